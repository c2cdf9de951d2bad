"""One session of a search, from a `PreparedSearch` to an exit code; and `--plan`, which only says what one would take.

A session is: a lock, Ray, resources for each trial, the state of all trials, `search.json`, the plan on the terminal,
the trials themselves (`tuner`), fresh seeds for the best of a study, and the results.
"""

import importlib.metadata
import logging
import math
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final

from rich.console import Console

from tune_bisenet import __version__, spaces
from tune_bisenet.config import Resources
from tune_bisenet.errors import FAILED, OK
from tune_bisenet.options import InputError, Limits, Options
from tune_bisenet.records import (
    BEGINNINGS,
    ENDED_WELL,
    TRIALS,
    DataInfo,
    Manifest,
    SavedState,
    Session,
    SpaceInfo,
    StudyInfo,
    code_changes,
    project_commit,
    read_manifest,
    read_saved_state,
    read_sound_trials,
    source_digest,
    write_manifest,
)
from tune_bisenet.report.page import refreshed, write_safely
from tune_bisenet.report.read import read_search
from tune_bisenet.report.verdicts import judge_search
from tune_bisenet.rungs import RULES, Stopper, protected_rows
from tune_bisenet.search.console import SearchProgress, print_dry_run, print_plan, print_results, resume_command
from tune_bisenet.search.forecast import estimate_search, time_throughput
from tune_bisenet.search.prepare import PreparedSearch, add_trials, pack_digests
from tune_bisenet.search.resources import Cluster, Node, allocate, ray_session, this_machine
from tune_bisenet.search.searcher import GridSearcher, Searcher, StudySearcher
from tune_bisenet.search.sharing import settle_sharing
from tune_bisenet.search.state import SearchState, SessionOutcome, complete_states, exclusive, restore
from tune_bisenet.search.tuner import run_trials
from tune_bisenet.text import counted
from tune_bisenet.training.tensorboard import HParamsTable

UNBOUNDED_TRIALS: Final = 10_000
"""The number of trials that resources are shared out for where only time or money bounds a search."""

CORES_PER_GPU: Final = 4
"""Of a cluster that does not exist yet: what the smallest cloud machines have beside a GPU."""

_log = logging.getLogger(__name__)

PACKAGES: Final = ("torch", "torchvision", "ray", "pyarrow", "numpy", "optuna", "pydantic", "tensorboard")


def run_search(
    search: PreparedSearch, console: Console, command: Sequence[str], on_begin: Callable[[str], None]
) -> int:
    """Run one session and return its exit code. Raises InputError; StorageError if storage does not answer.

    `on_begin` is called with the command to resume by, once the search has one.
    """
    with exclusive(search.folder):
        if read_manifest(search.folder) != search.earlier:
            raise InputError(
                f"another driver has run the search in {search.folder.uri} since this one began to check it. "
                "Run the same command again, a new search under another --name."
            )
        if search.study:
            search.study.database.prepare()  # before Ray is started for it
        search = settle_sharing(search)
        with ray_session(search.options.address) as cluster:
            resources = _allocate(search, cluster())
            manifest = _make_manifest(search, resources, command)
            running = partial(_run_session, search, resources, console, manifest, on_begin=on_begin)
            return running(max_running=lambda: cluster().max_in_flight(resources))


def _run_session(
    search: PreparedSearch,
    resources: Resources,
    console: Console,
    manifest: Manifest,
    *,
    on_begin: Callable[[str], None],
    max_running: Callable[[], int],
) -> int:
    folder, limits = search.folder, search.config.limits
    saved = read_saved_state(folder)
    stopper = _restore_stopper(search, saved)
    state = _restore_state(search, saved, stopper)
    if changes := code_changes(manifest.sessions[-2:]):
        search = replace(search, changes=(*search.changes, changes))
    estimate = estimate_search(search, resources, state.states)
    estimate.check_storage()
    write_manifest(folder, manifest)
    on_begin(resume_command(search))
    state.write()
    searcher = _make_searcher(search, state, max_running)
    table = HParamsTable(folder, {name: spec.run for name, spec in search.specs.items()})
    table.write()
    print_plan(console, estimate)
    gpu_share = 0.0 if search.options.device == "cpu" else min(resources.gpus_per_trial, 1.0)
    context = search.trial_context(threads_per_trial=resources.threads_per_trial, gpu_share=gpu_share)
    with SearchProgress(console) as progress, refreshed(folder):
        progress.update([*state.states, *searcher.pending()])
        train = partial(
            run_trials,
            context=context,
            resources=resources,
            stall_timeout=search.options.stall_timeout,
            state=state,
            table=table,
            progress=progress,
        )
        outcome = train(searcher, stopper=stopper, limits=limits)
        while not outcome.is_cut_off and (more := _next_look(search, progress)):
            search = more
            trials = {name: spec.run for name, spec in search.specs.items()}
            manifest = manifest.model_copy(update={"config": search.config, "trials": trials})
            write_manifest(folder, manifest)
            new_trials = GridSearcher(search.specs, state, share=not search.config.no_share)
            outcome = train(new_trials, stopper=stopper, limits=limits, earlier=outcome)
        if limits.confirm and outcome.signal_number is None:
            # No limit holds for fresh seeds, and nothing stops them early.
            fresh = GridSearcher(searcher.fresh_trials(limits.confirm), state, share=not search.config.no_share)
            never = _make_stopper(search, "fifo")
            confirmed = train(fresh, stopper=never, limits=Limits(), earlier=outcome)
            outcome = replace(confirmed, limit=outcome.limit)
    write_manifest(folder, _end_session(manifest, outcome))
    if all(trial.status in ENDED_WELL for trial in state.states):
        (folder / BEGINNINGS).remove()
    print_results(console, search, state.states, report=write_safely(folder), outcome=outcome)
    if outcome.signal_number is not None:
        return 128 + outcome.signal_number
    return FAILED if any(trial.status == "failed" for trial in state.states) else OK


def _next_look(search: PreparedSearch, progress: SearchProgress) -> PreparedSearch | None:
    """Return a search that decides by itself with the seeds that its open rows are to have next; None at the end."""
    if not search.config.decide or search.options.rerun:
        return None
    judgement = judge_search(read_search(search.folder))
    verdicts = Counter(claim.verdict for claim in judgement.claims)
    found = ", ".join(f"{count} {verdict}" for verdict, count in verdicts.items())
    more = judgement.more_seeds
    then = f"seeds {', '.join(map(str, more.seeds))} for {', '.join(more.runs)}" if more else "no more seeds"
    progress.announce(f"judged at {counted(judgement.looked_at, 'seed')}: {found}; {then}")
    return add_trials(search, more.runs, more.seeds) if more else None


def _allocate(search: PreparedSearch, cluster: Cluster) -> Resources:
    """Return what each trial gets. Raise InputError if that does not fit, or never reaches a limit."""
    resources = allocate(
        cluster,
        search.options,
        num_trials=search.num_trials or UNBOUNDED_TRIALS,
        threads_per_trial=search.first_threads,
    )
    if search.config.limits.gpu_hours is not None and not resources.gpus_per_trial:
        raise InputError("--gpu-hours: trials here have no GPU. Limit the search by --time-budget or --trials.")
    return resources


def _restore_state(search: PreparedSearch, saved: SavedState, stopper: Stopper) -> SearchState:
    specs, only = search.specs, search.options.rerun
    earlier = complete_states(search.folder, saved.states, specs) if search.earlier else []
    return SearchState(
        search.folder,
        [restore(name, spec.run, earlier, only=only) for name, spec in specs.items()],
        captions=search.captions,
        baseline=search.space.baseline,
        only=only,
        scheduler_state=stopper.to_json,
        seconds_before=saved.seconds,
    )


def _make_stopper(search: PreparedSearch, scheduler: str) -> Stopper:
    """Return the stopping rule before it has seen a trial of this search."""
    stopper = Stopper(
        rule=RULES[scheduler],
        iterations_per_epoch=partial(spaces.iterations_per_epoch, data=search.facts),
        protected=protected_rows(search.space.rows),
    )
    for known in search.study.known if search.study else ():
        curve = [epoch.miou for epoch in known.epochs if not epoch.diverged]
        stopper.add_known(known.spec.run, f"earlier/{known.source}", curve)
    return stopper


def _restore_stopper(search: PreparedSearch, saved: SavedState) -> Stopper:
    """Return the stopping rule with what earlier drivers saw and decided; where that is lost, as trials record it.

    The last epoch of a trial that has not ended then counts as not seen: the trial reports it again, and is judged.
    """
    stopper = _make_stopper(search, search.config.scheduler)
    if saved.scheduler is not None:
        return stopper.restored(saved.scheduler)
    records = read_sound_trials(search.folder, search.specs) if search.earlier else {}
    for name, record in records.items():
        has_ended = record.state.status in ENDED_WELL
        curve = [epoch.miou for epoch in record.epochs if not epoch.diverged]
        stopper.add_known(record.spec.run, name, curve if has_ended else curve[:-1])
        if has_ended and record.state.stopped_by:
            stopper.stops[name] = record.state.stopped_by
    if any(record.epochs for record in records.values()):
        _log.warning("%s was missing or damaged: what the stopping rule has seen was rebuilt from the trials.", TRIALS)
    return stopper


def _make_searcher(search: PreparedSearch, state: SearchState, max_running: Callable[[], int]) -> Searcher:
    if search.study is None:
        return GridSearcher(search.specs, state, share=not search.config.no_share)
    notes = {f"note {number}": caption for number, caption in enumerate(search.captions, start=1)}
    about = {"search": search.folder.uri, "space": search.config.space, "data": search.config.data}
    return StudySearcher(
        search.study,
        search.folder,
        state,
        name=search.name,
        limit=search.config.limits.trials,
        max_running=max_running,
        attributes=about | notes,
    )


def _make_manifest(search: PreparedSearch, resources: Resources, command: Sequence[str]) -> Manifest:
    """Return the manifest with one more session, which has just begun."""
    config, facts = search.config, search.facts
    study = search.study and StudyInfo(
        name=search.name,
        url=search.study.database.shown,
        sampler=config.sampler,
        objectives=config.objectives,
        warm_start=(config.warm_start,) if config.warm_start else (),
    )
    before = search.earlier.data.digests if search.earlier else {}
    session = Session(
        started=_now(),
        command=tuple(command),
        commit=project_commit(),
        source=source_digest(),
        python=platform.python_version(),
        packages={"tune-bisenet": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        cpus_per_trial=resources.cpus_per_trial,
        threads_per_trial=resources.threads_per_trial,
        gpus_per_trial=resources.gpus_per_trial,
        trials_at_once=resources.concurrency,
    )
    return Manifest(
        name=search.name,
        config=config,
        space=SpaceInfo(
            title=search.space.title,
            baseline=search.space.baseline,
            measured_share=search.space.measured_share,
            second_measure=search.space.second_measure,
        ),
        data=DataInfo(
            digests=before | pack_digests(search.packs),
            train_images=facts.num_train,
            val_images=facts.num_val,
            classes=search.source.classes,
        ),
        backbone_digest=search.backbone_digest,
        proxy=search.captions[0] if config.proxy else None,
        study=study,
        trials={name: spec.run for name, spec in search.specs.items()},
        sessions=(*(search.earlier.sessions if search.earlier else ()), session),
    )


def _end_session(manifest: Manifest, outcome: SessionOutcome) -> Manifest:
    *before, last = manifest.sessions
    end: dict[str, Any] = {"ended": _now(), "signal": outcome.signal_number, "limit": outcome.limit or None}
    end["warnings"] = tuple(dict.fromkeys(outcome.warnings))
    if outcome.max_concurrent is not None:
        end["trials_at_once"] = outcome.max_concurrent
    if outcome.gpus_per_trial is not None:
        end["gpus_per_trial"] = outcome.gpus_per_trial
    return manifest.model_copy(update={"sessions": (*before, last.model_copy(update=end))})


def _now() -> datetime:
    return datetime.now(UTC).replace(microsecond=0)


def print_plan_page(console: Console, search: PreparedSearch) -> None:
    """Print what a search would take, without starting anything. Raises InputError if no trial fits."""
    search = settle_sharing(search)
    resources = _allocate(search, _planned_cluster(search.options))
    states = read_saved_state(search.folder).states if search.options.continues else ()
    print_dry_run(console, time_throughput(estimate_search(search, resources, states)))


def _planned_cluster(options: Options) -> Cluster:
    """Return what Ray would find here or finds at an address, or the cluster of `--gpus`."""
    if options.address is not None:
        with ray_session(options.address) as cluster:
            return cluster()
    if options.gpus is None:
        return this_machine()
    share = options.gpus_per_trial if isinstance(options.gpus_per_trial, float) else 1.0
    cores = max(CORES_PER_GPU, math.ceil((options.cpus_per_trial or 0) / share))
    return Cluster((Node(cpus=options.gpus * cores, gpus=options.gpus),))
