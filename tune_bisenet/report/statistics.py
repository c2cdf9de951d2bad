"""The statistics behind the verdicts: t intervals, Holm's correction, seeds for a power, a bootstrap over images.

Numbers in, numbers out: nothing here knows rows, trials or words.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import special  # type: ignore[import-untyped]

CONFIDENCE: Final = 0.95
ALPHA: Final = 0.05
POWER: Final = 0.8

NO_SPREAD: Final = 1e-9
"""Values whose standard deviation stays below this are one value and its rounding, not several measurements."""

NUM_RESAMPLES: Final = 2000

Counts = NDArray[np.integer[Any]]
"""Confusion counts by image, labels by rows, images x classes x classes."""


@dataclass(frozen=True, kw_only=True)
class MeanTest:
    """Student's t for one mean: of differences paired by seed, or of one row's own values. `n` is at least 2."""

    n: int
    mean: float
    sd: float
    interval: tuple[float, float]
    """At 95 % confidence."""
    p: float | None
    """Two-sided, against the null; None without spread, where t is not defined."""


def mean_test(values: Sequence[float], *, null: float, least_sd: float = 0.0) -> MeanTest:
    """Return the mean of at least two values, its interval, and its test against `null`.

    `least_sd` is the spread that the values' own resolution gives them: whole numbers, say, that happen to be equal are
    not known to be equal. Without any spread the interval is the one value, and nothing is tested.
    """
    n, mean = len(values), float(np.mean(values))
    sd = max(float(np.std(values, ddof=1)), least_sd)
    if sd < NO_SPREAD:
        return MeanTest(n=n, mean=mean, sd=0.0, interval=(mean, mean), p=None)
    error = sd / math.sqrt(n)
    half = error * float(special.stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    p = 2 * float(special.stdtr(n - 1, -abs(mean - null) / error))
    return MeanTest(n=n, mean=mean, sd=sd, interval=(mean - half, mean + half), p=p)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return Holm's (1979) adjusted p-values. None, a claim not tested yet, stays None but counts in the family."""
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    known = sorted((p, index) for index, p in enumerate(p_values) if p is not None)
    for rank, (p, index) in enumerate(known):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p))
        adjusted[index] = highest
    return adjusted


def seeds_for_power(*, effect: float, sd: float, alpha: float, most: int) -> int | None:
    """Return the fewest seeds, 2 or more, at which a two-sided t test has 80 % power for `effect`; None above `most`.

    From the noncentral t distribution: df = n - 1, noncentrality effect / sd * sqrt(n). Found on the effect's own side:
    a rejection on the other side is no finding (and that tail is where scipy's noncentral t turns to NaN).
    """
    n = np.arange(2, most + 1)
    critical = special.stdtrit(n - 1, 1 - alpha / 2)
    shift = effect / sd * np.sqrt(n)
    power = 1 - special.nctdtr(n - 1, shift, critical)
    enough = np.flatnonzero(power >= POWER)
    return int(n[enough[0]]) if len(enough) else None


def image_interval(counts: Counts, reference: Counts) -> tuple[float, float]:
    """Return the 95 % interval of mIoU(counts) - mIoU(reference) in points, had other validation images been drawn.

    A percentile bootstrap that draws images, each with both its predictions; always the same for the same counts.
    """
    from scipy import stats  # late: it takes a second to import, and only searches of one seed need it

    assert len(counts) == len(reference), "both were validated on the same images"
    drawn = np.random.default_rng(0).integers(0, len(counts), (NUM_RESAMPLES, len(counts)))
    times = np.stack([np.bincount(images, minlength=len(counts)) for images in drawn]).astype(float)
    differences = _miou(times @ _iou_sums(counts)) - _miou(times @ _iou_sums(reference))
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
