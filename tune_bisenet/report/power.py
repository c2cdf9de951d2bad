"""Forecast, before a search, how likely its seeds are to show each claim, were it true.

Searches are simulated in which every claim holds at its middle, and judged by the rules and statistics of `verdicts`.
"""

import bisect
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

import numpy as np

from tune_bisenet.config import Run
from tune_bisenet.report.claims import Claim, Kind, Verdict, claims_of, judge_interval
from tune_bisenet.report.statistics import POWER, Flags, Floats, compare_rows, estimate_levels, fit_noise
from tune_bisenet.report.verdicts import ASSUMED_SD, MOST_SEEDS, trained_rows
from tune_bisenet.spaces import MEASURED_SHARE

SIMULATED_SEARCHES: Final = 2000
"""So that a share is known to 1.1 percentage points (one sd); fewer where a search has thousands of trials."""

MOST_CLAIMS: Final = 50
"""Only the first claims of a longer table are simulated, to bound memory."""

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


def powers(rows: Sequence[Run], seeds: Mapping[str, Collection[int]], *, proxy: bool) -> list[Power]:
    """Return the power of every claim that this search can judge, in declared order. `seeds` are those of each row.

    Trials differ by ASSUMED_SD, none of it shared by equal seeds. How soon a row reaches a level is expected without a
    number. Nothing is stopped early.
    """
    measured = [claims_of(row, (), measured_share=MEASURED_SHARE, proxy=proxy) for row in rows]
    claims = [claim for of_row in measured for claim in of_row if claim.is_judged]
    paired = [set.intersection(*(set(seeds.get(name, ())) for name in trained_rows(claim))) for claim in claims]
    numbered = [claim for claim in claims if claim.expected is not None]
    simulated, families = numbered[:MOST_CLAIMS], Counter(claim.kind for claim in numbered)
    names = sorted({name for claim in simulated for name in trained_rows(claim)})
    numbers = sorted({seed for name in names for seed in seeds.get(name, ())})
    present = np.array([[seed in seeds.get(name, ()) for seed in numbers] for name in names], dtype=bool)
    now = _shares(simulated, names, present, families=families)

    @cache
    def shares_with(num_seeds: int) -> list[float]:
        return _shares(simulated, names, np.ones((len(names), num_seeds), dtype=bool), families=families)

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
    claims: Sequence[Claim], names: Sequence[str], present: Flags, *, families: Mapping[Kind, int]
) -> list[float]:
    """Return the share of simulated searches that show each claim. Rows `names` have the trials `present`, R x N."""
    if not present.size:
        return [0.0] * len(claims)
    num_searches = max(SIMULATED_SEARCHES // (1 + present.size // 1000), 200)
    noise = np.random.default_rng(0).normal(0, ASSUMED_SD, (num_searches, *present.shape))
    values = np.where(present, noise + _truths(claims, names)[:, None], np.nan)
    fitted = fit_noise(values)
    shares = []
    for claim in claims:
        row = names.index(claim.run)
        if claim.reference is None:
            mean, half_width = estimate_levels(values, [row], fitted, family=families[claim.kind])
        else:
            pairs = [(row, names.index(claim.reference))]
            mean, half_width = compare_rows(values, pairs, fitted, family=families[claim.kind])
        known = zip(mean[:, 0].tolist(), half_width[:, 0].tolist(), strict=True)
        shown = [judge_interval(claim, middle - half, middle + half)[0] in SHOWN for middle, half in known]
        shares.append(sum(shown) / num_searches)
    return shares


def _truths(claims: Sequence[Claim], names: Sequence[str]) -> Floats:
    """Return the mIoU of each row at which every claim holds at its middle; rows that claim none have 0."""
    middles = {claim.run: sum(claim.expected) / 2 for claim in claims if claim.expected}
    over = {claim.run: claim.reference for claim in claims if claim.reference is not None}
    return np.array([middles.get(name, 0.0) + middles.get(over.get(name, ""), 0.0) for name in names])
