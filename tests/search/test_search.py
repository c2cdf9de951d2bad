"""A whole search under a real Ray, each driver a process of its own, as a person starts it.

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
from helpers.processes import Driver, end_process
from helpers.searches import epoch_numbers, leaderboard, make_place, on_frames, statuses, write_space

from tune_bisenet.report.read import read_best
from tune_bisenet.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]

Board = list[dict[str, str]]

place = pytest.fixture(scope="module")(make_place)


@dataclass
class Session:
    """What a driver left: its exit code, its log, and the leaderboard when it had ended."""

    code: int
    log: str
    board: Board


@dataclass
class History:
    """What was seen of one search: its sessions, and its leaderboard while the first one ran."""

    folder: Path
    sessions: dict[str, Session] = field(default_factory=dict)
    midway: Board = field(default_factory=list)
    most_at_once: int = 0

    def look(self) -> None:
        """Look at the leaderboard while the search runs."""
        board = leaderboard(self.folder)
        self.most_at_once = max(self.most_at_once, [row["status"] for row in board].count("running"))
        if any(row["best_miou"] for row in board) and any(row["status"] == "waiting" for row in board):
            self.midway = self.midway or board
        time.sleep(0.02)

    def end(self, name: str, driver: Driver) -> None:
        self.sessions[name] = Session(driver.end(), driver.log, leaderboard(self.folder))

    def run(self, name: str, *flags: str) -> None:
        place = self.folder.parent
        with Driver(place, "--storage", str(place), "--name", self.folder.name, *flags) as driver:
            self.end(name, driver)


@pytest.fixture(scope="module")
def search(place: Path) -> History:
    """Three rows with two seeds, one of which diverges; in one trial's folder lies the state of another run."""
    from tune_bisenet.training import checkpoint

    write_space(place / "space.py", {"good": 0.01, "hot": 1e9, "mild": 0.001}, num_epochs=3, baseline="good")
    search = History(place / "kept")
    foreign = search.folder / "mild-s1" / "last.pt"
    foreign.parent.mkdir(parents=True)
    state = {"format": checkpoint.FORMAT, "identity": "of another run", "optimizer": {}, "history": []}
    foreign.write_bytes(checkpoint.to_bytes(state))
    flags = [*on_frames(place), "--scheduler", "fifo", "--seeds", "0,1", "--name", "kept"]
    with Driver(place, *flags) as driver:
        driver.until(lambda: "running" in statuses(search.folder).values())
        with Driver(place, "--storage", str(place), "--resume", "--name", "kept") as intruder:
            halted: set[int] = set()
            while intruder.process.poll() is None:  # until then the first must not come to its end
                for pid in {*driver.trainers()} - halted:
                    end_process(pid, signal.SIGSTOP)
                    halted.add(pid)
                search.look()
            for pid in halted:
                end_process(pid, signal.SIGCONT)
            search.end("intruder", intruder)
        while driver.process.poll() is None:
            search.look()
        search.end("first", driver)
    foreign.unlink()
    search.run("rerun", "--rerun", "mild")
    search.run("added", "--add", "--runs", "good", "--seeds", "2")
    return search


def test_the_leaderboard_has_all_trials_in_declared_order(search: History) -> None:
    board = search.sessions["first"].board
    assert [row["trial"] for row in board] == ["good-s0", "hot-s0", "mild-s0", "good-s1", "hot-s1", "mild-s1"]
    columns = "run,seed,status,stopped_by,epochs,best_miou,best_epoch,last_miou,pixel_accuracy,seconds"
    assert list(board[0])[:10] == columns.split(",")
    assert (board[0]["run"], board[0]["seed"], board[0]["status"], board[0]["epochs"]) == ("good", "0", "finished", "3")
    assert 0 < float(board[0]["best_miou"]) <= float(board[0]["pixel_accuracy"]) <= 100
    assert 1 <= int(board[0]["best_epoch"]) <= 3
    assert float(board[0]["seconds"]) > 0


def test_the_leaderboard_is_current_while_no_more_trials_run_than_fit(search: History) -> None:
    assert search.midway, "no mIoU was on the leaderboard while trials waited"
    assert 1 <= search.most_at_once <= (os.cpu_count() or 1)


def test_trials_that_diverge_or_fail_leave_the_others_alone(search: History) -> None:
    first = search.sessions["first"]
    board = {row["trial"]: row for row in first.board}
    states = {trial: row["status"] for trial, row in board.items()}
    assert states == {
        "good-s0": "finished",
        "hot-s0": "diverged",
        "mild-s0": "finished",
        "good-s1": "finished",
        "hot-s1": "diverged",
        "mild-s1": "failed",
    }
    hot = {key: board["hot-s0"][key] for key in ("epochs", "best_miou", "last_miou", "gain_over_good")}
    assert hot == {"epochs": "1", "best_miou": "", "last_miou": "", "gain_over_good": ""}
    assert "another run" in board["mild-s1"]["error"]
    assert "mild-s1" in first.log
    assert first.code == 1


def test_a_rerun_finishes_what_failed_and_repeats_nothing_else(search: History) -> None:
    first, rerun = search.sessions["first"], search.sessions["rerun"]
    assert rerun.code == 0
    *others, last = rerun.board
    assert (last["trial"], last["status"], last["error"]) == ("mild-s1", "finished", "")
    assert others == first.board[:-1]
    assert trials_of_session(search, 1) == ["mild-s1"]


def test_a_search_takes_more_trials_later(search: History) -> None:
    assert search.sessions["added"].code == 0
    *before, added = search.sessions["added"].board
    assert before == search.sessions["rerun"].board
    assert (added["trial"], added["status"], added["epochs"]) == ("good-s2", "finished", "3")
    assert trials_of_session(search, 2) == ["good-s2"]
    assert "7 of 7 trials" in (search.folder / "report.md").read_text()


def trials_of_session(search: History, number: int) -> list[str]:
    """Return the trials that Tune ran in a session."""
    session = sorted((search.folder / "tune").iterdir())[number]
    return [path.name for path in session.iterdir() if path.is_dir()]


def test_a_second_driver_is_refused_while_the_first_runs(search: History) -> None:
    intruder = search.sessions["intruder"]
    assert intruder.code == 2
    assert str(search.folder) in intruder.log


def test_without_a_terminal_progress_is_plain_lines(search: History) -> None:
    assert "good-s0  epoch 1/3" in search.sessions["first"].log
    assert "\x1b" not in search.sessions["rerun"].log
    assert "Traceback" not in search.sessions["rerun"].log


def test_tune_keeps_its_own_files(search: History) -> None:
    trial = sorted((search.folder / "tune").iterdir())[0] / "good-s0"
    assert json.loads((trial / "params.json").read_text())["run"]["name"] == "good"
    lines = [json.loads(line) for line in (trial / "result.json").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    rows = list(csv.DictReader((trial / "progress.csv").read_text().splitlines()))
    assert [float(row["miou"]) for row in rows] == pytest.approx([line["miou"] for line in lines])


def test_the_manifest_has_every_session(search: History) -> None:
    manifest = json.loads((search.folder / "search.json").read_text())
    assert set(manifest["trials"]) == set(statuses(search.folder))
    first, second, third = manifest["sessions"]
    assert first["command"][:3] == ["python", "-m", "tune_bisenet.run"]
    assert ["--seeds" in first["command"], "--rerun" in second["command"], "--add" in third["command"]] == [True] * 3
    assert first["started"] <= first["ended"] <= second["started"] <= second["ended"]
    assert manifest["proxy"] is None


def test_an_ended_trial_keeps_its_record_its_best_epoch_and_event_files(search: History) -> None:
    for trial in ("good-s0", "mild-s1"):
        names = {path.name for path in (search.folder / trial).iterdir()}
        events = {name for name in names if ".tfevents." in name}
        assert events
        assert names - events == {"trial.json", "best.pt", "best.npz"}
        assert epoch_numbers(search.folder / trial) == [1, 2, 3]
        kept = read_best(Storage.at(str(search.folder / trial)))
        assert kept.groups == ("town/street",) * len(kept.confusions)  # as all frames lie in one folder


@pytest.fixture(scope="module")
def decided(place: Path) -> History:
    """A search that decides by itself: `twin` is trained as its baseline is, so its promise of +0 is kept.

    Of `even`, whose rate is another, two seeds say next to nothing. Its driver is killed after the first look.
    """
    write_space(place / "decide.py", {"base": 0.01, "twin": 0.01, "even": 0.02}, num_epochs=2, baseline="base")
    search = History(place / "decided")
    with Driver(place, *on_frames(place, "decide.py"), "--decide", "--looks", "2,4", "--name", "decided") as driver:
        driver.until(lambda: "even-s3" in statuses(search.folder))
        driver.kill()
        search.end("killed", driver)
    search.run("resumed", "--resume")
    search.run("again", "--resume")
    return search


def test_only_open_rows_and_their_references_get_the_seeds_of_the_next_look(decided: History) -> None:
    resumed = decided.sessions["resumed"]
    assert "judged at 2 seeds: 1 kept, 1 open; seeds 2, 3 for base, even" in decided.sessions["killed"].log
    assert resumed.code == 0
    assert {row["trial"] for row in resumed.board} == {
        *(f"base-s{seed}" for seed in range(4)),
        *(f"twin-s{seed}" for seed in range(2)),
        *(f"even-s{seed}" for seed in range(4)),
    }
    assert {row["status"] for row in resumed.board} == {"finished"}
    groups = json.loads((decided.folder / "search.json").read_text())["config"]["groups"]
    assert groups == [{"runs": None, "seeds": [0, 1]}, {"runs": ["base", "even"], "seeds": [2, 3]}]


def test_a_search_that_has_decided_ends_with_its_verdicts_and_repeats_nothing(decided: History) -> None:
    resumed, again = decided.sessions["resumed"], decided.sessions["again"]
    assert again.code == 0
    assert again.board == resumed.board
    assert "judged at 4 seeds: 1 kept, " in resumed.log
    assert "✓ kept" in again.log
    page = (decided.folder / "report.md").read_text()
    assert "the same to the last bit" in page
    assert "Looks were planned at 2, 4 seeds" in page
    assert "no longer guarded" not in page
