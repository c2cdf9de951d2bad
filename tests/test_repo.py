"""The repository keeps its word: what README, lock and docs say is so."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import tune_bisenet
from tune_bisenet import spaces

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").rglob("*.md"))]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def tracked_files() -> list[Path]:
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_the_readme_shows_the_ten_runs_as_show_prints_them() -> None:
    assert spaces.space_to_markdown(spaces.load_space("runs10").runs) in README


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_every_make_verb_of_the_readme_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    verbs = set(re.findall(r"(?:^|`)make ([a-z0-9-]+)", README, flags=re.MULTILINE))
    assert verbs
    assert verbs <= targets


@pytest.mark.parametrize("page", ["README.md", "docs/guide.md", "docs/inference.md"])
def test_every_flag_of_a_page_exists(page: str) -> None:
    from tune_bisenet import options
    from tune_bisenet.__main__ import VERBS

    verbs = [importlib.import_module(module) for verb, (module, _) in VERBS.items() if verb != "run"]
    helps = options.build_parser().format_help() + "".join(verb._parser().format_help() for verb in verbs)
    ours = set(re.findall(r"--[a-z][a-z-]+", helps))
    others = {"--logdir"}  # TensorBoard's
    assert set(re.findall(r"--[a-z][a-z-]+", (ROOT / page).read_text())) <= ours | others


def test_every_module_run_by_a_page_exists() -> None:
    texts = [path.read_text() for path in [*PAGES, ROOT / "cluster" / "README.md", ROOT / "Makefile"]]
    modules = {name for text in texts for name in re.findall(r"python -m (tune_bisenet[.a-z_]*[a-z])", text)}
    assert len(modules) >= 5
    assert not [name for name in modules if importlib.util.find_spec(name) is None]


def test_each_public_name_has_one_meaning() -> None:
    """No two modules define the same public name, but for the `main` of each command line."""
    modules: dict[str, set[str]] = {}
    for path in (ROOT / "tune_bisenet").rglob("*.py"):
        for node in ast.parse(path.read_text()).body:
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", node)]
            names = [getattr(target, "id", getattr(target, "name", "_")) for target in targets]
            for name in names:
                modules.setdefault(name, set()).add(str(path.relative_to(ROOT)))
    shared = {name: where for name, where in modules.items() if not name.startswith("_") and len(where) > 1}
    assert set(shared) == {"main"}, shared


def test_the_root_folder_holds_ten_modules_at_most() -> None:
    assert len(list((ROOT / "tune_bisenet").glob("[!_]*.py"))) <= 10


def test_the_lock_holds_every_exact_pin() -> None:
    wanted = [*PYPROJECT["project"]["dependencies"], *PYPROJECT["dependency-groups"]["dev"]]
    lock = (ROOT / "requirements.lock").read_text()
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9-]+", requirement)
        assert name
        locked = re.search(rf"^{name[0]}==(\S+)", lock, flags=re.MULTILINE | re.IGNORECASE)
        assert locked, f"{name[0]} is not locked: make lock"
        if "==" in requirement:
            assert requirement.partition("==")[2] == locked[1]


def test_every_locked_package_has_hashes() -> None:
    lock = (ROOT / "requirements.lock").read_text()
    assert all("--hash=sha256:" in block for block in re.split(r"^(?=[a-z])", lock, flags=re.MULTILINE)[1:])


def test_the_version_is_told_once() -> None:
    assert PYPROJECT["project"]["version"] == tune_bisenet.__version__


def test_no_file_speaks_of_one_machine() -> None:
    """No absolute path of a home or a workplace, and no package registry's address."""
    forbidden = re.compile(
        "|".join([r"/(?:root|home/\w+|work)/\w", r"pypi\.org/", r"files\.pythonhosted", r"index-url"])
    )
    texts = {path: path.read_text(errors="ignore") for path in tracked_files() if path.name != Path(__file__).name}
    assert not [str(path) for path, text in texts.items() if forbidden.search(text)]
