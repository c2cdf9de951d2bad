"""Whole searches whose data and results lie in object storage: moto's S3 server, real Ray, real training.

The server dies and comes back, the driver is killed, and another machine goes on; the results are those of a search
on this machine's disk that nothing happened to.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from driving import PROJECT, Driver, end_process, environment, make_place, on_frames, results, write_space
from object_store import KEY_ID, SECRET, ObjectStore, object_store

from tune_bisenet.ledger import LEADERBOARD_CSV

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(300)]

NUM_EPOCHS = 5
TRIALS = ("a", "b")
OUTAGE_SECONDS = 15

place = pytest.fixture(scope="module")(make_place)


@pytest.fixture(scope="module")
def store(place: Path) -> Iterator[ObjectStore]:
    with object_store() as store:
        store.upload(place / "frames", "data/cityscapes")
        yield store


@pytest.fixture(scope="module")
def elsewhere(place: Path) -> Path:
    """Another machine's home, with nothing in it."""
    (place / "elsewhere").mkdir()
    return place / "elsewhere"


def board(store: ObjectStore, name: str, place: Path) -> list[dict[str, str]]:
    """The leaderboard in the bucket, as `results` has that of a folder."""
    content = store.read(f"searches/{name}/{LEADERBOARD_CSV}")
    copy = place / "board"
    copy.mkdir(exist_ok=True)
    (copy / LEADERBOARD_CSV).write_bytes(content or b"")
    return results(copy)


def epochs(store: ObjectStore, trial: str) -> list[int]:
    return [epoch["epoch"] for epoch in json.loads(store.read(f"searches/s/{trial}/epochs.json") or b"[]")]


def num_epochs(store: ObjectStore) -> int:
    return sum(len(epochs(store, trial)) for trial in TRIALS)


def now_and_then(condition: Callable[[], bool]) -> Callable[[], bool]:
    """The server runs in this process: it is not to be asked without a pause."""

    def ask() -> bool:
        time.sleep(0.2)
        return condition()

    return ask


def test_a_search_outlives_its_storage_and_its_driver_and_goes_on_elsewhere(
    place: Path, store: ObjectStore, elsewhere: Path
) -> None:
    write_space(place / "space.py", {"a": 0.01, "b": 0.05}, num_epochs=NUM_EPOCHS, baseline="a")
    with Driver(place, *on_frames(place), "--scheduler", "fifo", "--name", "local") as driver:
        assert driver.end() == 0
    undisturbed = results(place / "local")
    assert [row["status"] for row in undisturbed] == ["finished"] * 2
    shutil.rmtree(place / "local")

    flags = ["--space", str(place / "space.py"), "--backbone", "none", "--scheduler", "fifo", "--name", "s"]
    in_bucket = ["--data", store.uri("data/cityscapes"), "--storage", store.uri("searches")]
    with Driver(place, *flags, *in_bucket) as driver:
        driver.until(now_and_then(lambda: num_epochs(store) >= 2))
        store.go_away()
        trainers = driver.trainers()
        time.sleep(OUTAGE_SECONDS)
        assert driver.process.poll() is None
        assert driver.trainers() == trainers
        store.come_back()
        before = num_epochs(store)
        assert before < NUM_EPOCHS * len(TRIALS)
        driver.until(now_and_then(lambda: num_epochs(store) >= before + 2))
        assert driver.log.count("s3://bucket cannot be") in (1, 2)
        assert "s3://bucket answers again after" in driver.log
        assert driver.trainers() == trainers, "the trials went on, and were not begun again"
        end_process(driver.process.pid, signal.SIGKILL)
    assert num_epochs(store) < NUM_EPOCHS * len(TRIALS), "it was killed in the midst"
    for trial in TRIALS:
        events = [key for key in store.listed(f"searches/s/{trial}/") if "tfevents" in key]
        assert len(events) == 1, "one attempt, one file"

    shutil.rmtree(place / "cache")
    store.requests.clear()
    there = {"HOME": str(elsewhere), "TUNE_BISENET_CACHE": str(elsewhere / "cache")}
    env = {"AWS_ENDPOINT_URL": store.endpoint, "AWS_DEFAULT_REGION": "us-east-1"}
    with Driver(
        place, "--resume", "--name", "s", "--storage", "s3://bucket/searches", cwd=elsewhere, **there, **env
    ) as d:
        assert d.end() == 0
        assert "packing frames" not in d.log, "they are fetched instead"
    assert board(store, "s", place) == undisturbed
    assert [epochs(store, trial) for trial in TRIALS] == [list(range(1, NUM_EPOCHS + 1))] * 2
    assert len(list((elsewhere / "cache").glob("*/train.arrow"))) == 1

    report = subprocess.run(
        [sys.executable, "-m", "tune_bisenet.report", store.uri("searches/s")],
        cwd=elsewhere,
        env=environment(place) | there | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 0, report.stderr
    assert f"report: {store.uri('searches/s/report.html')}" in report.stdout
    assert b"</html>" in (store.read("searches/s/report.html") or b"")

    for key in store.listed():
        content = store.read(key) or b""
        assert SECRET.encode() not in content, key
        assert KEY_ID.encode() not in content, key
    for folder, _, names in os.walk(place):
        for path in (Path(folder) / name for name in names):
            if path.is_file():
                assert SECRET.encode() not in path.read_bytes(), path


def test_what_is_wrong_with_storage_is_told_before_anything_is_written(place: Path, store: ObjectStore) -> None:
    before = store.listed()
    write_space(place / "space.py", {"a": 0.01}, num_epochs=2)
    flags = ["--space", str(place / "space.py"), "--backbone", "none", "--name", "wrong"]
    data, nobucket = store.uri("data/cityscapes"), store.uri("x", bucket="nobucket")
    with_key = store.uri("searches").replace("s3://", f"s3://{KEY_ID}:{SECRET}@")
    cases = {
        "Check the bucket's name": ["--data", data, "--storage", nobucket],
        "--data s3://nobucket": ["--data", nobucket, "--storage", str(place)],
        "holds a key or a password": ["--data", data, "--storage", with_key],
        "an address is written into files": ["--data", with_key, "--storage", str(place)],
    }
    for words, where in cases.items():
        with Driver(place, *flags, *where) as driver:
            assert driver.end(seconds=30) == 2
            assert words in driver.log
            assert "Nothing was started" in driver.log
            assert SECRET not in driver.log
    assert store.listed() == before
    assert not (place / "wrong").exists()
