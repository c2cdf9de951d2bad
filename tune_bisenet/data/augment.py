"""Random scale, crop, flip and colour jitter of whole batches, on the device that trains.

All randomness of an epoch is drawn at once from `(seed, epoch)`, so a resumed run sees what it would have seen, and
runs with one seed see the same data in the same order.

Shapes: N images of a split, B of a batch, H x W pixels.
"""

from dataclasses import dataclass
from typing import Final, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tune_bisenet.config import Augment
from tune_bisenet.data.classes import VOID

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
LUMA: Final = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness as eyes see it (ITU-R BT.601)."""


@dataclass(frozen=True)
class Draw:
    """The random choices for N (or B) images."""

    window: Tensor  # N x 2 x 3: from the crop's coordinates to the image's, both in -1 .. 1
    brightness: Tensor  # N
    contrast: Tensor  # N
    saturation: Tensor  # N

    def __getitem__(self, images: slice) -> Self:
        return type(self)(self.window[images], self.brightness[images], self.contrast[images], self.saturation[images])

    def to(self, device: torch.device) -> Self:
        return type(self)(
            *(values.to(device) for values in (self.window, self.brightness, self.contrast, self.saturation))
        )


def epoch_order(num_images: int, *, seed: int, epoch: int) -> Tensor:
    """The order in which `epoch` visits the images: a permutation of 0 .. N - 1."""
    return torch.randperm(num_images, generator=_generator(seed, epoch, stream=0))


def epoch_draw(augment: Augment, num_images: int, *, seed: int, epoch: int) -> Draw:
    """The random choices for the N images of `epoch`, in the order in which they are visited."""
    uniform = torch.rand((7, num_images), generator=_generator(seed, epoch, stream=1), dtype=torch.float64)
    scale = augment.min_scale * (augment.max_scale / augment.min_scale) ** uniform[0]
    window = torch.zeros(num_images, 2, 3, dtype=torch.float64)
    # A crop at scale s shows 1/s of the image; below 1 the whole image lies inside it, framed by void.
    shown, room = 1.0 / scale, (1.0 - 1.0 / scale).abs()
    window[:, 0, 0] = shown.where(uniform[1] >= augment.flip, -shown)
    window[:, 1, 1] = shown
    window[:, 0, 2] = room * (2.0 * uniform[2] - 1.0)
    window[:, 1, 2] = room * (2.0 * uniform[3] - 1.0)
    factors = 1.0 + augment.jitter * (2.0 * uniform[4:] - 1.0)
    return Draw(window.float(), *factors.float())


def augment_batch(images: Tensor, labels: Tensor, draw: Draw) -> tuple[Tensor, Tensor]:
    """uint8 B x 3 x H x W and B x H x W to normalised float images and uint8 labels of the same size.

    Outside the image there is 0 after normalisation, and void in the label.
    """
    grid = F.affine_grid(draw.window, list(images.shape), align_corners=False)
    sampled = F.grid_sample(_jitter(images, draw), grid, mode="bilinear", padding_mode="zeros", align_corners=False)
    # grid_sample pads with 0: shift the ids so that 0 means void while it works.
    shifted = labels.unsqueeze(1).float() - VOID
    moved = F.grid_sample(shifted, grid, mode="nearest", padding_mode="zeros", align_corners=False)
    return sampled, (moved + VOID).squeeze(1).to(torch.uint8)


def normalise(images: Tensor) -> Tensor:
    """uint8 B x 3 x H x W to float with ImageNet's mean and deviation taken out."""
    mean, std = _channels(IMAGENET_MEAN, images), _channels(IMAGENET_STD, images)
    return (images.float() / 255.0 - mean) / std


def _jitter(images: Tensor, draw: Draw) -> Tensor:
    """Brightness, then contrast, then saturation, then normalisation, as one 3 x 4 colour matrix an image."""
    luma = torch.tensor(LUMA, device=images.device)
    mean, std = _channels(IMAGENET_MEAN, images), _channels(IMAGENET_STD, images)
    pixels = images.float() / 255.0
    mean_luma = pixels.mean((2, 3)) @ luma
    identity = torch.eye(3, device=images.device)
    saturation = draw.saturation.view(-1, 1, 1)
    mixing = (draw.brightness * draw.contrast).view(-1, 1, 1) * (saturation * identity + (1.0 - saturation) * luma)
    offset = (draw.brightness * (1.0 - draw.contrast) * mean_luma).view(-1, 1, 1, 1)
    jittered = torch.einsum("bij,bjhw->bihw", mixing, pixels) + offset
    return (jittered.clamp_(0.0, 1.0) - mean) / std


def _channels(values: tuple[float, float, float], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(1, 3, 1, 1)


def _generator(seed: int, epoch: int, *, stream: int) -> torch.Generator:
    """Independent streams for every (seed, epoch, stream): numpy's SeedSequence mixes them well."""
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
