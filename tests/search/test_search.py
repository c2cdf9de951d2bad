"""Whole searches under a real Ray, each driver a process of its own, as a person starts it.

The frames are eleven, of 32 x 64 pixels: an epoch takes a fifth of a second, so that time goes into Ray's start.
"""

import csv
import json
import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from driving import (
    Driver,
    end_process,
    epoch_numbers,
    epochs,
    leaderboard,
    make_place,
    on_frames,
    statuses,
    write_space,
)

place = pytest.fixture(scope="module")(make_place)


# --- one search, seen from all sides --------------------------------------------------------------------------------


@dataclass
class Seen:
    """What was seen of one search: while its first driver ran, and after others ran again what failed, and added."""

    folder: Path
    code: int = -1
    log: str = ""
    board: list[dict[str, str]] = field(default_factory=list)
    while_it_ran: list[dict[str, str]] = field(default_factory=list)
    most_at_once: int = 0
    intruder_code: int = -1
    intruder_log: str = ""
    rerun_code: int = -1
    rerun_log: str = ""
    rerun_board: list[dict[str, str]] = field(default_factory=list)
    added_code: int = -1


@pytest.fixture(scope="module")
def seen(place: Path) -> Seen:
    """Three rows with two seeds, one of which diverges; in one trial's folder lies the state of another run."""
    from tune_bisenet.training import checkpoint

    write_space(place / "space.py", {"good": 0.01, "hot": 1e9, "mild": 0.001}, num_epochs=3, baseline="good")
    flags = [*on_frames(place), "--scheduler", "fifo", "--seeds", "0,1", "--name", "seen"]
    seen = Seen(place / "seen")
    foreign = seen.folder / "mild-s1" / "last.pt"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(checkpoint.to_bytes({"format": checkpoint.FORMAT, "identity": "of another run"}))
    with Driver(place, *flags) as driver:
        driver.until(lambda: "running" in statuses(seen.folder).values())
        with Driver(place, "--storage", str(place), "--resume", "--name", "seen") as intruder:
            halted: set[int] = set()
            while intruder.process.poll() is None:  # until then the first must not come to its end
                for pid in {*driver.trainers()} - halted:
                    end_process(pid, signal.SIGSTOP)
                    halted.add(pid)
                look(seen)
            for pid in halted:
                end_process(pid, signal.SIGCONT)
            seen.intruder_code, seen.intruder_log = intruder.end(), intruder.log
        while driver.process.poll() is None:
            look(seen)
        seen.code, seen.log, seen.board = driver.end(), driver.log, leaderboard(seen.folder)
    foreign.unlink()
    with Driver(place, "--storage", str(place), "--name", "seen", "--rerun", "mild") as driver:
        seen.rerun_code, seen.rerun_log, seen.rerun_board = driver.end(), driver.log, leaderboard(seen.folder)
    with Driver(place, "--storage", str(place), "--name", "seen", "--add", "--runs", "good", "--seeds", "2") as driver:
        seen.added_code = driver.end()
    return seen


def look(seen: Seen) -> None:
    """At the leaderboard, while the search runs."""
    board = leaderboard(seen.folder)
    seen.most_at_once = max(seen.most_at_once, [row["status"] for row in board].count("running"))
    if any(row["epochs"] != "0" for row in board) and any(row["status"] == "waiting" for row in board):
        seen.while_it_ran = seen.while_it_ran or board
    time.sleep(0.02)


pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


def test_trials_are_named_by_row_and_seed_and_stand_in_declared_order(seen: Seen) -> None:
    assert [row["trial"] for row in seen.board] == ["good-s0", "hot-s0", "mild-s0", "good-s1", "hot-s1", "mild-s1"]


def test_the_leaderboard_has_its_columns_in_order(seen: Seen) -> None:
    columns = "run,seed,status,stopped_by,epochs,best_miou,best_epoch,last_miou,pixel_accuracy,seconds"
    header = (seen.folder / "leaderboard.csv").read_text().splitlines()[0]
    assert header.startswith(columns)
    good = seen.board[0]
    assert (good["run"], good["seed"], good["status"], good["epochs"]) == ("good", "0", "finished", "3")
    assert 0 < float(good["best_miou"]) <= float(good["pixel_accuracy"]) <= 100
    assert 1 <= int(good["best_epoch"]) <= 3
    assert float(good["seconds"]) > 0
    assert "good" in (seen.folder / "leaderboard.md").read_text()


def test_the_leaderboard_is_current_while_the_search_runs(seen: Seen) -> None:
    assert {row["status"] for row in seen.while_it_ran} >= {"waiting"}
    assert any(row["best_miou"] for row in seen.while_it_ran)


def test_a_trial_that_diverges_leaves_the_others_alone(seen: Seen) -> None:
    board = {row["trial"]: row for row in seen.board}
    assert board["hot-s0"]["status"] == board["hot-s1"]["status"] == "diverged"
    assert "no longer a number" in board["hot-s0"]["stopped_by"]
    assert board["mild-s0"]["status"] == board["good-s1"]["status"] == "finished"


def test_a_trial_that_fails_says_why_and_leaves_the_others_alone(seen: Seen) -> None:
    failed = seen.board[-1]
    assert (failed["trial"], failed["status"]) == ("mild-s1", "failed")
    assert "was written by another run" in failed["error"]
    assert "mild-s1 failed" in seen.log
    assert [row["status"] for row in seen.board].count("failed") == 1
    assert seen.code == 1


def test_a_search_takes_more_trials_later_and_reports_both_as_one(seen: Seen) -> None:
    assert seen.added_code == 0
    *before, added = leaderboard(seen.folder)
    assert before == seen.rerun_board
    assert (added["trial"], added["status"], added["epochs"]) == ("good-s2", "finished", "3")
    third_session = sorted((seen.folder / "tune").iterdir())[-1]
    assert [path.name for path in third_session.iterdir() if path.is_dir()] == ["good-s2"]
    assert "good-s2" in (seen.folder / "report.md").read_text()


def test_a_rerun_finishes_what_failed_and_repeats_nothing_else(seen: Seen) -> None:
    assert seen.rerun_code == 0
    after = {row["trial"]: row for row in seen.rerun_board}
    assert after["mild-s1"]["status"] == "finished"
    assert after["mild-s1"]["error"] == ""
    assert [row for row in seen.board if row["trial"] != "mild-s1"] == [
        row for row in after.values() if row["trial"] != "mild-s1"
    ]
    second_session = sorted((seen.folder / "tune").iterdir())[1]
    assert [path.name for path in second_session.iterdir() if path.is_dir()] == ["mild-s1"]


def test_a_second_driver_is_refused_while_the_first_runs(seen: Seen) -> None:
    assert seen.intruder_code == 2
    assert f"another process is running the search in {seen.folder}" in seen.intruder_log


def test_no_more_trials_run_at_once_than_there_are_cores_for(seen: Seen) -> None:
    assert 1 <= seen.most_at_once <= (os.cpu_count() or 1)


def test_without_a_terminal_progress_is_plain_lines(seen: Seen) -> None:
    assert "good-s0  epoch 1/3" in seen.log
    assert "\x1b" not in seen.rerun_log
    assert "Traceback" not in seen.rerun_log


def test_seeds_differ_and_a_seed_repeats_itself(seen: Seen) -> None:
    losses = {trial: epochs(seen.folder / trial)[0]["loss"] for trial in ("good-s0", "mild-s0", "good-s1", "mild-s1")}
    assert losses["good-s0"] != losses["good-s1"]
    assert losses["mild-s0"] != losses["mild-s1"]


def test_tune_keeps_its_own_files(seen: Seen) -> None:
    first_session = sorted((seen.folder / "tune").iterdir())[0]
    trial = first_session / "good-s0"
    assert json.loads((trial / "params.json").read_text())["run"]["name"] == "good"
    lines = [json.loads(line) for line in (trial / "result.json").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    rows = list(csv.DictReader((trial / "progress.csv").read_text().splitlines()))
    assert [float(row["miou"]) for row in rows] == pytest.approx([line["miou"] for line in lines])


def test_the_manifest_says_how_the_search_was_made(seen: Seen) -> None:
    manifest = json.loads((seen.folder / "search.json").read_text())
    assert set(manifest["trials"]) == set(statuses(seen.folder))
    assert set(manifest["data"]["digests"]) == {"32x64"}
    assert (manifest["data"]["train_images"], manifest["data"]["val_images"]) == (8, 3)
    first, second, third = manifest["sessions"]
    assert first["command"][:3] == ["python", "-m", "tune_bisenet.run"]
    assert "--seeds" in first["command"]
    assert "--rerun" in second["command"]
    assert "--add" in third["command"]
    assert {"torch", "ray", "numpy"} <= set(first["packages"])
    assert first["started"] <= first["ended"] <= second["started"] <= second["ended"]
    assert "commit" in first
    assert manifest["proxy"] is None


def test_each_trial_keeps_weights_and_epochs_and_event_files(seen: Seen) -> None:
    for trial in ("good-s0", "mild-s1"):
        names = {path.name for path in (seen.folder / trial).iterdir()}
        assert {"ended.json", "best.pt", "best.npz", "epochs.json"} <= names
        assert not {"last.pt", "previous.pt"} & names, "nothing goes on from there"
        assert any(".tfevents." in name for name in names)
        assert not any(name.endswith(".part") for name in names)
        assert epoch_numbers(seen.folder / trial) == [1, 2, 3]
