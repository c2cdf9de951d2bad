"""`--plan`: what a search would take, said without starting anything.

A few frames are read and some iterations timed, in processes of their own; nothing is packed, fetched or written.
"""

import importlib.metadata
import math
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, assert_never

import torch
from rich.console import Console

from tune_bisenet import __version__, briefing, records, rungs, spaces
from tune_bisenet.config import Resources, Run, TrialContext
from tune_bisenet.data.source import DataError
from tune_bisenet.estimate import timing
from tune_bisenet.estimate.outlook import Outlook
from tune_bisenet.estimate.timing import ProbeError
from tune_bisenet.options import Limits, Options
from tune_bisenet.progress import Progress
from tune_bisenet.records import BEST_WEIGHTS, KNOWN, RUN, SEARCH, TrialSpec, TrialState, project_commit
from tune_bisenet.report import keeper
from tune_bisenet.rungs import Judge, MedianRule, Rungs, first_judged_epoch
from tune_bisenet.search import prepare, state, tuner
from tune_bisenet.search import resources as resources_module
from tune_bisenet.search import state as state_module
from tune_bisenet.search.prepare import PreparedSearch, Sampling, Survey
from tune_bisenet.search.resources import Cluster, Node
from tune_bisenet.search.searcher import Asked, Declared, Supply
from tune_bisenet.search.state import SearchState, json_bytes
from tune_bisenet.search.tuner import SessionOutcome, StoppingScheduler
from tune_bisenet.spaces import DataFacts
from tune_bisenet.storage import Storage, redact
from tune_bisenet.study import confirm
from tune_bisenet.study.place import StudyError
from tune_bisenet.study.study import Study
from tune_bisenet.training.tensorboard import HParamsTable

PACKAGES: Final = (
    "torch",
    "torchvision",
    "ray",
    "pyarrow",
    "numpy",
    "optuna",
    "pydantic",
    "tensorboard",
)


def write_manifest(folder: Storage, record: dict[str, Any]) -> None:
    folder.make()
    folder.write(SEARCH, json_bytes(record))


def open_manifest(
    flight: PreparedSearch, runs: Mapping[str, Run], *, command: list[str], resources: Resources
) -> dict[str, Any]:
    """The manifest with one more session, which has just begun."""
    survey, choices = flight.survey, flight.survey.choices
    sessions = survey.earlier["sessions"] if survey.earlier else []
    return {
        "name": survey.name,
        "choices": choices.model_dump(mode="json"),
        "limits": survey.limits.model_dump(mode="json"),
        "space": {"name": choices.space, "title": survey.space.title, "baseline": survey.space.baseline},
        "study": _study(flight),
        "trials": {name: run.model_dump(mode="json") for name, run in runs.items()},
        "data": {
            "name": choices.data,
            "digests": prepare.pack_digests(flight.packs),
            "train_images": survey.facts.num_train,
            "val_images": survey.facts.num_val,
        },
        "backbone": {"name": choices.backbone, "digest": survey.backbone_digest},
        "proxy": survey.captions[0] if choices.proxy else None,
        "sessions": [*sessions, _session(command, resources)],
    }


def close_manifest(record: dict[str, Any], signal_number: int | None, limit: str) -> dict[str, Any]:
    """The same after the session has ended, by itself, by a signal or at a limit."""
    *before, last = record["sessions"]
    end = {"ended": _now(), "signal": signal_number, "limit": limit or None}
    return record | {"sessions": [*before, last | end]}


def _study(flight: PreparedSearch) -> dict[str, Any] | None:
    """Of a sampled search, without the password of its database."""
    if flight.sampling is None:
        return None
    choices = flight.survey.choices
    return {
        "name": flight.survey.name,
        "url": flight.sampling.place.shown,
        "sampler": choices.sampler,
        "objectives": list(choices.objectives),
        "warm_start": [redact(choices.warm_start)] if choices.warm_start else [],
    }


def _session(command: list[str], resources: Resources) -> dict[str, Any]:
    return {
        "started": _now(),
        "ended": None,
        "signal": None,
        "limit": None,
        "command": command,
        "commit": project_commit(),
        "python": platform.python_version(),
        "packages": {"tune-bisenet": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "cpus_per_trial": resources.cpus_per_trial,
        "gpus_per_trial": resources.gpus_per_trial,
        "trials_at_once": resources.concurrency,
    }


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


CANNOT_BEGIN: Final = (state_module.InUseError, resources_module.ClusterError, StudyError)

OK: Final = 0
SOME_FAILED: Final = 1

UNBOUNDED_TRIALS: Final = 10_000
"""How many trials resources are shared out for where only time or money bounds a search."""


def run_search(flight: PreparedSearch, console: Console, command: list[str]) -> int:
    """Run the session; its exit code. InUseError, ClusterError or StudyError if it cannot begin."""
    survey, arguments = flight.survey, flight.survey.arguments
    with state_module.exclusive(survey.folder), resources_module.ray_session(arguments.address) as cluster:
        num_trials = survey.num_trials or UNBOUNDED_TRIALS
        resources = resources_module.allocate(cluster(), arguments, num_trials=num_trials)
        if arguments.address and survey.folder.local_path is not None:
            resources_module.check_shared(survey.folder.local_path.parent, cluster())
        check_limits(survey.limits, resources)
        return _Session.of(flight, resources, at_once=lambda: cluster().can_take(resources)).run(console, command)


def check_limits(limits: Limits, resources: Resources) -> None:
    """ClusterError for a limit that trials with these resources never reach."""
    if limits.gpu_hours is not None and not resources.gpus_per_trial:
        raise resources_module.ClusterError(
            "--gpu-hours: trials here have no GPU. Bound the search by --time-budget or --trials."
        )


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What the phases of a session share."""

    flight: PreparedSearch
    resources: Resources
    at_once: Callable[[], int]
    """How many trials a study may have out at the moment."""
    job: TrialContext
    book: SearchState
    scheduler: StoppingScheduler
    board: HParamsTable

    @classmethod
    def of(cls, flight: PreparedSearch, resources: Resources, *, at_once: Callable[[], int]) -> "_Session":
        survey = flight.survey
        use_gpu = resources.gpus_per_trial > 0 and survey.arguments.device != "cpu"
        job = flight.job(cpus_per_trial=resources.cpus_per_trial, use_gpu=use_gpu)
        kept = state_module.read_trials(survey.folder)
        runs = _runs(flight, job)
        earlier = records.complete_states(survey.folder, kept.standings, runs) if survey.earlier else []
        scheduler = StoppingScheduler(_judge(flight, kept.scheduler))
        only = survey.arguments.rerun
        book = SearchState(
            survey.folder,
            [state_module.restore(name, run, earlier, only=only) for name, run in runs.items()],
            captions=survey.captions,
            baseline=survey.space.baseline,
            only=only,
            scheduler_state=scheduler.state,
            seconds_before=kept.seconds,
        )
        board = HParamsTable(survey.folder, runs)
        return cls(
            flight=flight,
            resources=resources,
            at_once=at_once,
            job=job,
            book=book,
            scheduler=scheduler,
            board=board,
        )

    def run(self, console: Console, command: list[str]) -> int:
        flight, survey = self.flight, self.flight.survey
        runs = _runs(flight, self.job)
        record = open_manifest(flight, runs, command=command, resources=self.resources)
        write_manifest(survey.folder, record)
        self.book.write()
        supply = self._supply(flight.sampling) if flight.sampling else Declared(runs, self.book)
        self.board.write()
        briefing.print_plan(console, flight, self.resources, runs, self.book.standings)
        with Progress(console) as progress, keeper.kept_current(survey.folder):
            progress.update([*self.book.standings, *supply.to_come()])
            outcome = self._search(supply, survey.limits, progress)
            if flight.sampling and survey.limits.confirm and outcome.signal_number is None and not outcome.trouble:
                outcome.signal_number = self._confirm(flight.sampling, survey.limits.confirm, progress).signal_number
        write_manifest(survey.folder, close_manifest(record, outcome.signal_number, outcome.limit))
        page = keeper.write_safely(survey.folder)
        best = keeper.best_safely(survey.folder) if flight.sampling else []
        briefing.print_results(console, flight, self.book.standings, page=page, best=best, outcome=outcome)
        return _exit_code(self.book.standings, outcome)

    def _search(
        self, supply: Supply, limits: Limits, progress: Progress, scheduler: StoppingScheduler | None = None
    ) -> SessionOutcome:
        return tuner.run_trials(
            supply,
            self.job,
            self.resources,
            scheduler=scheduler or self.scheduler,
            limits=limits,
            ledger=self.book,
            board=self.board,
            progress=progress,
        )

    # --- a sampled search -------------------------------------------------------------------------------------------

    def _supply(self, sampling: Sampling) -> Asked:
        survey = self.flight.survey
        if sampling.known:
            survey.folder.write(KNOWN, json_bytes([known.to_json() for known in sampling.known]))
        study = Study(
            sampling.place.open(),
            survey.name,
            sampling.question,
            limit=survey.limits.trials,
            checkpoint_of=lambda trial: f"{survey.folder.uri}/{trial}/{BEST_WEIGHTS}",
        )
        notes = {f"note {number}": caption for number, caption in enumerate(survey.captions, start=1)}
        study.describe(
            {"search": survey.folder.uri, "space": survey.choices.space, "data": survey.choices.data} | notes
        )
        return Asked(
            study,
            survey.folder,
            self.book,
            suggested=sampling.suggested,
            known=sampling.known,
            limit=survey.limits.trials,
            at_once=self.at_once,
            num_epochs=survey.example.num_epochs,
            snapshot=sampling.place.snapshot,
        )

    def _confirm(self, sampling: Sampling, count: int, progress: Progress) -> SessionOutcome:
        """Train the best anew, with fresh seeds. No limit holds for that, and nothing stops it early."""
        survey = self.flight.survey
        suggested = prepare.read_suggested(survey.folder)
        fresh = confirm.fresh_runs(
            suggested,
            self.book.standings,
            sampling.known,
            rows={run.name: run for run in survey.runs},
            baseline=survey.space.baseline,
            count=count,
        )
        runs = {name: one.run for name, one in suggested.items() if one.origin == "confirm"}
        for run in fresh:
            name = self.job.trial_name(run)
            if name not in runs:
                self._add_fresh(name, run)
                runs[name] = run
        scheduler = StoppingScheduler(Rungs(rungs_of=rungs.no_rungs))
        return self._search(Declared(runs, self.book), Limits(), progress, scheduler)

    def _add_fresh(self, name: str, run: Run) -> None:
        fresh = TrialSpec(trial=name, run=run, origin="confirm", number=None, params={}, distributions={})
        folder = self.flight.survey.folder / name
        folder.make()
        folder.write(RUN, json_bytes(fresh.to_json()))
        self.book.add(TrialState(trial=name, run=run.name, seed=run.seed, num_epochs=run.num_epochs))


def _runs(flight: PreparedSearch, job: TrialContext) -> dict[str, Run]:
    """The trials that are known as the session begins, by name."""
    if flight.sampling:
        return {name: one.run for name, one in flight.sampling.suggested.items()}
    return {job.trial_name(run): run for run in flight.survey.runs}


def _judge(flight: PreparedSearch, state: dict[str, Any] | None) -> Judge:
    """The rule that was chosen, going on from what an earlier driver saw, and from what an earlier search teaches."""
    judge = _judge_of(flight.survey, state or {"seen": [], "stops": {}})
    for known in flight.sampling.known if flight.sampling else ():
        curve = [epoch.miou for epoch in known.epochs if not epoch.diverged]
        judge.know(known.suggested.run, f"earlier/{known.source}", curve)
    return judge


def _judge_of(survey: Survey, state: dict[str, Any]) -> Judge:
    spared = rungs.spared_rows(survey.space.rows)
    match survey.choices.scheduler:
        case "asha":
            return Rungs.from_json(state, rungs_of=partial(_rungs_on, survey.facts), spared=spared)
        case "median":
            return MedianRule.from_json(state, judged_from=partial(_judged_from_on, survey.facts), spared=spared)
        case "fifo":
            return Rungs.from_json(state, rungs_of=rungs.no_rungs)
        case _:
            assert_never(survey.choices.scheduler)


def _rungs_on(facts: DataFacts, run: Run) -> tuple[int, ...]:
    return rungs.rung_epochs(run, iterations_per_epoch=spaces.iterations_per_epoch(run, facts))


def _judged_from_on(facts: DataFacts, run: Run) -> int:
    return first_judged_epoch(run, iterations_per_epoch=spaces.iterations_per_epoch(run, facts))


def _exit_code(standings: Sequence[TrialState], outcome: SessionOutcome) -> int:
    if outcome.signal_number is not None:
        return 128 + outcome.signal_number
    if outcome.trouble:
        return resources_module.RESTARTABLE
    return SOME_FAILED if any(standing.status == "failed" for standing in standings) else OK


CANNOT_PLAN: Final = (resources_module.ClusterError, DataError)

CORES_PER_GPU: Final = 4
"""Of a cluster that is not there yet: what the smallest cloud machines have beside a GPU."""


def print_plan_page(console: Console, survey: Survey) -> None:
    """Say it. ClusterError if no such cluster can hold a trial, DataError if a frame is damaged."""
    num_trials = survey.num_trials or UNBOUNDED_TRIALS
    resources = resources_module.allocate(_cluster(survey.arguments), survey.arguments, num_trials=num_trials)
    check_limits(survey.limits, resources)
    standings = state.read_trials(survey.folder).standings if survey.arguments.continues else ()
    suggested = prepare.read_suggested(survey.folder) if survey.draft and survey.arguments.continues else {}
    outlook = briefing.outlook_of(survey, resources, standings, suggested=suggested.values())
    briefing.print_survey(console, _timed(outlook))


def _cluster(arguments: Options) -> Cluster:
    """What Ray would find, or finds at an address; or what is planned for."""
    if arguments.gpus is not None:
        cores = math.ceil((arguments.cpus_per_trial or 0) / (arguments.gpus_per_trial or 1.0))
        return _one_node(cpus=arguments.gpus * max(CORES_PER_GPU, cores), gpus=arguments.gpus)
    if arguments.address is not None:
        with resources_module.ray_session(arguments.address) as cluster:
            return cluster()
    return _one_node(cpus=os.cpu_count() or 1, gpus=torch.cuda.device_count())


def _one_node(*, cpus: int, gpus: int) -> Cluster:
    return Cluster((Node(id="planned", cpus=cpus, gpus=gpus),))


def _timed(outlook: Outlook) -> Outlook:
    """With the speed timed here, where it is not known and can be."""
    if outlook.speed is not None or not outlook.work.left:
        return outlook
    if outlook.has_gpus and not torch.cuda.is_available():
        return replace(outlook, speed_problem="no GPU here to time it on; --images-per-second X states it")
    survey, runs = outlook.survey, [run for run, _done in outlook.work.left]
    try:
        timings = timing.time_trials(survey.source, runs, outlook.resources, survey.choices.precision)
    except ProbeError as error:
        return replace(outlook, speed_problem=f"a trial could not be timed here: {error}")
    return replace(outlook, speed=timings.speed, timings=timings)
