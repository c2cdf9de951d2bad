"""The state of a search: trials from waiting to ended, copies in storage, what a resumed search keeps, the lock."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.rows import plain_epoch, plain_row, plain_state

from tune_bisenet.options import InputError
from tune_bisenet.records import (
    BEST_WEIGHTS,
    LAST,
    PREVIOUS,
    SEARCH,
    TRIAL,
    TRIALS,
    DamagedFileError,
    SavedState,
    Status,
    TrialRecord,
    TrialSpec,
    TrialState,
    measure,
    read_manifest,
    read_saved_state,
    read_trial,
    write_trial,
)
from tune_bisenet.search import state as state_module
from tune_bisenet.search.state import SearchState, complete_states, end_trial, restore
from tune_bisenet.storage import Storage

SCHEDULER = {"seen": [], "stops": {"b": "too slow"}}


def spec(trial: str) -> TrialSpec:
    return TrialSpec(trial=trial, run=plain_row(trial, num_epochs=4))


def measured(epoch: int, miou: float = 10.0) -> dict[str, Any]:
    """Return what a trial reports after an epoch of two seconds."""
    return measure([plain_epoch(number, miou if number == epoch else 1.0) for number in range(1, epoch + 1)])


@pytest.fixture
def folder(tmp_path: Path) -> Storage:
    """The folder of a search whose trials a and b have all that a running trial has."""
    search = Storage.at(str(tmp_path / "search"))
    for trial in ("a", "b"):
        write_trial(search, TrialRecord.of_spec(spec(trial), [plain_epoch(1, 10.0)]))
        for name in (LAST, PREVIOUS, BEST_WEIGHTS):
            (search / trial).write(name, b"weights")
    return search


@pytest.fixture
def state(folder: Storage) -> SearchState:
    trials = [plain_state("a"), plain_state("b")]
    return SearchState(folder, trials, captions=["A proxy."], baseline="a", scheduler_state=lambda: SCHEDULER)


def files(search: Storage, trial: str) -> set[str]:
    return {info.base_name for info in (search / trial).infos()}


# --- trials -----------------------------------------------------------------------------------------------------------


def test_a_trial_waits_runs_and_finishes(state: SearchState) -> None:
    assert state["a"].status == "waiting"
    state.on_start("a")
    assert state["a"].status == "running"
    state.on_result("a", measured(1))
    assert (state["a"].epochs, state["a"].best_miou, state["a"].seconds) == (1, 10.0, 2.0)
    state.on_result("a", measured(4, miou=20.0))
    state.on_end(spec("a"), diverged=False, stopped_by="")
    assert (state["a"].status, state["a"].best_epoch, state["a"].stopped_by) == ("finished", 4, "")
    assert state.unfinished() == ["b"]


@pytest.mark.parametrize(
    ("epochs", "diverged", "status"),
    [(4, False, "finished"), (2, False, "stopped"), (2, True, "diverged"), (4, True, "diverged")],
)
def test_a_trial_that_ends_well_keeps_its_best_weights_and_nothing_to_resume_from(
    state: SearchState, folder: Storage, epochs: int, diverged: bool, status: Status
) -> None:
    state.on_result("a", measured(epochs))
    state.on_end(spec("a"), diverged=diverged, stopped_by="" if status == "finished" else "a reason")
    assert state["a"].status == status
    assert state["a"].stopped_by == ("" if status == "finished" else "a reason")
    assert files(folder, "a") == {BEST_WEIGHTS, TRIAL}
    assert files(folder, "b") == {LAST, PREVIOUS, BEST_WEIGHTS, TRIAL}
    record = read_trial(folder / "a")
    assert record is not None
    assert (record.state, len(record.epochs)) == (state["a"], 1)


def test_a_failed_trial_keeps_everything_for_another_try(state: SearchState, folder: Storage) -> None:
    state.on_error("a", "ValueError: no")
    assert (state["a"].status, state["a"].error) == ("failed", "ValueError: no")
    assert state.unfinished() == ["b"]
    assert files(folder, "a") == {LAST, PREVIOUS, BEST_WEIGHTS, TRIAL}
    assert [trial.status for trial in complete_states(folder, [state["a"]], ["a"])] == ["failed"]


def test_running_trials_wait_when_the_session_ends(state: SearchState, folder: Storage) -> None:
    state.on_start("a")
    state.close()
    assert [trial.status for trial in read_saved_state(folder).states] == ["waiting", "waiting"]


# --- copies in storage ------------------------------------------------------------------------------------------------


def test_the_copies_in_storage_agree(state: SearchState, folder: Storage) -> None:
    state.on_result("a", measured(1))
    state.write()
    saved = read_saved_state(folder)
    assert (list(saved.states), saved.scheduler) == (state.states, SCHEDULER)
    assert saved.states[1].best_miou is None
    rows = list(csv.DictReader((folder.read(state_module.LEADERBOARD_CSV) or b"").decode().splitlines()))
    assert [(row["trial"], row["epochs"], row["best_miou"]) for row in rows] == [("a", "1", "10.00"), ("b", "0", "")]
    assert (folder.read(state_module.LEADERBOARD_MD) or b"").startswith(b"A proxy.")


class Clock:
    """A clock that a test turns by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class SlowStorage(Storage):
    """Takes `seconds` of a clock for the three copies, and counts them."""

    clock: ClassVar[Clock]
    seconds: ClassVar[float]
    writes: ClassVar[int]

    def write(self, name: str, content: bytes) -> None:
        if name in (TRIALS, state_module.LEADERBOARD_CSV, state_module.LEADERBOARD_MD):
            SlowStorage.clock.seconds += SlowStorage.seconds / 3
            SlowStorage.writes += name == TRIALS
        super().write(name, content)


def slow_state(folder: Path, trials: list[str], *, write_seconds: float) -> SearchState:
    SlowStorage.clock, SlowStorage.seconds, SlowStorage.writes = Clock(), write_seconds, 0
    states = [plain_state(trial) for trial in trials]
    search = SlowStorage.at(str(folder))
    return SearchState(search, states, captions=[], baseline=None, scheduler_state=dict, clock=SlowStorage.clock)


@pytest.mark.parametrize("write_seconds", [0.0, 0.3])
def test_short_epochs_share_a_write(tmp_path: Path, write_seconds: float) -> None:
    state = slow_state(tmp_path, ["a"], write_seconds=write_seconds)
    state.write()
    wait = max(state_module.SECONDS_BETWEEN_WRITES, write_seconds / state_module.MAX_SHARE_OF_WRITING)
    for epoch in range(1, 4):
        SlowStorage.clock.seconds += 0.3 * wait
        state.on_result("a", measured(epoch))
        state.write_if_due()
    assert SlowStorage.writes == 1
    SlowStorage.clock.seconds += 0.3 * wait
    state.write_if_due()
    assert SlowStorage.writes == 2
    assert read_saved_state(Storage.at(str(tmp_path))).states[0].epochs == 3


def test_slow_writes_take_a_small_share_of_the_time(tmp_path: Path) -> None:
    names = [f"r{number:02}" for number in range(50)]
    state = slow_state(tmp_path, names, write_seconds=0.3)
    for name in names:
        SlowStorage.clock.seconds += 0.3
        state.on_result(name, measured(4))
        state.on_end(spec(name), diverged=False, stopped_by="")
    writing = 0.3 * (SlowStorage.writes - 1)  # but for the first, whose cost was not known
    assert 0 < writing <= state_module.MAX_SHARE_OF_WRITING * SlowStorage.clock.seconds
    state.close()
    assert {trial.status for trial in read_saved_state(Storage.at(str(tmp_path))).states} == {"finished"}


DAMAGED = [b"", b"\xff\xfe", b'{"states": [', b"[]", b"null", b'{"states": [{}], "scheduler": {}}']


@pytest.mark.parametrize("content", [None, *DAMAGED])
def test_damaged_states_count_as_missing(folder: Storage, content: bytes | None) -> None:
    if content is not None:
        folder.write(TRIALS, content)
        (folder / "a").write(TRIAL, content)
    assert read_saved_state(folder) == SavedState()
    found = complete_states(folder, [], ["a"])
    assert found == ([] if content is not None else [plain_state("a", status="running", **measured(1))])


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_manifest_is_an_error_that_names_it(folder: Storage, content: bytes) -> None:
    folder.write(SEARCH, content)
    with pytest.raises(DamagedFileError, match=r"search\.json is damaged.*--name"):
        read_manifest(folder)


# --- a resumed search -------------------------------------------------------------------------------------------------

STOPPED = plain_state("a", status="stopped", stopped_by="below the median (ASHA)", **measured(1))


def test_a_trial_records_its_end_before_it_deletes_its_weights(folder: Storage) -> None:
    class Killed(Storage):
        """Its driver dies at the first deletion."""

        def delete(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        end_trial(Killed.at(folder.path), spec("a"), STOPPED)
    assert complete_states(folder, [], ["a"]) == [STOPPED]
    end_trial(folder, spec("a"), STOPPED)  # as the next driver does
    assert files(folder, "a") == {BEST_WEIGHTS, TRIAL}


def test_folders_know_the_ends_that_trials_json_has_lost(folder: Storage, caplog: pytest.LogCaptureFixture) -> None:
    end_trial(folder, spec("a"), STOPPED)
    waits = plain_state("b", status="running", **measured(1))
    assert complete_states(folder, [], ["a", "b"]) == [STOPPED, waits]
    late = [plain_state("a", status="running"), plain_state("b", status="failed", error="no memory")]
    assert complete_states(folder, late, ["a", "b"]) == [STOPPED, replace(late[1], **measured(1))]
    assert not caplog.text


@pytest.mark.parametrize(
    "wrong", [{"best_miou": 99.0}, {"epochs": 4}, {"status": "finished"}, {"status": "finished", "best_miou": 99.0}]
)
def test_numbers_in_trials_json_that_are_not_the_trials_own_are_replaced_and_told(
    folder: Storage, caplog: pytest.LogCaptureFixture, wrong: dict[str, Any]
) -> None:
    end_trial(folder, spec("a"), STOPPED)
    assert complete_states(folder, [replace(STOPPED, **wrong)], ["a"]) == [STOPPED]
    assert "trials.json is wrong about a" in caplog.text


def test_a_trial_that_has_not_ended_is_known_by_its_own_epochs(
    folder: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    own = plain_state("b", **measured(1))
    for wrong in ({"status": "waiting", "best_miou": 99.0}, {"status": "finished", "best_miou": 99.0}):
        caplog.clear()
        (found,) = complete_states(folder, [replace(own, **wrong)], ["b"])
        assert (found.status in ("waiting", "running"), found.best_miou) == (True, 10.0)
        assert "best_miou is 99.0, not 10.0" in caplog.text


def test_the_numbers_of_a_trial_whose_record_is_damaged_are_kept(folder: Storage) -> None:
    (folder / "a").write(TRIAL, b"{}")
    assert complete_states(folder, [STOPPED], ["a"]) == [STOPPED]


@pytest.mark.parametrize("status", ["finished", "stopped", "diverged", "waiting", "running", "failed"])
def test_a_resumed_search_keeps_ended_trials_and_continues_the_others(status: Status) -> None:
    earlier = plain_state("a", status=status, error="no memory", epochs=1, best_miou=3.0)
    restored = restore("a", spec("a").run, [plain_state("b"), earlier])
    if status in ("finished", "stopped", "diverged"):
        assert restored == earlier
    else:
        assert (restored.status, restored.error, restored.epochs, restored.best_miou) == ("waiting", "", 1, 3.0)


def test_an_unknown_trial_begins_from_nothing() -> None:
    run = spec("a").run.model_copy(update={"seed": 3})
    assert restore("a-s3", run, []) == TrialState(trial="a-s3", run="a", seed=3, num_epochs=4)


HOLDER = """
import sys
from tune_bisenet.search.state import exclusive
from tune_bisenet.storage import Storage
with exclusive(Storage.at(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_one_process_at_a_time_runs_a_search_and_a_killed_one_does_not_block_it(folder: Storage) -> None:
    command = [sys.executable, "-c", HOLDER, folder.path]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(InputError, match=folder.path), state_module.exclusive(folder):
            pass
        holder.kill()
    with state_module.exclusive(folder):
        pass
