"""Estimate what a search will take before it starts: time, device-hours, memory, disk, and the power of its claims.

Numbers only: `console` shows them, and `training.benchmark` trains to measure. Torch is imported late.
"""

import heapq
import math
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from tune_bisenet import rungs, spaces
from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.config import SGD, Resources, Run, format_size, partners, trial_name
from tune_bisenet.data.packed import FORMAT_VERSION, Header
from tune_bisenet.options import InputError
from tune_bisenet.records import ENDED_WELL, NUM_SAMPLES, TrialState
from tune_bisenet.report.power import ASSUMED_NOISE, ExpectedTrials, Power, expected_trials, powers
from tune_bisenet.report.verdicts import NoiseSummary
from tune_bisenet.search.prepare import PreparedSearch
from tune_bisenet.spaces import DataFacts
from tune_bisenet.text import format_bytes
from tune_bisenet.training.tensorboard import NUM_PICTURED_EPOCHS, TRIPTYCH_HEIGHT

if TYPE_CHECKING:
    from tune_bisenet.training.benchmark import TrainingBenchmark

VAL_SHARE: Final = 1 / 3
"""Time of validating an image relative to training on it, where only the latter is known: a forward pass of the main
path is 59 of the 177 GFLOP of a training image (counted at 512x1024)."""

KEEPING_SECONDS: Final = 0.6
"""Time of an epoch beside training and validation, mostly for writing weights: 0.3 to 0.9 over 24 epochs on two busy
cores and a local disk (2026-11-23)."""

TRIAL_SECONDS: Final = 0.24
"""Time of a trial beside its epochs: 0.84 with one epoch's keeping (benchmarks/results.md)."""

UNBOUNDED_SAMPLE: Final = 100
"""Number of trials that stand for a search which only time or money ends."""

SEARCH_BYTES: Final = 20_000_000
"""Of what a search has once: mostly the report, whose page of 5 MB is written beside the one before."""

TRIAL_BYTES: Final = 200_000
EPOCH_BYTES: Final = 10_000
"""Of a trial's records beside weights and pictures, ours, TensorBoard's and Tune's, and of each of its epochs."""

CONFIRMED_RUNS: Final = 3
"""At most so many runs get fresh seeds by `--confirm`: the best, the best row, and the baseline."""

MAX_SIMULATED: Final = 200
"""Trials of a search in which early stopping is simulated: thousands take long, and save as large a share."""


@dataclass(frozen=True, kw_only=True)
class Throughput:
    """Images per second of one trial while others train beside it; inversely proportional to an image's pixels.

    The loss counts for little: an iteration with Lovász-Softmax takes 15 % longer, of which nothing is counted
    (2026-11-28, one thread, 128x256, n = 3).
    """

    images_per_second: float
    """In training."""
    val_images_per_second: float
    num_pixels: int
    """Of an image at these speeds."""
    source: str
    """How the speeds are known, for people."""

    @classmethod
    def stated(cls, images_per_second: float, run: Run) -> Self:
        """At the size of `run`; only training is stated."""
        return cls(
            images_per_second=images_per_second,
            val_images_per_second=images_per_second / VAL_SHARE,
            num_pixels=math.prod(run.image_size),
            source=f"at {format_size(run.image_size)}, as stated by --images-per-second",
        )

    @classmethod
    def measured(cls, states: Iterable[TrialState], runs: Iterable[Run], facts: DataFacts) -> Self | None:
        """From the epochs that trials of these runs have trained; None if there are none."""
        rows = {run.name: run for run in runs}
        trained = [(state, rows[state.run]) for state in states if state.trained_epochs and state.run in rows]
        if not trained:
            return None
        size = trained[0][1].image_size
        unit = cls(images_per_second=1, val_images_per_second=1 / VAL_SHARE, num_pixels=math.prod(size), source="")
        images = math.fsum(state.trained_epochs * unit.epoch_seconds(run, facts) for state, run in trained)
        speed = images / math.fsum(state.seconds for state, _run in trained)
        source = f"at {format_size(size)}, measured in earlier sessions of this search"
        return replace(unit, images_per_second=speed, val_images_per_second=speed / VAL_SHARE, source=source)

    @classmethod
    def timed(cls, benchmark: "TrainingBenchmark", run: Run) -> Self:
        beside = f", {benchmark.num_processes} trials side by side" if benchmark.num_processes > 1 else ""
        return cls(
            images_per_second=benchmark.images_per_second,
            val_images_per_second=benchmark.val_images_per_second,
            num_pixels=math.prod(run.image_size),
            source=f"± {benchmark.spread:.0%}, timed for {benchmark.seconds:.0f} s with {run.name} at "
            f"{format_size(run.image_size)} on {benchmark.device}{beside}",
        )

    def epoch_seconds(self, run: Run, facts: DataFacts) -> float:
        """Return the time of training and validation. Batches that are not full are not trained."""
        num_trained = facts.num_train // run.batch_size * run.batch_size
        seconds = num_trained / self.images_per_second + facts.num_val / self.val_images_per_second
        return seconds * math.prod(run.image_size) / self.num_pixels

    def trial_seconds(self, run: Run, facts: DataFacts, *, epochs_done: int = 0) -> float:
        """Return the time from `epochs_done` to the trial's last epoch."""
        epoch_seconds = KEEPING_SECONDS + self.epoch_seconds(run, facts)
        return TRIAL_SECONDS + (run.num_epochs - epochs_done) * epoch_seconds


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The trials of a search. Those that a study has yet to draw are represented by test draws."""

    runs: tuple[Run, ...]
    """All trials, also those that have ended."""
    remaining: tuple[tuple[Run, int], ...]
    """Trials that have not ended, in their order, each with the number of epochs it has done."""
    shared_epochs: tuple[int, ...]
    """How many first epochs each of these is to take over from a trial before it."""
    num_beginnings: int
    """Of how many states the search keeps for that."""
    is_unbounded: bool = False
    """Whether only time or money ends the search: then the trials are a sample of it."""


def find_workload(search: PreparedSearch, states: Iterable[TrialState]) -> Workload:
    """Return the trials of a search whose earlier sessions left `states`.

    A study trains the rows that it does not know from an earlier search first, then draws up to its limit, and adds
    fresh seeds for `--confirm`. A grid may be limited to the rows of `--rerun`.
    """
    runs, only = list(search.runs), search.options.rerun
    limit, fresh = search.config.limits.trials, CONFIRMED_RUNS * (search.config.limits.confirm or 0)
    if study := search.study:
        runs = [trial.run for trial in study.suggested.values() if trial.origin != "confirm"]
        present = {run.name for run in runs} | {trial.spec.run.name for trial in study.known}
        num_trials = max(limit or UNBOUNDED_SAMPLE, len(runs))
        rows = [run for run in search.runs if run.name not in present]
        runs = [*runs, *rows, *islice(cycle(study.drawn), num_trials)][:num_trials]
        runs += islice(cycle(study.drawn), fresh)
    known_states = {(state.run, state.seed): state for state in states}
    remaining = []
    for run in runs:
        state = known_states.get((run.name, run.seed))
        if (state is None or state.status not in ENDED_WELL) and (only is None or run.name in only):
            remaining.append((run, state.epochs if state else 0))
    shared = _shared_epochs([] if search.study or search.config.no_share else search.runs)
    return Workload(
        runs=tuple(runs),
        remaining=tuple(remaining),
        shared_epochs=tuple(0 if epochs else shared.get((run.name, run.seed), 0) for run, epochs in remaining),
        num_beginnings=len(shared),
        is_unbounded=search.study is not None and limit is None,
    )


def _shared_epochs(runs: Sequence[Run]) -> dict[tuple[str, int], int]:
    """Return, by name and seed, how many epochs a run can take over from one before it; without those that can none."""
    named = {(run.name, run.seed): run for run in runs}
    order = {key: number for number, key in enumerate(named)}
    shared = {
        key: max((epochs for other, epochs in others.items() if order[other] < order[key]), default=0)
        for key, others in partners(named).items()
    }
    return {key: epochs for key, epochs in shared.items() if epochs}


def makespan(durations: Iterable[float], *, num_slots: int) -> float:
    """Return when the last has ended, if each in its order starts as soon as one of `num_slots` is free."""
    free_at = [0.0] * num_slots
    for duration in durations:
        heapq.heapreplace(free_at, free_at[0] + duration)
    return max(free_at)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A search, and what it takes to train all trials to their end."""

    search: PreparedSearch
    resources: Resources
    workload: Workload
    throughput: Throughput | None
    benchmark: "TrainingBenchmark | None" = None
    """Where a trial was timed; it knows the memory of one."""
    problem: str = ""
    """Why no trial could be timed."""

    @cached_property
    def trial_seconds(self) -> list[float]:
        """Return those of each trial that is left; nothing while the throughput is not known."""
        if self.throughput is None:
            return []
        facts, trial_seconds = self.search.facts, self.throughput.trial_seconds
        done = map(max, (epochs for _run, epochs in self.workload.remaining), self.workload.shared_epochs)
        runs = (run for run, _epochs in self.workload.remaining)
        return [trial_seconds(run, facts, epochs_done=epochs) for run, epochs in zip(runs, done, strict=True)]

    @property
    def wall_seconds(self) -> float:
        return makespan(self.trial_seconds, num_slots=self.resources.concurrency)

    def device_hours(self, seconds: float) -> float:
        """Return the hours of GPUs in `seconds` of a trial; without GPUs, its share of the machine's hours."""
        return seconds / 3600 * (self.resources.gpus_per_trial or 1 / self.resources.concurrency)

    def num_trials_in_limits(self, seconds: float) -> float:
        """Return how many trials of so many seconds time budget and GPU-hours have room for."""
        limits = self.search.config.limits
        by_time = math.inf if limits.time_budget is None else limits.time_budget / seconds * self.resources.concurrency
        by_hours = math.inf if limits.gpu_hours is None else limits.gpu_hours / self.device_hours(seconds)
        return min(by_time, by_hours)

    @cached_property
    def stopping(self) -> rungs.Forecast | None:
        """Return what ASHA is expected to save and to risk; None for other schedulers."""
        if self.search.config.scheduler != "asha":
            return None
        runs = self.workload.runs[:MAX_SIMULATED]
        return rungs.forecast(runs, spaces.iterations_per_epoch(runs[0], self.search.facts))

    @property
    def image_sizes(self) -> list[tuple[int, int]]:
        return sorted({run.image_size for run in self.workload.runs})

    @property
    def pack_bytes(self) -> int:
        """Packed frames of all sizes, on each node's disk."""
        frame_size = self.search.source.frame_size
        return sum(pack_bytes(self.search.facts, image_size=size, frame_size=frame_size) for size in self.image_sizes)

    @property
    def free_bytes(self) -> int:
        """Free space of this machine where frames are packed."""
        return _free_bytes(self.search.cache_dir)

    @property
    def storage_bytes(self) -> int:
        """Return the most that the trials left take in storage at any time; where no number bounds them, of a few.

        A trial that runs, or was cut off, has two checkpoints, and writes a file of at most that size beside them.
        """
        remaining, facts, num_running = self.workload.remaining, self.search.facts, self.resources.concurrency
        if self.workload.is_unbounded:
            remaining = remaining[:num_running]
        num_classes = len(self.search.source.classes)
        checkpoints = sorted((checkpoint_bytes(run, num_classes)[1] for run, _epochs in remaining), reverse=True)
        num_running = max(num_running, sum(epochs > 0 for _run, epochs in remaining))
        frame_size = self.search.source.frame_size
        kept = [trial_bytes(run, facts, frame_size=frame_size, num_classes=num_classes) for run, _epochs in remaining]
        beginnings = self.workload.num_beginnings * (max(kept, default=0) + max(checkpoints, default=0))
        return SEARCH_BYTES + sum(kept) + 3 * sum(checkpoints[:num_running]) + beginnings

    @property
    def free_storage_bytes(self) -> int | None:
        """Return the room for `storage_bytes`: what is free, and what these trials have; None in object storage."""
        search = self.search
        if search.folder.local_path is None:
            return None
        default_seed = search.config.default_seed
        trials = [trial_name(run, default_seed=default_seed) for run, _epochs in self.workload.remaining]
        present = sum(info.size or 0 for name in trials for info in (search.folder / name).infos())
        return _free_bytes(search.folder.local_path) + present

    def check_storage(self) -> None:
        """Raise InputError if the trials that are left do not fit on the storage's disk."""
        needed, free = self.storage_bytes, self.free_storage_bytes
        if self.workload.remaining and free is not None and free < needed:
            raise InputError(
                f"the results need up to {format_bytes(needed)} in {self.search.folder.path}, where "
                f"{format_bytes(free)} are free: make room there, name another --storage, or run fewer trials at once "
                "by --max-concurrent."
            )

    @property
    def powers(self) -> list[Power]:
        """Return the power of every claim that a grid can judge; none of a study, whose trials have one seed."""
        if self.search.study:
            return []
        seeds: dict[str, set[int]] = {}
        for run in self.workload.runs:
            seeds.setdefault(run.name, set()).add(run.seed)
        config = self.search.config
        return powers(self.rows, seeds, proxy=config.proxy, noise=self._noise, spent=self._spent, looks=config.looks)

    @property
    def rows(self) -> list[Run]:
        """Return each row of the search once."""
        return list({run.name: run for run in self.workload.runs}.values())

    @cached_property
    def expected_trials(self) -> ExpectedTrials | None:
        """Return how many trials `--decide` is expected to take in all; None for other searches."""
        config = self.search.config
        if not config.decide:
            return None
        return expected_trials(self.rows, config.looks, proxy=config.proxy, noise=self._noise, spent=self._spent)

    @property
    def _noise(self) -> NoiseSummary:
        return self.search.noise or ASSUMED_NOISE

    @property
    def _spent(self) -> float:
        """Return the share of the error that claims on mIoU may use up: a second measure has the other half."""
        return 0.5 if self.search.space.second_measure else 1.0


def estimate_search(search: PreparedSearch, resources: Resources, states: Sequence[TrialState]) -> Estimate:
    """Return what is known without training anything: the throughput if it is stated or was measured earlier."""
    workload = find_workload(search, states)
    stated = search.options.images_per_second
    measured = None if stated else Throughput.measured(states, workload.runs, search.facts)
    throughput = Throughput.stated(stated, search.example) if stated else measured
    return Estimate(search=search, resources=resources, workload=workload, throughput=throughput)


def time_throughput(estimate: Estimate) -> Estimate:
    """Return the estimate with throughput and memory as timed here, where they are not known and can be."""
    from tune_bisenet.training.benchmark import BenchmarkError

    if estimate.throughput is not None or not estimate.workload.remaining:
        return estimate
    try:
        runs = [run for run, _epochs in estimate.workload.remaining]
        run, benchmark = time_trial(estimate.search, runs, estimate.resources)
    except BenchmarkError as error:
        return replace(estimate, problem=str(error))
    return replace(estimate, throughput=Throughput.timed(benchmark, run), benchmark=benchmark)


def time_trial(search: PreparedSearch, runs: Sequence[Run], resources: Resources) -> "tuple[Run, TrainingBenchmark]":
    """Time the first of the runs with the most pixels in a batch, so that memory is that of the largest.

    Raise BenchmarkError if it cannot be trained here.
    """
    from tune_bisenet.training.benchmark import benchmark_training

    run = max(runs, key=lambda run: run.batch_size * math.prod(run.image_size))
    benchmark = benchmark_training(
        run,
        frame_size=search.source.frame_size,
        with_lovasz=any(run.loss.lovasz_after is not None for run in runs),
        resources=resources,
        precision=search.config.precision,
        classes=search.source.classes,
        step=search.config.step,
    )
    return run, benchmark


def pack_bytes(facts: DataFacts, *, image_size: tuple[int, int], frame_size: tuple[int, int]) -> int:
    """Return the size of the packed frames of both splits, but for names and headers."""
    train = Header(FORMAT_VERSION, "", "", "train", 1, image_size, label_size=image_size)
    val = Header(FORMAT_VERSION, "", "", "val", 1, image_size, label_size=frame_size)
    return facts.num_train * train.row_bytes + facts.num_val * val.row_bytes


def trial_bytes(run: Run, facts: DataFacts, *, frame_size: tuple[int, int], num_classes: int = len(CITYSCAPES)) -> int:
    """Return the most that a trial leaves in storage when it has ended, as if no picture were compressed."""
    num_pixels = math.prod(run.image_size)
    best = facts.num_val * 4 * num_classes**2 + NUM_SAMPLES * (3 * num_pixels + 2 * math.prod(frame_size))
    shrink = min(1.0, TRIPTYCH_HEIGHT / run.image_size[0])
    pictures = min(run.num_epochs, NUM_PICTURED_EPOCHS + 1) * NUM_SAMPLES * 9 * math.ceil(num_pixels * shrink**2)
    return checkpoint_bytes(run, num_classes)[0] + best + pictures + run.num_epochs * EPOCH_BYTES + TRIAL_BYTES


def checkpoint_bytes(run: Run, num_classes: int = len(CITYSCAPES)) -> tuple[int, int]:
    """Return the sizes of `best.pt` and of `last.pt`, which holds the optimizer's numbers of each weight as well."""
    # Of the network's weights and statistics all is fixed but for the main head's hidden layer and what gives classes.
    best = 51_365_664 + 4 * ((256 * 9 + 4) * run.head_width + num_classes * (run.head_width + 131))
    numbers_per_weight = 1 + bool(run.optimizer.momentum) if isinstance(run.optimizer, SGD) else 3
    return best, best * numbers_per_weight


def _free_bytes(folder: Path) -> int:
    """Return the free space of the disk where a folder is, or will be."""
    return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
