"""Storage that does not answer, or is full: what is worth trying again, for how long, and what is said of it.

pyarrow's own retries give up after seconds, which is too soon for a search of days. What cannot succeed however
long one waits, such as a bucket that does not exist or a key that is not accepted, fails at once.
"""

import errno
import logging
import math
import os
import random
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Final, TypeVar

from tune_bisenet.secrets import in_a_line
from tune_bisenet.words import counted

PATIENCE_SECONDS: Final = 600.0
"""How long a search waits for its storage, unless $TUNE_BISENET_PATIENCE says another number of seconds."""

PATIENCE_VARIABLE: Final = "TUNE_BISENET_PATIENCE"

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

log = logging.getLogger(__name__)


def patience_seconds() -> float:
    """How long storage is waited for in this process."""
    text = os.environ.get(PATIENCE_VARIABLE, f"{PATIENCE_SECONDS}")
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"${PATIENCE_VARIABLE} is {text!r}: give a number of seconds, as in 600.") from None


class StorageError(OSError):
    """Storage refuses for good, or has not answered for as long as one waits. The text says what to do."""


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
                if remedy := _remedy(error):
                    raise StorageError(f"{self.place}: {in_a_line(error)}. {remedy}") from error
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
                f"{in_a_line(error)}{_full(error)}"
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
