"""The Cityscapes layout as downloaded: find the frames, check them all without decoding, decode one at a time.

    ROOT/leftImg8bit/{train,val}/CITY/STEM_leftImg8bit.png
    ROOT/gtFine/{train,val}/CITY/STEM_gtFine_labelIds.png    (or _labelTrainIds.png, where only those exist)
    ROOT/classes.json                                        (for other classes than those of Cityscapes)

ROOT is a local folder or one in object storage; a file is named by its path below ROOT. This module knows folders, file
names and label ids, and refuses to know what the frames are resized to or used for.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pyarrow.fs import FileType
from pydantic import ValidationError

from tune_bisenet.classes import CITYSCAPES, VOID, VOID_LABELS, ClassSet
from tune_bisenet.config import format_size
from tune_bisenet.data.png import HEADER_BYTES, PngHeader, decode_png, read_png_header
from tune_bisenet.data.source import SPLITS, Frame, Split
from tune_bisenet.options import InputError
from tune_bisenet.storage import Storage, StorageError
from tune_bisenet.text import in_words

IMAGES: Final = "leftImg8bit"
LABELS: Final = "gtFine"
CLASSES_FILE: Final = "classes.json"
IMAGE_SUFFIX: Final = "_leftImg8bit.png"
ARCHIVES: Final = {IMAGES: "leftImg8bit_trainvaltest.zip", LABELS: "gtFine_trainvaltest.zip"}

IS_FOLDER: Final = "is a folder"
NUM_HEADER_THREADS: Final = 16  # in object storage a header costs a round trip
NUM_DESCRIBED_LABELS: Final = 20

IMAGE_KINDS: Final = {"8-bit RGB": "an image must be 8-bit RGB"}
LABEL_KINDS: Final = dict.fromkeys(
    ("8-bit grey", "8-bit palette", "4-bit palette", "2-bit palette", "1-bit palette"),
    "a label is 8-bit grey, or has a palette whose indices are the ids",
)
"""The kinds of PNG that are accepted. Others are refused, not converted: grey or RGBA is most often the wrong file."""

PICTURES: Final = re.compile(r"\.(png|jpe?g|webp|bmp|gif|tiff?|p[gp]m)$", re.IGNORECASE)
OTHER_LABEL_SUFFIXES: Final = tuple(
    f"{kind}.png" for kind in ("_color", "_instanceIds", "_instanceTrainIds", "_labelIds", "_labelTrainIds")
)
"""What the archives hold beside the labels that are read."""


class LabelFormat(NamedTuple):
    """One of the two kinds of label files."""

    suffix: str
    known_ids: frozenset[int]  # others are refused
    train_ids: bytes  # by id, 256 entries

    @property
    def ids_in_words(self) -> str:
        """Return which ids are valid, as `0 to 33, and 255 for void`."""
        ids = sorted(self.known_ids)
        ends = [(i, j) for i, j in zip(ids, [*ids[1:], 257], strict=True) if j != i + 1]
        starts = [ids[0], *(j for _i, j in ends[:-1])]
        ranges = [f"{i}" if i == j else f"{i} to {j}" for i, (j, _next) in zip(starts, ends, strict=True)]
        is_void_apart = ranges[-1] == str(VOID) and self.train_ids[VOID] == VOID
        return f"{', '.join(ranges[:-1])}, and {VOID} for void" if is_void_apart else ", ".join(ranges)


def _label_ids(classes: ClassSet) -> LabelFormat:
    return LabelFormat("_gtFine_labelIds.png", classes.known_ids, classes.train_id_table().tobytes())


def _label_train_ids(classes: ClassSet) -> LabelFormat:
    return LabelFormat("_gtFine_labelTrainIds.png", frozenset({*range(len(classes)), VOID}), bytes(range(256)))


@dataclass(frozen=True, eq=False)
class Cityscapes:
    """A `Source` over checked files, made by `open_cityscapes`. A frame's name is `CITY/STEM`."""

    root: Storage
    classes: ClassSet
    label_format: LabelFormat
    frame_size: tuple[int, int]
    frame_sizes: Mapping[Split, Sequence[tuple[int, int]]]
    fingerprint: str
    frame_names: Mapping[Split, Sequence[str]]
    notes: Sequence[str]

    @property
    def name(self) -> str:
        return self.root.uri

    def names(self, split: Split) -> Sequence[str]:
        return self.frame_names[split]

    def describe_labels(self, split: Split) -> tuple[str, bool]:
        names = self.frame_names[split][:NUM_DESCRIBED_LABELS]
        paths = [_label_path(split, name, self.label_format) for name in names]
        ids = sorted(
            {i for path in paths for i in set(_read_ids(self.root, path, self.label_format, self.classes).tobytes())}
        )
        is_cityscapes = self.classes == CITYSCAPES
        label_ids, label_train_ids = _label_ids(self.classes), _label_train_ids(self.classes)
        as_label_ids = (VOID_LABELS if is_cityscapes else {}) | {label.id: label.name for label in self.classes.classes}
        meanings = [
            f"as {kind} {', '.join(by_id.get(i, 'void') for i in ids)}"
            for kind, by_id in (("labelIds", as_label_ids), ("trainIds", dict(enumerate(self.classes.names))))
        ]
        found = (
            f"The first {len(paths)} *{self.label_format.suffix} hold the ids {', '.join(map(str, ids))}: "
            f"{'; '.join(meanings)}."
        )
        if is_cityscapes and self.label_format == label_ids and _are_train_ids(ids):
            return (
                f"{found} They look like trainIds: name the files *{label_train_ids.suffix}. If they are labelIds, "
                f"write void as 0 in them, not as {VOID}.",
                True,
            )
        return (
            f"{found} If they are trainIds, name the files *{label_train_ids.suffix}, if they are labelIds, "
            f"*{label_ids.suffix}. {_advise_classes(self.root, ids)}",
            False,
        )

    def load(self, split: Split, index: int) -> Frame:
        """Decode one frame. Raises InputError for what a header cannot show: damaged pixels and unknown ids."""
        name = self.frame_names[split][index]
        problems: list[str] = []
        with _collect(problems):
            image = np.asarray(_decode(self.root, _image_path(split, name), IMAGE_KINDS))
        with _collect(problems):
            path = _label_path(split, name, self.label_format)
            ids = _read_ids(self.root, path, self.label_format, self.classes)
        if problems:
            raise InputError(*problems)
        return Frame(image, np.frombuffer(self.label_format.train_ids, np.uint8)[ids])


def open_cityscapes(root: Storage) -> Cityscapes:
    """Find and check every frame under `root`, reading headers only.

    Raises one InputError that names every file that is missing, unpaired, unreadable, of another kind, or
    of another size than its other half. Frames may differ in size from each other.
    """
    _require_layout(root)
    problems: list[str] = []
    classes = CITYSCAPES
    with _collect(problems):
        classes = read_classes(root)
    images = {split: _find_frames(root, f"{IMAGES}/{split}", IMAGE_SUFFIX) for split in SPLITS}
    label_format, labels = _find_labels(root, classes)
    pairs: list[tuple[_File, _File]] = []
    kinds: dict[_File, Mapping[str, str]] = {}
    for split in SPLITS:
        image_files, label_files = images[split].files, labels[split].files
        problems += _pairing_problems(root, split, label_format, images[split], labels[split])
        pairs += [(image, label_files[name]) for name, image in image_files.items() if name in label_files]
        kinds |= dict.fromkeys(image_files.values(), IMAGE_KINDS) | dict.fromkeys(label_files.values(), LABEL_KINDS)
    sizes = _read_header_sizes(root, kinds, problems)
    problems += _size_problems(root, pairs, sizes)
    if problems:
        raise InputError(*problems)
    frame_sizes: dict[Split, list[tuple[int, int]]] = {
        split: [sizes[image] for image in images[split].files.values()] for split in SPLITS
    }
    notes = [found.note for found in (*images.values(), *labels.values()) if found.passed_over]
    different = {size for of_split in frame_sizes.values() for size in of_split}
    if len(different) == 1:
        frame_sizes = {}
    else:
        smallest, largest = (format_size(choose(different, key=math.prod)) for choose in (min, max))
        notes.append(
            f"frames have {len(different)} sizes, {smallest} to {largest}: each is resized to the size that is trained "
            "on, and scored at its own"
        )
    files = sorted(file for pair in pairs for file in pair)
    lines = [f"{path}\t{num_bytes}\t{mtime_ns}" for path, num_bytes, mtime_ns, _ in files]  # cheap: no file is read
    if classes != CITYSCAPES:
        lines.append(classes.model_dump_json())
    return Cityscapes(
        root=root,
        classes=classes,
        label_format=label_format,
        frame_size=max((sizes[image] for image, _label in pairs), key=lambda size: (math.prod(size), size)),
        frame_sizes=frame_sizes,
        fingerprint=hashlib.sha256("\n".join(lines).encode()).hexdigest(),
        frame_names={split: tuple(images[split].files) for split in SPLITS},
        notes=notes,
    )


def read_classes(root: Storage) -> ClassSet:
    """Return the classes that `classes.json` in `root` describes; those of Cityscapes if there is no such file.

    Raises InputError with all that is wrong with it.
    """
    content = root.read(CLASSES_FILE)
    if content is None:
        return CITYSCAPES
    try:
        return ClassSet.model_validate_json(content)
    except ValidationError as error:
        problems = []
        for finding in error.errors():
            where = ".".join(map(str, finding["loc"]))
            given = f" (given {finding['input']!r})" if finding["type"].endswith("_type") else ""
            lines = f"{in_words(finding['msg'])}{given}".split("\n")
            problems += [f"{where + ': ' if where else ''}{line}" for line in lines]
        uri = (root / CLASSES_FILE).uri
        example = ClassSet(classes=CITYSCAPES.classes[:2], void=(0,)).model_dump_json()
        raise InputError(*(f"{uri}: {problem}" for problem in problems), f"{uri} must read like {example}") from error


def _advise_classes(root: Storage, ids: Collection[int]) -> str:
    """Return how to describe classes of one's own that have these ids."""
    own = [{"name": f"class {i}", "id": i} for i in sorted(ids) if i != VOID]
    if not own:
        return "They hold no class, whatever their names."
    template = json.dumps({"classes": own, "void": []})
    return (
        f"If they are classes of your own, name them in {(root / CLASSES_FILE).uri}, and list ids that are not to be "
        f"scored as void: {template}"
    )


class _File(NamedTuple):
    """A file as it was listed. Some file systems give no time of change; then path and size must do."""

    path: str  # below the root
    num_bytes: int
    mtime_ns: int
    problem: str  # why it cannot be opened, continuing its name; empty for most


class _Found(NamedTuple):
    """The frames in a folder, and the pictures beside them that are none."""

    folder_uri: str
    files: dict[str, _File]  # by frame name, sorted
    passed_over: dict[str, list[str]]  # paths by what they are instead

    @property
    def note(self) -> str:
        return f"not used in {self.folder_uri}: {self.describe_passed_over()}"

    def describe_passed_over(self) -> str:
        return ", ".join(f"{len(paths)} {what} (such as {min(paths)})" for what, paths in self.passed_over.items())


def _find_labels(root: Storage, classes: ClassSet) -> tuple[LabelFormat, dict[Split, _Found]]:
    """Return the labels of each split: labelIds where both kinds exist, or none."""
    found = {
        form: {split: _find_frames(root, f"{LABELS}/{split}", form.suffix) for split in SPLITS}
        for form in (_label_ids(classes), _label_train_ids(classes))
    }
    label_format = max(found, key=lambda form: any(labels.files for labels in found[form].values()))
    return label_format, found[label_format]


def _find_frames(root: Storage, folder: str, suffix: str) -> _Found:
    """Return the files `folder/CITY/STEM + suffix`, and what other pictures there are; none if there is no folder."""
    files: dict[str, _File] = {}
    passed_over: dict[str, list[str]] = {}
    others = tuple(other for other in OTHER_LABEL_SUFFIXES if not suffix.endswith(other))
    for file in _list_folder(root / folder):
        *folders, name = file.path.split("/")
        if len(folders) == 1 and name.endswith(suffix):
            files[file.path.removesuffix(suffix)] = file._replace(path=f"{folder}/{file.path}")
        elif file.problem != IS_FOLDER and re.search(PICTURES, name) and not name.endswith(others):
            passed_over.setdefault(_what_instead(folders, name, suffix), []).append(file.path)
    return _Found((root / folder).uri, dict(sorted(files.items())), passed_over)


def _list_folder(folder: Storage) -> Iterator[_File]:
    """Yield what is in a folder, at any depth, by its path in it; not what begins with a dot, as macOS writes it."""
    problems = {FileType.Directory: IS_FOLDER, FileType.Unknown: "is no regular file, but a FIFO, a socket or a device"}
    files = []
    for info in folder.infos(recursive=True):
        try:
            path, problem = info.path, problems.get(info.type, "")
        except UnicodeDecodeError as error:
            path, problem = error.object.decode(errors="backslashreplace"), "has a name that is not UTF-8"
        files.append(_File(path, info.size or 0, info.mtime_ns or 0, problem))
    if folder.local_path and folder.local_path.is_dir():  # broken links, which pyarrow leaves out
        files += [_File(path, 0, 0, "is a link to nothing") for path in _broken_links(folder.path)]
    for file in files:
        path = file.path.lstrip("/").removeprefix(f"{folder.path.lstrip('/')}/")
        if not any(name.startswith(".") for name in path.split("/")):
            yield file._replace(path=path)


def _broken_links(folder: str) -> Iterator[str]:
    """Yield the paths of links to nothing, at any depth; folders that are links are followed."""
    with os.scandir(folder) as entries:
        for entry in entries:
            path = Path(entry.path)
            if path.is_dir() if entry.is_symlink() else entry.is_dir():
                yield from _broken_links(entry.path)
            elif entry.is_symlink() and not path.exists():
                yield os.fsencode(entry.path).decode(errors="backslashreplace")


def _what_instead(folders: Sequence[str], name: str, suffix: str) -> str:
    """Return how a picture that is no frame differs from one."""
    if name.endswith(suffix):
        return f"that lie {len(folders)} folders deep, not 1" if folders else "that lie in no folder of a city"
    mark = suffix[: suffix.index("_", 1) if suffix.count("_") > 1 else suffix.index(".")]  # _gtFine, _leftImg8bit
    start = name.lower().rfind(mark.lower())
    return f"named *{name[start if start >= 0 else name.rindex('.') :]}"


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
    is_file = root.local_path is not None and root.local_path.exists() and not root.local_path.is_dir()
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
    root: Storage, split: Split, label_format: LabelFormat, images: _Found, labels: _Found
) -> list[str]:
    """Report folders without frames, or else the frames of which one half is missing."""
    empty = []
    for top, suffix, found in ((IMAGES, IMAGE_SUFFIX, images), (LABELS, label_format.suffix, labels)):
        if not found.files:
            instead = f"Unpack {ARCHIVES[top]} into {root.uri}."
            if found.passed_over:
                instead = f"There are {found.describe_passed_over()}: move, rename or convert them."
            elif not (root / top / split).exists() and (others := (root / top).folder_names()):
                instead = f"{(root / top).uri} holds the folders {', '.join(others[:5])}. {instead}"
            empty.append(f"no frames in {(root / top / split).uri}: expected CITY/*{suffix} there. {instead}")
    if empty:
        return empty
    problems = []
    for name in sorted(images.files.keys() ^ labels.files.keys()):
        image, label = (root / _image_path(split, name)).uri, (root / _label_path(split, name, label_format)).uri
        missing = f"{image} has no label: expected {label}. Unpack {ARCHIVES[LABELS]} again, or remove the image."
        if name in labels.files:
            missing = f"{label} has no image: expected {image}. Unpack {ARCHIVES[IMAGES]} again, or remove the label."
        problems.append(missing)
    if problems:
        problems += [found.note for found in (images, labels) if found.passed_over]
    return problems


def _read_header_sizes(
    root: Storage, kinds: Mapping[_File, Mapping[str, str]], problems: list[str]
) -> dict[_File, tuple[int, int]]:
    """Return height and width of every file that is readable and of one of its `kinds`; report the others."""

    def read_header_size(file: _File) -> tuple[int, int]:
        if file.problem:
            raise InputError(f"{(root / file.path).uri} {file.problem}: rename, replace or remove it.")
        _content, header = _read_png(root, file.path, kinds[file], at_most=HEADER_BYTES)
        return header.height, header.width

    sizes = {}
    with ThreadPoolExecutor(NUM_HEADER_THREADS) as pool:
        futures = {file: pool.submit(read_header_size, file) for file in kinds}
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
    """Report pairs whose halves differ in size."""
    problems = []
    for image, label in (pair for pair in pairs if all(file in sizes for file in pair)):
        if sizes[label] == sizes[image]:
            continue
        image_is, label_is = (f"{(root / file.path).uri} is {format_size(sizes[file])}" for file in (image, label))
        problems.append(f"{label_is} but its image {image_is} (height x width): replace one of them.")
    return problems


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add the problems of an InputError to `problems` instead of raising it."""
    try:
        yield
    except InputError as error:
        problems.extend(error.problems)


@contextmanager
def _naming(uri: str) -> Iterator[None]:
    """Turn errors about a file into an InputError that names it."""
    try:
        yield
    except (InputError, StorageError):
        raise
    except OSError as error:
        raise InputError(f"{uri} cannot be read ({error}): unpack or copy it again, or remove the frame.") from error
    except ValueError as error:  # of the module png
        raise InputError(f"{uri} {error}") from error


def _read_png(
    root: Storage, path: str, kinds: Mapping[str, str], *, at_most: int | None = None
) -> tuple[bytes, PngHeader]:
    """Return a PNG's bytes, or the first of them, and its header: its size is bounded, its kind one of `kinds`."""
    with _naming((root / path).uri):
        content = root.read(path, at_most=at_most)
        if content is None:
            raise FileNotFoundError("there is no such file")
        header = read_png_header(content[:HEADER_BYTES])
        if header.kind not in kinds:
            rule = next(iter(kinds.values()))
            raise ValueError(f"is {header.kind}: {rule}. Convert or replace the file.")
        return content, header


def _decode(root: Storage, path: str, kinds: Mapping[str, str]) -> Image.Image:
    content, _header = _read_png(root, path, kinds)
    with _naming((root / path).uri):
        return decode_png(content)


def _read_ids(root: Storage, path: str, label_format: LabelFormat, classes: ClassSet) -> NDArray[np.uint8]:
    """Return a label's ids (H, W) as they are in its file."""
    picture = _decode(root, path, LABEL_KINDS)
    uri = (root / path).uri
    ids = np.asarray(picture)
    counts = np.array(picture.histogram())
    if picture.mode == "P" and (problem := _palette_problem(picture.getpalette() or [], counts, label_format, classes)):
        raise InputError(f"{uri} {problem}")
    present = np.flatnonzero(counts).tolist()
    if unknown := [i for i in present if i not in label_format.known_ids]:
        listed = ", ".join(f"{i} ({counts[i]:,} pixels)" for i in unknown)
        advice = _advise_classes(root, present)
        if classes != CITYSCAPES:
            advice = f"Add them to {(root / CLASSES_FILE).uri}, as classes or to its list void."
        problem = (
            f"{uri} holds the ids {listed}: *{label_format.suffix} may hold {label_format.ids_in_words}. "
            f"Replace it by the original if it is damaged. {advice}"
        )
        raise InputError(problem)
    return ids


def _palette_problem(
    palette: list[int], counts: NDArray[np.int64], label_format: LabelFormat, classes: ClassSet
) -> str | None:
    """Return why a palette's indices seem not to be the ids, if its greys or its colours say something else.

    Programs that make files smaller turn grey into a palette, and others turn painted classes into one: then
    indices number what occurs in the file.
    """
    colours = list(zip(palette[::3], palette[1::3], palette[2::3], strict=True))
    used = np.flatnonzero(counts[: len(colours)]).tolist()
    is_grey = [len(set(colour)) == 1 for colour in colours]
    if all(is_grey):
        moved = [index for index in used if colours[index][0] != index]
        if moved:
            return (
                f"has a palette of greys in which index {moved[0]} is grey {colours[moved[0]][0]}: either could be "
                "the id. Save it as 8-bit grey."
            )
        return None
    own = {label.colour: train_id for train_id, label in enumerate(classes.classes) if label.colour}
    painted = [index for index, colour in enumerate(colours) if not is_grey[index]]
    meant = label_format.train_ids
    moved = [i for i in painted if own.get(colours[i], meant[i]) != meant[i]]
    if 2 * len(moved) < len(painted):
        return None
    name = classes.names[own[colours[moved[0]]]]
    return (
        f"has a palette in which index {moved[0]} has the colour of {name}, which has another id in "
        f"*{label_format.suffix}: is it a painted label? Save the ids as 8-bit grey."
    )


def _are_train_ids(ids: Collection[int]) -> bool:
    """Return whether ids are trainIds by all signs: void is 255, all others fit, and as labelIds some were void, too.

    Cityscapes' own labelIds hold no 255, and others mark void once: by 255, or by 0.
    """
    others = set(ids) - {VOID}
    return VOID in ids and max(others, default=0) < len(CITYSCAPES) and not others.isdisjoint(VOID_LABELS.keys() - {0})


def open_test_split(root: Storage) -> tuple[Sequence[str], Callable[[int], Frame], ClassSet]:
    """Return the names of a test split's frames, what reads one, and the classes; a frame without a label is all void.

    Cityscapes keeps the labels of its test split to itself. Raises InputError if there are no frames.
    """
    classes = read_classes(root)
    formats = (_label_ids(classes), _label_train_ids(classes))
    found = {
        suffix: _find_frames(root, f"{top}/test", suffix)
        for top, suffix in ((IMAGES, IMAGE_SUFFIX), *((LABELS, form.suffix) for form in formats))
    }
    names = tuple(found[IMAGE_SUFFIX].files)
    if not names:
        folder = (root / IMAGES / "test").uri
        raise InputError(f"no frames in {folder}: expected CITY/*{IMAGE_SUFFIX} there. Unpack {ARCHIVES[IMAGES]}.")

    def read(index: int) -> Frame:
        name = names[index]
        image = np.asarray(_decode(root, found[IMAGE_SUFFIX].files[name].path, IMAGE_KINDS))
        for form in formats:
            if file := found[form.suffix].files.get(name):
                ids = _read_ids(root, file.path, form, classes)
                return Frame(image, np.frombuffer(form.train_ids, np.uint8)[ids])
        return Frame(image, np.full(image.shape[:2], VOID, dtype=np.uint8))

    return names, read, classes
