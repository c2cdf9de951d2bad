"""Format numbers, tables and errors as text; tell paths from addresses, and hide passwords in these."""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

HIDDEN: Final = "***"
_PASSWORD_IN_ADDRESS: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://[^\s:/@?#]*:)[^\s/?#]*(?=@)")
_PASSWORD_IN_QUERY: Final = re.compile(
    r"([?&][^=&\s]*(?:password|secret|token|access_key|account_key|signature)[^=&\s]*=)[^&\s'\"]+", re.IGNORECASE
)
_AMBIGUOUS: Final = re.compile(r"[^:/]+://[^:/@]*:(?:[^@]*[\s/?#][^@]*@|[^@/]*@[^/?]*@)")


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, as `1 epoch` or `1,000 epochs`. For nouns whose plural adds an s."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def format_duration(seconds: float) -> str:
    """Return the two largest units, rounded to whole seconds, as `12 s`, `2 min 10 s`, `1 h 5 min` or `2 d 3 h`."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"


def format_bytes(number: float) -> str:
    """Return a size with three digits, as `1.35 GB`."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number / 1e3:.3g} kB"


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: Collection[str] = ()) -> str:
    """Return an aligned Markdown table without a final newline; the columns of `numbers` are set to the right."""
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in [columns, *rows]]
    widths = [max(map(len, column)) for column in zip(*escaped, strict=True)]
    right = [title in numbers for title in columns]
    lines = [
        "| "
        + " | ".join(
            f"{cell:{'>' if is_right else '<'}{width}}"
            for cell, width, is_right in zip(row, widths, right, strict=True)
        )
        + " |"
        for row in escaped
    ]
    ruler = ["-" * (width + 1) + (":" if is_right else "-") for width, is_right in zip(widths, right, strict=True)]
    return "\n".join([lines[0], f"|{'|'.join(ruler)}|", *lines[1:]])


def is_uri(text: str) -> bool:
    """Return whether `text` is an address such as `s3://bucket/x`; anything else is a local path."""
    return "://" in text and not text.startswith(("/", ".", "~"))


def absolute_path(text: str) -> Path:
    """Return a local path, absolute. A `~` that names the home of no user is a character like others.

    ValueError if it has bytes that are not UTF-8: neither Arrow nor JSON can hold them.
    """
    path = Path(text)
    with suppress(RuntimeError):
        path = path.expanduser()
    path = path.absolute()
    if not is_utf8(str(path)):
        raise ValueError(f"{str(path)!a} has bytes that are not UTF-8: rename the folder, or link to it.")
    return path


def is_utf8(text: str) -> bool:
    """Return whether `text`, which may be a name that the system gave, can be written as UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def redact(text: str) -> str:
    """Return `text` with `***` for every password in an address."""
    for pattern in (_PASSWORD_IN_ADDRESS, _PASSWORD_IN_QUERY):
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


def has_secret(text: str) -> bool:
    """Return whether an address in `text` holds a readable password."""
    return redact(text) != text


def is_ambiguous(address: str) -> bool:
    """Return whether its password holds a character that must be percent-encoded there: `@ / ? #` or a blank."""
    return _AMBIGUOUS.match(address) is not None


def one_line(error: BaseException) -> str:
    """Return the first line of an error, or of the one it was raised from, redacted."""
    lines = redact(without_errno(str(error.__cause__ or error))).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def in_words(message: str) -> str:
    """Return what pydantic says of a value, as the program says it: `must be greater than 0`."""
    return message.removeprefix("Value error, ").replace("Input should", "must")


def without_errno(text: str) -> str:
    """Return `text` without the numbers of the system's errors: their words say as much."""
    return re.sub(r"\[Errno \d+\] ", "", text)
