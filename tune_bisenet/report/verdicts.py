"""Judge a table of claims: what was shown of each, how sure that is, and what it would cost to know more.

Pure functions over rows and what their trials measured; neither Ray nor torch. A trial's measure is its mean mIoU over
the last tenth of its epochs, or what share the space declares. The rules, of which `claims` applies those of a claim:

- **One model of the noise.** measure[row, seed] = row + seed + residual, over all trials that completed. All rows share
  the residual's variance, so three seeds of ten rows say as much of it as many seeds of two. A row far noisier than the
  others is judged by its own noise, and with five seeds or more leaves the pool.
- **Intervals hold together.** Gains have Dunnett's two-sided intervals against their reference, never narrower than
  the row's own differences say; levels and epochs saved have Student's, with Bonferroni's correction. Of all
  statements in a table, of either sign, one or more is false in at most 5 % of searches (`statistics.STRICTNESS`,
  benchmarks/verdicts.py). That holds for one look at the seeds, or for all planned looks together. With three or four
  seeds most of that error is spent on showing gains: the upper end of a gain's interval is further away than the lower
  one, and a promise is rarely broken before the fifth seed.
- **Planned looks.** A table is judged at the first 3 seeds, say, then at the first 5, 8 and 12, each time with a share
  of the error, small where seeds are few. What a look has decided is final; what it left open, or a gain whose size is
  open, is judged again.
- **A gain** of "low to high" is *kept* if its interval lies above low less the margin (and above 0), *exceeded* if
  above high, *gained* if above 0 with its size open, *broken* if below low less the margin, or at or under 0.
- **A level** is *kept* if its interval lies within the range, give or take the margin; *above* or *below* if beyond it.
  On a proxy a level is not judged.
- **A second measure**, if the space declares one, is the mean IoU of some classes, quieter than mIoU. Gains are judged
  by it, too, by a noise of its own; both measures share the error, so every interval of the table uses half of it.
- **Sooner** counts epochs saved: when each trial's running mean came near its own end, as near as the lower of the two
  is above the level that the row names. *Kept* above 0, *broken* below.
- **Open** is everything else. A trial that the scheduler stopped is described, never judged: it was stopped for being
  low. A trial that failed is left out; while one is pending, its claims are open. One seed has no verdict.
- **Blew up**: the row's loss diverged at every seed. Diverged trials have no part in the noise.
- **Seeds needed** decide a claim at 80 % power, if what is measured, or the middle of the expectation, is true.
"""

import math
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

import numpy as np
from scipy import special  # type: ignore[import-untyped]

from tune_bisenet.config import Run
from tune_bisenet.report.claims import (
    UNDECIDED,
    Claim,
    Kind,
    Range,
    SampleSize,
    claims_of,
    confounded_rows,
    decided,
    final_miou,
    latest,
)
from tune_bisenet.report.read import ReportedTrial, SearchRecord, Unit
from tune_bisenet.report.statistics import (
    NO_SPREAD,
    Floats,
    compare_rows,
    dunnett,
    error_share,
    estimate_levels,
    fit_noise,
    reached_looks,
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


@dataclass(frozen=True, kw_only=True)
class MoreSeeds:
    """Names rows, each of which is to be trained with each of these seeds."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    hours: float | None


@dataclass(frozen=True, kw_only=True)
class NoiseSummary:
    """Holds the noise that all rows share, as far as it was measured."""

    sd: float
    """Of residuals, in points."""
    within_sd: float
    """Of a row's trials over its seeds, in points; what seeds share included."""
    num_rows: int
    """Rows with two seeds or more."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Every claim of a table, in declared order."""

    claims: tuple[Claim, ...]
    noise: NoiseSummary | None
    """None before rows have repeats."""
    seeds: tuple[int, ...]
    """Of all trials, in the order in which the search got them."""
    looks: tuple[int, ...]
    """The numbers of seeds at which the table was planned to be judged; empty for a single look."""
    hours_per_seed: Mapping[str, float]
    """What one more seed of a row costs at the speed measured; empty before anything was."""
    unit: Unit

    @property
    def looked_at(self) -> int:
        """Return the number of seeds that were judged; more may wait for the next planned look."""
        return max(reached_looks(len(self.seeds), self.looks), default=0)

    @property
    def more_seeds(self) -> MoreSeeds | None:
        """Return what the open rows and their references need: one command gives all of them the same seeds.

        With planned looks, those of the next one; else as many as the claim that needs most, up to 100. None if that
        decides nothing.
        """
        if self.looks:
            next_look = min((look for look in self.looks if look > len(self.seeds)), default=0)
            claims = [claim for claim in self.claims if claim.verdict == "open" and not claim.is_blocked]
            wanted = [(claim, next_look - len(self.seeds)) for claim in claims if next_look]
        else:
            sizes = [(claim, claim.sample_size) for claim in self.claims]
            wanted = [(claim, size.seeds) for claim, size in sizes if size and not size.is_capped]
        if not wanted:
            return None
        most = max(seeds for _, seeds in wanted)
        first = max(self.seeds, default=-1) + 1
        names = sorted({name for claim, _ in wanted for name in trained_rows(claim)})
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
    """Judge the declared rows; what a sampler made up expects nothing."""
    devices, unit = search.devices_per_trial
    return judge(
        search.declared_rows,
        judged_trials(search),
        measured_share=search.manifest.space.measured_share,
        second_measure=search.manifest.space.second_measure,
        looks=search.manifest.config.looks,
        proxy=search.manifest.proxy is not None,
        devices_per_trial=devices,
        unit=unit,
    )


def judged_trials(search: SearchRecord) -> list[ReportedTrial]:
    """Return the trials that rows are judged by.

    A row that got fresh seeds because it looked best is judged by them alone: the seed it was chosen by flatters.
    """
    fresh = search.fresh_trials
    chosen = {record.run.name for record in fresh.values()} - {search.baseline}
    return [record for name, record in search.trials.items() if name in fresh or record.run.name not in chosen]


def judge(
    rows: Sequence[Run],
    trials: Sequence[ReportedTrial],
    *,
    measured_share: float = MEASURED_SHARE,
    second_measure: tuple[str, ...] = (),
    looks: Sequence[int] = (),
    proxy: bool = False,
    devices_per_trial: float = 1.0,
    unit: Unit = "GPU-hours",
) -> Judgement:
    """Judge the rows of a search (one Run each, or one a seed) by its trials, in the order in which it got them.

    `second_measure` names the classes by whose mean IoU gains are judged, too. `looks` are the planned numbers of
    seeds; without any, all seeds are judged at once. `devices_per_trial` is the share of a GPU, or of the machine, that
    a trial has to itself.
    """
    declared = {row.name: row for row in rows}
    seeds = tuple(dict.fromkeys(trial.run.seed for trial in trials))
    hours = _hours_per_seed(declared.values(), trials, devices_per_trial=devices_per_trial)
    judgement = Judgement(claims=(), noise=None, seeds=seeds, looks=tuple(looks), hours_per_seed=hours, unit=unit)
    measures = ((), second_measure) if second_measure else ((),)

    def spent(num_seeds: int) -> float:
        return error_share(num_seeds, num_looks=len(looks)) / len(measures)

    claims: list[Claim] = []
    noises: dict[tuple[str, ...], NoiseSummary | None] = dict.fromkeys(measures)
    for look in reached_looks(len(seeds), looks) or [0]:
        seen = [trial for trial in trials if trial.run.seed in seeds[:look]]
        measured = [
            claim
            for row in declared.values()
            for claim in claims_of(row, seen, measured_share=measured_share, proxy=proxy, second_measure=second_measure)
        ]
        for classes in measures:
            measured, noises[classes] = _with_intervals(measured, seen, measured_share, classes, spent(look))
        now = [decided(claim) for claim in measured]
        claims = [latest(*both) for both in zip(claims, now, strict=True)] if claims else now
    families = Counter(claim.kind for claim in claims if not claim.classes)
    confounded = confounded_rows(declared)

    def sample_size(claim: Claim) -> SampleSize | None:
        noise = noises[claim.classes]
        num_rows = noise.num_rows if noise else len(declared)
        return _sample_size(claim, families, noise, num_rows=num_rows, spent=spent, hours_per_seed=hours)

    return replace(
        judgement,
        noise=noises[()],
        claims=tuple(
            replace(claim, sample_size=sample_size(claim), confounded=confounded[claim.run]) for claim in claims
        ),
    )


def _with_intervals(
    all_claims: Sequence[Claim],
    trials: Sequence[ReportedTrial],
    measured_share: float,
    classes: tuple[str, ...],
    spent: float,
) -> tuple[list[Claim], NoiseSummary | None]:
    """Return the claims and the noise of one measure: its claims have intervals where they can be judged."""
    values, names = _measures(trials, measured_share, classes)
    if not names:
        return list(all_claims), None
    noise = fit_noise(values)
    claims = [claim for claim in all_claims if claim.classes == classes]
    families = {kind: sum(claim.is_judged and claim.kind == kind for claim in claims) for kind in ("gain", "miou")}
    index = {name: number for number, name in enumerate(names)}
    gains = [claim for claim in claims if claim.kind == "gain" and {claim.run, claim.reference} <= index.keys()]
    pairs = [(index[claim.run], index[claim.reference or ""]) for claim in gains]
    levels = [claim for claim in claims if claim.kind == "miou" and claim.run in index and claim.is_judged]
    level_rows = [index[claim.run] for claim in levels]
    compared = compare_rows(values, pairs, noise, family=families["gain"], spent=spent)
    estimated = estimate_levels(values, level_rows, noise, family=families["miou"], spent=spent)
    intervals = {
        (claim.run, claim.kind): (float(low[0, number]), float(high[0, number]))
        for of_kind, (low, high) in ((gains, compared), (levels, estimated))
        for number, claim in enumerate(of_kind)
    }
    noisy, suspect = (
        {name for name, is_set in zip(names, flags[0], strict=True) if is_set}
        for flags in (noise.is_noisy, noise.is_suspect)
    )
    num_sooner = sum(claim.kind == "sooner" for claim in claims)
    most_saved = float(max(trial.run.num_epochs for trial in trials))

    def interval(claim: Claim) -> Range | None:
        if claim.obstacle:
            return None
        if claim.kind == "sooner":
            effects = np.array([pair.effect for pair in claim.pairs])
            error = strictness(len(effects)).sooner_error * spent
            ends = student_interval(effects, error=error, family=num_sooner, least_sd=EPOCHS_SD)
            low, high = np.clip(ends, -most_saved, most_saved).tolist()
        else:
            low, high = intervals.get((claim.run, claim.kind), (math.nan, math.nan))
        return (low, high) if high - low > 2 * NO_SPREAD else None  # NaN is not

    judged = [
        replace(
            claim,
            interval=interval(claim),
            is_noisy=claim.kind != "sooner" and (claim.run in noisy or (claim.reference or claim.run) in suspect),
        )
        if claim.classes == classes
        else claim
        for claim in all_claims
    ]
    if not noise.variance[0] > NO_SPREAD**2:
        return judged, None
    summary = NoiseSummary(
        sd=math.sqrt(noise.variance[0]),
        within_sd=math.sqrt(noise.within[0]),
        num_rows=len(names),
    )
    return judged, summary


def _measures(
    trials: Sequence[ReportedTrial], measured_share: float, classes: tuple[str, ...]
) -> tuple[Floats, list[str]]:
    """Return 1 x R x N measures of the trials that completed, and the names of the R rows: those with two or more."""
    measured: dict[str, dict[int, float]] = {}
    for trial in trials:
        miou = final_miou(trial, measured_share, classes=classes)
        if trial.state.status == "finished" and math.isfinite(miou):
            measured.setdefault(trial.run.name, {})[trial.run.seed] = miou
    repeated = {name: by_seed for name, by_seed in measured.items() if len(by_seed) > 1}
    seeds = sorted({seed for by_seed in repeated.values() for seed in by_seed})
    values = np.full((1, len(repeated), len(seeds)), np.nan)
    for row, by_seed in enumerate(repeated.values()):
        for seed, miou in by_seed.items():
            values[0, row, seeds.index(seed)] = miou
    return values, list(repeated)


def _sample_size(
    claim: Claim,
    families: Mapping[Kind, int],
    noise: NoiseSummary | None,
    *,
    num_rows: int,
    spent: Callable[[int], float],
    hours_per_seed: Mapping[str, float],
) -> SampleSize | None:
    """Return the seeds that would decide a claim of a table of `num_rows` rows; None if seeds are not what is missing.

    `families` holds the number of claims by kind.
    """
    number = len(claim.pairs)
    is_blocked = claim.pending or (claim.obstacle and number > 1) or (number > 1 and claim.interval is None)
    spread = _spread(claim, noise)
    if claim.verdict not in UNDECIDED or not number or is_blocked or spread is None:
        return None
    num_means = 2 if claim.kind == "gain" else 1

    def standard_error(total: int) -> float:
        return spread * math.sqrt(num_means / total)

    critical = partial(_critical, claim, families[claim.kind], num_rows=num_rows, spent=spent)
    most = MOST_SEEDS + number
    total = seeds_for_power(_distance(claim), standard_error=standard_error, critical=critical, most=most)
    more = MOST_SEEDS if total is None else max(total - number, 1)
    return SampleSize(
        seeds=more,
        is_capped=total is None,
        spread=spread,
        is_assumed=noise is None and claim.kind != "sooner",
        hours=_hours(more, trained_rows(claim), hours_per_seed),
    )


def _spread(claim: Claim, noise: NoiseSummary | None) -> float | None:
    """Return the standard deviation of a trial over seeds, or of epochs saved; None where one seed saved some."""
    effects = [pair.effect for pair in claim.pairs]
    if claim.kind == "sooner":
        return max(statistics.stdev(effects), EPOCHS_SD) if len(effects) > 1 else None
    if noise is None:
        return ASSUMED_SD
    if claim.is_noisy and len(effects) > 1:
        return statistics.stdev(effects) / (2**0.5 if claim.kind == "gain" else 1)
    return noise.sd if claim.kind == "gain" else noise.within_sd


def _critical(
    claim: Claim, family: int, num_seeds: int, *, num_rows: int, spent: Callable[[int], float]
) -> tuple[float, float]:
    """Return the quantile that a balanced table of so many seeds is judged by, and its degrees of freedom."""
    rule, share = strictness(num_seeds), spent(num_seeds)
    match claim.kind:
        case "gain":
            freedom = float(max(num_rows - 1, 1) * (num_seeds - 1))
            falls_short = (claim.estimate or 0.0) < (claim.expected or (0.0, 0.0))[0] - claim.margin
            error = rule.broken_error if falls_short else rule.gain_error
            return dunnett(family, freedom, 2 * error * share, 0.5), freedom
        case "miou":
            error, freedom = rule.level_error, float(num_rows * (num_seeds - 1))
        case "sooner":
            error, freedom = rule.sooner_error, float(num_seeds - 1)
    return float(special.stdtrit(freedom, 1 - error * share / (2 * family))), freedom


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


def trained_rows(claim: Claim) -> list[str]:
    """Return the rows that a claim needs: its own and its reference."""
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
    """Format as `+0.3 to +0.5 over r01`, `mIoU 55 to 57 %` or `sooner than r01`; names a second measure."""
    if claim.expected is None:
        return f"sooner than {claim.reference}"
    if claim.kind == "gain":
        measure = f", {claim.measure}" if claim.classes else ""
        return f"{format_range(claim.expected, '+g')} over {claim.reference}{measure}"
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
        f"{format_range(claim.image_interval, form)} over {claim.drawn_from} at the best epochs, no seed noise"
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
