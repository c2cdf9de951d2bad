"""A folder on a local disk or in object storage: files change whole or not at all, and outages are waited out.

pyarrow reaches the storage. What it lacks is here: storage that is unreachable or full is retried for minutes, and
logged once; what cannot succeed fails at once and says what to do; passwords never reach a log.
"""

import io
import logging
import math
import os
import random
import re
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from errno import EACCES, EBADF, EDQUOT, EINVAL, ELOOP, ENAMETOOLONG, ENOSPC, ENOSYS, ENOTEMPTY, EPERM, EROFS, EXDEV
from itertools import count
from pathlib import Path
from typing import Any, Final, Self, TypeGuard, TypeVar
from urllib.parse import parse_qsl, urlsplit

import pyarrow as pa
import pyarrow.fs

from tune_bisenet.text import absolute_path, has_secret, is_ambiguous, is_uri, one_line

RETRY_VARIABLE: Final = "TUNE_BISENET_RETRY_SECONDS"
RETRY_SECONDS: Final = 600.0
"""How long an outage is retried unless the variable says otherwise. pyarrow gives up after seconds."""

FAIL_FAST_SECONDS: Final = 3.0
"""The same where a person waits, or the next epoch tries again. pyarrow adds six seconds of its own."""

PYARROW_SCHEMES: Final = ("file", "s3", "gs", "gcs", "abfs", "abfss", "hdfs", "viewfs")
"""All others are left to fsspec."""

COPY_BYTES: Final = 16 * 2**20
"""How much of a large file is copied at a time: in object storage each part costs a round trip."""

FIRST_PAUSE_SECONDS: Final = 0.25
MAX_PAUSE_SECONDS: Final = 10.0

_REFUSALS: Final = {
    "Check the bucket's name, or create it first.": (
        r"NO_?SUCH_?BUCKET|Bucket '.*' not found|bucket does not exist|INVALID_?BUCKET_?NAME|bucket is not valid"
    ),
    (
        "Access is denied, or the credentials are missing or wrong: allow reading, writing, listing and deleting; give "
        "this machine a role, or name a profile in $AWS_PROFILE or keys in $AWS_ACCESS_KEY_ID and "
        "$AWS_SECRET_ACCESS_KEY; for Google, credentials in $GOOGLE_APPLICATION_CREDENTIALS."
    ): (
        r"ACCESS[_ ]?DENIED|HTTP status 40[13]|PERMISSION_?DENIED|\bForbidden\b|INVALID_?ACCESS_?KEY|"
        r"INVALID_?CLIENT_?TOKEN|SIGNATURE_?DOES_?NOT_?MATCH|UNRECOGNIZED_?CLIENT|MISSING_?AUTHENTICATION|"
        r"UNAUTHENTICATED|could not be verified|Unable to locate credentials"
    ),
    "The bucket is in another region: name it, as in s3://bucket/x?region=eu-central-1.": (
        r"HTTP status 301|configured region is|region .* is wrong"
    ),
}
"""What to do when retrying is useless, and the patterns of what services answer then."""

_PERMANENT_ERRORS: Final = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
_PERMANENT_CODES: Final = (EBADF, EINVAL, ELOOP, ENAMETOOLONG, ENOSYS, ENOTEMPTY, EROFS, EXDEV)
_PERMANENT_TEXTS: Final = ("NO_SUCH_KEY", "is a directory")
"""In errors of pyarrow that have no code."""
_FULL_CODES: Final = (EDQUOT, ENOSPC)
_REFUSAL_CODES: Final = (EACCES, EPERM, EROFS)

_Value = TypeVar("_Value")

_log = logging.getLogger(__name__)


class StorageError(OSError):
    """Storage has not answered for as long as it is retried. The text says why."""


class StorageRefusedError(StorageError):
    """Storage refuses, which no retry mends. The text says what to do."""


def retry_seconds() -> float:
    """Return how long this process retries, by the environment. ValueError if that is not a number."""
    text = os.environ.get(RETRY_VARIABLE, f"{RETRY_SECONDS}")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"${RETRY_VARIABLE} is {text!r}: give a number of seconds, as in 600.") from None


@dataclass(frozen=True)
class RetryPolicy:
    """Calls again what failed for a moment. Threads of one process share what they know of an outage of `root`."""

    root: str = "storage"
    """The bucket, or the folder on a local disk, as logs name it."""
    seconds: float = RETRY_SECONDS

    def __call__(self, attempt: Callable[[], _Value], *, writing: bool = False) -> _Value:
        """Return what `attempt` returns. StorageRefusedError at once, or StorageError after `seconds` of failures.

        A full disk is waited for by writes alone: if a copy to another disk finds that one full, the reader is told.
        """
        began = time.monotonic()
        for number in count():
            try:
                value = attempt()
            except Exception as error:
                if not isinstance(error, StorageError) and (remedy := _remedy(error)):
                    raise StorageRefusedError(f"{self.root}: {one_line(error)}. {remedy}") from error
                if not _is_transient(error) or (is_full(error) and not writing):
                    raise
                self._pause(error, number, began, writing=writing)
            else:
                _log_recovery(self.root, writing=writing)
                return value
        raise AssertionError("unreachable")

    def _pause(self, error: Exception, number: int, began: float, *, writing: bool) -> None:
        """Wait longer each time, at random so that processes do not retry in step, and never past the limit."""
        verb = "written" if writing else "read"
        reason = one_line(error)
        if is_full(error):
            reason += ". It is full: make room there"
        since = min(began, _outages.get(self.root, (began, writing))[0])
        seconds = min(self.seconds, FAIL_FAST_SECONDS) if _is_hurried else self.seconds
        left = since + seconds - time.monotonic()
        if left <= 0:
            raise StorageError(f"{self.root} could not be {verb} for {seconds - left:.0f} s: {reason}") from error
        with _outages_lock:
            is_new = self.root not in _outages
            _outages.setdefault(self.root, (time.monotonic(), writing))
        if is_new:
            message = "%s cannot be %s (%s). Retrying for up to %.0f s; nothing is lost meanwhile."
            _log.warning(message, self.root, verb, reason, seconds)
        pause = min(MAX_PAUSE_SECONDS, FIRST_PAUSE_SECONDS * 2.0 ** min(number, 16)) * random.uniform(0.5, 1)
        until = time.monotonic() + min(pause, left)
        was_hurried = _is_hurried  # the signal that ends a process may come in the middle of a pause
        while (rest := until - time.monotonic()) > 0 and was_hurried == _is_hurried:
            time.sleep(min(rest, FIRST_PAUSE_SECONDS))


_is_hurried = False


def hurry() -> None:
    """Let this process wait for seconds only from now on: it was told to end. A signal's handler may call this."""
    global _is_hurried
    _is_hurried = True


_outages: Final[dict[str, tuple[float, bool]]] = {}
"""By root: since when it has been failing, and whether it was a write that failed."""
_outages_lock: Final = threading.Lock()


def _log_recovery(root: str, *, writing: bool) -> None:
    """Log the end of an outage once. A full disk can be read, so only a write ends an outage of writes."""
    with _outages_lock:
        since, was_writing = _outages.get(root, (math.inf, False))
        if since == math.inf or (was_writing and not writing):
            return
        del _outages[root]
    _log.warning("%s answers again after %.0f s.", root, time.monotonic() - since)


def _is_transient(error: Exception) -> bool:
    """Return whether a retry may succeed. Unknown errors from libraries of file systems count as transient."""
    if isinstance(error, (StorageError, *_PERMANENT_ERRORS)):
        return False
    if isinstance(error, OSError):
        return error.errno not in _PERMANENT_CODES and not any(text in str(error) for text in _PERMANENT_TEXTS)
    # Libraries under fsspec raise errors of their own for networks; Python's and pyarrow's are mistakes of ours.
    return type(error).__module__.partition(".")[0] not in ("builtins", "pyarrow", "tune_bisenet")


def is_full(error: BaseException) -> TypeGuard[OSError]:
    """Return whether a disk has no room left, or a user's share of it."""
    return isinstance(error, OSError) and error.errno in _FULL_CODES


def is_refused(error: BaseException) -> TypeGuard[OSError]:
    """Return whether storage or a disk denies access: only a person can mend that."""
    return isinstance(error, StorageRefusedError) or (isinstance(error, OSError) and error.errno in _REFUSAL_CODES)


def _remedy(error: Exception) -> str | None:
    text = f"{type(error).__name__} {error}"
    return next((remedy for remedy, pattern in _REFUSALS.items() if re.search(pattern, text, re.IGNORECASE)), None)


@dataclass(frozen=True)
class Storage:
    """A folder. Every method retries outages as `retry` says; those that write raise OSError where that fails."""

    filesystem: pyarrow.fs.FileSystem
    path: str
    """In the file system's own form, without a scheme."""
    uri: str
    """As a person or another process names it."""
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    @classmethod
    def at(cls, address: str, *, fail_fast: bool = False) -> Self:
        """Open a local path or a URI such as `s3://bucket/searches`; `fail_fast` where a person waits for it.

        ValueError if the scheme is unknown, the URI holds a key, or the path has bytes that are not UTF-8. StorageError
        if it does not answer.
        """
        seconds = FAIL_FAST_SECONDS if fail_fast else retry_seconds()
        if not is_uri(address):
            path = str(absolute_path(address))
            return cls(pyarrow.fs.LocalFileSystem(), path, path, RetryPolicy(path, seconds))
        if has_secret(address) or is_ambiguous(address):  # addresses are written into files and logs
            raise ValueError(
                f"the {address.partition('://')[0]}:// address holds a key or a password, and an address is written "
                "into files and logs. Leave it out: use a role of the machine, a profile ($AWS_PROFILE), or the "
                "environment ($AWS_ACCESS_KEY_ID and $AWS_SECRET_ACCESS_KEY)."
            )
        scheme, _, rest = address.partition("://")
        retry = RetryPolicy(f"{scheme}://{re.split('[/?#]', rest)[0]}", seconds)
        try:
            filesystem, path = retry(lambda: _open_file_system(address))
        except StorageError:
            raise
        except (pa.ArrowException, OSError, ValueError, TypeError, ImportError) as error:
            raise ValueError(f"cannot use {address} as storage: {error}") from error
        return cls(filesystem, path.rstrip("/"), address, retry)

    def __truediv__(self, name: str) -> Self:
        base, query = self._split_uri()
        return replace(self, path=f"{self.path}/{name}", uri=f"{base}/{name}{query}")

    @property
    def name(self) -> str:
        """Return the folder's own name."""
        return self.path.rpartition("/")[2]

    @property
    def parent(self) -> Self:
        """Return the folder that it is in."""
        base, query = self._split_uri()
        return replace(self, path=self.path.rpartition("/")[0], uri=f"{base.rpartition('/')[0]}{query}")

    def _split_uri(self) -> tuple[str, str]:
        """Return the URI without and from its question mark on; in a local path that is a character like others."""
        base, mark, options = self.uri.partition("?") if is_uri(self.uri) else (self.uri, "", "")
        return base.rstrip("/"), mark + options

    @property
    def local_path(self) -> Path | None:
        """Return the folder's path on this machine's disk; None in object storage."""
        return Path(self.path) if isinstance(self.filesystem, pyarrow.fs.LocalFileSystem) else None

    @property
    def retrying_filesystem(self) -> pyarrow.fs.FileSystem:
        """Return a file system for libraries such as Tune, which retries as this folder does."""
        return pyarrow.fs.PyFileSystem(RetryingFileSystem(self.filesystem, self.retry))

    def fail_fast(self) -> Self:
        """Return the same folder, retried for seconds only: for what can be done later, or not at all."""
        return replace(self, retry=replace(self.retry, seconds=FAIL_FAST_SECONDS))

    def exists(self, name: str = "") -> bool:
        return bool(self.stat(name)[0].type != pyarrow.fs.FileType.NotFound)

    def stat(self, *names: str) -> list[Any]:
        """Return pyarrow's FileInfo of each file or folder in it; `""` is the folder itself."""
        paths = [f"{self.path}/{name}" if name else self.path for name in names]
        return list(self.retry(lambda: self.filesystem.get_file_info(paths)))

    def infos(self, *, recursive: bool = False) -> Sequence[Any]:
        """Return pyarrow's FileInfo of what is in the folder; nothing if there is no folder."""
        selector = pyarrow.fs.FileSelector(self.path, allow_not_found=True, recursive=recursive)
        return list(self.retry(lambda: self.filesystem.get_file_info(selector)))

    def folder_names(self) -> list[str]:
        """Return the names of the folders in it, sorted."""
        return sorted(info.base_name for info in self.infos() if info.type == pyarrow.fs.FileType.Directory)

    def open(self, name: str) -> Any:
        """Return pyarrow's file for random access. FileNotFoundError if there is none."""
        return self.retry(lambda: self.filesystem.open_input_file(f"{self.path}/{name}"))

    def read(self, name: str, *, at_most: int | None = None) -> bytes | None:
        """Return the file's bytes, or the first of them; None if there is no such file."""

        def attempt() -> bytes:
            # Of a stream, pyarrow asks S3 for 16 KiB at a time: 6,000 requests for a checkpoint.
            with self.filesystem.open_input_file(f"{self.path}/{name}") as file:
                return bytes(file.read(file.size() if at_most is None else at_most))

        try:
            return self.retry(attempt)
        except FileNotFoundError:
            return None

    def check_readable(self) -> None:
        """Raise OSError if the folder cannot be listed or there is no such bucket; the folder may not exist yet."""
        bucket = self.path.partition("/")[0]
        if self.local_path is None and not replace(self, path=bucket).exists():
            raise FileNotFoundError(f"there is no bucket {bucket}. Check the bucket's name, or create it first.")
        self.infos()

    def make(self) -> None:
        """Create the folder, and those above it, where missing."""
        self.retry(lambda: self.filesystem.create_dir(self.path, recursive=True), writing=True)

    def write(self, name: str, content: bytes) -> None:
        """Create or replace a file. A reader sees the old or the new bytes, never a part of them."""
        is_local = self.local_path is not None
        target = f"{self.path}/{name}"
        partial = f"{self.path}/.{name}.part" if is_local else target  # an object appears when its upload has ended

        def attempt() -> None:
            try:
                _put(self.filesystem, partial, content)
            except OSError:
                if is_local:  # what is left of it would take room from others that wait for some
                    Path(partial).unlink(missing_ok=True)
                raise
            if is_local:
                self.filesystem.move(partial, target)

        self.retry(attempt, writing=True)

    def extend(self, name: str, content: bytes, *, length: int) -> None:
        """Let a file that holds the first `length` bytes of `content` hold all of it.

        On a local disk it grows in place, as those who follow it expect; an object is written again.
        """
        if self.local_path is None:
            self.write(name, content)
            return
        path = self.local_path / name

        def attempt() -> None:
            with path.open("ab") as file:
                file.truncate(length)  # a full disk may have taken a part of what comes next
                file.write(memoryview(content)[length:])

        self.retry(attempt, writing=True)

    def remove_partial_files(self) -> None:
        """Delete what processes that were killed while they wrote a file here have left of it."""
        for path in self.local_path.glob(".*.part") if self.local_path else ():
            path.unlink(missing_ok=True)

    def upload(self, source: Path, name: str) -> None:
        """Create or replace a file with the content of a local one, which may be larger than memory."""
        self._copy(pyarrow.fs.LocalFileSystem(), str(source), self.filesystem, f"{self.path}/{name}", writing=True)

    def download(self, name: str, target: Path) -> None:
        """Copy a file to the local `target`. FileNotFoundError if there is no such file."""
        self._copy(self.filesystem, f"{self.path}/{name}", pyarrow.fs.LocalFileSystem(), str(target), writing=False)

    def move(self, source: str, target: str) -> None:
        """Rename a file within the folder, replacing the target."""
        paths = f"{self.path}/{source}", f"{self.path}/{target}"
        self._change(
            lambda: self.filesystem.move(*paths), is_done=lambda: self.exists(target) and not self.exists(source)
        )

    def delete(self, name: str) -> None:
        """Remove a file. FileNotFoundError if there is none."""
        self._change(lambda: self.filesystem.delete_file(f"{self.path}/{name}"), is_done=lambda: not self.exists(name))

    def remove(self) -> None:
        """Remove the folder with all that is in it, if there is one."""
        self.retry(lambda: self.filesystem.delete_dir(self.path) if self.exists() else None, writing=True)

    def check_writable(self) -> None:
        """Raise OSError if nothing can be written here. On a local disk a file without a name is written."""
        if self.local_path is None:
            self.write(".writable", b"")
            self.delete(".writable")
            return
        existing = next(path for path in (self.local_path, *self.local_path.parents) if path.exists())
        try:
            with tempfile.TemporaryFile(dir=existing, buffering=0) as file:
                file.write(b"x")
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(existing)) from error

    def _copy(self, source: Any, source_path: str, target: Any, target_path: str, *, writing: bool) -> None:
        """Copy a file in parts; an outage starts it again."""
        options = {"source_filesystem": source, "destination_filesystem": target, "chunk_size": COPY_BYTES}
        self.retry(lambda: pyarrow.fs.copy_files(source_path, target_path, **options), writing=writing)

    def _change(self, change: Callable[[], None], *, is_done: Callable[[], bool]) -> None:
        """Retry what cannot be done twice: the first attempt may have worked, and only its answer was lost."""
        attempts = count()

        def attempt() -> None:
            if next(attempts) == 0 or not is_done():
                change()

        self.retry(attempt, writing=True)


class ConditionalFile:
    """A file that several processes write, each only if no other has written it since it last read or wrote it.

    S3 itself compares. Where storage does not, this does, so that two who write in the same moment are not kept apart:
    `is_exact` says so.
    """

    def __init__(self, folder: Storage, name: str) -> None:
        self.folder = folder
        self._name = name
        self._version: Any = None
        """The file's ETag in S3, elsewhere its content; None if there was no file."""
        self._client = _open_s3_client(folder) if folder.filesystem.type_name == "s3" else None
        bucket, _, path = folder.path.partition("/")
        self._object = {"Bucket": bucket, "Key": f"{path}/{name}".lstrip("/")}

    def is_exact(self) -> bool:
        """Return whether storage itself compares. To be called before the file is read or written.

        Not all that speak S3's language do: two writes that must be refused are tried, on a file beside this one.
        """
        if self._client is None:
            return False
        suffix = f".{uuid.uuid4().hex}"
        probe = {"Key": self._object["Key"] + suffix, "Body": b""}
        self.folder.write(self._name + suffix, b"")
        try:
            if self._ask("put_object", **probe, IfNoneMatch="*") or self._ask("put_object", **probe, IfMatch='"other"'):
                self._client = None
        except NotImplementedError:
            self._client = None
        self.folder.delete(self._name + suffix)
        return self._client is not None

    def read(self) -> bytes | None:
        """Return the file's bytes; None if there is no such file."""
        if self._client is None:
            self._version = content = self.folder.read(self._name)
            return content
        answer = self._ask("get_object") or {"ETag": None, "Body": None}
        self._version = answer["ETag"]
        body: bytes | None = answer["Body"]
        return body

    def write(self, content: bytes) -> bool:
        """Write `content`, which no other process writes; return whether the file holds it. If not, read it first."""
        if self._client is None:
            if self.folder.read(self._name) != self._version:
                return False
            self.folder.write(self._name, content)
            self._version = content
            return True
        condition = {"IfMatch": self._version} if self._version else {"IfNoneMatch": "*"}
        answer = self._ask("put_object", Body=content, **condition)
        if answer is None:  # or a first attempt succeeded, and only its answer was lost
            answer = self._ask("get_object")
            if answer is None or answer["Body"] != content:
                return False
        self._version = answer["ETag"]
        return True

    def _ask(self, method: str, **arguments: Any) -> dict[str, Any] | None:
        """Return what S3 answers, its body read; None if the file is not there or is not what a condition says.

        Raises NotImplementedError if the server knows no conditions.
        """
        from botocore.exceptions import ClientError

        def attempt() -> dict[str, Any] | None:
            try:
                answer: dict[str, Any] = getattr(self._client, method)(**self._object | arguments)
            except ClientError as error:
                if error.response["Error"]["Code"] in ("NoSuchKey", "PreconditionFailed"):
                    return None
                if error.response["Error"]["Code"] == "NotImplemented":
                    raise NotImplementedError(str(error)) from error
                raise
            return answer | ({"Body": answer["Body"].read()} if "Body" in answer else {})

        return self.folder.retry(attempt, writing=method == "put_object")


def _open_s3_client(folder: Storage) -> Any:
    """Open S3 as `_open_s3` does, by boto3: pyarrow writes without conditions."""
    import boto3  # late, as it takes a while
    from botocore.config import Config

    endpoint, options = _s3_options(folder.uri)
    if endpoint and "://" not in endpoint:
        endpoint = f"{options.get('scheme', 'https')}://{endpoint}"
    config = Config(
        connect_timeout=FAIL_FAST_SECONDS,
        read_timeout=FAIL_FAST_SECONDS,
        retries={"total_max_attempts": 1},
        request_checksum_calculation="when_required",  # not every server knows the newer sums
        s3={"addressing_style": "path"} if endpoint else None,
    )
    return boto3.client("s3", region_name=folder.filesystem.region, endpoint_url=endpoint, config=config)


def _s3_options(address: str) -> tuple[str | None, dict[str, str]]:
    """Return the server that is named in an address or else in the environment, and all options of the address."""
    options = dict(parse_qsl(urlsplit(address).query))
    variables = (os.environ.get("AWS_ENDPOINT_URL_S3"), os.environ.get("AWS_ENDPOINT_URL"))
    return options.get("endpoint_override") or variables[0] or variables[1], options


def _put(filesystem: Any, path: str, content: bytes, metadata: Any = None) -> None:
    with filesystem.open_output_stream(path, metadata=metadata) as stream:
        stream.write(content)


def _open_file_system(address: str) -> tuple[Any, str]:
    """Return the file system and the path in it. ValueError if neither pyarrow nor fsspec knows the scheme."""
    scheme = address.partition("://")[0].lower()
    if re.fullmatch(r"[a-z][a-z0-9+.-]*", scheme) and scheme not in PYARROW_SCHEMES:
        import fsspec  # type: ignore[import-untyped]  # late: few need it

        filesystem, path = fsspec.core.url_to_fs(address)
        return pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem)), path
    if scheme in ("gs", "gcs") and "retry_limit_seconds=" not in address:  # else it retries for fifteen minutes itself
        address = f"{address}{'&' if '?' in address else '?'}retry_limit_seconds={FAIL_FAST_SECONDS:g}"
    filesystem, path = pyarrow.fs.FileSystem.from_uri(address)
    if scheme == "s3":
        filesystem = _open_s3(address, region=filesystem.region)
    return filesystem, path


def _open_s3(address: str, *, region: str) -> Any:
    """Open S3 by the URI's own options, so that small files take one request and none is written in the background.

    Background writes wait for threads of the pool that Tune's copies run in, and can deadlock.
    """
    endpoint, query = _s3_options(address)
    options = {name: {"true": True, "false": False}.get(value, value) for name, value in query.items()}
    fixed = {"endpoint_override": endpoint, "region": region, "background_writes": False, "allow_delayed_open": True}
    return pyarrow.fs.S3FileSystem(**options | fixed)


def _retried(name: str) -> Callable[..., Any]:
    """Return a method that calls the inner file system's method `name`, with retries."""

    def method(self: "RetryingFileSystem", *args: Any) -> Any:
        return self.retry(lambda: getattr(self.inner, name)(*args))

    return method


class RetryingFileSystem(pyarrow.fs.FileSystemHandler):  # type: ignore[misc]
    """A file system for Tune, which does not retry. Files are kept in memory until they can be written whole."""

    def __init__(self, inner: Any, retry: RetryPolicy) -> None:
        self.inner = inner
        self.retry = retry

    def get_type_name(self) -> str:
        return str(self.inner.type_name)

    normalize_path = _retried("normalize_path")
    get_file_info = _retried("get_file_info")
    get_file_info_selector = _retried("get_file_info")
    open_input_stream = _retried("open_input_stream")
    open_input_file = _retried("open_input_file")

    def create_dir(self, path: str, recursive: bool) -> None:
        self.retry(lambda: self.inner.create_dir(path, recursive=recursive), writing=True)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        def upload(content: bytes) -> None:
            self.retry(lambda: _put(self.inner, path, content, metadata), writing=True)

        return pa.PythonFile(_Upload(upload), mode="w")

    def _refuse(self, *_: Any) -> Any:
        raise pa.ArrowNotImplementedError("Tune neither moves nor deletes: see Storage for that")

    copy_file = move = open_append_stream = _refuse
    delete_dir = delete_dir_contents = delete_file = delete_root_dir_contents = _refuse


class _Upload(io.BytesIO):
    """A file that is uploaded when it is closed."""

    def __init__(self, upload: Callable[[bytes], None]) -> None:
        super().__init__()
        self._upload = upload

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            self._upload(content)
