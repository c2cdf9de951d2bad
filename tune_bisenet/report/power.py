"""Forecast, before a search, how likely its seeds are to show each claim, were it true, and how many trials it takes.

Searches are simulated and judged by the rules and statistics of `verdicts`: those on mIoU, not those on speed.
"""

import bisect
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.config import Run
from tune_bisenet.report.claims import Claim, Kind, Verdict, claims_of, is_final, judge_intervals
from tune_bisenet.report.statistics import (
    POWER,
    Flags,
    Floats,
    compare_rows,
    error_share,
    estimate_levels,
    fit_noise,
    reached_looks,
)
from tune_bisenet.report.verdicts import ASSUMED_SD, MOST_SEEDS, NoiseSummary, trained_rows
from tune_bisenet.spaces import MEASURED_SHARE

SIMULATED_SEARCHES: Final = 6000
"""So that a share is known to 0.65 percentage points (one sd)."""

SIMULATED_MEASURES: Final = 400_000
"""At most, so larger searches are simulated less often: 12 seeds of ten rows to 0.9 points, 100 seeds to 2.5."""

SIMULATED_DECISIONS: Final = 200
"""So that the mean number of trials is known to about two per cent."""

MOST_CLAIMS: Final = 50
"""Only the first claims of a longer table are simulated, to bound memory."""

ASSUMED_NOISE: Final = NoiseSummary(sd=ASSUMED_SD, within_sd=ASSUMED_SD, num_rows=0)
"""Noise of which equal seeds share nothing."""

Verdicts = NDArray[np.object_]
Trials = NDArray[np.int_]

SHOWN: Final[tuple[Verdict, ...]] = ("kept", "exceeded", "gained")
"""Verdicts that show a gain, whatever its size, or a level kept."""


@dataclass(frozen=True, kw_only=True)
class Power:
    """Says how likely a search is to show one claim, were it true: a gain, whatever its size, or a level kept."""

    claim: Claim
    seeds: int
    """Seeds of this search at which both the row and its reference are trained."""
    share: float | None
    """Share of simulated searches that show it, 0 to 1; None for a claim without a number, or beyond MOST_CLAIMS."""
    seeds_for_80: int | None
    """The fewest seeds of all rows that show it in 80 % of searches; None above MOST_SEEDS, or without a number."""


def powers(
    rows: Sequence[Run],
    seeds: Mapping[str, Collection[int]],
    *,
    proxy: bool,
    noise: NoiseSummary = ASSUMED_NOISE,
    spent: float = 1.0,
    looks: Sequence[int] = (),
) -> list[Power]:
    """Return the power of every claim that this search can judge, in declared order. `seeds` are those of each row.

    Trials differ by `noise`, and nothing is stopped early. How soon a row reaches a level is expected without a number.
    `spent` is the share of the error that these claims may use up at all of their planned `looks`.
    """
    measured = [claims_of(row, (), measured_share=MEASURED_SHARE, proxy=proxy) for row in rows]
    claims = [claim for of_row in measured for claim in of_row if claim.is_judged]
    paired = [set.intersection(*(set(seeds.get(name, ())) for name in trained_rows(claim))) for claim in claims]
    numbered = [claim for claim in claims if claim.expected is not None]
    simulated, families = numbered[:MOST_CLAIMS], Counter(claim.kind for claim in numbered)
    names = sorted({name for claim in simulated for name in trained_rows(claim)})
    numbers = sorted({seed for name in names for seed in seeds.get(name, ())})
    present = np.array([[seed in seeds.get(name, ()) for seed in numbers] for name in names], dtype=bool)
    shares = partial(_shares, simulated, names, families=families, noise=noise, spent=spent, looks=looks)
    now = shares(present)

    @cache
    def shares_with(num_seeds: int) -> list[float]:
        return shares(np.ones((len(names), num_seeds), dtype=bool))

    def seeds_for_80(index: int) -> int | None:
        candidates = range(2, MOST_SEEDS + 1)
        first = bisect.bisect_left(candidates, POWER, key=lambda number: shares_with(number)[index])
        return candidates[first] if first < len(candidates) else None

    places = {id(claim): index for index, claim in enumerate(simulated)}
    return [
        Power(
            claim=claim,
            seeds=len(common),
            share=None if (index := places.get(id(claim))) is None else now[index],
            seeds_for_80=None if index is None else seeds_for_80(index),
        )
        for claim, common in zip(claims, paired, strict=True)
    ]


def _shares(
    claims: Sequence[Claim],
    names: Sequence[str],
    present: Flags,
    *,
    families: Mapping[Kind, int],
    noise: NoiseSummary,
    spent: float,
    looks: Sequence[int],
) -> list[float]:
    """Return the share of simulated searches that show each claim. Rows `names` have the trials `present`, R x N."""
    if not present.size or not reached_looks(present.shape[1], looks):
        return [0.0] * len(claims)
    num_searches = min(max(SIMULATED_MEASURES // present.size, 200), SIMULATED_SEARCHES)
    drawn = _draw_noise(noise, (num_searches, *present.shape))
    values = np.where(present, drawn + _truths(claims, names)[:, None], np.nan)
    by_look, _ = judge_at_looks(values, claims, names, looks, families=families, decides=False, spent=spent)
    return [float(share) for share in np.isin(by_look[-1], SHOWN).mean(0)]


def _draw_noise(noise: NoiseSummary, shape: tuple[int, int, int]) -> Floats:
    """Return S x R x N draws: a residual for each trial, and what the rows of a seed share."""
    num_searches, _num_rows, num_seeds = shape
    rng = np.random.default_rng(0)
    residuals = rng.normal(0, noise.sd, shape)
    shared_sd = math.sqrt(max(noise.within_sd**2 - noise.sd**2, 0.0))
    return residuals + rng.normal(0, shared_sd, (num_searches, 1, num_seeds))


def judge_values(
    values: Floats, claims: Sequence[Claim], names: Sequence[str], *, families: Mapping[Kind, int], spent: float = 1.0
) -> Verdicts:
    """Return the verdicts, S x claims, on gains and levels of S searches by what rows `names` measured, S x R x N.

    `families` holds the number of claims by kind, and `spent` the share of the error that may be used up.
    """
    noise = fit_noise(values)
    verdicts = np.full((len(values), len(claims)), "open", dtype=object)
    rows = [names.index(claim.run) for claim in claims]
    gains = [index for index, claim in enumerate(claims) if claim.reference is not None]
    levels = [index for index, claim in enumerate(claims) if claim.reference is None]
    pairs = [(rows[index], names.index(claims[index].reference or "")) for index in gains]
    of_gains = compare_rows(values, pairs, noise, family=families["gain"], spent=spent)
    level_rows = [rows[index] for index in levels]
    of_levels = estimate_levels(values, level_rows, noise, family=families["miou"], spent=spent)
    for indices, (low, high) in ((gains, of_gains), (levels, of_levels)):
        for column, index in enumerate(indices):
            verdicts[:, index] = judge_intervals(claims[index], low[:, column], high[:, column])
    return verdicts


def judge_at_looks(
    values: Floats,
    claims: Sequence[Claim],
    names: Sequence[str],
    looks: Sequence[int],
    *,
    families: Mapping[Kind, int],
    decides: bool,
    spent: float = 1.0,
) -> tuple[Verdicts, Trials]:
    """Judge S simulated searches at planned looks; return verdicts, looks x S x claims, and the trials of each search.

    `values`, S x R x N, are what each row would measure at each seed. With `decides`, only open claims get the seeds of
    the next look, as by `--decide`; else all rows do. `families` holds the number of claims by kind. All planned looks
    together may use up the share `spent` of the error.
    """
    reached = reached_looks(values.shape[2], looks)
    needed = np.array([[name in trained_rows(claim) for name in names] for claim in claims])
    num_seeds = np.full(values.shape[:2], reached[0])
    verdicts = np.full((len(values), len(claims)), "open", dtype=object)
    by_look = []
    for look, next_look in zip(reached, [*reached[1:], 0], strict=True):
        has_trial = np.arange(look) < num_seeds[:, :, None]
        seen = np.where(has_trial, values[:, :, :look], np.nan)
        share = spent * error_share(look, num_looks=len(looks))
        found = judge_values(seen, claims, names, families=families, spent=share)
        verdicts = np.where(is_final(verdicts, found), verdicts, found)
        by_look.append(verdicts)
        goes_on = (verdicts == "open") @ needed if decides else np.ones_like(num_seeds, dtype=bool)
        num_seeds = np.where(goes_on, max(next_look, look), num_seeds)
    return np.stack(by_look), num_seeds.sum(1)


@dataclass(frozen=True, kw_only=True)
class ExpectedTrials:
    """Says how many trials `--decide` is expected to train: means over simulated searches."""

    if_kept: float
    """If every claim is true at its middle."""
    if_equal: float
    """If all rows are equal."""
    most: int
    """If every row gets all seeds."""


def expected_trials(
    rows: Sequence[Run],
    looks: Sequence[int],
    *,
    proxy: bool,
    noise: NoiseSummary = ASSUMED_NOISE,
    spent: float = 1.0,
) -> ExpectedTrials | None:
    """Return what `--decide` is expected to take; None for rows that claim nothing on mIoU. Claims on speed add to it.

    `noise` and `spent` are as in `powers`.
    """
    measured = [claims_of(row, (), measured_share=MEASURED_SHARE, proxy=proxy) for row in rows]
    claims = [claim for of_row in measured for claim in of_row if claim.is_judged and claim.expected][:MOST_CLAIMS]
    if not claims:
        return None
    names = sorted({name for claim in claims for name in trained_rows(claim)})
    num_others = len({row.name for row in rows} - set(names))  # they get the seeds of the first look
    drawn = _draw_noise(noise, (SIMULATED_DECISIONS, len(names), looks[-1]))
    judged = partial(
        judge_at_looks,
        claims=claims,
        names=names,
        looks=looks,
        families=Counter(claim.kind for claim in claims),
        decides=True,
        spent=spent,
    )
    levels = np.full(len(names), next((_middle(claim) for claim in claims if claim.kind == "miou"), 0.0))
    kept, equal = (
        float(judged(drawn + truths[:, None])[1].mean()) + num_others * looks[0]
        for truths in (_truths(claims, names), levels)
    )
    return ExpectedTrials(if_kept=kept, if_equal=equal, most=(len(names) + num_others) * looks[-1])


def _truths(claims: Sequence[Claim], names: Sequence[str]) -> Floats:
    """Return the mIoU of each row at which every claim holds at its middle; rows that claim none have 0."""
    middles = {claim.run: _middle(claim) for claim in claims}
    over = {claim.run: claim.reference for claim in claims if claim.reference is not None}
    return np.array([middles.get(name, 0.0) + middles.get(over.get(name, ""), 0.0) for name in names])


def _middle(claim: Claim) -> float:
    low, high = claim.expected or (0.0, 0.0)
    return (low + high) / 2
