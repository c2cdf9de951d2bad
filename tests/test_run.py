"""The command line: what it says of itself, what it prints without waiting, and the first search a newcomer starts."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from driving import PROJECT, Driver, environment, epoch_numbers, leaderboard, make_place

from tune_bisenet import run

place = pytest.fixture(scope="module")(make_place)


def called(*flags: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, with what it imported as its last line on standard error."""
    code = (
        "import sys\n"
        "from tune_bisenet import run\n"
        "code = run.main(sys.argv[1:])\n"
        "sys.stderr.write(' '.join(sorted(sys.modules)))\n"
        "sys.exit(code)\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, *flags], cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200
    )


LOADED = "import sys; print(*sys.modules)"


@pytest.mark.parametrize("space", ["runs10", "smoke", "around10"])
def test_show_prints_the_table_and_imports_neither_torch_nor_ray(space: str) -> None:
    shown = called("--show", "--space", space)
    assert shown.returncode == 0
    assert shown.stdout.startswith("| run ")
    modules = shown.stderr.split()
    assert "tune_bisenet.spaces" in modules
    assert not {"torch", "ray", "pyarrow", "tensorboard", "PIL"} & set(modules)


def test_show_takes_no_time_worth_telling() -> None:
    """Half a second on an idle machine, most of it pydantic's; how many there are on a busy one is not asked."""
    modules = called("--show").stderr.split()
    bare = subprocess.run([sys.executable, "-c", LOADED], cwd=PROJECT, capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in modules if not name.startswith("_")}
    packages -= sys.stdlib_module_names | set(bare.stdout.split())
    of_pydantic = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}
    assert {"tune_bisenet", "search_spaces"} <= packages <= {"tune_bisenet", "search_spaces", *of_pydantic}
    assert len(modules) < 350, "those of the standard library among them"


def test_show_can_be_limited_to_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--show", "--runs", "r03,r01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["r01", "r03"]


def test_show_names_an_unknown_row_or_space(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--show", "--runs", "r99"]) == 2
    assert "no row r99" in capsys.readouterr().err
    assert run.main(["--show", "--space", "nosuch"]) == 2
    assert "there is none of that name. There are" in capsys.readouterr().err


def test_a_mistake_is_found_without_torch_and_ray() -> None:
    refused = called("--runs", "r99", "--data", "streets", "--epochs", "0")
    assert refused.returncode == 2
    assert not {"torch", "ray"} & set(refused.stderr.splitlines()[-1].split())


def test_help_tells_every_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        run.main(["--help"])
    assert ended.value.code == 0
    words = capsys.readouterr().out.partition("exit codes:")[2].split()
    assert {"0", "1", "2", "75", "130", "143"} <= set(words)


# --- the first search -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def first_search(place: Path) -> Iterator[Driver]:
    """What a newcomer starts: the smoke space on the built-in streets, which need no download."""
    flags = ["--space", "smoke", "--image-size", "32x64", "--epochs", "1", "--storage", str(place / "results")]
    with Driver(place, *flags) as driver:
        driver.end()
        yield driver


def only_search(storage: Path) -> Path:
    (folder,) = (path for path in storage.iterdir() if path.is_dir())
    return folder


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_search_ends_well(first_search: Driver, place: Path) -> None:
    assert first_search.process.returncode == 0
    folder = only_search(place / "results")
    assert folder.name.startswith("smoke-20"), "named by the space and the time"
    board = leaderboard(folder)
    assert [(row["run"], row["status"], row["epochs"]) for row in board] == [
        (name, "finished", "1") for name in ("a", "b", "c")
    ]
    assert [epoch_numbers(folder / name) for name in "abc"] == [[1]] * 3
    assert board[0]["gain_over_a"] == ""
    gain = float(board[1]["best_miou"]) - float(board[0]["best_miou"])
    assert float(board[1]["gain_over_a"]) == pytest.approx(gain, abs=0.011)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_search_says_what_it_does_and_that_it_is_a_proxy(first_search: Driver, place: Path) -> None:
    folder = only_search(place / "results")
    for words in ("streets: 96 training and 24 validation images, 32x64", f"tensorboard --logdir {folder}"):
        assert words in first_search.log
    assert f"--resume --name {folder.name} --storage {place / 'results'}" in first_search.log
    assert "Proxy:" in first_search.log
    assert "Proxy:" in (folder / "leaderboard.md").read_text()
    assert json.loads((folder / "search.json").read_text())["proxy"].startswith("Proxy:")
    assert "Traceback" not in first_search.log


@pytest.mark.ray
def test_more_than_the_machine_has_is_refused_before_anything_is_trained(place: Path) -> None:
    flags = ["--space", "smoke", "--image-size", "32x64", "--storage", str(place / "kept"), "--name", "x"]
    refused = subprocess.run(
        [sys.executable, "-m", "tune_bisenet.run", *flags, "--cpus-per-trial", "9999"],
        cwd=PROJECT,
        env=environment(place),
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert refused.returncode == 2
    assert "Lower --cpus-per-trial" in refused.stderr
    assert re.search(r"a trial asks for 9999 CPUs and [01] GPUs; Ray has [1-9]\d* and \d", refused.stderr)
    assert not (place / "kept" / "x" / "search.json").exists()
