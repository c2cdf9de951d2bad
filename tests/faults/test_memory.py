"""Memory that runs out, by Ray's monitor or the kernel: it is told, fewer trials run at once, the search goes on."""

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults import assert_as_if_nothing_had_happened, epochs_done, has_done, record_figures, start
from helpers.searches import leaderboard

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2700)]

TWO_AT_ONCE = ("--max-concurrent", "2", "--cpus-per-trial", "1")


def used_share() -> float:
    """Return the share of this machine's memory that is in use."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    sizes = {name: int(size.split()[0]) for name, size in (line.split(":") for line in lines)}
    return 1 - sizes["MemAvailable"] / sizes["MemTotal"]


def assert_told(folder: Path, log: str) -> None:
    assert "1 trial at once until this session ends, not 2: out of memory" in log
    assert "Traceback" not in log
    (session,) = json.loads((folder / "search.json").read_text())["sessions"]
    assert session["trials_at_once"] == 1


def test_workers_that_ray_kills_in_training_go_on_one_at_a_time(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    threshold = used_share() + 0.3
    if threshold > 0.85:
        pytest.skip("too little memory is free to take a third of it")
    variables = {"RAY_memory_usage_threshold": f"{threshold:.2f}"}
    with start(place, folder.name, *TWO_AT_ONCE, variables=variables) as driver:
        driver.until(has_done(folder, 3))
        began = time.monotonic()
        held = []

        def memory_ran_out() -> bool:
            if used_share() < threshold + 0.05:
                held.append(bytearray(b"x") * 2**27)
            return "out of memory" in driver.log

        driver.until(memory_ran_out)
        held.clear()
        driver.until(has_done(folder, epochs_done(folder) + 1))
        seconds = time.monotonic() - began
        assert driver.end() == 0
    assert_told(folder, driver.log)
    assert_as_if_nothing_had_happened(folder, undisturbed)
    record_figures("Ray's memory monitor", n=1, worst_recovery_seconds=seconds)


def test_where_ray_kills_every_worker_as_it_begins_trials_fail_for_memory(place: Path, folder: Path) -> None:
    variables = {"RAY_memory_usage_threshold": "0.01"}
    with start(place, folder.name, "--runs", "a,b", *TWO_AT_ONCE, variables=variables) as driver:
        assert driver.end() == 1
    assert_told(folder, driver.log)
    for row in leaderboard(folder):
        assert row["status"] == "failed"
        assert row["error"].startswith("out of memory: ")
        assert "lower the batch size" in row["error"]


@pytest.fixture
def tight_group() -> Iterator[Path]:
    """A control group whose processes get no more memory than they have."""
    version_1 = Path("/sys/fs/cgroup/memory")
    group = (version_1 if version_1.is_dir() else version_1.parent) / f"tune-bisenet-{os.getpid()}"
    try:
        group.mkdir()
        (group / ("memory.limit_in_bytes" if version_1.is_dir() else "memory.max")).write_text(f"{2**24}")
    except OSError as error:
        pytest.skip(f"control groups cannot be made here: {error}")
    yield group
    deadline = time.monotonic() + 60
    while (group / "cgroup.procs").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    group.rmdir()


def test_a_worker_that_the_kernel_kills_for_memory_goes_on_without_a_neighbour(
    place: Path, folder: Path, undisturbed: list[dict[str, str]], tight_group: Path
) -> None:
    with start(place, folder.name, *TWO_AT_ONCE) as driver:
        driver.until(has_done(folder, 3))
        (tight_group / "cgroup.procs").write_text(f"{driver.trainers()[0]}")
        began = time.monotonic()
        driver.until(lambda: "the kernel has just killed a process" in driver.log)
        driver.until(has_done(folder, epochs_done(folder) + 1))
        seconds = time.monotonic() - began
        assert driver.end() == 0
    assert_told(folder, driver.log)
    assert_as_if_nothing_had_happened(folder, undisturbed)
    record_figures("the kernel's killer", n=1, worst_recovery_seconds=seconds)
