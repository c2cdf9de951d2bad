"""The data sets a person can name."""

from contextlib import suppress
from pathlib import Path

from pyarrow.fs import FileSelector

from tune_bisenet.data.cityscapes import open_cityscapes
from tune_bisenet.data.remote import RemotePath
from tune_bisenet.data.source import DataError, Source
from tune_bisenet.data.streets import Streets
from tune_bisenet.options import STREETS
from tune_bisenet.storage import Storage


def open_source(name: str) -> Source:
    """The built-in streets, or a folder or URI in Cityscapes layout. Raises DataError with all that is wrong with it.

    Object storage that is away is waited for; after ten minutes that is a StorageError.
    """
    if name == STREETS:
        return Streets()
    if "://" not in name:
        return open_cityscapes(Path(name))
    storage = Storage.at(name)
    return open_cityscapes(storage.local_path or RemotePath(storage))


def check_reachable(name: str) -> None:
    """DataError, after seconds, if the data of that name lies in object storage that refuses or does not answer."""
    if "://" not in name:
        return
    try:
        storage = Storage.at(name, hurried=True)
        with suppress(FileNotFoundError):  # in its bucket; what is expected there is told by who opens it
            storage.filesystem.get_file_info(FileSelector(storage.path))
    except OSError as error:
        raise DataError([f"--data {name} cannot be read: {error}"]) from error
