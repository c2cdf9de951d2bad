"""Storage: local paths and URIs, writes that are whole or not there, and file systems that are not a local disk."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.fs
import pytest
from object_store import ObjectStore, object_store

from tune_bisenet.storage import Storage


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(params=["local", "elsewhere", "s3", "memory"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, store: ObjectStore) -> Storage:
    """A folder on the local disk, and some that have no local paths: object storage, and what only fsspec knows."""
    match request.param:
        case "local":
            return Storage.at(str(tmp_path))
        case "s3":
            return Storage.at(store.uri(tmp_path.name))
        case "memory":
            return Storage.at(f"memory://{tmp_path}/bucket")
    return Storage(pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem()), "bucket", "s3://bucket")


def test_what_is_written_can_be_read_and_replaced(storage: Storage) -> None:
    storage.make()
    storage.write("a.json", b"first")
    storage.write("a.json", b"second")
    assert storage.read("a.json") == b"second"
    assert storage.exists("a.json")


def test_a_missing_file_is_none(storage: Storage) -> None:
    storage.make()
    assert storage.read("nothing") is None
    assert (storage / "no folder").read("nothing") is None
    assert not storage.exists("nothing")


def test_a_file_can_be_moved_over_another_and_deleted(storage: Storage) -> None:
    storage.make()
    storage.write("last.pt", b"new")
    storage.write("previous.pt", b"old")
    storage.move("last.pt", "previous.pt")
    assert (storage.read("last.pt"), storage.read("previous.pt")) == (None, b"new")
    storage.delete("previous.pt")
    assert not storage.exists("previous.pt")


def test_folders_are_made_with_those_above_them(storage: Storage) -> None:
    inner = storage / "search" / "trial"
    inner.make()
    inner.make()
    assert inner.exists()
    assert (storage / "search").exists("trial")


def test_a_check_for_writability_leaves_nothing_behind(storage: Storage) -> None:
    storage.make()
    storage.check_writable()
    assert storage.infos() == []


def test_a_folder_tells_what_lies_in_it(storage: Storage) -> None:
    (storage / "trial").make()
    (storage / "trial").write("last.pt", b"12345")
    storage.write("search.json", b"{}")
    found = {info.base_name: info.type for info in storage.infos()}
    assert found == {"trial": pyarrow.fs.FileType.Directory, "search.json": pyarrow.fs.FileType.File}
    files = {info.base_name: info.size for info in storage.infos(recursive=True) if info.is_file}
    assert files == {"last.pt": 5, "search.json": 2}
    assert (storage / "nothing").infos() == []
    assert (storage / "trial").read("last.pt", at_most=2) == b"12"


def test_only_a_local_disk_has_local_paths(tmp_path: Path) -> None:
    assert Storage.at(str(tmp_path)).local_path == tmp_path
    assert Storage.at(tmp_path.as_uri()).local_path == tmp_path
    assert Storage(pyarrow.fs.SubTreeFileSystem("/", pyarrow.fs.LocalFileSystem()), "x", "s3://x").local_path is None


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert Storage.at("results").uri == str(tmp_path / "results")


def test_a_folder_is_named_below_its_uri(tmp_path: Path) -> None:
    assert (Storage.at(str(tmp_path)) / "a").uri == f"{tmp_path}/a"
    folder = Storage(pyarrow.fs.LocalFileSystem(), "bucket/searches", "s3://bucket/searches?region=eu-central-1") / "a"
    assert (folder.path, folder.uri) == ("bucket/searches/a", "s3://bucket/searches/a?region=eu-central-1")
    assert Storage.at((Storage.at(tmp_path.as_uri()) / "a").uri).path == str(tmp_path / "a")


@pytest.mark.parametrize(
    "place",
    [
        "s3://AKIDofATest:theSecret@bucket/x",
        "s3://AKIDofATest:theSec/ret@bucket/x",  # such keys hold slashes
        "s3://bucket/x?region=us-east-1&secret_key=theSecret",
        "abfs://account@bucket/x?account_key=theSecret",
        "gs://bucket/x?access_token=theSecret",
        "sftp://someone:theSecret@host/x",
    ],
)
def test_a_key_in_an_address_is_refused_and_not_shown(place: str) -> None:
    with pytest.raises(ValueError, match="holds a key or a password") as refused:
        Storage.at(place)
    assert "Sec" not in str(refused.value)


@pytest.mark.parametrize("place", ["nosuch://bucket/x", "s3//x://", "file://relative path"])
def test_a_place_that_cannot_be_storage_is_refused(place: str) -> None:
    with pytest.raises(ValueError, match=r"cannot use .* as storage"):
        Storage.at(place)


def test_a_folder_below_a_file_is_not_writable(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="not a folder"):
        Storage.at(str(tmp_path / "file" / "results")).check_writable()


WRITER = """
import sys
from tune_bisenet.storage import Storage
storage = Storage.at(sys.argv[1])
while True:
    for letter in (b"a", b"b"):
        storage.write("file", letter * 5_000_000)
"""


def test_a_reader_and_a_kill_never_see_a_part_of_a_file(tmp_path: Path) -> None:
    storage = Storage.at(str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)])
    try:
        while storage.read("file") is None:
            time.sleep(0.01)
        for _ in range(100):
            content = storage.read("file")
            assert content in (b"a" * 5_000_000, b"b" * 5_000_000)
    finally:
        writer.kill()
        writer.wait()
    assert storage.read("file") in (b"a" * 5_000_000, b"b" * 5_000_000)
