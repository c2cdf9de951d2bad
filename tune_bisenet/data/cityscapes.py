"""The Cityscapes layout as downloaded: find the frames, check them all without decoding, decode one at a time.

    ROOT/leftImg8bit/{train,val}/CITY/STEM_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/STEM_gtFine_labelIds.png    (or _labelTrainIds.png, where only those exist)

ROOT is a local folder or one in object storage. It knows folders, file names and label ids, and refuses to know what
the frames are resized to or used for.
"""

import hashlib
import struct
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tune_bisenet.config import format_size
from tune_bisenet.data.classes import MAX_LABEL_ID, NUM_CLASSES, VOID, train_id_table
from tune_bisenet.data.remote import Place, RemotePath
from tune_bisenet.data.source import SPLITS, DataError, Frame, Split
from tune_bisenet.storage import StorageError

IMAGES: Final = "leftImg8bit"
LABELS: Final = "gtFine"
IMAGE_SUFFIX: Final = "_leftImg8bit.png"
DOWNLOAD: Final = {IMAGES: "leftImg8bit_trainvaltest.zip", LABELS: "gtFine_trainvaltest.zip"}

MAX_FRAME_PIXELS: Final = 64 * 2**20
NUM_PROBE_THREADS: Final = 16  # for storage over a network, where a header costs a round trip
HEADER_BYTES: Final = 2**16  # of a remote file, read to see its header

IMAGE_MODES: Final = {"RGB": "an image is 8-bit RGB"}
LABEL_MODES: Final = dict.fromkeys(("L", "P"), "a label is one channel of 8-bit ids")
"""Pillow's modes that are accepted. Others are refused, not converted: grey or RGBA is most often the wrong file."""

# A small file can unfold to gigabytes. Pillow checks a header's size on opening; its default only warns, and late.
Image.MAX_IMAGE_PIXELS = MAX_FRAME_PIXELS
warnings.simplefilter("error", Image.DecompressionBombWarning)


class LabelKind(NamedTuple):
    """One of the two kinds of label files. Valid are the ids 0 to `max_id`, and 255 for void."""

    suffix: str
    max_id: int
    train_ids: bytes  # by id, 256 entries


LABEL_IDS: Final = LabelKind("_gtFine_labelIds.png", MAX_LABEL_ID, train_id_table().tobytes())
LABEL_TRAIN_IDS: Final = LabelKind("_gtFine_labelTrainIds.png", NUM_CLASSES - 1, bytes(range(256)))


@dataclass(frozen=True, eq=False)
class Cityscapes:
    """A `Source` over checked files, to be had from `open_cityscapes`. A frame's name is `CITY/STEM`."""

    root: Place
    label_kind: LabelKind
    frame_size: tuple[int, int]
    fingerprint: str
    frame_names: Mapping[Split, Sequence[str]]

    @property
    def name(self) -> str:
        return str(self.root)

    def names(self, split: Split) -> Sequence[str]:
        return self.frame_names[split]

    def load(self, split: Split, index: int) -> Frame:
        """Decode one frame. Raises DataError for what a header cannot tell: damaged pixels and unknown ids."""
        image_path, label_path = _pair(self.root, split, self.frame_names[split][index], self.label_kind)
        problems: list[str] = []
        with _noted_in(problems):
            image = _decode_image(image_path)
        with _noted_in(problems):
            label = _decode_label(label_path, self.label_kind)
        if problems:
            raise DataError(problems)
        return Frame(image, label)


def open_cityscapes(root: Place) -> Cityscapes:
    """Find and check every frame under `root`, reading headers only.

    Raises one DataError that names every file in the way: missing, unpaired, unreadable, of another size or kind.
    """
    _require_layout(root)
    root = root.resolve()
    kind = _label_kind(root)
    images = {split: _found(root / IMAGES / split, IMAGE_SUFFIX) for split in SPLITS}
    labels = {split: _found(root / LABELS / split, kind.suffix) for split in SPLITS}
    pairs = [
        (images[split][name], labels[split][name])
        for split in SPLITS
        for name in images[split]
        if name in labels[split]
    ]
    problems = [
        problem
        for split in SPLITS
        for problem in _pairing_problems(root, split, kind, set(images[split]), set(labels[split]))
    ]
    sizes = _header_sizes(images, labels, problems)
    problems += _size_problems(pairs, sizes)
    if problems:
        raise DataError(problems)
    return Cityscapes(
        root=root,
        label_kind=kind,
        frame_size=sizes[pairs[0][0]],
        fingerprint=_fingerprint(root, [path for pair in pairs for path in pair]),
        frame_names={split: tuple(images[split]) for split in SPLITS},
    )


# --- the layout -------------------------------------------------------------------------------------------------


Files = Mapping[str, Place]  # by the frame's name, sorted


def _pair(root: Place, split: Split, name: str, kind: LabelKind) -> tuple[Place, Place]:
    """Where a frame's image and label belong."""
    return root / IMAGES / split / f"{name}{IMAGE_SUFFIX}", root / LABELS / split / f"{name}{kind.suffix}"


def _found(folder: Place, suffix: str) -> Files:
    """The files one level below `folder`; empty where there is no such folder."""
    files = {path.relative_to(folder).as_posix().removesuffix(suffix): path for path in folder.glob(f"*/*{suffix}")}
    return dict(sorted(files.items()))


def _label_kind(root: Place) -> LabelKind:
    """labelIds if any frame has them; labelTrainIds where only those exist."""
    kinds = (LABEL_IDS, LABEL_TRAIN_IDS)
    return next(
        (kind for kind in kinds if any(_found(root / LABELS / split, kind.suffix) for split in SPLITS)), LABEL_IDS
    )


def _is_layout(folder: Place) -> bool:
    return (folder / IMAGES).is_dir() and (folder / LABELS).is_dir()


def _require_layout(root: Place) -> None:
    """Raise DataError unless both top folders are there; say which folder was meant if it is a step away."""
    if _is_layout(root):
        return
    meant = [near for near in _nearby(root) if _is_layout(near)]
    if meant:
        raise DataError([f"no Cityscapes under {root}, but under {meant[0]}: point --data at {meant[0]}."])
    state = "" if root.is_dir() else "; that is a file" if root.exists() else "; there is no such folder"
    raise DataError(
        [
            f"no Cityscapes under {root}: expected {root / IMAGES / 'train'} and {root / LABELS / 'train'}{state}. "
            "Point --data at the folder that holds them, or leave --data out: the built-in streets need no download."
        ]
    )


def _nearby(root: Place) -> Sequence[Place]:
    """The folders above, for who names an inner one, and those just below."""
    if isinstance(root, RemotePath):
        return root.nearby
    local = Path(str(root)).absolute()
    return [*local.parents, *(sorted(local.iterdir()) if local.is_dir() else [])]


# --- what is checked before anything is decoded -----------------------------------------------------------------


def _pairing_problems(root: Place, split: Split, kind: LabelKind, images: set[str], labels: set[str]) -> list[str]:
    """Empty folders, or else frames of which one half is missing."""
    found = ((IMAGES, IMAGE_SUFFIX, images), (LABELS, kind.suffix, labels))
    empty = [
        f"no frames in {root / top / split}: expected CITY/*{suffix} there. Unpack {DOWNLOAD[top]} into {root}."
        for top, suffix, names in found
        if not names
    ]
    if empty:
        return empty
    without_label = [_pair(root, split, name, kind) for name in sorted(images - labels)]
    without_image = [_pair(root, split, name, kind) for name in sorted(labels - images)]
    return [
        *(
            f"{image} has no label: expected {label}. Unpack {DOWNLOAD[LABELS]} again, or remove the image."
            for image, label in without_label
        ),
        *(
            f"{label} has no image: expected {image}. Unpack {DOWNLOAD[IMAGES]} again, or remove the label."
            for image, label in without_image
        ),
    ]


def _header_sizes(
    images: Mapping[Split, Files], labels: Mapping[Split, Files], problems: list[str]
) -> dict[Place, tuple[int, int]]:
    """Height and width of every file that is readable and of the right mode; what is not goes to `problems`."""
    kinds = ((images, IMAGE_MODES), (labels, LABEL_MODES))
    sizes: dict[Place, tuple[int, int]] = {}
    with ThreadPoolExecutor(NUM_PROBE_THREADS) as pool:
        probes = {
            path: pool.submit(_header_size, path, modes)
            for files, modes in kinds
            for split in SPLITS
            for path in files[split].values()
        }
        try:
            for path, probe in probes.items():
                with _noted_in(problems):
                    sizes[path] = probe.result()
        finally:
            pool.shutdown(cancel_futures=True)  # nobody waits for thousands of files if storage is away
    return sizes


def _header_size(path: Place, modes: Mapping[str, str]) -> tuple[int, int]:
    with _opened(path, modes, at_most=HEADER_BYTES) as picture:
        return picture.height, picture.width


def _size_problems(pairs: Sequence[tuple[Place, Place]], sizes: Mapping[Place, tuple[int, int]]) -> list[str]:
    """Pairs whose halves differ in size, and frames that differ from most others. Sizes read height x width."""
    readable = [pair for pair in pairs if all(path in sizes for path in pair)]
    if not readable:
        return []
    (usual, _), *_ = Counter(sizes[image] for image, _ in readable).most_common(1)
    problems = []
    for image, label in readable:
        if sizes[label] != sizes[image]:
            problems.append(
                f"{label} is {format_size(sizes[label])} but its image {image} is {format_size(sizes[image])} "
                "(height x width): both must agree. Replace one of them."
            )
        elif sizes[image] != usual:
            problems.append(
                f"{image} is {format_size(sizes[image])} but most frames are {format_size(usual)} (height x width): "
                "all frames must have one size. Resize it and its label, or remove both."
            )
    return problems


def _fingerprint(root: Place, paths: Iterable[Place]) -> str:
    """A hash of names, sizes and times of change: cheap, and new when a file may have changed."""
    in_order = sorted((path.relative_to(root).parts, path.stat()) for path in paths)
    stats = (("/".join(parts), stat) for parts, stat in in_order)
    lines = [f"{name}\t{stat.st_size}\t{stat.st_mtime_ns}" for name, stat in stats]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


@contextmanager
def _noted_in(problems: list[str]) -> Iterator[None]:
    """Turn a DataError into entries of `problems` and go on."""
    try:
        yield
    except DataError as error:
        problems.extend(error.problems)


# --- one file ---------------------------------------------------------------------------------------------------


@contextmanager
def _opened(path: Place, modes: Mapping[str, str], *, at_most: int | None = None) -> Iterator[Image.Image]:
    """A PNG whose header is right: readable, of bounded size, in one of `modes`. Raises DataError, in the body too.

    Of a remote file `at_most` so many bytes are fetched.
    """
    try:
        file = path.opened(at_most) if isinstance(path, RemotePath) else str(path)
        with Image.open(file, formats=("PNG",)) as picture:
            if picture.width * picture.height > MAX_FRAME_PIXELS:
                raise Image.DecompressionBombError
            if picture.mode not in modes:
                rule = next(iter(modes.values()))
                raise DataError([f"{path} has Pillow's mode {picture.mode!r}: {rule}. Convert or replace the file."])
            yield picture
    except (DataError, StorageError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(
            [f"{path} claims more than {MAX_FRAME_PIXELS:,} pixels, the most a frame may have: remove or replace it."]
        ) from error
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error) as error:  # all of Pillow's own
        raise DataError(
            [f"{path} cannot be read as PNG ({error}): unpack or copy it again, or remove the frame."]
        ) from error


def _decode_image(path: Place) -> NDArray[np.uint8]:
    """RGB uint8 (H, W, 3)."""
    with _opened(path, IMAGE_MODES) as picture:
        return np.asarray(picture)


def _decode_label(path: Place, kind: LabelKind) -> NDArray[np.uint8]:
    """trainIds uint8 (H, W)."""
    with _opened(path, LABEL_MODES) as picture:
        counts = picture.histogram()
        ids = picture.tobytes()
    unknown = {i: count for i, count in enumerate(counts) if count and i > kind.max_id and i != VOID}
    if unknown:
        found = ", ".join(f"{i} ({count:,} pixels)" for i, count in unknown.items())
        raise DataError(
            [
                f"{path} holds the ids {found}: *{kind.suffix} holds 0 to {kind.max_id}, and {VOID} for void. "
                "Replace it by the original, or map your own classes to these ids."
            ]
        )
    return np.frombuffer(ids.translate(kind.train_ids), np.uint8).reshape(picture.height, picture.width)
