"""The command line of the report, in a process of its own and in this one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from searches import state_of, write_search

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


@pytest.mark.parametrize("flag", ["--next", "--replay"])
def test_a_flag_that_asks_for_an_answer_alone_writes_nothing(tmp_path: Path, flag: str) -> None:
    write_search(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(tmp_path), flag]) == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_next_says_when_seeds_would_decide_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    waiting = {f"r0{row}-s{seed}": state_of(f"r0{row}-s{seed}", []) for row in (1, 2) for seed in (0, 1)}
    write_search(tmp_path, states=waiting)
    assert main([str(tmp_path), "--next"]) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "would decide nothing" in err


@pytest.mark.parametrize("place", ["{tmp_path}", "{tmp_path}/nowhere", "gopher://nowhere/at/all"])
def test_a_folder_without_a_search_is_refused(tmp_path: Path, place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([place.format(tmp_path=tmp_path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


READ_ONLY = """
mount --bind "$1" "$1" && mount -o remount,bind,ro "$1" || exit 99
shift; "$@" --price-per-gpu-hour 1 && exit 98
"$@" --out "$OUT"
"""


def test_a_search_on_a_read_only_disk_is_reported_elsewhere(tmp_path: Path) -> None:
    """In a mount namespace of its own, which not every machine allows."""
    folder, out = write_search(tmp_path / "search").path, tmp_path / "out"
    report = [sys.executable, "-m", "tune_bisenet.report", folder]
    command = ["unshare", "--map-root-user", "--mount", "bash", "-c", READ_ONLY, "bash", folder, *report]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | {"OUT": str(out)})
    if "unshare" in ran.stderr or ran.returncode == 99:
        pytest.skip(ran.stderr)
    assert ran.returncode == 0, ran.stderr
    assert "Read-only file system" in ran.stderr
    assert "Name a folder to write it to with --out." in ran.stderr
    assert (out / "report.html").exists()


@pytest.mark.parametrize("price", ["-1", "nan", "inf", "cheap"])
def test_an_invalid_price_is_refused(tmp_path: Path, price: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main([str(tmp_path), f"--price-per-gpu-hour={price}"])
    assert refused.value.code == 2
    assert "price" in capsys.readouterr().err


def test_words_with_brackets_survive_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_search(tmp_path, proxy="[bold]not[/bold] [/all] markup")
    assert main([str(tmp_path)]) == 0
    assert "[bold]not[/bold] [/all] markup" in capsys.readouterr().out
