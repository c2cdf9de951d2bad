"""The statistics behind the verdicts: one model of the noise, simultaneous intervals, a bootstrap over images.

Numbers in, numbers out: nothing here knows rows, trials or words. The model is

    measure[row, seed] = row + seed + residual

with residuals of one variance, estimated from all rows together. Arrays are S x R x N: searches (one, or many that are
simulated), rows, seeds; NaN where a row has no measure at a seed, in the same places of every search.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, special  # type: ignore[import-untyped]

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]

NO_SPREAD: Final = 1e-9
"""Values whose standard deviation stays below this are one value and its rounding, not several measurements."""

POWER: Final = 0.8
CONFIDENCE: Final = 0.95
"""Of the bootstrap over images, which judges nothing."""
NUM_RESAMPLES: Final = 2000

Counts = NDArray[np.integer[Any]]
"""Confusion counts by image, labels by rows, images x classes x classes."""


@dataclass(frozen=True, kw_only=True)
class Strictness:
    """Says how much error statements may have that rest on so many seeds, and when a row counts as noisy.

    Chosen by simulation (benchmarks/verdicts.py), so that any false statement in a table of ten rows stays under 5 %,
    one row with four times the noise of the others included: with two or three seeds such a row often cannot be told.
    """

    seeds: int
    """From this number on."""
    gain_error: float
    """The chance that any gain of the table is judged falsely, by the model."""
    level_error: float
    sooner_error: float
    noisy_ratio: float
    """A row whose residual standard deviation is over this many times the median row's is judged by its own."""
    leaves_pool: bool
    """Whether such a row also leaves the pool. With few seeds too many rows would do so by chance."""


STRICTNESS: Final = (
    Strictness(seeds=2, gain_error=0.0005, level_error=0.0001, sooner_error=0.001, noisy_ratio=2.5, leaves_pool=False),
    Strictness(seeds=3, gain_error=0.018, level_error=0.003, sooner_error=0.001, noisy_ratio=1.7, leaves_pool=False),
    Strictness(seeds=5, gain_error=0.03, level_error=0.005, sooner_error=0.003, noisy_ratio=2.2, leaves_pool=True),
    Strictness(seeds=8, gain_error=0.03, level_error=0.005, sooner_error=0.015, noisy_ratio=2.2, leaves_pool=True),
)

EARLY_SEEDS: Final = 8
"""A look at fewer seeds is early: a noisy row often cannot be told there, whatever error a statement may have."""
EARLY_SHARE: Final = 1 / 8
"""How much of its share of the error an early look may use up, where there are several looks."""


def strictness(num_seeds: int) -> Strictness:
    """Return the strictness for statements from this number of seeds, two or more."""
    return [rule for rule in STRICTNESS if rule.seeds <= max(num_seeds, 2)][-1]


def error_share(num_seeds: int, *, num_looks: int) -> float:
    """Return the share of the error that a look at so many seeds may use up, 0 to 1, if it is one of several."""
    if num_looks < 2:
        return 1.0
    return (EARLY_SHARE if num_seeds < EARLY_SEEDS else 1.0) / num_looks


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Holds what all rows together say of the noise, for each of S searches; NaN where nothing repeats."""

    variance: Floats
    """S: of residuals, in squared points; rows that have left the pool do not count."""
    freedom: Floats
    """S: its degrees of freedom."""
    within: Floats
    """S: the variance of one row over its seeds, residuals and what seeds share together."""
    within_freedom: Floats
    """S: its degrees of freedom, by Satterthwaite."""
    is_noisy: Flags
    """S x R."""


def fit_noise(values: Floats) -> Noise:
    """Fit row + seed + residual to S x R x N values; see `Noise`."""
    present = ~np.isnan(values[0])
    num_seeds = present.sum(1)
    squares, leverage = _residual_squares(values, present)
    row_freedom = np.where(num_seeds > 1, leverage, 0.0)
    known = row_freedom > 1e-6
    row_variances = np.full(squares.shape, np.nan)
    np.divide(squares, row_freedom, out=row_variances, where=np.broadcast_to(known, squares.shape))
    sds = np.sqrt(row_variances)
    is_noisy = np.zeros(squares.shape, dtype=bool)
    if known.sum() > 2:  # of two rows, neither is noisier: the residuals of one are those of the other
        ratios = np.array([strictness(number).noisy_ratio for number in num_seeds])
        median = np.nanmedian(sds[:, known], axis=1, keepdims=True)
        is_noisy[:, known] = sds[:, known] > ratios[known] * median
    may_leave = np.array([strictness(number).leaves_pool for number in num_seeds])
    leaves = is_noisy & may_leave
    variance, freedom, within, within_freedom = (np.full(len(values), np.nan) for _ in range(4))
    for pattern in np.unique(leaves, axis=0):
        here = (leaves == pattern).all(1)
        pool = ~pattern
        if pool.any():
            fits = _pooled(values[here][:, pool], present[pool])
            variance[here], freedom[here], within[here], within_freedom[here] = fits
    return Noise(
        variance=variance,
        freedom=freedom,
        within=within,
        within_freedom=within_freedom,
        is_noisy=is_noisy,
    )


def _residual_squares(values: Floats, present: Flags) -> tuple[Floats, Floats]:
    """Return the sum of squared residuals by search and row (S x R), and its degrees of freedom by row (R)."""
    num_rows, num_seeds = present.shape
    if present.all():
        centred = values - values.mean(2, keepdims=True)
        residuals = centred - centred.mean(1, keepdims=True)
        freedom = np.full(num_rows, num_seeds * (1 - 1 / num_rows) * (1 - 1 / num_seeds))
        return (residuals**2).sum(2), freedom
    rows, seeds = np.nonzero(present)
    design = np.zeros((len(rows), num_rows + num_seeds))
    cells = np.arange(len(rows))
    design[cells, rows] = design[cells, num_rows + seeds] = 1.0
    left, singular, _ = np.linalg.svd(design, full_matrices=False)
    basis = left[:, singular > 1e-9 * max(singular.max(initial=0.0), 1.0)]
    flat = values[:, rows, seeds]
    residuals = flat - flat @ basis @ basis.T
    leverage = 1 - (basis**2).sum(1)
    squares = np.zeros((len(values), num_rows))
    freedom = np.zeros(num_rows)
    for row in range(num_rows):
        squares[:, row] = (residuals[:, rows == row] ** 2).sum(1)
        freedom[row] = leverage[rows == row].sum()
    return squares, freedom


def _pooled(values: Floats, present: Flags) -> tuple[Floats, Floats, Floats, Floats]:
    """Return residual variance and freedom, then the variance within a row and its freedom, each S."""
    squares, leverage = _residual_squares(values, present)
    # Rows that share no seeds leave nothing to estimate residuals from.
    freedom = leverage.sum() if leverage.sum() > 1e-6 else math.nan
    variance, residual_freedom = squares.sum(1) / freedom, np.full(len(values), freedom)
    repeats = present.sum(1) - 1
    num_rows, num_repeats = int((repeats > 0).sum()), int(repeats[repeats > 0].sum())
    if not num_repeats:
        unknown = np.full(len(values), math.nan)
        return variance, residual_freedom, unknown, unknown
    repeated = values[:, repeats > 0]
    deviations = repeated - np.nanmean(repeated, axis=2, keepdims=True)
    within = np.nansum(deviations**2, axis=(1, 2)) / num_repeats
    if num_rows == 1 or math.isnan(freedom):
        return variance, residual_freedom, within, np.full(len(values), float(num_repeats))
    # Satterthwaite: within = (between seeds + (k - 1) residual) / k, of which the first has far fewer degrees.
    per_row = num_repeats / num_rows
    between = np.maximum(num_rows * within - (num_rows - 1) * variance, 0.0)
    shares = (between / num_rows) ** 2 / per_row + ((num_rows - 1) / num_rows * variance) ** 2 / freedom
    within_freedom = np.divide(within**2, shares, out=np.full(len(values), per_row), where=shares > 0)
    return variance, residual_freedom, within, np.maximum(within_freedom, per_row)


def compare_rows(
    values: Floats, pairs: Sequence[tuple[int, int]], noise: Noise, *, family: int, spent: float = 1.0
) -> tuple[Floats, Floats]:
    """Return each row's mean difference to its reference over the seeds both have, and half of Dunnett's interval.

    `pairs` are indices of rows; `family` is the number of claims that are guarded together, measured or not; `spent` is
    the share of the error that these intervals may use up. Both results are S x claims; the second is NaN where there
    is no interval.
    """
    present = ~np.isnan(values[0])
    correlation = _least_correlation(present, pairs)
    means, half_widths = [], []
    for row, reference in pairs:
        common = present[row] & present[reference]
        differences = values[:, row, common] - values[:, reference, common]
        means.append(differences.mean(1) if common.any() else np.full(len(values), np.nan))
        number = int(common.sum())
        if number < 2:
            half_widths.append(np.full(len(values), np.nan))
            continue
        error = strictness(number).gain_error * spent
        own = differences.var(1, ddof=1)
        critical = _by_freedom(noise.freedom, partial(dunnett, family, error=error, correlation=correlation))
        half = critical * np.sqrt(np.maximum(2 * noise.variance, own) / number)
        alone = float(special.stdtrit(number - 1, 1 - error / (2 * family))) * np.sqrt(own / number)
        is_noisy = noise.is_noisy[:, row] | noise.is_noisy[:, reference]
        half_widths.append(np.where(is_noisy, np.fmax(half, alone), half))
    return _columns(means, len(values)), _columns(half_widths, len(values))


def estimate_levels(
    values: Floats, rows: Sequence[int], noise: Noise, *, family: int, spent: float = 1.0
) -> tuple[Floats, Floats]:
    """Return the mean of each of `rows` over its seeds, and half of intervals that hold together (Bonferroni).

    `family` and `spent` are as in `compare_rows`. Both results are S x claims; the second is NaN where there is no
    interval.
    """
    means, half_widths = [], []
    for row in rows:
        own_values = values[:, row, ~np.isnan(values[0, row])]
        number = own_values.shape[1]
        means.append(own_values.mean(1) if number else np.full(len(values), np.nan))
        if number < 2:
            half_widths.append(np.full(len(values), np.nan))
            continue
        tail = 1 - strictness(number).level_error * spent / (2 * family)
        own = own_values.var(1, ddof=1)
        half = special.stdtrit(noise.within_freedom, tail) * np.sqrt(np.maximum(noise.within, own) / number)
        alone = float(special.stdtrit(number - 1, tail)) * np.sqrt(own / number)
        half_widths.append(np.where(noise.is_noisy[:, row], np.fmax(half, alone), half))
    return _columns(means, len(values)), _columns(half_widths, len(values))


def _columns(columns: Sequence[Floats], num_searches: int) -> Floats:
    return np.stack(columns, axis=1) if columns else np.empty((num_searches, 0))


def student_interval(
    values: Sequence[float], *, error: float, family: int, least_sd: float
) -> tuple[float, float] | None:
    """Return Student's interval of the mean of values, at `error` over `family` claims; None below two values.

    `least_sd` is the spread that the values' own resolution gives them: whole numbers, say, that happen to be equal are
    not known to be equal.
    """
    number = len(values)
    if number < 2:
        return None
    mean, sd = float(np.mean(values)), max(float(np.std(values, ddof=1)), least_sd)
    half = float(special.stdtrit(number - 1, 1 - error / (2 * family))) * sd / math.sqrt(number)
    return mean - half, mean + half


def _least_correlation(present: Flags, pairs: Sequence[tuple[int, int]]) -> float:
    """Return the least correlation of any two differences: a half where all share seeds and reference.

    Dunnett's quantile falls as differences correlate more (Slepian), so the least is safe for all.
    """
    least = 0.5
    seeds = [present[row] & present[reference] for row, reference in pairs]
    for first, (row, reference) in enumerate(pairs):
        for second in range(first):
            other, other_reference = pairs[second]
            shared = float((seeds[first] & seeds[second]).sum())
            sign = (reference == other_reference) - (row == other_reference) - (reference == other)
            sizes = float(seeds[first].sum() * seeds[second].sum())
            least = min(least, sign * shared / (2 * math.sqrt(sizes)) if sizes else least)
    return max(least, 0.0)


def _by_freedom(freedom: Floats, quantile: Callable[[float], float]) -> Floats:
    """Return the quantile at each degree of freedom; NaN at NaN."""
    result = np.full(freedom.shape, np.nan)
    for value in np.unique(freedom[~np.isnan(freedom)]):
        result[freedom == value] = quantile(float(value))
    return result


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(64)
_PROBABILITIES: Final = (np.arange(150) + 0.5) / 150


@lru_cache(maxsize=4096)
def dunnett(family: int, freedom: float, error: float, correlation: float) -> float:
    """Return the two-sided quantile of the largest of `family` equally correlated t statistics of one variance.

    Dunnett (1955). By quadrature over the shared normal variable and over the standard deviation; agrees with
    `scipy.stats.multivariate_t` to about 0.1 %, which takes a thousand times as long.
    """
    if family == 1:
        return float(special.stdtrit(freedom, 1 - error / 2))
    # Two thirds of the quadrature lie in the lowest and highest two per cent, where small errors are decided.
    tails = np.concatenate([_PROBABILITIES * 0.02, 0.02 + _PROBABILITIES * 0.96, 0.98 + _PROBABILITIES * 0.02])
    weights = np.repeat([0.02, 0.96, 0.02], len(_PROBABILITIES)) / len(_PROBABILITIES)
    scales = np.sqrt(special.chdtri(freedom, 1 - tails) / freedom)[:, None]
    shared = math.sqrt(correlation) * _NODES
    rest = math.sqrt(1 - correlation)

    def excess(critical: float) -> float:
        inside = special.ndtr((critical * scales + shared) / rest) - special.ndtr((-critical * scales + shared) / rest)
        return float(weights @ (inside**family @ (_WEIGHTS / _WEIGHTS.sum()))) - (1 - error)

    highest = float(special.stdtrit(freedom, 1 - error / (2 * family))) + 1e-6  # Bonferroni's is never exceeded
    return float(optimize.brentq(excess, 0.1, 1.02 * highest, xtol=1e-6))


def seeds_for_power(
    effect: float, *, standard_error: Callable[[int], float], critical: Callable[[int], tuple[float, float]], most: int
) -> int | None:
    """Return the fewest seeds, 2 or more, that show at 80 % power that a mean is `effect` away from where it is not.

    `standard_error` gives that of the mean and `critical` the quantile and its degrees of freedom, by number of seeds.
    From the noncentral t distribution; None above `most`.
    """

    def is_enough(number: int) -> bool:
        quantile, freedom = critical(number)
        shift = effect / standard_error(number)
        # Far above the quantile, scipy's noncentral t turns to NaN.
        return shift > quantile + 6 or 1 - float(special.nctdtr(freedom, shift, quantile)) >= POWER

    numbers = range(2, most + 1)
    first = bisect.bisect_left(numbers, True, key=is_enough)
    return numbers[first] if first < len(numbers) else None


def image_interval(counts: Counts, reference: Counts, groups: Sequence[str]) -> tuple[float, float] | None:
    """Return the 95 % interval of mIoU(counts) - mIoU(reference) in points, had other validation images been drawn.

    A percentile bootstrap that draws whole groups of images, as those of one city share their errors, each with both
    its predictions; always the same for the same counts. None of a single group, which says nothing of others. Over few
    it is too narrow: with errors that groups share, it held the truth in 50 % of 200 simulations over two groups, in
    75 % over three (Cityscapes has three cities), in 90 % over ten.
    """
    from scipy import stats  # late: it takes a second to import, and only searches of one seed need it

    assert len(counts) == len(reference) == len(groups), "both were validated on the same images"
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    if len(numbers) < 2:
        return None
    drawn = np.random.default_rng(0).integers(0, len(numbers), (NUM_RESAMPLES, len(numbers)))
    times = np.stack([np.bincount(draw, minlength=len(numbers)) for draw in drawn]).astype(float)
    of_image = times[:, [numbers[group] for group in groups]]  # how often each resample holds each image
    differences = _miou(of_image @ _iou_sums(counts)) - _miou(of_image @ _iou_sums(reference))
    tail = (1 - CONFIDENCE) / 2
    low, high = stats.quantile(differences, np.array([tail, 1 - tail]))
    return float(low), float(high)


def _iou_sums(counts: Counts) -> NDArray[np.float64]:
    """Return each class's intersection, then each class's union: images x 2 classes.

    mIoU needs no more of the counts, and float64 holds the pixels of any split exactly.
    """
    hits = np.diagonal(counts, axis1=1, axis2=2)
    return np.concatenate((hits, counts.sum(1) + counts.sum(2) - hits), axis=1).astype(np.float64)


def _miou(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return mIoU in percent by resample; a class that a resample nowhere holds has no part in its mean."""
    hits, union = np.split(sums, 2, axis=1)
    occurs = union > 0
    iou = np.divide(hits, union, out=np.zeros_like(hits), where=occurs)
    mean: NDArray[np.float64] = 100 * iou.sum(1) / np.maximum(occurs.sum(1), 1)
    return mean
