"""What a search writes to its folder and reads back: plain values, one reader and one writer, and the file names.

    search.json        `Manifest`: how the search was made; its driver writes it as a session starts and ends
    trials.json        `SavedState`: every trial's state and what the stopping rule has seen; can be rebuilt from
    TRIAL/trial.json   `TrialRecord`: what is trained, all its epochs, how it ended; written whole after every epoch
    known.json         `KnownTrials`: those of earlier searches that a study began with, if there are any
    TRIAL/best.npz     `BestPredictions`

`search.json`, `trial.json` and `known.json` carry a checksum of what they hold: JSON that was damaged may still be
JSON. What is in `trials.json` counts only as far as the trials' own records agree, and has a checksum for what they do
not know.

Nothing here knows Ray, torch or Optuna. IoU, mIoU and accuracy are in percent.
"""

import hashlib
import io
import json
import math
import os
import subprocess
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import (
    AwareDatetime,
    BeforeValidator,
    Field,
    PlainSerializer,
    PositiveFloat,
    PositiveInt,
    TypeAdapter,
    ValidationError,
)

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.config import Frozen, Param, Run
from tune_bisenet.options import SearchConfig
from tune_bisenet.storage import Storage
from tune_bisenet.text import in_words

SEARCH: Final = "search.json"
TRIALS: Final = "trials.json"
STUDY: Final = "study.db"
"""The Optuna study of a sampled search, in SQLite; in the search's folder."""
KNOWN: Final = "known.json"
"""Trials of earlier searches that the study began with; in the search's folder, if there are any."""
TRIAL: Final = "trial.json"
LAST: Final = "last.pt"
"""The state that an unfinished trial resumes from, after an epoch of odd number; deleted when the trial has ended."""
PREVIOUS: Final = "previous.pt"
"""The same after an epoch of even number: the newer of the two counts, the other is there in case it is damaged."""
BEST_WEIGHTS: Final = "best.pt"
"""The weights of a trial's best epoch."""
BEST_PREDICTIONS: Final = "best.npz"
NUM_SAMPLES: Final = 3
"""Validation images whose predictions are kept for people to look at."""
LEADERBOARD_CSV: Final = "leaderboard.csv"
LEADERBOARD_MD: Final = "leaderboard.md"
HTML: Final = "report.html"
MARKDOWN: Final = "report.md"
TABLES: Final = "tables"
"""A folder of the report, in that of the search; Tune's own is beside it."""
BEGINNINGS: Final = "beginnings"
"""A folder of states that several trials go through; deleted when all trials have ended."""
TUNE: Final = "tune"


def is_reserved(name: str) -> bool:
    """Return whether a search's folder has a file or a folder of that name, so that no trial can have it.

    Case does not count, as on some disks; nor does what follows the name of the study, as SQLite's journal has it.
    """
    names = (SEARCH, TRIALS, KNOWN, LEADERBOARD_CSV, LEADERBOARD_MD, HTML, MARKDOWN, TABLES, BEGINNINGS, TUNE)
    return name.lower() in names or name.lower().startswith((STUDY, "events.out.tfevents"))


READERS: Final = 16
"""Files read at once: object storage answers slowly, but many requests at a time."""

COMMIT_VARIABLE: Final = "TUNE_BISENET_COMMIT"
"""Tells a submitted job the commit of its code: a job is sent without its git history."""

Measurement = Annotated[
    float,
    BeforeValidator(lambda value: math.nan if value is None else value),
    PlainSerializer(lambda value: value if math.isfinite(value) else None),
]
"""A float that may be NaN or infinite, for which strict JSON has only null."""


@dataclass(frozen=True, kw_only=True)
class Epoch:
    """The measurements of one epoch; `epoch` counts from 1. Losses and gradient norm are means over the epoch."""

    epoch: int
    iterations: int
    """Iterations (micro-batches) since the run began."""
    loss: Measurement
    loss_main: Measurement
    loss_aux1: Measurement
    loss_aux2: Measurement
    lr: Measurement
    """The rate of the epoch's last iteration."""
    grad_norm: Measurement
    """L2 norm over all parameters, before clipping."""
    miou: Measurement
    """NaN if the epoch diverged, as is `pixel_accuracy`."""
    iou: tuple[float | None, ...]
    """By trainId; None for a class that occurs neither in the labels nor in the predictions, or if it diverged."""
    pixel_accuracy: Measurement
    images_per_second: Measurement
    """Training only, validation left out."""
    train_seconds: Measurement
    val_seconds: Measurement

    def __post_init__(self) -> None:
        """Drop what a diverged epoch scored: its weights are no numbers, so its predictions mean nothing."""
        if self.diverged:
            for name, value in (("miou", math.nan), ("iou", (None,) * len(self.iou)), ("pixel_accuracy", math.nan)):
                object.__setattr__(self, name, value)

    @property
    def seconds(self) -> float:
        """Return the seconds of training and validation together."""
        return self.train_seconds + self.val_seconds

    @property
    def diverged(self) -> bool:
        """Return whether the loss, a gradient or mIoU is no number; mIoU is none if the weights are not."""
        return not all(map(math.isfinite, (self.loss, self.grad_norm, self.miou)))


def best_of(history: Iterable[Epoch]) -> Epoch | None:
    """Return the epoch of highest mIoU, the earliest of equals; None if all diverged."""
    measured = (epoch for epoch in history if not epoch.diverged)
    return max(measured, key=lambda epoch: (epoch.miou, -epoch.epoch), default=None)


Origin = Literal["row", "sampled", "confirm"]
"""A declared row, a point that the sampler chose, or a fresh seed of either that the study does not count."""


@dataclass(frozen=True, kw_only=True)
class TrialSpec:
    """Says what a trial trains: a run and, in a sampled search, the point of the space that it stands for."""

    trial: str
    """The trial's name: unique in its search, and the name of its folder."""
    run: Run
    origin: Origin = "row"
    number: int | None = None
    """The number of the study's trial; None for a trial that the study does not count."""
    params: dict[str, Param] = field(default_factory=dict)
    """By name, as the space's `sample` was given them; empty where the study does not count the trial."""
    distributions: dict[str, str] = field(default_factory=dict)
    """The range of each parameter, in Optuna's JSON."""
    row: Run | None = None
    """The run as a space file would declare it, on the rows' own scale; None where the study does not count it."""


Status = Literal["waiting", "running", "finished", "stopped", "diverged", "failed"]
"""`stopped`: by the scheduler; `diverged`: the loss stopped being a number; `failed`: by an error."""

ENDED_WELL: frozenset[Status] = frozenset({"finished", "stopped", "diverged"})


@dataclass(frozen=True, kw_only=True)
class TrialState:
    """The state of one trial: a row of the leaderboard. `trial` is unique in a search, `run` is the row's name."""

    trial: str
    run: str
    seed: int
    status: Status = "waiting"
    stopped_by: str = ""
    """What ended it before its last epoch, in words; empty for a run that went to its end."""
    epochs: int = 0
    num_epochs: int
    best_miou: float | None = None
    best_epoch: int | None = None
    last_miou: float | None = None
    pixel_accuracy: float | None = None
    seconds: float = 0.0
    """Of the epochs that it has trained itself."""
    shared_epochs: int = 0
    """How many of its epochs another trial has trained."""
    latency_ms: float | None = None
    """Milliseconds of one prediction at batch 1; None unless the search has latency for a goal."""
    error: str = ""

    @classmethod
    def of_run(cls, trial: str, run: Run, **measured: Any) -> "TrialState":
        """Return the state of a trial of `run`: waiting, unless `measured` says more."""
        return cls(trial=trial, run=run.name, seed=run.seed, num_epochs=run.num_epochs, **measured)

    @property
    def trained_epochs(self) -> int:
        """Return how many epochs it has trained itself."""
        return self.epochs - self.shared_epochs


def measure(history: Sequence[Epoch], *, latency_ms: float | None = None, shared_epochs: int = 0) -> dict[str, Any]:
    """Return the fields of `TrialState` that follow from a trial's epochs; none of them without an epoch.

    The last mIoU and accuracy are None if the last epoch diverged, the best ones if all did. Another trial has trained
    the first `shared_epochs`.
    """
    if not history:
        return {}
    best, last = best_of(history), history[-1]
    return {
        "epochs": last.epoch,
        "best_miou": best and best.miou,
        "best_epoch": best and best.epoch,
        "last_miou": None if last.diverged else last.miou,
        "pixel_accuracy": None if last.diverged else last.pixel_accuracy,
        "seconds": sum(epoch.seconds for epoch in history[shared_epochs:]),
        "shared_epochs": min(shared_epochs, len(history)),
        "latency_ms": latency_ms,
    }


MEASURED: Final = (
    "epochs",
    "best_miou",
    "best_epoch",
    "last_miou",
    "pixel_accuracy",
    "seconds",
    "shared_epochs",
    "latency_ms",
)
"""The keys of what `measure` returns."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """The time of one prediction: median and quartiles of `repeats`, in milliseconds."""

    median_ms: PositiveFloat
    low_ms: PositiveFloat
    """The lower quartile."""
    high_ms: PositiveFloat
    """The upper quartile."""
    repeats: PositiveInt
    device: str
    """The GPU's name, or the number of the CPU's threads."""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Names what decides the last bits of what a trial measures, beside all that its search declares."""

    threads: PositiveInt
    """CPU threads that torch uses."""
    device: str
    """The GPU's name; without a GPU, "CPU" and its model if that is known."""
    torch: str
    cuda: str | None = None
    """None where no GPU is used."""
    numpy: str
    python: str
    first_epoch: PositiveInt | None = None
    """The first epoch that it trained; None where an earlier version of the program did not note it."""
    eager: str = ""
    """Why a GPU was given kernels one by one, though a CUDA graph was tried; empty if it was not."""


def add_environment(
    earlier: Iterable[Environment], current: Environment, *, epochs_done: int
) -> tuple[Environment, ...]:
    """Return the environments of a trial that is resumed in `current` after `epochs_done`; those of lost epochs go.

    One in which the trial was before is named again if another came between: first epochs tell which epochs were where.
    """
    kept = tuple(environment for environment in earlier if (environment.first_epoch or 1) <= epochs_done)
    if kept and replace(kept[-1], first_epoch=None) == replace(current, first_epoch=None):
        return kept
    return (*kept, replace(current, first_epoch=epochs_done + 1))


@dataclass(frozen=True, kw_only=True)
class Beginning:
    """Says which trial trained the first epochs of another, the same training until the loss of one switches."""

    trial: str
    epochs: PositiveInt


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """A trial as its own folder has it: all that is known of it, without weights and pictures."""

    spec: TrialSpec
    state: TrialState
    epochs: tuple[Epoch, ...] = ()
    latency: Latency | None = None
    """None where latency is no goal of the search."""
    environments: tuple[Environment, ...] = ()
    """Each that trained a part of it, in order of its first epoch; empty before it has begun."""
    beginning: Beginning | None = None
    """None if it has trained all its epochs itself."""
    source: str = ""
    """The folder in an earlier search that it was taken from; empty for a trial of this search."""
    checksum: str = field(default="", compare=False, repr=False)
    """That of the file it was read from; empty if it was not."""

    def __post_init__(self) -> None:
        """Raise ValueError unless the epochs are 1, 2, 3 and so on."""
        for expected, epoch in enumerate(self.epochs, start=1):
            if epoch.epoch != expected:
                raise ValueError(f"epoch {expected} is missing: epoch {epoch.epoch} is in its place")

    @classmethod
    def of_spec(
        cls,
        spec: TrialSpec,
        epochs: Iterable[Epoch] = (),
        latency: Latency | None = None,
        environments: tuple[Environment, ...] = (),
        beginning: Beginning | None = None,
    ) -> "TrialRecord":
        """Return the record of a trial that has these epochs and has not ended."""
        history = tuple(epochs)
        state = TrialState.of_run(spec.trial, spec.run, status="running" if history else "waiting")
        record = cls(
            spec=spec,
            state=state,
            epochs=history,
            latency=latency,
            environments=environments,
            beginning=beginning,
        )
        return replace(record, state=replace(state, **record.measured))

    @property
    def measured(self) -> dict[str, Any]:
        """Return the fields of its state that follow from its epochs."""
        return measure(
            self.epochs,
            latency_ms=self.latency.median_ms if self.latency else None,
            shared_epochs=self.beginning.epochs if self.beginning else 0,
        )


@dataclass(frozen=True, kw_only=True)
class KnownTrials:
    """Holds what is in `known.json`."""

    trials: tuple[TrialRecord, ...]
    checksum: str = field(default="", compare=False, repr=False)
    """That of the file it was read from; empty if it was not."""


def true_state(record: TrialRecord, cached: TrialState | None) -> TrialState:
    """Return a trial's state as its record has it. `cached`, from trials.json, knows only of failures and waits."""
    own = replace(record.state, **record.measured)
    if cached is None or own.status in ENDED_WELL or cached.status in ENDED_WELL:
        return own
    return replace(own, status=cached.status, stopped_by=cached.stopped_by, error=cached.error)


def find_contradiction(record: TrialRecord, cached: TrialState) -> str:
    """Return what `cached`, from trials.json, says otherwise than the trial's record; empty if it is only behind."""
    true = true_state(record, cached)
    names: tuple[str, ...] = ("status", *MEASURED)
    if cached.status not in ENDED_WELL:
        if not 0 < cached.epochs <= len(record.epochs):
            return ""
        names, true = MEASURED, replace(true, **measure(record.epochs[: cached.epochs], latency_ms=true.latency_ms))
    pairs = [(name, getattr(cached, name), getattr(true, name)) for name in names]
    return ", ".join(f"{name} is {theirs}, not {own}" for name, theirs, own in pairs if theirs != own)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """Holds what is in `trials.json`."""

    states: tuple[TrialState, ...] = ()
    scheduler: Any = None
    """What the stopping rule has seen, as plain values; None if nothing, or if it was damaged."""
    seconds: float = 0.0
    """The running time of the search in all its sessions; 0 if it was damaged."""
    own_checksum: str = field(default="", compare=False, repr=False)
    """Of what is in no trial's record: `scheduler` and `seconds`."""

    def sign(self) -> str:
        """Return what `own_checksum` must be."""
        return _checksum(to_json([self.scheduler, self.seconds]))


class Session(Frozen):
    """One run of the search's driver."""

    started: AwareDatetime
    ended: AwareDatetime | None = None
    signal: int | None = None
    limit: str | None = None
    """The limit that ended it, in words."""
    command: tuple[str, ...]
    commit: str | None
    source: str = ""
    """A digest of the package's files, which may have changed under the same commit; empty if it is not known."""
    python: str
    packages: dict[str, str]
    cpus_per_trial: int
    """What Ray reserved for each trial."""
    threads_per_trial: int
    """What torch used of it; that of the search's first session."""
    gpus_per_trial: float
    trials_at_once: int
    warnings: tuple[str, ...] = ()
    """What its trials have warned of, as it ended."""


class SpaceInfo(Frozen):
    """The space that the search's runs come from."""

    title: str
    baseline: str | None
    """The row that others are measured against."""
    measured_share: float
    """The share of the epochs, the last ones, whose mean mIoU expectations are judged by."""
    second_measure: tuple[str, ...] = ()
    """The classes by whose mean IoU gains are judged, too; empty for mIoU alone."""


class DataInfo(Frozen):
    """The data trained on: a digest of the frames by image size, the number of frames, and the classes."""

    digests: dict[str, str]
    train_images: int
    val_images: int
    classes: ClassSet = Field(default=CITYSCAPES, exclude_if=lambda classes: bool(classes == CITYSCAPES))
    """Not written if they are those of Cityscapes."""


class StudyInfo(Frozen):
    """The study of a sampled search."""

    name: str
    url: str
    """The address of its database, without its password."""
    sampler: str
    objectives: tuple[str, ...]
    warm_start: tuple[str, ...] = ()
    """The searches whose trials the study began with."""


class Manifest(Frozen):
    """`search.json`: how a search was made, so that it can be resumed, repeated and believed."""

    name: str
    config: SearchConfig
    space: SpaceInfo
    data: DataInfo
    backbone_digest: str
    proxy: str | None
    """The sentence that goes with everything shown of a proxy; None for a search that is none."""
    study: StudyInfo | None = None
    """None for a grid."""
    trials: dict[str, Run]
    """The trials that were known as the last session began, by name."""
    sessions: Annotated[tuple[Session, ...], Field(min_length=1)]
    checksum: str = ""
    """That of the file it was read from; empty if it was not."""


_Value = TypeVar("_Value")


class DamagedFileError(ValueError):
    """A file of a search does not hold what the program wrote."""


_adapter: Final[Callable[[Any], TypeAdapter[Any]]] = cache(TypeAdapter)
"""Made once for each type, as that takes a millisecond."""


def to_json(value: Any) -> bytes:
    """Return a record as JSON for a file."""
    return _adapter(type(value)).dump_json(value, indent=1) + b"\n"


def from_json(kind: type[_Value], content: bytes, *, path: str) -> _Value:
    """Return the record of type `kind` in `content`. Raises DamagedFileError, naming `path`."""
    try:
        record: _Value = _adapter(kind).validate_json(content)
    except ValidationError as error:
        finding = error.errors()[0]
        where = ".".join(map(str, finding["loc"]))
        raise DamagedFileError(
            f"{path} is damaged: {where + ': ' if where else ''}{in_words(finding['msg'])}"
        ) from error
    checksum = getattr(record, "checksum", "")
    if checksum and checksum != _checksum(content):
        raise DamagedFileError(f"{path} is damaged: its checksum is not that of what it holds")
    return record


def _checksum(content: bytes) -> str:
    """Return the checksum of a JSON object, however it is laid out; one that it holds itself does not count."""
    plain = json.loads(content)
    if isinstance(plain, dict):
        plain.pop("checksum", None)
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:16]


def to_plain(value: Any) -> dict[str, Any]:
    """Return a record as plain values, for a message to another process."""
    plain: dict[str, Any] = _adapter(type(value)).dump_python(value, mode="json")
    return plain


def from_plain(kind: type[_Value], plain: Any) -> _Value:
    """Return the record of type `kind` that `to_plain` was given."""
    record: _Value = _adapter(kind).validate_python(plain)
    return record


def read_record(kind: type[_Value], folder: Storage, name: str) -> _Value | None:
    """Return the record in a file of `folder`; None if there is none. Raises DamagedFileError."""
    content = folder.read(name)
    return None if content is None else from_json(kind, content, path=f"{folder.path}/{name}")


def read_manifest(folder: Storage) -> Manifest | None:
    """Return the manifest of the search in `folder`; None if there is no search. Raises DamagedFileError."""
    try:
        return read_record(Manifest, folder, SEARCH)
    except DamagedFileError as error:
        raise DamagedFileError(
            f"{error}. It has been changed, or another version of tune_bisenet wrote it: restore it, or start a new "
            "search under another --name."
        ) from error


def write_manifest(folder: Storage, manifest: Manifest) -> None:
    """Write the manifest to the search's folder, which is made if need be."""
    folder.make()
    folder.write(SEARCH, to_json(manifest.model_copy(update={"checksum": _checksum(to_json(manifest))})))


def read_saved_state(folder: Storage) -> SavedState:
    """Return what `trials.json` holds; nothing if it is missing or damaged: every trial's folder has its part."""
    try:
        saved = read_record(SavedState, folder, TRIALS) or SavedState()
    except DamagedFileError:
        return SavedState()
    return saved if saved.own_checksum == saved.sign() else SavedState(states=saved.states)


def write_saved_state(folder: Storage, saved: SavedState) -> None:
    """Write `trials.json`."""
    folder.write(TRIALS, to_json(replace(saved, own_checksum=saved.sign())))


def read_trial(folder: Storage) -> TrialRecord | None:
    """Return the record of the trial in `folder`; None if there is none. DamagedFileError, also for another trial's."""
    record = read_record(TrialRecord, folder, TRIAL)
    if record and record.spec.trial != folder.name:
        raise DamagedFileError(f"{folder.path}/{TRIAL} is damaged: it is that of {record.spec.trial}")
    return record


def read_sound_trial(folder: Storage) -> TrialRecord | None:
    """Return the record of the trial in `folder`; None if there is none, or if it is damaged."""
    try:
        return read_trial(folder)
    except DamagedFileError:
        return None


def read_sound_trials(search: Storage, names: Iterable[str]) -> dict[str, TrialRecord]:
    """Return the record of each of these trials of a search that has one and is not damaged."""
    listed = list(names)
    with ThreadPoolExecutor(READERS) as pool:
        records = pool.map(lambda name: read_sound_trial(search / name), listed)
        return {name: record for name, record in zip(listed, records, strict=True) if record}


def write_trial(search: Storage, record: TrialRecord) -> None:
    """Write a trial's record to its folder in `search`, which is made if need be."""
    folder = search / record.spec.trial
    folder.make()
    folder.write(TRIAL, to_json(replace(record, checksum=_checksum(to_json(record)))))


def write_known(search: Storage, trials: tuple[TrialRecord, ...]) -> None:
    """Write the trials of earlier searches that a study begins with."""
    known = KnownTrials(trials=trials)
    search.write(KNOWN, to_json(replace(known, checksum=_checksum(to_json(known)))))


@dataclass(frozen=True, eq=False)
class BestPredictions:
    """Keeps what a trial's best epoch predicted, for people and statistics: numpy arrays, and no code in the file.

    N validation images, S of them kept for a person to look at; C classes, H x W images, h x w labels.
    """

    confusions: NDArray[np.int32]  # N x C x C, labels by rows
    groups: tuple[str, ...]  # the city or sequence of each of the N images
    names: tuple[str, ...]  # of the S images
    images: NDArray[np.uint8]  # S x 3 x H x W
    labels: NDArray[np.uint8]  # S x h x w trainIds
    predictions: NDArray[np.uint8]  # S x h x w trainIds


def predictions_to_bytes(best: BestPredictions) -> bytes:
    """Return a compressed npz archive."""
    buffer = io.BytesIO()
    arrays: dict[str, Any] = vars(best) | {"groups": np.array(best.groups), "names": np.array(best.names)}
    np.savez_compressed(buffer, **arrays)
    return buffer.getvalue()


def code_changes(sessions: Sequence[Session]) -> str:
    """Say in a sentence what code and package versions have changed between sessions; empty if nothing has."""
    columns: dict[str, list[str]] = {}
    for session in sessions:
        commit, mark, changes = (session.commit or "").partition("+")
        code = {"commit": f"{commit[:12]}{mark}{changes}", "source": session.source, "Python": session.python}
        for name, version in (code | session.packages).items():
            versions = columns.setdefault(name, [])
            if version and version not in versions[-1:]:
                versions.append(version)
    changed = {name: " → ".join(versions) for name, versions in columns.items() if len(versions) > 1}
    if "commit" in changed:
        changed.pop("source", None)  # says the same
    listed = "; ".join(f"{name} {versions}" for name, versions in changed.items())
    return f"Code changed between sessions: {listed}; results of both are in this search." if listed else ""


def source_digest() -> str:
    """Return 16 hex digits over the package's Python files: what runs, whatever its commit is."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(f"{path.relative_to(package)}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def project_commit() -> str | None:
    """Return the project's git commit, with `+changes` where the tree differs from it; None if it is unknown."""
    project = Path(__file__).resolve().parents[1]

    def git(*arguments: str) -> str:
        options: Any = {"cwd": project, "capture_output": True, "text": True, "check": True}
        return str(subprocess.run(["git", *arguments], **options).stdout).strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")) == project:  # else installed inside somebody else's checkout
            return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        pass
    return os.environ.get(COMMIT_VARIABLE)
