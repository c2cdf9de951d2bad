"""The flags of the command line, each declared once, and what a search keeps of them.

`Options` holds the flags as they were given; `build_parser` makes the command line from its fields. `SearchConfig` is
what `search.json` keeps: nothing open, and the same in every session.
"""

import argparse
import math
import re
import time
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    PositiveFloat,
    ValidationError,
)
from pydantic_core import ErrorDetails

from tune_bisenet.config import Frozen, NumEpochs, Objective, Precision, Sampler, Seed, StepMode, check_image_size
from tune_bisenet.text import absolute_path, format_duration, in_words, is_uri, is_utf8, redact, without_errno

STREETS: Final = "streets"
NO_BACKBONE: Final = "none"
STUDY_VARIABLE: Final = "TUNE_BISENET_STUDY"
"""Holds the address of a study's database, so that its password stands on no command line."""
DEFAULT_TRIALS: Final = 40
"""The trials of a sampled search that is given no limit at all."""
CONTROL: Final = "aa"
"""The row of `--control`."""
DEFAULT_LOOKS: Final = (3, 5, 8, 12)
"""Numbers of seeds at which `--decide` judges."""
EPILOG: Final = """\
exit codes: 0 all trials ended well (finished, stopped by the scheduler, or diverged); 1 at least one failed, the rest
completed; 2 the input was wrong and nothing was started; 70 an error of the program; 75 Ray died, the driver was
killed, or storage or the study's database did not answer for ten minutes: resume with --resume; 130 and 143 interrupted
by a signal: resume with --resume.
"""
MAX_LISTED_PROBLEMS: Final = 20
NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"


MAX_NUMBER: Final = 1_000_000
"""Of trials, machines and the like: a plan goes through all of them."""
MAX_SEEDS: Final = 1000
"""Of a row, as many as a look can be planned at."""


class InputError(ValueError):
    """The user's input cannot be used. `problems` holds a sentence each, with what to do; str() lists the first."""

    def __init__(self, *problems: str) -> None:
        problems = tuple(map(without_errno, problems))
        super().__init__(*problems)  # not joined, so that it can be pickled on its way out of a worker
        self.problems = problems

    @property
    def listed(self) -> list[str]:
        """Return the first problems, and how many more there are: a broken download has thousands."""
        num_more = len(self.problems) - MAX_LISTED_PROBLEMS
        more = [f"and {num_more:,} more"] if num_more > 0 else []
        return [*self.problems[:MAX_LISTED_PROBLEMS], *more]

    def __str__(self) -> str:
        return "\n".join(self.listed)


def problems_of(error: ValueError) -> list[str]:
    """Return what an error of the package says, a sentence each.

    One of Python's own or of a library, as for Unicode or JSON, is a fault of the program: it is raised again.
    """
    if isinstance(error, InputError):
        return error.listed
    modules = ("tune_bisenet", "__main__")  # the second of a command line run by -m
    if type(error) is not ValueError and not type(error).__module__.startswith(modules):
        raise error
    return [str(error)]


_UNIT_SECONDS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def _split(text: object) -> object:
    if not isinstance(text, str):
        return text
    parts = [part.strip() for part in text.split(",")]
    if "" in parts:
        raise ValueError(f"{text!r} lacks a value before, after or between commas: write a list as in 0,1,2.")
    return parts


def _parse_size(text: object) -> object:
    if not isinstance(text, str):
        return text
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise ValueError(f"{text} is not a size: write height x width, as in 512x1024.")
    return check_image_size((int(match[1]), int(match[2])))


def _parse_duration(text: object) -> object:
    """Return the seconds of a text such as `8h` or `1h30m`; anything else as it is."""
    if not isinstance(text, str):
        return text
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text} is not a valid duration: write it as 8h, 90m or 1h30m.")
    return sum(float(number) * _UNIT_SECONDS[unit] for number, unit in parts)


def _check_name(text: str) -> str:
    if re.fullmatch(NAME_PATTERN, text) is None:
        raise ValueError(
            f"{text!r} is not a valid name for a search: use at most 100 letters, digits, '.', '_' and '-', no path."
        )
    return text


def _check_unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{', '.join(map(str, values))} repeats a value: give each once.")
    return values


def _check_looks(values: tuple[int, ...]) -> tuple[int, ...]:
    if values and (min(values) < 2 or list(values) != sorted(set(values))):
        raise ValueError(f"{','.join(map(str, values))} is not a valid plan: numbers of seeds from 2 up that grow.")
    return values


def _check_objectives(values: tuple[Objective, ...]) -> tuple[Objective, ...]:
    if values not in (("miou",), ("miou", "latency")):
        raise ValueError(f"{','.join(values)} is not a valid choice of objectives: use miou or miou,latency.")
    return values


def _parse_gpus(value: object) -> object:
    if value == "auto":
        return value
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if number > 1:
        raise ValueError(f"{value} is more than one GPU, and a trial trains on one: use 1, or 0.5 for two on a GPU.")
    if not number >= 0:
        raise ValueError(f"{value} is not a share of a GPU: use a number from 0 to 1, or auto.")
    return number


def _none_for_auto(precision: str) -> str | None:
    return None if precision == "auto" else precision


Names = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_check_unique)]
Seeds = Annotated[tuple[Seed, ...], BeforeValidator(_split), AfterValidator(_check_unique)]
ImageSize = Annotated[tuple[int, int], BeforeValidator(_parse_size)]
Number = Annotated[int, Field(gt=0, le=MAX_NUMBER)]
Looks = Annotated[
    tuple[Annotated[int, Field(gt=0, le=MAX_SEEDS)], ...], BeforeValidator(_split), AfterValidator(_check_looks)
]
Seconds = Annotated[PositiveFloat, BeforeValidator(_parse_duration)]
Gpus = Annotated[float | Literal["auto"], BeforeValidator(_parse_gpus)]
PrecisionChoice = Annotated[Literal["auto", "fp32", "bf16"], AfterValidator(_none_for_auto)]
"""`auto` is as good as no flag: a search that is resumed keeps what it began with."""
Objectives = Annotated[tuple[Objective, ...], BeforeValidator(_split), AfterValidator(_check_objectives)]
Scheduler = Literal["asha", "median", "fifo"]

WHAT: Final = "what is trained"
JUDGED: Final = "how a grid's expectations are judged"
SAMPLED: Final = "how a sampled space, such as around10, is searched"
LIMITS: Final = "when the search ends by itself: at whichever limit comes first"
WHERE: Final = "where and how"
PLANNING: Final = "what the search will take: printed before every search"


def _flag(group: str, metavar: str | None, help_text: str, default: Any = None) -> Any:
    """Declare a flag; one without `metavar` takes no value."""
    return Field(default=default, description=help_text, json_schema_extra={"group": group, "metavar": metavar})


class Options(Frozen):
    """The flags as given; None where one was left out."""

    space: str | None = _flag(WHAT, "NAME", "a module of search_spaces, or the path of a Python file (default: runs10)")
    runs: Names | None = _flag(WHAT, "r01,r05", "train only these rows")
    seeds: Seeds | None = _flag(
        WHAT, "0,1,2", "train every row once with each of these seeds (default: 0, or as many as the first of --looks)"
    )
    data: str | None = _flag(
        WHAT,
        "DIR_OR_URI|streets",
        "Cityscapes or other data in its layout (default: $CITYSCAPES_DATASET, else the built-in streets)",
    )
    backbone: str | None = _flag(
        WHAT,
        "imagenet|none|FILE",
        "initial weights of the ResNet-18 (default: imagenet with real data, none with streets)",
    )
    epochs: NumEpochs | None = _flag(WHAT, "N", "override the epochs of the rows (default on streets: 8)")
    image_size: ImageSize | None = _flag(
        WHAT, "HxW", "train and predict at this size (default: fits the frames into 512x1024)"
    )
    proxy: bool | None = _flag(
        WHAT, None, "a short search: warm-up and loss switch keep the table's proportions (implied by streets)"
    )
    scheduler: Scheduler | None = _flag(
        WHAT,
        "asha|median|fifo",
        "asha stops hopeless runs early, median only those that were never near the others; fifo trains all to "
        "the end, for judging expectations (default: asha)",
    )
    precision: PrecisionChoice | None = _flag(
        WHAT,
        "auto|fp32|bf16",
        "precision of the training step; auto is bf16 where trials have instructions for it: GPUs from compute "
        "capability 8 on, and CPUs with AVX512-BF16 or AMX (default: auto, settled as a search begins)",
    )
    no_share: bool | None = _flag(
        WHAT,
        None,
        "train every row from its first epoch, also those that are the same training until the loss of one switches, "
        "as r01 and r05 (default: their common epochs are trained once)",
    )
    deterministic: bool | None = _flag(
        WHAT,
        None,
        "let a GPU use only kernels that repeat their results, which are slower; that equal runs are then equal to the "
        "last bit has not been seen on a card yet (on a CPU they are, and this changes nothing)",
    )
    step: StepMode | None = _flag(
        WHAT,
        "auto|graph|eager",
        "graph: a GPU replays each training step as one CUDA graph, and a trial fails where that cannot be recorded; "
        "eager: kernels are launched one by one; auto: graph on a GPU, eager where that fails and on a CPU. Graphs "
        "have not run on a card yet (default: auto)",
    )

    looks: Looks | None = _flag(
        JUDGED,
        "3,5,8,12",
        "judge at these numbers of seeds, which share the 5 % of error; add seeds from one to the next with --add "
        "(default: one look, at all seeds)",
    )
    decide: bool | None = _flag(
        JUDGED,
        None,
        "give all rows the seeds of the first look, and those of the next only to rows that are open and what they are "
        "compared with, until nothing is open or a limit is reached (looks by default at 3,5,8,12; implies fifo)",
    )
    control: bool | None = _flag(
        JUDGED,
        None,
        "add a row aa, the baseline again with other random numbers and expected to gain +0: what no difference looks "
        "like",
    )

    trials: Number | None = _flag(SAMPLED, "N", "total number of trials (default: 40, if no other limit is given)")
    sampler: Sampler | None = _flag(SAMPLED, "tpe|gp|cmaes|random|qmc", "Optuna's sampler (default: tpe)")
    warm_start: str | None = _flag(
        SAMPLED,
        "DIR_OR_URI",
        "start from the trials and learning curves of that search; rows that it has trained are not trained again",
    )
    objectives: Objectives | None = _flag(
        SAMPLED,
        "miou[,latency]",
        "with latency, the milliseconds of one prediction are a second goal, and head width and input size are varied "
        "(default: miou)",
    )
    confirm: Number | None = _flag(
        SAMPLED, "K", "afterwards train the best trial, the best row and the baseline with K fresh seeds"
    )
    study: str | None = _flag(
        SAMPLED,
        "URL",
        "database of the study, as postgresql://USER@HOST/NAME (default: a file in the search's folder). An address "
        f"with a password belongs in ${STUDY_VARIABLE} instead",
    )

    time_budget: Seconds | None = _flag(
        LIMITS, "8h", "running time of all sessions together; unfinished trials can be resumed"
    )
    gpu_hours: PositiveFloat | None = _flag(LIMITS, "X", "GPU-hours of all epochs trained")

    gpus_per_trial: Gpus | None = _flag(
        WHERE,
        "X|auto",
        "at most 1; by a fraction trials share a GPU. auto times one, two and three side by side on a GPU of this "
        "machine before the first trial, and takes the number with the most images/s in all if it gains over 10 %; it "
        "has not been tried on a card yet (default: 1 if there are any)",
    )
    cpus_per_trial: Number | None = _flag(
        WHERE,
        "N",
        "default: the machine's cores divided by the trials that run at once; 1 on a cluster that has no nodes yet. "
        "torch uses as many threads; later sessions of a search use as many as its first, whatever they reserve",
    )
    max_concurrent: Number | None = _flag(WHERE, "N", "run at most N trials at once")
    stall_timeout: Seconds | None = _flag(
        WHERE,
        "10m",
        "end the process of a trial that has got nowhere for so long, log its stack, and resume the trial from its "
        "last epoch (default: ten times what an epoch of it takes, at least 5 minutes; 4 hours for its first epoch, if "
        "the process answers). Waiting for storage is no stall, nor are 4 hours of packing",
    )
    device: Literal["auto", "cuda", "cpu"] = _flag(
        WHERE,
        "auto|cuda|cpu",
        "cuda: refuse to train without a GPU; cpu: train on the CPU, whatever GPUs are requested (default: auto, the "
        "GPU if trials have one)",
        default="auto",
    )
    storage: str = _flag(WHERE, "DIR_OR_URI", "folder of all searches (default: results)", default="results")
    name: Annotated[str, BeforeValidator(_check_name)] | None = _flag(
        WHERE, "NAME", "the search's name, a folder in the storage (default: the space and the time)"
    )
    resume: bool = _flag(WHERE, None, "resume the search of that name; failed trials are tried again", default=False)
    add: bool = _flag(
        WHERE, None, "add trials to that search: with --seeds for its rows, with --runs other rows", default=False
    )
    rerun: Names | None = _flag(WHERE, "r03", "resume that search, but only the failed trials of these rows")
    address: str | None = _flag(WHERE, "ADDR", "a running Ray cluster (default: start Ray on this machine)")

    plan: bool = _flag(
        PLANNING,
        None,
        "print the plan and exit: nothing is started, packed, fetched or written. Training is timed for some seconds "
        "on noise, unless --images-per-second is given",
        default=False,
    )
    gpus: Number | None = _flag(PLANNING, "N", "with --plan: plan for a cluster of N GPUs (default: this machine)")
    images_per_second: Annotated[float, Field(ge=1e-6)] | None = _flag(
        PLANNING, "X", "training speed of one trial, as a report or TensorBoard shows it"
    )
    noise_from: str | None = _flag(
        PLANNING,
        "DIR_OR_URI",
        "forecast verdicts with the noise that repeats of that search had (default: repeats differ by 1 point)",
    )
    price_per_gpu_hour: PositiveFloat | None = _flag(PLANNING, "X", "also show the cost, in any currency")

    @property
    def continues(self) -> bool:
        """Return whether this session continues a search that exists."""
        return self.resume or self.add or self.rerun is not None


def build_parser() -> argparse.ArgumentParser:
    """Return the command line of the main job; flags that are left out are left out of the namespace, too."""
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.run",
        description="Train the rows of a search space under Ray Tune and compare what they reach.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    groups: dict[str, Any] = {}
    for name, field in Options.model_fields.items():
        extra: Any = field.json_schema_extra
        group = groups.get(extra["group"]) or parser.add_argument_group(extra["group"])
        groups[extra["group"]] = group
        value = {"action": "store_true"} if extra["metavar"] is None else {"metavar": extra["metavar"]}
        group.add_argument(f"--{name.replace('_', '-')}", help=str(field.description).replace("%", "%%"), **value)
    parser.add_argument("--show", action="store_true", help="print the space as a Markdown table and exit")
    return parser


def parse_options(flags: dict[str, Any]) -> tuple[Options, dict[str, str]]:
    """Return the options that the flags hold and, by option, what is wrong with the flags left out of them."""
    mistyped = {
        name: f"--{name.replace('_', '-')} {value!a} has bytes that are not UTF-8: rename that, or link to it."
        for name, value in flags.items()
        if isinstance(value, str) and not is_utf8(value)
    }
    try:
        return Options.model_validate({name: value for name, value in flags.items() if name not in mistyped}), mistyped
    except ValidationError as error:
        mistyped |= {str(finding["loc"][0]): _explain(finding) for finding in error.errors()}
    return Options.model_validate({name: value for name, value in flags.items() if name not in mistyped}), mistyped


def _explain(finding: ErrorDetails) -> str:
    flag = "--" + str(finding["loc"][0]).replace("_", "-")
    message = in_words(finding["msg"])
    return f"{flag}: {message}" if "Value error" in finding["msg"] else f"{flag} {finding['input']}: {message}."


class Limits(Frozen):
    """When a search ends by itself; None for no limit. Those of the last session hold."""

    trials: Number | None = None
    """The trials of a sampled search in all its sessions; those that its study began with do not count."""
    time_budget: PositiveFloat | None = None
    """Seconds of all sessions together."""
    gpu_hours: PositiveFloat | None = None
    """The hours of all epochs trained, times the GPUs of a trial."""
    confirm: Number | None = None
    """How many fresh seeds the best of a sampled search is trained with when it has ended; beyond the limits."""

    @property
    def is_empty(self) -> bool:
        """Return whether nothing ends the search before everything is trained."""
        return (self.trials, self.time_budget, self.gpu_hours) == (None, None, None)

    def updated(self, options: Options) -> Self:
        """Return the limits with those that the command line gives now."""
        changes = {name: getattr(options, name) for name in Limits.model_fields}
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    def limit_reached(self, *, seconds: float, gpu_hours: float) -> str:
        """Return which limit has been reached, in words; an empty string as long as none is."""
        if self.time_budget is not None and seconds >= self.time_budget:
            return f"--time-budget {format_duration(self.time_budget)} was used up"
        if self.gpu_hours is not None and gpu_hours >= self.gpu_hours:
            return f"--gpu-hours {self.gpu_hours:g} were used up"
        return ""


class TrialGroup(Frozen):
    """Names rows, each of which is trained with each of the seeds."""

    runs: Names | None
    """None for all rows."""
    seeds: Annotated[Seeds, Field(min_length=1)]


class SearchConfig(Frozen):
    """Says what a search trains and how it is judged, nothing left open. It is the same in every session."""

    space: str
    data: str
    """`streets`, or the absolute path or the URI of a folder."""
    backbone: str
    """`imagenet`, `none`, or the absolute path of a file."""
    groups: Annotated[tuple[TrialGroup, ...], Field(min_length=1)]
    """The trials of the first session, and those that each `--add` has added."""
    epochs: NumEpochs | None = None
    """None for what each row says."""
    image_size: ImageSize | None = None
    """None for what fits the frames."""
    proxy: bool
    scheduler: Scheduler
    precision: Precision
    deterministic: bool = False
    """Whether a GPU uses only kernels that repeat their results."""
    step: StepMode = "auto"
    """How a GPU is given a training step."""
    auto_gpus_per_trial: Annotated[float, Field(gt=0, le=1)] | None = None
    """What `--gpus-per-trial auto` measured to be best, for sessions that are given no number; None if it did not."""
    no_share: bool = False
    """Whether rows that begin as the same training each train those epochs."""
    looks: Looks = ()
    """The numbers of seeds at which a grid is judged; empty for one look at all of them."""
    decide: bool = False
    """Whether the search adds the seeds of the next look by itself, to the rows that are open."""
    control: bool = False
    """Whether the grid has one more row, its baseline again."""
    sampler: Sampler = "tpe"
    """How a sampled space is searched; as are the next three."""
    objectives: Objectives = ("miou",)
    warm_start: str | None = None
    """The folder of the search whose trials it began with."""
    study: str | None = None
    """The address of the study's database without its password; None for a file in the search's folder."""
    limits: Limits = Limits()

    @property
    def default_seed(self) -> int | None:
        """Return the seed that trial names leave out: the only one of the first session, or None."""
        seeds = self.groups[0].seeds
        return seeds[0] if len(seeds) == 1 else None

    @property
    def is_planned(self) -> bool:
        """Return whether no result was seen before trials were planned: there is one group, or each reaches a look."""
        seeds = [seed for group in self.groups for seed in group.seeds]
        if not self.looks:
            return len(self.groups) == 1
        return len(set(seeds)) == len(seeds) <= self.looks[-1]

    def with_group(self, *, runs: tuple[str, ...] | None, seeds: tuple[int, ...] | None) -> Self:
        """Return the configuration with more trials; what is None is as in the first group. ValueError if both are."""
        if runs is None and seeds is None:
            raise ValueError("--add needs rows or seeds: --seeds 3,4 for the same rows, --runs r05 for other rows.")
        first = self.groups[0]
        group = TrialGroup(runs=first.runs if runs is None else runs, seeds=first.seeds if seeds is None else seeds)
        return self.model_copy(update={"groups": (*self.groups, group)})


def resolve_options(options: Options, *, default_data: str) -> SearchConfig:
    """Fill in what was not given. The built-in streets are trained from scratch, and always as a proxy.

    The precision is then fp32: what `auto` stands for depends on machines, of which nothing is known here.
    """
    given = given_choices(options)
    streets = given.get("data", default_data) == STREETS
    looks = options.looks or (DEFAULT_LOOKS if options.decide else ())
    seeds = options.seeds or (tuple(range(looks[0])) if looks else (0,))
    is_never_stopped = options.decide or len(options.objectives or ()) > 1
    defaults = {
        "space": "runs10",
        "data": make_absolute("data", default_data),
        "backbone": NO_BACKBONE if streets else "imagenet",
        "groups": (TrialGroup(runs=selected_rows(options, control=bool(options.control)), seeds=seeds),),
        "proxy": streets,
        "scheduler": "fifo" if is_never_stopped else "asha",
        "looks": looks,
        "precision": "fp32",
        "limits": Limits().updated(options),
    }
    return SearchConfig.model_validate(defaults | given)


def selected_rows(options: Options, *, control: bool) -> tuple[str, ...] | None:
    """Return the rows that were named, and the control; None for all."""
    return tuple(dict.fromkeys([*options.runs, CONTROL])) if options.runs and control else options.runs


def default_name(space: str | None) -> str:
    """Return the name of a search that is given none: its space, in the characters of a name, and the time."""
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(space or "runs10").stem).lstrip("_.-")[:80] or "space"
    return f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def given_choices(options: Options) -> dict[str, Any]:
    """Return the fields of `SearchConfig` that were given as flags of the same name, paths made absolute."""
    values = {name: getattr(options, name, None) for name in SearchConfig.model_fields}
    return {name: make_absolute(name, value) for name, value in values.items() if value is not None}


def make_absolute(name: str, value: Any) -> Any:
    """Make a path absolute, so that it holds when a search is resumed from another folder; redact an address."""
    if name == "data" and is_uri(value):
        return value
    if name == "study" or (name == "warm_start" and is_uri(value)):
        return redact(value)
    is_path = (
        name == "warm_start"
        or (name == "data" and value != STREETS)
        or (name == "backbone" and value not in (NO_BACKBONE, "imagenet"))
        or (name == "space" and (value.endswith(".py") or "/" in value))
    )
    return str(absolute_path(value)) if is_path else value
