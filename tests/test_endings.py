"""How a trial ended, as its own folder says it, and what the folder lets go of."""

from pathlib import Path

import pytest

from tune_bisenet import records
from tune_bisenet.records import BEST_WEIGHTS, ENDED, EPOCHS, LAST, PREVIOUS, Status, TrialState
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage


def standing(trial: str, status: Status = "waiting", *, epochs: int = 0, stopped_by: str = "") -> TrialState:
    return TrialState(
        trial=trial,
        run=trial,
        seed=0,
        num_epochs=4,
        status=status,
        epochs=epochs,
        stopped_by=stopped_by,
        best_miou=12.5,
    )


STOPPED = standing("a", "stopped", epochs=2, stopped_by="below the median (ASHA)")


@pytest.fixture
def search(tmp_path: Path) -> Storage:
    """Of trials a and b, both with all that a trial that goes on has."""
    folder = Storage.at(str(tmp_path))
    for trial in ("a", "b"):
        (folder / trial).make()
        for name in (LAST, PREVIOUS, BEST_WEIGHTS, EPOCHS):
            (folder / trial).write(name, b"[]")
    return folder


def files(search: Storage, trial: str) -> set[str]:
    return {path.name for path in (Path(search.path) / trial).iterdir()}


def test_a_trial_that_has_ended_keeps_its_best_weights_and_nothing_to_go_on_from(search: Storage) -> None:
    records.keep_ending(search / "a", STOPPED)
    assert files(search, "a") == {BEST_WEIGHTS, EPOCHS, ENDED}
    assert files(search, "b") == {LAST, PREVIOUS, BEST_WEIGHTS, EPOCHS}
    records.keep_ending(search / "a", STOPPED)  # a driver killed in between does it again
    assert files(search, "a") == {BEST_WEIGHTS, EPOCHS, ENDED}


def test_it_says_how_before_it_lets_go(search: Storage) -> None:
    class Killed(Storage):
        """By a driver's death at its first deletion."""

        def delete(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        records.keep_ending(Killed.at(search.path) / "a", STOPPED)
    assert records.complete_states(search, [], ["a", "b"]) == [STOPPED]


def test_what_trials_json_has_lost_the_folders_know(search: Storage) -> None:
    records.keep_ending(search / "a", STOPPED)
    assert records.complete_states(search, [], ["a", "b"]) == [STOPPED]
    late = [standing("a", "running", epochs=1), standing("b", "running", epochs=3)]
    assert records.complete_states(search, late, ["a", "b"]) == [STOPPED, late[1]]


def test_an_end_that_trials_json_knows_is_not_read_again(search: Storage) -> None:
    records.keep_ending(search / "a", STOPPED)
    known = standing("a", "finished", epochs=4)
    assert records.complete_states(search, [known], ["a"]) == [known]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'"stopped"'])
def test_a_damaged_file_says_nothing(search: Storage, content: bytes) -> None:
    (search / "a").write(ENDED, content)
    assert records.complete_states(search, [], ["a"]) == []


@pytest.mark.parametrize(
    ("epochs", "diverged", "status"), [(4, False, "finished"), (2, False, "stopped"), (2, True, "diverged")]
)
def test_the_ledger_sees_to_it_when_a_trial_ends_well(
    search: Storage, epochs: int, diverged: bool, status: Status
) -> None:
    book = SearchState(search, [standing("a", epochs=epochs)], captions=[], baseline=None, scheduler_state=dict)
    book.ended("a", diverged=diverged, stopped_by="")
    assert files(search, "a") == {BEST_WEIGHTS, EPOCHS, ENDED}
    assert [found.status for found in records.complete_states(search, [], ["a"])] == [status]


def test_one_that_failed_keeps_all_for_another_try(search: Storage) -> None:
    book = SearchState(search, [standing("a", epochs=2)], captions=[], baseline=None, scheduler_state=dict)
    book.failed("a", "no memory")
    assert files(search, "a") == {LAST, PREVIOUS, BEST_WEIGHTS, EPOCHS}
    assert records.complete_states(search, [], ["a"]) == []
