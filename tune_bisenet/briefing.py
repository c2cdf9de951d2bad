"""What the terminal says before and after a search: the plan, and what came of it."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tune_bisenet import forecast, plan, promises
from tune_bisenet.arguments import NO_BACKBONE, Limits, duration_words
from tune_bisenet.config import Resources, Run, size_words
from tune_bisenet.flight import Flight, Survey
from tune_bisenet.forecast import Work
from tune_bisenet.outlook import Line, Outlook
from tune_bisenet.outlook import lines as outlook_lines
from tune_bisenet.recorder import Outcome
from tune_bisenet.rehearsal import Sampling
from tune_bisenet.report import leaderboard
from tune_bisenet.results import Standing
from tune_bisenet.spaces import Sampled

TITLE_WIDTH: Final = 11
COPIED: Final = frozenset({"search", "data", "results", "watch", "study", "resume"})
"""Titles of lines with paths and commands."""

CONFIRMED_RUNS: Final = 3
"""At most so many runs get fresh seeds by `--confirm`: the best, the best row, and the baseline."""


def print_plan(
    console: Console, flight: Flight, resources: Resources, runs: Mapping[str, Run], standings: Sequence[Standing]
) -> None:
    """What will be done, with what, what it will take, where the results go, and how to watch."""
    outlook = outlook_of(flight, resources, runs, standings)
    _print_page(console, plan_lines(flight, outlook, runs), outlook)


def print_survey(console: Console, survey: Survey, outlook: Outlook) -> None:
    """The same of a search that is not started."""
    _print_page(console, survey_lines(survey, outlook), outlook)
    _print_line(console, "A plan: nothing was started. The same command without --plan does it.")


def _print_page(console: Console, lines: Sequence[Line], outlook: Outlook) -> None:
    found = promises.of(outlook)
    console.print()
    for title, text in [*lines, *promises.line(outlook, found)]:
        _print_titled(console, title, text)
    if found:
        console.print(promises.table(found))
    console.print()


def _print_titled(console: Console, title: str, text: str) -> None:
    """In a terminal, prose is broken under itself. Paths and commands never are, nor is anything in a log."""
    if not console.is_terminal or title in COPIED:
        _print_line(console, Text.assemble((f"{title:<{TITLE_WIDTH}}", "bold"), text))
        return
    line = Table.grid()
    line.add_column(width=TITLE_WIDTH, style="bold")
    line.add_column()
    line.add_row(Text(title), Text(text))
    console.print(line)


def outlook_of(flight: Flight, resources: Resources, runs: Mapping[str, Run], standings: Sequence[Standing]) -> Outlook:
    """`runs` are the trials known as yet, `standings` theirs. Nothing is timed: the trials will tell soon."""
    given = flight.arguments.images_per_second
    return Outlook(
        work=_work(flight, runs, standings),
        arguments=flight.arguments,
        choices=flight.choices,
        limits=flight.limits,
        space=flight.space,
        facts=flight.facts,
        frame_size=next(iter(flight.packs.values())).label_size,
        cache_dir=flight.cache_dir,
        resources=resources,
        speed=forecast.given_speed(given, flight.example) if given else forecast.measured_speed(standings),
    )


def _work(flight: Flight, runs: Mapping[str, Run], standings: Sequence[Standing]) -> Work:
    if flight.sampling is None:
        return forecast.grid_work(list(runs.values()), standings, only=flight.arguments.rerun)
    suggested = flight.sampling.suggested.values()
    begun = [one.run for one in suggested if one.origin != "confirm"]
    return forecast.sampled_work(
        begun,
        _rows_to_come(flight, runs),
        flight.sampling.drawn,
        standings,
        limit=flight.limits.trials,
        fresh=CONFIRMED_RUNS * (flight.limits.confirm or 0),
    )


def plan_lines(flight: Flight, outlook: Outlook, runs: Mapping[str, Run]) -> list[Line]:
    """The page as (title, text) pairs. `runs` are the trials known as yet."""
    return [
        *_what(flight, outlook, runs),
        *outlook_lines(outlook),
        ("results", flight.folder.uri),
        ("watch", f"tensorboard --logdir {flight.folder.uri}"),
        *_study(flight.sampling),
        ("resume", f"python -m tune_bisenet.run {_again(flight)}"),
        *(("note", caption) for caption in flight.captions),
    ]


def survey_lines(survey: Survey, outlook: Outlook) -> list[Line]:
    """The same of a search that is not started."""
    runs = {} if isinstance(survey.space, Sampled) else _named(survey)
    return [
        *_what(survey, outlook, runs),
        *outlook_lines(outlook),
        *(("note", caption) for caption in survey.captions),
    ]


def _named(survey: Survey) -> dict[str, Run]:
    several = len({run.seed for run in survey.runs}) > 1
    return {f"{run.name}-s{run.seed}" if several else run.name: run for run in survey.runs}


def _what(asked: Flight | Survey, outlook: Outlook, runs: Mapping[str, Run]) -> list[Line]:
    """What is trained, on what."""
    choices, facts = asked.choices, asked.facts
    sizes = ", ".join(size_words(size) for size in sorted({run.image_size for run in outlook.work.runs}))
    start = "from scratch" if choices.backbone == NO_BACKBONE else choices.backbone
    return [
        ("search", f"{asked.name}: {asked.space.title}"),
        *_trials(asked, runs),
        ("data", f"{choices.data}: {facts.num_train} training and {facts.num_val} validation images, {sizes}"),
        ("backbone", f"ResNet-18, {start}"),
        ("device", _device(asked, outlook.resources)),
    ]


def _trials(asked: Flight | Survey, runs: Mapping[str, Run]) -> list[Line]:
    """What will be trained, and what bounds it."""
    if not isinstance(asked.space, Sampled):
        epochs = sum(run.num_epochs for run in runs.values())
        iterations = sum(run.num_epochs * plan.iterations_per_epoch(run, asked.facts) for run in runs.values())
        words = f"{len(runs)} ({_shortened(list(runs))}), {epochs:,} epochs, {iterations:,} iterations in all"
        return [("trials", words), *_bounds(asked.limits)]
    example = asked.example
    rows = [run.name for run in _rows_to_come(asked, runs)]
    number = "as many as time allows" if asked.limits.trials is None else str(asked.limits.trials)
    first = f", the rows {_shortened(rows)} first" if rows else ""
    iterations = plan.iterations_per_epoch(example, asked.facts)
    words = f"{number}{first}, {example.num_epochs} epochs of {iterations} iterations each"
    if asked.limits.confirm is not None:
        words += f"; then up to {CONFIRMED_RUNS * asked.limits.confirm} with fresh seeds"
    lines = [("trials", words), ("sampler", f"{asked.choices.sampler}, for {' and '.join(asked.choices.objectives)}")]
    return [*lines, *_known(asked), *_bounds(asked.limits)]


def _rows_to_come(asked: Flight | Survey, runs: Mapping[str, Run]) -> list[Run]:
    """Declared rows that a sampled search has yet to begin with."""
    known = _known_trials(asked)
    return [run for run in asked.runs if run.name not in known and run.name not in runs]


def _known_trials(asked: Flight | Survey) -> list[str]:
    """By name of the run."""
    if isinstance(asked, Survey) or asked.sampling is None:
        return []
    return [known.suggested.run.name for known in asked.sampling.known]


def _known(asked: Flight | Survey) -> list[Line]:
    """What an earlier search teaches, and what of it could not be used."""
    if isinstance(asked, Survey):
        earlier = asked.choices.warm_start
        return [("known", f"what {earlier} measured; rows it has are not trained again")] if earlier else []
    if asked.sampling is None or not asked.sampling.known:
        return []
    sampling = asked.sampling
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


def _device(asked: Flight | Survey, resources: Resources) -> str:
    each = f"{resources.gpus_per_trial:g} GPU, " if resources.gpus_per_trial else ""
    cores = f"{resources.cpus_per_trial} CPU core{'s' if resources.cpus_per_trial > 1 else ''}"
    more = ", more as the cluster starts nodes for those that wait" if resources.grows else ""
    return f"{resources.concurrency} trials at once{more}, {each}{cores} each, {asked.choices.precision}"


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])}, … {names[-1]}"
