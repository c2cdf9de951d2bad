"""What a run leaves behind, as plain data: one `Epoch` after each epoch, one `Standing` for each trial.

Everything here is JSON in and JSON out; nobody needs torch or Ray to read it. IoU and accuracy are in percent.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, Self

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
BEST: Final = "best.pt"
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
class Standing:
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
