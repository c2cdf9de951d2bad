"""The cluster's files, as they are, as a user would fill them in, and with one thing changed."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent.parent
CLUSTER = ROOT / "cluster"
LAUNCHER_FILES = ("gpu.yaml", "gcp.yaml", "local.yaml")
FILES = (*LAUNCHER_FILES, "kuberay.yaml")

AMI, SUBNET, GROUP = "ami-0123456789abcdef0", "subnet-0123456789abcdef0", "sg-0123456789abcdef0"

_ANSWERS = {
    "ami-EDIT": AMI,
    "subnet-EDIT": SUBNET,
    "sg-EDIT": GROUP,
    "vEDIT": "v20260626",
    "storage EDIT": "storage /shared/searches",
    "EDIT/tune-bisenet": "registry.example/tune-bisenet",
    "head_ip: EDIT": "head_ip: 192.0.2.1",
    "worker_ips: [EDIT]": "worker_ips: [192.0.2.2, 192.0.2.3]",
}

Change = Callable[[Any], object]


def filled_text(name: str) -> str:
    """Return a file of cluster/ with every placeholder replaced."""
    text = re.sub(r"#.*", "", (CLUSTER / name).read_text())
    for placeholder, answer in _ANSWERS.items():
        text = text.replace(placeholder, answer)
    return text.replace("EDIT", "mine")


def written(path: Path, name: str, change: Change = lambda _: None) -> Path:
    """Write a filled file to `path`, all its documents changed. Anchors no longer share anything."""
    documents = [yaml.safe_load(_unshared(document)) for document in yaml.safe_load_all(filled_text(name))]
    for document in documents:
        change(document)
    path.write_text("---\n".join(map(_unshared, documents)))
    return path


def _unshared(document: Any) -> str:
    class Dumper(yaml.SafeDumper):
        def ignore_aliases(self, data: Any) -> bool:
            return True

    return yaml.dump(document, Dumper=Dumper, sort_keys=False)


def setting(path: str, value: object = None, **parts: str) -> Change:
    """Return a change of what is at a path such as `setup_commands.0`: to a value, or of a part of its text."""

    def change(document: Any) -> None:
        parent, key = _parent(document, path)
        parent[key] = value if not parts else parent[key].replace(parts["old"], parts["new"])

    return change


def dropping(path: str) -> Change:
    """Return a change that removes the key at a path."""

    def change(document: Any) -> None:
        parent, key = _parent(document, path)
        del parent[key]

    return change


def _parent(document: Any, path: str) -> tuple[Any, Any]:
    """Return the mapping or list that holds what is at a path, and its key there."""
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        document = document[key]
    return document, last
