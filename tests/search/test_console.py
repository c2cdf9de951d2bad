"""What the terminal shows: progress on a terminal and without one, and a plan and results that can be copied."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import plain_epoch
from rich.console import Console

from tune_bisenet.records import Epoch, Status, TrialState
from tune_bisenet.search.console import SearchProgress
from tune_bisenet.text import format_duration


def state(trial: str, status: Status, epochs: int = 0, num_epochs: int = 8, **more: Any) -> TrialState:
    return TrialState(trial=trial, run=trial, seed=0, status=status, epochs=epochs, num_epochs=num_epochs, **more)


def epoch(number: int) -> Epoch:
    return plain_epoch(number, 21.3, loss=1.234, images_per_second=7.5, train_seconds=3.0, val_seconds=0.2)


class Clock:
    """A clock that a test turns by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Screen:
    """A progress display and what it wrote."""

    def __init__(self, *, terminal: bool = False, width: int = 120, encoding: str = "utf-8", **environ: str) -> None:
        self.clock = Clock()
        self.bytes = io.BytesIO()
        file = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        environ = {"TERM": "xterm-256color"} | environ
        console = Console(file=file, force_terminal=terminal, width=width, height=30, _environ=environ)
        self.progress = SearchProgress(console, clock=self.clock)

    @property
    def text(self) -> str:
        return self.bytes.getvalue().decode()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


@pytest.mark.parametrize(
    ("seconds", "text"), [(59.4, "59 s"), (59.6, "1 min 0 s"), (3599.7, "1 h 0 min"), (183600, "2 d 3 h")]
)
def test_a_duration_is_written_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


# --- plain lines ----------------------------------------------------------------------------------------------------


def test_without_a_terminal_an_epoch_is_one_line_however_narrow_the_log() -> None:
    screen = Screen(width=20)
    with screen.progress as progress:
        progress.update([state("r03", "running", 0)])
        screen.clock.seconds = 130.0
        progress.epoch_done("r03", epoch(4))
        progress.update([state("r03", "running", 4)])
    assert screen.lines == ["r03  epoch 4/8  loss 1.234  mIoU 21.3 %  3.2 s  | search 50 %, about 2 min 10 s left"]


def test_the_time_left_follows_from_the_rate_of_this_session_and_of_all_trials() -> None:
    screen = Screen()
    with screen.progress as progress:
        progress.update([state("r01", "running", 2), state("r02", "running")])
        screen.clock.seconds = 40.0
        progress.epoch_done("r01", epoch(6))
        assert screen.lines[-1].endswith("about 1 min 40 s left")  # 10 of 16 are left, at 10 s each


@pytest.mark.parametrize("status", ["stopped", "diverged", "failed"])
def test_what_an_ended_trial_left_undone_takes_no_time(status: Status) -> None:
    screen = Screen()
    with screen.progress as progress:
        progress.update([state("r01", "running"), state("r02", "running", num_epochs=10)])
        progress.update([state("r01", status, 2), state("r02", "running", num_epochs=10)])
        screen.clock.seconds = 80.0
        progress.epoch_done("r02", epoch(6))
    assert screen.lines[-1].endswith("search 66 %, about 40 s left")  # 4 of 12 are left, at 10 s each


def test_a_trial_that_has_ended_is_announced_once_with_its_reason() -> None:
    screen = Screen()
    ended = [
        state("r01", "finished", 8, best_miou=24.1, best_epoch=8),
        state("r02", "failed", 1, error="RuntimeError:\n  [no] memory"),
        state("r03", "stopped", 2, stopped_by="ASHA", best_miou=9.96, best_epoch=2),
    ]
    with screen.progress as progress:
        progress.update([state(ending.trial, "running") for ending in ended])
        progress.update(ended)
        progress.epoch_done("r03", epoch(2))  # a late report does not wake it
        progress.update(ended)
    first, second, third, _epoch = screen.lines
    assert all(part in first for part in ("r01 finished", "epoch 8 of 8", "24.1 %"))
    assert all(part in second for part in ("r02 failed", "[no] memory", "epoch 1 of 8"))
    assert all(part in third for part in ("r03 stopped", "ASHA", "epoch 2 of 8", "10.0 %"))


def test_a_resumed_search_says_where_it_starts_and_announces_nothing_old() -> None:
    screen = Screen()
    with screen.progress as progress:
        progress.update([state("r01", "finished", 8), state("r02", "running", 3)])
        progress.epoch_done("r99", epoch(1))  # a trial that nothing is known of
    assert screen.lines == ["resumed: 1 of 2 trials had ended, 11 of 16 epochs were done"]


# --- a terminal -----------------------------------------------------------------------------------------------------


def run_a_little(screen: Screen) -> None:
    with screen.progress as progress:
        progress.update([state("r01", "running"), state("r02", "running"), state("r03", "waiting")])
        screen.clock.seconds = 10.0
        progress.epoch_done("r01", epoch(1))
        failed = state("r02", "failed", error="[/oops]")
        progress.update([state("r01", "running", 1), failed, state("r03", "waiting")])


def test_a_terminal_shows_the_search_each_running_trial_and_what_ended() -> None:
    screen = Screen(terminal=True)
    run_a_little(screen)
    last = screen.text.split("[/oops]")[-1]
    for part in ("1/16", "about 2 min 30 s left", "1 running, 1 waiting, 1 ended", "1/8", "mIoU 21.3 %", "loss 1.234"):
        assert part in last
    assert "r02" not in last.split("1/16")[-1], "its bar is gone"


def test_a_terminal_gets_its_cursor_back_after_an_error() -> None:
    screen = Screen(terminal=True)
    with pytest.raises(KeyboardInterrupt), screen.progress:
        raise KeyboardInterrupt
    assert screen.text.rindex("\x1b[?25h") > screen.text.rindex("\x1b[?25l")


@pytest.mark.parametrize("width", [1, 12, 40])
def test_a_narrow_terminal_and_one_that_knows_only_ascii_are_served(width: int) -> None:
    for encoding in ("utf-8", "ascii"):
        screen = Screen(terminal=True, width=width, encoding=encoding)
        run_a_little(screen)
        assert screen.text


def test_a_dumb_terminal_gets_plain_lines() -> None:
    screen = Screen(terminal=True, TERM="dumb")
    run_a_little(screen)
    assert len(screen.lines) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_output_does_not_end_the_search(terminal: bool) -> None:
    file = io.StringIO()
    progress = SearchProgress(Console(file=file, force_terminal=terminal))
    file.close()
    with progress:
        progress.update([state("r01", "running")])
        progress.epoch_done("r01", epoch(1))


def test_a_broken_pipe_does_not_end_the_search(tmp_path: Path) -> None:
    search = """
import sys
sys.path[:0] = sys.argv[1:3]
from test_console import Console, SearchProgress, epoch, state
from pathlib import Path
with SearchProgress(Console()) as progress:
    progress.update([state("r01", "running", num_epochs=100)])
    sys.stdin.readline()
    for number in range(1, 100):
        progress.epoch_done("r01", epoch(number))
Path(sys.argv[3]).write_text("to its end")
"""
    mark, folder = tmp_path / "mark", Path(__file__).parent
    command = [sys.executable, "-c", search, str(folder), str(folder.parent), str(mark)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=250) == 0
    assert mark.read_text() == "to its end"
