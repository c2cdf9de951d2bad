"""What a study left beside a search's trials: the point that each trial stands for, and what it knew before it began.

A damaged file costs a note. Neither Ray nor torch; Optuna is imported only for a search that has a study.
"""

import json
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import pyarrow.fs
from pydantic import BaseModel, ConfigDict, TypeAdapter

from tune_bisenet.config import Run
from tune_bisenet.records import KNOWN, RUN, Known, TrialSpec, TrialState
from tune_bisenet.storage import Storage

READERS: Final = 16
"""Files read at once: object storage answers slowly, but many at a time."""

_SUGGESTED: Final = TypeAdapter(TrialSpec)
_STANDING: Final = TypeAdapter(TrialState)


class Study(BaseModel):
    """What the manifest says of the study. A newer version's may say more."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    name: str
    url: str
    sampler: str
    objectives: tuple[str, ...]
    warm_start: tuple[str, ...] = ()
    """The searches whose trials it knew before it began."""


@dataclass(frozen=True, kw_only=True, eq=False)
class StudyRecord:
    """A study as storage has it."""

    manifest: Study
    known: tuple[Known, ...]
    suggested: dict[str, TrialSpec]
    """By trial; by number, then the trials that the study is not told of."""

    @property
    def objectives(self) -> tuple[str, ...]:
        return self.manifest.objectives

    @property
    def sampler(self) -> str:
        return self.manifest.sampler

    @cached_property
    def sampled_rows(self) -> frozenset[str]:
        """The names of runs that the sampler made up, here or in an earlier search."""
        everything = [*self.suggested.values(), *(one.suggested for one in self.known)]
        return frozenset(one.run.name for one in everything if one.origin == "sampled")

    def is_confirm(self, trial: str) -> bool:
        """Whether the trial is a fresh seed, trained after the choice was made."""
        return trial in self.suggested and self.suggested[trial].origin == "confirm"

    def runs(self, declared: Mapping[str, Run]) -> dict[str, Run]:
        """Every trial of the search: as numbered, then declared ones that have not begun, then fresh seeds."""
        fresh = {trial: one.run for trial, one in self.suggested.items() if one.number is None}
        numbered = {trial: one.run for trial, one in self.suggested.items() if one.number is not None}
        waiting = {trial: run for trial, run in declared.items() if trial not in self.suggested}
        return {**numbered, **waiting, **fresh}


def read_study(folder: Storage, manifest: Study) -> tuple[StudyRecord, tuple[str, ...]]:
    """The study of the search in `folder`, and notes on what could not be read."""
    notes: list[str] = []
    suggested = _read_suggested(folder, notes)
    known = _read_known(folder, notes)
    return StudyRecord(manifest=manifest, known=known, suggested=suggested), tuple(notes)


def _read_suggested(folder: Storage, notes: list[str]) -> dict[str, TrialSpec]:
    infos = folder.filesystem.get_file_info(pyarrow.fs.FileSelector(folder.path))
    names = sorted(info.base_name for info in infos if info.type == pyarrow.fs.FileType.Directory)
    with ThreadPoolExecutor(READERS) as pool:
        found = list(pool.map(lambda name: _read_one(folder / name, name), names))
    notes += [one for one in found if isinstance(one, str)]
    suggested = [one for one in found if isinstance(one, TrialSpec)]
    return {one.trial: one for one in sorted(suggested, key=_place)}


def _read_one(folder: Storage, trial: str) -> TrialSpec | str | None:
    """What the trial is, or a note on why nobody can say; None if the folder is not a trial's."""
    try:
        content = folder.read(RUN)
        return None if content is None else _checked(TrialSpec.from_json(json.loads(content) | {"trial": trial}))
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        return f"{trial}: {RUN} cannot be read ({one_line(error)}), so nobody can say what it is."


def _place(one: TrialSpec) -> tuple[bool, int, str]:
    return one.number is None, one.number or 0, one.trial


def _read_known(folder: Storage, notes: list[str]) -> tuple[Known, ...]:
    try:
        records = json.loads(folder.read(KNOWN) or b"[]")
        known = tuple(map(Known.from_json, records))
        for one in known:
            _checked(one.suggested)
            _STANDING.validate_python(vars(one.standing))
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        notes.append(f"{KNOWN} cannot be read ({one_line(error)}); earlier searches are left out.")
        return ()
    return known


def _checked(one: TrialSpec) -> TrialSpec:
    """ValueError unless each parameter has a range that Optuna knows."""
    from optuna.distributions import json_to_distribution  # late: it takes a second, and a grid does not need it

    _SUGGESTED.validate_python(vars(one))
    for name in _without(one.params, one.distributions):
        raise ValueError(f"the parameter {name} has no range")
    for text in one.distributions.values():
        json_to_distribution(text)
    return one


def _without(params: Iterable[str], distributions: Mapping[str, Any]) -> list[str]:
    return [name for name in params if name not in distributions]


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
