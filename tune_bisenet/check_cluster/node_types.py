"""What the rules of both clouds share: the walk over a file's kinds of nodes, and the watcher that spot nodes need."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from tune_bisenet.check_cluster.reading import Document

Rule = Callable[[dict[str, Any], str], Iterator[str]]
"""What is wrong with the `node_config` at a place in the file."""


def problems(
    config: Document, unlike: Rule, rules: Sequence[Rule], of_all: Callable[[Document], Iterator[str]]
) -> Iterator[str]:
    """Where a node is not `unlike` what its cloud knows, `rules` are asked; where none is, `of_all` of the file."""
    is_sound = True
    for name, node_type in config["available_node_types"].items():
        place, node = f"available_node_types.{name}.node_config", node_type["node_config"]
        found = list(unlike(node, place))
        yield from found
        is_sound = is_sound and not found
        for rule in () if found else rules:
            yield from rule(node, place)
    if is_sound:
        yield from of_all(config)


def unwatched(config: Document, cloud: str) -> Iterator[str]:
    """Of a file with spot nodes, on which nothing listens for the cloud's notice."""
    watcher = f"tune_bisenet.spot --cloud {cloud}"
    if not any(watcher in command for command in config.get("worker_start_ray_commands") or []):
        yield (
            f"worker_start_ray_commands: `python -m {watcher}` is not started, so a notice is not "
            "heard and a lost node counts as a failure of its trials."
        )
