"""A search has one driver: a second one is told who that is, wherever results are, and disturbs nothing.

Leases in object storage, which end, are lost and are taken over, are tried without a search in `search/test_state.py`.
"""

import json
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.faults import (
    MOMENTS,
    NUM_EPOCHS,
    assert_as_if_nothing_had_happened,
    epochs_done,
    has_done,
    record_figures,
    resume,
    start,
)
from helpers.object_store import ObjectStore, StoredSearch, leaderboard_here, make_store
from helpers.processes import TIMEOUT_SECONDS, Driver, end_process

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.faults, pytest.mark.timeout(2700)]

store = pytest.fixture(scope="module")(make_store)


@pytest.fixture(scope="module")
def undisturbed_pair(place: Path) -> Iterator[list[dict[str, str]]]:
    """The leaderboard of an undisturbed search of two rows, whose space replaces that of the three meanwhile."""
    space = place / "space.py"
    before = space.read_text() if space.exists() else ""
    yield leaderboard_here(place, num_epochs=NUM_EPOCHS)
    space.write_text(before)


def assert_refused(second: Driver, first: Driver) -> None:
    """Check that the second driver was told who runs the search, and left the first alone."""
    assert second.end() == 2
    told = rf"process (\d+) on {socket.gethostname()}, since 20\d\d-\d\d-\d\d \S+ UTC, is running the search"
    holder = re.search(told, second.log)
    assert holder, second.log
    assert int(holder[1]) in {process.pid for process in first.processes()}
    assert "Nothing was started." in second.log
    assert first.process.poll() is None


def wait_for_first_end(*drivers: Driver) -> list[int | None]:
    """Return the exit codes of drivers, None of one that runs, as soon as one has ended."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while set(codes := [driver.process.poll() for driver in drivers]) == {None}:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return codes


def test_of_two_drivers_one_runs_the_other_is_told_and_another_takes_over_when_it_was_killed(
    place: Path, folder: Path, undisturbed: list[dict[str, str]]
) -> None:
    recoveries = []
    with start(place, folder.name) as one, start(place, folder.name) as other:  # the same new search, twice at once
        codes = wait_for_first_end(one, other)
        assert [code for code in codes if code is not None] == [2], "one was refused, and the other goes on"
        refused, first = (one, other) if codes[0] == 2 else (other, one)
        assert re.search("is running the search|another driver has run|there is a search", refused.log), refused.log
        first.until(has_done(folder, 2))
        assert len(json.loads((folder / "search.json").read_text())["sessions"]) == 1
        with resume(folder) as second:
            assert_refused(second, first)
        end_process(first.process.pid, signal.SIGKILL)
        first.end()
        for _ in range(max(1, MOMENTS - 1)):
            time.sleep(random.SystemRandom().uniform(0, 1))
            before, began = epochs_done(folder), time.monotonic()
            with resume(folder) as driver:  # at once: orphans of the first may still train
                driver.until(has_done(folder, min(before + 1, 3 * NUM_EPOCHS)))
                recoveries.append(time.monotonic() - began)
                end_process(driver.process.pid, signal.SIGKILL)
    with resume(folder) as driver:
        assert driver.end() == 0
    assert_as_if_nothing_had_happened(folder, undisturbed)
    record_figures("two drivers on one disk", n=MOMENTS, worst_recovery_seconds=round(max(recoveries), 1))


@pytest.mark.cluster
def test_in_object_storage_a_second_driver_is_refused_and_one_whose_lease_was_taken_writes_nothing_more(
    place: Path, store: ObjectStore, undisturbed_pair: list[dict[str, str]]
) -> None:
    search = StoredSearch(place, store, "leased")
    again = ["--resume", "--name", search.name, "--storage", store.uri("searches")]
    lease = f"searches/.{search.name}.driver.json"
    with Driver(place, *search.flags) as first:
        first.until(search.has_done(2))
        with Driver(place, *again) as second:
            assert_refused(second, first)
        other = json.loads(store.read(lease) or b"") | {"host": "elsewhere", "machine": "another", "ended": True}
        store.write(lease, json.dumps(other).encode())  # another machine took it, and has ended since
        assert first.end(seconds=120) == 75
        assert "on elsewhere" in first.log
        assert "--resume" in first.log
        while first.trainers():  # they end with their driver
            time.sleep(0.1)
        before = {key: store.read(key) for key in store.listed(f"searches/{search.name}/")}
        time.sleep(2)
        assert {key: store.read(key) for key in store.listed(f"searches/{search.name}/")} == before
    with Driver(place, *again) as driver:
        assert driver.end() == 0
    assert search.results() == undisturbed_pair
