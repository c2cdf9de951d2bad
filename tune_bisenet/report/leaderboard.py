"""The leaderboard of a search, from its trials' states: as CSV, as Markdown and as a table for the terminal.

Pure functions; neither Ray nor torch, and no files. States come in the order in which the rows were declared, mIoU
and accuracy are in percent, gains in percentage points.
"""

import csv
import io
import shlex
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from tune_bisenet.records import TrialState
from tune_bisenet.text import markdown_table

UNFINISHED: Final = "*"
NOTE: Final = f"{UNFINISHED}: not trained to its last epoch, so its best is no final result."

MAX_REASONS: Final = 12
"""A terminal does not list more: a sampled search stops dozens."""


def best_first(states: Sequence[TrialState]) -> list[TrialState]:
    """Sort by best mIoU, the highest first; equals in declared order, and those without any at the end."""
    return sorted(states, key=lambda state: -_sortable(state.best_miou))


def best_of_run(states: Sequence[TrialState], run: str | None = None) -> TrialState | None:
    """Return the trial of highest mIoU, of all or of the row or the trial named `run`; None if none has an mIoU."""
    measured = [state for state in states if state.best_miou is not None and run in (None, state.run, state.trial)]
    return best_first(measured)[0] if measured else None


def winner_commands(search: str, trial: str, *, data: str) -> list[str]:
    """Return what makes something of a trial, ready to paste: `search` is its folder's path or URI."""
    model = f"{shlex.quote(search)} --run {trial}"
    return [
        f"python -m tune_bisenet export {model} --to onnx",
        f"python -m tune_bisenet evaluate {model} --data {shlex.quote(data)}",
        f"python -m tune_bisenet predict {shlex.quote(search)} PICTURES --run {trial} --out labelled",
        f"python -m tune_bisenet benchmark {model}",
    ]


def gains(states: Sequence[TrialState], *, baseline: str | None) -> dict[str, float | None]:
    """Return, by trial, its best mIoU minus that of the row `baseline` at the same seed, in percentage points.

    None where nothing can be compared: no mIoU yet, no baseline at that seed, and for the baseline itself.
    """
    bars = {state.seed: state.best_miou for state in states if state.run == baseline}
    differences: dict[str, float | None] = {}
    for state in states:
        value, bar = state.best_miou, bars.get(state.seed)
        is_comparable = value is not None and bar is not None and state.run != baseline
        differences[state.trial] = value - bar if is_comparable else None  # type: ignore[operator]
    return differences


def seed_table(states: Sequence[TrialState], *, baseline: str | None) -> tuple[list[str], list[list[str]]]:
    """Return columns and rows: each row's mean ± sample standard deviation over its seeds, the highest mean first.

    Only trials that completed count. Gains are paired by seed before they are averaged.
    """
    finished = [state for state in states if state.status == "finished"]
    gain_of = gains(finished, baseline=baseline)
    over = [] if baseline is None else [f"over {baseline}"]
    rows = []
    for run in dict.fromkeys(state.run for state in states):
        own = [state for state in finished if state.run == run]
        mious = [state.best_miou for state in own if state.best_miou is not None]
        paired = [gain for state in own if (gain := gain_of[state.trial]) is not None]
        count = f"{len(own)} of {sum(state.run == run for state in states)}"
        means = [_format_mean(mious, "z.2f"), *(_format_mean(paired, "+z.2f") for _ in over)]
        rows.append((statistics.fmean(mious) if mious else None, [run, count, *means]))
    rows.sort(key=lambda row: -_sortable(row[0]))
    return ["run", "seeds", "best mIoU", *over], [cells for _, cells in rows]


def _format_mean(values: Sequence[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}" if values else ""
    return f"{mean} ± {statistics.stdev(values):.2f}" if len(values) > 1 else mean


def _sortable(miou: float | None) -> float:
    """Sort what was not measured after everything that was."""
    return float("-inf") if miou is None else miou


def to_csv(states: Sequence[TrialState], *, baseline: str | None) -> str:
    """Return one line for each run and seed in declared order, under a header; empty where nothing was measured."""
    gain_of = gains(states, baseline=baseline)
    gain_column = [] if baseline is None else [f"gain_over_{baseline}"]
    header = ["run", "seed", "status", "stopped_by", "epochs", "best_miou", "best_epoch", "last_miou", "pixel_accuracy",
              "seconds", "trial", "num_epochs", *gain_column, "latency_ms", "error"]  # fmt: skip
    text = io.StringIO()
    writer = csv.DictWriter(text, header, lineterminator="\n", extrasaction="ignore")
    writer.writeheader()
    for state in states:
        writer.writerow(
            asdict(state)
            | {
                "best_miou": format_percent(state.best_miou),
                "last_miou": format_percent(state.last_miou),
                "pixel_accuracy": format_percent(state.pixel_accuracy),
                "seconds": f"{state.seconds:.1f}",
                f"gain_over_{baseline}": format_percent(gain_of[state.trial]),
                "latency_ms": _format_latency(state),
                "error": _one_line(state.error),
            }
        )
    return text.getvalue()


def to_markdown(states: Sequence[TrialState], *, baseline: str | None, captions: Sequence[str] = ()) -> str:
    """Return the captions, then the trials, best first; with several seeds also the rows' means over them."""
    columns, lines = ranked(states, baseline)
    cells = [line | {"status": format_status(state)} for state, line in lines]
    blocks = [*captions, markdown_table(columns, [list(line.values()) for line in cells], numbers=numbers_of(columns))]
    if any(state.status != "finished" for state in states):
        blocks.append(NOTE)
    if "seed" in columns:
        blocks.append("Mean ± standard deviation over the seeds that completed:")
        titles, rows = seed_table(states, baseline=baseline)
        blocks.append(markdown_table(titles, rows, numbers=titles[1:]))
    return "\n\n".join(blocks) + "\n"


def to_rich(states: Sequence[TrialState], *, baseline: str | None, captions: Sequence[str] = ()) -> RenderableType:
    """Return the same trials for a terminal of 80 columns; why some ended early is listed below them."""
    columns, lines = ranked(states, baseline)
    table = RichTable(box=SIMPLE_HEAD, collapse_padding=True)
    for title in columns:
        # Names of rows are cut, with a sign, before anything else; numbers stay whole.
        width = max((len(line[title].rstrip()) for _state, line in lines), default=0) if title != "run" else None
        table.add_column(
            title,
            justify="right" if title in numbers_of(columns) else "left",
            no_wrap=title not in ("run", f"over {baseline}"),
            overflow="ellipsis",
            min_width=width,
        )
    for state, line in lines:
        table.add_row(*line.values(), style="" if state.status == "finished" else "dim")
    reasons = [f"{state.trial} {status}" for state in states if ":" in (status := format_status(state))]
    if len(reasons) > MAX_REASONS:
        reasons = [f"{len(reasons)} trials ended early; the report and leaderboard.md say why."]
    notes = [*reasons, *captions, *([NOTE] if any(state.status != "finished" for state in states) else [])]
    # As Text: an error may hold brackets, which strings would turn into markup.
    return Group(table, *(Text(note) for note in notes))


def ranked(
    states: Sequence[TrialState], baseline: str | None
) -> tuple[list[str], list[tuple[TrialState, dict[str, str]]]]:
    """Return the columns, and each trial with its cells by column, best first.

    Latency takes the place of the last mIoU: 80 columns hold no more.
    """
    gain_of = gains(states, baseline=baseline)
    lines = []
    for rank, state in enumerate(best_first(states), start=1):
        mark = " " if state.status == "finished" else UNFINISHED
        cells = {
            "#": str(rank),
            "run": state.run,
            "seed": str(state.seed),
            "status": state.status,
            "epochs": f"{state.epochs}/{state.num_epochs}",
            "best mIoU": "" if state.best_miou is None else f"{state.best_miou:.2f} {mark}",
            "at": "" if state.best_epoch is None else str(state.best_epoch),
            "ms": _format_latency(state),
            "last": format_percent(state.last_miou),
            f"over {baseline}": format_gain(gain_of[state.trial]),
            "h:mm:ss": str(timedelta(seconds=round(state.seconds))),
        }
        lines.append((state, cells))
    seed = ["seed"] if len({state.seed for state in states}) > 1 else []
    last = "last" if all(state.latency_ms is None for state in states) else "ms"
    over = [] if baseline is None else [f"over {baseline}"]
    columns = ["#", "run", *seed, "status", "epochs", "best mIoU", "at", last, *over, "h:mm:ss"]
    return columns, [(state, {title: cells[title] for title in columns}) for state, cells in lines]


def numbers_of(columns: Sequence[str]) -> list[str]:
    """Return those that are set to the right."""
    return [title for title in columns if title not in ("run", "status")]


def format_status(state: TrialState) -> str:
    """Format as `finished`, or with the reason: `stopped: ASHA, epoch 10`, `failed: CUDA out of memory`."""
    reason = _one_line(state.stopped_by or state.error)
    return f"{state.status}: {reason}" if reason else state.status


def format_percent(value: float | None) -> str:
    return "" if value is None else f"{value:z.2f}"


def format_gain(value: float | None) -> str:
    return "" if value is None else f"{value:+z.2f}"


def _format_latency(state: TrialState) -> str:
    return "" if state.latency_ms is None else f"{state.latency_ms:.1f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
