"""Everything that can be wrong is found here, before the first trial, and reported together.

`check` turns the command line into a `Flight`: rows, data packed on this node, weights at hand, a folder to write to.
`survey` finds what can be found without decoding a frame, fetching weights or writing anything: enough for a plan.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from pyarrow.fs import FileType

from tune_bisenet import flag_rules, ledger, plan, rehearsal, spaces
from tune_bisenet.arguments import (
    DEFAULT_TRIALS,
    NO_BACKBONE,
    STREETS,
    Arguments,
    Choices,
    InputError,
    Limits,
    asked_for,
    choose,
)
from tune_bisenet.config import Precision, Run, size_words
from tune_bisenet.data.catalog import check_reachable, open_source
from tune_bisenet.data.packed import Packed, suggested_image_size
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.sharing import PACKS
from tune_bisenet.data.source import DataError, Source
from tune_bisenet.flight import Flight, Survey
from tune_bisenet.outages import StorageError
from tune_bisenet.rehearsal import Draft, Sampling
from tune_bisenet.storage import Storage

STREETS_EPOCHS: Final = 8
"""Enough on the built-in streets for mIoU to rise clearly, few enough for a first try on two cores."""

DATASET_VARIABLE: Final = "CITYSCAPES_DATASET"
CACHE_VARIABLE: Final = "TUNE_BISENET_CACHE"

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


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """What is asked for, and can be had as far as one sees without decoding a frame."""

    given: Arguments
    name: str
    folder: Storage
    earlier: dict[str, Any] | None
    choices: Choices
    limits: Limits
    space: spaces.Space
    backbone_digest: str
    source: Source
    facts: plan.DataFacts
    runs: tuple[Run, ...]


def check(
    given: Arguments, mistyped: Mapping[str, str], *, default_name: str, progress: Callable[[int, int], None]
) -> Flight:
    """All checks, cheap ones first; frames are decoded last. Raises InputError with everything found.

    `mistyped` is from `arguments.parse`: with any, nothing is planned, since the plan may lack just what they say.
    """
    planned = _planned(given, mistyped, name=given.name or default_name)
    try:
        return _ready(planned, progress)
    except ValueError as error:
        raise InputError(list(_sentences(error))) from error


def survey(given: Arguments, mistyped: Mapping[str, str], *, default_name: str) -> Survey:
    """The cheap checks alone; nothing is written. Raises InputError with everything found."""
    planned = _planned(given, mistyped, name=given.name or default_name)
    try:
        if planned.earlier:
            _check_something_to_do(planned, planned.earlier)
            _check_same_rows(planned.runs, planned.earlier)
        draft = _rehearsed(planned)
    except ValueError as error:
        raise InputError(list(_sentences(error))) from error
    return Survey(
        name=planned.name,
        folder=planned.folder,
        arguments=given,
        choices=planned.choices,
        limits=planned.limits,
        space=planned.space,
        runs=planned.runs,
        drawn=tuple(point.run for point in draft.points) if draft else (),
        facts=planned.facts,
        source=planned.source,
        cache_dir=_cache_dir(),
    )


def _planned(given: Arguments, mistyped: Mapping[str, str], *, name: str) -> _Plan:
    """The cheap checks, which do not need each other. InputError with all that they found."""
    problems = _Problems(list(mistyped.values()))
    folder = problems.attempt(lambda: _folder(given, name))
    earlier = problems.attempt(lambda: _earlier(given, folder, name)) if folder and "name" not in mistyped else None
    choices = problems.attempt(lambda: _continued(given, earlier)) if earlier else None
    choices = choices or choose(given, default_data=os.environ.get(DATASET_VARIABLE) or STREETS)
    space = problems.attempt(lambda: spaces.load(choices.space))
    if space:
        problems.found += flag_rules.kind_problems(given, choices, space)
    rows = problems.attempt(lambda: _rows(space, choices)) if space else None
    problems.found += flag_rules.plan_problems(given)
    problems.attempt(lambda: _check_precision(choices.precision, given))
    backbone_digest = problems.attempt(lambda: _check_backbone(choices.backbone, may_fetch=not given.plan))
    source = problems.attempt(lambda: _source(choices.data))
    facts = problems.attempt(lambda: _facts(source)) if source else None
    runs = None
    if rows is not None and facts and not mistyped:
        runs = problems.attempt(partial(_plan, rows, choices, facts))
    if problems.found:
        raise InputError(problems.found)
    assert folder and space and backbone_digest and source and facts and runs is not None  # noqa: PT018
    return _Plan(
        given=given,
        name=name,
        folder=folder,
        earlier=earlier,
        choices=choices,
        limits=_limits(given, earlier, space),
        space=space,
        backbone_digest=backbone_digest,
        source=source,
        facts=facts,
        runs=runs,
    )


def _ready(planned: _Plan, progress: Callable[[int, int], None]) -> Flight:
    """The checks that build on one another, up to frames that are packed. ValueError with the first mistake."""
    earlier = planned.earlier
    if earlier:
        _check_something_to_do(planned, earlier)
        _check_same_rows(planned.runs, earlier)
    draft = _rehearsed(planned)
    shared = _shared_packs(planned.given, planned.choices)
    packs = _pack(planned.source, draft.runs if draft else planned.runs, progress, shared)
    if earlier:
        _check_same_data(packs, earlier)
    return Flight(
        name=planned.name,
        folder=planned.folder,
        arguments=planned.given,
        choices=planned.choices,
        limits=planned.limits,
        space=planned.space,
        runs=planned.runs,
        facts=planned.facts,
        packs=packs,
        cache_dir=_cache_dir(),
        backbone_digest=planned.backbone_digest,
        earlier=earlier,
        sampling=_sampling(planned, draft, packs) if draft else None,
        shared_packs=shared,
    )


def _rehearsed(planned: _Plan) -> Draft | None:
    """Of a sampled space; None for a grid."""
    if not isinstance(planned.space, spaces.Sampled):
        return None
    return rehearsal.rehearse(planned.space, planned.runs, planned.choices, _settings(planned.choices), planned.facts)


def _sampling(planned: _Plan, draft: Draft, packs: dict[tuple[int, int], Packed]) -> Sampling:
    return rehearsal.prepare(
        draft,
        planned.given,
        planned.choices,
        name=planned.name,
        folder=planned.folder,
        is_new=planned.earlier is None,
        data_digests=_digests(packs),
        backbone_digest=planned.backbone_digest,
        cache_dir=_cache_dir(),
    )


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


def _shared_packs(arguments: Arguments, choices: Choices) -> Storage | None:
    """Beside the searches in object storage. The built-in streets are drawn faster than fetched."""
    storage = Storage.at(arguments.storage)
    return None if storage.local_path or choices.data == STREETS else storage / PACKS


def _source(data: str) -> Source:
    check_reachable(data)
    try:
        return open_source(data)
    except StorageError as error:
        raise DataError([f"--data {data} cannot be read: {error}"]) from error


def _check_bucket(storage: Storage) -> None:
    """FileNotFoundError if there is none: below one, folders come into being with the first file."""
    bucket = storage.path.partition("/")[0]
    if storage.filesystem.get_file_info(bucket).type == FileType.NotFound:
        raise FileNotFoundError(f"there is no bucket {bucket}")


def _earlier(arguments: Arguments, folder: Storage, name: str) -> dict[str, Any] | None:
    if arguments.continues and arguments.name is None:
        raise ValueError("--resume, --add and --rerun need the --name of the search to go on with.")
    earlier = ledger.read_search(folder)
    if arguments.continues and earlier is None:
        raise ValueError(f"there is no search {name} in {arguments.storage} to go on with. Check --name and --storage.")
    if earlier is not None and not arguments.continues:
        raise ValueError(
            f"there is a search {name} in {arguments.storage} already. "
            "Go on with it by --resume, give it more trials by --add, or take another --name."
        )
    return earlier


def _continued(given: Arguments, earlier: dict[str, Any]) -> Choices:
    """The choices of the search that is resumed or added to. ValueError if a flag asks for something else."""
    before = Choices.model_validate(earlier["choices"])
    changed = [name for name, value in asked_for(given).items() if value != getattr(before, name)]
    if not given.add:
        first = before.parts[0]
        changed += ["runs"] if given.runs not in (None, first.runs) else []
        changed += ["seeds"] if given.seeds not in (None, first.seeds) else []
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(
            f"{flags} differs from what this search was started with. Leave it out to resume the search, "
            "give the search more trials by --add, or start another under another --name."
        )
    return before.with_part(runs=given.runs, seeds=given.seeds) if given.add else before


def _check_same_rows(runs: tuple[Run, ...], earlier: dict[str, Any]) -> None:
    """A row edited since would go on under the old one's name and results. What is expected of it may be edited."""
    before = {(run["name"], run["seed"]): Run.model_validate(run).fingerprint() for run in earlier["trials"].values()}
    changed = {run.name for run in runs if before.get((run.name, run.seed), run.fingerprint()) != run.fingerprint()}
    if changed:
        raise ValueError(
            f"the space says other things of {', '.join(sorted(changed))} than when this search was started. "
            "Bring the rows back to resume it, or start another search under another --name."
        )


def _check_same_data(packs: dict[tuple[int, int], Packed], earlier: dict[str, Any]) -> None:
    digests = _digests(packs)
    before = earlier["data"]["digests"]
    if any(before.get(size, digest) != digest for size, digest in digests.items()):
        raise ValueError(
            f"the frames in {earlier['data']['name']} have changed since this search was started. "
            "Bring them back to resume it, or start another search under another --name."
        )


def _digests(packs: dict[tuple[int, int], Packed]) -> dict[str, str]:
    return {size_words(size): pack.digest for size, pack in packs.items()}


def _limits(given: Arguments, earlier: dict[str, Any] | None, space: spaces.Space) -> Limits:
    """What is said now, or was when the search was started; a sampled search needs one of them."""
    limits = Limits.model_validate((earlier or {}).get("limits") or {}).updated(given)
    bounded = (limits.trials, limits.time_budget, limits.gpu_hours) != (None, None, None)
    if isinstance(space, spaces.Sampled) and not bounded:
        return limits.model_copy(update={"trials": DEFAULT_TRIALS})
    return limits


def _check_something_to_do(planned: _Plan, earlier: dict[str, Any]) -> None:
    """ValueError if `--add` names nothing new, or `--rerun` a row of which nothing has failed."""
    given = planned.given
    known = {(run["name"], run["seed"]) for run in earlier["trials"].values()}
    if given.add and all((run.name, run.seed) in known for run in planned.runs):
        raise ValueError("--add: this search has all these rows and seeds already. Name seeds or rows that are new.")
    standings = ledger.read_trials(planned.folder).standings
    failed = {standing.run for standing in standings if standing.status == "failed"}
    sound = [name for name in given.rerun or () if name not in failed]
    if sound:
        raise ValueError(
            f"--rerun {', '.join(sound)}: nothing of that has failed. "
            + (f"What has: {', '.join(sorted(failed))}." if failed else "Nothing has, in this search.")
        )


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


def _pack(
    source: Source, runs: Sequence[Run], progress: Callable[[int, int], None], shared: Storage | None
) -> dict[tuple[int, int], Packed]:
    sizes = sorted({run.image_size for run in runs})
    cache_dir = _cache_dir()
    pack = partial(prepare, source, cache_dir=cache_dir, progress=progress, shared=shared)
    try:
        return {size: pack(image_size=size) for size in sizes}
    except StorageError as error:
        raise ValueError(f"{error}. Frames that are packed by then must be packed again.") from error
    except OSError as error:
        raise ValueError(
            f"frames cannot be packed into {cache_dir} ({error}). Set {CACHE_VARIABLE} to a folder on a disk with room."
        ) from error


def _facts(source: Source) -> plan.DataFacts:
    return plan.DataFacts(
        num_train=len(source.names("train")),
        num_val=len(source.names("val")),
        suggested_image_size=suggested_image_size(source.frame_size),
    )


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


def _cache_dir() -> Path:
    cache = os.environ.get(CACHE_VARIABLE)
    return Path(cache).expanduser().absolute() if cache else Path.home() / ".cache" / "tune_bisenet"
