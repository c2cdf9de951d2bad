"""From a search's folder to values: everything the report needs, read from storage alone.

The search may be running, may have died, and may lie in object storage. A damaged or half-written file of one trial
costs that trial a note, never the whole. Neither Ray nor torch.
"""

import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from tune_bisenet import records as records_module
from tune_bisenet.config import Run
from tune_bisenet.data.classes import NUM_CLASSES
from tune_bisenet.records import BEST_PREDICTIONS, EPOCHS, SEARCH, TRIALS, BestPredictions, Epoch, TrialState, best_of
from tune_bisenet.report.study import READERS, Study, StudyRecord, one_line, read_study
from tune_bisenet.storage import Storage

_EPOCHS: Final = TypeAdapter(tuple[Epoch, ...])
_STANDINGS: Final = TypeAdapter(tuple[TrialState, ...])


# --- what search.json says ------------------------------------------------------------------------------------------


class _Written(BaseModel):
    """A part of the manifest. A newer version's manifest may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Session(_Written):
    """One time that the search's driver ran."""

    started: AwareDatetime
    ended: AwareDatetime | None
    signal: int | None
    limit: str | None = None
    """Which bound ended it, in words."""
    command: tuple[str, ...]
    commit: str | None
    python: str
    packages: dict[str, str]
    cpus_per_trial: int
    gpus_per_trial: float
    trials_at_once: int


class Space(_Written):
    name: str
    title: str
    baseline: str | None
    """The row that others are measured against."""


class Data(_Written):
    name: str
    digests: dict[str, str]
    train_images: int
    val_images: int


class Backbone(_Written):
    name: str
    digest: str


class Choices(_Written):
    scheduler: str
    precision: str


class Limits(_Written):
    """What the search was allowed; None for no bound."""

    trials: int | None = None
    time_budget_seconds: float | None = None
    gpu_hours: float | None = None


class Manifest(_Written):
    """How the search was made. `proxy` is the sentence that goes with everything shown of a proxy."""

    name: str
    choices: Choices
    space: Space
    trials: dict[str, Run]
    data: Data
    backbone: Backbone
    proxy: str | None
    study: Study | None = None
    """None for a grid."""
    limits: Limits = Limits()
    sessions: Annotated[tuple[Session, ...], Field(min_length=1)]


# --- what a search has left -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, eq=False)
class TrialRecord:
    """One trial as storage has it. `notes` says what could not be read."""

    folder: Storage
    run: Run
    standing: TrialState
    epochs: tuple[Epoch, ...]
    confusions: NDArray[np.int32] | None  # of its best epoch: N x C x C, labels by rows
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchRecord:
    """A search as storage has it, trials in declared order, or as its study numbered them."""

    folder: Storage
    manifest: Manifest
    trials: dict[str, TrialRecord]
    study: StudyRecord | None
    """None for a grid."""
    changed: datetime
    """When any trial last was heard of."""
    notes: tuple[str, ...]

    @property
    def baseline(self) -> str | None:
        """The row that others are measured against."""
        return self.manifest.space.baseline

    @property
    def rows(self) -> tuple[Run, ...]:
        """Each row of the space once, in declared order, whatever its seeds."""
        rows: dict[str, Run] = {}
        for record in self.trials.values():
            rows.setdefault(record.run.name, record.run)
        return tuple(rows.values())

    @property
    def declared_rows(self) -> tuple[Run, ...]:
        """The same without the runs that a sampler made up."""
        return tuple(row for row in self.rows if not self.study or row.name not in self.study.sampled_rows)

    @property
    def standings(self) -> list[TrialState]:
        return [record.standing for record in self.trials.values()]

    @property
    def all_notes(self) -> list[str]:
        """What could not be read, of the search and of its trials."""
        return [*self.notes, *(f"{name}: {note}" for name, record in self.trials.items() for note in record.notes)]


def read_search(folder: Storage) -> SearchRecord:
    """All that a search's folder holds. ValueError, saying what to do, if there is none or its manifest is lost."""
    content = folder.read(SEARCH)
    if content is None:
        raise ValueError(f"there is no search in {folder.uri}: expected {SEARCH} there. Point to STORAGE/NAME.")
    try:
        manifest = Manifest.model_validate_json(content)
    except ValueError as error:
        raise ValueError(
            f"{folder.uri}/{SEARCH} is damaged ({one_line(error)}): without it nobody can say what was run."
        ) from error
    study, study_notes = read_study(folder, manifest.study) if manifest.study else (None, ())
    runs = study.runs(manifest.trials) if study else manifest.trials
    standings, notes = _read_standings(folder)

    def read(name: str) -> TrialRecord:
        return _read_trial(folder / name, runs[name], trial=name, standing=standings.get(name))

    with ThreadPoolExecutor(READERS) as pool:
        trials = dict(zip(runs, pool.map(read, runs), strict=True))
    return SearchRecord(
        folder=folder,
        manifest=manifest,
        trials=trials,
        study=study,
        changed=_changed(folder, manifest, trials),
        notes=(*notes, *study_notes),
    )


def _changed(folder: Storage, manifest: Manifest, trials: Iterable[str]) -> datetime:
    paths = [f"{folder.path}/{TRIALS}", *(f"{folder.path}/{name}/{EPOCHS}" for name in trials)]
    times: list[datetime | None] = [info.mtime for info in folder.filesystem.get_file_info(paths)]
    return max([manifest.sessions[-1].started, *(time for time in times if time is not None)])


def _read_standings(folder: Storage) -> tuple[dict[str, TrialState], tuple[str, ...]]:
    """By trial, and notes."""
    try:
        record = json.loads(folder.read(TRIALS) or b"")
        standings = _STANDINGS.validate_python([vars(TrialState.from_json(row)) for row in record["standings"]])
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        words = f"{TRIALS} cannot be read ({one_line(error)}); how trials stand is taken from their own folders."
        return {}, (words,)
    return {standing.trial: standing for standing in standings}, ()


def _read_trial(folder: Storage, run: Run, *, trial: str, standing: TrialState | None) -> TrialRecord:
    notes: list[str] = []
    epochs = _read_epochs(folder, notes)
    confusions = _read_confusions(folder, notes)
    return TrialRecord(
        folder=folder,
        run=run,
        standing=standing or records_module.read_ending(folder) or _standing(trial, run, epochs),
        epochs=epochs,
        confusions=confusions,
        notes=tuple(notes),
    )


def _read_epochs(folder: Storage, notes: list[str]) -> tuple[Epoch, ...]:
    try:
        content = folder.read(EPOCHS)
        records = [] if content is None else json.loads(content)
        epochs = _EPOCHS.validate_python([vars(Epoch.from_json(record)) for record in records])
        if any(len(epoch.iou) != NUM_CLASSES for epoch in epochs):
            raise ValueError(f"an epoch has no IoU for each of {NUM_CLASSES} classes")
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        notes.append(f"{EPOCHS} cannot be read: {one_line(error)}")
        return ()
    return epochs


def _standing(name: str, run: Run, epochs: Sequence[Epoch]) -> TrialState:
    """How a trial stands by its epochs alone."""
    if not epochs:
        return TrialState(trial=name, run=run.name, seed=run.seed, num_epochs=run.num_epochs)
    best, last = best_of(epochs), epochs[-1]
    return TrialState(
        trial=name,
        run=run.name,
        seed=run.seed,
        num_epochs=run.num_epochs,
        status="diverged" if last.diverged else "finished" if last.epoch == run.num_epochs else "running",
        epochs=last.epoch,
        best_miou=best.miou,
        best_epoch=best.epoch,
        last_miou=last.miou,
        pixel_accuracy=last.pixel_accuracy,
        seconds=sum(epoch.seconds for epoch in epochs),
    )


# --- the file of a best epoch ---------------------------------------------------------------------------------------


def read_best(folder: Storage) -> BestPredictions:
    """What a trial's best epoch predicted. ValueError if there is none or it is damaged."""
    names = ("confusions", "names", "images", "labels", "predictions")
    confusions, frames, images, labels, predictions = _read_arrays(folder, names)
    if not len(frames) == len(images) == len(labels) == len(predictions) or images.shape[1:2] != (3,):
        raise ValueError(f"{BEST_PREDICTIONS} holds pictures that do not belong together")
    return BestPredictions(confusions, tuple(map(str, frames)), images, labels, predictions)


def _read_confusions(folder: Storage, notes: list[str]) -> NDArray[np.int32] | None:
    if not folder.exists(BEST_PREDICTIONS):
        return None
    try:
        (confusions,) = _read_arrays(folder, ("confusions",))
        if confusions.shape[1:] != (NUM_CLASSES, NUM_CLASSES):
            raise ValueError(f"confusions of shape {confusions.shape}")
    except ValueError as error:
        notes.append(f"{BEST_PREDICTIONS} cannot be read: {one_line(error)}")
        return None
    return confusions


def _read_arrays(folder: Storage, names: Sequence[str]) -> list[NDArray[Any]]:
    """Only the named members are fetched: the pictures of thirty trials are many, and few of them are shown."""
    try:
        with (
            folder.filesystem.open_input_file(f"{folder.path}/{BEST_PREDICTIONS}") as file,
            np.load(file, allow_pickle=False) as archive,
        ):
            return [archive[name] for name in names]
    except Exception as error:  # zip, zlib and numpy each fail on damaged bytes in ways of their own
        raise ValueError(f"{BEST_PREDICTIONS} is missing or damaged: {one_line(error)}") from error
