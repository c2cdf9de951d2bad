"""What a search keeps in its own folder while it runs: who stands where, and what was decided.

    trials.json        every trial's standing, and the scheduler's state: what `--resume` goes on from
    leaderboard.csv    the standings as a table, kept current
    leaderboard.md

Trials themselves, with weights and epochs, lie in folders beside these, and `manifest` says how it all was made.
"""

import json
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from filelock import FileLock, Timeout

from tune_bisenet import records
from tune_bisenet.config import Run
from tune_bisenet.records import ENDED_WELL, SEARCH, TRIALS, Status, TrialState
from tune_bisenet.report import leaderboard
from tune_bisenet.storage import Storage

LEADERBOARD_CSV: Final = "leaderboard.csv"
LEADERBOARD_MD: Final = "leaderboard.md"

SECONDS_BETWEEN_WRITES: Final = 1.0

MAX_SHARE_OF_WRITING: Final = 0.05
"""Of a driver's time: in a search of thousands each write takes some tenths of a second."""


class InUseError(ValueError):
    """Another driver is at work on the same search."""


@contextmanager
def exclusive(folder: Storage) -> Iterator[None]:
    """Keep other drivers on this machine's disk out: two would train everything twice. Raises InUseError.

    Object storage has no locks; there, a second driver repeats work but damages nothing.
    """
    if folder.local_path is None:
        yield
        return
    path = folder.local_path.with_name(
        f".{folder.local_path.name}.lock"
    )  # beside it: a search refused leaves no folder
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise InUseError(f"another process is running the search in {folder.path}: wait for it, or stop it.") from error
    try:
        yield
    finally:
        lock.release()


class SearchState:
    """The standings of a search, in declared order, and their copies on storage.

    A session may be about some rows only: `only`. The others stand where they stood.
    """

    def __init__(
        self,
        folder: Storage,
        standings: Sequence[TrialState],
        *,
        captions: Sequence[str],
        baseline: str | None,
        only: Collection[str] | None = None,
        scheduler_state: Callable[[], dict[str, Any]],
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._standings = {standing.trial: standing for standing in standings}
        self._captions = tuple(captions)
        self._baseline = baseline
        self._only = only
        self._scheduler_state = scheduler_state
        self._clock = clock
        self._began_at = clock() - seconds_before
        self._written_at = -SECONDS_BETWEEN_WRITES
        self._write_seconds = 0.0

    @property
    def standings(self) -> list[TrialState]:
        return list(self._standings.values())

    def __getitem__(self, trial: str) -> TrialState:
        return self._standings[trial]

    @property
    def seconds(self) -> float:
        """How long the search has run, in all its sessions."""
        return self._clock() - self._began_at

    def add(self, standing: TrialState) -> None:
        """Take in a trial that was not known before; one that is stands as it stood."""
        self._standings.setdefault(standing.trial, standing)

    def learnt(self, trial: str, status: Status) -> None:
        """A trial has ended in a way that this ledger had lost."""
        self._set(trial, status=status)

    def unfinished(self) -> list[str]:
        """The trials of this session that have not come to an end of any kind."""
        return [
            name
            for name, standing in self._standings.items()
            if standing.status in ("waiting", "running") and (self._only is None or standing.run in self._only)
        ]

    def started(self, trial: str) -> None:
        self._set(trial, status="running")

    def heard(self, trial: str, result: dict[str, Any]) -> None:
        """Take over what a trial reported after an epoch."""
        self._set(
            trial,
            status="running",
            epochs=result["epoch"],
            best_miou=result["best_miou"],
            best_epoch=result["best_epoch"],
            last_miou=result["miou"],
            pixel_accuracy=result["pixel_accuracy"],
            seconds=result["total_seconds"],
            latency_ms=result["latency_ms"],
        )

    def ended(self, trial: str, *, diverged: bool, stopped_by: str) -> None:
        """A trial has returned or was stopped by the scheduler."""
        standing = self._standings[trial]
        if diverged:
            self._set(trial, status="diverged", stopped_by=stopped_by)
        elif standing.epochs < standing.num_epochs:
            self._set(trial, status="stopped", stopped_by=stopped_by)
        else:
            self._set(trial, status="finished")
        records.keep_ending(self._folder / trial, self._standings[trial])
        self._write_unless_costly()

    def failed(self, trial: str, error: str) -> None:
        self._set(trial, status="failed", error=error)
        self._write_unless_costly()

    def close(self) -> None:
        """Nothing runs any more: what was running waits for `--resume`."""
        for name in self.unfinished():
            self._set(name, status="waiting")
        self.write()

    def write(self) -> None:
        """Bring the copies on storage up to date."""
        began_at = self._clock()
        record = {
            "standings": [standing.to_json() for standing in self.standings],
            "scheduler": self._scheduler_state(),
            "seconds": round(self.seconds, 1),
        }
        self._folder.write(TRIALS, json_bytes(record))
        self._folder.write(LEADERBOARD_CSV, leaderboard.to_csv(self.standings, baseline=self._baseline).encode())
        markdown = leaderboard.to_markdown(self.standings, captions=self._captions, baseline=self._baseline)
        self._folder.write(LEADERBOARD_MD, markdown.encode())
        self._written_at = self._clock()
        self._write_seconds = self._written_at - began_at

    def write_if_due(self) -> None:
        """The same, at most once a second: a search of many short epochs must not drown its storage."""
        if self._clock() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._write_unless_costly()

    def _write_unless_costly(self) -> None:
        """The same, as long as that takes a small share of the time; else with what comes next."""
        if self._clock() - self._written_at >= self._write_seconds / MAX_SHARE_OF_WRITING:
            self.write()

    def _set(self, trial: str, **changes: Any) -> None:
        self._standings[trial] = replace(self._standings[trial], **changes)


def read_manifest(folder: Storage) -> dict[str, Any] | None:
    """The manifest of the search in `folder`; None if there is no search. ValueError if it is damaged."""
    return read_json(folder, SEARCH)


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """What `trials.json` holds."""

    standings: tuple[TrialState, ...] = ()
    scheduler: dict[str, Any] | None = None
    """The scheduler's state."""
    seconds: float = 0.0
    """How long the search had run."""


def read_trials(folder: Storage) -> SavedState:
    """What was last written; nothing if the file is missing or damaged.

    It may be lost without loss: every trial's folder says how far that trial is.
    """
    try:
        record = read_json(folder, TRIALS)
        if record is None:
            return SavedState()
        standings = tuple(TrialState.from_json(standing) for standing in record["standings"])
        return SavedState(standings=standings, scheduler=record["scheduler"], seconds=float(record.get("seconds", 0.0)))
    except (ValueError, LookupError, TypeError, AttributeError):  # no JSON, or JSON of another shape
        return SavedState()


def restore(trial: str, run: Run, earlier: Sequence[TrialState], *, only: Collection[str] | None = None) -> TrialState:
    """Where a trial stands as a session begins: ended trials stay ended, all others wait, failed ones too.

    In a session about the rows `only`, what failed in others stays failed.
    """
    known = {other.trial: other for other in earlier}.get(trial)
    if known is None:
        return TrialState(trial=trial, run=run.name, seed=run.seed, num_epochs=run.num_epochs)
    stays_failed = known.status == "failed" and only is not None and run.name not in only
    return (
        known
        if known.status in ENDED_WELL or stays_failed
        else replace(known, status="waiting", stopped_by="", error="")
    )


def json_bytes(value: Any) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(folder: Storage, name: str) -> dict[str, Any] | None:
    """A JSON object in `folder`; None if there is no such file. ValueError if it is damaged."""
    content = folder.read(name)
    if content is None:
        return None
    try:
        record = json.loads(content)
        if not isinstance(record, dict):
            raise ValueError("it holds no JSON object")
    except ValueError as error:
        raise ValueError(
            f"{folder.path}/{name} is damaged: {error}. Start a new search under another --name."
        ) from error
    return record
