"""What a search will take, found by arithmetic: seconds of trials, time on the clock, bytes on disks.

    Kind, kinds_of           what decides how long an epoch takes
    Timed, Measured          how fast trials train, and how that is known
    trial_seconds, makespan  from a speed to the time of one trial, and of all over a cluster
    pack_bytes               disk of a node
    Work                     the trials that are left

Neither words nor files, and no torch: where speeds come from is not known here.
"""

import heapq
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final, NamedTuple, Protocol

from tune_bisenet.config import Run
from tune_bisenet.data.packed import FORMAT_VERSION, Header
from tune_bisenet.data.source import Split
from tune_bisenet.records import ENDED_WELL, TrialState
from tune_bisenet.spaces import DataFacts

VAL_SHARE: Final = 1 / 3
"""What validating an image takes of the time of training on it, where only the latter is known: a forward pass of the
main path is 59 of the 177 GFLOP of a training image (counted at 512x1024)."""

KEEPING_SECONDS: Final = 0.6
"""What an epoch takes beside training and validation, mostly for writing weights: 0.3 to 0.9 over 24 epochs on two
busy cores and a local disk (2026-11-23)."""

TRIAL_SECONDS: Final = 0.24
"""What a trial takes beside its epochs: 0.84 with one epoch's keeping (benchmarks/results.md)."""


# --- kinds of epochs ------------------------------------------------------------------------------------------------


class Kind(NamedTuple):
    """Epochs of one kind take equally long on the same data. Rates, weights of classes and heads cost nothing."""

    image_size: tuple[int, int]
    head_width: int
    batch_size: int
    lovasz: bool
    """Whether the main head has switched."""
    hard_pixels: bool


def kinds_of(run: Run) -> list[Kind]:
    """The kind of each epoch, the first one first."""
    return [_kind(run, epoch) for epoch in range(1, run.num_epochs + 1)]


def _kind(run: Run, epoch: int) -> Kind:
    switch = run.loss.lovasz_after
    return Kind(
        image_size=run.image_size,
        head_width=run.head_width,
        batch_size=run.batch_size,
        lovasz=switch is not None and epoch > switch,
        hard_pixels=run.loss.kind == "ohem",
    )


def commonest(runs: Iterable[Run]) -> list[Kind]:
    """All kinds of epochs, those that are trained most often first."""
    return [kind for kind, _count in Counter(kind for run in runs for kind in kinds_of(run)).most_common()]


# --- speeds ---------------------------------------------------------------------------------------------------------


class Speed(Protocol):
    """How fast trials train beside one another."""

    def epoch_seconds(self, run: Run, epoch: int, facts: DataFacts) -> float:
        """Training and validation of `epoch`, from 1."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of one image, by kind of epoch. A trial's own, while others run beside it."""

    train: float
    val: float
    spread: float = 0.0
    """Half the range over repeats, as a share of the median."""


@dataclass(frozen=True)
class Timed:
    """By images: from a probe, or from a number that was given."""

    timings: Mapping[Kind, Timing]

    def epoch_seconds(self, run: Run, epoch: int, facts: DataFacts) -> float:
        timing = self.timing(_kind(run, epoch))
        trained = facts.num_train // run.batch_size * run.batch_size
        return trained * timing.train + facts.num_val * timing.val

    def timing(self, kind: Kind) -> Timing:
        """That of the kind; else of the one most like it, in proportion to the pixels."""
        nearest = max(self.timings, key=lambda other: sum(mine == its for mine, its in zip(kind, other, strict=True)))
        known, ratio = self.timings[nearest], math.prod(kind.image_size) / math.prod(nearest.image_size)
        return Timing(train=known.train * ratio, val=known.val * ratio, spread=known.spread)

    @property
    def spread(self) -> float:
        """The largest of any kind."""
        return max(timing.spread for timing in self.timings.values())


def given_speed(images_per_second: float, run: Run) -> Timed:
    """Of a trial in training, at the run's size and with the loss that it begins with."""
    return Timed(
        {_kind(run, 1): Timing(train=1 / images_per_second, val=VAL_SHARE / images_per_second)},
    )


@dataclass(frozen=True)
class Measured:
    """By epochs that this search has trained already: seconds of one, by row, each known as the mean of its trials."""

    seconds: Mapping[str, float]

    def epoch_seconds(self, run: Run, epoch: int, facts: DataFacts) -> float:
        """That of the row, or of all rows."""
        return self.seconds.get(run.name, self.mean)

    @property
    def mean(self) -> float:
        return math.fsum(self.seconds.values()) / len(self.seconds)


def measured_speed(standings: Iterable[TrialState]) -> Measured | None:
    """None before an epoch was trained."""
    by_row: dict[str, list[TrialState]] = {}
    for standing in standings:
        if standing.epochs:
            by_row.setdefault(standing.run, []).append(standing)
    known = {
        row: sum(trial.seconds for trial in trials) / sum(trial.epochs for trial in trials)
        for row, trials in by_row.items()
    }
    return Measured(known) if known else None


# --- time -----------------------------------------------------------------------------------------------------------


def trial_seconds(run: Run, speed: Speed, facts: DataFacts, *, epochs_done: int = 0) -> float:
    """From where the trial stands to its last epoch."""
    epochs = range(epochs_done + 1, run.num_epochs + 1)
    return TRIAL_SECONDS + math.fsum(KEEPING_SECONDS + speed.epoch_seconds(run, epoch, facts) for epoch in epochs)


def makespan(durations: Iterable[float], *, at_once: int) -> float:
    """When the last has ended, if each in its order starts as soon as one of `at_once` places is free."""
    free_at = [0.0] * at_once
    for duration in durations:
        heapq.heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


# --- disk -----------------------------------------------------------------------------------------------------------


def pack_bytes(facts: DataFacts, *, image_size: tuple[int, int], frame_size: tuple[int, int]) -> int:
    """What the packed frames of both splits take on each node's disk; names and headers are next to nothing."""
    sizes: Sequence[tuple[Split, int, tuple[int, int]]] = (
        ("train", facts.num_train, image_size),
        ("val", facts.num_val, frame_size),
    )
    return sum(number * _row_bytes(split, image_size, label_size) for split, number, label_size in sizes)


def _row_bytes(split: Split, image_size: tuple[int, int], label_size: tuple[int, int]) -> int:
    return Header(FORMAT_VERSION, "", "", split, 1, image_size, label_size).row_bytes


# --- what there is to train -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Work:
    """The trials of a search that have not ended, in their order; those still to be drawn are stood in for."""

    left: tuple[tuple[Run, int], ...]
    """Each with the epochs that it has done."""
    runs: tuple[Run, ...]
    """Of all trials, ended ones included."""
    endless: bool = False
    """Only time or money bounds the search: these trials are a sample of it."""

    @property
    def epochs(self) -> int:
        return sum(run.num_epochs - done for run, done in self.left)

    def seconds(self, speed: Speed, facts: DataFacts) -> list[float]:
        """Of each trial, trained to its end."""
        return [trial_seconds(run, speed, facts, epochs_done=done) for run, done in self.left]


ENDLESS_SAMPLE: Final = 100


def grid_work(runs: Sequence[Run], standings: Iterable[TrialState], *, only: Collection[str] | None = None) -> Work:
    """Of declared runs; `standings` are those of earlier sessions. The session may be about the rows `only`."""
    known = {(standing.run, standing.seed): standing for standing in standings}
    left = []
    for run in runs:
        standing = known.get((run.name, run.seed))
        has_ended = standing is not None and standing.status in ENDED_WELL
        if not has_ended and (only is None or run.name in only):
            left.append((run, standing.epochs if standing else 0))
    return Work(left=tuple(left), runs=tuple(runs))


def sampled_work(
    begun: Sequence[Run],
    rows: Sequence[Run],
    drawn: Sequence[Run],
    standings: Iterable[TrialState],
    *,
    limit: int | None,
    fresh: int = 0,
) -> Work:
    """Of a study that has `begun` some trials, has these `rows` before it, and draws the others at random.

    `limit` is on all of them together; `fresh` are trials after them. None for a limit makes it endless.
    """
    number = ENDLESS_SAMPLE if limit is None else limit
    to_come = [*rows, *islice(cycle(drawn), number)][: max(0, number - len(begun))]
    work = grid_work([*begun, *to_come, *islice(cycle(drawn), fresh)], standings)
    return Work(left=work.left, runs=work.runs, endless=limit is None)
