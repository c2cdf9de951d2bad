"""Small changes to a parsed file, each at a path such as `provider.region` or `setup_commands.0`."""

from collections.abc import Callable
from typing import Any

Change = Callable[[Any], None]


def _at(document: Any, path: str) -> tuple[Any, Any]:
    """What holds the last key of a path, and that key."""
    *parents, last = path.split(".")
    for key in parents:
        document = document[int(key) if isinstance(document, list) else key]
    return document, int(last) if isinstance(document, list) else last


def setting(path: str, value: object) -> Change:
    """Put `value` there."""

    def change(document: Any) -> None:
        holder, key = _at(document, path)
        holder[key] = value

    return change


def dropping(path: str) -> Change:
    """Take away what is there."""

    def change(document: Any) -> None:
        holder, key = _at(document, path)
        del holder[key]

    return change


def renaming(path: str, name: str) -> Change:
    """Give the key another name."""

    def change(document: Any) -> None:
        holder, key = _at(document, path)
        holder[name] = holder.pop(key)

    return change


def replacing(path: str, old: str, new: str) -> Change:
    """Replace a part of the text there."""

    def change(document: Any) -> None:
        holder, key = _at(document, path)
        assert old in holder[key]
        holder[key] = holder[key].replace(old, new)

    return change
