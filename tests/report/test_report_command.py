"""The command line of the report, in a process of its own and in this one."""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from searches import PROXY, standing, write_search

from tune_bisenet.report.__main__ import main


def test_the_report_imports_neither_ray_nor_torch(tmp_path: Path) -> None:
    write_search(tmp_path)
    code = (
        "import sys; from tune_bisenet.report.__main__ import main; code = main(sys.argv[1:]); "
        "print(sorted({'ray', 'torch', 'tensorboard'} & set(sys.modules))); sys.exit(code)"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert ran.stdout.endswith("\n[]\n")
    assert ran.stderr == ""


def test_the_terminal_shows_the_verdicts_and_where_the_page_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(tmp_path)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    for words in ("r02", "+2.25", "undecided", f"report: {tmp_path}/report.html"):
        assert words in shown


def test_next_prints_the_command_and_writes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_search(tmp_path / "small")
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path / "small"), "--next"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    words = shlex.split(line)
    assert words[:3] == ["python", "-m", "tune_bisenet.run"]
    assert words[words.index("--storage") + 1] == str(tmp_path)
    assert words[words.index("--seeds") + 1].startswith("2")
    assert sorted(tmp_path.rglob("*")) == before


def test_next_says_when_seeds_would_decide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = {f"r0{row}-s{seed}": standing(f"r0{row}-s{seed}", []) for row in (1, 2) for seed in (0, 1)}
    write_search(tmp_path, standings=waiting)
    assert main([str(tmp_path), "--next"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "would decide nothing" in err


def test_replay_says_what_other_rules_would_have_stopped_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    write_search(tmp_path, proxy=PROXY)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path), "--replay"]) == 0
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert [line.split()[0] for line in shown.splitlines() if "*" in line] == ["fifo*"]
    for words in ("winner is r02-s1 with 53.50 %", "asha", "median", PROXY):
        assert words in " ".join(shown.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_replay_of_a_search_in_which_nothing_has_finished_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_search(tmp_path, trials={})
    assert main([str(tmp_path), "--replay"]) == 0
    assert "nothing to replay" in " ".join(capsys.readouterr().out.split())


def test_only_one_thing_is_printed_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path), "--replay", "--next"])
    assert refused.value.code == 2
    assert "not allowed with" in capsys.readouterr().err


def test_a_price_is_told_in_money(tmp_path: Path) -> None:
    write_search(tmp_path / "small")
    assert main([str(tmp_path / "small"), "--price-per-gpu-hour", "100", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "Cost at 100 an hour." in page
    assert "6.00" in page  # 12 epochs of 36 seconds on half a GPU


@pytest.mark.parametrize("place", ["{tmp_path}", "{tmp_path}/nowhere", "gopher://nowhere/at/all"])
def test_what_is_no_search_is_refused_with_a_reason(
    tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([place.format(tmp_path=tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "cheap"])
def test_what_is_no_price_is_refused(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path), f"--price-per-gpu-hour={price}"])
    assert refused.value.code == 2
    assert "price" in capsys.readouterr().err


def test_words_with_brackets_survive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_search(tmp_path, proxy="[bold]not[/bold] [/all] markup")
    assert main([str(tmp_path)]) == 0
    assert "[bold]not[/bold] [/all] markup" in capsys.readouterr().out
