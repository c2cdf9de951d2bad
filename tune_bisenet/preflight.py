"""Everything that can be wrong is found here, before the first trial, and reported together.

`check` turns the command line into a `Flight`: rows, data packed on this node, weights at hand, a folder to write to.
"""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

from pydantic import BeforeValidator, NonNegativeFloat, NonNegativeInt, PositiveInt, ValidationError

from tune_bisenet import manifest, plan, spaces
from tune_bisenet.config import Frozen, Job, Precision, Run, check_image_size, size_words
from tune_bisenet.data.catalog import STREETS, open_source
from tune_bisenet.data.packed import Packed, prepare, suggested_image_size
from tune_bisenet.data.source import DataError, Source
from tune_bisenet.storage import Storage

STREETS_EPOCHS: Final = 8
"""Enough on the built-in streets for mIoU to rise clearly, few enough for a first try on two cores."""

DATASET_VARIABLE: Final = "CITYSCAPES_DATASET"
CACHE_VARIABLE: Final = "TUNE_BISENET_CACHE"
NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"

Value = TypeVar("Value")


# --- the command line, typed -----------------------------------------------------------------------------------------


def _split(text: object) -> object:
    return [part.strip() for part in text.split(",")] if isinstance(text, str) else text


def _size(text: object) -> object:
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"{text} is not a size: write height x width, as in 512x1024.")
    return check_image_size((int(match[1]), int(match[2])))


def _name(text: str) -> str:
    if re.fullmatch(NAME_PATTERN, text) is None:
        raise ValueError(f"{text!r} is no name for a search: use letters, digits, '.', '_' and '-', no path, at most 100.")
    return text


Names = Annotated[tuple[str, ...], BeforeValidator(_split)]
Seeds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_split)]
Size = Annotated[tuple[int, int], BeforeValidator(_size)]


class Arguments(Frozen):
    """The flags as given; None where one was left out. The first group decides what is trained."""

    space: str = "runs10"
    data: str | None = None
    backbone: str | None = None
    runs: Names | None = None
    seeds: Seeds | None = None
    epochs: PositiveInt | None = None
    image_size: Size | None = None
    proxy: bool | None = None
    scheduler: Literal["asha", "fifo"] | None = None
    precision: Precision | None = None

    gpus_per_trial: NonNegativeFloat | None = None
    cpus_per_trial: PositiveInt | None = None
    max_concurrent: PositiveInt | None = None
    storage: str = "results"
    name: Annotated[str, BeforeValidator(_name)] | None = None
    resume: bool = False
    address: str | None = None


SCIENCE: Final = ("space", "data", "backbone", "runs", "seeds", "epochs", "image_size", "proxy", "scheduler", "precision")
"""The arguments that a resumed search must share with the one it continues."""


# --- the result --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A search that has nothing wrong with it, ready for resources."""

    arguments: Arguments
    grid: spaces.Grid
    runs: tuple[Run, ...]
    packs: dict[tuple[int, int], Packed]  # by image size
    facts: plan.DataFacts
    data: str
    cache_dir: Path
    backbone: str
    backbone_digest: str
    precision: Precision
    scheduler: Literal["asha", "fifo"]
    folder: Storage
    name: str
    earlier: dict[str, Any] | None  # the manifest of the search that is resumed
    caption: str | None  # what to say of a proxy

    @property
    def captions(self) -> list[str]:
        """What every table of this search must say."""
        return [self.caption] if self.caption else []

    def job(self, *, cpus_per_trial: int, use_gpu: bool) -> Job:
        """What each trial is told besides its run."""
        return Job(
            data=self.data,
            packs={size_words(size): str(pack.path) for size, pack in self.packs.items()},
            data_digests={size_words(size): pack.digest for size, pack in self.packs.items()},
            cache_dir=str(self.cache_dir),
            backbone=self.backbone,
            backbone_digest=self.backbone_digest,
            precision=self.precision,
            storage=self.folder.uri,
            cpus_per_trial=cpus_per_trial,
            use_gpu=use_gpu,
            several_seeds=len({run.seed for run in self.runs}) > 1,
        )


class PreflightError(ValueError):
    """The input was wrong. `problems` holds one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


@dataclass
class _Problems:
    """Collects what is wrong, so that one mistake does not hide the next."""

    found: list[str] = field(default_factory=list)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Take note of a user's mistake, ValueError in this project, and go on after the block."""
        try:
            yield
        except (DataError, plan.PlanError) as error:
            self.found += error.problems
        except ValueError as error:
            self.found.append(str(error))

    def attempt(self, function: Callable[[], Value]) -> Value | None:
        with self.gathered():
            return function()
        return None


# --- the checks --------------------------------------------------------------------------------------------------------


def parse(flags: dict[str, Any]) -> Arguments:
    """Typed arguments from the flags that were given. Raises PreflightError naming every flag that is wrong."""
    try:
        return Arguments.model_validate(flags)
    except ValidationError as error:
        problems = []
        for finding in error.errors():
            flag = "--" + str(finding["loc"][0]).replace("_", "-")
            message = finding["msg"].removeprefix("Value error, ")
            problems.append(f"{flag}: {message}" if "Value error" in finding["msg"] else f"{flag} {finding['input']}: {message}.")
        raise PreflightError(problems) from error


def check(arguments: Arguments, *, default_name: str, progress: Callable[[int, int], None]) -> Flight:
    """All checks, cheap ones first; frames are decoded last. Raises PreflightError with everything found."""
    problems = _Problems()
    name = arguments.name or default_name
    folder = problems.attempt(lambda: _folder(arguments, name))
    earlier = problems.attempt(lambda: _earlier(arguments, folder, name)) if folder else None
    if earlier is not None:
        arguments = problems.attempt(lambda: _continued(arguments, earlier)) or arguments
    grid = problems.attempt(lambda: spaces.load(arguments.space))
    rows = problems.attempt(lambda: spaces.select(grid, arguments.runs)) if grid else None
    data = _data(arguments)
    precision = arguments.precision or "fp32"
    problems.attempt(lambda: _check_precision(precision, arguments))
    backbone = _backbone(arguments, data)
    backbone_digest = problems.attempt(lambda: _check_backbone(backbone))
    source = problems.attempt(lambda: open_source(data))
    settings = _settings(arguments, data)
    facts = problems.attempt(lambda: _facts(source)) if source else None
    runs = problems.attempt(lambda: plan.plan_runs(rows, settings, facts)) if rows and facts else None
    if problems.found:
        raise PreflightError(problems.found)
    assert folder and grid and source and facts and runs and backbone_digest
    cache_dir = _cache_dir()
    sizes = sorted({run.image_size for run in runs})
    packs = problems.attempt(
        lambda: {size: prepare(source, image_size=size, cache_dir=cache_dir, progress=progress) for size in sizes}
    )
    if packs is not None and earlier is not None:
        problems.attempt(lambda: _check_same_data(packs, earlier))
    if problems.found:
        raise PreflightError(problems.found)
    assert packs is not None
    return Flight(
        arguments=arguments,
        grid=grid,
        runs=runs,
        packs=packs,
        facts=facts,
        data=data,
        cache_dir=cache_dir,
        backbone=backbone,
        backbone_digest=backbone_digest,
        precision=precision,
        scheduler=arguments.scheduler or "asha",
        folder=folder,
        name=name,
        earlier=earlier,
        caption=plan.proxy_caption(runs[0], facts) if settings.proxy else None,
    )


def _folder(arguments: Arguments, name: str) -> Storage:
    """The search's folder, whose storage can be written to."""
    storage = Storage.at(arguments.storage)
    try:
        storage.make()
        storage.write(".writable", b"")
        storage.delete(".writable")
    except OSError as error:
        raise ValueError(f"--storage {arguments.storage} cannot be written to: {error}") from error
    return storage / name


def _earlier(arguments: Arguments, folder: Storage, name: str) -> dict[str, Any] | None:
    if arguments.resume and arguments.name is None:
        raise ValueError("--resume needs the --name of the search to go on with.")
    earlier = manifest.read(folder)
    if arguments.resume and earlier is None:
        raise ValueError(f"there is no search {name} in {arguments.storage} to resume. Check --name and --storage.")
    if earlier is not None and not arguments.resume:
        raise ValueError(
            f"there is a search {name} in {arguments.storage} already. Go on with it by --resume, or take another --name."
        )
    return earlier


def _continued(given: Arguments, earlier: dict[str, Any]) -> Arguments:
    """The earlier search's arguments with this session's resources. ValueError if a flag asks for something else."""
    before = Arguments.model_validate(earlier["arguments"])
    changed = [
        f"--{name.replace('_', '-')}"
        for name in SCIENCE
        if name in given.model_fields_set and getattr(given, name) != getattr(before, name)
    ]
    if changed:
        raise ValueError(
            f"{', '.join(changed)} differ from what this search was started with. Leave them out to resume it, "
            "or start another search under another --name."
        )
    return given.model_copy(update={name: getattr(before, name) for name in SCIENCE})


def _check_same_data(packs: dict[tuple[int, int], Packed], earlier: dict[str, Any]) -> None:
    digests = {pack.digest for pack in packs.values()}
    if digests != set(earlier["data"]["digests"]):
        raise ValueError(
            f"the frames in {earlier['data']['name']} have changed since this search was started. "
            "Bring them back to resume it, or start another search under another --name."
        )


def _data(arguments: Arguments) -> str:
    data = arguments.data or os.environ.get(DATASET_VARIABLE) or STREETS
    return data if data == STREETS else str(Path(data).expanduser().absolute())


def _settings(arguments: Arguments, data: str) -> plan.Settings:
    streets = data == STREETS
    return plan.Settings(
        seeds=arguments.seeds or (0,),
        num_epochs=arguments.epochs or (STREETS_EPOCHS if streets else None),
        image_size=arguments.image_size,
        proxy=bool(arguments.proxy) or streets,
    )


def _facts(source: Source) -> plan.DataFacts:
    return plan.DataFacts(
        num_train=len(source.names("train")),
        num_val=len(source.names("val")),
        suggested_image_size=suggested_image_size(source.frame_size),
    )


def _backbone(arguments: Arguments, data: str) -> str:
    chosen = arguments.backbone or ("none" if data == STREETS else "imagenet")
    return chosen if chosen in ("none", "imagenet") else str(Path(chosen).expanduser().absolute())


def _check_backbone(name: str) -> str:
    """Fetch or read the weights once, now; their digest. Without any, torch is not even imported."""
    if name == "none":
        return "none"
    from tune_bisenet import backbone

    backbone.load(name)
    return backbone.digest(name)


def _check_precision(precision: Precision, arguments: Arguments) -> None:
    """bf16 on a CPU that has no instructions for it is ten times slower than fp32, not faster."""
    on_gpu = arguments.gpus_per_trial != 0 and (arguments.address is not None or Path("/dev/nvidiactl").exists())
    if precision == "bf16" and not on_gpu and not _cpu_has_bf16():
        raise ValueError("--precision bf16: this machine has no GPU, and its CPU no bf16 instructions. Use fp32 here.")


def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def _cache_dir() -> Path:
    cache = os.environ.get(CACHE_VARIABLE)
    return Path(cache).expanduser().absolute() if cache else Path.home() / ".cache" / "tune_bisenet"
