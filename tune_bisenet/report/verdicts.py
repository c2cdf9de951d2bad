"""Judge a table of claims: what was shown of each, how sure that is, and what it would cost to know more.

Pure functions over rows and what their trials measured; neither Ray nor torch. A trial's measure is its mean mIoU over
the last tenth of its epochs, or what share the space declares. The rules, of which `claims` applies those of a claim:

- **One model of the noise.** measure[row, seed] = row + seed + residual, over all trials that completed. All rows share
  the residual's variance, so three seeds of ten rows say as much of it as many seeds of two. A row far noisier than the
  others is judged by its own noise, and with five seeds or more leaves the pool.
- **Intervals hold together.** Gains have Dunnett's two-sided intervals against their reference, never narrower than
  the row's own differences say; levels and epochs saved have Student's, with Bonferroni's correction. Of all
  statements in a table, of either sign, one or more is false in at most 5 % of searches (`statistics.STRICTNESS`,
  benchmarks/verdicts.py). That holds for one look at the seeds; looking again as seeds are added costs more.
- **A gain** of "low to high" is *kept* if its interval lies above low less the margin (and above 0), *exceeded* if
  above high, *gained* if above 0 with its size open, *broken* if below low less the margin, or at or under 0.
- **A level** is *kept* if its interval lies within the range, give or take the margin; *above* or *below* if beyond it.
  On a proxy a level is not judged.
- **Sooner** counts epochs saved: when each trial's running mean came near its own end, as near as the lower of the two
  is above the level that the row names. *Kept* above 0, *broken* below.
- **Open** is everything else. A trial that the scheduler stopped is described, never judged: it was stopped for being
  low. A trial that failed is left out; while one is pending, its claims are open. One seed has no verdict.
- **Blew up**: the row's loss diverged at every seed. Diverged trials have no part in the noise.
- **Seeds needed** decide a claim at 80 % power, if what is measured, or the middle of the expectation, is true.
"""

import bisect
import math
import shlex
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray
from scipy import special  # type: ignore[import-untyped]

from tune_bisenet.config import Run
from tune_bisenet.report.claims import (
    UNDECIDED,
    Claim,
    Range,
    SampleSize,
    claims_of,
    confounded_rows,
    decided,
    final_miou,
)
from tune_bisenet.report.read import ReportedTrial, SearchRecord, Unit
from tune_bisenet.report.statistics import (
    NO_SPREAD,
    POWER,
    Floats,
    compare_rows,
    dunnett,
    estimate_levels,
    fit_noise,
    seeds_for_power,
    strictness,
    student_interval,
)
from tune_bisenet.spaces import MEASURED_SHARE
from tune_bisenet.text import counted

MOST_SEEDS: Final = 100
"""More seeds than this are shown as "more than 100"."""

EPOCHS_SD: Final = (2 / 12) ** 0.5
"""The least spread of a difference of two whole epochs: each is rounded, with a variance of 1/12."""

ASSUMED_SD: Final = 1.0
"""Points of mIoU between repeats, assumed where none is measured, and none of it shared by equal seeds.

Published repeats of small real-time nets on Cityscapes differ by 0.1 to 1.2 (RegSeg's training logs), also at one seed.
"""

SIMULATED_SEARCHES: Final = 2000
"""So that a share is known to 1.1 percentage points (one sd)."""

MOST_CLAIMS: Final = 50
"""Only the first claims of a longer table are simulated, to bound memory."""


@dataclass(frozen=True, kw_only=True)
class MoreSeeds:
    """What would decide every claim that up to 100 more seeds can decide."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    hours: float | None


@dataclass(frozen=True, kw_only=True)
class NoiseSummary:
    """The noise that all rows share, as far as it was measured."""

    sd: float
    """Of residuals, in points."""
    within_sd: float
    """Of a row's trials over its seeds, in points; what seeds share included."""
    freedom: float
    """Degrees of freedom of `sd`."""
    num_rows: int
    """Rows with two seeds or more."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Every claim of a table, in declared order."""

    claims: tuple[Claim, ...]
    noise: NoiseSummary | None
    """None before rows have repeats."""
    seeds: tuple[int, ...]
    hours_per_seed: Mapping[str, float]
    """What one more seed of a row costs at the speed measured; empty before anything was."""
    unit: Unit

    @property
    def more_seeds(self) -> MoreSeeds | None:
        """The open rows with their references; None if no number of seeds up to 100 decides any.

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
    return judge(
        search.declared_rows,
        trials,
        measured_share=search.manifest.space.measured_share,
        proxy=search.manifest.proxy is not None,
        devices_per_trial=devices,
        unit=unit,
    )


def judge(
    rows: Sequence[Run],
    trials: Sequence[ReportedTrial],
    *,
    measured_share: float = MEASURED_SHARE,
    proxy: bool = False,
    devices_per_trial: float = 1.0,
    unit: Unit = "GPU-hours",
) -> Judgement:
    """Judge the rows of a search (one Run each, or one a seed) by its trials.

    `devices_per_trial` is the share of a GPU, or of the machine, that a trial has to itself.
    """
    declared = {row.name: row for row in rows}
    measured = [
        claim
        for row in declared.values()
        for claim in claims_of(row, trials, measured_share=measured_share, proxy=proxy)
    ]
    claims, noise = _with_intervals(measured, trials, measured_share)
    hours = _hours_per_seed(declared.values(), trials, devices_per_trial=devices_per_trial)
    sizing = _Sizing(claims, noise, num_rows=noise.num_rows if noise else len(declared))
    confounded = confounded_rows(declared)
    return Judgement(
        claims=tuple(
            replace(claim, sample_size=sizing.of(claim, hours), confounded=confounded[claim.run])
            for claim in map(decided, claims)
        ),
        noise=noise,
        seeds=tuple(sorted({trial.run.seed for trial in trials})),
        hours_per_seed=hours,
        unit=unit,
    )


def _with_intervals(
    claims: Sequence[Claim], trials: Sequence[ReportedTrial], measured_share: float
) -> tuple[list[Claim], NoiseSummary | None]:
    """Return the claims with their intervals where nothing stands against judging them, and the noise."""
    values, names = _measures(trials, measured_share)
    if not names:
        return list(claims), None
    noise = fit_noise(values)
    families = {kind: sum(claim.is_judged and claim.kind == kind for claim in claims) for kind in ("gain", "miou")}
    index = {name: number for number, name in enumerate(names)}
    gains = [claim for claim in claims if claim.kind == "gain" and {claim.run, claim.reference} <= index.keys()]
    pairs = [(index[claim.run], index[claim.reference or ""]) for claim in gains]
    levels = [claim for claim in claims if claim.kind == "miou" and claim.run in index and claim.is_judged]
    level_rows = [index[claim.run] for claim in levels]
    compared = compare_rows(values, pairs, noise, family=families["gain"])
    estimated = estimate_levels(values, level_rows, noise, family=families["miou"])
    intervals = {
        (claim.run, claim.kind): (means.mean[0, number], means.half_width[0, number])
        for of_kind, means in ((gains, compared), (levels, estimated))
        for number, claim in enumerate(of_kind)
    }
    noisy = {name for name, is_noisy in zip(names, noise.is_noisy[0], strict=True) if is_noisy}
    num_sooner = sum(claim.kind == "sooner" for claim in claims)

    def interval(claim: Claim) -> Range | None:
        if claim.obstacle:
            return None
        if claim.kind == "sooner":
            effects = [pair.effect for pair in claim.pairs]
            error = strictness(len(effects)).sooner_error
            return student_interval(effects, error=error, family=num_sooner, least_sd=EPOCHS_SD)
        mean, half_width = intervals.get((claim.run, claim.kind), (math.nan, math.nan))
        is_known = half_width > NO_SPREAD  # False for NaN
        return (float(mean - half_width), float(mean + half_width)) if is_known else None

    judged = [
        replace(
            claim,
            interval=interval(claim),
            is_noisy=claim.kind != "sooner" and bool(noisy & {claim.run, claim.reference}),
        )
        for claim in claims
    ]
    if not noise.variance[0] > NO_SPREAD**2:
        return judged, None
    summary = NoiseSummary(
        sd=math.sqrt(noise.variance[0]),
        within_sd=math.sqrt(noise.within[0]),
        freedom=float(noise.freedom[0]),
        num_rows=len(names),
    )
    return judged, summary


def _measures(trials: Sequence[ReportedTrial], measured_share: float) -> tuple[Floats, list[str]]:
    """Return 1 x R x N measures of the trials that completed, and the names of the R rows: those with two or more."""
    measured: dict[str, dict[int, float]] = {}
    for trial in trials:
        if trial.state.status == "finished":
            measured.setdefault(trial.run.name, {})[trial.run.seed] = final_miou(trial, measured_share)
    repeated = {name: by_seed for name, by_seed in measured.items() if len(by_seed) > 1}
    seeds = sorted({seed for by_seed in repeated.values() for seed in by_seed})
    values = np.full((1, len(repeated), len(seeds)), np.nan)
    for row, by_seed in enumerate(repeated.values()):
        for seed, miou in by_seed.items():
            values[0, row, seeds.index(seed)] = miou
    return values, list(repeated)


class _Sizing:
    """Finds the seeds that would decide a claim, given the noise and the size of the table."""

    def __init__(self, claims: Sequence[Claim], noise: NoiseSummary | None, *, num_rows: int) -> None:
        self._families = {kind: sum(claim.kind == kind for claim in claims) for kind in ("gain", "miou", "sooner")}
        self._noise = noise
        self._num_rows = num_rows

    def of(self, claim: Claim, hours_per_seed: Mapping[str, float]) -> SampleSize | None:
        """Return None where seeds are not what is missing."""
        number = len(claim.pairs)
        if claim.verdict not in UNDECIDED or not number or (claim.obstacle and number > 1) or claim.pending:
            return None
        if number > 1 and claim.interval is None:
            return None
        spread = self._spread(claim)
        if spread is None:
            return None
        total = self._seeds(claim, spread, most=MOST_SEEDS + number)
        more = MOST_SEEDS if total is None else max(total - number, 1)
        return SampleSize(
            seeds=more,
            is_capped=total is None,
            spread=spread,
            is_assumed=self._noise is None and claim.kind != "sooner",
            hours=_hours(more, _trained(claim), hours_per_seed),
        )

    def _spread(self, claim: Claim) -> float | None:
        effects = [pair.effect for pair in claim.pairs]
        if claim.kind == "sooner":
            return max(statistics.stdev(effects), EPOCHS_SD) if len(effects) > 1 else None
        if self._noise is None:
            return ASSUMED_SD
        if claim.is_noisy:
            return statistics.stdev(effects) / (2**0.5 if claim.kind == "gain" else 1)
        return self._noise.sd if claim.kind == "gain" else self._noise.within_sd

    def _seeds(self, claim: Claim, spread: float, *, most: int) -> int | None:
        family = max(self._families[claim.kind], 1)
        num_means = 2 if claim.kind == "gain" else 1

        def critical(number: int) -> tuple[float, float]:
            rule = strictness(number)
            if claim.kind == "gain":
                freedom = float(max(self._num_rows - 1, 1) * (number - 1))
                return dunnett(family, freedom, rule.gain_error, 0.5), freedom
            rows = self._num_rows if claim.kind == "miou" else 1
            error = rule.level_error if claim.kind == "miou" else rule.sooner_error
            freedom = float(rows * (number - 1))
            return float(special.stdtrit(freedom, 1 - error / (2 * family))), freedom

        return seeds_for_power(
            _distance(claim),
            standard_error=lambda number: spread * math.sqrt(num_means / number),
            critical=critical,
            most=most,
        )


def _distance(claim: Claim) -> float:
    """Return how far the estimate is from where the verdict turns; no less than where the expectation's middle is."""
    estimate, (low, high) = claim.estimate or 0.0, claim.expected or (0.0, 0.0)
    match claim.kind:
        case "gain":
            bar = low - claim.margin
            return max(abs(estimate - bar), (low + high) / 2 - bar)
        case "miou":
            inside = min(estimate - low, high - estimate) + claim.margin
            outside = max(low - estimate, estimate - high)
            return max(inside, outside, claim.margin)
        case _:
            return max(abs(estimate), 1.0)


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
    """Format the interval over seeds, or over validation images where one seed has no other."""
    digits = "z.1f" if claim.kind == "sooner" else "z.2f"
    form = digits if claim.kind == "miou" else f"+{digits}"
    if claim.interval:
        return format_range(claim.interval, form)
    return (
        f"{format_range(claim.image_interval, form)} over images at the best epochs, no seed noise"
        if claim.image_interval
        else ""
    )


def format_verdict(claim: Claim) -> str:
    """Format as `kept`, or `kept on this proxy`."""
    return f"{claim.verdict} on this proxy" if claim.on_proxy and claim.is_judged else claim.verdict


def format_best(claim: Claim) -> str:
    """Format what the trials' best epochs say: it flatters restless runs, and judges nothing."""
    if claim.best_estimate is None:
        return ""
    return f"{claim.best_estimate:+z.2f}" if claim.kind == "gain" else f"{claim.best_estimate:.2f} %"


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
    """How likely a search is to show one claim, were it true: a gain, whatever its size, or a level kept."""

    claim: Claim
    seeds: int
    """Seeds of this search at which both the row and its reference are trained."""
    share: float | None
    """Share of simulated searches that show it, 0 to 1; None for a claim without a number, or beyond MOST_CLAIMS."""
    seeds_for_80: int | None
    """The fewest seeds of all rows that show it in 80 % of searches; None above MOST_SEEDS, or without a number."""


def powers(rows: Sequence[Run], seeds: Mapping[str, Collection[int]], *, proxy: bool) -> list[Power]:
    """Return the power of every claim that this search can judge, in declared order. `seeds` are those of each row.

    Searches are drawn in which every expectation holds at its middle, and judged by the rules above. Trials differ by
    ASSUMED_SD, none of it shared by equal seeds. How soon a row reaches a level is expected without a number. Nothing
    is stopped early.
    """
    claims = [
        claim
        for row in rows
        for claim in claims_of(row, (), measured_share=MEASURED_SHARE, proxy=proxy)
        if claim.is_judged
    ]
    paired = [set.intersection(*(set(seeds.get(name, ())) for name in _trained(claim))) for claim in claims]
    numbered = [claim for claim in claims if claim.expected is not None]
    table = _SimulatedTable(numbered[:MOST_CLAIMS], families=numbered)
    now = table.shares(seeds)
    found = []
    for claim, common in zip(claims, paired, strict=True):
        key = claim.run, claim.kind
        needed = table.seeds_for_power(key) if key in now else None
        found.append(Power(claim=claim, seeds=len(common), share=now.get(key), seeds_for_80=needed))
    return found


class _SimulatedTable:
    """Searches of the rows that some claims need, each claim true at its middle."""

    def __init__(self, claims: Sequence[Claim], *, families: Sequence[Claim]) -> None:
        self._claims = claims
        self._families = {kind: sum(claim.kind == kind for claim in families) for kind in ("gain", "miou")}
        self._names = sorted({name for claim in claims for name in _trained(claim)})
        levels = {claim.run: sum(claim.expected) / 2 for claim in claims if claim.kind == "miou" and claim.expected}
        gains = {claim.run: sum(claim.expected) / 2 for claim in claims if claim.kind == "gain" and claim.expected}
        self._truth = np.array([levels.get(name, gains.get(name, 0.0)) for name in self._names])
        self._offset = {claim.run: levels.get(claim.reference or "", 0.0) for claim in claims if claim.kind == "gain"}
        self._truth += np.array([self._offset.get(name, 0.0) for name in self._names])
        self.balanced_shares = lru_cache(self._balanced_shares)

    def shares(self, seeds: Mapping[str, Collection[int]]) -> dict[tuple[str, str], float]:
        """Return, by row and kind of claim, the share of searches with these seeds by row that show it."""
        numbers = sorted({seed for name in self._names for seed in seeds.get(name, ())})
        present = np.array([[seed in seeds.get(name, ()) for seed in numbers] for name in self._names], dtype=bool)
        return self._shares(present) if self._claims and numbers else {(c.run, c.kind): 0.0 for c in self._claims}

    def _balanced_shares(self, number: int) -> dict[tuple[str, str], float]:
        return self._shares(np.ones((len(self._names), number), dtype=bool))

    def seeds_for_power(self, key: tuple[str, str]) -> int | None:
        """Return the fewest seeds of all rows that show a claim in 80 % of searches; None above MOST_SEEDS."""
        numbers = range(2, MOST_SEEDS + 1)
        first = bisect.bisect_left(numbers, POWER, key=lambda number: self.balanced_shares(number)[key])
        return numbers[first] if first < len(numbers) else None

    def _shares(self, present: NDArray[np.bool_]) -> dict[tuple[str, str], float]:
        rng = np.random.default_rng(0)
        searches = max(SIMULATED_SEARCHES // (1 + present.size // 1000), 200)
        values = self._truth[:, None] + rng.normal(0, ASSUMED_SD, (searches, *present.shape))
        values[:, ~present] = np.nan
        noise = fit_noise(values)
        shown: dict[tuple[str, str], float] = {}
        for kind in ("gain", "miou"):
            claims = [claim for claim in self._claims if claim.kind == kind]
            rows = [self._names.index(claim.run) for claim in claims]
            if kind == "gain":
                bars = [self._names.index(claim.reference or "") for claim in claims]
                means = compare_rows(values, list(zip(rows, bars, strict=True)), noise, family=self._families[kind])
            else:
                means = estimate_levels(values, rows, noise, family=self._families[kind])
            low, high = means.mean - means.half_width, means.mean + means.half_width
            for number, claim in enumerate(claims):
                least, most = claim.expected or (0.0, 0.0)
                if kind == "gain":
                    is_shown = (low[:, number] > 0) & (high[:, number] >= least - claim.margin)
                else:
                    is_shown = (low[:, number] >= least - claim.margin) & (high[:, number] <= most + claim.margin)
                shown[claim.run, kind] = float(is_shown.mean())
        return shown
