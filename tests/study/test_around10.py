"""The space around the ten rows: each row is one point of it, and every run it draws can be trained."""

from collections.abc import Iterator

import pytest

from search_spaces.around10 import SPACE, augment
from search_spaces.runs10 import SPACE as RUNS10
from tune_bisenet.config import OHEM, SGD, AdamW, Augment, CrossEntropy, Objective, Run, WeightedCrossEntropy
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs
from tune_bisenet.study import sampling
from tune_bisenet.study.sampling import SampledRun, SearchSpace

FULL = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))
STREETS = DataFacts(num_train=120, num_val=24, suggested_image_size=(96, 192))

SCALES = {
    "the table's own": (RowOverrides(), FULL),
    "a proxy of 8 epochs": (RowOverrides(max_epochs=8, proxy=True), STREETS),
    "a proxy of 2 epochs": (RowOverrides(num_epochs=2, proxy=True), STREETS),
    "another size and seed": (RowOverrides(seeds=(3,), image_size=(256, 512)), FULL),
}

ROWS = {row.name: row for row in RUNS10.runs}


def space_at(scale: str = "the table's own", objectives: tuple[Objective, ...] = ("miou",)) -> SearchSpace:
    settings, facts = SCALES[scale]
    return SearchSpace(name="around10", space=SPACE, settings=settings, facts=facts, objectives=objectives)


def test_it_begins_with_the_ten_rows_and_no_others() -> None:
    assert SPACE.rows == RUNS10.runs
    assert SPACE.baseline == "r01"
    sampling.check_rows(SPACE)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ROWS)
def test_the_point_of_a_row_draws_the_run_that_the_row_is(name: str, scale: str) -> None:
    (resolved,) = resolve_runs([ROWS[name]], *SCALES[scale])
    assert space_at(scale).sample_row(ROWS[name]).run.fingerprint() == resolved.fingerprint()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_no_other_point(name: str) -> None:
    point = space_at().sample_row(ROWS[name])
    for param, value in neighbours(point):
        try:
            other = sampling.sample_at(point.params | {param: value}, space_at().sample_run)
        except ValueError:  # another branch of the space, which needs other parameters
            continue
        assert other.run.fingerprint() != point.run.fingerprint(), param


def neighbours(point: SampledRun) -> Iterator[tuple[str, float | int | bool | str]]:
    """Yield each parameter at its other choices, or at the ends of its range."""
    for param, distribution in point.distributions.items():
        values = getattr(distribution, "choices", None) or (distribution.low, distribution.high)  # type: ignore[attr-defined]
        yield from ((param, value) for value in values if value != point.params[param])


def test_the_plain_and_the_class_weighted_row_are_the_ends_of_one_axis() -> None:
    plain, weighted = (space_at().sample_row(ROWS[name]) for name in ("r01", "r10"))
    assert plain.params | {"class_weight_exponent": 1.0} == weighted.params
    assert plain.params["class_weight_exponent"] == 0.0
    assert isinstance(plain.run.loss, CrossEntropy)
    assert isinstance(weighted.run.loss, WeightedCrossEntropy)
    between = sampling.sample_at(plain.params | {"class_weight_exponent": 0.25}, space_at().sample_run).run.loss
    assert isinstance(between, WeightedCrossEntropy)
    assert between.exponent == 0.25


@pytest.mark.parametrize("scale", SCALES)
def test_every_draw_can_be_trained(scale: str) -> None:
    space = space_at(scale, ("miou", "latency"))
    draws = space.test_draws(seed=1, count=300)
    assert len({draw.run.fingerprint() for draw in draws}) == 300
    for draw in draws:
        assert Run.model_validate(draw.run.model_dump()) == draw.run
        assert sampling.sample_at(draw.params, space.sample_run).run == draw.run


def test_its_draws_reach_every_branch() -> None:
    runs = [draw.run for draw in space_at().test_draws(seed=2, count=300)]
    assert {type(run.optimizer) for run in runs} == {SGD, AdamW}
    assert {type(run.loss) for run in runs} == {WeightedCrossEntropy, OHEM}  # exactly 0 is not drawn by chance
    assert {run.accumulation for run in runs} == {1, 2, 4}
    for choices in (
        {run.loss.lovasz_after is None for run in runs},
        {run.max_grad_norm is None for run in runs},
        {run.decay_norms_and_biases for run in runs},
    ):
        assert choices == {False, True}


def test_augmentation_ranges_from_none_over_that_of_the_rows_to_more() -> None:
    assert augment(0) == Augment(min_scale=1, max_scale=1, jitter=0)
    assert augment(1) == Augment()
    assert augment(1.5).max_scale > 2
    assert augment(1.5).min_scale < 0.75


def test_its_table_says_where_a_parameter_is_used() -> None:
    lines = sampling.parameters_to_markdown(SPACE).splitlines()
    table = {cells[0]: cells[1:] for cells in ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)}
    assert table["parameter"] == ["range", "where"]
    assert table["sgd_lr"] == ["0.001 to 0.1, log", "optimizer sgd"]
    assert table["lovasz_after"] == ["20 to 47", "switch_to_lovasz True"]
    assert table["class_weight_exponent"] == ["0 to 1", "loss ce"]
    assert table["accumulation"] == ["1, 2, 4", "always"]
