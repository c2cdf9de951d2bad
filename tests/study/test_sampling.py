"""From parameters to runs and back; what a space may get wrong is found before a search."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import optuna
import pytest
from helpers.light_search import ROWS, SPACE, UNLUCKY, point, row, sample, search_space
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.exceptions import StorageInternalError
from optuna.trial import BaseTrial

from tune_bisenet.config import Param, Run, Sampler
from tune_bisenet.options import InputError
from tune_bisenet.spaces import Sampled
from tune_bisenet.study import sampling

PARAMS: dict[str, Param] = {"lr": 0.02, "optimizer": "sgd", "momentum": 0.7, "aux_weight": 0.5, "accumulation": 2}


def test_parameters_make_a_run_with_their_distributions() -> None:
    sampled = sampling.sample_at(PARAMS, search_space().sample_run)
    assert sampled.params == PARAMS
    assert sampled.run.fingerprint() == sample(optuna.trial.FixedTrial(PARAMS)).fingerprint()
    assert sampled.distributions["lr"] == FloatDistribution(1e-3, 1e-1, log=True)
    assert sampled.distributions["accumulation"] == CategoricalDistribution([1, 2, 4])
    assert sampled.spec("t0001", origin="sampled").distributions.keys() == PARAMS.keys()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"lr": 0.5}, "lr"),
        ({"accumulation": 3}, "3"),
        ({"optimizer": "adamw"}, "momentum"),
        ({"aux_weight": UNLUCKY + 0.1}, "out of luck"),
    ],
)
def test_parameters_that_are_no_point_of_the_space_are_named(changes: dict[str, Param], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        sampling.sample_at(PARAMS | changes, search_space().sample_run)


def test_with_latency_as_an_objective_width_and_size_vary_too() -> None:
    space = search_space(objectives=("miou", "latency"), image_size=(96, 192))
    small = sampling.sample_at(PARAMS | {"head_width": 64, "input_scale": 0.5}, space.sample_run).run
    assert (small.head_width, small.image_size) == (64, (64, 96))
    declared = space.sample_row(ROWS[0])
    assert (declared.run.head_width, declared.run.image_size) == (256, (96, 192))
    with pytest.raises(ValueError, match="head_width"):
        sampling.sample_at(PARAMS, space.sample_run)


def test_a_space_says_which_widths_and_scales_are_tried() -> None:
    def sample_rate(trial: BaseTrial) -> Run:
        return row("drawn", trial.suggest_float("lr", 0.01, 0.1))

    rates = Sampled("rates", sample_rate, head_widths=(32,), input_scales=(1.0,))
    space = search_space(rates, objectives=("miou", "latency"))
    runs = [draw.run for draw in space.test_draws(seed=0, count=5)]
    assert {(run.head_width, run.image_size) for run in runs} == {(32, (32, 64))}


@pytest.mark.parametrize(
    ("scale", "size"), [(1.0, (96, 192)), (0.5, (64, 96)), (0.75, (64, 128)), (0.1, (32, 32)), (2.0, (192, 384))]
)
def test_a_scaled_size_is_one_that_bisenet_takes(scale: float, size: tuple[int, int]) -> None:
    assert sampling.scale_size((96, 192), scale) == size


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda run: point(run) | {"accumulation": 4}, "a draws another run: accumulation is 4 and should be 1"),
        (lambda run: point(run) | {"lr": 5.0}, "row a .*lr"),
        (lambda run: point(run) | {"surprise": 1}, "row a .*surprise"),
        (lambda run: {"lr": run.optimizer.lr}, "row b .*optimizer"),
        (lambda run: {}[run.name], "row a .*'a'"),
    ],
)
def test_a_row_whose_point_is_wrong_is_named(wrong: Callable[[Run], dict[str, Param]], words: str) -> None:
    sampling.check_rows(SPACE)
    with pytest.raises(InputError, match=words):
        sampling.check_rows(replace(SPACE, point=wrong))


def test_a_branch_that_fails_is_found_with_the_parameters_that_lead_there() -> None:
    def sample_kind(trial: BaseTrial) -> Run:
        bad = trial.suggest_categorical("kind", ["good", "bad"]) == "bad"
        return row("drawn", trial.suggest_float("bad_lr", -2.0, -1.0) if bad else trial.suggest_float("lr", 0.01, 0.1))

    with pytest.raises(InputError) as refused:
        search_space(Sampled("broken", sample_kind)).test_draws(seed=0)
    said = str(refused.value)
    assert 60 < int(said.split()[0]) < 140
    assert "With kind bad, bad_lr -1." in said
    assert said.endswith("must be greater than 0")


def test_any_error_of_a_space_is_the_users_mistake() -> None:
    def sample_typo(trial: BaseTrial) -> Run:
        return row("drawn", {"lr": trial.suggest_float("lr", 0.01, 0.1)}["rate"])

    with pytest.raises(InputError, match=r"200 of 200 .* With lr 0.0.*: its code raises KeyError: 'rate'"):
        search_space(Sampled("typo", sample_typo)).test_draws(seed=0)


def test_only_cmaes_cannot_search_for_two_objectives() -> None:
    for sampler in get_args(Sampler):
        assert not sampling.sampler_problems(sampler, ("miou",))
        assert bool(sampling.sampler_problems(sampler, ("miou", "latency"))) == (sampler == "cmaes")


# --- CMA-ES, whose state Optuna keeps as a pickle ---------------------------------------------------------------------


def cmaes_study(*, num_trials: int) -> optuna.Study:
    study = optuna.create_study(sampler=sampling.build_sampler("cmaes", seed=0))
    study.optimize(lambda trial: trial.suggest_float("x", -1, 1) ** 2 + trial.suggest_float("y", -1, 1), num_trials)
    return study


def test_cmaes_continues_from_its_state_as_optunas_own_does() -> None:
    study = cmaes_study(num_trials=20)
    last = max(trial.system_attrs.get("cma:generation", 0) for trial in study.trials)
    assert last > 1
    trials = [trial for trial in study.trials if trial.system_attrs]
    own = optuna.samplers.CmaEsSampler(seed=0)._restore_optimizer(trials)
    ours = sampling.PlainCmaEsSampler(seed=0)._restore_optimizer(trials)
    assert own is not None
    assert pickle.dumps(ours) == pickle.dumps(own)


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


def test_code_in_a_database_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "the code ran"
    hostile = pickle.dumps(Exploit(trace)).hex()
    study = cmaes_study(num_trials=8)
    ranges = {"x": FloatDistribution(-1, 1), "y": FloatDistribution(-1, 1)}
    study._storage.set_trial_system_attr(study.ask(ranges)._trial_id, "cma:optimizer:0", hostile)
    study.tell(8, 0.0)
    optuna.samplers.CmaEsSampler(seed=0)._restore_optimizer(study.trials)
    assert trace.exists(), "the exploit works"
    trace.unlink()
    with pytest.raises(StorageInternalError, match=r"trial 8 .*pathlib\.Path"):
        study.ask(ranges)
    assert not trace.exists()
