"""A place to search in, a driver to kill, and what it left: for the tests that start whole searches."""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import pytest
from PIL import Image

from tune_bisenet.data.streets import Streets

PROJECT = Path(__file__).parent.parent

PATIENCE_SECONDS = 400.0
"""How long a test waits for what must happen: a busy machine takes its time, and nothing is timed here."""

SPACE = """
from tune_bisenet.config import SGD, Augment, CrossEntropy, Expect, Run, WarmupPoly
from tune_bisenet.spaces import Grid


def row(name, lr, over=None):
    return Run(
        name=name,
        optimizer=SGD(lr=lr, momentum=0.9, weight_decay=1e-4),
        schedule=WarmupPoly(warmup_iterations=1, power=0.9),
        loss=CrossEntropy(aux_weight=1.0),
        accumulation=1,
        max_grad_norm=None,
        num_epochs={num_epochs},
        expect=Expect(gain=(0, 5), over=over) if over else None,
    )


SPACE = Grid("rows of a test", ({rows}))
"""


SAMPLED_SPACE = """
from tune_bisenet.config import SGD, CrossEntropy, Expect, Run, WarmupPoly
from tune_bisenet.spaces import Grid, Sampled


def row(name, lr, momentum=0.9, expect=None):
    return Run(
        name=name,
        optimizer=SGD(lr=lr, momentum=momentum, weight_decay=1e-4),
        schedule=WarmupPoly(warmup_iterations=1, power=0.9),
        loss=CrossEntropy(aux_weight=1.0),
        accumulation=1,
        max_grad_norm=None,
        num_epochs={num_epochs},
        expect=expect,
    )


def sample(trial):
    plain = trial.suggest_categorical("plain", [True, False])
    momentum = 0.9 if plain else trial.suggest_float("momentum", 0.5, 0.95)
    return row("drawn", trial.suggest_float("lr", 1e-4, 0.1, log=True), momentum)


def point(run):
    return {"plain": True, "lr": run.optimizer.lr}


ROWS = Grid("two rows", (row("a", 0.01), row("b", 0.03, expect=Expect(gain=(0, 5), over="a"))))
SPACE = Sampled("around two rows", sample, around=ROWS, point=point)
"""


# --- a place to search in -------------------------------------------------------------------------------------------


def write_space(path: Path, rows: dict[str, float], *, num_epochs: int, baseline: str | None = None) -> None:
    """A space of plain SGD, one row for each name and rate."""
    calls = (f"row({name!r}, {lr}, {None if name == baseline else baseline!r})," for name, lr in rows.items())
    path.write_text(SPACE.replace("{num_epochs}", str(num_epochs)).replace("{rows}", " ".join(calls)))


def write_sampled_space(path: Path, *, num_epochs: int) -> None:
    """Rates and momentums around two rows, `a`, the baseline, and `b`; beside it `rows.py` with the rows alone."""
    text = SAMPLED_SPACE.replace("{num_epochs}", str(num_epochs))
    path.write_text(text)
    path.with_name("rows.py").write_text(text + "SPACE = ROWS\n")


def write_frames(root: Path) -> None:
    """Eight training and three validation frames in Cityscapes layout."""
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
    """A folder with frames in it, removed afterwards: a trial leaves 200 MB. Ray's sockets demand its short name."""
    place = Path(tempfile.mkdtemp(prefix="tb-"))
    write_frames(place / "frames")
    yield place
    shutil.rmtree(place, ignore_errors=True)


def move_into(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the test itself is the driver: work and keep whatever is packed there, know of no data and no network."""
    monkeypatch.chdir(place)
    monkeypatch.delenv("CITYSCAPES_DATASET", raising=False)
    monkeypatch.setenv("TUNE_BISENET_CACHE", str(place / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(place / "torch"))
    for name in ("http_proxy", "https_proxy"):  # nothing is fetched from anywhere: nobody hears at this port
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("no_proxy", "127.0.0.1,0.0.0.0,localhost")
    monkeypatch.setattr(urllib.request, "_opener", None)  # which Python makes once, with the proxies of the moment


def environment(place: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "TUNE_", "CITYSCAPES"))}
    return kept | {"TUNE_BISENET_CACHE": str(place / "cache"), "RAY_TMPDIR": str(place)}


def on_frames(place: Path, space: str = "space.py") -> list[str]:
    """The flags of a search in `place`."""
    here = ["--space", str(place / space), "--data", str(place / "frames"), "--backbone", "none"]
    return [*here, "--storage", str(place)]


# --- a driver -------------------------------------------------------------------------------------------------------


class Driver:
    """`python -m tune_bisenet.run`, with all that Ray starts for it in one session; nothing of it is left behind."""

    def __init__(self, place: Path, *flags: str, cwd: Path = PROJECT, variables: dict[str, str] | None = None) -> None:
        self._log = place / f"{time.time_ns()}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "tune_bisenet.run", *flags],
                cwd=cwd,
                env=environment(place) | {"PYTHONPATH": str(PROJECT)} | (variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        deadline = time.monotonic() + 120
        while self.kill() and time.monotonic() < deadline:
            time.sleep(0.1)
        self.process.wait(timeout=120)
        if error is not None:
            print(self.log)  # noqa: T201 - pytest shows it with the failure

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def until(self, condition: Callable[[], bool], *, seconds: float = PATIENCE_SECONDS) -> None:
        """Wait for `condition` while the driver runs."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None, f"the driver ended with {self.process.returncode} too early"
            assert time.monotonic() < deadline, f"nothing happened for {seconds} s"
            time.sleep(0.02)

    def end(self, *, seconds: float = PATIENCE_SECONDS) -> int:
        """Wait for the driver's own end; its exit code."""
        return self.process.wait(timeout=seconds)

    def assert_nothing_lives_on(self) -> None:
        """After the driver's end: what it has ended may take a moment to be gone."""
        deadline = time.monotonic() + 60
        while left := self.processes():
            assert time.monotonic() < deadline, f"still there: {left}"
            time.sleep(0.1)

    def processes(self) -> dict[int, str]:
        """The title of every process of the session, by id; the driver is among them. Zombies are not."""
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                stat = (folder / "stat").read_text(errors="replace")  # a name of 15 bytes may end within a letter
                state, _parent, _group, session = stat.rpartition(")")[2].split()[:4]
                title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(session) == self.process.pid and state != "Z":
                found[int(folder.name)] = title
        return found

    def trainers(self) -> list[int]:
        """The processes that train."""
        return [pid for pid, title in self.processes().items() if title.startswith("ray::ImplicitFunc")]

    def raylet(self) -> int:
        return next(pid for pid, title in self.processes().items() if "/raylet/raylet " in title)

    def kill(self) -> int:
        """SIGKILL for whatever is left; how many that were."""
        left = self.processes()
        for pid in left:
            end_process(pid, signal.SIGKILL)
        return len(left)


def end_process(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):  # it may have ended by itself in the meantime
        os.kill(pid, number)


# --- what it left ---------------------------------------------------------------------------------------------------


def leaderboard(folder: Path) -> list[dict[str, str]]:
    """The rows of leaderboard.csv; none before it is there."""
    path = folder / "leaderboard.csv"
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def results(folder: Path) -> list[dict[str, str]]:
    """The same without what differs from one machine's hour to the next."""
    return [{column: value for column, value in row.items() if column != "seconds"} for row in leaderboard(folder)]


def statuses(folder: Path) -> dict[str, str]:
    return {row["trial"]: row["status"] for row in leaderboard(folder)}


def epochs(folder: Path) -> list[dict[str, Any]]:
    """What a trial's folder says of its epochs; none before the first."""
    path = folder / "epochs.json"
    return json.loads(path.read_text()) if path.exists() else []


def epoch_numbers(folder: Path) -> list[int]:
    return [epoch["epoch"] for epoch in epochs(folder)]
