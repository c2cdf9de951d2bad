"""Whole searches of a sampled space: real Ray, real training, a real study."""

import json
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from helpers.processes import PROJECT, Driver, end_process, environment
from helpers.searches import epoch_numbers, make_place, on_frames, results, statuses, write_sampled_space

from tune_bisenet.report.page import Report
from tune_bisenet.search.prepare import read_specs
from tune_bisenet.storage import Storage

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]

NUM_EPOCHS = 3
NUM_TRIALS = 6

place = pytest.fixture(scope="module")(make_place)


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """The folder of this test's search."""
    write_sampled_space(place / "space.py", num_epochs=NUM_EPOCHS)
    folder = place / "search"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def start(folder: Path, *flags: str, space: str = "space.py") -> Driver:
    return Driver(folder.parent, *on_frames(folder.parent, space), "--name", folder.name, *flags)


def resume(folder: Path, *flags: str) -> Driver:
    return Driver(folder.parent, "--storage", str(folder.parent), "--resume", "--name", folder.name, *flags)


def study_of(folder: Path) -> optuna.Study:
    return optuna.load_study(study_name=folder.name, storage=f"sqlite:///{folder / 'study.db'}")


def test_a_sampled_search_killed_three_times_equals_one_undisturbed(folder: Path) -> None:
    # One at a time: what the sampler draws depends on what it has heard, and so on the order of ends.
    flags = ("--trials", str(NUM_TRIALS), "--scheduler", "fifo", "--max-concurrent", "1", "--cpus-per-trial", "1")
    quiet = folder.with_name("undisturbed")
    with start(quiet, *flags) as driver:
        assert driver.end() == 0
    moments = [random.SystemRandom().uniform(0, 0.4) for _ in range(3)]
    print(f"killed {moments} s after a first, a third and a fifth trial had begun")  # noqa: T201
    with start(folder, *flags) as driver:
        driver.until(lambda: bool(epoch_numbers(folder / "a")))
        time.sleep(moments[0])
        end_process(driver.process.pid, signal.SIGKILL)
    for moment, trial in zip(moments[1:], ("t0002", "t0004"), strict=True):
        with resume(folder) as driver:
            driver.until(lambda trial=trial: bool(epoch_numbers(folder / trial)))
            time.sleep(moment)
            end_process(driver.process.pid, signal.SIGKILL)
    with resume(folder) as driver:
        assert driver.end() == 0
    assert results(folder) == results(quiet)
    studies = [study_of(folder), study_of(quiet)]
    names = [trial.user_attrs["trial"] for trial in studies[0].trials]
    assert names == ["a", "b", *(f"t{number:04d}" for number in range(2, NUM_TRIALS))]
    for killed, undisturbed in zip(studies[0].trials, studies[1].trials, strict=True):
        assert killed.state is optuna.trial.TrialState.COMPLETE
        assert killed.params == undisturbed.params
        assert killed.values == undisturbed.values
        assert killed.intermediate_values == undisturbed.intermediate_values
        assert len(killed.intermediate_values) == NUM_EPOCHS
        assert Path(killed.user_attrs["checkpoint"]).is_file()
    shutil.rmtree(quiet)


def test_a_search_goes_on_from_an_earlier_one_ends_at_its_limit_and_confirms_its_best(folder: Path) -> None:
    earlier = folder.with_name("earlier")
    with start(earlier, space="rows.py") as driver:
        assert driver.end() == 0
    flags = ("--warm-start", str(earlier), "--trials", "4", "--scheduler", "median")
    with start(folder, *flags) as driver:
        assert driver.end() == 0
        assert "2 trials of" in driver.log
        assert "ended: --trials 4 have been run" in driver.log
    assert set(statuses(folder)) == {"t0002", "t0003", "t0004", "t0005"}, "known rows are not run again"
    study = study_of(folder)
    for name, trial in zip("ab", study.trials, strict=False):
        assert trial.user_attrs["source"] == str(earlier / name)
        assert len(trial.intermediate_values) == NUM_EPOCHS
    shutil.rmtree(earlier)  # it has taught what it had to
    with resume(folder, "--trials", "5", "--confirm", "2") as driver:
        assert driver.end() == 0
    fresh = {name for name in statuses(folder) if "-s" in name}
    assert {name.rpartition("-s")[2] for name in fresh} == {"1", "2"}
    assert {"a-s1", "a-s2"} <= fresh, "the baseline, with the same fresh seeds"
    assert len(study_of(folder).trials) == 7, "fresh seeds are not told to the study"
    page = Path(Report.of(Storage.at(str(folder))).write(Storage.at(str(folder)))).read_text()
    assert "t0004" in page
    assert "fresh seed" in page


def test_a_time_budget_ends_a_search_cleanly_and_a_longer_one_goes_on(folder: Path) -> None:
    with start(folder, "--time-budget", "1s", "--trials", "3") as driver:
        assert driver.end() == 0
        assert "ended: --time-budget 1 s was used up" in driver.log
        driver.assert_nothing_lives_on()
    session, *_ = json.loads((folder / "search.json").read_text())["sessions"]
    assert session["limit"] == "--time-budget 1 s was used up"
    assert optuna.trial.TrialState.RUNNING not in {trial.state for trial in study_of(folder).trials}
    with resume(folder, "--time-budget", "1h") as driver:
        assert driver.end() == 0
    assert not {"waiting", "running"} & set(statuses(folder).values())
    assert len(statuses(folder)) == 3
    assert epoch_numbers(folder / "a") == [1, 2, 3]


def test_two_goals_vary_what_latency_depends_on(folder: Path) -> None:
    with start(folder, "--objectives", "miou,latency", "--sampler", "random", "--trials", "5") as driver:
        assert driver.end() == 0
    study = study_of(folder)
    assert study.directions == [optuna.study.StudyDirection.MAXIMIZE, optuna.study.StudyDirection.MINIMIZE]
    assert all(trial.values[1] > 0 for trial in study.trials)
    specs = read_specs(Storage.at(str(folder))).values()
    assert len({(spec.run.head_width, spec.run.image_size) for spec in specs}) > 1
    assert {name for spec in specs for name in spec.params} >= {"head_width", "input_scale"}
    page = Path(Report.of(Storage.at(str(folder))).write(Storage.at(str(folder)))).read_text()
    assert "Pareto" in page


def test_storage_may_have_any_name_and_the_printed_command_resumes_a_search_there(folder: Path) -> None:
    storage = folder.parent / "what? {now} $HOME 'n :car:"
    flags = [*on_frames(folder.parent)[:-1], str(storage), "--name", "odd", "--scheduler", "fifo", "--trials", "2"]
    with Driver(folder.parent, *flags) as driver:
        assert driver.end() == 0
        log = driver.log
    assert set(statuses(storage / "odd").values()) == {"finished"}
    assert [path for path in folder.parent.iterdir() if path.name.startswith("what")] == [storage]
    lines = {line.partition(" ")[0]: line.partition(" ")[2].strip() for line in log.splitlines() if " " in line}
    assert lines["results:"] == str(storage / "odd")
    assert shlex.split(lines["watch"]) == ["tensorboard", "--logdir", str(storage / "odd")]
    study = optuna.load_study(study_name="odd", storage=shlex.split(lines["study"])[1])
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 2
    command = lines["resume"].replace("python", shlex.quote(sys.executable), 1)
    env = environment(folder.parent) | {"PYTHONPATH": str(PROJECT)}
    again = subprocess.run(["bash", "-c", command], env=env, cwd=PROJECT, capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert "resumed: 2 of 2 trials had ended" in again.stdout


def test_a_space_that_fails_in_mid_search_is_told_and_the_search_continues_once_it_is_mended(folder: Path) -> None:
    space, is_broken = folder.with_name("space.py"), folder.with_name("is_broken")
    broken = f"    if __import__('os').path.exists({str(is_broken)!r}):\n        raise SystemExit\n"
    space.write_text(space.read_text().replace("def sample(trial):\n", f"def sample(trial):\n{broken}"))
    flags = ("--trials", "5", "--scheduler", "fifo", "--max-concurrent", "1", "--cpus-per-trial", "1")
    with start(folder, *flags) as driver:
        driver.until(lambda: bool(epoch_numbers(folder / "b")))
        is_broken.touch()
        assert driver.end() == 2
        driver.assert_nothing_lives_on()
        assert "space.py cannot be used" in driver.log
        assert f"continue: python -m tune_bisenet.run --resume --name {folder.name}" in driver.log
        assert "Traceback" not in driver.log
    is_broken.unlink()
    with resume(folder) as driver:
        assert driver.end() == 0
    assert set(statuses(folder).values()) == {"finished"}
    assert len(study_of(folder).trials) == 5
    space.unlink()
