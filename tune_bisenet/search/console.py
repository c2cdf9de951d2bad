"""What the terminal shows of a search: the plan before it, its progress, and the results after it.

Numbers of the plan come from `forecast`, those of the results from the states of trials; nothing is computed here.
"""

import shlex
import textwrap
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Final, Self

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from tune_bisenet.config import format_size, trial_name
from tune_bisenet.options import NO_BACKBONE
from tune_bisenet.records import Epoch, TrialState
from tune_bisenet.report import leaderboard
from tune_bisenet.report.claims import format_measure
from tune_bisenet.report.page import Report, format_verdicts
from tune_bisenet.report.power import Power
from tune_bisenet.report.sampled import best_lines
from tune_bisenet.report.verdicts import ASSUMED_SD, MOST_SEEDS, format_expected
from tune_bisenet.search.forecast import CONFIRMED_RUNS, Estimate, Workload, checkpoint_bytes
from tune_bisenet.search.prepare import PreparedSearch
from tune_bisenet.search.state import SessionOutcome
from tune_bisenet.spaces import published_levels
from tune_bisenet.text import counted, format_bytes, format_duration, redact

TITLE_WIDTH: Final = 11


def print_plan(console: Console, estimate: Estimate) -> None:
    """Print what is left to do, what it takes, where results go, and how to watch and to resume."""
    search = estimate.search
    lines = plan_lines(estimate)
    if study := search.study:
        left_out = "".join(f"; without {name}: {reason}" for name, reason in study.left_out.items())
        known = f"{counted(len(study.known), 'trial')} of {search.config.warm_start}{left_out}"
        lines += [("known", known)] if search.config.warm_start else []
        lines += [("study", f"optuna-dashboard {shlex.quote(study.database.shown)}")]
    lines += [
        ("results", search.folder.uri),
        ("watch", f"tensorboard --logdir {shlex.quote(search.folder.uri)}"),
        ("resume", resume_command(search)),
    ]
    _print_page(console, lines, estimate)


def print_dry_run(console: Console, estimate: Estimate) -> None:
    _print_page(console, plan_lines(estimate), estimate)
    _print(console, "A plan: nothing was started. The same command without --plan does it.")


def plan_lines(estimate: Estimate) -> list[tuple[str, str]]:
    """Return what is trained, on what, and what it takes, as titles and texts."""
    search, resources = estimate.search, estimate.resources
    config, facts, limits = search.config, search.facts, search.config.limits
    bounds = [] if limits.time_budget is None else [format_duration(limits.time_budget)]
    bounds += [] if limits.gpu_hours is None else [f"{limits.gpu_hours:g} GPU-hours"]
    gpus = f"{resources.gpus_per_trial:g} GPU, " if resources.gpus_per_trial else ""
    trials, cores = counted(resources.concurrency, "trial"), counted(resources.cpus_per_trial, "CPU core")
    threads = f", {counted(resources.threads_per_trial, 'thread')} as in the first session"
    threads = threads if resources.threads_per_trial != resources.cpus_per_trial else ""
    grows = ", more as the cluster starts nodes" if resources.grows else ""
    sizes = ", ".join(map(format_size, estimate.image_sizes))
    scheduler: str = config.scheduler
    bearers = ""
    if estimate.stopping:
        scheduler, bearers = f"{scheduler}: {estimate.stopping}", estimate.stopping.bearers
    published = published_levels(search.runs, config, num_train=facts.num_train)
    return [
        ("search", f"{search.name}: {search.space.title}"),
        ("trials", _trials(search, estimate.workload)),
        *([("sampler", f"{config.sampler}, for {' and '.join(config.objectives)}")] if search.study else []),
        *([("limits", "ends after " + " or ".join(bounds))] if bounds else []),
        ("data", f"{config.data}: {facts.num_train} training and {facts.num_val} validation images, {sizes}"),
        *[("changed", text) for text in search.changes],
        *_label_lines(search),
        ("backbone", f"ResNet-18, {'from scratch' if config.backbone == NO_BACKBONE else config.backbone}"),
        ("device", f"{trials} at once{grows}, {gpus}{cores} each{threads}, {config.precision}"),
        *([("sharing", search.sharing)] if search.sharing else []),
        ("scheduler", scheduler),
        *([("risk", bearers)] if bearers else []),
        *([("published", published)] if published else []),
        *([("looks", _looks(estimate))] if config.looks else []),
        *([("measures", _measures(search))] if search.space.second_measure else []),
        *_speed_lines(estimate),
        ("disk", _disk(estimate)),
        *[("note", note) for note in (*search.captions, *search.source.notes)],
    ]


def _label_lines(search: PreparedSearch) -> list[tuple[str, str]]:
    """Return what the labels hold; nothing before they are packed."""
    if not search.packs:
        return []
    pack = next(iter(search.packs.values()))
    classes = f"{pack.describe_classes('train')} | validation: {pack.describe_classes('val')}"
    return [("classes", f"training: {classes}"), *(("warning", text) for text in search.label_warnings)]


def _trials(search: PreparedSearch, workload: Workload) -> str:
    limits, example = search.config.limits, search.example
    if search.study is None:
        names = ", ".join(trial_name(run, default_seed=search.config.default_seed) for run in search.runs)
        num_epochs = counted(sum(run.num_epochs for run in search.runs), "epoch")
        text = f"{len(search.runs)} ({textwrap.shorten(names, 80, placeholder=' …')}), {num_epochs} in all"
        pairs = zip(workload.remaining, workload.shared_epochs, strict=True)
        rows = dict.fromkeys(run.name for (run, _epochs), shared in pairs if shared)
        taken_over = (
            f", {sum(workload.shared_epochs)} of them taken over by {', '.join(rows)} from rows that begin alike"
        )
        return text + (taken_over if rows else "")
    num_trials = "as many as the limits allow" if limits.trials is None else str(limits.trials)
    confirmed = f"; then up to {CONFIRMED_RUNS * limits.confirm} with fresh seeds" if limits.confirm else ""
    return f"{num_trials}, declared rows first, {counted(example.num_epochs, 'epoch')} each{confirmed}"


def _looks(estimate: Estimate) -> str:
    config, expected = estimate.search.config, estimate.expected_trials
    text = f"judged at {', '.join(map(str, config.looks))} seeds, which share the error"
    if not config.decide:
        return text
    text += "; after each, only open rows and what they are compared with get more"
    if expected is None:
        return text
    return (
        f"{text}: about {expected.if_kept:.0f} trials if every claim on mIoU is true at its middle, "
        f"{expected.if_equal:.0f} if all rows are equal, {expected.most} at most"
    )


def _measures(search: PreparedSearch) -> str:
    return f"mIoU, and for gains also the {format_measure(search.space.second_measure)}; each has half of the error"


def _speed_lines(estimate: Estimate) -> list[tuple[str, str]]:
    """Return speed, time, cost and memory, as far as they are known."""
    throughput, benchmark, seconds = estimate.throughput, estimate.benchmark, estimate.trial_seconds
    if throughput is None:
        problem = estimate.problem or "--plan times a trial"
        return [("speed", f"not known: {problem}; --images-per-second X states it")]
    lines = [("speed", f"{throughput.images_per_second:.3g} images/s per trial in training, {throughput.source}")]
    if not seconds:
        return [*lines, ("time", "nothing is left to train")]
    hours = estimate.device_hours(sum(seconds))
    if estimate.workload.is_unbounded:
        mean_seconds = sum(seconds) / len(seconds)
        room = f"the limits have room for about {estimate.num_trials_in_limits(mean_seconds):.0f}"
        lines.append(("time", f"about {format_duration(mean_seconds)} for a trial to its end; {room}"))
        lines.append(("cost", f"{_cost(hours / len(seconds), estimate)} for a trial"))
    else:
        time_text = f"about {format_duration(estimate.wall_seconds)} for all to their end, after Ray's start"
        cost_text = _cost(hours, estimate)
        if estimate.stopping and estimate.stopping.epochs_share_saved:
            share = 1 - estimate.stopping.epochs_share_saved
            time_text += f"; {format_duration(estimate.wall_seconds * share)} if asha saves {1 - share:.0%}"
            cost_text += f"; {_cost(hours * share, estimate)} if asha saves {1 - share:.0%}"
        if expected := estimate.expected_trials:
            counts = (expected.if_kept, expected.if_equal, expected.most)
            kept, equal, most = (_cost(count * hours / len(seconds), estimate) for count in counts)
            time_text += ", without the looks to come"
            cost_text += f" without them; with them about {kept} if claims are true, {equal} if not, {most} at most"
        lines += [("time", time_text), ("cost", cost_text)]
    if benchmark is None:
        return [*lines, ("memory", "not known: --plan measures it where it times a trial")]
    needed, available = benchmark.memory_bytes, benchmark.available_bytes
    scarce = ": NOT ENOUGH, lower --image-size or run fewer trials at once" if needed > available else ""
    return [*lines, ("memory", f"{format_bytes(needed)} per trial, of {format_bytes(available)} for each{scarce}")]


def _cost(hours: float, estimate: Estimate) -> str:
    price = estimate.search.options.price_per_gpu_hour
    if not estimate.resources.gpus_per_trial:
        return f"{hours:.3g} machine-hours" + ("" if price is None else " (no price: trials here have no GPU)")
    return f"{hours:.3g} GPU-hours" + ("" if price is None else f" = {hours * price:,.2f} to pay")


def _disk(estimate: Estimate) -> str:
    packs, free = estimate.pack_bytes, estimate.free_bytes
    text = f"{format_bytes(packs)} of packed frames on every node, {_free_here(packs, free)}"
    if not estimate.workload.remaining:
        return text
    best, last = map(format_bytes, checkpoint_bytes(estimate.search.example))
    needed, free_storage = estimate.storage_bytes, estimate.free_storage_bytes
    text += f"; in storage weights of {best} a trial, 3 x {last} more while it runs"
    text += "" if estimate.workload.is_unbounded else f", at most {format_bytes(needed)} in all"
    return text if free_storage is None else f"{text}, {_free_here(needed, free_storage)}"


def _free_here(needed: int, free: int) -> str:
    return f"{format_bytes(free)} are free here{': NOT ENOUGH' if needed > free else ''}"


def _print_page(console: Console, lines: Iterable[tuple[str, str]], estimate: Estimate) -> None:
    console.print()
    for title, text in lines:
        _print(console, Text.assemble((f"{title:<{TITLE_WIDTH}}", "bold"), text))
    if estimate.search.study and not estimate.search.config.limits.confirm:
        _print(console, "One seed shows nothing: --confirm K trains the best with K fresh seeds.")
    elif powers := estimate.powers:
        console.print(_power_table(powers))
        _print(
            console,
            "Shown: how likely a gain is shown, or a level kept, if the claim is true at its middle, repeats differ by "
            f"{_noise(estimate.search)} and none is stopped early. One seed shows nothing.",
        )
    console.print()


def _noise(search: PreparedSearch) -> str:
    noise, source = search.noise, search.options.noise_from
    if noise is None or source is None:
        return f"{ASSUMED_SD:g} point (assumed)"
    repeats = max(noise.sd, noise.within_sd)
    return f"{repeats:.2f} points, as measured in {redact(source)} over {counted(noise.num_rows, 'row')},"


def _power_table(powers: Sequence[Power]) -> Table:
    table = Table("run", "claim", box=SIMPLE_HEAD)
    for title in ("seeds", "shown", "80 % with"):
        table.add_column(title, justify="right")
    for power in powers:
        share = "no number" if power.share is None else f"{100 * power.share:.0f} %"
        needed = f"more than {MOST_SEEDS} seeds" if power.seeds_for_80 is None else f"{power.seeds_for_80} seeds"
        if power.claim.reference is not None and not power.seeds:
            needed = f"not without {power.claim.reference}"
        needed = "" if power.share is None else needed
        table.add_row(power.claim.run, format_expected(power.claim), str(power.seeds), share, needed)
    return table


class SearchProgress:
    """Shows a search while it runs: bars in a terminal, plain lines anywhere else. A context manager.

    A display that fails is left alone: the search continues without it. `clock` returns seconds.
    """

    def __init__(self, console: Console, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._started = clock, clock()
        self._states: dict[str, TrialState] = {}
        self._num_done = self._num_total = 0  # epochs; what an ended trial has left undone is not in the total
        self._num_done_before: int | None = None
        self._counts = ""
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}", markup=False),
            TimeElapsedColumn(),
            console=console,
            disable=not console.is_terminal or console.is_dumb_terminal,
            refresh_per_second=2,
        )
        self._search_bar = self._bars.add_task("search", note="")
        self._trial_bars: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        with suppress(Exception, SystemExit):  # rich exits on a broken pipe
            self._bars.start()
        return self

    def __exit__(self, *_error: object) -> None:
        with suppress(Exception, SystemExit):
            self._bars.stop()

    def update(self, states: Sequence[TrialState]) -> None:
        """Show these states of all trials, and announce trials that have ended since the last call."""
        ended_before = {trial for trial, state in self._states.items() if _has_ended(state)}
        ended = [state for state in states if _has_ended(state)]
        counts = Counter("ended" if _has_ended(state) else state.status for state in states)
        self._counts = ", ".join(f"{counts[status]} {status}" for status in ("running", "waiting", "ended"))
        self._states = {state.trial: state for state in states}
        self._num_done = sum(state.epochs for state in states)
        self._num_total = sum(state.epochs if _has_ended(state) else state.num_epochs for state in states)
        if self._num_done_before is not None:
            for state in ended:
                if state.trial not in ended_before:
                    text = (
                        f"{state.trial} {leaderboard.format_status(state)}, epoch {state.epochs} of {state.num_epochs}"
                    )
                    if state.best_miou is not None:
                        text += f", best mIoU {state.best_miou:.1f} % at epoch {state.best_epoch}"
                    self._print(text)
        elif self._num_done:
            epochs = f"{self._num_done} of {self._num_total} epochs were done"
            self._print(f"resumed: {len(ended)} of {len(states)} trials had ended, {epochs}")
        self._num_done_before = self._num_done if self._num_done_before is None else self._num_done_before
        running = [trial for trial, state in self._states.items() if state.status == "running"]
        with suppress(Exception, SystemExit):
            for trial in self._trial_bars.keys() - running:
                self._bars.remove_task(self._trial_bars.pop(trial))
            for trial in running:
                self._show_trial(trial)
            self._show_search()

    def announce(self, text: str) -> None:
        """Print a line above the bars."""
        self._print(text)

    def epoch_done(self, trial: str, epoch: Epoch) -> None:
        """Show an epoch as soon as it is measured. Ignore trials that no `update` has named."""
        state = self._states.get(trial)
        if state is None:
            return
        measured = f"loss {epoch.loss:.3f}  " + ("diverged" if epoch.diverged else f"mIoU {epoch.miou:.1f} %")
        if not _has_ended(state):  # a report may arrive after its trial was stopped
            self._num_done += epoch.epoch - state.epochs
            self._states[trial] = replace(state, status="running", epochs=epoch.epoch)
            with suppress(Exception, SystemExit):
                self._show_trial(trial, f"{measured}  {epoch.images_per_second:.1f} images/s")
                self._show_search()
        if self._bars.disable:
            position = f"{trial}  epoch {epoch.epoch}/{state.num_epochs}"
            done = f"search {100 * self._num_done // max(self._num_total, 1)} %{self._time_left()}"
            self._print(f"{position}  {measured}  {epoch.seconds:.1f} s  | {done}")

    def _show_trial(self, trial: str, note: str = "") -> None:
        state = self._states[trial]
        if trial not in self._trial_bars:
            self._trial_bars[trial] = self._bars.add_task(trial, total=state.num_epochs, note="")
        self._bars.update(self._trial_bars[trial], completed=state.epochs)
        if note:
            self._bars.update(self._trial_bars[trial], note=note)

    def _show_search(self) -> None:
        note = f"epochs{self._time_left()}, {self._counts}"
        self._bars.update(self._search_bar, completed=self._num_done, total=self._num_total, note=note)

    def _time_left(self) -> str:
        """Return what the epochs left take at this session's rate, of all trials together; empty before the first."""
        num_fresh = self._num_done - (self._num_done_before or 0)
        if num_fresh <= 0:
            return ""
        seconds = (self._num_total - self._num_done) * (self._clock() - self._started) / num_fresh
        return f", about {format_duration(seconds)} left"

    def _print(self, line: str) -> None:
        with suppress(Exception, SystemExit):
            _print(self._bars.console, line)


def _has_ended(state: TrialState) -> bool:
    return state.status not in ("waiting", "running")


def print_results(
    console: Console,
    search: PreparedSearch,
    states: Sequence[TrialState],
    *,
    report: Report | None,
    outcome: SessionOutcome,
) -> None:
    """Print the leaderboard, a grid's verdicts, what failed, how the search ended, and what to do next.

    `report` is what was written at the end; None if that failed.
    """
    resume = resume_command(search)
    failed = ", ".join(state.trial for state in states if state.status == "failed")
    console.print()
    console.print(leaderboard.to_rich(states, baseline=search.space.baseline, captions=search.captions))
    if report and report.judgement.claims and not search.study:
        console.print(format_verdicts(report))
    lines = best_lines(report.search) if report and search.study else []
    lines += [f"results: {search.folder.uri}"]
    lines += [f"report:  {report.uri(search.folder)}"] if report else []
    lines += [f"failed: {failed}. To try again: {resume}"] if failed else []
    if outcome.signal_number is not None:
        lines.append(f"interrupted. To continue: {resume}")
    elif outcome.limit:
        lines.append(f"ended: {outcome.limit}. To continue with a higher limit: {resume}")
    elif search.study:
        lines.append(f"ended: --trials {search.config.limits.trials} have been run. For more: {resume} --trials N")
        if search.config.limits.confirm is None:
            lines.append(f"To train the best with fresh seeds: {resume} --confirm 3")
        elif all(state.trial == state.run for state in states):
            lines.append("--confirm: no sampled trial was trained to its end, so there is nothing to confirm.")
    if best := leaderboard.best_of_run(states):
        commands = leaderboard.winner_commands(search.folder.uri, best.trial, data=search.config.data)
        lines += [f"what to do with {best.trial}, the best ({best.best_miou:.2f} % mIoU):", *commands]
    for line in lines:
        _print(console, line)


def resume_command(search: PreparedSearch) -> str:
    """Return the command that continues a search from anywhere with the same storage."""
    storage = shlex.quote(search.options.storage)
    return f"python -m tune_bisenet.run --resume --name {search.name} --storage {storage}"


def _print(console: Console, line: str | Text) -> None:
    """Print a line unbroken: a path or a command must survive copying, also out of a log."""
    console.print(line, highlight=False, markup=False, emoji=False, soft_wrap=True)
