"""Which state of the project this is: its git commit, here or where a job was sent from."""

import io
import json
import math
import os
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.config import Run
from tune_bisenet.storage import Storage

SEARCH: Final = "search.json"
"""How a search was made; in its folder."""
TRIALS: Final = "trials.json"
"""How its trials stand, and what the scheduler saw; in its folder."""
EPOCHS: Final = "epochs.json"
"""The measurements of every epoch; in a trial's folder."""
STUDY: Final = "study.db"
"""The Optuna study of a sampled search, in SQLite; in the search's folder."""
ENDED: Final = "ended.json"
"""How a trial ended; in its folder, once it has."""
LAST: Final = "last.pt"
"""What a trial goes on from; in its folder until it has ended, as is the following."""
PREVIOUS: Final = "previous.pt"
"""The same of the epoch before, should that one be damaged."""
BEST_WEIGHTS: Final = "best.pt"
"""The weights of a trial's best epoch; in its folder."""
LATENCY: Final = "latency.json"
"""How long a prediction takes, where that is a goal; in a trial's folder."""

Status = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
"""`stopped` means by the scheduler; `diverged` means the loss stopped being a number; `failed` means by an error."""

ENDED_WELL: frozenset[Status] = frozenset({"finished", "stopped", "diverged"})


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The measurements of one epoch; `epoch` counts from 1. Losses and gradient norm are means over the epoch."""

    epoch: int
    iterations: int
    """Iterations (micro-batches) since the run began."""
    loss: float
    loss_main: float
    loss_aux1: float
    loss_aux2: float
    lr: float
    """The rate of the epoch's last iteration."""
    grad_norm: float
    """L2 norm over all parameters, before clipping."""
    miou: float
    iou: tuple[float | None, ...]
    """By trainId; None for a class that occurs neither in the labels nor in the predictions."""
    pixel_accuracy: float
    images_per_second: float
    """Training only, validation left out."""
    train_seconds: float
    val_seconds: float

    @property
    def seconds(self) -> float:
        return self.train_seconds + self.val_seconds

    @property
    def diverged(self) -> bool:
        """The loss, or a gradient, is no longer a number."""
        return not (math.isfinite(self.loss) and math.isfinite(self.grad_norm))

    def to_json(self) -> dict[str, Any]:
        """A dict that strict JSON can hold: NaN and infinities become None."""
        return {key: _finite_or_none(value) for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        numbers = {key: math.nan if value is None else value for key, value in record.items()}
        return cls(**(numbers | {"iou": tuple(record["iou"])}))


def best_of(history: Sequence[Epoch]) -> Epoch:
    """The epoch of highest mIoU that did not diverge, the earliest of equals; the first if all diverged."""
    return max(history, key=lambda epoch: (not epoch.diverged, epoch.miou, -epoch.epoch))


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """Where one trial stands: a row of the leaderboard. `trial` is unique in a search, `run` is the row's name."""

    trial: str
    run: str
    seed: int
    status: Status = "waiting"
    stopped_by: str = ""
    """Who or what ended it before its last epoch, in words; empty for a run that went to its end."""
    epochs: int = 0
    num_epochs: int
    best_miou: float | None = None
    best_epoch: int | None = None
    last_miou: float | None = None
    pixel_accuracy: float | None = None
    seconds: float = 0.0
    latency_ms: float | None = None
    """Milliseconds of one prediction at batch 1; None unless the search has latency for a goal."""
    error: str = ""

    def to_json(self) -> dict[str, Any]:
        return dict(vars(self))

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        known = {field.name for field in fields(cls)}
        return cls(**{key: value for key, value in record.items() if key in known})


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


RUN: Final = "run.json"
"""What a trial of a sampled search trains; in the trial's folder, written before it starts."""
KNOWN: Final = "known.json"
"""Trials of earlier searches that the study began with; in the search's folder, if there are any."""

Param = float | int | bool | str | None
Origin = Literal["row", "sampled", "confirm"]
"""A declared row, a point the sampler chose, or a fresh seed of either that the study is not told of."""


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """A run, and the point of the space that it stands for."""

    trial: str
    run: Run
    origin: Origin
    number: int | None
    """Of the study's trial; None for one that the study is not told of."""
    params: dict[str, Param]
    """By name, as the space's `sample` was given them; empty where the study is not told."""
    distributions: dict[str, str]
    """The range of each parameter, in Optuna's JSON."""
    row: Run | None = None
    """What a space file would say of it, on the rows' own scale; None where the study is not told."""

    def to_json(self) -> dict[str, Any]:
        row = self.row and self.row.model_dump(mode="json")
        return vars(self) | {"run": self.run.model_dump(mode="json"), "row": row}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        row = record.get("row")
        runs = {"run": Run.model_validate(record["run"]), "row": row and Run.model_validate(row)}
        return cls(**(record | runs))


@dataclass(frozen=True, kw_only=True)
class Known:
    """A trial of an earlier search: what it was, how it ended, its learning curve."""

    suggested: TrialSpec
    standing: TrialState
    epochs: tuple[Epoch, ...]
    source: str
    """The folder of the trial."""

    def to_json(self) -> dict[str, Any]:
        return {
            "suggested": self.suggested.to_json(),
            "standing": self.standing.to_json(),
            "epochs": [epoch.to_json() for epoch in self.epochs],
            "source": self.source,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        return cls(
            suggested=TrialSpec.from_json(record["suggested"]),
            standing=TrialState.from_json(record["standing"]),
            epochs=tuple(Epoch.from_json(epoch) for epoch in record["epochs"]),
            source=record["source"],
        )


BEST_PREDICTIONS: Final = "best.npz"
"""Beside `best.pt` in a trial's folder."""


@dataclass(frozen=True, eq=False)
class BestPredictions:
    """N validation images, S of them kept for a person to look at; C classes, H x W images, h x w labels."""

    confusions: NDArray[np.int32]  # N x C x C, labels by rows
    names: tuple[str, ...]  # of the S images
    images: NDArray[np.uint8]  # S x 3 x H x W
    labels: NDArray[np.uint8]  # S x h x w trainIds
    predictions: NDArray[np.uint8]  # S x h x w trainIds


def predictions_to_bytes(best: BestPredictions) -> bytes:
    """A compressed npz archive."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = vars(best) | {"names": np.array(best.names)}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def keep_ending(folder: Storage, standing: TrialState) -> None:
    """The trial in `folder` has ended well: nothing will go on from its last epoch. Its best weights stay."""
    folder.write(ENDED, json.dumps(standing.to_json(), ensure_ascii=False).encode())
    for name in (LAST, PREVIOUS):
        if folder.exists(name):
            folder.delete(name)


def complete_states(search: Storage, earlier: Sequence[TrialState], trials: Iterable[str]) -> list[TrialState]:
    """`earlier`, and in its place what the folders of `trials` say of ends that it has not heard of."""
    known = {standing.trial: standing for standing in earlier}
    for trial in trials:
        is_open = trial not in known or known[trial].status not in ENDED_WELL
        if is_open and (ending := read_ending(search / trial)):
            known[trial] = ending
    return list(known.values())


def read_ending(folder: Storage) -> TrialState | None:
    """How the trial in `folder` ended; None if it has not, or the file is damaged."""
    try:
        return TrialState.from_json(json.loads(folder.read(ENDED) or b"null"))
    except (ValueError, TypeError, AttributeError):  # no JSON, or JSON of another shape
        return None


COMMIT_VARIABLE: Final = "TUNE_BISENET_COMMIT"
"""Where a job finds the commit of the code that was sent with it: no checkout is sent."""


def project_commit() -> str | None:
    """The project's git commit, with `+changes` where the tree differs from it; None where nobody knows."""
    project = Path(__file__).resolve().parents[1]
    try:
        root, commit, changes = (
            subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE)
    if Path(root) != project:  # installed inside somebody else's checkout
        return os.environ.get(COMMIT_VARIABLE)
    return f"{commit}+changes" if changes else commit
