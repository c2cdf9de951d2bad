"""Time a prediction, and the training of one trial, on this machine. Knows neither Ray nor storage nor real frames.

measure_latency     milliseconds of one prediction at batch 1
benchmark_training  images per second and memory of a trial while others train beside it
"""

import math
import multiprocessing
import os
import re
import resource
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.config import Precision, Resources, Run, StepMode, WarmupPoly
from tune_bisenet.data.packed import Packed, PackedSplit
from tune_bisenet.records import Latency
from tune_bisenet.text import counted
from tune_bisenet.training import engine
from tune_bisenet.training.model import BiSeNet
from tune_bisenet.training.stepper import Batch, Stepper

NUM_WARMUPS: Final = 5
"""Predictions before the first that counts: caches fill, cuDNN chooses its algorithms, clocks rise."""
MIN_REPEATS: Final = 10
MAX_REPEATS: Final = 50
MAX_SECONDS: Final = 5.0  # after this time no repeat beyond `MIN_REPEATS` begins
BENCHMARK_SECONDS: Final = 8.0  # after this time no epoch beyond the first begins
GPU_BATCHES: Final = 8
"""Batches of a timed epoch on a GPU, which hides the launch of one behind the work on another; on a CPU one will do."""
MAX_PROCESSES: Final = 8
CUDA_BYTES: Final = 10**9
"""Roughly what CUDA, cuDNN's workspace and torch's unused blocks take on a GPU beside all tensors."""


class BenchmarkError(ValueError):
    """No trial can be trained on this machine."""


def measure_latency(
    run: Run,
    *,
    device: torch.device,
    precision: Precision,
    num_classes: int = len(CITYSCAPES),
    step: StepMode = "eager",
) -> Latency:
    """Time what validation does for one image of the run's size: normalise, network, likeliest class of each pixel.

    The network has the run's head width, no auxiliary heads, and random weights, since speed does not depend on them.
    With another `step` than `eager`, a GPU replays a CUDA graph if it can, and its own clock counts: what Python takes
    to launch hundreds of kernels hides how fast a network is. `Latency.device` says so. Takes some seconds.
    Other work on the device is in the number: compare trials that had as much of it.
    """
    with torch.random.fork_rng(devices=[]):  # training is not disturbed; weights are drawn on the CPU
        model = BiSeNet(num_classes=num_classes, head_width=run.head_width, auxiliary_heads=False)
    engine.place(model, device, precision)
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, *run.image_size), generator=noise, dtype=torch.uint8).to(device)

    stepper = Stepper(step, device)

    def predict(batches: Sequence[Batch]) -> list[Tensor]:
        ((images,),) = batches
        return [engine.predict(model, images, run.image_size, precision=precision)]

    def predict_once() -> float:
        call = partial(stepper.call, predict, [(image,)], kind="a prediction")
        return _time_call(call, device, by_events=device.type == "cuda" and not stepper.is_eager)

    for _ in range(NUM_WARMUPS):
        predict_once()
    name = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device) + ("" if stepper.is_eager else ", as a CUDA graph")
    return summarize(repeat_timing(predict_once), device=name)


def repeat_timing(time_once: Callable[[], float]) -> list[float]:
    """Return the seconds of each call: at least MIN_REPEATS, and up to MAX_REPEATS within MAX_SECONDS."""
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or (len(seconds) < MAX_REPEATS and sum(seconds) < MAX_SECONDS):
        seconds.append(time_once())
    return seconds


def summarize(seconds: list[float], *, device: str) -> Latency:
    """Return median and quartiles in milliseconds."""
    low, median, high = (1000.0 * quartile for quartile in statistics.quantiles(seconds, n=4, method="inclusive"))
    return Latency(median_ms=median, low_ms=low, high_ms=high, repeats=len(seconds), device=device)


def _time_call(function: Callable[[], object], device: torch.device, *, by_events: bool) -> float:
    """Return the seconds of a call, by the GPU's own clock or by this machine's; the device is idle before it."""
    _synchronize(device)
    if by_events:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        function()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1000.0
    started = time.perf_counter()
    function()
    _synchronize(device)
    return time.perf_counter() - started


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class TrainingBenchmark:
    """Speed and memory of one trial. Speeds are medians over the timed epochs of all processes."""

    images_per_second: float
    val_images_per_second: float
    spread: float  # half the range of `images_per_second`, as a share of it
    memory_bytes: int  # peak of the tensors on a GPU, and CUDA_BYTES; without a GPU, peak of the whole process
    available_bytes: int  # what there is for one trial: its share of the GPU's memory; without a GPU, of the machine's
    device: str
    num_processes: int
    seconds: float


def benchmark_training(
    run: Run,
    *,
    frame_size: tuple[int, int],
    with_lovasz: bool,
    resources: Resources,
    precision: Precision,
    classes: ClassSet = CITYSCAPES,
    step: StepMode = "eager",
) -> TrainingBenchmark:
    """Train `run` on noise for some seconds, in as many processes as trials will share this machine or one GPU.

    The loss before its switch is timed. One more epoch, with Lovász-Softmax if `with_lovasz`, counts for memory only.
    Validation labels have `frame_size` (h, w). Raise BenchmarkError with the reason if the run cannot be trained here.
    """
    started = time.perf_counter()
    use_gpu, threads = resources.gpus_per_trial > 0, resources.threads_per_trial
    if use_gpu:
        num_sharing = max(1, int(1 / resources.gpus_per_trial))
    else:
        num_sharing = max(1, min(resources.concurrency, (os.cpu_count() or 1) // resources.cpus_per_trial))
    num_processes = min(num_sharing, resources.concurrency, MAX_PROCESSES)
    if use_gpu and not torch.cuda.is_available():
        raise BenchmarkError("this machine has no GPU to time a trial on")
    device = torch.device("cuda" if use_gpu else "cpu")
    time_training = partial(
        _time_training,
        with_lovasz=with_lovasz,
        precision=precision,
        step=step,
        device=device,
        threads=threads,
        seconds=BENCHMARK_SECONDS,
        classes=classes,
    )
    # Processes of their own: CUDA wants a fresh one, and memory is that of a trial alone.
    with ProcessPoolExecutor(num_processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            answers = list(pool.map(time_training, [run] * num_processes, [frame_size] * num_processes))
        except (RuntimeError, OSError, ValueError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise BenchmarkError(f"no trial can be trained here: {reason}") from error
    train_seconds, val_seconds = zip(*(epoch for epochs, _memory in answers for epoch in epochs), strict=True)
    median = statistics.median(train_seconds)
    device_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if use_gpu:
        device_bytes = torch.cuda.get_device_properties(device).total_memory
    return TrainingBenchmark(
        images_per_second=1 / median,
        val_images_per_second=1 / statistics.median(val_seconds),
        spread=(max(train_seconds) - min(train_seconds)) / 2 / median,
        memory_bytes=max(memory for _epochs, memory in answers),
        available_bytes=device_bytes // num_sharing,
        device=torch.cuda.get_device_name(device) if use_gpu else f"CPU, {counted(threads, 'thread')} each",
        num_processes=num_processes,
        seconds=time.perf_counter() - started,
    )


def _time_training(
    run: Run,
    frame_size: tuple[int, int],
    *,
    with_lovasz: bool,
    precision: Precision,
    step: StepMode,
    device: torch.device,
    threads: int,
    seconds: float,
    classes: ClassSet,
) -> tuple[list[tuple[float, float]], int]:
    """Return the seconds of an image in training and in validation, for each timed epoch; and the bytes of memory."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.benchmark = True  # as a trial does
    before_switch, after_switch = (run.loss.model_copy(update={"lovasz_after": switch}) for switch in (None, 0))
    endless = {"schedule": WarmupPoly(warmup_iterations=0, power=0.9), "num_epochs": 10**6, "loss": before_switch}
    run = run.model_copy(update=endless)
    noise = _noise(run, frame_size, classes, num_batches=GPU_BATCHES if device.type == "cuda" else 1)
    room = sys.maxsize if device.type == "cuda" else 0  # these few frames are held there as a trial's are
    training = engine.begin(run, noise, device=device, precision=precision, backbone=None, frames_room=room, step=step)
    epochs = engine.fit(training)

    def time_epoch() -> tuple[float, float]:
        epoch = next(epochs).epoch
        return epoch.train_seconds / len(training.train), epoch.val_seconds / len(training.val)

    ends = time.perf_counter() + seconds
    first = time_epoch()  # slow: caches fill and cuDNN chooses its algorithms
    timed = []
    while time.perf_counter() < ends:
        timed.append(time_epoch())
    if with_lovasz:
        training.run = run.model_copy(update={"loss": after_switch})
        time_epoch()
    if device.type == "cuda":
        return timed or [first], torch.cuda.max_memory_allocated(device) + CUDA_BYTES
    return timed or [first], peak_bytes()


def peak_bytes() -> int:
    """Return the most memory that this process has held."""
    status = Path("/proc/self/status")  # ru_maxrss begins with that of the process that started this one
    if status.exists() and (peak := re.search(r"^VmHWM:\s+(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(peak[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _noise(run: Run, frame_size: tuple[int, int], classes: ClassSet, *, num_batches: int) -> Packed:
    """Return a random batch for each split, `num_batches` times over: what frames show does not change the time."""
    rng = np.random.default_rng(0)

    def split(label_size: tuple[int, int]) -> PackedSplit:
        images = rng.integers(256, size=(run.batch_size, 3, *run.image_size), dtype=np.uint8)
        labels = rng.integers(len(classes), size=(run.batch_size, *label_size), dtype=np.uint8)
        names = [""] * run.batch_size
        return PackedSplit(names * num_batches, list(images) * num_batches, list(labels) * num_batches)

    return Packed(
        path=Path(),
        source_name="noise",
        fingerprint="",
        image_size=run.image_size,
        label_size=frame_size,
        class_counts=np.ones(len(classes), dtype=np.int64),
        val_class_counts=np.ones(len(classes), dtype=np.int64),
        digest="",
        train=split(run.image_size),
        val=split(frame_size),
        classes=classes,
    )


def gpu_bytes(run: Run, precision: Precision, num_classes: int = len(CITYSCAPES)) -> int:
    """Return about what a trial takes of a GPU's memory beside its frames.

    Fitted to the peaks of all tensors on fake ones, without a card (torch 2.15, batch of 4, 512x1024 and 1024x1024),
    with the classes of Cityscapes. Lovász-Softmax alone keeps numbers of full size for each class.
    """
    for_lovasz = 500 * num_classes // len(CITYSCAPES) if run.loss.lovasz_after is not None else 0
    by_pixel = {"fp32": 875, "bf16": 510}[precision] + for_lovasz
    return CUDA_BYTES + 3 * 10**8 + by_pixel * run.batch_size * math.prod(run.image_size)
