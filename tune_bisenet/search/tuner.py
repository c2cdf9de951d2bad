"""One search under Ray Tune: its searcher, scheduler and callback, signals, and Tune experiments one after another.

Tune schedules, Ray runs, storage remembers. A search is never restored from Tune's own state: whatever ended the
driver, the next one starts a new Tune experiment over what is left, and each trial resumes from its folder. What
an error means is decided in `failures`.
"""

import logging
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import FrameType
from typing import Any, Final

import ray
from ray import ObjectRef, tune
from ray.exceptions import OutOfMemoryError, RayError
from ray.tune import Callback
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.result import DEFAULT_METRIC
from ray.tune.schedulers import FIFOScheduler, TrialScheduler
from ray.tune.search import Searcher as RaySearcher
from ray.util import get_node_ip_address

from tune_bisenet.config import Resources, Run, TrialContext
from tune_bisenet.data.packing import publish_packed
from tune_bisenet.options import Limits
from tune_bisenet.records import TUNE, Epoch, TrialSpec, from_plain, to_plain
from tune_bisenet.rungs import Stopper
from tune_bisenet.search import failures
from tune_bisenet.search.console import SearchProgress
from tune_bisenet.search.failures import FAILURE, LACKS, STACK_SECONDS, STACK_SIGNAL, WARNING
from tune_bisenet.search.resources import RESTARTABLE
from tune_bisenet.search.searcher import Searcher
from tune_bisenet.search.state import SearchState, SessionOutcome
from tune_bisenet.storage import Storage, StorageRefusedError, hurry, is_refused
from tune_bisenet.text import counted, format_duration
from tune_bisenet.training.tensorboard import HParamsTable

METRIC: Final = "miou"
MODE: Final = "max"

SECONDS_BETWEEN_LOOKS: Final = 10.0
"""At all trials of a search, which may be thousands."""

SECONDS_TO_ASK: Final = 60.0
"""Ray may have to start a process on the trial's node, which looks at the other one."""

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
    stall_timeout: float | None = None,
    earlier: SessionOutcome | None = None,
) -> SessionOutcome:
    """Train what `searcher` hands out, until it has nothing more, a limit is reached or a signal comes.

    What ends the whole Tune experiment costs each trial its unfinished epoch. After an error, another experiment
    follows over what is left as long as there is progress; where memory ran out, with fewer trials at once, or with a
    larger share of a GPU for each. `earlier` says how far this session has come with that.
    """
    outcome = SessionOutcome()
    if earlier:
        outcome = replace(earlier, signal_number=None, limit="")
    callback = TuneCallback(state, stopper, progress, searcher, limits, resources, outcome, stall_timeout)
    with _restartable(outcome):
        with _signals(outcome):
            while searcher.begin() and not callback.is_cut_off():
                epochs_before = _epochs_done(state)
                callback.is_to_restart = False
                try:
                    _share_packs(context)
                    _fit(TuneSearcher(searcher, table), context, StoppingScheduler(stopper), callback)
                except Exception as error:
                    causes = list(failures.causes(error))
                    if killed := [cause for cause in causes if isinstance(cause, OutOfMemoryError)]:
                        callback.on_killed_for_memory(str(killed[0]))  # which Tune does not expect of a trial
                    elif (
                        _epochs_done(state) > epochs_before
                        and any(isinstance(cause, (RayError, TuneError)) for cause in causes)
                        and not failures.find_outage(error)
                    ):
                        _log.warning("Tune gave up (%s); another Tune experiment trains what is left.", error)
                    else:
                        raise
                else:
                    if not callback.is_to_restart:
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
        for size, pack in context.packs.items():
            publish_packed(Path(pack), context.data_digests[size], Storage.at(context.shared_packs))
    except OSError as error:
        _log.warning("The packed frames could not be copied to %s: %s", context.shared_packs, error)


def _fit(
    searcher: "TuneSearcher",
    context: TrialContext,
    scheduler: "StoppingScheduler",
    callback: "TuneCallback",
) -> None:
    """Run one Tune experiment."""
    resources, outcome = callback.resources, callback.outcome
    if outcome.gpus_per_trial:
        context = context.model_copy(update={"gpu_share": outcome.gpus_per_trial})
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(AWS_KEYS)
    storage = Storage.at(context.storage) / TUNE
    trainable = tune.with_resources(
        tune.with_parameters(make_trainable(), context=context.model_dump(mode="json")),
        {"cpu": resources.cpus_per_trial, "gpu": callback.gpus_per_trial},
    )
    tuner = tune.Tuner(
        trainable,
        tune_config=tune.TuneConfig(
            # No metric here: Tune would end the whole search if one trial returned without a report.
            search_alg=searcher,
            num_samples=-1,  # until the searcher is exhausted
            scheduler=scheduler,
            max_concurrent_trials=outcome.max_concurrent or resources.max_concurrent,
            reuse_actors=True,
            trial_name_creator=_name_of,
            trial_dirname_creator=_name_of,
        ),
        run_config=tune.RunConfig(
            # A name of its own each time, so that a new driver never writes over an earlier one's files.
            name=time.strftime("%Y-%m-%dT%H-%M-%S") + f"-{os.getpid()}",
            storage_path=storage.path,
            storage_filesystem=storage.retrying_filesystem,
            failure_config=tune.FailureConfig(max_failures=failures.MAX_FAILURES),
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
        if result.get("done") or FAILURE in result:
            # The trial has returned, or is about to. Tune repeats its last result, on which we decided when it came; if
            # the trial resumed at its end and had nothing left to report, the result has none of our keys.
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


@dataclass
class _Worker:
    """The process of a running trial, as the driver knows it."""

    actor: Any
    """Ray ends it when nothing refers to it any more."""
    address: ObjectRef[tuple[str, int]]
    """Its node's IP address and its process id; asked for before it trains, as it answers nothing then."""
    heard_at: float
    quiet: float = 0.0
    """Seconds since it last began or reported an epoch, without those in which the driver was busy otherwise."""
    asked: float = 0.0
    """How long it had been quiet when it was last asked for its stack."""
    stalled: str = ""
    """Why it was killed."""


@dataclass(eq=False)
class TuneCallback(Callback):
    """Takes what Tune hears of trials to state, searcher and screen; ends what stalls, and a search at its limit."""

    state: SearchState
    stopper: Stopper
    progress: SearchProgress
    searcher: Searcher
    limits: Limits
    resources: Resources
    outcome: SessionOutcome
    stall_timeout: float | None = None
    is_to_restart: bool = False
    """Whether the Tune experiment is to end so that another one runs fewer trials at once."""

    def __post_init__(self) -> None:
        self._ran_at = self._looked_at = time.monotonic()
        self._workers: dict[str, _Worker] = {}
        self._last_started = ""
        self._kills: Counter[str] = Counter()
        self._kernel_kills = (_kernel_kills(),) * 2
        """At the last look but one, and at the last."""

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that never comes

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = _name_of(trial)
        actor: Any = trial.temporary_state.ray_actor
        self._last_started = name
        self._workers[name] = _Worker(actor, actor.get_current_ip_pid.remote(), heard_at=time.monotonic())
        self.state.on_start(name)
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = _name_of(trial)
        if FAILURE in result:
            self._on_failure(name, result[FAILURE], lacks=result.get(LACKS, ""))
            return
        if WARNING in result:
            warning = f"{name}: {result[WARNING]}"
            _log.warning("%s", warning)
            self.outcome.warnings.append(warning)
        is_new = result["epoch"] > self.state[name].epochs
        self.state.on_result(name, result)
        self.state.write_if_due()
        self.searcher.on_result(name, epoch=result["epoch"], miou=result["miou"])
        self._workers[name] = replace(self._workers[name], heard_at=time.monotonic(), quiet=0.0, asked=0.0)
        if is_new:
            trial.max_failures = trial.num_failures + failures.MAX_FAILURES
            self._kills.pop(name, None)
            self.progress.epoch_done(name, Epoch(**{field.name: result[field.name] for field in fields(Epoch)}))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, last = _name_of(trial), trial.last_result or {}
        self._workers.pop(name, None)
        if FAILURE in last:
            return
        spec = from_plain(TrialSpec, trial.config)
        self.state.on_end(spec, diverged=bool(last.get("diverged")), stopped_by=self.stopper.stops.get(name, ""))
        self.searcher.on_end(self.state[name])
        self._show()

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, error = _name_of(trial), self._why_lost(trial)
        failures.raise_outage(error)
        if self._lowered_for_memory(error):
            return
        _log.warning("%s %s", name, failures.describe_retry(error))

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, error = _name_of(trial), self._why_lost(trial)
        failures.raise_outage(error)
        if not self._lowered_for_memory(error):
            self._fail(name, error)

    def on_killed_for_memory(self, reason: str) -> None:
        """Go on after Ray has killed workers for memory: with fewer trials at once, if there were others.

        A trial that was alone has as many tries as Tune gives one whose process dies.
        """
        for worker in self._workers.values():  # none, unless the same error cut off Tune's own end
            ray.kill(worker.actor)
        error = failures.explain_memory_kill(reason)
        if self._lowered_for_memory(error):
            return
        name = self._last_started
        self._kills[name] += 1
        if self._kills[name] > failures.MAX_FAILURES:
            self._fail(name, error)
        else:
            _log.warning("%s was killed and is tried again from its last epoch; %s", name, error)

    def _on_failure(self, name: str, problem: str, *, lacks: str) -> None:
        """Take in a trial's own word that it cannot go on: never, or not beside others that hold the memory.

        Raises StorageRefusedError if its storage denies access: the next trial would have no more luck.
        """
        if lacks == "access":
            raise StorageRefusedError(problem)
        error = (f"{failures.OUT_OF_MEMORY}: " if lacks else "") + " ".join(problem.split())
        is_handled = self._has_raised_share(error) if lacks == "GPU memory" else self._lowered_for_memory(error)
        if not is_handled:
            self._fail(name, error)

    def _fail(self, name: str, error: str) -> None:
        error = failures.describe_end(error)
        _log.error("%s failed:\n%s", name, error)
        self.state.on_error(name, failures.last_line(error))
        self.searcher.on_end(self.state[name])
        self._show()

    def _why_lost(self, trial: Trial) -> str:
        """Return why a trial failed. What the driver or the kernel did to its process, Ray does not know."""
        worker, error = self._workers.pop(_name_of(trial), None), _error_of(trial)
        if worker and worker.stalled:
            return worker.stalled
        kernel_killed = _kernel_kills() > self._kernel_kills[0] and _is_here(worker)
        return failures.explain_loss(error, kernel_killed=kernel_killed)

    @property
    def gpus_per_trial(self) -> float:
        """Return how much of a GPU each trial has now: more than it began with, if that was not enough."""
        return self.outcome.gpus_per_trial or self.resources.gpus_per_trial

    def _has_raised_share(self, error: str) -> bool:
        """Give each trial the next larger share of a GPU from now on; return False if it has a whole one.

        Fewer trials at once would not do: the memory of each is bounded by its share.
        """
        if not self.is_to_restart:
            share = self.gpus_per_trial
            if share >= 1:
                return False
            self.is_to_restart = True
            self.outcome.gpus_per_trial = 1 / max(1, int(1 / share) - 1)
            _log.warning(
                "Each trial gets %.2g of a GPU until this session ends, not %.2g: %s. Those that ran resume from their "
                "last epoch, and no try of theirs is spent. For more at once, take smaller batches or images.",
                self.gpus_per_trial,
                share,
                error.removesuffix("."),
            )
        return True

    def _lowered_for_memory(self, error: str) -> bool:
        """Let fewer trials run at once from now on if memory ran out; return False if it did not, or for one alone."""
        if not error.startswith(failures.OUT_OF_MEMORY):
            return False
        running = sum(state.status == "running" for state in self.state.states)
        fit = max(running, self.resources.concurrency) if self.resources.grows else self.resources.concurrency
        at_once = min(self.outcome.max_concurrent or fit, len(self.state.unfinished()))
        fewer = failures.fewer_at_once(at_once)
        if fewer and not self.is_to_restart:
            self.is_to_restart, self.outcome.max_concurrent = True, fewer
            _log.warning(
                "At most %s at once until this session ends, not %d: %s. Those that ran resume from their last epoch, "
                "and no try of theirs is spent. For more at once, give them more memory, or smaller batches or images.",
                counted(fewer, "trial"),
                at_once,
                error.removesuffix("."),
            )
        return self.is_to_restart

    def _end_if_stalled(self, name: str, worker: _Worker, now: float) -> None:
        """Kill a process that does not answer, or is at one place for too long; Tune then resumes its trial."""
        unheard = now - max(worker.heard_at, self._looked_at)
        worker.quiet += min(unheard, 2 * SECONDS_BETWEEN_LOOKS)  # a driver that waits for storage hears nothing
        state, timeout = self.state[name], self.stall_timeout
        if worker.stalled or worker.quiet - worker.asked < failures.stall_seconds(state, timeout):
            return
        worker.asked = worker.quiet
        stack = _ask_for_stack(worker)
        if stack != "" and worker.quiet < failures.longest_stall(state, timeout, stack):
            return
        worker.stalled = f"stalled: nothing has come of it for {format_duration(worker.quiet)}"
        if stack == "":
            worker.stalled += ", and its process did not answer"
        _log.warning("%s has %s. Its process is ended.\n%s", name, worker.stalled, stack or "")
        ray.kill(worker.actor)

    def on_experiment_end(self, trials: list[Trial], **info: Any) -> None:
        for trial in trials:  # Tune now unpickles their errors from storage, which runs whatever code is there
            trial.run_metadata.pickled_error_filename = None
        self._workers.clear()

    def on_step_end(self, iteration: int, trials: list[Trial], **info: Any) -> None:
        now = time.monotonic()
        if now - self._looked_at >= SECONDS_BETWEEN_LOOKS:
            for name, worker in self._workers.items():
                self._end_if_stalled(name, worker, now)
            self._looked_at, self._kernel_kills = now, (self._kernel_kills[1], _kernel_kills())
            if any(trial.status == Trial.RUNNING for trial in trials):
                self._ran_at = now
            elif now - self._ran_at > SECONDS_WITHOUT_TRIAL:
                _log.warning("No trial runs: they wait for a node that can hold one. `ray status` says why none comes.")
                self._ran_at = now
        if self.is_to_restart or self.is_cut_off():
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


def make_trainable() -> Callable[..., None]:
    """Return Tune's trainable. It goes to workers by value, so that only they import torch, which takes seconds."""

    def train(config: dict[str, Any], *, context: dict[str, Any]) -> None:
        from tune_bisenet.search.trainable import train_trial

        train_trial(config, context=context)

    return train


def _error_of(trial: Trial) -> str:
    """Return the last error's text from the driver's own disk; Tune keeps errors as pickles, too, which run code."""
    path = Path(trial.error_file or "")
    return failures.last_error(path.read_text(errors="replace") if path.is_file() else "")


def _ask_for_stack(worker: _Worker) -> str | None:
    """Return what a trial's process is doing; an empty string if it does not answer, None if it cannot be asked."""
    try:
        address, pid = ray.get(worker.address, timeout=STACK_SECONDS)
        on_its_node = ray.remote(num_cpus=0, max_retries=0, resources={f"node:{address}": 0.001})(_read_stack)
        stacks: str = ray.get(on_its_node.remote(pid), timeout=SECONDS_TO_ASK)
    except RayError as error:
        _log.warning("A process cannot be asked for its stack: %s", error)
        return None
    return failures.stack_of_trial(stacks)


def _read_stack(pid: int) -> str:
    """Return the stacks of a worker's threads on this node, which the worker writes itself; empty if it does not.

    Ray lets a worker's standard error be a file.
    """
    log = Path(f"/proc/{pid}/fd/2").resolve()
    size = began_with = log.stat().st_size
    os.kill(pid, STACK_SIGNAL)
    deadline = time.monotonic() + STACK_SECONDS
    while time.monotonic() < deadline:
        time.sleep(STACK_SECONDS / 20)
        size_before, size = size, log.stat().st_size
        if size == size_before > began_with:
            break
    return log.read_bytes()[began_with:].decode(errors="replace").strip()


def _is_here(worker: _Worker | None) -> bool:
    """Return whether a process ran on this machine, as far as is known."""
    try:
        return worker is None or ray.get(worker.address, timeout=0)[0] == get_node_ip_address()  # type: ignore[no-untyped-call]
    except RayError:
        return False


def _kernel_kills() -> int:
    """Return how many processes the kernel has killed for memory since this machine started; 0 if it does not tell."""
    path = Path("/proc/vmstat")
    found = re.search(r"^oom_kill (\d+)$", path.read_text() if path.exists() else "", re.MULTILINE)
    return int(found[1]) if found else 0


@contextmanager
def _signals(outcome: SessionOutcome) -> Iterator[None]:
    """Let SIGINT and SIGTERM (a spot notice, a job's stop) end the search cleanly, between two results.

    `TuneCallback` passes them on at Tune's next step. What takes too long, the supervisor kills (`run.supervise`).
    """

    def handle(number: int, _frame: FrameType | None) -> None:
        outcome.signal_number = outcome.signal_number or number
        hurry()

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

    After a signal that is seconds, and the code is the signal's: every trial's folder knows how far it is. Raise
    StorageRefusedError if storage denies access.
    """
    try:
        yield
    except Exception as error:
        cause = failures.find_outage(error)
        if cause is None:
            raise
        if is_refused(cause) and not outcome.signal_number:
            raise StorageRefusedError(str(cause)) from error
        _log.error("%s.", str(cause).removesuffix("."))  # the supervisor says how to continue
        # Threads of Tune's still wait for it, and pyarrow's end badly with the interpreter.
        os._exit(128 + outcome.signal_number if outcome.signal_number else RESTARTABLE)
