"""What a sampled search found: its trials as points of a study, the best of them, and that at fresh seeds.

Trials at fresh seeds are no points: they would count the chosen one twice.
"""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

from tune_bisenet.config import Expect, Frozen, Run
from tune_bisenet.records import ENDED_WELL, TrialSpec, TrialState
from tune_bisenet.report.leaderboard import format_gain
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.report.tables import Table
from tune_bisenet.report.verdicts import format_interval, format_measured, judge

CHOICE_CAUTION: Final = (
    "The best of many looks better than it is, for it was chosen by its luck, too: --confirm K trains it, the best "
    "declared row and the baseline at K fresh seeds."
)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One trial of the study, or of an earlier search that it began with."""

    trial: str
    """For an earlier search `NAME/trial`."""
    number: int
    """Its position in the history."""
    is_known: bool
    """Whether it is of an earlier search."""
    spec: TrialSpec
    state: TrialState
    latency_device: str = ""
    """What its latency was measured on; empty if that is not known."""

    @property
    def is_declared(self) -> bool:
        """Return whether it is a row of the space, not a point that the sampler chose."""
        return self.spec.origin == "row"

    @property
    def miou(self) -> float | None:
        return self.state.best_miou

    @property
    def is_complete(self) -> bool:
        """Return whether it was trained to its last epoch: the only value that says what the point is worth."""
        return self.state.status == "finished" and self.miou is not None


def samples_of(search: SearchRecord) -> list[Sample]:
    """Return them in the order of the history; none without a study."""
    own = [(record.spec.number, record) for record in search.trials.values() if record.spec.number is not None]
    known = [record for record in search.known if record.spec.origin != "confirm"]
    first = min((number for number, _ in own), default=0) - len(known)
    earlier = [
        Sample(
            trial="/".join(record.source.rstrip("/").split("/")[-2:]),
            number=number,
            is_known=True,
            spec=record.spec,
            state=record.state,
        )
        for number, record in enumerate(known, start=first)
    ]
    return earlier + [
        Sample(
            trial=record.spec.trial,
            number=number,
            is_known=False,
            spec=record.spec,
            state=record.state,
            latency_device=record.latency.device if record.latency else "",
        )
        for number, record in own
    ]


def best_sample(samples: Iterable[Sample]) -> Sample | None:
    """Return the highest mIoU of those that completed, else of all; None if there is none yet."""
    measured = [sample for sample in samples if sample.miou is not None]
    return max(measured, key=lambda sample: (sample.is_complete, sample.miou or 0.0, -sample.number), default=None)


def best_lines(search: SearchRecord) -> list[str]:
    """Return what to say of the best of a study, a sentence or more a line; nothing for a grid."""
    if not search.is_sampled:
        return []
    samples = samples_of(search)
    own = [sample for sample in samples if sample.miou is not None and not sample.is_known]
    best = best_sample(own)
    if best is None:
        return ["No trial has an mIoU yet."]
    early = "" if best.is_complete else f" ({best.state.status})"
    sentences = [f"{best.trial} reached {best.miou:.2f} % mIoU{early}, the best of {len(own)} trials."]
    declared = best_sample(sample for sample in samples if sample.is_declared)
    if best.is_declared:
        sentences.append("It is a declared row: no sampled trial came higher.")
    elif declared:
        rows = len({sample.spec.run.name for sample in samples if sample.is_declared})
        gain = format_gain((best.miou or 0.0) - (declared.miou or 0.0))
        sentences.append(f"That is {gain} points over {declared.trial}, the best of {rows} declared rows.")
    fresh = []
    for table in fresh_seed_tables(search):
        gains = [f"Over {line['over']}: {line['gain']} points, {line['so it is']}." for line in table.lines]
        fresh.append(" ".join([table.text, *gains]))
    return [" ".join(sentences), *(fresh or [CHOICE_CAUTION])]


def fresh_seed_tables(search: SearchRecord) -> list[Table]:
    """Return a table for each sampled run that was trained at fresh seeds, beside the declared rows at these seeds."""
    runs = {record.run.name: record.run for record in search.fresh_trials.values()}
    return [_fresh_seed_table(search, run) for name, run in runs.items() if name in search.sampled_rows]


def _fresh_seed_table(search: SearchRecord, run: Run) -> Table:
    records = [replace(record, confusions=None) for record in search.fresh_trials.values()]
    names = dict.fromkeys(record.run.name for record in records)
    lines = []
    for bar in [name for name in names if name not in search.sampled_rows]:
        gaining = run.model_copy(update={"expect": Expect(gain=(0, 0), over=bar)})
        (claim,) = judge([gaining], records, measured_share=search.manifest.space.measured_share).claims
        low, high = claim.interval or (-math.inf, math.inf)
        decision = "better" if low > 0 else "worse" if high < 0 else "open"
        lines.append(
            {
                "over": bar,
                "gain": format_measured(claim),
                "interval": format_interval(claim),
                "at each seed": ", ".join(f"{pair.effect:+z.2f}" for pair in claim.pairs),
                "so it is": decision,
                "remarks": "; ".join(filter(None, [claim.obstacle, *claim.remarks])),
            }
        )
    return Table(text=_shrinkage(search, run.name), lines=lines, numbers=("gain", "interval"))


def _shrinkage(search: SearchRecord, name: str) -> str:
    """Say what became of the value that the run was chosen for."""
    chosen = best_sample(sample for sample in samples_of(search) if sample.spec.run.name == name)
    states = [record.state for record in search.fresh_trials.values() if record.run.name == name]
    mious = [state.best_miou for state in states if state.best_miou is not None and state.status in ENDED_WELL]
    if not mious or chosen is None or chosen.miou is None:
        return f"{name} was trained again at seeds that had no part in choosing it."
    mean = statistics.fmean(mious)
    spread = f" ± {statistics.stdev(mious):.2f}" if len(mious) > 1 else ""
    less = chosen.miou - mean
    change = f"{less:.2f} points less than it was chosen for" if less > 0 else "no less than it was chosen for"
    return f"In the search {name} reached {chosen.miou:.2f} %, at fresh seeds {mean:.2f}{spread} %: {change}."


COLUMNS: Final = ("optimizer", "schedule", "loss", "accumulation", "max_grad_norm")
"""The table's columns: a row always states them."""


def best_source(search: SearchRecord) -> str:
    """Return the best trial of this search as a row to paste into a space; empty before there is one."""
    best = best_sample(sample for sample in samples_of(search) if not sample.is_known)
    if best is None:
        return ""
    row = best.spec.row or best.spec.run
    return to_python(row.model_copy(update={"name": "best", "expect": None}))


def to_python(run: Run) -> str:
    """Return the call that makes this run; fields at their defaults are left out, the table's columns are not."""
    always = ("name", *COLUMNS)
    fields = [*always, *(name for name in _changed_fields(run) if name not in always)]
    return "Run(\n{})".format("".join(f"    {name}={_to_source(getattr(run, name))},\n" for name in fields))


def _changed_fields(value: Frozen) -> list[str]:
    return [name for name, field in type(value).model_fields.items() if getattr(value, name) != field.default]


def _to_source(value: object) -> str:
    if isinstance(value, Frozen):
        arguments = ", ".join(f"{name}={_to_source(getattr(value, name))}" for name in _changed_fields(value))
        return f"{type(value).__name__}({arguments})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
