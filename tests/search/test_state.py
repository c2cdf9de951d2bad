"""The state of a search: trials from waiting to ended, copies in storage, what a resumed search keeps, the lock."""

import csv
import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from helpers.object_store import ObjectStore, object_store
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
    from_json,
    measure,
    read_manifest,
    read_saved_state,
    read_trial,
    to_json,
    write_saved_state,
    write_trial,
)
from tune_bisenet.search import state as state_module
from tune_bisenet.search.state import Holder, SearchState, complete_states, end_trial, restore
from tune_bisenet.storage import ConditionalFile, Storage

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


@pytest.mark.parametrize(
    "edit",
    [
        {"seen": []},
        {"stops": {}},
        {"seen": [{"num_epochs": 4, "trial": "a", "miou": {"2": 99.0}}]},
        {"seen": 5},
        {"seen": [{}]},
        {"stops": None},
        {"more": 1},
        5,
        [],
        "text",
    ],
    ids=str,
)
def test_an_edited_memory_of_the_stopping_rule_is_forgotten(state: SearchState, folder: Storage, edit: Any) -> None:
    state.write()
    plain = json.loads(folder.read(TRIALS) or b"")
    plain["scheduler"] = plain["scheduler"] | edit if isinstance(edit, dict) else edit
    folder.write(TRIALS, json.dumps(plain).encode())
    saved = read_saved_state(folder)
    assert (list(saved.states), saved.scheduler) == (state.states, SCHEDULER if edit == {"seen": []} else None)


def test_an_edited_time_of_the_search_is_forgotten(folder: Storage) -> None:
    write_saved_state(folder, SavedState(scheduler=SCHEDULER, seconds=60.0))
    assert read_saved_state(folder).seconds == 60.0
    folder.write(TRIALS, (folder.read(TRIALS) or b"").replace(b"60.0", b"90.0"))
    assert read_saved_state(folder) == SavedState()


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
    "wrong", [{"seconds": 9.0}, {"epochs": 4}, {"status": "finished"}, {"status": "finished", "last_miou": 99.0}]
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
    for wrong in ({"status": "waiting", "seconds": 99.0}, {"status": "finished", "seconds": 99.0}):
        caplog.clear()
        (found,) = complete_states(folder, [replace(own, **wrong)], ["b"])
        assert (found.status in ("waiting", "running"), found.seconds) == (True, 2.0)
        assert "seconds is 99.0, not 2.0" in caplog.text


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


# --- one driver at a time ---------------------------------------------------------------------------------------------

HOLDER = """
import sys
from tune_bisenet.search import state
from tune_bisenet.storage import Storage
state.RENEWAL_SECONDS = 0.2
with state.exclusive(Storage.at(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(address: str) -> Iterator[subprocess.Popen[str]]:
    """Let another process run the search at `address`, until its input is closed or it is killed."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLDER, address]
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as holder:
        try:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            yield holder
        finally:
            holder.kill()


def assert_refused(folder: Storage, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError) as refused, state_module.exclusive(folder):
        pass
    told = rf"process {holder.pid} on {socket.gethostname()}, since 20\d\d-.* UTC, is running the search in "
    assert re.search(told + re.escape(folder.uri), str(refused.value)), refused.value


def test_one_process_at_a_time_runs_a_search_and_a_killed_one_does_not_block_it(folder: Storage) -> None:
    with held(folder.path) as holder:
        assert_refused(folder, holder)
        holder.kill()
        holder.wait()
        with state_module.exclusive(folder):
            pass


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def leased(store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Storage:
    """The folder of a search in S3, whose leases are looked at often."""
    monkeypatch.setattr(state_module, "LOOK_SECONDS", 0.1)
    return Storage.at(store.uri(f"{tmp_path.name}/search"))


def lease_of(folder: Storage) -> ConditionalFile:
    return ConditionalFile(folder.parent, ".search.driver.json")


def write_lease(folder: Storage, **changes: Any) -> Holder:
    """Give the search to a driver of another machine."""
    other = replace(Holder.of_this_process(), host="elsewhere", machine="another", **changes)
    file = lease_of(folder)
    file.read()
    assert file.write(to_json(other))
    return other


def test_in_object_storage_a_renewed_lease_keeps_others_out_until_its_process_is_dead(
    leased: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with held(leased.uri) as holder:
        assert_refused(leased, holder)
        holder.kill()
        holder.wait()
        caplog.clear()
        with state_module.exclusive(leased):
            pass
    assert not caplog.text, "a dead process of this machine is not waited for"
    with held(leased.uri) as holder:  # nor is one that has ended
        _, errors = holder.communicate("")
        assert (holder.returncode, errors) == (0, "")
    with state_module.exclusive(leased):
        pass


@pytest.mark.parametrize("content", ["another machine's", b"{}", b""])
def test_a_lease_that_nobody_renews_ends(
    leased: Storage, content: str | bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state_module, "LEASE_SECONDS", 0.5)
    if isinstance(content, str):
        write_lease(leased)
    else:
        assert lease_of(leased).write(content)
    with state_module.exclusive(leased):
        holder = from_json(Holder, lease_of(leased).read() or b"", path="the lease")
        assert holder.pid == os.getpid()
    assert "ran the search in" in caplog.text
    assert ("process" in caplog.text and "on elsewhere" in caplog.text) == isinstance(content, str)


def test_a_driver_whose_lease_was_taken_ends_at_once_and_leaves_it_alone(leased: Storage) -> None:
    with held(leased.uri) as holder:
        for _ in range(50):  # its own renewal may come between reading and writing
            with suppress(AssertionError):
                other = write_lease(leased)
                break
        assert holder.wait(timeout=120) == 75
        assert holder.stderr is not None
        errors = holder.stderr.read()
        assert f"process {other.pid} on elsewhere" in errors
    assert from_json(Holder, lease_of(leased).read() or b"", path="the lease") == other


def test_a_renewal_that_storage_does_not_answer_is_tried_again(store: ObjectStore, leased: Storage) -> None:
    with held(leased.uri) as holder:
        before = lease_of(leased).read()
        store.go_away()
        try:
            with pytest.raises(subprocess.TimeoutExpired):
                holder.wait(timeout=2)
        finally:
            store.come_back()
        while lease_of(leased).read() == before:
            assert holder.poll() is None


def test_where_storage_compares_nothing_the_lease_holds_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(state_module, "LOOK_SECONDS", 0.1)
    folder = Storage.at(f"memory://{tmp_path}/search")
    folder.parent.make()
    with state_module.exclusive(folder):
        threading.Timer(0.5, lambda: write_lease(folder, renewals=1)).start()
        with pytest.raises(InputError, match=f"process {os.getpid()}"), state_module.exclusive(folder):
            pass
    assert "does not compare before it writes" in caplog.text


def test_where_a_server_ignores_conditions_the_lease_is_compared_here_and_told(
    store: ObjectStore, leased: Storage, caplog: pytest.LogCaptureFixture
) -> None:
    with state_module.exclusive(leased):
        assert not caplog.text
    store.ignores_conditions = True
    try:
        with held(leased.uri) as holder:
            assert_refused(leased, holder)
            write_lease(leased)
            assert holder.wait(timeout=120) == 75
            assert holder.stderr is not None
            told, ended = holder.stderr.read().splitlines()
            assert "does not compare before it writes" in told
            assert "on elsewhere" in ended
    finally:
        store.ignores_conditions = False
    assert [info.base_name for info in leased.parent.infos()] == [".search.driver.json"], "the probe is gone"
