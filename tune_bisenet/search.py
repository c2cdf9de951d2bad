"""One search under Ray Tune: the trials that have not ended, a scheduler, and a driver that can be lost at any time.

Tune schedules, Ray runs, storage remembers. A search is never restored from Tune's own state: whatever ended the
driver, the next one starts a new Tune experiment over what is left, and each trial goes on from its folder.
"""

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

from ray import tune
from ray.exceptions import RayError
from ray.tune.error import TuneError
from ray.tune.execution import class_cache
from ray.tune.experiment import Trial
from ray.tune.logger import CSVLoggerCallback, JsonLoggerCallback
from ray.tune.search import Searcher

from tune_bisenet import trial as trial_edge
from tune_bisenet.arguments import Limits
from tune_bisenet.board import Board
from tune_bisenet.config import Job, Resources, Run
from tune_bisenet.data import sharing
from tune_bisenet.ledger import Ledger
from tune_bisenet.outages import StorageError
from tune_bisenet.progress import Progress
from tune_bisenet.ray_session import RESTARTABLE
from tune_bisenet.recorder import MAX_FAILURES, Outcome, Recorder
from tune_bisenet.stopping import EarlyStopping
from tune_bisenet.storage import Storage
from tune_bisenet.supply import Supply

KEYS: Final = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SECURITY_TOKEN", "AWS_SESSION_TOKEN")
"""Tune would hand these to its workers by name and value, which Ray writes into its logs and shows to who asks. Workers
of this machine inherit them; nodes of a cluster have a role, or an environment of their own."""

log = logging.getLogger(__name__)


# --- Tune -------------------------------------------------------------------------------------------------------


def search(
    supply: Supply,
    job: Job,
    resources: Resources,
    *,
    scheduler: EarlyStopping,
    limits: Limits,
    ledger: Ledger,
    board: Board,
    progress: Progress,
) -> Outcome:
    """Train what `supply` hands out, until it has nothing more, a limit is reached or a signal comes.

    An error that ends the whole Tune experiment, such as Ray's memory monitor killing a worker, costs each trial
    its unfinished epoch: as long as there is progress, another experiment follows over what is left.
    """
    outcome = Outcome()
    recorder = Recorder(ledger, scheduler, progress, supply, limits, resources.gpus_per_trial, outcome)
    with _restartable():
        with _signals(outcome):
            while supply.begin() and not recorder.is_cut_off():
                epochs_before = _epochs_done(ledger)
                try:
                    _share_packs(job)
                    _fit(_Asking(supply, board), job, resources, scheduler, recorder)
                except KeyboardInterrupt:
                    break
                except (RayError, TuneError) as error:
                    if _epochs_done(ledger) == epochs_before or _storage_trouble(error):
                        raise
                    log.warning("Tune gave up (%s); going on with what is left.", error)
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
        log.error("%s. Nothing is lost: when it answers, run the same command again with --resume.", trouble)
        os._exit(RESTARTABLE)  # threads of Tune's still wait for it, and pyarrow's end badly with the interpreter


def _storage_trouble(error: BaseException | None) -> StorageError | None:
    """The error of ours under Tune's."""
    while error is not None and not isinstance(error, StorageError):
        error = error.__cause__ or error.__context__
    return error


def _share_packs(job: Job) -> None:
    """Put this node's packs where the others find them. A node that finds none packs for itself."""
    if job.shared_packs is None:
        return
    try:
        for pack in job.packs.values():
            sharing.publish(Path(pack), Storage.at(job.shared_packs))
    except OSError as error:
        log.warning("The packed frames could not be copied to %s: %s", job.shared_packs, error)


def _epochs_done(ledger: Ledger) -> int:
    return sum(standing.epochs for standing in ledger.standings)


def _fit(asking: "_Asking", job: Job, resources: Resources, scheduler: EarlyStopping, recorder: "Recorder") -> None:
    class_cache.ENV_VARS_TO_PROPAGATE.difference_update(KEYS)
    storage = Storage.at(job.storage) / "tune"
    trainable = tune.with_resources(
        tune.with_parameters(trial_edge.train, job=job.model_dump(mode="json")),
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


class _Asking(Searcher):
    """Tune's searcher: asks the supply. What becomes of a trial the recorder tells, who knows trials by their names."""

    def __init__(self, supply: Supply, board: Board) -> None:
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


def _name_of(job: Job, trial: Trial) -> str:
    return job.trial_name(Run.model_validate(trial.config["run"]))


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
