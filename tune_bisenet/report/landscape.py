"""mIoU over the parameters of a study: all of them at once on parallel axes, and each alone as a slice."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from tune_bisenet.report.figures import Figure, Trace
from tune_bisenet.report.history import MARKER_SIZE, SYMBOLS, floor_words, height, hover
from tune_bisenet.report.samples import MAX_LINES, Parameter, Sample, floor_of, parameters, round_numbers, thinned

NOWHERE: Final = "–"
"""For a parameter that does not apply."""
NOT_THERE: Final = -0.12
"""Its height, below the axis."""
AXIS_WIDTH: Final = 58
FEW_AXES: Final = 8
"""More than these have no room for names side by side."""
COLD_TO_WARM: Final = ("#8f99a5", "#4f8fd9", "#e8833a", "#d1402f")
FAINT: Final = 0.3
GOLDEN: Final = 0.618034
"""Multiples of it, less their whole parts, spread evenly however many there are."""


def measured(of: Sequence[Sample]) -> list[Sample]:
    """Those that have an mIoU, the lowest first: so the best are drawn on top."""
    return sorted((one for one in of if one.miou is not None), key=lambda one: one.miou or 0.0)


# --- parallel axes --------------------------------------------------------------------------------------------------


def parallel(of: Sequence[Sample]) -> Figure | None:
    """A line for each trial across an axis for each parameter; None before any trial has an mIoU.

    Drawn as plain lines: Plotly's own `parcoords` shows nothing where a browser has no WebGL, and nothing on hover.
    """
    found = measured(of)
    if not found:
        return None
    shown = _best_and_some(found)
    few = "" if len(shown) == len(found) else f" {len(shown)} of {len(found)} trials: the best, and some of the others."
    axes = [*(_axis(one, shown) for one in parameters(shown)), _miou_axis(shown)]
    names = [one.name for one in axes]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": names,
            "tickangle": -35 if len(axes) > FEW_AXES else 0,
            "side": "top",
            "range": [-0.15, len(axes) - 0.55],
            "automargin": True,
            "zeroline": False,
            "fixedrange": True,
        },
        "yaxis": {"range": [NOT_THERE - 0.06, 1.04], "visible": False, "fixedrange": True},
        "showlegend": False,
        "margin": {"l": 16, "r": 96, "t": 40, "b": 8},
        "height": 480,
    }
    return Figure(
        name="parallel",
        title="All parameters at once",
        caption="A line is a trial; the warmer and stronger, the higher its best mIoU, on the last axis. Point at a "
        f"line where it crosses an axis to follow it. {NOWHERE}: the parameter does not apply.{few}",
        data=[*(_line(place, one, axes) for place, one in enumerate(shown)), _tick_words(axes)],
        layout=layout,
        min_width=AXIS_WIDTH * len(axes),
    )


def _best_and_some(found: Sequence[Sample]) -> list[Sample]:
    """No more than can be told apart; a fifth of them are the best, without a gap."""
    if len(found) <= MAX_LINES:
        return list(found)
    best = MAX_LINES // 5
    return [*thinned(found[:-best], MAX_LINES - best), *found[-best:]]


@dataclass(frozen=True, kw_only=True)
class _Axis:
    """From bottom, 0, to top, 1."""

    name: str
    heights: list[float]
    """Of the trials."""
    ticks: list[tuple[float, str]]


def _axis(parameter: Parameter, shown: Sequence[Sample]) -> _Axis:
    low, high = parameter.ends

    def share(place: float) -> float:
        return round((place - low) / (high - low), 4) if low < high else 0.5

    applies = [parameter.name in one.params for one in shown]
    heights = [
        share(parameter.place(one.params[parameter.name])) if there else NOT_THERE
        for one, there in zip(shown, applies, strict=True)
    ]
    nowhere = [] if all(applies) else [(NOT_THERE, NOWHERE)]
    return _Axis(
        name=parameter.name, heights=heights, ticks=nowhere + [(share(at), text) for at, text in parameter.ticks]
    )


def _miou_axis(shown: Sequence[Sample]) -> _Axis:
    floor, top = floor_of(shown), shown[-1].miou or 0.0

    def share(miou: float) -> float:
        return round((miou - floor) / (top - floor), 4) if floor < top else 1.0

    ticks = [(share(miou), f"{miou:g}") for miou in round_numbers(floor, top)]
    return _Axis(name="best mIoU in %", heights=[share(height(one, floor)) for one in shown], ticks=ticks)


def _line(place: int, one: Sample, axes: Sequence[_Axis]) -> Trace:
    quality = axes[-1].heights[place]
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(range(len(axes))),
        "y": [axis.heights[place] for axis in axes],
        "line": {"color": _blended(quality), "width": 1.5 + quality},
        "opacity": round(FAINT + (1 - FAINT) * quality, 2),
        **hover([one] * len(axes)),
    }


def _blended(quality: float) -> str:
    """Between the colours of COLD_TO_WARM, evenly from 0 to 1."""
    place = quality * (len(COLD_TO_WARM) - 1)
    first = min(int(place), len(COLD_TO_WARM) - 2)
    ends = zip(bytes.fromhex(COLD_TO_WARM[first][1:]), bytes.fromhex(COLD_TO_WARM[first + 1][1:]), strict=True)
    return "#" + "".join(f"{round(a + (place - first) * (b - a)):02x}" for a, b in ends)


def _tick_words(axes: Sequence[_Axis]) -> Trace:
    """Written beside the axes, which Plotly knows as grid lines alone."""
    ticks = [(place, at, words) for place, axis in enumerate(axes) for at, words in axis.ticks]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [place for place, _, _ in ticks],
        "y": [at for _, at, _ in ticks],
        "text": [f" {words}" for _, _, words in ticks],
        "textposition": "middle right",
        "textfont": {"size": 11, "shadow": "auto"},
        "hoverinfo": "skip",
    }


# --- slices ---------------------------------------------------------------------------------------------------------


def slices(of: Sequence[Sample]) -> list[Figure]:
    """A small plot for each parameter, all on one scale of mIoU."""
    shown = sorted(measured(of), key=lambda one: one.number)
    if not shown:
        return []
    floor = floor_of(shown)
    top = max(height(one, floor) for one in shown)
    last = max(one.number for one in shown)
    room = 0.06 * (top - floor) or 1.0
    return [
        _slice(f"slice-{place}", parameter, shown, floor=floor, last=last, extent=(floor - room, top + room))
        for place, parameter in enumerate(parameters(shown))
    ]


def slices_words(of: Sequence[Sample]) -> str:
    """How to read the slices."""
    shown = measured(of)
    floor = floor_of(shown)
    below = sum((one.miou or 0.0) < floor for one in shown)
    return (
        "Best mIoU over each parameter by itself; the warmer the colour, the later in the search. Hollow: stopped "
        f"early; cross: diverged; diamond: from an earlier search.{floor_words(below)}"
    )


def _slice(
    name: str, parameter: Parameter, shown: Sequence[Sample], *, floor: float, last: int, extent: tuple[float, float]
) -> Figure:
    having = [one for one in shown if parameter.name in one.params]
    layout = {
        "xaxis": {"automargin": True, "zeroline": False, **_slice_axis(parameter)},
        "yaxis": {"automargin": True, "zeroline": False, "range": list(extent)},
        "coloraxis2": {"cmin": 0, "cmax": max(last, 1), "showscale": False},
        "showlegend": False,
        "margin": {"l": 32, "r": 8, "t": 8, "b": 30},
        "height": 220,
    }
    absent = len(shown) - len(having)
    return Figure(
        name=name,
        title=parameter.name,
        caption=f"of {len(having)} trials" if absent else "",
        data=[_dots(parameter, having, floor)],
        layout=layout,
    )


def _slice_axis(parameter: Parameter) -> dict[str, Any]:
    if parameter.choices:
        return {
            "range": [-0.5, len(parameter.choices) - 0.5],
            "showgrid": False,
            "tickvals": [place for place, _ in parameter.ticks],
            "ticktext": [words for _, words in parameter.ticks],
        }
    if parameter.is_log:
        ticks = [value for _, value in parameter.ticks]
        return {"type": "log", "tickvals": [float(value) for value in ticks], "ticktext": ticks}
    return {}


def _dots(parameter: Parameter, having: Sequence[Sample], floor: float) -> Trace:
    return {
        "type": "scatter",
        "mode": "markers",
        "x": [_abscissa(parameter, one) for one in having],
        "y": [height(one, floor) for one in having],
        "marker": {
            "color": [one.number for one in having],
            "coloraxis": "coloraxis2",
            "size": MARKER_SIZE - 1,
            "symbol": [_symbol(one) for one in having],
        },
        **hover(having),
    }


def _abscissa(parameter: Parameter, one: Sample) -> Any:
    """The value itself; choices are spread into a strip."""
    value = one.params[parameter.name]
    if not parameter.choices:
        return value
    return round(parameter.place(value) + 0.5 * (one.number * GOLDEN % 1 - 0.5), 3)


def _symbol(one: Sample) -> str:
    symbol = SYMBOLS[one.standing.status]
    return symbol.replace("circle", "diamond") if one.is_known else symbol
