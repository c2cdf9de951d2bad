"""What a search can tell of its rows' promises, in words: how likely each is to be confirmed, were it true."""

from collections.abc import Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.table import Table

from tune_bisenet.estimate.outlook import Line, Outlook
from tune_bisenet.report.cost import ASSUMED_SD, MOST_SEEDS
from tune_bisenet.report.power import Power, powers
from tune_bisenet.report.promises import promised_words

MOST_PROMISES: Final = 16
"""A terminal does not list more."""


def of(outlook: Outlook) -> list[Power]:
    """Of every promise that can be judged; of a sampled search none."""
    if outlook.survey.draft:
        return []
    seeds: dict[str, set[int]] = {}
    for run in outlook.work.runs:
        seeds.setdefault(run.name, set()).add(run.seed)
    rows = {run.name: run for run in outlook.work.runs}
    return powers(list(rows.values()), seeds, proxy=outlook.survey.choices.proxy)


def line(outlook: Outlook, found: Sequence[Power]) -> list[Line]:
    """What the table below tells, and on what assumptions."""
    if outlook.survey.draft:
        how = "--confirm K trains its best anew with K fresh ones"
        return [("promises", f"a sampled search has one seed, which confirms nothing; {how}")]
    if not found:
        return []
    few = "one seed confirms nothing; " if max(power.seeds for power in found) < 2 else ""
    fifo = "" if outlook.survey.choices.scheduler == "fifo" else " and none is stopped early (--scheduler fifo)"
    return [
        (
            "promises",
            f"{few}below, how likely each is confirmed if it is true at its middle, repeats differ by {ASSUMED_SD:g} "
            f"points (assumed){fifo}; and the seeds that make it 80 %",
        )
    ]


def table(found: Sequence[Power]) -> Table:
    """A line a promise."""
    shown = Table(box=SIMPLE_HEAD)
    for title in ("run", "promise"):
        shown.add_column(title)
    for title in ("seeds", "confirmed", "80 % with"):
        shown.add_column(title, justify="right")
    for power in found[:MOST_PROMISES]:
        shown.add_row(power.run, promised_words(power), str(power.seeds), _share(power), _needed(power))
    if len(found) > MOST_PROMISES:
        shown.add_row("…", f"and {len(found) - MOST_PROMISES} more", "", "", "")
    return shown


def _share(power: Power) -> str:
    return "no number" if power.share is None else f"{power.share:.0%}".replace("%", " %")


def _needed(power: Power) -> str:
    if power.share is None:
        return ""
    if power.reference is not None and not power.seeds:
        return f"not without {power.reference}"
    return f"more than {MOST_SEEDS} seeds" if power.seeds_for_80 is None else f"{power.seeds_for_80} seeds"
