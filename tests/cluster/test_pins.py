"""The files in cluster/ agree with the lock, with each other and with what set-up needs."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest
import yaml
from files import CLUSTER, LAUNCHER_FILES, ROOT

from tune_bisenet import __version__
from tune_bisenet.cluster import daemons
from tune_bisenet.cluster.check import check_image, locked_ray


def versions(lock: Path) -> dict[str, str]:
    return dict(re.findall(r"^([a-z0-9._-]+)==([^\s;]+)", lock.read_text(), flags=re.MULTILINE))


def test_every_ray_named_in_a_cluster_file_is_that_of_the_lock() -> None:
    named = {
        (path.name, version)
        for path in CLUSTER.iterdir()
        if path.is_file() and path.suffix != ".lock"
        for version in re.findall(r"ray[:=]*(\d+\.\d+\.\d+)", path.read_text())
    }
    assert {name for name, _ in named} >= {"kuberay.yaml", "Dockerfile"}
    assert {version for _, version in named} == {locked_ray()}


def test_the_image_of_kuberay_has_the_projects_version_and_the_locks_packages() -> None:
    tags = set(re.findall(r"image: \S+?:(\S+)", (CLUSTER / "kuberay.yaml").read_text()))
    assert tags == {f"{__version__}-ray{locked_ray()}"}
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    (base,) = re.findall(r"^FROM (\S+)", dockerfile, flags=re.MULTILINE)
    assert not list(check_image("FROM", base))
    assert "--require-hashes --requirement /opt/tune_bisenet/requirements.lock" in dockerfile


def test_both_ways_of_kuberay_run_on_the_same_cluster() -> None:
    cluster, job = yaml.safe_load_all((CLUSTER / "kuberay.yaml").read_text())
    assert cluster["spec"] == job["spec"]["rayClusterSpec"]
    assert cluster["metadata"]["labels"] != job["metadata"]["labels"]


def test_googles_lock_is_hashed_and_agrees_with_ours() -> None:
    ours, googles = versions(ROOT / "requirements.lock"), versions(CLUSTER / "gcp.lock")
    assert {"google-api-python-client", "google-auth-httplib2", "cryptography"} <= googles.keys()
    assert {name: ours[name] for name in googles if name in ours} == {n: v for n, v in googles.items() if n in ours}
    blocks = re.split(r"^(?=[a-z])", (CLUSTER / "gcp.lock").read_text(), flags=re.MULTILINE)[1:]
    assert all("--hash=sha256:" in block for block in blocks)


@pytest.mark.parametrize("name", LAUNCHER_FILES)
def test_what_is_mounted_is_what_set_up_needs(name: str) -> None:
    mounts = yaml.safe_load((CLUSTER / name).read_text())["file_mounts"]
    sent = {local for local in mounts.values() if not local.startswith("~")}
    files = {"Makefile", "README.md", "pyproject.toml", "requirements.lock", "requirements-uv.lock"}
    assert sent == {"tune_bisenet", "search_spaces", "cluster"} | files
    assert all((ROOT / local).exists() for local in sent)
    assert all(remote == f"~/tune_bisenet/{local}" for remote, local in mounts.items() if local in sent)


def test_daemons_take_the_flags_that_the_files_give_them() -> None:
    texts = [(CLUSTER / name).read_text() for name in LAUNCHER_FILES]
    commands = re.findall(r"cluster\.daemons ((?:spot|dashboards) .*?) <", "\n".join(texts))
    commands += re.findall(r"cluster\.daemons, (.*)\]", (CLUSTER / "kuberay.yaml").read_text().replace(", --", " --"))
    parsed = [daemons._parser().parse_args(shlex.split(command.replace(", ", " "))) for command in commands]
    assert [flags.daemon for flags in parsed].count("spot") == 2
    storages = {flags.storage for flags in parsed if flags.daemon == "dashboards"}
    assert storages == {"s3://EDIT/searches", "gs://EDIT/searches", "EDIT"}


@pytest.mark.parametrize("script", sorted(CLUSTER.glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound_shell(script: Path) -> None:
    subprocess.run(["bash", "-n", script], check=True)
    assert script.stat().st_mode & 0o111
    assert "set -euo pipefail" in script.read_text()


def test_every_link_of_the_readme_leads_somewhere() -> None:
    page = (CLUSTER / "README.md").read_text()
    links = re.findall(r"\]\(([^)]+)\)", page)
    titles = re.findall(r"^#+ (.*)", page, flags=re.MULTILINE)
    headings = {re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-") for title in titles}
    broken = [link for link in links if link.removeprefix("#") not in headings and not (CLUSTER / link).exists()]
    assert not broken


@pytest.mark.parametrize("policy", sorted((CLUSTER / "iam").iterdir()), ids=lambda path: path.name)
def test_no_policy_allows_everything(policy: Path) -> None:
    for statement in json.loads(policy.read_text())["Statement"]:
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        assert not any("*" in action for action in actions)
        if statement.get("Resource") == "*":
            looks = all(action.startswith("ec2:Describe") for action in actions)
            assert looks or "Condition" in statement, statement["Sid"]
