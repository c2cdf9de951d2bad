"""SIGINT and SIGTERM at any moment of a driver's life: it ends as documented, and what it leaves behind resumes."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.faults import (
    MOMENTS,
    TRIALS,
    assert_as_if_nothing_had_happened,
    epochs_done,
    has_done,
    record_figures,
    resume,
    start,
)
from helpers.processes import Driver, hears_signals

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]

STAGES = {
    "its start": lambda _driver, _folder, _before: True,
    "the start of Ray": lambda driver, _folder, _before: any(
        "gcs_server" in found.title for found in driver.processes()
    ),
    "the node's start": lambda driver, _folder, _before: any(found.is_raylet for found in driver.processes()),
    "the plan": lambda driver, _folder, _before: "\nsearch " in driver.log,
    "the workers' start": lambda driver, _folder, _before: bool(driver.trainers()),
    "training": lambda _driver, folder, before: has_done(folder, min(before + 4, 12 * len(TRIALS)))(),
    "the results": lambda driver, _folder, _before: "\nresults:" in driver.log,
}
"""What a moment follows: a driver at a folder in which so many epochs were done before."""


def signal_it(driver: Driver, number: int, *, group: bool, times: int) -> None:
    for _ in range(times):
        (os.killpg if group else os.kill)(driver.process.pid, number)


def has_ended(driver: Driver) -> bool:
    """Return whether the process has ended, without reaping it: signals still have somewhere to go."""
    return os.waitid(os.P_PID, driver.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def test_a_signal_at_any_moment_ends_a_driver_as_documented(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    chance = random.SystemRandom()
    worst_seconds = 0.0
    for number in [signal.SIGTERM, signal.SIGINT] * (MOMENTS // 2):
        stage, delay = chance.choice(list(STAGES)), chance.uniform(0, 1)
        group, times = chance.choice([False, True]), chance.choice([1, 2])
        # For whoever has to repeat it:
        print(f"{number.name}, {times} times, group: {group}, {delay:.3f} s after {stage}")  # noqa: T201
        is_new = not (folder / "search.json").exists()
        before = epochs_done(folder)
        with start(place, folder.name) if is_new else resume(folder) as driver:
            driver.until(lambda: hears_signals(driver.process.pid))
            while not has_ended(driver) and not STAGES[stage](driver, folder, before):
                time.sleep(0.02)
            time.sleep(delay)
            began = time.monotonic()
            signal_it(driver, number, group=group, times=times)
            code = driver.end(seconds=120)
            seconds = time.monotonic() - began
            driver.assert_nothing_lives_on()
            log = driver.log
        assert "Traceback" not in log
        if code == 0:
            assert "\nresults:" in log, "it had ended before the signal came"
            assert_as_if_nothing_had_happened(folder, undisturbed)
            shutil.rmtree(folder)  # a search that has ended would end at once at every other moment
            continue
        worst_seconds = max(worst_seconds, seconds)
        assert code == 128 + number
        (word,) = [line for line in log.splitlines() if line.startswith("interrupted. ")]
        can_resume = f"--resume --name {folder.name}" in word
        assert can_resume or not ("\nresume " in log or not is_new)
        assert not can_resume or (folder / "search.json").exists()
    with resume(folder) if (folder / "search.json").exists() else start(place, folder.name) as driver:
        assert driver.end() == 0
    assert_as_if_nothing_had_happened(folder, undisturbed)
    record_figures("a signal at any moment", n=MOMENTS, worst_seconds_to_the_end=round(worst_seconds, 1))
