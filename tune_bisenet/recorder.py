"""What Tune tells of trials: to the ledger, the supply and the screen; and the end of a search at its limit."""

import logging
import pickle
import signal
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.experiment import Trial

from tune_bisenet.arguments import Limits
from tune_bisenet.ledger import Ledger
from tune_bisenet.progress import Progress
from tune_bisenet.results import Epoch
from tune_bisenet.stopping import EarlyStopping, trial_name
from tune_bisenet.supply import Supply

MAX_FAILURES: Final = 3
"""How often in a row, without an epoch between, a trial is put back to its last epoch before it counts as failed.

A lost node, a killed worker or a hiccup of the storage costs an unfinished epoch, however often; what cannot go on, or
takes its node down each time, comes to an end. Ray itself counts nothing where it was told of a preemption (`spot`).
"""

SECONDS_BETWEEN_LOOKS: Final = 10.0
"""At all trials of a search, which may be thousands."""

SECONDS_WITHOUT_TRIAL: Final = 600.0
"""After which it is said that trials wait for a node: a machine of a cloud takes minutes to come."""

log = logging.getLogger(__name__)


@dataclass
class Outcome:
    """How a session of a search ended: by itself, by a signal, by a limit or by trouble, both in words."""

    signal_number: int | None = None
    limit: str = ""
    trouble: str = ""

    @property
    def is_cut_off(self) -> bool:
        return self.signal_number is not None or bool(self.limit or self.trouble)


class Recorder(Callback):
    """Takes what Tune hears of trials to the ledger, the supply and the screen, and ends a search at its limit."""

    def __init__(
        self,
        ledger: Ledger,
        scheduler: EarlyStopping,
        progress: Progress,
        supply: Supply,
        limits: Limits,
        gpus_per_trial: float,
        outcome: Outcome,
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
        self._ledger.started(trial_name(trial))
        self._show()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: Any
    ) -> None:
        name = trial_name(trial)
        is_new = result["epoch"] > self._ledger[name].epochs
        self._ledger.heard(name, result)
        self._ledger.write_if_due()
        self._supply.heard(name, epoch=result["epoch"], miou=result["miou"])
        if is_new:
            trial.max_failures = trial.num_failures + MAX_FAILURES
            self._progress.epoch_done(name, _epoch_of(result))

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name = trial_name(trial)
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
        log.warning("%s %s", trial_name(trial), words)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: Any) -> None:
        name, error = trial_name(trial), _error_of(trial)
        log.error("%s failed:\n%s", name, error)
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
            log.warning("No trial runs: they wait for a node that can hold one. `ray status` says why none comes.")
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
