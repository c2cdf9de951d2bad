"""A study: what it asks for, what it is told, and what it knows from before."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from light_search import close_connections, make_place
from light_space import ROWS, SPACE, curve_of, ended, question, sample
from optuna.study import StudyDirection
from optuna.trial import BaseTrial
from optuna.trial import TrialState as OptunaState
from studies import EARLIER, done, failed, opened, suggested, train, train_next, trial_at, trials_at, url_in, waiting

from tune_bisenet.config import Objective, Run, Sampler
from tune_bisenet.records import Known, TrialSpec
from tune_bisenet.spaces import Sampled
from tune_bisenet.study.study import MAX_FAILED_DRAWS, Question, Record, exists, open_storage
from tune_bisenet.study.translation import name_of

place = pytest.fixture(make_place)
url = pytest.fixture(url_in)
_closed = pytest.fixture(autouse=True)(close_connections)


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
    assert [trial.state for trial in trials_at(url)].count(OptunaState.WAITING) == 0


def test_every_trial_has_the_seed_of_the_search(url: str) -> None:
    study = opened(url, question(seed=5))
    study.reconcile([], [])
    assert {one.run.seed for one in train_next(study, 4)} == {5}
    assert {trial.user_attrs["seed"] for trial in trials_at(url) if trial.state is not OptunaState.FAIL} == {5}


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
    failures = [trial for trial in trials_at(url) if trial.state is OptunaState.FAIL]
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
    again: list[TrialSpec] = []
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


def test_a_sampler_learns_what_pays(place: Path) -> None:
    gains = []
    for seed in range(3):
        study = opened(f"sqlite:///{place / str(seed)}.db", without_rows(seed=seed))
        study.reconcile([], [])
        miou = [ended(one).best_miou or 0 for one in train_next(study, 40)]
        gains.append(sum(miou[-15:]) / 15 - sum(miou[:15]) / 15)
    assert sum(gains) / 3 > 1  # 5 are seen


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
    assert (trial.state, trial.value) == (OptunaState.COMPLETE, 49.0)
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
    assert (trial.state, trial.value, trial.intermediate_values) == (OptunaState.PRUNED, 20.0, {1: 30.0, 2: 20.0})
    assert (trial.user_attrs["status"], trial.user_attrs["reason"]) == (status, "so it is")
    assert trial.user_attrs["checkpoint"] == "/search/a/best.pt"


def test_a_failed_trial_failed_and_says_why(url: str) -> None:
    study = opened(url)
    study.reconcile([], [])
    one = suggested(study)
    study.ended(failed(one))
    trial = trial_at(url, "a")
    assert (trial.state, trial.values) == (OptunaState.FAIL, None)
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
    assert states == [("a", OptunaState.FAIL), ("b", OptunaState.WAITING)]
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
        assert trial.state is (OptunaState.COMPLETE if finished else OptunaState.PRUNED)
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
    one = TrialSpec(
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


# --- the database ---------------------------------------------------------------------------------------------------


def test_a_database_knows_its_studies_by_name(url: str) -> None:
    assert not exists(open_storage(url), "test")
    opened(url)
    assert exists(open_storage(url), "test")
    assert not exists(open_storage(url), "tes")
