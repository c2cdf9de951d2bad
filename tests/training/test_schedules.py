"""The rate of every iteration, against numbers worked out apart from the code."""

import math
from itertools import pairwise

import pytest

from tune_bisenet.config import WarmupPoly
from tune_bisenet.training.optim import lr_at

TOTAL = 37_150  # 50 epochs of 743 iterations: Cityscapes at batch 4
TABLE = WarmupPoly(warmup_iterations=1100, power=0.9)


@pytest.mark.parametrize(
    ("base_lr", "iteration", "rate"),
    [
        (0.01, 0, 1e-6),
        (0.01, 1, 1.009e-5),
        (0.01, 550, 0.0050005),
        (0.01, 1099, 0.00999091),
        (0.01, 1100, 0.01),
        (0.01, 18_575, 0.0055058097),
        (0.01, 26_005, 0.0034766208),
        (0.01, 37_149, 7.921e-7),
        (0.015, 0, 1e-6),
        (0.015, 1, 1.46355e-5),
        (0.015, 550, 0.0075005),
        (0.015, 1099, 0.0149863645),
        (0.015, 1100, 0.015),
        (0.015, 18_575, 0.0082587146),
        (0.015, 26_005, 0.0052149312),
        (0.015, 37_149, 1.1882e-6),
        (0.001, 0, 1e-6),
        (0.001, 1, 1.9082e-6),
        (0.001, 550, 0.0005005),
        (0.001, 1099, 0.0009990918),
        (0.001, 1100, 0.001),
        (0.001, 18_575, 0.000550581),
        (0.001, 26_005, 0.0003476621),
        (0.001, 37_149, 7.92e-8),
    ],
)
def test_the_rates_are_those_of_the_oracle_table(base_lr: float, iteration: int, rate: float) -> None:
    found = lr_at(TABLE, base_lr, iteration, TOTAL)
    assert found == pytest.approx(rate, abs=1e-9, rel=0)
    assert found == pytest.approx(rate, rel=2e-4)  # 1e-9 alone says little of a rate of 8e-8


def test_the_two_parts_meet_at_the_base_rate() -> None:
    before, joint, after = (lr_at(TABLE, 0.01, iteration, TOTAL) for iteration in (1099, 1100, 1101))
    assert joint == 0.01
    assert joint - before == pytest.approx((0.01 - 1e-6) / 1100, rel=1e-6)
    assert joint - after == pytest.approx(0.01 * 0.9 / (TOTAL - 1100), rel=1e-4)


@pytest.mark.parametrize("warmup_iterations", [0, 1, 1100, 2500])
def test_the_rate_rises_over_the_warmup_and_falls_ever_after(warmup_iterations: int) -> None:
    schedule = WarmupPoly(warmup_iterations=warmup_iterations, power=0.9)
    rates = [lr_at(schedule, 0.01, iteration, TOTAL) for iteration in range(TOTAL + 1)]
    rising, falling = rates[: warmup_iterations + 1], rates[warmup_iterations:]
    assert all(left < right for left, right in pairwise(rising))
    assert all(left > right for left, right in pairwise(falling))
    assert max(rates) == 0.01


@pytest.mark.parametrize("iteration", [TOTAL, TOTAL + 1, 10 * TOTAL])
def test_past_its_end_the_rate_is_a_real_zero(iteration: int) -> None:
    rate = lr_at(TABLE, 0.01, iteration, TOTAL)
    assert isinstance(rate, float)
    assert rate == 0.0


def test_a_run_that_is_all_warmup_has_a_rate_everywhere() -> None:
    schedule = WarmupPoly(warmup_iterations=4, power=0.9)
    rates = [lr_at(schedule, 0.01, iteration, 4) for iteration in range(8)]
    assert all(math.isfinite(rate) and rate >= 0 for rate in rates)
    assert rates[4:] == [0.0] * 4


def test_the_power_bends_the_decay() -> None:
    straight = WarmupPoly(warmup_iterations=0, power=1.0)
    assert [lr_at(straight, 1.0, iteration, 4) for iteration in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    square = WarmupPoly(warmup_iterations=0, power=2.0)
    assert lr_at(square, 1.0, 2, 4) == 0.25


def test_the_first_rate_is_a_field_of_the_schedule() -> None:
    assert lr_at(WarmupPoly(warmup_iterations=10, power=0.9, start_lr=0.002), 0.01, 0, 100) == 0.002
