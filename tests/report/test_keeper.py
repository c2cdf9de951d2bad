"""The page is kept current while a search runs, and never harms it."""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from searches import epochs, write_search, write_trial

from tune_bisenet.report.keeper import SECONDS_BETWEEN_PAGES, kept_current, write_safely
from tune_bisenet.storage import Storage


def wait_for(condition: Callable[[], bool], *, seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_page_follows_what_trials_leave_on_storage(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    table = Path(folder.path) / "tables" / "epochs.csv"
    with kept_current(folder, every_seconds=0.05, max_share=1.0):
        wait_for(table.exists)
        assert "61.25" not in table.read_text()
        write_trial(folder / "r02-s0", epochs(61.25))
        wait_for(lambda: "61.25" in table.read_text())


def test_pages_are_never_older_than_a_minute() -> None:
    assert SECONDS_BETWEEN_PAGES < 60 - 10  # seconds that a page of thirty trials may take on a busy machine


def test_a_page_that_takes_long_to_draw_takes_a_small_share_of_the_time(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    page = Path(folder.path) / "report.html"
    with kept_current(folder, every_seconds=0.01, max_share=0.001):
        wait_for(page.exists)
        time.sleep(0.5)
        written = page.stat().st_mtime_ns
        time.sleep(2)
        assert page.stat().st_mtime_ns == written


def test_a_search_whose_page_cannot_be_written_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = Storage.at(str(tmp_path / "nothing"))
    with caplog.at_level(logging.WARNING), kept_current(nothing, every_seconds=0.01):
        wait_for(lambda: "the report could not be written" in caplog.text)
    assert write_safely(nothing) is None


def test_it_says_where_the_page_is(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    assert write_safely(folder) == f"{folder.uri}/report.html"
