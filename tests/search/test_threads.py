"""A search that takes more trials later, on other resources: what is paired by seed still shares its noise."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import Driver
from helpers.searches import epochs, make_place

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2700)]

SWITCH = 3
"""The last epoch before r05's loss becomes Lovász; with four epochs it is the last but one."""

place = pytest.fixture(scope="module")(make_place)


@pytest.fixture(scope="module")
def search(place: Path) -> Path:
    """Return the folder of a search that trained r01 on all cores and then r05 on one."""
    flags = ["--space", "runs10", "--proxy", "--epochs", "4", "--data", str(place / "frames"), "--backbone", "none"]
    for session in (["--runs", "r01", *flags], ["--add", "--runs", "r05", "--cpus-per-trial", "1"]):
        with Driver(place, "--storage", str(place), "--name", "paired", *session) as driver:
            assert driver.end() == 0
    return place / "paired"


def test_a_row_added_on_fewer_cores_equals_its_reference_until_its_loss_switches(search: Path) -> None:
    r01, r05 = (
        [{name: value for name, value in epoch.items() if "second" not in name} for epoch in epochs(search / trial)]
        for trial in ("r01", "r05")
    )
    assert r05[:SWITCH] == r01[:SWITCH]
    assert r05[SWITCH] != r01[SWITCH]


def test_the_first_session_decides_the_threads(search: Path) -> None:
    first, second = json.loads((search / "search.json").read_text())["sessions"]
    assert (first["cpus_per_trial"], second["cpus_per_trial"]) == (os.cpu_count(), 1)
    assert first["threads_per_trial"] == second["threads_per_trial"] == os.cpu_count()
    assert environment_of(search / "r05") == environment_of(search / "r01")


def environment_of(trial: Path) -> dict[str, Any]:
    """Return the only environment of a trial."""
    (environment,) = json.loads((trial / "trial.json").read_text())["environments"]
    return environment
