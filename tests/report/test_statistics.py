"""Statistics against scipy's and statsmodels' own, against brute force, and by hand."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import special, stats
from statsmodels.stats.power import TTestPower

from tune_bisenet.report.statistics import (
    compare_rows,
    dunnett,
    estimate_levels,
    fit_noise,
    image_interval,
    seeds_for_power,
    strictness,
    student_interval,
)


def test_students_interval_by_hand() -> None:
    # 1, 2, 3: mean 2, error 1 / sqrt(3) = 0.57735; t(0.975, 2 df) = 4.30265, so 2 -+ 2.48414.
    values = np.array([1.0, 2.0, 3.0])
    assert student_interval(values, error=0.05, family=1, least_sd=0) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    # Of two claims each has half the error: t(0.9875, 2 df) = 6.20535.
    assert student_interval(values, error=0.05, family=2, least_sd=0) == pytest.approx((-1.58266, 5.58266), abs=1e-4)
    assert np.isnan(student_interval(values[:1], error=0.05, family=1, least_sd=0)).all()


def test_equal_whole_numbers_keep_the_spread_of_rounding() -> None:
    # 5, 5, 5 with a least sd of 0.6: error 0.6 / sqrt(3) = 0.34641, times 4.30265 = 1.49048.
    equal = np.array([5.0, 5.0, 5.0])
    assert student_interval(equal, error=0.05, family=1, least_sd=0.6) == pytest.approx((3.50952, 6.49048))


@pytest.mark.parametrize(
    ("family", "freedom", "error", "critical"),
    # Dunnett's (1955, 1964) tables, two-sided, equal sizes.
    [(1, 10, 0.05, 2.23), (2, 10, 0.05, 2.57), (9, 20, 0.05, 2.95)],
)
def test_dunnetts_quantile_agrees_with_his_tables(family: int, freedom: int, error: float, critical: float) -> None:
    assert dunnett(family, freedom, error, 0.5) == pytest.approx(critical, abs=0.012)


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.5])
@pytest.mark.parametrize(("family", "freedom", "error"), [(6, 18, 0.025), (6, 9, 0.001), (3, 4, 0.05)])
def test_dunnetts_quantile_agrees_with_scipys_multivariate_t(
    family: int, freedom: int, error: float, correlation: float
) -> None:
    shape = np.full((family, family), correlation) + (1 - correlation) * np.eye(family)
    critical = dunnett(family, freedom, error, correlation)
    found = stats.multivariate_t(shape=shape, df=freedom, seed=1).cdf(
        np.full(family, critical), lower_limit=np.full(family, -critical), maxpts=200_000
    )
    assert 1 - found == pytest.approx(error, rel=0.02)


def test_a_table_of_two_rows_is_the_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(56, 1, (1, 2, 6)) + rng.normal(0, 3, (1, 1, 6))
    noise = fit_noise(values)
    truth = stats.ttest_rel(values[0, 1], values[0, 0])
    (low,), (high,) = compare_rows(values, [(1, 0)], noise, family=1)
    interval = truth.confidence_interval(1 - 2 * strictness(6).gain_error)
    assert (noise.freedom[0], noise.is_noisy.any()) == (5, False)
    assert (low[0], high[0]) == pytest.approx((interval.low, interval.high))


def test_with_three_seeds_a_broken_promise_takes_more_than_a_gain() -> None:
    values = np.random.default_rng(5).normal(56, 1, (1, 10, 3))
    low, high = compare_rows(values, [(1, 0)], fit_noise(values), family=6)
    mean = (values[0, 1] - values[0, 0]).mean()
    assert high[0, 0] - mean > 1.5 * (mean - low[0, 0])


def test_searches_with_gaps_of_their_own_are_judged_as_each_would_be_alone() -> None:
    rng = np.random.default_rng(6)
    values = rng.normal(56, 1, (40, 10, 5))
    values[rng.random(values.shape) < 0.3] = np.nan
    values[0, :, 1:] = values[1, 1:] = np.nan  # one seed, and one row
    pairs = [(row, 0) for row in (3, 4, 5)]
    together = compare_rows(values, pairs, fit_noise(values), family=3)
    levels = estimate_levels(values, [0, 1], fit_noise(values), family=2)
    for search in range(40):
        one = values[search : search + 1]
        noise = fit_noise(one)
        alone = [*compare_rows(one, pairs, noise, family=3), *estimate_levels(one, [0, 1], noise, family=2)]
        for ours, theirs in zip([*together, *levels], alone, strict=True):
            assert ours[search] == pytest.approx(theirs[0], nan_ok=True)


def test_the_noise_of_a_whole_table_agrees_with_a_two_way_analysis_of_variance() -> None:
    import pandas as pd
    import statsmodels.formula.api as smf

    values = np.random.default_rng(1).normal(56, 1, (1, 4, 5))
    values[0, 1, 4] = values[0, 3, 0] = values[0, 3, 2] = np.nan
    cells = [
        {"row": f"r{row}", "seed": f"s{seed}", "miou": values[0, row, seed]}
        for row, seed in np.ndindex(4, 5)
        if not np.isnan(values[0, row, seed])
    ]
    fit = smf.ols("miou ~ row + seed", pd.DataFrame(cells)).fit()
    noise = fit_noise(values)
    assert noise.variance[0] == pytest.approx(fit.mse_resid)
    assert noise.freedom[0] == pytest.approx(fit.df_resid)


def test_what_seeds_share_widens_levels_and_not_gains() -> None:
    rng = np.random.default_rng(2)
    values = 56 + rng.normal(0, 0.1, (1, 10, 5))
    shared = values + rng.normal(0, 3, (1, 1, 5))
    alone, together = fit_noise(values), fit_noise(shared)
    assert together.variance == pytest.approx(alone.variance)
    assert together.within[0] > 100 * alone.within[0]
    # Ten rows repeat one draw of the seeds: hardly more than four degrees of freedom, not forty.
    assert together.within_freedom[0] == pytest.approx(4, abs=0.1)


def test_a_far_noisier_row_leaves_the_pool_and_is_judged_by_itself() -> None:
    rng = np.random.default_rng(3)
    values = 56 + rng.normal(0, 0.3, (1, 10, 5))
    values[0, 7] += np.array([4, -4, 4, -4, 0])
    noise = fit_noise(values)
    assert np.flatnonzero(noise.is_noisy[0]).tolist() == [7]
    assert math.sqrt(noise.variance[0]) == pytest.approx(0.3, abs=0.1)
    low, high = compare_rows(values, [(4, 0), (7, 0)], noise, family=6)
    alone = stats.ttest_rel(values[0, 7], values[0, 0]).confidence_interval(1 - 2 * strictness(5).gain_error / 6)
    assert (low[0, 1], high[0, 1]) == pytest.approx((alone.low, alone.high))
    assert high[0, 0] - low[0, 0] < 2.4


def test_rows_left_without_a_shared_seed_have_no_residual_and_a_noisy_one_its_own_interval() -> None:
    rng = np.random.default_rng(4)
    values = 56 + rng.normal(0, 0.1, (1, 3, 12))
    values[0, 0] += 5 * rng.normal(size=12)  # leaves the pool: the others share no seed
    values[0, 1, 6:] = values[0, 2, :6] = np.nan
    noise = fit_noise(values)
    noise = replace(noise, is_suspect=np.array([[True, False, False]]), variance=np.array([np.nan]))
    noise = replace(noise, freedom=np.array([np.nan]))
    assert np.isfinite(compare_rows(values, [(1, 0), (2, 0)], noise, family=2)).all()
    alone = fit_noise(values[:, 1:])
    assert np.isnan([*alone.variance, *alone.freedom]).all()
    assert np.isfinite(alone.within).all()


@pytest.mark.parametrize("sd", [0.3, 0.5, 1.0])
def test_seeds_for_power_agree_with_statsmodels(sd: float) -> None:
    truth = math.ceil(TTestPower().solve_power(effect_size=1.0 / sd, alpha=0.05, power=0.8))
    found = seeds_for_power(
        1.0,
        standard_error=lambda number: sd / math.sqrt(number),
        critical=lambda number: (float(stats.t.ppf(0.975, number - 1)), number - 1),
        most=100,
    )
    assert found == truth


def test_more_seeds_than_asked_for_are_not_named() -> None:
    assert seeds_for_power(0.0, standard_error=lambda _: 1.0, critical=lambda _: (2.0, 10.0), most=100) is None


def _counts(num_images: int, *, seed: int, skill: int, num_classes: int = 19) -> NDArray[np.int64]:
    """Each image holds a few of the classes; `skill` weighs the diagonal."""
    rng = np.random.default_rng(seed)
    there = rng.random((num_images, num_classes, 1)) < 0.4
    counts: NDArray[np.int64] = rng.integers(0, 20, (num_images, num_classes, num_classes)) * there
    return counts + np.eye(num_classes, dtype=np.int64) * skill * there


def apart(num_images: int) -> list[str]:
    """Return groups of one image each."""
    return [f"image {number}" for number in range(num_images)]


def _brute_miou(counts: NDArray[np.int64]) -> float:
    matrix = counts.sum(0)
    hits = [matrix[c, c] for c in range(len(matrix))]
    union = [matrix[c].sum() + matrix[:, c].sum() - matrix[c, c] for c in range(len(matrix))]
    return float(np.mean([100 * h / u for h, u in zip(hits, union, strict=True) if u]))


def test_the_bootstrap_over_images_agrees_with_brute_force() -> None:
    row, reference = _counts(40, seed=1, skill=220), _counts(40, seed=2, skill=200)
    rng = np.random.default_rng(7)
    differences = [_brute_miou(row[drawn]) - _brute_miou(reference[drawn]) for drawn in rng.integers(0, 40, (2000, 40))]
    truth = np.percentile(differences, [2.5, 97.5])
    # Two Monte Carlo estimates of 2.5 % quantiles with 2000 draws each differ by some 5 % of the interval's width.
    assert image_interval(row, reference, apart(40)) == pytest.approx(truth, abs=0.1 * float(truth[1] - truth[0]))


def test_the_bootstrap_is_the_same_every_time() -> None:
    row, reference = _counts(10, seed=1, skill=220), _counts(10, seed=2, skill=200)
    assert image_interval(row, reference, apart(10)) == image_interval(row, reference, apart(10))


def test_the_bootstrap_keeps_both_predictions_of_an_image_together() -> None:
    # The row is its reference: no draw of images can part them.
    counts = _counts(10, seed=1, skill=200)
    assert image_interval(counts, counts, apart(10)) == (0.0, 0.0)


def test_two_images_of_two_classes_by_hand() -> None:
    # Image A: both perfect, IoU 1 and 1. Image B: the row is, the reference takes half of class 1 for class 0.
    # Draws AA, AB, BB (1/4, 1/2, 1/4). BB: the reference has IoU 4/6 and 2/4, mean 58.33: the row gains 41.67.
    # AA gains 0; both have more than 2.5 % of the draws, so the interval goes from one to the other.
    perfect, half = [[4, 0], [0, 4]], [[4, 0], [2, 2]]
    row, reference = np.array([perfect, perfect]), np.array([perfect, half])
    assert image_interval(row, reference, apart(2)) == pytest.approx((0.0, 41.6667), abs=1e-3)


def test_drawing_groups_is_drawing_their_sums_and_one_group_has_no_interval() -> None:
    row, reference = _counts(12, seed=1, skill=220), _counts(12, seed=2, skill=200)
    groups = ["b", "a", "c", "a"] * 3
    sums = [np.stack([counts[np.array(groups) == name].sum(0) for name in "bac"]) for counts in (row, reference)]
    assert image_interval(row, reference, groups) == pytest.approx(image_interval(*sums, apart(3)))
    assert image_interval(row, reference, ["a"] * 12) is None


def grouped_counts(rng: np.random.Generator, *, groups: int, images: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return counts of a row and its reference; in each group a class is easier or harder for each of them."""
    counts = []
    for skill in (1.3, 1.0):
        logit = skill + rng.normal(0, 0.3, (groups, 1, 4)) + rng.normal(0, 0.1, (groups, images, 4))
        hits = rng.binomial(200, special.expit(logit)).reshape(-1, 4)
        counts.append(
            hits[:, :, None] * np.eye(4, dtype=int) + (200 - hits)[:, :, None] * np.roll(np.eye(4, dtype=int), 1, 1)
        )
    return counts[0], counts[1]


def test_whole_groups_cover_the_truth_more_often_where_images_share_their_errors() -> None:
    rng = np.random.default_rng(0)
    row, reference = grouped_counts(rng, groups=20_000, images=1)
    truth = _brute_miou(row) - _brute_miou(reference)
    cities = [f"city {number // 10}" for number in range(60)]
    covered, widths = np.zeros(2), np.zeros(2)
    for _ in range(40):
        row, reference = grouped_counts(rng, groups=6, images=10)
        intervals = [image_interval(row, reference, groups) for groups in (apart(60), cities)]
        low, high = np.array(intervals, dtype=float).T
        covered += (low <= truth) & (truth <= high)
        widths += high - low
    assert widths[1] > 2 * widths[0]
    assert covered[0] < 30 < 32 <= covered[1]
