"""Storage: whole files on local disks and in object storage, and outages of a real S3 server."""

import errno
import pickle
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
import requests
from helpers.object_store import KEY_ID, OUTAGES, SECRET, ObjectStore, Outage, object_store

from tune_bisenet.storage import ConditionalFile, RetryPolicy, Storage, StorageError, is_refused

RETRY = "TUNE_BISENET_RETRY_SECONDS"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


# --- files and folders ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["local", "subtree", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, store: ObjectStore) -> Storage:
    """A folder on the local disk, and three without local paths: object storage, and what only fsspec knows."""
    addresses = {"local": str(tmp_path), "s3": store.uri(tmp_path.name), "memory": f"memory://{tmp_path}/bucket"}
    if request.param in addresses:
        return Storage.at(addresses[request.param])
    return Storage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()), "bucket", "s3://bucket")


def test_files_are_written_replaced_moved_and_deleted(storage: Storage) -> None:
    storage.make()
    assert storage.read("a") is None
    assert (storage / "no folder").read("a") is None
    storage.write("a", b"first")
    storage.write("a", b"second")
    storage.write("b", b"other")
    assert storage.read("a") == b"second"
    storage.move("a", "b")
    assert (storage.exists("a"), storage.read("b"), storage.read("b", at_most=2)) == (False, b"second", b"se")
    with storage.open("b") as file:
        file.seek(4)
        assert file.read() == b"nd"
    storage.delete("b")
    assert not storage.exists("b")
    with pytest.raises(FileNotFoundError):
        storage.delete("b")


def test_a_file_is_written_only_by_who_knows_what_it_holds(storage: Storage) -> None:
    storage.make()
    one, two = ConditionalFile(storage, "lease"), ConditionalFile(storage, "lease")
    assert one.is_exact() == (storage.filesystem.type_name == "s3")
    assert (one.read(), two.read()) == (None, None)
    assert one.write(b"1")
    assert not two.write(b"2"), "the file is there now"
    assert not two.write(b"2"), "and a refusal teaches nothing"
    assert one.write(b"3")
    assert two.read() == b"3"
    assert two.write(b"4")
    assert not one.write(b"5")
    assert two.write(b"6")
    assert storage.read("lease") == b"6"
    storage.delete("lease")
    assert not two.write(b"7"), "it is gone"
    assert two.read() is None
    assert two.write(b"8")


def test_of_many_who_write_at_once_s3_lets_one(store: ObjectStore, tmp_path: Path) -> None:
    folder = Storage.at(store.uri(tmp_path.name))
    files = [ConditionalFile(folder, "lease") for _ in range(6)]
    for first in range(0, 18, 6):
        assert len({file.read() for file in files}) == 1
        contents = [f"{number}".encode() for number in range(first, first + 6)]
        with ThreadPoolExecutor(len(files)) as pool:
            wrote = list(pool.map(ConditionalFile.write, files, contents))
        assert wrote.count(True) == 1


def test_a_write_whose_answer_was_lost_is_known_as_done(store: ObjectStore, tmp_path: Path) -> None:
    file = ConditionalFile(Storage.at(store.uri(tmp_path.name)), "lease")
    for content in (b"1", b"2"):
        lost: list[str] = []

        def lose_first(request: str, lost: list[str] = lost) -> None:
            if "PUT" in request and not lost:
                lost.append(request)
                raise ConnectionError("dropped")

        store.before_answer = lose_first
        try:
            assert file.write(content)
        finally:
            store.before_answer = lambda _request: None
        assert lost
        assert file.folder.read("lease") == content


def test_folders_are_created_with_their_parents_and_list_their_contents(storage: Storage) -> None:
    trial = storage / "search" / "trial"
    assert storage.infos() == (storage / "search").folder_names() == []
    trial.make()
    trial.make()
    trial.write("last.pt", b"12345")
    (storage / "search").write("search.json", b"{}")
    assert (storage / "search").folder_names() == ["trial"]
    assert trial.exists()
    assert [info.base_name for info in storage.infos()] == ["search"]
    sizes = {info.base_name: info.size for info in storage.infos(recursive=True) if info.is_file}
    assert sizes == {"last.pt": 5, "search.json": 2}
    assert [info.size for info in trial.stat("last.pt", "missing")] == [5, None]


def test_checks_leave_nothing_behind(storage: Storage) -> None:
    storage.make()
    storage.check_writable()
    storage.check_readable()
    assert storage.infos() == []


def test_a_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        Storage.at(str(tmp_path / "file" / "results")).check_writable()


def test_a_folder_that_only_seems_writable_is_not(tmp_path: Path) -> None:
    for folder in ("/proc/results", f"{tmp_path}/{'x' * 300}/results"):  # root's own permissions allow both
        with pytest.raises(OSError, match=r"/proc|File name too long"):
            Storage.at(folder).check_writable()
    (tmp_path / "folder").mkdir()
    Storage.at(f"{tmp_path}/folder/a/b").check_writable()
    assert list(tmp_path.rglob("*")) == [tmp_path / "folder"]


def test_only_a_local_disk_has_local_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.at("results").uri == str(tmp_path / "results")
    assert Storage.at(tmp_path.as_uri()).local_path == tmp_path
    assert Storage.at(f"memory://{tmp_path}").local_path is None


def test_a_folder_is_named_below_its_uri(tmp_path: Path) -> None:
    assert (Storage.at(str(tmp_path)) / "a").uri == f"{tmp_path}/a"
    folder = Storage(pyarrow.fs.LocalFileSystem(), "bucket/searches", "s3://bucket/searches?region=eu-central-1") / "a"
    assert (folder.path, folder.uri) == ("bucket/searches/a", "s3://bucket/searches/a?region=eu-central-1")
    assert (folder.name, folder.parent.uri) == ("a", "s3://bucket/searches?region=eu-central-1")
    assert Storage.at((Storage.at(tmp_path.as_uri()) / "a").uri).path == str(tmp_path / "a")


ODD_NAMES = [
    "what?now",
    "50%",
    "%3F",
    "two words",
    "#1",
    "{x}",
    "[1]*",
    "a:b",
    "é",
    "it's",
    "~no one",
    "$HOME",
    "new\nline",
]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_local_path_is_a_path_whatever_characters_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Storage.at(name) / "a"
    folder.make()
    folder.write("file", b"content")
    assert (tmp_path / name / "a" / "file").read_bytes() == b"content"
    assert Storage.at(folder.uri).read("file") == b"content"
    assert (folder.name, folder.parent) == ("a", Storage.at(str(tmp_path / name)))
    folder.check_writable()
    assert [path.name for path in tmp_path.rglob("*")] == [name, "a", "file"]


def test_a_path_with_a_scheme_inside_is_no_address(tmp_path: Path) -> None:
    assert Storage.at(f"{tmp_path}/s3://x").local_path == tmp_path / "s3:" / "x"


def test_bytes_that_are_not_utf8_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"caf\\udce9' has bytes that are not UTF-8"):
        Storage.at(f"{tmp_path}/caf\udce9")


@pytest.mark.parametrize(
    "address", ["nosuch://bucket/x", "s3//x://", "file://relative path", "s3://bucket/x?region=us-east-1&nosuch=1"]
)
def test_an_address_that_cannot_be_storage_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=re.escape(address)):
        Storage.at(address)


WRITER = """
import sys
from tune_bisenet.storage import Storage
storage = Storage.at(sys.argv[1])
while True:
    for letter in (b"a", b"b"):
        storage.write("file", letter * 5_000_000)
"""


def test_readers_and_kills_never_see_a_part_of_a_file(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        while storage.read("file") is None:
            time.sleep(0.01)
        for _ in range(100):
            assert storage.read("file") in (b"a" * 5_000_000, b"b" * 5_000_000)
    finally:
        writer.kill()
        writer.wait()
    assert storage.read("file") in (b"a" * 5_000_000, b"b" * 5_000_000)


# --- retries ----------------------------------------------------------------------------------------------------------


class Failing:
    """Raises the given errors, one a call, then answers."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "answer"


FULL = OSError(errno.ENOSPC, "No space left on device")
UNREACHABLE = OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")


class EndpointConnectionError(Exception):
    """Such as botocore's, which is not an OSError."""


def test_transient_errors_are_retried(caplog: pytest.LogCaptureFixture) -> None:
    errors = UNREACHABLE, FULL, ConnectionResetError(errno.ECONNRESET, "reset"), EndpointConnectionError("no route")
    assert RetryPolicy("s3://moment")(failing := Failing(*errors), writing=True) == "answer"
    assert failing.calls == 5
    away, back = caplog.messages
    assert away.startswith("s3://moment cannot be written (AWS Error NETWORK_CONNECTION")
    assert "600 s" in away
    assert back.startswith("s3://moment answers again")


def test_who_copies_to_a_full_disk_is_told_at_once_and_waits_for_no_server() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        RetryPolicy("s3://sound")(failing := Failing(FULL))
    assert (caught.value, failing.calls) == (FULL, 1)


def test_a_read_does_not_end_the_outage_of_a_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    policy = RetryPolicy("/full", seconds=0.6)
    with pytest.raises(StorageError, match=r"/full could not be written .*No space left on device.* full"):
        policy(Failing(*[FULL] * 9), writing=True)
    assert policy(Failing()) == "answer"
    assert len(caplog.messages) == 1
    assert policy(Failing(), writing=True) == "answer"
    assert "answers again" in caplog.messages[-1]


def test_an_outage_is_retried_until_its_limit_and_never_twice() -> None:
    policy = RetryPolicy("s3://limit", seconds=1.0)
    began = time.monotonic()
    with pytest.raises(StorageError, match=r"could not be read for \d+ s: AWS Error NETWORK_CONN") as caught:
        policy(Failing(*[UNREACHABLE] * 99))
    assert time.monotonic() - began >= 1, "whatever the pauses were"
    with pytest.raises(StorageError):
        RetryPolicy("s3://another")(outer := Failing(caught.value))
    assert outer.calls == 1
    with pytest.raises(StorageError):
        policy(second := Failing(*[UNREACHABLE] * 99))
    assert second.calls <= 2, "the limit of this outage has been reached"
    assert policy(Failing()) == "answer"
    assert policy(Failing(UNREACHABLE)) == "answer", "this is another outage"


def test_a_folder_in_place_of_a_file_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "search.json").mkdir()
    with pytest.raises(OSError, match="is a directory") as caught:
        Storage.at(str(tmp_path)).read("search.json")
    assert not isinstance(caught.value, StorageError), "which stands for an outage"


@pytest.mark.parametrize(
    "error",
    [PermissionError(errno.EACCES, "not yours"), OSError(errno.EROFS, "read-only"), OSError("NO_SUCH_KEY"), KeyError()],
)
def test_permanent_errors_are_raised_at_once(error: Exception) -> None:
    failing = Failing(error)
    with pytest.raises(type(error)) as caught:
        RetryPolicy()(failing)
    assert (caught.value, failing.calls) == (error, 1)


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("AWS Error NO_SUCH_BUCKET during PutObject operation", "bucket's name"),
        ("AWS Error SIGNATURE_DOES_NOT_MATCH during PutObject operation: the signature", "AWS_PROFILE"),
        ("AWS Error UNKNOWN (HTTP status 301) during HeadObject operation: No response body.", "region="),
        ("google::cloud::Status(PERMISSION_DENIED: Permission denied error_info={})", "GOOGLE_APPLICATION_CREDENTIALS"),
    ],
)
def test_refusals_are_raised_at_once_with_a_remedy(text: str, remedy: str) -> None:
    failing = Failing(OSError(text))
    with pytest.raises(StorageError, match=f"^s3://x: {re.escape(text[:20])}.*{remedy}") as caught:
        RetryPolicy("s3://x")(failing)
    assert failing.calls == 1
    assert is_refused(caught.value)


def test_a_disk_that_denies_access_refuses_and_one_that_is_full_or_away_does_not() -> None:
    assert is_refused(PermissionError(errno.EACCES, "not yours"))
    assert is_refused(OSError(errno.EROFS, "read-only"))
    assert not any(map(is_refused, (FULL, UNREACHABLE, StorageError("away"), ValueError("no"))))


def test_the_limit_is_set_in_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Storage.at(str(tmp_path)).retry.seconds == 600
    monkeypatch.setenv(RETRY, "5")
    assert Storage.at(str(tmp_path)).retry.seconds == 5
    assert Storage.at(tmp_path.as_uri()).retry.seconds == 5
    monkeypatch.setenv(RETRY, "long")
    with pytest.raises(ValueError, match=f"{RETRY} is 'long'"):
        Storage.at(str(tmp_path))


# --- a server that goes away ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outage", OUTAGES)
def test_reads_writes_moves_and_listings_wait_for_a_server(
    store: ObjectStore, outage: Outage, caplog: pytest.LogCaptureFixture
) -> None:
    folder = Storage.at(store.uri(f"waits/{outage.replace(' ', '-')}"))
    folder.write("a", b"1")
    folder.write("kept", b"3")
    for_tune = folder.retrying_filesystem

    def upload() -> None:
        with for_tune.open_output_stream(f"{folder.path}/tune") as stream:
            stream.write(b"4")

    results: dict[str, Any] = {}
    attempts: dict[str, Callable[[], Any]] = {
        "write": lambda: folder.write("b", b"2"),
        "read": lambda: folder.read("kept"),
        "move": lambda: folder.move("a", "c"),
        "list": lambda: len(folder.infos()),
        "tune": upload,
    }
    store.go_away(outage)
    threads = [threading.Thread(target=lambda n=n, f=f: results.update({n: f()})) for n, f in attempts.items()]
    for thread in threads:
        thread.start()
    while "cannot be" not in caplog.text:
        time.sleep(0.1)
    time.sleep(2)  # by now all have failed, and some more than once
    assert caplog.text.count("cannot be") == 1
    assert results == {}
    store.come_back()
    for thread in threads:
        thread.join()
    assert results.keys() == attempts.keys()
    assert results["read"] == b"3"
    assert [folder.read(name) for name in ("a", "b", "c", "tune")] == [None, b"2", b"1", b"4"]
    assert "s3://bucket answers again" in caplog.text
    assert caplog.text.count("cannot be") <= len(attempts), "one more for each that was under way at the first answer"


@pytest.mark.parametrize(
    "uri",
    [
        "s3://bucket/x?endpoint_override=http://127.0.0.1:9&scheme=http&region=us-east-1",
        "gs://anonymous@bucket/x?endpoint_override=127.0.0.1:9&scheme=http",  # pyarrow alone retries for 15 minutes
    ],
)
def test_a_person_waits_for_seconds_only(uri: str) -> None:
    began = time.monotonic()
    with pytest.raises(StorageError, match="could not be written for"):
        Storage.at(uri, fail_fast=True).check_writable()
    assert time.monotonic() - began < 100, "some five seconds on an idle machine"


def test_a_missing_bucket_and_wrong_keys_are_reported_at_once(
    store: ObjectStore, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(StorageError, match="bucket's name"):
        Storage.at(store.uri("x", bucket="nobucket")).check_writable()
    with pytest.raises(OSError, match="bucket's name"):
        Storage.at(store.uri("x", bucket="nobucket")).check_readable()
    reset = f"{store.endpoint}/moto-api/reset-auth"
    requests.post(reset, data=b"0", timeout=10).close()  # from now on the server knows no key
    try:
        with pytest.raises(StorageError, match="AWS_ACCESS_KEY_ID") as caught:
            Storage.at(store.uri("x")).check_writable()
    finally:
        requests.post(reset, data=b"inf", timeout=10).close()
    assert SECRET not in str(caught.value)
    assert not caplog.messages, "nothing was retried"


class LostAnswers:
    """A file system that does what it is asked, and the first time raises as if its answer had been lost."""

    def __init__(self, folder: Path) -> None:
        self._inner = pyarrow.fs.SubTreeFileSystem(str(folder), pyarrow.fs.LocalFileSystem())
        self._is_first = True

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            result = getattr(self._inner, name)(*args, **options)
            if self._is_first:
                self._is_first = False
                raise ConnectionResetError(errno.ECONNRESET, "lost")
            return result

        return call


def test_a_move_and_a_deletion_whose_answers_are_lost_succeed(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "last.pt").write_text("new")
    (tmp_path / "x" / "previous.pt").write_text("old")
    Storage(LostAnswers(tmp_path), "x", "s3://x").move("last.pt", "previous.pt")
    assert (tmp_path / "x" / "previous.pt").read_text() == "new"
    Storage(LostAnswers(tmp_path), "x", "s3://x").delete("previous.pt")
    assert list((tmp_path / "x").iterdir()) == []


def test_tune_copies_many_large_files_at_once(store: ObjectStore, tmp_path: Path) -> None:
    # pyarrow's own background writes wait here for threads that wait for them.
    for number in range(24):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * 6_000_000)
    folder = Storage.at(store.uri("copied"))
    pyarrow.fs.copy_files(
        str(tmp_path),
        folder.path,
        source_filesystem=pyarrow.fs.LocalFileSystem(),
        destination_filesystem=pickle.loads(pickle.dumps(folder.retrying_filesystem)),
    )
    assert {info.base_name: info.size for info in folder.infos()} == dict.fromkeys(map(str, range(24)), 6_000_000)
    store.requests = []
    assert folder.read("17") == bytes([17]) * 6_000_000
    assert folder.read("17", at_most=3) == bytes([17]) * 3
    assert len(store.requests) <= 4


def test_keys_of_the_environment_are_not_pickled(store: ObjectStore) -> None:
    folder = Storage.at(store.uri("x"))
    pickled = pickle.dumps((folder, folder.retrying_filesystem))
    assert SECRET.encode() not in pickled
    assert KEY_ID.encode() not in pickled
    assert pickle.loads(pickled)[0] == folder


def test_the_endpoint_may_be_set_in_the_environment(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    Storage.at(store.uri("x")).write("a", b"1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.endpoint)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    assert Storage.at("s3://bucket/x").read("a") == b"1"


# --- addresses with keys ----------------------------------------------------------------------------------------------

KEYED = [
    "s3://AKIDofATest:theSecret@bucket/x",
    "s3://AKIDofATest:theSec/ret@bucket/x",  # such keys contain slashes
    "s3://bucket/x?region=us-east-1&secret_key=theSecret",
    "abfs://account@bucket/x?account_key=theSecret",
    "gs://bucket/x?access_token=theSecret",
]


@pytest.mark.parametrize("address", KEYED)
def test_an_address_with_a_key_is_refused_and_not_shown(address: str) -> None:
    with pytest.raises(ValueError, match="holds a key or a password") as refused:
        Storage.at(address)
    assert "Sec" not in str(refused.value)
