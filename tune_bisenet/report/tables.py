"""A search as tables: those of the page, cells of text for a person, and those of files, numbers as measured.

mIoU, IoU and accuracy are in percent, gains in percentage points; empty where nothing was measured.
"""

import io
import shlex
import statistics
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from typing import Any, Final

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet

from tune_bisenet.records import best_of, to_plain
from tune_bisenet.report.claims import Claim, Verdict, differences, format_measure, format_setting, settings
from tune_bisenet.report.leaderboard import (
    NOTE,
    best_first,
    format_percent,
    format_status,
    gains,
    numbers_of,
    ranked,
    seed_table,
)
from tune_bisenet.report.noise import RepeatNoise, repeat_noise
from tune_bisenet.report.pairing import environment_parts
from tune_bisenet.report.read import ReportedTrial, SearchRecord
from tune_bisenet.report.verdicts import (
    Judgement,
    format_best,
    format_expected,
    format_interval,
    format_measured,
    format_sample_size,
    format_verdict,
    judged_trials,
)
from tune_bisenet.text import counted, format_duration

VERDICT_SYMBOLS: Final[dict[Verdict, str]] = {
    "kept": "✓", "exceeded": "✓", "gained": "+", "above": "↑", "below": "↓", "broken": "✗", "blew up": "✗", "open": "?",
    "not judged": "–",
}  # fmt: skip
"""To tell a verdict without its colour."""

VERDICT_STYLES: Final[dict[Verdict, str]] = {
    "kept": "good", "exceeded": "good", "gained": "good", "above": "off", "below": "bad", "broken": "bad",
    "blew up": "bad", "open": "open", "not judged": "none",
}  # fmt: skip

MAX_NAMES: Final = 400
"""Characters that the names of trials may take in a cell."""

NUM_BEST: Final = 5
"""Trials that stand out in plots of many."""

PATIENCE: Final = timedelta(minutes=10)
PATIENCE_EPOCHS: Final = 5
"""A search has perhaps died after this many of its slowest epochs without news, but not before PATIENCE."""


class Marked(str):
    """A cell that stands out: a setting that is not the baseline's, a trial that has a note."""


class Badge(str):
    """A verdict with its symbol, in the colour of its `style`: good, bad, open or none."""

    style: str

    @classmethod
    def of(cls, claim: Claim) -> "Badge":
        badge = cls(f"{VERDICT_SYMBOLS[claim.verdict]} {format_verdict(claim)}")
        badge.style = VERDICT_STYLES[claim.verdict]
        return badge


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of text with a sentence above it; without lines, only the sentence."""

    text: str = ""
    lines: Sequence[Mapping[str, str]] = ()
    """Cells by column, alike in all lines."""
    numbers: Collection[str] = ()
    """The columns that are set to the right."""
    style: str = ""
    """Its CSS class."""

    @property
    def columns(self) -> list[str]:
        return list(self.lines[0]) if self.lines else []


def shown_rows(search: SearchRecord) -> list[str]:
    """Return the rows that stand out: in a grid all, in a study the baseline, the best declared row and the best."""
    names = [row.name for row in search.rows]
    if not search.is_sampled:
        return names
    declared = {row.name for row in search.declared_rows}
    ranked = list(dict.fromkeys(state.run for state in best_first(search.states) if state.best_miou is not None))
    chosen = {search.baseline, *[name for name in ranked if name in declared][:1], *ranked[:NUM_BEST]}
    return [name for name in names if name in chosen]


def verdict_table(search: SearchRecord, judgement: Judgement, price: float | None) -> Table:
    """Return a line for each claim in declared order. `price` is that of a device hour."""
    rows = {row.name: row for row in search.declared_rows}
    bar = rows.get(search.baseline or "")
    lines = []
    for claim in judgement.claims:
        changes = differences(rows[claim.run], bar) if bar else {}
        changed = [] if claim.confounded else [f"{name} {change}" for name, change in changes.items()]
        lines.append(
            {
                "row": claim.run,
                "expected": format_expected(claim),
                "measured": format_measured(claim),
                "interval": format_interval(claim),
                "verdict": Badge.of(claim),
                "why": claim.reason,
                "to decide it": format_sample_size(claim, judgement.unit, price),
                "seeds": str(len(claim.pairs)),
                "best epochs": format_best(claim),
                "remarks": "; ".join([*claim.remarks, *changed]),
            }
        )
    return Table(lines=lines, numbers=("measured", "interval", "seeds", "best epochs"), style="verdicts")


def noise_table(search: SearchRecord) -> Table:
    """Return how much repeats differ, by class; nothing where nothing repeats."""
    noise = _noise_of(search)
    if noise is None:
        return Table()
    most = noise.classes[0]
    sentences = [
        f"Repeats of {counted(noise.num_rows, 'row')} ({noise.num_trials} trials) differ by {noise.sd:.2f} points of "
        f"mIoU (sd over seeds within a row, over the epochs that verdicts use). {most.share:.0f} % of it is "
        f"{most.name}.",
        "A class's share is its part of the variance: all sum to 100 %, and one below 0 makes up for others.",
        f"Left out, as some of these epochs lack them: {', '.join(noise.left_out)}." if noise.left_out else "",
    ]
    shares = {of.name: f"{of.share:z.0f} %" for of in noise.classes}
    lines = [
        {"measure": measure, "sd, points": f"{sd:.2f}", "share": shares.get(measure, "")}
        for measure, sd in _noise_sds(search, noise).items()
    ]
    return Table(text=" ".join(filter(None, sentences)), lines=lines, numbers=("sd, points", "share"))


def _noise_of(search: SearchRecord) -> RepeatNoise | None:
    space = search.manifest.space
    return repeat_noise(judged_trials(search), space.measured_share, space.second_measure)


def _noise_sds(search: SearchRecord, noise: RepeatNoise) -> dict[str, float]:
    """Return the spread over seeds of mIoU, of the second measure if there is one, and of each class."""
    second = {} if noise.second_sd is None else {format_measure(search.manifest.space.second_measure): noise.second_sd}
    return {"mIoU": noise.sd} | second | {of.name: of.sd for of in noise.classes}


def settings_table(search: SearchRecord) -> Table:
    """Return a column for each setting that rows differ in; the sentence lists what all rows share."""
    declared, shown = [row.name for row in search.declared_rows], shown_rows(search)
    rows = {row.name: settings(row) for row in search.rows if row.name in declared or row.name in shown}
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    varied = [name for name in names if len({format_setting(row, name) for row in rows.values()}) > 1]
    first = next(iter(rows.values()), {})
    shared = [f"{name.replace('_', ' ')} {format_setting(first, name)}" for name in names if name not in varied]
    bar = rows.get(search.baseline or "")

    def cell(row: Mapping[str, Any], name: str) -> str:
        text = format_setting(row, name)
        return Marked(text) if bar and text != format_setting(bar, name) else text

    sentences = [
        f"Marked: what differs from {search.baseline}." if bar else "",
        f"All rows share: {', '.join(shared)}." if shared else "",
        "The other trials are in tables/settings.csv." if len(rows) < len(search.rows) else "",
    ]
    return Table(
        text=" ".join(filter(None, sentences)),
        lines=[
            {"run": run} | {name.replace("_", " "): cell(row, name) for name in varied} for run, row in rows.items()
        ],
    )


def early_end_table(search: SearchRecord) -> Table:
    """Return the trials that did not complete, and why."""
    early = [state for state in search.states if state.status != "finished"]
    if not early:
        return Table(text="Every trial completed.")
    return Table(
        text=f"{len(early)} of {len(search.states)} trials have not completed.",
        lines=[
            {
                "trial": state.trial,
                "epochs": f"{state.epochs} of {state.num_epochs}",
                "status and reason": format_status(state),
                "best mIoU": format_percent(state.best_miou),
            }
            for state in early
        ],
        numbers=("epochs", "best mIoU"),
        style="ends",
    )


def leaderboard_table(search: SearchRecord) -> Table:
    """Return all trials, best first. Marked: something of the trial could not be read."""
    columns, lines = ranked(search.states, search.baseline)
    for state, cells in lines:
        notes = search.trials[state.trial].notes
        status = "; ".join([format_status(state), *notes])
        cells["status"] = Marked(status) if notes else status
    return Table(
        text=f"The best epoch of each trial counts. {NOTE}" if lines else "There are no trials.",
        lines=[cells for _, cells in lines],
        numbers=numbers_of(columns),
        style="leaderboard",
    )


def seed_means_table(search: SearchRecord) -> Table:
    """Return rows over the seeds that completed; nothing for a study, whose runs have one seed but for the choice."""
    if search.is_sampled:
        return Table()
    if len({state.seed for state in search.states}) < 2 or search.baseline is None:
        return Table(text="One seed a row: there is no spread over seeds.")
    columns, rows = seed_table(search.states, baseline=search.baseline)
    return Table(
        text="Mean ± standard deviation over the seeds that completed, gains paired by seed.",
        lines=[dict(zip(columns, row, strict=True)) for row in rows],
        numbers=columns[1:],
    )


def cost_table(search: SearchRecord, price: float | None) -> Table:
    """Return, by row, hours of its trials' epochs, speed, and cost at `price` for an hour of a device."""
    devices, unit = search.devices_per_trial
    groups = _by_row_or_origin(search)
    if not groups:
        return Table(text="No epoch has ended yet, so speed and cost are unknown.")
    if len(groups) > 1:
        groups["all"] = [trial for trials in groups.values() for trial in trials]
    share = f"{devices:g} GPU" if unit == "GPU-hours" else f"{devices:.0%} of the machine"
    at = "" if price is None else f" Cost at {price:g} an hour."
    lines = []
    for name, trials in groups.items():
        epochs = [epoch for trial in trials for epoch in trial.epochs]
        hours = sum(epoch.seconds for epoch in epochs) * devices / 3600
        line = {
            "trials of" if search.is_sampled else "run": name,
            "trials": str(len(trials)),
            "epochs": str(len(epochs)),
            unit: f"{hours:,.2f}",
            "cost": "" if price is None else f"{hours * price:,.2f}",
            "images per second": f"{statistics.median(epoch.images_per_second for epoch in epochs):.1f}",
            "seconds per epoch": f"{statistics.median(epoch.seconds for epoch in epochs):.1f}",
            "of that validation": f"{statistics.median(epoch.val_seconds for epoch in epochs):.1f}",
        }
        lines.append({title: cell for title, cell in line.items() if cell})
    return Table(
        text=f"Training and validation of all epochs; each trial has {share}. Start-up and retried epochs are not "
        f"counted. Speeds are medians over epochs.{at}",
        lines=lines,
        numbers=list(lines[0])[1:],
    )


def _by_row_or_origin(search: SearchRecord) -> dict[str, list[ReportedTrial]]:
    """Return trials that have epochs by row; in a study by origin, for it has too many rows."""
    groups: dict[str, list[ReportedTrial]] = {}
    if search.is_sampled:
        groups = {"declared rows": [], "sampled": [], "fresh seeds": []}
    for trial in search.trials.values():
        group = trial.run.name
        if trial.spec.origin == "confirm" and search.is_sampled:
            group = "fresh seeds"
        elif search.is_sampled:
            group = "sampled" if group in search.sampled_rows else "declared rows"
        if trial.epochs:
            groups.setdefault(group, []).append(trial)
    return {name: trials for name, trials in groups.items() if trials}


def search_state(search: SearchRecord, now: datetime) -> tuple[str, str]:
    """Return one of a few words, and a sentence: whether the search runs or how it ended, as of `now`."""
    ended = [state for state in search.states if state.status not in ("waiting", "running")]
    failed = [state.trial for state in ended if state.status == "failed"]
    progress = f"{len(ended)} of {len(search.states)} trials have ended"
    session = search.manifest.sessions[-1]
    if session.ended is None:
        slowest = max((epoch.seconds for trial in search.trials.values() for epoch in trial.epochs), default=0.0)
        if now - search.changed > max(PATIENCE, timedelta(seconds=PATIENCE_EPOCHS * slowest)):
            since = format_time(search.changed)
            return "silent", f"No news since {since}: it has died, or an epoch takes very long. {progress}."
        return "running", f"Still running, as of {format_time(search.changed)}: {progress}."
    ended_at = format_time(session.ended)
    if session.signal is not None:
        return "interrupted", f"Interrupted by signal {session.signal} on {ended_at}: {progress}."
    because = f", as {session.limit}" if session.limit else ""
    if session.limit and len(ended) < len(search.states):
        return "limit reached", f"Ended on {ended_at}{because}: {progress}."
    if failed or len(ended) < len(search.states):
        lost = f", of which failed: {', '.join(failed)}" if failed else ""
        return "ended with failures", f"Ended on {ended_at}: {progress}{lost}."
    return "finished", f"Finished on {ended_at}{because}: {progress}."


def format_time(time: datetime) -> str:
    """Format as `2026-03-01 14:05 UTC`."""
    return f"{time:%Y-%m-%d %H:%M %Z}"


def provenance_table(search: SearchRecord) -> Table:
    """Return what is needed to believe the search, or to repeat it."""
    manifest, study, limits = search.manifest, search.manifest.study, search.manifest.config.limits
    bounds = [
        counted(limits.trials, "trial") if limits.trials else "",
        format_duration(limits.time_budget) if limits.time_budget else "",
        f"{limits.gpu_hours:g} GPU-hours" if limits.gpu_hours else "",
    ]
    lines = {
        "space": f"{manifest.config.space}: {manifest.space.title}",
        "data": f"{manifest.config.data}: {manifest.data.train_images:,} training images, "
        f"{manifest.data.val_images:,} validation images",
        "data digest": ", ".join(f"{digest} at {size}" for size, digest in manifest.data.digests.items()),
        "backbone": f"ResNet-18, {manifest.config.backbone}, digest {manifest.backbone_digest}",
        "scheduler": manifest.config.scheduler,
        "study": f"{study.name} in {study.url}" if study else "",
        "sampler": f"{study.sampler}, for {' and '.join(study.objectives)}" if study else "",
        "began with": ", ".join(study.warm_start) if study else "",
        "limits": ", ".join(filter(None, bounds)),
        "precision": manifest.config.precision + (", repeatable kernels" if manifest.config.deterministic else ""),
        "training step": {"auto": "", "graph": "a CUDA graph", "eager": "eager"}[manifest.config.step],
        "storage": search.folder.uri,
    }
    rows = [(title, text) for title, text in lines.items() if text]
    rows += [("trained with", text) for text in _environment_lines(search)]
    for number, session in enumerate(manifest.sessions, start=1):
        until = "open" if session.ended is None else format_time(session.ended)
        gpus = f"{session.gpus_per_trial:g} GPU and " if session.gpus_per_trial else ""
        versions = ", ".join(f"{name} {version}" for name, version in session.packages.items())
        rows += [
            (f"session {number}", f"{format_time(session.started)} to {until}"),
            *([("ended as", session.limit)] if session.limit else []),
            *(("warned", warning) for warning in session.warnings),
            ("command", shlex.join(session.command)),
            ("commit", session.commit or "not from a checkout"),
            ("versions", f"Python {session.python}, {versions}"),
            (
                "resources",
                f"{gpus}{counted(session.cpus_per_trial, 'CPU core')} a trial, "
                f"with {counted(session.threads_per_trial, 'thread')}, "
                f"{counted(session.trials_at_once, 'trial')} at once",
            ),
        ]
    return Table(lines=[{"what": title, "value": text} for title, text in rows], style="made")


def _environment_lines(search: SearchRecord) -> list[str]:
    """Return what trials were trained with: one line if all are alike, else one for each with its trials.

    Of a trial that was moved, each line has the epochs that were trained there.
    """
    trials: dict[str, list[str]] = {}
    for name, trial in search.trials.items():
        following = [environment.first_epoch for environment in trial.environments[1:]]
        lasts = [first and first - 1 for first in following] + [len(trial.epochs)]
        for environment, last in zip(trial.environments, lasts, strict=False):
            first = environment.first_epoch
            was_moved = following and first and last
            epochs = f"epoch {first}" if first == last else f"epochs {first} to {last}"
            named = f"{name} ({epochs})" if was_moved else name
            trials.setdefault(", ".join(environment_parts(environment)), []).append(named)
    if len(trials) == 1:
        return list(trials)
    shortened = {
        text: textwrap.shorten(", ".join(names), MAX_NAMES, placeholder=" …") for text, names in trials.items()
    }
    return [f"{text}: {names}" for text, names in shortened.items()]


FileRow = dict[str, Any]


def table_files(search: SearchRecord, judgement: Judgement) -> Iterator[tuple[str, bytes]]:
    """Yield name and content of every file. A table without lines has no columns, so it has no file either."""
    for name, lines in file_tables(search, judgement).items():
        if lines:
            table = pa.Table.from_pylist(lines)
            for suffix, write in (("csv", pyarrow.csv.write_csv), ("parquet", pyarrow.parquet.write_table)):
                buffer = io.BytesIO()
                write(table, buffer)
                yield f"{name}.{suffix}", buffer.getvalue()


def file_tables(search: SearchRecord, judgement: Judgement) -> dict[str, list[FileRow]]:
    """Return all tables, by the name of their files."""
    gain_of = gains(search.states, baseline=search.baseline)
    identity = {
        trial: {"trial": trial, "run": record.run.name, "seed": record.run.seed}
        for trial, record in search.trials.items()
    }
    epochs = [(trial, to_plain(epoch)) for trial, record in search.trials.items() for epoch in record.epochs]
    bests = [(trial, best) for trial, record in search.trials.items() if (best := best_of(record.epochs))]
    return {
        "verdicts": [_verdict_line(claim, judgement) for claim in judgement.claims],
        "leaderboard": [
            {**asdict(record.state), "gain": gain_of[trial], "notes": "; ".join(record.notes)}
            for trial, record in search.trials.items()
        ],
        "epochs": [
            identity[trial] | {key: value for key, value in epoch.items() if key != "iou"} for trial, epoch in epochs
        ],
        "iou": [
            identity[trial] | {"epoch": best.epoch, "class": name, "iou": value}
            for trial, best in bests
            for name, value in zip(search.classes.names, best.iou, strict=True)
        ],
        "noise": _noise_lines(search),
        "settings": [identity[trial] | settings(record.run) for trial, record in search.trials.items()],
        "params": _param_lines(search),
    }


def _verdict_line(claim: Claim, judgement: Judgement) -> FileRow:
    bounds = {"expected": claim.expected, "interval": claim.interval, "image_interval": claim.image_interval}
    low = {f"{name}_low": ends and ends[0] for name, ends in bounds.items()}
    high = {f"{name}_high": ends and ends[1] for name, ends in bounds.items()}
    size = claim.sample_size
    return {
        **{name: getattr(claim, name) for name in ("run", "kind", "measure", "reference")},
        **{name: getattr(claim, name) for name in ("estimate", "best_estimate", "margin")},
        **low,
        **high,
        "num_seeds": len(claim.pairs),
        **{name: getattr(claim, name) for name in ("verdict", "reason", "compared_at_epoch", "on_proxy")},
        "seeds_needed": size and size.seeds,
        "more_than_that": size is not None and size.is_capped,
        "cost_hours": size and size.hours,
        "hours_of": judgement.unit,
        "remarks": "; ".join(claim.remarks),
    }


def _noise_lines(search: SearchRecord) -> list[FileRow]:
    """Return the spread over seeds by measure and by class, with the class's share of the variance in percent."""
    noise = _noise_of(search)
    if noise is None:
        return []
    shares = {of.name: of.share for of in noise.classes}
    return [
        {
            "measure": measure,
            "sd": sd,
            "variance_share": shares.get(measure),
            "num_rows": noise.num_rows,
            "num_trials": noise.num_trials,
        }
        for measure, sd in _noise_sds(search, noise).items()
    ]


def _param_lines(search: SearchRecord) -> list[FileRow]:
    """Return a study's trials and those of the earlier searches that it knew; columns as in Optuna's own table."""
    if not search.is_sampled:
        return []
    own = [(record.spec, record.state, "") for record in search.trials.values()]
    everything = [*((record.spec, record.state, record.source) for record in search.known), *own]
    kinds: dict[str, set[type]] = {}
    for spec, _, _ in everything:
        for name, value in spec.params.items():
            known = kinds.setdefault(name, set())
            if value is not None:
                known.add(float if type(value) is int else type(value))
    lines = []
    for spec, state, source in everything:
        params: FileRow = {}
        for name in kinds:
            value = spec.params.get(name)
            is_mixed = len(kinds[name]) > 1  # words and numbers, or truth values: a column of a file has one type
            params[f"params_{name}"] = str(value) if is_mixed and value is not None else value
        lines.append(
            {
                "trial": spec.trial,
                "number": spec.number,
                "origin": spec.origin,
                "state": state.status,
                "best_miou": state.best_miou,
                "latency_ms": state.latency_ms,
                **params,
                "known_from": source,
            }
        )
    return lines


def mean_class_iou(search: SearchRecord) -> dict[str, list[float | None]]:
    """Return, by row, the IoU in percent of each class at the trials' best epochs, the mean over seeds that have it."""
    ious: dict[str, list[tuple[float | None, ...]]] = {}
    for record in search.trials.values():
        if best := best_of(record.epochs):
            ious.setdefault(record.run.name, []).append(best.iou)
    means = {}
    for row, by_seed in ious.items():
        known = [[value for value in values if value is not None] for values in zip(*by_seed, strict=True)]
        means[row] = [sum(values) / len(values) if values else None for values in known]
    return means
