"""Train one run: an epoch loop that yields after every epoch and knows nothing of Ray, files or screens.

State is small because the rest is pure: the rate is a function of the iteration, all randomness one of
`(seed, epoch)`. Weights, optimizer and the number of epochs done say everything.

Shapes: B images, C classes, H x W pixels trained on, h x w pixels of a validation label.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, assert_never

import torch
from torch import Tensor

from tune_bisenet.config import OHEM, CrossEntropy, Precision, Run, WeightedCrossEntropy
from tune_bisenet.data.augment import augment_batch, epoch_draw, epoch_order, normalise
from tune_bisenet.data.frames import Frames
from tune_bisenet.data.packed import Packed
from tune_bisenet.records import Epoch
from tune_bisenet.training import losses, metrics, optim
from tune_bisenet.training.model import BiSeNet
from tune_bisenet.training.optim import lr_at

NUM_SAMPLES: Final = 3
"""Validation images whose predictions are handed out for a person to look at."""


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
    epochs_done: int = 0

    @property
    def iterations_per_epoch(self) -> int:
        return len(self.train) // self.run.batch_size

    @property
    def sample_indices(self) -> list[int]:
        """Validation images spread over the split."""
        count = min(NUM_SAMPLES, len(self.val))
        return [round(place * (len(self.val) - 1) / max(count - 1, 1)) for place in range(count)]


@dataclass(frozen=True)
class EpochEnd:
    """What an epoch leaves: its measurements, and what they were made from."""

    epoch: Epoch
    confusion: Tensor  # images x C x C, int64, on the CPU: labels by rows, predictions by columns
    samples: dict[int, Tensor]  # validation image -> its prediction, h x w uint8, on the CPU


@dataclass(frozen=True)
class _TrainSums:
    losses: tuple[float, float, float, float]  # total, main, aux1, aux2: means over the epoch
    grad_norm: float
    lr: float
    seconds: float


def begin(
    run: Run,
    data: Packed,
    *,
    device: torch.device,
    precision: Precision,
    backbone: dict[str, Tensor] | None,
) -> Training:
    """A run before its first epoch, its weights drawn from its seed. `backbone` holds ResNet-18 weights, if any."""
    torch.manual_seed(run.seed)
    model = BiSeNet(head_width=run.head_width)
    if backbone is not None:
        model.load_backbone(backbone)
    place(model, device)
    return Training(
        run=run,
        device=device,
        precision=precision,
        model=model,
        optimizer=optim.build(run, model),
        train=Frames(data.train, device),
        val=Frames(data.val, device),
        class_weights=_class_weights(run, data, device),
    )


def fit(training: Training) -> Iterator[EpochEnd]:
    """Train the epochs that are left, yielding after each. `training` may be saved whenever this has yielded."""
    while training.epochs_done < training.run.num_epochs:
        sums = _train_epoch(training, training.epochs_done + 1)
        training.epochs_done += 1
        yield _validate(training, sums)


def _class_weights(run: Run, data: Packed, device: torch.device) -> Tensor | None:
    """What each class weighs, C float32; None where the loss does not weigh classes."""
    loss = run.loss
    match loss:
        case WeightedCrossEntropy():
            return losses.class_weights_from(torch.from_numpy(data.class_counts.copy()), loss.exponent).to(device)
        case CrossEntropy() | OHEM():
            return None
        case _:
            assert_never(loss)


# --- training ---------------------------------------------------------------------------------------------------


def _train_epoch(training: Training, epoch: int) -> _TrainSums:
    """One pass over the training split; waits for the device only at its end, and where its loss does."""
    started = time.perf_counter()
    run = training.run
    training.model.train()
    order = epoch_order(len(training.train), seed=run.seed, epoch=epoch)
    draw = epoch_draw(run.augment, len(order), seed=run.seed, epoch=epoch).to(training.device)
    num_iterations = training.iterations_per_epoch
    loss_sums = torch.zeros(4, device=training.device)
    norms = []
    lr = 0.0
    for iteration in range(num_iterations):
        batch = slice(iteration * run.batch_size, (iteration + 1) * run.batch_size)
        images, labels = augment_batch(*training.train.batch(order[batch]), draw[batch])
        group_size = _group_size(iteration, num_iterations, run.accumulation)
        loss_sums += _backward(training, images, labels, epoch=epoch, scale=1.0 / group_size)
        if (iteration + 1) % run.accumulation == 0 or iteration + 1 == num_iterations:
            done = (epoch - 1) * num_iterations + iteration
            lr = lr_at(run.schedule, run.optimizer.lr, done, run.num_epochs * num_iterations)
            norms.append(_step(training, lr))
    total, main, aux1, aux2 = (loss_sums / num_iterations).tolist()
    grad_norm = torch.stack(norms).mean().item()
    return _TrainSums((total, main, aux1, aux2), grad_norm, lr, time.perf_counter() - started)


def _group_size(iteration: int, num_iterations: int, accumulation: int) -> int:
    """How many micro-batches share this iteration's optimizer step; an epoch's last group may be smaller."""
    first = iteration - iteration % accumulation
    return min(accumulation, num_iterations - first)


def _backward(training: Training, images: Tensor, labels: Tensor, *, epoch: int, scale: float) -> Tensor:
    """Add `scale` times the gradient of one micro-batch; return total, main, aux1 and aux2 loss, unscaled."""
    with _autocast(training.device, training.precision):
        logits = training.model(_laid_out(images))
    parts = losses.head_losses(logits, labels, training.run.loss, class_weights=training.class_weights, epoch=epoch)
    (parts.total * scale).backward()  # type: ignore[no-untyped-call]
    return torch.stack(parts).detach()


def _step(training: Training, lr: float) -> Tensor:
    """One optimizer step at rate `lr`; returns the gradient's norm before clipping."""
    norm = optim.clip_gradients(training.model.parameters(), training.run.max_grad_norm)
    optim.set_lr(training.optimizer, lr)
    training.optimizer.step()
    training.optimizer.zero_grad(set_to_none=True)
    return norm.detach()


# --- validation -------------------------------------------------------------------------------------------------


def _validate(training: Training, sums: _TrainSums) -> EpochEnd:
    """Score whole validation images at the resolution of their labels."""
    started = time.perf_counter()
    wanted = set(training.sample_indices)
    matrices, samples = [], {}
    for first in range(0, len(training.val), training.run.batch_size):
        indices = torch.arange(first, min(first + training.run.batch_size, len(training.val)))
        images, labels = training.val.batch(indices)
        size = (labels.shape[1], labels.shape[2])
        predictions = predict(training.model, images, size, precision=training.precision)
        matrices.append(metrics.confusion(predictions, labels))
        for index in wanted.intersection(indices.tolist()):
            samples[index] = predictions[index - first].cpu()
    confusion = torch.cat(matrices).cpu()
    return EpochEnd(_measured(training, sums, confusion, time.perf_counter() - started), confusion, samples)


@torch.no_grad()
def predict(model: BiSeNet, images: Tensor, size: tuple[int, int], *, precision: Precision) -> Tensor:
    """The likeliest trainId of each pixel: uint8 B x 3 x H x W to uint8 B x h x w, `size` being (h, w).

    `images` lie where `place` has put `model`, which is left in evaluation mode.
    """
    model.eval()
    with _autocast(images.device, precision):
        logits = model(_laid_out(normalise(images)))
    return losses.argmax(logits.main, size)


def _measured(training: Training, sums: _TrainSums, confusion: Tensor, val_seconds: float) -> Epoch:
    matrix = confusion.sum(dim=0)
    iou = metrics.iou_per_class(matrix)
    num_iterations = training.iterations_per_epoch
    total, main, aux1, aux2 = sums.losses
    return Epoch(
        epoch=training.epochs_done,
        iterations=training.epochs_done * num_iterations,
        loss=total,
        loss_main=main,
        loss_aux1=aux1,
        loss_aux2=aux2,
        lr=sums.lr,
        grad_norm=sums.grad_norm,
        miou=metrics.mean_iou(iou),
        iou=tuple(iou),
        pixel_accuracy=metrics.pixel_accuracy(matrix),
        images_per_second=num_iterations * training.run.batch_size / max(sums.seconds, math.ulp(1.0)),
        train_seconds=sums.seconds,
        val_seconds=val_seconds,
    )


# --- the device -------------------------------------------------------------------------------------------------


def place(model: BiSeNet, device: torch.device) -> None:
    """Move `model` onto `device`, its weights laid out as convolutions are fastest there."""
    model.to(device=device)
    if _prefers_channels_last(device):
        model.to(memory_format=torch.channels_last)


def _autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[object]:
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def _prefers_channels_last(device: torch.device) -> bool:
    """On GPUs convolutions are faster with channels last; on CPUs the gain of the forward is lost in the backward."""
    return device.type == "cuda"


def _laid_out(images: Tensor) -> Tensor:
    return images.contiguous(memory_format=torch.channels_last) if _prefers_channels_last(images.device) else images
