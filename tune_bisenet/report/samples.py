"""The points of a study with what became of them, and the parameters that they are points of.

Fresh seeds of a choice are no points: they would tell the choice twice.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, TypeVar

from tune_bisenet.config import Run
from tune_bisenet.records import Known, Param, TrialSpec, TrialState
from tune_bisenet.report.leaderboard import best_first
from tune_bisenet.report.read import SearchRecord

NUM_BEST: Final = 5
"""Trials that stand out in plots of many."""
MAX_TICKS: Final = 5
MAX_LINES: Final = 200
"""More lines in one plot are no picture, and a browser labours to draw them."""

Thing = TypeVar("Thing")


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One trial that the study was told of."""

    trial: str
    """Of an earlier search: `NAME/trial`."""
    number: int
    """Its place in the history. Earlier searches come right before the study's own first trial."""
    is_known: bool
    """Of an earlier search."""
    is_declared: bool
    """A row of the space, not a point that the sampler chose."""
    suggested: TrialSpec
    standing: TrialState

    @property
    def run(self) -> Run:
        return self.suggested.run

    @property
    def params(self) -> dict[str, Param]:
        return self.suggested.params

    @property
    def miou(self) -> float | None:
        return self.standing.best_miou

    @property
    def is_complete(self) -> bool:
        """Trained to its last epoch: the only value that says what the point is worth."""
        return self.standing.status == "finished" and self.miou is not None


def samples(search: SearchRecord) -> list[Sample]:
    """In the order of the history; none without a study."""
    if search.study is None:
        return []
    own = [(one.number, trial, one) for trial, one in search.study.suggested.items() if one.number is not None]
    known = [one for one in search.study.known if one.suggested.origin != "confirm"]
    first = min((number for number, _, _ in own), default=0) - len(known)
    return [
        *(_known(first + place, one) for place, one in enumerate(known)),
        *(_own(number, one, search.trials[trial].standing) for number, trial, one in own),
    ]


def _known(number: int, one: Known) -> Sample:
    return Sample(
        trial="/".join(one.source.rstrip("/").split("/")[-2:]),
        number=number,
        is_known=True,
        is_declared=one.suggested.origin == "row",
        suggested=one.suggested,
        standing=one.standing,
    )


def _own(number: int, one: TrialSpec, standing: TrialState) -> Sample:
    return Sample(
        trial=one.trial,
        number=number,
        is_known=False,
        is_declared=one.origin == "row",
        suggested=one,
        standing=standing,
    )


def best_sample(of: Iterable[Sample]) -> Sample | None:
    """The highest mIoU of those trained to their end, else of all; None if there is none yet."""
    measured = [one for one in of if one.miou is not None]
    return max(measured, key=lambda one: (one.is_complete, one.miou or 0.0, -one.number), default=None)


def thinned(things: Sequence[Thing], most: int) -> list[Thing]:
    """At most so many of them, evenly spread, the last one among them."""
    count = len(things)
    return list(things) if count <= most else [things[count - 1 - place * count // most] for place in range(most)][::-1]


def shown_rows(search: SearchRecord) -> list[str]:
    """Names of the rows that stand out: in a grid all, in a study the baseline, the best declared row and the best."""
    names = [row.name for row in search.rows]
    if search.study is None:
        return names
    declared = {row.name for row in search.declared_rows}
    ranked = list(dict.fromkeys(one.run for one in best_first(search.standings) if one.best_miou is not None))
    chosen = {search.baseline, *[name for name in ranked if name in declared][:1], *ranked[:NUM_BEST]}
    return [name for name in names if name in chosen]


# --- parameters -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter over all points that have it: a range of numbers, or choices."""

    name: str
    low: float
    high: float
    is_log: bool
    choices: tuple[Param, ...]
    """Empty for a number."""

    def place(self, value: Param) -> float:
        """On a scale where equal distances mean equal steps: the logarithm if it is logarithmic, a choice's index."""
        if self.choices:
            return float(self.choices.index(value))
        number = float(value or 0)
        return math.log10(number) if self.is_log else number

    @property
    def ends(self) -> tuple[float, float]:
        """The range in places."""
        return (0.0, len(self.choices) - 1.0) if self.choices else (self.place(self.low), self.place(self.high))

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """Round values within the range, or all choices: place and words."""
        if self.choices:
            return [(float(place), param_words(choice)) for place, choice in enumerate(self.choices)]
        values = round_logarithms(self.low, self.high) if self.is_log else round_numbers(self.low, self.high)
        return [(self.place(value), f"{value:.6g}") for value in values]


def parameters(of: Sequence[Sample]) -> list[Parameter]:
    """Those that any of these points has, with the widest range that any was drawn from."""
    names = dict.fromkeys(name for one in of for name in one.params)
    return [_parameter(name, [one for one in of if name in one.params]) for name in names]


def _parameter(name: str, of: Sequence[Sample]) -> Parameter:
    from optuna import distributions  # late: a grid does not need it

    ranges = [
        distributions.json_to_distribution(text)
        for text in dict.fromkeys(one.suggested.distributions[name] for one in of)
    ]
    values = [one.params[name] for one in of]
    categorical = [one for one in ranges if isinstance(one, distributions.CategoricalDistribution)]
    numeric = [
        one for one in ranges if isinstance(one, distributions.FloatDistribution | distributions.IntDistribution)
    ]
    if categorical:
        offered = [choice for one in categorical for choice in one.choices]
        return Parameter(name=name, low=0, high=0, is_log=False, choices=tuple(dict.fromkeys([*offered, *values])))
    numbers = [float(value or 0) for value in values]
    low, high = min([*numbers, *(one.low for one in numeric)]), max([*numbers, *(one.high for one in numeric)])
    return Parameter(name=name, low=low, high=high, is_log=low > 0 and all(one.log for one in numeric), choices=())


def param_words(value: Param) -> str:
    if value is None:
        return "none"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


# --- axes -----------------------------------------------------------------------------------------------------------


def round_numbers(low: float, high: float) -> list[float]:
    """At most MAX_TICKS round numbers from `low` to `high`."""
    if low == high:
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / MAX_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) < MAX_TICKS)
    return [float(f"{number * step:.10g}") for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def round_logarithms(low: float, high: float) -> list[float]:
    """Powers of ten from `low` to `high`; with few of them also twice and five times those."""
    exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1,), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        found = [float(f"{factor}e{exponent}") for exponent in exponents for factor in factors]
        within = [value for value in found if low * 0.999 <= value <= high * 1.001]
        if len(within) > 2:
            return within
    return [low, high]


def floor_of(of: Sequence[Sample]) -> float:
    """Where an axis of mIoU begins so that a few trials far below the rest do not press it flat.

    One and a half times the distance of the quartiles below the lower one, as in a box plot.
    """
    mious = sorted(one.miou for one in of if one.miou is not None)
    if len(mious) < 4:
        return mious[0] if mious else 0.0
    lower, _, upper = statistics.quantiles(mious, n=4)
    return max(mious[0], lower - 1.5 * (upper - lower))
