"""What kills a search, done to it for real: afterwards its results equal those of a search that nothing happened to.

`helpers/faults.py` has the search; `undisturbed` is what it gives.
"""

import json
import os
import random
import re
import signal
import time
from pathlib import Path

import pytest
from helpers.faults import (
    TRIALS,
    assert_as_if_nothing_had_happened,
    epochs_done,
    has_done,
    is_midway,
    resume,
    start,
)
from helpers.processes import Driver, end_process
from helpers.searches import epoch_numbers, leaderboard, on_frames, statuses, write_space

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]


def test_killed_workers_and_killed_drivers_change_no_result(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    moment = random.SystemRandom().uniform(0, 0.5)
    print(f"the first driver is killed {moment:.3f} s after it was midway")  # noqa: T201 - for whoever has to repeat it
    with start(place, folder.name) as driver:
        driver.until(has_done(folder, 3))
        end_process(driver.trainers()[0], signal.SIGKILL)
        driver.until(is_midway(folder))
        time.sleep(moment)
        end_process(driver.process.pid, signal.SIGKILL)
        assert driver.end() == -signal.SIGKILL
        assert_gone_soon(driver)
    with resume(folder) as driver:  # killed before any trial has gone on
        driver.until(lambda: "search " in driver.log)
        end_process(driver.process.pid, signal.SIGKILL)
    damage_last_weights(folder)
    with resume(folder) as driver:
        assert driver.end() == 0
    assert_as_if_nothing_had_happened(folder, undisturbed)


def assert_gone_soon(driver: Driver) -> None:
    """Without their driver the trainers end by themselves: nobody goes on writing to the search."""
    deadline = time.monotonic() + 120
    while driver.trainers():
        assert time.monotonic() < deadline, f"still there: {driver.processes()}"
        time.sleep(0.1)


def damage_last_weights(folder: Path) -> None:
    """Flip a byte in the newer state of a trial that has an older one to fall back on.

    On a busy machine trials may have come to their end in the meantime: then there is nothing to flip.
    """
    for trial in TRIALS:
        states = [path for name in ("last.pt", "previous.pt") if (path := folder / trial / name).exists()]
        if len(states) == 2:
            last = max(states, key=lambda path: path.stat().st_mtime_ns)
            content = bytearray(last.read_bytes())
            content[len(content) // 2] ^= 1
            last.write_bytes(content)
            return


def test_signals_end_a_search_within_seconds_and_it_goes_on_over_damaged_files(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    with start(place, folder.name) as driver:
        driver.until(has_done(folder, 3))
        end_process(driver.process.pid, signal.SIGTERM)  # a spot notice, a cluster's job that is stopped
        assert driver.end(seconds=120) == 128 + signal.SIGTERM
        driver.assert_nothing_lives_on()
        assert f"--resume --name {folder.name}" in driver.log
    assert set(statuses(folder).values()) <= {"waiting", "finished"}
    assert "waiting" in statuses(folder).values()
    damage_what_is_not_needed(folder)
    with resume(folder) as driver:
        driver.until(has_done(folder, epochs_done(folder) + 3))
        os.killpg(driver.process.pid, signal.SIGINT)  # as a terminal does at Ctrl-C: all hear it
        assert driver.end(seconds=120) == 128 + signal.SIGINT
        assert "Traceback" not in driver.log
    states = json.loads((folder / "trials.json").read_text())["states"]
    assert {state["status"] for state in states} <= {"waiting", "finished"}
    with resume(folder) as driver:
        assert driver.end() == 0
    assert_as_if_nothing_had_happened(folder, undisturbed)
    sessions = json.loads((folder / "search.json").read_text())["sessions"]
    assert [session["signal"] for session in sessions] == [signal.SIGTERM, signal.SIGINT, None]


def damage_what_is_not_needed(folder: Path) -> None:
    """Tune's own state, the standings and the leaderboard: none of them may matter."""
    for path in folder.glob("tune/*/experiment_state-*.json"):
        path.write_text("no state")
        path.with_name("experiment_state-2099-01-01_00-00-00.json").write_text("{}")
    content = (folder / "trials.json").read_bytes()
    (folder / "trials.json").write_bytes(content[: len(content) // 2])
    (folder / "leaderboard.csv").write_text("run,se")


def test_what_asha_saw_and_decided_survives_the_driver(place: Path, folder: Path) -> None:
    # Two at a time: poor is judged when at least three others have been, weak long after poor was.
    rows = {"good": 0.01, "fair": 0.02, "well": 0.05, "fine": 0.04, "poor": 1e-6}
    rows |= {"next": 0.03, "more": 0.035, "last": 0.045, "weak": 2e-6}
    write_space(place / "judged.py", rows, num_epochs=3)  # judged after epoch 2
    flags = [*on_frames(place, "judged.py"), "--scheduler", "asha", "--name", folder.name]
    flags += ["--max-concurrent", "2", "--cpus-per-trial", "1"]
    with Driver(place, *flags) as driver:
        driver.until(lambda: statuses(folder).get("poor") == "stopped")
        end_process(driver.process.pid, signal.SIGKILL)
    before = json.loads((folder / "trials.json").read_text())
    stopped = [row for row in leaderboard(folder) if row["status"] == "stopped"]
    assert "weak" not in {rung["trial"] for rung in before["scheduler"]["seen"]}, "the driver was to be killed before"
    with resume(folder) as driver:
        assert driver.end() == 0
    after = json.loads((folder / "trials.json").read_text())
    for row in stopped:
        assert row in leaderboard(folder), "a stopped trial stays as it was"
        assert epoch_numbers(folder / row["trial"]) == [1, 2]
    assert before["scheduler"]["seen"] == after["scheduler"]["seen"][: len(before["scheduler"]["seen"])]
    assert before["scheduler"]["stops"].items() <= after["scheduler"]["stops"].items()
    assert {rung["trial"] for rung in after["scheduler"]["seen"]} == set(rows)
    board = {row["trial"]: row for row in leaderboard(folder)}
    assert board["weak"]["status"] == "stopped", "judged against those that the first driver had seen"
    others = re.search(r"of (\d+) others \(ASHA\)", board["weak"]["stopped_by"])
    assert others
    assert len(before["scheduler"]["seen"]) <= int(others[1]) < len(rows)
    assert board["good"]["status"] == "finished"
    (folder / "trials.json").unlink()
    epochs_before = {trial: epoch_numbers(folder / trial) for trial in rows}
    with resume(folder) as driver:
        assert driver.end() == 0
    assert leaderboard(folder) == list(board.values()), "each trial's own folder knows how it ended"
    assert {trial: epoch_numbers(folder / trial) for trial in rows} == epochs_before
