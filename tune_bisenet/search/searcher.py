"""Where a session's trials come from: rows declared beforehand, or a study that is asked for one after the other.

A supply hands out trials until there are none left, and is told what becomes of each. It knows nothing of Ray.
"""

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final, Protocol

from tune_bisenet.config import Run
from tune_bisenet.records import EPOCHS, LATENCY, RUN, Epoch, Known, TrialSpec, TrialState, best_of
from tune_bisenet.search.state import SearchState, json_bytes
from tune_bisenet.storage import Storage, one_line
from tune_bisenet.study.study import DATABASE_ERRORS, Record, Study

_log = logging.getLogger(__name__)

OUTAGE_SECONDS: Final = 600.0
"""How long a search goes on with a study's database that does not answer. Nothing is lost by waiting."""

SECONDS_BETWEEN_TRIES: Final = 5.0


class Supply(Protocol):
    """Where trials come from. A name's trial is handed out once between two calls of `begin`."""

    def begin(self) -> bool:
        """Start over with whatever has not ended; whether there is anything."""

    def next(self) -> tuple[str, Run] | None:
        """A trial to start now, by name; None if there is none at the moment, or none any more."""

    @property
    def exhausted(self) -> bool:
        """Whether `next` has nothing any more."""

    def heard(self, trial: str, *, epoch: int, miou: float) -> None:
        """An epoch was measured."""

    def ended(self, standing: TrialState) -> None:
        """A trial has ended, well or not. The ledger knows already."""

    def close(self) -> None:
        """Nothing runs any more."""

    @property
    def trouble(self) -> str:
        """Why the session cannot go on, in words; empty as long as it can."""

    def to_come(self) -> list[TrialState]:
        """Trials that the ledger has not heard of yet, as far as their number is known."""


class Declared:
    """Runs known beforehand, by trial name, in their order."""

    def __init__(self, runs: Mapping[str, Run], ledger: SearchState) -> None:
        self._runs = runs
        self._ledger = ledger
        self._left: list[str] = []

    def begin(self) -> bool:
        self._left = [name for name in self._ledger.unfinished() if name in self._runs]
        return bool(self._left)

    def next(self) -> tuple[str, Run] | None:
        if not self._left:
            return None
        name = self._left.pop(0)
        return name, self._runs[name]

    @property
    def exhausted(self) -> bool:
        return not self._left

    def heard(self, trial: str, *, epoch: int, miou: float) -> None:
        pass

    def ended(self, standing: TrialState) -> None:
        pass

    def close(self) -> None:
        pass

    @property
    def trouble(self) -> str:
        return ""

    def to_come(self) -> list[TrialState]:
        return []


class Asked:
    """Trials that a study suggests. Each is written to its folder before it starts.

    At most `at_once()` are out at a time: what is asked ahead is asked before the sampler has heard of those running.
    A database that does not answer for a while costs nothing: the study is brought in line when it does again.
    """

    def __init__(
        self,
        study: Study,
        folder: Storage,
        ledger: SearchState,
        *,
        suggested: Mapping[str, TrialSpec],
        known: Sequence[Known],
        limit: int | None,
        at_once: Callable[[], int],
        num_epochs: int,
        snapshot: Callable[[], None],
    ) -> None:
        self._study = study
        self._folder = folder
        self._ledger = ledger
        self._suggested = {name: one for name, one in suggested.items() if one.origin != "confirm"}
        self._known = known
        self._limit = limit
        self._at_once = at_once
        self._num_epochs = num_epochs
        self._snapshot = snapshot
        self._live: set[str] = set()
        self._exhausted = False
        self._behind_since: float | None = None
        self._tried_at = 0.0
        self._trouble = ""

    def begin(self) -> bool:
        self._live.clear()
        with self._tolerated():
            self._reconcile()
        self._exhausted = False
        begun = {name for name in self._ledger.unfinished() if name in self._suggested}
        return bool(begun) or self._limit is None or len(self._suggested) < self._limit

    def next(self) -> tuple[str, Run] | None:
        if len(self._live) >= self._at_once() or not self._catch_up():
            return None
        suggested = None
        with self._tolerated():
            suggested = self._study.next()
            self._exhausted = suggested is None
        if suggested is None:
            return None
        self._live.add(suggested.trial)
        return suggested.trial, self._written(suggested)

    @property
    def exhausted(self) -> bool:
        return self._exhausted

    def heard(self, trial: str, *, epoch: int, miou: float) -> None:
        if self._catch_up():
            with self._tolerated():
                self._study.heard(trial, epoch, miou)

    def ended(self, standing: TrialState) -> None:
        self._live.discard(standing.trial)
        if self._catch_up():
            with self._tolerated():
                self._study.ended(standing)
                self._snapshot()

    def close(self) -> None:
        self._live.clear()
        with self._tolerated():
            if self._behind_since is not None:
                self._reconcile()
            self._study.close()
            self._snapshot()

    @property
    def trouble(self) -> str:
        return self._trouble

    def to_come(self) -> list[TrialState]:
        more = 0 if self._limit is None else max(0, self._limit - len(self._suggested))
        return [
            TrialState(trial=f"to come {number}", run="", seed=0, num_epochs=self._num_epochs) for number in range(more)
        ]

    # --- inside -----------------------------------------------------------------------------------------------------

    def _written(self, suggested: TrialSpec) -> Run:
        """The run of a suggestion, after it is safe in the trial's folder; that of a trial cut off is there already."""
        if suggested.trial not in self._suggested:
            folder = self._folder / suggested.trial
            folder.make()
            folder.write(RUN, json_bytes(suggested.to_json()))
            self._suggested[suggested.trial] = suggested
        run = self._suggested[suggested.trial].run
        self._ledger.add(TrialState(trial=suggested.trial, run=run.name, seed=run.seed, num_epochs=run.num_epochs))
        return run

    def _reconcile(self) -> None:
        for lost in self._study.ended_without(self._suggested):
            self._written(lost)
        standings = {standing.trial: standing for standing in self._ledger.standings}
        records = [
            Record(suggested=one, standing=standings[name], epochs=read_epochs(self._folder / name))
            for name, one in self._suggested.items()
        ]
        curves = {record.suggested.trial: record.epochs for record in records}
        for trial, status in self._study.reconcile(records, self._known, live=self._live).items():
            if curves[trial]:
                self._ledger.heard(trial, reported(curves[trial], latency_ms=read_latency(self._folder / trial)))
            self._ledger.learnt(trial, status)
        self._snapshot()

    def _catch_up(self) -> bool:
        """Whether the study is in line with the folders; after an outage it is brought there, now and then."""
        if self._behind_since is None:
            return True
        if time.monotonic() - self._tried_at < SECONDS_BETWEEN_TRIES:
            return False
        self._tried_at = time.monotonic()
        with self._tolerated():
            self._reconcile()
            self._behind_since, self._trouble = None, ""
            _log.warning("The study's database answers again; nothing was lost.")
        return self._behind_since is None

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        """A study that cannot be written to now will be later. After OUTAGE_SECONDS that is `trouble`."""
        try:
            yield
        except DATABASE_ERRORS as error:
            now = time.monotonic()
            if self._behind_since is None:
                self._behind_since = self._tried_at = now
                _log.warning("The study's database does not answer (%s); trials go on meanwhile.", one_line(error))
            elif now - self._behind_since > OUTAGE_SECONDS:
                self._trouble = (
                    f"the study's database has not answered for {OUTAGE_SECONDS / 60:.0f} minutes ({one_line(error)})"
                )


def read_epochs(folder: Storage) -> list[Epoch]:
    """A trial's curve; nothing if it has none or the file is damaged."""
    try:
        return [Epoch.from_json(record) for record in json.loads(folder.read(EPOCHS) or b"[]")]
    except (ValueError, LookupError, TypeError, AttributeError):
        return []


def read_latency(folder: Storage) -> float | None:
    """Milliseconds of one prediction of the trial's network; None if they were not measured or the file is damaged."""
    try:
        return float(json.loads(folder.read(LATENCY) or b"{}")["median_ms"])
    except (ValueError, LookupError, TypeError):
        return None


def reported(history: Sequence[Epoch], *, latency_ms: float | None) -> dict[str, Any]:
    """What a trial with this curve and this latency has told the ledger."""
    last, best = history[-1], best_of(history)
    return {
        "epoch": last.epoch,
        "miou": last.miou,
        "pixel_accuracy": last.pixel_accuracy,
        "best_miou": best.miou,
        "best_epoch": best.epoch,
        "total_seconds": sum(epoch.seconds for epoch in history),
        "latency_ms": latency_ms,
    }
