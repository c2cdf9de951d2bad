"""The packed format: a source decoded once a node, as one Arrow file per split, which every trial reads.

    CACHE/SOURCE-HxW-HASH/train.arrow    images and labels at HxW
    CACHE/SOURCE-HxW-HASH/val.arrow      images at HxW, labels at the size of the source, as they are scored

Where frames differ in size, each label of `val` has its own, with void behind it up to the length of the largest.

Columns: `name`, `image` (RGB planes, 3 x H x W bytes), `label` (trainIds, h x w bytes), all uncompressed. The schema's
metadata holds what is known before the first frame; the metadata of each record batch holds its class counts and its
sha256. A folder appears under its name only when complete and never changes after that: another state of the source
gets another HASH.

A cache may be damaged at any time. To open a pack is to read it whole and compare its sha256; each frame is compared
with its checksum whenever it is read again. Files are read, not mapped: a map of a file that is cut short, or lies on a
disk that fails, ends the process. All trials share the system's cache of the files either way. Measured 2026-11-29 on
one busy Xeon core, 512x1024: to read and compare all frames takes 0.04 % of an epoch, to open a pack 0.1 % of one.

This file is the format and its reader; `packing` writes. `H x W` are images, `h x w` labels.
"""

import hashlib
import json
import math
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.config import STRIDE, format_size
from tune_bisenet.data.source import SPLITS, Split
from tune_bisenet.options import InputError
from tune_bisenet.text import counted, one_line

FORMAT_VERSION: Final = 1
_ARROW_MAGIC: Final = b"ARROW1\0\0"  # with which a file begins; the rest is a stream, and a footer
MAX_SUGGESTED_SIZE: Final = (512, 1024)
MAX_NAMED_CLASSES: Final = 5

FrameSize = tuple[int, int]  # height, width
ByteArray = NDArray[np.uint8]
ClassCounts = NDArray[np.int64]  # (C,): pixels by class, without void


class DamagedPackError(InputError):
    """A pack is missing, or does not hold what was packed. To pack again mends it."""


@dataclass(frozen=True, eq=False)
class _Column(Sequence[ByteArray]):
    """Arrays of one shape, or each of its own, by the index of their frame. Each is read when it is asked for."""

    path: Path
    file: Any
    shape: tuple[int, ...]
    places: list[tuple[int, int]]  # offset in the file and CRC-32 of each
    own_shapes: Sequence[tuple[int, ...]] = ()  # where they differ; of the bytes of `shape` it takes the first ones

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: Any) -> Any:
        """Return a read-only array. Raises DamagedPackError if the file no longer holds it."""
        offset, checksum = self.places[index]
        try:
            content = self.file.read_at(math.prod(self.shape), offset)
        except OSError as error:
            raise _damaged(self.path, error) from error
        if zlib.crc32(content) != checksum:
            raise _damaged(self.path, f"frame {index} has changed since the pack was opened")
        shape = self.own_shapes[index] if self.own_shapes else self.shape
        return np.frombuffer(content, np.uint8, math.prod(shape)).reshape(shape)


@dataclass(frozen=True, eq=False)
class PackedSplit:
    """Frames by index; none is in memory before it is used."""

    names: Sequence[str]
    images: Sequence[ByteArray]  # each 3 x H x W
    labels: Sequence[ByteArray]  # each h x w, trainIds, void 255
    label_sizes: Sequence[FrameSize] = ()  # h and w of each, where they differ

    def __len__(self) -> int:
        return len(self.names)

    def gather(self, indices: Iterable[int], out_images: ByteArray, out_labels: ByteArray) -> None:
        """Copy frames into the first rows of `out_images` (B, 3, H, W) and `out_labels` (B, h, w), of equal sizes."""
        for row, index in enumerate(indices):
            out_images[row] = self.images[index]
            out_labels[row] = self.labels[index]


@dataclass(frozen=True, eq=False)
class Packed:
    """An opened pack. Pass its `path` to other processes, and compare `digest` there: it depends on content alone."""

    path: Path
    source_name: str
    fingerprint: str  # the source's
    image_size: FrameSize
    label_size: FrameSize  # of `val`, the largest where they differ; the labels of `train` have `image_size`
    class_counts: ClassCounts  # of the train labels at the size of the source
    val_class_counts: ClassCounts
    digest: str  # of names, pixels and counts: equal for equal frames, on any machine and path
    train: PackedSplit
    val: PackedSplit
    classes: ClassSet = CITYSCAPES
    label_pixels: Mapping[Split, int] = field(default_factory=dict)
    """Of all labels before resizing; empty where all have `label_size`."""
    replaced: str = ""
    """What was wrong with the pack that was here before, in words; empty if nothing was."""

    def class_shares(self, split: Split) -> NDArray[np.float64]:
        """Return each class's share (C,) of all pixels in a split's labels, before resizing; the rest is void."""
        rows, counts = (self.train, self.class_counts) if split == "train" else (self.val, self.val_class_counts)
        return counts / (self.label_pixels.get(split) or len(rows) * math.prod(self.label_size))

    def describe_classes(self, split: Split) -> str:
        """Return what a split's labels hold, as `road 29 %, sky 9 %, 15 others; 2 never (rider, train); void 3 %`."""
        shares = self.class_shares(split)
        present = [index for index in np.argsort(-shares, kind="stable").tolist() if shares[index] > 0]
        never = [name for name, share in zip(self.classes.names, shares, strict=True) if share == 0]
        named = [f"{self.classes.names[index]} {_percent(shares[index])}" for index in present[:MAX_NAMED_CLASSES]]
        more = [counted(len(present) - len(named), "other")] if len(present) > len(named) else []
        missing = f"; {len(never)} never" if never else ""
        missing += f" ({', '.join(never)})" if 0 < len(never) <= MAX_NAMED_CLASSES else ""
        return f"{', '.join([*named, *more])}{missing}; void {_percent(1 - shares.sum())}"


def _percent(share: float) -> str:
    return "under 1 %" if 1e-9 < share < 0.01 else f"{100 * share:.0f} %"


def suggested_image_size(frame_size: FrameSize) -> FrameSize:
    """Return the default size to pack at: the frame shrunk to fit 512x1024, each side cut to a multiple of 32.

    It never exceeds the frame's own: 1024x2048 gives 512x1024, 360x480 gives 352x480, 720x960 gives 512x672.
    """
    if min(frame_size) < STRIDE:
        raise ValueError(
            f"frames are {format_size(frame_size)} (height x width): both sides must be {STRIDE} pixels or more."
        )
    height, width = frame_size
    scale = min(1, MAX_SUGGESTED_SIZE[0] / height, MAX_SUGGESTED_SIZE[1] / width)
    return max(STRIDE, int(height * scale) // STRIDE * STRIDE), max(STRIDE, int(width * scale) // STRIDE * STRIDE)


class Header(NamedTuple):
    """The metadata of a file's schema, one entry a field, as JSON; what is as in Cityscapes has none."""

    format_version: int
    source_name: str
    fingerprint: str
    split: str
    num_rows: int
    image_size: FrameSize
    label_size: FrameSize
    classes: ClassSet = CITYSCAPES
    frame_sizes: tuple[FrameSize, ...] = ()  # of the source, where they differ

    @property
    def row_bytes(self) -> int:
        return 3 * math.prod(self.image_size) + math.prod(self.label_size)


_REQUIRED: Final = Header._fields[: -len(Header._field_defaults)]


def arrow_schema(header: Header) -> Any:
    image, label = pa.binary(3 * math.prod(header.image_size)), pa.binary(math.prod(header.label_size))
    values = header._asdict() | {"classes": header.classes.model_dump(mode="json")}
    unusual = {key for key, default in Header._field_defaults.items() if getattr(header, key) != default}
    metadata = {key: json.dumps(values[key]) for key in Header._fields if key in unusual or key in _REQUIRED}
    return pa.schema({"name": pa.string(), "image": image, "label": label}, metadata=metadata)


class _SplitFile(NamedTuple):
    header: Header
    rows: PackedSplit
    class_counts: ClassCounts  # before resizing
    batch_sha256: Sequence[str]


def open_packed(path: Path) -> Packed:
    """Open a pack, of which every byte is read and compared. Raises DamagedPackError."""
    train, val = (_read_split(path, split) for split in SPLITS)
    shared = [file.header._replace(split="", num_rows=0, label_size=(0, 0), frame_sizes=()) for file in (train, val)]
    if shared[0] != shared[1]:
        raise _damaged(path, "its two files are of different packs")
    content = [
        [header.format_version, header.split, header.image_size, header.label_size, batch_sha256]
        for header, _rows, _class_counts, batch_sha256 in (train, val)
    ]
    if train.header.frame_sizes:
        content.append([train.header.frame_sizes, val.header.frame_sizes])
    classes = train.header.classes
    if classes.names != CITYSCAPES.names:
        content.append([list(classes.names)])
    return Packed(
        path=path,
        source_name=train.header.source_name,
        fingerprint=train.header.fingerprint,
        image_size=train.header.image_size,
        label_size=val.header.label_size,
        class_counts=train.class_counts,
        val_class_counts=val.class_counts,
        digest=hashlib.sha256(json.dumps(content).encode()).hexdigest(),
        train=train.rows,
        val=val.rows,
        classes=classes,
        label_pixels={
            split: sum(map(math.prod, file.header.frame_sizes))
            for split, file in zip(SPLITS, (train, val), strict=True)
            if file.header.frame_sizes
        },
    )


def _damaged(path: Path, reason: object) -> DamagedPackError:
    return DamagedPackError(f"the packed frames in {path} are damaged: {reason}")


def _read_split(folder: Path, split: Split) -> _SplitFile:
    path = folder / f"{split}.arrow"
    if not path.is_file():
        raise DamagedPackError(f"there are no packed frames in {path}")
    try:
        file = pa.OSFile(str(path))
        footer = pa.ipc.open_file(file)  # a file that is cut short has lost it
        metadata = footer.schema.metadata or {}
        header = _read_header(metadata)
        if header.format_version != FORMAT_VERSION:
            raise ValueError(f"it has format {header.format_version}, this program reads {FORMAT_VERSION}")
        if not footer.schema.equals(arrow_schema(header), check_metadata=True):
            raise ValueError("its columns differ from those in its metadata")
        read = _read_batches(path, file, header, num_batches=footer.num_record_batches)
        if header.split != split or header.num_rows != len(read.rows):
            raise ValueError(f"it holds {len(read.rows)} rows of {header.split}, not {header.num_rows} of {split}")
        return read
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError, StopIteration) as error:
        raise _damaged(path, one_line(error)) from error


def _read_header(metadata: dict[bytes, bytes]) -> Header:
    """Return the header in a schema's metadata. LookupError, TypeError or ValueError if it is damaged."""
    values: dict[str, Any] = {}
    for key in Header._fields:
        if key in _REQUIRED or key.encode() in metadata:
            value = json.loads(metadata[key.encode()])
            values[key] = tuple(value) if isinstance(value, list) else value
    if "classes" in values:
        values["classes"] = ClassSet.model_validate(values["classes"])
    values["frame_sizes"] = tuple((int(height), int(width)) for height, width in values.get("frame_sizes", ()))
    header = Header(**values)
    sizes, most = header.frame_sizes, math.prod(header.label_size)
    if sizes and len(sizes) != header.num_rows:
        raise ValueError(f"it has {len(sizes)} sizes of {header.num_rows} frames")
    if header.split == "val" and not all(min(size) > 0 and math.prod(size) <= most for size in sizes):
        raise ValueError(f"a label is larger than {format_size(header.label_size)}")
    return header


def _read_batches(path: Path, file: Any, header: Header, *, num_batches: int) -> _SplitFile:
    """Read one batch after the other; `np.frombuffer` raises ValueError where a buffer is too short for its rows."""
    file.seek(len(_ARROW_MAGIC))
    reader = pa.ipc.open_stream(file)  # it tells where in the file a batch lies
    names: list[str] = []
    label_sizes = header.frame_sizes if header.split == "val" and len({*header.frame_sizes}) > 1 else ()
    columns = (
        _Column(path, file, (3, *header.image_size), []),
        _Column(path, file, header.label_size, [], label_sizes),
    )
    class_counts, batch_sha256 = np.zeros(len(header.classes), np.int64), []
    for _ in range(num_batches):
        batch, metadata = reader.read_next_batch_with_custom_metadata()
        batch.column("name").validate(full=True)  # otherwise a damaged offset would be followed
        names += batch.column("name").to_pylist()
        batch_counts = json.loads(metadata[b"class_counts"])
        digest = hashlib.sha256(json.dumps([names[-batch.num_rows :], batch_counts]).encode())
        for column, name in zip(columns, ("image", "label"), strict=True):
            buffer = batch.column(name).buffers()[1]
            num_bytes = math.prod(column.shape)
            pixels = np.frombuffer(buffer, np.uint8, batch.num_rows * num_bytes).reshape(batch.num_rows, num_bytes)
            digest.update(pixels.data)
            body = buffer.parent  # the batch's part of the file, read to its end
            start = file.tell() - body.size + buffer.address - body.address
            places = [(start + row * num_bytes, zlib.crc32(array.data)) for row, array in enumerate(pixels)]
            column.places.extend(places)
        if digest.hexdigest() != metadata[b"sha256"].decode():
            raise ValueError("its content differs from its sha256")
        class_counts += np.array(batch_counts, np.int64)
        batch_sha256.append(digest.hexdigest())
    images, labels = columns
    split = PackedSplit(names=tuple(names), images=images, labels=labels, label_sizes=label_sizes)
    return _SplitFile(header, split, class_counts, batch_sha256)
