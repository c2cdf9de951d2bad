"""Storage that does not answer, or is full: what is worth trying again, for how long, and what is said of it.

    Patience    tries one thing again until it succeeds or time is up
    Patient     a pyarrow file system that does so at every step, for those who use it directly, such as Tune

pyarrow's own retries give up after seconds, which is too soon for a search of days. What cannot succeed however
long one waits, such as a bucket that does not exist or a key that is not accepted, fails at once.
"""

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, Final, TypeVar

import pyarrow as pa
import pyarrow.fs

from tune_bisenet.secrets import in_a_line

PATIENCE_SECONDS: Final = 600.0
"""How long a search waits for its storage."""

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
        r"ACCESS_?DENIED|HTTP status 403|PERMISSION_?DENIED|\bForbidden\b",
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

log = logging.getLogger(__name__)


class StorageError(OSError):
    """Storage refuses for good, or has not answered for as long as one waits. The text says what to do."""


# --- one thing ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Patience:
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
                if not is_transient(error):
                    raise _refused(self.place, error) from error
                self._pause(error, number, began, writing=writing)
            else:
                _NEWS.answered(self.place, writing=writing)
                return value
        raise AssertionError("unreachable")

    def _pause(self, error: Exception, number: int, began: float, *, writing: bool) -> None:
        """Wait longer each time, and never two processes in step."""
        pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(number, 16)) * random.uniform(0.5, 1)
        if time.monotonic() - began + pause > self.seconds:
            waited = time.monotonic() - began
            raise StorageError(
                f"{self.place} could not be {'written' if writing else 'read'} for {_words(waited)}: "
                f"{in_a_line(error)}{_full(error)}"
            ) from error
        _NEWS.failed(self, error, writing=writing)
        time.sleep(pause)


def is_transient(error: Exception) -> bool:
    """Whether the same may succeed later. So may errors nobody has told us of, if they come from a file system."""
    if isinstance(error, (StorageError, *_ALREADY_SO)) or _remedy(error):
        return False
    if isinstance(error, OSError):
        return error.errno not in _USELESS and "NO_SUCH_KEY" not in str(error)
    # Libraries under fsspec raise errors of their own for networks; Python's and pyarrow's are mistakes of ours.
    return type(error).__module__.partition(".")[0] not in ("builtins", "pyarrow", "tune_bisenet")


def _refused(place: str, error: Exception) -> Exception:
    """The error itself, or with the words of what to do about it."""
    remedy = None if isinstance(error, StorageError) else _remedy(error)
    return StorageError(f"{place}: {in_a_line(error)}. {remedy}") if remedy else error


def _remedy(error: Exception) -> str | None:
    text = f"{type(error).__name__} {error}"
    return next((remedy for pattern, remedy in REFUSALS if re.search(pattern, text, re.IGNORECASE)), None)


def _full(error: Exception) -> str:
    is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    return ". It is full: make room there" if is_full else ""


def _words(seconds: float) -> str:
    return f"{seconds / 60:.0f} minutes" if seconds >= 90 else f"{seconds:.0f} seconds"


class _News:
    """Tells once in a process that a place is away, however many threads wait for it, and once that it is back."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._away: dict[str, tuple[float, bool]] = {}  # since when, and whether it was a write that failed

    def failed(self, patience: Patience, error: Exception, *, writing: bool) -> None:
        with self._lock:
            if patience.place in self._away:
                return
            self._away[patience.place] = time.monotonic(), writing
        log.warning(
            "%s cannot be %s (%s%s). It is tried again for up to %s; nothing is lost meanwhile.",
            patience.place,
            "written" if writing else "read",
            in_a_line(error),
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
        log.warning("%s answers again after %s.", place, _words(time.monotonic() - since))


_NEWS: Final = _News()


# --- a file system --------------------------------------------------------------------------------------------------


class Patient(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """The file system `inner`, waited for. What is written is kept in memory until it can be put there whole."""

    def __init__(self, inner: pyarrow.fs.FileSystem, patience: Patience) -> None:
        self.inner = inner
        self.patience = patience

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patient) and self.inner == other.inner

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
