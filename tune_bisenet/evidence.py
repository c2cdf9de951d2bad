"""What a trial's best epoch predicted, for people and statistics: a file that needs numpy alone, and runs no code."""

import io
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

BEST: Final = "best.npz"
"""Beside `best.pt` in a trial's folder."""


@dataclass(frozen=True, eq=False)
class Best:
    """N validation images, S of them kept for a person to look at; C classes, H x W images, h x w labels."""

    confusions: NDArray[np.int32]  # N x C x C, labels by rows
    names: tuple[str, ...]  # of the S images
    images: NDArray[np.uint8]  # S x 3 x H x W
    labels: NDArray[np.uint8]  # S x h x w trainIds
    predictions: NDArray[np.uint8]  # S x h x w trainIds


def best_to_bytes(best: Best) -> bytes:
    """A compressed npz archive."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = vars(best) | {"names": np.array(best.names)}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()
