"""A folder on local disk or in object storage, as pyarrow reaches it; files in it change whole or not at all.

Storage that is away or full is waited for: ten minutes where nobody is, seconds where somebody does (`outages`).
"""

import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import pyarrow as pa
import pyarrow.fs

from tune_bisenet.outages import HURRIED_SECONDS, Patience, StorageError, patience_seconds
from tune_bisenet.patient import Patient
from tune_bisenet.secrets import has_secret, is_ambiguous

PYARROW_SCHEMES: Final = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Everything else is left to fsspec."""

Value = TypeVar("Value")


@dataclass(frozen=True)
class Storage:
    """A folder. `path` is in the file system's own form, without a scheme."""

    filesystem: pyarrow.fs.FileSystem
    """In object storage one that waits out outages, for those who use it directly."""
    path: str
    uri: str
    """How a person or another process names it."""
    patience: Patience = field(default_factory=Patience)

    @classmethod
    def at(cls, place: str, *, hurried: bool = False) -> Self:
        """The folder at a local path or a URI such as `s3://bucket/searches`; `hurried` where a person waits for it.

        ValueError if the scheme is unknown, or the URI holds a key. StorageError if it does not answer.
        """
        refuse_keys(place)
        seconds = HURRIED_SECONDS if hurried else patience_seconds()
        if "://" not in place:
            path = str(Path(place).expanduser().absolute())
            return cls(pyarrow.fs.LocalFileSystem(), path, path, Patience(path, seconds))
        patience = Patience(_root(place), seconds)
        try:
            filesystem, path = patience(lambda: _file_system(place))
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise ValueError(f"cannot use {place} as storage: {error}") from error
        if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            filesystem = pyarrow.fs.PyFileSystem(Patient(filesystem, patience))
        return cls(filesystem, path.rstrip("/"), place, patience)

    def __truediv__(self, name: str) -> Self:
        base, query, options = self.uri.partition("?")
        uri = f"{base.rstrip('/')}/{name}{query}{options}"
        return replace(self, path=f"{self.path}/{name}", uri=uri)

    @property
    def local_path(self) -> Path | None:
        """Where the folder lies on this machine's disk; None in object storage."""
        return Path(self.path) if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem) else None

    def hurried(self) -> Self:
        """The same, not waited for longer than seconds: for what can as well be done later, or not at all."""
        patience = replace(self.patience, seconds=HURRIED_SECONDS)
        patient = self._patient
        filesystem = pyarrow.fs.PyFileSystem(Patient(patient.inner, patience)) if patient else self.filesystem
        return replace(self, filesystem=filesystem, patience=patience)

    def make(self) -> None:
        """Create the folder, and those above it, where missing."""
        self._write(lambda: self.filesystem.create_dir(self.path, recursive=True))

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
        info = self.patience(lambda: self.filesystem.get_file_info(target))
        return bool(info.type != pyarrow.fs.FileType.NotFound)

    def infos(self, *, recursive: bool = False) -> Sequence[Any]:
        """pyarrow's FileInfo of what lies in the folder; nothing if there is none."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        return list(self.patience(lambda: self.filesystem.get_file_info(selector)))

    def read(self, name: str, *, at_most: int | None = None) -> bytes | None:
        """The file's bytes, or the first of them; None if there is no such file."""

        def attempt() -> bytes:
            # Of a stream, pyarrow asks S3 for 16 KiB at a time: 6,000 requests for a checkpoint.
            with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                return bytes(file.read(file.size() if at_most is None else at_most))

        try:
            return self.patience(attempt)
        except FileNotFoundError:
            return None

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file. A reader sees the old or the new bytes, never a part of them."""
        if self._patient:
            self._patient.put(f"{self.path}/{name}", content)
            return
        if self.local_path is None:  # an object appears whole, when its upload has ended
            self._put(name, content)
            return

        def attempt() -> None:
            self._put(f".{name}.part", content)
            self.filesystem.move(f"{self.path}/.{name}.part", f"{self.path}/{name}")

        self._write(attempt)

    def move(self, source: str, target: str) -> None:
        """Rename a file within the folder, replacing the target."""
        self._write(lambda: self.filesystem.move(f"{self.path}/{source}", f"{self.path}/{target}"))

    def delete(self, name: str) -> None:
        """Remove a file that is there."""
        self._write(lambda: self.filesystem.delete_file(f"{self.path}/{name}"))

    @property
    def _patient(self) -> Patient | None:
        handler = self.filesystem.handler if isinstance(self.filesystem, pyarrow.fs.PyFileSystem) else None
        return handler if isinstance(handler, Patient) else None

    def _put(self, name: str, content: bytes) -> None:
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as stream:
            stream.write(content)

    def _write(self, attempt: Callable[[], Value]) -> Value:
        return self.patience(attempt, writing=True)


def refuse_keys(place: str) -> None:
    """ValueError, without the key, if an address holds one: it would be written down wherever the address is."""
    if "://" in place and (has_secret(place) or is_ambiguous(place)):
        scheme = place.partition("://")[0]
        raise ValueError(
            f"the {scheme}:// address holds a key or a password, and an address is written into files and logs. Leave "
            "it out: use a role of the machine, a profile ($AWS_PROFILE), or the environment ($AWS_ACCESS_KEY_ID and "
            "$AWS_SECRET_ACCESS_KEY)."
        )


# --- file systems -----------------------------------------------------------------------------------------------------


def _root(place: str) -> str:
    """`s3://bucket` of any address in it."""
    match = re.match(r"[^:]+://[^/?#]*", place)
    assert match, "only addresses have a root"
    return match[0]


def _file_system(place: str) -> tuple[Any, str]:
    """The file system, and the path in it. ValueError if neither pyarrow nor fsspec knows the scheme."""
    scheme = place.partition("://")[0].lower()
    if re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and scheme not in PYARROW_SCHEMES:
        return _fsspec_file_system(place)
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in place:  # else it tries for fifteen minutes by itself
        place = f"{place}{'&' if '?' in place else '?'}retry_limit_seconds={HURRIED_SECONDS:g}"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(place)
    return (_steady(filesystem) if scheme == "s3" else filesystem), path


def _steady(filesystem: Any) -> Any:
    """Small files in one request instead of three; and none of it in the background.

    Background writes wait for threads of the pool that Tune's copies run in, and may wait for each other for good.
    """
    _rebuild, (options,) = filesystem.__reduce__()  # as it travels to workers; keys of the environment do not
    return pyarrow.fs.S3FileSystem(**options | {"background_writes": False, "allow_delayed_open": True})


def _fsspec_file_system(place: str) -> tuple[Any, str]:
    import fsspec  # type: ignore[import-untyped]  # late: few need it

    filesystem, path = fsspec.core.url_to_fs(place)
    return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path
