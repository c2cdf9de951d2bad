"""What a study suggests, handed out trial by trial: into folders first, at most so many at once, whatever is lost."""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from light_search import Search, assert_whole, close_connections, make_place, results, trials_in
from light_space import curve_of, earlier_trials, row
from optuna.trial import TrialState as OptunaState

from tune_bisenet.records import LATENCY, RUN, TRIALS, TrialState
from tune_bisenet.search import state
from tune_bisenet.search.prepare import read_suggested
from tune_bisenet.search.searcher import Declared, read_epochs, read_latency, reported
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage
from tune_bisenet.training.benchmark import Latency

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


@pytest.fixture
def search(place: Path) -> Search:
    return Search(folder=Storage.at(str(place / "search")), limit=5)


@pytest.fixture
def undisturbed(place: Path) -> Iterator[Search]:
    """The same search, as it ends when nothing happens to it."""
    search = Search(folder=Storage.at(str(place / "undisturbed")), limit=5)
    search.run()
    return search  # type: ignore[return-value]


class SessionError(Exception):
    """Ends a session in the middle of it, as an error in Ray does."""


def stop_after(search: Search, epochs: int) -> None:
    """A session that is left, without any word of farewell, after that many epochs."""
    left = iter(range(epochs - 1))

    def between() -> None:
        if next(left, None) is None:
            raise SessionError

    with pytest.raises(SessionError):
        replace(search, between=between).run()


def book_of(search: Search, standings: list[TrialState]) -> SearchState:
    search.folder.make()
    return SearchState(search.folder, standings, captions=[], baseline=None, scheduler_state=dict)


# --- declared -------------------------------------------------------------------------------------------------------


def test_declared_runs_are_handed_out_once_in_their_order_until_a_new_beginning(search: Search) -> None:
    runs = {name: row(name, 0.01) for name in ("a", "b", "c")}
    book = book_of(search, [TrialState(trial=name, run=name, seed=0, num_epochs=3) for name in runs])
    supply = Declared(runs, book)
    assert supply.begin()
    assert [supply.next() for _ in range(4)] == [*runs.items(), None]
    assert supply.exhausted
    book.failed("b", "no memory")
    assert supply.begin()
    assert [supply.next() for _ in range(2)] == [("a", runs["a"]), ("c", runs["c"])]
    for name in ("a", "c"):
        book.failed(name, "no memory")
    assert not supply.begin()


# --- asked ----------------------------------------------------------------------------------------------------------


def test_a_trial_is_in_its_folder_and_in_the_ledger_before_it_is_handed_out(search: Search) -> None:
    book = book_of(search, [])
    supply = search.supply(book, {})
    assert supply.begin()
    found = supply.next()
    assert found is not None
    name, run = found
    assert read_suggested(search.folder)[name].run == run
    assert book[name].status == "waiting"
    assert [trial.state for trial in trials_in(search)] == [OptunaState.RUNNING, OptunaState.WAITING]


def test_no_more_are_out_than_may_run_at_once(search: Search) -> None:
    supply = replace(search, at_once=2).supply(book := book_of(search, []), {})
    supply.begin()
    first, second = supply.next(), supply.next()
    assert first
    assert second
    assert supply.next() is None
    assert not supply.exhausted
    book.failed(first[0], "no memory")
    supply.ended(book[first[0]])
    third = supply.next()
    assert third
    assert third[0] not in (first[0], second[0])


def test_what_is_to_come_is_counted_where_it_is_known(search: Search) -> None:
    supply = search.supply(book_of(search, []), {})
    supply.begin()
    assert len(supply.to_come()) == search.limit
    supply.next()
    assert len(supply.to_come()) == search.limit - 1


def test_a_search_goes_to_its_end_and_there_is_nothing_more_to_begin(search: Search) -> None:
    search.run()
    assert_whole(search, trials_in(search))
    before = results(trials_in(search))
    search.run()
    assert results(trials_in(search)) == before
    replace(search, limit=7).run()
    assert results(trials_in(search)).items() >= before.items()
    assert_whole(replace(search, limit=7), trials_in(search))


@pytest.mark.parametrize("epochs", [1, 3, 4, 8])
def test_a_session_that_was_left_anywhere_changes_no_result(search: Search, undisturbed: Search, epochs: int) -> None:
    stop_after(search, epochs)
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))


def test_several_at_once_come_to_the_same_kind_of_end(search: Search) -> None:
    several = replace(search, at_once=3, limit=8, known=earlier_trials(3))
    stop_after(several, 5)
    stop_after(several, 4)
    several.run()
    assert_whole(several, trials_in(several))


# --- what is lost ---------------------------------------------------------------------------------------------------


def test_a_lost_study_is_made_anew(search: Search, undisturbed: Search) -> None:
    stop_after(search, 10)
    (Path(search.folder.path) / "study.db").unlink()
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))


def test_lost_standings_come_back_from_folders_and_study(search: Search, undisturbed: Search) -> None:
    stop_after(search, 10)
    search.folder.write(TRIALS, b"")
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))
    standings = state.read_trials(search.folder).standings
    assert all(standing.seconds > 0 and standing.best_epoch for standing in standings)


def test_standings_lost_after_the_end_come_back(search: Search) -> None:
    search.run()
    before = state.read_trials(search.folder).standings
    search.folder.delete(TRIALS)
    search.run()
    after = state.read_trials(search.folder).standings
    assert [replace(one, stopped_by="") for one in after] == [replace(one, stopped_by="") for one in before]


@pytest.mark.parametrize("epochs", [9, 10, 13])
@pytest.mark.parametrize("lose_standings", [False, True])
def test_an_ended_trial_whose_folder_has_lost_what_it_trained_is_not_trained_again(
    search: Search, undisturbed: Search, epochs: int, *, lose_standings: bool
) -> None:
    stop_after(search, epochs)
    ended = {trial.user_attrs["trial"] for trial in trials_in(search) if trial.state.is_finished()} - {"a"}
    assert ended
    for name in ended:
        (search.folder / name).write(RUN, b"{")
    if lose_standings:
        search.folder.delete(TRIALS)
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))


@pytest.mark.parametrize("content", [None, b"", b"{}", b"[]", b'{"trial": 1}'])
def test_a_trial_whose_folder_has_lost_what_it_trains_is_asked_for_again(
    search: Search, undisturbed: Search, content: bytes | None
) -> None:
    stop_after(search, 8)  # in the midst of the third
    (third,) = set(read_suggested(search.folder)) - {"a", "b"}
    if content is None:
        (search.folder / third).delete(RUN)
    else:
        (search.folder / third).write(RUN, content)
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))


def test_a_copy_of_the_study_that_is_older_than_the_trials_is_brought_up_to_date(
    search: Search, undisturbed: Search
) -> None:
    stop_after(search, 5)
    file = Path(search.folder.path) / "study.db"
    older = file.read_bytes()
    stop_after(search, 6)
    file.write_bytes(older)
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))


# --- curves ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", [b"", b"[", b"{}", b"[1]", b'[{"epoch": 1}]', b"\xff", b"null"])
def test_a_damaged_curve_is_none(search: Search, content: bytes) -> None:
    search.folder.make()
    search.folder.write("epochs.json", content)
    assert read_epochs(search.folder) == []


def test_a_curve_says_what_its_trial_has_reported() -> None:
    history = curve_of(row("a", 0.01))
    assert json.loads(json.dumps(reported(history, latency_ms=12.5))) == {
        "epoch": 3,
        "miou": history[2].miou,
        "pixel_accuracy": 90.0,
        "best_miou": history[2].miou,
        "best_epoch": 3,
        "total_seconds": 6.0,
        "latency_ms": 12.5,
    }


@pytest.mark.parametrize("content", [None, b"", b"[", b"[]", b"{}", b'{"median_ms": null}', b"\xff"])
def test_a_latency_that_is_missing_or_damaged_is_none(search: Search, content: bytes | None) -> None:
    search.folder.make()
    if content is not None:
        search.folder.write(LATENCY, content)
    assert read_latency(search.folder) is None


def test_a_latency_is_read_from_what_the_trial_wrote(search: Search) -> None:
    search.folder.make()
    written = Latency(median_ms=12.5, low_ms=12.0, high_ms=13.0, repeats=10, device="CPU, 1 thread")
    search.folder.write(LATENCY, json.dumps(written.to_json()).encode())
    assert read_latency(search.folder) == 12.5
