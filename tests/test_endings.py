"""How a trial ended, as its own folder says it, and what the folder lets go of."""

from pathlib import Path

import pytest

from tune_bisenet import endings
from tune_bisenet.ledger import Ledger
from tune_bisenet.results import BEST, ENDED, EPOCHS, LAST, PREVIOUS, Standing, Status
from tune_bisenet.storage import Storage


def standing(trial: str, status: Status = "waiting", *, epochs: int = 0, stopped_by: str = "") -> Standing:
    return Standing(
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
        for name in (LAST, PREVIOUS, BEST, EPOCHS):
            (folder / trial).write(name, b"[]")
    return folder


def files(search: Storage, trial: str) -> set[str]:
    return {path.name for path in (Path(search.path) / trial).iterdir()}


def test_a_trial_that_has_ended_keeps_its_best_weights_and_nothing_to_go_on_from(search: Storage) -> None:
    endings.keep(search / "a", STOPPED)
    assert files(search, "a") == {BEST, EPOCHS, ENDED}
    assert files(search, "b") == {LAST, PREVIOUS, BEST, EPOCHS}
    endings.keep(search / "a", STOPPED)  # a driver killed in between does it again
    assert files(search, "a") == {BEST, EPOCHS, ENDED}


def test_it_says_how_before_it_lets_go(search: Storage) -> None:
    class Killed(Storage):
        """By a driver's death at its first deletion."""

        def delete(self, name: str) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        endings.keep(Killed.at(search.path) / "a", STOPPED)
    assert endings.completed(search, [], ["a", "b"]) == [STOPPED]


def test_what_trials_json_has_lost_the_folders_know(search: Storage) -> None:
    endings.keep(search / "a", STOPPED)
    assert endings.completed(search, [], ["a", "b"]) == [STOPPED]
    late = [standing("a", "running", epochs=1), standing("b", "running", epochs=3)]
    assert endings.completed(search, late, ["a", "b"]) == [STOPPED, late[1]]


def test_an_end_that_trials_json_knows_is_not_read_again(search: Storage) -> None:
    endings.keep(search / "a", STOPPED)
    known = standing("a", "finished", epochs=4)
    assert endings.completed(search, [known], ["a"]) == [known]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'"stopped"'])
def test_a_damaged_file_says_nothing(search: Storage, content: bytes) -> None:
    (search / "a").write(ENDED, content)
    assert endings.completed(search, [], ["a"]) == []


@pytest.mark.parametrize(
    ("epochs", "diverged", "status"), [(4, False, "finished"), (2, False, "stopped"), (2, True, "diverged")]
)
def test_the_ledger_sees_to_it_when_a_trial_ends_well(
    search: Storage, epochs: int, diverged: bool, status: Status
) -> None:
    book = Ledger(search, [standing("a", epochs=epochs)], captions=[], baseline=None, scheduler_state=dict)
    book.ended("a", diverged=diverged, stopped_by="")
    assert files(search, "a") == {BEST, EPOCHS, ENDED}
    assert [found.status for found in endings.completed(search, [], ["a"])] == [status]


def test_one_that_failed_keeps_all_for_another_try(search: Storage) -> None:
    book = Ledger(search, [standing("a", epochs=2)], captions=[], baseline=None, scheduler_state=dict)
    book.failed("a", "no memory")
    assert files(search, "a") == {LAST, PREVIOUS, BEST, EPOCHS}
    assert endings.completed(search, [], ["a"]) == []
