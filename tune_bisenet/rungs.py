"""When a trial ends early, the gentler way: its best mIoU so far lies below what others like it had on average.

The median stopping rule (Golovin et al., 2017, "Google Vizier: A Service for Black-Box Optimization", section 3.2.2),
judged after every epoch. mIoU grows, so the others' averages lag behind what they have by now: only who is far behind
is stopped. Vizier compares with completed trials; here count all that have come as far, since trials that run side by
side would else all go to their end. Plain data, as in `rungs`. Epochs count from 1; mIoU is in percent.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat
from typing import Any, Final, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.config import Run

FIRST_SHARE: Final = 0.4
"""The share of its epochs a run has before anything is decided: poly decay makes earlier mIoU a poor guide."""
REDUCTION_FACTOR: Final = 2
"""Rungs double, and about one trial in two goes on. Li et al. take 4; ten rows are few for that."""
MIN_OTHERS: Final = 3
"""Nobody is held against fewer: the median of one or two is chance. On ten rows and at a correlation of 0.7 this stops
the best row in 12 instead of 19 % of simulated searches, and saves 21 instead of 28 % of the epochs (`forecast`)."""
SWITCH_GRACE_SHARE: Final = 0.1
"""The share of its epochs a run has after its loss switch before it is judged."""
SIMULATED_TRIALS: Final = 50_000
"""A forecast simulates at most about so many trials in all: 0.3 s for 100 trials a search (2026-11-23, one core)."""


# --- where the rungs are ----------------------------------------------------------------------------------------


def rung_epochs(
    run: Run,
    *,
    iterations_per_epoch: int,
    first_share: float = FIRST_SHARE,
    reduction_factor: int = REDUCTION_FACTOR,
) -> tuple[int, ...]:
    """The epochs after which `run` may be stopped: 50 epochs have (20, 40); (40,) if the loss switches after epoch 35.

    Dropped, not moved, are rungs during warm-up and before the loss switch plus its grace: a rung that moved would
    compare with nobody. A rung at the last epoch would save nothing, so a run of one epoch has none.
    """
    assert reduction_factor >= 2, "rungs must grow"
    earliest = earliest_fair_epoch(run, iterations_per_epoch)
    rungs = []
    rung = epochs_of(first_share, run.num_epochs)
    while rung < run.num_epochs:
        if rung >= earliest:
            rungs.append(rung)
        rung *= reduction_factor
    return tuple(rungs)


def no_rungs(_run: Run) -> tuple[int, ...]:
    """First in, first out: nothing is compared, and only a diverged loss stops a trial."""
    return ()


def spared_rows(runs: Iterable[Run]) -> frozenset[str]:
    """The names of rows that another row's promise is measured against: stopping one would leave a gain unjudged."""
    promises = [run.expect for run in runs if run.expect is not None]
    return frozenset(row for promise in promises for row in (promise.over, promise.sooner_than) if row is not None)


def earliest_fair_epoch(run: Run, iterations_per_epoch: int) -> int:
    """The first epoch at whose end warm-up is over and, where the loss switches, the switch has had time to act."""
    warmed_up = math.ceil(run.schedule.warmup_iterations / iterations_per_epoch)
    if run.loss.lovasz_after is None:
        return warmed_up
    return max(warmed_up, run.loss.lovasz_after + epochs_of(SWITCH_GRACE_SHARE, run.num_epochs))


def epochs_of(share: float, num_epochs: int) -> int:
    """At least one epoch. Rounded first: 0.55 * 100 is a little over 55 in floating point and would give 56."""
    return math.ceil(round(share * num_epochs, 6))


# --- what was seen there, and the verdict -----------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """Whether a trial stops, and why, in words that fit a table's cell; no reason where it goes on."""

    stop: bool
    reason: str = ""


GO_ON: Final = Verdict(stop=False)


def diverged_at(epoch: int) -> str:
    """Why a trial whose loss is no longer a number is stopped, whatever the rule."""
    return f"the loss was no longer a number at epoch {epoch}"


class Judge(Protocol):
    """What hears of every epoch of every trial and says who stops. A verdict stands, over restarts too."""

    stops: dict[str, str]
    """Why each stopped trial was stopped."""

    def judge(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> Verdict:
        """The verdict on `trial` after `epoch`. An epoch that is reported again changes nothing."""

    def know(self, run: Run, trial: str, curve: Sequence[float]) -> None:
        """Have `trial` to compare with, as if heard: mIoU after epochs 1, 2, ... of an earlier search. Stops nobody.

        Epochs that are known are not judged when they are reported, so no trial of this search may bear its name.
        """

    def to_json(self) -> dict[str, Any]:
        """What was seen and decided, not the settings."""


@dataclass(kw_only=True)
class Rungs:
    """The judge of one search: what each trial had at its rungs, and who was stopped.

    Trials go by their unique name, which outlives the driver; `spared` and the runs' names are names of rows, so all
    seeds of a row are spared together. Only trials with the same number of epochs are compared.
    """

    rungs_of: Callable[[Run], tuple[int, ...]]
    """`partial(rung_epochs, iterations_per_epoch=743)`, or `no_rungs`."""
    spared: frozenset[str] = frozenset()
    """Rows that are recorded, so that others are compared with them, but stopped only if their loss diverges."""
    reduction_factor: int = REDUCTION_FACTOR
    min_others: int = MIN_OTHERS
    seen: dict[tuple[int, int], dict[str, float]] = field(default_factory=dict)
    """mIoU by (num_epochs, rung epoch), then by trial."""
    stops: dict[str, str] = field(default_factory=dict)
    """Why each stopped trial was stopped."""

    def judge(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> Verdict:
        """The verdict on `trial` after `epoch`; records its mIoU if that is one of its rungs.

        A verdict stands: a restarted trial that reports an epoch again, or goes on where it was stopped, gets the same.
        Only the rung's own epoch counts. A trial that resumes beyond a rung is not recorded there with a later mIoU,
        which would stop good trials that come after it (ray-project/ray#30838).
        """
        assert math.isfinite(miou), f"trial {trial} reported mIoU {miou} at epoch {epoch}"
        if trial in self.stops:
            return Verdict(stop=True, reason=self.stops[trial])
        if diverged:
            return self._stop(trial, diverged_at(epoch))
        if epoch not in self.rungs_of(run):
            return GO_ON
        return self._compare(run, trial, epoch, miou)

    def know(self, run: Run, trial: str, curve: Sequence[float]) -> None:
        """As `Judge.know`; only what `curve` has at the run's rungs."""
        for epoch in self.rungs_of(run):
            if epoch <= len(curve):
                self.seen.setdefault((run.num_epochs, epoch), {}).setdefault(trial, curve[epoch - 1])

    def to_json(self) -> dict[str, Any]:
        """What was seen and decided, not the settings."""
        rows = [
            {"num_epochs": num_epochs, "epoch": epoch, "trial": trial, "miou": miou}
            for (num_epochs, epoch), mious in self.seen.items()
            for trial, miou in mious.items()
        ]
        return {"seen": rows, "stops": dict(self.stops)}

    @classmethod
    def from_json(
        cls,
        record: Mapping[str, Any],
        *,
        rungs_of: Callable[[Run], tuple[int, ...]],
        spared: frozenset[str] = frozenset(),
        reduction_factor: int = REDUCTION_FACTOR,
        min_others: int = MIN_OTHERS,
    ) -> Self:
        """Go on from `to_json`. The settings come from the space, which may have grown since."""
        seen: dict[tuple[int, int], dict[str, float]] = {}
        for row in record["seen"]:
            seen.setdefault((row["num_epochs"], row["epoch"]), {})[row["trial"]] = row["miou"]
        return cls(
            rungs_of=rungs_of,
            spared=spared,
            reduction_factor=reduction_factor,
            min_others=min_others,
            seen=seen,
            stops=dict(record["stops"]),
        )

    def _compare(self, run: Run, trial: str, epoch: int, miou: float) -> Verdict:
        """Record `miou` and hold it against the others' (1 - 1/rf) quantile; ties and the first few to arrive go on."""
        mious = self.seen.setdefault((run.num_epochs, epoch), {})
        if trial in mious:
            return GO_ON
        others = tuple(mious.values())
        mious[trial] = miou
        if len(others) < self.min_others or run.name in self.spared:
            return GO_ON
        share = 1 - 1 / self.reduction_factor
        cutoff = quantile(others, share)
        if miou >= cutoff:
            return GO_ON
        return self._stop(trial, _below(miou, epoch, cutoff, share, len(others)))

    def _stop(self, trial: str, reason: str) -> Verdict:
        self.stops[trial] = reason
        return Verdict(stop=True, reason=reason)


def quantile(values: Collection[float], share: float) -> float:
    """The `share` quantile, linear between neighbours: numpy's default, a hundred times faster on ten values."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (position - below) * (ordered[above] - ordered[below])


def _below(miou: float, epoch: int, cutoff: float, share: float, num_others: int) -> str:
    which = "median" if share == 0.5 else f"{share:.0%} quantile"
    others = "other" if num_others == 1 else "others"
    return f"mIoU {miou:.2f} at epoch {epoch}, below {cutoff:.2f}, the {which} of {num_others} {others} (ASHA)"


# --- what to expect of it ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What stopping early may save, and what it may cost, under a simple assumption about mIoU."""

    epochs_share_saved: float
    """Of the epochs of all trials, 0 to 1; the mean over simulated searches."""
    probability_best_stopped: float
    """How often, 0 to 1, the trial that would have ended best is stopped."""
    correlation: float
    """Assumed between the mIoU at any rung and the final one, over trials."""
    simulations: int

    def __str__(self) -> str:
        return (
            f"may save {self.epochs_share_saved:.0%} of the epochs; if a rung's mIoU correlates {self.correlation:g} "
            f"with the final one, it stops the truly best row in {self.probability_best_stopped:.0%} of searches"
        )


def forecast(
    runs: Sequence[Run],
    iterations_per_epoch: int,
    *,
    correlation: float = 0.7,
    min_others: int = MIN_OTHERS,
    simulations: int = 2000,
    seed: int = 0,
) -> Forecast:
    """Simulate searches over `runs`, one run a trial, in the order they are declared.

    Final scores are standard normal; a rung's score correlates `correlation` with the final one and is otherwise
    independent of the other rungs'. An epoch takes all trials equally long, so they reach every rung in the declared
    order however many run at once. Searches over many trials are simulated less often: the effort stays the same.
    """
    assert runs, "a search has at least one run"
    assert -1 <= correlation <= 1, f"{correlation} is no correlation"
    rungs_of = partial(rung_epochs, iterations_per_epoch=iterations_per_epoch)
    simulations = max(1, min(simulations, SIMULATED_TRIALS // len(runs)))
    rng = np.random.default_rng(seed)
    num_rungs = max(len(rungs_of(run)) for run in runs)
    names = [str(trial) for trial in range(len(runs))]
    spared = spared_rows(runs)
    trained = best_stopped = 0
    for _ in range(simulations):
        final, scores = _draw(rng, len(runs), num_rungs, correlation)
        judge = Rungs(rungs_of=rungs_of, spared=spared, min_others=min_others)
        trained += sum(map(_trained_epochs, runs, names, scores, repeat(judge)))
        best_stopped += names[final.argmax()] in judge.stops
    return Forecast(
        epochs_share_saved=1 - trained / (simulations * sum(run.num_epochs for run in runs)),
        probability_best_stopped=best_stopped / simulations,
        correlation=correlation,
        simulations=simulations,
    )


def _draw(
    rng: np.random.Generator, num_trials: int, num_rungs: int, correlation: float
) -> tuple[NDArray[np.float64], list[list[float]]]:
    """Each trial's final score, and its score at each of its rungs."""
    final = rng.standard_normal(num_trials)
    noise = rng.standard_normal((num_trials, num_rungs))
    scores = correlation * final[:, None] + math.sqrt(1 - correlation**2) * noise
    return final, scores.tolist()


def _trained_epochs(run: Run, trial: str, scores: Sequence[float], judge: Rungs) -> int:
    """How many epochs `trial` trains with these scores at its rungs."""
    for epoch, score in zip(judge.rungs_of(run), scores, strict=False):
        if judge.judge(run, trial, epoch=epoch, miou=score).stop:
            return epoch
    return run.num_epochs


def first_judged_epoch(run: Run, *, iterations_per_epoch: int, first_share: float = FIRST_SHARE) -> int:
    """The first epoch after which `run` may be stopped: 20 of 50, but 40 if the loss switches after epoch 35."""
    return max(epochs_of(first_share, run.num_epochs), earliest_fair_epoch(run, iterations_per_epoch))


@dataclass(kw_only=True)
class MedianRule:
    """The judge of one search, a `rungs.Judge`: what each trial had after each epoch, and who was stopped.

    Trials go by their unique name, rows by theirs, and only trials with the same number of epochs are compared.
    """

    judged_from: Callable[[Run], int]
    """`partial(first_judged_epoch, iterations_per_epoch=743)`."""
    spared: frozenset[str] = frozenset()
    """Rows that others are compared with, but that are stopped only if their loss diverges."""
    min_others: int = MIN_OTHERS
    seen: dict[int, dict[str, dict[int, float]]] = field(default_factory=dict)
    """mIoU by num_epochs, then by trial, then by epoch; missing is what a driver that died did not hear of."""
    stops: dict[str, str] = field(default_factory=dict)
    """Why each stopped trial was stopped."""

    def judge(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> Verdict:
        """The verdict on `trial` after `epoch`, whose mIoU is recorded; the last epoch is not worth one.

        A verdict stands: a restarted trial that reports an epoch again, or goes on where it was stopped, gets the same.
        """
        assert math.isfinite(miou), f"trial {trial} reported mIoU {miou} at epoch {epoch}"
        if trial in self.stops:
            return Verdict(stop=True, reason=self.stops[trial])
        if diverged:
            return self._stop(trial, diverged_at(epoch))
        own = self._curve(run, trial)
        if epoch in own:
            return GO_ON
        own[epoch] = miou
        if run.name in self.spared or not self.judged_from(run) <= epoch < run.num_epochs:
            return GO_ON
        return self._compare(run, trial, epoch)

    def know(self, run: Run, trial: str, curve: Sequence[float]) -> None:
        """As `Judge.know`; all of `curve`."""
        own = self._curve(run, trial)
        for epoch, miou in enumerate(curve, start=1):
            own.setdefault(epoch, miou)

    def to_json(self) -> dict[str, Any]:
        """What was seen and decided, not the settings. `curve` holds epochs 1, 2, ...; null where nothing was heard."""
        rows = [
            {"num_epochs": num_epochs, "trial": trial, "curve": [curve.get(n) for n in range(1, max(curve) + 1)]}
            for num_epochs, curves in self.seen.items()
            for trial, curve in curves.items()
            if curve
        ]
        return {"seen": rows, "stops": dict(self.stops)}

    @classmethod
    def from_json(
        cls,
        record: Mapping[str, Any],
        *,
        judged_from: Callable[[Run], int],
        spared: frozenset[str] = frozenset(),
        min_others: int = MIN_OTHERS,
    ) -> Self:
        """Go on from `to_json`. The settings come from the space, which may have grown since."""
        seen: dict[int, dict[str, dict[int, float]]] = {}
        for row in record["seen"]:
            heard = {epoch: miou for epoch, miou in enumerate(row["curve"], start=1) if miou is not None}
            seen.setdefault(row["num_epochs"], {})[row["trial"]] = heard
        return cls(
            judged_from=judged_from, spared=spared, min_others=min_others, seen=seen, stops=dict(record["stops"])
        )

    def _curve(self, run: Run, trial: str) -> dict[int, float]:
        return self.seen.setdefault(run.num_epochs, {}).setdefault(trial, {})

    def _compare(self, run: Run, trial: str, epoch: int) -> Verdict:
        """Hold the best heard of `trial` against the median of the others; ties and the first few to arrive go on."""
        curves = self.seen[run.num_epochs]
        sums = [_sum(curve, epoch) for other, curve in curves.items() if other != trial and _is_whole(curve, epoch)]
        if len(sums) < self.min_others:
            return GO_ON
        best = max(miou for number, miou in curves[trial].items() if number <= epoch)
        median_sum = quantile(sums, 0.5)
        # Not divided: rounding could let a curve that is flat lie below the average of one just like it.
        if best * epoch >= median_sum:
            return GO_ON
        return self._stop(trial, _median_below(best, epoch, median_sum / epoch, len(sums)))

    def _stop(self, trial: str, reason: str) -> Verdict:
        self.stops[trial] = reason
        return Verdict(stop=True, reason=reason)


def _is_whole(curve: Mapping[int, float], epoch: int) -> bool:
    """Whether all epochs until `epoch` are known: an average over the later ones alone would be too high."""
    return all(number in curve for number in range(1, epoch + 1))


def _sum(curve: Mapping[int, float], epoch: int) -> float:
    return math.fsum(curve[number] for number in range(1, epoch + 1))


def _median_below(best: float, epoch: int, cutoff: float, num_others: int) -> str:
    others = "other's running average" if num_others == 1 else "others' running averages"
    return f"best mIoU {best:.2f} until epoch {epoch}, below {cutoff:.2f}, the median of {num_others} {others}"
