"""Storage: local paths and URIs, writes that are whole or not there, and file systems that are not a local disk."""

import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs
import pytest

from tune_bisenet.storage import Storage


@pytest.fixture(params=["local", "elsewhere"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """A folder on the local disk, and one in a file system that has no local paths, as in object storage."""
    if request.param == "local":
        return Storage.at(str(tmp_path))
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
    before = [info.path for info in storage.filesystem.get_file_info(pyarrow.fs.FileSelector(storage.path))]
    storage.check_writable()
    after = [info.path for info in storage.filesystem.get_file_info(pyarrow.fs.FileSelector(storage.path))]
    assert before == after == []


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
