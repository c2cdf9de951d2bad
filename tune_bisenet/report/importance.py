"""Which parameters mattered, by two of Optuna's measures: PED-ANOVA, and fANOVA over a forest.

Only trials that went to their last epoch count: where a trial was stopped says more of the scheduler than of its
parameters. A parameter that only some trials have is measured within those.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from tune_bisenet.report.figures import Figure, Trace
from tune_bisenet.report.history import LEGEND_BELOW
from tune_bisenet.report.samples import Parameter, Sample, param_words, parameters
from tune_bisenet.report.views import Cell, View
from tune_bisenet.text import counted

if TYPE_CHECKING:
    from optuna.importance import BaseImportanceEvaluator
    from optuna.study import Study

Measure = Literal["PED-ANOVA", "fANOVA"]

COLOURS: Final[dict[Measure, str]] = {"PED-ANOVA": "#3b7dd8", "fANOVA": "#e8833a"}

MIN_TRIALS: Final = 10
"""Under so many complete trials both measures tell noise."""

MIN_TOP_TRIALS: Final = 5
"""PED-ANOVA compares the best with all; its authors want at least five among the best."""
TOP_SHARE: Final = 0.1

MAX_FANOVA_TRIALS: Final = 300
"""fANOVA takes many seconds over more, and says the same of as many that were chosen at random."""

CAUTION: Final = (
    "This is what went with mIoU in trials that an optimiser chose, not what caused it: it looks where it hopes to "
    "find, so parameters come in company, and what it left early is hardly known."
)


@dataclass(frozen=True, kw_only=True)
class Importance:
    """The parameters' shares within one group of trials."""

    given: str
    """As `optimizer = sgd`; empty for all trials."""
    num_trials: int
    shares: dict[Measure, dict[str, float]]
    """By measure and parameter: those of the group, and those that all trials have. Each measure's add up to 1."""
    own: tuple[str, ...]
    """The parameters that this group is about."""
    why_not: str
    """Why there are no shares; empty if there are."""

    @property
    def names(self) -> list[str]:
        """Its own parameters that varied, the highest mean share first."""
        varied = [name for name in self.own if name in next(iter(self.shares.values()), {})]
        return sorted(varied, key=lambda name: -sum(share[name] for share in self.shares.values()))

    @property
    def title(self) -> str:
        return f"Given {self.given}" if self.given else "Over all trials"


def importances(of: Sequence[Sample]) -> list[Importance]:
    """Over all complete trials, then within those that have the same further parameters."""
    complete = [one for one in of if one.is_complete]
    if not complete:
        return []
    having: dict[frozenset[int], list[str]] = {frozenset(one.number for one in complete): []}
    for name in dict.fromkeys(name for one in complete for name in one.params):
        having.setdefault(frozenset(one.number for one in complete if name in one.params), []).append(name)
    groups = [([one for one in complete if one.number in numbers], own) for numbers, own in having.items()]
    return [_importance(group, own, complete) for group, own in groups if own]


def _condition(group: Sequence[Sample], complete: Sequence[Sample]) -> str:
    """The choices that all of the group made and not all others did; only the decisive one, if there is one."""
    shared = {
        name: value
        for name, value in group[0].params.items()
        if isinstance(value, str | bool) and all(_made(one, name, value) for one in group)
    }
    takers = {name: sum(_made(one, name, value) for one in complete) for name, value in shared.items()}
    telling = [name for name in shared if takers[name] < len(complete)]
    decisive = [name for name in telling if takers[name] == len(group)]
    return " and ".join(f"{name} = {param_words(shared[name])}" for name in decisive[:1] or telling)


def _made(one: Sample, name: str, value: object) -> bool:
    return name in one.params and one.params[name] == value


def _importance(group: Sequence[Sample], own: Sequence[str], complete: Sequence[Sample]) -> Importance:
    common = [one for one in parameters(group) if all(one.name in sample.params for sample in group)]
    varied = [one for one in common if one.ends[0] < one.ends[1]]
    why_not = _why_not(group, varied)
    shares = {} if why_not else _shares(group, varied)
    given = "" if len(group) == len(complete) else _condition(group, complete) or f"{own[0]} applies"
    return Importance(given=given, num_trials=len(group), shares=shares, own=tuple(own), why_not=why_not)


def _why_not(group: Sequence[Sample], varied: Sequence[Parameter]) -> str:
    if len(group) < MIN_TRIALS:
        return f"{len(group)} of the {MIN_TRIALS} complete trials that it takes to tell."
    if not varied:
        return "no parameter varies."
    if len({one.miou for one in group}) == 1:
        return "all trials reached the same mIoU, so nothing made a difference."
    return ""


# --- Optuna's measures ----------------------------------------------------------------------------------------------


def _shares(group: Sequence[Sample], varied: Sequence[Parameter]) -> dict[Measure, dict[str, float]]:
    from optuna.importance import (  # late: it takes two seconds
        FanovaImportanceEvaluator,
        PedAnovaImportanceEvaluator,
        get_param_importances,
    )

    top = min(0.5, max(TOP_SHARE, MIN_TOP_TRIALS / len(group)))
    evaluators: dict[Measure, BaseImportanceEvaluator] = {
        "PED-ANOVA": PedAnovaImportanceEvaluator(target_quantile=top),
        "fANOVA": FanovaImportanceEvaluator(seed=0),
    }
    some = random.Random(0).sample(group, MAX_FANOVA_TRIALS) if len(group) > MAX_FANOVA_TRIALS else group
    studies = {"PED-ANOVA": _study(group, varied), "fANOVA": _study(some, varied)}
    return {measure: get_param_importances(studies[measure], evaluator=one) for measure, one in evaluators.items()}


def _study(group: Sequence[Sample], varied: Sequence[Parameter]) -> "Study":
    """In memory, of complete trials alone: the measures look at no others.

    Numbers are given by their places, logarithmic ones by their logarithms: fANOVA weighs a range evenly, and of one
    from 0.0001 to 0.1 would see little but the last decade.
    """
    import optuna

    ranges: dict[str, optuna.distributions.BaseDistribution] = {
        one.name: optuna.distributions.CategoricalDistribution(one.choices)
        if one.choices
        else optuna.distributions.FloatDistribution(*one.ends)
        for one in varied
    }
    with _quiet():
        study = optuna.create_study(direction="maximize")
    for sample in group:
        params: dict[str, Any] = {
            one.name: sample.params[one.name] if one.choices else one.place(sample.params[one.name]) for one in varied
        }
        study.add_trial(optuna.trial.create_trial(params=params, distributions=ranges, value=sample.miou))
    return study


@contextmanager
def _quiet() -> Iterator[None]:
    """Optuna announces each new study in the terminal."""
    import optuna

    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


# --- as shown -------------------------------------------------------------------------------------------------------


def importance_view(found: Sequence[Importance]) -> View:
    """All shares as a table, with what they mean and what they do not."""
    if not found:
        return View(words="No trial has gone to its last epoch yet, so nothing is known of the parameters.")
    reasons = [f"{one.title}: {one.why_not}" for one in found if one.why_not]
    told = [one for one in found if one.names]
    if not told:
        return View(words=" ".join(reasons))
    meaning = (
        "Shares of the differences in best mIoU, over trials that went to their last epoch. PED-ANOVA: what tells the "
        "best trials from all; fANOVA: what explains mIoU everywhere. They add up to 100 % however little there is to "
        "explain."
    )
    return View(
        words=" ".join([CAUTION, meaning, *reasons]),
        columns=("parameter", "among", "trials", *COLOURS),
        rows=tuple(_line(name, one) for one in told for name in one.names),
        numbers=frozenset({"trials", *COLOURS}),
    )


def _line(name: str, one: Importance) -> tuple[Cell, ...]:
    shares = [Cell(f"{100 * one.shares[measure][name]:.0f} %") for measure in COLOURS]
    return (Cell(name), Cell(one.given or "all"), Cell(str(one.num_trials)), *shares)


def importance_figures(found: Sequence[Importance]) -> list[Figure]:
    """Bars of both measures side by side, a plot for each group."""
    told = [one for one in found if one.names]
    return [_figure(f"importance-{place}", one) for place, one in enumerate(told)]


def _figure(name: str, one: Importance) -> Figure:
    names = one.names[::-1]  # bars are drawn from below
    data = [_bars(measure, one.shares[measure], names) for measure in reversed(COLOURS)]
    layout = {
        "barmode": "group",
        "bargap": 0.3,
        "xaxis": {"rangemode": "tozero", "ticksuffix": " %", "automargin": True},
        "yaxis": {"type": "category", "automargin": True, "showgrid": False, "ticksuffix": "  "},
        "legend": LEGEND_BELOW | {"traceorder": "reversed"},
        "height": 120 + 34 * len(names),
    }
    rest = " What is missing to 100 % is that of the parameters that all trials have." if one.given else ""
    some = f" fANOVA looks at {MAX_FANOVA_TRIALS} of them." if one.num_trials > MAX_FANOVA_TRIALS else ""
    caption = f"{counted(one.num_trials, 'trial')}.{some}{rest}"
    return Figure(name=name, title=one.title, caption=caption, data=data, layout=layout)


def _bars(measure: Measure, shares: Mapping[str, float], names: Sequence[str]) -> Trace:
    return {
        "type": "bar",
        "orientation": "h",
        "name": measure,
        "y": names,
        "x": [round(100 * shares[name], 1) for name in names],
        "marker": {"color": COLOURS[measure]},
        "hovertemplate": f"<b>%{{y}}</b> {measure}: %{{x:.0f}} %<extra></extra>",
    }
