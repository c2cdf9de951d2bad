"""An S3 server for tests: moto's, real HTTP on a port of this machine, that can go away and come back."""

import logging
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import boto3
import pytest
from moto.server import ThreadedMotoServer

KEY_ID = "AKIAOFATEST000000000"
SECRET = "theSecretOfATest/+0123456789abcdefghijkl"
BUCKET = "bucket"


class ObjectStore:
    """A server with one bucket. What is in it outlives its going away."""

    def __init__(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port: int = free.getsockname()[1]
        self.requests: list[str] = []
        self._server = ThreadedMotoServer("127.0.0.1", self.port, verbose=False)
        self._server.start()
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
        store.go_away()


@contextmanager
def _heard(store: ObjectStore) -> Iterator[None]:
    """Have the server's log lines, instead of on the screen."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            store.requests.append(record.getMessage())

    logger, listener = logging.getLogger("werkzeug"), Listener()
    before = logger.propagate, logger.level
    logger.addHandler(listener)
    logger.propagate = False
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.propagate, logger.level = before
