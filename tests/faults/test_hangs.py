"""A trial's process that is stopped: it is noticed, told and replaced, and no result changes."""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.faults import MOMENTS, assert_as_if_nothing_had_happened, has_done, record_figures, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2700)]

STALL_SECONDS = 45
"""Long for an epoch even on a busy machine: undisturbed, one takes a second."""


def test_a_stopped_worker_is_replaced_and_changes_no_result(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    recoveries = []
    for _ in range(max(1, MOMENTS // 5)):  # each takes as long as it takes to notice
        moment = random.SystemRandom().uniform(0, 1)
        print(f"a worker is stopped {moment:.3f} s after the third epoch")  # noqa: T201 - for whoever has to repeat it
        with start(place, folder.name, "--stall-timeout", f"{STALL_SECONDS}s") as driver:
            driver.until(has_done(folder, 3))
            time.sleep(moment)
            os.kill(driver.trainers()[0], signal.SIGSTOP)
            began = time.monotonic()
            driver.until(lambda log=driver: "lost its process (stalled: " in log.log)
            recoveries.append(time.monotonic() - began)
            assert driver.end() == 0
        assert "and its process did not answer" in driver.log
        assert driver.log.count("has stalled: ") == driver.log.count("lost its process (") == 1, "it counts once"
        assert_as_if_nothing_had_happened(folder, undisturbed)
        shutil.rmtree(folder)
    record_figures("stopped worker", n=len(recoveries), worst_recovery_seconds=max(recoveries))
