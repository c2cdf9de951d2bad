import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rows import plain_epoch

from tune_bisenet.progress import Progress, ending_in_words, format_duration, search_in_words, seconds_left, tally_of
from tune_bisenet.records import Epoch, Status, TrialState


def standing(trial: str, status: Status, epochs: int = 0, num_epochs: int = 8, **more: object) -> TrialState:
    record = {"trial": trial, "run": trial, "seed": 0, "status": status, "epochs": epochs, "num_epochs": num_epochs}
    return TrialState.from_json(record | more)


def epoch(number: int) -> Epoch:
    seen = {"loss": 1.234, "images_per_second": 7.5, "train_seconds": 3.0, "val_seconds": 0.2}
    return plain_epoch(number, 21.3, **seen)


class Clock:
    """A clock that a test turns by hand."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


class Seen:
    """A progress display and what it wrote."""

    def __init__(self, *, terminal: bool = False, width: int = 100, encoding: str = "utf-8", **environ: str) -> None:
        self.clock = Clock()
        self.bytes = io.BytesIO()
        file = io.TextIOWrapper(self.bytes, encoding=encoding, write_through=True)
        environ = {"TERM": "xterm-256color"} | environ
        console = Console(file=file, force_terminal=terminal, width=width, height=30, _environ=environ)
        self.progress = Progress(console, clock=self.clock)

    @property
    def text(self) -> str:
        return self.bytes.getvalue().decode()

    @property
    def lines(self) -> list[str]:
        return self.text.splitlines()


# --- numbers ----------------------------------------------------------------------------------------------------


def test_no_time_is_estimated_before_the_first_epoch() -> None:
    standings = [standing("r01", "running", 0), standing("r02", "waiting")]
    assert seconds_left(tally_of(standings), elapsed_seconds=60, epochs_done_at_start=0) is None


def test_the_time_left_follows_from_this_sessions_rate() -> None:
    # 6 epochs done, 4 of them in this session in 40 s; 10 to do: 100 s.
    standings = [standing("r01", "running", 6), standing("r02", "waiting")]
    assert seconds_left(tally_of(standings), elapsed_seconds=40, epochs_done_at_start=2) == 100


@pytest.mark.parametrize("status", ["stopped", "diverged", "failed"])
def test_what_an_ended_trial_left_undone_takes_no_time(status: Status) -> None:
    standings = [standing("r01", status, 2), standing("r02", "running", 6)]
    assert seconds_left(tally_of(standings), elapsed_seconds=80, epochs_done_at_start=0) == 20
    assert search_in_words(tally_of(standings), None) == "search 80 %"


def test_a_finished_search_has_no_time_left() -> None:
    assert seconds_left(tally_of([standing("r01", "finished", 8)]), elapsed_seconds=80, epochs_done_at_start=0) == 0


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (130, "2 min 10 s"),
        (3599.7, "1 h 0 min"),
        (3900, "1 h 5 min"),
        (183600, "2 d 3 h"),
    ],
)
def test_durations_are_written_in_two_units(seconds: float, words: str) -> None:
    assert format_duration(seconds) == words


# --- plain lines ------------------------------------------------------------------------------------------------


def test_without_a_terminal_an_epoch_is_one_plain_line() -> None:
    seen = Seen()
    with seen.progress as progress:
        progress.update([standing("r03", "running", 0)])
        seen.clock.seconds = 130.0
        progress.epoch_done("r03", epoch(4))
        progress.update([standing("r03", "running", 4)])
    assert seen.lines == [
        "r03  epoch 4/8  loss 1.234  mIoU 21.3 %  3.2 s  | search 50 %, about 2 min 10 s left",
    ]


def test_a_line_is_never_broken_where_a_log_is_narrow() -> None:
    seen = Seen(width=20)
    with seen.progress as progress:
        progress.update([standing("r03", "running")])
        progress.epoch_done("r03", epoch(1))
    assert len(seen.lines) == 1


def test_the_time_left_counts_down_while_an_epoch_runs() -> None:
    seen = Seen()
    with seen.progress as progress:
        progress.update([standing("r01", "running"), standing("r02", "running")])
        seen.clock.seconds = 10.0
        progress.epoch_done("r01", epoch(1))
        assert seen.lines[-1].endswith("about 2 min 30 s left")  # 15 more at 10 s each
        seen.clock.seconds = 20.0
        progress.update([standing("r01", "stopped", 1), standing("r02", "running")])
        progress.epoch_done("r02", epoch(1))
        assert seen.lines[-1].endswith("about 1 min 10 s left")  # r02 has 7 more at 10 s each


def test_an_ended_trial_is_announced_once() -> None:
    seen = Seen()
    ended = standing("r03", "finished", 8, best_miou=24.1, best_epoch=8)
    with seen.progress as progress:
        progress.update([standing("r03", "running", 0)])
        progress.update([ended])
        progress.update([ended])
    assert seen.lines == ["r03 finished: best mIoU 24.1 % at epoch 8"]


def test_every_ending_gives_its_reason() -> None:
    assert (
        ending_in_words(standing("r01", "stopped", 2, stopped_by="ASHA", best_miou=9.96, best_epoch=2))
        == "r01 stopped after epoch 2 of 8 (ASHA): best mIoU 10.0 % at epoch 2"
    )
    assert ending_in_words(standing("r01", "diverged", 1)) == "r01 diverged after epoch 1 of 8"
    assert (
        ending_in_words(standing("r01", "failed", 1, error="RuntimeError:\n  [no] memory"))
        == "r01 failed after epoch 1 of 8: RuntimeError: [no] memory"
    )


def test_a_resumed_search_says_where_it_begins_and_announces_nothing_old() -> None:
    seen = Seen()
    with seen.progress as progress:
        progress.update([standing("r01", "finished", 8), standing("r02", "running", 3)])
    assert seen.lines == ["resumed: 1 of 2 trials had ended, 11 of 16 epochs were done"]


def test_a_late_report_does_not_wake_a_stopped_trial() -> None:
    seen = Seen()
    with seen.progress as progress:
        progress.update([standing("r01", "running")])
        progress.update([standing("r01", "stopped", 2)])
        progress.epoch_done("r01", epoch(2))
        progress.update([standing("r01", "stopped", 2)])
    assert [line for line in seen.lines if "stopped" in line] == ["r01 stopped after epoch 2 of 8"]


def test_an_epoch_of_an_unknown_trial_is_passed_over() -> None:
    seen = Seen()
    with seen.progress as progress:
        progress.epoch_done("r99", epoch(1))
    assert seen.lines == []


# --- a terminal -------------------------------------------------------------------------------------------------


def run_a_little(seen: Seen) -> None:
    with seen.progress as progress:
        progress.update([standing("r01", "running"), standing("r02", "running"), standing("r03", "waiting")])
        seen.clock.seconds = 10.0
        progress.epoch_done("r01", epoch(1))
        progress.update(
            [standing("r01", "running", 1), standing("r02", "failed", error="[/oops]"), standing("r03", "waiting")]
        )


def test_a_terminal_shows_the_search_each_running_trial_and_what_ended() -> None:
    seen = Seen(terminal=True)
    run_a_little(seen)
    for words in (
        "search 6 %, about 2 min 30 s left, 10 s elapsed",
        "1 running, 1 waiting, 1 ended",
        "epoch 1/8",
        "mIoU 21.3 %",
        "loss 1.234",
        "7.5 img/s",
        "r02 failed after epoch 0 of 8: [/oops]",
    ):
        assert words in seen.text


def test_a_terminal_gets_its_cursor_back_after_an_error() -> None:
    seen = Seen(terminal=True)
    with pytest.raises(KeyboardInterrupt), seen.progress:
        raise KeyboardInterrupt
    assert seen.text.rindex("\x1b[?25h") > seen.text.rindex("\x1b[?25l")


def test_no_color_means_no_colour() -> None:
    coloured, plain = Seen(terminal=True), Seen(terminal=True, NO_COLOR="1")
    for seen in (coloured, plain):
        run_a_little(seen)
    colour = re.compile(r"\x1b\[[39]\d")
    assert colour.search(coloured.text)
    assert not colour.search(plain.text)


@pytest.mark.parametrize("width", [1, 12, 40])
def test_a_narrow_terminal_is_borne(width: int) -> None:
    seen = Seen(terminal=True, width=width)
    run_a_little(seen)
    assert seen.text


def test_a_terminal_that_knows_only_ascii_is_borne() -> None:
    seen = Seen(terminal=True, encoding="ascii")
    run_a_little(seen)
    assert "1 running, 1 waiting, 1 ended" in seen.text


def test_a_dumb_terminal_gets_plain_lines() -> None:
    seen = Seen(terminal=True, TERM="dumb")
    run_a_little(seen)
    assert len(seen.lines) == 2


@pytest.mark.parametrize("terminal", [False, True])
def test_a_closed_output_does_not_end_the_search(terminal: bool) -> None:
    file = io.StringIO()
    progress = Progress(Console(file=file, force_terminal=terminal))
    file.close()
    with progress:
        progress.update([standing("r01", "running")])
        progress.epoch_done("r01", epoch(1))


def test_a_broken_pipe_does_not_end_the_search(tmp_path: Path) -> None:
    search = """
import sys
sys.path.insert(0, sys.argv[1])
from test_progress import Progress, epoch, standing
from pathlib import Path
with Progress() as progress:
    progress.update([standing("r01", "running", num_epochs=100)])
    sys.stdin.readline()
    for number in range(1, 100):
        progress.epoch_done("r01", epoch(number))
Path(sys.argv[2]).write_text("went to its end")
"""
    mark = tmp_path / "mark"
    command = [sys.executable, "-c", search, str(Path(__file__).parent), str(mark)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.close()
        process.stdin.close()
        assert process.wait(timeout=250) == 0
    assert mark.read_text() == "went to its end"
