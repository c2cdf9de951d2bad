"""Everything that can be wrong is found here, before the first trial, and reported together.

`check` turns the command line into a `Flight`: rows, data packed on this node, weights at hand, a folder to write to.
`survey` finds what can be found without decoding a frame, fetching weights or writing anything: enough for a plan.
"""

import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from pyarrow.fs import FileSelector, FileType

from tune_bisenet import spaces
from tune_bisenet.config import Precision, Run, TrialContext, format_size
from tune_bisenet.data.catalog import check_reachable, open_source
from tune_bisenet.data.packed import Packed, Size, suggested_image_size
from tune_bisenet.data.packing import prepare
from tune_bisenet.data.sharing import PACKS
from tune_bisenet.data.source import DataError, Source
from tune_bisenet.options import (
    DEFAULT_TRIALS,
    NO_BACKBONE,
    STREETS,
    STUDY_VARIABLE,
    InputError,
    Limits,
    Options,
    SearchConfig,
    asked_for,
    resolve_options,
)
from tune_bisenet.records import KNOWN, RUN, Known, TrialSpec
from tune_bisenet.report.read import read_search
from tune_bisenet.search import state
from tune_bisenet.spaces import DataFacts, RowOverrides, Sampled, Space
from tune_bisenet.storage import HIDDEN, Storage, StorageError, redact
from tune_bisenet.study import sampling, warm
from tune_bisenet.study.place import StudyPlace, study_place
from tune_bisenet.study.sampling import Point
from tune_bisenet.study.study import Question

CACHE_VARIABLE: Final = "TUNE_BISENET_CACHE"

Packs = dict[Size, Packed]
"""By image size."""


def source_of(data: str) -> Source:
    """What `--data` names."""
    check_reachable(data)
    try:
        return open_source(data)
    except StorageError as error:
        raise DataError([f"--data {data} cannot be read: {error}"]) from error


def facts_of(source: Source) -> DataFacts:
    return DataFacts(
        num_train=len(source.names("train")),
        num_val=len(source.names("val")),
        suggested_image_size=suggested_image_size(source.frame_size),
    )


def cache_dir() -> Path:
    """Where each node keeps packs."""
    cache = os.environ.get(CACHE_VARIABLE)
    return Path(cache).expanduser().absolute() if cache else Path.home() / ".cache" / "tune_bisenet"


def shared_packs_folder(storage: Storage, data: str) -> Storage | None:
    """Beside the searches in object storage. The built-in streets are drawn faster than fetched."""
    return None if storage.local_path or data == STREETS else storage / PACKS


def pack_frames(
    source: Source,
    runs: Sequence[Run],
    progress: Callable[[int, int], None],
    *,
    cache_dir: Path,
    shared: Storage | None,
) -> Packs:
    """At every size that the runs are trained at."""
    sizes = sorted({run.image_size for run in runs})
    pack_at = partial(prepare, source, cache_dir=cache_dir, progress=progress, shared=shared)
    try:
        return {size: pack_at(image_size=size) for size in sizes}
    except StorageError as error:
        raise ValueError(f"{error}. Frames that are packed by then must be packed again.") from error
    except OSError as error:
        raise ValueError(
            f"frames cannot be packed into {cache_dir} ({error}). Set {CACHE_VARIABLE} to a folder on a disk with room."
        ) from error


def pack_digests(packs: Packs) -> dict[str, str]:
    """Of what is packed, by image size in words."""
    return {format_size(size): pack.digest for size, pack in packs.items()}


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A space that has been drawn from."""

    question: Question
    points: tuple[Point, ...]
    """Drawn at random."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The declared rows, and runs such as the search may draw."""
        return (*(run for run, _point in self.question.rows.values()), *self.drawn)

    @property
    def drawn(self) -> tuple[Run, ...]:
        return tuple(point.run for point in self.points)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A search that has nothing wrong with it, as far as one sees without decoding a frame."""

    name: str
    folder: Storage
    arguments: Options
    choices: SearchConfig
    limits: Limits
    space: Space
    runs: tuple[Run, ...]
    """All trials of a grid; the declared rows that a sampled search begins with."""
    source: Source
    facts: spaces.DataFacts
    cache_dir: Path
    backbone_digest: str
    earlier: dict[str, Any] | None
    """The manifest of the search that is resumed."""
    draft: Draft | None = None
    """Of a sampled search."""

    @property
    def drawn(self) -> tuple[Run, ...]:
        """Such as a sampled search may draw; empty for a grid."""
        return self.draft.drawn if self.draft else ()

    @property
    def example(self) -> Run:
        """A run such as this search trains."""
        return self.drawn[0] if self.draft else self.runs[0]

    @property
    def num_trials(self) -> int | None:
        """How many there will be, as far as it is known."""
        return self.limits.trials if self.draft else len(self.runs)

    @property
    def captions(self) -> list[str]:
        """What every table of this search must say."""
        return [spaces.proxy_caption(self.example, self.facts)] if self.choices.proxy else []


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sampled search goes by, and goes on from."""

    question: Question
    suggested: Mapping[str, TrialSpec]
    """The trials that it has had already, by number; fresh seeds last."""
    known: tuple[Known, ...]
    left_out: Mapping[str, str]
    """Trials of `--warm-start` that are not known here, and why."""
    place: StudyPlace


@dataclass(frozen=True, kw_only=True)
class PreparedSearch:
    """A search that has nothing wrong with it, ready for resources."""

    survey: Survey
    packs: Packs
    sampling: Sampling | None
    """Of a sampled search."""
    shared_packs: Storage | None = None
    """Where nodes find the packs of this one; None if each packs for itself."""

    def job(self, *, cpus_per_trial: int, use_gpu: bool) -> TrialContext:
        """What each trial is told besides its run."""
        survey, choices = self.survey, self.survey.choices
        return TrialContext(
            data=choices.data,
            packs={format_size(size): str(pack.path) for size, pack in self.packs.items()},
            data_digests=pack_digests(self.packs),
            shared_packs=self.shared_packs.uri if self.shared_packs else None,
            cache_dir=str(survey.cache_dir),
            backbone=choices.backbone,
            backbone_digest=survey.backbone_digest,
            precision=choices.precision,
            storage=survey.folder.uri,
            cpus_per_trial=cpus_per_trial,
            use_gpu=use_gpu,
            default_seed=choices.default_seed,
            measures_latency="latency" in choices.objectives,
        )


def find_search(given: Options, folder: Storage, name: str) -> dict[str, Any] | None:
    """The manifest of the search that is gone on with; None for a new one."""
    if given.continues and given.name is None:
        raise ValueError("--resume, --add and --rerun need the --name of the search to go on with.")
    earlier = state.read_manifest(folder)
    if given.continues and earlier is None:
        raise ValueError(f"there is no search {name} in {given.storage} to go on with. Check --name and --storage.")
    if earlier is not None and not given.continues:
        raise ValueError(
            f"there is a search {name} in {given.storage} already. "
            "Go on with it by --resume, give it more trials by --add, or take another --name."
        )
    return earlier


def restore_config(given: Options, earlier: dict[str, Any]) -> SearchConfig:
    """The choices of the search that is resumed or added to. ValueError if a flag asks for something else."""
    before = SearchConfig.model_validate(earlier["choices"])
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


def resolve_limits(given: Options, earlier: dict[str, Any] | None, space: Space) -> Limits:
    """What is said now, or was when the search was started; a sampled search needs one of them."""
    said = Limits.model_validate((earlier or {}).get("limits") or {}).updated(given)
    bounded = (said.trials, said.time_budget, said.gpu_hours) != (None, None, None)
    if isinstance(space, Sampled) and not bounded:
        return said.model_copy(update={"trials": DEFAULT_TRIALS})
    return said


def check_unchanged(planned: Survey) -> None:
    """ValueError if there is nothing to go on with, or other rows than before."""
    if planned.earlier:
        _check_something_to_do(planned, planned.earlier)
        _check_same_rows(planned.runs, planned.earlier)


def check_same_data(digests: Mapping[str, str], earlier: dict[str, Any]) -> None:
    """`digests` are of the packs that there are now."""
    before = earlier["data"]["digests"]
    if any(before.get(size, digest) != digest for size, digest in digests.items()):
        raise ValueError(
            f"the frames in {earlier['data']['name']} have changed since this search was started. "
            "Bring them back to resume it, or start another under another --name."
        )


def _check_something_to_do(planned: Survey, earlier: dict[str, Any]) -> None:
    """ValueError if `--add` names nothing new, or `--rerun` a row of which nothing has failed."""
    given = planned.arguments
    known = {(run["name"], run["seed"]) for run in earlier["trials"].values()}
    if given.add and all((run.name, run.seed) in known for run in planned.runs):
        raise ValueError("--add: this search has all these rows and seeds already. Name seeds or rows that are new.")
    standings = state.read_trials(planned.folder).standings
    failed = {standing.run for standing in standings if standing.status == "failed"}
    sound = [name for name in given.rerun or () if name not in failed]
    if sound:
        raise ValueError(
            f"--rerun {', '.join(sound)}: nothing of that has failed. "
            + (f"What has: {', '.join(sorted(failed))}." if failed else "Nothing has, in this search.")
        )


def _check_same_rows(runs: Collection[Run], earlier: dict[str, Any]) -> None:
    """A row edited since would go on under the old one's name and results. What is expected of it may be edited."""
    before = {(run["name"], run["seed"]): Run.model_validate(run).fingerprint() for run in earlier["trials"].values()}
    changed = {run.name for run in runs if before.get((run.name, run.seed), run.fingerprint()) != run.fingerprint()}
    if changed:
        raise ValueError(
            f"the space says other things of {', '.join(sorted(changed))} than when this search was started. "
            "Bring the rows back to resume it, or start another search under another --name."
        )


def plan_problems(given: Options) -> list[str]:
    """Flags that mean nothing for this search, or this plan."""
    problems = []
    if given.gpus is not None and not given.plan:
        problems.append("--gpus is for --plan: a search takes the GPUs that are there. --max-concurrent bounds them.")
    if given.gpus is not None and given.address is not None:
        problems.append("--gpus and --address: plan for a cluster that is there, or for one that is not, not both.")
    if given.gpus is not None and given.gpus_per_trial == 0:
        problems.append("--gpus-per-trial 0 uses none of the --gpus that are planned for. Leave one out.")
    return problems


def kind_problems(given: Options, choices: SearchConfig, space: spaces.Space) -> list[str]:
    """Flags that mean nothing, or something else, for this kind of space."""
    if isinstance(space, spaces.Sampled):
        return _sampled_problems(given, choices)
    flags = ("trials", "sampler", "objectives", "warm_start", "study", "confirm")
    asked = [f"--{flag.replace('_', '-')}" for flag in flags if getattr(given, flag) is not None]
    return (
        [f"{', '.join(asked)}: {choices.space} is a grid of declared rows, not a space to sample from."]
        if asked
        else []
    )


def _sampled_problems(given: Options, choices: SearchConfig) -> list[str]:
    problems = sampling.sampler_problems(choices.sampler, choices.objectives)
    if len(choices.parts[0].seeds) > 1:
        problems.append("--seeds: a sampled search has one seed. --confirm K trains its best with K fresh ones.")
    if given.add:
        problems.append("--add is for a grid. Give a sampled search more trials by --resume --trials N.")
    if given.rerun is not None:
        problems.append("--rerun is for a grid. A sampled search tries again what failed when it is resumed.")
    if len(choices.objectives) > 1 and choices.scheduler != "fifo":
        problems.append(
            f"--scheduler {choices.scheduler} stops by mIoU alone, and would stop the fast before they are seen: "
            f"with --objectives {','.join(choices.objectives)} use fifo."
        )
    return problems


def draft_study(survey: Survey, settings: RowOverrides) -> Draft | None:
    """Draw the rows, as they will be trained, and many points besides; None for a grid, of which nothing is drawn."""
    space, choices = survey.space, survey.choices
    if not isinstance(space, Sampled):
        return None
    sampling.check_rows(space)
    seed = choices.parts[0].seeds[0]
    draw = sampling.draw_with(space, settings, survey.facts, choices.objectives)
    declared = {row.name: row for row in space.rows}
    rows = {
        run.name: (run, sampling.point_of(declared[run.name], space, draw, choices.objectives)) for run in survey.runs
    }
    question = Question(draw=draw, rows=rows, objectives=choices.objectives, sampler=choices.sampler, seed=seed)
    return Draft(question=question, points=tuple(sampling.rehearse(draw, seed=seed)))


def prepare_study(survey: Survey, draft: Draft, data_digests: Mapping[str, str]) -> Sampling:
    """Everything else. ValueError with the first thing that is wrong: the database, the earlier search, the space."""
    given, choices, is_new = survey.arguments, survey.choices, survey.earlier is None
    place = study_place(survey.folder, url=_study_url(given, choices), cache_dir=survey.cache_dir)
    place.check(survey.name, is_new=is_new)
    suggested = {} if is_new else read_suggested(survey.folder)
    _check_same_draws(suggested, draft.question)
    here = warm.Here(
        draw=draft.question.draw,
        rows=draft.question.rows,
        data_digests=data_digests,
        backbone_digest=survey.backbone_digest,
        precision=choices.precision,
        objectives=choices.objectives,
    )
    taken = _known(survey.folder, given.warm_start or choices.warm_start, here)
    return Sampling(
        question=draft.question, suggested=suggested, known=taken.known, left_out=taken.left_out, place=place
    )


def _study_url(given: Options, choices: SearchConfig) -> str | None:
    """With its password, which only the command line or the environment has; None for a file of the search's own."""
    address = given.study or choices.study
    if address is None or HIDDEN not in address:
        return address
    variable = os.environ.get(STUDY_VARIABLE)
    if variable is not None and redact(variable) == address:
        return variable
    raise ValueError(
        f"the study lies in {address}, and nothing of its password is kept. "
        f"Give the address with its password by --study, or in ${STUDY_VARIABLE}."
    )


def _known(folder: Storage, warm_start: str | None, here: warm.Here) -> warm.Taken:
    """As it was taken over when the search began, or now."""
    content = folder.read(KNOWN)
    if content is not None:
        return warm.Taken(known=tuple(Known.from_json(record) for record in json.loads(content)), left_out={})
    if warm_start is None:
        return warm.Taken(known=(), left_out={})
    return warm.take_over(read_search(Storage.at(warm_start)), here)


# --- the trials it has had ------------------------------------------------------------------------------------------


def read_suggested(folder: Storage) -> dict[str, TrialSpec]:
    """Of every trial in the search's folder that says what it trains, by number; fresh seeds last.

    A damaged file is passed over: the study still has the trial, and the file is written anew from it.
    """
    places = [
        info for info in folder.filesystem.get_file_info(FileSelector(folder.path)) if info.type == FileType.Directory
    ]
    found = [one for place in places if (one := _read_run(folder / place.base_name)) is not None]
    in_order = sorted(found, key=lambda one: (one.number is None, one.number or 0, one.trial))
    return {one.trial: one for one in in_order}


def _read_run(folder: Storage) -> TrialSpec | None:
    try:
        content = folder.read(RUN)
        return None if content is None else TrialSpec.from_json(json.loads(content))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _check_same_draws(suggested: Mapping[str, TrialSpec], question: Question) -> None:
    """A space edited since would draw other runs from the values that its trials were drawn with."""
    changed = [name for name, one in suggested.items() if one.params and not _is_drawn(one, question)]
    if changed:
        raise ValueError(
            f"the space draws other runs than when this search was started, as of {', '.join(changed[:3])}. "
            "Bring it back to resume the search, or start another under another --name."
        )


def _is_drawn(suggested: TrialSpec, question: Question) -> bool:
    try:
        drawn = sampling.point_at(suggested.params, question.draw).run
    except Exception:  # the space is the user's own code
        return False
    return drawn.model_copy(update={"seed": suggested.run.seed}).fingerprint() == suggested.run.fingerprint()


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
    return error.problems if isinstance(error, spaces.PlanError) else [str(error)]


# --- the checks ---------------------------------------------------------------------------------------------------


def prepare_search(
    given: Options, mistyped: Mapping[str, str], *, default_name: str, progress: Callable[[int, int], None]
) -> PreparedSearch:
    """All checks, cheap ones first; frames are decoded last. Raises InputError with everything found.

    `mistyped` is from `arguments.parse`: with any, nothing is planned, since the plan may lack just what they say.
    """
    surveyed = survey_search(given, mistyped, default_name=default_name)
    try:
        return _packed(surveyed, progress)
    except ValueError as error:
        raise InputError(list(_sentences(error))) from error


def survey_search(given: Options, mistyped: Mapping[str, str], *, default_name: str) -> Survey:
    """The cheap checks alone; nothing is written. Raises InputError with everything found."""
    planned = _planned(given, mistyped, name=given.name or default_name)
    try:
        check_unchanged(planned)
        return replace(planned, draft=draft_study(planned, _settings(planned.choices)))
    except ValueError as error:
        raise InputError(list(_sentences(error))) from error


def _planned(given: Options, mistyped: Mapping[str, str], *, name: str) -> Survey:
    """The checks that do not need each other; nothing is drawn as yet. InputError with all that they found."""
    problems = _Problems(list(mistyped.values()))
    folder = problems.attempt(lambda: _folder(given, name))
    earlier = problems.attempt(lambda: find_search(given, folder, name)) if folder and "name" not in mistyped else None
    choices = problems.attempt(lambda: restore_config(given, earlier)) if earlier else None
    choices = choices or resolve_options(given, default_data=os.environ.get(DATASET_VARIABLE) or STREETS)
    space = problems.attempt(lambda: spaces.load_space(choices.space))
    if space:
        problems.found += kind_problems(given, choices, space)
    rows = problems.attempt(lambda: _rows(space, choices)) if space else None
    problems.found += plan_problems(given)
    problems.attempt(lambda: _check_precision(choices.precision, given))
    backbone_digest = problems.attempt(lambda: _check_backbone(choices.backbone, may_fetch=not given.plan))
    source = problems.attempt(lambda: source_of(choices.data))
    facts = problems.attempt(lambda: facts_of(source)) if source else None
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
        limits=resolve_limits(given, earlier, space),
        space=space,
        runs=runs,
        source=source,
        facts=facts,
        cache_dir=cache_dir(),
        backbone_digest=backbone_digest,
        earlier=earlier,
    )


def _packed(survey: Survey, progress: Callable[[int, int], None]) -> PreparedSearch:
    """The checks that need frames, which are packed. ValueError with the first mistake."""
    shared = shared_packs_folder(Storage.at(survey.arguments.storage), survey.choices.data)
    runs = survey.draft.runs if survey.draft else survey.runs
    packs = pack_frames(survey.source, runs, progress, cache_dir=survey.cache_dir, shared=shared)
    digests = pack_digests(packs)
    if survey.earlier:
        check_same_data(digests, survey.earlier)
    sampling = prepare_study(survey, survey.draft, digests) if survey.draft else None
    return PreparedSearch(survey=survey, packs=packs, sampling=sampling, shared_packs=shared)


# --- where it is kept -----------------------------------------------------------------------------------------------


def _folder(arguments: Options, name: str) -> Storage:
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


def _rows(space: spaces.Space, choices: SearchConfig) -> list[tuple[Run, ...]]:
    """The declared rows of each part."""
    return [spaces.select_rows(space, part.runs) for part in choices.parts]


def _plan(rows: list[tuple[Run, ...]], choices: SearchConfig, facts: spaces.DataFacts) -> tuple[Run, ...]:
    """The runs of all parts, each once, in the order in which they were asked for."""
    runs = [
        run
        for declared, part in zip(rows, choices.parts, strict=True)
        for run in spaces.resolve_runs(declared, replace(_settings(choices), seeds=part.seeds), facts)
    ]
    return tuple({(run.name, run.seed): run for run in runs}.values())


def _settings(choices: SearchConfig) -> spaces.RowOverrides:
    return spaces.RowOverrides(
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
    from tune_bisenet.training import checkpoint

    if may_fetch or name != checkpoint.IMAGENET:
        checkpoint.load_backbone(name)
    return checkpoint.backbone_digest(name)


def _check_precision(precision: Precision, arguments: Options) -> None:
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
