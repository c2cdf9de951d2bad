"""Statistics against scipy's and statsmodels' own, against brute force, and by hand."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from tune_bisenet.report.statistics import holm, image_interval, mean_test, seeds_for_power


def test_a_mean_of_three_by_hand() -> None:
    # 1, 2, 3: mean 2, sd 1, error 1 / sqrt(3) = 0.57735; t(0.975, 2 df) = 4.30265, so 2 -+ 2.48414.
    # Against 0: t = 2 / 0.57735 = 3.46410; for 2 df p = 1 - t / sqrt(t^2 + 2) = 1 - 3.46410 / 3.74166 = 0.07418.
    test = mean_test([1.0, 2.0, 3.0], null=0.0)
    assert (test.n, test.mean, test.sd) == (3, 2.0, 1.0)
    assert test.interval == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert test.p == pytest.approx(0.07418, abs=1e-5)


@pytest.mark.parametrize("n", [2, 3, 5, 30])
@pytest.mark.parametrize("null", [0.0, 55.0])
def test_means_agree_with_scipys_t_tests(n: int, null: float) -> None:
    values = np.random.default_rng(n).normal(null + 0.4, 0.5, n)
    test, truth = mean_test(values.tolist(), null=null), stats.ttest_1samp(values, null)
    interval = truth.confidence_interval(0.95)
    assert test.p == pytest.approx(truth.pvalue)
    assert test.interval == pytest.approx((interval.low, interval.high))


def test_differences_agree_with_scipys_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    row, reference = rng.normal(56.5, 1, 6), rng.normal(56, 1, 6)
    assert mean_test((row - reference).tolist(), null=0).p == pytest.approx(stats.ttest_rel(row, reference).pvalue)


def test_without_spread_nothing_is_tested_and_nothing_divides_by_zero() -> None:
    # 56.1 - 56 and 57.1 - 57 differ in their last bits only.
    test = mean_test([56.1 - 56, 57.1 - 57], null=0.0)
    assert (test.sd, test.p) == (0.0, None)
    assert test.interval == (test.mean, test.mean)


def test_equal_whole_numbers_keep_the_spread_of_rounding() -> None:
    # 5, 5, 5 with a least sd of 0.6: error 0.6 / sqrt(3) = 0.34641, times 4.30265 = 1.49048.
    assert mean_test([5, 5, 5], null=0, least_sd=0.6).interval == pytest.approx((3.50952, 6.49048), abs=1e-5)


def test_holm_by_hand() -> None:
    # Sorted: 0.01 x 3 = 0.03, 0.02 x 2 = 0.04, 0.03 x 1 = 0.03, raised to 0.04.
    assert holm([0.03, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert holm([]) == []


def test_holm_agrees_with_statsmodels() -> None:
    p_values = (np.random.default_rng(0).random(13) ** 3).tolist()
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1])


def test_a_claim_not_tested_yet_counts_in_holms_family() -> None:
    # 0.01 of three claims, whatever the others will say: 0.03.
    assert holm([None, 0.01, None]) == [None, pytest.approx(0.03), None]


@pytest.mark.parametrize("effect", [0.3, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("alpha", [0.05, 0.05 / 13])
def test_seeds_for_power_agree_with_statsmodels(effect: float, alpha: float) -> None:
    truth = TTestPower().solve_power(effect_size=effect / 0.5, alpha=alpha, power=0.8)
    assert seeds_for_power(effect=effect, sd=0.5, alpha=alpha, most=200) == math.ceil(truth)


def test_seeds_for_power_of_an_effect_as_large_as_the_spread() -> None:
    # A textbook's number: d = 1, alpha 0.05 two-sided, power 0.8 needs 10 pairs.
    assert seeds_for_power(effect=0.5, sd=0.5, alpha=0.05, most=100) == 10
    assert seeds_for_power(effect=0.5, sd=0.5, alpha=0.05, most=9) is None
    assert seeds_for_power(effect=0.0, sd=0.5, alpha=0.05, most=100) is None


def _counts(num_images: int, *, seed: int, skill: int, num_classes: int = 19) -> NDArray[np.int64]:
    """Each image holds a few of the classes; `skill` weighs the diagonal."""
    rng = np.random.default_rng(seed)
    there = rng.random((num_images, num_classes, 1)) < 0.4
    counts: NDArray[np.int64] = rng.integers(0, 20, (num_images, num_classes, num_classes)) * there
    return counts + np.eye(num_classes, dtype=np.int64) * skill * there


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
    assert image_interval(row, reference) == pytest.approx(truth, abs=0.1 * float(truth[1] - truth[0]))


def test_the_bootstrap_is_the_same_every_time() -> None:
    row, reference = _counts(10, seed=1, skill=220), _counts(10, seed=2, skill=200)
    assert image_interval(row, reference) == image_interval(row, reference)


def test_the_bootstrap_keeps_both_predictions_of_an_image_together() -> None:
    # The row is its reference: no draw of images can part them.
    counts = _counts(10, seed=1, skill=200)
    assert image_interval(counts, counts) == (0.0, 0.0)


def test_two_images_of_two_classes_by_hand() -> None:
    # Image A: both perfect, IoU 1 and 1. Image B: the row is, the reference takes half of class 1 for class 0.
    # Draws AA, AB, BB (1/4, 1/2, 1/4). BB: the reference has IoU 4/6 and 2/4, mean 58.33: the row gains 41.67.
    # AA gains 0; both have more than 2.5 % of the draws, so the interval goes from one to the other.
    perfect, half = [[4, 0], [0, 4]], [[4, 0], [2, 2]]
    row, reference = np.array([perfect, perfect]), np.array([perfect, half])
    assert image_interval(row, reference) == pytest.approx((0.0, 41.6667), abs=1e-3)
