"""Packs in object storage: put there once by the driver, fetched once by each node that has none.

    PLACE/KEY/train.arrow.00000, …    the files in parts
    PLACE/KEY/pack.json               written last: how the parts make files, and the digest of the pack

A part is an object of its own, so that what was cut off goes on behind the last whole one, both up and down. Whether
the bytes are right is not judged here: a pack holds its own sums, and `packing` checks them.
"""

import json
import logging
import math
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Final, NamedTuple

from tune_bisenet.data.disk import require_space
from tune_bisenet.data.packed import open_packed
from tune_bisenet.data.source import SPLITS, DataError
from tune_bisenet.storage import Storage

PACKS: Final = "_packs"
"""The folder for packs beside the searches, none of which can have this name."""

RECORD: Final = "pack.json"
FORMAT: Final = 1
PART_BYTES: Final = 16 * 2**20
NUM_THREADS: Final = 8  # together they hold as many parts in memory

_log = logging.getLogger(__name__)


class _Record(NamedTuple):
    """What `pack.json` holds."""

    format: int
    digest: str
    part_bytes: int
    files: Mapping[str, int]  # bytes by name

    def num_parts(self, name: str) -> int:
        return math.ceil(self.files[name] / self.part_bytes)

    def num_bytes(self, name: str, part: int) -> int:
        return min(self.part_bytes, self.files[name] - part * self.part_bytes)


# --- up -----------------------------------------------------------------------------------------------------------


def publish(pack: Path, place: Storage) -> None:
    """Put a pack where other nodes find it, unless it is there. What an earlier driver has put is not put again."""
    folder = place / pack.name
    files = {f"{split}.arrow": (pack / f"{split}.arrow").stat().st_size for split in SPLITS}
    record = _Record(FORMAT, open_packed(pack).digest, PART_BYTES, files)
    before = _read_record(folder)
    if before == record:
        return
    there = {} if before else {info.base_name: info.size for info in folder.infos()}
    missing = [
        (name, part)
        for name in files
        for part in range(record.num_parts(name))
        if there.get(_part_name(name, part)) != record.num_bytes(name, part)
    ]
    _log.info("copying %d parts of the packed frames to %s", len(missing), folder.uri)
    folder.make()

    def put(name: str, part: int) -> None:
        folder.write(_part_name(name, part), _bytes_of(pack / name, part, record.num_bytes(name, part)))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        futures = [pool.submit(put, name, part) for name, part in missing]
        try:
            for future in futures:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)
    folder.write(RECORD, json.dumps(record._asdict()).encode())


def _bytes_of(path: Path, part: int, num_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(part * PART_BYTES)
        return file.read(num_bytes)


# --- down ---------------------------------------------------------------------------------------------------------


def download(folder: Storage, target: Path) -> bool:
    """Fetch the pack in `folder` to `target`, going on where it was cut off; whether there is a whole one.

    DataError if it does not fit on the disk, or a part has gone meanwhile.
    """
    record = _read_record(folder)
    if record is None:
        return False
    target.mkdir(exist_ok=True)
    there = sum(path.stat().st_size for path in target.iterdir())
    require_space(target, max(0, sum(record.files.values()) - there))
    _log.info("fetching %s, of which %.0f MB are here", folder.uri, there / 1e6)
    for name in record.files:
        _download_file(folder, record, name, target / name)
    return True


def _download_file(folder: Storage, record: _Record, name: str, target: Path) -> None:
    num_parts = record.num_parts(name)

    def fetch(part: int) -> bytes:
        content = folder.read(_part_name(name, part))
        if content is None or len(content) != record.num_bytes(name, part):
            raise DataError([f"{folder.uri}/{_part_name(name, part)} is not whole."])
        return content

    with target.open("ab") as file, ThreadPoolExecutor(NUM_THREADS) as pool:
        num_done = 0 if file.tell() > record.files[name] else file.tell() // record.part_bytes
        file.truncate(num_done * record.part_bytes)
        for first in range(num_done, num_parts, NUM_THREADS):
            for content in pool.map(fetch, range(first, min(first + NUM_THREADS, num_parts))):
                file.write(content)
                file.flush()
        os.fsync(file.fileno())


def _part_name(name: str, part: int) -> str:
    return f"{name}.{part:05d}"


def _read_record(folder: Storage) -> _Record | None:
    """None if there is none, or one of a kind that this program does not know."""
    try:
        record = _Record(**json.loads(folder.read(RECORD) or b""))
    except (ValueError, TypeError):
        return None
    return record if record.format == FORMAT and set(record.files) == {f"{split}.arrow" for split in SPLITS} else None
