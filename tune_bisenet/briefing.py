"""What the terminal says before and after a search: the plan, and what came of it."""

import shlex
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from tune_bisenet import plan, rungs
from tune_bisenet.arguments import NO_BACKBONE, Limits, duration_words
from tune_bisenet.config import Resources, Run, size_words
from tune_bisenet.preflight import Flight
from tune_bisenet.rehearsal import Sampling
from tune_bisenet.report import leaderboard
from tune_bisenet.results import Standing
from tune_bisenet.search import Outcome


def print_plan(console: Console, flight: Flight, resources: Resources, runs: Mapping[str, Run]) -> None:
    """What will be done, with what, where the results go, and how to watch."""
    console.print()
    for title, text in plan_lines(flight, resources, runs):
        _print_line(console, Text.assemble((f"{title:<11}", "bold"), text))
    console.print()


def plan_lines(flight: Flight, resources: Resources, runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """The plan as (title, text) pairs. `runs` are the trials known as yet."""
    choices, facts = flight.choices, flight.facts
    sizes = ", ".join(size_words(size) for size in flight.packs)
    start = "from scratch" if choices.backbone == NO_BACKBONE else choices.backbone
    lines = [
        ("search", f"{flight.name}: {flight.space.title}"),
        *_trials(flight, runs),
        ("data", f"{choices.data}: {facts.num_train} training and {facts.num_val} validation images, {sizes}"),
        ("backbone", f"ResNet-18, {start}"),
        ("device", _device(flight, resources)),
        ("scheduler", _scheduler(flight)),
        ("results", flight.folder.uri),
        ("watch", f"tensorboard --logdir {flight.folder.uri}"),
        *_study(flight.sampling),
        ("resume", f"python -m tune_bisenet.run {_again(flight)}"),
    ]
    return [*lines, *(("note", caption) for caption in flight.captions)]


def _trials(flight: Flight, runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """What will be trained, and what bounds it."""
    if flight.sampling is None:
        epochs = sum(run.num_epochs for run in runs.values())
        iterations = sum(run.num_epochs * plan.iterations_per_epoch(run, flight.facts) for run in runs.values())
        words = f"{len(runs)} ({_shortened(list(runs))}), {epochs} epochs, {iterations:,} iterations in all"
        return [("trials", words), *_bounds(flight.limits)]
    example, sampling = flight.example, flight.sampling
    known = {known.suggested.run.name for known in sampling.known}
    rows = [name for name in sampling.question.rows if name not in known and name not in runs]
    number = "as many as time allows" if flight.limits.trials is None else str(flight.limits.trials)
    first = f", the rows {_shortened(rows)} first" if rows else ""
    iterations = plan.iterations_per_epoch(example, flight.facts)
    words = f"{number}{first}, {example.num_epochs} epochs of {iterations} iterations each"
    lines = [("trials", words), ("sampler", f"{flight.choices.sampler}, for {' and '.join(flight.choices.objectives)}")]
    return [*lines, *_known(sampling), *_bounds(flight.limits)]


def _known(sampling: Sampling) -> list[tuple[str, str]]:
    """What an earlier search teaches, and what of it could not be used."""
    if not sampling.known:
        return []
    names = _shortened([known.suggested.trial for known in sampling.known])
    left_out = "; ".join(f"{name} is left out: {reason}" for name, reason in sampling.left_out.items())
    return [("known", f"{len(sampling.known)} trials ({names})" + (f"; {left_out}" if left_out else ""))]


def _bounds(limits: Limits) -> list[tuple[str, str]]:
    bounds = []
    if limits.time_budget is not None:
        bounds.append(f"{duration_words(limits.time_budget)} of time")
    if limits.gpu_hours is not None:
        bounds.append(f"{limits.gpu_hours:g} GPU-hours")
    return [("limits", f"ends after {' or '.join(bounds)}, whichever comes first")] if bounds else []


def _study(sampling: Sampling | None) -> list[tuple[str, str]]:
    return [("study", f"optuna-dashboard {sampling.place.shown}")] if sampling else []


def print_results(
    console: Console,
    flight: Flight,
    standings: Sequence[Standing],
    *,
    page: str | None,
    best: Sequence[str] = (),
    outcome: Outcome,
) -> None:
    """The leaderboard, where it lies, and what to do if the search is not whole."""
    console.print()
    console.print(leaderboard.to_rich(standings, baseline=flight.space.baseline, captions=flight.captions))
    for line in best:
        _print_line(console, line)
    _print_line(console, f"results: {flight.folder.uri}")
    if page is not None:
        _print_line(console, f"report:  {page}")
    failed = [standing.trial for standing in standings if standing.status == "failed"]
    if failed:
        _print_line(console, f"failed: {', '.join(failed)}. Try these again with {_again(flight)}.")
    for line in _endings(flight, standings, outcome):
        _print_line(console, line)


def _endings(flight: Flight, standings: Sequence[Standing], outcome: Outcome) -> list[str]:
    """Why the search ended, where that is not plain, and how to go on."""
    if outcome.signal_number is not None:
        return [f"interrupted. Go on with {_again(flight)}."]
    if outcome.trouble:
        return [f"ended: {outcome.trouble}. Nothing is lost: go on with {_again(flight)} when it does."]
    if outcome.limit:
        return [f"ended: {outcome.limit}. Go on with {_again(flight)} and a higher limit."]
    if flight.sampling is None:
        return []
    lines = [f"ended: --trials {flight.limits.trials} have been run. More by {_again(flight)} --trials N."]
    if flight.limits.confirm is None:
        lines.append(f"Fresh seeds for the best: {_again(flight)} --confirm 3.")
    elif not any(standing.trial != standing.run for standing in standings):
        lines.append("--confirm: no sampled trial was trained to its end, so there is nothing to confirm.")
    return lines


def _again(flight: Flight) -> str:
    """The flags that go on with this search."""
    return f"--resume --name {flight.name} --storage {shlex.quote(flight.arguments.storage)}"


def _print_line(console: Console, line: str | Text) -> None:
    """Never broken over lines by us: a path or a command must survive copying, also out of a log."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _device(flight: Flight, resources: Resources) -> str:
    each = f"{resources.gpus_per_trial:g} GPU, " if resources.gpus_per_trial else ""
    cores = f"{resources.cpus_per_trial} CPU core{'s' if resources.cpus_per_trial > 1 else ''}"
    more = ", more as the cluster starts nodes for those that wait" if resources.grows else ""
    return f"{resources.concurrency} trials at once{more}, {each}{cores} each, {flight.choices.precision}"


def _scheduler(flight: Flight) -> str:
    if flight.choices.scheduler == "fifo":
        return "fifo: every run is trained to its end, unless its loss diverges"
    if flight.choices.scheduler == "median":
        return "median: a run whose best mIoU is below the median of the others' means so far is stopped"
    if flight.sampling is not None:
        return (
            "asha: at 40 and 80 % of its epochs a run below the others' median is stopped (--scheduler fifo: none is)"
        )
    forecast = rungs.forecast(flight.runs, plan.iterations_per_epoch(flight.runs[0], flight.facts))
    return f"asha: {forecast} (--scheduler fifo trains all to the end)"


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])}, … {names[-1]}"
