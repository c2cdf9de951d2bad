"""Machines that are taken away from a search, with and without notice: its results are those of one left in peace."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import clouds
import pytest
from clouds import Cloud
from driving import (
    PROJECT,
    Driver,
    end_process,
    environment,
    epoch_numbers,
    epochs,
    make_place,
    on_frames,
    results,
    write_space,
)
from nodes import UNSHARED, Joined, Nodes, reason_not_to_unshare

from tune_bisenet.search.tuner import MAX_FAILURES

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1200)]

NUM_EPOCHS = 60
TRIALS = ("a", "b")
TOKEN = "0123456789abcdef" * 4

place = pytest.fixture(scope="module")(make_place)
cloud = pytest.fixture(clouds.serve)


@pytest.fixture
def folder(place: Path) -> Iterator[Path]:
    """The folder of this test's search."""
    folder = place / "search"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(place / "ray", ignore_errors=True)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[dict[str, str]]:
    """The leaderboard of a search on one machine of its own."""
    write_space(place / "space.py", {"a": 0.01, "b": 0.001}, num_epochs=NUM_EPOCHS, baseline="a")
    with Driver(place, *flags(place, "undisturbed")) as driver:
        assert driver.end() == 0
    board = results(place / "undisturbed")
    assert [row["status"] for row in board] == ["finished"] * 2
    shutil.rmtree(place / "undisturbed")
    return board


def flags(place: Path, name: str, *more: str) -> list[str]:
    return [*on_frames(place), "--scheduler", "fifo", "--cpus-per-trial", "1", "--name", name, *more]


def is_midway(folder: Path) -> bool:
    """Whether every trial has a state to go back to, and epochs to go."""
    return all(2 <= len(epochs(folder / trial)) <= NUM_EPOCHS - 3 for trial in TRIALS)


def failures(folder: Path) -> list[str]:
    """Ray's own count at each time that a trial was put back."""
    logs = [path.read_text() for path in (folder.parent / "ray").rglob("driver_artifacts/*/error.txt")]
    return [line.split()[2] for text in logs for line in text.splitlines() if line.startswith("Failure #")]


def watcher(nodes: Nodes, cloud: Cloud, place: Path, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "tune_bisenet.spot", "--cloud", "aws", "--metadata-url", cloud.url]
    return subprocess.Popen(
        [*command, "--poll-seconds", "0.2", "--address", nodes.address, *flags],
        cwd=PROJECT,
        env=environment(place) | nodes.variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_node_drained_at_its_notice_and_one_simply_gone_change_no_result(
    place: Path, folder: Path, undisturbed: list[dict[str, str]], cloud: Cloud
) -> None:
    # In a job of Ray's Jobs API that sets for its workers what we set for ours, on a cluster that asks for a token.
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": json.dumps({"runtime_env": {"env_vars": {"RAY_CHDIR_TO_TRIAL_DIR": "0"}}})}
    with (
        Nodes(place, 0, 1, 1, token=TOKEN) as nodes,
        Driver(
            place, *flags(place, folder.name, "--address", nodes.address), variables=nodes.variables | job
        ) as driver,
        watcher(nodes, cloud, place, "--node-id", nodes.ids[1]) as watching,
    ):
        driver.until(lambda: is_midway(folder))
        assert nodes.trainers(nodes.ids[1])
        cloud.takes_away(seconds=4)
        _, said = watching.communicate(timeout=250)
        assert watching.returncode == 0, said
        assert "AWS will terminate this machine" in said
        before = failures(folder)
        time.sleep(2)  # trials go on until the machine is really gone
        nodes.remove(nodes.ids[1])
        third = nodes.add(1)
        driver.until(lambda: bool(nodes.trainers(third)))
        drained = failures(folder)
        assert is_midway(folder)
        nodes.remove(nodes.ids[2])
        assert driver.end() == 0
    assert results(folder) == undisturbed
    for trial in TRIALS:
        assert epoch_numbers(folder / trial) == list(range(1, NUM_EPOCHS + 1))
    assert before == []
    assert drained == ["0"], "put back once, and not counted"
    assert sorted(failures(folder)) == ["0", "1"]


def test_a_node_that_is_shut_down_changes_no_result(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    with (
        Nodes(place, 0, 1, 1) as nodes,
        Driver(place, *flags(place, folder.name, "--address", nodes.address)) as driver,
    ):
        driver.until(lambda: is_midway(folder))
        assert nodes.trainers(nodes.ids[1])
        nodes.shut_down(nodes.ids[1])
        driver.until(lambda: not nodes.lives(nodes.ids[1]))
        third = nodes.add(1)
        driver.until(lambda: bool(nodes.trainers(third)))
        assert is_midway(folder)
        assert driver.end() == 0
    assert results(folder) == undisturbed
    for trial in TRIALS:
        assert epoch_numbers(folder / trial) == list(range(1, NUM_EPOCHS + 1))
    assert failures(folder) == ["1"], "counted once by Ray, and by us no more after the next epoch"


def test_a_watcher_that_is_told_no_node_drains_the_one_it_runs_on(place: Path, cloud: Cloud) -> None:
    with Nodes(place, 1, token=TOKEN) as nodes, watcher(nodes, cloud, place) as watching:
        cloud.takes_away(seconds=120)
        _, said = watching.communicate(timeout=250)
        assert watching.returncode == 0, said
        deadline = time.monotonic() + 250
        while nodes.lives(nodes.ids[0]):  # a drained node that has nothing to do leaves by itself
            assert time.monotonic() < deadline
            time.sleep(0.1)


def test_a_trial_may_be_lost_any_number_of_times_if_it_gets_on_between(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    num_kills = MAX_FAILURES + 1
    with Driver(place, *flags(place, folder.name, "--runs", "a")) as driver:
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


REASON = reason_not_to_unshare(*UNSHARED)


@pytest.mark.skipif(bool(REASON), reason=REASON)
def test_a_node_that_does_not_see_the_storage_is_told_of_before_any_trial(place: Path) -> None:
    write_space(place / "short.py", {"a": 0.01, "b": 0.001}, num_epochs=1)
    shared, searched = place / "shared", [*on_frames(place, "short.py"), "--storage", str(place / "shared")]
    shared.mkdir()
    with Nodes(place, 0, 1) as nodes:
        words = [*searched, "--name", "search", "--address", nodes.address]
        with Joined(place, nodes.address, lacks=shared) as blind:
            blind.until(lambda: blind.is_there)
            with Driver(place, *words) as driver:
                assert driver.end() == 2
            assert f"1 of the cluster's 2 nodes do not see {shared}" in driver.log
            assert "--storage must be a URI, such as s3://bucket/searches, or a path that all of them" in driver.log
            assert "Nothing was started." in driver.log
            assert [path.name for path in shared.iterdir()] == [".search.lock"]
        with Joined(place, nodes.address) as seeing:  # the other is gone, though Ray may not know it yet
            seeing.until(lambda: seeing.is_there)
            with Driver(place, *words) as driver:
                assert driver.end() == 0
    assert {row["status"] for row in results(shared / "search")} == {"finished"}


def test_a_trial_on_a_machine_that_does_not_see_the_search_says_so(tmp_path: Path) -> None:
    from tune_bisenet.search import trainable

    with pytest.raises(ValueError, match="--storage must be a URI"):
        trainable.train_trial({}, job={"storage": str(tmp_path / "on another machine")})
    assert not list(tmp_path.iterdir())


PATIENT = """
import os, sys, ray
from tune_bisenet.ray_session import ray_session

@ray.remote(num_cpus=1)
def patience():
    return os.environ.get("TUNE_BISENET_PATIENCE")

with ray_session(sys.argv[1]):
    print(ray.get(patience.remote()))
"""


def test_how_long_storage_is_waited_for_is_said_to_other_machines_too(place: Path) -> None:
    with Nodes(place, 0, 1) as nodes:
        for variables, told in (({}, "None"), ({"TUNE_BISENET_PATIENCE": "7"}, "7")):
            ran = subprocess.run(
                [sys.executable, "-c", PATIENT, nodes.address],
                cwd=PROJECT,
                env=environment(place) | variables,
                capture_output=True,
                text=True,
                check=True,
            )
            assert ran.stdout.strip() == told
