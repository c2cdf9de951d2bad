"""The plots of the page, as the plain dicts that Plotly's JavaScript takes; nothing here imports plotly.

A row keeps its colour through all plots; its seeds are a line at their mean within a band from the lowest to the
highest. The colours of text, grid and colour scales are the page's, which knows whether it is light or dark.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np

from tune_bisenet.data.classes import CLASS_NAMES
from tune_bisenet.report.leaderboard import best_first
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.report.tables import mean_iou
from tune_bisenet.results import Epoch

BASELINE_COLOUR: Final = "#7d8590"
COLOURS: Final = (
    "#3b7dd8", "#e8833a", "#3f9e5a", "#d1495b", "#9467bd", "#17a2a2", "#c79a1e", "#e377c2", "#8c6d4f", "#7aa52a",
)  # fmt: skip
"""Told apart on white and on near-black."""

BAND_OPACITY: Final = 0.14
SIGNIFICANT_DIGITS: Final = 5
HEATMAP_MIN_WIDTH: Final = 860

Trace = dict[str, Any]
Scale = Literal["linear", "log"]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot. `name` is its id on the page; narrower than `min_width` pixels it scrolls instead of shrinking."""

    name: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    min_width: int = 0


def row_colours(search: SearchRecord) -> dict[str, str]:
    """By row; the baseline is grey."""
    others = [row.name for row in search.rows if row.name != search.baseline]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}
    return {row.name: colours.get(row.name, BASELINE_COLOUR) for row in search.rows}


# --- learning curves ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Quantity:
    name: str
    title: str
    of: Callable[[Epoch], float]
    scale: Scale = "linear"
    caption: str = ""


_QUANTITIES: Final = (
    _Quantity(name="miou", title="mIoU in % on the validation images", of=lambda epoch: epoch.miou),
    _Quantity(name="loss", title="Loss, total", of=lambda epoch: epoch.loss),
    _Quantity(name="loss_main", title="Loss of the main head", of=lambda epoch: epoch.loss_main),
    _Quantity(name="loss_aux1", title="Loss of auxiliary head 1", of=lambda epoch: epoch.loss_aux1),
    _Quantity(name="loss_aux2", title="Loss of auxiliary head 2", of=lambda epoch: epoch.loss_aux2),
    _Quantity(name="lr", title="Learning rate at the epoch's end", of=lambda epoch: epoch.lr),
    _Quantity(
        name="grad_norm",
        title="Gradient norm, before clipping",
        of=lambda epoch: epoch.grad_norm,
        scale="log",
        caption="L2 over all parameters, mean over the epoch.",
    ),
)


def curves(search: SearchRecord) -> list[Figure]:
    """A plot for each quantity, and for the gain over the baseline; none before an epoch has ended."""
    histories = _histories(search)
    if not histories:
        return []
    miou, *others = (_measured_curve(quantity, histories, search) for quantity in _QUANTITIES)
    return [miou, *_gain_curve(histories, search), *others]


def _histories(search: SearchRecord) -> dict[str, dict[int, Sequence[Epoch]]]:
    """By row and seed, the epochs of trials that have any."""
    histories: dict[str, dict[int, Sequence[Epoch]]] = {}
    for trial in search.trials.values():
        if trial.epochs:
            histories.setdefault(trial.run.name, {})[trial.run.seed] = trial.epochs
    return histories


def _measured_curve(
    quantity: _Quantity, histories: Mapping[str, Mapping[int, Sequence[Epoch]]], search: SearchRecord
) -> Figure:
    values = {
        row: _by_epoch((epoch.epoch, quantity.of(epoch)) for epochs in seeds.values() for epoch in epochs)
        for row, seeds in histories.items()
    }
    return _curve(
        values, search, name=quantity.name, title=quantity.title, caption=quantity.caption, scale=quantity.scale
    )


def _gain_curve(histories: Mapping[str, Mapping[int, Sequence[Epoch]]], search: SearchRecord) -> list[Figure]:
    """What the mIoU's own curves are too close to show. None without a baseline, or without anything else."""
    bars = {
        (seed, epoch.epoch): epoch.miou
        for seed, epochs in histories.get(search.baseline or "", {}).items()
        for epoch in epochs
    }
    values = {
        row: _by_epoch(
            (epoch.epoch, epoch.miou - bars[seed, epoch.epoch])
            for seed, epochs in seeds.items()
            for epoch in epochs
            if (seed, epoch.epoch) in bars
        )
        for row, seeds in histories.items()
        if row != search.baseline
    }
    if not any(values.values()):
        return []
    caption = "In percentage points, epoch by epoch at the same seed."
    return [_curve(values, search, name="gain", title=f"mIoU less that of {search.baseline}", caption=caption)]


def _curve(
    values: Mapping[str, Mapping[int, Sequence[float]]],
    search: SearchRecord,
    *,
    name: str,
    title: str,
    caption: str,
    scale: Scale = "linear",
) -> Figure:
    colours = row_colours(search)
    data = [
        trace
        for row, by_epoch in values.items()
        for trace in _row_traces(row, by_epoch, colour=colours[row], is_baseline=row == search.baseline)
    ]
    y_axis = {"type": scale, "automargin": True} | ({"dtick": "D2"} if scale == "log" else {})
    layout = {"xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"}, "yaxis": y_axis, "showlegend": False}
    return Figure(name=name, title=title, caption=caption, data=data, layout=layout)


def _by_epoch(measured: Iterable[tuple[int, float]]) -> dict[int, list[float]]:
    """By epoch, the values of all seeds that have one and that are numbers."""
    values: dict[int, list[float]] = {}
    for epoch, value in measured:
        if math.isfinite(value):
            values.setdefault(epoch, []).append(value)
    return dict(sorted(values.items()))


def _row_traces(name: str, values: Mapping[int, Sequence[float]], *, colour: str, is_baseline: bool) -> list[Trace]:
    """The band, if there are several seeds, below the line. `meta` is the row, by which the page hides and shows it."""
    epochs = list(values)
    lows, highs = ([_short(bound(found)) for found in values.values()] for bound in (min, max))
    line = {
        "type": "scatter",
        "mode": "lines" if len(epochs) > 1 else "markers",
        "name": name,
        "meta": name,
        "x": epochs,
        "y": [_short(sum(found) / len(found)) for found in values.values()],
        "customdata": [
            [low, high, f"{len(found)} seed{'s' * (len(found) > 1)}"]
            for low, high, found in zip(lows, highs, values.values(), strict=True)
        ],
        "hovertemplate": f"<b>{name}</b> epoch %{{x}}: %{{y}}<br>%{{customdata[0]}} to %{{customdata[1]}}, "
        "%{customdata[2]}<extra></extra>",
        "line": {"color": colour, "width": 3 if is_baseline else 2, "dash": "dot" if is_baseline else "solid"},
    }
    if lows == highs:
        return [line]
    band = {
        "type": "scatter",
        "mode": "lines",
        "name": f"{name}, lowest to highest seed",
        "meta": name,
        "x": epochs + epochs[::-1],
        "y": highs + lows[::-1],
        "fill": "toself",
        "fillcolor": _translucent(colour),
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    return [band, line]


def _translucent(colour: str) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red},{green},{blue},{BAND_OPACITY})"


def _short(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


# --- classes --------------------------------------------------------------------------------------------------------


def iou_heatmap(search: SearchRecord) -> Figure | None:
    """Each row's IoU by class less the baseline's, in points; None without a baseline, or without anything else."""
    ious = mean_iou(search)
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
    bound = max(_short(most), 0.1)
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
    return None if value is None or base is None else _short(value - base)


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
    shares = [[_short(value) if math.isfinite(value) else None for value in row] for row in percent.tolist()]
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
