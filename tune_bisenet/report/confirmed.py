"""The best of a study against the declared rows: as it looked when it was chosen, and at seeds that chose nothing."""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tune_bisenet.config import Expect, Run
from tune_bisenet.records import ENDED_WELL
from tune_bisenet.report.judging import fresh_trials, measured
from tune_bisenet.report.pairs import Evidence, evidence_of
from tune_bisenet.report.read import SearchRecord, TrialRecord
from tune_bisenet.report.samples import Sample, best_sample
from tune_bisenet.report.statistics import mean_test
from tune_bisenet.report.verdicts import Measured
from tune_bisenet.report.views import Cell, View

CAUTION = (
    "The best of many looks better than it is, for it was chosen by its luck, too: --confirm K trains it, the best "
    "declared row and the baseline at K fresh seeds."
)


def best_words(of: Sequence[Sample], *, num_trials: int) -> str:
    """The best of the search beside the best declared row."""
    best = best_sample(one for one in of if not one.is_known)
    if best is None:
        return "No trial has an mIoU yet."
    early = "" if best.is_complete else f" ({best.standing.status})"
    words = [f"{best.trial} reached {best.miou:.2f} % mIoU{early}, the best of {num_trials} trials."]
    declared = best_sample(one for one in of if one.is_declared)
    if best.is_declared:
        words.append("It is a declared row: nothing that was sampled came higher.")
    elif declared:
        rows = len({one.run.name for one in of if one.is_declared})
        gain = (best.miou or 0.0) - (declared.miou or 0.0)
        words.append(f"That is {gain:+z.2f} points over {declared.trial}, the best of {rows} declared rows.")
    return " ".join(words)


# --- fresh seeds ----------------------------------------------------------------------------------------------------


def confirmed(search: SearchRecord, of: Sequence[Sample]) -> list[View]:
    """A table for each sampled run that was trained at fresh seeds."""
    assert search.study is not None
    fresh = fresh_trials(search)
    runs = {record.run.name: record.run for record in fresh.values()}
    chosen = [run for name, run in runs.items() if name in search.study.sampled_rows]
    bars = [name for name in runs if name not in search.study.sampled_rows]
    return [_view(run, bars, fresh, of, baseline=search.baseline) for run in chosen]


def _view(
    run: Run, bars: Sequence[str], fresh: Mapping[str, TrialRecord], of: Sequence[Sample], *, baseline: str | None
) -> View:
    trials = [replace(measured(trial, record), confusions=None) for trial, record in fresh.items()]
    against = {bar: _evidence(run, bar, trials) for bar in bars}
    columns = (run.name, *bars)
    values = {name: _values(name, fresh) for name in columns}
    seeds = sorted({seed for by_seed in values.values() for seed in by_seed})
    gains = {bar: {pair.seed: pair.effect for pair in item.pairs} for bar, item in against.items()}
    over = tuple(f"over {bar}" for bar in bars)
    return View(
        words=" ".join([_shrinkage(run.name, list(values[run.name].values()), of), *_verdicts(run, against, baseline)]),
        columns=("fresh seed", *columns, *over),
        rows=(
            *(_line(str(seed), [values[name].get(seed) for name in columns], [gains[bar].get(seed) for bar in bars])
              for seed in seeds),
            _line("mean", [_mean(values[name].values()) for name in columns], [against[bar].estimate for bar in bars]),
            (Cell("95 % interval"), *(Cell("") for _ in columns), *(Cell(_interval(against[bar])) for bar in bars)),
        ),
        numbers=frozenset({*columns, *over}),
    )  # fmt: skip


def _evidence(run: Run, bar: str, trials: Sequence[Measured]) -> Evidence:
    """The gain over `bar`, paired as the promises of declared rows are."""
    (found,) = evidence_of(run.model_copy(update={"expect": Expect(gain=(0, 0), over=bar)}), trials, proxy=False)
    return found


def _values(name: str, fresh: Mapping[str, TrialRecord]) -> dict[int, float]:
    """Best mIoU by seed, of trials that have ended."""
    ended = [one for one in fresh.values() if one.run.name == name and one.standing.status in ENDED_WELL]
    return {one.run.seed: one.standing.best_miou for one in ended if one.standing.best_miou is not None}


def _shrinkage(name: str, values: Sequence[float], of: Sequence[Sample]) -> str:
    """What became of the value that the run was chosen for."""
    chosen = best_sample(one for one in of if one.run.name == name)
    if not values or chosen is None or chosen.miou is None:
        return f"{name} was trained again at seeds that had no part in choosing it."
    mean = math.fsum(values) / len(values)
    spread = f" ± {mean_test(values, null=0.0).sd:.2f}" if len(values) > 1 else ""
    less = chosen.miou - mean
    fate = f"{less:.2f} points less than it was chosen for" if less > 0 else "it holds what it was chosen for"
    return f"In the search {name} stood at {chosen.miou:.2f} %, on fresh seeds at {mean:.2f}{spread} %: {fate}."


def _verdicts(run: Run, against: Mapping[str, Evidence], baseline: str | None) -> list[str]:
    return [_verdict(run, bar, item, _role(bar, list(against), baseline)) for bar, item in against.items()]


def _role(bar: str, bars: Sequence[str], baseline: str | None) -> str:
    if bar != baseline:
        return "the best declared row"
    return "the baseline" if len(bars) > 1 else "the baseline and best declared row"


def _verdict(run: Run, bar: str, item: Evidence, role: str) -> str:
    if item.estimate is None:
        return f"Against {bar}, {role}, nothing can be paired yet."
    basis = f"95 % interval {_interval(item)}, {len(item.pairs)} seeds" if item.test else "one seed, no interval"
    at = f", compared at epoch {item.compared_at_epoch}" if item.compared_at_epoch else ""
    remarks = [
        f" {title}: {', '.join(names)}."
        for title, names in (
            ("Not ended", item.pending),
            ("Failed, left out", item.failed),
            ("Diverged", item.diverged),
        )
        if names
    ]
    return f"Over {bar}, {role}: {item.estimate:+z.2f} points ({basis}{at}), {_decision(run, item)}.{''.join(remarks)}"


def _decision(run: Run, item: Evidence) -> str:
    if item.test is None or item.pending:
        return "which decides nothing yet"
    low, high = item.test.interval
    if low > 0:
        return f"so {run.name} is better"
    return f"so {run.name} is worse" if high < 0 else "so it may be either"


def _line(title: str, values: Sequence[float | None], gains: Sequence[float | None]) -> tuple[Cell, ...]:
    return (
        Cell(title),
        *(Cell("" if value is None else f"{value:.2f}") for value in values),
        *(Cell("" if gain is None else f"{gain:+z.2f}") for gain in gains),
    )


def _mean(values: Collection[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _interval(item: Evidence) -> str:
    if item.test is None:
        return ""
    low, high = item.test.interval
    return f"{low:+z.2f} to {high:+z.2f}"
