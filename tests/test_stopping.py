"""Early stopping in real Tune searches: who is stopped, who goes on, and what a second search inherits."""

import json
import pickle
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import pytest
import ray
from ray import tune
from ray.tune.experiment import Trial
from rows import plain_row

from tune_bisenet.config import Expect, Run
from tune_bisenet.rungs import MedianRule, Rungs, first_judged_epoch, no_rungs, rung_epochs, spared_rows
from tune_bisenet.search.tuner import StoppingScheduler, tune_trial_name

NUM_EPOCHS = 6  # one rung, after epoch 3
RUNGS_OF = partial(rung_epochs, iterations_per_epoch=100)


def row(name: str, expect: Expect | None = None) -> Run:
    return plain_row(name, warmup=100, expect=expect, num_epochs=NUM_EPOCHS)


class Curve(TypedDict, total=False):
    miou: float
    """The same after every epoch."""
    first_epoch: int
    """1 unless the trial resumes."""
    nan_from: int
    """The epoch from which on the loss is NaN."""


def reporter(curves: dict[str, Curve]) -> Callable[[dict[str, Any]], None]:
    """A trainable; a closure, because workers can't import this file."""

    def report(config: dict[str, Any]) -> None:
        curve = curves[config["run"]["name"]]
        for epoch in range(curve.get("first_epoch", 1), NUM_EPOCHS + 1):
            diverged = epoch >= curve.get("nan_from", NUM_EPOCHS + 1)
            tune.report({"epoch": epoch, "miou": curve["miou"], "diverged": diverged})

    return report


def row_name(trial: Trial) -> str:
    return str(trial.config["run"]["name"])


def last_epochs(
    scheduler: StoppingScheduler, runs: list[Run], curves: dict[str, Curve], storage: Path, **tune_config: Any
) -> dict[str, int]:
    """Search, one trial after the other in this order; the last epoch that each reported, 0 for none."""
    tuner = tune.Tuner(
        reporter(curves),
        param_space={"run": tune.grid_search([run.model_dump(mode="json") for run in runs])},
        tune_config=tune.TuneConfig(
            scheduler=scheduler,
            max_concurrent_trials=1,
            reuse_actors=True,
            trial_name_creator=row_name,
            trial_dirname_creator=row_name,
            **tune_config,
        ),
        run_config=tune.RunConfig(storage_path=str(storage), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    ended = [results[index] for index in range(len(results))]
    return {result.config["run"]["name"]: (result.metrics or {}).get("epoch", 0) for result in ended if result.config}


@pytest.fixture(scope="module")
def one_ray() -> Iterator[None]:
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_bad_rows_stop_at_the_rung_diverged_ones_at_once_and_the_baseline_goes_to_its_end(tmp_path: Path) -> None:
    runs = [row("r02"), row("r01"), row("r03"), row("r04", Expect(gain=(0.5, 0.5), over="r01")), row("r05")]
    curves: dict[str, Curve] = {
        "r02": {"miou": 50.0},
        "r01": {"miou": 10.0},
        "r03": {"miou": 20.0},
        "r04": {"miou": 60.0, "nan_from": 2},
        "r05": {"miou": 40.0},
    }
    scheduler = StoppingScheduler(Rungs(rungs_of=RUNGS_OF, min_others=1, spared=spared_rows(runs)))
    ended = last_epochs(scheduler, runs, curves, tmp_path)
    assert ended == {"r02": 6, "r01": 6, "r03": 3, "r04": 2, "r05": 6}
    assert scheduler.stops == {
        "r03": "mIoU 20.00 at epoch 3, below 30.00, the median of 2 others (ASHA)",
        "r04": "the loss was no longer a number at epoch 2",
    }


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_a_second_search_judges_by_what_the_first_has_seen(tmp_path: Path) -> None:
    first = StoppingScheduler(Rungs(rungs_of=RUNGS_OF, min_others=1))
    curves: dict[str, Curve] = {"r01": {"miou": 50.0}, "r02": {"miou": 40.0}}
    assert last_epochs(first, [row("r01"), row("r02")], curves, tmp_path) == {"r01": 6, "r02": 3}

    state = json.loads(json.dumps(first.state()))
    rungs = Rungs.from_json(state, rungs_of=RUNGS_OF, min_others=1)
    second = StoppingScheduler(rungs)
    runs = [row("r01"), row("r02"), row("r03"), row("r04"), row("r05")]
    curves = {
        "r01": {"miou": 30.0, "first_epoch": 3},  # repeats the rung, where it went on
        "r02": {"miou": 90.0, "first_epoch": 4},  # was stopped, but the driver died before it noted so
        "r03": {"miou": 99.0, "first_epoch": 4},  # resumes beyond the rung: not to be recorded there
        "r04": {"miou": 44.0},  # below 45, the median of 50 and 40
        "r05": {"miou": 45.0},  # above 44, the median of 50, 40 and 44
    }
    assert last_epochs(second, runs, curves, tmp_path) == {"r01": 6, "r02": 4, "r03": 6, "r04": 3, "r05": 6}
    assert rungs.seen == {(6, 3): {"r01": 50.0, "r02": 40.0, "r04": 44.0, "r05": 45.0}}
    assert second.stops["r02"] == first.stops["r02"]


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_a_trial_that_resumes_at_its_end_and_reports_nothing_harms_nobody(tmp_path: Path) -> None:
    curves: dict[str, Curve] = {"r01": {"first_epoch": NUM_EPOCHS + 1}, "r02": {"miou": 40.0}}
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    assert last_epochs(StoppingScheduler(rungs), [row("r01"), row("r02")], curves, tmp_path) == {"r01": 0, "r02": 6}
    assert rungs.seen == {(6, 3): {"r02": 40.0}}


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_without_rungs_every_row_goes_to_its_end_but_a_diverged_one(tmp_path: Path) -> None:
    scheduler = StoppingScheduler(Rungs(rungs_of=no_rungs))
    curves: dict[str, Curve] = {"r01": {"miou": 50.0}, "r02": {"miou": 1.0}, "r03": {"miou": 60.0, "nan_from": 4}}
    runs = [row("r01"), row("r02"), row("r03")]
    ended = last_epochs(scheduler, runs, curves, tmp_path, metric="miou", mode="max")
    assert ended == {"r01": 6, "r02": 6, "r03": 4}


@pytest.mark.ray
@pytest.mark.usefixtures("one_ray")
def test_another_judge_is_obeyed_as_well_and_hands_out_its_own_state(tmp_path: Path) -> None:
    judge = MedianRule(judged_from=partial(first_judged_epoch, iterations_per_epoch=100), min_others=1)
    curves: dict[str, Curve] = {"r01": {"miou": 50.0}, "r02": {"miou": 40.0}, "r03": {"miou": 60.0, "nan_from": 2}}
    scheduler = StoppingScheduler(judge)
    assert last_epochs(scheduler, [row("r01"), row("r02"), row("r03")], curves, tmp_path) == {
        "r01": 6,
        "r02": 3,
        "r03": 2,
    }
    assert scheduler.stops["r02"].startswith("best mIoU 40.00 until epoch 3, below 50.00")
    assert scheduler.state() == judge.to_json()


# --- without a cluster ------------------------------------------------------------------------------------------


def test_a_result_without_its_keys_is_a_broken_promise() -> None:
    scheduler = StoppingScheduler(Rungs(rungs_of=RUNGS_OF, min_others=1))
    trial = Trial("stub", config={"run": row("r01").model_dump()}, trial_name_creator=row_name, stub=True)
    with pytest.raises(AssertionError, match="trial r01 reported no diverged, miou"):
        scheduler.on_trial_result(None, trial, {"epoch": 3, "done": False})


def test_a_trial_goes_by_the_name_it_was_given_and_needs_one() -> None:
    named = Trial("stub", config={"run": {"name": "r01-s1"}}, trial_name_creator=row_name, stub=True)
    assert tune_trial_name(named) == str(named) == "r01-s1"
    with pytest.raises(AssertionError, match="trial_name_creator"):
        tune_trial_name(Trial("stub", stub=True))


@pytest.mark.parametrize(
    ("metric", "mode", "accepted"),
    [(None, None, True), ("miou", "max", True), ("loss", "max", False), ("miou", "min", False)],
)
def test_tune_may_name_the_same_metric_and_mode_but_no_other(
    metric: str | None, mode: str | None, accepted: bool
) -> None:
    scheduler = StoppingScheduler(Rungs(rungs_of=RUNGS_OF, min_others=1))
    assert scheduler.set_search_properties(metric, mode, anything="else") is accepted


def test_a_scheduler_can_be_pickled_as_tune_does_when_it_starts() -> None:
    scheduler = StoppingScheduler(Rungs(rungs_of=RUNGS_OF, min_others=1, stops={"r03": "slow"}))
    copied = pickle.loads(pickle.dumps(scheduler))
    assert copied.state() == scheduler.state()
    assert copied.debug_string() == "stopped early: 1"
