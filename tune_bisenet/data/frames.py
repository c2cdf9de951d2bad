"""Batches of packed frames as tensors on the training device: the torch edge of `packed`.

A split that fits comfortably onto a GPU is moved there once and whole; otherwise each batch is copied out of the
memory map, which all trials of a node share.
"""

from typing import Final

import numpy as np
import torch
from torch import Tensor

from tune_bisenet.data.packed import PackedSplit

RESIDENT_SHARE: Final = 0.4
"""A split is kept on the GPU if it takes no more than this share of the memory that is free."""


class Frames:
    """One split on one device."""

    def __init__(self, split: PackedSplit, device: torch.device) -> None:
        self._split = split
        self._device = device
        self._resident = self._gather(np.arange(len(split))) if _fits(split, device) else None

    def __len__(self) -> int:
        return len(self._split)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Images B x 3 x H x W and labels B x h x w, both uint8 on the device, for int64 `indices` on the CPU."""
        if self._resident is None:
            return self._gather(indices.numpy())
        images, labels = self._resident
        indices = indices.to(self._device, non_blocking=True)
        return images[indices], labels[indices]

    def _gather(self, indices: np.ndarray[tuple[int], np.dtype[np.int64]]) -> tuple[Tensor, Tensor]:
        pinned = self._device.type == "cuda"
        split = self._split
        images = torch.empty((len(indices), *split.images[0].shape), dtype=torch.uint8, pin_memory=pinned)
        labels = torch.empty((len(indices), *split.labels[0].shape), dtype=torch.uint8, pin_memory=pinned)
        split.gather(indices, images.numpy(), labels.numpy())
        return images.to(self._device, non_blocking=True), labels.to(self._device, non_blocking=True)


def _fits(split: PackedSplit, device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    num_bytes = len(split) * (split.images[0].nbytes + split.labels[0].nbytes)
    return num_bytes <= RESIDENT_SHARE * torch.cuda.mem_get_info(device)[0]
