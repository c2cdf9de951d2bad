"""Ray's own processes killed under a search: the driver ends soon, and tells how to resume."""

import signal
import time
from pathlib import Path

import pytest
from helpers.faults import assert_as_if_nothing_had_happened, epochs_done, has_done, record_figures, resume, start
from helpers.processes import end_process

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]


def test_when_raylet_or_gcs_dies_the_driver_ends_with_75_and_says_how_to_resume(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    worst_seconds = 0.0
    for victim in ("raylet/raylet", "gcs/gcs_server"):
        is_new = not folder.exists()
        with start(place, folder.name) if is_new else resume(folder) as driver:
            driver.until(has_done(folder, epochs_done(folder) + 3))
            began = time.monotonic()
            end_process(next(found.pid for found in driver.processes() if f"{victim} " in found.title), signal.SIGKILL)
            assert driver.end(seconds=180) == 75, victim
            worst_seconds = max(worst_seconds, time.monotonic() - began)
            driver.assert_nothing_lives_on()
            assert f"--resume --name {folder.name}" in driver.log.splitlines()[-1]
    with resume(folder) as driver:
        assert driver.end() == 0
    assert_as_if_nothing_had_happened(folder, undisturbed)
    record_figures("raylet or GCS killed", n=2, worst_seconds_to_the_end=round(worst_seconds, 1))
