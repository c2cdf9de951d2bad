"""Time some iterations of training and validation, by the engine's own clock: `python -m tune_bisenet.estimate.probe`.

A process of its own, so that a trial's memory is told apart from everything else, and as many may run side by side
as trials will. It reads an `Order` as JSON from standard input and answers with `Findings` on standard output. The few
frames it is given are repeated: an epoch of theirs has as many iterations as it takes for a clock to tell.
"""

import resource
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Final, TypeVar

import torch

from tune_bisenet.config import Frozen, Precision, Run
from tune_bisenet.data.frames import Frames
from tune_bisenet.data.packed import Packed, PackedSplit, open_packed
from tune_bisenet.training import engine

EPOCH_SECONDS: Final = 0.5
"""What a timed epoch is to take: long beside its start, short beside the time there is."""
MOST_ITERATIONS: Final = 64
MOST_EPOCHS: Final = 20

Value = TypeVar("Value")


class Order(Frozen):
    """What to time."""

    runs: tuple[Run, ...]
    """One of each kind; each is timed in the way its first epoch is."""
    packs: tuple[str, ...]
    """By run, the folder of the frames."""
    precision: Precision
    use_gpu: bool
    threads: int
    seconds: float
    """For all of it; the first run is timed even if it takes longer, the others as far as time goes."""


class Finding(Frozen):
    """Of one run: a number an epoch."""

    train_seconds: tuple[float, ...]
    """Of one image."""
    val_seconds: tuple[float, ...]
    """Of one image."""
    card_bytes: int | None
    """Of the tensors on the card at their height; None without a card."""


class Findings(Frozen):
    """Of the runs of an `Order`, in its order; those at its end are missing where time ran out."""

    found: tuple[Finding, ...]
    process_bytes: int
    """Of this process's memory, at its height."""
    device: str
    device_bytes: int | None
    """Of the card; None without one."""
    seconds: float
    """That all this took, from the first import of the engine on."""


def main() -> None:
    """One order, one answer."""
    started = time.perf_counter()
    order = Order.model_validate_json(sys.stdin.read())
    torch.set_num_threads(order.threads)
    torch.backends.cudnn.benchmark = True  # as a trial does
    device = torch.device("cuda" if order.use_gpu else "cpu")
    found = tuple(_timed(order, device))
    findings = Findings(
        found=found,
        process_bytes=1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        device=torch.cuda.get_device_name(device) if order.use_gpu else "CPU",
        device_bytes=torch.cuda.get_device_properties(device).total_memory if order.use_gpu else None,
        seconds=time.perf_counter() - started,
    )
    sys.stdout.write(findings.model_dump_json() + "\n")


def _timed(order: Order, device: torch.device) -> Iterator[Finding]:
    ends = time.perf_counter() + order.seconds
    for number, (run, pack) in enumerate(zip(order.runs, order.packs, strict=True)):
        left = ends - time.perf_counter()
        if number and left <= 0:
            return
        yield _time(run, open_packed(Path(pack)), device, order.precision, seconds=left / (len(order.runs) - number))


def _time(run: Run, data: Packed, device: torch.device, precision: Precision, *, seconds: float) -> Finding:
    """The first epoch warms up; it is all there is if it takes the time for more."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    ends = time.perf_counter() + seconds
    training = engine.begin(run, _repeated(data, run.batch_size), device=device, precision=precision, backbone=None)
    epochs = engine.fit(training)
    iterations = 1

    def timed_epoch() -> tuple[float, float]:
        epoch, images = next(epochs).epoch, run.batch_size * iterations
        return epoch.train_seconds / images, epoch.val_seconds / images

    def has_time() -> bool:
        return time.perf_counter() + sum(timed[-1]) * run.batch_size * iterations < ends

    timed = [timed_epoch()]
    if has_time():
        timed = [timed_epoch()]
        iterations = min(MOST_ITERATIONS, max(1, round(EPOCH_SECONDS / (sum(timed[0]) * run.batch_size))))
        if iterations > 1 and has_time():
            many = _repeated(data, run.batch_size * iterations)
            training.train, training.val = Frames(many.train, device), Frames(many.val, device)
            timed = [timed_epoch()]
        while has_time() and len(timed) < MOST_EPOCHS:
            timed.append(timed_epoch())
    train, val = zip(*timed, strict=True)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return Finding(train_seconds=train, val_seconds=val, card_bytes=peak)


def _repeated(data: Packed, images: int) -> Packed:
    """The same frames time and again, `images` of each split; nothing is copied."""
    return replace(data, train=_split(data.train, images), val=_split(data.val, images))


def _split(split: PackedSplit, images: int) -> PackedSplit:
    return PackedSplit(
        names=_cycled(split.names, images), images=_cycled(split.images, images), labels=_cycled(split.labels, images)
    )


def _cycled(values: Sequence[Value], number: int) -> list[Value]:
    return [values[index % len(values)] for index in range(number)]


if __name__ == "__main__":
    main()
