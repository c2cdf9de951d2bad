"""The plots and pictures of the page: curves, intervals, heat maps, and the same frames side by side.

Plots are the plain dicts that Plotly's JavaScript takes. A row keeps its colour through all plots; its seeds are a line
at their mean within a band from the lowest to the highest. The colours of text, grid and colour scales are the page's,
which knows whether it is light or dark. Pictures are data URIs of bounded size, in the colours of the classes.
"""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tune_bisenet.classes import VOID, ClassSet
from tune_bisenet.records import BestPredictions
from tune_bisenet.report.claims import Claim, Kind
from tune_bisenet.report.leaderboard import best_first
from tune_bisenet.report.read import SearchRecord, read_best
from tune_bisenet.report.tables import Table, mean_class_iou, shown_rows
from tune_bisenet.report.verdicts import Judgement
from tune_bisenet.text import counted

BASELINE_COLOUR: Final = "#7d8590"
COLOURS: Final = (
    "#3b7dd8", "#e8833a", "#3f9e5a", "#d1495b", "#9467bd", "#17a2a2", "#c79a1e", "#e377c2", "#8c6d4f", "#7aa52a",
)  # fmt: skip
"""Told apart on white and on near-black."""

OTHERS: Final = "all others"
OTHERS_COLOUR: Final = "#9aa3ad"
OTHERS_OPACITY: Final = 0.35
BAND_OPACITY: Final = 0.14
SIGNIFICANT_DIGITS: Final = 5
HEATMAP_MIN_WIDTH: Final = 860
MAX_LINES: Final = 200
"""More lines in one plot are no picture, and slow in a browser."""

NUM_FRAMES: Final = 4
NUM_PICTURED: Final = 3
PICTURE_WIDTH: Final = 512
"""Pixels at most: four frames of six pictures then stay well under 2 MB."""
PHOTO_QUALITY: Final = 80

Trace = dict[str, Any]
Item = TypeVar("Item")


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One plot. `name` is its id on the page; narrower than `min_width` pixels it scrolls instead of shrinking."""

    name: str
    title: str
    caption: str = ""
    data: list[Trace]
    layout: dict[str, Any]
    min_width: int = 0


@dataclass(frozen=True, kw_only=True)
class Plots:
    """Plots in a grid of this CSS class, with a button for each of `colours` that hides and shows its lines."""

    text: str
    figures: Sequence[Figure]
    style: str
    colours: Mapping[str, str]


@dataclass(frozen=True)
class PythonSource:
    """Python source to copy."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture, with what is written below it. `uri` holds all of it."""

    title: str
    uri: str
    width: int
    height: int


Gallery = Mapping[str, Sequence[Panel]]
"""Frames by name, each with its panels."""

Block = str | Table | PythonSource | Plots | Gallery


@dataclass(frozen=True)
class Section:
    """A heading, its id on the page, and what follows; Markdown has it without plots and pictures."""

    name: str
    title: str
    blocks: Sequence[Block]


def plots(*figures: Figure | None, text: str = "", style: str = "", colours: Mapping[str, str] | None = None) -> Plots:
    return Plots(text=text, figures=[figure for figure in figures if figure], style=style, colours=colours or {})


def row_colours(search: SearchRecord) -> dict[str, str]:
    """Return colours by row; the baseline is grey. Rows that do not stand out share an entry, OTHERS."""
    shown = shown_rows(search)
    others = [name for name in shown if name != search.baseline]
    colours = {name: COLOURS[number % len(COLOURS)] for number, name in enumerate(others)}
    rest = {} if len(shown) == len(search.rows) else {OTHERS: OTHERS_COLOUR}
    return {name: colours.get(name, BASELINE_COLOUR) for name in shown} | rest


def short(value: float) -> float:
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")


def thinned(items: Sequence[Item], most: int) -> list[Item]:
    """Return at most `most` items, evenly spread, the last one among them."""
    count = len(items)
    if count <= most:
        return list(items)
    return [items[count - 1 - index * count // most] for index in range(most)][::-1]


QUANTITIES: Final = {
    "miou": "mIoU in % on the validation images",
    "gain": "mIoU less that of the baseline, in points at the same seed and epoch",
    "loss": "Loss, total",
    "loss_main": "Loss of the main head",
    "loss_aux1": "Loss of auxiliary head 1",
    "loss_aux2": "Loss of auxiliary head 2",
    "lr": "Learning rate at the epoch's end",
    "grad_norm": "Gradient norm before clipping, L2, mean over the epoch",
}


def curves(search: SearchRecord) -> list[Figure]:
    """Return a plot for each quantity that has values; none before an epoch has ended."""
    epochs = [(trial.run, epoch) for trial in search.trials.values() for epoch in trial.epochs]
    bars = {(run.seed, epoch.epoch): epoch.miou for run, epoch in epochs if run.name == search.baseline}
    figures = []
    for name in QUANTITIES:
        values: dict[str, dict[int, list[float]]] = {}  # by row and epoch, of all seeds
        for run, epoch in epochs:
            if name != "gain":
                value = getattr(epoch, name)
            elif run.name != search.baseline:
                value = epoch.miou - bars.get((run.seed, epoch.epoch), math.nan)
            else:
                continue
            if math.isfinite(value):
                values.setdefault(run.name, {}).setdefault(epoch.epoch, []).append(value)
        if values:
            figures.append(_curve(name, values, search))
    return figures


def _curve(name: str, values: Mapping[str, Mapping[int, Sequence[float]]], search: SearchRecord) -> Figure:
    colours = row_colours(search)
    muted, above = ([row for row in values if (row in colours) is shown] for shown in (False, True))
    below = thinned(muted, MAX_LINES)
    data = []
    for row in below:
        *_, line = _row_traces(row, values[row], colour=OTHERS_COLOUR, width=1)
        data.append(line | {"meta": OTHERS, "opacity": OTHERS_OPACITY})
    for row in above:
        is_baseline = row == search.baseline
        dash = "dot" if is_baseline else "solid"
        data += _row_traces(row, values[row], colour=colours[row], width=3 if is_baseline else 2, dash=dash)
    few = f"Of the {len(muted)} that do not stand out, {len(below)} are drawn." if len(below) < len(muted) else ""
    y_axis = {"type": "log", "dtick": "D2"} if name == "grad_norm" else {"type": "linear"}
    layout = {
        "xaxis": {"title": {"text": "epoch"}, "rangemode": "tozero"},
        "yaxis": y_axis | {"automargin": True},
        "showlegend": False,
    }
    return Figure(name=name, title=QUANTITIES[name], caption=few, data=data, layout=layout)


def _row_traces(
    name: str, values: Mapping[int, Sequence[float]], *, colour: str, width: int, dash: str = "solid"
) -> list[Trace]:
    """Return the band, if there are several seeds, below the line. By `meta`, the row, the page hides and shows it."""
    values = dict(sorted(values.items()))
    epochs = list(values)
    lows, highs = ([short(bound(by_seed)) for by_seed in values.values()] for bound in (min, max))
    line = {
        "type": "scatter",
        "mode": "lines" if len(epochs) > 1 else "markers",
        "name": name,
        "meta": name,
        "x": epochs,
        "y": [short(sum(by_seed) / len(by_seed)) for by_seed in values.values()],
        "customdata": [
            [low, high, counted(len(by_seed), "seed")]
            for low, high, by_seed in zip(lows, highs, values.values(), strict=True)
        ],
        "hovertemplate": f"<b>{name}</b> epoch %{{x}}: %{{y}}<br>%{{customdata[0]}} to %{{customdata[1]}}, "
        "%{customdata[2]}<extra></extra>",
        "line": {"color": colour, "width": width, "dash": dash},
    }
    if lows == highs:
        return [line]
    red, green, blue = bytes.fromhex(colour[1:])
    band = {
        "type": "scatter",
        "mode": "lines",
        "name": f"{name}, lowest to highest seed",
        "meta": name,
        "x": epochs + epochs[::-1],
        "y": highs + lows[::-1],
        "fill": "toself",
        "fillcolor": f"rgba({red},{green},{blue},{BAND_OPACITY})",
        "line": {"width": 0},
        "hoverinfo": "skip",
    }
    return [band, line]


AXIS_TITLES: Final[dict[Kind, str]] = {
    "gain": "Gain in percentage points",
    "miou": "mIoU in %",
    "sooner": "Epochs saved",
}


def intervals(judgement: Judgement) -> list[Figure]:
    """Return a plot for each kind of claim: estimate with its interval, over the expected range."""
    figures = []
    for kind, title in AXIS_TITLES.items():
        claims = [claim for claim in judgement.claims if claim.kind == kind and claim.estimate is not None][::-1]
        if claims:
            layout = {
                "xaxis": {"range": _extent(claims), "automargin": True, "zeroline": kind != "miou"},
                "yaxis": {"type": "category", "automargin": True, "showgrid": False},
                "showlegend": False,
                "height": 110 + 32 * len(claims),
            }
            ends = [(claim.estimate or 0.0, *(claim.interval or (claim.estimate or 0.0,) * 2)) for claim in claims]
            estimates = {
                "type": "scatter",
                "mode": "markers",
                "x": [claim.estimate for claim in claims],
                "y": [_axis_label(claim) for claim in claims],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - estimate for estimate, _low, high in ends],
                    "arrayminus": [estimate - low for estimate, low, _high in ends],
                },
                "text": [f"{_axis_label(claim)}: {claim.verdict}" for claim in claims],
                "hovertemplate": "%{text}, %{x:.2f}<extra></extra>",
                "marker": {"color": BASELINE_COLOUR, "size": 9},
            }
            data = [*map(_expected_trace, claims), estimates]
            figures.append(Figure(name=f"intervals-{kind}", title=title, data=data, layout=layout))
    return figures


def _extent(claims: Sequence[Claim]) -> list[float]:
    """Return an axis over all that is expected or estimated, and of the intervals as much again to both sides.

    An interval from two seeds can be ten times as wide as everything else; it must not press the rest into a point.
    """
    anchors = [value for claim in claims for value in (*(claim.expected or ()), claim.estimate) if value is not None]
    anchors += [0.0] if claims[0].kind != "miou" else []
    ends = [end for claim in claims for end in claim.interval or ()]
    low, high = min(anchors), max(anchors)
    room = max(high - low, 0.5)
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = max(0.04 * (high - low), 0.05)
    return [low - margin, high + margin]


def _axis_label(claim: Claim) -> str:
    return f"{claim.run}, {claim.measure}" if claim.classes else claim.run


def _expected_trace(claim: Claim) -> Trace:
    ends = claim.expected or ()
    line = {"color": COLOURS[0], "width": 14}
    trace = {"type": "scatter", "mode": "lines", "x": list(ends), "y": [_axis_label(claim)] * len(ends), "line": line}
    return trace | {"opacity": 0.35, "hoverinfo": "skip"}


def iou_heatmap(search: SearchRecord) -> Figure | None:
    """Return each row's IoU by class less the baseline's, in points; None without both."""
    shown = shown_rows(search)
    ious = {row: values for row, values in mean_class_iou(search).items() if row in shown}
    bar = ious.pop(search.baseline, None) if search.baseline else None
    if bar is None or not ious:
        return None
    differences = [
        [None if value is None or base is None else short(value - base) for value, base in zip(row, bar, strict=True)]
        for row in ious.values()
    ]
    most = max((abs(value) for row in differences for value in row if value is not None), default=0.0)
    bound = max(short(most), 0.1)
    return _heat_figure(
        name="iou",
        title=f"IoU by class, less that of {search.baseline}",
        caption="Percentage points at the trials' best epochs, mean over seeds. The IoU itself shows on hover, and is "
        "in tables/iou.csv.",
        unit="points",
        scale={"cmin": -bound, "cmax": bound, "cmid": 0},
        height=140 + 34 * len(ious),
        x=search.classes.names,
        y=list(ious),
        z=differences,
        text=[["" if value is None else f"{value:+z.1f}" for value in row] for row in differences],
        customdata=[list(zip(map(_format_iou, row), map(_format_iou, bar), strict=True)) for row in ious.values()],
        hovertemplate=f"<b>%{{y}}</b> %{{x}}: %{{customdata[0]}}<br>{search.baseline}: %{{customdata[1]}}, "
        "%{text} points<extra></extra>",
    )


def _format_iou(iou: float | None) -> str:
    return "does not occur" if iou is None else f"{iou:.1f} %"


def confusion_matrix(search: SearchRecord) -> Figure | None:
    """Return where the pixels of each class went, in percent, of the best trial whose counts are kept."""
    for best in best_first(search.states):
        confusions = search.trials[best.trial].confusions
        if confusions is not None:
            break
    else:
        return None
    counts = confusions.sum(axis=0, dtype=np.int64)  # C x C
    totals = counts.sum(axis=1, keepdims=True)
    percent = np.divide(100.0 * counts, totals, out=np.full(counts.shape, np.nan), where=totals > 0)
    shares = [[short(value) if math.isfinite(value) else None for value in row] for row in percent.tolist()]
    return _heat_figure(
        name="confusion",
        title=f"Confusion matrix of the best trial, {best.trial}: labels by rows, predictions by columns",
        caption=f"Each line is 100 % of a class's labelled pixels, over {len(confusions)} validation images at epoch "
        f"{best.best_epoch}; shares under 1 % are left blank.",
        unit="%",
        scale={"cmin": 0, "cmax": 100},
        height=720,
        x=search.classes.names,
        y=search.classes.names,
        z=shares,
        text=[["" if value is None or value < 1 else f"{value:.0f}" for value in row] for row in shares],
        customdata=counts.tolist(),
        hovertemplate="%{z:.2f} % of <b>%{y}</b><br>taken for <b>%{x}</b>, %{customdata:,} pixels<extra></extra>",
    )


def _heat_figure(
    *, name: str, title: str, caption: str, unit: str, scale: Mapping[str, float], height: int, **trace: Any
) -> Figure:
    """Return a map with a column for each class."""
    style = {"texttemplate": "%{text}", "textfont": {"size": 10}, "coloraxis": "coloraxis", "xgap": 1, "ygap": 1}
    layout = {
        "xaxis": {"tickangle": -45, "showgrid": False, "automargin": True},
        "yaxis": {"autorange": "reversed", "showgrid": False, "automargin": True, "type": "category"},
        "coloraxis": {**scale, "colorbar": {"title": {"text": unit}, "thickness": 12, "outlinewidth": 0}},
        "height": height,
    }
    data = [{"type": "heatmap", **style, **trace}]
    return Figure(name=name, title=title, caption=caption, data=data, layout=layout, min_width=HEATMAP_MIN_WIDTH)


def legend(classes: ClassSet) -> list[tuple[str, str]]:
    """Return names and colours by trainId, and those of void."""
    colours = ("#{:02x}{:02x}{:02x}".format(*colour) for colour in classes.colours)
    return [*zip(classes.names, colours, strict=True), ("not scored", "#000000")]


def gallery(search: SearchRecord) -> tuple[Gallery, list[str]]:
    """Return a few of the frames that were kept, by the baseline and the best of the other rows; and notes."""
    best_trials: dict[str, str] = {}
    for state in best_first(search.states):
        if search.trials[state.trial].confusions is not None:
            best_trials.setdefault(state.run, state.trial)
    baseline = best_trials.pop(search.baseline or "", None)
    others = list(best_trials.values())[:NUM_PICTURED]
    shown: dict[str, BestPredictions] = {}
    notes = []
    for trial in [*([baseline] if baseline else []), *others]:
        role = ", baseline" if trial == baseline else ""
        try:
            title = f"{trial}{role}: {search.trials[trial].state.best_miou or 0:.1f} % mIoU"
            shown[title] = read_best(search.folder / trial)
        except ValueError as error:
            notes.append(f"{trial}: {error}")
    names = next(iter(shown.values())).names[:NUM_FRAMES] if shown else ()
    return {name: _panels(name, shown, search.classes) for name in names}, notes


def _panels(name: str, shown: Mapping[str, BestPredictions], classes: ClassSet) -> list[Panel]:
    """Return image and label, then each trial's prediction of it, black where the label is void."""
    holders = {title: (best, best.names.index(name)) for title, best in shown.items() if name in best.names}
    first, index = next(iter(holders.values()))
    image, label = first.images[index], first.labels[index]  # 3 x H x W, h x w
    height, width = image.shape[1:]
    shrink = min(1.0, PICTURE_WIDTH / width)
    size = math.ceil(width * shrink), math.ceil(height * shrink)
    photo = Image.fromarray(image.transpose(1, 2, 0)).resize(size, Image.Resampling.BOX)
    panels = [_panel("image", photo, "webp", quality=PHOTO_QUALITY), _class_map("label", label, size, classes)]
    for title, (best, place) in holders.items():
        prediction = best.predictions[place]
        scored = np.where(_resized(label, prediction.shape[::-1]) == VOID, np.uint8(VOID), prediction)
        panels.append(_class_map(title, scored, size, classes))
    return panels


def _class_map(title: str, train_ids: NDArray[np.uint8], size: Sequence[int], classes: ClassSet) -> Panel:
    """Draw a PNG with a palette: classes have few colours and sharp edges."""
    picture = Image.fromarray(_resized(train_ids, size))
    picture.putpalette(classes.palette().tobytes())
    return _panel(title, picture, "png", optimize=True)


def _resized(train_ids: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """Resize to width and height, without mixing classes."""
    width, height = size
    return np.asarray(Image.fromarray(train_ids).resize((width, height), Image.Resampling.NEAREST))


def _panel(title: str, picture: Image.Image, kind: str, **options: int) -> Panel:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Panel(title=title, uri=uri, width=picture.width, height=picture.height)
