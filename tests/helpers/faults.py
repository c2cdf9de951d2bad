"""Searches of three rows that faults are injected into, and what they cost.

However such a search was disturbed, it ends with what an undisturbed one gives; CPU arithmetic makes that exact.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

from helpers.processes import Driver
from helpers.searches import epoch_numbers, epochs, on_frames, results, write_space

NUM_EPOCHS = 12
TRIALS = ("a", "b", "c")

MOMENTS = int(os.environ.get("TUNE_BISENET_FAULT_MOMENTS", "2"))
"""How many random moments a fault is tried at, where the moment matters: `make faults` tries 20."""


def write_three_rows(place: Path) -> None:
    """Write space.py in `place`: rows a, b and c, each of `NUM_EPOCHS` epochs."""
    write_space(place / "space.py", {"a": 0.01, "b": 0.001, "c": 0.05}, num_epochs=NUM_EPOCHS, baseline="a")


def start(
    place: Path, name: str, *flags: str, scheduler: str = "fifo", variables: dict[str, str] | None = None
) -> Driver:
    """Start the search of the three rows under `name`."""
    return Driver(place, *on_frames(place), "--scheduler", scheduler, "--name", name, *flags, variables=variables)


def resume(folder: Path, *flags: str, variables: dict[str, str] | None = None) -> Driver:
    """Resume the search in `folder`."""
    where = ["--storage", str(folder.parent), "--resume", "--name", folder.name]
    return Driver(folder.parent, *where, *flags, variables=variables)


def epochs_done(folder: Path) -> int:
    return sum(len(epochs(folder / trial)) for trial in TRIALS)


def has_done(folder: Path, count: int) -> Callable[[], bool]:
    """Whether that many epochs, of all trials together, are safe on storage."""
    return lambda: epochs_done(folder) >= count


def is_midway(folder: Path) -> Callable[[], bool]:
    """Whether a trial has an older state to fall back on, and far enough to go not to end in the next second."""
    return lambda: any(3 <= len(epochs(folder / trial)) <= NUM_EPOCHS - 4 for trial in TRIALS)


def assert_as_if_nothing_had_happened(folder: Path, undisturbed: list[dict[str, str]]) -> None:
    assert results(folder) == undisturbed
    for trial in TRIALS:
        assert epoch_numbers(folder / trial) == list(range(1, NUM_EPOCHS + 1))
    assert set(json.loads((folder / "search.json").read_text())["trials"]) == set(TRIALS)


def record_figures(fault: str, **figures: float | int | str) -> None:
    """Append what a fault cost to the file that TUNE_BISENET_FAULT_FIGURES names, if any: `make faults` shows it.

    Usual figures: `n` moments, `worst_recovery_seconds`, `epochs_repeated`.
    """
    if path := os.environ.get("TUNE_BISENET_FAULT_FIGURES"):
        with Path(path).open("a") as file:
            file.write(json.dumps({"fault": fault, **figures}) + "\n")
