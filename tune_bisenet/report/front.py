"""Two goals at once: which trials are as good at their latency as any, the Pareto front."""

from collections.abc import Sequence
from typing import Final

from tune_bisenet.config import format_size
from tune_bisenet.report.figures import Figure, Trace
from tune_bisenet.report.history import DECLARED_COLOUR, LEGEND_BELOW, MARKER_SIZE, SAMPLED_COLOUR, SYMBOLS, hover
from tune_bisenet.report.samples import Sample
from tune_bisenet.report.views import Cell, View

FRONT_COLOUR: Final = "#d1495b"


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Which of the points (cost, gain) no other beats: costs no more, gains no less, and not both alike.

    The cheapest first. Of points alike in both, all are on the front.
    """
    order = sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1]))
    front: list[int] = []
    for index in order:
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def front(of: Sequence[Sample]) -> list[Sample]:
    """The trials on the front of latency and mIoU, the fastest first. Only those of this search that went to their end:
    a latency belongs to the machine that it was measured on.
    """
    complete = [one for one in of if one.is_complete and one.standing.latency_ms is not None and not one.is_known]
    return [complete[index] for index in pareto([_point(one) for one in complete])]


def _point(one: Sample) -> tuple[float, float]:
    return one.standing.latency_ms or 0.0, one.miou or 0.0


def front_view(of: Sequence[Sample]) -> View:
    found = front(of)
    if not found:
        return View(words="No trial has gone to its last epoch with a latency yet, so there is no front.")
    return View(
        words="No other trial is both faster and better than these. Latency is that of one prediction at batch 1, on "
        "the machine that trained the trial.",
        columns=("trial", "best mIoU", "latency in ms", "head width", "image size"),
        rows=tuple(
            (
                Cell(one.trial),
                Cell(f"{one.miou:.2f}"),
                Cell(f"{one.standing.latency_ms:.2f}"),
                Cell(str(one.run.head_width)),
                Cell(format_size(one.run.image_size)),
            )
            for one in found
        ),
        numbers=frozenset({"best mIoU", "latency in ms", "head width"}),
    )


def front_figure(of: Sequence[Sample]) -> Figure | None:
    """Every trial of this search that has a latency, and the front as a line; None without a front."""
    best = front(of)
    if not best:
        return None
    shown = [one for one in of if not one.is_known and one.standing.latency_ms is not None and one.miou is not None]
    groups = {
        ("sampled", SAMPLED_COLOUR): [one for one in shown if not one.is_declared],
        ("declared rows", DECLARED_COLOUR): [one for one in shown if one.is_declared],
    }
    line: Trace = {
        "type": "scatter",
        "mode": "lines",
        "name": "Pareto front",
        "x": [one.standing.latency_ms for one in best],
        "y": [one.miou for one in best],
        "line": {"color": FRONT_COLOUR, "width": 2, "shape": "hv"},
        "hoverinfo": "skip",
    }
    rings = _markers("on the front", FRONT_COLOUR, best) | {"showlegend": False, "hoverinfo": "skip"}
    rings["marker"] |= {"symbol": "circle-open", "size": MARKER_SIZE + 6}
    return Figure(
        name="front",
        title="Best mIoU in % against latency in ms",
        caption="To the upper left is better. Filled: went to its last epoch; hollow: stopped early.",
        data=[line, rings, *(_markers(name, colour, group) for (name, colour), group in groups.items() if group)],
        layout={
            "xaxis": {"automargin": True, "zeroline": False},
            "yaxis": {"automargin": True, "zeroline": False},
            "legend": LEGEND_BELOW,
            "height": 420,
        },
    )


def _markers(name: str, colour: str, group: Sequence[Sample]) -> Trace:
    symbols = [SYMBOLS[one.standing.status] for one in group]
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [one.standing.latency_ms for one in group],
        "y": [one.miou for one in group],
        "marker": {"color": colour, "size": MARKER_SIZE, "symbol": symbols},
        **hover(group),
    }
