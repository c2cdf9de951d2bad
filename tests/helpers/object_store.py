"""An S3 server for tests: moto's, real HTTP on a port of this machine, that can go away and come back."""

import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.request import urlopen

import boto3
import pytest
from helpers import processes, searches
from helpers.processes import PROJECT, environment
from moto.server import ThreadedMotoServer
from werkzeug.serving import make_server

from tune_bisenet.search.state import LEADERBOARD_CSV

KEY_ID = "AKIAOFATEST000000000"
SECRET = "theSecretOfATest/+0123456789abcdefghijkl"
BUCKET = "bucket"

Outage = Literal["refuses", "answers 500", "is silent"]
OUTAGES: tuple[Outage, ...] = get_args(Outage)


class ObjectStore:
    """A server with one bucket, whose content outlives the server's absence."""

    def __init__(self) -> None:
        # Bound without listening: the port stays ours while the server is away, and connections are refused.
        self._held = socket.socket()
        self._held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._held.bind(("127.0.0.1", 0))
        self.port: int = self._held.getsockname()[1]
        self.requests: list[str] = []
        self.before_answer: Callable[[str], None] = lambda _request: None
        """Called with each request's line before it is answered, by the thread that answers it."""
        self.ignores_conditions = False
        """Whether it writes what is to be written under a condition anyway, as some do that speak S3's language."""
        self._broken: Any = None
        self._is_back = threading.Event()
        self.come_back()
        urlopen(f"{self.endpoint}/moto-api/reset", data=b"").close()  # moto keeps one content for all its servers
        self._client().create_bucket(Bucket=BUCKET)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def uri(self, path: str, *, bucket: str = BUCKET) -> str:
        """Return an address as a user with an own server writes it."""
        return f"s3://{bucket}/{path}?endpoint_override={self.endpoint}&scheme=http&region=us-east-1"

    def go_away(self, how: Outage = "refuses") -> None:
        """Leave the port to nobody, who refuses connections, or to a server that cannot do better."""
        self._server.stop()
        if how == "refuses":
            return

        def answer(_environ: Any, start_response: Any) -> list[bytes]:
            if how == "is silent":
                self._is_back.wait()
            start_response("500 Internal Server Error", [])
            return [b""]

        self._is_back.clear()
        self._broken = make_server("127.0.0.1", self.port, answer, threaded=True)
        threading.Thread(target=self._broken.serve_forever, daemon=True).start()

    def come_back(self) -> None:
        self._is_back.set()
        if self._broken:
            self._broken.shutdown()
            self._broken = None
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
        server: Any = self._server._server
        app = server.app

        def answer(environ: dict[str, Any], start_response: Any) -> Any:
            if self.ignores_conditions:
                for condition in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
                    environ.pop(condition, None)
            return app(environ, start_response)

        server.app = answer

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
        """Write every file below `folder`."""
        for path in folder.rglob("*"):
            if path.is_file():
                self.write(f"{prefix}/{path.relative_to(folder).as_posix()}", path.read_bytes())

    def listed(self, prefix: str = "") -> list[str]:
        pages = self._client().get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [entry["Key"] for page in pages for entry in page.get("Contents", [])]

    def asked(self, method: str, pattern: str) -> list[str]:
        """Return the keys that match a pattern, of the requests since the last call."""
        lines, self.requests = self.requests, []
        matches = (re.search(rf"{method} /{BUCKET}/([^ ?]+)\S* HTTP", line) for line in lines)
        return [match[1] for match in matches if match and re.search(pattern, match[1])]

    def _client(self) -> Any:
        keys = {"aws_access_key_id": KEY_ID, "aws_secret_access_key": SECRET, "region_name": "us-east-1"}
        return boto3.client("s3", endpoint_url=self.endpoint, **keys)


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Run a server. This process, and those that it starts, have the keys to it in their environment."""
    store = ObjectStore()

    def hear(record: logging.LogRecord) -> bool:
        store.requests.append(record.getMessage())
        store.before_answer(record.getMessage())
        return False  # nothing on the screen

    logger = logging.getLogger("werkzeug")
    level = logger.level
    logger.addFilter(hear)  # no handler: those hold a lock, and one request may wait for another
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", KEY_ID)
        patch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        try:
            yield store
        finally:
            logger.removeFilter(hear)
            logger.setLevel(level)
            store.close()


# --- a search in the bucket -----------------------------------------------------------------------------------------


def make_store(place: Path) -> Iterator[ObjectStore]:
    """Run a server that has the frames of `place`."""
    with object_store() as store:
        store.upload(place / "frames", "data/cityscapes")
        yield store


def leaderboard_here(place: Path, *, num_epochs: int) -> list[dict[str, str]]:
    """Return the leaderboard of an undisturbed search of two rows on this disk. Its space is left in `place`."""
    searches.write_space(place / "space.py", {"a": 0.01, "b": 0.05}, num_epochs=num_epochs, baseline="a")
    with processes.Driver(place, *searches.on_frames(place), "--scheduler", "fifo", "--name", "undisturbed") as driver:
        assert driver.end() == 0
    board = searches.results(place / "undisturbed")
    assert [row["status"] for row in board] == ["finished"] * 2
    shutil.rmtree(place / "undisturbed")
    return board


@dataclass(frozen=True)
class StoredSearch:
    """A search of two rows whose storage is `searches` in the bucket, and what is there so far."""

    place: Path
    store: ObjectStore
    name: str
    trials = ("a", "b")

    @property
    def flags(self) -> list[str]:
        """Return the flags that begin it."""
        what = [
            "--space",
            str(self.place / "space.py"),
            "--backbone",
            "none",
            "--data",
            self.store.uri("data/cityscapes"),
        ]
        how = ["--scheduler", "fifo", "--precision", "fp32"]
        return [*what, *how, "--storage", self.store.uri("searches"), "--name", self.name]

    def read(self, name: str) -> bytes:
        return self.store.read(f"searches/{self.name}/{name}") or b""

    def results(self) -> list[dict[str, str]]:
        copy = self.place / "board"
        copy.mkdir(exist_ok=True)
        (copy / LEADERBOARD_CSV).write_bytes(self.read(LEADERBOARD_CSV))
        return searches.results(copy)

    def epochs(self, trial: str) -> list[int]:
        record = self.read(f"{trial}/trial.json")
        return [epoch["epoch"] for epoch in json.loads(record)["epochs"]] if record else []

    def has_done(self, count: int) -> Callable[[], bool]:
        """Return whether so many epochs of all trials are safe. The server is in this process, so ask it seldom."""

        def ask() -> bool:
            time.sleep(0.2)
            return self.num_epochs >= count

        return ask

    @property
    def num_epochs(self) -> int:
        return sum(len(self.epochs(trial)) for trial in self.trials)

    def attempts(self, trial: str) -> int:
        """Count its files for TensorBoard, one for each attempt."""
        return sum("tfevents" in key for key in self.store.listed(f"searches/{self.name}/{trial}/"))


def assert_reported_from(search: StoredSearch, cwd: Path, **variables: str) -> None:
    """Check that `tune_bisenet.report` makes the page from the search's address, in a folder outside the project."""
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
    """Check everything in the bucket, with Tune's pickles, and every file and log below `places`."""
    keys = store.listed()
    assert any(key.endswith(".pkl") for key in keys)
    for key in keys:
        content = store.read(key) or b""
        assert not any(secret.encode() in content for secret in (SECRET, KEY_ID, *secrets)), key
    for path in (path for place in places for path in place.rglob("*") if path.is_file()):
        assert SECRET.encode() not in path.read_bytes(), path
