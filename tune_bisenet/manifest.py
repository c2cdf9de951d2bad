"""`search.json`: how a search was made, so that it can be resumed, repeated and believed."""

import importlib.metadata
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Final

from tune_bisenet import __version__, frames
from tune_bisenet.config import Resources, Run
from tune_bisenet.flight import Flight
from tune_bisenet.ledger import to_json
from tune_bisenet.provenance import commit
from tune_bisenet.results import SEARCH
from tune_bisenet.secrets import hidden
from tune_bisenet.storage import Storage

PACKAGES: Final = (
    "torch",
    "torchvision",
    "ray",
    "pyarrow",
    "numpy",
    "optuna",
    "pydantic",
    "tensorboard",
)


def write(folder: Storage, record: dict[str, Any]) -> None:
    folder.make()
    folder.write(SEARCH, to_json(record))


def opened(flight: Flight, runs: Mapping[str, Run], *, command: list[str], resources: Resources) -> dict[str, Any]:
    """The manifest with one more session, which has just begun."""
    survey, choices = flight.survey, flight.survey.choices
    sessions = survey.earlier["sessions"] if survey.earlier else []
    return {
        "name": survey.name,
        "choices": choices.model_dump(mode="json"),
        "limits": survey.limits.model_dump(mode="json"),
        "space": {"name": choices.space, "title": survey.space.title, "baseline": survey.space.baseline},
        "study": _study(flight),
        "trials": {name: run.model_dump(mode="json") for name, run in runs.items()},
        "data": {
            "name": choices.data,
            "digests": frames.digests(flight.packs),
            "train_images": survey.facts.num_train,
            "val_images": survey.facts.num_val,
        },
        "backbone": {"name": choices.backbone, "digest": survey.backbone_digest},
        "proxy": survey.captions[0] if choices.proxy else None,
        "sessions": [*sessions, _session(command, resources)],
    }


def closed(record: dict[str, Any], signal_number: int | None, limit: str) -> dict[str, Any]:
    """The same after the session has ended, by itself, by a signal or at a limit."""
    *before, last = record["sessions"]
    end = {"ended": _now(), "signal": signal_number, "limit": limit or None}
    return record | {"sessions": [*before, last | end]}


def _study(flight: Flight) -> dict[str, Any] | None:
    """Of a sampled search, without the password of its database."""
    if flight.sampling is None:
        return None
    choices = flight.survey.choices
    return {
        "name": flight.survey.name,
        "url": flight.sampling.place.shown,
        "sampler": choices.sampler,
        "objectives": list(choices.objectives),
        "warm_start": [hidden(choices.warm_start)] if choices.warm_start else [],
    }


def _session(command: list[str], resources: Resources) -> dict[str, Any]:
    return {
        "started": _now(),
        "ended": None,
        "signal": None,
        "limit": None,
        "command": command,
        "commit": commit(),
        "python": platform.python_version(),
        "packages": {"tune-bisenet": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpus_per_trial": resources.cpus_per_trial,
        "gpus_per_trial": resources.gpus_per_trial,
        "trials_at_once": resources.concurrency,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
