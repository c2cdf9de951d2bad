"""What another scheduler, or other settings of it, would have done to a search, told from its logs alone.

A replay lets the search's trials happen again on as many slots: every epoch takes the seconds it took, and a judge as
it is used in a search hears of each in turn. Whom it stops frees a slot. Nothing is trained, and beyond the end of a
trial's log nothing is known: a trial that a policy would have let go on is cut short there. Neither Ray nor torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from math import fsum
from typing import Final, assert_never

from tune_bisenet.config import Run
from tune_bisenet.records import Epoch, best_of
from tune_bisenet.report.read import SearchRecord, TrialRecord
from tune_bisenet.report.verdicts import Unit
from tune_bisenet.report.views import Cell, View, cost_basis
from tune_bisenet.rungs import (
    FIRST_SHARE,
    REDUCTION_FACTOR,
    Judge,
    MedianRule,
    Rungs,
    first_judged_epoch,
    no_rungs,
    rung_epochs,
    spared_rows,
)
from tune_bisenet.text import counted

FIRST_SHARES: Final = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
REDUCTION_FACTORS: Final = (2, 3, 4)
MOST_NAMED: Final = 3
"""Of policies that save the same, the words name so many."""


# --- what is tried ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fifo:
    """Only a diverged loss stops a trial."""

    def __str__(self) -> str:
        return "fifo"


@dataclass(frozen=True)
class Asha:
    """As `rungs.Rungs`."""

    first_share: float = FIRST_SHARE
    reduction_factor: int = REDUCTION_FACTOR

    def __str__(self) -> str:
        return f"asha (grace {self.first_share:g}, factor {self.reduction_factor})"


@dataclass(frozen=True)
class Median:
    """As `median.MedianRule`."""

    first_share: float = FIRST_SHARE

    def __str__(self) -> str:
        return f"median (grace {self.first_share:g})"


Policy = Fifo | Asha | Median

POLICIES: Final[tuple[Policy, ...]] = (
    Fifo(),
    *(Asha(share, factor) for factor in REDUCTION_FACTORS for share in FIRST_SHARES),
    *(Median(share) for share in FIRST_SHARES),
)
USED: Final[Mapping[str, Policy]] = {"fifo": Fifo(), "asha": Asha(), "median": Median()}
"""What a search is run with, by its `--scheduler`."""


def judge_of(policy: Policy, *, train_images: int, spared: frozenset[str]) -> Judge:
    """A judge that has seen nothing yet, as a search over so many training images would make it."""
    match policy:
        case Fifo():
            return Rungs(rungs_of=no_rungs)
        case Asha():
            return Rungs(
                rungs_of=partial(_rungs_on, train_images, policy),
                spared=spared,
                reduction_factor=policy.reduction_factor,
            )
        case Median():
            return MedianRule(judged_from=partial(_judged_from_on, train_images, policy), spared=spared)
        case _:
            assert_never(policy)


def _rungs_on(train_images: int, policy: Asha, run: Run) -> tuple[int, ...]:
    return rung_epochs(
        run,
        iterations_per_epoch=train_images // run.batch_size,
        first_share=policy.first_share,
        reduction_factor=policy.reduction_factor,
    )


def _judged_from_on(train_images: int, policy: Median, run: Run) -> int:
    return first_judged_epoch(run, iterations_per_epoch=train_images // run.batch_size, first_share=policy.first_share)


# --- what would have happened -----------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A search under one policy."""

    policy: Policy
    stopped: tuple[str, ...]
    """Trials that are compared and stopped; those that diverge end under every policy."""
    cut_short: tuple[str, ...]
    """Trials that would have gone on where their log ends."""
    epochs_share_saved: float
    """Of the epochs in the log, 0 to 1."""
    hours_saved: float
    """Device hours of the epochs in the log that are not trained."""
    keeps_winner: bool
    best_miou: float
    """The highest that any trial reaches until it ends."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A search under every policy, and what they are held against."""

    outcomes: tuple[Outcome, ...]
    used: Policy | None
    """What the search was run with; None for a scheduler that only a newer version knows."""
    winner: str
    """The trial of the highest best mIoU in the log."""
    winner_miou: float
    num_trials: int
    num_ended_early: int
    """Trials whose log ends before their last epoch, though they did not diverge."""
    num_epochs: int
    """In the log."""
    hours: float
    unit: Unit
    slots: int

    def most_saving(self) -> list[Outcome]:
        """Those that keep the winner and save most; more than one if they save the same, none if nothing is saved."""
        keeping = [one for one in self.outcomes if one.keeps_winner and one.hours_saved > 0]
        most = max((one.hours_saved for one in keeping), default=0.0)
        return [one for one in keeping if one.hours_saved == most]


def replay(search: SearchRecord) -> Replay | None:
    """None as long as no trial has gone to its last epoch: there is nobody to hold the others against."""
    trials = {name: record for name, record in search.trials.items() if record.epochs}
    if not any(_reached(record) == record.run.num_epochs for record in trials.values()):
        return None
    session = search.manifest.sessions[-1]
    devices, unit = cost_basis(session)
    known = [epoch for record in trials.values() for epoch in record.epochs]
    best = {name: best_of(record.epochs).miou for name, record in trials.items()}
    winner = max(best, key=best.__getitem__)
    slots = max(session.trials_at_once, 1)
    spared = spared_rows(search.rows)
    outcomes = []
    for policy in POLICIES:
        judge = judge_of(policy, train_images=search.manifest.data.train_images, spared=spared)
        trained = simulate(trials, judge, slots=slots)
        outcomes.append(_outcome(policy, trials, trained, judge=judge, winner=winner, devices=devices))
    return Replay(
        outcomes=tuple(outcomes),
        used=USED.get(search.manifest.choices.scheduler),
        winner=winner,
        winner_miou=best[winner],
        num_trials=len(trials),
        num_ended_early=sum(_ended_early(record) for record in trials.values()),
        num_epochs=len(known),
        hours=_hours(known, devices),
        unit=unit,
        slots=slots,
    )


def simulate(trials: Mapping[str, TrialRecord], judge: Judge, *, slots: int) -> dict[str, int]:
    """How many of its logged epochs each trial trains if `judge` hears of each when it ends.

    Trials, which have an epoch at least, start in their order on `slots` slots; one that is stopped or whose log ends
    frees its slot at once. Of epochs that end at the same moment, that of the trial started first is heard first.
    """
    waiting = iter(range(len(trials)))
    names, records = list(trials), list(trials.values())
    running: list[tuple[float, int, int]] = []  # when its current epoch ends, start order, epochs trained by then
    trained = dict.fromkeys(names, 0)

    def start_next(now: float) -> None:
        order = next(waiting, None)
        if order is not None:
            heappush(running, (now + records[order].epochs[0].seconds, order, 1))

    for _ in range(slots):
        start_next(0.0)
    while running:
        now, order, count = heappop(running)
        name, record = names[order], records[order]
        epoch = record.epochs[count - 1]
        trained[name] = count
        verdict = judge.judge(record.run, name, epoch=epoch.epoch, miou=epoch.miou, diverged=epoch.diverged)
        if verdict.stop or count == len(record.epochs):
            start_next(now)
        else:
            heappush(running, (now + record.epochs[count].seconds, order, count + 1))
    return trained


def _outcome(
    policy: Policy,
    trials: Mapping[str, TrialRecord],
    trained: Mapping[str, int],
    *,
    judge: Judge,
    winner: str,
    devices: float,
) -> Outcome:
    stopped = [name for name in trials if name in judge.stops and not trials[name].epochs[trained[name] - 1].diverged]
    known = sum(len(record.epochs) for record in trials.values())
    untrained = [epoch for name, record in trials.items() for epoch in record.epochs[trained[name] :]]
    return Outcome(
        policy=policy,
        stopped=tuple(stopped),
        cut_short=tuple(name for name, record in trials.items() if name not in judge.stops and _ended_early(record)),
        epochs_share_saved=len(untrained) / known,
        hours_saved=_hours(untrained, devices),
        keeps_winner=winner not in stopped,
        best_miou=max(best_of(record.epochs[: trained[name]]).miou for name, record in trials.items()),
    )


def _reached(record: TrialRecord) -> int:
    return record.epochs[-1].epoch


def _ended_early(record: TrialRecord) -> bool:
    return _reached(record) < record.run.num_epochs and not record.epochs[-1].diverged


def _hours(epochs: Iterable[Epoch], devices: float) -> float:
    return fsum(epoch.seconds for epoch in epochs) * devices / 3600


# --- in words ---------------------------------------------------------------------------------------------------


def replay_view(replayed: Replay | None) -> View:
    """A line for each policy. Marked: what the search was run with."""
    if replayed is None:
        return View(words="No trial has gone to its last epoch yet, so there is nothing to replay.")
    numbers = ("grace", "factor", "stops", "epochs saved", "hours saved", "best mIoU", "loss", "cut short")
    return View(
        words=" ".join(_sentences(replayed)),
        columns=("rule", *numbers[:5], "winner", *numbers[5:]),
        rows=tuple(_cells(outcome, replayed) for outcome in replayed.outcomes),
        numbers=frozenset(numbers),
    )


def _cells(outcome: Outcome, replayed: Replay) -> tuple[Cell, ...]:
    rule, *settings = _settings(outcome.policy)
    return (
        Cell(rule, marked=outcome.policy == replayed.used),
        *map(Cell, settings),
        Cell(str(len(outcome.stopped))),
        Cell(f"{outcome.epochs_share_saved:.0%}"),
        Cell(f"{outcome.hours_saved:,.2f}"),
        Cell("kept" if outcome.keeps_winner else "stopped"),
        Cell(f"{outcome.best_miou:.2f}"),
        Cell(f"{replayed.winner_miou - outcome.best_miou:.2f}"),
        Cell(str(len(outcome.cut_short))),
    )


def _settings(policy: Policy) -> tuple[str, str, str]:
    """Rule, grace share and reduction factor."""
    match policy:
        case Fifo():
            return "fifo", "", ""
        case Asha():
            return "asha", f"{policy.first_share:g}", str(policy.reduction_factor)
        case Median():
            return "median", f"{policy.first_share:g}", ""
        case _:
            assert_never(policy)


def _sentences(replayed: Replay) -> list[str]:
    return [
        f"What each rule would have done to this search, from its log alone: {counted(replayed.num_trials, 'trial')}, "
        f"{replayed.slots} at once, {counted(replayed.num_epochs, 'epoch')}, {replayed.hours:,.2f} {replayed.unit}.",
        f"The winner is {replayed.winner} with {replayed.winner_miou:.2f} % mIoU; the loss is in points below that.",
        _advice(replayed.most_saving()),
        *([f"Marked: {replayed.used}, which it was run with."] if replayed.used else []),
        "Grace is the share of its epochs that a trial has before it is judged; with factor 3, about one in three goes "
        "on from each rung.",
        *_doubts(replayed),
    ]


def _advice(outcomes: Sequence[Outcome]) -> str:
    if not outcomes:
        return "Nothing that keeps the winner saves anything."
    names = [str(one.policy) for one in outcomes]
    told = " or ".join([*names[:MOST_NAMED], *([f"{len(names) - MOST_NAMED} more"] if names[MOST_NAMED:] else [])])
    saved = outcomes[0].epochs_share_saved
    return f"Of those that keep the winner, {told} saves most: {saved:.0%} of the epochs, chosen in hindsight."


def _doubts(replayed: Replay) -> list[str]:
    """Where trials were stopped, what stopped them has also hidden whether it should have."""
    if not replayed.num_ended_early:
        return []
    return [
        f"{replayed.num_ended_early} of {replayed.num_trials} trials ended early in this log, and nobody knows what "
        "would have become of them: where they would have gone on they count as cut short, and no savings beyond the "
        "log are told. A search run with --scheduler fifo answers best."
    ]
