"""What it would cost to know: the seeds that would decide an undecided claim, and the hours they would take."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from tune_bisenet.config import Run
from tune_bisenet.report.claims import Measured
from tune_bisenet.report.pairs import Evidence
from tune_bisenet.report.ruling import Ruling, obstacle
from tune_bisenet.report.statistics import seeds_for_power

ASSUMED_SD: Final = 0.5
"""Points of mIoU, the spread assumed where one seed has measured none: repeats of a run differ by 0.5 to 2."""

MOST_SEEDS: Final = 100
"""More seeds than this are told as "more than 100"."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    seeds: int
    capped: bool
    spread: float
    assumed: bool
    hours: float | None


def plan_seeds(ruling: Ruling, *, alpha: float, hours_per_seed: Mapping[str, float]) -> Plan | None:
    """None where seeds are not what is missing."""
    item, test = ruling.item, ruling.item.test
    if ruling.verdict != "undecided" or item.pending or obstacle(item) or (test and test.p is None):
        return None
    effect = _effect_to_find(item)
    if effect is None or effect < 0:
        return None
    spread = ASSUMED_SD if test is None else test.sd
    total = seeds_for_power(effect=effect, sd=spread, alpha=alpha, most=MOST_SEEDS + len(item.pairs))
    more = MOST_SEEDS if total is None else max(total - len(item.pairs), 1)
    names = [name for name in (item.run, item.reference) if name is not None]
    return Plan(
        seeds=more,
        capped=total is None,
        spread=spread,
        assumed=test is None,
        hours=hours_of(more, names, hours_per_seed=hours_per_seed),
    )


def _effect_to_find(item: Evidence) -> float | None:
    """Above what must be exceeded: what was measured, but no less than the middle of the promise.

    A row that so far falls short of its promise gets the seeds that would confirm it if it were true.
    """
    measured = None if item.test is None else item.test.mean
    if item.promised is None:
        return measured
    low, high = item.promised
    middle, must_exceed = (low + high) / 2, (low if item.kind == "miou" else 0.0)
    return (middle if measured is None else max(middle, measured)) - must_exceed


def hours_of(seeds: int, names: Iterable[str], *, hours_per_seed: Mapping[str, float]) -> float | None:
    """In device hours; None while a row's speed is unknown."""
    hours = [hours_per_seed.get(name) for name in names]
    return None if None in hours else seeds * sum(hour for hour in hours if hour is not None)


def measured_hours_per_seed(
    rows: Iterable[Run], trials: Sequence[Measured], *, devices_per_trial: float
) -> dict[str, float]:
    """Device hours of one trial that goes to its end; a row without epochs goes by those of all the others."""
    hours = {}
    for row in rows:
        known = [trial for trial in trials if trial.run == row.name and trial.epochs]
        known = known or [trial for trial in trials if trial.epochs]
        if known:
            seconds = [epoch.seconds for trial in known for epoch in trial.epochs]
            num_epochs = max(trial.num_epochs for trial in known)
            hours[row.name] = math.fsum(seconds) / len(seconds) * num_epochs * devices_per_trial / 3600
    return hours
