"""The versions of requirements.lock, and whatever in a cluster's file could bring others."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parent.parent.parent

_IMAGE: Final = re.compile(r"(?P<name>[^:@]+)(?::(?P<tag>[\w.-]+))?(?P<digest>@sha256:[0-9a-f]{64})?")
_LOOSE: Final = re.compile(r"nightly|ray-wheels|\blatest\b|\.dev\d", re.IGNORECASE)
_RAY: Final = re.compile(r"\bray(?:\[[\w,]+\])?\s*(?P<version>[=<>!~]=?\s*[\w.*]+)")
_PIP: Final = re.compile(r"\bpip3?\s+install\b[^;&|]*")


def locked(package: str) -> str:
    """The version in requirements.lock."""
    lock = (PROJECT / "requirements.lock").read_text()
    found = re.search(rf"^{re.escape(package)}==(\S+)", lock, flags=re.MULTILINE)
    assert found, f"{package} is not in requirements.lock"
    return found[1]


def python_versions() -> list[str]:
    """The minor versions of Python that the lock is for, as in 3.11."""
    wanted = re.search(r'requires-python = ">=3\.(\d+),<3\.(\d+)"', (PROJECT / "pyproject.toml").read_text())
    assert wanted, "pyproject.toml gives no range of Pythons"
    return [f"3.{minor}" for minor in range(int(wanted[1]), int(wanted[2]))]


def image_problems(place: str, image: str) -> Iterator[str]:
    """An image without a fixed tag, or with another Ray or Python than the lock's."""
    parts = _IMAGE.fullmatch(image)
    if parts is None:
        yield f"{place}: {image} is no name of an image."
        return
    tag = parts["tag"] or ""
    if not parts["digest"] and (not tag or _LOOSE.search(tag)):
        yield f"{place}: {image} can be another image tomorrow. Give a tag that stays, or a digest."
    if not re.fullmatch(r"(?:docker\.io/)?rayproject/ray(?:-ml)?", parts["name"]):
        return
    ray = locked("ray")
    if tag.partition("-")[0] != ray:
        yield f"{place}: {image} has another Ray than requirements.lock: it must be {ray}."
    python = re.search(r"-py3(\d+)", tag)
    if python is None or f"3.{python[1]}" not in python_versions():
        yield f"{place}: the tag of {image} must name a Python that the lock is for, as in {ray}-py311-cu128."


def command_problems(place: str, command: str) -> Iterator[str]:
    """A command that installs what is not fixed."""
    if _LOOSE.search(command):
        yield f"{place}: `{command}` brings what can be another version tomorrow."
    for call in _PIP.findall(command):
        if "--require-hashes" not in call:
            yield f"{place}: `{call.strip()}` is not locked. Use --require-hashes and a file of hashes."
    for found in _RAY.finditer(command):
        if found["version"].replace(" ", "") != f"=={locked('ray')}":
            yield f"{place}: `{found[0]}` is another Ray than requirements.lock, which has {locked('ray')}."
