"""Read a search's folder into values: everything the report needs, from storage alone.

The search may be running, may have died, and may be in object storage. A damaged or half-written file of one trial
costs that trial a note, never the whole report. Neither Ray nor torch; Optuna only for a search that has a study.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.config import Run
from tune_bisenet.records import (
    BEST_PREDICTIONS,
    ENDED_WELL,
    KNOWN,
    READERS,
    SEARCH,
    TRIAL,
    TRIALS,
    Beginning,
    BestPredictions,
    Environment,
    Epoch,
    KnownTrials,
    Latency,
    Manifest,
    SavedState,
    TrialRecord,
    TrialSpec,
    TrialState,
    best_of,
    code_changes,
    find_contradiction,
    read_manifest,
    read_record,
    true_state,
)
from tune_bisenet.storage import Storage
from tune_bisenet.text import one_line

Unit = Literal["GPU-hours", "machine-hours"]

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class ReportedTrial:
    """One trial as storage has it. `notes` says what could not be read."""

    spec: TrialSpec
    state: TrialState
    epochs: Sequence[Epoch]
    environments: tuple[Environment, ...] = ()
    beginning: Beginning | None = None
    latency: Latency | None = None
    """All three as in its record."""
    confusions: NDArray[np.int32] | None = field(default=None, compare=False, repr=False)
    """Counts of its best epoch, N images x C x C, labels by rows; None if not kept."""
    classes: ClassSet = field(default=CITYSCAPES, repr=False)
    """Those that it scores."""
    groups: tuple[str, ...] = field(default=(), repr=False)
    """The city or sequence of each of the N images."""
    notes: tuple[str, ...] = ()

    @property
    def run(self) -> Run:
        return self.spec.run

    @property
    def reached(self) -> int:
        """Return the last epoch it came to."""
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def ended_at(self) -> int | None:
        """Return the epoch it came to, if that is not its last."""
        return self.reached if self.reached < self.run.num_epochs else None

    def best(self, until: int) -> Epoch | None:
        return best_of(epoch for epoch in self.epochs if epoch.epoch <= until)


@dataclass(frozen=True, kw_only=True, eq=False)
class SearchRecord:
    """A search as storage has it, trials in declared order, or as its study numbered them."""

    folder: Storage
    manifest: Manifest
    trials: dict[str, ReportedTrial]
    known: tuple[TrialRecord, ...]
    """Trials of earlier searches that its study began with."""
    changed: datetime
    """When any trial last wrote."""
    notes: tuple[str, ...]

    @property
    def classes(self) -> ClassSet:
        return self.manifest.data.classes

    @property
    def is_sampled(self) -> bool:
        return self.manifest.study is not None

    @cached_property
    def sampled_rows(self) -> frozenset[str]:
        """Return the names of runs that the sampler made up, in this or an earlier search."""
        specs = [*(trial.spec for trial in self.trials.values()), *(record.spec for record in self.known)]
        return frozenset(spec.run.name for spec in specs if spec.origin == "sampled")

    @property
    def baseline(self) -> str | None:
        return self.manifest.space.baseline

    @property
    def rows(self) -> tuple[Run, ...]:
        """Return each row of the space once, in declared order: the run of its first seed."""
        rows: dict[str, Run] = {}
        for record in self.trials.values():
            rows.setdefault(record.run.name, record.run)
        return tuple(rows.values())

    @property
    def declared_rows(self) -> tuple[Run, ...]:
        """Return the rows without the runs that a sampler made up."""
        return tuple(row for row in self.rows if row.name not in self.sampled_rows)

    @property
    def states(self) -> list[TrialState]:
        return [record.state for record in self.trials.values()]

    @property
    def fresh_trials(self) -> dict[str, ReportedTrial]:
        """Return the trials at fresh seeds, trained after a study had made its choice."""
        return {name: record for name, record in self.trials.items() if record.spec.origin == "confirm"}

    @property
    def code_changes(self) -> str:
        """Say what code and package versions have changed between its sessions; empty if nothing has."""
        return code_changes(self.manifest.sessions)

    @property
    def all_notes(self) -> list[str]:
        """Return what could not be read, of the search and of its trials."""
        return [*self.notes, *(f"{name}: {note}" for name, record in self.trials.items() for note in record.notes)]

    @property
    def devices_per_trial(self) -> tuple[float, Unit]:
        """Devices that a trial has to itself, and the unit of an hour of them: GPUs, or shares of the machine."""
        session = self.manifest.sessions[-1]
        if session.gpus_per_trial:
            return session.gpus_per_trial, "GPU-hours"
        return 1 / max(session.trials_at_once, 1), "machine-hours"


def read_search(folder: Storage) -> SearchRecord:
    """Read all of a search's folder. ValueError, with what to do, if there is none or its manifest is damaged."""
    manifest = read_manifest(folder)
    if manifest is None:
        raise ValueError(f"there is no search in {folder.uri}: expected {SEARCH} there. Give STORAGE/NAME.")
    notes: list[str] = []
    classes = manifest.data.classes
    saved = _read(SavedState, folder, TRIALS, notes, classes) or SavedState()
    states = {state.trial: state for state in saved.states}
    names = list(manifest.trials)
    if manifest.study:
        written = [name for name in sorted(folder.folder_names()) if (folder / name).exists(TRIAL)]
        names = list(dict.fromkeys([*names, *written]))
    with ThreadPoolExecutor(READERS) as pool:
        trials = list(
            pool.map(
                lambda name: _read_trial(folder / name, name, manifest.trials.get(name), states.get(name), classes),
                names,
            )
        )
    notes += [trial for trial in trials if isinstance(trial, str)]
    readable = sorted((trial for trial in trials if isinstance(trial, ReportedTrial)), key=_position)
    known: tuple[TrialRecord, ...] = ()
    if manifest.study:
        read = _read(KnownTrials, folder, KNOWN, notes, classes)
        known = read.trials if read else ()
    infos = folder.stat(TRIALS, *(f"{name}/{TRIAL}" for name in names))
    times = [info.mtime for info in infos if info.mtime is not None]
    return SearchRecord(
        folder=folder,
        manifest=manifest,
        trials={trial.spec.trial: trial for trial in readable},
        known=known,
        changed=max([manifest.sessions[-1].started, *times]),
        notes=tuple(notes),
    )


def _position(trial: ReportedTrial) -> tuple[int, int, str]:
    """Sort trials as the study numbers them, then those that it does not, as declared; fresh seeds come last."""
    number = trial.spec.number
    if trial.spec.origin == "confirm":
        return 2, 0, trial.spec.trial
    return (1, 0, "") if number is None else (0, number, "")


def _read(kind: type[_Value], folder: Storage, name: str, notes: list[str], classes: ClassSet) -> _Value | None:
    """Return the record in a file; None if it is missing, or damaged and noted."""
    try:
        value = read_record(kind, folder, name)
        for record in value.trials if isinstance(value, KnownTrials) else (value,):
            if isinstance(record, TrialRecord):
                _check(record, len(classes))
        return value
    except (ValueError, OSError) as error:
        notes.append(f"{name} cannot be read: {error}")
        return None


def _read_trial(
    folder: Storage, name: str, declared: Run | None, cached: TrialState | None, classes: ClassSet
) -> ReportedTrial | str:
    """Return the trial; a note if its record is damaged and it was not declared, so that its run is not known.

    `cached` is its state in trials.json, which counts only as far as its record agrees.
    """
    notes: list[str] = []
    record = _read(TrialRecord, folder, TRIAL, notes, classes)
    if record and record.spec.trial != name:
        notes.append(f"{TRIAL} is that of {record.spec.trial}")
        record = None
    if record:
        spec = replace(record.spec, run=declared or record.spec.run)
    elif declared:
        spec = TrialSpec(trial=name, run=declared)
    else:
        return f"{name}: {notes[0]}"
    if not record and cached and cached.status in ENDED_WELL:
        notes.append(f"its numbers are those of {TRIALS}, as its {TRIAL} is lost")
    if record and len(record.epochs) < record.state.epochs:
        notes.append(f"{TRIAL} holds {len(record.epochs)} of its {record.state.epochs} epochs")
    if record and cached and (contradiction := find_contradiction(record, cached)):
        notes.append(f"{TRIALS} is wrong about it and not used: {contradiction}")
    confusions, groups = _read_confusions(folder, notes, len(classes))
    return ReportedTrial(
        spec=spec,
        state=true_state(record, cached) if record else cached or TrialState.of_run(name, spec.run),
        epochs=record.epochs if record else (),
        environments=record.environments if record else (),
        beginning=record.beginning if record else None,
        latency=record.latency if record else None,
        confusions=confusions,
        classes=classes,
        groups=groups,
        notes=tuple(notes),
    )


def _check(record: TrialRecord, num_classes: int) -> None:
    """Raise ValueError unless each epoch has an IoU for each class, and each parameter a range that Optuna knows."""
    if any(len(epoch.iou) != num_classes for epoch in record.epochs):
        raise ValueError(f"an epoch has no IoU for each of {num_classes} classes")
    spec = record.spec
    for name in spec.params.keys() - spec.distributions.keys():
        raise ValueError(f"the parameter {name} has no range")
    if spec.distributions:
        from optuna.distributions import json_to_distribution  # late: it takes a second, and a grid does not need it

        for text in spec.distributions.values():
            json_to_distribution(text)


def read_best(folder: Storage) -> BestPredictions:
    """Return what a trial's best epoch predicted. ValueError if there is none or it is damaged."""
    names = ("confusions", "groups", "names", "images", "labels", "predictions")
    confusions, groups, frames, images, labels, predictions = _read_arrays(folder, names)
    if not len(frames) == len(images) == len(labels) == len(predictions) or images.shape[1:2] != (3,):
        raise ValueError(f"{BEST_PREDICTIONS} holds pictures that do not belong together")
    return BestPredictions(confusions, tuple(groups.tolist()), tuple(map(str, frames)), images, labels, predictions)


def _read_confusions(
    folder: Storage, notes: list[str], num_classes: int
) -> tuple[NDArray[np.int32] | None, tuple[str, ...]]:
    """Return the counts of each validation image, and its group."""
    if not folder.exists(BEST_PREDICTIONS):
        return None, ()
    try:
        confusions, groups = _read_arrays(folder, ("confusions", "groups"))
        if confusions.shape[1:] != (num_classes, num_classes) or groups.shape != confusions.shape[:1]:
            raise ValueError(f"confusions of shape {confusions.shape}, groups of shape {groups.shape}")
    except ValueError as error:
        notes.append(f"{BEST_PREDICTIONS} cannot be read: {error}")
        return None, ()
    return confusions, tuple(groups.tolist())


def _read_arrays(folder: Storage, names: Sequence[str]) -> list[NDArray[Any]]:
    """Return the named members alone: the pictures of thirty trials are many, and few of them are shown."""
    try:
        with folder.open(BEST_PREDICTIONS) as file, np.load(file, allow_pickle=False) as archive:
            return [archive[name] for name in names]
    except Exception as error:  # zip, zlib and numpy each fail on damaged bytes in ways of their own
        raise ValueError(f"{BEST_PREDICTIONS} is missing or damaged: {one_line(error)}") from error
