"""Nodes that are taken away from a search, with and without notice: its results are those of one left in peace."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from clouds import Cloud
from helpers.processes import PROJECT, Driver, LoggedProcess, end_process, environment
from helpers.searches import epoch_numbers, epochs, on_frames, results, write_space
from nodes import Nodes

from tune_bisenet.search.failures import MAX_FAILURES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(2700)]

NUM_EPOCHS = 60
TRIALS = ("a", "b")
TOKEN = "0123456789abcdef" * 4


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    folder = place / "search"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(place / "ray", ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[dict[str, str]]:
    """Return the leaderboard of a search on one machine of its own."""
    write_space(place / "space.py", {"a": 0.01, "b": 0.001}, num_epochs=NUM_EPOCHS, baseline="a")
    with Driver(place, *flags(place, "undisturbed")) as driver:
        assert driver.end() == 0
    board = results(place / "undisturbed")
    assert [row["status"] for row in board] == ["finished"] * 2
    shutil.rmtree(place / "undisturbed")
    return board


def flags(place: Path, name: str, nodes: Nodes | None = None) -> list[str]:
    address = ["--address", nodes.address] if nodes else []
    return [*on_frames(place), "--scheduler", "fifo", "--cpus-per-trial", "1", "--name", name, *address]


def is_midway(folder: Path) -> bool:
    """Return whether every trial has a state to go back to, and epochs to go."""
    return all(2 <= len(epochs(folder / trial)) <= NUM_EPOCHS - 3 for trial in TRIALS)


def failures(folder: Path) -> list[str]:
    """Return Ray's own count at each time that a trial was put back."""
    logs = [path.read_text() for path in (folder.parent / "ray").rglob("driver_artifacts/*/error.txt")]
    return [line.split()[2] for text in logs for line in text.splitlines() if line.startswith("Failure #")]


def assert_undisturbed(folder: Path, undisturbed: list[dict[str, str]]) -> None:
    assert results(folder) == undisturbed
    for trial in TRIALS:
        assert epoch_numbers(folder / trial) == list(range(1, NUM_EPOCHS + 1))


def watcher(nodes: Nodes, cloud: Cloud, place: Path, *flags: str) -> LoggedProcess:
    command = [sys.executable, "-m", "tune_bisenet.cluster.daemons", "spot", "--cloud", "aws"]
    command += ["--metadata-url", cloud.url, "--poll-seconds", "0.2", "--address", nodes.address, *flags]
    return LoggedProcess(command, log=place / "watcher.log", env=environment(place) | nodes.variables)


def test_a_node_drained_at_its_notice_and_one_simply_gone_change_no_result(
    place: Path, folder: Path, undisturbed: list[dict[str, str]], cloud: Cloud
) -> None:
    # In a job of Ray's Jobs API that sets for its workers what we set for ours, on a cluster that asks for a token.
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}}})}
    with (
        Nodes(place, 0, 1, 1, token=TOKEN) as nodes,
        Driver(place, *flags(place, folder.name, nodes), variables=nodes.variables | job) as driver,
        watcher(nodes, cloud, place, "--node-id", nodes.ids[1]) as watching,
    ):
        driver.until(lambda: is_midway(folder))
        assert nodes.trainers(nodes.ids[1])
        cloud.takes_away(seconds=4)
        assert watching.end() == 0
        before = failures(folder)
        time.sleep(2)  # trials go on until the machine is really gone
        nodes.remove(nodes.ids[1])
        third = nodes.add(1)
        driver.until(lambda: bool(nodes.trainers(third)))
        drained = failures(folder)
        assert is_midway(folder)
        nodes.remove(nodes.ids[2])
        assert driver.end() == 0
    assert_undisturbed(folder, undisturbed)
    assert before == []
    assert drained == ["0"], "put back once, and not counted"
    assert sorted(failures(folder)) == ["0", "1"]


def test_a_node_that_is_shut_down_changes_no_result(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    with (
        Nodes(place, 0, 1, 1) as nodes,
        Driver(place, *flags(place, folder.name, nodes)) as driver,
    ):
        driver.until(lambda: is_midway(folder))
        assert nodes.trainers(nodes.ids[1])
        nodes.shut_down(nodes.ids[1])
        driver.until(lambda: not nodes.lives(nodes.ids[1]))
        third = nodes.add(1)
        driver.until(lambda: bool(nodes.trainers(third)))
        assert is_midway(folder)
        assert driver.end() == 0
    assert_undisturbed(folder, undisturbed)
    assert failures(folder) == ["1"], "counted once by Ray, and by us no more after the next epoch"


def test_a_watcher_without_a_node_id_drains_the_node_it_runs_on(place: Path, cloud: Cloud) -> None:
    with Nodes(place, 1, token=TOKEN) as nodes, watcher(nodes, cloud, place) as watching:
        cloud.takes_away(seconds=120)
        assert watching.end() == 0
        deadline = time.monotonic() + 250
        while nodes.lives(nodes.ids[0]):  # a drained node that has nothing to do leaves by itself
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_trial_may_be_lost_any_number_of_times_if_it_ends_an_epoch_between(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    num_kills = MAX_FAILURES + 1
    with Driver(place, *flags(place, folder.name), "--runs", "a") as driver:
        for count in range(1, num_kills + 1):
            driver.until(lambda count=count: len(epochs(folder / "a")) > count and bool(driver.trainers()))  # type: ignore[misc]
            for pid in driver.trainers():
                end_process(pid, signal.SIGTERM if count % 2 else signal.SIGKILL)
            driver.until(lambda count=count: len(failures(folder)) >= count)  # type: ignore[misc]
        assert driver.end() == 0
    assert best_of(results(folder)) == best_of(undisturbed)
    assert failures(folder)[-1] == str(num_kills)


def best_of(board: list[dict[str, str]], trial: str = "a") -> str:
    return next(row["best_miou"] for row in board if row["trial"] == trial)


PRINT_RETRY_SECONDS = """
import os, sys, ray
from tune_bisenet.search.resources import ray_session

@ray.remote(num_cpus=1)
def retry_seconds():
    return os.environ.get("TUNE_BISENET_RETRY_SECONDS")

with ray_session(sys.argv[1]):
    print(ray.get(retry_seconds.remote()))
"""


def test_other_nodes_get_the_retry_seconds_of_storage(place: Path) -> None:
    with Nodes(place, 0, 1) as nodes:
        for variables, printed in (({}, "None"), ({"TUNE_BISENET_RETRY_SECONDS": "7"}, "7")):
            command = [sys.executable, "-c", PRINT_RETRY_SECONDS, nodes.address]
            env = environment(place) | variables
            ran = subprocess.run(command, cwd=PROJECT, env=env, capture_output=True, text=True, check=True)
            assert ran.stdout.strip() == printed
