"""The plots of a study: history, Pareto front, importances and slices by Optuna, and our own parallel axes.

Optuna draws complete trials of a study alone, so trials are copied into a study in memory: each with an mIoU is a
complete one there, stopped or not, and symbols tell them apart. The parallel axes are our own because Optuna's leave
out every trial that lacks a parameter, which in a conditional space is every trial.
"""

import json
import math
import statistics
from collections.abc import Sequence
from typing import Any, Final

import optuna
import plotly.graph_objects
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    json_to_distribution,
)
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.visualization import plot_optimization_history, plot_param_importances, plot_pareto_front, plot_slice

from tune_bisenet.config import format_size
from tune_bisenet.records import Status
from tune_bisenet.report.figures import BASELINE_COLOUR, MAX_LINES, Figure, Trace, thinned
from tune_bisenet.report.sampled import Sample, best_sample
from tune_bisenet.report.tables import Table
from tune_bisenet.text import counted

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it would announce each study in the terminal

SAMPLED_COLOUR: Final = "#3b7dd8"
DECLARED_COLOUR: Final = "#e8833a"
KNOWN_COLOUR: Final = "#9aa3ad"
FRONT_COLOUR: Final = "#d1495b"

STATUS_SYMBOLS: Final[dict[Status, str]] = {
    "finished": "circle",
    "stopped": "circle-open",
    "diverged": "x",
    "failed": "triangle-down-open",
    "running": "circle-open-dot",
    "waiting": "circle-open-dot",
}
KEY: Final = (
    "Blue: sampled; orange: declared rows; grey: earlier searches. Filled: completed; hollow: stopped early; "
    "cross: diverged; dot: not ended."
)
MARKER_SIZE: Final = 9
PARAMS_ON_HOVER: Final = 20

MIN_TRIALS: Final = 10
"""With fewer complete trials, importances are noise."""
MIN_TOP_TRIALS: Final = 5
"""PED-ANOVA compares the best with all; its authors want at least five among the best."""
TOP_SHARE: Final = 0.1
IMPORTANCE_CAUTION: Final = (
    "This is what came with mIoU in trials that an optimiser chose, not what caused it: it looks where it hopes to "
    "find, so parameters come in company, and what it left early is hardly known. Shares by PED-ANOVA: what tells the "
    "best complete trials from all. They add up to 100 % however little there is to explain."
)

NOT_APPLICABLE: Final = "–"
BELOW_AXIS: Final = -0.12
"""The height of a parameter that does not apply, below its axis."""
AXIS_WIDTH: Final = 58
FEW_AXES: Final = 8
"""More than these have no room for names side by side."""
COLD_TO_WARM: Final = ("#8f99a5", "#4f8fd9", "#e8833a", "#d1402f")
FAINT: Final = 0.3


def distributions_of(samples: Sequence[Sample]) -> dict[str, BaseDistribution]:
    """Return, for each parameter that any has, the widest range that any was drawn from, or all choices."""
    distributions: dict[str, BaseDistribution] = {}
    for name in dict.fromkeys(name for sample in samples for name in sample.spec.params):
        having = [sample.spec for sample in samples if name in sample.spec.params]
        ranges = [json_to_distribution(text) for text in dict.fromkeys(spec.distributions[name] for spec in having)]
        values = [spec.params[name] for spec in having]
        choices = [choice for one in ranges if isinstance(one, CategoricalDistribution) for choice in one.choices]
        if choices:
            distributions[name] = CategoricalDistribution(tuple(dict.fromkeys([*choices, *values])))
            continue
        numbers = [float(value or 0) for value in values]
        numeric = [one for one in ranges if isinstance(one, FloatDistribution | IntDistribution)]
        low, high = min([*numbers, *(one.low for one in numeric)]), max([*numbers, *(one.high for one in numeric)])
        is_log = low > 0 and all(one.log for one in numeric)
        distributions[name] = FloatDistribution(low, high, log=is_log)
    return distributions


def _study(samples: Sequence[Sample], *, with_latency: bool = False) -> optuna.Study:
    """Return a study whose trial n is `samples[n]`, complete."""
    distributions = distributions_of(samples)
    study = optuna.create_study(directions=["minimize", "maximize"] if with_latency else ["maximize"])
    for sample in samples:
        values = [sample.miou or 0.0]
        study.add_trial(
            optuna.trial.create_trial(
                params=dict(sample.spec.params),
                distributions={name: distributions[name] for name in sample.spec.params},
                values=[sample.state.latency_ms or 0.0, *values] if with_latency else values,
            )
        )
    return study


def _measured(samples: Sequence[Sample]) -> list[Sample]:
    return [sample for sample in samples if sample.miou is not None]


def _figure(name: str, title: str, plot: plotly.graph_objects.Figure, *, caption: str = "", **layout: Any) -> Figure:
    """Return Optuna's plot without its own title, size and colours of the page."""
    spec = json.loads(plot.to_json())
    kept = {key: value for key, value in spec["layout"].items() if key not in ("template", "title", "width")}
    data = [trace for trace in spec["data"] if trace.get("x")]
    return Figure(name=name, title=title, caption=caption, data=data, layout=kept | layout)


def _mark(trace: plotly.graph_objects.Scatter, samples: Sequence[Sample], colours: Any = None, **marker: Any) -> None:
    """Give the points of a trace, which are these trials, their symbol, colour and what they show on hover."""
    origins = [
        KNOWN_COLOUR if sample.is_known else DECLARED_COLOUR if sample.is_declared else SAMPLED_COLOUR
        for sample in samples
    ]
    marks = {"size": MARKER_SIZE, "symbol": [STATUS_SYMBOLS[sample.state.status] for sample in samples]}
    trace.marker = marks | {"color": colours or origins} | marker
    trace.text = [_describe(sample) for sample in samples]
    trace.hovertemplate = "%{text}<extra></extra>"


def _describe(sample: Sample) -> str:
    latency = "" if sample.state.latency_ms is None else f", {sample.state.latency_ms:.1f} ms"
    params = [f"{name} {format_param(value)}" for name, value in sample.spec.params.items()][:PARAMS_ON_HOVER]
    return "<br>".join([f"<b>{sample.trial}</b> {sample.miou:.2f} %{latency}, {sample.state.status}", *params])


def format_param(value: object) -> str:
    return "none" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def _miou_range(samples: Sequence[Sample]) -> tuple[float, float, str]:
    """Return the ends of an axis of mIoU, and how many trials are below it: a few far below must not press it flat.

    It begins one and a half times the distance of the quartiles below the lower one, as the whisker of a box plot.
    """
    mious = sorted(sample.miou or 0.0 for sample in samples)
    floor = mious[0]
    if len(mious) >= 4:
        lower, _, upper = statistics.quantiles(mious, n=4)
        floor = max(floor, lower - 1.5 * (upper - lower))
    room = 0.06 * (mious[-1] - floor) or 1.0
    below = sum(miou < floor - room for miou in mious)
    return floor - room, mious[-1] + room, f" {counted(below, 'trial')} below this range." if below else ""


def history(samples: Sequence[Sample]) -> Figure | None:
    """Return best mIoU by trial, the best so far, and the best declared row; None before any trial has an mIoU."""
    measured = _measured(samples)
    if not measured:
        return None
    plot = plot_optimization_history(_study(measured), target_name="best mIoU in %")
    points, best_so_far = plot.data[:2]
    _mark(points, [measured[index] for index in points.x])
    best_so_far.line = {"color": BASELINE_COLOUR, "width": 2, "shape": "hv"}
    for trace in (points, best_so_far):
        trace.x = [measured[index].number for index in trace.x]
    declared = best_sample(sample for sample in measured if sample.is_declared)
    if declared:
        text = f"best declared row, {declared.spec.run.name}: {declared.miou:.2f} %"
        line = {"color": DECLARED_COLOUR, "width": 1.5, "dash": "dash"}
        plot.add_hline(y=declared.miou, line=line, annotation_text=text, annotation_position="bottom right")
    low, high, below = _miou_range(measured)
    plot.update_yaxes(range=[low, high])
    title = "Best mIoU in % by trial of the study"
    return _figure("history", title, plot, caption=KEY + below, showlegend=False, height=420)


def slices(samples: Sequence[Sample]) -> list[Figure]:
    """Return a small plot for each parameter, all on one scale of mIoU; the warmer the colour, the later the trial."""
    measured = _measured(samples)
    if not measured:
        return []
    study = _study(measured)
    low, high, _ = _miou_range(measured)
    figures = []
    for index, name in enumerate(distributions_of(measured)):
        plot = plot_slice(study, params=[name], target_name="best mIoU in %")
        (points,) = plot.data[:1]
        shown = [measured[number] for number in points.marker.color]
        _mark(points, shown, [sample.number for sample in shown], coloraxis="coloraxis2")
        plot.update_yaxes(range=[low, high], title=None)
        plot.update_xaxes(title=None)
        last = max(sample.number for sample in measured)
        scale = {"cmin": 0, "cmax": max(last, 1), "showscale": False}
        margin = {"l": 32, "r": 8, "t": 8, "b": 30}
        few = f"{len(shown)} trials" if len(shown) < len(measured) else ""
        figures.append(_figure(f"slice-{index}", name, plot, caption=few, coloraxis2=scale, margin=margin, height=220))
    return figures


def pareto_front(samples: Sequence[Sample]) -> tuple[Table, Figure | None]:
    """Return the trials that no other beats in both latency and mIoU, the fastest first, and a plot of all.

    Only those of this search that completed: a latency belongs to the machine that it was measured on. Those measured
    on another device than the first of them are left out and named.
    """
    own = [sample for sample in samples if sample.is_complete and not sample.is_known]
    measured = [sample for sample in own if sample.state.latency_ms is not None]
    complete = [sample for sample in measured if sample.latency_device == measured[0].latency_device]
    others = [f"{one.trial} ({one.latency_device})" for one in measured if one not in complete]
    if not complete:
        return Table(text="No trial has completed with a latency yet, so there is no front."), None
    study = _study(complete, with_latency=True)
    plot = plot_pareto_front(study, target_names=["latency in ms", "best mIoU in %"])
    for trace, colour in zip(plot.data, (SAMPLED_COLOUR, FRONT_COLOUR), strict=False):
        _mark(trace, [complete[index] for index in trace.marker.color], colour)
    front = sorted((complete[trial.number] for trial in study.best_trials), key=lambda one: one.state.latency_ms or 0.0)
    table = Table(
        text="No other trial is both faster and better than these. Latency is that of one prediction at batch 1, on "
        "the machine that trained the trial."
        + (f" Left out, as not measured on {complete[0].latency_device}: {', '.join(others)}." if others else ""),
        lines=[
            {
                "trial": sample.trial,
                "best mIoU": f"{sample.miou:.2f}",
                "latency in ms": f"{sample.state.latency_ms:.2f}",
                "head width": str(sample.spec.run.head_width),
                "image size": format_size(sample.spec.run.image_size),
            }
            for sample in front
        ],
        numbers=("best mIoU", "latency in ms", "head width"),
    )
    caption = "To the upper left is better. Red: on the front."
    return table, _figure("front", "Best mIoU in % against latency in ms", plot, caption=caption, height=420)


def importances(samples: Sequence[Sample]) -> tuple[Table, Figure | None]:
    """Return which parameters mattered, over trials that completed, by Optuna's PED-ANOVA.

    It measures a parameter that only some trials have within those. Where a trial was stopped says more of the
    scheduler than of its parameters, so stopped trials do not count.
    """
    complete = [sample for sample in samples if sample.is_complete]
    if len(complete) < MIN_TRIALS:
        return Table(text=f"{len(complete)} of the {MIN_TRIALS} complete trials that importances need."), None
    if len({sample.miou for sample in complete}) == 1:
        return Table(text="All trials reached the same mIoU, so nothing made a difference."), None
    study = _study(complete)
    quantile = min(0.5, max(TOP_SHARE, MIN_TOP_TRIALS / len(complete)))
    evaluator = PedAnovaImportanceEvaluator(target_quantile=quantile)
    having = {name: sum(name in sample.spec.params for sample in complete) for name in distributions_of(complete)}
    shares = get_param_importances(study, evaluator=evaluator)
    table = Table(
        text=IMPORTANCE_CAUTION,
        lines=[
            {"parameter": name, "share": f"{100 * share:.0f} %", "trials": str(having[name])}
            for name, share in shares.items()
        ],
        numbers=("share", "trials"),
    )
    plot = plot_param_importances(study, evaluator=evaluator)
    plot.update_traces(marker_color=SAMPLED_COLOUR)
    plot.update_yaxes(title=None, automargin=True)
    caption = counted(len(complete), "complete trial") + "."
    title = "Shares of the differences in best mIoU"
    return table, _figure("importance", title, plot, caption=caption, height=120 + 34 * len(shares))


def parallel(samples: Sequence[Sample]) -> Figure | None:
    """Return a line for each trial across an axis for each parameter; None before any trial has an mIoU.

    Drawn as plain lines: Plotly's own `parcoords` shows nothing where a browser has no WebGL, and nothing on hover.
    """
    measured = sorted(_measured(samples), key=lambda sample: sample.miou or 0.0)  # so the best are drawn on top
    if not measured:
        return None
    best = MAX_LINES // 5
    many = len(measured) > MAX_LINES
    shown = [*thinned(measured[:-best], MAX_LINES - best), *measured[-best:]] if many else measured
    few = f" {len(shown)} of {len(measured)} trials: the best, and some of the others." if many else ""
    axes: dict[str, tuple[list[float], Ticks]] = {}
    for name, distribution in distributions_of(shown).items():
        params = [sample.spec.params for sample in shown]
        places = [_height(distribution, values[name]) if name in values else BELOW_AXIS for values in params]
        ticks = _ticks(distribution)
        axes[name] = places, [(BELOW_AXIS, NOT_APPLICABLE), *ticks] if BELOW_AXIS in places else ticks
    floor, top, _ = _miou_range(shown)
    mious = FloatDistribution(floor, top)
    qualities = [max(_height(mious, sample.miou), 0.0) for sample in shown]
    axes["best mIoU in %"] = qualities, _ticks(mious)
    heights = list(zip(*(heights for heights, _ in axes.values()), strict=True))
    data = [_line(sample, own, quality) for sample, own, quality in zip(shown, heights, qualities, strict=True)]
    layout = {
        "xaxis": {
            "tickvals": list(range(len(axes))),
            "ticktext": list(axes),
            "tickangle": -35 if len(axes) > FEW_AXES else 0,
            "side": "top",
            "range": [-0.15, len(axes) - 0.55],
            "automargin": True,
            "zeroline": False,
            "fixedrange": True,
        },
        "yaxis": {"range": [BELOW_AXIS - 0.06, 1.04], "visible": False, "fixedrange": True},
        "showlegend": False,
        "margin": {"l": 16, "r": 96, "t": 40, "b": 8},
        "height": 480,
    }
    return Figure(
        name="parallel",
        title="All parameters at once",
        caption="A line is a trial; the warmer and stronger, the higher its best mIoU, on the last axis. Point at a "
        f"line where it crosses an axis to follow it. {NOT_APPLICABLE}: the parameter does not apply.{few}",
        data=[*data, _tick_labels([ticks for _, ticks in axes.values()])],
        layout=layout,
        min_width=AXIS_WIDTH * len(axes),
    )


Ticks = list[tuple[float, str]]
"""Heights from bottom, 0, to top, 1, with their labels."""


def _height(distribution: BaseDistribution, value: Any) -> float:
    """Return where a value is on an axis, 0 to 1; logarithmic if its range is."""
    if isinstance(distribution, CategoricalDistribution):
        position, low, high = float(distribution.choices.index(value)), 0.0, len(distribution.choices) - 1.0
    else:
        assert isinstance(distribution, FloatDistribution)
        ends = (float(value or 0), distribution.low, distribution.high)
        position, low, high = map(math.log10, ends) if distribution.log else ends
    return round((position - low) / (high - low), 4) if low < high else 0.5


def _ticks(distribution: BaseDistribution) -> Ticks:
    """Return all choices, or the ends and the middle of a range."""
    if isinstance(distribution, CategoricalDistribution):
        values: list[Any] = list(distribution.choices)
    else:
        assert isinstance(distribution, FloatDistribution)
        low, high = distribution.low, distribution.high
        values = [low, math.sqrt(low * high) if distribution.log else (low + high) / 2, high]
    return [(_height(distribution, value), format_param(value)) for value in values]


def _line(sample: Sample, heights: Sequence[float], quality: float) -> Trace:
    position = quality * (len(COLD_TO_WARM) - 1)
    first = min(int(position), len(COLD_TO_WARM) - 2)
    ends = zip(bytes.fromhex(COLD_TO_WARM[first][1:]), bytes.fromhex(COLD_TO_WARM[first + 1][1:]), strict=True)
    colour = "#" + "".join(f"{round(a + (position - first) * (b - a)):02x}" for a, b in ends)
    return {
        "type": "scatter",
        "mode": "lines",
        "x": list(range(len(heights))),
        "y": list(heights),
        "line": {"color": colour, "width": 1.5 + quality},
        "opacity": round(FAINT + (1 - FAINT) * quality, 2),
        "text": [_describe(sample)] * len(heights),
        "hovertemplate": "%{text}<extra></extra>",
    }


def _tick_labels(axes: Sequence[Ticks]) -> Trace:
    """Return labels beside the axes, which Plotly knows as grid lines alone."""
    labels = [(index, height, text) for index, ticks in enumerate(axes) for height, text in ticks]
    return {
        "type": "scatter",
        "mode": "text",
        "x": [index for index, _, _ in labels],
        "y": [height for _, height, _ in labels],
        "text": [f" {text}" for _, _, text in labels],
        "textposition": "middle right",
        "textfont": {"size": 11, "shadow": "auto"},
        "hoverinfo": "skip",
    }
