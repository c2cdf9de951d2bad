"""A study: what it asks for, what it is told, and how it agrees with the folders after a crash."""

import logging
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from helpers.light_search import (
    ROWS,
    SPACE,
    close_connections,
    curve_of,
    database_at,
    earlier_trials,
    ended,
    make_place,
    record_of,
    row,
    sample,
    setup_of,
    stored_trials,
)
from helpers.rows import plain_epoch
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FrozenTrial
from optuna.trial import TrialState as OptunaState

from tune_bisenet import spaces
from tune_bisenet.config import Objective, Run, Sampler
from tune_bisenet.records import TrialRecord, TrialSpec, TrialState, measure
from tune_bisenet.spaces import Sampled, SpaceError
from tune_bisenet.storage import Storage
from tune_bisenet.study.study import MAX_FAILED_DRAWS, Study, StudySetup, name_in_search

EARLIER = earlier_trials(11)
BOTH: tuple[Objective, ...] = ("miou", "latency")

place = pytest.fixture(make_place)
_closed = pytest.fixture(autouse=True)(close_connections)


@pytest.fixture
def url(place: Path) -> str:
    return f"sqlite:///{place / 'study.db'}"


def open_study(
    url: str,
    setup: StudySetup | None = None,
    *,
    limit: int | None = None,
    records: Sequence[TrialRecord] = (),
    known: Sequence[TrialRecord] = (),
) -> Study:
    """Open the study as a new process does."""
    study = Study(replace(setup_in(url, setup or setup_of()), known=tuple(known)), "test", limit=limit)
    assert study.reconcile(records) == {}
    return study


def setup_in(url: str, setup: StudySetup) -> StudySetup:
    return replace(setup, database=database_at(url, Storage.at("/search")))


def trials_at(url: str) -> list[FrozenTrial]:
    return stored_trials("test", url)


def trial_at(url: str, name: str) -> FrozenTrial:
    """Return the last trial of that name."""
    return [trial for trial in trials_at(url) if name_in_search(trial) == name][-1]


def ask(study: Study) -> TrialSpec:
    spec = study.ask()
    assert spec is not None
    return spec


def train(study: Study, spec: TrialSpec) -> TrialSpec:
    for epoch in curve_of(spec.run):
        study.report(spec.trial, epoch.epoch, epoch.miou)
    study.tell(ended(spec))
    return spec


def train_next(study: Study, count: int) -> list[TrialSpec]:
    return [train(study, ask(study)) for _ in range(count)]


def test_the_rows_come_first_in_their_order_then_what_the_sampler_draws(url: str) -> None:
    study = open_study(url, setup_of(seed=5), limit=5)
    specs = train_next(study, 5)
    assert [(spec.trial, spec.run.name, spec.origin) for spec in specs[:2]] == [("a", "a", "row"), ("b", "b", "row")]
    assert [spec.run.fingerprint() for spec in specs[:2]] == [
        declared.model_copy(update={"seed": 5}).fingerprint() for declared in ROWS
    ]
    for spec in specs[2:]:
        assert spec.origin == "sampled"
        assert spec.trial == spec.run.name == f"t{spec.number:04d}"
        drawn = sample(optuna.trial.FixedTrial(spec.params)).model_copy(update={"seed": 5})
        assert spec.run.fingerprint() == drawn.fingerprint()
    assert study.ask() is None
    assert OptunaState.WAITING not in {trial.state for trial in trials_at(url)}
    assert {trial.user_attrs["seed"] for trial in trials_at(url)} == {5}


def test_a_draw_that_makes_no_run_fails_and_another_follows(url: str) -> None:
    specs = train_next(open_study(url, setup_of(sampler="random", seed=1)), 12)
    failures = [trial for trial in trials_at(url) if trial.state is OptunaState.FAIL]
    assert failures
    assert all("out of luck" in trial.user_attrs["error"] for trial in failures)
    assert not {spec.number for spec in specs} & {trial.number for trial in failures}


def test_a_space_that_makes_no_run_any_more_ends_the_search(url: str) -> None:
    def sample_nothing(trial: BaseTrial) -> Run:
        raise ValueError(f"nothing at {trial.suggest_float('x', 0, 1)}")

    study = open_study(url, setup_of(Sampled("nothing", sample_nothing)))
    with pytest.raises(SpaceError, match=f"{MAX_FAILED_DRAWS} draws .* because nothing at"):
        study.ask()


def loop() -> None:
    while True:
        time.sleep(0.01)


def leave() -> None:
    sys.exit(0)


def interrupt() -> None:
    raise KeyboardInterrupt


def miss() -> None:
    {}["missing"]


@pytest.mark.parametrize("fault", [loop, leave, interrupt, miss])
@pytest.mark.parametrize("is_cut_off", [False, True], ids=["new", "cut off"])
def test_a_space_whose_code_fails_in_a_search_is_told_at_once_and_the_mended_one_goes_on(
    url: str, monkeypatch: pytest.MonkeyPatch, fault: Callable[[], None], is_cut_off: bool
) -> None:
    monkeypatch.setattr(spaces, "MAX_SPACE_SECONDS", 0.5)
    is_broken = False

    def sample_or_fail(trial: BaseTrial) -> Run:
        if is_broken:
            fault()
        return row("drawn", trial.suggest_float("lr", 1e-3, 1e-1))

    study = open_study(url, setup_of(Sampled("breaks", sample_or_fail)))
    if is_cut_off:
        assert study.ask() is not None
        study.close()
    is_broken = True
    handler = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a driver: its signals raise no KeyboardInterrupt
    try:
        with pytest.raises(SpaceError, match="the space light cannot be used: "):
            study.ask()
    finally:
        signal.signal(signal.SIGINT, handler)
    is_broken = False
    study.close()
    specs = train_next(study, 3)
    assert [spec.number for spec in specs] == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("sampler", get_args(Sampler))
def test_a_search_draws_the_same_however_often_it_is_resumed(
    place: Path, sampler: Sampler, caplog: pytest.LogCaptureFixture
) -> None:
    setup = setup_of(sampler=sampler, seed=3)
    optuna.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        specs = train_next(open_study(f"sqlite:///{place / 'once.db'}", setup, known=EARLIER), 14)
    optuna.logging.disable_propagation()
    assert [message for message in caplog.messages if "greenlet" not in message] == []
    again: list[TrialSpec] = []
    for number in range(14):
        url = f"sqlite:///{place / 'often.db'}"
        study = open_study(url, setup, records=[record_of(spec) for spec in again], known=EARLIER)
        spec = ask(study)
        if number % 2:  # cut off after its first epoch
            study.report(spec.trial, 1, curve_of(spec.run)[0].miou)
            study.close()
            records = [*(record_of(earlier) for earlier in again), record_of(spec, epochs=1)]
            study = open_study(url, setup, records=records, known=EARLIER)
            assert ask(study) == spec
        again.append(train(study, spec))
    assert again == specs
    assert len({str(spec.params) for spec in specs}) >= 8, "a sampler may come back to its best"


@pytest.mark.slow
def test_a_sampler_learns_what_pays(place: Path) -> None:
    gains = []
    for seed in range(3):
        setup = setup_of(replace(SPACE, around=None, point=None), seed=seed)
        study = open_study(f"sqlite:///{place / str(seed)}.db", setup)
        miou = [ended(spec).best_miou or 0 for spec in train_next(study, 40)]
        gains.append(sum(miou[-15:]) / 15 - sum(miou[:15]) / 15)
    assert sum(gains) / 3 > 1  # 5 are seen


def test_a_finished_trial_is_complete_with_its_best_miou_and_its_curve(url: str) -> None:
    study = open_study(url)
    spec = ask(study)
    for epoch, miou in enumerate((30.0, 49.0, 40.0), start=1):
        study.report(spec.trial, epoch, miou)
    study.tell(replace(ended(spec), best_miou=49.0, last_miou=40.0))
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


@pytest.mark.parametrize("status", ["stopped", "diverged", "failed"])
def test_a_trial_that_ended_early_is_pruned_with_its_last_miou_and_one_that_failed_fails(url: str, status: Any) -> None:
    study = open_study(url)
    spec = ask(study)
    study.report(spec.trial, 1, 30.0)
    study.report(spec.trial, 2, 20.0)
    study.tell(replace(ended(spec), status=status, stopped_by="a rule", epochs=2, best_miou=30.0, last_miou=20.0))
    trial = trial_at(url, "a")
    expected = (OptunaState.FAIL, None) if status == "failed" else (OptunaState.PRUNED, 20.0)
    assert (trial.state, trial.value) == expected
    assert trial.intermediate_values == {1: 30.0, 2: 20.0}
    assert (trial.user_attrs["status"], trial.user_attrs["reason"]) == (status, "a rule")
    assert trial.user_attrs["checkpoint"] == "/search/a/best.pt"


@pytest.mark.parametrize("before", [[], [30.0]])
def test_a_diverged_epoch_is_told_as_no_number_and_is_no_value(url: str, before: list[float]) -> None:
    study = open_study(url)
    spec = ask(study)
    history = [*(plain_epoch(1, miou) for miou in before), plain_epoch(len(before) + 1, 99.0, loss=math.nan)]
    for epoch in history:
        study.report(spec.trial, epoch.epoch, epoch.miou)
    diverged = TrialState.of_run(spec.trial, spec.run, status="diverged", **measure(history))
    study.tell(diverged)
    trial = trial_at(url, "a")
    assert (trial.state, trial.value) == (OptunaState.PRUNED, None)
    assert trial.intermediate_values == {epoch.epoch: epoch.miou for epoch in history}
    (lost,) = study.ended_without(())
    assert (lost.state.epochs, lost.state.best_miou) == (len(history), before[0] if before else None)
    assert lost.state.last_miou is None
    assert study.ask()


def failed(spec: TrialSpec) -> TrialRecord:
    return record_of(spec, epochs=0, status="failed", error="no memory")


def test_telling_again_changes_nothing(url: str) -> None:
    study = open_study(url)
    spec = ask(study)
    study.report(spec.trial, 1, 28.0)
    study.report(spec.trial, 1, 28.0)
    train(study, spec)
    before = trials_at(url)
    study.tell(ended(spec))
    study.tell(failed(spec).state)
    assert trials_at(url) == before


def test_two_objectives_are_both_told(url: str) -> None:
    study = open_study(url, setup_of(objectives=BOTH))
    spec = ask(study)
    study.report(spec.trial, 1, 28.0)
    study.tell(replace(ended(spec), latency_ms=12.5))
    stored = optuna.load_study(study_name="test", storage=url)
    assert stored.directions == [StudyDirection.MAXIMIZE, StudyDirection.MINIMIZE]
    assert stored.metric_names == ["best mIoU in %", "ms per prediction"]
    assert stored.trials[0].values == [ended(spec).best_miou, 12.5]
    assert stored.trials[0].params["input_scale"] == 1.0


@pytest.mark.parametrize("status", ["stopped", "diverged"])
def test_with_two_objectives_a_trial_that_ended_early_fails_and_is_not_tried_again(url: str, status: Any) -> None:
    setup = setup_of(objectives=BOTH)
    study = open_study(url, setup, limit=1)
    spec = ask(study)
    record = record_of(spec, epochs=1, status=status)
    study.report(spec.trial, 1, 28.0)
    study.tell(record.state)
    assert open_study(url, setup, limit=1, records=[record]).ask() is None
    states = [(name_in_search(trial), trial.state) for trial in trials_at(url)]
    assert states == [("a", OptunaState.FAIL), ("b", OptunaState.WAITING)]
    lost = Study(setup_in(url, setup), "test", limit=None)
    assert lost.reconcile([record_of(spec, epochs=1)]) == {"a": status}


def test_trials_of_an_earlier_search_are_in_the_study_as_they_ended(url: str) -> None:
    for _ in range(3):
        study = open_study(url, limit=4, known=EARLIER)
    assert len(trials_at(url)) == len(EARLIER) + 2
    for known, trial in zip(EARLIER, trials_at(url), strict=False):
        finished = known.state.status == "finished"
        assert trial.state is (OptunaState.COMPLETE if finished else OptunaState.PRUNED)
        assert trial.value == (known.state.best_miou if finished else known.state.last_miou)
        assert trial.intermediate_values == {epoch.epoch: epoch.miou for epoch in known.epochs}
        assert trial.params == known.spec.params
        assert trial.user_attrs == {
            "trial": known.spec.trial,
            "seed": 0,
            "status": known.state.status,
            "source": known.source,
            "checkpoint": f"{known.source}/best.pt",
        }
    assert {known.state.status for known in EARLIER} == {"finished", "stopped", "diverged"}
    specs = train_next(study, 4)
    assert [spec.trial for spec in specs[:2]] == ["a", "b"]
    assert (specs[2].number or 0) >= len(EARLIER) + 2
    assert study.ask() is None, "they do not count for the limit"


def test_a_row_that_is_known_is_not_trained_again(url: str) -> None:
    declared = setup_of().rows["a"]
    spec = replace(declared, run=declared.run.model_copy(update={"seed": 1})).spec("a", origin="row")
    study = open_study(url, known=[record_of(spec, source="/earlier/a")])
    assert ask(study).trial == "b"
    assert ask(study).origin == "sampled"
    assert [name_in_search(trial) for trial in trials_at(url)].count("a") == 1


def test_a_trial_that_was_cut_off_waits_and_is_the_next_with_the_same_parameters(url: str) -> None:
    study = open_study(url, limit=4)
    *trained, cut_off = [*train_next(study, 2), ask(study)]
    study.report(cut_off.trial, 1, 25.0)
    study.close()
    assert trial_at(url, cut_off.trial).state is OptunaState.WAITING
    record = record_of(cut_off, epochs=1)
    records = [*(record_of(spec) for spec in trained), record]
    assert ask(open_study(url, limit=4, records=records)) == cut_off
    assert trial_at(url, cut_off.trial).intermediate_values == {1: record.epochs[0].miou}, "its folder decides"


def test_what_a_killed_driver_left_running_waits_and_live_trials_run_on(url: str) -> None:
    study = open_study(url)
    first, second = ask(study), ask(study)
    study.reconcile([record_of(first, 0), record_of(second, 0)], live={first.trial})
    assert [trial.state for trial in trials_at(url)] == [OptunaState.RUNNING, OptunaState.WAITING]
    assert ask(study) == second


def test_a_study_behind_its_folders_is_told_what_they_have(url: str) -> None:
    study = open_study(url)
    ended_since, further_since = ask(study), ask(study)
    study.report(ended_since.trial, 1, curve_of(ended_since.run)[0].miou)
    open_study(url, records=[record_of(ended_since), record_of(further_since, epochs=2)])
    first, second = trials_at(url)
    assert (first.state, first.value) == (OptunaState.COMPLETE, ended(ended_since).best_miou)
    assert list(first.intermediate_values) == [1, 2, 3]
    assert (second.state, list(second.intermediate_values)) == (OptunaState.WAITING, [1, 2])


@pytest.mark.parametrize("lr", [0.01, 0.002, 0.09])
def test_a_study_ahead_of_its_folders_returns_how_trials_ended(url: str, lr: float) -> None:
    setup = setup_of(Sampled("one", lambda trial: row("drawn", trial.suggest_float("lr", lr, lr))))
    study = open_study(url, setup, limit=1)
    (spec,) = train_next(study, 1)
    before = trials_at(url)
    assert study.reconcile([record_of(spec, epochs=1)]) == {spec.trial: ended(spec).status}
    assert trials_at(url) == before
    assert study.ask() is None


def test_a_failed_trial_that_waits_again_is_a_new_trial_with_the_same_parameters(url: str) -> None:
    study = open_study(url, limit=1)
    spec = ask(study)
    study.report(spec.trial, 1, 28.0)
    study.tell(failed(spec).state)
    assert open_study(url, limit=1, records=[failed(spec)]).ask() is None, "it stays failed"
    for _ in range(3):  # as often as a driver may be killed before it continues
        resumed = open_study(url, limit=1, records=[record_of(spec, epochs=1)])
    again = train(resumed, ask(resumed))
    assert (again.trial, again.run, again.params) == (spec.trial, spec.run, spec.params)
    assert resumed.ask() is None
    first, retried = (trial for trial in trials_at(url) if name_in_search(trial) == "a")
    assert first.state is OptunaState.FAIL
    assert (retried.state, retried.user_attrs["retry_of"]) == (OptunaState.COMPLETE, first.number)


def test_in_a_rebuilt_study_no_name_is_given_twice(url: str, place: Path) -> None:
    setup = setup_of(sampler="random", seed=1)
    trained = train_next(open_study(url, setup), 9)
    assert max(spec.number or 0 for spec in trained) > 8, "there was a draw that made no run"
    (place / "study.db").unlink()
    more = train_next(open_study(url, setup, records=[record_of(spec) for spec in trained]), 3)
    assert not {spec.trial for spec in more} & {spec.trial for spec in trained}
    assert train_next(open_study(f"sqlite:///{place / 'other.db'}", setup), 12) == [*trained, *more]


def bowl(trial: BaseTrial) -> Run:
    """Return a run of two numbers alone, all that CMA-ES draws, whose mIoU is highest near lr 0.05 and momentum 0.9."""
    return row(
        "drawn", trial.suggest_float("lr", 1e-3, 1e-1, log=True), momentum=trial.suggest_float("momentum", 0.5, 0.99)
    )


def test_cmaes_whose_state_was_lost_starts_again_around_the_best_trials_and_says_so(
    url: str, place: Path, caplog: pytest.LogCaptureFixture
) -> None:
    setup = setup_of(Sampled("bowl", bowl), sampler="cmaes")
    trained = train_next(open_study(url, setup), 30)
    assert "CMA-ES" not in caplog.text
    (place / "study.db").unlink()
    study = open_study(url, setup, records=[record_of(spec) for spec in trained])
    assert "CMA-ES has lost its state with the study" in caplog.text
    caplog.clear()
    more = train_next(study, 20)
    best = max(trained, key=lambda spec: ended(spec).best_miou or 0).params
    first = [distance(spec.params, best) for spec in more[:6]]
    assert sum(first) / 6 < 0.75 * sum(distance(spec.params, best) for spec in trained[:6]) / 6
    states = [trial.system_attrs for trial in trials_at(url)]
    generations = [attributes["cma:generation"] for attributes in states if attributes]
    assert generations[0] == 0
    assert generations[-1] >= 2, "it learns from the new ones"
    open_study(url, setup, records=[record_of(spec) for spec in [*trained, *more]])
    assert not caplog.text


def distance(params: Mapping[str, Any], best: Mapping[str, Any]) -> float:
    """Return how far apart two points are, in shares of their ranges."""
    return math.hypot(math.log10(params["lr"] / best["lr"]) / 2, (params["momentum"] - best["momentum"]) / 0.49)
