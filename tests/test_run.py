"""The command line: what it prints without waiting, and the first search that a newcomer starts."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import PROJECT, Driver, environment
from helpers.searches import epoch_numbers, leaderboard, make_place, on_frames, write_space

from tune_bisenet import run

place = pytest.fixture(scope="module")(make_place)

PYDANTIC = {"pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"}


def call(*flags: str) -> tuple[subprocess.CompletedProcess[str], set[str]]:
    """Run the command line in a process of its own; return it with the modules that it imported."""
    code = "import sys; from tune_bisenet import run; code = run.main(sys.argv[1:])"
    tell = "sys.stderr.write('\\n' + ' '.join(sys.modules)); sys.exit(code)"
    command = [sys.executable, "-c", f"{code}; {tell}", *flags]
    ran = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=False, timeout=200)
    return ran, set(ran.stderr.splitlines()[-1].split())


def test_show_prints_the_table_of_a_sampled_space_without_torch_and_ray() -> None:
    shown, modules = call("--show", "--space", "around10")
    assert shown.returncode == 0
    assert shown.stdout.startswith("| run ")
    assert not {"torch", "ray", "pyarrow", "tensorboard", "PIL"} & modules


def test_show_imports_next_to_nothing() -> None:
    """It takes half a second on an idle machine, most of it pydantic's; a busy one is not timed."""
    _, modules = call("--show")
    command = [sys.executable, "-c", "import sys; print(*sys.modules)"]
    bare = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in modules if not name.startswith("_")}
    packages -= sys.stdlib_module_names | set(bare.stdout.split())
    assert packages <= {"tune_bisenet", "search_spaces", *PYDANTIC}
    assert len(modules) < 350, "those of the standard library among them"


def test_show_can_be_limited_to_rows(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--show", "--runs", "r03,r01"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:]] == ["r01", "r03"]
    for flags in (["--runs", "r99"], ["--space", "nosuch"]):
        assert run.main(["--show", *flags]) == 2
        assert flags[1] in capsys.readouterr().err


def test_a_mistake_is_found_without_torch_and_ray() -> None:
    refused, modules = call("--runs", "r99", "--data", "streets", "--epochs", "0")
    assert refused.returncode == 2
    assert not {"torch", "ray"} & modules


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_first_search_of_a_newcomer_ends_well_as_a_proxy(place: Path) -> None:
    """It trains the smoke space on the built-in streets, which need no download."""
    storage = place / "results"
    flags = ["--space", "smoke", "--image-size", "32x64", "--epochs", "1", "--storage", str(storage)]
    with Driver(place, *flags) as driver:
        assert driver.end() == 0
        log = driver.log
    (folder,) = (path for path in storage.iterdir() if path.is_dir())
    assert folder.name.startswith("smoke-20"), "named by the space and the time"
    board = leaderboard(folder)
    assert [(row["run"], row["status"], row["epochs"]) for row in board] == [(row, "finished", "1") for row in "abc"]
    assert [epoch_numbers(folder / name) for name in "abc"] == [[1]] * 3
    assert board[0]["gain_over_a"] == ""
    gain = float(board[1]["best_miou"]) - float(board[0]["best_miou"])
    assert float(board[1]["gain_over_a"]) == pytest.approx(gain, abs=0.011)
    for text in (
        log,
        (folder / "leaderboard.md").read_text(),
        json.loads((folder / "search.json").read_text())["proxy"],
    ):
        assert "Proxy:" in text
    for words in ("96 training and 24 validation images", f"--logdir {folder}", f"--resume --name {folder.name}"):
        assert words in log
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.ray
def test_more_than_the_machine_has_is_refused_before_anything_is_trained(place: Path) -> None:
    write_space(place / "space.py", {"a": 0.01}, num_epochs=1)
    flags = [*on_frames(place), "--image-size", "32x64", "--name", "x", "--cpus-per-trial", "9999"]
    command = [sys.executable, "-m", "tune_bisenet.run", *flags]
    env = environment(place)
    refused = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert refused.returncode == 2
    assert "--cpus-per-trial" in refused.stderr
    assert re.search(r"9999 CPUs and [01] GPUs; Ray has [1-9]\d* and \d", refused.stderr)
    assert not (place / "x" / "search.json").exists()
