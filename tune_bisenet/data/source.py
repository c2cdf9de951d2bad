"""A source of labelled street frames: what the packer reads and everything after it never sees."""

from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.classes import ClassSet

Split = Literal["train", "val"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val")


class Frame(NamedTuple):
    """One decoded frame."""

    image: NDArray[np.uint8]  # H x W x 3, RGB
    label: NDArray[np.uint8]  # H x W, trainIds, void 255


def frame_group(name: str) -> str:
    """Return the city or sequence of a frame, for frames that were taken together share their errors.

    Of `CITY/STEM` it is CITY and what stands before STEM's first underscore: `frankfurt/frankfurt` of Cityscapes'
    `frankfurt/frankfurt_000000_000294`, `camvid/0016E5` of `camvid/0016E5_07959`; CITY alone of a STEM without one.
    A name without a folder is its own group: the built-in streets are drawn independently.
    """
    folder, is_filed, stem = name.rpartition("/")
    if not is_filed:
        return name
    prefix, is_numbered, _number = stem.partition("_")
    return f"{folder}/{prefix}" if is_numbered else folder


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
        """Return height and width in pixels of every frame, of the largest one where they differ."""

    @property
    def frame_sizes(self) -> Mapping[Split, Sequence[tuple[int, int]]]:
        """Return height and width of each frame by split; nothing where all frames have `frame_size`."""

    @property
    def classes(self) -> ClassSet:
        """Return the classes whose trainIds its labels hold."""

    @property
    def notes(self) -> Sequence[str]:
        """Return what a user should know of the frames, such as pictures that are not used."""

    def names(self, split: Split) -> Sequence[str]:
        """Return the frames' names in order, one for each frame of the split."""

    def describe_labels(self, split: Split) -> tuple[str, bool]:
        """Return what a split's labels hold and what to do if it is meant otherwise, and whether that is certain."""

    def load(self, split: Split, index: int) -> Frame:
        """Decode one frame. Raises InputError if it is damaged."""
