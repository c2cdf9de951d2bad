"""What several test files share: one thread for torch, a tiny data set, and a run that trains on it in a second."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from helpers.rows import plain_row

from tune_bisenet.config import Run

if TYPE_CHECKING:
    from tune_bisenet.data.packed import Packed


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """One thread makes sums come out in one order. Tests that do without torch are spared its import."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


def _packed_streets(num_train: int, image_size: tuple[int, int], cache_dir: Path) -> "Packed":
    from tune_bisenet.data.packing import prepare_packed
    from tune_bisenet.data.streets import Streets

    source = Streets(num_train=num_train, num_val=4, frame_size=(64, 128))
    return prepare_packed(source, image_size=image_size, cache_dir=cache_dir)


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory: pytest.TempPathFactory) -> "Packed":
    """Eight training and four validation frames of 64 x 128 pixels."""
    return _packed_streets(8, (64, 128), tmp_path_factory.mktemp("tiny_data"))


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> "Packed":
    """Twelve training and four validation frames, trained on at 32 x 64 and scored at 64 x 128 pixels."""
    return _packed_streets(12, (32, 64), tmp_path_factory.mktemp("small_data"))


@pytest.fixture(scope="session")
def tiny_run() -> Run:
    """Two epochs at 64 x 128 pixels, augmented as any run is."""
    return plain_row("tiny", warmup=1, num_epochs=2, image_size=(64, 128))
