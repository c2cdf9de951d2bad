"""The flags of the command line, typed. Knows what a flag may say, not whether it fits the data or the machine."""

import re
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    ValidationError,
)
from pydantic_core import ErrorDetails

from tune_bisenet.config import Frozen, Objective, Precision, Sampler, check_image_size
from tune_bisenet.storage import redact

STREETS: Final = "streets"
NO_BACKBONE: Final = "none"
STUDY_VARIABLE: Final = "TUNE_BISENET_STUDY"
"""Holds the address of a study, where its password is not to stand on a command line."""
NAME_PATTERN: Final = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"


class InputError(ValueError):
    """The input was wrong. `problems` holds one sentence each."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


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
        raise ValueError(
            f"{text!r} is no name for a search: use letters, digits, '.', '_' and '-', no path, at most 100."
        )
    return text


_UNITS: Final = {"d": 86400, "h": 3600, "m": 60, "s": 1}


def _duration(text: object) -> object:
    """Seconds of a text such as `8h` or `1h30m`; anything else as it is."""
    if not isinstance(text, str):
        return text
    parts = re.findall(r"(\d+(?:\.\d+)?)([dhms])", text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{text} is no time: write it as 8h, 90m or 1h30m.")
    return sum(float(number) * _UNITS[unit] for number, unit in parts)


def duration_words(seconds: float) -> str:
    """As `--time-budget` takes it: `1h30m`."""
    words, left = "", round(seconds)
    for unit, size in _UNITS.items():
        words += f"{left // size}{unit}" if left >= size else ""
        left %= size
    return words or "0s"


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if len(set(values)) < len(values):
        raise ValueError(f"{', '.join(map(str, values))} names something twice: each once is enough.")
    return values


def _goals(values: tuple[Objective, ...]) -> tuple[Objective, ...]:
    if values not in (("miou",), ("miou", "latency")):
        raise ValueError(f"{','.join(values)} is no choice of goals: there are miou, and miou,latency.")
    return values


def _whole_above_one(value: float) -> float:
    if value > 1 and not value.is_integer():
        raise ValueError(f"{value:g} is more than one GPU and not a whole number of them: Ray gives out 0.5, 1 or 2.")
    return value


Names = Annotated[tuple[str, ...], BeforeValidator(_split), AfterValidator(_unique)]
Seeds = Annotated[tuple[NonNegativeInt, ...], BeforeValidator(_split), AfterValidator(_unique)]
ImageSize = Annotated[tuple[int, int], BeforeValidator(_size)]
Seconds = Annotated[PositiveFloat, BeforeValidator(_duration)]
Gpus = Annotated[NonNegativeFloat, AfterValidator(_whole_above_one)]
Objectives = Annotated[tuple[Objective, ...], BeforeValidator(_split), AfterValidator(_goals)]
Scheduler = Literal["asha", "median", "fifo"]

DEFAULT_TRIALS: Final = 40
"""Of a sampled search that is given no limit at all."""


class Options(Frozen):
    """The flags as given; None where one was left out."""

    space: str | None = None
    data: str | None = None
    backbone: str | None = None
    runs: Names | None = None
    seeds: Seeds | None = None
    epochs: PositiveInt | None = None
    image_size: ImageSize | None = None
    proxy: bool | None = None
    scheduler: Scheduler | None = None
    precision: Precision | None = None

    sampler: Sampler | None = None
    objectives: Objectives | None = None
    warm_start: str | None = None
    study: str | None = None
    """Where the study is kept, as given: with its password."""

    trials: PositiveInt | None = None
    time_budget: Seconds | None = None
    gpu_hours: PositiveFloat | None = None
    confirm: PositiveInt | None = None

    gpus_per_trial: Gpus | None = None
    cpus_per_trial: PositiveInt | None = None
    max_concurrent: PositiveInt | None = None
    device: Literal["auto", "cuda", "cpu"] = "auto"
    storage: str = "results"
    name: Annotated[str, BeforeValidator(_name)] | None = None
    resume: bool = False
    add: bool = False
    rerun: Names | None = None
    address: str | None = None

    plan: bool = False
    """Say what the search would take, and end without starting anything."""
    gpus: PositiveInt | None = None
    """Of the cluster that is planned for; None for what is there."""
    images_per_second: PositiveFloat | None = None
    """Of one trial in training; None for what was timed or measured."""
    price_per_gpu_hour: PositiveFloat | None = None

    @property
    def continues(self) -> bool:
        """Whether this goes on with a search that is there already."""
        return self.resume or self.add or self.rerun is not None


class Limits(Frozen):
    """When a search ends by itself; None where nothing was said. Those of the last session hold."""

    trials: PositiveInt | None = None
    """Of a sampled search, in all its sessions; earlier searches' trials that it began with do not count."""
    time_budget: PositiveFloat | None = None
    """Seconds, of all its sessions together."""
    gpu_hours: PositiveFloat | None = None
    """Of all epochs trained, times the GPUs of a trial."""
    confirm: PositiveInt | None = None
    """How many fresh seeds the best of a sampled search is trained with when it has ended; beyond the limits."""

    def updated(self, given: Options) -> Self:
        """The same with what the command line says now."""
        changes = {name: getattr(given, name) for name in Limits.model_fields}
        return self.model_copy(update={name: value for name, value in changes.items() if value is not None})

    def used_up(self, *, seconds: float, gpu_hours: float) -> str:
        """Which limit has been reached, in words; empty as long as none is."""
        if self.time_budget is not None and seconds >= self.time_budget:
            return f"--time-budget {duration_words(self.time_budget)} was used up"
        if self.gpu_hours is not None and gpu_hours >= self.gpu_hours:
            return f"--gpu-hours {self.gpu_hours:g} were used up"
        return ""


class Part(Frozen):
    """Some rows, each with some seeds."""

    runs: Names | None
    """None for all rows."""
    seeds: Seeds


class SearchConfig(Frozen):
    """What a search trains and how it is judged, nothing left open. A resumed search has those it was started with."""

    space: str
    data: str
    """`streets`, or the absolute path or the URI of a folder."""
    backbone: str
    """`imagenet`, `none`, or the absolute path of a file."""
    parts: tuple[Part, ...]
    """What was asked for first, and what `--add` asked for since."""
    epochs: PositiveInt | None
    """None for what each row says."""
    image_size: ImageSize | None
    """None for what fits the frames."""
    proxy: bool
    scheduler: Scheduler
    precision: Precision
    sampler: Sampler = "tpe"
    """Of a sampled space, as are the following."""
    objectives: Objectives = ("miou",)
    warm_start: str | None = None
    """The folder of the search whose trials it began with."""
    study: str | None = None
    """Where the study is kept, its password hidden; None for a file in the search's folder."""

    @property
    def default_seed(self) -> int | None:
        """The seed whose trials go by their row's name alone: the only one that was asked for first, or None."""
        seeds = self.parts[0].seeds
        return seeds[0] if len(seeds) == 1 else None

    def with_part(self, *, runs: tuple[str, ...] | None, seeds: tuple[int, ...] | None) -> Self:
        """The same with more trials; what is left out is as it was first. ValueError if both are."""
        if runs is None and seeds is None:
            raise ValueError("--add needs to be told what: --seeds 3,4 for the same rows, --runs r05 for other rows.")
        first = self.parts[0]
        part = Part(runs=first.runs if runs is None else runs, seeds=first.seeds if seeds is None else seeds)
        return self.model_copy(update={"parts": (*self.parts, part)})


def resolve_options(given: Options, *, default_data: str) -> SearchConfig:
    """Fill in what was not given. The built-in streets are trained from scratch, and always as a proxy."""
    asked = asked_for(given)
    streets = asked.get("data", default_data) == STREETS
    defaults = {
        "space": "runs10",
        "data": absolute("data", default_data),
        "backbone": NO_BACKBONE if streets else "imagenet",
        "parts": (Part(runs=given.runs, seeds=given.seeds or (0,)),),
        "epochs": None,
        "image_size": None,
        "proxy": streets,
        "scheduler": "fifo" if len(given.objectives or ()) > 1 else "asha",
        "precision": "fp32",
    }
    return SearchConfig.model_validate(defaults | asked)


def asked_for(given: Options) -> dict[str, Any]:
    """The choices that were given as flags, paths made absolute."""
    choices = {name: getattr(given, name) for name in SearchConfig.model_fields if name != "parts"}
    return {name: absolute(name, value) for name, value in choices.items() if value is not None}


def absolute(name: str, value: Any) -> Any:
    """A path stays valid when a search is resumed from another folder; words such as `streets` are no paths.

    Of an address only what may be seen is a choice.
    """
    if name == "data" and "://" in value:
        return value
    if name in ("study", "warm_start") and "://" in value:
        return redact(value)
    is_path = (
        name == "warm_start"
        or (name == "data" and value != STREETS)
        or (name == "backbone" and value not in (NO_BACKBONE, "imagenet"))
        or (name == "space" and (value.endswith(".py") or "/" in value))
    )
    return str(Path(value).expanduser().absolute()) if is_path else value


def parse_options(flags: dict[str, Any]) -> tuple[Options, dict[str, str]]:
    """Typed arguments from the flags that were given; and, by argument, what is wrong with those left out of them."""
    try:
        return Options.model_validate(flags), {}
    except ValidationError as error:
        mistyped = {str(finding["loc"][0]): _in_words(finding) for finding in error.errors()}
    return Options.model_validate({name: value for name, value in flags.items() if name not in mistyped}), mistyped


def _in_words(finding: ErrorDetails) -> str:
    flag = "--" + str(finding["loc"][0]).replace("_", "-")
    message = finding["msg"].removeprefix("Value error, ")
    return f"{flag}: {message}" if "Value error" in finding["msg"] else f"{flag} {finding['input']}: {message}."
