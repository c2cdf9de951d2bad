"""The state of a search while it runs: every trial's, and its copies in the search's folder.

`--resume` starts from `trials.json`. Trials themselves, with their epochs and weights, are in folders beside it.
"""

import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, NoReturn

from filelock import FileLock, Timeout
from pydantic import Field

from tune_bisenet.config import Run
from tune_bisenet.options import InputError
from tune_bisenet.records import (
    ENDED_WELL,
    LAST,
    LEADERBOARD_CSV,
    LEADERBOARD_MD,
    MEASURED,
    PREVIOUS,
    TRIALS,
    DamagedFileError,
    SavedState,
    Status,
    TrialRecord,
    TrialSpec,
    TrialState,
    find_contradiction,
    from_json,
    read_sound_trial,
    read_sound_trials,
    to_json,
    true_state,
    write_saved_state,
    write_trial,
)
from tune_bisenet.report import leaderboard
from tune_bisenet.storage import ConditionalFile, Storage, StorageError

LEASE_SECONDS: Final = 120.0
"""How long the lease of a search in object storage holds that is not renewed."""
RENEWAL_SECONDS: Final = 20.0
LOOK_SECONDS: Final = 5.0
"""Between two looks at another driver's lease."""

SECONDS_BETWEEN_WRITES: Final = 1.0

MAX_SHARE_OF_WRITING: Final = 0.05
"""Of the driver's time: in a search of thousands of trials, each write takes some tenths of a second."""

_log = logging.getLogger(__name__)


@dataclass
class SessionOutcome:
    """Says how a session of a search ended: by itself, by a signal, or by a limit, in words."""

    signal_number: int | None = None
    limit: str = ""
    max_concurrent: int | None = None
    """How many trials ran at once at most after memory had run out; None if it has not."""
    gpus_per_trial: float | None = None
    """The share of a GPU that each trial had after its memory had run out; None if it has not."""
    warnings: list[str] = field(default_factory=list)
    """What trials have warned of, with their names."""

    @property
    def is_cut_off(self) -> bool:
        """Return whether there may be more to train."""
        return self.signal_number is not None or bool(self.limit)


@dataclass(frozen=True, kw_only=True)
class Holder:
    """The driver that runs a search, as it says in a file beside the search's folder; in object storage its lease."""

    host: str
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    machine: str
    """Equal for two processes that see each other by their pids."""
    since: datetime
    renewals: int = 0
    ended: bool = False

    @classmethod
    def of_this_process(cls) -> "Holder":
        try:
            boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
            machine = f"{boot} {Path('/proc/self/ns/pid').readlink()}"
        except OSError:  # not Linux
            machine = f"{uuid.getnode():x}"
        now = datetime.now(UTC).replace(microsecond=0)
        return cls(host=socket.gethostname(), pid=os.getpid(), machine=machine, since=now)

    @property
    def has_ended(self) -> bool:
        """Return whether it has said so, or was a process of this machine that is gone."""
        own = Holder.of_this_process()
        if self.ended or (self.host, self.machine) != (own.host, own.machine):
            return self.ended
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:  # of another user
            pass
        return False

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.since:%Y-%m-%d %H:%M:%S %Z},"


@contextmanager
def exclusive(folder: Storage) -> Iterator[None]:
    """Keep other drivers of the same search out; raise InputError, naming the one that runs it.

    On a disk by a lock, which ends with its process. In object storage by a lease that a thread renews: that of a dead
    machine ends after `LEASE_SECONDS`, and a process whose lease another has taken in the meantime ends at once.
    """
    # Beside the folder: a search that is refused leaves none.
    file = ConditionalFile(folder.parent, f".{folder.name}.driver.json")
    with _leased(file, folder) if folder.local_path is None else _locked(file, folder):
        yield


@contextmanager
def _locked(file: ConditionalFile, folder: Storage) -> Iterator[None]:
    path = Path(file.folder.path) / f".{folder.name}.lock"
    lock = FileLock(path, timeout=0)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout as error:
        raise InputError(_held_by(_read_holder(file.read()), folder)) from error
    except (OSError, NotImplementedError) as error:
        raise InputError(f"{path} cannot be locked ({error}): choose a --storage that can be written to.") from error
    try:
        file.read()
        file.write(to_json(Holder.of_this_process()))
        yield
    finally:
        lock.release()


@contextmanager
def _leased(file: ConditionalFile, folder: Storage) -> Iterator[None]:
    if not file.is_exact():
        _log.warning(
            "%s does not compare before it writes, so two drivers that begin this search within the same seconds "
            "are not kept apart: begin one after the other.",
            folder.uri,
        )
    _wait_for_lease(file, folder)
    lease, done = Holder.of_this_process(), threading.Event()
    if not file.write(to_json(lease)):
        raise InputError(_held_by(_read_holder(file.read()), folder))
    file.folder = replace(file.folder, retry=replace(file.folder.retry, seconds=0.0))  # the next renewal tries again

    def renew() -> None:
        nonlocal lease
        while not done.wait(RENEWAL_SECONDS):
            lease = replace(lease, renewals=lease.renewals + 1)
            with suppress(StorageError):
                if not file.write(to_json(lease)):
                    _end_at_once(_read_holder(file.read()), folder)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        with suppress(StorageError):
            file.write(to_json(replace(lease, ended=True)))


def _end_at_once(other: Holder | None, folder: Storage) -> NoReturn:
    """End this process before it writes anything more."""
    message = (
        "%s runs the search in %s now: it took over when this driver had been silent for minutes. This one ends and "
        "writes nothing more. To continue it here, stop the other first."
    )
    _log.error(message, other or "another process", folder.uri)
    os._exit(os.EX_TEMPFAIL)


def _wait_for_lease(file: ConditionalFile, folder: Storage) -> None:
    """Return once no lease holds; raise InputError if another driver renews one. No two machines' clocks are compared.

    Reads that take long say that storage was away, and that its holder could not renew it either.
    """
    first = file.read()
    holder = _read_holder(first)
    if first is None or (holder and holder.has_ended):
        return
    message = "%s ran the search in %s. If it is dead, this driver takes over in %.0f s."
    _log.warning(message, str(holder or "another driver").rstrip(","), folder.uri, LEASE_SECONDS)
    silent_since = time.monotonic()
    while time.monotonic() - silent_since < LEASE_SECONDS:
        time.sleep(LOOK_SECONDS)
        asked_at = time.monotonic()
        content = file.read()
        if time.monotonic() - asked_at > LOOK_SECONDS:
            silent_since = time.monotonic()
        if content != first:
            holder = _read_holder(content)
            if content is None or (holder and holder.has_ended):
                return
            raise InputError(_held_by(holder, folder))


def _read_holder(content: bytes | None) -> Holder | None:
    """Return who holds a search; None if the file does not say."""
    with suppress(DamagedFileError):
        return from_json(Holder, content or b"", path="")
    return None


def _held_by(holder: Holder | None, folder: Storage) -> str:
    return f"{holder or 'another process'} is running the search in {folder.uri}: wait for it, or stop it."


class SearchState:
    """The states of a search's trials, in declared order, and their copies in storage.

    A session may be about some rows `only`; the trials of others keep their state.
    """

    def __init__(
        self,
        folder: Storage,
        states: Sequence[TrialState],
        *,
        captions: Sequence[str],
        baseline: str | None,
        only: Collection[str] | None = None,
        scheduler_state: Callable[[], dict[str, Any]],
        seconds_before: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._folder = folder
        self._states = {state.trial: state for state in states}
        self._captions = tuple(captions)
        self._baseline = baseline
        self._only = only
        self._scheduler_state = scheduler_state
        self._clock = clock
        self._began_at = clock() - seconds_before
        self._written_at = -SECONDS_BETWEEN_WRITES
        self._write_seconds = 0.0

    @property
    def states(self) -> list[TrialState]:
        return list(self._states.values())

    def __getitem__(self, trial: str) -> TrialState:
        return self._states[trial]

    @property
    def seconds(self) -> float:
        """Return the running time of the search in all its sessions."""
        return self._clock() - self._began_at

    def add(self, state: TrialState) -> None:
        """Add a trial; one that is there already keeps its state."""
        self._states.setdefault(state.trial, state)

    def unfinished(self) -> list[str]:
        """Return the trials of this session that have not ended in any way."""
        return [
            name
            for name, state in self._states.items()
            if state.status in ("waiting", "running") and (self._only is None or state.run in self._only)
        ]

    def on_start(self, trial: str) -> None:
        self._set(trial, status="running")

    def on_result(self, trial: str, measured: dict[str, Any]) -> None:
        """Take over what a trial has measured; `measured` has the keys `MEASURED`, and may have others."""
        self._set(trial, status="running", **{name: measured[name] for name in MEASURED})

    def on_end(self, spec: TrialSpec, *, diverged: bool, stopped_by: str) -> None:
        """Note that a trial has returned or was stopped, and let its folder say so."""
        state = self._states[spec.trial]
        if diverged or state.epochs < state.num_epochs:
            self._set(spec.trial, status="diverged" if diverged else "stopped", stopped_by=stopped_by)
        else:
            self._set(spec.trial, status="finished")
        end_trial(self._folder, spec, self._states[spec.trial])
        self._write_unless_costly()

    def on_error(self, trial: str, error: str) -> None:
        self._set(trial, status="failed", error=error)
        self._write_unless_costly()

    def restore_end(self, spec: TrialSpec, status: Status) -> None:
        """Note an end that only the study remembers, and let the trial's folder say so."""
        self._set(spec.trial, status=status)
        end_trial(self._folder, spec, self._states[spec.trial])

    def close(self) -> None:
        """Let every trial that ran wait for `--resume`."""
        for name in self.unfinished():
            self._set(name, status="waiting")
        self.write()

    def write(self) -> None:
        began_at = self._clock()
        saved = SavedState(states=tuple(self.states), scheduler=self._scheduler_state(), seconds=round(self.seconds, 1))
        write_saved_state(self._folder, saved)
        self._folder.write(LEADERBOARD_CSV, leaderboard.to_csv(self.states, baseline=self._baseline).encode())
        markdown = leaderboard.to_markdown(self.states, captions=self._captions, baseline=self._baseline)
        self._folder.write(LEADERBOARD_MD, markdown.encode())
        self._written_at = self._clock()
        self._write_seconds = self._written_at - began_at

    def write_if_due(self) -> None:
        """Write the copies at most once a second: a search of many short epochs must not drown its storage."""
        if self._clock() - self._written_at >= SECONDS_BETWEEN_WRITES:
            self._write_unless_costly()

    def _write_unless_costly(self) -> None:
        """Write the copies if that takes a small share of the time; else leave it to the next change."""
        if self._clock() - self._written_at >= self._write_seconds / MAX_SHARE_OF_WRITING:
            self.write()

    def _set(self, trial: str, **changes: Any) -> None:
        self._states[trial] = replace(self._states[trial], **changes)


def end_trial(search: Storage, spec: TrialSpec, state: TrialState) -> None:
    """Record in a trial's folder that it has ended well, and delete what it would have resumed from."""
    folder = search / spec.trial
    record = read_sound_trial(folder) or TrialRecord.of_spec(spec)
    write_trial(search, replace(record, spec=spec, state=state))
    for name in (LAST, PREVIOUS):
        if folder.exists(name):
            folder.delete(name)


def complete_states(search: Storage, saved: Sequence[TrialState], trials: Iterable[str]) -> list[TrialState]:
    """Return `saved`, from trials.json, as far as it agrees with the records of `trials`, and else what those say."""
    states = {state.trial: state for state in saved}
    for name, record in read_sound_trials(search, trials).items():
        cached = states.get(name)
        if cached and (contradiction := find_contradiction(record, cached)):
            _log.warning("%s is wrong about %s and was rebuilt: %s.", TRIALS, name, contradiction)
        states[name] = true_state(record, cached)
    return list(states.values())


def restore(trial: str, run: Run, earlier: Sequence[TrialState], *, only: Collection[str] | None = None) -> TrialState:
    """Return a trial's state as a session begins: ended trials stay ended, all others wait, failed ones too.

    In a session about the rows `only`, failed trials of other rows stay failed.
    """
    known = {state.trial: state for state in earlier}.get(trial)
    if known is None:
        return TrialState.of_run(trial, run)
    stays_failed = known.status == "failed" and only is not None and run.name not in only
    if known.status in ENDED_WELL or stays_failed:
        return known
    return replace(known, status="waiting", stopped_by="", error="")
