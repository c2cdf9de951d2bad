"""Packs in object storage: put there once, fetched once by a node, resumed when cut, and never believed unseen."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from object_store import ObjectStore, object_store

from tune_bisenet.data import sharing
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.packing import fetch, prepare
from tune_bisenet.data.source import DataError
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


def num_parts(pack: Packed) -> int:
    return sum(-(-path.stat().st_size // 512) for path in pack.path.iterdir())


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


def test_of_two_processes_on_a_node_one_fetches_and_the_other_waits(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    processes = [asking(pack, shared, tmp_path) for _ in range(2)]
    for process in processes:
        go(process)
    assert [process.communicate(timeout=60)[0].strip() for process in processes] == [pack.digest] * 2
    parts = store.asked("GET", r"\.arrow\.\d+$")
    assert len(parts) == len(set(parts)) == num_parts(pack)


def test_a_fetch_that_is_cut_goes_on_where_it_was(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    part = tmp_path / f"{pack.path.name}.fetched" / "train.arrow"
    process = asking(pack, shared, tmp_path)
    go(process)
    deadline = time.monotonic() + 30
    while not (part.exists() and part.stat().st_size > 10_000):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    num_here = part.stat().st_size // 512
    assert 0 < num_here < num_parts(pack), "it was cut"
    time.sleep(0.2)  # for requests that are on their way
    store.requests.clear()
    fetched = fetch(pack.path.name, shared=shared, cache_dir=tmp_path)
    assert fetched is not None
    assert fetched.digest == pack.digest
    assert len(store.asked("GET", r"\.arrow\.\d+$")) == num_parts(pack) - num_here


def test_a_server_that_goes_away_in_mid_fetch_is_waited_for(
    store: ObjectStore, pack: Packed, shared: Storage, tmp_path: Path
) -> None:
    part = tmp_path / f"{pack.path.name}.fetched" / "train.arrow"
    process = asking(pack, shared, tmp_path)
    go(process)
    while not part.exists():
        time.sleep(0.001)
    store.go_away()
    time.sleep(2)
    assert process.poll() is None
    store.come_back()
    assert process.communicate(timeout=60)[0].strip() == pack.digest


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
