"""Batches of packed frames on the training device, and their augmentation: random scale, crop, flip, colour jitter.

All randomness of an epoch is drawn at once from `(seed, epoch)`, so a resumed run sees what it would have seen, and
runs with one seed see the same data in the same order.

Shapes: N images of a split, B of a batch, H x W pixels of an image, h x w of a label.
"""

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.classes import VOID
from tune_bisenet.config import Augment
from tune_bisenet.data.packed import PackedSplit

RESIDENT_SHARE: Final = 0.4
"""A split is kept on the GPU if it takes no more than this share of the memory that is free."""

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
LUMA: Final = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness as eyes see it (ITU-R BT.601)


class Frames:
    """One split, moved to the device at once if it fits comfortably onto a GPU.

    Otherwise each batch is read from the pack, whose files the system keeps in memory for all trials of a node.
    """

    def __init__(self, split: PackedSplit, device: torch.device) -> None:
        self._split = split
        self._device = device
        self._shapes = (split.images[0].shape, split.labels[0].shape)
        self._resident: tuple[Tensor, Tensor] | None = None
        if device.type == "cuda":
            num_bytes = len(split) * sum(map(math.prod, self._shapes))
            if num_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]:
                self._resident = self._gather(np.arange(len(split)))

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Return uint8 images B x 3 x H x W and labels B x h x w on the device, for int64 `indices` on the CPU."""
        if self._resident is None:
            return self._gather(indices.numpy())
        images, labels = self._resident
        indices = indices.to(self._device, non_blocking=True)
        return images[indices], labels[indices]

    def _gather(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
        pinned = self._device.type == "cuda"
        images, labels = (
            torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=pinned) for shape in self._shapes
        )
        self._split.gather(indices, images.numpy(), labels.numpy())
        return images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


@dataclass(frozen=True)
class AugmentDraw:
    """The random choices for N (or B) images."""

    window: Tensor  # N x 2 x 3: from the crop's coordinates to the image's, both in -1 .. 1
    brightness: Tensor  # N
    contrast: Tensor  # N
    saturation: Tensor  # N

    def __getitem__(self, images: slice) -> Self:
        return type(self)(self.window[images], self.brightness[images], self.contrast[images], self.saturation[images])

    def to(self, device: torch.device) -> Self:
        values = (self.window, self.brightness, self.contrast, self.saturation)
        return type(self)(*(value.to(device) for value in values))


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """Return the order in which `epoch` visits the images: a permutation of 0 .. N - 1."""
    return torch.randperm(num_images, generator=_generator(seed, epoch, stream=0))


def epoch_draw(augment: Augment, num_images: int, *, seed: int, epoch: int) -> AugmentDraw:
    """Draw the random choices for the N images of `epoch`, in the order in which they are visited."""
    uniform = torch.rand((7, num_images), generator=_generator(seed, epoch, stream=1), dtype=torch.float64)
    scale = augment.min_scale + (augment.max_scale - augment.min_scale) * uniform[0]
    window = torch.zeros(num_images, 2, 3, dtype=torch.float64)
    # A crop at scale s shows 1/s of the image; below 1 the whole image lies inside it, framed by void.
    shown, room = 1.0 / scale, (1.0 - 1.0 / scale).abs()
    window[:, 0, 0] = shown.where(uniform[1] >= augment.flip, -shown)
    window[:, 1, 1] = shown
    window[:, 0, 2] = room * (2.0 * uniform[2] - 1.0)
    window[:, 1, 2] = room * (2.0 * uniform[3] - 1.0)
    factors = 1.0 + augment.jitter * (2.0 * uniform[4:] - 1.0)
    return AugmentDraw(window.float(), *factors.float())


def augment_batch(images: Tensor, labels: Tensor, draw: AugmentDraw) -> tuple[Tensor, Tensor]:
    """Augment uint8 B x 3 x H x W and B x H x W to normalised float images and uint8 labels of the same size.

    Pixels outside the image are 0 after normalisation, and void in the label.
    """
    grid = F.affine_grid(draw.window, list(images.shape), align_corners=False)
    sampled = F.grid_sample(_jitter(images, draw), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # grid_sample pads with 0: shift the ids so that 0 means void while it works.
    shifted = labels.unsqueeze(1).float() - VOID
    moved = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled, (moved + VOID).squeeze(1).to(torch.uint8)


def normalise(images: Tensor) -> Tensor:
    """Convert uint8 B x 3 x H x W to float and normalise with ImageNet's mean and standard deviation."""
    return _standardise(images.float() / 255.0)


def _jitter(images: Tensor, draw: AugmentDraw) -> Tensor:
    """Apply brightness, contrast, saturation and normalisation, in this order, as one 3 x 4 colour matrix an image."""
    luma = torch.tensor(LUMA, device=images.device)
    pixels = images.float() / 255.0
    mean_luma = pixels.mean((2, 3)) @ luma
    identity = torch.eye(3, device=images.device)
    saturation = draw.saturation.view(-1, 1, 1)
    mixing = (draw.brightness * draw.contrast).view(-1, 1, 1) * (saturation * identity + (1.0 - saturation) * luma)
    offset = (draw.brightness * (1.0 - draw.contrast) * mean_luma).view(-1, 1, 1, 1)
    jittered = torch.einsum("bij,bjhw->bihw", mixing, pixels) + offset
    return _standardise(jittered.clamp_(0.0, 1.0))


def _standardise(pixels: Tensor) -> Tensor:
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return (pixels - mean) / std


def _generator(seed: int, epoch: int, *, stream: int) -> torch.Generator:
    """Return an independent generator for every (seed, epoch, stream): numpy's SeedSequence mixes them well."""
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
