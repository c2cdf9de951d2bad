"""Files on disk or in object storage, with just those methods of `pathlib.Path` that a layout of frames is read by."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import PurePath, PurePosixPath
from typing import Any, BinaryIO, NamedTuple, Protocol, Self

import pyarrow.fs

from tune_bisenet.storage import Storage


class Place(Protocol):
    """A `Path`, or a `RemotePath`."""

    def __truediv__(self, name: str, /) -> Self: ...

    def resolve(self) -> Self: ...

    def relative_to(self, other: Any, /) -> PurePath: ...

    def is_dir(self) -> bool: ...

    def exists(self) -> bool: ...

    def glob(self, pattern: str, /) -> Iterator[Self]: ...

    def stat(self) -> Any: ...


class Stat(NamedTuple):
    """What tells one state of a file from another: its size in bytes and when it was written."""

    st_size: int
    st_mtime_ns: int


@dataclass(frozen=True)
class RemotePath:
    """A file or folder `below` a `root`. Its state is that of the listing it was found in."""

    root: Storage = field(compare=False)  # one for all that are compared
    below: PurePosixPath = field(default_factory=PurePosixPath)
    found: Stat | None = field(default=None, compare=False)

    def __truediv__(self, name: str) -> "RemotePath":
        return replace(self, below=self.below / name, found=None)

    def __str__(self) -> str:
        """Its URI."""
        return self._storage.uri

    def resolve(self) -> "RemotePath":
        return self

    def relative_to(self, other: "RemotePath") -> PurePosixPath:
        return self.below.relative_to(other.below)

    @property
    def nearby(self) -> "list[RemotePath]":
        """The folders just below it; those above may be somebody else's."""
        folders = [info for info in self._storage.infos() if info.type == pyarrow.fs.FileType.Directory]
        return [self / name for name in sorted(info.base_name for info in folders)]

    def is_dir(self) -> bool:
        return bool(self._type == pyarrow.fs.FileType.Directory)

    def exists(self) -> bool:
        return bool(self._type != pyarrow.fs.FileType.NotFound)

    def glob(self, pattern: str) -> "Iterator[RemotePath]":
        """Files below it, at any depth that `pattern`, such as `*/*.png`, has."""
        depth = pattern.count("/")
        top = self._storage.path.strip("/")  # not all file systems begin paths with it
        for info in self._storage.infos(recursive=True):
            below = PurePosixPath(info.path.strip("/")).relative_to(top)
            is_file = info.type == pyarrow.fs.FileType.File
            if is_file and len(below.parts) == depth + 1 and fnmatchcase(below.as_posix(), pattern):
                yield replace(self, below=self.below / below, found=_stat(info))

    def stat(self) -> Stat:
        assert self.found is not None, "only files of a listing are asked for their state"
        return self.found

    def opened(self, at_most: int | None) -> BinaryIO:
        """What is in it, or its first bytes, in memory."""
        content = self._parent.read(self.below.name, at_most=at_most)
        if content is None:
            raise FileNotFoundError(f"{self} is gone")
        return io.BytesIO(content)

    @property
    def _storage(self) -> Storage:
        return self.root / self.below.as_posix() if self.below.parts else self.root

    @property
    def _parent(self) -> Storage:
        return replace(self, below=self.below.parent)._storage

    @property
    def _type(self) -> Any:
        storage = self._storage
        return storage.patience(lambda: storage.filesystem.get_file_info(storage.path)).type


def _stat(info: Any) -> Stat:
    """Some file systems do not say when a file was written; then names and sizes must do."""
    return Stat(info.size or 0, info.mtime_ns or 0)
