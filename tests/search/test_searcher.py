"""Trials handed out one by one: into folders first, at most so many at once, whatever is lost."""

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.light_search import (
    Search,
    assert_whole,
    close_connections,
    earlier_trials,
    ended,
    make_place,
    results,
    row,
    trials_in,
)
from helpers.rows import plain_epoch
from optuna.trial import TrialState as OptunaState

from tune_bisenet.config import Sampler
from tune_bisenet.records import TRIAL, TRIALS, TrialSpec, TrialState, measure, read_saved_state
from tune_bisenet.search.prepare import read_specs
from tune_bisenet.search.searcher import GridSearcher
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


@pytest.fixture
def search(place: Path) -> Search:
    return Search(folder=Storage.at(str(place / "search")), limit=5)


@pytest.fixture
def undisturbed(place: Path) -> Search:
    """The same search, after it ran without a disturbance."""
    search = Search(folder=Storage.at(str(place / "undisturbed")), limit=5)
    search.run()
    return search


class SessionError(Exception):
    """Ends a session in the middle of it, as an error in Ray does."""


def stop_after(search: Search, epochs: int) -> None:
    """Run a session that ends after that many epochs, closing nothing."""
    left = iter(range(epochs - 1))

    def between() -> None:
        if next(left, None) is None:
            raise SessionError

    with pytest.raises(SessionError):
        replace(search, between=between).run()


def assert_equal(search: Search, undisturbed: Search) -> None:
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    assert_whole(search, trials_in(search))


def state_of(search: Search, *states: TrialState) -> SearchState:
    search.folder.make()
    return SearchState(search.folder, states, captions=[], baseline=None, scheduler_state=dict)


def test_declared_runs_are_handed_out_once_in_their_order_until_a_new_beginning(search: Search) -> None:
    specs = {name: TrialSpec(trial=name, run=row(name, 0.01)) for name in ("a", "b", "c")}
    state = state_of(search, *(TrialState.of_run(name, spec.run) for name, spec in specs.items()))
    searcher = GridSearcher(specs, state, share=True)
    assert searcher.begin()
    assert [searcher.next() for _ in range(4)] == [*specs.values(), None]
    assert searcher.exhausted
    state.on_error("b", "no memory")
    assert searcher.begin()
    assert [searcher.next() for _ in range(2)] == [specs["a"], specs["c"]]
    for name in ("a", "c"):
        state.on_error(name, "no memory")
    assert not searcher.begin()


def test_a_row_waits_for_one_that_begins_alike_until_they_part_or_that_has_ended(search: Search) -> None:
    plain = row("r01", 0.01).model_copy(update={"num_epochs": 4})
    switching = plain.model_copy(update={"name": "r05", "loss": plain.loss.model_copy(update={"lovasz_after": 3})})
    rows = [plain, switching, row("r09", 0.02), plain.model_copy(update={"name": "same"})]
    specs = {run.name: TrialSpec(trial=run.name, run=run) for run in rows}
    state = state_of(search)
    searcher = GridSearcher(specs, state, share=True)
    searcher.begin()
    assert [searcher.next() for _ in range(4)] == [specs["r01"], specs["r09"], specs["same"], None]
    assert not searcher.exhausted
    for name in ("r01", "same"):
        state.on_result(name, measure([plain_epoch(number, 10.0) for number in (1, 2)]))
    assert searcher.next() is None, "they part after epoch 3"
    state.on_error("same", "no memory")
    searcher.on_end(state["same"])
    assert searcher.next() is None, "r01 still trains what they have in common"
    state.on_result("r01", measure([plain_epoch(number, 10.0) for number in (1, 2, 3)]))
    assert searcher.next() == specs["r05"]
    assert searcher.exhausted
    alone = GridSearcher(specs, state, share=False)
    alone.begin()
    assert [alone.next() for _ in range(3)] == [specs["r01"], specs["r05"], specs["r09"]]


def test_a_trial_is_in_its_folder_and_in_the_state_before_it_is_handed_out(search: Search) -> None:
    state = state_of(search)
    searcher = search.searcher(state, {})
    assert searcher.begin()
    assert len(searcher.pending()) == search.limit
    spec = searcher.next()
    assert spec is not None
    assert read_specs(search.folder) == {spec.trial: spec}
    assert state[spec.trial].status == "waiting"
    assert len(searcher.pending()) == search.limit - 1
    assert [trial.state for trial in trials_in(search)] == [OptunaState.RUNNING, OptunaState.WAITING]


def test_no_more_trials_are_out_than_may_run_at_once(search: Search) -> None:
    state = state_of(search)
    searcher = replace(search, at_once=2).searcher(state, {})
    searcher.begin()
    first, second = searcher.next(), searcher.next()
    assert first
    assert second
    assert searcher.next() is None
    assert not searcher.exhausted
    state.on_error(first.trial, "no memory")
    searcher.on_end(state[first.trial])
    third = searcher.next()
    assert third
    assert third.trial not in (first.trial, second.trial)


def test_a_completed_search_stays_as_it_is_and_a_higher_limit_continues_it(search: Search) -> None:
    search.run()
    assert_whole(search, trials_in(search))
    before = results(trials_in(search))
    search.run()
    assert results(trials_in(search)) == before
    replace(search, limit=7).run()
    assert results(trials_in(search)).items() >= before.items()
    assert_whole(replace(search, limit=7), trials_in(search))


def test_fresh_seeds_of_the_best_are_trials_that_the_study_does_not_know(search: Search) -> None:
    search.run()
    for _ in range(2):
        suggested = read_specs(search.folder)
        state = search.state(suggested)
        fresh = search.searcher(state, suggested).fresh_trials(2)
        best = max((one.best_miou or 0, one.run) for one in state.states if one.run.startswith("t"))[1]
        assert {f"{name}-s{seed}" for name in (best, "a") for seed in (1, 2)} <= fresh.keys()
        assert {state[name].status for name in fresh} == {"waiting"}
        assert read_specs(search.folder).keys() >= fresh.keys()
    assert len(results(trials_in(search))) == search.limit


@pytest.mark.parametrize("epochs", [1, 3, 4, 8])
def test_a_session_that_ended_anywhere_changes_no_result(search: Search, undisturbed: Search, epochs: int) -> None:
    stop_after(search, epochs)
    search.run()
    assert_equal(search, undisturbed)


def test_several_at_once_come_to_a_whole_end(search: Search) -> None:
    several = replace(search, at_once=3, limit=8, known=earlier_trials(3))
    stop_after(several, 5)
    stop_after(several, 4)
    several.run()
    assert_whole(several, trials_in(several))


def test_a_lost_study_is_rebuilt_with_what_it_began_with(search: Search, place: Path) -> None:
    search, undisturbed = (
        replace(search, folder=Storage.at(str(place / name)), known=earlier_trials(3)) for name in ("lost", "kept")
    )
    undisturbed.run()
    stop_after(search, 10)
    (place / "lost" / "study.db").unlink()
    search.run()
    assert_equal(search, undisturbed)


def test_a_damaged_study_is_rebuilt(search: Search, undisturbed: Search, caplog: pytest.LogCaptureFixture) -> None:
    stop_after(search, 10)
    file = Path(search.folder.path) / "study.db"
    content = file.read_bytes()
    file.write_bytes(content[:8192] + b"\xff" * (len(content) - 8192))
    search.run()
    assert_equal(search, undisturbed)
    assert caplog.text.count("it is rebuilt") == 1


@pytest.mark.parametrize("sampler", ["qmc", "cmaes", "random"])
def test_every_sampler_draws_from_a_rebuilt_study_what_it_would_have_drawn(place: Path, sampler: Sampler) -> None:
    undisturbed = Search(folder=Storage.at(str(place / "undisturbed")), limit=8, sampler=sampler)
    undisturbed.run()
    search = replace(undisturbed, folder=Storage.at(str(place / "search")))
    stop_after(search, 13)
    (place / "search" / "study.db").unlink()
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    points = [str(trial.params) for trial in trials_in(search)]
    assert len(set(points)) == len(points), "no point is tried twice"


def overwrite(file: Path) -> None:
    file.write_bytes(b"no database" * 10_000)


def truncate(file: Path) -> None:
    os.truncate(file, 5000)


@pytest.mark.parametrize("damage", [overwrite, truncate, Path.unlink])
@pytest.mark.parametrize(("epoch", "at_once"), [(4, 1), (8, 1), (2, 3), (9, 3)])
def test_a_study_that_is_damaged_while_trials_run_is_rebuilt(
    search: Search,
    undisturbed: Search,
    damage: Callable[[Path], None],
    epoch: int,
    at_once: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    file, epochs = Path(search.folder.path) / "study.db", iter(range(1, 1000))
    searched = replace(search, at_once=at_once, between=lambda: damage(file) if next(epochs) == epoch else None)
    searched.run()
    assert_whole(searched, trials_in(searched))
    if at_once == 1:
        assert_equal(searched, undisturbed)
    assert caplog.text.count("it is rebuilt") == 1
    assert len(list(file.parent.glob("study.db.damaged-*"))) == (0 if damage is Path.unlink else 1)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE trial_params SET param_value = param_value * 1.01 WHERE param_name = 'lr'",
        "UPDATE trial_intermediate_values SET intermediate_value = intermediate_value + 1",
        "UPDATE trial_values SET value = value + 1",
    ],
)
@pytest.mark.parametrize("epochs", [10, 14])
def test_a_study_that_contradicts_the_folders_follows_them(
    search: Search, undisturbed: Search, statement: str, epochs: int
) -> None:
    stop_after(search, epochs)
    with closing(sqlite3.connect(Path(search.folder.path) / "study.db")) as connection, connection:
        connection.execute(statement)
    search.run()
    assert_equal(search, undisturbed)


def test_lost_states_come_back_from_folders_and_study(search: Search, undisturbed: Search) -> None:
    stop_after(search, 10)
    search.folder.write(TRIALS, b"")
    search.run()
    assert_equal(search, undisturbed)
    states = read_saved_state(search.folder).states
    assert all(one.seconds > 0 and one.best_epoch for one in states)
    search.folder.delete(TRIALS)
    search.run()
    after = read_saved_state(search.folder).states
    assert [replace(one, stopped_by="") for one in after] == [replace(one, stopped_by="") for one in states]


@pytest.mark.parametrize("epochs", [9, 10, 13])
@pytest.mark.parametrize("lose_states", [False, True])
def test_an_ended_trial_whose_folder_has_lost_what_it_trained_is_not_trained_again(
    search: Search, undisturbed: Search, epochs: int, *, lose_states: bool
) -> None:
    stop_after(search, epochs)
    lost = {name for name, (trial_state, *_) in results(trials_in(search)).items() if trial_state != "RUNNING"} - {"a"}
    assert lost
    for name in lost:
        (search.folder / name).write(TRIAL, b"{")
    if lose_states:
        search.folder.delete(TRIALS)
    search.run()
    assert results(trials_in(search)) == results(trials_in(undisturbed))
    specs = read_specs(search.folder)
    for state in read_saved_state(search.folder).states:
        expected = ended(specs[state.trial])
        if state.trial in lost:  # only the study knew what they reached
            expected = replace(expected, pixel_accuracy=None, seconds=0.0)
        assert replace(state, stopped_by="") == expected


@pytest.mark.parametrize("content", [None, b"", b'{"trial": 1}'])
def test_a_trial_whose_folder_has_lost_what_it_trains_is_asked_for_again(
    search: Search, undisturbed: Search, content: bytes | None
) -> None:
    stop_after(search, 8)  # within the third
    (third,) = set(read_specs(search.folder)) - {"a", "b"}
    if content is None:
        (search.folder / third).delete(TRIAL)
    else:
        (search.folder / third).write(TRIAL, content)
    search.run()
    assert_equal(search, undisturbed)


def test_a_copy_of_the_study_that_is_older_than_the_trials_is_brought_up_to_date(
    search: Search, undisturbed: Search
) -> None:
    stop_after(search, 5)
    file = Path(search.folder.path) / "study.db"
    older = file.read_bytes()
    stop_after(search, 6)
    file.write_bytes(older)
    search.run()
    assert_equal(search, undisturbed)
