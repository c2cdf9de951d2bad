"""The same validation frames side by side: image, label, and what the baseline and the best rows made of them.

Pictures are data URIs of bounded size, in the Cityscapes colours.
"""

import base64
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tune_bisenet.data.classes import CLASSES, VOID, palette
from tune_bisenet.records import BestPredictions
from tune_bisenet.report.leaderboard import best_first
from tune_bisenet.report.read import SearchRecord, read_best

NUM_FRAMES: Final = 4
NUM_BEST: Final = 3
WIDTH: Final = 512
"""Pixels at most: four frames of six pictures then stay well under 2 MB."""
PHOTO_QUALITY: Final = 80


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One picture, with what is written below it. `uri` holds all of it."""

    title: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """Frames by name, each with its panels. `notes` says which trials' pictures could not be read."""

    frames: tuple[tuple[str, tuple[Panel, ...]], ...]
    notes: tuple[str, ...]


LEGEND: Final = (*((one.name, "#{:02x}{:02x}{:02x}".format(*one.colour)) for one in CLASSES), ("not scored", "#000000"))
"""Names and colours, by trainId."""


def gallery(search: SearchRecord) -> Gallery:
    """Of the frames that were kept, a few; each row by its best trial."""
    shown: dict[str, BestPredictions] = {}
    notes = []
    for title, trial in _chosen(search).items():
        try:
            shown[title] = read_best(search.trials[trial].folder)
        except ValueError as error:
            notes.append(f"{trial}: {error}")
    names = next(iter(shown.values())).names[:NUM_FRAMES] if shown else ()
    return Gallery(frames=tuple((name, _panels(name, shown)) for name in names), notes=tuple(notes))


def _chosen(search: SearchRecord) -> dict[str, str]:
    """Title and trial: the baseline first, then the best of the other rows."""
    best_trials: dict[str, str] = {}
    for standing in best_first(search.standings):
        if search.trials[standing.trial].confusions is not None:
            best_trials.setdefault(standing.run, standing.trial)
    others = [run for run in best_trials if run != search.baseline][:NUM_BEST]
    bar = [search.baseline] if search.baseline in best_trials else []
    return {_title(search, best_trials[run]): best_trials[run] for run in [*bar, *others]}


def _title(search: SearchRecord, trial: str) -> str:
    standing = search.trials[trial].standing
    role = ", baseline" if standing.run == search.baseline else ""
    return f"{trial}{role}: {standing.best_miou or 0:.1f} % mIoU"


def _panels(name: str, shown: dict[str, BestPredictions]) -> tuple[Panel, ...]:
    """Image and label, then each trial's prediction of it, black where the label is void."""
    holders = {title: (best, best.names.index(name)) for title, best in shown.items() if name in best.names}
    first, index = next(iter(holders.values()))
    image, label = first.images[index], first.labels[index]
    size = _size(*image.shape[1:])
    panels = [_photo(image, size), _map("label", label, size)]
    for title, (best, place) in holders.items():
        prediction = best.predictions[place]
        scored = np.where(_resized(label, prediction.shape[::-1]) == VOID, np.uint8(VOID), prediction)
        panels.append(_map(title, scored, size))
    return tuple(panels)


def _size(height: int, width: int) -> tuple[int, int]:
    """Width and height of a picture that is no wider than WIDTH."""
    shrink = min(1.0, WIDTH / width)
    return math.ceil(width * shrink), math.ceil(height * shrink)


def _photo(image: NDArray[np.uint8], size: tuple[int, int]) -> Panel:
    """`image` is 3 x H x W."""
    picture = Image.fromarray(image.transpose(1, 2, 0)).resize(size, Image.Resampling.BOX)
    return _panel("image", picture, "webp", quality=PHOTO_QUALITY)


def _map(title: str, train_ids: NDArray[np.uint8], size: tuple[int, int]) -> Panel:
    """As a PNG with a palette: classes have few colours and sharp edges."""
    picture = Image.fromarray(_resized(train_ids, size))
    picture.putpalette(palette().tobytes())
    return _panel(title, picture, "png", optimize=True)


def _resized(train_ids: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """To width and height, without mixing classes."""
    width, height = size
    return np.asarray(Image.fromarray(train_ids).resize((width, height), Image.Resampling.NEAREST))


def _panel(title: str, picture: Image.Image, kind: str, **options: int) -> Panel:
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    uri = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Panel(title=title, uri=uri, width=picture.width, height=picture.height)
