"""How likely a search is to confirm each promise of its rows, were it true, and how many seeds that would take.

By simulation, since Holm's correction ties all claims of a table together: searches are drawn in which every promise
holds at its middle, and judged by the rules in `verdicts`. Neither Ray nor torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special  # type: ignore[import-untyped]

from tune_bisenet.config import Run
from tune_bisenet.report.claims import Kind
from tune_bisenet.report.cost import ASSUMED_SD, MOST_SEEDS
from tune_bisenet.report.pairs import Evidence, evidence_of
from tune_bisenet.report.statistics import ALPHA, CONFIDENCE, POWER

SIMULATED_CLAIMS: Final = 20_000
"""Of all simulated searches together: 2,000 searches of a table of ten, known to 1.1 percentage points (one sd)."""

MOST_CLAIMS: Final = 50
"""Of a longer table only the first are simulated: nobody reads more, and memory has an end."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Power:
    """One promise."""

    run: str
    kind: Kind
    reference: str | None
    promised: tuple[float, float] | None
    seeds: int
    """Of this search, at which the row and its reference are both trained."""
    share: float | None
    """Of simulated searches that confirm it, 0 to 1; None for what promises no number, or beyond MOST_CLAIMS."""
    seeds_for_80: int | None
    """The fewest, of all rows, that confirm it in 80 % of searches; None above MOST_SEEDS, or without a number."""


def powers(rows: Sequence[Run], seeds: Mapping[str, Collection[int]], *, proxy: bool) -> list[Power]:
    """Of every claim that this search can judge, in declared order. `seeds` are those of each row.

    Trials differ over seeds by ASSUMED_SD, half of that variance shared by all rows of a seed, so that differences of
    two rows have ASSUMED_SD as well. How soon a row passes another is promised without a number: such claims count in
    Holm's family and are taken as never confirmed, as are those beyond MOST_CLAIMS. Nothing is stopped early.
    """
    claims = [claim for row in rows for claim in evidence_of(row, (), proxy=proxy) if not claim.unjudged]
    numbered = [claim for claim in claims if claim.promised is not None][:MOST_CLAIMS]
    if not numbered:
        return [_power(claim, seeds, None, None) for claim in claims]
    drawn = _Drawn.of(numbered, family=len(claims))
    now = drawn.confirmed([_num_seeds(claim, seeds) for claim in numbered])
    by_seeds = np.stack([drawn.confirmed([number] * len(numbered)) for number in range(2, MOST_SEEDS + 1)])
    found = {
        id(claim): (float(share), _first(shares >= POWER))
        for claim, share, shares in zip(numbered, now, by_seeds.T, strict=True)
    }
    return [_power(claim, seeds, *found.get(id(claim), (None, None))) for claim in claims]


def _power(claim: Evidence, seeds: Mapping[str, Collection[int]], share: float | None, needed: int | None) -> Power:
    return Power(
        run=claim.run,
        kind=claim.kind,
        reference=claim.reference,
        promised=claim.promised,
        seeds=_num_seeds(claim, seeds),
        share=share,
        seeds_for_80=needed,
    )


def _num_seeds(claim: Evidence, seeds: Mapping[str, Collection[int]]) -> int:
    own = set(seeds.get(claim.run, ()))
    return len(own if claim.reference is None else own & set(seeds.get(claim.reference, ())))


def _first(enough: NDArray[np.bool_]) -> int | None:
    found = np.flatnonzero(enough)
    return int(found[0]) + 2 if len(found) else None


# --- simulated searches ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Drawn:
    """Simulated searches after 2, 3, ... MOST_SEEDS seeds: S x N x claims. Effects are above what must be exceeded."""

    p: Floats
    low: Floats
    high: Floats
    least: Floats  # claims: the low end of the promise above what must be exceeded
    family: int

    @classmethod
    def of(cls, claims: Sequence[Evidence], *, family: int) -> "_Drawn":
        effects = _effects(claims)
        n = np.arange(1, MOST_SEEDS + 1, dtype=float)[:, None]
        mean = effects.cumsum(axis=1) / n
        variance = ((effects**2).cumsum(axis=1) - n * mean**2)[:, 1:] / (n[1:] - 1)
        error, mean, freedom = np.sqrt(variance / n[1:]), mean[:, 1:], n[1:] - 1
        half = error * special.stdtrit(freedom, (1 + CONFIDENCE) / 2)
        return cls(
            p=2 * special.stdtr(freedom, -np.abs(mean / error)),
            low=mean - half,
            high=mean + half,
            least=np.array([_least(claim) for claim in claims]),
            family=family,
        )

    def confirmed(self, seeds: Sequence[int]) -> Floats:
        """By claim, the share of searches that confirm it with so many seeds (up to MOST_SEEDS); 0 with one."""
        tested = np.array([number >= 2 for number in seeds])
        place = (np.arange(len(self.p))[:, None], np.clip(seeds, 2, MOST_SEEDS) - 2, np.arange(len(seeds)))
        p_holm = _holm(np.where(tested, self.p[place], np.inf), family=self.family)
        found = tested & (self.low[place] > 0) & (self.high[place] >= self.least) & (p_holm < ALPHA)
        share: Floats = found.mean(axis=0)
        return share


def _effects(claims: Sequence[Evidence]) -> Floats:
    """S x seeds x claims: what each seed measures above what must be exceeded."""
    searches = min(2000, max(200, SIMULATED_CLAIMS // len(claims)))
    names = sorted({name for claim in claims for name in (claim.run, claim.reference) if name is not None})
    rng = np.random.default_rng(0)
    sd = ASSUMED_SD / 2**0.5
    shared = rng.normal(0, sd, (searches, MOST_SEEDS, 1))
    trials = shared + rng.normal(0, sd, (searches, MOST_SEEDS, len(names)))
    own = trials[:, :, [names.index(claim.run) for claim in claims]]
    bars = [
        np.zeros_like(shared[:, :, 0]) if claim.reference is None else trials[:, :, names.index(claim.reference)]
        for claim in claims
    ]
    effects: Floats = own - np.stack(bars, axis=2) + np.array([_middle(claim) for claim in claims])
    return effects


def _null(claim: Evidence) -> float:
    """What must be exceeded: nothing gained, or the low end of a level."""
    assert claim.promised is not None
    return claim.promised[0] if claim.kind == "miou" else 0.0


def _least(claim: Evidence) -> float:
    assert claim.promised is not None
    return claim.promised[0] - _null(claim)


def _middle(claim: Evidence) -> float:
    assert claim.promised is not None
    return sum(claim.promised) / 2 - _null(claim)


def _holm(p: Floats, *, family: int) -> Floats:
    """Holm's adjusted p-values, S x claims; claims of the family that are not among them are never confirmed."""
    order = np.argsort(p, axis=1)
    steps = np.take_along_axis(p, order, axis=1) * (family - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, axis=1), axis=1)
    return adjusted
