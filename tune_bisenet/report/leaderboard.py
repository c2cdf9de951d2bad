"""The leaderboard of a search, from its trials' standings: as CSV, as Markdown and as a table for the terminal.

Pure functions; neither Ray nor torch, and no files. Standings come in the order in which the rows were declared, mIoU
and accuracy are in percent, gains in percentage points.
"""

import csv
import io
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Final, Literal

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from tune_bisenet.records import TrialState

BASELINE: Final = "r01"
"""The row that gains are measured against, if nobody says otherwise. With None, tables have no gains."""

UNFINISHED: Final = "*"
NOTE: Final = f"{UNFINISHED}: not trained to its last epoch, so its best is no final result."

MAX_REASONS: Final = 12
"""A terminal does not list more: a sampled search stops dozens."""

Align = Literal["left", "right"]


# --- views ------------------------------------------------------------------------------------------------------


def best_first(standings: Sequence[TrialState]) -> list[TrialState]:
    """By best mIoU, the highest first; equals in declared order, and those without any at the end."""
    return sorted(standings, key=lambda standing: -_measured(standing.best_miou))


def gains(standings: Sequence[TrialState], *, baseline: str | None = BASELINE) -> dict[str, float | None]:
    """By trial: its best mIoU minus that of the row `baseline` at the same seed, in percentage points.

    None where nothing can be compared: no mIoU yet, no baseline at that seed, and for the baseline itself.
    """
    bars = {standing.seed: standing.best_miou for standing in standings if standing.run == baseline}
    return {
        standing.trial: None if standing.run == baseline else _difference(standing.best_miou, bars.get(standing.seed))
        for standing in standings
    }


@dataclass(frozen=True, kw_only=True)
class RowSummary:
    """One row over its seeds. Only trials that went to their end count; spreads are sample standard deviations."""

    run: str
    trials: int
    finished: int
    miou: float | None
    miou_sd: float | None
    gain: float | None
    gain_sd: float | None


def over_seeds(standings: Sequence[TrialState], *, baseline: str | None = BASELINE) -> list[RowSummary]:
    """A summary of each row, the highest mean first. Gains are paired by seed before they are averaged."""
    finished = [standing for standing in standings if standing.status == "finished"]
    gain_of = gains(finished, baseline=baseline)
    rows = [_summary(run, standings, gain_of) for run in dict.fromkeys(standing.run for standing in standings)]
    return sorted(rows, key=lambda row: -_measured(row.miou))


def _summary(run: str, standings: Sequence[TrialState], gain_of: Mapping[str, float | None]) -> RowSummary:
    trials = [standing for standing in standings if standing.run == run]
    finished = [standing for standing in trials if standing.status == "finished"]
    miou, miou_sd = _mean_and_sd([trial.best_miou for trial in finished])
    gain, gain_sd = _mean_and_sd([gain_of[trial.trial] for trial in finished])
    return RowSummary(
        run=run,
        trials=len(trials),
        finished=len(finished),
        miou=miou,
        miou_sd=miou_sd,
        gain=gain,
        gain_sd=gain_sd,
    )


def _mean_and_sd(values: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in values if value is not None]
    mean = statistics.fmean(known) if known else None
    return mean, statistics.stdev(known) if len(known) > 1 else None


def _measured(miou: float | None) -> float:
    """A key to sort by: what was not measured comes after everything that was."""
    return float("-inf") if miou is None else miou


def _difference(value: float | None, bar: float | None) -> float | None:
    return None if value is None or bar is None else value - bar


# --- CSV --------------------------------------------------------------------------------------------------------


def to_csv(standings: Sequence[TrialState], *, baseline: str | None = BASELINE) -> str:
    """One line for each run and seed in declared order, under a header; empty where nothing was measured."""
    gain_of = gains(standings, baseline=baseline)
    lines = [_csv_line(standing, gain_of[standing.trial], baseline) for standing in standings]
    header = list(_csv_line(_NOBODY, None, baseline))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=header, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


_NOBODY: Final = TrialState(trial="", run="", seed=0, num_epochs=0)


def _csv_line(standing: TrialState, gain: float | None, baseline: str | None) -> dict[str, object]:
    return {
        "run": standing.run,
        "seed": standing.seed,
        "status": standing.status,
        "stopped_by": standing.stopped_by,
        "epochs": standing.epochs,
        "best_miou": _percent(standing.best_miou),
        "best_epoch": standing.best_epoch,
        "last_miou": _percent(standing.last_miou),
        "pixel_accuracy": _percent(standing.pixel_accuracy),
        "seconds": f"{standing.seconds:.1f}",
        "trial": standing.trial,
        "num_epochs": standing.num_epochs,
        **({} if baseline is None else {f"gain_over_{baseline}": _percent(gain)}),
        "latency_ms": _milliseconds(standing.latency_ms),
        "error": _one_line(standing.error),
    }


# --- tables to read ---------------------------------------------------------------------------------------------


def to_markdown(
    standings: Sequence[TrialState], *, baseline: str | None = BASELINE, captions: Sequence[str] = ()
) -> str:
    """The captions, then the trials, best first; with several seeds also the rows' means over them."""
    cells = _cells(standings, baseline, status=status_in_words)
    blocks = [*captions, _markdown_table(_columns(standings, baseline), cells)]
    if any(map(_unfinished, standings)):
        blocks.append(NOTE)
    if _several_seeds(standings):
        blocks.append("Mean ± standard deviation over the seeds that went to their end:")
        blocks.append(_seed_table(standings, baseline))
    return "\n\n".join(blocks) + "\n"


def to_rich(
    standings: Sequence[TrialState], *, baseline: str | None = BASELINE, captions: Sequence[str] = ()
) -> RenderableType:
    """The same trials for a terminal of 80 columns; why some ended early stands below, and needs no colour."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True)
    for title, align in _columns(standings, baseline):
        table.add_column(title, justify=align, no_wrap=True, overflow="crop")
    for standing, cells in zip(best_first(standings), _cells(standings, baseline, status=_status), strict=True):
        table.add_row(*cells, style="dim" if _unfinished(standing) else "")
    explained = [standing for standing in standings if standing.stopped_by or standing.error]
    reasons = [f"{standing.trial} {status_in_words(standing)}" for standing in explained]
    if len(reasons) > MAX_REASONS:
        reasons = [f"{len(reasons)} trials ended early; the report and leaderboard.md say why."]
    notes = [*reasons, *captions, *([NOTE] if any(map(_unfinished, standings)) else [])]
    # As Text: an error's words may hold brackets, which strings would turn into markup.
    return Group(table, *(Text(note) for note in notes))


def _status(standing: TrialState) -> str:
    return standing.status


def _columns(standings: Sequence[TrialState], baseline: str | None) -> list[tuple[str, Align]]:
    seed: list[tuple[str, Align]] = [("seed", "right")] if _several_seeds(standings) else []
    return [
        ("#", "right"),
        ("run", "left"),
        *seed,
        ("status", "left"),
        ("epochs", "right"),
        ("best mIoU", "right"),
        ("at", "right"),
        _last_or_latency(standings),
        *_gain_column(baseline),
        ("h:mm:ss", "right"),
    ]


def _last_or_latency(standings: Sequence[TrialState]) -> tuple[str, Align]:
    """A second goal takes the place of the last mIoU: 80 columns hold no more."""
    return ("ms", "right") if _has_latency(standings) else ("last", "right")


def _gain_column(baseline: str | None) -> list[tuple[str, Align]]:
    return [] if baseline is None else [(f"over {baseline}", "right")]


def _cells(
    standings: Sequence[TrialState], baseline: str | None, *, status: Callable[[TrialState], str]
) -> list[list[str]]:
    gain_of = gains(standings, baseline=baseline)
    several_seeds = _several_seeds(standings)
    has_latency = _has_latency(standings)
    return [
        [
            str(rank),
            standing.run,
            *([str(standing.seed)] if several_seeds else []),
            status(standing),
            f"{standing.epochs}/{standing.num_epochs}",
            _marked_best(standing),
            "" if standing.best_epoch is None else str(standing.best_epoch),
            _milliseconds(standing.latency_ms) if has_latency else _percent(standing.last_miou),
            *([] if baseline is None else [_signed(gain_of[standing.trial])]),
            str(timedelta(seconds=round(standing.seconds))),
        ]
        for rank, standing in enumerate(best_first(standings), start=1)
    ]


def _marked_best(standing: TrialState) -> str:
    if standing.best_miou is None:
        return ""
    return f"{standing.best_miou:.2f} {UNFINISHED if _unfinished(standing) else ' '}"


def _seed_table(standings: Sequence[TrialState], baseline: str | None) -> str:
    columns: list[tuple[str, Align]] = [
        ("run", "left"),
        ("seeds", "right"),
        ("best mIoU", "right"),
        *_gain_column(baseline),
    ]
    cells = [
        [
            row.run,
            f"{row.finished} of {row.trials}",
            _percent(row.miou) + _spread(row.miou_sd),
            *([] if baseline is None else [_signed(row.gain) + _spread(row.gain_sd)]),
        ]
        for row in over_seeds(standings, baseline=baseline)
    ]
    return _markdown_table(columns, cells)


def status_in_words(standing: TrialState) -> str:
    """As `finished`, or with the reason: `stopped: ASHA, epoch 10`, `failed: CUDA out of memory`."""
    reason = _one_line(standing.stopped_by or standing.error)
    return f"{standing.status}: {reason}" if reason else standing.status


def _markdown_table(columns: Sequence[tuple[str, Align]], cells: Sequence[Sequence[str]]) -> str:
    escaped = [[cell.replace("|", r"\|") for cell in line] for line in [[title for title, _ in columns], *cells]]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    ruler = [
        "-" * (width + 1) + (":" if align == "right" else "-")
        for (_, align), width in zip(columns, widths, strict=True)
    ]
    lines = [
        " | ".join(
            cell.rjust(width) if align == "right" else cell.ljust(width)
            for cell, width, (_, align) in zip(line, widths, columns, strict=True)
        )
        for line in escaped
    ]
    return "\n".join([f"| {lines[0]} |", f"|{'|'.join(ruler)}|", *(f"| {line} |" for line in lines[1:])])


# --- words and numbers ------------------------------------------------------------------------------------------


def _unfinished(standing: TrialState) -> bool:
    return standing.status != "finished"


def _several_seeds(standings: Sequence[TrialState]) -> bool:
    return len({standing.seed for standing in standings}) > 1


def _has_latency(standings: Sequence[TrialState]) -> bool:
    return any(standing.latency_ms is not None for standing in standings)


def _milliseconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:z.2f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+z.2f}"


def _spread(sd: float | None) -> str:
    return "" if sd is None else f" ± {sd:.2f}"


def _one_line(text: str) -> str:
    return " ".join(text.split())
