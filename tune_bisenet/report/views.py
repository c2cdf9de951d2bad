"""Sections of the report as tables for a person: settings, what ended early, costs, leaderboard.

Each becomes HTML on the page and Markdown beside it. A section with nothing to show says so in `words`.
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from tune_bisenet.report.leaderboard import best_first, gains, over_seeds, status_in_words
from tune_bisenet.report.read import SearchRecord, Session, TrialRecord
from tune_bisenet.report.samples import shown_rows
from tune_bisenet.report.tables import settings
from tune_bisenet.report.verdicts import Unit


@dataclass(frozen=True)
class Cell:
    text: str
    marked: bool = False
    """Stands out: a setting that is not the baseline's, a trial that has a note."""


@dataclass(frozen=True, kw_only=True)
class View:
    """A table, with words above it; without rows, only the words. The columns of `numbers` are set to the right."""

    words: str
    columns: tuple[str, ...] = ()
    rows: tuple[tuple[Cell, ...], ...] = ()
    numbers: frozenset[str] = frozenset()


# --- the rows -------------------------------------------------------------------------------------------------------


def settings_view(search: SearchRecord) -> View:
    """A column for each setting that rows differ in; what all rows share is told in words."""
    declared, shown = [row.name for row in search.declared_rows], shown_rows(search)
    rows = {row.name: settings(row) for row in search.rows if row.name in declared or row.name in shown}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    varied = [name for name in names if len({_words(row, name) for row in rows.values()}) > 1]
    first = next(iter(rows.values()), {})
    shared = [f"{name.replace('_', ' ')} {_words(first, name)}" for name in names if name not in varied]
    bar = rows.get(search.baseline or "")
    return View(
        words=(f"Marked: what differs from {search.baseline}. " if bar else "")
        + (f"All rows share: {', '.join(shared)}." if shared else "")
        + (" The other trials are in tables/settings.csv." if len(rows) < len(search.rows) else ""),
        columns=("run", *(name.replace("_", " ") for name in varied)),
        rows=tuple((Cell(run), *_settings_cells(row, bar or row, varied)) for run, row in rows.items()),
    )


def _settings_cells(row: Mapping[str, Any], bar: Mapping[str, Any], names: Sequence[str]) -> list[Cell]:
    return [Cell(_words(row, name), marked=_words(row, name) != _words(bar, name)) for name in names]


def _words(row: Mapping[str, Any], name: str) -> str:
    """`–` for a setting that only another kind of row has."""
    value = row.get(name)
    if value is None:
        return "none" if name in row else "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --- trials ---------------------------------------------------------------------------------------------------------


def early_ends(search: SearchRecord) -> View:
    """Which trials did not go to their last epoch, and why."""
    early = [standing for standing in search.standings if standing.status != "finished"]
    if not early:
        return View(words="Every trial went to its last epoch.")
    return View(
        words=f"{len(early)} of {len(search.standings)} trials have not gone to their last epoch.",
        columns=("trial", "epochs", "how and why", "best mIoU"),
        rows=tuple(
            (
                Cell(standing.trial),
                Cell(f"{standing.epochs} of {standing.num_epochs}"),
                Cell(status_in_words(standing)),
                Cell(_percent(standing.best_miou)),
            )
            for standing in early
        ),
        numbers=frozenset({"epochs", "best mIoU"}),
    )


def leaderboard(search: SearchRecord) -> View:
    """All trials, best first. Marked: not trained to the last epoch, or with something that could not be read."""
    gain_of = gains(search.standings, baseline=search.baseline)
    has_latency = search.study is not None and "latency" in search.study.objectives
    latency = ("ms",) if has_latency else ()
    return View(
        words="A trial counts by its best epoch. Marked: best of a trial that did not go to its last epoch."
        if search.standings
        else "There are no trials.",
        columns=("#", "trial", "status", "epochs", "best mIoU", "at", "last", "gain", *latency, "h:mm:ss"),
        rows=tuple(
            _trial_cells(rank, search.trials[standing.trial], gain_of[standing.trial], has_latency=has_latency)
            for rank, standing in enumerate(best_first(search.standings), start=1)
        ),
        numbers=frozenset({"#", "epochs", "best mIoU", "at", "last", "gain", *latency, "h:mm:ss"}),
    )


def _trial_cells(rank: int, record: TrialRecord, gain: float | None, *, has_latency: bool) -> tuple[Cell, ...]:
    standing = record.standing
    return (
        Cell(str(rank)),
        Cell(standing.trial),
        Cell("; ".join([status_in_words(standing), *record.notes]), marked=bool(record.notes)),
        Cell(f"{standing.epochs}/{standing.num_epochs}"),
        Cell(_percent(standing.best_miou), marked=standing.status != "finished" and standing.best_miou is not None),
        Cell("" if standing.best_epoch is None else str(standing.best_epoch)),
        Cell(_percent(standing.last_miou)),
        Cell("" if gain is None else f"{gain:+z.2f}"),
        *([Cell(_percent(standing.latency_ms))] if has_latency else []),
        Cell(_clock(standing.seconds)),
    )


def row_means(search: SearchRecord) -> View:
    """Rows over the seeds that went to their end; only words where there is one seed. Of a study nothing: its runs
    have one seed, but for the choice, which has a section of its own.
    """
    if search.study:
        return View(words="")
    if len({standing.seed for standing in search.standings}) < 2 or search.baseline is None:
        return View(words="One seed a row: there is no spread over seeds.")
    return View(
        words="Mean ± standard deviation over the seeds that went to their last epoch, gains paired by seed.",
        columns=("run", "seeds", "best mIoU", f"over {search.baseline}"),
        rows=tuple(
            (
                Cell(row.run),
                Cell(f"{row.finished} of {row.trials}"),
                Cell(_percent(row.miou) + _spread(row.miou_sd)),
                Cell(("" if row.gain is None else f"{row.gain:+z.2f}") + _spread(row.gain_sd)),
            )
            for row in over_seeds(search.standings, baseline=search.baseline)
        ),
        numbers=frozenset({"seeds", "best mIoU", f"over {search.baseline}"}),
    )


# --- cost -----------------------------------------------------------------------------------------------------------


def cost_basis(session: Session) -> tuple[float, Unit]:
    """Devices that a trial has to itself, and the unit of an hour of them: GPUs, or shares of the machine."""
    if session.gpus_per_trial:
        return session.gpus_per_trial, "GPU-hours"
    return 1 / max(session.trials_at_once, 1), "machine-hours"


def costs(search: SearchRecord, price: float | None) -> View:
    """By row: hours of its trials' epochs, speed, and money at `price` for an hour of a device."""
    devices, unit = cost_basis(search.manifest.sessions[-1])
    measured = _by_row(search) if search.study is None else _by_origin(search)
    if not measured:
        return View(words="No epoch has ended yet, so nothing is known of speed and cost.")
    everything = [trial for trials in measured.values() for trial in trials]
    money = () if price is None else ("cost",)
    lines = [*measured.items(), *([("all", everything)] if len(measured) > 1 else [])]
    speeds = ("images per second", "seconds per epoch", "of that validation")
    numbers = ("trials", "epochs", unit, *money, *speeds)
    at = "" if price is None else f" Cost at {price:g} an hour."
    return View(
        words=f"Training and validation of all epochs, a trial having {_share(devices, unit)} to itself; start-up and "
        f"retried epochs are not counted. Speeds are medians over epochs.{at}",
        columns=("run" if search.study is None else "trials of", *numbers),
        rows=tuple(_cost_cells(name, trials, devices=devices, price=price) for name, trials in lines),
        numbers=frozenset(numbers),
    )


def _by_row(search: SearchRecord) -> dict[str, list[TrialRecord]]:
    """The trials that have epochs."""
    rows: dict[str, list[TrialRecord]] = {row.name: [] for row in search.rows}
    for trial in search.trials.values():
        rows[trial.run.name] += [trial] if trial.epochs else []
    return {name: trials for name, trials in rows.items() if trials}


def _by_origin(search: SearchRecord) -> dict[str, list[TrialRecord]]:
    """The same, for a study has too many rows to tell each one's cost."""
    assert search.study is not None
    origins: dict[str, list[TrialRecord]] = {"declared rows": [], "sampled": [], "fresh seeds": []}
    for name, trial in search.trials.items():
        sampled = "sampled" if trial.run.name in search.study.sampled_rows else "declared rows"
        origins["fresh seeds" if search.study.is_confirm(name) else sampled] += [trial] if trial.epochs else []
    return {name: trials for name, trials in origins.items() if trials}


def _share(devices: float, unit: Unit) -> str:
    if unit == "GPU-hours":
        return f"{devices:g} GPU"
    return "the machine" if devices == 1 else f"{devices:.2g} of the machine"


def _cost_cells(name: str, trials: Sequence[TrialRecord], *, devices: float, price: float | None) -> tuple[Cell, ...]:
    epochs = [epoch for trial in trials for epoch in trial.epochs]
    hours = sum(epoch.seconds for epoch in epochs) * devices / 3600
    return (
        Cell(name),
        Cell(str(len(trials))),
        Cell(str(len(epochs))),
        Cell(f"{hours:,.2f}"),
        *([] if price is None else [Cell(f"{hours * price:,.2f}")]),
        Cell(f"{statistics.median(epoch.images_per_second for epoch in epochs):.1f}"),
        Cell(f"{statistics.median(epoch.seconds for epoch in epochs):.1f}"),
        Cell(f"{statistics.median(epoch.val_seconds for epoch in epochs):.1f}"),
    )


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:z.2f}"


def _spread(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.2f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
