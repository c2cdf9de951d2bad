"""What the terminal says before and after a search: the plan, and what came of it."""

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from tune_bisenet import spaces
from tune_bisenet.config import Precision, Resources, Run, format_size, trial_name
from tune_bisenet.estimate import forecast, promises
from tune_bisenet.estimate.forecast import Work
from tune_bisenet.estimate.outlook import Line, Outlook
from tune_bisenet.estimate.outlook import lines as outlook_lines
from tune_bisenet.options import NO_BACKBONE, Limits, SearchConfig, duration_words
from tune_bisenet.records import Known, TrialSpec, TrialState
from tune_bisenet.report import leaderboard
from tune_bisenet.search.prepare import PreparedSearch, Sampling, Survey
from tune_bisenet.search.tuner import SessionOutcome
from tune_bisenet.text import counted

TITLE_WIDTH: Final = 11
COPIED: Final = frozenset({"search", "data", "results", "watch", "study", "resume"})
"""Titles of lines with paths and commands."""

CONFIRMED_RUNS: Final = 3
"""At most so many runs get fresh seeds by `--confirm`: the best, the best row, and the baseline."""


def print_plan(
    console: Console,
    flight: PreparedSearch,
    resources: Resources,
    runs: Mapping[str, Run],
    standings: Sequence[TrialState],
) -> None:
    """What will be done, with what, what it will take, where the results go, and how to watch."""
    outlook = flight_outlook(flight, resources, standings)
    _print_page(console, plan_lines(flight, outlook, runs), outlook)


def print_survey(console: Console, outlook: Outlook) -> None:
    """The same of a search that is not started."""
    _print_page(console, survey_lines(outlook), outlook)
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


def flight_outlook(flight: PreparedSearch, resources: Resources, standings: Sequence[TrialState]) -> Outlook:
    """`standings` are of the trials known as yet."""
    if flight.sampling is None:
        return outlook_of(flight.survey, resources, standings)
    suggested, known = flight.sampling.suggested.values(), flight.sampling.known
    return outlook_of(flight.survey, resources, standings, suggested=suggested, known=known)


def outlook_of(
    survey: Survey,
    resources: Resources,
    standings: Sequence[TrialState],
    *,
    suggested: Iterable[TrialSpec] = (),
    known: Iterable[Known] = (),
) -> Outlook:
    """A sampled search has had the trials `suggested`, and takes over those `known`. Nothing is timed here."""
    given = survey.arguments.images_per_second
    return Outlook(
        survey=survey,
        work=_work(survey, standings, suggested, known),
        resources=resources,
        speed=forecast.given_speed(given, survey.example) if given else forecast.measured_speed(standings),
    )


def _work(
    survey: Survey, standings: Sequence[TrialState], suggested: Iterable[TrialSpec], known: Iterable[Known]
) -> Work:
    if survey.draft is None:
        return forecast.grid_work(survey.runs, standings, only=survey.arguments.rerun)
    begun = [one.run for one in suggested if one.origin != "confirm"]
    return forecast.sampled_work(
        begun,
        _rows_to_come(survey, {run.name for run in begun} | _names(known)),
        survey.drawn,
        standings,
        limit=survey.limits.trials,
        fresh=CONFIRMED_RUNS * (survey.limits.confirm or 0),
    )


def _rows_to_come(survey: Survey, had: Collection[str]) -> list[Run]:
    """Declared rows that a sampled search has yet to begin with."""
    return [run for run in survey.runs if run.name not in had]


def _names(known: Iterable[Known]) -> set[str]:
    """Of their runs."""
    return {one.suggested.run.name for one in known}


def plan_lines(flight: PreparedSearch, outlook: Outlook, runs: Mapping[str, Run]) -> list[Line]:
    """The page as (title, text) pairs. `runs` are the trials known as yet."""
    uri = flight.survey.folder.uri
    return [
        *_what(outlook, runs, flight.sampling),
        *outlook_lines(outlook),
        ("results", uri),
        ("watch", f"tensorboard --logdir {uri}"),
        *_study(flight.sampling),
        ("resume", f"python -m tune_bisenet.run {_again(flight.survey)}"),
        *_notes(flight.survey),
    ]


def survey_lines(outlook: Outlook) -> list[Line]:
    """The same of a search that is not started."""
    survey = outlook.survey
    runs = (
        {} if survey.draft else {trial_name(run, default_seed=survey.choices.default_seed): run for run in survey.runs}
    )
    return [*_what(outlook, runs, None), *outlook_lines(outlook), *_notes(survey)]


def _notes(survey: Survey) -> list[Line]:
    return [("note", caption) for caption in survey.captions]


def _what(outlook: Outlook, runs: Mapping[str, Run], sampling: Sampling | None) -> list[Line]:
    """What is trained, on what. `sampling` is None for a grid, and for what is only planned."""
    survey, choices, facts = outlook.survey, outlook.survey.choices, outlook.survey.facts
    sizes = ", ".join(format_size(size) for size in sorted({run.image_size for run in outlook.work.runs}))
    start = "from scratch" if choices.backbone == NO_BACKBONE else choices.backbone
    return [
        ("search", f"{survey.name}: {survey.space.title}"),
        *(_sampled_trials(survey, runs, sampling) if survey.draft else _grid_trials(survey, runs)),
        *_bounds(survey.limits),
        ("data", f"{choices.data}: {facts.num_train} training and {facts.num_val} validation images, {sizes}"),
        ("backbone", f"ResNet-18, {start}"),
        ("device", _device(outlook.resources, choices.precision)),
    ]


def _grid_trials(survey: Survey, runs: Mapping[str, Run]) -> list[Line]:
    epochs = sum(run.num_epochs for run in runs.values())
    iterations = sum(run.num_epochs * spaces.iterations_per_epoch(run, survey.facts) for run in runs.values())
    amount = f"{counted(epochs, 'epoch')}, {counted(iterations, 'iteration')} in all"
    return [("trials", f"{len(runs)} ({_shortened(list(runs))}), {amount}")]


def _sampled_trials(survey: Survey, runs: Mapping[str, Run], sampling: Sampling | None) -> list[Line]:
    choices, limits, example = survey.choices, survey.limits, survey.example
    had = {*runs, *_names(sampling.known if sampling else ())}
    rows = [run.name for run in _rows_to_come(survey, had)]
    number = "as many as time allows" if limits.trials is None else str(limits.trials)
    first = f", the rows {_shortened(rows)} first" if rows else ""
    iterations = spaces.iterations_per_epoch(example, survey.facts)
    words = f"{number}{first}, {counted(example.num_epochs, 'epoch')} of {counted(iterations, 'iteration')} each"
    if limits.confirm is not None:
        words += f"; then up to {CONFIRMED_RUNS * limits.confirm} with fresh seeds"
    return [
        ("trials", words),
        ("sampler", f"{choices.sampler}, for {' and '.join(choices.objectives)}"),
        *(_known(sampling) if sampling else _to_be_known(choices)),
    ]


def _to_be_known(choices: SearchConfig) -> list[Line]:
    """What an earlier search will teach, as far as it is known before that is read."""
    earlier = choices.warm_start
    return [("known", f"what {earlier} measured; rows it has are not trained again")] if earlier else []


def _known(sampling: Sampling) -> list[Line]:
    """What an earlier search teaches, and what of it could not be used."""
    if not sampling.known:
        return []
    names = _shortened([known.suggested.trial for known in sampling.known])
    left_out = "; ".join(f"{name} is left out: {reason}" for name, reason in sampling.left_out.items())
    return [("known", f"{counted(len(sampling.known), 'trial')} ({names})" + (f"; {left_out}" if left_out else ""))]


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
    flight: PreparedSearch,
    standings: Sequence[TrialState],
    *,
    page: str | None,
    best: Sequence[str] = (),
    outcome: SessionOutcome,
) -> None:
    """The leaderboard, where it lies, and what to do if the search is not whole."""
    survey = flight.survey
    console.print()
    console.print(leaderboard.to_rich(standings, baseline=survey.space.baseline, captions=survey.captions))
    for line in best:
        _print_line(console, line)
    _print_line(console, f"results: {survey.folder.uri}")
    if page is not None:
        _print_line(console, f"report:  {page}")
    failed = [standing.trial for standing in standings if standing.status == "failed"]
    if failed:
        _print_line(console, f"failed: {', '.join(failed)}. Try these again with {_again(survey)}.")
    for line in _endings(flight, standings, outcome):
        _print_line(console, line)


def _endings(flight: PreparedSearch, standings: Sequence[TrialState], outcome: SessionOutcome) -> list[str]:
    """Why the search ended, where that is not plain, and how to go on."""
    again = _again(flight.survey)
    if outcome.signal_number is not None:
        return [f"interrupted. Go on with {again}."]
    if outcome.trouble:
        return [f"ended: {outcome.trouble}. Nothing is lost: go on with {again} when it does."]
    if outcome.limit:
        return [f"ended: {outcome.limit}. Go on with {again} and a higher limit."]
    if flight.sampling is None:
        return []
    lines = [f"ended: --trials {flight.survey.limits.trials} have been run. More by {again} --trials N."]
    if flight.survey.limits.confirm is None:
        lines.append(f"Fresh seeds for the best: {again} --confirm 3.")
    elif not any(standing.trial != standing.run for standing in standings):
        lines.append("--confirm: no sampled trial was trained to its end, so there is nothing to confirm.")
    return lines


def _again(survey: Survey) -> str:
    """The flags that go on with this search."""
    return f"--resume --name {survey.name} --storage {shlex.quote(survey.arguments.storage)}"


def _print_line(console: Console, line: str | Text) -> None:
    """Never broken over lines by us: a path or a command must survive copying, also out of a log."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _device(resources: Resources, precision: Precision) -> str:
    each = f"{resources.gpus_per_trial:g} GPU, " if resources.gpus_per_trial else ""
    cores = counted(resources.cpus_per_trial, "CPU core")
    more = ", more as the cluster starts nodes for those that wait" if resources.grows else ""
    return f"{counted(resources.concurrency, 'trial')} at once{more}, {each}{cores} each, {precision}"


def _shortened(names: list[str]) -> str:
    return ", ".join(names) if len(names) <= 12 else f"{', '.join(names[:4])}, … {names[-1]}"
