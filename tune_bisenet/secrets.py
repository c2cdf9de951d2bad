"""Passwords in addresses: they are used, and never shown."""

import re
from typing import Final

HIDDEN: Final = "***"

_IN_ADDRESS: Final = re.compile(r"(?P<before>[A-Za-z][A-Za-z0-9+.-]*://[^\s:/@?#]*:)(?P<secret>[^\s/?#]*)(?=@)")
"""`scheme://user:SECRET@`; see `is_ambiguous` for the characters that must be percent-encoded there."""

_IN_QUERY: Final = re.compile(
    r"(?P<before>[?&][^=&\s]*(?:password|secret|token|access_key|account_key|signature)[^=&\s]*=)(?P<secret>[^&\s'\"]+)",
    re.IGNORECASE,
)

_AMBIGUOUS: Final = re.compile(r"[^:/]+://[^:/@]*:(?:[^@]*[\s/?#][^@]*@|[^@/]*@[^/?]*@)")


def hidden(text: str) -> str:
    """`text` with `***` for every password in an address."""
    for pattern in (_IN_ADDRESS, _IN_QUERY):
        text = pattern.sub(rf"\g<before>{HIDDEN}", text)
    return text


def has_secret(text: str) -> bool:
    """Whether an address in `text` holds a password that can be read."""
    return hidden(text) != text


def is_ambiguous(address: str) -> bool:
    """Whether a password in it holds a character that ends it for some who read it: `@ / ? #` and blanks."""
    return _AMBIGUOUS.match(address) is not None


def in_a_line(error: BaseException) -> str:
    """What an error, or the one it was raised from, says first, without a password."""
    lines = hidden(str(error.__cause__ or error)).strip().splitlines()
    return lines[0] if lines else type(error).__name__
