"""The Cityscapes layout on disk, with real PNG files in it: what is read, and what is said of files in the way."""

import os
import pickle
import shutil
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tune_bisenet.data.cityscapes import Cityscapes, open_cityscapes
from tune_bisenet.data.source import SPLITS, DataError, Split

# From the label table of cityscapesScripts, by hand; every other id is void.
TRAIN_ID_OF_LABEL_ID = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip
FRAMES: dict[Split, tuple[str, ...]] = {"train": ("aachen/a_1", "aachen/a_2", "bonn/b_1"), "val": ("ulm/u_1",)}
SIZE = (4, 6)


def image_path(root: Path, split: str, name: str) -> Path:
    return root / "leftImg8bit" / split / f"{name}_leftImg8bit.png"


def label_path(root: Path, split: str, name: str, kind: str = "labelIds") -> Path:
    return root / "gtFine" / split / f"{name}_gtFine_{kind}.png"


def save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def write(root: Path, kind: str = "labelIds") -> None:
    rng = np.random.default_rng(0)
    for split, names in FRAMES.items():
        for name in names:
            save(image_path(root, split, name), rng.integers(0, 256, (*SIZE, 3)))
            save(label_path(root, split, name, kind), rng.integers(0, 19, SIZE))


def claim_size(path: Path, height: int, width: int) -> None:
    """Change the size in a PNG's header, and its checksum, leaving the pixels as they are."""
    header = b"IHDR" + struct.pack(">II", width, height) + path.read_bytes()[24:29]
    path.write_bytes(path.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + path.read_bytes()[33:])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "cityscapes")
    return tmp_path / "cityscapes"


def problems_of(root: Path) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        open_cityscapes(root)
    return caught.value.problems


def load_problems(source: Cityscapes, split: Split = "train", index: int = 0) -> tuple[str, ...]:
    with pytest.raises(DataError) as caught:
        source.load(split, index)
    return caught.value.problems


# --- what is read -----------------------------------------------------------------------------------------------


def test_frames_are_found_by_split_in_the_order_of_their_names(root: Path) -> None:
    source = open_cityscapes(root)
    assert {split: tuple(source.names(split)) for split in SPLITS} == FRAMES
    assert source.frame_size == SIZE
    assert source.name == str(root)


def test_images_are_read_as_they_were_written(root: Path) -> None:
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    save(image_path(root, "train", "aachen/a_2"), pixels)
    np.testing.assert_array_equal(open_cityscapes(root).load("train", 1).image, pixels)


@pytest.mark.parametrize("mode", ["L", "P"])
def test_every_label_id_becomes_its_train_id_and_all_others_void(root: Path, mode: str) -> None:
    ids = [*range(34), 255, 255]
    for split, names in FRAMES.items():
        for name in names:
            save(image_path(root, split, name), np.zeros((6, 6, 3)))
            save(label_path(root, split, name), np.array(ids).reshape(6, 6))
    path = label_path(root, "train", "aachen/a_1")
    picture = Image.frombytes(mode, (6, 6), bytes(ids))
    if mode == "P":
        picture.putpalette([255 - value // 3 for value in range(768)])
    picture.save(path)
    label = open_cityscapes(root).load("train", 0).label
    assert label.dtype == np.uint8
    assert label.ravel().tolist() == [TRAIN_ID_OF_LABEL_ID.get(label_id, 255) for label_id in ids]


def test_label_train_ids_are_taken_as_they_are_where_only_they_exist(tmp_path: Path) -> None:
    write(tmp_path, kind="labelTrainIds")
    ids = np.array([*range(19), 255, 255, 255, 255, 255]).reshape(SIZE)
    save(label_path(tmp_path, "train", "aachen/a_1", "labelTrainIds"), ids)
    np.testing.assert_array_equal(open_cityscapes(tmp_path).load("train", 0).label, ids)


def test_label_ids_are_preferred_to_label_train_ids(root: Path) -> None:
    write(root, kind="labelTrainIds")
    save(label_path(root, "train", "aachen/a_1"), np.full(SIZE, 26))
    save(label_path(root, "train", "aachen/a_1", "labelTrainIds"), np.full(SIZE, 5))
    assert (open_cityscapes(root).load("train", 0).label == 13).all()


def test_symbolic_links_are_followed(root: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "gtFine").symlink_to(root / "gtFine")
    for split in SPLITS:
        (linked / "leftImg8bit" / split).mkdir(parents=True)
        for city in (root / "leftImg8bit" / split).iterdir():
            (linked / "leftImg8bit" / split / city.name).symlink_to(city)
    assert open_cityscapes(linked).names("train") == FRAMES["train"]


# --- the fingerprint --------------------------------------------------------------------------------------------


def test_the_fingerprint_stays_while_no_file_changes(root: Path) -> None:
    assert open_cityscapes(root).fingerprint == open_cityscapes(root).fingerprint


def test_the_fingerprint_follows_times_sizes_and_names(root: Path) -> None:
    fingerprints = [open_cityscapes(root).fingerprint]
    os.utime(label_path(root, "val", "ulm/u_1"), ns=(1, 1))
    fingerprints.append(open_cityscapes(root).fingerprint)
    for path_of in (image_path, label_path):
        path_of(root, "train", "bonn/b_1").rename(path_of(root, "train", "bonn/b_2"))
    fingerprints.append(open_cityscapes(root).fingerprint)
    assert len(set(fingerprints)) == 3


# --- the wrong folder -------------------------------------------------------------------------------------------


def test_a_missing_folder_is_named_with_what_is_expected_and_the_way_out(tmp_path: Path) -> None:
    d = tmp_path / "nowhere"
    assert problems_of(d) == (
        f"no Cityscapes under {d}: expected {d}/leftImg8bit/train and {d}/gtFine/train; there is no such folder. Point "
        "--data at the folder that holds them, or leave --data out: the built-in streets need no download.",
    )


def test_a_file_in_place_of_the_folder_is_called_a_file(tmp_path: Path) -> None:
    (tmp_path / "leftImg8bit_trainvaltest.zip").touch()
    assert "that is a file" in problems_of(tmp_path / "leftImg8bit_trainvaltest.zip")[0]


@pytest.mark.parametrize("given", ["cityscapes/leftImg8bit", "cityscapes/gtFine/train/aachen", "."])
def test_the_folder_that_was_meant_is_named_for_an_inner_or_outer_one(root: Path, given: str) -> None:
    assert problems_of(root.parent / given)[0].endswith(f"point --data at {root}.")


# --- frames in the way, each made by one change to a good tree ------------------------------------------------------


def test_a_split_without_files_is_named_with_the_archive_that_holds_them(root: Path) -> None:
    shutil.rmtree(root / "gtFine" / "val")
    shutil.rmtree(root / "leftImg8bit" / "train")
    (root / "leftImg8bit" / "train").mkdir()
    assert problems_of(root) == (
        f"no frames in {root}/leftImg8bit/train: expected CITY/*_leftImg8bit.png there. "
        f"Unpack leftImg8bit_trainvaltest.zip into {root}.",
        f"no frames in {root}/gtFine/val: expected CITY/*_gtFine_labelIds.png there. "
        f"Unpack gtFine_trainvaltest.zip into {root}.",
    )


def test_an_image_without_label_and_a_label_without_image_are_named(root: Path) -> None:
    label_path(root, "train", "aachen/a_1").unlink()
    image_path(root, "train", "bonn/b_1").unlink()
    without_label, without_image = problems_of(root)
    expected = label_path(root, "train", "aachen/a_1")
    assert without_label.startswith(f"{image_path(root, 'train', 'aachen/a_1')} has no label: expected {expected}.")
    expected = image_path(root, "train", "bonn/b_1")
    assert without_image.startswith(f"{label_path(root, 'train', 'bonn/b_1')} has no image: expected {expected}.")


def test_a_label_of_another_size_than_its_image_is_named(root: Path) -> None:
    save(label_path(root, "train", "aachen/a_2"), np.zeros((2, 3)))
    (problem,) = problems_of(root)
    assert problem.startswith(f"{label_path(root, 'train', 'aachen/a_2')} is 2x3 but its image")


def test_a_frame_of_another_size_than_the_others_is_named(root: Path) -> None:
    save(image_path(root, "train", "aachen/a_1"), np.zeros((2, 3, 3)))
    save(label_path(root, "train", "aachen/a_1"), np.zeros((2, 3)))
    (problem,) = problems_of(root)
    assert problem.startswith(f"{image_path(root, 'train', 'aachen/a_1')} is 2x3 but most frames are 4x6")


@pytest.mark.parametrize("num_bytes", [0, 7, 20, 40])
def test_a_file_cut_short_in_its_header_is_named(root: Path, num_bytes: int) -> None:
    path = image_path(root, "val", "ulm/u_1")
    path.write_bytes(path.read_bytes()[:num_bytes])
    (problem,) = problems_of(root)
    assert problem.startswith(f"{path} cannot be read as PNG (")


def test_a_jpeg_under_the_name_of_a_png_is_refused(root: Path) -> None:
    path = image_path(root, "val", "ulm/u_1")
    Image.new("RGB", (6, 4)).save(path, format="JPEG")
    (problem,) = problems_of(root)
    assert problem.startswith(f"{path} cannot be read as PNG")


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_an_image_that_is_not_rgb_is_refused(root: Path, mode: str) -> None:
    path = image_path(root, "train", "aachen/a_1")
    Image.new(mode, (6, 4)).save(path)
    (problem,) = problems_of(root)
    assert problem.startswith(f"{path} has Pillow's mode {mode!r}: an image is 8-bit RGB.")


@pytest.mark.parametrize("mode", ["RGB", "I;16", "1", "LA"])
def test_a_label_that_is_not_one_channel_of_8_bits_is_refused(root: Path, mode: str) -> None:
    path = label_path(root, "train", "aachen/a_1")
    Image.new(mode, (6, 4)).save(path)
    (problem,) = problems_of(root)
    assert problem.startswith(f"{path} has Pillow's mode {mode!r}: a label is one channel of 8-bit ids.")


@pytest.mark.parametrize("warn", ["error", "ignore"])
@pytest.mark.parametrize("side", [8_193, 100_000])
def test_a_small_file_that_unfolds_to_a_huge_frame_is_refused_before_it_is_decoded(
    root: Path, side: int, warn: str
) -> None:
    path = image_path(root, "train", "aachen/a_1")
    claim_size(path, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter(warn)  # type: ignore[arg-type]
        (problem,) = problems_of(root)
    assert problem.startswith(f"{path} claims more than 67,108,864 pixels")


def test_all_problems_are_reported_at_once(root: Path) -> None:
    label_path(root, "train", "aachen/a_1").unlink()
    image_path(root, "train", "aachen/a_2").write_bytes(b"")
    Image.new("RGBA", (6, 4)).save(label_path(root, "train", "bonn/b_1"))
    shutil.rmtree(root / "gtFine" / "val")
    said = "\n".join(problems_of(root))
    assert said.count("\n") == 3
    for path in (
        label_path(root, "train", "aachen/a_1"),
        image_path(root, "train", "aachen/a_2"),
        label_path(root, "train", "bonn/b_1"),
        root / "gtFine" / "val",
    ):
        assert str(path) in said


def test_a_long_list_of_problems_is_kept_whole_and_cut_where_it_is_read(root: Path) -> None:
    for number in range(50):
        save(image_path(root, "val", f"ulm/x_{number:02}"), np.zeros((*SIZE, 3)))
    with pytest.raises(DataError) as caught:
        open_cityscapes(root)
    *first, last = str(caught.value).splitlines()
    assert (first, last) == ([*caught.value.problems[:20]], "and 30 more")
    assert len(caught.value.problems) == 50


def test_an_error_stays_whole_when_it_is_pickled() -> None:
    error = pickle.loads(pickle.dumps(DataError(["one", "two"])))
    assert (error.problems, str(error)) == (("one", "two"), "one\ntwo")


# --- what only decoding shows -----------------------------------------------------------------------------------


def test_unknown_label_ids_are_named_with_their_number_of_pixels(root: Path) -> None:
    ids = np.zeros(SIZE)
    ids[0, :3], ids[1, 0] = 34, 254
    path = label_path(root, "train", "aachen/a_1")
    save(path, ids)
    (problem,) = load_problems(open_cityscapes(root))
    assert problem.startswith(
        f"{path} holds the ids 34 (3 pixels), 254 (1 pixels): *_gtFine_labelIds.png holds 0 to 33"
    )


def test_label_train_ids_above_18_are_refused(tmp_path: Path) -> None:
    write(tmp_path, kind="labelTrainIds")
    save(label_path(tmp_path, "train", "aachen/a_1", "labelTrainIds"), np.full(SIZE, 19))
    (problem,) = load_problems(open_cityscapes(tmp_path))
    assert "holds the ids 19 (24 pixels): *_gtFine_labelTrainIds.png holds 0 to 18, and 255 for void" in problem


def test_both_halves_of_a_frame_cut_short_in_their_pixels_are_named(root: Path) -> None:
    paths = image_path(root, "train", "aachen/a_1"), label_path(root, "train", "aachen/a_1")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-25])
    problems = load_problems(open_cityscapes(root))
    assert [problem.startswith(f"{path} cannot be read") for path, problem in zip(paths, problems, strict=True)] == [
        True,
        True,
    ]


def test_a_file_that_vanished_since_it_was_checked_is_named(root: Path) -> None:
    source = open_cityscapes(root)
    image_path(root, "train", "aachen/a_1").unlink()
    (problem,) = load_problems(source)
    assert problem.startswith(str(image_path(root, "train", "aachen/a_1")))


# --- real frames ------------------------------------------------------------------------------------------------


def test_camvid_in_this_layout_opens_with_its_11_classes() -> None:
    folder = os.environ.get("TUNE_BISENET_CAMVID")
    if not folder:
        pytest.skip("set TUNE_BISENET_CAMVID to a folder with CamVid's 60 + 20 small set in Cityscapes layout")
    source = open_cityscapes(Path(folder))
    assert [len(source.names(split)) for split in SPLITS] == [60, 20]
    assert source.frame_size == (360, 480)
    seen = set()
    for split in SPLITS:
        for index in range(len(source.names(split))):
            frame = source.load(split, index)
            assert frame.image.shape == (360, 480, 3)
            seen |= set(np.unique(frame.label).tolist())
    assert seen == {0, 1, 2, 4, 5, 7, 8, 10, 11, 12, 13, 255}
