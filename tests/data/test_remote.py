"""Frames in object storage: the same frames, the same checks and the same words as on a local disk."""

import time
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from driving import write_frames
from object_store import ObjectStore, object_store
from PIL import Image

from tune_bisenet.data.catalog import check_reachable, open_source
from tune_bisenet.data.cityscapes import open_cityscapes
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.source import SPLITS, DataError

LABELS = "gtFine/train/town"


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    write_frames(tmp_path / "frames")
    return tmp_path / "frames"


@pytest.fixture(params=["s3", "memory"])
def uri(request: pytest.FixtureRequest, frames: Path, store: ObjectStore) -> Iterator[str]:
    """The same frames where pyarrow reaches them by itself, and where fsspec does."""
    if request.param == "s3":
        store.upload(frames, "frames")
        yield store.uri("frames")
        return
    memory = fsspec.filesystem("memory")
    for path in frames.rglob("*.png"):
        memory.pipe(f"/frames/{path.relative_to(frames).as_posix()}", path.read_bytes())
    yield "memory://frames"
    memory.rm("/frames", recursive=True)


def problems_of(uri: str) -> str:
    with pytest.raises(DataError) as caught:
        open_source(uri)
    return str(caught.value)


def test_frames_are_those_of_a_local_folder(uri: str, frames: Path, tmp_path: Path) -> None:
    here, there = open_cityscapes(frames), open_source(uri)
    assert there.name == uri
    assert there.frame_size == here.frame_size
    for split in SPLITS:
        assert there.names(split) == here.names(split)
        for index in range(len(here.names(split))):
            assert np.array_equal(there.load(split, index).image, here.load(split, index).image)
            assert np.array_equal(there.load(split, index).label, here.load(split, index).label)
    packs = [prepare(source, image_size=(32, 64), cache_dir=tmp_path / "cache") for source in (here, there)]
    assert packs[0].digest == packs[1].digest
    assert packs[0].path != packs[1].path
    assert packs[1].path.name.startswith("frames-32x64-")


def test_a_uri_of_the_local_disk_is_a_local_folder(frames: Path) -> None:
    assert open_source(frames.as_uri()).name == str(frames)


def test_the_fingerprint_stays_until_a_file_is_written_anew(store: ObjectStore, frames: Path) -> None:
    store.upload(frames, "changing")
    before = open_source(store.uri("changing")).fingerprint
    assert open_source(store.uri("changing")).fingerprint == before
    time.sleep(1.1)  # S3 tells times in seconds
    store.upload(frames / LABELS, f"changing/{LABELS}")
    assert open_source(store.uri("changing")).fingerprint != before


def test_everything_in_the_way_is_named_by_its_uri(store: ObjectStore, frames: Path) -> None:
    missing, cut, *_ = sorted((frames / LABELS).iterdir())
    missing.unlink()
    cut.write_bytes(cut.read_bytes()[:20])
    Image.new("RGB", (10, 10)).save(frames / "leftImg8bit" / "train" / "town" / "odd_leftImg8bit.png")
    Image.new("L", (10, 10)).save(frames / LABELS / "odd_gtFine_labelTrainIds.png")
    store.upload(frames, "broken")
    said = problems_of(store.uri("broken"))
    assert f"has no label: expected s3://bucket/broken/{LABELS}/{missing.name}" in said
    assert f"s3://bucket/broken/{LABELS}/{cut.name}" in said
    assert "cannot be read as PNG" in said
    assert "odd_leftImg8bit.png" in said
    assert "10x10" in said


def test_a_wrong_folder_is_named_with_the_right_one(store: ObjectStore, frames: Path) -> None:
    store.upload(frames, "above/cityscapes")
    assert f"point --data at {store.uri('above/cityscapes')}" in problems_of(store.uri("above"))
    assert "there is no such folder" in problems_of(store.uri("nothing"))


def test_headers_of_large_files_are_read_without_the_rest(store: ObjectStore, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for top, kind, shape in (
            ("leftImg8bit", "leftImg8bit", (400, 400, 3)),
            ("gtFine", "gtFine_labelIds", (400, 400)),
        ):
            path = tmp_path / top / split / "town" / f"a_{kind}.png"
            path.parent.mkdir(parents=True)
            Image.fromarray(rng.integers(0, 19, shape).astype(np.uint8)).save(path)
    store.upload(tmp_path, "large")
    assert open_source(store.uri("large")).frame_size == (400, 400)


def test_what_refuses_or_does_not_answer_is_told_within_seconds(store: ObjectStore) -> None:
    with pytest.raises(DataError, match=r"--data s3://nobucket/x\?.* cannot be read: .*Check the bucket's name"):
        check_reachable(store.uri("x", bucket="nobucket"))
    with pytest.raises(DataError, match="could not be read for"):
        check_reachable("s3://bucket/x?endpoint_override=http://127.0.0.1:9&scheme=http&region=us-east-1")
    with pytest.raises(ValueError, match="holds a key"):
        check_reachable("s3://AKID:secret@bucket/x")
    check_reachable("/nowhere")  # a folder is looked at when it is opened
    check_reachable("streets")
