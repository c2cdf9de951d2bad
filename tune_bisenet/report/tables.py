"""A search as plain tables, a line each for what was judged, reached and measured: as CSV and as Parquet.

Numbers as they were measured: mIoU, IoU and accuracy in percent, gains in percentage points; empty where nothing was.
"""

import io
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tune_bisenet.config import Run, format_size
from tune_bisenet.data.classes import CLASS_NAMES
from tune_bisenet.records import best_of
from tune_bisenet.report.leaderboard import gains
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.report.verdicts import Claim, Judgement

Line = dict[str, Any]

NOT_SETTINGS: Final = {"name", "seed", "expect"}
"""Fields of a row that do not say how it is trained."""


def tables(search: SearchRecord, judgement: Judgement) -> dict[str, list[Line]]:
    """All tables, by the name of their files."""
    return {
        "verdicts": [_verdict(claim, judgement) for claim in judgement.claims],
        "leaderboard": _leaderboard(search),
        "epochs": _epochs(search),
        "iou": _iou(search),
        "settings": [{**_who(search, trial), **settings(record.run)} for trial, record in search.trials.items()],
        "params": _params(search),
    }


def files(of: Mapping[str, Sequence[Line]]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every file. A table without lines has no columns, so it has no file either."""
    for name, lines in of.items():
        if lines:
            table = pa.Table.from_pylist(list(lines))
            yield f"{name}.csv", _written(table, pyarrow.csv.write_csv)
            yield f"{name}.parquet", _written(table, pyarrow.parquet.write_table)


def settings(run: Run) -> dict[str, Any]:
    """Every setting that decides how a row is trained, by a name such as `optimizer lr`; the size in words."""
    leaves: dict[str, Any] = {}
    for name, value in run.model_dump(exclude=NOT_SETTINGS).items():
        leaves |= {f"{name} {key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return leaves | {"image_size": format_size(run.image_size)}


def mean_iou(search: SearchRecord) -> dict[str, list[float | None]]:
    """By row, the IoU of each class at the trials' best epochs, in percent, averaged over the seeds that have it."""
    return {
        row.name: [_mean(values) for values in zip(*_best_ious(search, row.name), strict=True)]
        for row in search.rows
        if _best_ious(search, row.name)
    }


def _best_ious(search: SearchRecord, run: str) -> list[tuple[float | None, ...]]:
    return [best_of(trial.epochs).iou for trial in search.trials.values() if trial.run.name == run and trial.epochs]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


# --- lines ----------------------------------------------------------------------------------------------------------


def _verdict(claim: Claim, judgement: Judgement) -> Line:
    nothing = (None, None)
    return {
        "run": claim.run,
        "kind": claim.kind,
        "reference": claim.reference,
        **_ends("promised", claim.promised or nothing),
        "estimate": claim.estimate,
        **_ends("interval", claim.interval or nothing),
        **_ends("image_interval", claim.image_interval or nothing),
        "num_seeds": claim.n_pairs,
        "p": claim.p,
        "p_holm": claim.p_holm,
        "verdict": claim.verdict,
        "reason": claim.reason,
        "compared_at_epoch": claim.compared_at_epoch,
        "seeds_needed": claim.seeds_needed,
        "more_than_that": claim.seeds_capped,
        "cost_hours": claim.cost_hours,
        "hours_of": judgement.unit,
        "proxy": judgement.proxy,
        "flags": "; ".join(claim.flags),
        "note": claim.note,
        "words": claim.words,
    }


def _ends(name: str, bounds: tuple[float | None, float | None]) -> Line:
    return {f"{name}_low": bounds[0], f"{name}_high": bounds[1]}


def _leaderboard(search: SearchRecord) -> list[Line]:
    gain_of = gains(search.standings, baseline=search.baseline)
    return [
        {**record.standing.to_json(), "gain": gain_of[trial], "notes": "; ".join(record.notes)}
        for trial, record in search.trials.items()
    ]


def _epochs(search: SearchRecord) -> list[Line]:
    return [
        {**_who(search, trial), **{key: value for key, value in epoch.to_json().items() if key != "iou"}}
        for trial, record in search.trials.items()
        for epoch in record.epochs
    ]


def _iou(search: SearchRecord) -> list[Line]:
    """At each trial's best epoch."""
    return [
        {**_who(search, trial), "epoch": best.epoch, "class": name, "iou": value}
        for trial, record in search.trials.items()
        if record.epochs
        for best in [best_of(record.epochs)]
        for name, value in zip(CLASS_NAMES, best.iou, strict=True)
    ]


def _params(search: SearchRecord) -> list[Line]:
    """Of a study: its trials and those of the earlier searches that it knew; parameters named as Optuna's own table."""
    if search.study is None:
        return []
    own = [(one, search.trials[trial].standing, "") for trial, one in search.study.suggested.items()]
    everything = [*((one.suggested, one.standing, one.source) for one in search.study.known), *own]
    names = dict.fromkeys(name for one, _, _ in everything for name in one.params)
    lines = [
        {
            "trial": one.trial,
            "number": one.number,
            "origin": one.origin,
            "state": standing.status,
            "best_miou": standing.best_miou,
            "latency_ms": standing.latency_ms,
            **{f"params_{name}": one.params.get(name) for name in names},
            "known_from": source,
        }
        for one, standing, source in everything
    ]
    return _of_one_type(lines)


def _of_one_type(lines: list[Line]) -> list[Line]:
    """Columns that mix words with numbers, or with truth values, become words: a column has one type."""
    names = lines[0] if lines else {}
    types = {name: {_type(line[name]) for line in lines if line[name] is not None} for name in names}
    mixed = {name for name, found in types.items() if len(found) > 1}
    return [
        {name: str(value) if name in mixed and value is not None else value for name, value in line.items()}
        for line in lines
    ]


def _type(value: object) -> type:
    return float if type(value) is int else type(value)


def _who(search: SearchRecord, trial: str) -> Line:
    run = search.trials[trial].run
    return {"trial": trial, "run": run.name, "seed": run.seed}


def _written(table: pa.Table, write: Any) -> bytes:
    buffer = io.BytesIO()
    write(table, buffer)
    return buffer.getvalue()
