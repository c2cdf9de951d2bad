"""A study: what it asks for, what it is told, and how it is brought in line with the folders after a crash."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from light_search import (
    ROWS,
    SPACE,
    close_connections,
    curve_of,
    earlier_trials,
    ended,
    make_place,
    question,
    row,
    sample,
)
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial, TrialState

from tune_bisenet.config import Objective, Run, Sampler
from tune_bisenet.results import Standing
from tune_bisenet.spaces import Sampled
from tune_bisenet.study import MAX_FAILED_DRAWS, Question, Record, Study, exists, name_of, open_storage
from tune_bisenet.suggested import Known, Suggested

EARLIER = earlier_trials(11)


place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


@pytest.fixture
def url(place: Path) -> str:
    return f"sqlite:///{place / 'study.db'}"


def opened(url: str, asked: Question | None = None, *, limit: int | None = None) -> Study:
    """As a new process opens it."""
    return Study(
        open_storage(url),
        "test",
        asked or question(),
        limit=limit,
        checkpoint_of=lambda trial: f"/search/{trial}/best.pt",
    )


def trials_at(url: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="test", storage=url).trials


def trial_at(url: str, name: str) -> FrozenTrial:
    """The last one of that name."""
    return [trial for trial in trials_at(url) if name_of(trial) == name][-1]


def train(study: Study, one: Suggested) -> None:
    for epoch in curve_of(one.run):
        study.heard(one.trial, epoch.epoch, epoch.miou)
    study.ended(ended(one))


def train_next(study: Study, count: int) -> list[Suggested]:
    trained = []
    for _ in range(count):
        one = study.next()
        assert one is not None
        train(study, one)
        trained.append(one)
    return trained


def waiting(one: Suggested, epochs: int = 0) -> Record:
    standing = Standing(trial=one.trial, run=one.run.name, seed=one.run.seed, num_epochs=one.run.num_epochs)
    return Record(suggested=one, standing=standing, epochs=curve_of(one.run)[:epochs])


def done(one: Suggested) -> Record:
    return Record(suggested=one, standing=ended(one), epochs=curve_of(one.run))


def failed(one: Suggested) -> Standing:
    return replace(waiting(one).standing, status="failed", error="no memory")


def suggested(study: Study) -> Suggested:
    one = study.next()
    assert one is not None
    return one


def without_rows(**choices: Any) -> Question:
    return question(replace(SPACE, around=None, point=None), **choices)


# --- what to try ----------------------------------------------------------------------------------------------------


def test_the_rows_come_first_in_their_order_then_what_the_sampler_draws(url: str) -> None:
    study = opened(url, limit=5)
    study.reconcile([], [])
    first = train_next(study, 5)
    assert [(one.trial, one.run.name, one.origin) for one in first[:2]] == [("a", "a", "row"), ("b", "b", "row")]
    assert [one.run for one in first[:2]] == list(ROWS)
    for one in first[2:]:
        assert one.origin == "sampled"
        assert one.trial == one.run.name == f"t{one.number:04d}"
        drawn = sample(optuna.trial.FixedTrial(one.params))
        assert one.run.fingerprint() == drawn.fingerprint()
    assert study.next() is None
    assert [trial.state for trial in trials_at(url)].count(TrialState.WAITING) == 0


def test_every_trial_has_the_seed_of_the_search(url: str) -> None:
    study = opened(url, question(seed=5))
    study.reconcile([], [])
    assert {one.run.seed for one in train_next(study, 4)} == {5}
    assert {trial.user_attrs["seed"] for trial in trials_at(url) if trial.state is not TrialState.FAIL} == {5}


def test_without_a_limit_there_is_no_end(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    assert len({one.trial for one in train_next(study, 20)}) == 20


def test_a_limit_below_the_rows_holds(url: str) -> None:
    study = opened(url, limit=1)
    study.reconcile([], [])
    assert [one.trial for one in train_next(study, 1)] == ["a"]
    assert study.next() is None


def test_a_draw_that_makes_no_run_is_told_as_failed_and_passed_over(url: str) -> None:
    study = opened(url, question(sampler="random", seed=1))
    study.reconcile([], [])
    trained = train_next(study, 12)
    failures = [trial for trial in trials_at(url) if trial.state is TrialState.FAIL]
    assert failures
    assert all("out of luck" in trial.user_attrs["error"] for trial in failures)
    assert not {one.number for one in trained} & {trial.number for trial in failures}


def test_a_space_that_makes_no_run_any_more_ends_the_search(url: str) -> None:
    def sample_nothing(trial: BaseTrial) -> Run:
        raise ValueError(f"nothing at {trial.suggest_float('x', 0, 1)}")

    study = opened(url, question(Sampled("nothing", sample_nothing)))
    study.reconcile([], [])
    with pytest.raises(RuntimeError, match=f"{MAX_FAILED_DRAWS} draws from the space in a row cannot be trained"):
        study.next()


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_one_seed_gives_one_search_however_often_it_is_resumed(place: Path, sampler: Sampler) -> None:
    asked = question(sampler=sampler, seed=3)
    once = opened(f"sqlite:///{place / 'once.db'}", asked)
    once.reconcile([], [])
    trained = train_next(once, 16)
    again: list[Suggested] = []
    for number in range(16):
        study = opened(f"sqlite:///{place / 'often.db'}", asked)
        study.reconcile([done(one) for one in again], [])
        one = suggested(study)
        if number % 2:  # cut off after its first epoch
            study.heard(one.trial, 1, curve_of(one.run)[0].miou)
            study.close()
            study = opened(f"sqlite:///{place / 'often.db'}", asked)
            study.reconcile([*(done(earlier) for earlier in again), waiting(one, epochs=1)], [])
            assert suggested(study) == one
        train(study, one)
        again.append(one)
    assert again == trained


def test_another_seed_gives_another_search(place: Path) -> None:
    found = []
    for seed in (0, 1):
        study = opened(f"sqlite:///{place / str(seed)}.db", without_rows(sampler="random", seed=seed))
        study.reconcile([], [])
        found.append([one.params for one in train_next(study, 3)])
    assert all(first != second for first, second in zip(*found, strict=True))


def test_a_sampler_learns_what_pays(url: str) -> None:
    study = opened(url, without_rows())
    study.reconcile([], [])
    miou = [ended(one).best_miou or 0 for one in train_next(study, 40)]
    assert sum(miou[-15:]) / 15 > sum(miou[:15]) / 15 + 1


@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_every_sampler_searches_without_a_warning(url: str, sampler: Sampler, caplog: pytest.LogCaptureFixture) -> None:
    study = opened(url, question(sampler=sampler), limit=15)
    study.reconcile([], EARLIER)
    optuna.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        assert len(train_next(study, 15)) == 15
    optuna.logging.disable_propagation()
    assert [message for message in caplog.messages if "greenlet" not in message] == []


# --- what became of it ----------------------------------------------------------------------------------------------


def test_a_finished_trial_is_complete_with_its_best_miou_and_its_curve(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    one = suggested(study)
    worse_at_last = replace(ended(one), best_miou=49.0, last_miou=40.0)
    for epoch, miou in enumerate((30.0, 49.0, 40.0), start=1):
        study.heard(one.trial, epoch, miou)
    study.ended(worse_at_last)
    trial = trial_at(url, "a")
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 49.0)
    assert trial.intermediate_values == {1: 30.0, 2: 49.0, 3: 40.0}
    assert trial.user_attrs == {
        "trial": "a",
        "row": "a",
        "seed": 0,
        "status": "finished",
        "checkpoint": "/search/a/best.pt",
    }


@pytest.mark.parametrize("status", ["stopped", "diverged"])
def test_a_trial_that_ended_early_is_pruned_with_its_last_miou_and_its_curve(url: str, status: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    one = suggested(study)
    study.heard(one.trial, 1, 30.0)
    study.heard(one.trial, 2, 20.0)
    study.ended(replace(ended(one), status=status, stopped_by="so it is", epochs=2, best_miou=30.0, last_miou=20.0))  # type: ignore[arg-type]
    trial = trial_at(url, "a")
    assert (trial.state, trial.value, trial.intermediate_values) == (TrialState.PRUNED, 20.0, {1: 30.0, 2: 20.0})
    assert (trial.user_attrs["status"], trial.user_attrs["reason"]) == (status, "so it is")
    assert trial.user_attrs["checkpoint"] == "/search/a/best.pt"


def test_a_failed_trial_failed_and_says_why(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    one = suggested(study)
    study.ended(failed(one))
    trial = trial_at(url, "a")
    assert (trial.state, trial.values) == (TrialState.FAIL, None)
    assert (trial.user_attrs["status"], trial.user_attrs["reason"]) == ("failed", "no memory")
    assert "checkpoint" not in trial.user_attrs


def test_what_is_told_again_stands_as_it_is(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    one = suggested(study)
    study.heard(one.trial, 1, 28.0)
    study.heard(one.trial, 1, 28.0)
    train(study, one)
    before = trials_at(url)
    study.ended(ended(one))
    study.ended(failed(one))
    assert trials_at(url) == before


def test_a_drawn_trial_says_that_it_is_no_row(url: str) -> None:
    study = opened(url, without_rows())
    study.reconcile([], [])
    (one,) = train_next(study, 1)
    assert trial_at(url, one.trial).user_attrs.keys() == {"trial", "seed", "status", "checkpoint"}


BOTH: tuple[Objective, ...] = ("miou", "latency")


def test_two_goals_are_both_told(url: str) -> None:
    study = opened(url, question(objectives=BOTH))
    study.reconcile([], [])
    one = suggested(study)
    study.heard(one.trial, 1, 28.0)
    study.ended(replace(ended(one), latency_ms=12.5))
    kept = optuna.load_study(study_name="test", storage=url)
    assert kept.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    assert kept.metric_names == ["best mIoU in %", "ms per prediction"]
    assert kept.trials[0].values == [ended(one).best_miou, 12.5]
    assert kept.trials[0].params["input_scale"] == 1.0


@pytest.mark.parametrize("status", ["stopped", "diverged"])
def test_of_two_goals_a_trial_that_ended_early_reaches_neither_and_is_not_tried_again(url: str, status: str) -> None:
    study = opened(url, question(objectives=BOTH), limit=1)
    study.reconcile([], [])
    one = suggested(study)
    standing = replace(ended(one), status=status, epochs=1, last_miou=28.0, best_miou=28.0)  # type: ignore[arg-type]
    study.heard(one.trial, 1, 28.0)
    study.ended(standing)
    resumed = opened(url, question(objectives=BOTH), limit=1)
    record = Record(suggested=one, standing=standing, epochs=curve_of(one.run)[:1])
    assert resumed.reconcile([record], []) == {}
    assert resumed.next() is None
    states = [(name_of(trial), trial.state) for trial in trials_at(url)]
    assert states == [("a", TrialState.FAIL), ("b", TrialState.WAITING)]
    assert opened(url, question(objectives=BOTH)).reconcile([replace_standing(record)], []) == {"a": status}


def replace_standing(record: Record) -> Record:
    """As if the standings had been lost."""
    return waiting(record.suggested, epochs=len(record.epochs))


# --- what was known before ------------------------------------------------------------------------------------------


def test_trials_of_an_earlier_search_are_there_as_they_ended_and_are_not_tried_again(url: str) -> None:
    study = opened(url, limit=4)
    study.reconcile([], EARLIER)
    for one, trial in zip(EARLIER, trials_at(url), strict=False):
        finished = one.standing.status == "finished"
        assert trial.state is (TrialState.COMPLETE if finished else TrialState.PRUNED)
        assert trial.value == (one.standing.best_miou if finished else one.standing.last_miou)
        assert trial.intermediate_values == {epoch.epoch: epoch.miou for epoch in one.epochs}
        assert trial.params == one.suggested.params
        assert trial.user_attrs == {
            "trial": one.suggested.trial,
            "seed": 0,
            "status": one.standing.status,
            "source": one.source,
            "checkpoint": f"{one.source}/best.pt",
        }
    assert {one.standing.status for one in EARLIER} == {"finished", "stopped", "diverged"}
    trained = train_next(study, 4)
    assert [one.trial for one in trained[:2]] == ["a", "b"]
    assert trained[2].number is not None
    assert trained[2].number >= len(EARLIER) + 2
    assert study.next() is None, "they do not count for the limit"


def test_known_trials_enter_once_however_often_a_search_is_resumed(url: str) -> None:
    for _ in range(3):
        opened(url).reconcile([], EARLIER)
    assert [name_of(trial) for trial in trials_at(url)] == [*(one.suggested.trial for one in EARLIER), "a", "b"]


def test_a_row_that_is_known_is_not_trained_again(url: str) -> None:
    study = opened(url)
    study.reconcile([], [known_row()])
    assert suggested(study).trial == "b"
    assert suggested(study).origin == "sampled"
    assert trial_at(url, "a").user_attrs["row"] == "a"
    assert [name_of(trial) for trial in trials_at(url)].count("a") == 1


def known_row() -> Known:
    run, point = question().rows["a"]
    one = Suggested(
        trial="a-s1",
        run=run.model_copy(update={"seed": 1}),
        origin="row",
        number=None,
        params=point.params,
        distributions=point.ranges,
    )
    return Known(
        suggested=replace(one, trial="a"), standing=ended(one), epochs=tuple(curve_of(run)), source="/earlier/a-s1"
    )


# --- after a crash --------------------------------------------------------------------------------------------------


def test_what_was_cut_off_waits_and_is_the_next_with_the_same_values(url: str) -> None:
    study = opened(url, limit=4)
    study.reconcile([], [])
    *trained, cut_off = [*train_next(study, 2), suggested(study)]
    study.heard(cut_off.trial, 1, 25.0)
    study.close()
    assert trial_at(url, cut_off.trial).state is TrialState.WAITING
    resumed = opened(url, limit=4)
    resumed.reconcile([*(done(one) for one in trained), waiting(cut_off, epochs=1)], [])
    assert suggested(resumed) == cut_off
    assert trial_at(url, cut_off.trial).intermediate_values == {1: 25.0}


def test_what_a_killed_driver_left_running_waits_and_live_trials_run_on(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    first, second = suggested(study), suggested(study)
    study.reconcile([waiting(first), waiting(second)], [], live={first.trial})
    assert [trial.state for trial in trials_at(url)] == [TrialState.RUNNING, TrialState.WAITING]
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
    assert (first.state, first.value) == (TrialState.COMPLETE, ended(ended_since).best_miou)
    assert list(first.intermediate_values) == [1, 2, 3]
    assert (second.state, list(second.intermediate_values)) == (TrialState.WAITING, [1, 2])


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
    assert first.state is TrialState.FAIL
    assert (retried.state, retried.user_attrs["retry_of"]) == (TrialState.COMPLETE, first.number)


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
        if trial.state is not TrialState.FAIL
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


# --- the database ---------------------------------------------------------------------------------------------------


def test_a_database_knows_its_studies_by_name(url: str) -> None:
    assert not exists(open_storage(url), "test")
    opened(url)
    assert exists(open_storage(url), "test")
    assert not exists(open_storage(url), "tes")
