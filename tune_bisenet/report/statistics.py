"""The statistics behind the verdicts: one model of the noise, simultaneous intervals, a bootstrap over images.

Numbers in, numbers out: nothing here knows rows, trials or words. The model is

    measure[row, seed] = row + seed + residual

with residuals of one variance, estimated from all rows together. Arrays are S x R x N: searches (one, or many that are
simulated), rows, seeds; NaN where a row has no measure at a seed.
"""

import bisect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
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
    """The chance that any gain of the table is overstated (kept, exceeded or gained), by the model."""
    broken_error: float
    """The chance that any is called broken falsely. With three seeds it is small, so that gains can have the rest."""
    level_error: float
    sooner_error: float
    noisy_ratio: float
    """A row whose residual standard deviation is over this many times the median row's is judged by its own."""
    suspect_ratio: float
    """The same for a reference, which many claims hang on, and for a row with a claim on its level."""
    leaves_pool: bool
    """Whether a noisy row also leaves the pool. With few seeds too many rows would do so by chance."""


STRICTNESS: Final = (
    Strictness(
        seeds=2,
        gain_error=0.00025,
        broken_error=0.00025,
        level_error=0.0001,
        sooner_error=0.001,
        noisy_ratio=2.5,
        suspect_ratio=2.5,
        leaves_pool=False,
    ),
    Strictness(
        seeds=3,
        gain_error=0.031,
        broken_error=0.0002,
        level_error=0.0002,
        sooner_error=0.001,
        noisy_ratio=2.6,
        suspect_ratio=1.6,
        leaves_pool=False,
    ),
    Strictness(
        seeds=5,
        gain_error=0.015,
        broken_error=0.015,
        level_error=0.005,
        sooner_error=0.003,
        noisy_ratio=2.2,
        suspect_ratio=2.2,
        leaves_pool=True,
    ),
    Strictness(
        seeds=8,
        gain_error=0.015,
        broken_error=0.015,
        level_error=0.005,
        sooner_error=0.015,
        noisy_ratio=2.2,
        suspect_ratio=2.2,
        leaves_pool=True,
    ),
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


def reached_looks(num_seeds: int, looks: Sequence[int]) -> list[int]:
    """Return at how many seeds a table that has so many is judged: at all, or at the planned looks that it reached."""
    is_beyond = not looks or num_seeds > looks[-1]
    return [look for look in looks if look <= num_seeds] + [num_seeds] * is_beyond


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
    """S x R: rows whose gains are judged by their own noise."""
    is_suspect: Flags
    """S x R: rows by whose own noise their levels are judged, and the gains of others over them."""


def fit_noise(values: Floats) -> Noise:
    """Fit row + seed + residual to S x R x N values; see `Noise`."""
    present = _present(values)
    num_seeds = present.sum(2)
    squares, row_freedom = _residual_squares(values, present)
    is_known = (num_seeds > 1) & (row_freedom > 1e-6)
    row_variances = np.full(squares.shape, np.nan)
    np.divide(squares, row_freedom, out=row_variances, where=np.broadcast_to(is_known, squares.shape))
    sds, median = np.sqrt(row_variances), np.full(len(values), np.inf)
    # Of two rows, neither is noisier: the residuals of one are those of the other.
    has_median = np.broadcast_to(is_known.sum(1) > 2, median.shape)
    median[has_median] = np.nanmedian(sds[has_median], axis=1)
    is_noisy, is_suspect = (
        sds > _by_seeds(ratio, num_seeds) * median[:, None] for ratio in ("noisy_ratio", "suspect_ratio")
    )
    leaves = is_noisy & _by_seeds("leaves_pool", num_seeds)
    variance, freedom, within, within_freedom = _pooled(values, present & ~leaves[:, :, None])
    return Noise(
        variance=variance,
        freedom=freedom,
        within=within,
        within_freedom=within_freedom,
        is_noisy=is_noisy,
        is_suspect=is_suspect,
    )


def _present(values: Floats) -> Flags:
    """Return where there are measures: S x R x N, or 1 x R x N if that is the same in every search."""
    present = ~np.isnan(values)
    return present[:1] if (present == present[:1]).all() else present


def _by_seeds(name: str, num_seeds: NDArray[np.int_]) -> NDArray[Any]:
    """Return this part of the `Strictness` for each number of seeds."""
    rules = [getattr(strictness(number), name) for number in range(num_seeds.max(initial=0) + 1)]
    return np.array(rules)[num_seeds]


def _residual_squares(values: Floats, present: Flags) -> tuple[Floats, Floats]:
    """Return the sum of squared residuals by search and row (S x R), and its degrees of freedom (S x R or 1 x R).

    Least squares: rows are swept out first, so what is solved has a line for each seed.
    """
    weights = present.astype(float)
    counts = weights.sum(2, keepdims=True)
    shares = weights / np.maximum(counts, 1.0)
    filled = np.where(present, values, 0.0)
    centred = filled - weights * (shares * filled).sum(2, keepdims=True)
    row_freedom = np.maximum(counts[:, :, 0] - 1, 0.0)
    if (present == present.any(2, keepdims=True)).all():  # each row has all seeds or none
        num_rows = np.maximum(present.any(2).sum(1), 1)[:, None]
        effects, freedom = centred.sum(1) / num_rows, row_freedom * (1 - 1 / num_rows)
    else:
        normal = weights.sum(1)[:, :, None] * np.eye(values.shape[2]) - np.einsum("srn,srm->snm", shares, weights)
        inverse = np.linalg.pinv(normal, rcond=1e-9, hermitian=True)
        effects = np.einsum("snm,srm->sn", inverse, centred)
        of_seeds = (weights * np.einsum("snn->sn", inverse)[:, None]).sum(2)
        freedom = row_freedom - of_seeds + np.einsum("srn,snm,srm->sr", shares, inverse, weights, optimize=True)
    residuals = centred - weights * (effects[:, None] - (shares * effects[:, None]).sum(2, keepdims=True))
    return (residuals**2).sum(2), freedom


def _pooled(values: Floats, present: Flags) -> tuple[Floats, Floats, Floats, Floats]:
    """Return residual variance and freedom, then the variance within a row and its freedom, each S."""
    num_searches = len(values)
    squares, row_freedom = _residual_squares(values, present)
    freedom = np.broadcast_to(np.round(row_freedom.sum(1)), num_searches)
    # Rows that share no seeds leave nothing to estimate residuals from.
    freedom = np.where(freedom > 0, freedom, np.nan)
    variance = squares.sum(1) / freedom
    repeats = np.maximum(present.sum(2) - 1, 0)
    num_rows, num_repeats = (np.broadcast_to(of.sum(1), num_searches) for of in (repeats > 0, repeats))
    _, _, row_variances = _moments(np.where(present, values, np.nan))
    within = np.nansum(row_variances * repeats, axis=1) / np.where(num_repeats > 0, num_repeats, np.nan)
    # Satterthwaite: within = (between seeds + (k - 1) residual) / k, of which the first has far fewer degrees.
    of_rows = np.maximum(num_rows, 1)
    per_row = num_repeats / of_rows
    between = np.maximum(num_rows * within - (num_rows - 1) * variance, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        uncertainty = (between / of_rows) ** 2 / per_row + ((of_rows - 1) / of_rows * variance) ** 2 / freedom
        satterthwaite = np.maximum(within**2 / uncertainty, per_row)
    within_freedom = np.where(uncertainty > 0, satterthwaite, np.where(np.isnan(freedom), num_repeats, per_row))
    return variance, freedom, within, np.where(num_repeats > 0, within_freedom, np.nan)


def _moments(values: Floats) -> tuple[NDArray[np.int_], Floats, Floats]:
    """Return number, mean and variance of the values along the last axis; NaN where they are too few."""
    number = (~np.isnan(values)).sum(-1)
    mean = np.nansum(values, axis=-1) / np.where(number > 0, number, np.nan)
    squares = np.nansum((values - mean[..., None]) ** 2, axis=-1)
    return number, mean, squares / np.where(number > 1, number - 1, np.nan)


def compare_rows(
    values: Floats, pairs: Sequence[tuple[int, int]], noise: Noise, *, family: int, spent: float = 1.0
) -> tuple[Floats, Floats]:
    """Return the ends of Dunnett's intervals of each row's mean difference to its reference over the seeds both have.

    `pairs` are indices of rows; `family` is the number of claims that are guarded together, measured or not; `spent` is
    the share of the error that these intervals may use up. Both ends are S x claims, NaN where there is no interval;
    with three seeds the upper one is further from the mean.
    """
    correlation = _least_correlation(_present(values), pairs)
    lows, highs = [], []
    for row, reference in pairs:
        number, mean, own = _moments(values[:, row] - values[:, reference])
        scale = np.sqrt(np.maximum(2 * noise.variance, own) / np.maximum(number, 1))
        own_scale = np.sqrt(own / np.maximum(number, 1))
        is_noisy = noise.is_noisy[:, row] | noise.is_suspect[:, reference]
        widths = []
        for name in ("gain_error", "broken_error"):
            error = 2 * _by_seeds(name, number) * spent  # of both ends, of which one is used
            width = _quantiles(family, noise.freedom, error, correlation) * scale
            alone = _student(number - 1, error / family) * own_scale
            widths.append(np.where(is_noisy, np.fmax(width, alone), width))
        lows.append(mean - widths[0])
        highs.append(mean + widths[1])
    return _columns(lows, len(values)), _columns(highs, len(values))


def estimate_levels(
    values: Floats, rows: Sequence[int], noise: Noise, *, family: int, spent: float = 1.0
) -> tuple[Floats, Floats]:
    """Return the ends of intervals of the mean of each of `rows` over its seeds, which hold together (Bonferroni).

    `family` and `spent` are as in `compare_rows`, and so are the results.
    """
    lows, highs = [], []
    for row in rows:
        number, mean, own = _moments(values[:, row])
        error = _by_seeds("level_error", number) * spent / family
        variance = np.maximum(noise.within, own)
        width = _student(noise.within_freedom, error) * np.sqrt(variance / np.maximum(number, 1))
        alone = _student(number - 1, error) * np.sqrt(own / np.maximum(number, 1))
        width = np.where(noise.is_suspect[:, row], np.fmax(width, alone), width)
        lows.append(mean - width)
        highs.append(mean + width)
    return _columns(lows, len(values)), _columns(highs, len(values))


def _student(freedom: Any, error: Any) -> Floats:
    """Return Student's two-sided quantile; NaN without a degree of freedom."""
    return np.asarray(special.stdtrit(freedom, 1 - error / 2))


def _columns(columns: Sequence[Floats], num_searches: int) -> Floats:
    return np.stack(columns, axis=1) if columns else np.empty((num_searches, 0))


def student_interval(values: Floats, *, error: float, family: int, least_sd: float) -> tuple[Floats, Floats]:
    """Return the ends of Student's interval of the mean along the last axis, at `error` over `family` claims.

    They are NaN below two values. `least_sd` is the spread that the values' own resolution gives them: whole numbers,
    say, that happen to be equal are not known to be equal.
    """
    number, mean, variance = _moments(values)
    half = _student(number - 1, error / family) * np.maximum(np.sqrt(variance), least_sd) / np.sqrt(number)
    return mean - half, mean + half


def _least_correlation(present: Flags, pairs: Sequence[tuple[int, int]]) -> Floats:
    """Return, by search, the least correlation of any two differences: a half where all share seeds and reference.

    Differences of a single seed have no interval, and do not count.

    Dunnett's quantile falls as differences correlate more (Slepian), so the least is safe for all. It is rounded down,
    which is safe, too, and leaves few quantiles to compute.
    """
    least = np.full(len(present), 0.5)
    seeds = [present[:, row] & present[:, reference] for row, reference in pairs]
    for first, (row, reference) in enumerate(pairs):
        for second in range(first):
            other, other_reference = pairs[second]
            sign = (reference == other_reference) - (row == other_reference) - (reference == other)
            shared = (seeds[first] & seeds[second]).sum(1)
            own, others = seeds[first].sum(1), seeds[second].sum(1)
            sizes = np.where((own > 1) & (others > 1), own * others, np.nan)
            least = np.fmin(least, sign * shared / (2 * np.sqrt(sizes)))
    return np.asarray(np.floor(20 * np.maximum(least, 0.0) + 1e-9) / 20)


def _quantiles(family: int, freedom: Floats, error: Floats, correlation: Floats) -> Floats:
    """Return Dunnett's quantile for each search; NaN where there are no degrees of freedom."""
    cases = np.stack(np.broadcast_arrays(freedom, error, correlation), axis=1).tolist()
    return np.array([math.nan if math.isnan(case[0]) else dunnett(family, *case) for case in cases])


_NODES, _WEIGHTS = np.polynomial.hermite_e.hermegauss(24)
_PROBABILITIES: Final = (np.arange(150) + 0.5) / 150


@cache
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
