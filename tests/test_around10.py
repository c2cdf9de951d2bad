"""The space around the ten rows: each row is one point of it, and whatever is drawn from it can be trained."""

import itertools
from collections.abc import Iterator

import pytest

from search_spaces.around10 import SPACE, augment
from search_spaces.runs10 import SPACE as RUNS10
from tune_bisenet.config import OHEM, SGD, AdamW, Augment, CrossEntropy, Run, WeightedCrossEntropy
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs
from tune_bisenet.study import sampling
from tune_bisenet.study.sampling import Point

FULL = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))
STREETS = DataFacts(num_train=120, num_val=24, suggested_image_size=(96, 192))

SCALES = {
    "the table's own": (RowOverrides(), FULL),
    "a proxy of 8 epochs": (RowOverrides(max_epochs=8, proxy=True), STREETS),
    "a proxy of 2 epochs": (RowOverrides(num_epochs=2, proxy=True), STREETS),
    "another size and seed": (RowOverrides(seeds=(3,), image_size=(256, 512)), FULL),
}

ROWS = {row.name: row for row in RUNS10.runs}


def point_of(row: Run, settings: RowOverrides = SCALES["the table's own"][0], facts: DataFacts = FULL) -> Point:
    draw = sampling.draw_with(SPACE, settings, facts, ("miou",))
    return sampling.point_of(row, SPACE, draw, ("miou",))


def test_it_begins_with_the_ten_rows_and_no_others() -> None:
    assert SPACE.rows == RUNS10.runs
    assert SPACE.baseline == "r01"
    sampling.check_rows(SPACE)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("name", ROWS)
def test_the_point_of_a_row_draws_the_run_that_the_row_is(name: str, scale: str) -> None:
    settings, facts = SCALES[scale]
    (planned,) = resolve_runs([ROWS[name]], settings, facts)
    drawn = point_of(ROWS[name], settings, facts).run
    assert drawn.fingerprint() == planned.fingerprint()


def test_no_two_rows_are_the_same_point() -> None:
    points = [point_of(row) for row in RUNS10.runs]
    for one, other in itertools.combinations(points, 2):
        assert one.params != other.params
        assert one.run.fingerprint() != other.run.fingerprint()


@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_no_other_point(name: str) -> None:
    point = point_of(ROWS[name])
    draw = sampling.draw_with(SPACE, RowOverrides(), FULL, ("miou",))
    for param, value in neighbours(point):
        try:
            other = sampling.point_at(point.params | {param: value}, draw)
        except ValueError:  # another branch of the space, which needs other values
            continue
        assert other.run.fingerprint() != point.run.fingerprint(), param


def neighbours(point: Point) -> Iterator[tuple[str, float | int | bool | str]]:
    """Each parameter at its other choices, or at the ends of its range."""
    for param, distribution in point.distributions.items():
        values = getattr(distribution, "choices", None) or (distribution.low, distribution.high)  # type: ignore[attr-defined]
        yield from ((param, value) for value in values if value != point.params[param])


def test_the_plain_and_the_class_weighted_row_are_the_ends_of_one_axis() -> None:
    plain, weighted = point_of(ROWS["r01"]), point_of(ROWS["r10"])
    assert plain.params | {"class_weight_exponent": 1.0} == weighted.params
    assert plain.params["class_weight_exponent"] == 0.0
    assert isinstance(plain.run.loss, CrossEntropy)
    assert isinstance(weighted.run.loss, WeightedCrossEntropy)
    draw = sampling.draw_with(SPACE, RowOverrides(), FULL, ("miou",))
    between = sampling.point_at(plain.params | {"class_weight_exponent": 0.25}, draw).run.loss
    assert isinstance(between, WeightedCrossEntropy)
    assert between.exponent == 0.25


@pytest.mark.parametrize("scale", SCALES)
def test_whatever_is_drawn_can_be_trained(scale: str) -> None:
    settings, facts = SCALES[scale]
    draw = sampling.draw_with(SPACE, settings, facts, ("miou", "latency"))
    points = sampling.rehearse(draw, seed=1, draws=300)
    assert len(points) == 300
    assert len({point.run.fingerprint() for point in points}) == 300
    for point in points:
        assert Run.model_validate(point.run.model_dump()) == point.run
        assert sampling.point_at(point.params, draw).run == point.run


def test_its_draws_reach_every_branch() -> None:
    draw = sampling.draw_with(SPACE, RowOverrides(), FULL, ("miou",))
    runs = [point.run for point in sampling.rehearse(draw, seed=2, draws=300)]
    assert {type(run.optimizer) for run in runs} == {SGD, AdamW}
    assert {type(run.loss) for run in runs} == {WeightedCrossEntropy, OHEM}  # exactly 0 is not drawn by chance
    assert {run.accumulation for run in runs} == {1, 2, 4}
    for choices in (
        {run.loss.lovasz_after is None for run in runs},
        {run.max_grad_norm is None for run in runs},
        {run.decay_norms_and_biases for run in runs},
    ):
        assert choices == {False, True}


def test_augmentation_goes_from_none_over_that_of_the_rows_to_more() -> None:
    assert augment(0) == Augment(min_scale=1, max_scale=1, jitter=0)
    assert augment(1) == Augment()
    assert augment(1.5).max_scale > 2
    assert augment(1.5).min_scale < 0.75


def test_its_table_says_where_a_value_is_asked_for() -> None:
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in sampling.to_markdown(SPACE).splitlines()]
    table = {name: (values, where) for name, values, where in cells}
    assert table["parameter"] == ("range", "where")
    assert table["sgd_lr"] == ("0.001 to 0.1, log", "optimizer sgd")
    assert table["adamw_lr"] == ("0.0001 to 0.01, log", "optimizer adamw")
    assert table["lovasz_after"] == ("20 to 47", "switch_to_lovasz True")
    assert table["class_weight_exponent"] == ("0 to 1", "loss ce")
    assert table["ohem_threshold"] == ("0.5 to 0.9", "loss ohem")
    assert table["max_grad_norm"] == ("0.1 to 10, log", "clip_gradients True")
    assert table["accumulation"] == ("1, 2, 4", "always")
