"""A folder on local disk or in object storage, as pyarrow reaches it; files in it change whole or not at all.

Storage that is away or full is waited for: ten minutes where nobody is, seconds where somebody does (`outages`).
"""

import errno
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Final, Self, TypeVar

import pyarrow as pa
import pyarrow.fs

from tune_bisenet.text import counted

_log = logging.getLogger(__name__)

HIDDEN: Final = "***"

_IN_ADDRESS: Final = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@?#]*:)(?P<secret>[^\s/?#]*)(?=@)")
"""`scheme://user:SECRET@`; see `is_ambiguous` for the characters that must be percent-encoded there."""

_IN_QUERY: Final = re.compile(
    r"(?P<before>[?&][^=&\s]*(?:password|secret|token|access_key|account_key|signature)[^=&\s]*=)(?P<secret>[^&\s'\"]+)",
    re.IGNORECASE,
)

_AMBIGUOUS: Final = re.compile(r"[^:/]+://[^:/@]*:(?:[^@]*[\s/?#][^@]*@|[^@/]*@[^/?]*@)")


def redact(text: str) -> str:
    """`text` with `***` for every password in an address."""
    for pattern in (_IN_ADDRESS, _IN_QUERY):
        text = pattern.sub(rf"\g<before>{HIDDEN}", text)
    return text


def has_secret(text: str) -> bool:
    """Whether an address in `text` holds a password that can be read."""
    return redact(text) != text


def is_ambiguous(address: str) -> bool:
    """Whether a password in it holds a character that ends it for some who read it: `@ / ? #` and blanks."""
    return _AMBIGUOUS.match(address) is not None


def one_line(error: BaseException) -> str:
    """What an error, or the one it was raised from, says first, without a password."""
    lines = redact(str(error.__cause__ or error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__


PATIENCE_SECONDS: Final = 600.0
"""How long a search waits for its storage, unless $TUNE_BISENET_PATIENCE says another number of seconds."""

RETRY_VARIABLE: Final = "TUNE_BISENET_PATIENCE"

HURRIED_SECONDS: Final = 3.0
"""How long one waits where a person does, or where the next epoch tries again. pyarrow adds six seconds of its own."""

FIRST_PAUSE_SECONDS: Final = 0.25
MAX_PAUSE_SECONDS: Final = 10.0

CREDENTIALS: Final = (
    "Give this machine a role, or name a profile in $AWS_PROFILE or keys in $AWS_ACCESS_KEY_ID and "
    "$AWS_SECRET_ACCESS_KEY; for Google, credentials in $GOOGLE_APPLICATION_CREDENTIALS."
)
REFUSALS: Final = (
    (r"NO_?SUCH_?BUCKET|Bucket '.*' not found|bucket does not exist", "Check the bucket's name, or create it first."),
    (r"INVALID_?BUCKET_?NAME|bucket is not valid", "That is no name for a bucket: check it."),
    (
        r"ACCESS[_ ]?DENIED|HTTP status 403|PERMISSION_?DENIED|\bForbidden\b",
        f"Access is denied: let who runs this read, write, list and delete there, or use other credentials. "
        f"{CREDENTIALS}",
    ),
    (
        r"INVALID_?ACCESS_?KEY|INVALID_?CLIENT_?TOKEN|SIGNATURE_?DOES_?NOT_?MATCH|UNRECOGNIZED_?CLIENT|"
        r"MISSING_?AUTHENTICATION|HTTP status 401|UNAUTHENTICATED|could not be verified",
        f"The credentials are missing or wrong. {CREDENTIALS}",
    ),
    (
        r"HTTP status 301|configured region is|region .* is wrong",
        "The bucket lies in another region: name it, as in s3://bucket/x?region=eu-central-1.",
    ),
)
"""What a service says when waiting does not help, and what does."""

_ALREADY_SO: Final = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_USELESS: Final = frozenset(
    {
        errno.EINVAL,
        errno.ENAMETOOLONG,
        errno.EROFS,
        errno.ELOOP,
        errno.EXDEV,
        errno.ENOTEMPTY,
        errno.ENOSYS,
        errno.EBADF,
    }
)

Value = TypeVar("Value")


def patience_seconds() -> float:
    """How long storage is waited for in this process."""
    text = os.environ.get(RETRY_VARIABLE, f"{PATIENCE_SECONDS}")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"${RETRY_VARIABLE} is {text!r}: give a number of seconds, as in 600.") from None


class StorageError(OSError):
    """Storage refuses for good, or has not answered for as long as one waits. The text says what to do."""


@dataclass(frozen=True)
class RetryPolicy:
    """How long `place`, as a person names it, is waited for."""

    place: str = "storage"
    seconds: float = PATIENCE_SECONDS

    def __call__(self, attempt: Callable[[], Value], *, writing: bool = False) -> Value:
        """What `attempt` returns, as soon as it does. StorageError if it is refused, or fails for too long."""
        began = time.monotonic()
        for number in count():
            try:
                value = attempt()
            except Exception as error:
                if remedy := _remedy(error):
                    raise StorageError(f"{self.place}: {one_line(error)}. {remedy}") from error
                if not is_transient(error):
                    raise
                self._pause(error, number, began, writing=writing)
            else:
                _NEWS.answered(self.place, writing=writing)
                return value
        raise AssertionError("unreachable")

    def _pause(self, error: Exception, number: int, began: float, *, writing: bool) -> None:
        """Wait longer each time, and never two processes in step; in all as long as `seconds` since it went away."""
        waited = time.monotonic() - min(began, _NEWS.away_since(self.place))
        left = self.seconds - waited
        if left <= 0:
            raise StorageError(
                f"{self.place} could not be {'written' if writing else 'read'} for {_words(waited)}: "
                f"{one_line(error)}{_full(error)}"
            ) from error
        _NEWS.failed(self, error, writing=writing)
        pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(number, 16)) * random.uniform(0.5, 1)
        time.sleep(min(pause, left))


def is_transient(error: Exception) -> bool:
    """Whether the same may succeed later. So may errors nobody has told us of, if they come from a file system."""
    if isinstance(error, (StorageError, *_ALREADY_SO)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _USELESS and "NO_SUCH_KEY" not in str(error)
    # Libraries under fsspec raise errors of their own for networks; Python's and pyarrow's are mistakes of ours.
    return type(error).__module__.partition(".")[0] not in ("builtins", "pyarrow", "tune_bisenet")


def _remedy(error: Exception) -> str | None:
    """What to do about a refusal; None if it is none, or has been told already."""
    if isinstance(error, StorageError):
        return None
    text = f"{type(error).__name__} {error}"
    return next((remedy for pattern, remedy in REFUSALS if re.search(pattern, text, re.IGNORECASE)), None)


def _full(error: Exception) -> str:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ". It is full: make room there" if is_full else ""


def _words(seconds: float) -> str:
    return counted(round(seconds / 60), "minute") if seconds >= 90 else counted(round(seconds), "second")


class _News:
    """Tells once in a process that a place is away, however many threads wait for it, and once that it is back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._away: dict[str, tuple[float, bool]] = {}  # since when, and whether it was a write that failed

    def away_since(self, place: str) -> float:
        """Infinity if it is not known to be."""
        return self._away.get(place, (math.inf, False))[0]

    def failed(self, patience: RetryPolicy, error: Exception, *, writing: bool) -> None:
        with self._lock:
            if patience.place in self._away:
                return
            self._away[patience.place] = time.monotonic(), writing
        _log.warning(
            "%s cannot be %s (%s%s). It is tried again for up to %s; nothing is lost meanwhile.",
            patience.place,
            "written" if writing else "read",
            one_line(error),
            _full(error),
            _words(patience.seconds),
        )

    def answered(self, place: str, *, writing: bool) -> None:
        """Of a full disk, reading says nothing about writing."""
        if place not in self._away:
            return
        with self._lock:
            since, was_writing = self._away.get(place, (0.0, True))
            if place not in self._away or (was_writing and not writing):
                return
            del self._away[place]
        _log.warning("%s answers again after %s.", place, _words(time.monotonic() - since))


_NEWS: Final = _News()


class RetryingFileSystem(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """The file system `inner`, waited for. What is written is kept in memory until it can be put there whole."""

    def __init__(self, inner: pyarrow.fs.FileSystem, patience: RetryPolicy) -> None:
        self.inner = inner
        self.patience = patience

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RetryingFileSystem) and self.inner == other.inner

    __hash__ = None  # type: ignore[assignment]

    def get_type_name(self) -> str:
        return str(self.inner.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.inner.normalize_path(path))

    # --- reading ---

    def get_file_info(self, paths: list[str]) -> Any:
        return self.patience(lambda: self.inner.get_file_info(paths))

    def get_file_info_selector(self, selector: Any) -> Any:
        return self.patience(lambda: self.inner.get_file_info(selector))

    def open_input_stream(self, path: str) -> Any:
        return self.patience(lambda: self.inner.open_input_stream(path))

    def open_input_file(self, path: str) -> Any:
        return self.patience(lambda: self.inner.open_input_file(path))

    # --- writing ---

    def create_dir(self, path: str, recursive: bool) -> None:
        self._write(lambda: self.inner.create_dir(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._write(_once_done(lambda: self.inner.delete_dir(path), lambda: not self._is_there(path)))

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._write(lambda: self.inner.delete_dir_contents(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        self._write(lambda: self.inner.delete_dir_contents("", accept_root_dir=True))

    def delete_file(self, path: str) -> None:
        self._write(_once_done(lambda: self.inner.delete_file(path), lambda: not self._is_there(path)))

    def move(self, src: str, dest: str) -> None:
        is_done = lambda: self._is_there(dest) and not self._is_there(src)  # noqa: E731
        self._write(_once_done(lambda: self.inner.move(src, dest), is_done))

    def copy_file(self, src: str, dest: str) -> None:
        self._write(lambda: self.inner.copy_file(src, dest))

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        return pa.PythonFile(_Upload(lambda content: self.put(path, content, metadata)), mode="w")

    def put(self, path: str, content: bytes, metadata: Any = None) -> None:
        """Create or replace a file."""
        self._write(lambda: self._put(path, content, metadata))

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        return self.inner.open_append_stream(path, metadata=metadata)

    # --- inside ---

    def _write(self, attempt: Callable[[], None]) -> None:
        self.patience(attempt, writing=True)

    def _put(self, path: str, content: bytes, metadata: Any) -> None:
        with self.inner.open_output_stream(path, metadata=metadata) as stream:
            stream.write(content)

    def _is_there(self, path: str) -> bool:
        return bool(self.inner.get_file_info(path).type != pyarrow.fs.FileType.NotFound)


def _once_done(attempt: Callable[[], None], is_done: Callable[[], bool]) -> Callable[[], None]:
    """`attempt`, where a second one finds that the first had worked, and only its answer was lost."""
    attempts = count()

    def again() -> None:
        if next(attempts) == 0 or not is_done():
            attempt()

    return again


class _Upload:
    """What pyarrow takes for a file: it is put in its place on closing."""

    def __init__(self, put: Callable[[bytes], None]) -> None:
        self._put = put
        self._content = bytearray()
        self.closed = False

    def write(self, content: Any) -> int:
        self._content += content
        return len(content)

    def tell(self) -> int:
        return len(self._content)

    def flush(self) -> None:
        pass

    def writable(self) -> bool:
        return True

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._put(bytes(self._content))


PYARROW_SCHEMES: Final = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""Everything else is left to fsspec."""


@dataclass(frozen=True)
class Storage:
    """A folder. `path` is in the file system's own form, without a scheme."""

    filesystem: pyarrow.fs.FileSystem
    """In object storage one that waits out outages, for those who use it directly."""
    path: str
    uri: str
    """How a person or another process names it."""
    patience: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def at(cls, place: str, *, hurried: bool = False) -> Self:
        """The folder at a local path or a URI such as `s3://bucket/searches`; `hurried` where a person waits for it.

        ValueError if the scheme is unknown, or the URI holds a key. StorageError if it does not answer.
        """
        refuse_keys(place)
        seconds = HURRIED_SECONDS if hurried else patience_seconds()
        if "://" not in place:
            path = str(Path(place).expanduser().absolute())
            return cls(pyarrow.fs.LocalFileSystem(), path, path, RetryPolicy(path, seconds))
        patience = RetryPolicy(_root(place), seconds)
        try:
            filesystem, path = patience(lambda: _file_system(place))
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, ImportError) as error:
            raise ValueError(f"cannot use {place} as storage: {error}") from error
        if not isinstance(filesystem, pyarrow.fs.LocalFileSystem):
            filesystem = pyarrow.fs.PyFileSystem(RetryingFileSystem(filesystem, patience))
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
        filesystem = (
            pyarrow.fs.PyFileSystem(RetryingFileSystem(patient.inner, patience)) if patient else self.filesystem
        )
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
    def _patient(self) -> RetryingFileSystem | None:
        handler = self.filesystem.handler if isinstance(self.filesystem, pyarrow.fs.PyFileSystem) else None
        return handler if isinstance(handler, RetryingFileSystem) else None

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
