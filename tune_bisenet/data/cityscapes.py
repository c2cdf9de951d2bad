"""The Cityscapes layout as downloaded: find the frames, check them all without decoding, decode one at a time.

    ROOT/leftImg8bit/{train,val}/CITY/STEM_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/STEM_gtFine_labelIds.png    (or _labelTrainIds.png, where only those exist)

ROOT is a local folder or one in object storage; a file is named by its path below ROOT. This module knows folders, file
names and label ids, and refuses to know what the frames are resized to or used for.
"""

import hashlib
import io
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pyarrow.fs import FileType

from tune_bisenet.classes import CLASS_NAMES, CLASSES, MAX_LABEL_ID, NUM_CLASSES, VOID, VOID_LABELS, train_id_table
from tune_bisenet.config import format_size
from tune_bisenet.data.source import SPLITS, Frame, Split
from tune_bisenet.options import InputError
from tune_bisenet.storage import Storage, StorageError

IMAGES: Final = "leftImg8bit"
LABELS: Final = "gtFine"
IMAGE_SUFFIX: Final = "_leftImg8bit.png"
ARCHIVES: Final = {IMAGES: "leftImg8bit_trainvaltest.zip", LABELS: "gtFine_trainvaltest.zip"}

MAX_FRAME_PIXELS: Final = 64 * 2**20
NUM_HEADER_THREADS: Final = 16  # in object storage a header costs a round trip
MAX_HEADER_BYTES: Final = 2**16
NUM_DESCRIBED_LABELS: Final = 20

IMAGE_MODES: Final = {"RGB": "an image is 8-bit RGB"}
LABEL_MODES: Final = dict.fromkeys(("L", "P"), "a label is one channel of 8-bit ids")
"""Pillow's modes that are accepted. Others are refused, not converted: grey or RGBA is most often the wrong file."""

# A small file can unfold to gigabytes. Pillow checks a header's size on opening; its default only warns, and late.
Image.MAX_IMAGE_PIXELS = MAX_FRAME_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)


class LabelFormat(NamedTuple):
    """One of the two kinds of label files. Valid are the ids 0 to `max_id`, and 255 for void."""

    suffix: str
    max_id: int
    train_ids: bytes  # by id, 256 entries


LABEL_IDS: Final = LabelFormat("_gtFine_labelIds.png", MAX_LABEL_ID, train_id_table().tobytes())
LABEL_TRAIN_IDS: Final = LabelFormat("_gtFine_labelTrainIds.png", NUM_CLASSES - 1, bytes(range(256)))


@dataclass(frozen=True, eq=False)
class Cityscapes:
    """A `Source` over checked files, made by `open_cityscapes`. A frame's name is `CITY/STEM`."""

    root: Storage
    label_format: LabelFormat
    frame_size: tuple[int, int]
    fingerprint: str
    frame_names: Mapping[Split, Sequence[str]]

    @property
    def name(self) -> str:
        return self.root.uri

    def names(self, split: Split) -> Sequence[str]:
        return self.frame_names[split]

    def describe_labels(self, split: Split) -> str:
        names = self.frame_names[split][:NUM_DESCRIBED_LABELS]
        paths = [_label_path(split, name, self.label_format) for name in names]
        ids = sorted({i for path in paths for i in set(_read_ids(self.root, path, self.label_format)[0])})
        as_label_ids = dict(VOID_LABELS | {label.label_id: label.name for label in CLASSES})
        meanings = [
            f"as {kind} {', '.join(by_id.get(i, 'void') for i in ids)}"
            for kind, by_id in (("labelIds", as_label_ids), ("trainIds", dict(enumerate(CLASS_NAMES))))
        ]
        return (
            f"The first {len(paths)} *{self.label_format.suffix} hold the ids {', '.join(map(str, ids))}: "
            f"{'; '.join(meanings)}. If they are trainIds, name the files *{LABEL_TRAIN_IDS.suffix}, if they are "
            f"labelIds, *{LABEL_IDS.suffix}; map classes of your own to the ids of Cityscapes (road is labelId 7 and "
            "trainId 0)."
        )

    def load(self, split: Split, index: int) -> Frame:
        """Decode one frame. Raises InputError for what a header cannot show: damaged pixels and unknown ids."""
        name = self.frame_names[split][index]
        problems: list[str] = []
        with _collect(problems), _open_png(self.root, _image_path(split, name), IMAGE_MODES) as picture:
            image = np.asarray(picture)
        with _collect(problems):
            label = _decode_label(self.root, _label_path(split, name, self.label_format), self.label_format)
        if problems:
            raise InputError(*problems)
        return Frame(image, label)


def open_cityscapes(root: Storage) -> Cityscapes:
    """Find and check every frame under `root`, reading headers only.

    Raises one InputError that names every file that is missing, unpaired, unreadable, or of another size or mode.
    """
    _require_layout(root)
    listed = {
        form: {split: _list_files(root, f"{LABELS}/{split}", form.suffix) for split in SPLITS}
        for form in (LABEL_IDS, LABEL_TRAIN_IDS)
    }
    label_format = max(listed, key=lambda form: any(listed[form].values()))  # labelIds where both exist, or none
    labels = listed[label_format]
    images = {split: _list_files(root, f"{IMAGES}/{split}", IMAGE_SUFFIX) for split in SPLITS}
    problems: list[str] = []
    pairs: list[tuple[_File, _File]] = []
    modes: dict[_File, Mapping[str, str]] = {}
    for split in SPLITS:
        problems += _pairing_problems(root, split, label_format, set(images[split]), set(labels[split]))
        pairs += [(image, labels[split][name]) for name, image in images[split].items() if name in labels[split]]
        modes |= dict.fromkeys(images[split].values(), IMAGE_MODES) | dict.fromkeys(labels[split].values(), LABEL_MODES)
    sizes = _read_header_sizes(root, modes, problems)
    problems += _size_problems(root, pairs, sizes)
    if problems:
        raise InputError(*problems)
    files = sorted(file for pair in pairs for file in pair)
    lines = [f"{path}\t{num_bytes}\t{mtime_ns}" for path, num_bytes, mtime_ns in files]  # cheap: no file is read
    return Cityscapes(
        root=root,
        label_format=label_format,
        frame_size=sizes[pairs[0][0]],
        fingerprint=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        frame_names={split: tuple(images[split]) for split in SPLITS},
    )


class _File(NamedTuple):
    """A file as it was listed. Some file systems give no time of change; then path and size must do."""

    path: str  # below the root
    num_bytes: int
    mtime_ns: int


def _list_files(root: Storage, folder: str, suffix: str) -> dict[str, _File]:
    """Return the files `folder/CITY/STEM + suffix` by frame name, sorted; none where there is no such folder."""
    files = {}
    for info in (root / folder).infos(recursive=True):
        *_, city, name = info.path.split("/")
        path = f"{folder}/{city}/{name}"
        if info.type == FileType.File and info.path.endswith(f"/{path}") and name.endswith(suffix):
            files[f"{city}/{name.removesuffix(suffix)}"] = _File(path, info.size or 0, info.mtime_ns or 0)
    return dict(sorted(files.items()))


def _image_path(split: Split, name: str) -> str:
    return f"{IMAGES}/{split}/{name}{IMAGE_SUFFIX}"


def _label_path(split: Split, name: str, label_format: LabelFormat) -> str:
    return f"{LABELS}/{split}/{name}{label_format.suffix}"


def _require_layout(root: Storage) -> None:
    """Raise InputError unless both top folders exist; name the folder that was meant if it is above or one below."""

    def has_layout(folder: Storage) -> bool:
        return folder.exists(IMAGES) and folder.exists(LABELS)

    if has_layout(root):
        return
    is_file = root.local_path is not None and root.local_path.is_file()
    children = [] if is_file else root.folder_names()
    parents = root.local_path.parents if root.local_path else ()  # in object storage they may belong to others
    for folder in (*(Storage.at(str(parent)) for parent in parents), *(root / child for child in children)):
        if has_layout(folder):
            raise InputError(f"no Cityscapes under {root.uri}, but under {folder.uri}: point --data at {folder.uri}.")
    state = "; that is a file" if is_file else "" if root.exists() else "; there is no such folder"
    images, labels = (root / IMAGES / "train").uri, (root / LABELS / "train").uri
    problem = (
        f"no Cityscapes under {root.uri}: expected {images} and {labels}{state}. "
        "Point --data at the folder that holds them, or leave --data out: the built-in streets need no download."
    )
    raise InputError(problem)


def _pairing_problems(
    root: Storage, split: Split, label_format: LabelFormat, images: set[str], labels: set[str]
) -> list[str]:
    """Report folders without frames, or else the frames of which one half is missing."""
    empty = [
        f"no frames in {(root / top / split).uri}: expected CITY/*{suffix} there. Unpack {ARCHIVES[top]} into "
        f"{root.uri}."
        for top, suffix, names in ((IMAGES, IMAGE_SUFFIX, images), (LABELS, label_format.suffix, labels))
        if not names
    ]
    if empty:
        return empty
    problems = []
    for name in sorted(images ^ labels):
        image, label = (root / _image_path(split, name)).uri, (root / _label_path(split, name, label_format)).uri
        missing = f"{image} has no label: expected {label}. Unpack {ARCHIVES[LABELS]} again, or remove the image."
        if name in labels:
            missing = f"{label} has no image: expected {image}. Unpack {ARCHIVES[IMAGES]} again, or remove the label."
        problems.append(missing)
    return problems


def _read_header_sizes(
    root: Storage, modes: Mapping[_File, Mapping[str, str]], problems: list[str]
) -> dict[_File, tuple[int, int]]:
    """Return height and width of every file that is readable and has one of its `modes`; report the others."""

    def read_header_size(file: _File) -> tuple[int, int]:
        with _open_png(root, file.path, modes[file], max_bytes=MAX_HEADER_BYTES) as picture:
            return picture.height, picture.width

    sizes = {}
    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        futures = {file: pool.submit(read_header_size, file) for file in modes}
        try:
            for file, future in futures.items():
                with _collect(problems):
                    sizes[file] = future.result()
        finally:
            pool.shutdown(cancel_futures=True)  # if storage is unreachable, do not try thousands of files
    return sizes


def _size_problems(
    root: Storage, pairs: Sequence[tuple[_File, _File]], sizes: Mapping[_File, tuple[int, int]]
) -> list[str]:
    """Report pairs whose halves differ in size, and frames that differ from most others."""
    readable = [pair for pair in pairs if all(file in sizes for file in pair)]
    if not readable:
        return []
    (usual, _), *_ = Counter(sizes[image] for image, _ in readable).most_common(1)
    problems = []
    for image, label in readable:
        image_is, label_is = (f"{(root / file.path).uri} is {format_size(sizes[file])}" for file in (image, label))
        if sizes[label] != sizes[image]:
            problems.append(f"{label_is} but its image {image_is} (height x width): replace one of them.")
        elif sizes[image] != usual:
            problems.append(
                f"{image_is} but most frames are {format_size(usual)} (height x width): all frames must have one size. "
                "Resize it and its label, or remove both."
            )
    return problems


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add the problems of an InputError to `problems` instead of raising it."""
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)


@contextmanager
def _open_png(
    root: Storage, path: str, modes: Mapping[str, str], *, max_bytes: int | None = None
) -> Iterator[Image.Image]:
    """Open a PNG whose header is right: readable, of bounded size, in one of `modes`, reading at most `max_bytes`.

    Raises InputError, also for errors of Pillow in the body of the `with`.
    """
    uri = (root / path).uri
    try:
        content = root.read(path, at_most=max_bytes)
        if content is None:
            raise FileNotFoundError("there is no such file")
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_FRAME_PIXELS:
                raise Image.DecompressionBombError
            if picture.mode not in modes:
                rule = next(iter(modes.values()))
                raise InputError(f"{uri} has Pillow's mode {picture.mode!r}: {rule}. Convert or replace the file.")
            yield picture
    except (InputError, StorageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        problem = (
            f"{uri} claims more than {MAX_FRAME_PIXELS:,} pixels, the most a frame may have: remove or replace it."
        )
        raise InputError(problem) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # all that Pillow raises
        problem = f"{uri} cannot be read as PNG ({error}): unpack or copy it again, or remove the frame."
        raise InputError(problem) from error


def _read_ids(root: Storage, path: str, label_format: LabelFormat) -> tuple[bytes, int, int]:
    """Return a label's ids as they are in its file, row by row, then height and width."""
    with _open_png(root, path, LABEL_MODES) as picture:
        counts = picture.histogram()
        ids = picture.tobytes()
    unknown = {i: count for i, count in enumerate(counts) if count and i > label_format.max_id and i != VOID}
    if unknown:
        listed = ", ".join(f"{i} ({count:,} pixels)" for i, count in unknown.items())
        problem = (
            f"{(root / path).uri} holds the ids {listed}: *{label_format.suffix} holds 0 to {label_format.max_id}, "
            f"and {VOID} for void. Replace it by the original, or map your own classes to these ids."
        )
        raise InputError(problem)
    return ids, picture.height, picture.width


def _decode_label(root: Storage, path: str, label_format: LabelFormat) -> NDArray[np.uint8]:
    """Return trainIds, uint8 (H, W)."""
    ids, height, width = _read_ids(root, path, label_format)
    return np.frombuffer(ids.translate(label_format.train_ids), np.uint8).reshape(height, width)
