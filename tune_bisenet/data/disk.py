"""A node's disk, which many processes share: who may write, whether there is room, and names that stay."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from tune_bisenet.data.source import DataError

_log = logging.getLogger(__name__)


@contextmanager
def locked(path: Path) -> Iterator[None]:
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


def require_space(folder: Path, needed_bytes: int) -> None:
    """DataError if so much does not fit."""
    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise DataError(
            [
                f"packed frames need {needed_bytes / 1e9:,.1f} GB in {folder}, where {free_bytes / 1e9:,.1f} GB are "
                "free: remove packs there that no search uses, name another cache folder, or choose a smaller image "
                "size."
            ]
        )


def put_in_place(part: Path, folder: Path) -> None:
    """Give a whole folder its name, for good; what had it before is removed."""
    shutil.rmtree(folder, ignore_errors=True)  # views still open outlive the name
    _fsync(part)
    part.rename(folder)
    _fsync(folder.parent)


def _fsync(folder: Path) -> None:
    """Make a new name in `folder` outlast a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
