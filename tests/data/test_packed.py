"""One pack a node: exact, mapped and not copied, made once, and made anew whenever it is not what it should be."""

import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from tune_bisenet.data import packed as packed_module
from tune_bisenet.data import packing
from tune_bisenet.data.cityscapes import open_cityscapes
from tune_bisenet.data.packed import Packed, open_packed, suggested_image_size
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.source import SPLITS, DataError, Frame, Split

SIZE = (16, 24)
NAMES: dict[Split, tuple[str, ...]] = {
    "train": tuple(f"bonn/b_{number}" for number in range(7)),
    "val": tuple(f"ulm/u_{number}" for number in range(3)),
}


@dataclass
class Noise:
    """A source of random frames; `damaged` ones cannot be loaded."""

    name: str = "noise"
    fingerprint: str = "first"
    frame_size: tuple[int, int] = SIZE
    damaged: Sequence[tuple[Split, int]] = field(default_factory=tuple)

    def names(self, split: Split) -> Sequence[str]:
        return NAMES[split]

    def load(self, split: Split, index: int) -> Frame:
        if (split, index) in self.damaged:
            raise DataError([f"image {split} {index} is damaged", f"label {split} {index} is damaged"])
        rng = np.random.default_rng([SPLITS.index(split), index])
        label = rng.choice(np.array([*range(19), 255], np.uint8), self.frame_size)
        return Frame(rng.integers(0, 256, (*self.frame_size, 3), np.uint8), label)


@dataclass
class Same(Noise):
    """A source whose frames are all the same one."""

    frame: Frame = field(default_factory=lambda: Noise().load("train", 0))

    def load(self, split: Split, index: int) -> Frame:
        return self.frame


class Killed(Noise):
    """A source whose process dies at once, as by SIGKILL, at the fifth frame."""

    def load(self, split: Split, index: int) -> Frame:
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().load(split, index)


def pack(cache_dir: Path, source: Noise | None = None, image_size: tuple[int, int] = SIZE) -> Packed:
    return prepare(source or Noise(), image_size=image_size, cache_dir=cache_dir)


def arrow_files(cache_dir: Path) -> list[Path]:
    return sorted(cache_dir.glob("*/*.arrow"))


def write_cityscapes(root: Path) -> None:
    source = Noise()
    for split in SPLITS:
        for index, name in enumerate(NAMES[split]):
            frame = source.load(split, index)
            for top, pixels, suffix in (("leftImg8bit", frame.image, ""), ("gtFine", frame.label % 34, "_labelIds")):
                path = root / top / split / f"{name}_{top}{suffix}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(path)


# --- what is in it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_rows", [64, 3])
def test_pixels_and_labels_come_back_exactly_where_nothing_is_resized(
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


def test_train_is_resized_whole_and_val_keeps_the_labels_it_is_scored_on(tmp_path: Path) -> None:
    packed = pack(tmp_path, image_size=(8, 12))
    assert {image.shape for rows in (packed.train, packed.val) for image in rows.images} == {(3, 8, 12)}
    assert {label.shape for label in packed.train.labels} == {(8, 12)}
    assert {label.shape for label in packed.val.labels} == {SIZE}
    assert (packed.image_size, packed.label_size) == ((8, 12), SIZE)
    np.testing.assert_array_equal(packed.val.labels[2], Noise().load("val", 2).label)


def test_halving_takes_the_mean_of_four_pixels_and_one_of_their_labels(tmp_path: Path) -> None:
    packed, frame = pack(tmp_path, image_size=(8, 12)), Noise().load("train", 1)
    boxes = frame.image.reshape(8, 2, 12, 2, 3).mean((1, 3)).transpose(2, 0, 1)
    assert np.abs(packed.train.images[1] - boxes).max() <= 0.5
    label_boxes = frame.label.reshape(8, 2, 12, 2).transpose(0, 2, 1, 3).reshape(8, 12, 4)
    assert (label_boxes == packed.train.labels[1][..., None]).any(-1).all()


@pytest.mark.parametrize("image_size", [(10, 20), (16, 12), (32, 24)])
def test_any_other_size_keeps_flat_colours_and_makes_no_new_label(tmp_path: Path, image_size: tuple[int, int]) -> None:
    label = np.full(SIZE, 3, np.uint8)
    label[:, 12:] = 18
    packed = pack(tmp_path, Same(frame=Frame(np.full((*SIZE, 3), (10, 20, 30), np.uint8), label)), image_size)
    assert packed.train.images[0].reshape(3, -1).T.tolist() == [[10, 20, 30]] * (image_size[0] * image_size[1])
    assert set(np.unique(packed.train.labels[0])) == {3, 18}


def test_classes_are_counted_on_the_train_labels_before_resizing_without_void(tmp_path: Path) -> None:
    label = np.full(SIZE, 255, np.uint8)
    label[0, :5], label[1, :2] = 0, 18
    counts = pack(tmp_path, Same(frame=Frame(np.zeros((*SIZE, 3), np.uint8), label)), (8, 12)).class_counts
    assert counts.dtype == np.int64
    assert counts.tolist() == [7 * 5, *[0] * 17, 7 * 2]  # seven frames of train


def test_the_schema_tells_source_state_and_sizes_to_any_reader_of_arrow(tmp_path: Path) -> None:
    val = pack(tmp_path, image_size=(8, 12)).path / "val.arrow"
    schema = pa.ipc.open_file(pa.memory_map(str(val))).schema
    assert {key.decode(): value.decode() for key, value in schema.metadata.items()} == {
        "format_version": "1",
        "source_name": '"noise"',
        "fingerprint": '"first"',
        "split": '"val"',
        "num_rows": "3",
        "image_size": "[8, 12]",
        "label_size": "[16, 24]",
    }
    assert [(column.name, column.type) for column in schema] == [
        ("name", pa.string()),
        ("image", pa.binary(3 * 8 * 12)),
        ("label", pa.binary(16 * 24)),
    ]


# --- how it is read ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of memory maps")
def test_rows_are_read_only_views_into_the_memory_map(tmp_path: Path) -> None:
    packed = pack(tmp_path)
    maps = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(packed.path) in line]
    ranges = [tuple(int(end, 16) for end in line[0].split("-")) for line in maps]
    for rows in (packed.train, packed.val):
        for view in (*rows.images, *rows.labels):
            assert any(start <= view.ctypes.data and view.ctypes.data + view.nbytes <= end for start, end in ranges)
            with pytest.raises(ValueError, match="read-only"):
                view[...] = 0


def test_gather_copies_the_named_rows_in_their_order(tmp_path: Path) -> None:
    train = pack(tmp_path).train
    images, labels = np.zeros((3, 3, *SIZE), np.uint8), np.zeros((3, *SIZE), np.uint8)
    train.gather([4, 0, 4], images, labels)
    for row, index in enumerate([4, 0, 4]):
        np.testing.assert_array_equal(images[row], train.images[index])
        np.testing.assert_array_equal(labels[row], train.labels[index])


def test_an_opened_pack_equals_the_prepared_one(tmp_path: Path) -> None:
    prepared = pack(tmp_path)
    opened = open_packed(prepared.path)
    assert (opened.digest, opened.source_name, opened.fingerprint) == (prepared.digest, "noise", "first")
    np.testing.assert_array_equal(opened.class_counts, prepared.class_counts)
    np.testing.assert_array_equal(opened.val.images[2], prepared.val.images[2])


def test_opening_what_is_no_pack_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no pack at .*train\.arrow: it is made when a search starts"):
        open_packed(tmp_path)


@pytest.mark.parametrize("num_bytes", [0, 100, -1])
def test_opening_a_truncated_file_says_so(tmp_path: Path, num_bytes: int) -> None:
    path = pack(tmp_path).path / "val.arrow"
    path.write_bytes(path.read_bytes()[:num_bytes])
    with pytest.raises(DataError, match=r"val\.arrow is no whole pack"):
        open_packed(path.parent)


def test_opening_a_pack_of_another_format_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = pack(tmp_path).path
    monkeypatch.setattr(packed_module, "FORMAT_VERSION", 2)
    with pytest.raises(DataError, match="it has format 1, this program reads 2"):
        open_packed(path)


def test_a_file_under_the_name_of_the_other_split_is_noticed(tmp_path: Path) -> None:
    path = pack(tmp_path).path
    shutil.copy(path / "train.arrow", path / "val.arrow")
    with pytest.raises(DataError, match="it holds 7 rows of train, not 7 of val"):
        open_packed(path)


# --- when it is made, and when made anew ------------------------------------------------------------------------


def test_a_second_prepare_opens_what_the_first_one_packed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    first = pack(tmp_path)
    second = pack(tmp_path)
    assert (first.path, first.digest) == (second.path, second.digest)
    assert [record.message.split(":")[0] for record in caplog.records] == ["packing noise at 16x24"]


def test_another_image_size_gives_another_pack_beside_the_first(tmp_path: Path) -> None:
    packs = [pack(tmp_path, image_size=size) for size in (SIZE, (8, 12))]
    assert len({packed.path for packed in packs}) == len({packed.digest for packed in packs}) == 2
    assert packs[0].digest == open_packed(packs[0].path).digest


def test_progress_counts_the_frames_of_both_splits(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    prepare(Noise(), image_size=SIZE, cache_dir=tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(done, 10) for done in range(1, 11)]


def test_a_changed_source_file_is_packed_anew_and_the_old_pack_stays_for_who_reads_it(tmp_path: Path) -> None:
    write_cityscapes(tmp_path / "data")
    before = prepare(open_cityscapes(tmp_path / "data"), image_size=SIZE, cache_dir=tmp_path / "cache")
    path = tmp_path / "data/leftImg8bit/train/bonn/b_2_leftImg8bit.png"
    Image.fromarray(np.full((*SIZE, 3), 7, np.uint8)).save(path)
    after = prepare(open_cityscapes(tmp_path / "data"), image_size=SIZE, cache_dir=tmp_path / "cache")
    assert (after.train.images[2] == 7).all()
    assert after.digest != before.digest
    assert open_packed(before.path).digest == before.digest


def test_every_changed_byte_is_either_noticed_or_changes_nothing(tmp_path: Path) -> None:
    packed = pack(tmp_path, image_size=(4, 6))
    images = np.stack(packed.train.images)
    path = packed.path / "train.arrow"
    whole = path.read_bytes()
    for position in range(5, len(whole), len(whole) // 150):
        replace(path, whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        repaired = pack(tmp_path, image_size=(4, 6))
        assert repaired.digest == packed.digest
        np.testing.assert_array_equal(np.stack(repaired.train.images), images)


def test_a_changed_pixel_is_noticed_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    packed = pack(tmp_path)
    path = packed.path / "val.arrow"
    whole, pixels = path.read_bytes(), packed.val.images[1].tobytes()
    position = whole.index(pixels) + 99
    replace(path, whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    caplog.set_level(logging.INFO)
    assert pack(tmp_path).digest == packed.digest
    assert path.read_bytes() == whole
    assert "is damaged: 1 of 2 record batches are not as written" in caplog.text


@pytest.mark.parametrize("num_bytes", [0, 1000, -1, None])
def test_a_truncated_or_missing_file_is_made_anew(tmp_path: Path, num_bytes: int | None) -> None:
    packed = pack(tmp_path)
    path = packed.path / "train.arrow"
    whole = path.read_bytes()
    path.unlink()
    if num_bytes is not None:
        path.write_bytes(whole[:num_bytes])
    assert pack(tmp_path).digest == packed.digest
    assert path.read_bytes() == whole


def test_views_that_are_open_outlive_the_pack_being_made_anew(tmp_path: Path) -> None:
    packed = pack(tmp_path)
    (packed.path / "val.arrow").unlink()
    pack(tmp_path)
    np.testing.assert_array_equal(packed.val.labels[0], Noise().load("val", 0).label)


def test_the_digest_follows_content_and_not_paths_or_times(tmp_path: Path) -> None:
    write_cityscapes(tmp_path / "here")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    for path in (tmp_path / "there").rglob("*.png"):
        os.utime(path, ns=(1, 1))
    here, there = (open_cityscapes(tmp_path / place) for place in ("here", "there"))
    assert here.fingerprint != there.fingerprint
    packs = [prepare(source, image_size=(8, 12), cache_dir=tmp_path / "cache") for source in (here, there)]
    assert packs[0].path != packs[1].path
    assert packs[0].digest == packs[1].digest


# --- what stops it ----------------------------------------------------------------------------------------------


def test_all_damaged_frames_are_named_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        pack(tmp_path, Noise(damaged=[("train", 0), ("train", 6), ("val", 1)]))
    assert caught.value.problems == tuple(
        f"{half} {frame} is damaged" for frame in ("train 0", "train 6", "val 1") for half in ("image", "label")
    )
    assert not arrow_files(tmp_path)
    assert [path.suffix for path in tmp_path.iterdir()] == [".lock"]


def test_a_disk_too_small_is_refused_before_the_first_frame(tmp_path: Path) -> None:
    huge = Noise(frame_size=(10_000_000, 10_000_000), damaged=[("train", 0)])  # three val labels of 100 TB
    with pytest.raises(
        DataError, match=r"packed frames need 300,000\.0 GB in .*, where [\d,.]+ GB are free: remove packs"
    ):
        pack(tmp_path, huge)


# --- several processes ------------------------------------------------------------------------------------------


def prepare_and_log(cache_dir: Path, log: Path, start: threading.Barrier) -> None:
    logging.basicConfig(filename=log, level=logging.INFO)
    start.wait(200)
    pack(cache_dir)


def prepare_and_be_killed(cache_dir: Path) -> None:
    pack(cache_dir, Killed())


def test_of_three_processes_at_once_one_packs_and_all_open_the_same(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    start = context.Barrier(len(logs))
    processes = [context.Process(target=prepare_and_log, args=(tmp_path / "cache", log, start)) for log in logs]
    for process in processes:
        process.start()
    for process in processes:
        process.join(250)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert sum(log.read_text().count("packing noise") for log in logs) == 1
    assert [path.name for path in arrow_files(tmp_path / "cache")] == ["train.arrow", "val.arrow"]


def test_a_process_killed_while_packing_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    process = multiprocessing.get_context("spawn").Process(target=prepare_and_be_killed, args=(tmp_path,))
    process.start()
    process.join(250)
    assert process.exitcode == -signal.SIGKILL
    (left,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert left.suffix == ".part"
    packed = pack(tmp_path)
    assert packed.digest == pack(tmp_path / "elsewhere").digest
    assert not left.exists()


# --- the suggested size -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("frame_size", "image_size"),
    [
        ((1024, 2048), (512, 1024)),
        ((512, 1024), (512, 1024)),
        ((360, 480), (352, 480)),
        ((720, 960), (512, 672)),
        ((1208, 1920), (512, 800)),
        ((40, 2048), (32, 1024)),
        ((32, 32), (32, 32)),
    ],
)
def test_the_suggested_size_fits_512x1024_in_multiples_of_32(
    frame_size: tuple[int, int], image_size: tuple[int, int]
) -> None:
    assert suggested_image_size(frame_size) == image_size


def test_frames_below_32_pixels_have_no_suggested_size() -> None:
    with pytest.raises(ValueError, match=r"frames are 16x64 .*32 pixels or more"):
        suggested_image_size((16, 64))


def replace(path: Path, content: bytes) -> None:
    """Put a new file in place of the old one, whose memory may be mapped."""
    new = path.with_suffix(".new")
    new.write_bytes(content)
    new.replace(path)
