"""How a study went: best mIoU by trial, the best so far, and the best declared row to compare with."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, Final

from tune_bisenet.records import Status
from tune_bisenet.report.figures import BASELINE_COLOUR, Figure, Trace
from tune_bisenet.report.samples import Sample, best_sample, floor_of, param_words, round_numbers
from tune_bisenet.text import counted

SAMPLED_COLOUR: Final = "#3b7dd8"
DECLARED_COLOUR: Final = "#e8833a"
KNOWN_COLOUR: Final = "#9aa3ad"

SYMBOLS: Final[dict[Status, str]] = {
    "finished": "circle",
    "stopped": "circle-open",
    "diverged": "x",
    "failed": "triangle-down-open",
    "running": "circle-open-dot",
    "waiting": "circle-open-dot",
}
KEY: Final = "Filled: went to its last epoch; hollow: stopped early; cross: diverged; triangle: failed; dot: not ended."

MARKER_SIZE: Final = 9
LEGEND_BELOW: Final = {"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"}
"""Above the plot it would lie below the buttons on a phone."""
PARAMS_ON_HOVER: Final = 20


def history(of: Sequence[Sample]) -> Figure | None:
    """None before any trial has an mIoU."""
    shown = [one for one in of if one.miou is not None or one.standing.status == "failed"]
    if best_sample(shown) is None:
        return None
    floor = floor_of(shown)
    below = sum(one.miou is None or one.miou < floor for one in shown)
    ticks = [number for number in round_numbers(0, max(one.number for one in of)) if number == round(number)]
    layout = {
        "xaxis": {"automargin": True, "zeroline": False, "tickvals": ticks},
        "yaxis": {"automargin": True, "zeroline": False},
        "legend": LEGEND_BELOW,
        "height": 420,
    }
    lines = [*_reference(shown), _best_so_far(shown)]
    return Figure(
        name="history",
        title="Best mIoU in % by trial of the study",
        caption=KEY + floor_words(below),
        data=[*lines, *_points(shown, floor)],
        layout=layout,
    )


def floor_words(below: int) -> str:
    """What the lower edge of a plot means, if `below` trials lie there."""
    return f" On the lower edge: {counted(below, 'trial')} below it, or without mIoU." if below else ""


def _points(shown: Sequence[Sample], floor: float) -> list[Trace]:
    groups = {
        ("earlier searches", KNOWN_COLOUR): [one for one in shown if one.is_known],
        ("sampled", SAMPLED_COLOUR): [one for one in shown if not (one.is_known or one.is_declared)],
        ("declared rows", DECLARED_COLOUR): [one for one in shown if one.is_declared and not one.is_known],
    }
    return [_markers(name, colour, group, floor) for (name, colour), group in groups.items() if group]


def _markers(name: str, colour: str, trials: Sequence[Sample], floor: float) -> Trace:
    group = sorted(trials, key=lambda one: not one.is_complete)  # the legend shows the first one's symbol
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [one.number for one in group],
        "y": [height(one, floor) for one in group],
        "marker": {"color": colour, "size": MARKER_SIZE, "symbol": [SYMBOLS[one.standing.status] for one in group]},
        **hover(group),
    }


def height(one: Sample, floor: float) -> float:
    return round(max(one.miou or floor, floor), 3)


def hover(group: Sequence[Sample]) -> dict[str, Any]:
    """What a point says of itself: its trial, how it went, its parameters."""
    return {"text": [_words(one) for one in group], "hovertemplate": "%{text}<extra></extra>"}


def _words(one: Sample) -> str:
    miou = "no mIoU" if one.miou is None else f"{one.miou:.2f} %"
    latency = "" if one.standing.latency_ms is None else f", {one.standing.latency_ms:.1f} ms"
    params = [f"{name} {param_words(value)}" for name, value in one.params.items()][:PARAMS_ON_HOVER]
    return "<br>".join([f"<b>{one.trial}</b> {miou}{latency}, {one.standing.status}", *params])


def _best_so_far(shown: Sequence[Sample]) -> Trace:
    measured = [one for one in shown if one.miou is not None]
    return {
        "type": "scatter",
        "mode": "lines",
        "name": "best so far",
        "x": [one.number for one in measured],
        "y": [round(best, 3) for best in accumulate((one.miou or 0.0 for one in measured), max)],
        "line": {"color": BASELINE_COLOUR, "width": 2, "shape": "hv"},
        "hoverinfo": "skip",
    }


def _reference(shown: Sequence[Sample]) -> list[Trace]:
    """The best declared row, as far as the plot goes."""
    best = best_sample(one for one in shown if one.is_declared)
    if best is None:
        return []
    return [
        {
            "type": "scatter",
            "mode": "lines",
            "name": f"best declared row, {best.run.name}: {best.miou:.2f} %",
            "x": [min(one.number for one in shown), max(one.number for one in shown)],
            "y": [best.miou, best.miou],
            "line": {"color": DECLARED_COLOUR, "width": 1.5, "dash": "dash"},
            "hoverinfo": "skip",
        }
    ]
