"""Packs in object storage: put there once, fetched once by a node, resumed when cut, and never believed unseen."""

import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from object_store import ObjectStore, object_store

from tune_bisenet.data import sharing
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.packing import fetch, prepare
from tune_bisenet.data.source import SPLITS, DataError
from tune_bisenet.data.streets import Streets
from tune_bisenet.storage import Storage

SOURCE = Streets(num_train=8, num_val=3, frame_size=(32, 64))
FETCH = """
import sys
from pathlib import Path
from tune_bisenet.data.packing import fetch
from tune_bisenet.storage import Storage
print("ready", flush=True)
sys.stdin.readline()
print(fetch(sys.argv[1], shared=Storage.at(sys.argv[2]), cache_dir=Path(sys.argv[3])).digest, flush=True)
"""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return prepare(SOURCE, image_size=(32, 64), cache_dir=tmp_path_factory.mktemp("driver"))


@pytest.fixture
def shared(
    store: ObjectStore, pack: Packed, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Storage:
    """The pack in some hundred parts, in a folder of this test's own."""
    monkeypatch.setattr(sharing, "PART_BYTES", 512)
    place = Storage.at(store.uri(f"{request.node.name}/_packs"))
    sharing.publish(pack.path, place)
    store.requests.clear()
    return place


def asking(pack: Packed, shared: Storage, cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FETCH, pack.path.name, shared.uri, str(cache)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    return process


def test_a_node_fetches_what_the_driver_packed(pack: Packed, shared: Storage, tmp_path: Path) -> None:
    fetched = fetch(pack.path.name, shared=shared, cache_dir=tmp_path / "cache")
    assert fetched is not None
    assert fetched.digest == pack.digest
    for path in pack.path.iterdir():
        assert (fetched.path / path.name).read_bytes() == path.read_bytes()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path != fetched.path] in ([], [".lock"])


def test_the_next_driver_fetches_it_too_and_puts_it_there_no_second_time(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    packed = []
    again = prepare(
        SOURCE, image_size=(32, 64), cache_dir=tmp_path, shared=shared, progress=lambda *frame: packed.append(frame)
    )
    assert packed == []
    assert again.digest == pack.digest
    store.requests.clear()
    sharing.publish(again.path, shared)
    assert store.asked("PUT", "") == []


def test_without_a_whole_pack_there_is_nothing_to_fetch(pack: Packed, shared: Storage, tmp_path: Path) -> None:
    assert fetch("another", shared=shared, cache_dir=tmp_path) is None
    (shared / pack.path.name).delete(sharing.RECORD)
    assert fetch(pack.path.name, shared=shared, cache_dir=tmp_path) is None
    assert prepare(SOURCE, image_size=(32, 64), cache_dir=tmp_path, shared=shared).digest == pack.digest


def test_a_driver_that_was_cut_off_puts_only_what_is_missing(store: ObjectStore, pack: Packed, shared: Storage) -> None:
    folder = shared / pack.path.name
    folder.delete(sharing.RECORD)
    folder.delete("train.arrow.00003")
    folder.write("val.arrow.00001", b"cut")
    store.requests.clear()
    sharing.publish(pack.path, shared)
    puts = {key.rpartition("/")[2] for key in store.asked("PUT", r"[^/]$")}
    assert puts == {"train.arrow.00003", "val.arrow.00001", sharing.RECORD}


def go(process: subprocess.Popen[str]) -> None:
    """Let a process that is asking begin."""
    assert process.stdin
    process.stdin.write("\n")
    process.stdin.flush()


def parts_of(pack: Packed) -> list[str]:
    """By name, in the order in which they are fetched."""
    files = [pack.path / f"{split}.arrow" for split in SPLITS]
    return [f"{file.name}.{part:05d}" for file in files for part in range(-(-file.stat().st_size // 512))]


def parts_asked(store: ObjectStore) -> list[str]:
    return [key.rpartition("/")[2] for key in store.asked("GET", r"\.arrow\.\d+$")]


NUM_HERE = 4 * sharing.NUM_THREADS


@contextmanager
def halfway(store: ObjectStore, process: "subprocess.Popen[str]") -> Iterator[None]:
    """Let a process fetch until it has so many parts, and its requests for the next ones all wait for an answer."""
    waiting: set[int] = set()
    all_wait, goes_on = threading.Event(), threading.Event()

    def hear(request: str) -> None:
        found = re.search(r"GET \S+/train\.arrow\.(\d+)", request)
        if found and int(found[1]) >= NUM_HERE:
            waiting.add(int(found[1]))
            if len(waiting) == sharing.NUM_THREADS:
                all_wait.set()
            goes_on.wait(300)

    store.before_answer = hear
    go(process)
    try:
        assert all_wait.wait(250)
        yield
    finally:
        store.before_answer = lambda _request: None
        goes_on.set()


def test_of_two_processes_on_a_node_one_fetches_and_the_other_waits(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    processes = [asking(pack, shared, tmp_path) for _ in range(2)]
    for process in processes:
        go(process)
    assert [process.communicate(timeout=250)[0].strip() for process in processes] == [pack.digest] * 2
    parts = parts_asked(store)
    assert set(parts) == set(parts_of(pack))
    assert len(parts) < 1.5 * len(parts_of(pack)), "some may have been tried again, but not each fetched by both"


def test_a_fetch_that_is_cut_goes_on_where_it_was(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    process = asking(pack, shared, tmp_path)
    with halfway(store, process):
        process.kill()
        process.communicate()
        store.requests.clear()
    here = tmp_path / f"{pack.path.name}.fetched" / "train.arrow"
    assert here.stat().st_size == 512 * NUM_HERE
    fetched = fetch(pack.path.name, shared=shared, cache_dir=tmp_path)
    assert fetched is not None
    assert fetched.digest == pack.digest
    assert set(parts_asked(store)) == set(parts_of(pack)[NUM_HERE:])


def test_a_server_that_goes_away_in_mid_fetch_is_waited_for(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    process = asking(pack, shared, tmp_path)
    with halfway(store, process):
        store.go_away()
    time.sleep(2)
    assert process.poll() is None
    store.come_back()
    assert process.communicate(timeout=250)[0].strip() == pack.digest


def test_what_was_begun_and_is_damaged_is_fetched_anew(
    pack: Packed, shared: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    part = tmp_path / f"{pack.path.name}.fetched"
    part.mkdir()
    (part / "train.arrow").write_bytes(bytes(20_000))
    fetched = fetch(pack.path.name, shared=shared, cache_dir=tmp_path)
    assert fetched is not None
    assert fetched.digest == pack.digest
    assert "cannot be used" in caplog.text


def test_a_pack_that_is_damaged_in_storage_is_packed_here_instead(
    pack: Packed, shared: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = shared / pack.path.name
    content = bytearray(folder.read("train.arrow.00050") or b"")
    content[100] ^= 1
    folder.write("train.arrow.00050", bytes(content))
    assert fetch(pack.path.name, shared=shared, cache_dir=tmp_path) is None
    assert "is damaged: 1 of 2 record batches" in caplog.text
    assert prepare(SOURCE, image_size=(32, 64), cache_dir=tmp_path, shared=shared).digest == pack.digest


def test_a_pack_that_does_not_fit_on_the_disk_is_not_begun(pack: Packed, shared: Storage, tmp_path: Path) -> None:
    folder = shared / pack.path.name
    record = json.loads(folder.read(sharing.RECORD) or b"")
    record["files"]["train.arrow"] = 10**17
    folder.write(sharing.RECORD, json.dumps(record).encode())
    target = tmp_path / "target"
    with pytest.raises(DataError, match=r"packed frames need 100,000,000\.0 GB"):
        sharing.download(folder, target)
    assert list(target.iterdir()) == []
