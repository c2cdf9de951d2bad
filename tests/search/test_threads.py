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
    """Return the folder of a search that trained r01 on all cores, then r05 on one, then both with another seed."""
    flags = ["--space", "runs10", "--proxy", "--epochs", "4", "--data", str(place / "frames"), "--backbone", "none"]
    for session in (
        ["--runs", "r01", *flags],
        ["--add", "--runs", "r05", "--cpus-per-trial", "1"],
        ["--add", "--runs", "r01,r05", "--seeds", "1"],
    ):
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
    first, second, _third = json.loads((search / "search.json").read_text())["sessions"]
    assert (first["cpus_per_trial"], second["cpus_per_trial"]) == (os.cpu_count(), 1)
    assert first["threads_per_trial"] == second["threads_per_trial"] == os.cpu_count()
    assert environment_of(search / "r05") == environment_of(search / "r01")


def test_rows_that_train_side_by_side_train_what_they_have_in_common_once(search: Path) -> None:
    records = {name: json.loads((search / name / "trial.json").read_text()) for name in ("r01-s1", "r05-s1", "r05")}
    assert records["r05-s1"]["beginning"] == {"trial": "r01-s1", "epochs": SWITCH}
    assert records["r05-s1"]["epochs"][:SWITCH] == records["r01-s1"]["epochs"][:SWITCH]
    assert (
        records["r05-s1"]["state"]["seconds"]
        == records["r05-s1"]["epochs"][SWITCH]["train_seconds"] + (records["r05-s1"]["epochs"][SWITCH]["val_seconds"])
    )
    assert records["r05"]["beginning"] is None, "r01 had ended before r05 was added"
    assert not (search / "beginnings").exists()
    assert "took over epochs 1 to 3 of r01 (seed 1)" in (search / "report.md").read_text()


def environment_of(trial: Path) -> dict[str, Any]:
    """Return the only environment of a trial."""
    (environment,) = json.loads((trial / "trial.json").read_text())["environments"]
    return environment
