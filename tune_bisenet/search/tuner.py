"""One search under Ray Tune: the trials that have not ended, a scheduler, and a driver that can be lost at any time.

Tune schedules, Ray runs, storage remembers. A search is never restored from Tune's own state: whatever ended the
driver, the next one starts a new Tune experiment over what is left, and each trial goes on from its folder.
"""

import logging
import os
import pickle
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ray import tune
from ray.exceptions import RayActorError, RayError
from ray.tune import Callback
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.result import DEFAULT_METRIC
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher

from tune_bisenet.config import Resources, Run, TrialContext
from tune_bisenet.data import sharing
from tune_bisenet.options import Limits
from tune_bisenet.progress import Progress
from tune_bisenet.records import Epoch
from tune_bisenet.rungs import Judge
from tune_bisenet.search import trainable as trial_edge
from tune_bisenet.search.resources import RESTARTABLE
from tune_bisenet.search.searcher import Supply
from tune_bisenet.search.state import SearchState
from tune_bisenet.storage import Storage, StorageError
from tune_bisenet.training.tensorboard import HParamsTable

_log = logging.getLogger(__name__)

METRIC: Final = "miou"
MODE: Final = "max"


class StoppingScheduler(FIFOScheduler):
    """Start trials first in, first out; stop those that `judge` objects to.

    With `Rungs(rungs_of=no_rungs)` it is a plain FIFO scheduler that stops diverged trials.

    A result holds `epoch` (done, from 1), `miou` (percent, finite) and `diverged`; the trial's config holds the run's
    plain dict under "run", and `trial_name_creator` gives each trial a name that is unique in the search.
    """

    # Named, the metric would be demanded of every result, and a trial that resumes at its end and has nothing left to
    # report would end the whole search (seen in Ray 2.60). For the same reason leave it out of TuneConfig.
    _metric = DEFAULT_METRIC

    def __init__(self, judge: Judge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.judge = judge

    @property
    def stops(self) -> dict[str, str]:
        """Why each stopped trial was stopped, by its name."""
        return self.judge.stops

    def state(self) -> dict[str, Any]:
        """For the judge's `from_json` in the next driver. Tune's callbacks get a result after it was judged here."""
        return self.judge.to_json()

    def set_search_properties(self, metric: str | None, mode: str | None, **_spec: Any) -> bool:
        """Whether `TuneConfig(metric=, mode=)` agrees: left out or the same. On False Tune raises a ValueError."""
        return metric in (None, METRIC) and mode in (None, MODE)

    def on_trial_result(self, _tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("done"):
            # The trial has returned. Tune repeats its last result, which was judged when it came; of a trial that
            # resumed at its end and had nothing left to report, the result holds none of our keys.
            return TrialScheduler.CONTINUE
        missing = {"epoch", METRIC, "diverged"} - result.keys()
        assert not missing, f"trial {trial} reported no {', '.join(sorted(missing))}"
        verdict = self.judge.judge(
            Run.model_validate(trial.config["run"]),
            tune_trial_name(trial),
            epoch=result["epoch"],
            miou=result[METRIC],
            diverged=result["diverged"],
        )
        return TrialScheduler.STOP if verdict.stop else TrialScheduler.CONTINUE

    def debug_string(self) -> str:
        return f"stopped early: {len(self.stops)}"


def tune_trial_name(trial: Trial) -> str:
    """The name that outlives a restart. Ray's trial_id does not, nor does `str(trial)` where no name was given."""
    assert trial.custom_trial_name, "trials need TuneConfig(trial_name_creator=...)"
    return str(trial.custom_trial_name)


MAX_FAILURES: Final = 3
"""How often in a row, without an epoch between, a trial is put back to its last epoch before it counts as failed.

A lost node, a killed worker or a hiccup of the storage costs an unfinished epoch, however often; what cannot go on, or
takes its node down each time, comes to an end. Ray itself counts nothing where it was told of a preemption (`spot`).
"""

SECONDS_BETWEEN_LOOKS: Final = 10.0
"""At all trials of a search, which may be thousands."""

SECONDS_WITHOUT_TRIAL: Final = 600.0
"""After which it is said that trials wait for a node: a machine of a cloud takes minutes to come."""


@dataclass
class SessionOutcome:
    """How a session of a search ended: by itself, by a signal, by a limit or by trouble, both in words."""

    signal_number: int | None = None
    limit: str = ""
    trouble: str = ""

    @property
    def is_cut_off(self) -> bool:
        return self.signal_number is not None or bool(self.limit or self.trouble)


class TuneCallback(Callback):
    """Takes what Tune hears of trials to the ledger, the supply and the screen, and ends a search at its limit."""

    def __init__(
        self,
        ledger: SearchState,
        scheduler: StoppingScheduler,
        progress: Progress,
        supply: Supply,
        limits: Limits,
        gpus_per_trial: float,
        outcome: SessionOutcome,
    ) -> None:
        self._ledger = ledger
        self._scheduler = scheduler
        self._progress = progress
        self._supply = supply
        self._limits = limits
        self._gpus_per_trial = gpus_per_trial
        self._outcome = outcome
        self._ran_at = self._looked_at = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that never comes

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.started(tune_trial_name(trial))
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = tune_trial_name(trial)
        is_new = result["epoch"] > self._ledger[name].epochs
        self._ledger.heard(name, result)
        self._ledger.write_if_due()
        self._supply.heard(name, epoch=result["epoch"], miou=result["miou"])
        if is_new:
            trial.max_failures = trial.num_failures + MAX_FAILURES
            self._progress.epoch_done(name, _epoch_of(result))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = tune_trial_name(trial)
        diverged = bool((trial.last_result or {}).get("diverged"))
        self._ledger.ended(name, diverged=diverged, stopped_by=self._scheduler.stops.get(name, ""))
        self._supply.ended(self._ledger[name])
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = _error_of(trial)
        if isinstance(error, RayActorError):  # no fault of the trial's, most of the time
            words = f"lost its process ({_last_line(error)}); it goes on from its last epoch, where there is room."
        else:
            words = f"failed and is tried again from its last epoch:\n{error}"
        _log.warning("%s %s", tune_trial_name(trial), words)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, error = tune_trial_name(trial), _error_of(trial)
        _log.error("%s failed:\n%s", name, error)
        self._ledger.failed(name, _last_line(error))
        self._supply.ended(self._ledger[name])
        self._show()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        self._say_if_none_runs(trials)
        if not self._outcome.is_cut_off and self.is_cut_off():
            signal.raise_signal(signal.SIGUSR1)  # Tune then ends as it does for a person: trials wait to be resumed

    def is_cut_off(self) -> bool:
        """Whether a signal has come, a limit is reached or the supply is in trouble."""
        if not self._outcome.is_cut_off:
            self._outcome.trouble = self._supply.trouble
            self._outcome.limit = self._limits.used_up(seconds=self._ledger.seconds, gpu_hours=self._gpu_hours())
        return self._outcome.is_cut_off

    def _gpu_hours(self) -> float:
        """Of all trials; not added up where nothing depends on it."""
        if self._limits.gpu_hours is None:
            return 0.0
        return sum(standing.seconds for standing in self._ledger.standings) * self._gpus_per_trial / 3600

    def _say_if_none_runs(self, trials: list[Trial]) -> None:
        now = time.monotonic()
        if now - self._looked_at < SECONDS_BETWEEN_LOOKS:
            return
        self._looked_at = now
        if any(trial.status == Trial.RUNNING for trial in trials):
            self._ran_at = now
        elif now - self._ran_at > SECONDS_WITHOUT_TRIAL:
            _log.warning("No trial runs: they wait for a node that can hold one. `ray status` says why none comes.")
            self._ran_at = now

    def _show(self) -> None:
        self._progress.update([*self._ledger.standings, *self._supply.to_come()])


def _epoch_of(result: dict[str, Any]) -> Epoch:
    return Epoch(**{field.name: result[field.name] for field in fields(Epoch)})


def _error_of(trial: Trial) -> BaseException | None:
    """The last error, as the driver has it at hand: on storage it is later."""
    if trial.pickled_error_file is None or not Path(trial.pickled_error_file).exists():
        return None
    error: BaseException = pickle.loads(Path(trial.pickled_error_file).read_bytes())
    return error


def _last_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() if error else []
    return lines[-1].strip() if lines else "unknown error"


KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Tune would hand these to its workers by name and value, which Ray writes into its logs and shows to who asks. Workers
of this machine inherit them; nodes of a cluster have a role, or an environment of their own."""


# --- Tune -------------------------------------------------------------------------------------------------------


def run_trials(
    supply: Supply,
    job: TrialContext,
    resources: Resources,
    *,
    scheduler: StoppingScheduler,
    limits: Limits,
    ledger: SearchState,
    board: HParamsTable,
    progress: Progress,
) -> SessionOutcome:
    """Train what `supply` hands out, until it has nothing more, a limit is reached or a signal comes.

    An error that ends the whole Tune experiment, such as Ray's memory monitor killing a worker, costs each trial
    its unfinished epoch: as long as there is progress, another experiment follows over what is left.
    """
    outcome = SessionOutcome()
    recorder = TuneCallback(ledger, scheduler, progress, supply, limits, resources.gpus_per_trial, outcome)
    with _restartable():
        with _signals(outcome):
            while supply.begin() and not recorder.is_cut_off():
                epochs_before = _epochs_done(ledger)
                try:
                    _share_packs(job)
                    _fit(TuneSearcher(supply, board), job, resources, scheduler, recorder)
                except KeyboardInterrupt:
                    break
                except (RayError, TuneError) as error:
                    if _epochs_done(ledger) == epochs_before or _storage_trouble(error):
                        raise
                    _log.warning("Tune gave up (%s); going on with what is left.", error)
                else:
                    break
        ledger.close()
        supply.close()
        board.write()
    return outcome


@contextmanager
def _restartable() -> Iterator[None]:
    """End the process, as one to be run again, if storage was away for longer than a search waits for it."""
    try:
        yield
    except Exception as error:
        trouble = _storage_trouble(error)
        if trouble is None:
            raise
        _log.error("%s. Nothing is lost: when it answers, run the same command again with --resume.", trouble)
        os._exit(RESTARTABLE)  # threads of Tune's still wait for it, and pyarrow's end badly with the interpreter


def _storage_trouble(error: BaseException | None) -> StorageError | None:
    """The error of ours under Tune's."""
    while error is not None and not isinstance(error, StorageError):
        error = error.__cause__ or error.__context__
    return error


def _share_packs(job: TrialContext) -> None:
    """Put this node's packs where the others find them. A node that finds none packs for itself."""
    if job.shared_packs is None:
        return
    try:
        for pack in job.packs.values():
            sharing.publish(Path(pack), Storage.at(job.shared_packs))
    except OSError as error:
        _log.warning("The packed frames could not be copied to %s: %s", job.shared_packs, error)


def _epochs_done(ledger: SearchState) -> int:
    return sum(standing.epochs for standing in ledger.standings)


def _fit(
    asking: "TuneSearcher",
    job: TrialContext,
    resources: Resources,
    scheduler: StoppingScheduler,
    recorder: "TuneCallback",
) -> None:
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(KEYS)
    storage = Storage.at(job.storage) / "tune"
    trainable = tune.with_resources(
        tune.with_parameters(trial_edge.train_trial, job=job.model_dump(mode="json")),
        {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            # No metric here: Tune would end the whole search if one trial returned without a report.
            search_alg=asking,
            num_samples=-1,  # until the supply is exhausted
            scheduler=scheduler,
            max_concurrent_trials=resources.max_concurrent,
            reuse_actors=True,
            trial_name_creator=partial(_name_of, job),
            trial_dirname_creator=partial(_name_of, job),
        ),
        run_config=tune.RunConfig(
            # A name of its own each time, so that a new driver never writes over an earlier one's files.
            name=time.strftime("%Y-%m-%dT%H-%M-%S") + f"-{os.getpid()}",
            storage_path=storage.path,
            storage_filesystem=storage.filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[recorder, JsonLoggerCallback(), CSVLoggerCallback()],  # type: ignore[no-untyped-call]
            verbose=0,
        ),
    )
    tuner.fit()


class TuneSearcher(Searcher):
    """Tune's searcher: asks the supply. What becomes of a trial the recorder tells, who knows trials by their names."""

    def __init__(self, supply: Supply, board: HParamsTable) -> None:
        super().__init__()
        self._supply = supply
        self._board = board

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that never comes

    def suggest(self, trial_id: str) -> Any:
        """A trial's config; None if there is none at the moment, FINISHED if there is none any more."""
        found = self._supply.next()
        if found is None:
            return Searcher.FINISHED if self._supply.exhausted else None
        self._board.add(*found)
        return {"run": found[1].model_dump(mode="json")}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


def _name_of(job: TrialContext, trial: Trial) -> str:
    return job.trial_name(Run.model_validate(trial.config["run"]))


# --- signals ----------------------------------------------------------------------------------------------------


@contextmanager
def _signals(outcome: SessionOutcome) -> Iterator[None]:
    """Let SIGINT and SIGTERM (a spot notice, a job's stop) end the search cleanly, between two results.

    Tune itself listens to SIGUSR1 while it runs. A second signal, or one that Tune is not there for, ends at once.
    """

    def handle(number: int, _frame: FrameType | None) -> None:
        again = outcome.signal_number is not None
        outcome.signal_number = number
        if again or signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
            raise KeyboardInterrupt
        signal.raise_signal(signal.SIGUSR1)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
