"""What changes between a start and `--resume`: rows, code and data. What was trained stays what it is called."""

import shutil
import signal
from pathlib import Path

import pytest
from helpers.faults import (
    NUM_EPOCHS,
    assert_as_if_nothing_had_happened,
    epochs_done,
    resume,
    start,
    write_three_rows,
)
from helpers.processes import PROJECT, Driver, end_process
from helpers.searches import epochs, statuses, write_space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2700)]

ROWS = {"a": 0.01, "b": 0.001, "c": 0.05}
"""Those of `write_three_rows`."""


def test_a_search_keeps_apart_what_was_trained_by_other_rows_and_tells_other_code(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    with start(place, folder.name) as driver:
        driver.until(lambda: all(len(epochs(folder / trial)) >= 2 for trial in "ab"))
        end_process(driver.process.pid, signal.SIGKILL)
        driver.end()
    changed = {
        "row b has changed: optimizer lr 0.001 → 0.002": ROWS | {"b": 0.002},
        "row d: not in this search": ROWS | {"d": 0.02},
    }
    try:
        for told, rows in changed.items():
            assert_refused(folder, rows, told)
        code = place / "other code"
        shutil.copytree(PROJECT / "tune_bisenet", code / "tune_bisenet")
        with (code / "tune_bisenet" / "training" / "optim.py").open("a") as file:
            file.write("# changed\n")
        write_rows(place, {"a": ROWS["a"], "c": ROWS["c"]})
        flags = ["--storage", str(place), "--resume", "--name", folder.name]
        with Driver(place, *flags, cwd=code, variables={"PYTHONPATH": str(code)}) as driver:
            assert driver.end() == 0
            assert "taken out: row b; results stay in storage" in driver.log
            assert "Code changed between sessions: " in driver.log
        assert statuses(folder) == {"a": "finished", "c": "finished"}
        assert "Code changed between sessions: " in (folder / "report.html").read_text()
        before = epochs_done(folder)
        assert_refused(folder, ROWS | {"b": 0.5}, "row b has changed: optimizer lr 0.001 → 0.5")
        assert_refused(folder, ROWS | {"c": 0.5}, "row c has changed: optimizer lr 0.05 → 0.5")
        assert epochs_done(folder) == before
        assert 2 <= len(epochs(folder / "b")) <= NUM_EPOCHS
    finally:
        write_three_rows(place)
    with resume(folder) as driver:
        assert driver.end() == 0
        assert "put back: row b, with the results in storage" in driver.log
    assert_as_if_nothing_had_happened(folder, undisturbed)


def write_rows(place: Path, rows: dict[str, float]) -> None:
    write_space(place / "space.py", rows, num_epochs=NUM_EPOCHS, baseline="a")


def assert_refused(folder: Path, rows: dict[str, float], told: str) -> None:
    write_rows(folder.parent, rows)
    with resume(folder) as driver:
        assert driver.end() == 2
        assert told in driver.log
        assert "Nothing was started." in driver.log
