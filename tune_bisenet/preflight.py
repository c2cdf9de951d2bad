"""Everything that can be wrong is found here, before the first trial, and reported together.

`check` turns the command line into a `Flight`: rows, data packed on this node, weights at hand, a folder to write to.
`survey` finds what can be found without decoding a frame, fetching weights or writing anything: enough for a plan.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from pyarrow.fs import FileType

from tune_bisenet import flag_rules, frames, plan, rehearsal, resuming, spaces
from tune_bisenet.arguments import NO_BACKBONE, STREETS, Arguments, Choices, InputError, choose
from tune_bisenet.config import Precision, Run
from tune_bisenet.data.source import DataError
from tune_bisenet.flight import Flight, Survey
from tune_bisenet.storage import Storage

STREETS_EPOCHS: Final = 8
"""Enough on the built-in streets for mIoU to rise clearly, few enough for a first try on two cores."""

DATASET_VARIABLE: Final = "CITYSCAPES_DATASET"

Value = TypeVar("Value")


@dataclass
class _Problems:
    """Collects what is wrong, so that one mistake does not hide the next."""

    found: list[str] = field(default_factory=list)

    def attempt(self, function: Callable[[], Value]) -> Value | None:
        """Its value; None after a user's mistake, ValueError in this project, of which a note is taken."""
        try:
            return function()
        except ValueError as error:
            self.found += _sentences(error)
            return None


def _sentences(error: ValueError) -> Sequence[str]:
    """What is wrong, one thing each."""
    if isinstance(error, DataError):
        return str(error).splitlines()  # a broken download has thousands; the message stops at some
    return error.problems if isinstance(error, plan.PlanError) else [str(error)]


# --- the checks ---------------------------------------------------------------------------------------------------


def check(
    given: Arguments, mistyped: Mapping[str, str], *, default_name: str, progress: Callable[[int, int], None]
) -> Flight:
    """All checks, cheap ones first; frames are decoded last. Raises InputError with everything found.

    `mistyped` is from `arguments.parse`: with any, nothing is planned, since the plan may lack just what they say.
    """
    surveyed = survey(given, mistyped, default_name=default_name)
    try:
        return _packed(surveyed, progress)
    except ValueError as error:
        raise InputError(list(_sentences(error))) from error


def survey(given: Arguments, mistyped: Mapping[str, str], *, default_name: str) -> Survey:
    """The cheap checks alone; nothing is written. Raises InputError with everything found."""
    planned = _planned(given, mistyped, name=given.name or default_name)
    try:
        resuming.check(planned)
        return replace(planned, draft=rehearsal.rehearse(planned, _settings(planned.choices)))
    except ValueError as error:
        raise InputError(list(_sentences(error))) from error


def _planned(given: Arguments, mistyped: Mapping[str, str], *, name: str) -> Survey:
    """The checks that do not need each other; nothing is drawn as yet. InputError with all that they found."""
    problems = _Problems(list(mistyped.values()))
    folder = problems.attempt(lambda: _folder(given, name))
    earlier = (
        problems.attempt(lambda: resuming.find(given, folder, name)) if folder and "name" not in mistyped else None
    )
    choices = problems.attempt(lambda: resuming.continued(given, earlier)) if earlier else None
    choices = choices or choose(given, default_data=os.environ.get(DATASET_VARIABLE) or STREETS)
    space = problems.attempt(lambda: spaces.load(choices.space))
    if space:
        problems.found += flag_rules.kind_problems(given, choices, space)
    rows = problems.attempt(lambda: _rows(space, choices)) if space else None
    problems.found += flag_rules.plan_problems(given)
    problems.attempt(lambda: _check_precision(choices.precision, given))
    backbone_digest = problems.attempt(lambda: _check_backbone(choices.backbone, may_fetch=not given.plan))
    source = problems.attempt(lambda: frames.source_of(choices.data))
    facts = problems.attempt(lambda: frames.facts_of(source)) if source else None
    runs = None
    if rows is not None and facts and not mistyped:
        runs = problems.attempt(partial(_plan, rows, choices, facts))
    if problems.found:
        raise InputError(problems.found)
    assert folder and space and backbone_digest and source and facts and runs is not None  # noqa: PT018
    return Survey(
        name=name,
        folder=folder,
        arguments=given,
        choices=choices,
        limits=resuming.limits(given, earlier, space),
        space=space,
        runs=runs,
        source=source,
        facts=facts,
        cache_dir=frames.cache_dir(),
        backbone_digest=backbone_digest,
        earlier=earlier,
    )


def _packed(survey: Survey, progress: Callable[[int, int], None]) -> Flight:
    """The checks that need frames, which are packed. ValueError with the first mistake."""
    shared = frames.shared_place(Storage.at(survey.arguments.storage), survey.choices.data)
    runs = survey.draft.runs if survey.draft else survey.runs
    packs = frames.pack(survey.source, runs, progress, cache_dir=survey.cache_dir, shared=shared)
    digests = frames.digests(packs)
    if survey.earlier:
        resuming.check_same_data(digests, survey.earlier)
    sampling = rehearsal.prepare(survey, survey.draft, digests) if survey.draft else None
    return Flight(survey=survey, packs=packs, sampling=sampling, shared_packs=shared)


# --- where it is kept -----------------------------------------------------------------------------------------------


def _folder(arguments: Arguments, name: str) -> Storage:
    """The search's folder, whose storage can be written to. A person waits for this, so it is not waited for long."""
    storage = Storage.at(arguments.storage, hurried=True)
    only_read = arguments.plan and storage.local_path is None  # there, checking is writing
    try:
        if only_read:
            _check_bucket(storage)
        else:
            storage.check_writable()
    except OSError as error:
        verb = "read" if only_read else "written to"
        raise ValueError(f"--storage {arguments.storage} cannot be {verb}: {error}") from error
    return Storage.at(arguments.storage) / name


def _check_bucket(storage: Storage) -> None:
    """FileNotFoundError if there is none: below one, folders come into being with the first file."""
    bucket = storage.path.partition("/")[0]
    if storage.filesystem.get_file_info(bucket).type == FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {bucket}")


# --- rows -----------------------------------------------------------------------------------------------------------


def _rows(space: spaces.Space, choices: Choices) -> list[tuple[Run, ...]]:
    """The declared rows of each part."""
    return [spaces.select(space, part.runs) for part in choices.parts]


def _plan(rows: list[tuple[Run, ...]], choices: Choices, facts: plan.DataFacts) -> tuple[Run, ...]:
    """The runs of all parts, each once, in the order in which they were asked for."""
    runs = [
        run
        for declared, part in zip(rows, choices.parts, strict=True)
        for run in plan.plan_runs(declared, replace(_settings(choices), seeds=part.seeds), facts)
    ]
    return tuple({(run.name, run.seed): run for run in runs}.values())


def _settings(choices: Choices) -> plan.Settings:
    return plan.Settings(
        num_epochs=choices.epochs,
        max_epochs=STREETS_EPOCHS if choices.data == STREETS else None,
        image_size=choices.image_size,
        proxy=choices.proxy,
    )


# --- weights and device ---------------------------------------------------------------------------------------------


def _check_backbone(name: str, *, may_fetch: bool) -> str:
    """Fetch or read the weights once, now; their digest. Without any, torch is not even imported."""
    if name == NO_BACKBONE:
        return NO_BACKBONE
    from tune_bisenet import backbone

    if may_fetch or name != backbone.IMAGENET:
        backbone.load(name)
    return backbone.digest(name)


def _check_precision(precision: Precision, arguments: Arguments) -> None:
    """bf16 on a CPU that has no instructions for it is ten times slower than fp32, not faster."""
    elsewhere = arguments.address is not None or arguments.gpus is not None
    on_gpu = arguments.gpus_per_trial != 0 and (elsewhere or Path("/dev/nvidiactl").exists())
    if precision == "bf16" and not on_gpu and not _cpu_has_bf16():
        raise ValueError("--precision bf16: this machine has no GPU, and its CPU no bf16 instructions. Use fp32 here.")


def _cpu_has_bf16() -> bool:
    try:
        return "avx512_bf16" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
