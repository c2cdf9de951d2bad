"""Optuna's samplers against random draws, on a surrogate of the space fitted to trials of our own: no training.

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
from tune_bisenet.records import Param, TrialState
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs
from tune_bisenet.study import sampling
from tune_bisenet.study.study import Question, Study, open_storage

CHECKPOINTS = (10, 20, 40)
"""After how many trials the best value is noted."""
FACTS = DataFacts(num_train=96, num_val=24, suggested_image_size=(96, 192))
SETTINGS = RowOverrides(num_epochs=8, proxy=True)

Params = Mapping[str, Param]
Surrogate = Callable[[Params], float]


# --- the surrogate --------------------------------------------------------------------------------------------------


class Encoder:
    """Values as numbers in 0..1, logarithms where the space draws logarithms; a column says whether a value applies."""

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
    low, high, given = float(distribution.low), float(distribution.high), float(value)  # type: ignore[attr-defined]
    if distribution.log:  # type: ignore[attr-defined]
        low, high, given = np.log(low), np.log(high), np.log(given)
    return [(given - low) / (high - low), 1.0]


def read_trials(path: Path, distributions: Mapping[str, BaseDistribution]) -> list[tuple[dict[str, Param], float]]:
    """Values and best mIoU of every trial that went to its end."""
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
    """The better of two models, and what cross-validation says of both."""
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
    words = "; ".join(f"{name}: R² {r2:.2f}, rank correlation {rank:.2f}" for name, (r2, rank) in scores.items())
    return lambda params: float(model.predict([encode(params)])[0]), f"{best} of ({words}), 10-fold, n = {len(trials)}"


def _r2(values: NDArray[np.float64], guesses: NDArray[np.float64]) -> float:
    return float(1 - ((values - guesses) ** 2).sum() / ((values - values.mean()) ** 2).sum())


# --- the searches ---------------------------------------------------------------------------------------------------


def search(sampler: str, seed: int, surrogate: Surrogate, *, rows_first: bool, place: Path) -> list[float]:
    """The best value after each trial of a study that is asked as a search asks it."""
    space = spaces.load_space("around10")
    assert isinstance(space, spaces.Sampled)
    draw = sampling.draw_with(space, SETTINGS, FACTS, ("miou",))
    runs = resolve_runs(space.rows, SETTINGS, FACTS) if rows_first else ()
    rows = {
        run.name: (run, sampling.point_of(row, space, draw, ("miou",)))
        for run, row in zip(runs, space.rows, strict=False)
    }
    question = Question(draw=draw, rows=rows, objectives=("miou",), sampler=sampler, seed=seed)  # type: ignore[arg-type]
    storage = open_storage(f"sqlite:///{place}/{sampler}-{seed}-{rows_first}.db")
    study = Study(storage, "benchmark", question, limit=max(CHECKPOINTS), checkpoint_of=str)
    study.reconcile([], [])
    best: list[float] = []
    while (suggested := study.next()) is not None:
        value = surrogate(suggested.params)
        best.append(max([value, *best[-1:]]))
        study.ended(
            TrialState(
                trial=suggested.trial,
                run=suggested.run.name,
                seed=seed,
                num_epochs=8,
                status="finished",
                best_miou=value,
            )
        )
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("table", type=Path)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--samplers", default="tpe,random")
    given = parser.parse_args()
    space = spaces.load_space("around10")
    assert isinstance(space, spaces.Sampled)
    points = sampling.rehearse(sampling.draw_with(space, SETTINGS, FACTS, ("miou",)), seed=0, draws=2000)
    distributions = {name: one for point in points for name, one in point.distributions.items()}
    surrogate, words = fit(read_trials(given.table, distributions), Encoder(distributions))
    values = [surrogate(point.params) for point in points]
    print(
        f"surrogate: {words}; over 2,000 random points: median {statistics.median(values):.2f}, best {max(values):.2f}"
    )
    for rows_first in (False, True):
        compare(given.samplers.split(","), given.seeds, surrogate, rows_first=rows_first)


def compare(samplers: Sequence[str], seeds: int, surrogate: Surrogate, *, rows_first: bool) -> None:
    print(f"\n{'the ten rows first' if rows_first else 'from nothing'}, {seeds} seeds: best mIoU, mean (± sd)")
    found = {}
    with tempfile.TemporaryDirectory() as place:
        for sampler in samplers:
            runs = [search(sampler, seed, surrogate, rows_first=rows_first, place=Path(place)) for seed in range(seeds)]
            found[sampler] = np.array([[run[count - 1] for count in CHECKPOINTS] for run in runs])
            cells = [
                f"{mean:.2f} ± {sd:.2f}"
                for mean, sd in zip(found[sampler].mean(0), found[sampler].std(0, ddof=1), strict=True)
            ]
            print(f"| {sampler} | {' | '.join(cells)} |", flush=True)
    for sampler in samplers:
        if "random" in found and sampler != "random":
            gains = found[sampler] - found["random"]
            cells = [f"{column.mean():+.2f} ({_interval(column)})" for column in gains.T]
            print(f"| {sampler} less random | {' | '.join(cells)} |")


def _interval(gains: NDArray[np.float64]) -> str:
    """95 %, paired by seed."""
    half = stats.t.ppf(0.975, len(gains) - 1) * gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{gains.mean() - half:+.2f} to {gains.mean() + half:+.2f}"


if __name__ == "__main__":
    main()
