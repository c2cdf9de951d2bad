"""YAML files, read strictly, and the words in them that are still to be replaced."""

import re
from collections.abc import Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

PLACEHOLDER: Final = "EDIT"

_PLACEHOLDER: Final = re.compile(rf"(?<![A-Z]){PLACEHOLDER}(?![A-Z])")

_MERGE: Final = "tag:yaml.org,2002:merge"

Document = dict[str, Any]


class UnreadableError(ValueError):
    """The file is not there, or is no YAML of the kind that is meant."""


class _StrictLoader(yaml.SafeLoader):  # type: ignore[misc]
    """A key given twice is an error: YAML itself silently keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            if key_node.tag == _MERGE:
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key} is given twice", key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Hashable, Any] = super().construct_mapping(node, deep=deep)
        return mapping


def documents(path: Path) -> list[Document]:
    """The mappings in a file. Raises UnreadableError."""
    try:
        found = list(yaml.load_all(path.read_text(), Loader=_StrictLoader))
    except OSError as error:
        raise UnreadableError(f"cannot be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UnreadableError(f"is no YAML: {error}") from error
    if not found or not all(isinstance(document, dict) for document in found):
        raise UnreadableError("is not a file for `ray up`, nor a manifest: it holds no keys.")
    return found


def placeholders(content: Sequence[Document]) -> Iterator[str]:
    """What a user has still to fill in. What `metadata` defines for use further down is told there alone."""
    for document in content:
        defined = {text for _, text in strings(document.get("metadata"))}
        for place, text in strings(document):
            if _PLACEHOLDER.search(text) and (place.startswith("metadata") or text not in defined):
                yield f"{place}: `{text}` is still to be filled in."


def strings(value: object, place: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a tree of mappings and lists, with where it is."""
    match value:
        case str():
            yield place, value
        case dict():
            for key, inner in value.items():
                yield from strings(inner, f"{place}.{key}" if place else str(key))
        case list():
            for number, inner in enumerate(value):
                yield from strings(inner, f"{place}[{number}]")
