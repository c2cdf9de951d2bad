"""Measure everything that depends on the card, in at most eight minutes: one JSON line for each figure, as it comes.

python benchmarks/gpu.py              all blocks, on the GPU of this machine: make gpu-check
python benchmarks/gpu.py --only step --size 256x512      on a CPU: the step against the plain loops, and its memory
python benchmarks/gpu.py --smoke      tiny sizes, to see that it runs to its end

Without a GPU, blocks that need one are skipped and say so, and times are CPU seconds. A block that is late is cut off,
and the next one begins. Training goes through `engine.begin` and `engine.fit`, as in a trial; beside it stand plain
loops, written as most code is: `interpolate`, three `cross_entropy`, an optimizer. Times are medians of windows, with
their range.
"""

import argparse
import json
import multiprocessing
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts: for `repeatable`

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from tune_bisenet.classes import CITYSCAPES, VOID
from tune_bisenet.config import (
    OHEM,
    SGD,
    AdamW,
    CrossEntropy,
    Precision,
    Resources,
    Run,
    StepMode,
    WarmupPoly,
    WeightedCrossEntropy,
    format_size,
)
from tune_bisenet.data.batches import IMAGENET_MEAN, IMAGENET_STD, augment_batch, epoch_draw
from tune_bisenet.data.packed import Packed, PackedSplit
from tune_bisenet.data.streets import Streets
from tune_bisenet.training import benchmark, engine, losses
from tune_bisenet.training.model import BiSeNet

Record = dict[str, Any]
STEPS: tuple[StepMode, ...] = ("eager", "graph") if torch.cuda.is_available() else ("eager",)
"""How `engine.begin` is asked to step; the last is how a trial does."""


@dataclass(frozen=True)
class Setting:
    """How large and how long everything is."""

    device: torch.device
    folder: Path
    size: tuple[int, int] = (512, 1024)
    batch: int = 4
    batches: int = 16  # of an epoch
    windows: int = 5
    small_size: tuple[int, int] = (96, 192)
    learning_epochs: int = 12
    precisions: tuple[Precision, ...] = ("fp32", "bf16")  # the last is that of blocks that have but one
    resident_bytes: float = 6.2e9  # of Cityscapes' training split at 512x1024

    @property
    def label_size(self) -> tuple[int, int]:
        return 2 * self.size[0], 2 * self.size[1]


# --- runs, frames, windows ----------------------------------------------------------------------------------------


def row(setting: Setting, **changes: Any) -> Run:
    plain: Record = {
        "optimizer": SGD(lr=0.01, momentum=0.9, weight_decay=1e-4),
        "schedule": WarmupPoly(warmup_iterations=0, power=0.9),
        "loss": CrossEntropy(aux_weight=1.0),
        "accumulation": 1,
        "max_grad_norm": None,
        "num_epochs": 10**6,
        "image_size": setting.size,
        "batch_size": setting.batch,
    }
    return Run(name="gpu", **(plain | changes))


ROWS: dict[str, Record] = {
    "ce": {},
    "weighted": {"loss": WeightedCrossEntropy(aux_weight=1.0)},
    "ohem": {"loss": OHEM(aux_weight=1.0)},
    "lovasz": {"loss": CrossEntropy(aux_weight=1.0, lovasz_after=0)},
    "accumulation": {"accumulation": 2},
    "clipping": {"max_grad_norm": 1.0},
    "adamw": {"optimizer": AdamW(lr=0.001, weight_decay=1e-4)},
}


load_scene = cache(Streets.load)


def frames(size: tuple[int, int], num_train: int, num_val: int, *, distinct: int = 4, label_scale: int = 2) -> Packed:
    """Return streets drawn at half the size and tiled; from `distinct` on they repeat, and take no more memory."""
    source = Streets(frame_size=(size[0] // 2, size[1] // 2))

    def split(name: Any, number: int, scale: int) -> PackedSplit:
        drawn = [load_scene(source, name, index) for index in range(min(distinct, number))]
        images = [np.ascontiguousarray(np.tile(frame.image, (2, 2, 1)).transpose(2, 0, 1)) for frame in drawn]
        labels = [np.tile(frame.label, (2 * scale, 2 * scale)) for frame in drawn]
        chosen = [index % len(drawn) for index in range(number)]
        return PackedSplit([str(i) for i in range(number)], [images[i] for i in chosen], [labels[i] for i in chosen])

    train = split("train", num_train, 1)
    counts = np.bincount(np.concatenate([label.ravel() for label in train.labels[:distinct]]), minlength=256)
    return Packed(
        path=Path(),
        source_name="streets, tiled",
        fingerprint="",
        image_size=size,
        label_size=(label_scale * size[0], label_scale * size[1]),
        class_counts=counts[: len(CITYSCAPES)].astype(np.int64),
        val_class_counts=np.ones(len(CITYSCAPES), dtype=np.int64),
        digest=f"{size} {num_train} {num_val}",
        train=train,
        val=split("val", num_val, label_scale),
    )


def begin(
    setting: Setting, run: Run, data: Packed, precision: Precision, step: StepMode = STEPS[-1]
) -> engine.Training:
    return engine.begin(run, data, device=setting.device, precision=precision, backbone=None, step=step)


def clock(device: torch.device) -> float:
    """Return seconds: of the wall beside a GPU that has done its work; of the CPU without one, which others may use."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(setting: Setting, function: Callable[[], object]) -> float:
    started = clock(setting.device)
    function()
    return clock(setting.device) - started


def summary(seconds: list[float]) -> Record:
    ordered = [round(1000 * value, 3) for value in sorted(seconds)]
    return {"ms": round(statistics.median(ordered), 3), "low": ordered[0], "high": ordered[-1], "n": len(ordered)}


def windows(setting: Setting, function: Callable[[], object], repeats: int = 10) -> Record:
    """Return milliseconds of one call: median of windows of `repeats` calls each, after one call that warms up."""
    repeats = repeats if setting.device.type == "cuda" else 1
    function()
    taken = [seconds_of(setting, lambda: [function() for _ in range(repeats)]) for _ in range(setting.windows)]
    return summary([seconds / repeats for seconds in taken])


# --- loops to compare: each makes a function that trains an epoch and returns the seconds of one step --------------

Loop = Callable[[], float]


def product_loop(setting: Setting, data: Packed, precision: Precision, step: StepMode = STEPS[-1]) -> Loop:
    training = begin(setting, row(setting), data, precision, step)
    epochs = engine.fit(training)
    validated: list[float] = []  # when the network was first asked to predict: the end of training in CPU seconds
    training.model.register_forward_pre_hook(
        lambda network, _: None if network.training else validated.append(clock(setting.device))
    )

    def train() -> float:
        validated.clear()
        started = clock(setting.device)
        measured = next(epochs).epoch
        seconds = measured.train_seconds if setting.device.type == "cuda" else validated[0] - started
        return seconds / training.iterations_per_epoch

    return train


class PlainStep:
    """`interpolate`, three `cross_entropy`, SGD: the structure of most code for BiSeNet, without its logging."""

    def __init__(self, setting: Setting, precision: Precision) -> None:
        torch.manual_seed(0)
        is_cuda = setting.device.type == "cuda"
        self.layout = torch.channels_last if is_cuda else torch.contiguous_format
        self.model = BiSeNet().to(setting.device, memory_format=self.layout).train()
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
        self.autocast = torch.autocast(setting.device.type, torch.bfloat16, enabled=precision == "bf16")

    def __call__(self, images: Tensor, labels: Tensor) -> None:
        targets = labels.long()
        with self.autocast:
            logits = self.model(images.to(memory_format=self.layout))
            loss = torch.zeros((), device=images.device)
            for head in (logits.main, *logits.aux):
                full_size = F.interpolate(head, size=targets.shape[1:], mode="bilinear", align_corners=False)
                loss = loss + F.cross_entropy(full_size, targets, ignore_index=VOID)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def plain_loop(setting: Setting, data: Packed, precision: Precision) -> Loop:
    """Return the plain loop over frames in the device's memory, augmented as the product does."""
    step, run = PlainStep(setting, precision), row(setting)
    images, labels = (
        torch.from_numpy(np.stack(arrays)).to(setting.device) for arrays in (data.train.images, data.train.labels)
    )

    def train(epoch: int) -> None:
        draw = epoch_draw(run.augment, len(images), seed=0, epoch=epoch).to(setting.device)
        order = torch.randperm(len(images)).to(setting.device)
        for first in range(0, len(images), setting.batch):
            batch = slice(first, first + setting.batch)
            step(*augment_batch(images[order[batch]], labels[order[batch]], draw[batch]))

    epochs = iter(range(1, 10**9))
    return lambda: seconds_of(setting, lambda: train(next(epochs))) / (len(images) // setting.batch)


class PngFrames(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """Frames as PNG files, decoded and augmented one by one: what loaders of Cityscapes do."""

    def __init__(self, folder: Path, data: Packed) -> None:
        self.folder, self.size, self.number = folder, data.image_size, len(data.train)
        for index in range(min(4, self.number)):
            Image.fromarray(data.train.images[index].transpose(1, 2, 0)).save(folder / f"{index}.png")
            Image.fromarray(data.train.labels[index]).save(folder / f"{index}-label.png")
        self.colour = v2.ColorJitter(0.4, 0.4, 0.4)

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        name, (height, width) = index % min(4, self.number), self.size
        scale = float(torch.empty(()).uniform_(0.75, 2.0))
        with Image.open(self.folder / f"{name}.png") as image, Image.open(self.folder / f"{name}-label.png") as label:
            large = (int(scale * width), int(scale * height))
            image, label = image.resize(large), label.resize(large, Image.Resampling.NEAREST)
        top, left = max(large[1] - height, 0) // 2, max(large[0] - width, 0) // 2
        box = (left, top, left + width, top + height)
        pixels = np.asarray(self.colour(image.crop(box)), dtype=np.float32) / 255.0
        pixels = (pixels - np.float32(IMAGENET_MEAN)) / np.float32(IMAGENET_STD)
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(np.array(label.crop(box)))


def png_loop(setting: Setting, data: Packed) -> Loop:
    """Return the plain fp32 loop over PNG files, with eight processes to decode them if there are cores for them."""
    step, folder = PlainStep(setting, "fp32"), Path(tempfile.mkdtemp(dir=setting.folder))
    workers = min(8, os.cpu_count() or 1) if setting.device.type == "cuda" else 0
    loader = torch.utils.data.DataLoader(
        PngFrames(folder, data), setting.batch, shuffle=True, num_workers=workers, persistent_workers=workers > 0,
        pin_memory=setting.device.type == "cuda", multiprocessing_context="spawn" if workers else None,
    )  # fmt: skip

    def train() -> None:
        for images, labels in loader:
            step(images.to(setting.device, non_blocking=True), labels.to(setting.device, non_blocking=True))

    return lambda: seconds_of(setting, train) / len(loader)


def loops(setting: Setting, data: Packed) -> dict[str, Callable[[], Loop]]:
    made: dict[str, Callable[[], Loop]] = {}
    for precision in setting.precisions:
        made[f"plain {precision}, in memory"] = partial(plain_loop, setting, data, precision)
        for way in STEPS:
            made[f"product {precision}, {way}"] = partial(product_loop, setting, data, precision, way)
    made["plain fp32, PNG files"] = partial(png_loop, setting, data)
    return made


# --- blocks -------------------------------------------------------------------------------------------------------


def environment(setting: Setting) -> Iterator[Record]:
    """Name the card, driver, versions and commit."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    card = torch.cuda.get_device_name(0) if setting.device.type == "cuda" else platform.processor() or "CPU"
    yield {"commit": git.stdout.strip(), "torch": torch.__version__, "device": card, "cpus": os.cpu_count()}
    yield {"threads": torch.get_num_threads(), "load": [round(value, 1) for value in os.getloadavg()]} | clocks()


def clocks() -> Record:
    query = "driver_version,clocks.sm,clocks.mem,power.draw,temperature.gpu,memory.used"
    try:
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        return {"nvidia-smi": subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()}
    except (OSError, subprocess.CalledProcessError):
        return {"nvidia-smi": None}


def floors(setting: Setting) -> Iterator[Record]:
    """Measure what the card really gives: every ratio rests on these."""
    source = torch.empty(2 * 2**30, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    copied = windows(setting, lambda: target.copy_(source))
    yield {"what": "copy", "TB/s": round(2 * source.numel() / copied["ms"] / 1e9, 3)} | copied
    matrix = torch.randn(8192, 8192, device=setting.device, dtype=torch.bfloat16)
    product = windows(setting, lambda: matrix @ matrix)
    yield {"what": "bf16 matrix product, 8192", "TFLOP/s": round(2 * 8192**3 / product["ms"] / 1e9, 1)} | product
    images = torch.randn(4, 64, 256, 512, device=setting.device, dtype=torch.bfloat16)
    images = images.to(memory_format=torch.channels_last)
    weight = torch.randn(64, 64, 3, 3, device=setting.device, dtype=torch.bfloat16)
    weight = weight.to(memory_format=torch.channels_last)
    convolved = windows(setting, lambda: F.conv2d(images, weight, padding=1))
    flops = 2 * images.numel() * 64 * 9
    yield {"what": "bf16 convolution 3x3, 64 channels", "TFLOP/s": round(flops / convolved["ms"] / 1e9, 1)} | convolved


def correctness(setting: Setting) -> Iterator[Record]:
    """Compare five iterations with the CPU's, fp32 without TF32, and count what waits for the card in a step."""
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        for name, changes in ROWS.items():
            few, many = (frames((64, 128), number * setting.batch, 2) for number in (5, 9))  # an odd group is left
            run = row(setting, image_size=(64, 128), num_epochs=2, **changes)
            cpu = replace(setting, device=torch.device("cpu"))
            on_cpu = next(engine.fit(begin(cpu, run, few, "fp32", "eager"))).epoch.loss
            for way in STEPS:
                apart = abs(next(engine.fit(begin(setting, run, few, "fp32", way))).epoch.loss / on_cpu - 1)
                counts = [waits(begin(setting, run, data, "bf16", way)) for data in (few, many)]
                a_step, places = (len(counts[1]) - len(counts[0])) / 4, sorted(set(counts[1]))
                yield {"row": name, "step": way, "loss apart": apart, "passed": apart < 1e-4, "waits a step": a_step,
                       "at": places}  # fmt: skip
    finally:
        torch.backends.cudnn.allow_tf32 = allowed


def waits(training: engine.Training) -> list[str]:
    """Return the places that waited for the device in a second epoch."""
    epochs = engine.fit(training)
    next(epochs)
    torch.set_warn_always(True)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            next(epochs)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.set_warn_always(False)
    return [f"{Path(item.filename).name}:{item.lineno}" for item in caught if "synchroniz" in str(item.message)]


def step(setting: Setting) -> Iterator[Record]:
    """Time a step of every loop; those of one precision in turns, so that ratios hold on a busy machine, too."""
    data = frames(setting.size, setting.batches * setting.batch, 1)
    named, medians = loops(setting, data), {}
    for precision in setting.precisions:
        made = {}
        for name in (name for name in named if precision in name):
            made[name] = named[name]()
            yield {
                "loop": name,
                "first epoch, ms a step": 1000 * made[name](),
            }  # algorithms are chosen, kernels compiled
        rounds = []
        for _ in range(setting.windows):
            rounds.append({name: 1000 * loop() for name, loop in made.items()})
            yield {"ms": rounds[-1]}
        for name in made:
            taken = summary([milliseconds[name] / 1000 for milliseconds in rounds])
            medians[name] = taken["ms"]
            yield {"loop": name, "size": format_size(setting.size)} | taken
        for ours in (name for name in made if "product" in name):
            for other in (name for name in made if "plain" in name):
                ratios = sorted(milliseconds[other] / milliseconds[ours] for milliseconds in rounds)
                middle = statistics.median(ratios)
                yield {"ratio": f"{other} / {ours}", "median": middle, "low": ratios[0], "high": ratios[-1]}
        if setting.device.type == "cuda":
            yield from (kernels_of(name, loop, setting) for name, loop in made.items() if "PNG" not in name)
    yield {"medians": medians}
    for name in list(named)[:: 1 if setting.windows > 1 else 5]:
        yield {"loop": name, "peak MB": peak_megabytes(setting, name)}


def kernels_of(name: str, loop: Loop, setting: Setting) -> Record:
    """Return the kernels of a step, and the share of the time in which the card has work."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        seconds = seconds_of(setting, loop)
    kernels = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {
        "loop": name,
        "kernels an iteration, with evaluation": len(kernels) / setting.batches,
        "busy": busy / seconds,
    }


def peak_megabytes(setting: Setting, name: str) -> int:
    """Return the peak of a loop in a process of its own: of the card's tensors, or of the process without a GPU."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_peak, setting, name, torch.get_num_threads()).result()


def measure_peak(setting: Setting, name: str, threads: int) -> int:
    torch.set_num_threads(threads)
    small = replace(setting, batches=1)
    loops(small, frames(small.size, small.batch, 1))[name]()()
    if setting.device.type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 1e6)
    return round(benchmark.peak_bytes() / 1e6)


def parts(setting: Setting) -> Iterator[Record]:
    """Time each part of a step alone."""
    run, device = row(setting), setting.device
    data = frames(setting.size, setting.batch, setting.batch)
    arrays = (data.train.images, data.train.labels)
    images, labels = (torch.from_numpy(np.stack(array)).to(device) for array in arrays)
    draw = epoch_draw(run.augment, setting.batch, seed=0, epoch=1).to(device)
    yield {"part": "augmentation"} | windows(setting, lambda: augment_batch(images, labels, draw))
    plain = PlainStep(setting, setting.precisions[-1])
    batch = augment_batch(images, labels, draw)[0].to(memory_format=plain.layout)

    def forward() -> Any:
        with plain.autocast:
            return plain.model(batch)

    logits = forward()
    yield {"part": "forward"} | windows(setting, forward)
    upstream = [torch.zeros_like(head) for head in (logits.main, *logits.aux)]
    yield {"part": "forward and backward"} | windows(
        setting, lambda: torch.autograd.backward([(made := forward()).main, *made.aux], upstream)
    )
    yield {"part": "SGD"} | windows(setting, plain.optimizer.step)
    adamw = torch.optim.AdamW(plain.model.parameters(), fused=True)
    yield {"part": "AdamW, fused"} | windows(setting, adamw.step)
    yield from loss_parts(
        setting, type(logits)(logits.main.detach(), tuple(aux.detach() for aux in logits.aux)), labels
    )
    for size in (setting.size, setting.label_size):
        yield {"part": "prediction", "size": format_size(size)} | windows(
            setting, lambda size=size: engine.predict(plain.model, images, size, precision=setting.precisions[-1])
        )


def loss_parts(setting: Setting, logits: Any, labels: Tensor) -> Iterator[Record]:
    """Time every loss of three heads with its gradient; Lovász-Softmax also where nearly all errors share few bins."""
    heads = [head.requires_grad_() for head in (logits.main, *logits.aux)]
    weights = torch.ones(len(CITYSCAPES), device=setting.device)
    kinds = {
        name: ROWS[name].get("loss", CrossEntropy(aux_weight=1.0)) for name in ("ce", "weighted", "ohem", "lovasz")
    }
    for name, loss in kinds.items():
        given = weights if name == "weighted" else None

        def both(loss: Any = loss, given: Tensor | None = given) -> object:
            total = losses.head_losses(logits, labels, loss, class_weights=given, epoch=1).total
            return torch.autograd.grad(total, heads)

        yield {"part": f"loss {name}"} | windows(setting, both)
    targets = labels.long()

    def whole() -> object:
        sizes = targets.shape[1:]
        full_size = [F.interpolate(head.float(), size=sizes, mode="bilinear", align_corners=False) for head in heads]
        return torch.autograd.grad(sum(F.cross_entropy(x, targets, ignore_index=VOID) for x in full_size), heads)

    yield {"part": "loss ce, plain"} | windows(setting, whole)
    classes = labels[:, ::8, ::8].long().clamp_max(len(CITYSCAPES) - 1)
    perfect = (20.0 * F.one_hot(classes, len(CITYSCAPES))).movedim(3, 1).contiguous().requires_grad_()
    sure, lovasz = type(logits)(perfect, logits.aux), kinds["lovasz"]
    yield {"part": "loss lovasz, nearly perfect logits"} | windows(
        setting,
        lambda: torch.autograd.grad(
            losses.head_losses(sure, labels, lovasz, class_weights=None, epoch=1).main, perfect
        ),
    )


def epoch(setting: Setting) -> Iterator[Record]:
    """Time whole epochs with evaluation; the first also compiles, captures and chooses algorithms."""
    data = frames(setting.size, 4 * setting.batches * setting.batch, setting.batches * setting.batch)
    for way in STEPS:
        training = begin(setting, row(setting), data, setting.precisions[-1], way)
        epochs = engine.fit(training)
        for number in range(1, 5 if setting.windows > 1 else 3):
            started = time.perf_counter()
            done = next(epochs).epoch
            wall = time.perf_counter() - started
            inside = {"train": done.train_seconds, "val": done.val_seconds}
            other = 1 - sum(inside.values()) / wall
            yield {
                "step": way,
                "epoch": number,
                "seconds": wall,
                "images/s": len(data.train) / wall,
                "other": other,
            } | inside


def packing(setting: Setting) -> Iterator[Record]:
    """Train in 1 to 4 processes at the same time."""
    for size in (setting.size, setting.small_size):
        for number in (1, 2, 3, 4) if size == setting.size else (1, 4):
            cpus = max(1, (os.cpu_count() or 1) // number)
            resources = Resources(
                cpus_per_trial=cpus, gpus_per_trial=1 / number, max_concurrent=None, concurrency=number
            )
            run = row(setting, image_size=size)
            measured = benchmark.benchmark_training(
                run,
                frame_size=size,
                with_lovasz=False,
                resources=resources,
                precision=setting.precisions[-1],
                step=STEPS[-1],
            )
            yield {"processes": number, "size": format_size(size), "images/s": number * measured.images_per_second,
                   "spread": measured.spread, "MB each": round(measured.memory_bytes / 1e6)}  # fmt: skip


def sizes(setting: Setting) -> Iterator[Record]:
    """Time and weigh the step at other sizes and batches, and one prediction with other heads."""
    height, width = setting.size
    cases = [((height // 2, width // 2), 4), ((height * 3 // 2, width * 3 // 2), 4), ((2 * height, width), 4)]
    cases += [(setting.size, 2), (setting.size, 8), (setting.size, 16)]
    for size, batch in cases if setting.windows > 1 else cases[2:3]:
        case = replace(setting, size=size, batch=batch, batches=8 if setting.windows > 1 else 1)
        if setting.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        loop = product_loop(case, frames(size, case.batches * batch, batch), setting.precisions[-1])
        loop()
        taken = summary([loop() for _ in range(2)])
        peak = round(torch.cuda.max_memory_allocated() / 1e6) if setting.device.type == "cuda" else None
        yield {"size": format_size(size), "batch": batch, "peak MB": peak} | taken
    for head_width in (64, 256, 512) if setting.windows > 1 else (64,):
        run = row(setting, head_width=head_width)
        yield {
            "head": head_width,
            "latency": [
                vars(benchmark.measure_latency(run, device=setting.device, precision=setting.precisions[-1], step=way))
                for way in STEPS
            ],
        }


def same_miou(setting: Setting) -> Iterator[Record]:
    """Train three seeds in fp32 and in bf16: is the difference of their means within the spread of seeds?"""
    data = frames(setting.small_size, 96, 24, distinct=96, label_scale=1) if setting.windows > 1 else frames(
        setting.small_size, 4, 4, label_scale=1
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    for precision in setting.precisions:
        for seed in range(3 if setting.windows > 1 else 1):
            schedule = WarmupPoly(warmup_iterations=20, power=0.9)
            run = row(
                setting, image_size=setting.small_size, num_epochs=setting.learning_epochs, seed=seed, schedule=schedule
            )
            curve = [round(end.epoch.miou, 2) for end in engine.fit(begin(setting, run, data, precision))]
            found.setdefault(precision, []).append(curve[-1])
            yield {"precision": precision, "seed": seed, "mIoU": curve}
    if setting.windows > 1:
        spread = max(statistics.stdev(values) for values in found.values())
        apart = statistics.mean(found["bf16"]) - statistics.mean(found["fp32"])
        yield {"bf16 - fp32": round(apart, 2), "sd of seeds": round(spread, 2)}


def repeatable(setting: Setting) -> Iterator[Record]:
    """Train the same twice, with deterministic algorithms and with those chosen by stopwatch: equal bits?"""
    data = frames(setting.small_size, 4 * setting.batch, setting.batch)
    for deterministic in (True, False):
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = deterministic, not deterministic
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            for name in ("ce", "ohem", "lovasz") if setting.windows > 1 else ("ce",):
                run = row(setting, image_size=setting.small_size, num_epochs=2, **ROWS[name])
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    states = [trained_state(setting, run, data) for _ in range(2)]
                unequal = [key for key, value in states[0].items() if not torch.equal(value, states[1][key])]
                said = sorted({str(item.message).split(" does not have")[0][:80] for item in caught})
                yield {"deterministic": deterministic, "row": name, "unequal tensors": len(unequal), "warnings": said}
        finally:
            torch.use_deterministic_algorithms(False)
            torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True


def trained_state(setting: Setting, run: Run, data: Packed) -> dict[str, Tensor]:
    training = begin(setting, run, data, setting.precisions[-1])
    for _ in engine.fit(training):
        pass
    return {name: value.detach().cpu().clone() for name, value in training.model.state_dict().items()}


def upload(setting: Setting) -> Iterator[Record]:
    """Time the start of two trials of a process on as many frames as Cityscapes has, and see what memory they take."""
    number = int(setting.resident_bytes // (4 * setting.size[0] * setting.size[1]))
    data = frames(setting.size, number, setting.batch)
    kept = []
    for trial in (1, 2):
        before = host_megabytes()
        seconds = seconds_of(setting, lambda: kept.append(begin(setting, row(setting), data, "bf16")))
        after = host_megabytes()
        yield {"trial": trial, "seconds": seconds, "card MB": round(torch.cuda.memory_allocated() / 1e6),
               "host MB before": before, "host MB after": after}  # fmt: skip


def host_megabytes() -> Record:
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) // 1024 for name in ("VmRSS", "VmHWM", "VmLck", "VmPin")}


@dataclass(frozen=True)
class Block:
    run: Callable[[Setting], Iterator[Record]]
    seconds: int
    needs_cuda: bool = False


BLOCKS = {
    block.run.__name__: block
    for block in (
        Block(environment, 10),
        Block(floors, 15, needs_cuda=True),
        Block(correctness, 80, needs_cuda=True),
        Block(step, 100),
        Block(parts, 50),
        Block(epoch, 40),
        Block(packing, 110, needs_cuda=True),
        Block(sizes, 50),
        Block(same_miou, 40),
        Block(repeatable, 20),
        Block(upload, 30, needs_cuda=True),
    )
}


class LateError(Exception):
    """A block has used up its time."""


def say(block: str, **record: Any) -> None:
    print(json.dumps({"block": block} | record, default=str), flush=True)


def run_block(name: str, setting: Setting, seconds: float) -> bool:
    """Print the records of a block as they come. Return whether it did not fail; to be late is no failure."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise LateError

    if BLOCKS[name].needs_cuda and setting.device.type != "cuda":
        say(name, skipped="needs CUDA, which this machine does not have")
        return True
    signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 0.001))
    started = time.perf_counter()
    try:
        for record in BLOCKS[name].run(setting):
            say(name, **record)
        say(name, done=round(time.perf_counter() - started, 1))
    except LateError:
        say(name, skipped=f"late: cut off after {seconds:.0f} s")
    except Exception as error:
        say(name, failed=f"{type(error).__name__}: {error}", where=traceback.format_exc().splitlines()[-6:])
        return False
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if setting.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny sizes: does it run to its end?")
    parser.add_argument("--only", default=",".join(BLOCKS), help="blocks, with commas between them")
    parser.add_argument("--size", help="such as 256x512; 512x1024 by default")
    parser.add_argument("--seconds", type=float, default=480, help="for all blocks together")
    parser.add_argument("--block-seconds", type=float, help="for each block, in the place of its own limit")
    arguments = parser.parse_args()
    ends = time.monotonic() + arguments.seconds
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        setting = Setting(device, Path(folder))
        if arguments.smoke:
            tiny: Record = {"size": (32, 64), "small_size": (32, 64), "batch": 2, "batches": 1, "windows": 1}
            setting = replace(setting, **tiny, learning_epochs=1, precisions=("fp32",))
        elif device.type == "cpu":
            setting = replace(setting, batches=1, windows=3)
        if arguments.size:
            height, width = map(int, arguments.size.split("x"))
            setting = replace(setting, size=(height, width))
        torch.backends.cudnn.benchmark = True  # as a trial does
        passed = True
        for name in arguments.only.split(","):
            limit = min(arguments.block_seconds or BLOCKS[name].seconds, ends - time.monotonic())
            if limit <= 0:
                say(name, skipped=f"late: {arguments.seconds:.0f} s are over")
            else:
                passed &= run_block(name, setting, limit)
        say("end", passed=passed, **clocks())
    return not passed


if __name__ == "__main__":
    sys.exit(main())
