"""The frames of a search: listed before anything starts, then packed on this node.

Everything here raises a ValueError in words for the user.
"""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from tune_bisenet.arguments import STREETS
from tune_bisenet.config import Run, size_words
from tune_bisenet.data.catalog import check_reachable, open_source
from tune_bisenet.data.packed import Packed, Size, suggested_image_size
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.sharing import PACKS
from tune_bisenet.data.source import DataError, Source
from tune_bisenet.outages import StorageError
from tune_bisenet.plan import DataFacts
from tune_bisenet.storage import Storage

CACHE_VARIABLE: Final = "TUNE_BISENET_CACHE"

Packs = dict[Size, Packed]
"""By image size."""


def source_of(data: str) -> Source:
    """What `--data` names."""
    check_reachable(data)
    try:
        return open_source(data)
    except StorageError as error:
        raise DataError([f"--data {data} cannot be read: {error}"]) from error


def facts_of(source: Source) -> DataFacts:
    return DataFacts(
        num_train=len(source.names("train")),
        num_val=len(source.names("val")),
        suggested_image_size=suggested_image_size(source.frame_size),
    )


def cache_dir() -> Path:
    """Where each node keeps packs."""
    cache = os.environ.get(CACHE_VARIABLE)
    return Path(cache).expanduser().absolute() if cache else Path.home() / ".cache" / "tune_bisenet"


def shared_place(storage: Storage, data: str) -> Storage | None:
    """Beside the searches in object storage. The built-in streets are drawn faster than fetched."""
    return None if storage.local_path or data == STREETS else storage / PACKS


def pack(
    source: Source,
    runs: Sequence[Run],
    progress: Callable[[int, int], None],
    *,
    cache_dir: Path,
    shared: Storage | None,
) -> Packs:
    """At every size that the runs are trained at."""
    sizes = sorted({run.image_size for run in runs})
    pack_at = partial(prepare, source, cache_dir=cache_dir, progress=progress, shared=shared)
    try:
        return {size: pack_at(image_size=size) for size in sizes}
    except StorageError as error:
        raise ValueError(f"{error}. Frames that are packed by then must be packed again.") from error
    except OSError as error:
        raise ValueError(
            f"frames cannot be packed into {cache_dir} ({error}). Set {CACHE_VARIABLE} to a folder on a disk with room."
        ) from error


def digests(packs: Packs) -> dict[str, str]:
    """Of what is packed, by image size in words."""
    return {size_words(size): pack.digest for size, pack in packs.items()}
