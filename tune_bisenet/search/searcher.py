"""Where a session's trials come from: declared rows, or an Optuna study that is asked for one after the other.

A searcher hands out trials until there are none left, and is told what becomes of each. It knows nothing of Ray.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import TypeVar

from tune_bisenet.config import partners, trial_name
from tune_bisenet.options import InputError
from tune_bisenet.records import (
    TrialRecord,
    TrialSpec,
    TrialState,
    read_sound_trial,
    write_known,
    write_trial,
)
from tune_bisenet.search.state import SearchState
from tune_bisenet.spaces import SpaceError
from tune_bisenet.storage import RetryPolicy, Storage, StorageError, StorageRefusedError, retry_seconds
from tune_bisenet.study.study import DATABASE_ERRORS, Study, StudySetup, is_outage
from tune_bisenet.study.warm_start import fresh_runs

_Value = TypeVar("_Value")


class Searcher(ABC):
    """Hands out trials, each once between two calls of `begin`."""

    exhausted: bool = False
    """Whether `next` will return no more trials."""

    @abstractmethod
    def begin(self) -> bool:
        """Start over with all trials that have not ended. Return whether there are any."""

    @abstractmethod
    def next(self) -> TrialSpec | None:
        """Return a trial to start now; None if there is none now, or none any more."""

    def on_result(self, trial: str, *, epoch: int, miou: float) -> None:
        """Take in the mIoU (percent) of one epoch; NaN if it diverged."""

    def on_end(self, state: TrialState) -> None:
        """Take in how a trial ended, after the search's state has."""

    def close(self) -> None:
        """End the session: no trial runs any more."""

    def pending(self) -> list[TrialState]:
        """Return the trials that are not in the search's state yet, as far as their number is known."""
        return []

    def fresh_trials(self, count: int) -> dict[str, TrialSpec]:
        """Add `count` fresh seeds for the best trials to the search, and return all such trials by name."""
        return {}


class GridSearcher(Searcher):
    """Hands out declared trials in their order; those that are new to the search's state are added to it.

    With `share`, a trial that begins as one that is running waits until that has come to where they part: it then
    takes over its epochs (`trainable`), unless that has ended before.
    """

    def __init__(self, specs: Mapping[str, TrialSpec], state: SearchState, *, share: bool) -> None:
        for name, spec in specs.items():
            state.add(TrialState.of_run(name, spec.run))
        self._specs = specs
        self._state = state
        self._left: list[str] = []
        self._live: set[str] = set()
        self._partners = partners({name: spec.run for name, spec in specs.items()}) if share else {}

    def begin(self) -> bool:
        self._left = [name for name in self._state.unfinished() if name in self._specs]
        self._live.clear()
        self.exhausted = not self._left
        return bool(self._left)

    def next(self) -> TrialSpec | None:
        name = next((name for name in self._left if not self._waits(name)), None)
        if name is None:
            return None
        self._left.remove(name)
        self._live.add(name)
        self.exhausted = not self._left
        return self._specs[name]

    def on_end(self, state: TrialState) -> None:
        self._live.discard(state.trial)

    def _waits(self, name: str) -> bool:
        """Return whether a trial that is running will soon have trained epochs that this one can take over."""
        if self._state[name].epochs:
            return False
        others = self._partners.get(name, {})
        return any(self._state[other].epochs < others.get(other, 0) for other in self._live)


class StudySearcher(Searcher):
    """Hands out the trials of a study. Each is written to its folder before it starts.

    At most `max_running()` run at a time, because the sampler learns from those that have ended. Raises StorageError if
    the database refuses, or does not answer for as long as storage is retried: the session ends, and another resumes
    it. Only where that happens before the first trial, what no retry can mend is an InputError.
    """

    def __init__(
        self,
        setup: StudySetup,
        folder: Storage,
        state: SearchState,
        *,
        name: str,
        limit: int | None,
        max_running: Callable[[], int],
        attributes: Mapping[str, str],
    ) -> None:
        self._limit = limit
        if setup.known:
            write_known(folder, setup.known)
        self._setup = setup
        self._name = name
        self._attributes = attributes
        try:
            self._open_study()
        except DATABASE_ERRORS as error:
            told = setup.database.error(error)
            raise (StorageError(str(told)) if is_outage(error) else told) from error
        self._folder = folder
        self._state = state
        self._max_running = max_running
        self._suggested = {name: spec for name, spec in setup.suggested.items() if spec.origin != "confirm"}
        self._fresh = {name: spec for name, spec in setup.suggested.items() if spec.origin == "confirm"}
        self._live: set[str] = set()
        self._has_begun = False

    def begin(self) -> bool:
        self._live.clear()
        self._retry(self._reconcile)
        self._has_begun = True
        self.exhausted = False
        begun = {name for name in self._state.unfinished() if name in self._suggested}
        return bool(begun) or self._limit is None or len(self._suggested) < self._limit

    def next(self) -> TrialSpec | None:
        if len(self._live) >= self._max_running():
            return None
        spec = self._retry(lambda: self._study.ask())
        self.exhausted = spec is None
        if spec is None:
            return None
        self._live.add(spec.trial)
        if spec.trial not in self._suggested:
            self._add(TrialRecord.of_spec(spec), self._suggested)
        return self._suggested[spec.trial]

    def on_result(self, trial: str, *, epoch: int, miou: float) -> None:
        self._retry(lambda: self._study.report(trial, epoch, miou))

    def on_end(self, state: TrialState) -> None:
        self._live.discard(state.trial)
        self._retry(lambda: self._study.tell(state))
        self._setup.database.snapshot()

    def close(self) -> None:
        self._live.clear()
        self._retry(lambda: self._study.close())
        self._setup.database.snapshot()

    def pending(self) -> list[TrialState]:
        number = 0 if self._limit is None else max(0, self._limit - len(self._suggested))
        num_epochs = self._setup.drawn[0].num_epochs
        return [TrialState(trial=f"to come {index}", run="", seed=0, num_epochs=num_epochs) for index in range(number)]

    def fresh_trials(self, count: int) -> dict[str, TrialSpec]:
        trials = [(spec, self._state[name]) for name, spec in self._suggested.items()]
        trials += [(known.spec, known.state) for known in self._setup.known]
        rows = {name: row.run for name, row in self._setup.rows.items()}
        for run in fresh_runs(trials, rows, baseline=self._setup.space.space.baseline, count=count):
            name = trial_name(run, default_seed=self._setup.seed)
            if name not in self._fresh:
                self._add(TrialRecord.of_spec(TrialSpec(trial=name, run=run, origin="confirm")), self._fresh)
        return dict(self._fresh)

    def _add(self, record: TrialRecord, trials: dict[str, TrialSpec]) -> None:
        """Write what a trial trains to its folder, then add it to `trials` and to the search's state."""
        write_trial(self._folder, record)
        trials[record.spec.trial] = record.spec
        self._state.add(record.state)

    def _open_study(self) -> None:
        self._study = Study(self._setup, self._name, limit=self._limit)
        self._study.describe(self._attributes)

    def _reconcile(self) -> None:
        """Make the study, the search's state and the folders agree."""
        for lost in self._study.ended_without(self._suggested):
            self._add(lost, self._suggested)
        records = {}
        for name, spec in self._suggested.items():
            record = read_sound_trial(self._folder / name) or TrialRecord.of_spec(spec)
            records[name] = replace(record, spec=spec, state=self._state[name])
        database = self._setup.database
        if database.is_own and (contradiction := self._study.find_contradiction(list(records.values()))):
            database.put_aside(f"is wrong about {contradiction}")
            self._open_study()
        statuses = self._study.reconcile(list(records.values()), live=self._live)
        for trial, status in statuses.items():
            if measured := records[trial].measured:
                self._state.on_result(trial, measured)
            self._state.restore_end(records[trial].spec, status)
        self._setup.database.snapshot()

    def _retry(self, call: Callable[[], _Value]) -> _Value:
        """Return what `call` returns; if the database is away, retry it as storage is retried.

        A call that was cut off may have written half of what it writes, so the study is reconciled before each retry.
        A file of the search's own that is damaged or gone is rebuilt, once.
        """
        attempts = count()
        database = self._setup.database

        def attempt(*, rebuild: bool = False) -> _Value:
            try:
                if rebuild:
                    self._open_study()
                if next(attempts) > 0:
                    self._reconcile()
                return call()
            except SpaceError:
                raise
            except (*DATABASE_ERRORS, InputError) as error:
                if is_outage(error):
                    raise
                told = error if isinstance(error, InputError) else database.error(error)
                raise (StorageRefusedError(str(told)) if self._has_begun else told) from error

        def attempt_or_rebuild() -> _Value:
            try:
                return attempt()
            except Exception:
                if not database.put_aside_if_damaged(must_exist=True):
                    raise
            return attempt(rebuild=True)

        return RetryPolicy("the study's database", retry_seconds())(attempt_or_rebuild, writing=True)
