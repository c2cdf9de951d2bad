"""Compare Optuna's samplers with random draws, on a surrogate of the space that is fitted to our own trials.

    python benchmarks/samplers.py benchmarks/around10_streets.csv [--seeds 20] [--samplers tpe,gp,random]

The table is a sampled search's `tables/params.csv`. The surrogate is the better of a Gaussian process and a forest by
cross-validation, and the studies are asked exactly as a search asks them. Values are mIoU in percent.
"""

import argparse
import csv
import statistics
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution
from scipy import stats
from sklearn.ensemble import ExtraTreesRegressor
from sklearn.exceptions import ConvergenceWarning
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.model_selection import KFold, cross_val_predict

from tune_bisenet import spaces
from tune_bisenet.config import Param
from tune_bisenet.records import TrialState
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs
from tune_bisenet.storage import Storage
from tune_bisenet.study.sampling import SearchSpace
from tune_bisenet.study.study import Study, StudySetup, study_database

CHECKPOINTS = (10, 20, 40)
"""The numbers of trials after which the best value is noted."""
FACTS = DataFacts(num_train=96, num_val=24, suggested_image_size=(96, 192))
SETTINGS = RowOverrides(num_epochs=8, proxy=True)

Params = Mapping[str, Param]
Surrogate = Callable[[Params], float]


# --- the surrogate --------------------------------------------------------------------------------------------------


class Encoder:
    """Encodes values as numbers in 0..1, on a log scale where the space has one; a column says which values apply."""

    def __init__(self, distributions: Mapping[str, BaseDistribution]) -> None:
        self._distributions = distributions

    def __call__(self, params: Params) -> list[float]:
        return [
            number
            for name, distribution in self._distributions.items()
            for number in _encoded(params.get(name), distribution, applies=name in params)
        ]


def _encoded(value: Param, distribution: BaseDistribution, *, applies: bool) -> list[float]:
    if isinstance(distribution, CategoricalDistribution):
        return [float(applies and value == choice) for choice in distribution.choices]
    if not applies:
        return [0.5, 0.0]
    low, high, number = float(distribution.low), float(distribution.high), float(value)  # type: ignore[attr-defined]
    if distribution.log:  # type: ignore[attr-defined]
        low, high, number = np.log(low), np.log(high), np.log(number)
    return [(number - low) / (high - low), 1.0]


def read_trials(path: Path, distributions: Mapping[str, BaseDistribution]) -> list[tuple[dict[str, Param], float]]:
    """Return the parameters and the best mIoU of every trial that was trained to its end."""
    with path.open() as file:
        rows = [row for row in csv.DictReader(file) if row["state"] == "finished"]
    return [
        (
            {
                name: _parsed(row[f"params_{name}"], distribution)
                for name, distribution in distributions.items()
                if row[f"params_{name}"] != ""
            },
            float(row["best_miou"]),
        )
        for row in rows
    ]


def _parsed(text: str, distribution: BaseDistribution) -> Param:
    if isinstance(distribution, CategoricalDistribution):
        return next(choice for choice in distribution.choices if str(choice).lower() == text.lower())
    return float(text)


def fit(trials: Sequence[tuple[Params, float]], encode: Encoder) -> tuple[Surrogate, str]:
    """Return the better of two models, and a text with the cross-validation of both."""
    inputs = np.array([encode(params) for params, _ in trials])
    values = np.array([value for _, value in trials])
    models = {
        "Gaussian process": GaussianProcessRegressor(
            ConstantKernel() * Matern(np.ones(inputs.shape[1]), (0.1, 1e3), nu=2.5) + WhiteKernel(),
            normalize_y=True,
            random_state=0,
        ),
        "forest": ExtraTreesRegressor(500, min_samples_leaf=2, random_state=0),
    }
    scores = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        for name, model in models.items():
            guesses = cross_val_predict(model, inputs, values, cv=KFold(10, shuffle=True, random_state=0))
            scores[name] = (_r2(values, guesses), float(stats.spearmanr(values, guesses).statistic))
        best = max(scores, key=lambda name: scores[name])
        model = models[best].fit(inputs, values)
    scores_text = "; ".join(f"{name}: R² {r2:.2f}, rank correlation {rank:.2f}" for name, (r2, rank) in scores.items())
    description = f"{best} of ({scores_text}), 10-fold, n = {len(trials)}"
    return lambda params: float(model.predict([encode(params)])[0]), description


def _r2(values: NDArray[np.float64], guesses: NDArray[np.float64]) -> float:
    return float(1 - ((values - guesses) ** 2).sum() / ((values - values.mean()) ** 2).sum())


# --- the searches ---------------------------------------------------------------------------------------------------


def search(sampler: str, seed: int, surrogate: Surrogate, *, rows_first: bool, directory: Path) -> list[float]:
    """Return the best value after each trial of a study that is asked as a search asks it."""
    space = spaces.load_space("around10")
    assert isinstance(space, spaces.Sampled)
    scaled = SearchSpace(name=space.title, space=space, settings=SETTINGS, facts=FACTS, objectives=("miou",))
    runs = resolve_runs(space.rows, SETTINGS, FACTS) if rows_first else ()
    rows = {run.name: replace(scaled.sample_row(row), run=run) for run, row in zip(runs, space.rows, strict=False)}
    database = study_database(
        Storage.at(str(directory)),
        address=f"sqlite:///{directory}/{sampler}-{seed}-{rows_first}.db",
        secret=None,
        cache_dir=directory,
    )
    setup = StudySetup(space=scaled, rows=rows, sampler=sampler, seed=seed, test_draws=(), database=database)  # type: ignore[arg-type]
    study = Study(setup, "benchmark", limit=max(CHECKPOINTS))
    study.reconcile([])
    best: list[float] = []
    while (spec := study.ask()) is not None:
        value = surrogate(spec.params)
        best.append(max([value, *best[-1:]]))
        study.tell(
            TrialState(
                trial=spec.trial,
                run=spec.run.name,
                seed=seed,
                num_epochs=8,
                status="finished",
                best_miou=value,
            )
        )
    return best


def main() -> None:
    """Fit the surrogate, and compare the samplers on it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samplers", default="tpe,random")
    arguments = parser.parse_args()
    space = spaces.load_space("around10")
    assert isinstance(space, spaces.Sampled)
    points = SearchSpace(
        name=space.title, space=space, settings=SETTINGS, facts=FACTS, objectives=("miou",)
    ).test_draws(seed=0, count=2000)
    distributions = {name: distribution for point in points for name, distribution in point.distributions.items()}
    surrogate, description = fit(read_trials(arguments.table, distributions), Encoder(distributions))
    values = [surrogate(point.params) for point in points]
    print(
        f"surrogate: {description}; over 2,000 random points: median {statistics.median(values):.2f}, "
        f"best {max(values):.2f}"
    )
    for rows_first in (False, True):
        compare(arguments.samplers.split(","), arguments.seeds, surrogate, rows_first=rows_first)


def compare(samplers: Sequence[str], seeds: int, surrogate: Surrogate, *, rows_first: bool) -> None:
    """Print the best value of each sampler, and its lead over random draws."""
    print(f"\n{'the ten rows first' if rows_first else 'from nothing'}, {seeds} seeds: best mIoU, mean (± sd)")
    best = {}
    with tempfile.TemporaryDirectory() as directory:
        for sampler in samplers:
            runs = [
                search(sampler, seed, surrogate, rows_first=rows_first, directory=Path(directory))
                for seed in range(seeds)
            ]
            best[sampler] = np.array([[run[count - 1] for count in CHECKPOINTS] for run in runs])
            cells = [
                f"{mean:.2f} ± {sd:.2f}"
                for mean, sd in zip(best[sampler].mean(0), best[sampler].std(0, ddof=1), strict=True)
            ]
            print(f"| {sampler} | {' | '.join(cells)} |", flush=True)
    for sampler in samplers:
        if "random" in best and sampler != "random":
            gains = best[sampler] - best["random"]
            cells = [f"{column.mean():+.2f} ({_interval(column)})" for column in gains.T]
            print(f"| {sampler} less random | {' | '.join(cells)} |")


def _interval(gains: NDArray[np.float64]) -> str:
    """Return the 95 % interval of the mean gain, paired by seed."""
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{gains.mean() - half:+.2f} to {gains.mean() + half:+.2f}"


if __name__ == "__main__":
    main()
