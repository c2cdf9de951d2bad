"""What a person reads, whole: help, plans, and the results of the two searches in tests/fixtures, as they were written.

A test compares the program's real output with a file in tests/snapshots. Where a change is meant, `make snapshots`
writes the files again, and the diff in git is what to review.
"""

import difflib
import importlib
import io
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest
from rich.console import Console

from tune_bisenet import run
from tune_bisenet.config import Resources
from tune_bisenet.options import parse_options
from tune_bisenet.records import read_saved_state
from tune_bisenet.report import __main__ as report_command
from tune_bisenet.report.page import Report
from tune_bisenet.search.console import print_plan, print_results
from tune_bisenet.search.forecast import estimate_search
from tune_bisenet.search.prepare import PreparedSearch, prepare_search
from tune_bisenet.search.state import SessionOutcome

TESTS: Final = Path(__file__).parent
WRITES: Final = "TUNE_BISENET_WRITE_SNAPSHOTS"
"""Set to write the snapshots instead of comparing with them."""

WIDTH: Final = 120
INFERENCE: Final = [f"inference.{verb}" for verb in ("export", "evaluate", "predict", "benchmark")]
MASKS: Final = {
    r"This page: [-0-9]+ [:0-9]+ UTC": "This page: NOW",
    r"Written on [-0-9]+ [:0-9]+ UTC": "Written on NOW",
    r"[.\d]+ [kMGT]B are free here(: NOT ENOUGH)?": "MUCH are free here",
}


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of searches with the two fixtures in it, on a machine without colours or settings of its own."""
    shutil.copytree(TESTS / "fixtures", tmp_path / "results")
    monkeypatch.chdir(tmp_path)
    for name in ("CITYSCAPES_DATASET", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "PYTHON_COLORS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"COLUMNS": str(WIDTH), "NO_COLOR": "1", "TUNE_BISENET_CACHE": str(tmp_path / "cache")}.items():
        monkeypatch.setenv(name, value)
    return tmp_path / "results"


def check(name: str, text: str, results: Path) -> None:
    """Compare `text`, less what differs by machine and hour, with the snapshot of that name, or write it."""
    text = text.replace(str(results.parent), "/tmp/searches")  # where the fixtures were written
    text = re.sub(r" {2,}\|", " |", re.sub(r"-{4,}", "---", text))  # a table is as wide as the longest path in it
    for pattern, mask in MASKS.items():
        text = re.sub(pattern, mask, text)
    compare(TESTS / "snapshots" / name, "".join(f"{line.rstrip()}\n" for line in text.splitlines()))


def compare(path: Path, text: str) -> None:
    """Compare `text` with a file of this repository, or write it."""
    if os.environ.get(WRITES):
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    expected = path.read_text(encoding="utf-8") if path.exists() else ""
    diff = difflib.unified_diff(expected.splitlines(), text.splitlines(), path.name, "now", lineterm="")
    if text != expected:
        pytest.fail("\n".join([*diff, "", "If this is meant: make snapshots, and review its diff."]), pytrace=False)


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["run", "report.__main__", "cluster.submit", "cluster.check", *INFERENCE])
def test_help(module: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = importlib.import_module(f"tune_bisenet.{module}")
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    check(f"help-{module.removesuffix('.__main__').rpartition('.')[2]}.txt", capsys.readouterr().out, results)


# --- plans ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "flags"),
    {
        "grid-on-gpus": "--space runs10 --seeds 0,1,2 --gpus 2 --images-per-second 40 --price-per-gpu-hour 1.20",
        "grid-with-measured-noise": "--space runs10 --runs r01,r05,aa --control --decide --gpus 2 "
        "--images-per-second 40 --noise-from results/grid",
        "grid-on-cpus": "--space runs10 --runs r01,r05,r09 --scheduler fifo --images-per-second 2 "
        "--gpus-per-trial 0 --max-concurrent 1 --cpus-per-trial 1 --precision fp32",
        "sampled-on-gpus": "--space around10 --time-budget 8h --confirm 2 --warm-start results/grid --gpus 4 "
        "--images-per-second 40",
    }.items(),
    ids=lambda value: "flags" if " " in value else value,
)
def test_plan(name: str, flags: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--plan", "--name", "mine", *flags.split()]) == 0
    check(f"plan-{name}.txt", capsys.readouterr().out, results)


# --- results --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("search", ["grid", "sampled"])
def test_what_the_terminal_says_before_and_after_a_search(search: str, results: Path) -> None:
    """A session that is resumed when all trials have ended."""
    screen = io.StringIO()
    console = Console(file=screen)
    prepared = resumed(search)
    folder, states = prepared.folder, read_saved_state(prepared.folder).states
    resources = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)
    print_plan(console, estimate_search(prepared, resources, states))
    print_results(console, prepared, states, report=Report.of(folder), outcome=SessionOutcome())
    check(f"terminal-{search}.txt", screen.getvalue(), results)


def resumed(search: str) -> PreparedSearch:
    options, mistyped = parse_options({"name": search, "resume": True})
    return prepare_search(options, mistyped, default_name="", progress=lambda _done, _total: None)


@pytest.mark.parametrize("search", ["grid", "sampled"])
def test_report(search: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = results / search
    assert report_command.main([str(folder), "--price-per-gpu-hour", "1.20"]) == 0
    check(f"report-{search}-terminal.txt", capsys.readouterr().out, results)
    check(f"report-{search}.md", (folder / "report.md").read_text(encoding="utf-8"), results)
    check(f"report-{search}-page.txt", visible_text((folder / "report.html").read_text(encoding="utf-8")), results)


@pytest.mark.parametrize("flag", ["--next", "--replay"])
def test_report_that_only_answers_a_question(flag: str, results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert report_command.main([str(results / "grid"), flag]) == 0
    check(f"report-grid{flag}.txt", "".join(capsys.readouterr()), results)


def visible_text(html: str) -> str:
    """The page as a person reads it without its pictures: a line for a block or for a table's row."""
    parser = _VisibleText()
    parser.feed(html)
    lines = (" ".join(line.split()) for line in parser.text.splitlines())
    return "\n".join(line for line in lines if line)


class _VisibleText(HTMLParser):
    HIDDEN = frozenset({"head", "script", "svg"})
    INLINE = frozenset({"a", "button", "code", "i", "li", "mark", "small", "span", "strong", "svg", "tbody", "thead"})

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self._open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._add("| " if tag in ("td", "th") else " " if tag in self.INLINE else "\n")
        if tag in self.HIDDEN or tag == "pre":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag in self._open:
            self._open.remove(tag)
        self._add(" " if tag in self.INLINE or tag in ("td", "th") else "\n")

    def handle_data(self, data: str) -> None:
        self._add(data if "pre" in self._open else re.sub(r"\s+", " ", data))

    def _add(self, text: str) -> None:
        if self.HIDDEN.isdisjoint(self._open):
            self.text += text
