"""What the terminal says before and after a search: the plan, and what came of it."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.text import Text

from tune_bisenet import plan, rungs
from tune_bisenet.arguments import NO_BACKBONE
from tune_bisenet.config import Resources, Run, size_words
from tune_bisenet.preflight import Flight
from tune_bisenet.report import leaderboard
from tune_bisenet.results import Standing


def print_plan(console: Console, flight: Flight, resources: Resources, runs: Mapping[str, Run]) -> None:
    """What will be done, with what, where the results go, and how to watch."""
    console.print()
    for title, text in plan_lines(flight, resources, runs):
        _print_line(console, Text.assemble((f"{title:<11}", "bold"), text))
    console.print()


def plan_lines(flight: Flight, resources: Resources, runs: Mapping[str, Run]) -> list[tuple[str, str]]:
    """The plan as (title, text) pairs."""
    epochs = sum(run.num_epochs for run in runs.values())
    iterations = sum(run.num_epochs * plan.iterations_per_epoch(run, flight.facts) for run in runs.values())
    choices, facts = flight.choices, flight.facts
    sizes = ", ".join(size_words(size) for size in flight.packs)
    start = "from scratch" if choices.backbone == NO_BACKBONE else choices.backbone
    lines = [
        ("search", f"{flight.name}: {flight.grid.title}"),
        ("trials", f"{len(runs)} ({_shortened(list(runs))}), {epochs} epochs, {iterations:,} iterations in all"),
        ("data", f"{choices.data}: {facts.num_train} training and {facts.num_val} validation images, {sizes}"),
        ("backbone", f"ResNet-18, {start}"),
        ("device", _device(flight, resources)),
        ("scheduler", _scheduler(flight)),
        ("results", flight.folder.uri),
        ("watch", f"tensorboard --logdir {flight.folder.uri}"),
        ("resume", f"python -m tune_bisenet.run --resume --name {flight.name} --storage {flight.arguments.storage}"),
    ]
    return [*lines, *(("note", caption) for caption in flight.captions)]


def print_results(
    console: Console, flight: Flight, standings: Sequence[Standing], *, page: str | None, signal_number: int | None
) -> None:
    """The leaderboard, where it lies, and what to do if the search is not whole."""
    console.print()
    console.print(leaderboard.to_rich(standings, baseline=flight.grid.baseline, captions=flight.captions))
    _print_line(console, f"results: {flight.folder.uri}")
    if page is not None:
        _print_line(console, f"report:  {page}")
    failed = [standing.trial for standing in standings if standing.status == "failed"]
    if failed:
        _print_line(console, f"failed: {', '.join(failed)}. Try these again with --resume --name {flight.name}.")
    if signal_number is not None:
        _print_line(console, f"interrupted. Go on with --resume --name {flight.name}.")


def _print_line(console: Console, line: str | Text) -> None:
    """Never broken over lines by us: a path or a command must survive copying, also out of a log."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _device(flight: Flight, resources: Resources) -> str:
    each = f"{resources.gpus_per_trial:g} GPU, " if resources.gpus_per_trial else ""
    cores = f"{resources.cpus_per_trial} CPU core{'s' if resources.cpus_per_trial > 1 else ''}"
    return f"{resources.concurrency} trials at once, {each}{cores} each, {flight.choices.precision}"


def _scheduler(flight: Flight) -> str:
    if flight.choices.scheduler == "fifo":
        return "fifo: every run is trained to its end, unless its loss diverges"
    forecast = rungs.forecast(flight.runs, plan.iterations_per_epoch(flight.runs[0], flight.facts))
    return f"asha: {forecast} (--scheduler fifo trains all to the end)"


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])}, … {names[-1]}"
