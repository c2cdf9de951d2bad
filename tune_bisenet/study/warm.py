"""What an earlier search teaches a new one: its trials as points of the new space, with their curves.

Only what was trained as it would be trained here is taken: the same frames, backbone, precision, epochs and size. A
curve of another scale would teach the sampler, and early stopping, what is not so.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from tune_bisenet.config import Objective, Run, format_size
from tune_bisenet.records import ENDED_WELL, Known, TrialSpec
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.study.sampling import Draw, Point, point_at

EARLIER: Final = "earlier-"
"""Before the name of a sampled trial of the earlier search: this search has a `t0012` of its own."""


@dataclass(frozen=True, kw_only=True)
class Here:
    """What a trial must agree with to be known here."""

    draw: Draw
    rows: Mapping[str, tuple[Run, Point]]
    """By name: the row as it would be trained here, and its point."""
    data_digests: Mapping[str, str]
    """By image size."""
    backbone_digest: str
    precision: str
    objectives: Sequence[Objective]


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What was taken over, and why the rest was not, by trial."""

    known: tuple[Known, ...]
    left_out: Mapping[str, str]


def take_over(search: SearchRecord, here: Here) -> Taken:
    """The trials of `search` that count here. ValueError if none does, saying why."""
    problems = search_problems(search, here)
    if problems:
        raise ValueError(f"--warm-start {search.folder.uri}: {' '.join(problems)}")
    found = {name: _known(name, search, here) for name in search.trials}
    known = tuple(one for one in found.values() if isinstance(one, Known))
    left_out = {name: one for name, one in found.items() if isinstance(one, str)}
    if not known:
        raise ValueError(
            f"--warm-start {search.folder.uri}: none of its trials can be used here. "
            + " ".join(f"{name}: {reason}." for name, reason in list(left_out.items())[:3])
        )
    return Taken(known=known, left_out=left_out)


def search_problems(search: SearchRecord, here: Here) -> list[str]:
    """Why nothing of it was trained as it would be here, a sentence each."""
    manifest = search.manifest
    shared = manifest.data.digests.keys() & here.data_digests.keys()
    problems = []
    if not shared:
        sizes = " and ".join(manifest.data.digests), " and ".join(here.data_digests)
        problems.append(f"its images were {sizes[0]} and are {sizes[1]} here.")
    if any(manifest.data.digests[size] != here.data_digests[size] for size in shared):
        problems.append(f"its frames ({manifest.data.name}) are not those of this search.")
    if manifest.backbone.digest != here.backbone_digest:
        problems.append(f"its backbone ({manifest.backbone.name}) is not that of this search.")
    if manifest.choices.precision != here.precision:
        problems.append(f"its precision was {manifest.choices.precision} and is {here.precision} here.")
    return problems


def _known(name: str, search: SearchRecord, here: Here) -> Known | str:
    """The trial as known here, or why it cannot be."""
    record = search.trials[name]
    if record.standing.status not in ENDED_WELL or not record.epochs:
        return f"it has not ended well ({record.standing.status})"
    if "latency" in here.objectives and record.standing.latency_ms is None:
        return "its latency was not measured"
    if format_size(record.run.image_size) not in here.data_digests:
        return f"its images were {format_size(record.run.image_size)}"
    point = _point(name, search, here)
    if isinstance(point, str):
        return point
    differing = _differences(record.run, point.run)
    if differing:
        return f"it was trained otherwise ({', '.join(differing)})"
    is_row = record.run.name in here.rows
    known_as, run_name = (name, record.run.name) if is_row else (EARLIER + name, EARLIER + record.run.name)
    return Known(
        suggested=TrialSpec(
            trial=known_as,
            run=record.run.model_copy(update={"name": run_name}),
            origin="row" if is_row else "sampled",
            number=None,
            params=point.params,
            distributions=point.ranges,
        ),
        standing=replace(record.standing, trial=known_as, run=run_name),
        epochs=record.epochs,
        source=record.folder.uri,
    )


def _point(name: str, search: SearchRecord, here: Here) -> Point | str:
    """The point of this space that stands for the trial: by the name of its row, or by the values it was drawn with."""
    record = search.trials[name]
    if record.run.name in here.rows:
        return here.rows[record.run.name][1]
    suggested = search.study.suggested.get(name) if search.study else None
    if suggested is None or not suggested.params:
        return "it is no row of this space"
    try:
        return point_at(suggested.params, here.draw)
    except Exception as error:  # its values are not ones that this space was written for
        return f"it is no point of this space: {error}"


def _differences(trained: Run, here: Run) -> list[str]:
    """As `num_epochs 50, here 8`. Seeds may differ: they are what makes a result a sample."""
    ignored = {"name", "expect", "seed"}
    before, now = trained.model_dump(exclude=ignored), here.model_dump(exclude=ignored)
    return [f"{name} {before[name]}, here {now[name]}" for name in before if before[name] != now[name]]
