"""A folder on local disk or in object storage, as pyarrow reaches it; files in it change whole or not at all."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pyarrow.fs


@dataclass(frozen=True)
class Storage:
    """A folder. `path` is in the file system's own form, without a scheme."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    uri: str
    """How a person or another process names it."""

    @classmethod
    def at(cls, place: str) -> Self:
        """The folder at a local path or a URI such as `s3://bucket/searches`; ValueError if the scheme is unknown."""
        if "://" not in place:
            path = str(Path(place).expanduser().absolute())
            return cls(pyarrow.fs.LocalFileSystem(), path, path)
        try:
            filesystem, path = pyarrow.fs.FileSystem.from_uri(place)
        except (pyarrow.ArrowException, OSError) as error:
            raise ValueError(f"cannot use {place} as storage: {error}") from error
        return cls(filesystem, path, place)

    def __truediv__(self, name: str) -> Self:
        base, query, options = self.uri.partition("?")
        return type(self)(self.filesystem, f"{self.path}/{name}", f"{base.rstrip('/')}/{name}{query}{options}")

    @property
    def local_path(self) -> Path | None:
        """Where the folder lies on this machine's disk; None in object storage."""
        return Path(self.path) if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem) else None

    def make(self) -> None:
        """Create the folder, and those above it, where missing."""
        self.filesystem.create_dir(self.path, recursive=True)

    def check_writable(self) -> None:
        """Raise OSError if nothing can be written here. On a local disk nothing is created for it."""
        if self.local_path is None:
            self.write(".writable", b"")
            self.delete(".writable")
            return
        existing = next(place for place in (self.local_path, *self.local_path.parents) if place.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise PermissionError(f"{existing} belongs to somebody else")

    def exists(self, name: str = "") -> bool:
        target = f"{self.path}/{name}" if name else self.path
        return bool(self.filesystem.get_file_info(target).type != pyarrow.fs.FileType.NotFound)

    def read(self, name: str) -> bytes | None:
        """The file's bytes; None if there is no such file."""
        try:
            with self.filesystem.open_input_stream(f"{self.path}/{name}") as stream:
                return bytes(stream.read())
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file. A reader sees the old or the new bytes, never a part of them."""
        if self.local_path is None:  # an object appears whole, when its upload has ended
            self._put(name, content)
            return
        self._put(f".{name}.part", content)
        self.move(f".{name}.part", name)

    def move(self, source: str, target: str) -> None:
        """Rename a file within the folder, replacing the target."""
        self.filesystem.move(f"{self.path}/{source}", f"{self.path}/{target}")

    def delete(self, name: str) -> None:
        """Remove a file that is there."""
        self.filesystem.delete_file(f"{self.path}/{name}")

    def _put(self, name: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(content)
