"""From options to a checked search: everything that can be wrong is found before the first trial, and told together.

`prepare_search` returns a `PreparedSearch`: rows, data packed on this node, weights at hand, a folder to write to.
`survey_search` does only what needs no frame decoded, no weights fetched and nothing written: enough for `--plan`.
All mistakes are ValueErrors in words for the user; a StorageError says that storage does not answer.
"""

import logging
import os
import resource
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from tune_bisenet import spaces
from tune_bisenet.config import Precision, Run, StepMode, TrialContext, format_size, shared_beginnings, trial_name
from tune_bisenet.data.packed import FrameSize, Packed, suggested_image_size
from tune_bisenet.data.packing import (
    CACHE_VARIABLE,
    PACKS,
    check_labels,
    check_reachable,
    check_room,
    default_cache_dir,
    open_source,
    prepare_packed,
)
from tune_bisenet.data.source import Source
from tune_bisenet.options import (
    DEFAULT_TRIALS,
    NO_BACKBONE,
    STREETS,
    STUDY_VARIABLE,
    InputError,
    Options,
    SearchConfig,
    given_choices,
    make_absolute,
    problems_of,
    resolve_options,
    selected_rows,
)
from tune_bisenet.records import (
    KNOWN,
    DamagedFileError,
    KnownTrials,
    Manifest,
    TrialSpec,
    is_reserved,
    read_manifest,
    read_record,
    read_saved_state,
    read_sound_trials,
)
from tune_bisenet.report.claims import differences
from tune_bisenet.report.read import read_search
from tune_bisenet.report.verdicts import NoiseSummary, judge_search
from tune_bisenet.spaces import DataFacts, Grid, RowOverrides, Sampled, Space
from tune_bisenet.storage import Storage, StorageError, is_refused
from tune_bisenet.study.sampling import SearchSpace, check_rows, sample_at, sampler_problems
from tune_bisenet.study.study import StudySetup, study_database
from tune_bisenet.study.warm_start import warm_start
from tune_bisenet.text import counted, one_line, redact

STREETS_EPOCHS: Final = 8
"""Enough on the built-in streets for mIoU to rise clearly, few enough for a first try on two cores."""

DATASET_VARIABLE: Final = "CITYSCAPES_DATASET"

REACH_SECONDS: Final = 5.0
MIN_OPEN_FILES: Final = 256
"""For a process of Ray. One with two workers was seen to have up to 58 files open (Ray 2.60), and a core adds some."""
MAX_SOCKET_BYTES: Final = 107 if sys.platform == "linux" else 103
"""Of the path of a socket, as the system allows."""

MOVABLE: Final = ("space", "data", "backbone", "warm_start")
"""What a resumed search may find at another place: that it is the same is decided by its content."""

_log = logging.getLogger(__name__)

_RESTORE: Final = "Restore it to resume the search, or start another search under another --name."

_Value = TypeVar("_Value")


@dataclass(frozen=True, kw_only=True)
class PreparedSearch:
    """A search that has nothing wrong with it."""

    name: str
    folder: Storage
    options: Options
    config: SearchConfig
    space: Space
    runs: tuple[Run, ...]
    """All trials of a grid; the declared rows that a sampled search begins with."""
    source: Source
    facts: DataFacts
    cache_dir: Path
    backbone_digest: str
    earlier: Manifest | None
    """The manifest of the search that is resumed."""
    noise: NoiseSummary | None = None
    """The noise of an earlier search, which the forecast goes by; None to assume one."""
    study: StudySetup | None = None
    """What a sampled search samples from; None for a grid."""
    packs: dict[FrameSize, Packed] = field(default_factory=dict)
    """The packed data by image size; empty for a search that is only planned."""
    changes: tuple[str, ...] = ()
    """What has changed since the search was started, in sentences."""
    label_warnings: tuple[str, ...] = ()
    """What is doubtful about the labels; known once they are packed."""
    sharing: str = ""
    """How many trials share a GPU and why, in words, where `--gpus-per-trial auto` decides."""
    shared_packs: Storage | None = None
    """The folder where nodes find the packs of this one; None if each packs for itself."""

    @property
    def example(self) -> Run:
        return self.study.drawn[0] if self.study else self.runs[0]

    @property
    def num_trials(self) -> int | None:
        """Return the number of trials; None if only time or money ends the search."""
        return self.config.limits.trials if self.study else len(self.runs)

    @property
    def specs(self) -> dict[str, TrialSpec]:
        """Return the trials that are known as a session begins, by name."""
        if self.study:
            return dict(self.study.suggested)
        names = {trial_name(run, default_seed=self.config.default_seed): run for run in self.runs}
        return {name: TrialSpec(trial=name, run=run) for name, run in names.items()}

    @property
    def first_threads(self) -> int | None:
        """Return the number of CPU threads that the search's first session gave each trial; None for a new search."""
        return self.earlier.sessions[0].threads_per_trial if self.earlier else None

    @property
    def captions(self) -> list[str]:
        return [spaces.proxy_caption(self.example, self.facts)] if self.config.proxy else []

    def trial_context(self, *, threads_per_trial: int, gpu_share: float) -> TrialContext:
        return TrialContext(
            data=self.config.data,
            packs={format_size(size): str(pack.path) for size, pack in self.packs.items()},
            data_digests=pack_digests(self.packs),
            shared_packs=self.shared_packs.uri if self.shared_packs else None,
            cache_dir=str(self.cache_dir),
            backbone=self.config.backbone,
            backbone_digest=self.backbone_digest,
            precision=self.config.precision,
            storage=self.folder.uri,
            threads_per_trial=threads_per_trial,
            gpu_share=gpu_share,
            deterministic=self.config.deterministic,
            step=self.config.step,
            measures_latency="latency" in self.config.objectives,
            shared_beginnings={} if self.config.no_share else shared_beginnings(self.runs),
        )


def prepare_search(
    options: Options, mistyped: Mapping[str, str], *, default_name: str, progress: Callable[[int, int], None]
) -> PreparedSearch:
    """Check everything, cheap checks first; frames are decoded last. Raises InputError with everything found.

    `mistyped` is from `parse_options`. `progress` is called with the number of frames packed, and of all.
    """
    search = survey_search(options, mistyped, default_name=default_name)
    storage = Storage.at(options.storage)
    # The built-in streets are drawn faster than fetched.
    shared = None if storage.local_path or search.config.data == STREETS else storage / PACKS
    with _input_errors():
        packs = _pack_frames(search, progress, shared=shared)
        label_warnings = check_labels(search.source, next(iter(packs.values())))
        search = replace(search, packs=packs, label_warnings=label_warnings, shared_packs=shared)
        before = search.earlier.data.digests if search.earlier else {}
        if any(before.get(size, digest) != digest for size, digest in pack_digests(packs).items()):
            raise ValueError(
                f"the frames in {search.config.data} have changed since this search was started. "
                "Restore them to resume it, or start another search under another --name."
            )
        return replace(search, study=_add_known_trials(search, search.study)) if search.study else search


def survey_search(options: Options, mistyped: Mapping[str, str], *, default_name: str) -> PreparedSearch:
    """Make the cheap checks alone; nothing is written. Raises InputError with everything found."""
    search = _surveyed(options, mistyped, name=options.name or default_name)
    with _input_errors():
        if search.earlier is None and options.precision is None:
            from tune_bisenet.search.resources import find_bf16  # late, as Ray takes a second

            precision = "bf16" if find_bf16(options) else "fp32"
            search = replace(search, config=search.config.model_copy(update={"precision": precision}))
        recorded = read_specs(search.folder) if search.earlier else {}
        if search.earlier:
            search = replace(search, changes=_check_resumable(search, search.earlier, recorded))
        study, config = _set_up_study(search, recorded), search.config
        if study and config.study is None and not study.database.is_own:  # it comes from $TUNE_BISENET_STUDY
            config = config.model_copy(update={"study": study.database.shown})
        return replace(search, study=study, config=config)


@contextmanager
def _input_errors() -> Iterator[None]:
    """Raise InputError for a user's mistake, and for files and folders that cannot be used; not for outages."""
    try:
        yield
    except OSError as error:
        if isinstance(error, StorageError) and not is_refused(error):
            raise
        raise InputError(str(error) if isinstance(error, StorageError) else one_line(error)) from error
    except ValueError as error:
        raise InputError(*problems_of(error)) from error


def _attempt(problems: list[str], function: Callable[[], _Value]) -> _Value | None:
    """Return what `function` returns; None after a user's mistake, so that it does not hide the next."""
    try:
        with _input_errors():
            return function()
    except InputError as error:
        problems += error.listed
    return None


def _surveyed(options: Options, mistyped: Mapping[str, str], *, name: str) -> PreparedSearch:
    """Make the checks that do not need each other. Rows are not resolved if anything was mistyped: they may need it."""
    problems = list(mistyped.values())
    folder = _attempt(problems, lambda: _check_folder(options, name))
    earlier = None
    if folder and "name" not in mistyped:
        earlier = _attempt(problems, lambda: _find_search(options, folder, name))
    restored = _attempt(problems, lambda: _restore_config(options, earlier)) if earlier else None
    if options.continues and restored is None:  # what follows would be told of another search
        raise InputError(*problems)
    default_data = os.environ.get(DATASET_VARIABLE) or STREETS
    default_data = _attempt(problems, partial(make_absolute, "data", default_data)) or STREETS
    config = restored or resolve_options(options, default_data=default_data)
    space = _attempt(problems, lambda: _load_space(config))
    rows = None
    if space:
        if isinstance(space, Sampled) and config.limits.is_empty:
            limits = config.limits.model_copy(update={"trials": DEFAULT_TRIALS})
            config = config.model_copy(update={"limits": limits})
        rows = _attempt(problems, lambda: _select_rows(space, config, earlier))
    problems += _flag_problems(options, config, space)
    _attempt(problems, lambda: _check_precision(config.precision, options))
    _attempt(problems, lambda: _check_step(config.step, options))
    backbone_digest = _attempt(problems, lambda: _check_backbone(config.backbone, may_fetch=not options.plan))
    data = _attempt(problems, lambda: _open_data(config.data))
    if space and data:
        problems += _measure_problems(space, data[0])
    _attempt(problems, lambda: _check_ray(options))
    needed = {"space": space, "data": data, "backbone": backbone_digest}
    lost = [f"--{name}" for name, value in needed.items() if value is None and getattr(options, name) is None]
    if restored and lost:
        problems.append(f"if it has moved since this search was started, name its place by {' and '.join(lost)}.")
    noise = _attempt(problems, partial(_measured_noise, options.noise_from)) if options.noise_from else None
    packs_dir = _attempt(problems, default_cache_dir)
    runs = None
    if rows is not None and data and not mistyped:
        runs = _attempt(problems, partial(_resolve_runs, rows, config, data[1]))
    if problems:
        raise InputError(*problems)
    assert folder and space and backbone_digest and data and packs_dir and runs is not None  # noqa: PT018
    return PreparedSearch(
        name=name,
        folder=folder,
        options=options,
        config=config,
        space=space,
        runs=runs,
        source=data[0],
        facts=data[1],
        cache_dir=packs_dir,
        backbone_digest=backbone_digest,
        earlier=earlier,
        noise=noise,
    )


def _check_ray(options: Options) -> None:
    """Raise InputError if Ray cannot start on this machine, or within seconds if no cluster answers at --address."""
    if options.address is not None:
        host, separator, port = options.address.rpartition(":")
        try:
            if separator and port.isdigit() and "://" not in host:  # Ray itself retries for minutes
                socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
        except (OSError, OverflowError, UnicodeError) as error:
            raise InputError(
                f"no Ray cluster answers at {options.address} ({error}). `ray start --head` prints the address of one; "
                "leave --address out to use this machine alone."
            ) from error
    elif not options.plan:
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)  # Ray itself raises the other limit to this one
        if most != resource.RLIM_INFINITY and most < MIN_OPEN_FILES:
            raise InputError(
                f"Ray cannot run here: a process may open {most} files at once (ulimit -Hn), and Ray needs at least "
                f"{MIN_OPEN_FILES}. Start this from a shell with a higher limit, such as 8192."
            )
        variable = next((name for name in ("RAY_TMPDIR", "TMPDIR") if name in os.environ), None)
        folder = os.environ[variable] if variable else "/tmp"  # noqa: S108 (as Ray does)
        try:
            Storage.at(f"{folder}/ray").check_writable()
        except (OSError, ValueError) as error:
            raise InputError(
                f"Ray cannot write to {folder}: {error}. Set $RAY_TMPDIR to a folder on a disk."
            ) from error
        session = f"session_2026-12-31_23-59-59_123456_{os.getpid()}"  # as long as Ray's name will be
        socket_path = f"{folder}/ray/{session}/sockets/plasma_store"
        if (excess := len(os.fsencode(socket_path)) - MAX_SOCKET_BYTES) > 0:
            raise InputError(
                f"Ray's sockets cannot lie in {folder}: the path is {counted(excess, 'byte')} too long. "
                "Set $RAY_TMPDIR to a shorter one, such as /tmp."
            )


def _load_space(config: SearchConfig) -> Space:
    """Return the space, with the row of `--control` if that is asked for. Raise InputError for names of files."""
    space = spaces.load_space(config.space)
    if reserved := [row.name for row in space.rows if is_reserved(row.name)]:
        raise InputError(
            *(f"the row {name} is named like a file or folder of a search: choose another name." for name in reserved)
        )
    return spaces.with_control(space) if config.control and isinstance(space, Grid) else space


def _select_rows(space: Space, config: SearchConfig, earlier: Manifest | None) -> list[tuple[Run, ...]]:
    """Return the declared rows of each group. ValueError if a space at another place is not that of the search."""
    groups = [spaces.select_rows(space, group.runs) for group in config.groups]
    if earlier and config.space != earlier.config.space:
        rows, before = {row.name for group in groups for row in group}, {run.name for run in earlier.trials.values()}
        is_sampled = isinstance(space, Sampled)
        if is_sampled != (earlier.study is not None) or not (is_sampled or rows >= before):
            raise ValueError(
                f"--space differs from what this search was started with: {config.space} has the rows "
                f"{', '.join(sorted(rows))}, and the search {', '.join(sorted(before))}. {_RESTORE}"
            )
    return groups


def _measured_noise(earlier: str) -> NoiseSummary:
    """Return the noise that an earlier search measured. ValueError, saying what to do, if it has measured none."""
    flag = f"--noise-from {redact(earlier)}"
    try:
        noise = judge_search(read_search(Storage.at(earlier, fail_fast=True))).noise
    except (ValueError, OSError) as error:
        raise ValueError(f"{flag} cannot be used: {error}") from error
    if noise is None:
        raise ValueError(
            f"{flag}: no two rows of that search have completed at the same two seeds, so it does not know how repeats "
            "differ. Add seeds to it by --add --seeds, or leave --noise-from out to assume 1 point."
        )
    return noise


def add_trials(search: PreparedSearch, rows: tuple[str, ...], seeds: tuple[int, ...]) -> PreparedSearch:
    """Return the search of a grid with these rows at these seeds as one more group, as if by `--add`."""
    config = search.config.with_group(runs=rows, seeds=seeds)
    declared = [spaces.select_rows(search.space, group.runs) for group in config.groups]
    return replace(search, config=config, runs=_resolve_runs(declared, config, search.facts))


def _check_folder(options: Options, name: str) -> Storage:
    """Return the search's folder, whose storage can be written to. A person waits for this, so it fails fast."""
    storage = Storage.at(options.storage, fail_fast=True)
    only_read = options.plan and storage.local_path is None  # there, checking is writing
    try:
        if only_read:
            storage.check_readable()
        else:
            storage.check_writable()
    except OSError as error:
        verb = "read" if only_read else "written to"
        advice = "" if storage.local_path is None else f". Name a folder that can be {verb}."
        raise ValueError(f"--storage {options.storage} cannot be {verb}: {error}{advice}") from error
    return Storage.at(options.storage) / name


def _resolve_runs(rows: list[tuple[Run, ...]], config: SearchConfig, facts: DataFacts) -> tuple[Run, ...]:
    """Return the runs of all groups, each once, in the order in which they were asked for."""
    runs: dict[tuple[str, int], Run] = {}
    for declared, group in zip(rows, config.groups, strict=True):
        overrides = replace(_overrides(config), seeds=group.seeds)
        runs |= {(run.name, run.seed): run for run in spaces.resolve_runs(declared, overrides, facts)}
    return tuple(runs.values())


def _overrides(config: SearchConfig) -> RowOverrides:
    return RowOverrides(
        num_epochs=config.epochs,
        max_epochs=STREETS_EPOCHS if config.data == STREETS else None,
        image_size=config.image_size,
        proxy=config.proxy,
    )


def _flag_problems(options: Options, config: SearchConfig, space: Space | None) -> list[str]:
    problems = []
    if options.gpus is not None and not options.plan:
        problems.append("--gpus is for --plan: a search uses the GPUs that are there. --max-concurrent limits them.")
    if options.gpus is not None and options.address is not None:
        problems.append("--gpus and --address exclude each other: plan for a cluster that exists, or for one to be.")
    if options.gpus is not None and options.gpus_per_trial == 0:
        problems.append("--gpus-per-trial 0 uses none of the --gpus that are planned for. Leave one of them out.")
    if isinstance(space, Grid):
        if given := _given(options, "trials", "sampler", "objectives", "warm_start", "study", "confirm"):
            problems.append(
                f"{given}: {config.space} is a grid of declared rows, not a space to sample from. "
                "Leave them out, or name a sampled space such as around10."
            )
        problems += _look_problems(config)
    if not isinstance(space, Sampled):
        return problems
    if given := _given(options, "looks", "decide", "control", "noise_from"):
        problems.append(f"{given}: only a grid is judged. --confirm K trains the best of a study with fresh seeds.")
    problems += sampler_problems(config.sampler, config.objectives)
    if len(config.groups[0].seeds) > 1:
        problems.append("--seeds: a sampled search has one seed. --confirm K trains its best with K fresh ones.")
    if options.add:
        problems.append("--add is for a grid. Give a sampled search more trials with --resume --trials N.")
    if options.rerun is not None:
        problems.append("--rerun is for a grid. A sampled search tries failed trials again when it is resumed.")
    if len(config.objectives) > 1 and config.scheduler != "fifo":
        problems.append(
            f"--scheduler {config.scheduler} stops by mIoU alone, and would stop fast networks before they are seen: "
            f"with --objectives {','.join(config.objectives)} use fifo."
        )
    return problems


def _measure_problems(space: Space, source: Source) -> list[str]:
    """Return which classes of the space's second measure the data do not have."""
    names = source.classes.names
    return [
        f"second_measure: {name} is not a class of {redact(source.name)}. There are {', '.join(names)}."
        for name in space.second_measure
        if name not in names
    ]


def _given(options: Options, *flags: str) -> str:
    return ", ".join(f"--{flag.replace('_', '-')}" for flag in flags if getattr(options, flag) is not None)


def _look_problems(config: SearchConfig) -> list[str]:
    problems = []
    num_seeds = len(config.groups[0].seeds)
    if config.decide and num_seeds < config.looks[0]:
        problems.append(f"--seeds: {counted(num_seeds, 'seed')}, but --decide looks first at {config.looks[0]}.")
    if config.decide and config.scheduler != "fifo":
        problems.append(
            f"--scheduler {config.scheduler} stops rows early, and those are never judged: with --decide use fifo."
        )
    return problems


def _find_search(options: Options, folder: Storage, name: str) -> Manifest | None:
    """Return the manifest of the search to resume; None for a new one."""
    if options.continues and options.name is None:
        raise ValueError("--resume, --add and --rerun need the --name of the search.")
    earlier = read_manifest(folder)
    if options.continues and earlier is None:
        raise ValueError(f"there is no search {name} in {options.storage}. Check --name and --storage.")
    if earlier is not None and not options.continues:
        raise ValueError(
            f"there is a search {name} in {options.storage} already. "
            "Use --resume to resume it, --add to give it more trials, or another --name."
        )
    return earlier


def _restore_config(options: Options, earlier: Manifest) -> SearchConfig:
    """Return the configuration of the search that is resumed or added to. ValueError if a flag differs from it."""
    before = earlier.config
    given = given_choices(options)
    moved = {name: given.pop(name) for name in MOVABLE if name in given}
    changed = [name for name, value in given.items() if value != getattr(before, name)]
    if not options.add:
        first = before.groups[0]
        changed += ["runs"] if selected_rows(options, control=before.control) not in (None, first.runs) else []
        changed += ["seeds"] if options.seeds not in (None, first.seeds) else []
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(
            f"{flags} differs from what this search was started with. Leave it out to resume the search, "
            "use --add to give it more trials, or start another search under another --name."
        )
    config = before.with_group(runs=options.runs, seeds=options.seeds) if options.add else before
    return config.model_copy(update=moved | {"limits": before.limits.updated(options)})


def _check_resumable(search: PreparedSearch, earlier: Manifest, recorded: Mapping[str, TrialSpec]) -> tuple[str, ...]:
    """Raise ValueError if `--add` names nothing new, `--rerun` a row without failures, or if something has changed.

    Return what may change: rows put in by `--add`, and rows taken out. `recorded` is what trials' folders say they have
    trained. A changed row would continue with the old one's results, also one that was taken out for a while. What is
    expected of it may change.
    """
    options, runs = search.options, {(run.name, run.seed): run for run in search.runs}
    num_frames = (search.facts.num_train, search.facts.num_val), (earlier.data.train_images, earlier.data.val_images)
    if num_frames[0] != num_frames[1]:
        frames_now, frames_then = (
            f"{num_train} training and {num_val} validation frames" for num_train, num_val in num_frames
        )
        raise ValueError(
            f"{search.config.data} holds {frames_now}, but this search was started on {frames_then}. {_RESTORE}"
        )
    if search.source.classes.names != earlier.data.classes.names:
        now, then = (", ".join(classes.names) for classes in (search.source.classes, earlier.data.classes))
        raise ValueError(
            f"{search.config.data} has the classes {now}, but this search was started with {then}. {_RESTORE}"
        )
    if search.backbone_digest != earlier.backbone_digest:
        raise ValueError(
            f"the backbone {search.config.backbone} has other weights (digest {search.backbone_digest}) than this "
            f"search was started with ({earlier.config.backbone}, digest {earlier.backbone_digest}). {_RESTORE}"
        )
    for name in ("measured_share", "second_measure"):
        now, then = getattr(search.space, name), getattr(earlier.space, name)
        if now != then:
            now, then = (", ".join(value) or "none" if isinstance(value, tuple) else value for value in (now, then))
            raise ValueError(
                f"{name} of the space is {now}, but was {then} when this search was started. A measure is declared "
                "before results are seen: restore it, or start another search under another --name."
            )
    before = {(run.name, run.seed): run for run in earlier.trials.values()}
    trained = {(spec.run.name, spec.run.seed): spec.run for spec in recorded.values()}
    if options.add and runs.keys() <= before.keys():
        raise ValueError("--add: this search has all these rows and seeds already. Name seeds or rows that are new.")
    failed = {state.run for state in read_saved_state(search.folder).states if state.status == "failed"}
    sound = [name for name in options.rerun or () if name not in failed]
    if sound:
        rows = ", ".join(sorted(failed))
        known = f"Rows with failed trials: {rows}." if failed else "No trial of this search failed."
        raise ValueError(f"--rerun {', '.join(sound)}: no trial of that failed. {known}")
    changed = {
        run.name: ", ".join(f"{name} {change}" for name, change in differences(run, known[key]).items())
        for known in (before, trained)
        for key, run in runs.items()
        if key in known and known[key].fingerprint() != run.fingerprint()
    }
    if changed:
        rows = "; ".join(
            f"row {name} has changed: {change or 'its random numbers'}" for name, change in changed.items()
        )
        raise ValueError(
            f"{rows}. Restore what the space said when this search was started to resume it, or start another search "
            "under another --name."
        )
    return () if isinstance(search.space, Sampled) else _changed_rows(search, before.keys(), trained.keys())


def _changed_rows(
    search: PreparedSearch, before: Set[tuple[str, int]], trained: Set[tuple[str, int]]
) -> tuple[str, ...]:
    """Return which rows were put into a grid or taken out since its last session. ValueError if only `--add` may do so.

    All are names and seeds: of the trials that the last session knew, and of those that have something in their folder.
    """

    def format_rows(keys: Set[tuple[str, int]]) -> str:
        names = sorted({name for name, _ in keys})
        return f"{'row' if len(names) == 1 else 'rows'} {', '.join(names)}"

    runs = {(run.name, run.seed) for run in search.runs}
    known = {name for name, _ in before | trained}
    new = {key for key in runs if key[0] not in known}
    if new and not search.options.add:
        rows = ",".join(sorted({name for name, _ in new}))
        raise ValueError(
            f"{format_rows(new)}: not in this search when it was started. Put new rows in by --add --runs {rows}, or "
            "take them out of the space to resume it."
        )
    back, gone = runs & (trained - before), before - runs
    return (
        *([f"put in: {format_rows(new)}"] if new else []),
        *([f"put back: {format_rows(back)}, with the results in storage"] if back else []),
        *([f"taken out: {format_rows(gone)}; results stay in storage, and count again once put back"] if gone else []),
    )


def _set_up_study(search: PreparedSearch, recorded: Mapping[str, TrialSpec]) -> StudySetup | None:
    """Check a sampled space by test draws and by the trials it has; None for a grid. Raises ValueError."""
    space, config = search.space, search.config
    if not isinstance(space, Sampled):
        return None
    overrides, seed = _overrides(config), config.groups[0].seeds[0]
    search_space = SearchSpace(
        name=config.space, space=space, settings=overrides, facts=search.facts, objectives=config.objectives
    )
    with spaces.running_code_of(config.space):
        check_rows(space)
        test_draws = search_space.test_draws(seed=seed)
        declared = {row.name: row for row in space.rows}
        rows = {run.name: replace(search_space.sample_row(declared[run.name]), run=run) for run in search.runs}
    address = search.options.study or config.study
    database = study_database(
        search.folder,
        address=address,
        secret=os.environ.get(STUDY_VARIABLE) if address or not search.earlier else None,
        cache_dir=search.cache_dir,
    )
    with spaces.running_code_of(config.space):
        _check_same_draws(recorded, search_space)
    return StudySetup(
        space=search_space,
        rows=rows,
        sampler=config.sampler,
        seed=seed,
        test_draws=test_draws,
        database=database,
        suggested=recorded,
    )


def _add_known_trials(search: PreparedSearch, setup: StudySetup) -> StudySetup:
    """Check the study's database, and add the trials of an earlier search, as they were when this one was started."""
    setup.database.check(search.name, is_new=search.earlier is None)
    earlier = search.options.warm_start or search.config.warm_start
    try:
        if known := read_record(KnownTrials, search.folder, KNOWN):
            return replace(setup, known=known.trials)
    except DamagedFileError as error:
        _log.warning("%s. The earlier trials are read again from %s, as they are now.", error, earlier)
    if earlier is None:
        return setup
    return warm_start(
        setup,
        read_search(Storage.at(earlier)),
        data_digests=pack_digests(search.packs),
        backbone_digest=search.backbone_digest,
        precision=search.config.precision,
    )


def read_specs(folder: Storage) -> dict[str, TrialSpec]:
    """Return what each trial has in its folder by name, in the study's order; those that confirm last.

    A damaged file is left out: the study still has the trial, and the file is written again from it.
    """
    specs = [record.spec for record in read_sound_trials(folder, folder.folder_names()).values()]
    in_order = sorted(specs, key=lambda spec: (spec.number is None, spec.number or 0, spec.trial))
    return {spec.trial: spec for spec in in_order}


def _check_same_draws(suggested: Mapping[str, TrialSpec], space: SearchSpace) -> None:
    """Raise ValueError if the space was edited so that its trials' parameters now make other runs."""

    def is_same(spec: TrialSpec) -> bool:
        try:
            drawn = sample_at(spec.params, space.sample_run).run
        except Exception:  # the space is the user's own code
            return False
        return drawn.model_copy(update={"seed": spec.run.seed}).fingerprint() == spec.run.fingerprint()

    changed = [name for name, spec in suggested.items() if spec.params and not is_same(spec)]
    if changed:
        raise ValueError(
            f"the space draws other runs than when this search was started, as for {', '.join(changed[:3])}. "
            "Restore it to resume the search, or start another under another --name."
        )


def _open_data(data: str) -> tuple[Source, DataFacts]:
    check_reachable(data)
    try:
        source = open_source(data)
    except OSError as error:
        raise InputError(f"--data {data} cannot be read: {error}") from error
    size = suggested_image_size(source.frame_size)
    return source, DataFacts(len(source.names("train")), len(source.names("val")), size)


def _pack_frames(
    search: PreparedSearch, progress: Callable[[int, int], None], *, shared: Storage | None
) -> dict[FrameSize, Packed]:
    """Pack the frames at every size that the search's runs are trained at."""
    runs = search.study.runs if search.study else search.runs
    pack_at = partial(prepare_packed, search.source, cache_dir=search.cache_dir, progress=progress, shared=shared)
    sizes = sorted({run.image_size for run in runs})
    try:
        for size in sizes:
            check_room(search.source, image_size=size, cache_dir=search.cache_dir)
        return {size: pack_at(image_size=size) for size in sizes}
    except StorageError as error:
        raise ValueError(f"{error}. Frames that are packed by then must be packed again.") from error
    except OSError as error:
        raise ValueError(
            f"frames cannot be packed into {search.cache_dir} ({error}). "
            f"Set {CACHE_VARIABLE} to a folder on a disk with room."
        ) from error


def pack_digests(packs: Mapping[FrameSize, Packed]) -> dict[str, str]:
    """Return the digest of each pack, by image size as text."""
    return {format_size(size): pack.digest for size, pack in packs.items()}


def _check_backbone(name: str, *, may_fetch: bool) -> str:
    """Fetch or read the weights once, now, and return their digest. Without any, torch is not even imported."""
    if name == NO_BACKBONE:
        return NO_BACKBONE
    from tune_bisenet.training import checkpoint

    if name != checkpoint.IMAGENET and Path(name).exists() and not Path(name).is_file():  # reading a FIFO never ends
        raise ValueError(
            f"--backbone {name} cannot be read: it is no regular file. Name one with the weights of a ResNet-18."
        )
    if may_fetch or name != checkpoint.IMAGENET:
        checkpoint.load_backbone(name)
    return checkpoint.backbone_digest(name)


def _check_precision(precision: Precision, options: Options) -> None:
    """Raise ValueError for bf16 on a machine without instructions for it. Nodes of a cluster refuse it themselves."""
    if precision == "fp32" or options.address is not None:
        return
    from tune_bisenet.search.resources import find_bf16

    if not find_bf16(options):
        raise ValueError(
            "--precision bf16: what trials would train on here has no bf16 instructions, as GPUs have from compute "
            "capability 8 on, and CPUs with AVX512-BF16 or AMX. Use fp32 for a search here, and resume one in bf16 on "
            "such a machine."
        )


def _check_step(step: StepMode, options: Options) -> None:
    """Raise ValueError for graphs on a machine without a GPU. Nodes of a cluster refuse them themselves."""
    if step != "graph" or options.address is not None:
        return
    from tune_bisenet.search.resources import trains_on_gpu

    if not trains_on_gpu(options):
        raise ValueError(
            "--step graph: trials would train on a CPU here, and graphs are for GPUs alone. Leave it out for a search "
            "here, and resume one with it on a machine with a GPU."
        )
