"""Train one run: an epoch loop that yields after every epoch and knows nothing of Ray, files or screens.

State is small because the rest is pure: the rate is a function of the iteration, all randomness one of
`(seed, epoch)`. Weights, optimizer and the number of completed epochs are the whole state.

Shapes: B images, C classes, H x W pixels trained on, h x w pixels of a validation label.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import assert_never

import torch
from torch import Tensor, nn

from tune_bisenet.classes import ClassSet
from tune_bisenet.config import OHEM, CrossEntropy, Precision, Run, StepMode, WeightedCrossEntropy
from tune_bisenet.data.batches import (
    AugmentDraw,
    Frames,
    augment_batch,
    epoch_draw,
    epoch_order,
    load_frames,
    normalise,
)
from tune_bisenet.data.packed import Packed
from tune_bisenet.records import NUM_SAMPLES, Epoch
from tune_bisenet.training import losses, metrics, optim
from tune_bisenet.training.model import BiSeNet
from tune_bisenet.training.optim import lr_at
from tune_bisenet.training.stepper import Batch, Stepper


@dataclass
class Training:
    """A run in progress on a device. `epochs_done`, the model and the optimizer are all that changes."""

    run: Run
    device: torch.device
    precision: Precision
    model: BiSeNet
    optimizer: torch.optim.Optimizer
    train: Frames
    val: Frames
    class_weights: Tensor | None  # C, float32; None where the loss does not weigh classes
    classes: ClassSet
    stepper: Stepper
    epochs_done: int = 0

    @property
    def iterations_per_epoch(self) -> int:
        return len(self.train) // self.run.batch_size

    @property
    def sample_indices(self) -> list[int]:
        """Return validation images spread over the split."""
        count = min(NUM_SAMPLES, len(self.val))
        return [round(number * (len(self.val) - 1) / max(count - 1, 1)) for number in range(count)]


@dataclass(frozen=True)
class EpochEnd:
    """Holds what an epoch leaves: its measurements, and what they were made from."""

    epoch: Epoch
    confusion: Tensor  # images x C x C, int64, on the CPU: labels by rows, predictions by columns
    samples: dict[int, Tensor]  # validation image -> its prediction, h x w uint8, on the CPU


def begin(
    run: Run,
    data: Packed,
    *,
    device: torch.device,
    precision: Precision,
    backbone: dict[str, Tensor] | None,
    frames_room: int = 0,
    step: StepMode = "eager",
) -> Training:
    """Return a run before its first epoch, its weights drawn from its seed, or from `backbone` for the ResNet-18.

    Frames may take `frames_room` bytes of the device's memory. With another `step` than `eager`, what is recorded once
    is replayed (`Stepper`): a state is to be loaded before the first epoch.
    """
    torch.manual_seed(run.random_seed)
    model = BiSeNet(num_classes=len(data.classes), head_width=run.head_width)
    if backbone is not None:
        model.context.resnet.load_state_dict(backbone)
    place(model, device, precision)
    class_weights = None
    match run.loss:
        case WeightedCrossEntropy(exponent=exponent):
            counts = torch.from_numpy(data.class_counts.copy())
            class_weights = losses.class_weights_from(counts, exponent).to(device)
        case CrossEntropy() | OHEM():
            pass
        case _:
            assert_never(run.loss)
    train, val = load_frames(data, device, room=frames_room)
    return Training(
        run=run,
        device=device,
        precision=precision,
        model=model,
        optimizer=optim.build_optimizer(run, model, fused=device.type == "cuda"),
        train=train,
        val=val,
        class_weights=class_weights,
        classes=data.classes,
        stepper=Stepper(step, device),
    )


def fit(training: Training, *, between: Callable[[], None] = lambda: None) -> Iterator[EpochEnd]:
    """Train the remaining epochs and yield after each. `training` may be saved whenever this has yielded.

    `between` is called before each iteration. Its time is none of the epoch's; what it raises ends the training.
    """
    while training.epochs_done < training.run.num_epochs:
        measured = _train_epoch(training, training.epochs_done + 1, between)
        training.epochs_done += 1
        yield _validate(training, measured)


def _train_epoch(training: Training, epoch: int, between: Callable[[], None]) -> dict[str, float]:
    """Pass once over the training split; return what `Epoch` holds of it, by field.

    It waits for the device only before the first iteration and after the last.
    """
    started = time.perf_counter()
    run = training.run
    training.model.train()
    order = epoch_order(len(training.train), seed=run.random_seed, epoch=epoch)
    draw = epoch_draw(run.augment, len(order), seed=run.random_seed, epoch=epoch).to(training.device)
    num_iterations = training.iterations_per_epoch
    batch_counts = [count + num_iterations for count in _batch_counts(training.model)]
    loss_sums = torch.zeros(4, device=training.device)
    norms = []
    lr = 0.0
    group: list[Batch] = []
    batches = training.train.batches(order[: num_iterations * run.batch_size], run.batch_size)
    for iteration, frames in enumerate(batches):
        left = time.perf_counter()
        between()
        started += time.perf_counter() - left
        batch = slice(iteration * run.batch_size, (iteration + 1) * run.batch_size)
        group.append((*frames, *vars(draw[batch]).values()))
        if len(group) < run.accumulation and iteration + 1 < num_iterations:
            continue
        done = (epoch - 1) * num_iterations + iteration
        lr = lr_at(run.schedule, run.optimizer.lr, done, run.num_epochs * num_iterations)
        optim.set_rate(training.optimizer, lr)
        *parts, norm = training.stepper.call(
            partial(_take_step, training, epoch=epoch),
            group,
            kind="a training step",
            variant=losses.uses_lovasz(run.loss, epoch),
            undone=partial(_undone, training),
        )
        for part in parts:
            loss_sums += part
        norms.append(norm)
        group = []
    for count, expected in zip(_batch_counts(training.model), batch_counts, strict=True):
        count.copy_(expected)  # a replay counts nothing
    total, main, aux1, aux2 = (loss_sums / num_iterations).tolist()
    grad_norm = torch.stack(norms).mean().item()
    seconds = time.perf_counter() - started
    return {
        "loss": total,
        "loss_main": main,
        "loss_aux1": aux1,
        "loss_aux2": aux2,
        "lr": lr,
        "grad_norm": grad_norm,
        "images_per_second": num_iterations * run.batch_size / max(seconds, math.ulp(1.0)),
        "train_seconds": seconds,
    }


def _take_step(training: Training, group: Sequence[Batch], *, epoch: int) -> list[Tensor]:
    """Take one optimizer step by the mean gradient of a group; an epoch's last one may be smaller. The rate is set.

    A batch is that of `Frames` and the values of its `AugmentDraw`. Returns what `_backward` does for each, and then
    the gradient's norm before clipping.
    """
    parts = []
    for images, labels, *draw in group:
        augmented = augment_batch(images, labels, AugmentDraw(*draw))
        parts.append(_backward(training, *augmented, epoch=epoch, scale=1.0 / len(group)))
    norm = optim.clip_gradients(training.model.parameters(), training.run.max_grad_norm)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return [*parts, norm.detach()]


@contextlib.contextmanager
def _undone(training: Training) -> Iterator[None]:
    """Put back at the end, in place, what was changed of a training; it leaves no gradient."""
    before = {key: tensor.clone() for key, tensor in _numbers(training).items()}
    try:
        yield
    finally:
        training.optimizer.zero_grad(set_to_none=True)
        for key, tensor in _numbers(training).items():
            tensor.copy_(before[key] if key in before else torch.zeros_like(tensor))  # an optimizer begins with zeros


def _numbers(training: Training) -> dict[object, Tensor]:
    """Return all tensors that a step changes."""
    states = training.optimizer.state.items()
    numbers = {(id(weight), name): value for weight, state in states for name, value in state.items()}
    return training.model.state_dict() | {key: value for key, value in numbers.items() if isinstance(value, Tensor)}


def _batch_counts(model: BiSeNet) -> list[Tensor]:
    """Return each norm's count of the batches that it was trained on."""
    norms = (module for module in model.modules() if isinstance(module, nn.BatchNorm2d))
    return [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]


def _backward(training: Training, images: Tensor, labels: Tensor, *, epoch: int, scale: float) -> Tensor:
    """Add `scale` times the gradient of one micro-batch; return total, main, aux1 and aux2 loss, unscaled."""
    with _autocast(training.device, training.precision):
        logits = training.model(images.to(memory_format=_memory_format(images.device, training.precision)))
    parts = losses.head_losses(logits, labels, training.run.loss, class_weights=training.class_weights, epoch=epoch)
    (parts.total * scale).backward()  # type: ignore[no-untyped-call]
    return torch.stack(parts).detach()


def _validate(training: Training, measured: dict[str, float]) -> EpochEnd:
    """Score whole validation images at the resolution of their labels. `measured` is what training gave.

    The last step may break weights or running statistics unseen by its loss: then there is no mIoU.
    """
    started = time.perf_counter()
    training.model.eval()
    wanted = set(training.sample_indices)
    numbers = [value for value in training.model.state_dict().values() if value.is_floating_point()]
    is_sound = nn.utils.get_total_norm(numbers, math.inf).isfinite()
    matrices, samples = [], {}
    first = 0
    for images, labels in training.val.batches(torch.arange(len(training.val)), training.run.batch_size):
        predictions, matrix, is_finite = training.stepper.call(
            partial(_score, training), [(images, labels)], kind="validation"
        )
        is_sound &= is_finite
        matrices.append(matrix)
        for index in wanted.intersection(range(first, first + len(images))):
            samples[index] = predictions[index - first].cpu()
        first += len(images)
    confusion = torch.cat(matrices).cpu()
    val_seconds = time.perf_counter() - started
    matrix = confusion.sum(dim=0)
    iou = metrics.iou_per_class(matrix)
    epoch = Epoch(
        epoch=training.epochs_done,
        iterations=training.epochs_done * training.iterations_per_epoch,
        miou=metrics.mean_iou(iou) if is_sound else math.nan,
        iou=tuple(iou),
        pixel_accuracy=metrics.pixel_accuracy(matrix),
        val_seconds=val_seconds,
        **measured,
    )
    return EpochEnd(epoch, confusion, samples)


def _score(training: Training, batches: Sequence[Batch]) -> list[Tensor]:
    """Return the predictions for a batch of `Frames`, its confusion matrices, and whether its logits are finite."""
    ((images, labels),) = batches
    logits = main_logits(training.model, images, precision=training.precision)
    predictions = losses.argmax(logits, (labels.shape[1], labels.shape[2]))
    return [predictions, metrics.confusion(predictions, labels, len(training.classes)), logits.isfinite().all()]


def predict(model: BiSeNet, images: Tensor, size: tuple[int, int], *, precision: Precision) -> Tensor:
    """Return the likeliest trainId of each pixel: uint8 B x 3 x H x W to uint8 B x h x w, `size` being (h, w).

    `images` are on the device of `model`, which is left in evaluation mode.
    """
    return losses.argmax(main_logits(model, images, precision=precision), size)


@torch.no_grad()
def main_logits(model: BiSeNet, images: Tensor, *, precision: Precision) -> Tensor:
    """Return the main head's logits, at its own resolution: uint8 B x 3 x H x W to B x C x H/8 x W/8.

    `images` are on the device of `model`, which is left in evaluation mode.
    """
    model.eval()
    with _autocast(images.device, precision):
        logits = model(normalise(images).to(memory_format=_memory_format(images.device, precision)))
    main: Tensor = logits.main
    return main


def supports_bf16(device: torch.device) -> bool:
    """Return whether `device` has instructions for bf16: without them it is emulated, and slower than fp32.

    Of several GPUs all must have them, since a trial may get any.
    """
    if device.type == "cuda":
        capabilities = [torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())]
        return min(capabilities) >= (8, 0)
    found = torch.cpu.get_capabilities()
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


def place(model: BiSeNet, device: torch.device, precision: Precision) -> None:
    """Move `model` onto `device`, its weights laid out as convolutions are fastest there.

    The norms' counts of batches, which nothing reads, remain on the CPU: a GPU would be given 36 kernels for them.
    """
    model.to(device=device)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.num_batches_tracked is not None:
            module.num_batches_tracked = module.num_batches_tracked.cpu()
    model.to(memory_format=_memory_format(device, precision))


def _autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _memory_format(device: torch.device, precision: Precision) -> torch.memory_format:
    """Return channels last where it is faster; on CPUs in fp32 the backward loses what the forward gains."""
    return torch.channels_last if device.type == "cuda" or precision == "bf16" else torch.preserve_format
