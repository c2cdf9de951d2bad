"""The report's tables for a terminal of 80 columns."""

from collections.abc import Sequence
from typing import Final

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from tune_bisenet.report.page import Report
from tune_bisenet.report.tables import Badge, Marked, Table, verdict_table

STYLES: Final = {"good": "green", "bad": "red", "open": "yellow", "off": "yellow", "none": "dim"}
"""By a badge's style."""


def format_table(table: Table, *, left_out: Sequence[str] = ()) -> RenderableType:
    """Return the table and its sentence. Marked rows have a star, which needs no colour."""
    shown = RichTable(box=SIMPLE_HEAD, collapse_padding=True)
    kept = [title for title in table.columns if title not in left_out]
    for title in kept:
        shown.add_column(title, justify="right" if title in table.numbers else "left")
    for line in table.lines:
        marked = any(isinstance(cell, Marked) for cell in line.values())
        shown.add_row(*(_text(line[title]) for title in kept), style="bold" if marked else "")
    return Group(*([shown] if table.lines else []), *([Text(table.text)] if table.text else []))


def format_verdicts(report: Report) -> RenderableType:
    """Return a line for each claim; the page has the rest of what is known of it."""
    table = verdict_table(report.search, report.judgement, report.price)
    return format_table(table, left_out=("to decide it", "seeds", "best epochs", "remarks"))


def _text(cell: str) -> Text:
    """As Text: a cell may hold brackets, which strings would turn into markup."""
    if isinstance(cell, Badge):
        return Text(cell, style=STYLES[cell.style])
    return Text(f"{cell}*" if isinstance(cell, Marked) else cell)
