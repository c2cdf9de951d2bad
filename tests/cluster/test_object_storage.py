"""A search whose data and results are in object storage: moto's S3 server, real Ray, real training.

The server dies and comes back, the driver is killed, and the search is resumed elsewhere; its results are those of a
search on this machine's disk that was never disturbed.
"""

import shutil
import signal
import time
from pathlib import Path

import pytest
from helpers.object_store import (
    OUTAGES,
    ObjectStore,
    StoredSearch,
    assert_no_secret,
    assert_reported_from,
    leaderboard_here,
    make_store,
)
from helpers.processes import Driver, end_process

from tune_bisenet.search.resources import RESTARTABLE

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.cluster, pytest.mark.timeout(2700)]

NUM_EPOCHS = 10
ALL_EPOCHS = 2 * NUM_EPOCHS
OUTAGE_SECONDS = 15


store = pytest.fixture(scope="module")(make_store)


@pytest.fixture(scope="module")
def undisturbed(place: Path) -> list[dict[str, str]]:
    return leaderboard_here(place, num_epochs=NUM_EPOCHS)


def resume(search: StoredSearch, elsewhere: Path, **variables: str) -> Driver:
    """Resume on a machine that has another home and cache, and whose environment names the server."""
    variables |= {"HOME": str(elsewhere), "TUNE_BISENET_CACHE": str(elsewhere / "cache")}
    variables |= {"AWS_ENDPOINT_URL": search.store.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    flags = ["--resume", "--name", search.name, "--storage", "s3://bucket/searches"]
    return Driver(search.place, *flags, cwd=elsewhere, variables=variables)


def test_a_search_outlives_its_server_and_its_driver_and_is_resumed_elsewhere(
    place: Path, store: ObjectStore, undisturbed: list[dict[str, str]]
) -> None:
    search = StoredSearch(place, store, "moved")
    with Driver(place, *search.flags) as driver:
        driver.until(search.has_done(2))
        trainers = driver.trainers()
        for outage in OUTAGES:
            log_length = len(driver.log)
            store.go_away(outage)
            time.sleep(OUTAGE_SECONDS)
            assert driver.process.poll() is None
            num_reports = driver.log[log_length:].count("s3://bucket cannot be")
            assert 1 <= num_reports <= 2, "once when it was written, once when it was read"
            store.come_back()
            assert search.num_epochs < ALL_EPOCHS
            driver.until(search.has_done(search.num_epochs + 2))
            assert driver.trainers() == trainers
            assert "s3://bucket answers again after" in driver.log[log_length:]
        end_process(driver.process.pid, signal.SIGKILL)
    before = search.num_epochs
    assert search.num_epochs < ALL_EPOCHS, "it was killed in the middle"
    assert [search.attempts(trial) for trial in search.trials] == [1, 1], "no trial was started again"

    elsewhere = place / "elsewhere"
    elsewhere.mkdir()
    shutil.rmtree(place / "cache")
    with resume(search, elsewhere, TUNE_BISENET_RETRY_SECONDS="3") as driver:
        driver.until(search.has_done(before + 1))
        store.go_away()  # for longer than this driver waits
        code = driver.end()
        store.come_back()
        assert code == RESTARTABLE
        assert "s3://bucket could not be" in driver.log
        assert f"Nothing is lost. To continue: python -m tune_bisenet.run --resume --name {search.name}" in driver.log
        assert "packing frames" not in driver.log, "they were fetched"
    assert search.num_epochs < ALL_EPOCHS
    with resume(search, elsewhere) as driver:
        driver.until(search.has_done(search.num_epochs + 1))
        store.go_away("is silent")
        driver.until(lambda: "s3://bucket cannot be" in driver.log)
        end_process(driver.process.pid, signal.SIGTERM)
        code = driver.end(seconds=120)
        store.come_back()
        assert code == 128 + signal.SIGTERM
        assert "--resume" in driver.log
    assert search.num_epochs < ALL_EPOCHS
    with resume(search, elsewhere) as driver:
        assert driver.end() == 0
    assert search.results() == undisturbed
    assert [search.epochs(trial) for trial in search.trials] == [list(range(1, NUM_EPOCHS + 1))] * 2
    assert len(list((elsewhere / "cache").glob("*/train.arrow"))) == 1
    assert_reported_from(search, elsewhere, HOME=str(elsewhere))
    assert_no_secret(store, place)
