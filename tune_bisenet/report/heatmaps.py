"""Classes as heat maps: each row's IoU against the baseline's, and what the best trial takes for what."""

import math
from typing import Any, Final

import numpy as np

from tune_bisenet.data.classes import CLASS_NAMES
from tune_bisenet.report.figures import Figure, short
from tune_bisenet.report.leaderboard import best_first
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.report.samples import shown_rows
from tune_bisenet.report.tables import mean_iou

HEATMAP_MIN_WIDTH: Final = 860


def iou_heatmap(search: SearchRecord) -> Figure | None:
    """Each row's IoU by class less the baseline's, in points; None without a baseline, or without anything else."""
    shown = shown_rows(search)
    ious = {row: values for row, values in mean_iou(search).items() if row in shown}
    bar = ious.pop(search.baseline, None) if search.baseline else None
    if bar is None or not ious:
        return None
    differences = [[_minus(value, base) for value, base in zip(row, bar, strict=True)] for row in ious.values()]
    most = max((abs(value) for row in differences for value in row if value is not None), default=0.0)
    heat = {
        "type": "heatmap",
        "x": CLASS_NAMES,
        "y": list(ious),
        "z": differences,
        "text": [["" if value is None else f"{value:+z.1f}" for value in row] for row in differences],
        "texttemplate": "%{text}",
        "textfont": {"size": 10},
        "customdata": [list(zip(map(_words, row), map(_words, bar), strict=True)) for row in ious.values()],
        "hovertemplate": f"<b>%{{y}}</b> %{{x}}: %{{customdata[0]}}<br>{search.baseline}: %{{customdata[1]}}, "
        "%{text} points<extra></extra>",
        "coloraxis": "coloraxis",
        "xgap": 1,
        "ygap": 1,
    }
    bound = max(short(most), 0.1)
    layout = {
        "xaxis": {"tickangle": -45, "showgrid": False, "automargin": True},
        "yaxis": {"autorange": "reversed", "showgrid": False, "automargin": True, "type": "category"},
        "coloraxis": {"cmin": -bound, "cmax": bound, "cmid": 0, "colorbar": _colour_bar("points")},
        "height": 140 + 34 * len(ious),
    }
    return Figure(
        name="iou",
        title=f"IoU by class, less that of {search.baseline}",
        caption="Percentage points at the trials' best epochs, mean over seeds. The IoU itself shows on hover, and is "
        "in tables/iou.csv.",
        data=[heat],
        layout=layout,
        min_width=HEATMAP_MIN_WIDTH,
    )


def _minus(value: float | None, base: float | None) -> float | None:
    return None if value is None or base is None else short(value - base)


def _words(iou: float | None) -> str:
    return "does not occur" if iou is None else f"{iou:.1f} %"


def confusion_matrix(search: SearchRecord) -> Figure | None:
    """Of the trial of highest mIoU whose counts are kept: where the pixels of each class went, in percent."""
    kept = [
        standing for standing in best_first(search.standings) if search.trials[standing.trial].confusions is not None
    ]
    if not kept:
        return None
    best = kept[0]
    confusions = search.trials[best.trial].confusions
    assert confusions is not None
    counts = confusions.sum(axis=0, dtype=np.int64)  # C x C
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    shares = [[short(value) if math.isfinite(value) else None for value in row] for row in percent.tolist()]
    heat = {
        "type": "heatmap",
        "x": CLASS_NAMES,
        "y": CLASS_NAMES,
        "z": shares,
        "customdata": counts.tolist(),
        "text": [["" if value is None or value < 1 else f"{value:.0f}" for value in row] for row in shares],
        "texttemplate": "%{text}",
        "textfont": {"size": 10},
        "hovertemplate": "%{z:.2f} % of <b>%{y}</b><br>taken for <b>%{x}</b>, %{customdata:,} pixels<extra></extra>",
        "coloraxis": "coloraxis",
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "xaxis": {"title": {"text": "predicted"}, "tickangle": -45, "showgrid": False, "automargin": True},
        "yaxis": {"title": {"text": "label"}, "autorange": "reversed", "showgrid": False, "automargin": True},
        "coloraxis": {"cmin": 0, "cmax": 100, "colorbar": _colour_bar("%")},
        "height": 720,
    }
    return Figure(
        name="confusion",
        title=f"Confusion matrix of the best trial, {best.trial}",
        caption=f"Each line is 100 % of a class's labelled pixels, over {len(confusions)} validation images at epoch "
        f"{best.best_epoch}; shares under 1 % are left blank.",
        data=[heat],
        layout=layout,
        min_width=HEATMAP_MIN_WIDTH,
    )


def _colour_bar(unit: str) -> dict[str, Any]:
    return {"title": {"text": unit}, "thickness": 12, "outlinewidth": 0}
