"""A study brought in line with the folders after a crash: nothing is lost, and nothing is told twice."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from light_search import close_connections, make_place
from light_space import curve_of, ended, question, row
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState
from studies import EARLIER, done, failed, opened, suggested, train, train_next, trial_at, trials_at, url_in, waiting

from tune_bisenet.spaces import Sampled
from tune_bisenet.study.study import Record
from tune_bisenet.study.translation import name_of

place = pytest.fixture(make_place)
url = pytest.fixture(url_in)
_closed = pytest.fixture(autouse=True)(close_connections)


def test_what_was_cut_off_waits_and_is_the_next_with_the_same_values(url: str) -> None:
    study = opened(url, limit=4)
    study.reconcile([], [])
    *trained, cut_off = [*train_next(study, 2), suggested(study)]
    study.heard(cut_off.trial, 1, 25.0)
    study.close()
    assert trial_at(url, cut_off.trial).state is OptunaState.WAITING
    resumed = opened(url, limit=4)
    resumed.reconcile([*(done(one) for one in trained), waiting(cut_off, epochs=1)], [])
    assert suggested(resumed) == cut_off
    assert trial_at(url, cut_off.trial).intermediate_values == {1: 25.0}


def test_what_a_killed_driver_left_running_waits_and_live_trials_run_on(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    first, second = suggested(study), suggested(study)
    study.reconcile([waiting(first), waiting(second)], [], live={first.trial})
    assert [trial.state for trial in trials_at(url)] == [OptunaState.RUNNING, OptunaState.WAITING]
    assert suggested(study) == second


def test_a_trial_without_a_folder_is_asked_for_again(url: str) -> None:
    study = opened(url, limit=3)
    study.reconcile([], [])
    trained = train_next(study, 2)
    lost = suggested(study)
    resumed = opened(url, limit=3)
    resumed.reconcile([done(one) for one in trained], [])
    assert suggested(resumed) == lost
    assert resumed.next() is None


def test_a_study_behind_its_folders_is_told_what_they_have(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    ended_since, further_since = suggested(study), suggested(study)
    study.heard(ended_since.trial, 1, curve_of(ended_since.run)[0].miou)
    records = [done(ended_since), waiting(further_since, epochs=2)]
    resumed = opened(url)
    assert resumed.reconcile(records, []) == {}
    first, second = trials_at(url)
    assert (first.state, first.value) == (OptunaState.COMPLETE, ended(ended_since).best_miou)
    assert list(first.intermediate_values) == [1, 2, 3]
    assert (second.state, list(second.intermediate_values)) == (OptunaState.WAITING, [1, 2])


@pytest.mark.parametrize("lr", [0.01, 0.002, 0.09])
def test_a_study_ahead_of_its_folders_says_how_trials_ended(url: str, lr: float) -> None:
    space = Sampled("one", lambda trial: row("drawn", trial.suggest_float("lr", lr, lr)))
    study = opened(url, question(space))
    study.reconcile([], [])
    (one,) = train_next(study, 1)
    before = trials_at(url)
    resumed = opened(url, question(space), limit=1)
    assert resumed.reconcile([waiting(one, epochs=1)], []) == {one.trial: ended(one).status}
    assert trials_at(url) == before
    assert resumed.next() is None


def test_a_study_that_agrees_with_its_folders_stays_as_it_is(url: str) -> None:
    study = opened(url, limit=5)
    study.reconcile([], EARLIER)
    trained = train_next(study, 5)
    before = trials_at(url)
    assert opened(url, limit=5).reconcile([done(one) for one in trained], EARLIER) == {}
    assert trials_at(url) == before


def test_a_failed_trial_that_waits_again_is_a_trial_of_its_own_with_the_same_values(url: str) -> None:
    study = opened(url, limit=1)
    study.reconcile([], [])
    one = suggested(study)
    study.heard(one.trial, 1, 28.0)
    study.ended(failed(one))
    for _ in range(3):  # as often as a driver may be killed before it goes on
        resumed = opened(url, limit=1)
        assert resumed.reconcile([waiting(one, epochs=1)], []) == {}
    again = suggested(resumed)
    assert (again.trial, again.run, again.params) == (one.trial, one.run, one.params)
    train(resumed, again)
    assert resumed.next() is None
    first, retried = (trial for trial in trials_at(url) if name_of(trial) == "a")
    assert first.state is OptunaState.FAIL
    assert (retried.state, retried.user_attrs["retry_of"]) == (OptunaState.COMPLETE, first.number)


def test_a_trial_that_stays_failed_is_not_tried_again(url: str) -> None:
    study = opened(url, limit=1)
    study.reconcile([], [])
    one = suggested(study)
    study.ended(failed(one))
    resumed = opened(url, limit=1)
    resumed.reconcile([Record(suggested=one, standing=failed(one), epochs=[])], [])
    assert resumed.next() is None


def test_a_lost_study_is_made_anew_from_the_folders(url: str, place: Path) -> None:
    study = opened(url, limit=12)
    study.reconcile([], EARLIER)
    trained = train_next(study, 7)
    cut_off = suggested(study)
    study.heard(cut_off.trial, 1, curve_of(cut_off.run)[0].miou)
    study.close()
    before = comparable(trials_at(url))
    (place / "study.db").unlink()
    records = [*(done(one) for one in trained), waiting(cut_off, epochs=1)]
    rebuilt = opened(url, limit=12)
    assert rebuilt.reconcile(records, EARLIER) == {}
    after = comparable(trials_at(url))
    assert {name: after[name] for name in before} == before
    assert suggested(rebuilt) == cut_off


def comparable(trials: Sequence[FrozenTrial]) -> dict[str, tuple[Any, ...]]:
    """All but times and numbers of the database's own; of those that make no run, nothing."""
    return {
        name_of(trial): (
            trial.number,
            trial.state,
            trial.values,
            trial.params,
            trial.distributions,
            trial.intermediate_values,
            trial.user_attrs,
        )
        for trial in trials
        if trial.state is not OptunaState.FAIL
    }


def test_in_a_study_made_anew_no_name_is_given_twice(url: str, place: Path) -> None:
    asked = question(sampler="random", seed=1)
    study = opened(url, asked)
    study.reconcile([], [])
    trained = train_next(study, 9)
    numbers = [one.number for one in trained]
    assert max(number or 0 for number in numbers) > 8, "there was a draw that made no run"
    (place / "study.db").unlink()
    rebuilt = opened(url, asked)
    rebuilt.reconcile([done(one) for one in trained], [])
    more = train_next(rebuilt, 3)
    assert not {one.trial for one in more} & {one.trial for one in trained}
    undisturbed = opened(f"sqlite:///{place / 'other.db'}", asked)
    undisturbed.reconcile([], [])
    assert train_next(undisturbed, 12) == [*trained, *more]
