"""The plots of the page, as the plain dicts that Plotly's JavaScript takes; nothing here imports plotly.

A row keeps its colour through all plots; its seeds are a line at their mean within a band from the lowest to the
highest. The colours of text, grid and colour scales are the page's, which knows whether it is light or dark.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from tune_bisenet.records import Epoch
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.report.samples import MAX_LINES, shown_rows, thinned
from tune_bisenet.text import counted

BASELINE_COLOUR: Final = "#7d8590"
COLOURS: Final = (
    "#3b7dd8", "#e8833a", "#3f9e5a", "#d1495b", "#9467bd", "#17a2a2", "#c79a1e", "#e377c2", "#8c6d4f", "#7aa52a",
)  # fmt: skip
"""Told apart on white and on near-black."""

OTHERS: Final = "all others"
OTHERS_COLOUR: Final = "#9aa3ad"
"""Muted by its opacity, too."""
OTHERS_OPACITY: Final = 0.35

BAND_OPACITY: Final = 0.14
SIGNIFICANT_DIGITS: Final = 5

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
    """By row; the baseline is grey. Rows that do not stand out share an entry, OTHERS."""
    shown = shown_rows(search)
    others = [name for name in shown if name != search.baseline]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}
    rest = {} if len(shown) == len(search.rows) else {OTHERS: OTHERS_COLOUR}
    return {name: colours.get(name, BASELINE_COLOUR) for name in shown} | rest


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
    muted, above = ([row for row in values if (row in colours) is shown] for shown in (False, True))
    below = thinned(muted, MAX_LINES)
    if len(below) < len(muted):
        caption = f"{caption} Of the {len(muted)} that do not stand out, {len(below)} are drawn.".strip()
    data = [
        *(_muted(row, values[row]) for row in below),
        *(
            trace
            for row in above
            for trace in _row_traces(row, values[row], colour=colours[row], is_baseline=row == search.baseline)
        ),
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
    lows, highs = ([short(bound(found)) for found in values.values()] for bound in (min, max))
    line = {
        "type": "scatter",
        "mode": "lines" if len(epochs) > 1 else "markers",
        "name": name,
        "meta": name,
        "x": epochs,
        "y": [short(sum(found) / len(found)) for found in values.values()],
        "customdata": [
            [low, high, counted(len(found), "seed")]
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


def _muted(name: str, values: Mapping[int, Sequence[float]]) -> Trace:
    """A row among many, its mean alone; shown and hidden with all that do not stand out."""
    *_, line = _row_traces(name, values, colour=OTHERS_COLOUR, is_baseline=False)
    line["line"]["width"] = 1
    return line | {"meta": OTHERS, "opacity": OTHERS_OPACITY}


def _translucent(colour: str) -> str:
    red, green, blue = bytes.fromhex(colour[1:])
    return f"rgba({red},{green},{blue},{BAND_OPACITY})"


def short(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
