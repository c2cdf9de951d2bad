"""One search under Ray Tune: the trials that have not ended, a scheduler, and a driver that can be lost at any time.

Tune schedules, Ray runs, storage remembers. A search is never restored from Tune's own state: whatever ended the
driver, the next one starts a new Tune experiment over what is left, and each trial goes on from its folder.
"""

import logging
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import ray
from ray import tune
from ray.exceptions import RayError
from ray.tune import Callback
from ray.tune.error import TuneError
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback

from tune_bisenet import trial as trial_edge
from tune_bisenet.arguments import Arguments
from tune_bisenet.config import Job, Resources, Run
from tune_bisenet.ledger import Ledger
from tune_bisenet.progress import Progress
from tune_bisenet.results import Epoch
from tune_bisenet.stopping import EarlyStopping, trial_name
from tune_bisenet.storage import Storage
from tune_bisenet.tracking import write_experiment

MAX_FAILURES: Final = 3
"""How often a trial is put back to its last epoch before it counts as failed."""

RESTARTABLE: Final = 75
"""The exit code of a driver whose Ray has died under it (EX_TEMPFAIL): run it again with --resume."""

REACH_SECONDS: Final = 5.0

WATCH_SECONDS: Final = 1.0
"""Short: a driver that hears of it from Ray's own code may be ended by that, with exit code 1."""

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How a session of a search ended: by itself, or by a signal."""

    signal_number: int | None = None


class ClusterError(ValueError):
    """There is no such cluster, or it cannot hold what one trial asks for."""


# --- Ray --------------------------------------------------------------------------------------------------------


@contextmanager
def ray_session(address: str | None) -> Iterator[Mapping[str, float]]:
    """A Ray of our own on this machine, or the cluster at `address`; yields what it has, by resource name.

    Raises ClusterError if nobody answers there.
    """
    _configure_environment()
    if address is not None:
        _check_reachable(address)
    try:
        ray.init(
            address=address or "local",
            include_dashboard=None if address else False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": _worker_environment()} if address else None,
        )
    except (ConnectionError, ValueError) as error:
        raise ClusterError(
            f"--address {address}: Ray cannot connect: {error}. Is its Ray the same version as here? "
            "If it asks for a token (RAY_AUTH_MODE=token), are that variable and the token set here too?"
        ) from error
    try:
        with _watchdog():
            yield ray.cluster_resources()  # type: ignore[no-untyped-call]
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself retries for minutes. `auto` and the like are left to it."""
    host, separator, port = address.rpartition(":")
    if "://" in address or not separator or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except OSError as error:
        raise ClusterError(
            f"no Ray cluster answers at {address} ({error}). `ray start --head` prints the address of one; "
            "leave --address out to use this machine alone."
        ) from error


def allot(cluster: Mapping[str, float], asked: Arguments, *, num_trials: int) -> Resources:
    """Resources for each trial so that together they use the machine and no core is asked for twice.

    With GPUs, one for each trial unless `asked` says otherwise. Raises ClusterError if a trial cannot fit.
    """
    num_cpus, num_gpus = int(cluster.get("CPU", 0)), cluster.get("GPU", 0.0)
    gpus = (1.0 if num_gpus else 0.0) if asked.gpus_per_trial is None else asked.gpus_per_trial
    at_once = min(num_trials, asked.max_concurrent or num_trials)
    if gpus:
        at_once = max(1, min(at_once, int(num_gpus / gpus)))
    cpus = asked.cpus_per_trial or max(1, num_cpus // at_once)
    if cpus > num_cpus or gpus > num_gpus:
        raise ClusterError(
            f"a trial asks for {cpus} CPUs and {gpus:g} GPUs; Ray has {num_cpus} and {num_gpus:g}. "
            "Lower --cpus-per-trial or --gpus-per-trial."
        )
    return Resources(
        cpus_per_trial=cpus,
        gpus_per_trial=gpus,
        max_concurrent=asked.max_concurrent,
        concurrency=max(1, min(at_once, num_cpus // cpus)),
    )


def _configure_environment() -> None:
    for name, value in _worker_environment().items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # ours tells apart who asked, for the exit code
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # its reporter prints a box of its own, even when silent
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")  # its HParams show the last mIoU, not the best
    os.environ.setdefault("TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S", "0")


def _worker_environment() -> dict[str, str]:
    """Paths stay relative to where the user stands; a stopped trial has time to leave before its actor is reused."""
    return {"RAY_CHDIR_TO_TRIAL_DIR": "0", "TUNE_FUNCTION_THREAD_TIMEOUT_S": "60"}


@contextmanager
def _watchdog() -> Iterator[None]:
    """End the process if Ray has died: Tune would wait for it without end. Nothing is lost by it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(WATCH_SECONDS):
            nodes = ray.nodes()  # type: ignore[no-untyped-call]
            if not any(node["Alive"] for node in nodes):
                log.error("Ray has died under this search. Run the same command again with --resume.")
                os._exit(RESTARTABLE)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_board(folder: Storage, runs: Mapping[str, Run]) -> None:
    """TensorBoard's table of hyper-parameters, into the search's folder."""
    if folder.local_path is not None:
        write_experiment(folder.local_path, runs)
        return
    with tempfile.TemporaryDirectory() as place:
        write_experiment(Path(place), runs)
        for path in Path(place).iterdir():
            folder.write(path.name, path.read_bytes())


# --- Tune -------------------------------------------------------------------------------------------------------


def search(
    runs: Mapping[str, Run],
    job: Job,
    resources: Resources,
    *,
    scheduler: EarlyStopping,
    ledger: Ledger,
    progress: Progress,
) -> Outcome:
    """Train what `ledger` has not seen end. `runs` is by trial name.

    An error that ends the whole Tune experiment, such as Ray's memory monitor killing a worker, costs each trial
    its unfinished epoch: as long as there is progress, another experiment follows over what is left.
    """
    outcome = Outcome()
    with _signals(outcome):
        while (left := ledger.unfinished()) and outcome.signal_number is None:
            epochs_before = _epochs_done(ledger)
            try:
                _fit([runs[name] for name in left], job, resources, scheduler, _Recorder(ledger, scheduler, progress))
            except KeyboardInterrupt:
                break
            except (RayError, TuneError) as error:
                if _epochs_done(ledger) == epochs_before:
                    raise
                log.warning("Tune gave up (%s); going on with what is left.", error)
            else:
                break
    ledger.close()
    return outcome


def _epochs_done(ledger: Ledger) -> int:
    return sum(standing.epochs for standing in ledger.standings)


def _fit(runs: list[Run], job: Job, resources: Resources, scheduler: EarlyStopping, recorder: "_Recorder") -> None:
    storage = Storage.at(job.storage) / "tune"
    trainable = tune.with_resources(
        tune.with_parameters(trial_edge.train, job=job.model_dump(mode="json")),
        {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial},
    )
    tuner = tune.Tuner(
        trainable,
        param_space={"run": tune.grid_search([run.model_dump(mode="json") for run in runs])},
        tune_config=tune.TuneConfig(
            # No metric here: Tune would end the whole search if one trial returned without a report.
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


def _name_of(job: Job, trial: Trial) -> str:
    return job.trial_name(Run.model_validate(trial.config["run"]))


class _Recorder(Callback):
    """Takes what Tune hears of trials to the ledger and the screen."""

    def __init__(self, ledger: Ledger, scheduler: EarlyStopping, progress: Progress) -> None:
        self._ledger = ledger
        self._scheduler = scheduler
        self._progress = progress

    def __getstate__(self) -> dict[str, Any]:
        return {}  # Tune pickles its callbacks for a restore that never comes

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.started(trial_name(trial))
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial_name(trial)
        is_new = result["epoch"] > self._ledger[name].epochs
        self._ledger.heard(name, result)
        self._ledger.write_if_due()
        if is_new:
            self._progress.epoch_done(name, _epoch_of(result))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = trial_name(trial)
        diverged = bool((trial.last_result or {}).get("diverged"))
        self._ledger.ended(name, diverged=diverged, stopped_by=self._scheduler.stops.get(name, ""))
        self._show()

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        self._ledger.failed(trial_name(trial), _last_line(trial.get_pickled_error()))
        self._show()

    def _show(self) -> None:
        self._progress.update(self._ledger.standings)


def _epoch_of(result: dict[str, Any]) -> Epoch:
    return Epoch(**{field.name: result[field.name] for field in fields(Epoch)})


def _last_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() if error else []
    return lines[-1].strip() if lines else "unknown error"


# --- signals ----------------------------------------------------------------------------------------------------


@contextmanager
def _signals(outcome: Outcome) -> Iterator[None]:
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
