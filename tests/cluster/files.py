"""The cluster's files, as they are and as a user would fill them in."""

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


def filled_text(name: str) -> str:
    """A file of cluster/ with every placeholder replaced."""
    comment, text = "EDIT: replace", (CLUSTER / name).read_text()
    text = re.sub(r"#.*", lambda found: found[0].replace("EDIT", ""), text)
    assert comment not in text
    for placeholder, answer in _ANSWERS.items():
        text = text.replace(placeholder, answer)
    return text.replace("EDIT", "mine")


def filled(name: str) -> Any:
    """The first document of a filled file."""
    return next(yaml.safe_load_all(filled_text(name)))


def written(path: Path, name: str, change: Callable[[Any], None] = lambda _: None) -> Path:
    """A filled file, all its documents changed, written to `path`. Nothing in it is shared by anchors any more."""
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
