"""How a search stands and how it was made: what is needed to believe it, or to repeat it."""

import shlex
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, Literal

from tune_bisenet.report.read import Limits, SearchRecord, Session
from tune_bisenet.report.samples import best_sample, samples
from tune_bisenet.report.study import Study
from tune_bisenet.report.views import Cell, View
from tune_bisenet.text import counted

PATIENCE: Final = timedelta(minutes=10)
PATIENCE_EPOCHS: Final = 5
"""Silence of so many of the slowest epochs, at least PATIENCE, is taken for an end."""


# --- how it stands --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class State:
    """`sentence` says all of it; `word` is its summary."""

    word: Literal["finished", "running", "interrupted", "silent", "ended with failures", "limit reached"]
    sentence: str


def state(search: SearchRecord, now: datetime) -> State:
    """Whether the search runs or how it ended, as far as its storage tells at `now`; of a study also its best."""
    found, best = _state(search, now), best_sample(one for one in samples(search) if not one.is_known)
    summary = f" The best of them is {best.trial} with {best.miou:.2f} % mIoU." if best else ""
    return replace(found, sentence=found.sentence + summary)


def _state(search: SearchRecord, now: datetime) -> State:
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
    if session.limit and len(ended) < len(search.standings):
        return State(word="limit reached", sentence=f"Ended on {when(session.ended)}, as {session.limit}: {progress}.")
    if failed or len(ended) < len(search.standings):
        lost = f", of which failed: {', '.join(failed)}" if failed else ""
        return State(word="ended with failures", sentence=f"Ended on {when(session.ended)}: {progress}{lost}.")
    why = f", as {session.limit}" if session.limit else ""
    return State(word="finished", sentence=f"Finished on {when(session.ended)}{why}: {progress}.")


def when(time: datetime) -> str:
    """As `2026-03-01 14:05 UTC`."""
    return f"{time:%Y-%m-%d %H:%M %Z}"


def _patience(search: SearchRecord) -> timedelta:
    slowest = max((epoch.seconds for trial in search.trials.values() for epoch in trial.epochs), default=0.0)
    return max(PATIENCE, timedelta(seconds=PATIENCE_EPOCHS * slowest))


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
        *(_study(manifest.study) if manifest.study else []),
        *_limits(manifest.limits),
        ("precision", manifest.choices.precision),
        ("storage", search.folder.uri),
        *(line for number, session in enumerate(manifest.sessions, start=1) for line in _session(number, session)),
    ]  # fmt: skip
    return View(words="", columns=("what", "value"), rows=tuple((Cell(title), Cell(text)) for title, text in lines))


def _study(study: Study) -> list[tuple[str, str]]:
    known = [("began with", ", ".join(study.warm_start))] if study.warm_start else []
    return [
        ("study", f"{study.name} in {study.url}"),
        ("sampler", f"{study.sampler}, for {' and '.join(study.objectives)}"),
        *known,
    ]


def _limits(limits: Limits) -> list[tuple[str, str]]:
    bounds = {
        "trials": limits.trials and counted(limits.trials, "trial"),
        "time": limits.time_budget_seconds and f"{timedelta(seconds=round(limits.time_budget_seconds))} hours",
        "compute": limits.gpu_hours and f"{limits.gpu_hours:g} GPU-hours",
    }
    told = [words for words in bounds.values() if words]
    return [("limits", ", ".join(told))] if told else []


def _session(number: int, session: Session) -> list[tuple[str, str]]:
    until = "open" if session.ended is None else when(session.ended)
    versions = ", ".join(f"{name} {version}" for name, version in session.packages.items())
    gpus = f"{session.gpus_per_trial:g} GPU and " if session.gpus_per_trial else ""
    share = f"{gpus}{counted(session.cpus_per_trial, 'CPU core')}, {counted(session.trials_at_once, 'trial')} at once"
    return [
        (f"session {number}", f"{when(session.started)} to {until}"),
        *([("ended as", session.limit)] if session.limit else []),
        ("command", shlex.join(session.command)),
        ("commit", session.commit or "not from a checkout"),
        ("versions", f"Python {session.python}, {versions}"),
        ("a trial's share", share),
    ]
