"""What the faults' tests share: a place with frames, what three rows give undisturbed, and a folder for a search."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults import start, write_three_rows
from helpers.searches import make_place, results

place = pytest.fixture(scope="session")(make_place)


@pytest.fixture(scope="session")
def undisturbed(place: Path) -> list[dict[str, str]]:
    """The leaderboard of a search without any mishap, first in first out."""
    write_three_rows(place)
    with start(place, "undisturbed") as driver:
        assert driver.end() == 0
    board = results(place / "undisturbed")
    assert [row["status"] for row in board] == ["finished"] * 3
    shutil.rmtree(place / "undisturbed")
    return board


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """The folder of this test's search."""
    folder = place / "search"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
