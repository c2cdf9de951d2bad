"""An S3 server for tests: moto's, real HTTP on a port of this machine, that can go away and come back."""

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import boto3
import driving
import pytest
from driving import PROJECT, environment
from moto.server import ThreadedMotoServer

from tune_bisenet.search.state import LEADERBOARD_CSV

KEY_ID = "AKIAOFATEST000000000"
SECRET = "theSecretOfATest/+0123456789abcdefghijkl"
BUCKET = "bucket"


class ObjectStore:
    """A server with one bucket. What is in it outlives its going away."""

    def __init__(self) -> None:
        # Bound and not heard at: nobody is given the port while the server is away, and who calls there is refused.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]
        self.requests: list[str] = []
        self.before_answer: Callable[[str], None] = lambda _request: None
        """Called with each request's line before it is answered, by the thread that answers it."""
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        urlopen(f"{self.endpoint}/moto-api/reset", data=b"").close()  # moto keeps one content for all its servers
        self._client().create_bucket(Bucket=BUCKET)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str, *, bucket: str = BUCKET) -> str:
        """As a person with a server of their own writes it."""
        return f"s3://{bucket}/{path}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def go_away(self) -> None:
        self._server.stop()

    def come_back(self) -> None:
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()

    def close(self) -> None:
        self.go_away()
        self._held.close()

    def read(self, key: str) -> bytes | None:
        client = self._client()
        try:
            content: bytes = client.get_object(Bucket=BUCKET, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None
        return content

    def write(self, key: str, content: bytes) -> None:
        self._client().put_object(Bucket=BUCKET, Key=key, Body=content)

    def upload(self, folder: Path, prefix: str) -> None:
        """Every file below `folder`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def listed(self, prefix: str = "") -> list[str]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [found["Key"] for page in pages for found in page.get("Contents", [])]

    def asked(self, method: str, pattern: str) -> list[str]:
        """The keys, matching the regular expression, of the requests since the last call."""
        lines, self.requests = self.requests, []
        found = (re.search(rf"{method} /{BUCKET}/([^ ?]+)\S* HTTP", line) for line in lines)
        return [match[1] for match in found if match and re.search(pattern, match[1])]

    def _client(self) -> Any:
        keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """The server, with this process, and those that it starts, having the keys to it in the environment."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        store = ObjectStore()
        with _heard(store):
            yield store
        store.close()


@contextmanager
def _heard(store: ObjectStore) -> Iterator[None]:
    """Have the server's log lines, instead of on the screen."""

    def hear(record: logging.LogRecord) -> bool:
        store.requests.append(record.getMessage())
        store.before_answer(record.getMessage())
        return False

    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.addFilter(hear)  # no handler: those hold a lock, and one request may wait for another
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeFilter(hear)
        logger.setLevel(level)


# --- a search in the bucket -----------------------------------------------------------------------------------------


def make_store(place: Path) -> Iterator[ObjectStore]:
    """A server that has the frames of `place`."""
    with object_store() as store:
        store.upload(place / "frames", "data/cityscapes")
        yield store


def leaderboard_here(place: Path, *, num_epochs: int) -> list[dict[str, str]]:
    """Of two rows, whose space is left in `place`, with frames and results on this disk and nothing disturbing them."""
    driving.write_space(place / "space.py", {"a": 0.01, "b": 0.05}, num_epochs=num_epochs, baseline="a")
    with driving.Driver(place, *driving.on_frames(place), "--scheduler", "fifo", "--name", "undisturbed") as driver:
        assert driver.end() == 0
    board = driving.results(place / "undisturbed")
    assert [row["status"] for row in board] == ["finished"] * 2
    shutil.rmtree(place / "undisturbed")
    return board


@dataclass(frozen=True)
class StoredSearch:
    """What a search whose storage is `searches` in the bucket has left there so far."""

    place: Path
    store: ObjectStore
    name: str
    trials: tuple[str, ...] = ("a", "b")

    @property
    def flags(self) -> list[str]:
        """Of the run that begins it."""
        what = ["--space", str(self.place / "space.py"), "--backbone", "none", "--scheduler", "fifo"]
        where = ["--data", self.store.uri("data/cityscapes"), "--storage", self.store.uri("searches")]
        return [*what, *where, "--name", self.name]

    def read(self, name: str) -> bytes:
        return self.store.read(f"searches/{self.name}/{name}") or b""

    def results(self) -> list[dict[str, str]]:
        """The leaderboard, as `driving.results` has that of a folder."""
        copy = self.place / "board"
        copy.mkdir(exist_ok=True)
        (copy / LEADERBOARD_CSV).write_bytes(self.read(LEADERBOARD_CSV))
        return driving.results(copy)

    def epochs(self, trial: str) -> list[int]:
        return [epoch["epoch"] for epoch in json.loads(self.read(f"{trial}/epochs.json") or b"[]")]

    def has_done(self, count: int) -> Callable[[], bool]:
        """Whether so many epochs, of all trials, are safe. The server is in this process: it is asked now and then."""

        def ask() -> bool:
            time.sleep(0.2)
            return self.num_epochs >= count

        return ask

    @property
    def num_epochs(self) -> int:
        return sum(len(self.epochs(trial)) for trial in self.trials)

    def attempts(self, trial: str) -> int:
        """Each leaves a file for TensorBoard."""
        return sum("tfevents" in key for key in self.store.listed(f"searches/{self.name}/{trial}/"))


def assert_reported_from(search: StoredSearch, cwd: Path, **variables: str) -> None:
    """By `tune_bisenet.report` with the address of the search, in another folder than the project's."""
    uri = search.store.uri(f"searches/{search.name}")
    search.store.write(f"searches/{search.name}/report.html", b"")
    report = subprocess.run(
        [sys.executable, "-m", "tune_bisenet.report", uri],
        cwd=cwd,
        env=environment(search.place) | {"PYTHONPATH": str(PROJECT)} | variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert report.returncode == 0, report.stderr
    assert f"report: {search.store.uri(f'searches/{search.name}/report.html')}" in report.stdout
    assert b"</html>" in search.read("report.html")


def assert_no_secret(store: ObjectStore, *places: Path, secrets: tuple[str, ...] = ()) -> None:
    """In nothing that lies in the bucket, Tune's pickles among it, nor in any file or log below the `places`."""
    keys = store.listed()
    assert any(key.endswith(".pkl") for key in keys)
    for key in keys:
        content = store.read(key) or b""
        assert not any(secret.encode() in content for secret in (SECRET, KEY_ID, *secrets)), key
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
