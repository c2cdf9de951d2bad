"""A search on disk: the spaces and frames it is made of, the flags that start it, and what it leaves behind."""

import csv
import json
import shutil
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tune_bisenet.data.streets import Streets

_ROW = """
from tune_bisenet.config import SGD, Augment, CrossEntropy, Expect, Run, WarmupPoly
from tune_bisenet.spaces import Grid, Sampled


def row(name, lr, momentum=0.9, over=None):
    return Run(
        name=name,
        optimizer=SGD(lr=lr, momentum=momentum, weight_decay=1e-4),
        schedule=WarmupPoly(warmup_iterations=1, power=0.9),
        loss=CrossEntropy(aux_weight=1.0),
        accumulation=1,
        max_grad_norm=None,
        num_epochs={num_epochs},
        expect=Expect(gain=(0, 5), over=over) if over else None,
    )

"""

_SAMPLED = """
def sample(trial):
    plain = trial.suggest_categorical("plain", [True, False])
    momentum = 0.9 if plain else trial.suggest_float("momentum", 0.5, 0.95)
    return row("drawn", trial.suggest_float("lr", 1e-4, 0.1, log=True), momentum)


def point(run):
    return {"plain": True, "lr": run.optimizer.lr}


ROWS = Grid("two rows", (row("a", 0.01), row("b", 0.03, over="a")))
SPACE = Sampled("around two rows", sample, around=ROWS, point=point)
"""


def write_space(path: Path, rows: dict[str, float], *, num_epochs: int, baseline: str | None = None) -> None:
    """Write a space of plain SGD with one row for each name and rate."""
    calls = (f"row({name!r}, {lr}, over={None if name == baseline else baseline!r})," for name, lr in rows.items())
    grid = f"SPACE = Grid('rows of a test', ({' '.join(calls)}))\n"
    path.write_text(_ROW.replace("{num_epochs}", str(num_epochs)) + grid)


def write_sampled_space(path: Path, *, num_epochs: int) -> None:
    """Write a space around two rows, the baseline `a` and `b`, and beside it `rows.py` with the rows alone."""
    text = _ROW.replace("{num_epochs}", str(num_epochs)) + _SAMPLED
    path.write_text(text)
    path.with_name("rows.py").write_text(text + "SPACE = ROWS\n")


def write_frames(root: Path) -> None:
    """Write eight training and three validation frames of 32 x 64 pixels in Cityscapes layout."""
    source = Streets(num_train=8, num_val=3, frame_size=(32, 64))
    for split in ("train", "val"):
        for index, name in enumerate(source.names(split)):
            frame = source.load(split, index)
            images, labels = root / "leftImg8bit" / split / "town", root / "gtFine" / split / "town"
            images.mkdir(parents=True, exist_ok=True)
            labels.mkdir(parents=True, exist_ok=True)
            Image.fromarray(frame.image).save(images / f"{name}_leftImg8bit.png")
            Image.fromarray(frame.label).save(labels / f"{name}_gtFine_labelTrainIds.png")


def make_place() -> Iterator[Path]:
    """Make a folder with frames, removed afterwards: a trial leaves 200 MB. Ray's sockets demand its short name."""
    place = Path(tempfile.mkdtemp(prefix="tb-"))
    write_frames(place / "frames")
    yield place
    shutil.rmtree(place, ignore_errors=True)


def move_into(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the test itself be the driver: work and pack in `place`, without data in the environment or a network."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    monkeypatch.setenv("TUNE_BISENET_CACHE", str(place / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    for name in ("http_proxy", "https_proxy"):  # no process listens at this port
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1,0.0.0.0,localhost")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which Python makes once, with the proxies of the moment


def on_frames(place: Path, space: str = "space.py") -> list[str]:
    """Return the flags of a search in `place`."""
    data = ["--data", str(place / "frames"), "--backbone", "none"]
    return ["--space", str(place / space), *data, "--storage", str(place)]


# --- what it leaves behind --------------------------------------------------------------------------------------------


def leaderboard(folder: Path) -> list[dict[str, str]]:
    """Return the rows of leaderboard.csv; none before it is there."""
    path = folder / "leaderboard.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def results(folder: Path) -> list[dict[str, str]]:
    """Return the leaderboard without its times."""
    return [{column: value for column, value in row.items() if column != "seconds"} for row in leaderboard(folder)]


def statuses(folder: Path) -> dict[str, str]:
    """Return the status of each trial by the leaderboard."""
    return {row["trial"]: row["status"] for row in leaderboard(folder)}


def epochs(folder: Path) -> list[dict[str, Any]]:
    """Return the epochs in a trial's folder; none before the first."""
    path = folder / "trial.json"
    return json.loads(path.read_text())["epochs"] if path.exists() else []


def epoch_numbers(folder: Path) -> list[int]:
    return [epoch["epoch"] for epoch in epochs(folder)]
