"""The Optuna study of a sampled search: what to try next, and how each trial ended, stored exactly once.

Storage is the state, as everywhere: the trials' folders say what is trained and how far it is, and the study follows
them (`Study.reconcile`). A driver may be killed between any two lines; the next one gives the study what it lacks, and
nothing twice. A trial that was cut off waits (Optuna's WAITING) with its parameters, and is started first.

Knows nothing of Ray: whoever trains calls `ask`, `report`, `tell` and `close`.
"""

import logging
import math
import re
import sqlite3
import tempfile
import time
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import optuna
from optuna.distributions import json_to_distribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.study import StudyDirection
from optuna.trial import FixedTrial, FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState
from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, OperationalError, SQLAlchemyError

from tune_bisenet.config import Objective, Run, Sampler, fingerprint
from tune_bisenet.options import STUDY_VARIABLE, InputError
from tune_bisenet.records import BEST_WEIGHTS, STUDY, Status, TrialRecord, TrialSpec, TrialState
from tune_bisenet.spaces import SpaceError, running_code_of
from tune_bisenet.storage import Storage
from tune_bisenet.study.sampling import REBUILT, WARM_START_TRIALS, SampledRun, SearchSpace, build_sampler
from tune_bisenet.text import one_line

_OBJECTIVES: Final[dict[Objective, tuple[StudyDirection, str]]] = {
    "miou": (StudyDirection.MAXIMIZE, "best mIoU in %"),
    "latency": (StudyDirection.MINIMIZE, "ms per prediction"),
}

MAX_FAILED_DRAWS: Final = 20
"""In a row: a space that fails so often is wrong, whatever the test draws showed."""

DATABASE_ERRORS: Final = (SQLAlchemyError, StorageInternalError, ImportError)
"""What Optuna raises if a database cannot be used; ImportError if the database's driver is not installed."""

LOCK_SECONDS: Final = 60
"""How long a writer waits for an SQLite file that a dashboard reads."""

_AWAY: Final = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_PROTOCOL,
    }
)
"""What SQLite answers where a retry may succeed."""
_NO_DAMAGE: Final = _AWAY | {sqlite3.SQLITE_PERM, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN}
"""These, and what it answers where the file cannot be used as it lies there, though it may be whole."""
_DENIED: Final = r"authentication failed|no password supplied|does not exist|permission denied|no pg_hba\.conf entry"
"""What servers answer where a retry cannot succeed, though their drivers call it operational."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StudyDatabase:
    """Says where a study is stored: any database that Optuna can use, or an SQLite file in the search's own folder.

    SQLite needs a disk: for a search in object storage, this machine has the file and the folder a copy of it.
    """

    url: URL
    """With its password, which SQLAlchemy leaves out of the text of a URL."""
    folder: Storage
    is_own: bool
    """Whether it is a file of the search's own."""
    file: Path | None = None
    """The file on this machine whose copy is in object storage."""

    @property
    def shown(self) -> str:
        """Return the address without its password."""
        return _format_address(_without_password(self.url))

    def check(self, name: str, *, is_new: bool) -> None:
        """Raise InputError if a user's database does not answer, or has a study of that name before a new search.

        A file of the search's own is not touched: it is made when the search starts.
        """
        if self.is_own:
            return
        names = optuna.get_all_study_names(self._connect())
        if is_new and name in names:
            raise InputError(
                f"--study {self.shown}: there is a study {name} already. Take another --name, or another database."
            )

    def open(self) -> BaseStorage:
        """Return Optuna's storage, after `prepare`."""
        self.prepare()
        return self._connect()

    def prepare(self) -> None:
        """Let a file of the search's own be one that can be used. Nothing is made. Raise InputError if it is refused.

        In object storage the copy counts, which may be older than the trials.
        """
        if self.file is not None:
            content = self.folder.read(STUDY)
            self.file.parent.mkdir(parents=True, exist_ok=True)
            for path in _parts_of(self.file):
                path.unlink(missing_ok=True)
            if content is not None:
                self.file.write_bytes(content)
        self.put_aside_if_damaged()
        own = self._own_path
        if own is None or not own.exists():
            return
        try:
            with closing(sqlite3.connect(own, timeout=LOCK_SECONDS)) as connection:
                connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            if not is_outage(error):
                raise self.error(error) from error

    def put_aside_if_damaged(self, *, must_exist: bool = False) -> bool:
        """Return whether a file of the search's own does not hold a study, and log it. The file gets another name."""
        path = self._own_path
        if path is None:
            return False
        if not path.exists():
            if must_exist:
                log.warning("the study in %s is gone: it is rebuilt from the trials' folders.", path)
            return must_exist
        try:
            damage = self._find_damage(path)
        except Exception as error:  # SQLite, SQLAlchemy and Optuna each fail on damaged bytes in ways of their own
            damage = "" if _sqlite_code(error) in _NO_DAMAGE else one_line(error)
        if damage:
            self.put_aside(f"is damaged ({damage})")
        return bool(damage)

    def _find_damage(self, path: Path) -> str:
        """Return what SQLite finds wrong with the file, and let Optuna read it whole."""
        with closing(sqlite3.connect(path, timeout=LOCK_SECONDS)) as connection:
            findings = [text for (text,) in connection.execute("PRAGMA integrity_check")]
        if findings != ["ok"]:
            return str(findings[0])
        storage = RDBStorage(_format_address(self.url), skip_table_creation=True)
        try:
            for study in storage.get_all_studies():
                storage.get_all_trials(study._study_id)
        finally:
            storage.engine.dispose()
        return ""

    def put_aside(self, reason: str) -> None:
        """Give a file of the search's own another name, and log `reason`, which continues `the study in FILE`."""
        path = self._own_path
        assert path
        suffix = f".damaged-{time.strftime('%Y-%m-%dT%H-%M-%S')}"
        for part in _parts_of(path):
            if part.exists():
                part.rename(f"{part}{suffix}")
        log.warning(
            "the study in %s %s: it is rebuilt from the trials' folders. The file is kept as %s.",
            path,
            reason,
            f"{path.name}{suffix}",
        )

    @property
    def _own_path(self) -> Path | None:
        return Path(str(self.url.database)) if self.is_own else None

    def snapshot(self) -> None:
        """Update the copy in object storage. A failure is only logged: the next copy has everything."""
        if self.file is None:
            return
        with tempfile.TemporaryDirectory() as directory:
            copy = Path(directory) / STUDY
            try:
                with closing(sqlite3.connect(self.file)) as source, closing(sqlite3.connect(copy)) as target:
                    source.backup(target)
                self.folder.fail_fast().write(STUDY, copy.read_bytes())
            except (OSError, sqlite3.Error) as error:  # what is damaged is found when it is next written
                log.warning("the study is not copied to %s before the next trial ends: %s", self.folder.uri, error)

    def error(self, cause: BaseException) -> InputError:
        """Return the error to raise for `cause`, with what to do and without a password."""
        remedy = (
            "The file and its folder must be readable and writable."
            if self.is_own
            else f"The address is SQLAlchemy's, as in postgresql://user@host/database. If it needs a password, set "
            f"${STUDY_VARIABLE} to the whole address with its password."
        )
        return InputError(f"the study in {self.shown} cannot be used: {one_line(cause)}. {remedy}")

    def _connect(self) -> BaseStorage:
        options: dict[str, Any] = {"pool_pre_ping": True}
        if self.url.get_backend_name() == "sqlite":
            options["connect_args"] = {"timeout": LOCK_SECONDS}
        try:
            return get_storage(RDBStorage(_format_address(self.url), engine_kwargs=options))
        except (*DATABASE_ERRORS, RuntimeError) as error:  # RuntimeError for tables of another version of Optuna
            raise self.error(error) from None


def study_database(folder: Storage, *, address: str | None, secret: str | None, cache_dir: Path) -> StudyDatabase:
    """Return a user's database, or without an address the SQLite file of the search in `folder`. Raise InputError.

    `address` is from the command line, which everyone on the machine can read and which is stored with the search, so
    it may not have a password. `secret`, from $TUNE_BISENET_STUDY, is an address that may; it adds its password to the
    same `address`, or stands for it.
    """
    url = None if address is None else _parse_address("--study", address)
    full = None if secret is None else _parse_address(f"${STUDY_VARIABLE}", secret)
    if url is not None and url != _without_password(url):
        raise InputError(
            f"--study {_without_password(url)}: everyone on this machine can read a password on the command line. "
            f"Set ${STUDY_VARIABLE} to the whole address instead."
        )
    if full is not None and url in (None, _without_password(full)):
        url = full
    if url is not None:
        return StudyDatabase(url=url, folder=folder, is_own=False)
    local = folder.local_path
    file = local / STUDY if local is not None else cache_dir / "studies" / f"{fingerprint(folder.uri)}.db"
    return StudyDatabase(url=_sqlite_url(file), folder=folder, is_own=True, file=None if local else file)


def is_outage(error: BaseException) -> bool:
    """Return whether the database may answer later. Optuna wraps SQLAlchemy's errors."""
    cause = error.__cause__ if isinstance(error, StorageInternalError) else error
    if (code := _sqlite_code(error)) is not None:
        return code in _AWAY
    if re.search(_DENIED, str(cause), re.IGNORECASE):
        return False
    is_cut = isinstance(cause, DBAPIError) and cause.connection_invalidated
    return is_cut or isinstance(cause, (OperationalError, InterfaceError))


def _sqlite_code(error: BaseException | None) -> int | None:
    """Return SQLite's primary code of an error, wherever in its causes it is; None if SQLite raised none."""
    while error is not None and not isinstance(error, sqlite3.Error):
        error = error.__cause__
    code = getattr(error, "sqlite_errorcode", None)
    return None if code is None else code & 0xFF


def _parts_of(file: Path) -> list[Path]:
    """Return the files of an SQLite database. A journal without its database would be played into the next."""
    return [file.with_name(f"{file.name}{suffix}") for suffix in ("", "-journal", "-wal", "-shm")]


def _parse_address(source: str, address: str) -> URL:
    """Return SQLAlchemy's URL. Its own errors may hold a piece of a password, so they are not passed on."""
    try:
        url = make_url(address)
    except (ArgumentError, ValueError):
        url = None
    if url is None or "@" in (url.host or ""):
        raise InputError(
            f"{source} is not an address of a database, as postgresql://user@host:5432/database. "
            "In a password, write characters such as @ : / percent-encoded, as in %40 for @."
        )
    return url


def sqlite_address(file: Path) -> str:
    """Return the address of a database in `file`, as Optuna and its dashboard take it."""
    return _format_address(_sqlite_url(file))


def _sqlite_url(file: Path) -> URL:
    return URL.create("sqlite", database=str(file))


def _format_address(url: URL) -> str:
    """Return the address with its password. Optuna fills in a number between braces, so a path's are encoded."""
    return url.render_as_string(hide_password=False).replace("{", "%7B").replace("}", "%7D")


def _without_password(url: URL) -> URL:
    in_query = [name for name in url.query if "passw" in name.lower()]
    # URL.set ignores None, so the URL is created again.
    bare = URL.create(url.drivername, url.username, None, url.host, url.port, url.database, url.query)
    return bare.difference_update_query(in_query)


@dataclass(frozen=True, kw_only=True)
class StudySetup:
    """Says what a sampled search samples from and begins with."""

    space: SearchSpace
    rows: Mapping[str, SampledRun]
    """The declared rows it begins with, as trained in this search, by name."""
    sampler: Sampler
    seed: int
    """Of the sampler, and of every trial."""
    test_draws: tuple[SampledRun, ...]
    """Random draws, to check and plan with; not trained."""
    database: StudyDatabase
    suggested: Mapping[str, TrialSpec] = field(default_factory=dict)
    """The trials of its earlier sessions, by number; then those that confirm."""
    known: tuple[TrialRecord, ...] = ()
    """Trials of an earlier search."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Trials of the earlier search that cannot be used, with the reason."""

    @property
    def drawn(self) -> tuple[Run, ...]:
        """Runs such as the search may draw."""
        return tuple(draw.run for draw in self.test_draws)

    @property
    def runs(self) -> tuple[Run, ...]:
        """The declared rows, and runs such as the search may draw."""
        return (*(row.run for row in self.rows.values()), *self.drawn)


class Study:
    """One search's study. `limit` is how many trials it may have in all; None for no limit."""

    def __init__(self, setup: StudySetup, name: str, *, limit: int | None) -> None:
        self._storage = setup.database.open()
        self._setup = setup
        self._objectives = setup.space.objectives
        self._limit = limit
        directions, metric_names = zip(*(_OBJECTIVES[objective] for objective in self._objectives), strict=True)
        self._study = optuna.create_study(
            storage=self._storage, study_name=name, directions=directions, load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(list(metric_names))
        self._study_id = self._storage.get_study_id_from_name(name)
        self._ids: dict[str, int] = {}  # of the trials that have been started, by name

    def describe(self, attributes: Mapping[str, str]) -> None:
        """Store what a reader of the study should know about it."""
        for key, value in attributes.items():
            self._study.set_user_attr(key, value)

    def ask(self) -> TrialSpec | None:
        """Return what was cut off, then the declared rows, then what the sampler draws; None at the limit."""
        for _ in range(MAX_FAILED_DRAWS):
            trials = self._study.get_trials(deepcopy=False)
            waiting = [trial for trial in trials if trial.state is OptunaState.WAITING]
            begun = [trial for trial in waiting if name_in_search(trial) in self._ids]
            if not begun and self._limit is not None and len(self._ids) >= self._limit:
                return None
            if waiting:
                trial, *_ = [*begun, *waiting]
                self._storage.set_trial_state_values(trial._trial_id, OptunaState.RUNNING)
                self._ids[name_in_search(trial)] = trial._trial_id
                return self._spec(trial)
            drawn = self._draw(trials)
            if isinstance(drawn, TrialSpec):
                return drawn
        raise SpaceError(
            f"{MAX_FAILED_DRAWS} draws in a row from the space {self._setup.space.name} cannot be trained, the last "
            f"because {drawn}"
        )

    def report(self, trial: str, epoch: int, miou: float) -> None:
        """Store a trial's mIoU in percent after `epoch`, NaN if it diverged. Repeating it changes nothing."""
        self._storage.set_trial_intermediate_value(self._ids[trial], epoch, miou)

    def tell(self, trial_state: TrialState) -> None:
        """Store how a trial ended. Repeating it changes nothing."""
        trial_id = self._ids[trial_state.trial]
        frozen = self._storage.get_trial(trial_id)
        if frozen.state.is_finished():
            return
        if frozen.state is OptunaState.WAITING:
            self._storage.set_trial_state_values(trial_id, OptunaState.RUNNING)
        for key, value in self._attributes(trial_state).items():
            self._storage.set_trial_user_attr(trial_id, key, value)
        state, values = self._result(trial_state)
        # Optuna itself takes a pruned trial's last mIoU.
        self._study.tell(frozen.number, None if state is OptunaState.PRUNED else values, state)

    def close(self) -> None:
        """Let all running trials wait, with their parameters and curves."""
        self._mark_running(())

    def ended_without(self, names: Collection[str]) -> list[TrialRecord]:
        """Return the trials that ended but are not in `names`: their folders have lost what they trained and measured.

        Their states have what the study knows, which is mIoU.
        """
        ended = {
            name_in_search(trial): trial
            for trial in self._own_trials()
            if trial.state.is_finished() and "error" not in trial.user_attrs
        }
        records = []
        for name, trial in ended.items():
            if name in names:
                continue
            spec = self._spec(trial)
            curve, status = trial.intermediate_values, _status(trial)
            last = max(curve, default=None)
            measured = {epoch: miou for epoch, miou in curve.items() if math.isfinite(miou)}
            best = max(measured, key=lambda epoch: (measured[epoch], -epoch), default=None)
            state = TrialState.of_run(
                name,
                spec.run,
                status=status,
                epochs=last or 0,
                best_miou=None if best is None else measured[best],
                best_epoch=best,
                last_miou=None if last is None else measured.get(last),
                latency_ms=dict(zip(self._objectives, trial.values or (), strict=False)).get("latency"),
            )
            records.append(TrialRecord(spec=spec, state=state))
        return records

    def find_contradiction(self, records: Sequence[TrialRecord]) -> str:
        """Return where the study says otherwise than the folders what was trained or measured; empty if nowhere.

        Curves of trials that have not ended do not count: `reconcile` corrects them.
        """
        latest = {name_in_search(trial): trial for trial in self._own_trials()}
        for record in records:
            name = record.spec.trial
            trial = latest.get(name)
            if trial is None:
                continue
            if trial.params != dict(record.spec.params):
                return f"the parameters of {name}"
            curve = trial.intermediate_values if trial.state.is_finished() else {}
            if any(not _is_same(curve.get(epoch.epoch, epoch.miou), epoch.miou) for epoch in record.epochs):
                return f"the mIoU of {name}"
            has_result = trial.state is OptunaState.COMPLETE and record.state.status == "finished" and record.epochs
            if has_result and trial.values != self._result(record.state)[1]:
                return f"the result of {name}"
        return ""

    def reconcile(self, records: Sequence[TrialRecord], *, live: Collection[str] = ()) -> dict[str, Status]:
        """Make the study agree with the folders. It may be killed anywhere and called again.

        `records` are this search's trials as their folders have them; `live` trials are running. Returns the status of
        each trial that has ended for the study but not for its folder.
        """
        self._ids = {}
        known_before = {trial.user_attrs.get("source") for trial in self._study.get_trials(deepcopy=False)}
        for record in self._setup.known:
            if record.source not in known_before:
                self._add(record)
        latest = {name_in_search(trial): trial for trial in self._own_trials()}
        statuses = {
            record.spec.trial: status
            for record in records
            if (status := self._follow(record, latest.get(record.spec.trial))) is not None
        }
        self._mark_running(live)
        self._tell_lost_state(latest)
        tried = {trial.user_attrs.get("row") for trial in self._own_trials()}
        tried |= {record.spec.run.name for record in self._setup.known}
        for name, row in self._setup.rows.items():
            if name not in tried:
                self._add(TrialRecord.of_spec(row.spec(name, origin="row")))
        return statuses

    def _draw(self, trials: Sequence[FrozenTrial]) -> TrialSpec | str:
        """Draw a run in memory, then add it to the study in one transaction; return why its parameters make no run.

        A killed driver leaves a whole draw or none, so the next one draws the same. It is also faster: a sampler reads
        all trials several times for one draw.
        """
        number = len(trials)
        seed = int(np.random.SeedSequence([self._setup.seed, number]).generate_state(1)[0])
        # A failed draw teaches no sampler anything, so after one the next is random.
        failed_before = number > 0 and "error" in trials[-1].user_attrs
        sampler = build_sampler("random" if failed_before else self._setup.sampler, seed=seed)
        scratch = optuna.create_study(directions=self._study.directions, sampler=sampler)
        scratch.add_trials(trials)
        trial = scratch.ask()
        try:
            with running_code_of(self._setup.space.name):
                run, attributes = self._setup.space.sample_run(trial), {"trial": name_in_search(trial)}
        except SpaceError:
            raise
        except ValueError as error:
            run, attributes = None, {"error": str(error)}
        drawn = create_trial(
            state=OptunaState.FAIL if run is None else OptunaState.RUNNING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs=attributes | {"seed": self._setup.seed},
            system_attrs=scratch.get_trials(deepcopy=False)[-1].system_attrs,
        )
        trial_id = self._storage.create_new_trial(self._study_id, template_trial=drawn)
        if run is None:
            return attributes["error"]
        drawn.number = number
        spec = self._spec(drawn, run)
        self._ids[spec.trial] = trial_id
        return spec

    def _spec(self, trial: FrozenTrial, run: Run | None = None) -> TrialSpec:
        """Return what a trial trains: `run`, or what its parameters make. Raises SpaceError."""
        name = name_in_search(trial)
        with running_code_of(self._setup.space.name):
            run = run or self._setup.space.sample_run(FixedTrial(trial.params))
            declared = self._setup.space.declared_row(run, trial.params)
        row = self._setup.rows.get(name)
        trained = row.run if row else run.model_copy(update={"name": name, "seed": self._setup.seed})
        sampled = SampledRun(run=trained, params=trial.params, distributions=trial.distributions)
        return sampled.spec(name, origin="row" if row else "sampled", number=trial.number, row=declared)

    def _follow(self, record: TrialRecord, trial: FrozenTrial | None) -> Status | None:
        """Give `trial`, the last of its name, what `record` has more; or return the end that only the study has."""
        state, name = record.state, record.spec.trial
        has_ended = state.status not in ("waiting", "running")
        if trial is None:
            # Numbers name trials. After the study was lost, the number of a trial that left nothing stays unused.
            for _ in range(len(self._study.get_trials(deepcopy=False)), record.spec.number or 0):
                self._study.add_trial(create_trial(state=OptunaState.FAIL, user_attrs={"error": "lost"}))
            self._ids[name] = self._add(record, **({REBUILT: True} if record.spec.origin == "sampled" else {}))
        elif not trial.state.is_finished():
            self._ids[name] = trial._trial_id
            for epoch in record.epochs:
                if not _is_same(trial.intermediate_values.get(epoch.epoch), epoch.miou):
                    self.report(name, epoch.epoch, epoch.miou)
            if has_ended:
                self.tell(state)
        elif _status(trial) == "failed" and state.status != "failed":
            self._ids[name] = self._add(record, retry_of=trial.number)
        else:
            self._ids[name] = trial._trial_id
            return None if has_ended else _status(trial)
        return None

    def _tell_lost_state(self, known: Mapping[str, FrozenTrial]) -> None:
        """Log it if drawn trials were added that were not `known`, and no trial has the state of CMA-ES."""
        trials = self._own_trials()
        is_rebuilt = any(REBUILT in trial.user_attrs and name_in_search(trial) not in known for trial in trials)
        has_state = any(key.startswith("cma:") for trial in trials for key in trial.system_attrs)
        if is_rebuilt and self._setup.sampler == "cmaes" and not has_state:
            log.warning(
                "CMA-ES has lost its state with the study. It starts again around the best of the trials drawn before, "
                "or in the middle of the space if fewer than %d of them have finished.",
                WARM_START_TRIALS,
            )

    def _add(self, record: TrialRecord, **attributes: Any) -> int:
        """Add a trial as its folder has it; return its id."""
        spec = record.spec
        state, values = self._result(record.state)
        row = {"row": spec.run.name} if spec.origin == "row" else {}
        about = self._attributes(record.state, record.source)
        frozen = create_trial(
            state=state,
            values=values,
            params=dict(spec.params),
            distributions={name: json_to_distribution(text) for name, text in spec.distributions.items()},
            intermediate_values={epoch.epoch: epoch.miou for epoch in record.epochs},
            user_attrs={"trial": spec.trial, "seed": spec.run.seed, **row, **about, **attributes},
        )
        return self._storage.create_new_trial(self._study_id, template_trial=frozen)

    def _mark_running(self, live: Collection[str]) -> None:
        """Let the trials in `live` be RUNNING and all others that have not ended WAITING."""
        for trial in self._own_trials():
            state = OptunaState.RUNNING if name_in_search(trial) in live else OptunaState.WAITING
            if not trial.state.is_finished() and trial.state is not state:
                self._storage.set_trial_state_values(trial._trial_id, state)

    def _own_trials(self) -> list[FrozenTrial]:
        """Return the trials of this search by number, without those of earlier ones."""
        return [trial for trial in self._study.get_trials(deepcopy=False) if "source" not in trial.user_attrs]

    def _result(self, state: TrialState) -> tuple[OptunaState, list[float] | None]:
        """Return Optuna's state, and the objectives of a complete trial or the last mIoU of a pruned one.

        A trial stopped early is pruned, which Optuna allows only for a single objective.
        """
        objectives = self._objectives
        match state.status:
            case "finished":
                measured = {"miou": state.best_miou, "latency": state.latency_ms}
                values = [value for objective in objectives if (value := measured[objective]) is not None]
                assert len(values) == len(objectives), f"{state.trial} finished without {' and '.join(objectives)}"
                return OptunaState.COMPLETE, values
            case "stopped" | "diverged" if len(objectives) == 1:
                return OptunaState.PRUNED, None if state.last_miou is None else [state.last_miou]
            case "waiting" | "running":
                return OptunaState.WAITING, None
            case _:
                return OptunaState.FAIL, None

    def _attributes(self, state: TrialState, source: str = "") -> dict[str, str]:
        """Return what a person wants to know of an ended trial beside its numbers; nothing before it has ended."""
        if state.status in ("waiting", "running"):
            return {}
        folder = source or f"{self._setup.database.folder.uri}/{state.trial}"
        checkpoint = f"{folder}/{BEST_WEIGHTS}" if state.best_miou is not None else ""
        reason = state.stopped_by or state.error
        attributes = {"status": state.status, "reason": reason, "source": source, "checkpoint": checkpoint}
        return {name: value for name, value in attributes.items() if value}


def name_in_search(trial: FrozenTrial | optuna.Trial) -> str:
    """Return a trial's name in the search: that of its row, or its number in the study."""
    return str(trial.user_attrs.get("trial") or f"t{trial.number:04d}")


def _is_same(stored: float | None, measured: float) -> bool:
    return stored is not None and (stored == measured or (math.isnan(stored) and math.isnan(measured)))


def _status(trial: FrozenTrial) -> Status:
    """Return how a finished trial ended, as it was told."""
    status: Status = trial.user_attrs.get("status", "failed" if trial.state is OptunaState.FAIL else "finished")
    return status
