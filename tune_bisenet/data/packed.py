"""Decode once per node: a source as one Arrow file per split, memory-mapped by every trial.

    CACHE/SOURCE-HxW-HASH/train.arrow    images and labels at HxW
    CACHE/SOURCE-HxW-HASH/val.arrow      images at HxW, labels at the size of the source, as they are scored

Columns: `name`, `image` (RGB planes, 3 x H x W bytes), `label` (trainIds, h x w bytes), all uncompressed. What is known
before the first frame stands in the schema's metadata; what is known after a record batch (its class counts and
its sha256) stands in the metadata of that batch. So a file needs no other to be read or verified. A folder appears
under its name only when whole, and is never changed after: another state of the source gets another HASH.

This file knows nothing of where frames come from, nor of crops and batches. `H x W` are images, `h x w` labels.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from PIL import Image

from tune_bisenet.data.classes import NUM_CLASSES
from tune_bisenet.data.source import SPLITS, DataError, Frame, Source, Split

FORMAT_VERSION: Final = 1
BATCH_BYTES: Final = 64 * 2**20
MAX_BATCH_ROWS: Final = 64
SUGGESTED_SIZE: Final = (512, 1024)
STRIDE: Final = 32  # the network halves its input five times
NUM_THREADS: Final = min(16, os.cpu_count() or 1)

Size = tuple[int, int]  # height, width
Bytes = NDArray[np.uint8]
Counts = NDArray[np.int64]  # (19,): pixels by class, void left out
Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)


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
        raise ValueError(f"frames are {_x(frame_size)} (height x width): both sides must be {STRIDE} pixels or more.")
    height, width = frame_size
    scale = min(1, SUGGESTED_SIZE[0] / height, SUGGESTED_SIZE[1] / width)
    return max(STRIDE, int(height * scale) // STRIDE * STRIDE), max(STRIDE, int(width * scale) // STRIDE * STRIDE)


def prepare(source: Source, *, image_size: Size, cache_dir: Path, progress: Progress | None = None) -> Packed:
    """Open the pack of `source` at `image_size`; pack first unless a whole one is there whose every byte is right.

    Any number of processes may ask at once: one packs, the others wait. `progress(done, total)` counts frames.
    Raises DataError naming every frame that cannot be used, or when the disk is too small.
    """
    cache_dir.mkdir(parents=True, exist_ok=True)
    folder = cache_dir / _key(source, image_size)
    with _locked(folder.with_name(f"{folder.name}.lock")):
        try:
            _verify(folder, [_header(source, split, image_size) for split in SPLITS])
        except DataError as reason:
            _log.info("packing %s at %s: %s", source.name, _x(image_size), reason)
            _build(source, image_size, folder, progress or (lambda _done, _total: None))
        return open_packed(folder)


def open_packed(path: Path) -> Packed:
    """Open a pack without reading its pixels: what a trial does. Raises DataError if it is missing or not whole."""
    (train_header, train), (val_header, val) = (_read(path, split) for split in SPLITS)
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


def _split(batches: Sequence["_Batch"]) -> PackedSplit:
    return PackedSplit(
        names=tuple(name for batch in batches for name in batch.names),
        images=tuple(image for batch in batches for image in batch.images),
        labels=tuple(label for batch in batches for label in batch.labels),
    )


def _x(size: Size) -> str:
    return f"{size[0]}x{size[1]}"


# --- the format -------------------------------------------------------------------------------------------------


class _Header(NamedTuple):
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


class _Batch(NamedTuple):
    """The rows of one record batch: `n` names, images (n, 3, H, W), labels (n, h, w), counts before resizing."""

    names: Sequence[str]
    images: Bytes
    labels: Bytes
    class_counts: Counts
    sha256: str


def _header(source: Source, split: Split, image_size: Size) -> _Header:
    return _Header(
        format_version=FORMAT_VERSION,
        source_name=source.name,
        fingerprint=source.fingerprint,
        split=split,
        num_rows=len(source.names(split)),
        image_size=image_size,
        label_size=image_size if split == "train" else source.frame_size,
    )


def _schema(header: _Header) -> Any:
    (image_height, image_width), (label_height, label_width) = header.image_size, header.label_size
    return pa.schema(
        {
            "name": pa.string(),
            "image": pa.binary(3 * image_height * image_width),
            "label": pa.binary(label_height * label_width),
        },
        metadata={key: json.dumps(value) for key, value in header._asdict().items()},
    )


def _parsed(metadata: dict[bytes, bytes]) -> _Header:
    values = (json.loads(metadata[key.encode()]) for key in _Header._fields)
    return _Header._make(tuple(value) if isinstance(value, list) else value for value in values)


def _sha256(names: Sequence[str], class_counts: Counts, images: Bytes, labels: Bytes) -> str:
    """Measured 2026-11-23 on an EPYC, one core: sha256 1.7 GB/s, blake2b 1.1, crc32 4.2 but 32 bits name no content."""
    digest = hashlib.sha256(json.dumps([names, class_counts.tolist()]).encode())
    digest.update(images.data)
    digest.update(labels.data)
    return digest.hexdigest()


def _digest(splits: Iterable[tuple[_Header, Sequence[_Batch]]]) -> str:
    """Of the content only: neither path, fingerprint nor time goes in."""
    content = [
        [header.format_version, header.split, header.image_size, header.label_size, [batch.sha256 for batch in batches]]
        for header, batches in splits
    ]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


# --- reading ----------------------------------------------------------------------------------------------------


def _read(folder: Path, split: Split) -> tuple[_Header, list[_Batch]]:
    """Map one file and check all that costs no look at the pixels."""
    path = folder / f"{split}.arrow"
    if not path.is_file():
        raise DataError([f"no pack at {path}: it is made when a search starts."])
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(path)))
        header = _parsed(reader.schema.metadata or {})
        if header.format_version != FORMAT_VERSION:
            raise ValueError(f"it has format {header.format_version}, this program reads {FORMAT_VERSION}")
        if not reader.schema.equals(_schema(header), check_metadata=True):
            raise ValueError("its columns are not those its metadata tells of")
        batches = [_from_arrow(reader, index, header) for index in range(reader.num_record_batches)]
        num_rows = sum(len(batch.names) for batch in batches)
        if header.split != split or header.num_rows != num_rows:
            raise ValueError(f"it holds {num_rows} rows of {header.split}, not {header.num_rows} of {split}")
    except (pa.ArrowException, OSError, LookupError, TypeError, ValueError) as error:
        reason = str(error).strip() or type(error).__name__
        raise DataError([f"{path} is no whole pack ({reason}): it is made anew when a search starts."]) from error
    return header, batches


def _from_arrow(reader: Any, index: int, header: _Header) -> _Batch:
    """Views into the map; `np.frombuffer` raises ValueError where a buffer is too short for its rows."""
    batch, metadata = reader.get_batch_with_custom_metadata(index)
    batch.column("name").validate(full=True)  # else a damaged offset would be followed

    def rows(column: str, shape: tuple[int, ...]) -> Bytes:
        size = batch.num_rows * int(np.prod(shape))
        return np.frombuffer(batch.column(column).buffers()[1], np.uint8, size).reshape(batch.num_rows, *shape)

    return _Batch(
        names=batch.column("name").to_pylist(),
        images=rows("image", (3, *header.image_size)),
        labels=rows("label", header.label_size),
        class_counts=np.array(json.loads(metadata[b"class_counts"]), np.int64).reshape(NUM_CLASSES),
        sha256=metadata[b"sha256"].decode(),
    )


def _verify(folder: Path, expected: Sequence[_Header]) -> None:
    """Raise DataError unless every byte of every row is the one that was packed, from just this source."""
    splits = [_read(folder, split) for split in SPLITS]
    if [header for header, _ in splits] != list(expected):
        raise DataError([f"{folder} was packed from another source."])
    batches = [batch for _, batches in splits for batch in batches]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = pool.map(lambda batch: _sha256(batch.names, batch.class_counts, batch.images, batch.labels), batches)
        num_damaged = sum(batch.sha256 != sha256 for batch, sha256 in zip(batches, found, strict=True))
    if num_damaged:
        raise DataError([f"{folder} is damaged: {num_damaged} of {len(batches)} record batches are not as written."])


# --- packing ----------------------------------------------------------------------------------------------------


def _key(source: Source, image_size: Size) -> str:
    """A folder's name: for people the source and size, for us a hash of all that decides what is inside."""
    identity = [FORMAT_VERSION, source.name, source.fingerprint, image_size]
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", Path(source.name).name).strip("-")[:40] or "source"
    return f"{slug}-{_x(image_size)}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock; the system drops it when a process dies."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.info("waiting for the process that holds %s", path)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _build(source: Source, image_size: Size, folder: Path, progress: Progress) -> None:
    """Pack both splits beside `folder` and move them there when they are whole. To be called under the lock."""
    part = folder.with_name(f"{folder.name}.part")
    for useless in (folder, part):  # damaged, and left by a process that died; views still open outlive the name
        shutil.rmtree(useless, ignore_errors=True)
    headers = [_header(source, split, image_size) for split in SPLITS]
    _require_space(folder.parent, sum(header.num_rows * header.row_bytes for header in headers))
    num_frames, num_done = sum(header.num_rows for header in headers), count(1)
    problems: list[str] = []
    part.mkdir()
    try:
        for split, header in zip(SPLITS, headers, strict=True):
            rows = _pack_rows(source, split, header, problems, lambda: progress(next(num_done), num_frames))
            _write(part / f"{split}.arrow", header, rows)
        if problems:
            raise DataError(problems)
        _fsync(part)
        part.rename(folder)
        _fsync(folder.parent)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _require_space(folder: Path, needed_bytes: int) -> None:
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DataError(
            [
                f"packing needs {needed_bytes / 1e9:,.1f} GB in {folder}, where {free_bytes / 1e9:,.1f} GB are free: "
                "remove packs there that no search uses, name another cache folder, or choose a smaller image size."
            ]
        )


class _Row(NamedTuple):
    """One frame as it is packed: image (3, H, W), label (h, w), counts before resizing."""

    name: str
    image: Bytes
    label: Bytes
    class_counts: Counts


def _pack_rows(
    source: Source, split: Split, header: _Header, problems: list[str], tick: Callable[[], None]
) -> Iterator[_Row]:
    """The rows in order. After the first problem none is yielded, but all frames are still looked at."""
    names = source.names(split)
    for future in _in_order(lambda index: _pack_row(names[index], source.load(split, index), header), len(names)):
        try:
            row = future.result()
        except DataError as error:
            problems.extend(error.problems)
        else:
            if not problems:
                yield row
        tick()


def _in_order(function: Callable[[int], _Row], num_items: int) -> Iterator[Future[_Row]]:
    """`function` of 0, 1, … in threads (Pillow decodes without the GIL), with a bounded number of results waiting."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        waiting: deque[Future[_Row]] = deque()
        for index in range(num_items):
            waiting.append(pool.submit(function, index))
            if len(waiting) > 2 * NUM_THREADS:
                yield waiting.popleft()
        yield from waiting


def _pack_row(name: str, frame: Frame, header: _Header) -> _Row:
    counts = np.bincount(frame.label.ravel(), minlength=256)[:NUM_CLASSES]
    return _Row(name, _resized_planes(frame.image, header.image_size), _resized(frame.label, header.label_size), counts)


def _resized_planes(image: Bytes, size: Size) -> Bytes:
    """(H, W, 3) to (3, *size): the mean of whole boxes where the ratios are integers, else bilinear with antialias."""
    (height, width), (new_height, new_width) = image.shape[:2], size
    picture = Image.fromarray(image)
    if height % new_height == 0 and width % new_width == 0:
        picture = picture.reduce((width // new_width, height // new_height))
    else:
        picture = picture.resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def _resized(label: Bytes, size: Size) -> Bytes:
    """(h, w) to `size`, nearest: a mean of two ids is a third class."""
    if label.shape == size:
        return label
    return np.asarray(Image.fromarray(label).resize((size[1], size[0]), Image.Resampling.NEAREST))


def _write(path: Path, header: _Header, rows: Iterator[_Row]) -> None:
    """One file, record batch by record batch, and down to the disk."""
    schema = _schema(header)
    rows_per_batch = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // header.row_bytes))
    with path.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            while chunk := list(islice(rows, rows_per_batch)):
                batch = _stacked(chunk)
                metadata = {"class_counts": json.dumps(batch.class_counts.tolist()), "sha256": batch.sha256}
                writer.write_batch(_to_arrow(batch, schema), custom_metadata=metadata)
        file.flush()
        os.fsync(file.fileno())


def _to_arrow(batch: _Batch, schema: Any) -> Any:
    def column(name: str, rows: Bytes) -> Any:
        return pa.FixedSizeBinaryArray.from_buffers(schema.field(name).type, len(rows), [None, pa.py_buffer(rows)])

    names = pa.array(batch.names, pa.string())
    return pa.record_batch([names, column("image", batch.images), column("label", batch.labels)], schema=schema)


def _stacked(rows: Sequence[_Row]) -> _Batch:
    names = [row.name for row in rows]
    images, labels = np.stack([row.image for row in rows]), np.stack([row.label for row in rows])
    class_counts = np.sum([row.class_counts for row in rows], axis=0)
    return _Batch(names, images, labels, class_counts, _sha256(names, class_counts, images, labels))


def _fsync(folder: Path) -> None:
    """Make a new name in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
