"""A source of labelled street frames: what the packer reads and the rest never sees."""

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Split = Literal["train", "val"]
SPLITS: Final[tuple[Split, ...]] = ("train", "val")
MAX_LISTED_PROBLEMS: Final = 20


class Frame(NamedTuple):
    """One decoded frame. `image` is RGB uint8 (H, W, 3); `label` is trainIds uint8 (H, W), void 255."""

    image: NDArray[np.uint8]
    label: NDArray[np.uint8]


class DataError(ValueError):
    """The data cannot be used. `problems` holds one sentence each, naming the file and what to do; str() the first."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__(tuple(problems))  # not joined, so that the error can be pickled on its way out of a worker
        self.problems = tuple(problems)

    def __str__(self) -> str:
        num_more = len(self.problems) - MAX_LISTED_PROBLEMS
        more = [f"and {num_more:,} more"] if num_more > 0 else []
        return "\n".join([*self.problems[:MAX_LISTED_PROBLEMS], *more])


class Source(Protocol):
    """Frames by split and number."""

    @property
    def name(self) -> str:
        """What a person calls this data: a path, or `streets`."""

    @property
    def fingerprint(self) -> str:
        """Changes whenever the frames may have changed; cheap, so no frame is read for it."""

    @property
    def frame_size(self) -> tuple[int, int]:
        """Height and width in pixels of every frame."""

    def names(self, split: Split) -> Sequence[str]:
        """The frames' names, in order; their number is the size of the split."""

    def load(self, split: Split, index: int) -> Frame:
        """Decode one frame. Raises DataError if it is damaged."""
