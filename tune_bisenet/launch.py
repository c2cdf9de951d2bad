"""One session of a search, from a checked `Flight` to an exit code: ledger, supply, scheduler, search, report."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, assert_never

from rich.console import Console

from tune_bisenet import briefing, endings, ledger, manifest, plan, ray_session, rehearsal, rungs, search
from tune_bisenet.arguments import Limits
from tune_bisenet.board import Board
from tune_bisenet.config import Job, Resources, Run
from tune_bisenet.flight import Flight, Sampling, Survey
from tune_bisenet.ledger import Ledger, to_json
from tune_bisenet.median import MedianRule, first_judged_epoch
from tune_bisenet.plan import DataFacts
from tune_bisenet.progress import Progress
from tune_bisenet.recorder import Outcome
from tune_bisenet.report import keeper
from tune_bisenet.results import BEST, Standing
from tune_bisenet.rungs import Judge, Rungs
from tune_bisenet.stopping import EarlyStopping
from tune_bisenet.study import confirm
from tune_bisenet.study.place import StudyError
from tune_bisenet.study.study import Study
from tune_bisenet.suggested import KNOWN, RUN, Suggested
from tune_bisenet.supply import Asked, Declared, Supply

CANNOT_BEGIN: Final = (ledger.InUseError, ray_session.ClusterError, StudyError)

OK: Final = 0
SOME_FAILED: Final = 1

UNBOUNDED_TRIALS: Final = 10_000
"""How many trials resources are shared out for where only time or money bounds a search."""


def launch(flight: Flight, console: Console, command: list[str]) -> int:
    """Run the session; its exit code. InUseError, ClusterError or StudyError if it cannot begin."""
    survey, arguments = flight.survey, flight.survey.arguments
    with ledger.exclusive(survey.folder), ray_session.ray_session(arguments.address) as cluster:
        num_trials = survey.num_trials or UNBOUNDED_TRIALS
        resources = ray_session.allot(cluster(), arguments, num_trials=num_trials)
        if arguments.address and survey.folder.local_path is not None:
            ray_session.check_shared(survey.folder.local_path.parent, cluster())
        check_limits(survey.limits, resources)
        return _Session.of(flight, resources, at_once=lambda: cluster().can_take(resources)).run(console, command)


def check_limits(limits: Limits, resources: Resources) -> None:
    """ClusterError for a limit that trials with these resources never reach."""
    if limits.gpu_hours is not None and not resources.gpus_per_trial:
        raise ray_session.ClusterError(
            "--gpu-hours: trials here have no GPU. Bound the search by --time-budget or --trials."
        )


@dataclass(frozen=True, kw_only=True)
class _Session:
    """What the phases of a session share."""

    flight: Flight
    resources: Resources
    at_once: Callable[[], int]
    """How many trials a study may have out at the moment."""
    job: Job
    book: Ledger
    scheduler: EarlyStopping
    board: Board

    @classmethod
    def of(cls, flight: Flight, resources: Resources, *, at_once: Callable[[], int]) -> "_Session":
        survey = flight.survey
        use_gpu = resources.gpus_per_trial > 0 and survey.arguments.device != "cpu"
        job = flight.job(cpus_per_trial=resources.cpus_per_trial, use_gpu=use_gpu)
        kept = ledger.read_trials(survey.folder)
        runs = _runs(flight, job)
        earlier = endings.completed(survey.folder, kept.standings, runs) if survey.earlier else []
        scheduler = EarlyStopping(_judge(flight, kept.scheduler))
        only = survey.arguments.rerun
        book = Ledger(
            survey.folder,
            [ledger.carried_over(name, run, earlier, only=only) for name, run in runs.items()],
            captions=survey.captions,
            baseline=survey.space.baseline,
            only=only,
            scheduler_state=scheduler.state,
            seconds_before=kept.seconds,
        )
        board = Board(survey.folder, runs)
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
        record = manifest.opened(flight, runs, command=command, resources=self.resources)
        manifest.write(survey.folder, record)
        self.book.write()
        supply = self._supply(flight.sampling) if flight.sampling else Declared(runs, self.book)
        self.board.write()
        briefing.print_plan(console, flight, self.resources, runs, self.book.standings)
        with Progress(console) as progress, keeper.kept_current(survey.folder):
            progress.update([*self.book.standings, *supply.to_come()])
            outcome = self._search(supply, survey.limits, progress)
            if flight.sampling and survey.limits.confirm and outcome.signal_number is None and not outcome.trouble:
                outcome.signal_number = self._confirm(flight.sampling, survey.limits.confirm, progress).signal_number
        manifest.write(survey.folder, manifest.closed(record, outcome.signal_number, outcome.limit))
        page = keeper.write_safely(survey.folder)
        best = keeper.best_safely(survey.folder) if flight.sampling else []
        briefing.print_results(console, flight, self.book.standings, page=page, best=best, outcome=outcome)
        return _exit_code(self.book.standings, outcome)

    def _search(
        self, supply: Supply, limits: Limits, progress: Progress, scheduler: EarlyStopping | None = None
    ) -> Outcome:
        return search.search(
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
            survey.folder.write(KNOWN, to_json([known.to_json() for known in sampling.known]))
        study = Study(
            sampling.place.open(),
            survey.name,
            sampling.question,
            limit=survey.limits.trials,
            checkpoint_of=lambda trial: f"{survey.folder.uri}/{trial}/{BEST}",
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

    def _confirm(self, sampling: Sampling, count: int, progress: Progress) -> Outcome:
        """Train the best anew, with fresh seeds. No limit holds for that, and nothing stops it early."""
        survey = self.flight.survey
        suggested = rehearsal.read_suggested(survey.folder)
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
        scheduler = EarlyStopping(Rungs(rungs_of=rungs.no_rungs))
        return self._search(Declared(runs, self.book), Limits(), progress, scheduler)

    def _add_fresh(self, name: str, run: Run) -> None:
        fresh = Suggested(trial=name, run=run, origin="confirm", number=None, params={}, distributions={})
        folder = self.flight.survey.folder / name
        folder.make()
        folder.write(RUN, to_json(fresh.to_json()))
        self.book.add(Standing(trial=name, run=run.name, seed=run.seed, num_epochs=run.num_epochs))


def _runs(flight: Flight, job: Job) -> dict[str, Run]:
    """The trials that are known as the session begins, by name."""
    if flight.sampling:
        return {name: one.run for name, one in flight.sampling.suggested.items()}
    return {job.trial_name(run): run for run in flight.survey.runs}


def _judge(flight: Flight, state: dict[str, Any] | None) -> Judge:
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
    return rungs.rung_epochs(run, iterations_per_epoch=plan.iterations_per_epoch(run, facts))


def _judged_from_on(facts: DataFacts, run: Run) -> int:
    return first_judged_epoch(run, iterations_per_epoch=plan.iterations_per_epoch(run, facts))


def _exit_code(standings: Sequence[Standing], outcome: Outcome) -> int:
    if outcome.signal_number is not None:
        return 128 + outcome.signal_number
    if outcome.trouble:
        return ray_session.RESTARTABLE
    return SOME_FAILED if any(standing.status == "failed" for standing in standings) else OK
