"""Sections of the report as tables for a person: settings, what ended early, costs, leaderboard, how it was made.

Each becomes HTML on the page and Markdown beside it. A section with nothing to show says so in `words`.
"""

import shlex
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, Literal

from tune_bisenet.report.leaderboard import best_first, gains, over_seeds, status_in_words
from tune_bisenet.report.read import SearchRecord, Session, TrialRecord
from tune_bisenet.report.tables import settings
from tune_bisenet.report.verdicts import Unit

PATIENCE: Final = timedelta(minutes=10)
PATIENCE_EPOCHS: Final = 5
"""Silence of so many of the slowest epochs, at least PATIENCE, is taken for an end."""


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


# --- how the search stands ------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class State:
    """`sentence` says all of it; `word` is its summary."""

    word: Literal["finished", "running", "interrupted", "silent", "ended with failures"]
    sentence: str


def state(search: SearchRecord, now: datetime) -> State:
    """Whether the search runs or how it ended, as far as its storage tells at `now`."""
    ended = [standing for standing in search.standings if standing.status not in ("waiting", "running")]
    failed = [standing.trial for standing in ended if standing.status == "failed"]
    progress = f"{len(ended)} of {len(search.standings)} trials have ended"
    session = search.manifest.sessions[-1]
    silence = now - search.changed
    if session.ended is None and silence > _patience(search):
        silent = f"No news since {when(search.changed)}: it has died, or an epoch takes very long. {progress}."
        return State(word="silent", sentence=silent)
    if session.ended is None:
        return State(word="running", sentence=f"Still running, as of {when(search.changed)}: {progress}.")
    if session.signal is not None:
        how = f"Interrupted by signal {session.signal} on {when(session.ended)}: {progress}."
        return State(word="interrupted", sentence=how)
    if failed or len(ended) < len(search.standings):
        lost = f", of which failed: {', '.join(failed)}" if failed else ""
        return State(word="ended with failures", sentence=f"Ended on {when(session.ended)}: {progress}{lost}.")
    return State(word="finished", sentence=f"Finished on {when(session.ended)}: {progress}.")


def when(time: datetime) -> str:
    """As `2026-03-01 14:05 UTC`."""
    return f"{time:%Y-%m-%d %H:%M %Z}"


def _patience(search: SearchRecord) -> timedelta:
    slowest = max((epoch.seconds for trial in search.trials.values() for epoch in trial.epochs), default=0.0)
    return max(PATIENCE, timedelta(seconds=PATIENCE_EPOCHS * slowest))


# --- the rows -------------------------------------------------------------------------------------------------------


def settings_view(search: SearchRecord) -> View:
    """A column for each setting that rows differ in; what all rows share is told in words."""
    rows = {row.name: settings(row) for row in search.rows}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    varied = [name for name in names if len({_words(row, name) for row in rows.values()}) > 1]
    first = next(iter(rows.values()))
    shared = [f"{name.replace('_', ' ')} {_words(first, name)}" for name in names if name not in varied]
    bar = rows.get(search.baseline or "")
    return View(
        words=(f"Marked: what differs from {search.baseline}. " if bar else "")
        + f"All rows share: {', '.join(shared)}.",
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
    return View(
        words="A trial counts by its best epoch. Marked: best of a trial that did not go to its last epoch."
        if search.standings
        else "There are no trials.",
        columns=("#", "trial", "status", "epochs", "best mIoU", "at", "last", "gain", "h:mm:ss"),
        rows=tuple(
            _trial_cells(rank, search.trials[standing.trial], gain_of[standing.trial])
            for rank, standing in enumerate(best_first(search.standings), start=1)
        ),
        numbers=frozenset({"#", "epochs", "best mIoU", "at", "last", "gain", "h:mm:ss"}),
    )


def _trial_cells(rank: int, record: TrialRecord, gain: float | None) -> tuple[Cell, ...]:
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
        Cell(_clock(standing.seconds)),
    )


def row_means(search: SearchRecord) -> View:
    """Rows over the seeds that went to their end; only words where there is one seed."""
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
    rows = {row.name: [t for t in search.trials.values() if t.run.name == row.name and t.epochs] for row in search.rows}
    measured = {name: trials for name, trials in rows.items() if trials}
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
        columns=("run", *numbers),
        rows=tuple(_cost_cells(name, trials, devices=devices, price=price) for name, trials in lines),
        numbers=frozenset(numbers),
    )


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


# --- how it was made ------------------------------------------------------------------------------------------------


def made(search: SearchRecord) -> View:
    """What is needed to believe the search, or to repeat it."""
    manifest = search.manifest
    digests = ", ".join(f"{digest} at {size}" for size, digest in manifest.data.digests.items())
    lines = [
        ("space", f"{manifest.space.name}: {manifest.space.title}"),
        ("data", f"{manifest.data.name}: {manifest.data.train_images:,} training images, "
                 f"{manifest.data.val_images:,} validation images"),
        ("data digest", digests),
        ("backbone", f"ResNet-18, {manifest.backbone.name}, digest {manifest.backbone.digest}"),
        ("scheduler", manifest.choices.scheduler),
        ("precision", manifest.choices.precision),
        ("storage", search.folder.uri),
        *(line for number, session in enumerate(manifest.sessions, start=1) for line in _session(number, session)),
    ]  # fmt: skip
    return View(words="", columns=("what", "value"), rows=tuple((Cell(title), Cell(text)) for title, text in lines))


def _session(number: int, session: Session) -> list[tuple[str, str]]:
    until = "open" if session.ended is None else when(session.ended)
    versions = ", ".join(f"{name} {version}" for name, version in session.packages.items())
    resources = f"{session.gpus_per_trial:g} GPUs and {session.cpus_per_trial} CPU cores"
    return [
        (f"session {number}", f"{when(session.started)} to {until}"),
        ("command", shlex.join(session.command)),
        ("commit", session.commit or "not from a checkout"),
        ("versions", f"Python {session.python}, {versions}"),
        ("a trial's share", f"{resources}, {session.trials_at_once} trials at once"),
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:z.2f}"


def _spread(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.2f}"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
