"""The command line: what it prints without waiting, and the first search that a newcomer starts."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.processes import PROJECT, Driver, LoggedProcess, end_process, environment
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


def test_a_driver_starts_without_torch() -> None:
    code = "import sys, tune_bisenet.search.driver; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=PROJECT, check=True)


def test_a_mistake_is_found_without_torch_and_ray() -> None:
    refused, modules = call("--runs", "r99", "--data", "streets", "--epochs", "0")
    assert refused.returncode == 2
    assert not {"torch", "ray"} & modules


def test_too_few_open_files_for_ray_are_refused_before_frames_are_packed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tune_bisenet.run", "--space", "smoke", "--storage", str(tmp_path / "results")]
    limited = ["sh", "-c", 'ulimit -n 64; exec "$@"', "sh", *command]
    env = environment(tmp_path) | {"PYTHONPATH": str(PROJECT)}
    refused = subprocess.run(limited, cwd=PROJECT, env=env, capture_output=True, text=True, check=False, timeout=280)
    assert refused.returncode == 2
    assert re.search(r"may open 64 files .* at least 256\. Start this from a shell with a higher limit", refused.stderr)
    assert "Nothing was started." in refused.stderr
    assert not (tmp_path / "cache").exists()


# --- how a driver ends ------------------------------------------------------------------------------------------------

RESUME = "python -m tune_bisenet.run --resume --name x"

ENDS = {
    "it has told how it ended": ("return 1", 1, r""),
    "wrong input": ("raise SystemExit(2)", 2, r""),
    "an error before the search": ("raise KeyError('oops')", 70, r"KeyError: 'oops'\n.* report .* The same command .*"),
    "an error after": ("on_begin(RESUME); raise KeyError('oops')", 70, rf"KeyError: 'oops'\n.* report .*: {RESUME}"),
    "a space that exits": (
        "os._exit(0)",
        70,
        r"The driver ended itself without a word, .* code of the space.* The same command .*",
    ),
    "a recursion without an end": (
        "on_begin(RESUME); signal.raise_signal(signal.SIGSEGV)",
        70,
        rf"The driver was killed by SIGSEGV, .* code of the space.*: {RESUME}",
    ),
    "from C": ("on_begin(RESUME); os._exit(1)", 75, rf".* ended with code 1, without a word.*: {RESUME}"),
    "Ray's own exit at a signal": ("on_begin(RESUME); sys.exit(15)", 75, rf".* ended with code 15.*: {RESUME}"),
    "to be run again": ("on_begin(RESUME); print('away'); os._exit(75)", 75, rf"Nothing is lost. .*: {RESUME}"),
    "an abort": ("on_begin(RESUME); os.abort()", 75, rf".* was killed by SIGABRT.*: {RESUME}"),
    "killed": ("os.kill(os.getpid(), signal.SIGKILL)", 75, r".* was killed by SIGKILL.* The same command .*"),
    "a signal to it alone": (
        "on_begin(RESUME); os.kill(os.getpid(), signal.SIGTERM)",
        143,
        rf"interrupted\. .*: {RESUME}",
    ),
}


def supervised(place: Path, driver: str) -> LoggedProcess:
    """Start a supervisor of a driver that does this and nothing else."""
    code = f"""
import os, signal, subprocess, sys, time
from tune_bisenet import run

RESUME = {RESUME!r}

def main(*, on_begin):
    {driver}

run.main = main
run.GRACE_SECONDS = 3
sys.exit(run.supervise())
"""
    return LoggedProcess([sys.executable, "-c", code], log=place / "log", env=environment(place))


@pytest.mark.parametrize(("driver", "code", "told"), ENDS.values(), ids=ENDS)
def test_whatever_ends_a_driver_its_code_is_documented_and_it_says_how_to_resume(
    tmp_path: Path, driver: str, code: int, told: str
) -> None:
    with supervised(tmp_path, driver) as process:
        assert process.end() == code
        assert re.search(rf"^{told}$", process.log.removesuffix("\n"), re.MULTILINE), process.log
        assert process.log.count("Traceback") == (code == 70 and "KeyError" in driver)


STUBBORN = "signal.signal(signal.SIGTERM, signal.SIG_IGN); on_begin(RESUME); print('here', flush=True); time.sleep(600)"


@pytest.mark.parametrize("times", [1, 2])
def test_a_driver_that_heeds_no_signal_is_killed_with_all_that_it_has_started(tmp_path: Path, times: int) -> None:
    with supervised(tmp_path, f"subprocess.Popen(['sleep', '600']); {STUBBORN}") as process:
        process.until(lambda: "here" in process.log)
        for _ in range(times):
            end_process(process.process.pid, signal.SIGTERM)
            time.sleep(1.5)  # twice at once is one request
        assert process.end() == 143
        process.assert_nothing_lives_on()
        assert process.log.splitlines() == ["here", f"interrupted. Nothing is lost. To continue: {RESUME}"]


def test_a_driver_does_not_outlive_its_supervisor(tmp_path: Path) -> None:
    with supervised(tmp_path, STUBBORN) as process:
        process.until(lambda: "here" in process.log)
        end_process(process.process.pid, signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
        process.assert_nothing_lives_on()


def test_ctrl_z_stops_the_driver_too_and_fg_continues_it(tmp_path: Path) -> None:
    def states() -> set[str]:
        """Return the states of both processes, as ps shows them."""
        stats = [Path(f"/proc/{found.pid}/stat").read_text() for found in process.processes()]
        return {stat.rpartition(")")[2].split()[0] for stat in stats}

    with supervised(tmp_path, "print('here', flush=True); time.sleep(3); return 0") as process:
        process.until(lambda: "here" in process.log)
        end_process(process.process.pid, signal.SIGTSTP)
        process.until(lambda: states() == {"T"})
        end_process(process.process.pid, signal.SIGCONT)
        assert process.end() == 0


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
