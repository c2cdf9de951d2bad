"""A source of labelled street frames: what the packer reads and everything after it never sees."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val")


class Frame(NamedTuple):
    """One decoded frame."""

    image: NDArray[np.uint8]  # H x W x 3, RGB
    label: NDArray[np.uint8]  # H x W, trainIds, void 255


class Source(Protocol):
    """Frames by split and index."""

    @property
    def name(self) -> str:
        """Return what the user calls this data: a path, a URI, or `streets`."""

    @property
    def fingerprint(self) -> str:
        """Return a text that changes whenever the frames may have changed, without reading a frame."""

    @property
    def frame_size(self) -> tuple[int, int]:
        """Return height and width in pixels of every frame."""

    def names(self, split: Split) -> Sequence[str]:
        """Return the frames' names in order, one for each frame of the split."""

    def load(self, split: Split, index: int) -> Frame:
        """Decode one frame. Raises InputError if it is damaged."""
