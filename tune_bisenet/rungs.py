"""When a trial ends early: two stopping rules, what they have seen, and what a rule may save and cost.

A `StoppingRule` is settings alone, so the same objects serve the search, its forecast and the replay of its logs. A
`Stopper` applies one rule to the trials of one search. Epochs count from 1; mIoU is in percent.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.config import Run

FIRST_SHARE: Final = 0.4
"""The share of its epochs a run has before anything is decided: poly decay makes earlier mIoU a poor guide."""
REDUCTION_FACTOR: Final = 2
"""Rungs double, and about one trial in two continues. Li et al. take 4; ten rows are few for that."""
MIN_PEERS: Final = 3
"""No trial is compared with fewer: the median of one or two is chance. On ten rows and at a correlation of 0.7 this
stops the best row in 12 instead of 19 % of simulated searches, and saves 21 instead of 28 % of the epochs
(`forecast`)."""
SWITCH_GRACE_SHARE: Final = 0.1
"""The share of its epochs a run has after its loss switch before it is judged."""
SIMULATED_TRIALS: Final = 200_000
"""A forecast simulates at most about this many trials for each correlation."""
LEAST_SIMULATIONS: Final = 300
"""In which a row ends best: the lowest and the highest of risks from fewer would be chance."""
CORRELATIONS: Final = (0.3, 0.5, 0.7)
"""Assumed between the mIoU at a rung and the final one, over trials. Published logs of 30 trainings of another small
real-time net (RegSeg, 500 epochs on Cityscapes) have 0.30 at 40 % of the epochs, 95 % interval about -0.07 to 0.60."""

Curves = Mapping[str, Mapping[int, float]]
"""By trial, mIoU by epoch."""


@dataclass(frozen=True, kw_only=True)
class StoppingRule(ABC):
    """The settings of a rule, and the rule itself as pure functions of what was seen."""

    first_share: float = FIRST_SHARE
    min_peers: int = MIN_PEERS

    @abstractmethod
    def recorded_epochs(self, run: Run, iterations_per_epoch: int) -> Collection[int]:
        """Return the epochs whose mIoU is kept, for this run's comparison and for that of its peers."""

    @abstractmethod
    def judged_epochs(self, run: Run, iterations_per_epoch: int) -> Collection[int]:
        """Return the epochs after which `run` may be stopped, never the last: stopping there saves nothing."""

    @abstractmethod
    def objection(self, curves: Curves, trial: str, epoch: int, *, first: int) -> str:
        """Return why `trial` should stop after `epoch`, for a table's cell; empty if it should continue.

        `first` is the first of its judged epochs.
        """


@dataclass(frozen=True, kw_only=True)
class AshaRule(StoppingRule):
    """Stop a trial that at a rung is below the (1 - 1 / `reduction_factor`) quantile of those that came before it.

    Asynchronous successive halving (Li et al., 2020, arXiv:1810.05934) in the form that stops trials and never pauses
    them, and that is fair to warm-up, loss switches and restarts.
    """

    reduction_factor: int = REDUCTION_FACTOR

    def __str__(self) -> str:
        return f"asha (grace {self.first_share:g}, factor {self.reduction_factor})"

    def recorded_epochs(self, run: Run, iterations_per_epoch: int) -> Collection[int]:
        return self.judged_epochs(run, iterations_per_epoch)

    def judged_epochs(self, run: Run, iterations_per_epoch: int) -> tuple[int, ...]:
        """Return the rungs: 50 epochs have (20, 40), or (40,) if the loss switches after epoch 35.

        Rungs during warm-up, and before the loss switch plus its grace, are dropped and not moved: a moved rung would
        have no peers. A run of one epoch has none.
        """
        assert self.reduction_factor >= 2, "rungs must grow"
        earliest = earliest_fair_epoch(run, iterations_per_epoch)
        rungs = []
        rung = epochs_of(self.first_share, run.num_epochs)
        while rung < run.num_epochs:
            if rung >= earliest:
                rungs.append(rung)
            rung *= self.reduction_factor
        return tuple(rungs)

    def objection(self, curves: Curves, trial: str, epoch: int, *, first: int) -> str:
        """Compare mIoU at the rung; ties and the first few to arrive continue."""
        miou = curves[trial][epoch]
        peers = [curve[epoch] for other, curve in curves.items() if other != trial and epoch in curve]
        share = 1 - 1 / self.reduction_factor
        if len(peers) < self.min_peers or miou >= (cutoff := quantile(peers, share)):
            return ""
        which = "median" if share == 0.5 else f"{share:.0%} quantile"
        others = "other" if len(peers) == 1 else "others"
        return f"mIoU {miou:.2f} at epoch {epoch}, below {cutoff:.2f}, the {which} of {len(peers)} {others} (ASHA)"


@dataclass(frozen=True, kw_only=True)
class MedianRule(StoppingRule):
    """Stop a trial whose best mIoU so far is below the median of its peers' running averages, after every epoch.

    The median stopping rule (Golovin et al., 2017, "Google Vizier", section 3.2.2), averages taken from the first epoch
    after which the trial may be stopped. mIoU grows, so they lag behind, and a trial must be behind to stop. Vizier
    compares with completed trials; here all that have come as far count, since trials that run side by side would
    otherwise all complete.
    """

    def __str__(self) -> str:
        return f"median (grace {self.first_share:g})"

    def recorded_epochs(self, run: Run, iterations_per_epoch: int) -> Collection[int]:
        return range(1, run.num_epochs + 1)

    def judged_epochs(self, run: Run, iterations_per_epoch: int) -> range:
        """Return the epochs from 20 of 50 on, or from 40 on if the loss switches after epoch 35."""
        first = max(epochs_of(self.first_share, run.num_epochs), earliest_fair_epoch(run, iterations_per_epoch))
        return range(first, run.num_epochs)

    def objection(self, curves: Curves, trial: str, epoch: int, *, first: int) -> str:
        """Compare with peers whose curve has no gap from `first` to `epoch`: averages of other epochs do not compare.

        Earlier epochs do not count: with the steep start of every curve in them, the averages would stop nothing.
        """
        span = range(first, epoch + 1)
        peers = [curve for other, curve in curves.items() if other != trial and all(number in curve for number in span)]
        if len(peers) < self.min_peers:
            return ""
        best = max(miou for number, miou in curves[trial].items() if number <= epoch)
        median_sum = quantile([math.fsum(curve[number] for number in span) for curve in peers], 0.5)
        # Not divided: rounding could put a flat curve below the average of an equal one.
        if best * len(span) >= median_sum:
            return ""
        others = "other's running average" if len(peers) == 1 else "others' running averages"
        return (
            f"best mIoU {best:.2f} until epoch {epoch}, below {median_sum / len(span):.2f}, "
            f"the median of {len(peers)} {others} since epoch {first}"
        )


RULES: Final[Mapping[str, StoppingRule | None]] = {"fifo": None, "asha": AshaRule(), "median": MedianRule()}
"""By `--scheduler`; with None, first in, first out, only a diverged loss stops a trial."""


def protected_rows(runs: Iterable[Run]) -> frozenset[str]:
    """Return the names of rows that a claim is measured against: stopping one would leave a gain unjudged."""
    expectations = [run.expect for run in runs if run.expect is not None]
    names = [name for expect in expectations for name in (expect.over, expect.sooner_than)]
    return frozenset(name for name in names if name is not None)


def earliest_fair_epoch(run: Run, iterations_per_epoch: int) -> int:
    """Return the first epoch at whose end warm-up is over and a loss switch, if any, has had time to act."""
    warmed_up = math.ceil(run.schedule.warmup_iterations / iterations_per_epoch)
    if run.loss.lovasz_after is None:
        return warmed_up
    return max(warmed_up, run.loss.lovasz_after + epochs_of(SWITCH_GRACE_SHARE, run.num_epochs))


def epochs_of(share: float, num_epochs: int) -> int:
    """Return at least one epoch. Rounded first: 0.55 * 100 is a little over 55 in floating point and would give 56."""
    return math.ceil(round(share * num_epochs, 6))


def quantile(values: Collection[float], share: float) -> float:
    """Return the `share` quantile, linear between neighbours: numpy's default, 100 times faster on ten values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


@dataclass(kw_only=True)
class Stopper:
    """One rule over the trials of one search: what each trial reached, and which were stopped.

    Trials have unique names, which outlive the driver. Only trials with the same number of epochs are compared.
    """

    rule: StoppingRule | None
    """None stops diverged trials alone."""
    iterations_per_epoch: Callable[[Run], int]
    protected: frozenset[str] = frozenset()
    """Rows, with all their seeds, that others are compared with, but that stop only if their loss diverges."""
    seen: dict[int, dict[str, dict[int, float]]] = field(default_factory=dict)
    """mIoU by num_epochs, then by trial, then by epoch."""
    stops: dict[str, str] = field(default_factory=dict)
    """Why each stopped trial was stopped."""

    def decide(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> str:
        """Return why `trial` stops after `epoch`, empty if it continues; record its mIoU if the rule needs it.

        A diverged epoch has no mIoU: it stops its trial, and no other trial is compared with it.
        Decisions are final: a restarted trial that reports an epoch again, or resumes where it was stopped, gets the
        same one. A trial that resumes beyond a rung is not recorded there with a later mIoU, which would stop good
        trials that come after it (ray-project/ray#30838).
        """
        if trial in self.stops:
            return self.stops[trial]
        if diverged:
            self.stops[trial] = f"loss or weights were no longer numbers at epoch {epoch}"
            return self.stops[trial]
        assert math.isfinite(miou), f"trial {trial} reported mIoU {miou} at epoch {epoch}"
        if self.rule is None or epoch not in self.rule.recorded_epochs(run, self.iterations_per_epoch(run)):
            return ""
        curves = self.seen.setdefault(run.num_epochs, {})
        own = curves.setdefault(trial, {})
        if epoch in own:
            return ""
        own[epoch] = miou
        judged = self.rule.judged_epochs(run, self.iterations_per_epoch(run))
        if run.name in self.protected or epoch not in judged:
            return ""
        if reason := self.rule.objection(curves, trial, epoch, first=min(judged)):
            self.stops[trial] = reason
        return reason

    def add_known(self, run: Run, trial: str, curve: Sequence[float]) -> None:
        """Add a trial of an earlier search or session to compare with: mIoU after epochs 1, 2, ...; it stops no trial.

        Known epochs are not judged when they are reported, so no trial of this search may have the name of another's.
        """
        if self.rule is None:
            return
        recorded = self.rule.recorded_epochs(run, self.iterations_per_epoch(run))
        known = {epoch: miou for epoch, miou in enumerate(curve, start=1) if epoch in recorded}
        if known:
            curves = self.seen.setdefault(run.num_epochs, {})
            curves[trial] = known | curves.get(trial, {})

    def to_json(self) -> dict[str, Any]:
        """Return what was seen and decided, not the settings."""
        rows = [
            {"num_epochs": num_epochs, "trial": trial, "miou": {str(epoch): miou for epoch, miou in curve.items()}}
            for num_epochs, curves in self.seen.items()
            for trial, curve in curves.items()
        ]
        return {"seen": rows, "stops": dict(self.stops)}

    def restored(self, record: Mapping[str, Any]) -> Self:
        """Return a stopper with these settings, which may be newer, and the state of `to_json`."""
        seen: dict[int, dict[str, dict[int, float]]] = {}
        for row in record["seen"]:
            curve = {int(epoch): miou for epoch, miou in row["miou"].items()}
            seen.setdefault(row["num_epochs"], {})[row["trial"]] = curve
        return replace(self, seen=seen, stops=dict(record["stops"]))


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Says what stopping early may save, what it may cost, and which rows bear that; shares are from 0 to 1."""

    epochs_share_saved: float
    """Of the epochs of all trials; the mean over simulated searches, whose correlation hardly matters to it."""
    best_stopped: Mapping[float, float]
    """By correlation, how often the trial that would have ended best is stopped."""
    risk_by_row: Mapping[float, Mapping[str, float]]
    """By correlation and row, how often the row's trial is stopped if it would have ended best."""
    never_stopped: tuple[str, ...]
    """Rows of which no simulated search stops any trial."""
    simulations_of_row: int
    """The least number, at each correlation, in which a trial of one row would have ended best."""

    def __str__(self) -> str:
        if not self.epochs_share_saved:
            return "can stop none of these trials"
        return (
            f"may save {self.epochs_share_saved:.0%} of the epochs, and stops the truly best row in "
            f"{_either(f'{share:.0%}' for share in self.best_stopped.values())} of searches, if a rung's mIoU "
            f"correlates {_either(f'{correlation:g}' for correlation in self.best_stopped)} with the final one"
        )

    @property
    def bearers(self) -> str:
        """Say which rows are never stopped, and how often the others are; empty if none is stopped."""
        if not self.epochs_share_saved:
            return ""
        at_risk = [
            [risk for name, risk in risks.items() if name not in self.never_stopped]
            for risks in self.risk_by_row.values()
        ]
        never = ", ".join(self.never_stopped)
        safe = f"never {never} (protected, first to arrive, or without a rung); any other row" if never else "any row"
        if self.simulations_of_row < LEAST_SIMULATIONS:
            return f"at equal speed, {safe} may be stopped"
        ranges = _either(f"{min(risks):.0%} to {max(risks):.0%}" for risks in at_risk)
        return f"at equal speed, {safe}, when it is the best, in {ranges} of searches"


def _either(texts: Iterable[str]) -> str:
    *most, last = texts
    return f"{', '.join(most)} or {last}" if most else last


def forecast(
    runs: Sequence[Run],
    iterations_per_epoch: int,
    *,
    rule: AshaRule = AshaRule(),
    correlations: Sequence[float] = CORRELATIONS,
    simulations: int = 20_000,
    seed: int = 0,
) -> Forecast:
    """Simulate searches over `runs`, one run a trial, in the order they are declared.

    Final scores are standard normal; a rung's score correlates by so much with the final one and is otherwise
    independent of the other rungs'. An epoch takes all trials equally long, so they reach every rung in the declared
    order however many run at once. `simulations` are those of each correlation, and each trial ends best in equally
    many of them; searches over many trials are simulated less often.
    """
    assert runs, "a search has at least one run"
    assert all(-1 <= correlation <= 1 for correlation in correlations), f"{correlations}, expected -1 to 1"
    rounds = max(1, min(simulations, SIMULATED_TRIALS // len(runs)) // len(runs))
    best = np.tile(np.arange(len(runs)), rounds)
    rungs = [rule.judged_epochs(run, iterations_per_epoch) for run in runs]
    shape, rng = (len(best), len(runs), max(map(len, rungs))), np.random.default_rng(seed)
    ends = {
        correlation: simulate_ends(runs, rungs, rule, _simulated_scores(rng, best, shape, correlation))
        for correlation in correlations
    }
    names, num_epochs = np.array([run.name for run in runs]), np.array([run.num_epochs for run in runs])
    is_stopped = {correlation: end < num_epochs for correlation, end in ends.items()}
    stops_best = {correlation: stops[np.arange(len(best)), best] for correlation, stops in is_stopped.items()}
    trials = {name: np.flatnonzero(names == name) for name in dict.fromkeys(names.tolist())}
    return Forecast(
        epochs_share_saved=float(1 - np.mean(list(ends.values()), axis=(0, 1)).sum() / num_epochs.sum()),
        best_stopped={correlation: float(stops.mean()) for correlation, stops in stops_best.items()},
        risk_by_row={
            correlation: {name: float(stops[np.isin(best, own)].mean()) for name, own in trials.items()}
            for correlation, stops in stops_best.items()
        },
        never_stopped=tuple(
            name for name, own in trials.items() if not any(stops[:, own].any() for stops in is_stopped.values())
        ),
        simulations_of_row=rounds * min(map(len, trials.values())),
    )


def _simulated_scores(
    rng: np.random.Generator, best: NDArray[np.int64], shape: tuple[int, int, int], correlation: float
) -> NDArray[np.float64]:
    """Return scores at rungs, searches x trials x rungs, for searches in which the trial `best` would end best."""
    final, searches = rng.standard_normal(shape[:2]), np.arange(len(best))
    highest = final.argmax(1)
    final[searches, highest], final[searches, best] = final[searches, best], final[searches, highest]
    return correlation * final[:, :, None] + math.sqrt(1 - correlation**2) * rng.standard_normal(shape)


def simulate_ends(
    runs: Sequence[Run], rungs: Sequence[Sequence[int]], rule: AshaRule, scores: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the epoch at which each trial of each search ends: what a `Stopper` decides, for all searches at once.

    `scores` are searches x trials x rungs.
    """
    protected = protected_rows(runs)
    ends = np.tile([run.num_epochs for run in runs], (len(scores), 1))
    arrived: dict[tuple[int, int], list[NDArray[np.float64]]] = {}  # NaN where a trial was stopped before
    for trial, run in enumerate(runs):
        for rung, epoch in enumerate(rungs[trial]):
            own = np.where(ends[:, trial] == run.num_epochs, scores[:, trial, rung], np.nan)
            peers = arrived.setdefault((run.num_epochs, epoch), [])
            if run.name not in protected and len(peers) >= rule.min_peers:
                ordered = np.sort(np.stack(peers, axis=1), axis=1)  # NaN comes last
                num_peers = np.isfinite(ordered).sum(1)
                position = (1 - 1 / rule.reduction_factor) * np.maximum(num_peers - 1, 0)
                below = position.astype(int)
                above = np.minimum(below + 1, np.maximum(num_peers - 1, 0))
                low, high = (np.take_along_axis(ordered, index[:, None], 1)[:, 0] for index in (below, above))
                falls_short = (num_peers >= rule.min_peers) & (own < low + (position - below) * (high - low))
                ends[falls_short, trial] = epoch
            peers.append(own)
    return ends
