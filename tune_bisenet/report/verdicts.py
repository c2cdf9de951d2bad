"""Judge a table of claims: confirmed, refuted or undecided, how sure that is, and what it would cost to know.

Pure functions over rows and what their trials measured; neither Ray nor torch. A trial's measure is its best mIoU.
The rules, of which `claims` applies those of one claim:

- **Pairs.** A row and its reference are compared seed by seed. If either ended before its last epoch, both count up to
  the last epoch that both reached, and the claim says so. A trial that failed is left out; while one is pending or
  running, its claims are undecided, so that looking often finds nothing that is not there.
- **A gain** is confirmed when its 95 % interval (paired t) is above 0 and meets the expected range or is above it,
  and p after Holm's correction is under 0.05. It is refuted when the interval is at or under 0, or below the range.
- **A level of mIoU** is confirmed when its interval (one-sample t) is within or above the range, tested against the
  range's low end with the same correction; refuted when it is below. A trial stopped early could still have risen:
  it can confirm, not refute. On a proxy a level is not judged.
- **Sooner** counts epochs saved: when the reference reached its own final (best) mIoU, less when the row first did. A
  row that never did counts as if in the epoch after its last, which is an upper bound: such a pair can refute, not
  confirm; none at any seed of runs that completed refutes. Whole epochs are a spread of their own.
- **Holm's family** is every claim of the table that this search can judge, whether or not it is measured yet. It guards
  what is confirmed; a refutation depends on its own interval alone.
- **Diverged** runs ended there. A claim with one, of the row or of its reference, is never confirmed; a row that
  diverged at every seed (two or more) is refuted.
- **One seed** has no verdict; neither have seeds that changed nothing. Only no gain at all, to the last bit at every
  seed, is refuted.
- **Seeds needed** find what is measured so far, but no less than the middle of the expectation (for "sooner", the
  epochs measured), at a power of 80 %, at the spread measured and at the level of Holm's next step.
"""

import math
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special  # type: ignore[import-untyped]

from tune_bisenet.config import Run
from tune_bisenet.report.claims import ASSUMED_SD, Claim, Range, SampleSize, claims_of, confounded_rows, decided
from tune_bisenet.report.read import ReportedTrial, SearchRecord, Unit
from tune_bisenet.report.statistics import ALPHA, CONFIDENCE, POWER, holm, seeds_for_power
from tune_bisenet.text import counted

MOST_SEEDS: Final = 100
"""More seeds than this are shown as "more than 100"."""

SIMULATED_CLAIMS: Final = 20_000
"""Claims of all simulated searches: 2,000 searches of a table of ten, so known to 1.1 percentage points (one sd)."""

MOST_CLAIMS: Final = 50
"""Only the first claims of a longer table are simulated, to bound memory."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class MoreSeeds:
    """What would decide every claim that up to 100 more seeds can decide."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    hours: float | None


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Every claim of a table, in declared order."""

    claims: tuple[Claim, ...]
    family: int
    """How many claims Holm's correction is over."""
    seeds: tuple[int, ...]
    hours_per_seed: Mapping[str, float]
    """What one more seed of a row costs at the speed measured; empty before anything was."""
    unit: Unit

    @property
    def more_seeds(self) -> MoreSeeds | None:
        """The undecided rows with their references; None if no number of seeds up to 100 decides any.

        One command runs them: every row gets as many seeds as the one that needs most.
        """
        wanted = [(claim, size.seeds) for claim in self.claims if (size := claim.sample_size) and not size.is_capped]
        if not wanted:
            return None
        most = max(seeds for _, seeds in wanted)
        first = max(self.seeds, default=-1) + 1
        names = sorted({name for claim, _ in wanted for name in _trained(claim)})
        hours = _hours(most, names, self.hours_per_seed)
        return MoreSeeds(runs=tuple(names), seeds=tuple(range(first, first + most)), hours=hours)

    def next_command(self, *, space: str, name: str, storage: str) -> str | None:
        """Return the command that runs `more_seeds`."""
        more = self.more_seeds
        if more is None:
            return None
        runs, seeds = ",".join(more.runs), ",".join(map(str, more.seeds))
        command = ["python", "-m", "tune_bisenet.run", "--space", space, "--name", name, "--add"]
        return shlex.join([*command, "--runs", runs, "--seeds", seeds, "--storage", storage])


def judge_search(search: SearchRecord) -> Judgement:
    """Judge the declared rows; what a sampler made up expects nothing.

    A row that got fresh seeds because it looked best is judged by them alone: the seed it was chosen by flatters.
    """
    devices, unit = search.devices_per_trial
    fresh = search.fresh_trials
    chosen = {record.run.name for record in fresh.values()} - {search.baseline}
    trials = [record for name, record in search.trials.items() if name in fresh or record.run.name not in chosen]
    proxy = search.manifest.proxy is not None
    return judge(search.declared_rows, trials, proxy=proxy, devices_per_trial=devices, unit=unit)


def judge(
    rows: Sequence[Run],
    trials: Sequence[ReportedTrial],
    *,
    proxy: bool = False,
    devices_per_trial: float = 1.0,
    unit: Unit = "GPU-hours",
) -> Judgement:
    """Judge the rows of a search (one Run each, or one a seed) by its trials.

    `devices_per_trial` is the share of a GPU, or of the machine, that a trial has to itself.
    """
    declared = {row.name: row for row in rows}
    measured = [claim for row in declared.values() for claim in claims_of(row, trials, proxy=proxy)]
    family = sum(claim.is_judged for claim in measured)
    p_holm = iter(holm([claim.p for claim in measured if claim.is_judged]))
    claims = [decided(claim, next(p_holm) if claim.is_judged else None) for claim in measured]
    num_open = family - sum(claim.verdict == "confirmed" for claim in claims)
    hours = _hours_per_seed(declared.values(), trials, devices_per_trial=devices_per_trial)
    confounded = confounded_rows(declared)
    return Judgement(
        claims=tuple(
            replace(
                claim,
                sample_size=_sample_size(claim, alpha=ALPHA / max(num_open, 1), hours_per_seed=hours),
                confounded=confounded[claim.run],
            )
            for claim in claims
        ),
        family=family,
        seeds=tuple(sorted({trial.run.seed for trial in trials})),
        hours_per_seed=hours,
        unit=unit,
    )


def _sample_size(claim: Claim, *, alpha: float, hours_per_seed: Mapping[str, float]) -> SampleSize | None:
    """Return None where seeds are not what is missing."""
    test = claim.test
    if claim.verdict != "undecided" or claim.pending or claim.obstacle or (test and test.p is None):
        return None
    # A row that so far falls short gets the seeds that would confirm its expectation if it were true.
    effects = [test.mean] if test else []
    effects += [sum(claim.expected) / 2] if claim.expected else []
    if not effects or max(effects) < claim.must_exceed:
        return None
    spread = ASSUMED_SD if test is None else test.sd
    effect, most = max(effects) - claim.must_exceed, MOST_SEEDS + len(claim.pairs)
    total = seeds_for_power(effect=effect, sd=spread, alpha=alpha, most=most)
    more = MOST_SEEDS if total is None else max(total - len(claim.pairs), 1)
    return SampleSize(
        seeds=more,
        is_capped=total is None,
        spread=spread,
        is_assumed=test is None,
        hours=_hours(more, _trained(claim), hours_per_seed),
    )


def _trained(claim: Claim) -> list[str]:
    return [name for name in (claim.run, claim.reference) if name is not None]


def _hours(seeds: int, names: Iterable[str], hours_per_seed: Mapping[str, float]) -> float | None:
    """Return device hours; None while a row's speed is unknown."""
    hours = [hours_per_seed.get(name, math.nan) for name in names]
    return None if any(map(math.isnan, hours)) else seeds * sum(hours)


def _hours_per_seed(
    rows: Iterable[Run], trials: Sequence[ReportedTrial], *, devices_per_trial: float
) -> dict[str, float]:
    """Return device hours of one complete trial; a row without epochs is given those of all the others."""
    hours = {}
    for row in rows:
        known = [trial for trial in trials if trial.run.name == row.name and trial.epochs]
        known = known or [trial for trial in trials if trial.epochs]
        if known:
            seconds = [epoch.seconds for trial in known for epoch in trial.epochs]
            num_epochs = max(trial.run.num_epochs for trial in known)
            hours[row.name] = math.fsum(seconds) / len(seconds) * num_epochs * devices_per_trial / 3600
    return hours


def format_range(bounds: Range, form: str) -> str:
    low, high = bounds
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def format_expected(claim: Claim) -> str:
    """Format as `+0.3 to +0.5 over r01`, `mIoU 55 to 57 %` or `sooner than r01`."""
    if claim.expected is None:
        return f"sooner than {claim.reference}"
    if claim.kind == "gain":
        return f"{format_range(claim.expected, '+g')} over {claim.reference}"
    return f"mIoU {format_range(claim.expected, 'g')} %"


def format_measured(claim: Claim) -> str:
    """Format the mean over seeds as `+0.42`, `56.10 %` or `3.0 epochs sooner`."""
    if claim.estimate is None:
        return "nothing yet"
    match claim.kind:
        case "gain":
            return f"{claim.estimate:+z.2f}"
        case "miou":
            return f"{claim.estimate:.2f} %"
        case "sooner":
            return f"{abs(claim.estimate):.1f} epochs {'sooner' if claim.estimate >= 0 else 'later'}"


def format_interval(claim: Claim) -> str:
    """Format the 95 % interval over seeds, or over validation images where one seed has no other."""
    digits = "z.1f" if claim.kind == "sooner" else "z.2f"
    form = digits if claim.kind == "miou" else f"+{digits}"
    if claim.interval:
        return format_range(claim.interval, form)
    return f"{format_range(claim.image_interval, form)} over images, no seed noise" if claim.image_interval else ""


def format_evidence(claim: Claim) -> str:
    """Format as `3 seeds, p 0.012 after Holm`."""
    seeds = counted(len(claim.pairs), "seed")
    if claim.p_holm is None:
        return seeds
    p = "p < 0.001" if claim.p_holm < 0.001 else f"p {claim.p_holm:.3f}"
    return f"{seeds}, {p} after Holm"


def format_sample_size(claim: Claim, unit: Unit, price: float | None) -> str:
    """Format as `4 more seeds, 12 GPU-hours, cost 30.00`; empty where seeds would not help."""
    size = claim.sample_size
    if size is None:
        return ""
    if size.is_capped:
        return f"more than {size.seeds} more seeds"
    hours = [] if size.hours is None else [f"{size.hours:.3g} {unit}"]
    cost = [] if size.hours is None or price is None else [f"cost {size.hours * price:,.2f}"]
    return ", ".join([counted(size.seeds, "more seed"), *hours, *cost])


@dataclass(frozen=True, kw_only=True)
class Power:
    """How likely a search is to confirm one claim, were it true."""

    claim: Claim
    seeds: int
    """Seeds of this search at which both the row and its reference are trained."""
    share: float | None
    """Share of simulated searches that confirm it, 0 to 1; None for a claim without a number, or beyond MOST_CLAIMS."""
    seeds_for_80: int | None
    """The fewest seeds of all rows that confirm it in 80 % of searches; None above MOST_SEEDS, or without a number."""


def powers(rows: Sequence[Run], seeds: Mapping[str, Collection[int]], *, proxy: bool) -> list[Power]:
    """Return the power of every claim that this search can judge, in declared order. `seeds` are those of each row.

    By simulation, since Holm's correction ties all claims of a table together: searches are drawn in which every
    expectation holds at its middle, and judged by the rules above. Trials differ over seeds by ASSUMED_SD, half of that
    variance shared by all rows of a seed, so that differences of two rows have ASSUMED_SD as well. How soon a row
    passes another is expected without a number: such claims count in Holm's family and are taken as never confirmed,
    as are those beyond MOST_CLAIMS. Nothing is stopped early.
    """
    claims = [claim for row in rows for claim in claims_of(row, (), proxy=proxy) if claim.is_judged]
    paired = [set.intersection(*(set(seeds.get(name, ())) for name in _trained(claim))) for claim in claims]
    numbered = [index for index, claim in enumerate(claims) if claim.expected is not None][:MOST_CLAIMS]
    shares: dict[int, float] = {}
    needed: dict[int, int] = {}
    if numbered:
        confirmed = _simulated([claims[index] for index in numbered], family=len(claims))
        now = confirmed([len(paired[index]) for index in numbered])
        by_seeds = np.stack([confirmed([number] * len(numbered)) for number in range(2, MOST_SEEDS + 1)])
        shares = dict(zip(numbered, now.tolist(), strict=True))
        enough = by_seeds >= POWER
        needed = {
            index: int(column.argmax()) + 2 for index, column in zip(numbered, enough.T, strict=True) if column.any()
        }
    return [
        Power(claim=claim, seeds=len(paired[index]), share=shares.get(index), seeds_for_80=needed.get(index))
        for index, claim in enumerate(claims)
    ]


def _simulated(claims: Sequence[Claim], *, family: int) -> Callable[[Sequence[int]], Floats]:
    """Draw searches of MOST_SEEDS seeds; return a function from each claim's seeds to the share that confirm it."""
    effects = _effects(claims)
    n = np.arange(1, MOST_SEEDS + 1, dtype=float)[:, None]
    mean = effects.cumsum(axis=1) / n
    variance = ((effects**2).cumsum(axis=1) - n * mean**2)[:, 1:] / (n[1:] - 1)
    error, mean, freedom = np.sqrt(variance / n[1:]), mean[:, 1:], n[1:] - 1
    half = error * special.stdtrit(freedom, (1 + CONFIDENCE) / 2)
    p, low, high = 2 * special.stdtr(freedom, -np.abs(mean / error)), mean - half, mean + half  # each S x N x claims
    least = np.array([claim.expected[0] - claim.must_exceed for claim in claims if claim.expected])

    def confirmed(seeds: Sequence[int]) -> Floats:
        """Return 0 for claims with one seed."""
        tested = np.array([number >= 2 for number in seeds])
        at = (np.arange(len(p))[:, None], np.clip(seeds, 2, MOST_SEEDS) - 2, np.arange(len(seeds)))
        p_holm = holm_in_bulk(np.where(tested, p[at], np.inf), family=family)
        share: Floats = (tested & (low[at] > 0) & (high[at] >= least) & (p_holm < ALPHA)).mean(axis=0)
        return share

    return confirmed


def _effects(claims: Sequence[Claim]) -> Floats:
    """Return S x seeds x claims: what each seed measures above what must be exceeded."""
    searches = min(2000, max(200, SIMULATED_CLAIMS // len(claims)))
    names = sorted({name for claim in claims for name in _trained(claim)})
    rng = np.random.default_rng(0)
    sd = ASSUMED_SD / 2**0.5
    shared = rng.normal(0, sd, (searches, MOST_SEEDS, 1))
    trials = shared + rng.normal(0, sd, (searches, MOST_SEEDS, len(names)))
    own = trials[:, :, [names.index(claim.run) for claim in claims]]
    bars = [
        np.zeros_like(shared[:, :, 0]) if claim.reference is None else trials[:, :, names.index(claim.reference)]
        for claim in claims
    ]
    middles = [sum(claim.expected) / 2 - claim.must_exceed for claim in claims if claim.expected]
    effects: Floats = own - np.stack(bars, axis=2) + np.array(middles)
    return effects


def holm_in_bulk(p: Floats, *, family: int) -> Floats:
    """Return Holm's adjusted p-values, S x claims; the rest of the family is taken as never confirmed."""
    order = np.argsort(p, axis=1)
    steps = np.take_along_axis(p, order, axis=1) * (family - np.arange(p.shape[1]))
    adjusted = np.empty_like(p)
    np.put_along_axis(adjusted, order, np.maximum.accumulate(steps, axis=1), axis=1)
    return adjusted
