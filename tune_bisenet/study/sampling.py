"""Points of a sampled space: from values to a run and back, and what can be said of a space before it is searched.

Knows Optuna's trials and samplers, not where a study is kept.
"""

import copy
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final, assert_never, get_args

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState
from pydantic import ValidationError

from tune_bisenet import spaces
from tune_bisenet.config import STRIDE, Objective, Run, Sampler
from tune_bisenet.records import Param
from tune_bisenet.spaces import DataFacts, LatencyRanges, RowOverrides, Sampled, SpaceError

REHEARSALS: Final = 200
"""Points drawn at random before a search, to find in its first second what would go wrong in its eighth hour."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class Point:
    """A run, and the values it was drawn by."""

    run: Run
    params: dict[str, Param]
    distributions: dict[str, BaseDistribution]

    @property
    def ranges(self) -> dict[str, str]:
        """The distributions as Optuna's JSON."""
        return {name: distribution_to_json(distribution) for name, distribution in self.distributions.items()}


# --- drawing --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Draw:
    """How a search draws: the space's `sample`, the search's own scale, and what varies with latency if that is a goal.

    Called with a trial, it gives a run that is ready to train; PlanError, or the ValueError that `sample` raised,
    where the values make none.
    """

    space: Sampled
    settings: RowOverrides
    facts: DataFacts
    with_latency: bool

    def __call__(self, trial: BaseTrial) -> Run:
        (run,) = spaces.resolve_runs([self.space.sample(trial)], self.settings, self.facts)
        return vary_latency(trial, run, self.space.latency) if self.with_latency else run

    def as_row(self, run: Run, params: Mapping[str, Param]) -> Run:
        """What a space file would say of `run`, drawn by `params`: on the rows' own scale, not on that of a proxy."""
        row = self.space.sample(FixedTrial(dict(params)))
        changes = {"name": run.name, "head_width": run.head_width}
        if "image_size" in row.model_fields_set or params.get("input_scale", 1.0) != 1.0:
            changes["image_size"] = run.image_size
        return row.model_copy(update=changes)


def draw_with(space: Sampled, settings: RowOverrides, facts: DataFacts, objectives: Sequence[Objective]) -> Draw:
    """How a search for these goals draws."""
    return Draw(space=space, settings=settings, facts=facts, with_latency="latency" in objectives)


def vary_latency(trial: BaseTrial, run: Run, latency: LatencyRanges) -> Run:
    """The run with a head of another width, at another input size; what it is called with must not choose either."""
    width = trial.suggest_categorical("head_width", latency.head_widths)
    scale = trial.suggest_categorical("input_scale", latency.input_scales)
    changes = {"head_width": width, "image_size": scaled(run.image_size, scale)}
    return Run.model_validate(run.model_dump() | changes)


def scaled(size: tuple[int, int], share: float) -> tuple[int, int]:
    """`size` (H, W) times `share`, to the nearest multiples of 32; `96x192` halved is `64x96`."""
    height, width = (max(round(side * share / STRIDE), 1) * STRIDE for side in size)
    return height, width


def point_at(params: Mapping[str, Param], draw: Callable[[BaseTrial], Run]) -> Point:
    """The point with these values. ValueError if they lie outside the space, or are not just those that it asks for."""
    trial = FixedTrial(dict(params))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Optuna's way to say that a value lies out of its range
        try:
            run = draw(trial)
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning
    unused = params.keys() - trial.params.keys()
    if unused:
        raise ValueError(f"the space has no use for {', '.join(sorted(unused))} there.")
    return Point(run=run, params=dict(trial.params), distributions=trial.distributions)


def point_of(row: Run, space: Sampled, draw: Draw, objectives: Sequence[Objective]) -> Point:
    """The one point that stands for a declared row, at its full width and size. ValueError if there is none."""
    assert space.point is not None, "a row of a space without rows"
    params = dict(space.point(row))
    if "latency" in objectives:
        params |= {"head_width": row.head_width, "input_scale": 1.0}
    return point_at(params, draw)


# --- before a search ------------------------------------------------------------------------------------------------


def check_rows(space: Sampled) -> None:
    """SpaceError naming each row of the table that is not a point of the space."""
    problems = [problem for row in space.rows for problem in _row_problems(row, space)]
    if problems:
        raise SpaceError("\n".join(problems))


def _row_problems(row: Run, space: Sampled) -> list[str]:
    assert space.point is not None, "a row of a space without rows"
    try:
        drawn = point_at(space.point(row), space.sample).run
    except Exception as error:  # the space is the user's own code
        return [f"the row {row.name} is not a point of the space: {error}"]
    wanted = row.model_dump(exclude={"name", "expect"})
    got = drawn.model_dump(exclude={"name", "expect"})
    differing = [name for name in wanted if wanted[name] != got[name]]
    return [
        f"the point of the row {row.name} draws another run: {name} is {got[name]} and should be {wanted[name]}."
        for name in differing
    ]


def rehearse(draw: Draw, *, seed: int, draws: int = REHEARSALS) -> list[Point]:
    """Points drawn at random. SpaceError if any cannot be trained, with the first such values."""
    study = optuna.create_study(sampler=RandomSampler(seed=seed))
    points, failures = [], []
    for _ in range(draws):
        trial = study.ask()
        try:
            run = draw(trial)
        except Exception as error:  # the space is the user's own code: whatever it raises is a mistake in it
            failures.append((trial.params, error))
            continue
        points.append(Point(run=run, params=trial.params, distributions=trial.distributions))
    if failures:
        params, first = failures[0]
        raise SpaceError(
            f"{len(failures)} of {draws} random draws from the space cannot be trained. "
            f"With {_in_words(params)}: {_first_line(first)}"
        )
    return points


def _in_words(params: Mapping[str, Param]) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
    )


def _first_line(error: Exception) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(finding["msg"].removeprefix("Value error, ") for finding in error.errors())
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


# --- the space as a table -------------------------------------------------------------------------------------------


def to_markdown(space: Sampled) -> str:
    """The values that the space asks for, as a Markdown table, found by drawing from it."""
    points = [Point(run=run, params=trial.params, distributions=trial.distributions) for run, trial in _drawn(space)]
    names = list(dict.fromkeys(name for point in points for name in point.distributions))
    cells = [("parameter", "range", "where"), *(_param_cells(name, points) for name in names)]
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines) + "\n"


def _drawn(space: Sampled) -> Iterator[tuple[Run, Trial]]:
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    for _ in range(REHEARSALS):
        trial = study.ask()
        yield space.sample(trial), trial


def _param_cells(name: str, points: Sequence[Point]) -> tuple[str, str, str]:
    having = [point for point in points if name in point.params]
    return name, _range_words(having[0].distributions[name]), condition(name, points)


def condition(name: str, points: Sequence[Point]) -> str:
    """As `optimizer sgd`: the choices that all points with this parameter share, and not all points; or `always`."""
    having = [point.params for point in points if name in point.params]
    if len(having) == len(points):
        return "always"
    choices = [
        other
        for other, value in having[0].items()
        if isinstance(value, str | bool) and len({params.get(other) for params in having}) == 1
    ]
    telling = [other for other in choices if len({point.params.get(other) for point in points}) > 1]
    return ", ".join(f"{other} {having[0][other]}" for other in telling) or "sometimes"


def _range_words(distribution: BaseDistribution) -> str:
    match distribution:
        case CategoricalDistribution():
            return ", ".join(map(str, distribution.choices))
        case FloatDistribution() | IntDistribution():
            scale = ", log" if distribution.log else ""
            return f"{distribution.low:g} to {distribution.high:g}{scale}"
        case _:
            return str(distribution)


# --- samplers -------------------------------------------------------------------------------------------------------


def build_sampler(kind: Sampler, *, seed: int) -> BaseSampler:
    """Optuna's sampler of that name. Built for each trial from a seed of its own, it draws the same after a crash."""
    return _Repeatable(kind, seed)


class _Repeatable(BaseSampler):
    """What is drawn for itself is drawn by a seed of its own, however many values a crash has left of the trial."""

    def __init__(self, kind: Sampler, seed: int) -> None:
        self._kind: Sampler = kind
        self._seed = seed
        self._joint = _optunas(kind, seed=seed)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._joint.infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        with _read_once(study._storage):
            return self._joint.sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        seed = np.random.SeedSequence([self._seed, *param_name.encode()]).generate_state(1)[0]
        alone = _optunas(self._kind, seed=int(seed))
        return alone.sample_independent(study, trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        self._joint.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: OptunaState, values: Sequence[float] | None) -> None:
        self._joint.after_trial(study, trial, state, values)


@contextmanager
def _read_once(storage: BaseStorage) -> Iterator[None]:
    """Let a draw read the study's trials once: TPE would read those that run anew for each group of parameters.

    Only this driver writes to the study, and not while it draws.
    """
    read, kept = storage.get_all_trials, dict[int, list[FrozenTrial]]()

    def get_all_trials(
        study_id: int, deepcopy: bool = True, states: Container[OptunaState] | None = None
    ) -> list[FrozenTrial]:
        if study_id not in kept:
            kept[study_id] = read(study_id, deepcopy=False)
        found = [trial for trial in kept[study_id] if states is None or trial.state in states]
        return copy.deepcopy(found) if deepcopy else found

    storage.get_all_trials = get_all_trials  # type: ignore[method-assign]
    try:
        yield
    finally:
        del storage.get_all_trials


def _optunas(kind: Sampler, *, seed: int) -> BaseSampler:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        match kind:
            case "tpe":
                return TPESampler(multivariate=True, group=True, seed=seed)
            case "gp":
                return GPSampler(seed=seed, warn_independent_sampling=False)
            case "cmaes":
                return CmaEsSampler(seed=seed, warn_independent_sampling=False)
            case "random":
                return RandomSampler(seed=seed)
            case "qmc":
                return QMCSampler(seed=seed, warn_independent_sampling=False)
            case _:
                assert_never(kind)


def sampler_problems(kind: Sampler, objectives: Sequence[Objective]) -> list[str]:
    """Why this sampler cannot search for these goals, a sentence each."""
    if kind == "cmaes" and len(objectives) > 1:
        others = ", ".join(name for name in get_args(Sampler) if name != "cmaes")
        return [f"--sampler cmaes searches for one goal only. For {', '.join(objectives)} take one of {others}."]
    return []
