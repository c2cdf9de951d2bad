"""Make the pack of a source unless it is there, whole and right: decode, resize, write, and all under one lock a pack.

    prepare -> _verify                                  read every byte of what is there
            -> _fetch -> sharing                        or fetch what another node has made
            -> _build -> _pack_rows -> _pack_row        decode and resize in threads, in order
                      -> _write                         record batch by record batch, down to the disk

It knows where frames come from (a `Source`) and in which format they go (`packed`), and nothing of what they are for.
`H x W` are images, `h x w` labels.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from itertools import count, islice
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import pyarrow as pa
from PIL import Image

from tune_bisenet.config import format_size
from tune_bisenet.data.classes import NUM_CLASSES
from tune_bisenet.data.disk import locked, put_in_place, require_space
from tune_bisenet.data.packed import (
    FORMAT_VERSION,
    Batch,
    Bytes,
    Counts,
    Header,
    Packed,
    Size,
    arrow_schema,
    open_packed,
    read_split,
    rows_sha256,
)
from tune_bisenet.data.sharing import download
from tune_bisenet.data.source import SPLITS, DataError, Frame, Source, Split
from tune_bisenet.storage import Storage

BATCH_BYTES: Final = 64 * 2**20
MAX_BATCH_ROWS: Final = 64
NUM_THREADS: Final = min(16, os.cpu_count() or 1)

Progress = Callable[[int, int], None]

_log = logging.getLogger(__name__)


def prepare(
    source: Source,
    *,
    image_size: Size,
    cache_dir: Path,
    progress: Progress | None = None,
    shared: Storage | None = None,
) -> Packed:
    """Open the pack of `source` at `image_size`; pack first unless a whole one is there whose every byte is right.

    One that lies in `shared` is fetched instead. Any number of processes may ask at once: one packs, the others wait.
    `progress(done, total)` counts frames.
    Raises DataError naming every frame that cannot be used, or when the disk is too small.
    """
    folder = cache_dir / _key(source, image_size)
    with _locked(folder):
        headers = [_header(source, split, image_size) for split in SPLITS]
        try:
            _verify(folder, headers)
        except DataError as reason:
            if shared is None or not _fetch(shared / folder.name, folder, headers):
                _log.info("packing %s at %s: %s", source.name, format_size(image_size), reason)
                _build(source, image_size, folder, progress or (lambda _done, _total: None))
        return open_packed(folder)


def fetch(key: str, *, shared: Storage, cache_dir: Path) -> Packed | None:
    """The pack of that name: this node's, or fetched now from `shared`; None if no whole one is there.

    Of the processes that ask at once, one fetches and the others wait.
    """
    folder = cache_dir / key
    with _locked(folder):
        is_here = folder.is_dir() or _fetch(shared / key, folder, None)
        return open_packed(folder) if is_here else None


def _locked(folder: Path) -> AbstractContextManager[None]:
    folder.parent.mkdir(parents=True, exist_ok=True)
    return locked(folder.with_name(f"{folder.name}.lock"))


def _header(source: Source, split: Split, image_size: Size) -> Header:
    return Header(
        format_version=FORMAT_VERSION,
        source_name=source.name,
        fingerprint=source.fingerprint,
        split=split,
        num_rows=len(source.names(split)),
        image_size=image_size,
        label_size=image_size if split == "train" else source.frame_size,
    )


def _verify(folder: Path, expected: Sequence[Header] | None) -> None:
    """Raise DataError unless every byte of every row is the one that was packed, and from the source expected."""
    splits = [read_split(folder, split) for split in SPLITS]
    if expected is not None and [header for header, _ in splits] != list(expected):
        raise DataError([f"{folder} was packed from another source."])
    batches = [batch for _, batches in splits for batch in batches]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        found = pool.map(lambda rows: rows_sha256(rows.names, rows.class_counts, rows.images, rows.labels), batches)
        num_damaged = sum(batch.sha256 != sha256 for batch, sha256 in zip(batches, found, strict=True))
    if num_damaged:
        raise DataError([f"{folder} is damaged: {num_damaged} of {len(batches)} record batches are not as written."])


# --- one pack ---------------------------------------------------------------------------------------------------


def _key(source: Source, image_size: Size) -> str:
    """A folder's name: for people the source and size, for us a hash of all that decides what is inside."""
    identity = [FORMAT_VERSION, source.name, source.fingerprint, image_size]
    address = source.name.partition("?")[0] if "://" in source.name else source.name
    slug = re.sub(r"[^A-Za-z0-9_]+", "-", Path(address).name).strip("-")[:40] or "source"
    return f"{slug}-{format_size(image_size)}-{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:12]}"


def _build(source: Source, image_size: Size, folder: Path, progress: Progress) -> None:
    """Pack both splits beside `folder` and move them there when they are whole. To be called under the lock."""
    part = folder.with_name(f"{folder.name}.part")
    for useless in (folder, part):  # damaged, and left by a process that died; views still open outlive the name
        shutil.rmtree(useless, ignore_errors=True)
    headers = [_header(source, split, image_size) for split in SPLITS]
    require_space(folder.parent, sum(header.num_rows * header.row_bytes for header in headers))
    num_frames, num_done = sum(header.num_rows for header in headers), count(1)
    problems: list[str] = []
    part.mkdir()
    try:
        for split, header in zip(SPLITS, headers, strict=True):
            rows = _pack_rows(source, split, header, problems, lambda: progress(next(num_done), num_frames))
            _write(part / f"{split}.arrow", header, rows)
        if problems:
            raise DataError(problems)
        put_in_place(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _fetch(place: Storage, folder: Path, expected: Sequence[Header] | None) -> bool:
    """Whether a whole and right pack could be had from `place`. To be called under the lock."""
    part = folder.with_name(f"{folder.name}.fetched")
    for _ in range(2):  # what was begun by a process that died may be damaged; then all is fetched anew
        try:
            if not download(place, part):
                return False
            _verify(part, expected)
        except DataError as reason:
            _log.warning("the packed frames from %s cannot be used: %s", place.uri, reason)
            shutil.rmtree(part, ignore_errors=True)
        else:
            put_in_place(part, folder)
            return True
    return False


# --- rows -------------------------------------------------------------------------------------------------------


class _Row(NamedTuple):
    """One frame as it is packed: image (3, H, W), label (h, w), counts before resizing."""

    name: str
    image: Bytes
    label: Bytes
    class_counts: Counts


def _pack_rows(
    source: Source, split: Split, header: Header, problems: list[str], tick: Callable[[], None]
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
        try:
            for index in range(num_items):
                waiting.append(pool.submit(function, index))
                if len(waiting) > 2 * NUM_THREADS:
                    yield waiting.popleft()
            yield from waiting
        finally:
            pool.shutdown(cancel_futures=True)  # nobody waits for the others if storage is away


def _pack_row(name: str, frame: Frame, header: Header) -> _Row:
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


# --- writing ----------------------------------------------------------------------------------------------------


def _write(path: Path, header: Header, rows: Iterator[_Row]) -> None:
    """One file, record batch by record batch, and down to the disk."""
    schema = arrow_schema(header)
    rows_per_batch = min(MAX_BATCH_ROWS, max(1, BATCH_BYTES // header.row_bytes))
    with path.open("wb") as file:
        with pa.ipc.new_file(file, schema) as writer:
            while chunk := list(islice(rows, rows_per_batch)):
                batch = _stacked(chunk)
                metadata = {"class_counts": json.dumps(batch.class_counts.tolist()), "sha256": batch.sha256}
                writer.write_batch(_to_arrow(batch, schema), custom_metadata=metadata)
        file.flush()
        os.fsync(file.fileno())


def _to_arrow(batch: Batch, schema: Any) -> Any:
    def column(name: str, rows: Bytes) -> Any:
        return pa.FixedSizeBinaryArray.from_buffers(schema.field(name).type, len(rows), [None, pa.py_buffer(rows)])

    names = pa.array(batch.names, pa.string())
    return pa.record_batch([names, column("image", batch.images), column("label", batch.labels)], schema=schema)


def _stacked(rows: Sequence[_Row]) -> Batch:
    names = [row.name for row in rows]
    images, labels = np.stack([row.image for row in rows]), np.stack([row.label for row in rows])
    class_counts = np.sum([row.class_counts for row in rows], axis=0)
    return Batch(names, images, labels, class_counts, rows_sha256(names, class_counts, images, labels))
