"""From values to runs and back: what a space may get wrong is found before a search, and samplers repeat themselves."""

import logging
import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, get_args

import optuna
import pytest
from light_space import FACTS, NUM_EPOCHS, ROWS, SPACE, UNLUCKY, point, row, sample
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.samplers import BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import BaseTrial, FrozenTrial

from tune_bisenet.config import Objective, Run, Sampler, WarmupPoly
from tune_bisenet.records import Param
from tune_bisenet.spaces import Grid, LatencyRanges, RowOverrides, Sampled, SpaceError
from tune_bisenet.study import sampling
from tune_bisenet.study.sampling import Draw


def draw_of(space: Sampled, *, objectives: Sequence[Objective] = ("miou",), **settings: Any) -> Draw:
    return sampling.draw_with(space, RowOverrides(**settings), FACTS, objectives)


def kind_sample(trial: BaseTrial) -> Run:
    """Breaks in one of its branches."""
    if trial.suggest_categorical("kind", ["good", "bad"]) == "bad":
        return row("drawn", trial.suggest_float("bad_lr", -2.0, -1.0))
    return row("drawn", trial.suggest_float("good_lr", 0.01, 0.1))


# --- points ---------------------------------------------------------------------------------------------------------

VALUES: dict[str, Param] = {
    "lr": 0.02,
    "optimizer": "sgd",
    "momentum": 0.7,
    "aux_weight": 0.5,
    "accumulation": 2,
}


def test_values_make_a_point_with_their_ranges() -> None:
    found = sampling.point_at(VALUES, draw_of(SPACE))
    assert found.params == VALUES
    assert found.run.fingerprint() == sample(optuna.trial.FixedTrial(VALUES)).fingerprint()
    assert found.distributions["lr"] == FloatDistribution(1e-3, 1e-1, log=True)
    assert found.distributions["accumulation"] == CategoricalDistribution([1, 2, 4])
    assert found.ranges.keys() == VALUES.keys()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.5}, "lr"),
        ({"accumulation": 3}, "3"),
        ({"optimizer": "adamw"}, "no use for momentum"),
        ({"optimizer": "rmsprop"}, "rmsprop"),
        ({"dropout": 0.1}, "no use for dropout"),
        ({"aux_weight": UNLUCKY + 0.1}, "out of luck"),
    ],
)
def test_values_that_are_no_point_are_named(changes: dict[str, Param], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sampling.point_at(VALUES | changes, draw_of(SPACE))


@pytest.mark.parametrize("missing", VALUES)
def test_a_point_lacks_no_value(missing: str) -> None:
    with pytest.raises(ValueError, match=missing):
        sampling.point_at({name: value for name, value in VALUES.items() if name != missing}, draw_of(SPACE))


def test_a_search_draws_at_its_own_scale() -> None:
    drawn = sampling.point_at(VALUES, draw_of(SPACE, num_epochs=7, image_size=(64, 128))).run
    assert (drawn.num_epochs, drawn.image_size) == (7, (64, 128))
    assert NUM_EPOCHS != 7


def test_where_latency_is_a_goal_width_and_size_vary_too_and_rows_have_theirs() -> None:
    draw = draw_of(SPACE, objectives=("miou", "latency"), image_size=(96, 192))
    small = sampling.point_at(VALUES | {"head_width": 64, "input_scale": 0.5}, draw).run
    assert (small.head_width, small.image_size) == (64, (64, 96))
    declared = sampling.point_of(ROWS[0], SPACE, draw, ("miou", "latency"))
    assert (declared.run.head_width, declared.run.image_size) == (256, (96, 192))
    with pytest.raises(ValueError, match="head_width"):
        sampling.point_at(VALUES, draw)


def test_a_space_says_what_latency_varies() -> None:
    space = replace(SPACE, latency=LatencyRanges(head_widths=(32,), input_scales=(1.0,)))
    points = sampling.rehearse(draw_of(replace(space, sample=lucky), objectives=("miou", "latency")), seed=0, draws=5)
    assert {(one.run.head_width, one.run.image_size) for one in points} == {(32, (32, 64))}


def lucky(trial: BaseTrial) -> Run:
    return row("drawn", trial.suggest_float("lr", 0.01, 0.1))


@pytest.mark.parametrize(
    ("share", "size"), [(1.0, (96, 192)), (0.5, (64, 96)), (0.75, (64, 128)), (0.1, (32, 32)), (2.0, (192, 384))]
)
def test_a_scaled_size_is_one_that_bisenet_takes(share: float, size: tuple[int, int]) -> None:
    assert sampling.scaled((96, 192), share) == size


# --- before a search ------------------------------------------------------------------------------------------------


def test_rows_that_are_points_of_the_space_pass() -> None:
    sampling.check_rows(SPACE)


def test_a_point_that_draws_another_run_is_refused_with_what_differs() -> None:
    wrong = replace(SPACE, point=lambda run: point(run) | {"accumulation": 4})
    with pytest.raises(SpaceError) as refused:
        sampling.check_rows(wrong)
    assert str(refused.value).splitlines() == [
        f"the point of the row {name} draws another run: accumulation is 4 and should be 1." for name in ("a", "b")
    ]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"lr": 5.0}, "lr"), ({"accumulation": 3}, "3"), ({"surprise": 1}, "no use for surprise")],
)
def test_a_point_outside_the_space_is_refused(changes: dict[str, Param], words: str) -> None:
    wrong = replace(SPACE, point=lambda run: point(run) | changes)
    with pytest.raises(SpaceError, match=f"the row a is not a point of the space: .*{words}"):
        sampling.check_rows(wrong)


def test_a_point_that_lacks_a_value_is_refused() -> None:
    wrong = replace(SPACE, point=lambda run: {"lr": run.optimizer.lr})
    with pytest.raises(SpaceError, match=r"the row b is not a point of the space: .*optimizer"):
        sampling.check_rows(wrong)


def test_a_point_that_breaks_is_refused() -> None:
    def broken(run: Run) -> dict[str, Param]:
        raise KeyError(run.name)

    with pytest.raises(SpaceError, match="the row a is not a point of the space: 'a'"):
        sampling.check_rows(replace(SPACE, point=broken))


def test_a_row_outside_the_space_is_named() -> None:
    odd = row("odd", 0.02).model_copy(update={"schedule": WarmupPoly(warmup_iterations=1, power=2.0)})
    wrong = replace(SPACE, around=Grid("rows", (*ROWS, odd)))
    with pytest.raises(SpaceError, match="the row odd draws another run: schedule is"):
        sampling.check_rows(wrong)


def test_a_branch_that_breaks_is_found_with_the_values_that_lead_there() -> None:
    with pytest.raises(SpaceError) as refused:
        sampling.rehearse(draw_of(Sampled("broken", kind_sample)), seed=0)
    said = str(refused.value)
    assert "of 200 random draws from the space cannot be trained" in said
    assert 60 < int(said.split()[0]) < 140
    assert "With kind bad, bad_lr -1." in said
    assert said.endswith("Input should be greater than 0")


def test_a_run_that_does_not_fit_this_search_is_found() -> None:
    def sample_warmup(trial: BaseTrial) -> Run:
        schedule = WarmupPoly(warmup_iterations=trial.suggest_int("warmup", 1, 20), power=1)
        return row("drawn", 0.1).model_copy(update={"schedule": schedule})

    with pytest.raises(SpaceError, match=r"With warmup \d+: drawn: a warm-up of \d+ iterations does not fit into 6"):
        sampling.rehearse(draw_of(Sampled("warm-ups", sample_warmup)), seed=0)


def test_a_mistake_of_any_kind_in_a_space_is_told_as_one() -> None:
    def sample_typo(trial: BaseTrial) -> Run:
        return row("drawn", {"lr": trial.suggest_float("lr", 0.01, 0.1)}["rate"])

    with pytest.raises(SpaceError, match=r"200 of 200 random draws .* With lr 0.0.*: 'rate'"):
        sampling.rehearse(draw_of(Sampled("typo", sample_typo)), seed=0)


def test_rehearsals_of_one_seed_are_the_same() -> None:
    draw = draw_of(Sampled("lucky", lucky))
    first, second, other = (sampling.rehearse(draw, seed=seed, draws=5) for seed in (3, 3, 4))
    assert [one.params for one in first] == [one.params for one in second]
    assert [one.params for one in first] != [one.params for one in other]


# --- samplers -------------------------------------------------------------------------------------------------------


def value_of(trial: optuna.Trial) -> float:
    lr = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    if trial.suggest_categorical("optimizer", ["sgd", "adamw"]) == "sgd":
        lr *= 1 - trial.suggest_float("momentum", 0.5, 0.99)
    return lr * trial.suggest_int("accumulation", 1, 4)


def study_with(kind: Sampler, *, trials: int) -> optuna.Study:
    study = optuna.create_study(direction="maximize")
    for number in range(trials):
        study.sampler = sampling.build_sampler(kind, seed=number)
        trial = study.ask()
        study.tell(trial, value_of(trial))
    return study


@pytest.mark.parametrize("kind", get_args(Sampler))
def test_every_sampler_draws_and_draws_again_the_same_without_a_warning(
    kind: Sampler, caplog: pytest.LogCaptureFixture
) -> None:
    optuna.logging.enable_propagation()
    with caplog.at_level(logging.WARNING):
        first, second = (study_with(kind, trials=15) for _ in range(2))
    optuna.logging.disable_propagation()
    assert [trial.params for trial in first.trials] == [trial.params for trial in second.trials]
    assert len({str(trial.params) for trial in first.trials}) > 10
    assert [message for message in caplog.messages if "greenlet" not in message] == []


@pytest.mark.parametrize("kind", ["tpe", "random"])
@pytest.mark.parametrize("history", [0, 12])
@pytest.mark.parametrize("drawn", [1, 2, 3])
def test_a_trial_that_is_drawn_on_gets_the_values_that_it_would_have_had(
    kind: Sampler, history: int, drawn: int
) -> None:
    whole, cut_off = (study_with(kind, trials=history) for _ in range(2))
    for study in (whole, cut_off):
        study.sampler = sampling.build_sampler(kind, seed=99)
        study.ask()
    value_of(optuna.Trial(whole, whole.trials[-1]._trial_id))
    begun = optuna.Trial(cut_off, cut_off.trials[-1]._trial_id)
    for suggest in (
        lambda: begun.suggest_float("lr", 1e-3, 1e-1, log=True),
        lambda: begun.suggest_categorical("optimizer", ["sgd", "adamw"]),
        lambda: begun.suggest_int("accumulation", 1, 4),
    )[:drawn]:
        suggest()
    cut_off.sampler = sampling.build_sampler(kind, seed=99)  # as another process builds it
    value_of(optuna.Trial(cut_off, begun._trial_id))
    assert cut_off.trials[-1].params == whole.trials[-1].params


class Counting(InMemoryStorage):
    """Counts how often all trials are read."""

    reads = 0

    def get_all_trials(self, *arguments: Any, **named: Any) -> list[FrozenTrial]:
        self.reads += 1
        return super().get_all_trials(*arguments, **named)


def drawn_beside_others(sampler: BaseSampler) -> tuple[dict[str, Any], int]:
    """The values of a draw after 12 trials, while 3 others run, and how often it read all trials."""
    storage = Counting()
    study = optuna.create_study(storage=storage, direction="maximize")
    for number in range(15):
        study.sampler = sampling.build_sampler("random", seed=number)
        trial = study.ask()
        value = value_of(trial)
        if number < 12:
            study.tell(trial, value)
    study.sampler = sampler
    trial = study.ask()
    before = storage.reads
    value_of(trial)
    return trial.params, storage.reads - before


def test_a_draw_is_that_of_optunas_sampler_with_fewer_reads() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        optunas = optuna.samplers.TPESampler(multivariate=True, group=True, seed=99)
    values, reads = drawn_beside_others(sampling.build_sampler("tpe", seed=99))
    same_values, optunas_reads = drawn_beside_others(optunas)
    assert values == same_values
    assert reads == 2  # for the groups of parameters, and for all their values
    assert optunas_reads > reads


def test_values_of_one_draw_are_independent_of_each_other() -> None:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler())
    places = []
    for number in range(200):
        study.sampler = sampling.build_sampler("random", seed=number)
        trial = study.ask()
        places.append((trial.suggest_float("x", 0, 1), trial.suggest_float("y", 0, 1)))
    mean_x, mean_y = (sum(values) / 200 for values in zip(*places, strict=True))
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in places) / 200
    assert abs(mean_x - 0.5) < 0.08
    assert abs(mean_y - 0.5) < 0.08
    assert abs(covariance) < 0.02  # of equal values it were 1/12


def test_only_cmaes_cannot_search_for_two_goals() -> None:
    for kind in get_args(Sampler):
        assert not sampling.sampler_problems(kind, ("miou",))
        assert bool(sampling.sampler_problems(kind, ("miou", "latency"))) == (kind == "cmaes")
    (problem,) = sampling.sampler_problems("cmaes", ("miou", "latency"))
    assert problem == (
        "--sampler cmaes searches for one goal only. For miou, latency take one of tpe, gp, random, qmc."
    )
