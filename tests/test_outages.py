"""Storage that is away: what is tried again and what is not, on a real S3 server and on made-up errors."""

import errno
import pickle
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import requests
from object_store import KEY_ID, SECRET, ObjectStore, object_store

from tune_bisenet.storage import RETRY_VARIABLE, RetryingFileSystem, RetryPolicy, Storage, StorageError


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


class Stumbling:
    """Fails as often as told, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


FULL = OSError(errno.ENOSPC, "No space left on device")
AWAY = OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")


# --- one thing ------------------------------------------------------------------------------------------------------


def test_what_fails_for_a_moment_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    stumbling = Stumbling(AWAY, FULL, ConnectionResetError(errno.ECONNRESET, "reset"))
    assert RetryPolicy("s3://moment")(stumbling) == "answer"
    assert stumbling.calls == 4
    told, back = caplog.messages
    assert told.startswith("s3://moment cannot be read (AWS Error NETWORK_CONNECTION")
    assert "tried again for up to 10 minutes" in told
    assert back.startswith("s3://moment answers again after ")


def test_a_full_disk_is_told_as_such_and_not_said_to_answer_because_it_can_be_read(
    caplog: pytest.LogCaptureFixture,
) -> None:
    patience = RetryPolicy("/full", seconds=0.6)
    with pytest.raises(StorageError, match=r"/full could not be written .*No space left on device.*make room there"):
        patience(Stumbling(*[FULL] * 9), writing=True)
    assert patience(Stumbling()) == "answer"
    assert [message[:23] for message in caplog.messages] == ["/full cannot be written"]
    assert patience(Stumbling(), writing=True) == "answer"
    assert "answers again" in caplog.messages[-1]


def test_time_that_is_up_is_a_storage_error_that_nobody_tries_again() -> None:
    outer = Stumbling()
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"could not be read for \d+ seconds?: AWS Error NETWORK_CONN") as caught:
        RetryPolicy("s3://up", seconds=1.0)(Stumbling(*[AWAY] * 99))
    assert time.monotonic() - began >= 1, "it is tried until the time is up, whatever the pauses were"
    outer.errors = [caught.value]
    with pytest.raises(StorageError):
        RetryPolicy("s3://up")(outer)
    assert outer.calls == 1


def test_one_outage_is_waited_for_once() -> None:
    patience = RetryPolicy("s3://once", seconds=1.0)
    with pytest.raises(StorageError):
        patience(Stumbling(*[AWAY] * 99))
    second = Stumbling(*[AWAY] * 99)
    with pytest.raises(StorageError):
        patience(second)
    assert second.calls <= 2, "the time was up, but for what lies between two lines"
    assert patience(Stumbling()) == "answer"
    assert patience(Stumbling(AWAY)) == "answer", "this is another one"


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "no such file"),
        PermissionError(errno.EACCES, "not yours"),
        OSError(errno.EROFS, "read-only"),
        OSError("AWS Error NO_SUCH_KEY during CopyObject operation"),
        ValueError("a mistake of ours"),
        KeyError("another"),
    ],
)
def test_what_waiting_does_not_help_fails_at_once_as_it_is(error: Exception) -> None:
    stumbling = Stumbling(error)
    with pytest.raises(type(error)) as caught:
        RetryPolicy()(stumbling)
    assert caught.value is error
    assert stumbling.calls == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AWS Error NO_SUCH_BUCKET during PutObject operation: The specified bucket does not exist", "bucket's name"),
        ("Bucket 'x' not found. To create buckets, enable the allow_bucket_creation option.", "bucket's name"),
        ("AWS Error ACCESS_DENIED during HeadObject operation: No response body.", "Access is denied"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: the signature", "credentials are missing"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body.", "another region"),
        ("google::cloud::Status(PERMISSION_DENIED: Permission denied error_info={})", "Access is denied"),
    ],
)
def test_a_refusal_fails_at_once_with_what_to_do(text: str, words: str) -> None:
    stumbling = Stumbling(OSError(text))
    with pytest.raises(StorageError, match=words) as caught:
        RetryPolicy("s3://x")(stumbling)
    assert text[:20] in str(caught.value)
    assert stumbling.calls == 1


def test_errors_of_the_libraries_under_fsspec_are_tried_again() -> None:
    class EndpointConnectionError(Exception):
        """Such as botocore's, which is no OSError."""

    assert RetryPolicy("b2://x")(Stumbling(EndpointConnectionError("no route"))) == "answer"


def test_many_who_wait_tell_it_once(caplog: pytest.LogCaptureFixture) -> None:
    all_have_failed_twice = threading.Barrier(8)

    def wait() -> None:
        stumbling = Stumbling(AWAY, AWAY)

        def attempt() -> str:
            if not stumbling.errors:
                all_have_failed_twice.wait(250)
            return stumbling()

        RetryPolicy("s3://many")(attempt)

    threads = [threading.Thread(target=wait) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [message.partition(" (")[0] for message in caplog.messages][:1] == ["s3://many cannot be read"]
    assert len(caplog.messages) == 2
    assert "answers again" in caplog.messages[-1]


# --- a server that goes away ----------------------------------------------------------------------------------------


def test_reads_writes_moves_and_listings_wait_for_a_server(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Storage.at(store.uri("waits"))
    folder.make()
    folder.write("a", b"1")
    attempts = [
        lambda: folder.write("b", b"2"),
        lambda: folder.read("a"),
        lambda: folder.move("a", "c"),
        lambda: folder.infos(),
    ]

    def told() -> int:
        return sum("cannot be" in message for message in caplog.messages)

    store.go_away()
    threads = [threading.Thread(target=attempt) for attempt in attempts]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + 250
    while not told():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    time.sleep(2)  # all of them have failed by then, and some more than once
    assert told() == 1
    store.come_back()
    for thread in threads:
        thread.join()
    assert (folder.read("a"), folder.read("b"), folder.read("c")) == (None, b"2", b"1")
    assert told() <= len(attempts), "once more for each that was still under way when another had its answer"
    assert "s3://bucket answers again" in caplog.text


def test_preflight_gives_up_on_a_server_that_is_away_within_seconds() -> None:
    """Some five of them, on an idle machine, where a search waits ten minutes."""
    began = time.monotonic()
    uri = "s3://bucket/x?endpoint_override=http://127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(StorageError, match="could not be written for"):
        Storage.at(uri, hurried=True).check_writable()
    assert time.monotonic() - began < 100


def test_how_long_is_waited_is_the_users_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Storage.at(str(tmp_path)).patience.seconds == 600
    monkeypatch.setenv(RETRY_VARIABLE, "5")
    assert Storage.at(str(tmp_path)).patience.seconds == 5
    assert Storage.at(tmp_path.as_uri()).patience.seconds == 5
    monkeypatch.setenv(RETRY_VARIABLE, "long")
    with pytest.raises(ValueError, match="'long': give a number of seconds"):
        Storage.at(str(tmp_path))


def test_google_storage_that_is_away_is_given_up_within_seconds_too() -> None:
    began = time.monotonic()
    uri = "gs://anonymous@bucket/x?endpoint_override=127.0.0.1:9&scheme=http"  # pyarrow alone tries for 15 minutes
    with pytest.raises(StorageError, match="could not be written for"):
        Storage.at(uri, hurried=True).check_writable()
    assert time.monotonic() - began < 100


def test_no_such_bucket_and_wrong_keys_are_told_at_once(store: ObjectStore, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(StorageError, match="Check the bucket's name"):
        Storage.at(store.uri("x", bucket="nobucket")).check_writable()
    reset = f"{store.endpoint}/moto-api/reset-auth"
    requests.post(reset, data=b"0", timeout=10).close()  # from now on the server knows no key
    try:
        with pytest.raises(StorageError, match="credentials are missing or wrong") as caught:
            Storage.at(store.uri("x")).check_writable()
    finally:
        requests.post(reset, data=b"inf", timeout=10).close()
    assert SECRET not in str(caught.value)
    assert not caplog.messages, "nothing was tried again"


# --- a file system for others ---------------------------------------------------------------------------------------


class Forgetful:
    """Does what it is told, and the first time says that the connection was lost."""

    def __init__(self, place: Path) -> None:
        self._inner = pyarrow.fs.SubTreeFileSystem(str(place), pyarrow.fs.LocalFileSystem())
        self._is_first = True

    def __getattr__(self, name: str) -> Any:
        def do(*args: Any, **options: Any) -> Any:
            result = getattr(self._inner, name)(*args, **options)
            if self._is_first:
                self._is_first = False
                raise ConnectionResetError(errno.ECONNRESET, "lost")
            return result

        return do


def forgetful(place: Path) -> RetryingFileSystem:
    return RetryingFileSystem(Forgetful(place), RetryPolicy("forgetful"))


def test_a_move_or_a_removal_whose_answer_was_lost_is_done_once(tmp_path: Path) -> None:
    (tmp_path / "last.pt").write_text("new")
    (tmp_path / "previous.pt").write_text("old")
    forgetful(tmp_path).move("last.pt", "previous.pt")
    assert (tmp_path / "previous.pt").read_text() == "new"
    forgetful(tmp_path).delete_file("previous.pt")
    (tmp_path / "folder").mkdir()
    forgetful(tmp_path).delete_dir("folder")
    assert list(tmp_path.iterdir()) == []


def test_many_large_files_are_copied_at_once_as_tune_does(store: ObjectStore, tmp_path: Path) -> None:
    # pyarrow's own background writes wait here for threads that wait for them.
    for number in range(24):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 6_000_000)
    folder = Storage.at(store.uri("copied"))
    pyarrow.fs.copy_files(
        str(tmp_path),
        folder.path,
        source_filesystem=pyarrow.fs.LocalFileSystem(),
        destination_filesystem=folder.filesystem,
    )
    assert {info.base_name: info.size for info in folder.infos()} == dict.fromkeys(map(str, range(24)), 6_000_000)
    assert folder.read("17") == bytes([17]) * 6_000_000


def test_what_is_read_of_a_bucket_takes_few_requests(store: ObjectStore) -> None:
    folder = Storage.at(store.uri("few"))
    folder.write("checkpoint", bytes(5_000_000))
    store.requests = []
    assert folder.read("checkpoint") == bytes(5_000_000)
    assert folder.read("checkpoint", at_most=3) == bytes(3)
    assert len(store.requests) <= 4


def test_keys_of_the_environment_do_not_travel(store: ObjectStore) -> None:
    folder = Storage.at(store.uri("x"))
    sent = pickle.dumps(folder)
    assert SECRET.encode() not in sent
    assert KEY_ID.encode() not in sent
    assert pickle.loads(sent) == folder


def test_the_endpoint_may_stand_in_the_environment(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage.at(store.uri("x")).write("a", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert Storage.at("s3://bucket/x").read("a") == b"1"
