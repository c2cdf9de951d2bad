"""Whole searches whose data and results lie in object storage: moto's S3 server, real Ray, real training.

The server dies and comes back, the driver is killed, and another machine goes on; the results are those of a search
on this machine's disk that nothing happened to.
"""

import shutil
import signal
import time
from pathlib import Path

import pytest
from driving import PROJECT, Driver, end_process, make_place
from object_store import (
    KEY_ID,
    SECRET,
    ObjectStore,
    StoredSearch,
    assert_no_secret,
    assert_reported_from,
    leaderboard_here,
    make_store,
)

from tune_bisenet.search.resources import RESTARTABLE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(1200)]

NUM_EPOCHS = 6
OUTAGE_SECONDS = 15

place = pytest.fixture(scope="module")(make_place)


store = pytest.fixture(scope="module")(make_store)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[dict[str, str]]:
    return leaderboard_here(place, num_epochs=NUM_EPOCHS)


class Search(StoredSearch):
    """One that is started from here."""

    def start(self, **variables: str) -> Driver:
        return Driver(self.place, *self.flags, variables=variables)

    def resume(self, *, cwd: Path = PROJECT, **variables: str) -> Driver:
        """As on a machine whose environment names the server."""
        there = {"AWS_ENDPOINT_URL": self.store.endpoint, "AWS_DEFAULT_REGION": "us-east-1"} | variables
        flags = ["--resume", "--name", self.name, "--storage", "s3://bucket/searches"]
        return Driver(self.place, *flags, cwd=cwd, variables=there)

    @property
    def is_unfinished(self) -> bool:
        return self.num_epochs < NUM_EPOCHS * len(self.trials)


def test_a_search_outlives_its_server_and_its_driver_and_goes_on_elsewhere(
    place: Path, store: ObjectStore, undisturbed: list[dict[str, str]]
) -> None:
    search = Search(place, store, "moved")
    with search.start() as driver:
        driver.until(search.has_done(2))
        trainers, said_before = driver.trainers(), len(driver.log)
        store.go_away()
        time.sleep(OUTAGE_SECONDS)
        assert driver.process.poll() is None
        told = driver.log[said_before:].count("s3://bucket cannot be")
        assert 1 <= told <= 2, "once when it was written, once when it was read"
        store.come_back()
        assert search.is_unfinished
        driver.until(search.has_done(search.num_epochs + 2))
        assert driver.trainers() == trainers
        assert "s3://bucket answers again after" in driver.log
        end_process(driver.process.pid, signal.SIGKILL)
    before = search.num_epochs
    assert search.is_unfinished, "it was killed in the midst"
    assert [search.attempts(trial) for trial in search.trials] == [1, 1], "the trials went on, and were not begun again"

    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(place / "cache")
    there = {"HOME": str(elsewhere), "TUNE_BISENET_CACHE": str(elsewhere / "cache")}
    with search.resume(cwd=elsewhere, TUNE_BISENET_PATIENCE="3", **there) as driver:
        driver.until(search.has_done(before + 1))
        store.go_away()  # for longer than this driver waits
        code = driver.end()
        store.come_back()
        assert code == RESTARTABLE
        assert "s3://bucket could not be" in driver.log
        assert "run the same command again with --resume" in driver.log
        assert "packing frames" not in driver.log, "they were fetched"
    assert search.is_unfinished
    with search.resume(cwd=elsewhere, **there) as driver:
        assert driver.end() == 0
    assert search.results() == undisturbed
    assert [search.epochs(trial) for trial in search.trials] == [list(range(1, NUM_EPOCHS + 1))] * 2
    assert len(list((elsewhere / "cache").glob("*/train.arrow"))) == 1
    assert_reported_from(search, elsewhere, **there)
    assert_no_secret(store, place)


def test_what_is_wrong_with_storage_is_told_before_anything_is_written(
    place: Path, store: ObjectStore, undisturbed: list[dict[str, str]]
) -> None:
    before = store.listed()
    assert undisturbed, "there is a space"
    flags = ["--space", str(place / "space.py"), "--backbone", "none", "--name", "wrong"]
    data, nobucket = store.uri("data/cityscapes"), store.uri("x", bucket="nobucket")
    with_key = store.uri("searches").replace("s3://", f"s3://{KEY_ID}:{SECRET}@")
    cases = [
        (["--data", data, "--storage", nobucket], ["--storage", "Check the bucket's name"]),
        (["--data", nobucket, "--storage", with_key], ["--data s3://nobucket", "holds a key or a password"]),
    ]
    for where, said in cases:
        with Driver(place, *flags, *where) as driver:
            assert driver.end() == 2
            assert all(words in driver.log for words in [*said, "Nothing was started"])
            assert SECRET not in driver.log
    assert store.listed() == before
    assert not (place / "wrong").exists()
