"""Sampled spaces: from parameters to runs and back, checks before a search, Optuna's samplers.

Knows Optuna's trials and samplers, not how a study is stored.
"""

import io
import pickle
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, get_args

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    distribution_to_json,
)
from optuna.exceptions import StorageInternalError
from optuna.samplers import BaseSampler, CmaEsSampler, GPSampler, QMCSampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import BaseTrial, FixedTrial, FrozenTrial, create_trial
from pydantic import ValidationError

from tune_bisenet import spaces
from tune_bisenet.config import STRIDE, Objective, Param, Run, Sampler
from tune_bisenet.options import InputError
from tune_bisenet.spaces import DataFacts, RowOverrides, Sampled
from tune_bisenet.text import in_words, markdown_table

if TYPE_CHECKING:
    from tune_bisenet.records import Origin, TrialSpec

NUM_TEST_DRAWS: Final = 200
"""Random draws before a search: they find in a second what would otherwise fail after hours."""

CMAES_GLOBALS: Final = {
    ("cmaes._cma", "CMA"),
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "scalar"),
}
"""What the state of CMA-ES is made of: the optimizer, with arrays and numbers."""

REBUILT: Final = "rebuilt"
"""The user attribute of a drawn trial that a study has from its folder, without what the sampler had stored with it."""
WARM_START_TRIALS: Final = 10
"""Fewer do not say where CMA-ES is to start: it takes the best tenth of them."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class SampledRun:
    """A run, and the parameters it was sampled with."""

    run: Run
    params: dict[str, Param]
    distributions: dict[str, BaseDistribution]

    def spec(self, trial: str, *, origin: "Origin", number: int | None = None, row: Run | None = None) -> "TrialSpec":
        """Return what a trial of that name trains."""
        from tune_bisenet.records import TrialSpec  # late: `--show` prints a space without pyarrow

        return TrialSpec(
            trial=trial,
            run=self.run,
            origin=origin,
            number=number,
            params=self.params,
            distributions={name: distribution_to_json(values) for name, values in self.distributions.items()},
            row=row,
        )


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """A sampled space at the scale of one search; where latency is an objective, with what latency depends on."""

    name: str
    """The module of the space, or the path of its file."""
    space: Sampled
    settings: RowOverrides
    facts: DataFacts
    objectives: tuple[Objective, ...]

    def sample_run(self, trial: BaseTrial) -> Run:
        """Return a run ready to train. Raise InputError, or the space's own ValueError, if the parameters make none."""
        (run,) = spaces.resolve_runs([self.space.sample(trial)], self.settings, self.facts)
        if "latency" not in self.objectives:
            return run
        width = trial.suggest_categorical("head_width", self.space.head_widths)
        scale = trial.suggest_categorical("input_scale", self.space.input_scales)
        return Run.model_validate(
            run.model_dump() | {"head_width": width, "image_size": scale_size(run.image_size, scale)}
        )

    def sample_row(self, row: Run) -> SampledRun:
        """Return the draw that equals a declared row, at its full width and size. Raise ValueError if there is none."""
        assert self.space.point is not None, "a row of a space without rows"
        params = dict(self.space.point(row))
        if "latency" in self.objectives:
            params |= {"head_width": row.head_width, "input_scale": 1.0}
        return sample_at(params, self.sample_run)

    def declared_row(self, run: Run, params: Mapping[str, Param]) -> Run:
        """Return `run` as a space file would declare it: on the rows' own scale, not on that of a proxy."""
        row = self.space.sample(FixedTrial(dict(params)))
        changes = {"name": run.name, "head_width": run.head_width}
        if "image_size" in row.model_fields_set or params.get("input_scale", 1.0) != 1.0:
            changes["image_size"] = run.image_size
        return row.model_copy(update=changes)

    def test_draws(self, *, seed: int, count: int = NUM_TEST_DRAWS) -> tuple[SampledRun, ...]:
        """Return random draws. Raise InputError with the first parameters that cannot be trained, if there are any."""
        study = optuna.create_study(sampler=RandomSampler(seed=seed))
        draws, failures = [], []
        for _ in range(count):
            trial = study.ask()
            try:
                run = self.sample_run(trial)
            except Exception as error:  # the space is the user's own code: whatever it raises is a mistake in it
                failures.append((trial.params, error))
                continue
            draws.append(SampledRun(run=run, params=trial.params, distributions=trial.distributions))
        if failures:
            params, mistake = failures[0]
            if isinstance(mistake, ValidationError):
                problem = "; ".join(in_words(finding["msg"]) for finding in mistake.errors())
            else:
                is_in_words = str(mistake).strip() and (isinstance(mistake, InputError) or type(mistake) is ValueError)
                problem = str(mistake) if is_in_words else f"its code raises {type(mistake).__name__}: {mistake}"
                problem = problem.strip().splitlines()[0]
            values = ", ".join(
                f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in params.items()
            )
            raise InputError(
                f"{len(failures)} of {count} random draws from the space cannot be trained. With {values}: {problem}"
            )
        return tuple(draws)


def sample_at(params: Mapping[str, Param], sample_run: Callable[[BaseTrial], Run]) -> SampledRun:
    """Return the draw with exactly these parameters. Raise ValueError if they are not the space's, or out of range."""
    trial = FixedTrial(dict(params))
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # Optuna only warns of a value out of its range
        try:
            run = sample_run(trial)
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning
    unused = params.keys() - trial.params.keys()
    if unused:
        raise ValueError(f"the space does not use {', '.join(sorted(unused))} there.")
    return SampledRun(run=run, params=dict(trial.params), distributions=trial.distributions)


def scale_size(size: tuple[int, int], scale: float) -> tuple[int, int]:
    """Return `size` (H, W) times `scale`, rounded to multiples of 32: `96x192` halved is `64x96`."""
    height, width = (max(round(side * scale / STRIDE), 1) * STRIDE for side in size)
    return height, width


def check_rows(space: Sampled) -> None:
    """Raise InputError naming each declared row that the space cannot draw."""
    problems = []
    for row in space.rows:
        assert space.point is not None, "a row of a space without rows"
        try:
            drawn = sample_at(space.point(row), space.sample).run
        except Exception as error:  # the space is the user's own code
            problems.append(f"the row {row.name} is not a point of the space: {error}")
            continue
        expected, got = (run.model_dump(exclude={"name", "expect"}) for run in (row, drawn))
        problems += [
            f"the point of the row {row.name} draws another run: {name} is {got[name]} and should be {value}."
            for name, value in expected.items()
            if got[name] != value
        ]
    if problems:
        raise InputError(*problems)


def sampler_problems(sampler: Sampler, objectives: Sequence[Objective]) -> list[str]:
    """Return why this sampler cannot search for these objectives, a sentence each."""
    if sampler == "cmaes" and len(objectives) > 1:
        others = ", ".join(name for name in get_args(Sampler) if name != "cmaes")
        return [f"--sampler cmaes searches for one goal only. For {', '.join(objectives)} take one of {others}."]
    return []


def parameters_to_markdown(space: Sampled) -> str:
    """Return the parameters of a space as a Markdown table, as random draws show them."""
    study = optuna.create_study(sampler=RandomSampler(seed=0))
    trials = [study.ask() for _ in range(NUM_TEST_DRAWS)]
    for trial in trials:
        space.sample(trial)
    distributions = {name: distribution for trial in trials for name, distribution in trial.distributions.items()}
    draws = [trial.params for trial in trials]
    rows = [(name, _format_range(values), _condition(name, draws)) for name, values in distributions.items()]
    return markdown_table(("parameter", "range", "where"), rows) + "\n"


def _format_range(distribution: BaseDistribution) -> str:
    if isinstance(distribution, CategoricalDistribution):
        return ", ".join(map(str, distribution.choices))
    assert isinstance(distribution, FloatDistribution | IntDistribution)
    return f"{distribution.low:g} to {distribution.high:g}{', log' if distribution.log else ''}"


def _condition(name: str, draws: Sequence[Mapping[str, Param]]) -> str:
    """Return the choices under which a parameter is asked for, such as `optimizer sgd`; or `always`."""
    having = [params for params in draws if name in params]
    if len(having) == len(draws):
        return "always"
    choices = [
        other
        for other, value in having[0].items()
        if isinstance(value, str | bool)
        and len({params.get(other) for params in having}) == 1
        and len({params.get(other) for params in draws}) > 1
    ]
    return ", ".join(f"{other} {having[0][other]}" for other in choices) or "sometimes"


class _CmaEsUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CMAES_GLOBALS:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


class NumberedQMCSampler(QMCSampler):
    """Draws the point of the sequence that has the trial's number, as nothing else is left of a study that was rebuilt.

    Optuna's own counts in the study, and would begin with the first points again.
    """

    def _find_sample_id(self, study: optuna.Study, search_space: Mapping[str, BaseDistribution]) -> int:
        return len(study.get_trials(deepcopy=False)) - 1


class PlainCmaEsSampler(CmaEsSampler):
    """CMA-ES that runs no code out of a database: Optuna keeps its state there as a pickle, and loads any.

    Where that state was lost with a study, it starts again around the best of the trials that were rebuilt, if there
    are enough.
    """

    def _restore_optimizer(self, completed_trials: list[FrozenTrial]) -> Any:
        """Return the latest state; None before the first. Raise StorageInternalError if it is more than numbers."""
        self._rebuilt = [trial for trial in completed_trials if REBUILT in trial.user_attrs]
        for trial in reversed(completed_trials):
            attributes = trial.system_attrs
            parts = {key: attributes[key] for key in attributes if key.startswith(self._attr_key_optimizer)}
            if not parts:
                continue
            try:
                return _CmaEsUnpickler(io.BytesIO(bytes.fromhex(self._concat_optimizer_attrs(parts)))).load()
            except Exception as error:  # a damaged pickle can fail in any way
                raise StorageInternalError(
                    f"the state of CMA-ES in trial {trial.number} is not loaded: {error}"
                ) from None
        return None

    def _init_optimizer(self, trans: Any, direction: StudyDirection) -> Any:
        """Return the first state: in the middle of the space, or as Optuna warm-starts it from the rebuilt trials."""
        names = trans._search_space.keys()
        rebuilt = [
            create_trial(
                value=trial.value,
                params={name: trial.params[name] for name in names},
                distributions={name: trial.distributions[name] for name in names},
            )
            for trial in self._rebuilt
            if names <= trial.params.keys()
        ]
        self._source_trials = rebuilt if len(rebuilt) >= WARM_START_TRIALS else None
        return super()._init_optimizer(trans, direction)


def build_sampler(kind: Sampler, *, seed: int) -> BaseSampler:
    """Return Optuna's sampler of that name. Built for each trial from its own seed, it draws the same after a crash."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if kind == "tpe":
            return TPESampler(multivariate=True, group=True, seed=seed)
        if kind == "random":
            return RandomSampler(seed=seed)
        others: dict[str, Callable[..., BaseSampler]] = {
            "gp": GPSampler,
            "cmaes": PlainCmaEsSampler,
            "qmc": NumberedQMCSampler,
        }
        return others[kind](seed=seed, warn_independent_sampling=False)
