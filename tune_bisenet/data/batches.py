"""Batches of packed frames on the training device, and their augmentation: random scale, crop, flip, colour jitter.

All randomness of an epoch is drawn at once from `(seed, epoch)`, so a resumed run sees what it would have seen, and
runs with one seed see the same data in the same order.

Shapes: N images of a split, B of a batch, H x W pixels of an image, h x w of a label.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from typing import Final, Self, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from tune_bisenet.classes import VOID
from tune_bisenet.config import Augment
from tune_bisenet.data.packed import Packed, PackedSplit
from tune_bisenet.data.source import Split

CHUNK_BYTES: Final = 2**26
"""A split is copied to a GPU through two page-locked buffers of this size, or of a frame's where that is larger. torch
rounds such buffers up to powers of two and keeps them as long as the process lives."""

IMAGENET_MEAN: Final = (0.485, 0.456, 0.406)
IMAGENET_STD: Final = (0.229, 0.224, 0.225)
LUMA: Final = (0.299, 0.587, 0.114)  # weights of red, green and blue in brightness as eyes see it (ITU-R BT.601)


class Frames:
    """One split, batch by batch: resident on the device, or read from the pack, whose files the system caches."""

    def __init__(self, split: PackedSplit, device: torch.device, resident: tuple[Tensor, Tensor] | None = None) -> None:
        self._split = split
        self._device = device
        self._resident = resident

    def __len__(self) -> int:
        return len(self._split)

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the frames of `order`, N int64 on the CPU, on the device; the last batch may be smaller.

        Where labels differ in size, so is one whose next frame has another size: all labels of a batch have one.
        Images are uint8 B x 3 x H x W, labels B x h x w. A GPU is not waited for: frames that are not resident are read
        while the batch before is used. On a CPU, which has to read as well as to train, each is read when it is due.
        """
        if self._resident is not None:
            images, labels = self._resident
            for indices in torch.split(order.to(self._device), batch_size):
                yield images[indices], labels[indices]
            return
        parts = self._parts(order, batch_size)
        for images, labels in map(self._read, parts) if self._device.type == "cpu" else _read_ahead(self._read, parts):
            yield images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)

    def _parts(self, order: Tensor, batch_size: int) -> Iterator[Tensor]:
        sizes = self._split.label_sizes
        groups = [order]
        if sizes:
            groups = [torch.tensor(list(group)) for _size, group in groupby(order.tolist(), key=sizes.__getitem__)]
        for group in groups:
            yield from torch.split(group, batch_size)

    def _read(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        shapes = (self._split.images[0].shape, self._split.labels[int(indices[0])].shape)
        images, labels = (
            torch.empty((len(indices), *shape), dtype=torch.uint8, pin_memory=self._device.type == "cuda")
            for shape in shapes
        )
        self._split.gather(indices.numpy(), images.numpy(), labels.numpy())
        return images, labels


_Item = TypeVar("_Item")
_Value = TypeVar("_Value")


def _read_ahead(read: Callable[[_Item], _Value], items: Iterable[_Item]) -> Iterator[_Value]:
    """Yield `read(item)` of each item in turn; in a thread, the next is read while one is used, and none beyond."""
    with ThreadPoolExecutor(1) as pool:
        ahead: Future[_Value] | None = None
        for item in items:
            following = pool.submit(read, item)
            if ahead is not None:
                yield ahead.result()
            ahead = following
        if ahead is not None:
            yield ahead.result()


_resident: Final[dict[tuple[str, Split, torch.device], tuple[Tensor, Tensor]]] = {}
"""The splits that this process has on its devices, by the digest of their pack, the last used one last: trials that
follow each other in a worker share them."""


def load_frames(data: Packed, device: torch.device, *, room: int) -> tuple[Frames, Frames]:
    """Return both splits of a pack, each resident on the device if it fits into `room` bytes, the training split first.

    A split whose labels differ in size is not: a tensor holds labels of one size.
    What other packs left there remains only as far as it fits beside them. Raises DamagedPackError.
    """
    splits: dict[Split, PackedSplit] = {"train": data.train, "val": data.val}
    resident = {}
    for name, split in splits.items():
        num_bytes = len(split) * (split.images[0].nbytes + split.labels[0].nbytes)
        if num_bytes <= room and not split.label_sizes:
            room -= num_bytes
            resident[name] = (data.digest, name, device)
    for key in [key for key in reversed(_resident) if key[2] == device and key not in resident.values()]:
        num_bytes = sum(tensor.nbytes for tensor in _resident[key])
        if num_bytes <= room:
            room -= num_bytes
        else:
            del _resident[key]
    for name, key in resident.items():
        split = splits[name]
        present = _resident.pop(key, None)
        _resident[key] = present or (_copy_to(device, split.images), _copy_to(device, split.labels))
    train, val = (Frames(split, device, _resident.get((data.digest, name, device))) for name, split in splits.items())
    return train, val


def _copy_to(device: torch.device, arrays: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Copy arrays of one shape to the device as one tensor, through two buffers: one is filled, the other copied."""
    on_gpu = device.type == "cuda"
    target = torch.empty((len(arrays), *arrays[0].shape), dtype=torch.uint8, device=device)
    num_rows = min(len(arrays), max(1, CHUNK_BYTES // arrays[0].nbytes))
    buffers = [torch.empty((num_rows, *arrays[0].shape), dtype=torch.uint8, pin_memory=on_gpu) for _ in range(2)]
    copied = [torch.cuda.Event() for _ in buffers] if on_gpu else []  # type: ignore[no-untyped-call]
    for number, first in enumerate(range(0, len(arrays), num_rows)):
        rows = range(first, min(first + num_rows, len(arrays)))
        buffer = buffers[number % 2][: len(rows)]
        if on_gpu:
            copied[number % 2].synchronize()  # returns at once before it is first recorded
        for row, index in enumerate(rows):
            buffer.numpy()[row] = arrays[index]
        target[first : rows.stop].copy_(buffer, non_blocking=True)
        if on_gpu:
            copied[number % 2].record()
    return target


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
    luma, identity = _colours(images.device)
    pixels = images.float() / 255.0
    mean_luma = pixels.mean((2, 3)) @ luma
    saturation = draw.saturation.view(-1, 1, 1)
    mixing = (draw.brightness * draw.contrast).view(-1, 1, 1) * (saturation * identity + (1.0 - saturation) * luma)
    offset = (draw.brightness * (1.0 - draw.contrast) * mean_luma).view(-1, 1, 1, 1)
    jittered = torch.einsum("bij,bjhw->bihw", mixing, pixels) + offset
    return _standardise(jittered.clamp_(0.0, 1.0))


def _standardise(pixels: Tensor) -> Tensor:
    mean, std = _statistics(pixels.device)
    return (pixels - mean) / std


@cache
def _colours(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return LUMA and the 3 x 3 identity. They are copied to a GPU once, since it would be waited for each time."""
    return torch.tensor(LUMA, device=device), torch.eye(3, device=device)


@cache
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of ImageNet's colours, each 3 x 1 x 1."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def _generator(seed: int, epoch: int, *, stream: int) -> torch.Generator:
    """Return an independent generator for every (seed, epoch, stream): numpy's SeedSequence mixes them well."""
    state = np.random.SeedSequence([seed, epoch, stream]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(state >> np.uint64(1)))
