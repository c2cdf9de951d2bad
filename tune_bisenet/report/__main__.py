"""The command line of the report: read a search, write its page, and say in the terminal what became of each row.

python -m tune_bisenet.report results/NAME
python -m tune_bisenet.report s3://bucket/searches/NAME --out report --price-per-gpu-hour 2.5
python -m tune_bisenet.report results/NAME --next
python -m tune_bisenet.report results/NAME --replay
"""

import argparse
import sys
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from tune_bisenet.report.page import Report
from tune_bisenet.report.promises import Promise
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.replay import replay, replay_view
from tune_bisenet.report.sampled import best_lines
from tune_bisenet.report.verdicts import Verdict
from tune_bisenet.report.views import View
from tune_bisenet.storage import Storage

OK, NO_SEARCH = 0, 2

STYLES: dict[Verdict, str] = {"confirmed": "green", "refuted": "red", "undecided": "yellow", "not judged": "dim"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    given = _parser().parse_args(argv)
    try:
        folder = Storage.at(given.search, hurried=True)
        if given.replay:
            return _print_replay(read_search(folder))
        report = Report.of(folder, price=given.price_per_gpu_hour)
        return _print_next(report) if given.next else _write(report, Storage.at(given.out) if given.out else folder)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return NO_SEARCH


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.report",
        description="Write report.html, report.md and tables of a search, from its storage alone, and say what became "
        "of each row's promise. The search may still be running, or have died.",
        allow_abbrev=False,
    )
    parser.add_argument("search", metavar="DIR_OR_URI", help="the search's folder: STORAGE/NAME")
    parser.add_argument("--out", metavar="DIR_OR_URI", help="where to write (default: into the search's folder)")
    parser.add_argument("--price-per-gpu-hour", metavar="X", type=_price, help="say what it cost in money, too")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--next", action="store_true", help="only print the command that runs the seeds needed")
    instead.add_argument("--replay", action="store_true", help="only say what other schedulers would have stopped")
    return parser


def _price(text: str) -> float:
    price = float(text)
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no price: give a number from 0 up.")
    return price


def _print_next(report: Report) -> int:
    """The command alone on standard output, so that a shell can run it."""
    command = report.next_command
    if command is None:
        sys.stderr.write("No command: up to 100 more seeds would decide nothing that is still undecided.\n")
    else:
        sys.stdout.write(f"{command}\n")
    return OK


def _print_replay(search: SearchRecord) -> int:
    view = replay_view(replay(search))
    console = Console()
    if view.rows:
        console.print(_table(view))
    console.print(Text(view.words))
    if search.manifest.proxy:
        _say(console, search.manifest.proxy)
    for note in search.all_notes:
        _say(console, f"note: {note}")
    return OK


def _table(view: View) -> Table:
    """In 80 columns. What is marked has a star, which needs no colour."""
    table = Table(box=SIMPLE_HEAD, collapse_padding=True)
    for title in view.columns:
        table.add_column(title, justify="right" if title in view.numbers else "left")
    for row in view.rows:
        marked = any(cell.marked for cell in row)
        cells = [Text(f"{cell.text}*" if cell.marked else cell.text) for cell in row]
        table.add_row(*cells, style="bold" if marked else "")
    return table


def _write(report: Report, out: Storage) -> int:
    page = report.write(out)
    console = Console()
    console.print(_verdict_table(report))
    for line in best_lines(report.search):
        _say(console, line)
    for note in report.search.all_notes:
        _say(console, f"note: {note}")
    if report.next_command:
        _say(console, "what the undecided rows need: add --next to this command")
    _say(console, f"report: {page}")
    return OK


def _verdict_table(report: Report) -> Table:
    """What it says needs no colour. As Text throughout: words may hold brackets."""
    proxy = report.search.manifest.proxy
    table = Table(box=SIMPLE_HEAD, caption=Text(proxy) if proxy else None, caption_justify="left")
    for title in ("row", "promised", "measured", "95 % interval", "verdict", "to decide it"):
        table.add_column(title, justify="right" if title in ("measured", "95 % interval") else "left")
    for promise in report.promises:
        table.add_row(*_cells(promise))
    return table


def _cells(promise: Promise) -> list[Text]:
    claim = promise.claim
    reason = f", {claim.reason}" if claim.reason else ""
    verdict = Text.assemble((f"{promise.symbol} {claim.verdict}", STYLES[claim.verdict]), reason)
    plain = (claim.run, promise.promised, promise.measured, promise.interval)
    return [*map(Text, plain), verdict, Text(promise.to_decide)]


def _say(console: Console, line: str) -> None:
    """Never broken over lines by us: a path must survive copying."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
