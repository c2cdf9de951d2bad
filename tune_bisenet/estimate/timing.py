"""How fast would trials train here? A few of the frames, and as many probes side by side as trials will run.

Everything it makes lies in a temporary folder, which is gone afterwards.
"""

import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tune_bisenet.config import Precision, Resources, Run, WarmupPoly
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.source import Frame, Source, Split
from tune_bisenet.estimate.forecast import Kind, Timed, Timing, commonest, kinds_of
from tune_bisenet.estimate.probe import Findings, Order

SECONDS: Final = 8.0
"""For what is timed; starting a process takes some more."""
PATIENCE_SECONDS: Final = 300.0
"""After this a probe is given up."""
NUM_VAL: Final = 2
"""Validation frames that are decoded; a probe repeats them."""
MOST_SIDE_BY_SIDE: Final = 8
MOST_KINDS: Final = 6
"""Kinds of epochs that are timed, the commonest; the others go by the most alike."""
FOREVER: Final = 10**6
"""Epochs of a run that is timed: nobody trains it to its end."""


class ProbeError(ValueError):
    """No trial could be timed."""


@dataclass(frozen=True, kw_only=True)
class Timings:
    """What the probes found."""

    speed: Timed
    num_untimed: int
    """Kinds of epochs that there was no time for."""
    side_by_side: int
    device: str
    device_bytes: int | None
    """Of the card; None without one."""
    card_bytes: int | None
    """Of a trial's tensors on the card at their height; None without a card."""
    process_bytes: int
    """Of a trial's process at its height, apart from what is on the card."""
    seconds: float
    """That a probe took."""


def time_trials(source: Source, runs: Sequence[Run], resources: Resources, precision: Precision) -> Timings:
    """Time the kinds of epochs in `runs`.

    ProbeError, with the probe's last words, if no trial can be trained here; DataError if a frame is damaged.
    """
    kinds = commonest(runs)
    timed = kinds[:MOST_KINDS]
    side_by_side = _side_by_side(resources)
    with tempfile.TemporaryDirectory() as place:
        excerpt = _Excerpt(source, num_train=max(kind.batch_size for kind in timed))
        packs = {
            size: prepare(excerpt, image_size=size, cache_dir=Path(place)).path
            for size in {kind.image_size for kind in timed}
        }
        order = Order(
            runs=tuple(_example_of(kind, runs) for kind in timed),
            packs=tuple(str(packs[kind.image_size]) for kind in timed),
            precision=precision,
            use_gpu=resources.gpus_per_trial > 0,
            threads=resources.cpus_per_trial,
            seconds=SECONDS,
        )
        with ThreadPoolExecutor(side_by_side) as pool:
            answers = list(pool.map(_answer, [order] * side_by_side))
    return _together(timed, answers, num_kinds=len(kinds))


def _side_by_side(resources: Resources) -> int:
    """As many as will share this machine, or one card."""
    if resources.gpus_per_trial:
        return max(1, min(int(1 / resources.gpus_per_trial), resources.concurrency))
    return min(resources.concurrency, MOST_SIDE_BY_SIDE)


def _example_of(kind: Kind, runs: Iterable[Run]) -> Run:
    """A run whose epochs are all of this kind."""
    run = next(run for run in runs if kind in kinds_of(run))
    loss = run.loss.model_copy(update={"lovasz_after": 0 if kind.lovasz else None})
    schedule = WarmupPoly(warmup_iterations=0, power=run.schedule.power)
    return run.model_copy(update={"loss": loss, "schedule": schedule, "num_epochs": FOREVER, "expect": None})


def _answer(order: Order) -> Findings:
    command = [sys.executable, "-m", "tune_bisenet.estimate.probe"]
    try:
        ended = subprocess.run(
            command,
            input=order.model_dump_json(),
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE_SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        raise ProbeError(f"one iteration took longer than {PATIENCE_SECONDS:.0f} s") from error
    if ended.returncode:
        last_words = (ended.stderr.strip() or f"exit code {ended.returncode}").splitlines()[-1]
        raise ProbeError(last_words)
    return Findings.model_validate_json(ended.stdout.splitlines()[-1])


def _together(kinds: Sequence[Kind], answers: Sequence[Findings], *, num_kinds: int) -> Timings:
    """Repeats of all probes alike. A kind counts if every probe had time for it."""
    timed = kinds[: min(len(answer.found) for answer in answers)]
    timings = {}
    for number, kind in enumerate(timed):
        train = [seconds for answer in answers for seconds in answer.found[number].train_seconds]
        val = [seconds for answer in answers for seconds in answer.found[number].val_seconds]
        spread = (max(train) - min(train)) / 2 / statistics.median(train)
        timings[kind] = Timing(train=statistics.median(train), val=statistics.median(val), spread=spread)
    peaks = [found.card_bytes for answer in answers for found in answer.found if found.card_bytes is not None]
    return Timings(
        speed=Timed(timings),
        num_untimed=num_kinds - len(timed),
        side_by_side=len(answers),
        device=answers[0].device,
        device_bytes=answers[0].device_bytes,
        card_bytes=max(peaks, default=None),
        process_bytes=max(answer.process_bytes for answer in answers),
        seconds=max(answer.seconds for answer in answers),
    )


@dataclass(frozen=True)
class _Excerpt:
    """The first frames of a source."""

    source: Source
    num_train: int

    @property
    def name(self) -> str:
        return self.source.name

    @property
    def fingerprint(self) -> str:
        return f"the first {self.num_train} and {NUM_VAL} of {self.source.fingerprint}"

    @property
    def frame_size(self) -> tuple[int, int]:
        return self.source.frame_size

    def names(self, split: Split) -> Sequence[str]:
        return self.source.names(split)[: self.num_train if split == "train" else NUM_VAL]

    def load(self, split: Split, index: int) -> Frame:
        return self.source.load(split, index)
