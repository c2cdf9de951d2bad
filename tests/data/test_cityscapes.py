"""The Cityscapes layout with real PNG files, on disk and in object storage: what is read, and what is refused."""

import json
import os
import pickle
import shutil
import struct
import warnings
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pytest
from helpers.object_store import ObjectStore, object_store
from helpers.searches import write_frames
from PIL import Image

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.data.packing import check_labels, check_reachable, open_source, prepare_packed
from tune_bisenet.data.source import SPLITS, Split, frame_group
from tune_bisenet.options import InputError

# From the label table of cityscapesScripts, by hand; every other id is void.
TRAIN_ID_OF_LABEL_ID = {
    7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13, 27: 14, 28: 15,
    31: 16, 32: 17, 33: 18,
}  # fmt: skip
FRAMES: dict[Split, tuple[str, ...]] = {"train": ("aachen/a_1", "aachen/a_2", "bonn/b_1"), "val": ("ulm/u_1",)}
SIZE = (4, 6)
TOWN_LABELS = "gtFine/train/town"


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


def chunk(kind: bytes, content: bytes) -> bytes:
    """Return a chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def save_png(path: Path, *, depth: int, colour_type: int, rows: list[bytes], colours: bytes = b"") -> None:
    """Write a PNG six pixels wide of a kind that Pillow does not write."""
    header = struct.pack(">IIBBBBB", 6, len(rows), depth, colour_type, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    parts = [chunk(b"IHDR", header), chunk(b"PLTE", colours) if colours else b"", chunk(b"IDAT", pixels)]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b""))


def claim_size(path: Path, height: int, width: int) -> None:
    """Change the size in a PNG's header, and its checksum, leaving the pixels as they are."""
    header = b"IHDR" + struct.pack(">II", width, height) + path.read_bytes()[24:29]
    path.write_bytes(path.read_bytes()[:12] + header + struct.pack(">I", zlib.crc32(header)) + path.read_bytes()[33:])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "cityscapes")
    return tmp_path / "cityscapes"


def problems_of(root: Path | str, *, decode: bool = False) -> tuple[str, ...]:
    """Return what is wrong with the headers, or with the pixels of the first frame."""
    source = open_source(str(root)) if decode else None
    with pytest.raises(InputError) as caught:
        source.load("train", 0) if source else open_source(str(root))
    return caught.value.problems


# --- what is read -----------------------------------------------------------------------------------------------


def test_frames_are_found_by_split_in_the_order_of_their_names_and_read_exactly(root: Path) -> None:
    pixels = np.arange(4 * 6 * 3).reshape(4, 6, 3)
    save(image_path(root, "train", "aachen/a_2"), pixels)
    source = open_source(str(root))
    assert {split: tuple(source.names(split)) for split in SPLITS} == FRAMES
    assert source.frame_size == SIZE
    assert source.name == str(root)
    assert open_source(root.as_uri()).name == str(root), "a file URI is a local folder"
    np.testing.assert_array_equal(source.load("train", 1).image, pixels)


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
        picture.putpalette(bytes(value % 251 for value in range(768)))
    picture.save(path)
    label = open_source(str(root)).load("train", 0).label
    assert label.dtype == np.uint8
    assert label.ravel().tolist() == [TRAIN_ID_OF_LABEL_ID.get(label_id, 255) for label_id in ids]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_a_palette_of_any_depth_holds_ids(root: Path, depth: int) -> None:
    ids = [index % min(2**depth, 34) for index in range(24)]
    bits = [f"{label_id:0{depth}b}" for label_id in ids]
    rows = ["".join(bits[start : start + 6]).ljust(-(-6 * depth // 8) * 8, "0") for start in range(0, 24, 6)]
    packed_rows = [int(row, 2).to_bytes(len(row) // 8) for row in rows]
    colours = bytes(value % 251 for value in range(3 * 2**depth))
    path = label_path(root, "train", "aachen/a_1")
    save_png(path, depth=depth, colour_type=3, rows=packed_rows, colours=colours)
    label = open_source(str(root)).load("train", 0).label
    assert label.ravel().tolist() == [TRAIN_ID_OF_LABEL_ID.get(label_id, 255) for label_id in ids]


def test_a_palette_whose_colours_name_its_ids_is_read(root: Path) -> None:
    path = label_path(root, "train", "aachen/a_1")
    picture = Image.new("P", (6, 4), 26)
    colours = np.zeros((256, 3), np.uint8)
    for street_class in CITYSCAPES.classes:
        colours[street_class.id] = street_class.colour
    picture.putpalette(colours.tobytes())
    picture.save(path)
    assert (open_source(str(root)).load("train", 0).label == 13).all()


@pytest.mark.parametrize(
    ("colours", "words"),
    [
        ([(7, 7, 7), (26, 26, 26)], "index 0 is grey 7"),  # grey made smaller: the greys are the ids
        ([(0, 0, 0), (128, 64, 128), (0, 0, 142)], "index 1 has the colour of road"),  # a painted label made smaller
        (CITYSCAPES.palette()[:19].tolist(), "index 0 has the colour of road"),  # trainIds under the name of labelIds
    ],
)
def test_a_palette_whose_indices_are_not_the_ids_is_refused(root: Path, colours: list[list[int]], words: str) -> None:
    path = label_path(root, "train", "aachen/a_1")
    picture = Image.new("P", (6, 4), 1)
    picture.putpixel((0, 0), 0)
    picture.putpalette([value for colour in colours for value in colour])
    picture.save(path)
    (problem,) = problems_of(root, decode=True)
    assert str(path) in problem
    assert words in problem


@pytest.mark.parametrize(
    "beside",
    [
        chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(80_000_000))),
        chunk(b"tEXt", b"Comment\0" + b"x" * 200_000),
        chunk(b"tRNS", bytes(6)),
    ],
    ids=["profile", "compressed text", "text", "transparent colour"],
)
def test_what_is_stored_beside_the_pixels_does_not_matter(root: Path, beside: bytes) -> None:
    path = image_path(root, "train", "aachen/a_1")
    image = open_source(str(root)).load("train", 0).image
    path.write_bytes(path.read_bytes()[:33] + beside + path.read_bytes()[33:])
    np.testing.assert_array_equal(open_source(str(root)).load("train", 0).image, image)


def test_label_train_ids_are_used_where_there_are_no_label_ids(tmp_path: Path) -> None:
    write(tmp_path, kind="labelTrainIds")
    ids = np.array([*range(19), 255, 255, 255, 255, 255]).reshape(SIZE)
    save(label_path(tmp_path, "train", "aachen/a_1", "labelTrainIds"), ids)
    np.testing.assert_array_equal(open_source(str(tmp_path)).load("train", 0).label, ids)
    write(tmp_path)
    save(label_path(tmp_path, "train", "aachen/a_1"), np.full(SIZE, 26))
    assert (open_source(str(tmp_path)).load("train", 0).label == 13).all()


def test_symbolic_links_are_followed(root: Path, tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "gtFine").symlink_to(root / "gtFine")
    for split in SPLITS:
        (linked / "leftImg8bit" / split).mkdir(parents=True)
        for city in (root / "leftImg8bit" / split).iterdir():
            (linked / "leftImg8bit" / split / city.name).symlink_to(city)
    assert open_source(str(linked)).names("train") == FRAMES["train"]


def test_the_fingerprint_depends_on_times_sizes_and_names(root: Path) -> None:
    fingerprints = [open_source(str(root)).fingerprint]
    os.utime(label_path(root, "val", "ulm/u_1"), ns=(1, 1))
    fingerprints.append(open_source(str(root)).fingerprint)
    for path_of in (image_path, label_path):
        path_of(root, "train", "bonn/b_1").rename(path_of(root, "train", "bonn/b_2"))
    fingerprints.append(open_source(str(root)).fingerprint)
    assert len(set(fingerprints)) == 3


# --- what is passed over --------------------------------------------------------------------------------------------


def test_companions_of_macos_and_other_files_are_no_frames(root: Path) -> None:
    for path in [*root.rglob("*.png"), root / "leftImg8bit/train/bonn/Thumbs.db"]:
        path.with_name(f"._{path.name}").write_bytes(b"\0\5\x16\7" * 1000)
    for kind in ("color", "instanceIds", "labelTrainIds"):
        save(label_path(root, "train", "bonn/b_1", kind), np.zeros(SIZE))
    label_path(root, "train", "bonn/b_1", "polygons").with_suffix(".json").write_text("{}")
    source = open_source(str(root))
    assert {split: tuple(source.names(split)) for split in SPLITS} == FRAMES
    assert list(source.notes) == []


def test_pictures_that_are_no_frames_are_counted_and_named(root: Path) -> None:
    images = root / "leftImg8bit" / "train"
    for path in (images / "up_leftImg8bit.png", images / "bonn/deep/x_leftImg8bit.png", images / "bonn/1.jpeg"):
        save(path, np.zeros((*SIZE, 3)))
    for path_of in (image_path, label_path):
        path = path_of(root, "train", "aachen/a_2")
        path.rename(path.with_suffix(".PNG"))
    source = open_source(str(root))
    assert source.names("train") == ("aachen/a_1", "bonn/b_1")
    of_images, of_labels = source.notes
    assert str(images) in of_images
    for words in (
        "1 that lie in no folder of a city (such as up_leftImg8bit.png)",
        "1 that lie 2 folders deep, not 1 (such as bonn/deep/x_leftImg8bit.png)",
        "1 named *.jpeg (such as bonn/1.jpeg)",
        "1 named *_leftImg8bit.PNG (such as aachen/a_2_leftImg8bit.PNG)",
    ):
        assert words in of_images
    assert "1 named *_gtFine_labelIds.PNG (such as aachen/a_2_gtFine_labelIds.PNG)" in of_labels


def test_a_folder_without_frames_is_told_with_what_is_there_instead(root: Path) -> None:
    for path in (root / "leftImg8bit" / "train").rglob("*.png"):
        path.rename(path.with_suffix(".jpg"))
    (problem,) = problems_of(root)
    assert f"no frames in {root}/leftImg8bit/train" in problem
    assert "3 named *_leftImg8bit.jpg" in problem


def test_a_split_under_another_name_is_told(root: Path) -> None:
    (root / "gtFine" / "val").rename(root / "gtFine" / "Validation")
    (problem,) = problems_of(root)
    assert "holds the folders Validation, train" in problem


def test_a_label_of_another_spelling_is_told_with_the_image_that_misses_it(root: Path) -> None:
    path = label_path(root, "val", "ulm/u_1")
    path.rename(path.with_name(path.name.replace("Ids", "ids")))
    save(label_path(root, "val", "ulm/u_2"), np.zeros(SIZE))
    problems = problems_of(root)
    assert any("u_1_leftImg8bit.png has no label" in problem for problem in problems)
    assert any("1 named *_gtFine_labelids.png (such as ulm/u_1_gtFine_labelids.png)" in problem for problem in problems)


def test_frames_that_are_links_to_nothing_are_told(root: Path) -> None:
    for path_of in (image_path, label_path):
        replace(path_of(root, "train", "bonn/b_1"), lambda path: path.symlink_to("nothing"))
    (root / "leftImg8bit/train/loop").symlink_to(root / "leftImg8bit/train")
    problems = problems_of(root)
    assert len(problems) == 2
    assert all("bonn/b_1" in problem and "is a link to nothing" in problem for problem in problems)


def test_a_name_that_is_not_utf_8_is_told(root: Path) -> None:
    for path_of in (image_path, label_path):
        path = path_of(root, "train", "bonn/b_1")
        path.rename(os.fsdecode(os.fsencode(path).replace(b"b_1", b"stra\xdfe")))
    problems = problems_of(root)
    assert len(problems) == 2
    assert all(r"bonn/stra\xdfe_" in problem and "not UTF-8" in problem for problem in problems)


def test_a_missing_folder_is_named_with_what_is_expected(tmp_path: Path) -> None:
    d = tmp_path / "nowhere"
    (problem,) = problems_of(d)
    assert f"{d}/leftImg8bit/train" in problem
    assert f"{d}/gtFine/train" in problem
    assert "no such folder" in problem
    (tmp_path / "trainvaltest.zip").touch()
    assert "is a file" in problems_of(tmp_path / "trainvaltest.zip")[0]


@pytest.mark.parametrize("given", ["cityscapes/leftImg8bit", "cityscapes/gtFine/train/aachen", "."])
def test_the_folder_that_was_meant_is_named_for_an_inner_or_outer_one(root: Path, given: str) -> None:
    assert problems_of(root.parent / given)[0].endswith(f"point --data at {root}.")


# --- frames in the way, each made by one change to a good tree ------------------------------------------------------


def test_a_split_without_files_is_named_with_the_archive_that_holds_them(root: Path) -> None:
    shutil.rmtree(root / "gtFine" / "val")
    shutil.rmtree(root / "leftImg8bit" / "train")
    (root / "leftImg8bit" / "train").mkdir()
    images, labels = problems_of(root)
    assert f"{root}/leftImg8bit/train" in images
    assert "leftImg8bit_trainvaltest.zip" in images
    assert f"{root}/gtFine/val" in labels
    assert "gtFine_trainvaltest.zip" in labels


def test_an_image_without_label_and_a_label_without_image_are_named(root: Path) -> None:
    label_path(root, "train", "aachen/a_1").unlink()
    image_path(root, "train", "bonn/b_1").unlink()
    without_label, without_image = problems_of(root)
    for problem, name in ((without_label, "aachen/a_1"), (without_image, "bonn/b_1")):
        assert str(image_path(root, "train", name)) in problem
        assert str(label_path(root, "train", name)) in problem


def replace(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "cannot be read as PNG": lambda path: path.write_bytes(path.read_bytes()[:20]),
    "2x3": lambda path: save(path, np.zeros((2, 3, 3) if "leftImg8bit" in path.name else (2, 3))),
    "is 8-bit RGBA": lambda path: Image.new("RGBA", (6, 4)).save(path),
    "is 16-bit grey": lambda path: Image.new("I;16", (6, 4)).save(path),
    "is 1-bit grey": lambda path: Image.new("1", (6, 4)).save(path),
    "is 2-bit grey": lambda path: save_png(path, depth=2, colour_type=0, rows=[bytes(2)] * 4),
    "is 4-bit grey": lambda path: save_png(path, depth=4, colour_type=0, rows=[bytes(3)] * 4),
    "is 16-bit RGB:": lambda path: save_png(path, depth=16, colour_type=2, rows=[bytes(36)] * 4),
    "is 8-bit grey with alpha": lambda path: Image.new("LA", (6, 4)).save(path),
    "is empty (0 bytes)": lambda path: path.write_bytes(b""),
    "is a JPEG": lambda path: Image.new("RGB", (6, 4)).save(path, format="JPEG"),
    "Git LFS": lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"),
    "does not begin as one": lambda path: path.write_text("<html>"),
    "header is damaged": lambda path: path.write_bytes(path.read_bytes()[:28] + b"x" + path.read_bytes()[29:]),
    "a FIFO": lambda path: replace(path, os.mkfifo),
    "a socket": lambda path: replace(path, lambda path: path.symlink_to("/dev/zero")),
    "a link to nothing": lambda path: replace(path, lambda path: path.symlink_to("nothing")),
    "is a folder": lambda path: replace(path, Path.mkdir),
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("path_of", [image_path, label_path])
def test_a_file_that_cannot_be_used_is_named(root: Path, damage: str, path_of: Callable[..., Path]) -> None:
    path = path_of(root, "train", "aachen/a_1")
    DAMAGE[damage](path)
    (problem,) = problems_of(root)
    assert str(path) in problem
    assert damage in problem


@pytest.mark.parametrize("warn", ["error", "ignore"])
@pytest.mark.parametrize("side", [8_193, 100_000])
def test_a_decompression_bomb_is_refused_before_it_is_decoded(root: Path, side: int, warn: str) -> None:
    path = image_path(root, "train", "aachen/a_1")
    claim_size(path, side, side)
    with warnings.catch_warnings():
        warnings.simplefilter(warn)  # type: ignore[arg-type]
        (problem,) = problems_of(root)
    assert str(path) in problem
    assert "67,108,864 pixels" in problem


def test_a_long_list_of_problems_is_pickled_whole_and_shortened_when_printed(root: Path) -> None:
    for number in range(50):
        save(image_path(root, "val", f"ulm/x_{number:02}"), np.zeros((*SIZE, 3)))
    with pytest.raises(InputError) as caught:
        open_source(str(root))
    error = pickle.loads(pickle.dumps(caught.value))
    assert str(error).splitlines() == [*caught.value.problems[:20], "and 30 more"]
    assert len(error.problems) == 50


def test_unknown_label_ids_are_named_with_their_number_of_pixels(root: Path) -> None:
    ids = np.zeros(SIZE)
    ids[0, :3], ids[1, 0] = 34, 254
    path = label_path(root, "train", "aachen/a_1")
    save(path, ids)
    (problem,) = problems_of(root, decode=True)
    assert str(path) in problem
    assert "34 (3 pixels), 254 (1 pixels)" in problem
    assert "0 to 33" in problem


def test_truncated_pixels_are_named_in_both_halves_of_a_frame(root: Path) -> None:
    paths = image_path(root, "train", "aachen/a_1"), label_path(root, "train", "aachen/a_1")
    for path in paths:
        path.write_bytes(path.read_bytes()[:-25])
    problems = problems_of(root, decode=True)
    assert all(str(path) in problem for path, problem in zip(paths, problems, strict=True))


# --- object storage -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(scope="module")
def frames(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("frames")
    write_frames(folder)
    return folder


@pytest.fixture(params=["s3", "memory"])
def uri(request: pytest.FixtureRequest, frames: Path, store: ObjectStore) -> Iterator[str]:
    """Give the same frames where pyarrow reaches them by itself, and where fsspec does."""
    if request.param == "s3":
        store.upload(frames, "frames")
        yield store.uri("frames")
        return
    memory = fsspec.filesystem("memory")
    for path in frames.rglob("*.png"):
        memory.pipe(f"/frames/{path.relative_to(frames).as_posix()}", path.read_bytes())
    yield "memory://frames"
    memory.rm("/frames", recursive=True)


def test_frames_in_object_storage_equal_those_of_a_local_folder(uri: str, frames: Path, tmp_path: Path) -> None:
    local, remote = open_source(str(frames)), open_source(uri)
    assert remote.name == uri
    assert remote.frame_size == local.frame_size
    for split in SPLITS:
        assert remote.names(split) == local.names(split)
        for index in range(len(local.names(split))):
            assert np.array_equal(remote.load(split, index).image, local.load(split, index).image)
            assert np.array_equal(remote.load(split, index).label, local.load(split, index).label)
    packs = [prepare_packed(source, image_size=(32, 64), cache_dir=tmp_path / "cache") for source in (local, remote)]
    assert packs[0].digest == packs[1].digest
    assert packs[0].path != packs[1].path
    assert packs[1].path.name.startswith("frames-32x64-")


def test_the_fingerprint_changes_when_an_object_is_written_again(store: ObjectStore, frames: Path) -> None:
    store.upload(frames, "changing")
    before = open_source(store.uri("changing")).fingerprint
    assert open_source(store.uri("changing")).fingerprint == before
    path = next((frames / TOWN_LABELS).iterdir())
    store.write(f"changing/{TOWN_LABELS}/{path.name}", path.read_bytes() + b" ")
    assert open_source(store.uri("changing")).fingerprint != before


def test_the_folder_that_was_meant_is_named_in_object_storage(store: ObjectStore, frames: Path) -> None:
    store.upload(frames, "above/cityscapes")
    assert f"point --data at {store.uri('above/cityscapes')}" in problems_of(store.uri("above"))[0]
    assert "there is no such folder" in problems_of(store.uri("nothing"))[0]


def test_unreachable_storage_is_reported_within_seconds(store: ObjectStore) -> None:
    with pytest.raises(InputError, match="nobucket"):
        check_reachable(store.uri("x", bucket="nobucket"))
    with pytest.raises(InputError, match=r"127\.0\.0\.1:9"):
        check_reachable("s3://bucket/x?endpoint_override=http://127.0.0.1:9&scheme=http&region=us-east-1")
    with pytest.raises(ValueError, match="key"):
        check_reachable("s3://AKID:secret@bucket/x")
    check_reachable("/nowhere")
    check_reachable("streets")


@pytest.mark.parametrize(
    ("name", "group"),
    {
        "frankfurt/frankfurt_000000_000294": "frankfurt/frankfurt",
        "camvid/0016E5_07959": "camvid/0016E5",
        "119/782380": "119",
        "street_0_val_000003": "street_0_val_000003",
    }.items(),
)
def test_frames_of_one_city_or_sequence_are_one_group(name: str, group: str) -> None:
    assert frame_group(name) == group


STREET = (0, 1, 2, 8, 10, 13, 255)  # trainIds: a road with sidewalks, buildings, trees, sky and cars


@pytest.mark.parametrize(
    ("ids", "is_refused"),
    [
        (STREET, True),
        (STREET[:-1], False),  # without 255 they may be one's own
        ((*STREET, 26), False),  # no trainId
        ((0, 7, 255), False),  # a road as labelId, and the rest is void
        ((0, 5, 8, 255), True),
    ],
)
def test_train_ids_under_the_name_of_label_ids_are_refused_where_that_is_certain(
    tmp_path: Path, ids: tuple[int, ...], is_refused: bool
) -> None:
    root = tmp_path / "data"
    write(root)
    for split, names in FRAMES.items():
        for name in names:
            save(label_path(root, split, name), np.resize(ids, SIZE))
    source = open_source(str(root))
    packed = prepare_packed(source, image_size=(32, 32), cache_dir=tmp_path / "cache")
    if is_refused:
        with pytest.raises(InputError) as refused:
            check_labels(source, packed)
        assert len(refused.value.problems) == 2
        assert "name the files *_gtFine_labelTrainIds.png" in str(refused.value)
        assert "write void as 0" in str(refused.value)
    else:
        assert len(check_labels(source, packed)) == 2


# --- classes of one's own ---------------------------------------------------------------------------------------------

OWN = {"classes": [{"name": "field", "id": 3}, {"name": "wood", "id": 200, "colour": [0, 90, 0]}], "void": [7]}


def write_own(root: Path, ids: tuple[int, ...]) -> None:
    """Write `OWN` as classes.json, and labels that hold these ids."""
    (root / "classes.json").write_text(json.dumps(OWN))
    for split, names in FRAMES.items():
        for name in names:
            save(label_path(root, split, name), np.resize(np.array(ids), SIZE))


def test_ids_are_mapped_by_the_classes_beside_the_data(root: Path) -> None:
    assert open_source(str(root)).classes == CITYSCAPES
    write_own(root, (3, 200, 7, 255))
    source = open_source(str(root))
    assert source.classes == ClassSet.model_validate(OWN)
    assert set(source.load("train", 0).label.ravel().tolist()) == {0, 1, 255}


def test_classes_are_read_from_object_storage(root: Path, store: ObjectStore) -> None:
    write_own(root, (3, 200))
    store.upload(root, "own")
    assert open_source(store.uri("own")).classes.names == ("field", "wood")


def test_other_classes_are_another_source(root: Path) -> None:
    write_own(root, (3, 200))
    before = open_source(str(root)).fingerprint
    (root / "classes.json").write_text(json.dumps(OWN).replace("field", "meadow"))
    assert open_source(str(root)).fingerprint != before


def test_ids_that_no_class_has_are_refused_with_their_numbers(root: Path) -> None:
    write_own(root, (3, 200, 8))
    (problem,) = [line for line in problems_of(root, decode=True) if "a_1" in line]
    for words in ("the ids 8 (8 pixels)", "may hold 3, 7, 200, and 255 for void", "classes.json"):
        assert words in problem


def test_ids_beyond_those_of_cityscapes_are_answered_with_the_classes_to_write(root: Path) -> None:
    save(label_path(root, "train", "aachen/a_1"), np.resize(np.array([0, 40]), SIZE))
    problem, *_ = problems_of(root, decode=True)
    template = problem[problem.index("{") :]
    assert [label_class.id for label_class in ClassSet.model_validate_json(template).classes] == [0, 40]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ("Invalid JSON",)),
        ('{"classes": [{"name": "a", "id": 1}, {"name": "a", "id": 1}]}', ("the name a", "the id 1")),
        ('{"classes": [{"name": "a", "id": 1}], "colors": []}', ("colors",)),
        ('{"classes": [{"name": "a", "id": "1"}, {"id": 2}]}', ("classes.0.id", "classes.1.name")),
    ],
)
def test_all_that_is_wrong_with_the_classes_is_told_together(root: Path, content: str, words: tuple[str, ...]) -> None:
    (root / "classes.json").write_text(content)
    label_path(root, "train", "aachen/a_1").unlink()
    problems = problems_of(root)
    assert any("has no label" in problem for problem in problems), "and with what is wrong with the files"
    told = [problem for problem in problems if str(root / "classes.json") in problem]
    assert not [word for word in words if not any(word in problem for problem in told)]


def test_frames_may_differ_in_size_and_the_plan_says_so(root: Path) -> None:
    large = (8, 12)
    for split, name in (("train", "bonn/b_1"), ("val", "ulm/u_1")):
        save(image_path(root, split, name), np.zeros((*large, 3)))
        save(label_path(root, split, name), np.zeros(large))
    source = open_source(str(root))
    assert source.frame_size == large
    assert source.frame_sizes == {"train": [SIZE, SIZE, large], "val": [large]}
    (note,) = source.notes
    assert "2 sizes, 4x6 to 8x12" in note
