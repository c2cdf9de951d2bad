"""docs/own-space.md as a person follows it: rows, then a function that draws around them."""

from pathlib import Path

import pytest
from helpers.pages import blocks, run_lines
from helpers.processes import TIMEOUT_SECONDS
from helpers.searches import leaderboard, make_place

from tune_bisenet.report.read import read_search
from tune_bisenet.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_SECONDS)]

place = pytest.fixture(scope="module")(make_place)


@pytest.fixture(scope="module")
def printed(place: Path) -> list[str]:
    """What the commands of the page print, in their order."""
    for name, code in zip(("mine.py", "around.py"), blocks("own-space.md", "python"), strict=True):
        (place / name).write_text(code)
    return run_lines([line for block in blocks("own-space.md", "bash") for line in block.splitlines()], place)


def test_the_rows_are_shown_planned_and_trained(printed: list[str], place: Path) -> None:
    shown, planned, _trained, reported = printed[:4]
    assert [line.split()[1] for line in shown.splitlines()[2:]] == ["plain", "adamw", "half-aux"]
    assert "nothing was started" in planned
    assert {row["status"] for row in leaderboard(place / "results" / "mine")} == {"finished"}
    assert "half-aux" in reported


def test_what_a_short_row_leaves_out_is_as_in_the_table(printed: list[str], place: Path) -> None:
    assert printed
    run = read_search(Storage.at(str(place / "results" / "mine"))).manifest.trials["plain-s0"]
    assert (run.batch_size, run.accumulation, run.max_grad_norm, run.loss.aux_weight) == (4, 1, None, 1.0)


def test_drawing_begins_with_the_rows_or_with_what_was_measured_of_them(printed: list[str], place: Path) -> None:
    assert "adamw_lr" in printed[4]
    around = [row["run"] for row in leaderboard(place / "results" / "around")]
    assert {"plain", "adamw", "half-aux"} < set(around)
    assert len(around) == 4
    warm = [row["run"] for row in leaderboard(place / "results" / "warm")]
    assert len(warm) == 2
    assert not {"plain", "adamw", "half-aux"} & set(warm)
