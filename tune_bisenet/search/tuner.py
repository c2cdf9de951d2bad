"""One search under Ray Tune: its searcher, scheduler and callback, signals, and what to do when Tune gives up.

Tune schedules, Ray runs, storage remembers. A search is never restored from Tune's own state: whatever ended the
driver, the next one starts a new Tune experiment over what is left, and each trial resumes from its folder.
"""

import logging
import os
import re
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.result import DEFAULT_METRIC
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher as RaySearcher

from tune_bisenet.config import Resources, Run, TrialContext
from tune_bisenet.data.packing import publish_packed
from tune_bisenet.options import Limits
from tune_bisenet.records import TUNE, Epoch, TrialSpec, from_plain, to_plain
from tune_bisenet.rungs import Stopper
from tune_bisenet.search.console import SearchProgress
from tune_bisenet.search.resources import RESTARTABLE
from tune_bisenet.search.searcher import Searcher
from tune_bisenet.search.state import SearchState, SessionOutcome
from tune_bisenet.search.trainable import train_trial
from tune_bisenet.storage import Storage, StorageError, hurry, is_full
from tune_bisenet.training.tensorboard import HParamsTable

METRIC: Final = "miou"
MODE: Final = "max"

MAX_FAILURES: Final = 3
"""How often in a row, without an epoch between, a trial is put back to its last epoch before it counts as failed.

A lost node, a killed worker or a hiccup of the storage costs an unfinished epoch, however often; a trial that cannot
get further, or takes its node down each time, comes to an end. Ray itself counts no failure that was announced as a
preemption (`cluster.daemons`).
"""

SECONDS_BETWEEN_LOOKS: Final = 10.0
"""At all trials of a search, which may be thousands."""

SECONDS_WITHOUT_TRIAL: Final = 600.0
"""After which the user is told that trials wait for a node: a machine of a cloud takes minutes to start."""

AWS_KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Tune would hand these to its workers by name and value, which Ray writes into its logs and shows to anyone who asks.
Workers of this machine inherit them; nodes of a cluster have a role, or an environment of their own."""

_log = logging.getLogger(__name__)


def run_trials(
    searcher: Searcher,
    context: TrialContext,
    resources: Resources,
    *,
    stopper: Stopper,
    limits: Limits,
    state: SearchState,
    table: HParamsTable,
    progress: SearchProgress,
) -> SessionOutcome:
    """Train what `searcher` hands out, until it has nothing more, a limit is reached or a signal comes.

    An error that ends the whole Tune experiment, such as Ray's memory monitor killing a worker, costs each trial
    its unfinished epoch: as long as there is progress, another experiment follows over what is left.
    """
    outcome = SessionOutcome()
    callback = TuneCallback(state, stopper, progress, searcher, limits, resources.gpus_per_trial, outcome)
    with _restartable(outcome):
        with _signals(outcome):
            while searcher.begin() and not callback.is_cut_off():
                epochs_before = _epochs_done(state)
                try:
                    _share_packs(context)
                    _fit(TuneSearcher(searcher, table), context, resources, StoppingScheduler(stopper), callback)
                except KeyboardInterrupt:
                    break
                except (RayError, TuneError) as error:
                    if _epochs_done(state) == epochs_before or _find_outage(error):
                        raise
                    _log.warning("Tune gave up (%s); another Tune experiment trains what is left.", error)
                else:
                    break
        state.close()
        searcher.close()
        table.write()
    return outcome


def _epochs_done(state: SearchState) -> int:
    return sum(trial.epochs for trial in state.states)


def _share_packs(context: TrialContext) -> None:
    """Copy this node's packs to where other nodes find them. A node that finds none packs for itself."""
    if context.shared_packs is None:
        return
    try:
        for pack in context.packs.values():
            publish_packed(Path(pack), Storage.at(context.shared_packs))
    except OSError as error:
        _log.warning("The packed frames could not be copied to %s: %s", context.shared_packs, error)


def _fit(
    searcher: "TuneSearcher",
    context: TrialContext,
    resources: Resources,
    scheduler: "StoppingScheduler",
    callback: "TuneCallback",
) -> None:
    """Run one Tune experiment."""
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(AWS_KEYS)
    storage = Storage.at(context.storage) / TUNE
    trainable = tune.with_resources(
        tune.with_parameters(train_trial, context=context.model_dump(mode="json")),
        {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            # No metric here: Tune would end the whole search if one trial returned without a report.
            search_alg=searcher,
            num_samples=-1,  # until the searcher is exhausted
            scheduler=scheduler,
            max_concurrent_trials=resources.max_concurrent,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            # A name of its own each time, so that a new driver never writes over an earlier one's files.
            name=time.strftime("%Y-%m-%dT%H-%M-%S") + f"-{os.getpid()}",
            storage_path=storage.path,
            storage_filesystem=storage.retrying_filesystem,
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            callbacks=[callback, JsonLoggerCallback(), CSVLoggerCallback()],  # type: ignore[no-untyped-call]
            verbose=0,
        ),
    )
    tuner.fit()


def _name_of(trial: Trial) -> str:
    return str(trial.config["trial"])


class TuneSearcher(RaySearcher):
    """Lets Tune ask a `Searcher`. What becomes of trials is told by `TuneCallback`, which knows them by name."""

    def __init__(self, searcher: Searcher, table: HParamsTable) -> None:
        super().__init__()
        self._searcher = searcher
        self._table = table

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its searcher for a restore that never comes

    def suggest(self, trial_id: str) -> Any:
        """Return a trial's config; None if there is none now, FINISHED if none is left."""
        spec = self._searcher.next()
        if spec is None:
            return RaySearcher.FINISHED if self._searcher.exhausted else None
        self._table.add(spec.trial, spec.run)
        return to_plain(spec)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        pass

    def save(self, checkpoint_path: str) -> None:
        pass

    def restore(self, checkpoint_path: str) -> None:
        pass


class StoppingScheduler(FIFOScheduler):
    """Starts trials first in, first out, and stops those that `stopper` decides to stop.

    A result holds `epoch` (done, from 1), `miou` (percent; NaN if it diverged) and `diverged`; a trial's config is its
    `TrialSpec`.
    Tune keeps no scheduler's state over a restart, so the state is in the stopper.
    """

    # Named, the metric would be demanded of every result, and a trial that resumes at its end and has nothing left to
    # report would end the whole search (seen in Ray 2.60). For the same reason leave it out of TuneConfig.
    _metric = DEFAULT_METRIC

    def __init__(self, stopper: Stopper) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.stopper = stopper

    def set_search_properties(self, metric: str | None, mode: str | None, **_spec: Any) -> bool:
        """Return whether `TuneConfig(metric=, mode=)` is left out or the same; on False Tune raises a ValueError."""
        return metric in (None, METRIC) and mode in (None, MODE)

    def on_trial_result(self, _tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("done"):
            # The trial has returned. Tune repeats its last result, on which we decided when it came; if the trial
            # resumed at its end and had nothing left to report, the result has none of our keys.
            return TrialScheduler.CONTINUE
        missing = {"epoch", METRIC, "diverged"} - result.keys()
        assert not missing, f"trial {trial} reported no {', '.join(sorted(missing))}"
        reason = self.stopper.decide(
            Run.model_validate(trial.config["run"]),
            _name_of(trial),
            epoch=result["epoch"],
            miou=result[METRIC],
            diverged=result["diverged"],
        )
        return TrialScheduler.STOP if reason else TrialScheduler.CONTINUE

    def debug_string(self) -> str:
        return f"stopped early: {len(self.stopper.stops)}"


@dataclass(eq=False)
class TuneCallback(Callback):
    """Takes what Tune hears of trials to state, searcher and screen, and ends a search at its limit."""

    state: SearchState
    stopper: Stopper
    progress: SearchProgress
    searcher: Searcher
    limits: Limits
    gpus_per_trial: float
    outcome: SessionOutcome

    def __post_init__(self) -> None:
        self._ran_at = self._looked_at = time.monotonic()

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that never comes

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self.state.on_start(_name_of(trial))
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = _name_of(trial)
        is_new = result["epoch"] > self.state[name].epochs
        self.state.on_result(name, result)
        self.state.write_if_due()
        self.searcher.on_result(name, epoch=result["epoch"], miou=result["miou"])
        if is_new:
            trial.max_failures = trial.num_failures + MAX_FAILURES
            self.progress.epoch_done(name, Epoch(**{field.name: result[field.name] for field in fields(Epoch)}))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = _name_of(trial)
        diverged = bool((trial.last_result or {}).get("diverged"))
        spec = from_plain(TrialSpec, trial.config)
        self.state.on_end(spec, diverged=diverged, stopped_by=self.stopper.stops.get(name, ""))
        self.searcher.on_end(self.state[name])
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        error = _error_of(trial)
        _raise_outage(error)
        if error.startswith("ray::"):  # a traceback out of the worker
            message = f"failed and is tried again from its last epoch:\n{error}"
        else:  # mostly not the trial's fault
            message = f"lost its process ({_last_line(error)}); it resumes from its last epoch, where there is room."
        _log.warning("%s %s", _name_of(trial), message)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, error = _name_of(trial), _error_of(trial)
        _raise_outage(error)
        _log.error("%s failed:\n%s", name, error)
        self.state.on_error(name, _last_line(error))
        self.searcher.on_end(self.state[name])
        self._show()

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for trial in trials:  # Tune now unpickles their errors from storage, which runs whatever code is there
            trial.run_metadata.pickled_error_filename = None

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        if now - self._looked_at >= SECONDS_BETWEEN_LOOKS:
            self._looked_at = now
            if any(trial.status == Trial.RUNNING for trial in trials):
                self._ran_at = now
            elif now - self._ran_at > SECONDS_WITHOUT_TRIAL:
                _log.warning("No trial runs: they wait for a node that can hold one. `ray status` says why none comes.")
                self._ran_at = now
        if not self.outcome.is_cut_off and self.is_cut_off():
            signal.raise_signal(signal.SIGUSR1)  # Tune then ends as it does for a person: trials wait to be resumed

    def is_cut_off(self) -> bool:
        """Return whether a signal has come or a limit is reached."""
        if not self.outcome.is_cut_off:
            states = self.state.states if self.limits.gpu_hours else []  # not added up where nothing depends on it
            hours = sum(state.seconds for state in states) * self.gpus_per_trial / 3600
            self.outcome.limit = self.limits.limit_reached(seconds=self.state.seconds, gpu_hours=hours)
        return self.outcome.is_cut_off

    def _show(self) -> None:
        self.progress.update([*self.state.states, *self.searcher.pending()])


def _error_of(trial: Trial) -> str:
    """Return the last error's text from the driver's own disk; Tune keeps errors as pickles, too, which run code."""
    path = Path(trial.error_file or "")
    text = path.read_text(errors="replace") if path.is_file() else ""
    last = re.split(r"^Failure # \d+ \(occurred at .*\)\n", text, flags=re.MULTILINE)[-1]
    return re.sub(r"\x1b\[[0-9;]*m", "", last).strip()  # without Ray's colours


def _raise_outage(error: str) -> None:
    """Raise StorageError if a worker's storage did not answer for as long as it is retried: no trial is to blame."""
    if outage := re.search(
        r"^tune_bisenet\.storage\.StorageError: (.* could not be (?:read|written) for .*)$", error, re.M
    ):
        raise StorageError(outage[1])


def _last_line(error: str) -> str:
    return error.rpartition("\n")[2].strip() or "unknown error"


@contextmanager
def _signals(outcome: SessionOutcome) -> Iterator[None]:
    """Let SIGINT and SIGTERM (a spot notice, a job's stop) end the search cleanly, between two results.

    Tune itself listens to SIGUSR1 while it runs. A second signal, or one that Tune is not there for, ends at once.
    """

    def handle(number: int, _frame: FrameType | None) -> None:
        again = outcome.signal_number is not None
        outcome.signal_number = number
        hurry()
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


@contextmanager
def _restartable(outcome: SessionOutcome) -> Iterator[None]:
    """End the process, as one to be run again, if storage did not answer for as long as it is retried.

    After a signal that is seconds, and the code is the signal's: every trial's folder knows how far it is.
    """
    try:
        yield
    except Exception as error:
        cause = _find_outage(error)
        if cause is None:
            raise
        reason = str(cause).removesuffix(".")
        _log.error("%s. Nothing is lost: when it answers, run the same command again with --resume.", reason)
        # Threads of Tune's still wait for it, and pyarrow's end badly with the interpreter.
        os._exit(128 + outcome.signal_number if outcome.signal_number else RESTARTABLE)


def _find_outage(error: BaseException | None) -> OSError | None:
    """Return the error under Tune's that says that storage does not answer, or that Ray's own folder is full."""
    while error is not None and not isinstance(error, StorageError) and not is_full(error):
        error = error.__cause__ or error.__context__
    return error
