"""Packs are exact, made once a node, shared through object storage, and never used when incomplete or damaged."""

import logging
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from helpers.object_store import ObjectStore, object_store
from helpers.searches import write_frames
from PIL import Image

from tune_bisenet.classes import CITYSCAPES, ClassSet, LabelClass
from tune_bisenet.data import packed as packed_module
from tune_bisenet.data import packing
from tune_bisenet.data.packed import ByteArray, DamagedPackError, Packed, open_packed, suggested_image_size
from tune_bisenet.data.packing import (
    check_labels,
    check_room,
    fetch_packed,
    open_source,
    prepare_packed,
    publish_packed,
)
from tune_bisenet.data.source import SPLITS, Frame, Split
from tune_bisenet.data.streets import Streets
from tune_bisenet.options import InputError
from tune_bisenet.storage import Storage

SIZE = (16, 24)
STREETS = Streets(num_train=8, num_val=3, frame_size=(32, 64))
NAMES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"bonn/b_{number}" for number in range(7)),
    "val": tuple(f"ulm/u_{number}" for number in range(3)),
}


@dataclass
class Noise:
    """A source of random frames, or of copies of `frame`; `damaged` ones cannot be loaded."""

    name: str = "noise"
    fingerprint: str = "first"
    frame_size: tuple[int, int] = SIZE
    damaged: Sequence[tuple[Split, int]] = ()
    frame: Frame | None = None
    classes: ClassSet = CITYSCAPES
    frame_sizes: Mapping[Split, Sequence[tuple[int, int]]] = field(default_factory=dict)
    notes: Sequence[str] = ()
    is_misread: bool = False

    def names(self, split: Split) -> Sequence[str]:
        return NAMES[split]

    def describe_labels(self, split: Split) -> tuple[str, bool]:
        return f"They are {split} noise.", self.is_misread

    def load(self, split: Split, index: int) -> Frame:
        if (split, index) in self.damaged:
            raise InputError(f"image {split} {index} is damaged", f"label {split} {index} is damaged")
        if self.frame is not None:
            return self.frame
        rng = np.random.default_rng([SPLITS.index(split), index])
        size = self.frame_sizes[split][index] if self.frame_sizes else self.frame_size
        label = rng.choice(np.array([*range(len(self.classes)), 255], np.uint8), size)
        return Frame(rng.integers(0, 256, (*size, 3), np.uint8), label)


class Killed(Noise):
    """A source whose process dies at once, as by SIGKILL, at the fifth frame."""

    def load(self, split: Split, index: int) -> Frame:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(split, index)


def pack(cache_dir: Path, source: Noise | None = None, image_size: tuple[int, int] = SIZE) -> Packed:
    return prepare_packed(source or Noise(), image_size=image_size, cache_dir=cache_dir)


# --- what is in it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [64, 3])
def test_pixels_and_labels_are_exact_where_nothing_is_resized(
    tmp_path: Path, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "MAX_BATCH_ROWS", max_rows)
    packed = pack(tmp_path)
    for split, rows in zip(SPLITS, (packed.train, packed.val), strict=True):
        assert (len(rows), rows.names) == (len(NAMES[split]), NAMES[split])
        for index in range(len(rows)):
            frame = Noise().load(split, index)
            np.testing.assert_array_equal(rows.images[index].transpose(1, 2, 0), frame.image)
            np.testing.assert_array_equal(rows.labels[index], frame.label)


def test_train_is_resized_and_val_keeps_its_labels(tmp_path: Path) -> None:
    packed = pack(tmp_path, image_size=(8, 12))
    assert {image.shape for rows in (packed.train, packed.val) for image in rows.images} == {(3, 8, 12)}
    assert {label.shape for label in packed.train.labels} == {(8, 12)}
    assert {label.shape for label in packed.val.labels} == {SIZE}
    assert (packed.image_size, packed.label_size) == ((8, 12), SIZE)
    np.testing.assert_array_equal(packed.val.labels[2], Noise().load("val", 2).label)


def test_halving_averages_four_pixels_and_picks_one_label(tmp_path: Path) -> None:
    packed, frame = pack(tmp_path, image_size=(8, 12)), Noise().load("train", 1)
    boxes = frame.image.reshape(8, 2, 12, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(packed.train.images[1] - boxes).max() <= 0.5
    label_boxes = frame.label.reshape(8, 2, 12, 2).transpose(0, 2, 1, 3).reshape(8, 12, 4)
    assert (label_boxes == packed.train.labels[1][..., None]).any(-1).all()


@pytest.mark.parametrize("image_size", [(10, 20), (16, 12), (32, 24)])
def test_any_other_size_keeps_flat_colours_and_adds_no_label(tmp_path: Path, image_size: tuple[int, int]) -> None:
    label = np.full(SIZE, 3, np.uint8)
    label[:, 12:] = 18
    packed = pack(tmp_path, Noise(frame=Frame(np.full((*SIZE, 3), (10, 20, 30), np.uint8), label)), image_size)
    assert packed.train.images[0].reshape(3, -1).T.tolist() == [[10, 20, 30]] * (image_size[0] * image_size[1])
    assert set(np.unique(packed.train.labels[0])) == {3, 18}


def test_the_packed_bytes_of_the_streets_do_not_change(tmp_path: Path) -> None:
    """Searches compare these digests: whoever changes one changes all results, and raises FORMAT_VERSION."""
    sizes = ((96, 192), (48, 96), (64, 96))  # as drawn, by means of boxes, by bilinear interpolation
    packs = [prepare_packed(Streets(num_train=5, num_val=2), image_size=size, cache_dir=tmp_path) for size in sizes]
    assert [packed.digest[:16] for packed in packs] == ["8be33b6af299965d", "95b28830d96046cb", "4c62a1aeb498750f"]
    assert packs[0].path.name == "streets-96x192-0ab7ec6ccd42"


def test_class_counts_are_of_the_train_labels_before_resizing_without_void(tmp_path: Path) -> None:
    label = np.full(SIZE, 255, np.uint8)
    label[0, :5], label[1, :2] = 0, 18
    counts = pack(tmp_path, Noise(frame=Frame(np.zeros((*SIZE, 3), np.uint8), label)), (8, 12)).class_counts
    assert counts.dtype == np.int64
    assert counts.tolist() == [7 * 5, *[0] * 17, 7 * 2]  # seven frames of train


def test_what_the_labels_hold_is_told_by_share(tmp_path: Path) -> None:
    label = np.full(SIZE, 255, np.uint8)  # 384 pixels
    label[:12] = 0
    label[0, :1], label[12, :12] = 18, 13
    packed = pack(tmp_path, Noise(frame=Frame(np.zeros((*SIZE, 3), np.uint8), label)), (8, 12))
    for split in SPLITS:
        assert packed.describe_classes(split) == "road 75 %, car 3 %, bicycle under 1 %; 16 never; void 22 %"
    every_class = pack(tmp_path / "noise").describe_classes("train")
    assert every_class.count("%") == 6
    assert "14 others; void 5 %" in every_class


@pytest.mark.parametrize("num_labelled", [0, 1, 191, 192])
def test_labels_without_a_scored_pixel_are_refused_and_few_are_told(tmp_path: Path, num_labelled: int) -> None:
    label = np.full(SIZE, 255, np.uint8)
    label.ravel()[:num_labelled] = 7
    source = Noise(frame=Frame(np.zeros((*SIZE, 3), np.uint8), label))
    packed = pack(tmp_path, source)
    if num_labelled == 0:
        with pytest.raises(InputError) as caught:
            check_labels(source, packed)
        train, val = caught.value.problems
        assert "They are train noise." in train
        assert "They are val noise." in val
        return
    warnings = check_labels(source, packed)
    assert len(warnings) == (2 if num_labelled < 192 else 0)
    if warnings:
        with pytest.raises(InputError):
            check_labels(replace(source, is_misread=True), packed)
    assert all(f"{100 * num_labelled / 384:.2g} %" in warning for warning in warnings)


# --- how it is read ---------------------------------------------------------------------------------------------


def test_frames_are_read_only(tmp_path: Path) -> None:
    packed = pack(tmp_path)
    for rows in (packed.train, packed.val):
        for array in (*rows.images, *rows.labels):
            with pytest.raises(ValueError, match="read-only"):
                array[...] = 0


def test_a_pack_of_another_format_or_split_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path).path
    with monkeypatch.context() as patch:
        patch.setattr(packed_module, "FORMAT_VERSION", 2)
        with pytest.raises(InputError, match=r"format 1\b.* 2\b"):
            open_packed(path)
    shutil.copy(path / "train.arrow", path / "val.arrow")
    with pytest.raises(InputError, match="7 rows of train, not 7 of val"):
        open_packed(path)


# --- when it is made, and when made again ------------------------------------------------------------------------


def test_a_pack_is_made_once_and_progress_counts_the_frames_of_both_splits(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    seen: list[tuple[int, int]] = []
    first = prepare_packed(Noise(), image_size=SIZE, cache_dir=tmp_path, progress=lambda *frame: seen.append(frame))
    second = pack(tmp_path)
    assert (first.path, first.digest) == (second.path, second.digest)
    logged = [record.message.split(":")[0] for record in caplog.records]
    assert logged == ["packing noise at 16x24", "classes of train", "classes of val"]
    assert seen == [(done, 10) for done in range(1, 11)]


def test_a_changed_source_is_packed_again_beside_the_old_pack(tmp_path: Path) -> None:
    write_frames(tmp_path / "data")
    address, cache = str(tmp_path / "data"), tmp_path / "cache"
    before = prepare_packed(open_source(address), image_size=(32, 64), cache_dir=cache)
    path = sorted((tmp_path / "data/leftImg8bit/train/town").iterdir())[2]
    Image.fromarray(np.full((32, 64, 3), 7, np.uint8)).save(path)
    after = prepare_packed(open_source(address), image_size=(32, 64), cache_dir=cache)
    assert (after.train.images[2] == 7).all()
    assert after.digest != before.digest
    assert open_packed(before.path).digest == before.digest


@pytest.mark.parametrize("num_bytes", [0, 1000, -1, None])
def test_a_truncated_or_missing_file_is_refused_and_packed_again(tmp_path: Path, num_bytes: int | None) -> None:
    packed = pack(tmp_path)
    path = packed.path / "train.arrow"
    whole = path.read_bytes()
    path.unlink()
    if num_bytes is not None:
        path.write_bytes(whole[:num_bytes])
    with pytest.raises(InputError, match=r"train\.arrow"):
        open_packed(packed.path)
    assert pack(tmp_path).digest == packed.digest
    assert path.read_bytes() == whole
    np.testing.assert_array_equal(packed.val.labels[0], Noise().load("val", 0).label)  # files outlive their names


def test_the_digest_depends_on_content_and_not_on_paths_or_times(tmp_path: Path) -> None:
    write_frames(tmp_path / "first")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    for path in (tmp_path / "second").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    sources = [open_source(str(tmp_path / folder)) for folder in ("first", "second")]
    assert sources[0].fingerprint != sources[1].fingerprint
    packs = [prepare_packed(source, image_size=(8, 12), cache_dir=tmp_path / "cache") for source in sources]
    assert packs[0].path != packs[1].path
    assert packs[0].digest == packs[1].digest


def test_all_damaged_frames_are_named_at_once_and_nothing_remains(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        pack(tmp_path, Noise(damaged=[("train", 0), ("train", 6), ("val", 1)]))
    assert caught.value.problems == tuple(
        f"{half} {frame} is damaged" for frame in ("train 0", "train 6", "val 1") for half in ("image", "label")
    )
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_disk_too_small_is_refused_before_the_first_frame(tmp_path: Path) -> None:
    huge = Noise(frame_size=(10_000_000, 10_000_000), damaged=[("train", 0)])  # three val labels of 100 TB
    with pytest.raises(OSError, match="packed frames need 300 TB"):
        check_room(huge, image_size=(32, 64), cache_dir=tmp_path / "cache")


# --- when it is damaged -----------------------------------------------------------------------------------------


def flip(path: Path, position: int, bit: int = 0) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        (byte,) = file.read(1)
        file.seek(position)
        file.write(bytes([byte ^ 1 << bit]))


def find(path: Path, array: ByteArray) -> int:
    """Return where in the file an array lies."""
    return path.read_bytes().index(array.tobytes())


def assert_equal(packed: Packed, sound: Packed) -> None:
    assert (packed.digest, packed.fingerprint, packed.source_name) == (sound.digest, sound.fingerprint, "noise")
    assert packed.class_counts.tolist() == sound.class_counts.tolist()
    for rows, expected in ((packed.train, sound.train), (packed.val, sound.val)):
        assert rows.names == expected.names
        for arrays, expected_arrays in ((rows.images, expected.images), (rows.labels, expected.labels)):
            np.testing.assert_array_equal(list(arrays), list(expected_arrays))


def test_whatever_bit_is_flipped_changes_nothing_or_the_pack_is_refused(tmp_path: Path) -> None:
    sound, path = pack(tmp_path / "sound"), pack(tmp_path).path / "train.arrow"
    size, rng = path.stat().st_size, np.random.default_rng(0)
    refused = 0
    for position in (*rng.integers(0, size, 300), *rng.integers(0, 3000, 100), *rng.integers(size - 2000, size, 100)):
        bit = int(rng.integers(8))
        flip(path, int(position), bit)
        packed = fetch_packed(path.parent.name, shared=None, cache_dir=tmp_path)
        if packed:  # the bit is of no use, as those between two arrays
            assert_equal(packed, sound)
        refused += packed is None
        flip(path, int(position), bit)
    assert refused > 400


def truncate(pack: Path) -> None:
    os.truncate(pack / "train.arrow", 1000)


def delete(pack: Path) -> None:
    (pack / "val.arrow").unlink()


def swap_splits(pack: Path) -> None:
    (pack / "train.arrow").rename(pack / "other")
    (pack / "val.arrow").rename(pack / "train.arrow")
    (pack / "other").rename(pack / "val.arrow")


def swap_train(pack: Path) -> None:
    """Take the frames of another source, of the same names and size."""
    shutil.copy(other_pack(pack) / "train.arrow", pack)


def swap_both(pack: Path) -> None:
    shutil.copytree(other_pack(pack), pack, dirs_exist_ok=True)


def other_pack(path: Path) -> Path:
    frame = Frame(np.zeros((*SIZE, 3), np.uint8), np.zeros(SIZE, np.uint8))
    return pack(path.parent / "other", Noise(fingerprint="second", frame=frame)).path


def flip_pixel(path: Path) -> None:
    flip(path / "val.arrow", find(path / "val.arrow", open_packed(path).val.labels[1]))


@pytest.mark.parametrize("damage", [truncate, delete, swap_splits, swap_train, swap_both, flip_pixel])
def test_a_damaged_pack_is_made_again_and_that_is_told(
    tmp_path: Path, damage: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    before = pack(tmp_path)
    assert before.replaced == ""
    damage(before.path)
    assert fetch_packed(before.path.name, shared=None, cache_dir=tmp_path) is None
    again = pack(tmp_path)
    assert_equal(again, pack(tmp_path / "elsewhere"))
    assert str(before.path) in again.replaced
    assert [record.message for record in caplog.records] == [f"{again.replaced}. They were packed again."]
    assert pack(tmp_path).replaced == "", "it is told once"


def test_a_frame_that_changes_under_an_open_pack_is_never_handed_out(tmp_path: Path) -> None:
    packed, sound = pack(tmp_path), pack(tmp_path / "sound")
    path = packed.path / "train.arrow"
    flip(path, find(path, packed.train.images[2]) + 100)
    flip(path, find(path, packed.train.labels[4]))
    for index, image in enumerate(sound.train.images):
        if index == 2:
            with pytest.raises(DamagedPackError, match=r"train\.arrow.*frame 2 "):
                packed.train.images[index]
        else:
            np.testing.assert_array_equal(packed.train.images[index], image)
    with pytest.raises(DamagedPackError, match="frame 4 "):
        packed.train.gather([3, 4], np.empty((2, 3, *SIZE), np.uint8), np.empty((2, *SIZE), np.uint8))
    os.truncate(path, find(path, packed.train.images[1]) + 10)
    for index in (1, 6):
        with pytest.raises(DamagedPackError, match=f"frame {index} "):
            packed.train.images[index]
    np.testing.assert_array_equal(packed.train.images[0], sound.train.images[0])
    assert_equal(pack(tmp_path), sound)
    shutil.rmtree(sound.path)
    assert len(list(sound.train.images)) == 7, "an open file outlives its name"


# --- several processes ------------------------------------------------------------------------------------------


def pack_and_log(cache_dir: Path, log: Path, start: threading.Barrier) -> None:
    logging.basicConfig(filename=log, level=logging.INFO)
    start.wait(200)
    pack(cache_dir)


def test_of_three_processes_one_packs_and_all_open_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    start = context.Barrier(len(logs))
    processes = [context.Process(target=pack_and_log, args=(tmp_path / "cache", log, start)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(log.read_text().count("packing noise") for log in logs) == 1
    assert {path.name for path in tmp_path.glob("cache/*/*")} == {"train.arrow", "val.arrow"}


def test_a_process_killed_while_packing_leaves_no_pack(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=pack, args=(tmp_path, Killed()))
    process.start()
    process.join(250)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert left.suffix == ".part"
    packed = pack(tmp_path)
    assert packed.digest == pack(tmp_path / "elsewhere").digest
    assert not left.exists()


# --- packs in object storage --------------------------------------------------------------------------------------

FETCH = """
import sys
from pathlib import Path
from tune_bisenet import storage
from tune_bisenet.data.packing import fetch_packed
storage.COPY_BYTES = 512
print(fetch_packed(sys.argv[1], shared=storage.Storage.at(sys.argv[2]), cache_dir=Path(sys.argv[3])).digest)
"""


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def streets(tmp_path_factory: pytest.TempPathFactory) -> Packed:
    return prepare_packed(STREETS, image_size=(32, 64), cache_dir=tmp_path_factory.mktemp("driver"))


@pytest.fixture
def shared(store: ObjectStore, streets: Packed, tmp_path: Path) -> Storage:
    """Give a folder with the published pack."""
    shared = Storage.at(store.uri(f"{tmp_path.name}/_packs"))
    publish_packed(streets.path, streets.digest, shared)
    store.requests.clear()
    return shared


def start_fetch(streets: Packed, shared: Storage, cache: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FETCH, streets.path.name, shared.uri, str(cache)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_published_pack_is_fetched_exactly(streets: Packed, shared: Storage, tmp_path: Path) -> None:
    fetched = fetch_packed(streets.path.name, shared=shared, cache_dir=tmp_path / "cache")
    assert fetched is not None
    assert fetched.digest == streets.digest
    assert {path.name for path in fetched.path.iterdir()} == {"train.arrow", "val.arrow"}
    for path in streets.path.iterdir():
        assert (fetched.path / path.name).read_bytes() == path.read_bytes()


def test_the_next_driver_fetches_the_pack_and_does_not_publish_it_again(
    store: ObjectStore, streets: Packed, shared: Storage, tmp_path: Path
) -> None:
    frames: list[tuple[int, int]] = []
    again = prepare_packed(
        STREETS, image_size=(32, 64), cache_dir=tmp_path, shared=shared, progress=lambda *frame: frames.append(frame)
    )
    assert frames == []
    assert again.digest == streets.digest
    store.requests.clear()
    publish_packed(again.path, again.digest, shared)
    assert store.asked("PUT", "") == []


def test_an_incomplete_pack_in_storage_and_one_mixed_of_two_are_not_used(
    streets: Packed, shared: Storage, tmp_path: Path
) -> None:
    assert fetch_packed("another", shared=shared, cache_dir=tmp_path) is None
    other = prepare_packed(replace(STREETS, seed=1), image_size=(32, 64), cache_dir=tmp_path)
    (shared / streets.path.name).upload(other.path / "train.arrow", "train.arrow")
    assert fetch_packed(streets.path.name, shared=shared, cache_dir=tmp_path) is None
    for name in ("train.arrow", "complete"):
        (shared / streets.path.name).delete(name)
        assert fetch_packed(streets.path.name, shared=shared, cache_dir=tmp_path) is None
    assert prepare_packed(STREETS, image_size=(32, 64), cache_dir=tmp_path, shared=shared).digest == streets.digest


def test_of_two_processes_on_a_node_one_fetches_and_the_other_waits(
    store: ObjectStore, streets: Packed, shared: Storage, tmp_path: Path
) -> None:
    processes = [start_fetch(streets, shared, tmp_path) for _ in range(2)]
    assert [process.communicate(timeout=250)[0].strip() for process in processes] == [streets.digest] * 2
    assert len(store.asked("GET", "/complete$")) == 1


@contextmanager
def halfway(store: ObjectStore) -> Iterator[None]:
    """Hold the answer to a request in the middle of train.arrow during the block."""
    requests: list[str] = []
    reached, proceed = threading.Event(), threading.Event()

    def hear(request: str) -> None:
        if "GET" in request and "/train.arrow" in request:
            requests.append(request)
            if len(requests) == 10:
                reached.set()
                proceed.wait(300)

    store.before_answer = hear
    try:
        assert reached.wait(250)
        yield
    finally:
        store.before_answer = lambda _request: None
        proceed.set()


def test_a_fetch_that_is_killed_leaves_no_pack_and_is_repeated(
    store: ObjectStore, streets: Packed, shared: Storage, tmp_path: Path
) -> None:
    process = start_fetch(streets, shared, tmp_path)
    with halfway(store):
        process.kill()
        process.communicate()
    assert [path.suffix for path in tmp_path.iterdir() if path.is_dir()] == [".part"]
    fetched = fetch_packed(streets.path.name, shared=shared, cache_dir=tmp_path)
    assert fetched is not None
    assert fetched.digest == streets.digest
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == [fetched.path]


def test_a_fetch_waits_for_storage_that_becomes_unreachable(
    store: ObjectStore, streets: Packed, shared: Storage, tmp_path: Path
) -> None:
    process = start_fetch(streets, shared, tmp_path)
    with halfway(store):
        store.go_away()
    assert process.stderr
    assert process.stderr.readline(), "the process has noticed"
    assert process.poll() is None
    store.come_back()
    assert process.communicate(timeout=250)[0].strip() == streets.digest


def test_the_suggested_size_fits_512x1024_in_multiples_of_32() -> None:
    frame_sizes = ((1024, 2048), (360, 480), (720, 960), (40, 2048))
    suggested = [suggested_image_size(frame_size) for frame_size in frame_sizes]
    assert suggested == [(512, 1024), (352, 480), (512, 672), (32, 1024)]
    with pytest.raises(ValueError, match=r"frames are 16x64 .*32 pixels or more"):
        suggested_image_size((16, 64))


FIVE = ClassSet(classes=tuple(LabelClass(name=f"thing {number}", id=10 * number) for number in range(5)))


def test_packs_keep_the_classes_of_their_source(tmp_path: Path) -> None:
    packed = pack(tmp_path, Noise(fingerprint="five", classes=FIVE), SIZE)
    assert open_packed(packed.path).classes == FIVE
    assert packed.class_counts.shape == packed.val_class_counts.shape == (5,)
    assert "thing 4" in packed.describe_classes("train")


def test_equal_labels_of_other_classes_have_another_digest(tmp_path: Path) -> None:
    label = np.zeros(SIZE, np.uint8)
    frame = Frame(np.zeros((*SIZE, 3), np.uint8), label)
    four = ClassSet(classes=FIVE.classes[:4])
    renamed = ClassSet(classes=(FIVE.classes[0].model_copy(update={"name": "other"}), *FIVE.classes[1:]))
    digests = {
        pack(tmp_path, Noise(fingerprint=str(number), classes=classes, frame=frame), SIZE).digest
        for number, classes in enumerate((CITYSCAPES, FIVE, four, renamed))
    }
    assert len(digests) == 4


MIXED: dict[Split, tuple[tuple[int, int], ...]] = {
    "train": (SIZE, (8, 8), (32, 24), SIZE, SIZE, SIZE, SIZE),
    "val": ((32, 20), (10, 12), (20, 32)),
}


def test_frames_of_different_sizes_are_packed_at_one_and_their_validation_labels_at_their_own(tmp_path: Path) -> None:
    source = Noise(frame_size=(32, 24), frame_sizes=MIXED)
    packed = open_packed(pack(tmp_path, source, SIZE).path)
    assert {image.shape for split in (packed.train, packed.val) for image in split.images} == {(3, *SIZE)}
    assert {label.shape for label in packed.train.labels} == {SIZE}
    for index, label in enumerate(packed.val.labels):
        assert np.array_equal(label, source.load("val", index).label)
    assert tuple(packed.val.label_sizes) == MIXED["val"]
    for split in SPLITS:
        labels = np.concatenate([source.load(split, index).label.ravel() for index in range(len(MIXED[split]))])
        shares = np.bincount(labels, minlength=256)[:19] / labels.size
        assert packed.class_shares(split) == pytest.approx(shares)


def test_frames_that_differ_in_size_alone_have_another_digest(tmp_path: Path) -> None:
    def blank(sizes: Mapping[Split, tuple[tuple[int, int], ...]]) -> str:
        class Blank(Noise):
            def load(self, split: Split, index: int) -> Frame:
                size = sizes[split][index]
                return Frame(np.zeros((*size, 3), np.uint8), np.zeros(size, np.uint8))

        return pack(tmp_path, Blank(fingerprint=str(sizes), frame_sizes=sizes), SIZE).digest

    turned: dict[Split, tuple[tuple[int, int], ...]] = {"train": MIXED["train"], "val": ((32, 20), (12, 10), (20, 32))}
    assert blank(MIXED) != blank(turned)


def test_a_pack_whose_sizes_do_not_fit_its_labels_is_damaged(tmp_path: Path) -> None:
    packed = pack(tmp_path, Noise(frame_size=(32, 24), frame_sizes=MIXED), SIZE)
    path = packed.path / "val.arrow"
    path.write_bytes(path.read_bytes().replace(b"[[32, 20], [10, 12]", b"[[99, 99], [10, 12]"))
    with pytest.raises(DamagedPackError):
        open_packed(packed.path)
