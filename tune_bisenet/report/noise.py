"""Measure how much repeats of a row differ, and which classes make them differ.

Covariances within rows, pooled over the rows that have repeats. IoU and mIoU are in percent, so their spread is in
points.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tune_bisenet.report.claims import final_epochs, final_miou
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import NO_SPREAD, Floats


@dataclass(frozen=True, kw_only=True)
class ClassNoise:
    """Says how much one class contributes to the noise of mIoU."""

    name: str
    sd: float
    """Of its IoU over seeds, in points."""
    share: float
    """Of the variance of mIoU, in percent: all classes sum to 100, and one that moves against the others is below 0."""


@dataclass(frozen=True, kw_only=True)
class RepeatNoise:
    """Says how much trials of one row differ over seeds, from all rows with two completed seeds or more."""

    num_rows: int
    num_trials: int
    sd: float
    """Of mIoU over the last epochs, in points."""
    second_sd: float | None
    """Of the space's second measure; None if it has none, or if a trial has none of its classes."""
    classes: tuple[ClassNoise, ...]
    """The largest share first."""
    left_out: tuple[str, ...]
    """Classes that some epoch of the measure lacks. The shares are those of the mean of the other classes."""


def repeat_noise(
    trials: Sequence[ReportedTrial], measured_share: float, second_measure: tuple[str, ...] = ()
) -> RepeatNoise | None:
    """Return the noise over the last epochs, `measured_share` of them; None where nothing repeats."""
    rows: dict[str, list[ReportedTrial]] = {}
    for trial in trials:
        if trial.state.status == "finished" and final_epochs(trial, measured_share):
            rows.setdefault(trial.run.name, []).append(trial)
    repeated = [row for row in rows.values() if len(row) > 1]
    if not repeated:
        return None
    measures = [
        _within_rows(
            [np.array([final_miou(trial, measured_share, classes=classes) for trial in row]) for row in repeated]
        )
        for classes in ((), second_measure)
    ]
    ious = _within_rows([np.stack([_class_means(trial, measured_share) for trial in row]) for row in repeated])
    kept = [index for index, column in enumerate(ious.T) if not np.isnan(column).any()]
    ious, freedom = ious[:, kept], len(ious) - len(repeated)
    of_mean = ious.sum(1) / max(len(kept), 1)
    variance = float(of_mean @ of_mean)
    if not variance / freedom > NO_SPREAD**2:
        return None
    sds = np.sqrt((ious**2).sum(0) / freedom)
    sd, second_sd = (math.sqrt(float((values**2).sum()) / freedom) for values in measures)
    shares = 100 * (of_mean @ ious) / len(kept) / variance
    names = repeated[0][0].classes.names
    classes = [
        ClassNoise(name=names[index], sd=float(sd), share=float(share))
        for index, sd, share in zip(kept, sds, shares, strict=True)
    ]
    return RepeatNoise(
        num_rows=len(repeated),
        num_trials=len(ious),
        sd=sd,
        second_sd=second_sd if second_measure and math.isfinite(second_sd) else None,
        classes=tuple(sorted(classes, key=lambda noise: -noise.share)),
        left_out=tuple(name for name in names if name not in {of.name for of in classes}),
    )


def _class_means(trial: ReportedTrial, measured_share: float) -> Floats:
    """Return the mean IoU of each class over the last epochs; NaN where an epoch lacks it."""
    ious: Floats = np.array([epoch.iou for epoch in final_epochs(trial, measured_share)], dtype=float)
    return np.asarray(ious.mean(0))


def _within_rows(values_by_row: Sequence[Floats]) -> Floats:
    """Return the values of all T trials together, T or T x C, each less the mean of its row."""
    return np.concatenate([values - values.mean(0) for values in values_by_row])
