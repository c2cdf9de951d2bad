"""The Optuna study of a sampled search: what to try next, and what became of it, told once and only once.

Storage is the state, as everywhere: trials' folders say what was asked for and how far it came, and the study follows
them (`Study.reconcile`). A driver may be killed between any two lines; the next one finds in the study what it lacks,
adds that, and nothing twice. A trial that was cut off waits (Optuna's WAITING) with the values it has, and is the next
to be started.

No Ray here: whoever trains calls `next`, `heard`, `ended` and `close`.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import optuna
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, Trial, create_trial
from optuna.trial import TrialState as OptunaState
from sqlalchemy.exc import SQLAlchemyError

from tune_bisenet.config import Objective, Run, Sampler
from tune_bisenet.records import BEST_WEIGHTS, Epoch, Known, Status, TrialSpec, TrialState
from tune_bisenet.study.sampling import Draw, Point, build_sampler
from tune_bisenet.study.translation import frozen_trial, name_of, state_of, told, values_of

DIRECTIONS: Final[dict[Objective, StudyDirection]] = {
    "miou": StudyDirection.MAXIMIZE,
    "latency": StudyDirection.MINIMIZE,
}
METRIC_NAMES: Final[dict[Objective, str]] = {"miou": "best mIoU in %", "latency": "ms per prediction"}

MAX_FAILED_DRAWS: Final = 20
"""In a row: a space that gives no run so often is wrong, whatever its rehearsal said."""

BUSY_SECONDS: Final = 60
"""How long a writer waits for an SQLite file that a dashboard reads."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search asks of its space: how it draws, the declared rows it begins with, its goals and its sampler."""

    draw: Draw
    rows: Mapping[str, tuple[Run, Point]]
    """By name: the row as it is trained, and its point."""
    objectives: tuple[Objective, ...]
    sampler: Sampler
    seed: int
    """Of the sampler, and of every trial."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """A trial of this search as its folder has it."""

    suggested: TrialSpec
    standing: TrialState
    epochs: Sequence[Epoch]


DATABASE_ERRORS: Final = (SQLAlchemyError, StorageInternalError, ImportError)
"""How a database says that it cannot be used; ImportError for one whose driver is not installed."""


def open_storage(url: str) -> BaseStorage:
    """Optuna's storage at an SQLAlchemy URL. One of DATABASE_ERRORS if it cannot be used."""
    options: dict[str, Any] = {"pool_pre_ping": True}
    if url.startswith("sqlite"):
        options["connect_args"] = {"timeout": BUSY_SECONDS}
    return get_storage(RDBStorage(url, engine_kwargs=options))


def exists(storage: BaseStorage, name: str) -> bool:
    return any(study.study_name == name for study in storage.get_all_studies())


class Study:
    """One search's study. `limit` is how many trials it may ask for in all; None for no end."""

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        question: Question,
        *,
        limit: int | None,
        checkpoint_of: Callable[[str], str],
    ) -> None:
        self._storage = storage
        self._question = question
        self._limit = limit
        self._checkpoint_of = checkpoint_of
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=[DIRECTIONS[objective] for objective in question.objectives],
            load_if_exists=True,
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names([METRIC_NAMES[objective] for objective in question.objectives])
        self._asked: set[str] = set()
        self._ids: dict[str, int] = {}

    def describe(self, attributes: Mapping[str, str]) -> None:
        """What somebody who opens the study should know of it."""
        for key, value in attributes.items():
            self._study.set_user_attr(key, value)

    # --- what to try ------------------------------------------------------------------------------------------------

    def next(self) -> TrialSpec | None:
        """What was cut off, then the declared rows, then what the sampler draws; None when the limit is reached."""
        for _ in range(MAX_FAILED_DRAWS):
            trial = self._next_trial()
            if trial is None:
                return None
            try:
                drawn = self._question.draw(trial)
            except ValueError as error:
                trial.set_user_attr("error", str(error))
                self._study.tell(trial.number, state=OptunaState.FAIL)
                continue
            return self._suggest(trial, drawn)
        raise RuntimeError(f"{MAX_FAILED_DRAWS} draws from the space in a row cannot be trained; the study has why.")

    def _next_trial(self) -> Trial | None:
        trials = self._study.get_trials(deepcopy=False)
        waiting = [trial for trial in trials if trial.state is OptunaState.WAITING]
        begun = [trial for trial in waiting if name_of(trial) in self._asked]
        if not begun and self._limit is not None and len(self._asked) >= self._limit:
            return None
        for trial in [*begun, *waiting]:
            if self._storage.set_trial_state_values(trial._trial_id, OptunaState.RUNNING):
                self._study.sampler = self._sampler_of(trial.number, trials)
                return Trial(self._study, trial._trial_id)
        self._study.sampler = self._sampler_of(len(trials), trials)
        return self._study.ask()

    def _sampler_of(self, number: int, trials: Sequence[FrozenTrial]) -> BaseSampler:
        """That draws the trial of this number; at random after one that made no run, which no sampler learns from."""
        made_no_run = number > 0 and "error" in trials[number - 1].user_attrs
        seed = np.random.SeedSequence([self._question.seed, number]).generate_state(1)[0]
        return build_sampler("random" if made_no_run else self._question.sampler, seed=int(seed))

    def _suggest(self, trial: Trial, drawn: Run) -> TrialSpec:
        suggested = self._suggested(trial, drawn)
        row = {"row": suggested.trial} if suggested.origin == "row" else {}
        for key, value in {"trial": suggested.trial, "seed": self._question.seed, **row}.items():
            trial.set_user_attr(key, value)
        self._asked.add(suggested.trial)
        self._ids[suggested.trial] = trial._trial_id
        return suggested

    def _suggested(self, trial: FrozenTrial | Trial, drawn: Run) -> TrialSpec:
        name = name_of(trial)
        row = self._question.rows.get(name)
        return TrialSpec(
            trial=name,
            run=row[0] if row else drawn.model_copy(update={"name": name, "seed": self._question.seed}),
            origin="row" if row else "sampled",
            number=trial.number,
            params=trial.params,
            distributions=Point(run=drawn, params=trial.params, distributions=trial.distributions).ranges,
            row=self._question.draw.as_row(drawn, trial.params),
        )

    # --- what became of it ------------------------------------------------------------------------------------------

    def heard(self, trial: str, epoch: int, miou: float) -> None:
        """A trial's mIoU in percent after `epoch`; told again, it stands as it is."""
        self._storage.set_trial_intermediate_value(self._ids[trial], epoch, miou)

    def ended(self, standing: TrialState) -> None:
        """A trial has ended, well or not; told again, nothing changes."""
        trial_id = self._ids[standing.trial]
        frozen = self._storage.get_trial(trial_id)
        if frozen.state.is_finished():
            return
        if frozen.state is OptunaState.WAITING:
            self._storage.set_trial_state_values(trial_id, OptunaState.RUNNING)
        for key, value in self._about(standing).items():
            self._storage.set_trial_user_attr(trial_id, key, value)
        state = state_of(standing, self._question.objectives)
        complete = state is OptunaState.COMPLETE  # of a pruned trial Optuna itself takes the last mIoU
        self._study.tell(
            frozen.number, values_of(state, standing, self._question.objectives) if complete else None, state
        )

    def close(self) -> None:
        """Nothing runs any more: what was running waits, with its values and its curve."""
        for trial in self._study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,)):
            self._storage.set_trial_state_values(trial._trial_id, OptunaState.WAITING)

    # --- after a crash ----------------------------------------------------------------------------------------------

    def ended_without(self, there: Collection[str]) -> list[TrialSpec]:
        """Trials that have ended and are not `there`, such as one whose folder no longer says what it trained."""
        ended = {
            name_of(trial): trial
            for trial in self._own_trials()
            if trial.state.is_finished() and "error" not in trial.user_attrs
        }
        return [
            self._suggested(trial, self._question.draw(FixedTrial(trial.params)))
            for name, trial in ended.items()
            if name not in there
        ]

    def reconcile(
        self, records: Sequence[Record], known: Sequence[Known], *, live: Collection[str] = ()
    ) -> dict[str, Status]:
        """Bring the study in line with what the folders say. It may be cut off anywhere, and be called again.

        `live` trials run now. Returns how those trials ended of which the study knows an end and the folders do not.
        """
        self._asked = {record.suggested.trial for record in records}
        self._add_known(known)
        latest = {name_of(trial): trial for trial in self._own_trials()}
        ends = {
            record.suggested.trial: end
            for record in records
            if (end := self._follow(record, latest.get(record.suggested.trial))) is not None
        }
        self._leave_waiting(live)
        self._enqueue_rows(known)
        return ends

    def _follow(self, record: Record, trial: FrozenTrial | None) -> Status | None:
        """Give `trial`, the last of its name in the study, what `record` has more; or return the end it has."""
        standing, name = record.standing, record.suggested.trial
        if trial is None:
            self._fill_up_to(record.suggested.number or 0)
            self._add(record, attributes={})
        elif told(trial) == "failed" and standing.status != "failed":
            self._add(record, attributes={"retry_of": trial.number})
        elif trial.state.is_finished():
            self._ids[name] = trial._trial_id
            return told(trial) if standing.status in ("waiting", "running") else None
        else:
            self._ids[name] = trial._trial_id
            for epoch in record.epochs:
                if epoch.epoch not in trial.intermediate_values:
                    self.heard(name, epoch.epoch, epoch.miou)
            if standing.status not in ("waiting", "running"):
                self.ended(standing)
        return None

    def _fill_up_to(self, number: int) -> None:
        """Numbers name trials: one whose trial left nothing, in a study that was lost, is not given again."""
        for _ in range(len(self._study.get_trials(deepcopy=False)), number):
            self._create(create_trial(state=OptunaState.FAIL, user_attrs={"error": "lost with an earlier database"}))

    def _add(self, record: Record, *, attributes: Mapping[str, Any]) -> None:
        about = {**self._about(record.standing), **attributes}
        frozen = frozen_trial(record.suggested, record.standing, record.epochs, self._question.objectives, about=about)
        self._ids[record.suggested.trial] = self._create(frozen)

    def _add_known(self, known: Sequence[Known]) -> None:
        """Trials of earlier searches, as they ended there."""
        there = {trial.user_attrs.get("source") for trial in self._study.get_trials(deepcopy=False)}
        for one in known:
            if one.source not in there:
                about = {
                    "status": one.standing.status,
                    "source": one.source,
                    "checkpoint": f"{one.source}/{BEST_WEIGHTS}",
                }
                frozen = frozen_trial(one.suggested, one.standing, one.epochs, self._question.objectives, about=about)
                self._create(frozen)

    def _leave_waiting(self, live: Collection[str]) -> None:
        for trial in self._own_trials():
            if trial.state is OptunaState.RUNNING and name_of(trial) not in live:
                self._storage.set_trial_state_values(trial._trial_id, OptunaState.WAITING)

    def _enqueue_rows(self, known: Sequence[Known]) -> None:
        there = {trial.user_attrs.get("row") for trial in self._own_trials()}
        there |= {one.suggested.run.name for one in known}
        for name, (_run, point) in self._question.rows.items():
            if name not in there:
                self._study.enqueue_trial(point.params, user_attrs={"trial": name, "row": name})

    def _own_trials(self) -> list[FrozenTrial]:
        """By number, without those of earlier searches."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if "source" not in trial.user_attrs]

    def _create(self, frozen: FrozenTrial) -> int:
        study_id = self._storage.get_study_id_from_name(self._study.study_name)
        return self._storage.create_new_trial(study_id, template_trial=frozen)

    def _about(self, standing: TrialState) -> dict[str, str]:
        """What a person wants to know of an ended trial, beside its numbers; nothing of one that has not ended."""
        if standing.status in ("waiting", "running"):
            return {}
        checkpoint = {"checkpoint": self._checkpoint_of(standing.trial)} if standing.best_miou is not None else {}
        reason = standing.stopped_by or standing.error
        return {"status": standing.status, **({"reason": reason} if reason else {}), **checkpoint}
