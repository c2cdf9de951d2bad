"""What goes to a cluster: a run's flags, checked as far as can be seen from here, and the files that it needs there.

Files and words; it knows neither Ray nor the cluster.
"""

import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Final

import search_spaces
import tune_bisenet
from tune_bisenet import options, spaces
from tune_bisenet.options import NO_BACKBONE, STREETS, STUDY_VARIABLE, InputError, Options
from tune_bisenet.run import parser as run_parser
from tune_bisenet.storage import has_secret, is_ambiguous, redact

PACKAGES: Final = (tune_bisenet, search_spaces)

MAX_BYTES: Final = 512 * 2**20
"""Ray takes no larger working folder."""

# --- a submission -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A search that is ready to be sent."""

    name: str
    """Of the search."""
    storage: str
    continues: bool
    """Whether it goes on with a search that is there already."""
    words: tuple[str, ...]
    """The flags of the run, as they will be there."""
    files: Mapping[str, Path]
    """What is sent, by its place in the working folder."""
    cautions: tuple[str, ...]

    @property
    def metadata(self) -> dict[str, str]:
        """What the cluster keeps with the job, for all to see."""
        return {"search": self.name, "storage": redact(self.storage)}

    @property
    def entrypoint(self) -> str:
        """`exec`: the run itself, not a shell around it, is to hear the signal that stops a job."""
        return "exec " + shlex.join(["python", "-m", "tune_bisenet.run", "--address", "auto", *self.words])


def prepare(words: Sequence[str]) -> Submission:
    """The search that these flags of a run ask for. InputError with all that is wrong with them."""
    flags = vars(run_parser().parse_args(words))
    problems = _secret_problems(words)
    if problems:
        raise InputError(problems)  # before anything else is said of them
    if flags.pop("show", False):
        problems.append("--show needs no cluster: python -m tune_bisenet.run --show prints the table here.")
    if flags.pop("plan", False):
        problems.append("--plan starts nothing: python -m tune_bisenet.run --plan --gpus N says it here.")
    given, mistyped = options.parse_options(flags)
    problems += [*mistyped.values(), *_misplaced(given, is_default_storage="storage" not in flags)]
    files = _package_files()
    if given.space or not given.continues:  # what goes on has its space on storage
        try:
            files |= _space_files(given)
        except ValueError as error:
            problems.append(str(error))
    problems += size_problems(files)
    if problems:
        raise InputError(problems)
    name = given.name or f"{_space_of(given).stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    return Submission(
        name=name,
        storage=given.storage,
        continues=given.continues,
        words=tuple(_as_there(words, given, name)),
        files=files,
        cautions=tuple(_cautions(given)),
    )


def _space_of(given: Options) -> Path:
    return Path(given.space or "runs10")


def _as_there(words: Sequence[str], given: Options, name: str) -> list[str]:
    """The flags with the search's name, and with the space by the name that its file has among those sent."""
    if given.space and _is_path(given.space):
        words = [*_without(words, "--space"), "--space", _space_of(given).stem]
    return [*_without(words, "--name"), "--name", name]


def _without(words: Sequence[str], flag: str) -> list[str]:
    """The words of a command line without a flag and its value."""
    return [
        word
        for previous, word in zip(["", *words], words, strict=False)
        if flag not in (previous, word) and not word.startswith(f"{flag}=")
    ]


# --- its flags ----------------------------------------------------------------------------------------------------


def _secret_problems(words: Sequence[str]) -> list[str]:
    """The command of a job is on record for all who can reach the cluster."""
    if not any(has_secret(word) or ("://" in word and is_ambiguous(word)) for word in words):
        return []
    return [
        "an address in the run's flags holds a password, and all who can reach the cluster can read a job's command. "
        f"For a study, leave --study out and set ${STUDY_VARIABLE} on the head before Ray is started there; for "
        "storage and data, give the machines a role."
    ]


def _misplaced(given: Options, *, is_default_storage: bool) -> list[str]:
    """What means something here and something else, or nothing, on the cluster."""
    problems = []
    if given.address is not None:
        problems.append("--address: the run will be on the cluster already. Leave it out after `--`.")
    if given.continues and given.name is None:
        problems.append("--resume, --add and --rerun need the --name of the search to go on with.")
    if is_default_storage:
        problems.append(
            "--storage is needed: what a job writes into its working folder is lost with the cluster. "
            "Give a URI as s3://bucket/searches, or the absolute path of a folder that all its machines share."
        )
    problems += [
        f"{flag} {path} is a path from here on, and a job starts elsewhere. "
        "Give a URI as s3://bucket/…, or the absolute path on the cluster's machines."
        for flag, path in _paths(given).items()
        if not Path(path).is_absolute() and not (is_default_storage and flag == "--storage")
    ]
    if given.study and given.study.startswith("sqlite:///") and not given.study.startswith("sqlite:////"):
        problems.append("--study: a relative path would be lost with the cluster. Leave --study out, or name a server.")
    return problems


def _paths(given: Options) -> dict[str, str]:
    """The flags whose values are paths."""
    words = {STREETS, NO_BACKBONE, "imagenet"}
    values = {name: getattr(given, name) for name in ("storage", "data", "backbone", "warm_start")}
    return {
        "--" + name.replace("_", "-"): value.removeprefix("file://")
        for name, value in values.items()
        if value and value not in words and "://" not in value.removeprefix("file://")
    }


def _cautions(given: Options) -> list[str]:
    cautions = []
    if paths := _paths(given):
        named = ", ".join(f"{flag} {path}" for flag, path in paths.items())
        cautions.append(f"{named}: on the cluster's machines, not on this one, and all of them must see it.")
    if given.data is None and not given.continues:
        cautions.append("--data is left out: $CITYSCAPES_DATASET of the head decides, else the built-in streets.")
    if given.study is None and os.environ.get(STUDY_VARIABLE):
        cautions.append(f"${STUDY_VARIABLE} is not sent along: what the head has there holds.")
    return cautions


# --- its files ----------------------------------------------------------------------------------------------------


def _is_path(space: str) -> bool:
    return space.endswith(".py") or "/" in space


def _package_files() -> dict[str, Path]:
    """The two packages as they are imported here, whole; nothing of what lies around them."""
    return {place: path for package in PACKAGES for place, path in _files_of(package)}


def _files_of(package: ModuleType) -> Iterable[tuple[str, Path]]:
    root = Path(package.__path__[0])
    for path in sorted(root.rglob("*")):
        inside = path.relative_to(root)
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in inside.parts):
            yield f"{root.name}/{inside.as_posix()}", path


def _space_files(given: Options) -> dict[str, Path]:
    """A space's own file among the others, so that it has the same name on every cluster; and what it imports.

    ValueError if the space cannot be used.
    """
    name, path, before = given.space or "runs10", _space_of(given), set(sys.modules)
    spaces.select_rows(spaces.load_space(name), given.runs)
    if not _is_path(name):
        return {}
    if path.stem == "__init__" or "." in path.stem:
        raise ValueError(f"--space {path}: the file's name must be a module's. Rename it.")
    if path.stem in spaces.space_names() and path.read_bytes() != _shipped(path.stem).read_bytes():
        raise ValueError(f"--space {path}: search_spaces has another {path.stem} already. Rename the file.")
    return {f"{search_spaces.__name__}/{path.stem}.py": path.resolve()} | _imported_from_here(before)


def _shipped(space: str) -> Path:
    return Path(search_spaces.__path__[0]) / f"{space}.py"


def _imported_from_here(before: set[str]) -> dict[str, Path]:
    """Modules that have been imported since `before` from where the user stands, which the run would find, too."""
    here, elsewhere = Path.cwd(), (Path(sys.prefix), *(Path(each.__path__[0]) for each in PACKAGES))
    modules = [module for name, module in sys.modules.items() if name not in before and not name.startswith("space_")]
    paths = [Path(file).resolve() for module in modules if (file := getattr(module, "__file__", None))]
    return {
        path.relative_to(here).as_posix(): path
        for path in paths
        if path.is_relative_to(here) and not any(path.is_relative_to(folder.resolve()) for folder in elsewhere)
    }


def size_problems(files: Mapping[str, Path]) -> list[str]:
    sizes = {place: path.stat().st_size for place, path in files.items()}
    if sum(sizes.values()) < MAX_BYTES:
        return []
    largest = sorted(sizes, key=lambda place: -sizes[place])[:3]
    named = ", ".join(f"{place} ({sizes[place] / 2**20:.0f} MiB)" for place in largest)
    return [
        f"what would be sent has {sum(sizes.values()) / 2**20:.0f} MiB; Ray takes less than {MAX_BYTES // 2**20}. "
        f"The largest files: {named}. Move data out of the packages."
    ]


def stage(files: Mapping[str, Path], folder: Path) -> None:
    """Copy them to their places in `folder`."""
    for place, path in files.items():
        target = folder / place
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
