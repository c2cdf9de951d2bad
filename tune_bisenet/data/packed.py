"""Decode once per node: a source as one Arrow file per split, memory-mapped by every trial.

    CACHE/SOURCE-HxW-HASH/train.arrow    images and labels at HxW
    CACHE/SOURCE-HxW-HASH/val.arrow      images at HxW, labels at the size of the source, as they are scored

Columns: `name`, `image` (RGB planes, 3 x H x W bytes), `label` (trainIds, h x w bytes), all uncompressed. What is known
before the first frame stands in the schema's metadata; what is known after a record batch (its class counts and
its sha256) stands in the metadata of that batch. So a file needs no other to be read or verified. A folder appears
under its name only when whole, and is never changed after: another state of the source gets another HASH.

This file is the format and its reader; `packing` writes. It knows nothing of where frames come from, nor of crops and
batches. `H x W` are images, `h x w` labels.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from tune_bisenet.config import STRIDE, format_size
from tune_bisenet.data.classes import NUM_CLASSES
from tune_bisenet.data.source import SPLITS, DataError, Split

FORMAT_VERSION: Final = 1
SUGGESTED_SIZE: Final = (512, 1024)

Size = tuple[int, int]  # height, width
Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]  # (19,): pixels by class, void left out


@dataclass(frozen=True, eq=False)
class PackedSplit:
    """Frames by number: read-only views into the memory map, nothing is copied until it is asked for."""

    names: Sequence[str]
    images: Sequence[Bytes]  # each 3 x H x W
    labels: Sequence[Bytes]  # each h x w, trainIds, void 255

    def __len__(self) -> int:
        return len(self.names)

    def gather(self, indices: Iterable[int], out_images: Bytes, out_labels: Bytes) -> None:
        """Copy frames into the first rows of `out_images` (B, 3, H, W) and `out_labels` (B, h, w)."""
        for row, index in enumerate(indices):
            out_images[row] = self.images[index]
            out_labels[row] = self.labels[index]


@dataclass(frozen=True, eq=False)
class Packed:
    """An opened pack. Pass its `path` to other processes, and compare `digest` there: it follows the content alone."""

    path: Path
    source_name: str
    fingerprint: str  # the source's
    image_size: Size
    label_size: Size  # of `val`; the labels of `train` have `image_size`
    class_counts: Counts  # of the train labels at the size of the source
    digest: str  # of names, pixels and counts: equal for equal frames, on any machine and path
    train: PackedSplit
    val: PackedSplit


def suggested_image_size(frame_size: Size) -> Size:
    """The size to pack at if nobody says another: the frame shrunk to fit 512x1024, each side cut to a multiple of 32.

    Never above the frame's own: 1024x2048 gives 512x1024, 360x480 gives 352x480, 720x960 gives 512x672.
    """
    if min(frame_size) < STRIDE:
        raise ValueError(
            f"frames are {format_size(frame_size)} (height x width): both sides must be {STRIDE} pixels or more."
        )
    height, width = frame_size
    scale = min(1, SUGGESTED_SIZE[0] / height, SUGGESTED_SIZE[1] / width)
    return max(STRIDE, int(height * scale) // STRIDE * STRIDE), max(STRIDE, int(width * scale) // STRIDE * STRIDE)


def open_packed(path: Path) -> Packed:
    """Open a pack without reading its pixels: what a trial does. Raises DataError if it is missing or not whole."""
    (train_header, train), (val_header, val) = (read_split(path, split) for split in SPLITS)
    return Packed(
        path=path,
        source_name=train_header.source_name,
        fingerprint=train_header.fingerprint,
        image_size=train_header.image_size,
        label_size=val_header.label_size,
        class_counts=np.sum([batch.class_counts for batch in train], axis=0),
        digest=_digest([(train_header, train), (val_header, val)]),
        train=_split(train),
        val=_split(val),
    )


def _split(batches: Sequence["Batch"]) -> PackedSplit:
    return PackedSplit(
        names=tuple(name for batch in batches for name in batch.names),
        images=tuple(image for batch in batches for image in batch.images),
        labels=tuple(label for batch in batches for label in batch.labels),
    )


# --- the format -------------------------------------------------------------------------------------------------


class Header(NamedTuple):
    """The metadata of a file's schema, one entry a field, as JSON."""

    format_version: int
    source_name: str
    fingerprint: str
    split: str
    num_rows: int
    image_size: Size
    label_size: Size

    @property
    def row_bytes(self) -> int:
        return 3 * self.image_size[0] * self.image_size[1] + self.label_size[0] * self.label_size[1]


class Batch(NamedTuple):
    """The rows of one record batch: `n` names, images (n, 3, H, W), labels (n, h, w), counts before resizing."""

    names: Sequence[str]
    images: Bytes
    labels: Bytes
    class_counts: Counts
    sha256: str


def arrow_schema(header: Header) -> Any:
    (image_height, image_width), (label_height, label_width) = header.image_size, header.label_size
    return pa.schema(
        {
            "name": pa.string(),
            "image": pa.binary(3 * image_height * image_width),
            "label": pa.binary(label_height * label_width),
        },
        metadata={key: json.dumps(value) for key, value in header._asdict().items()},
    )


def _parsed(metadata: dict[bytes, bytes]) -> Header:
    values = (json.loads(metadata[key.encode()]) for key in Header._fields)
    return Header._make(tuple(value) if isinstance(value, list) else value for value in values)


def rows_sha256(names: Sequence[str], class_counts: Counts, images: Bytes, labels: Bytes) -> str:
    """Measured 2026-11-23 on an EPYC, one core: sha256 1.7 GB/s, blake2b 1.1, crc32 4.2 but 32 bits name no content."""
    digest = hashlib.sha256(json.dumps([names, class_counts.tolist()]).encode())
    digest.update(images.data)
    digest.update(labels.data)
    return digest.hexdigest()


def _digest(splits: Iterable[tuple[Header, Sequence[Batch]]]) -> str:
    """Of the content only: neither path, fingerprint nor time goes in."""
    content = [
        [header.format_version, header.split, header.image_size, header.label_size, [batch.sha256 for batch in batches]]
        for header, batches in splits
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------


def read_split(folder: Path, split: Split) -> tuple[Header, list[Batch]]:
    """Map one file and check all that costs no look at the pixels."""
    path = folder / f"{split}.arrow"
    if not path.is_file():
        raise DataError([f"no pack at {path}: it is made when a search starts."])
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        header = _parsed(reader.schema.metadata or {})
        if header.format_version != FORMAT_VERSION:
            raise ValueError(f"it has format {header.format_version}, this program reads {FORMAT_VERSION}")
        if not reader.schema.equals(arrow_schema(header), check_metadata=True):
            raise ValueError("its columns are not those its metadata tells of")
        batches = [_from_arrow(reader, index, header) for index in range(reader.num_record_batches)]
        num_rows = sum(len(batch.names) for batch in batches)
        if header.split != split or header.num_rows != num_rows:
            raise ValueError(f"it holds {num_rows} rows of {header.split}, not {header.num_rows} of {split}")
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError([f"{path} is no whole pack ({reason}): it is made anew when a search starts."]) from error
    return header, batches


def _from_arrow(reader: Any, index: int, header: Header) -> Batch:
    """Views into the map; `np.frombuffer` raises ValueError where a buffer is too short for its rows."""
    batch, metadata = reader.get_batch_with_custom_metadata(index)
    batch.column("name").validate(full=True)  # else a damaged offset would be followed

    def rows(column: str, shape: tuple[int, ...]) -> Bytes:
        size = batch.num_rows * int(np.prod(shape))
        return np.frombuffer(batch.column(column).buffers()[1], np.uint8, size).reshape(batch.num_rows, *shape)

    return Batch(
        names=batch.column("name").to_pylist(),
        images=rows("image", (3, *header.image_size)),
        labels=rows("label", header.label_size),
        class_counts=np.array(json.loads(metadata[b"class_counts"]), np.int64).reshape(NUM_CLASSES),
        sha256=metadata[b"sha256"].decode(),
    )
