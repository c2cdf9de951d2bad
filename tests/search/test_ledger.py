"""The ledger: who stands where, its copies on storage, what a resumed search takes over, and who may write."""

import csv
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tune_bisenet.config import Run
from tune_bisenet.records import TRIALS, Status, TrialState
from tune_bisenet.search import state as state_module
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage


def standing(trial: str, **known: Any) -> TrialState:
    return TrialState(trial=trial, run=trial, seed=0, num_epochs=4, **known)


def result(epoch: int, miou: float = 10.0) -> dict[str, Any]:
    best = {"best_miou": miou, "best_epoch": epoch}
    return {
        "epoch": epoch,
        "miou": miou,
        "pixel_accuracy": 50.0,
        "total_seconds": 2.0 * epoch,
        "latency_ms": None,
    } | best


class Clock:
    """A clock that a test turns by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """Of a search whose trials have folders."""
    for trial in ("a", "b"):
        (tmp_path / trial).mkdir()
    return Storage.at(str(tmp_path))


@pytest.fixture
def book(folder: Storage) -> SearchState:
    state = {"seen": [], "stops": {"b": "too slow"}}
    return SearchState(
        folder, [standing("a"), standing("b")], captions=["A proxy."], baseline="a", scheduler_state=lambda: state
    )


def test_a_trial_goes_from_waiting_over_running_to_finished(book: SearchState) -> None:
    assert book["a"].status == "waiting"
    book.started("a")
    assert book["a"].status == "running"
    book.heard("a", result(1))
    assert (book["a"].epochs, book["a"].best_miou, book["a"].seconds) == (1, 10.0, 2.0)
    book.heard("a", result(4, miou=20.0))
    book.ended("a", diverged=False, stopped_by="")
    assert (book["a"].status, book["a"].best_epoch, book["a"].stopped_by) == ("finished", 4, "")
    assert book.unfinished() == ["b"]


def test_a_trial_that_ends_before_its_last_epoch_was_stopped_or_diverged(book: SearchState) -> None:
    book.heard("a", result(2))
    book.ended("a", diverged=False, stopped_by="below the median (ASHA)")
    book.heard("b", result(2))
    book.ended("b", diverged=True, stopped_by="the loss was no longer a number at epoch 2")
    assert (book["a"].status, book["a"].stopped_by) == ("stopped", "below the median (ASHA)")
    assert (book["b"].status, book["b"].stopped_by) == ("diverged", "the loss was no longer a number at epoch 2")
    assert book.unfinished() == []


def test_a_loss_that_diverges_in_the_last_epoch_is_not_finished(book: SearchState) -> None:
    book.heard("a", result(4))
    book.ended("a", diverged=True, stopped_by="the loss was no longer a number at epoch 4")
    assert book["a"].status == "diverged"


def test_a_failed_trial_says_why_and_has_ended(book: SearchState) -> None:
    book.failed("a", "ValueError: no")
    assert (book["a"].status, book["a"].error) == ("failed", "ValueError: no")
    assert book.unfinished() == ["b"]


def test_when_a_session_ends_what_was_running_waits(book: SearchState) -> None:
    book.started("a")
    book.close()
    assert [standing.status for standing in book.standings] == ["waiting", "waiting"]


def test_its_copies_on_storage_agree(book: SearchState, folder: Storage, tmp_path: Path) -> None:
    book.heard("a", result(1))
    book.write()
    kept = state_module.read_trials(folder)
    standings, state = list(kept.standings), kept.scheduler
    assert standings == book.standings
    assert state == {"seen": [], "stops": {"b": "too slow"}}
    rows = list(csv.DictReader((tmp_path / "leaderboard.csv").read_text().splitlines()))
    assert [(row["trial"], row["epochs"], row["best_miou"]) for row in rows] == [("a", "1", "10.00"), ("b", "0", "")]
    assert (tmp_path / "leaderboard.md").read_text().startswith("A proxy.")


WRITE_SECONDS = 0.3


class Watched(Storage):
    """Takes its time over a ledger's three files, by a test's clock, and remembers what was written."""

    written: ClassVar[list[str]] = []
    clock: ClassVar[Clock]
    seconds: ClassVar[float]

    def write(self, name: str, content: bytes) -> None:
        if name in (TRIALS, state_module.LEADERBOARD_CSV, state_module.LEADERBOARD_MD):
            self.clock.seconds += self.seconds / 3
        self.written.append(name)
        super().write(name, content)


def watched(
    tmp_path: Path, clock: Clock, trials: Sequence[str], *, write_seconds: float
) -> tuple[Watched, SearchState]:
    Watched.written.clear()
    Watched.clock, Watched.seconds = clock, write_seconds
    folder = Watched.at(str(tmp_path))
    standings = [standing(name) for name in trials]
    return folder, SearchState(folder, standings, captions=[], baseline=None, scheduler_state=dict, clock=clock)


def test_storage_is_not_drowned_by_short_epochs(tmp_path: Path, clock: Clock) -> None:
    folder, book = watched(tmp_path, clock, ["a"], write_seconds=0.0)
    book.write()
    for epoch in range(1, 4):
        clock.seconds += 0.3 * state_module.SECONDS_BETWEEN_WRITES
        book.heard("a", result(epoch))
        book.write_if_due()
    assert folder.written.count(TRIALS) == 1
    clock.seconds += 0.3 * state_module.SECONDS_BETWEEN_WRITES
    book.write_if_due()
    assert folder.written.count(TRIALS) == 2
    assert state_module.read_trials(folder).standings[0].epochs == 3


def test_where_a_write_takes_long_trials_that_end_together_share_one(tmp_path: Path, clock: Clock) -> None:
    names = [f"r{number:02}" for number in range(50)]
    folder, book = watched(tmp_path, clock, names, write_seconds=WRITE_SECONDS)
    for name in names:
        (folder / name).make()
        clock.seconds += WRITE_SECONDS
        book.heard(name, result(4))
        book.ended(name, diverged=False, stopped_by="")
    writing = WRITE_SECONDS * (folder.written.count(TRIALS) - 1)  # but for the first, of which nothing was known
    assert 0 < writing <= state_module.MAX_SHARE_OF_WRITING * clock.seconds
    book.close()
    assert [one.status for one in state_module.read_trials(folder).standings] == ["finished"] * 50


def test_where_a_write_takes_long_epochs_share_one_too(tmp_path: Path, clock: Clock) -> None:
    folder, book = watched(tmp_path, clock, ["a"], write_seconds=WRITE_SECONDS)
    book.write()
    clock.seconds += state_module.SECONDS_BETWEEN_WRITES + 0.1
    book.heard("a", result(1))
    book.write_if_due()
    assert folder.written.count(TRIALS) == 1
    clock.seconds += WRITE_SECONDS / state_module.MAX_SHARE_OF_WRITING
    book.write_if_due()
    assert folder.written.count(TRIALS) == 2


def test_a_missing_file_of_standings_is_no_error(folder: Storage) -> None:
    assert state_module.read_trials(folder) == state_module.SavedState()


DAMAGED = [
    b"",
    b"\0" * 20,
    b"\xff\xfe",
    b'{"standings": [',
    b"[]",
    b"null",
    b"{}",
    b'{"standings": [{}], "scheduler": {}}',
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_of_standings_is_as_good_as_none(folder: Storage, content: bytes) -> None:
    folder.write(state_module.TRIALS, content)
    assert state_module.read_trials(folder) == state_module.SavedState()


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe"])
def test_a_damaged_manifest_is_named(folder: Storage, content: bytes) -> None:
    folder.write("search.json", content)
    with pytest.raises(ValueError, match=r"search\.json is damaged.*another --name"):
        state_module.read_json(folder, "search.json")


@pytest.mark.parametrize("status", ["finished", "stopped", "diverged"])
def test_a_resumed_search_keeps_what_has_ended(tiny_run: Run, status: Status) -> None:
    earlier = standing("tiny", status=status, stopped_by="somebody", epochs=2, best_miou=3.0)
    assert state_module.restore("tiny", tiny_run, [standing("other"), earlier]) == earlier


@pytest.mark.parametrize("status", ["waiting", "running", "failed"])
def test_a_resumed_search_goes_on_with_all_others(tiny_run: Run, status: Status) -> None:
    earlier = standing("tiny", status=status, error="no memory", epochs=1, best_miou=3.0)
    carried = state_module.restore("tiny", tiny_run, [earlier])
    assert (carried.status, carried.error, carried.epochs, carried.best_miou) == ("waiting", "", 1, 3.0)


def test_a_trial_that_nobody_knows_begins_anew(tiny_run: Run) -> None:
    fresh = state_module.restore("tiny-s3", tiny_run.model_copy(update={"seed": 3}), [])
    assert (fresh.trial, fresh.run, fresh.seed, fresh.num_epochs) == ("tiny-s3", "tiny", 3, tiny_run.num_epochs)
    assert (fresh.status, fresh.epochs, fresh.best_miou) == ("waiting", 0, None)


HOLDER = """
import sys
from tune_bisenet import ledger
from tune_bisenet.storage import Storage
with ledger.exclusive(Storage.at(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_works_on_a_search_and_a_killed_one_does_not_block_it(folder: Storage) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder.path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(state_module.InUseError, match="another process is running"), state_module.exclusive(folder):
            pass
        holder.kill()
    with state_module.exclusive(folder):
        pass


def test_numbers_that_are_none_survive_json(book: SearchState, folder: Storage) -> None:
    book.write()
    record = json.loads(folder.read(state_module.TRIALS) or b"")
    assert record["standings"][0]["best_miou"] is None
    assert state_module.read_trials(folder).standings[0].best_miou is None
