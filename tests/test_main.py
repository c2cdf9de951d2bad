"""One command with a verb for each module, which is what the module does by itself."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tune_bisenet.__main__ import VERBS, main
from tune_bisenet.errors import FAILED, INTERRUPTED, WRONG_INPUT, CommandError, run_command
from tune_bisenet.options import InputError
from tune_bisenet.report.leaderboard import winner_commands

FIXTURES = Path(__file__).parent / "fixtures"


def test_without_a_verb_all_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed and text in printed for verb, (_module, text) in VERBS.items())


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb != "run"])
def test_each_verb_has_help_that_names_it(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([verb, "--help"])
    assert verb in capsys.readouterr().out.partition("\n")[0]


def test_a_mistyped_verb_is_told_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["exprot"]) == WRONG_INPUT
    assert "Did you mean export?" in capsys.readouterr().err


def test_the_commands_that_a_search_prints_for_its_best_are_understood() -> None:
    commands = [shlex.split(line) for line in winner_commands("/my searches/paper", "r05-s1", data="/my data")]
    assert [words[3] for words in commands] == ["export", "evaluate", "predict", "benchmark"]
    for _python, _m, _package, verb, *words in commands:
        parsed = importlib.import_module(VERBS[verb][0])._parser().parse_args(words)
        assert (parsed.model, parsed.run) == ("/my searches/paper", "r05-s1")


def test_run_is_the_main_job_with_its_supervisor() -> None:
    def call(*words: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    assert call("tune_bisenet", "run", "--show") == call("tune_bisenet.run", "--show")
    code, _, problem = call("tune_bisenet", "run", "--space", "no_space")
    assert (code, problem) == call("tune_bisenet.run", "--space", "no_space")[::2]
    assert (code, "Nothing was started." in problem) == (WRONG_INPUT, True)


def test_report_is_the_report(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(FIXTURES / "grid"), "--replay"]) == 0
    assert "scheduler" in capsys.readouterr().out
    assert main(["report", str(FIXTURES)]) == WRONG_INPUT
    assert "there is no search in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (InputError("one", "two"), WRONG_INPUT),
        (CommandError("one two"), FAILED),
        (FileNotFoundError("one two"), WRONG_INPUT),
        (KeyboardInterrupt(), INTERRUPTED),
    ],
)
def test_an_error_becomes_a_message_and_an_exit_code(
    error: BaseException, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> int:
        raise error

    assert run_command(fail) == code
    told = capsys.readouterr().err
    assert "interrupted" in told if code == INTERRUPTED else "one" in told and "two" in told


def test_an_error_of_the_program_is_not_explained_away() -> None:
    with pytest.raises(UnicodeDecodeError):
        run_command(lambda: len(b"\xff".decode()))
