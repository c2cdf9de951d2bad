"""The command line of the report: read a search, write its page, and print what became of each row.

python -m tune_bisenet.report results/NAME
python -m tune_bisenet.report s3://bucket/searches/NAME --out report --price-per-gpu-hour 2.5
python -m tune_bisenet.report results/NAME --next
python -m tune_bisenet.report results/NAME --replay
"""

import argparse
import sys
from collections.abc import Sequence

from rich.console import Console, RenderableType

from tune_bisenet.errors import OK, run_command
from tune_bisenet.report.page import Report, format_table, format_verdicts
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.replay import replay_table
from tune_bisenet.report.sampled import best_lines
from tune_bisenet.storage import Storage
from tune_bisenet.text import one_line


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _report(arguments))


def _report(arguments: argparse.Namespace) -> int:
    folder = Storage.at(arguments.search, fail_fast=True)
    if arguments.replay:
        search = read_search(folder)
        return _print(search, format_table(replay_table(search)))
    report = Report.of(folder, price=arguments.price_per_gpu_hour)
    if arguments.next:
        if report.next_command:
            sys.stdout.write(f"{report.next_command}\n")  # alone, so that a shell can run it
        else:
            sys.stderr.write("No command: up to 100 more seeds would decide nothing that is still open.\n")
        return OK
    try:
        page = report.write(Storage.at(arguments.out) if arguments.out else folder)
    except OSError as error:
        advice = "" if arguments.out else " Name a folder to write it to with --out."
        raise ValueError(f"the report cannot be written: {one_line(error)}.{advice}") from error
    lines = [*best_lines(report.search), f"report: {page}"]
    if report.next_command:
        lines.insert(-1, "what the open rows need: add --next to this command")
    return _print(report.search, format_verdicts(report), lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.report",
        description="Write report.html, report.md and tables of a search, from its storage alone, and print what "
        "became of each row. The search may still be running, or have died.",
        allow_abbrev=False,
    )
    parser.add_argument("search", metavar="DIR_OR_URI", help="the search's folder: STORAGE/NAME")
    parser.add_argument("--out", metavar="DIR_OR_URI", help="where to write (default: into the search's folder)")
    parser.add_argument("--price-per-gpu-hour", metavar="X", type=_price, help="also show the cost")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--next", action="store_true", help="only print the command that runs the seeds needed")
    instead.add_argument("--replay", action="store_true", help="only print what other schedulers would have stopped")
    return parser


def _price(text: str) -> float:
    price = float(text)
    if not 0 <= price < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a valid price: give a number from 0 up.")
    return price


def _print(search: SearchRecord, table: RenderableType, lines: Sequence[str] = ()) -> int:
    console = Console()
    console.print(table)
    notes = [f"note: {note}" for note in search.all_notes]
    for text in [*filter(None, [search.manifest.proxy, search.code_changes]), *notes, *lines]:
        console.print(
            text, highlight=False, markup=False, emoji=False, soft_wrap=True
        )  # unbroken: a path must survive copying
    return OK


if __name__ == "__main__":
    sys.exit(main())
