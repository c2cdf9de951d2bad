"""What one trial holds in memory and leaves on disk, found without training it.

The network is built on torch's meta device, where shapes are real and numbers are not: a forward pass there tells
what is kept for the backward pass, in milliseconds and on any machine.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import torch
from torch import Tensor

from tune_bisenet.config import SGD, Precision, Run
from tune_bisenet.data.classes import NUM_CLASSES
from tune_bisenet.training.model import BiSeNet

LOVASZ_COPIES: Final = 9
"""How many float32 tensors of B x C x H x W Lovász-Softmax holds at its height: 8.4 to 8.8 by a process's memory, at
256x512 and 512x1024 (2026-11-23)."""

CONTEXT_BYTES: Final = 10**9
"""What CUDA, cuDNN's workspace and torch's unused blocks take on a card beside all tensors: roughly."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """In bytes."""

    weights: int
    """Running statistics of BatchNorm included."""
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass."""
    loss: int
    """What the loss holds beside them."""

    @property
    def last(self) -> int:
        """Of `last.pt`."""
        return self.weights + self.optimizer

    @property
    def going_on(self) -> int:
        """Of `last.pt` and `previous.pt`, which go when the trial has ended."""
        return 2 * self.last

    @property
    def best(self) -> int:
        """Of `best.pt`."""
        return self.weights

    @property
    def training(self) -> int:
        """Of all tensors at their height."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.loss


class Kind(NamedTuple):
    """What decides a footprint."""

    image_size: tuple[int, int]
    head_width: int
    batch_size: int
    optimizer_states: int
    """Numbers that the optimizer keeps of each weight."""
    lovasz: bool


def kind_of(run: Run) -> Kind:
    lovasz = run.loss.lovasz_after is not None
    return Kind(run.image_size, run.head_width, run.batch_size, _optimizer_states(run), lovasz)


def of(run: Run, *, precision: Precision) -> Footprint:
    """Of a trial that trains `run`; frames that are kept on the card are not counted."""
    return _of(kind_of(run), precision)


@cache
def _of(kind: Kind, precision: Precision) -> Footprint:
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    with torch.device("meta"):
        model = BiSeNet(head_width=kind.head_width)
        images = torch.empty(kind.batch_size, 3, *kind.image_size, dtype=dtype)
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    return Footprint(
        weights=parameters + sum(buffer.nbytes for buffer in model.buffers()),
        gradients=parameters,
        optimizer=kind.optimizer_states * parameters,
        activations=_kept_for_backward(model.to(dtype), images),
        loss=LOVASZ_COPIES * _logits_bytes(kind) if kind.lovasz else 0,
    )


def _optimizer_states(run: Run) -> int:
    optimizer = run.optimizer
    if isinstance(optimizer, SGD):
        return 1 if optimizer.momentum else 0
    return 2


def _kept_for_backward(model: BiSeNet, images: Tensor) -> int:
    """Each storage once, however many operations keep it; weights are counted elsewhere."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, Tensor] = {}  # the tensors too: a storage that is freed would give its address to another

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage()._cdata] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(images)
    return sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in weights)


def _logits_bytes(kind: Kind) -> int:
    """Of the main head's logits, upsampled to the labels."""
    return 4 * kind.batch_size * NUM_CLASSES * math.prod(kind.image_size)
