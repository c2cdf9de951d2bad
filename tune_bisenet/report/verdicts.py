"""Did each row keep its promise: confirmed, refuted or undecided, how sure is that, and what would it cost to know?

Pure functions over rows and what their trials measured; no files, neither Ray nor torch. mIoU is in percent, gains are
in percentage points. A trial's measure is its best mIoU. The rules:

- **Pairs.** A row and its reference are compared seed by seed. If either ended before its last epoch, both count up to
  the last epoch that both reached, and the claim says so. A trial that failed is left out; while one is still to come
  or running, its claims are undecided, so that looking often finds nothing that is not there.
- **A gain** is confirmed when its 95 % interval (paired t) lies above 0 and meets the promised range or lies above it,
  and p after Holm's correction is under 0.05. It is refuted when the interval lies at or under 0, or below the range.
- **A level of mIoU** is confirmed when its interval (one-sample t) lies within or above the range, tested against the
  range's low end with the same correction; refuted when it lies below. A trial stopped early could still have risen:
  it can confirm, not refute. On a proxy a level is not judged.
- **Sooner** counts epochs saved: when the reference reached its own final (best) mIoU, less when the row first did. A
  row that never did counts as if in the epoch after its last, which is an upper bound: such a pair can refute, not
  confirm; none at any seed of runs that went to their end refutes. Whole epochs are a spread of their own.
- **Holm's family** is every claim of the table that this search can judge, whether or not it is measured yet. It guards
  what is confirmed; a refutation goes by its own interval alone.
- **Diverged** runs ended there. A claim with one, of the row or of its reference, is never confirmed; a row that
  diverged at every seed (two or more) is refuted.
- **One seed** has no verdict; neither have seeds that changed nothing. Only no gain at all, to the last bit at every
  seed, is refuted.
- **Seeds needed** find the middle of the promise (for "sooner", the epochs measured so far) at a power of 80 %, at the
  spread measured and at the level of Holm's next step.
"""

import math
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Literal, assert_never

from tune_bisenet.config import Run
from tune_bisenet.report.statistics import (
    ALPHA,
    NO_SPREAD,
    POWER,
    Counts,
    MeanTest,
    holm,
    image_interval,
    mean_test,
    seeds_for_power,
)
from tune_bisenet.results import Epoch, Status, best_of

Kind = Literal["gain", "miou", "sooner"]
Verdict = Literal["confirmed", "refuted", "undecided", "not judged"]
Unit = Literal["GPU-hours", "machine-hours"]

ASSUMED_SD: Final = 0.5
"""Points of mIoU, the spread assumed where one seed has measured none: repeats of a run differ by 0.5 to 2."""

MOST_SEEDS: Final = 100
"""More seeds than this are told as "more than 100"."""

EPOCHS_SD: Final = (2 / 12) ** 0.5
"""The least spread of a difference of two whole epochs: each is rounded, with a variance of 1/12."""


# --- what comes in --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One trial: its epochs in order, and the counts of its best epoch (images x 19 x 19, labels by rows) if kept."""

    trial: str
    run: str
    seed: int
    status: Status
    num_epochs: int
    epochs: Sequence[Epoch]
    confusions: Counts | None = field(default=None, compare=False, repr=False)

    @property
    def reached(self) -> int:
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def ended_at(self) -> int | None:
        """The epoch it came to, if that is not its last."""
        return self.reached if self.reached < self.num_epochs else None

    def best(self, until: int) -> Epoch:
        return best_of([epoch for epoch in self.epochs if epoch.epoch <= until])

    def reaches(self, miou: float) -> int | None:
        """The first epoch at which its mIoU is no less than `miou`."""
        return next((epoch.epoch for epoch in self.epochs if not epoch.diverged and epoch.miou >= miou), None)


# --- what comes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One seed's part of a claim: mIoU in percent, or for "sooner" the epochs at which the final mIoU was reached."""

    seed: int
    own: float
    reference: float | None
    """None for a level of mIoU, which is compared with nothing."""
    effect: float
    """Points gained, epochs saved, or the row's own mIoU."""
    compared_at_epoch: int | None = None
    """Set where a trial ended early."""
    never_reached: bool = False
    """For "sooner": `own` is the epoch after the last, so `effect` is an upper bound."""
    diverged: bool = False
    """The row's own trial did."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One promise of one row, and what became of it."""

    run: str
    kind: Kind
    reference: str | None
    promised: tuple[float, float] | None
    """Points, or percent for a level of mIoU; None for "sooner"."""
    pairs: tuple[Pair, ...]
    n_pairs: int
    estimate: float | None
    """The mean over the pairs: points, percent, or epochs saved."""
    interval: tuple[float, float] | None
    """At 95 %, over seeds; None with fewer than two."""
    image_interval: tuple[float, float] | None
    """At 95 %, over validation images, of one seed's gain: the noise of the data, not that of seeds."""
    p: float | None
    p_holm: float | None
    verdict: Verdict
    reason: str
    """Why it is so, in a few words."""
    words: str
    """All of it in one sentence."""
    compared_at_epoch: int | None
    """The earliest epoch at which a pair was compared; None if all went to their end."""
    flags: tuple[str, ...]
    note: str
    seeds_needed: int | None
    """How many more would decide it; None where it is decided or where seeds alone would not."""
    seeds_capped: bool
    """More than `seeds_needed`."""
    spread: float | None
    """The standard deviation over seeds that `seeds_needed` goes by."""
    spread_assumed: bool
    cost_hours: float | None
    """Of `seeds_needed`, those of the reference included."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Every claim of a table, in declared order."""

    claims: tuple[Claim, ...]
    family: int
    """How many claims Holm's correction is over."""
    proxy: bool
    seeds: tuple[int, ...]
    """All that were run."""
    hours_per_seed: Mapping[str, float]
    """What one more seed of a row costs at the speed measured; empty before anything was."""
    unit: Unit

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MoreSeeds:
    """What would decide every claim that up to 100 more seeds can decide."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    hours: float | None
    unit: Unit


def judge(
    rows: Sequence[Run],
    trials: Sequence[Measured],
    *,
    proxy: bool = False,
    devices_per_trial: float = 1.0,
    unit: Unit = "GPU-hours",
) -> Judgement:
    """The rows of a search (one Run each, or one a seed) against its trials.

    `devices_per_trial` is the share of a GPU, or of the machine, that a trial has to itself.
    """
    declared = {row.name: row for row in rows}
    evidence = [item for row in declared.values() for item in _evidence(row, trials, proxy=proxy)]
    family = [item for item in evidence if not item.unjudged]
    p_holm = iter(holm([item.p for item in family]))
    rulings = [_rule(item, None if item.unjudged else next(p_holm)) for item in evidence]
    num_open = len(family) - sum(ruling.verdict == "confirmed" for ruling in rulings)
    hours = _hours_per_seed(declared.values(), trials, devices_per_trial)
    plans = [_plan(ruling, ALPHA / max(num_open, 1), hours) for ruling in rulings]
    flags = _row_flags(declared)
    return Judgement(
        claims=tuple(
            _claim(ruling, plan, flags[ruling.item.run], unit) for ruling, plan in zip(rulings, plans, strict=True)
        ),
        family=len(family),
        proxy=proxy,
        seeds=tuple(sorted({trial.seed for trial in trials})),
        hours_per_seed=hours,
        unit=unit,
    )


def more_seeds(judgement: Judgement) -> MoreSeeds | None:
    """The rows that 100 more seeds or fewer would decide, with their references; None if there are none."""
    wanted = [claim for claim in judgement.claims if claim.seeds_needed is not None and not claim.seeds_capped]
    if not wanted:
        return None
    # One command: every row gets as many seeds as the one that needs most.
    most = max(claim.seeds_needed or 0 for claim in wanted)
    first = max(judgement.seeds, default=-1) + 1
    names = sorted({name for claim in wanted for name in (claim.run, claim.reference) if name is not None})
    return MoreSeeds(
        runs=tuple(names),
        seeds=tuple(range(first, first + most)),
        hours=_cost(most, names, judgement.hours_per_seed),
        unit=judgement.unit,
    )


def next_command(judgement: Judgement, *, space: str, name: str) -> str | None:
    """The command that runs `more_seeds`."""
    more = more_seeds(judgement)
    if more is None:
        return None
    runs, seeds = ",".join(more.runs), ",".join(map(str, more.seeds))
    command = ["python", "-m", "tune_bisenet.run", "--space", space, "--name", name, "--add"]
    return shlex.join([*command, "--runs", runs, "--seeds", seeds])


# --- evidence -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Evidence:
    """One promise and all that was measured of it."""

    run: str
    kind: Kind
    reference: str | None
    promised: tuple[float, float] | None
    note: str
    proxy: bool
    pairs: tuple[Pair, ...]
    test: MeanTest | None
    """None with fewer than two pairs."""
    image_interval: tuple[float, float] | None
    pending: tuple[str, ...]
    failed: tuple[str, ...]
    diverged: tuple[str, ...]
    """Names of trials, those of the reference among them."""

    @property
    def unjudged(self) -> bool:
        return self.proxy and self.kind == "miou"

    @property
    def p(self) -> float | None:
        """None also while trials are pending: what changes with every look is no test."""
        return None if self.test is None or self.pending else self.test.p

    @property
    def compared_at_epoch(self) -> int | None:
        return min((pair.compared_at_epoch for pair in self.pairs if pair.compared_at_epoch), default=None)

    @property
    def obstacle(self) -> str:
        """Why no number of seeds could confirm it; empty if some could."""
        if self.diverged:
            return f"{', '.join(self.diverged)} diverged"
        return f"never passed at {self.num_never} of {_count(len(self.pairs), 'seed')}" if self.num_never else ""

    @property
    def num_never(self) -> int:
        """Seeds at which the row never reached the reference's final mIoU."""
        return sum(pair.never_reached for pair in self.pairs)

    @property
    def lost_everywhere(self) -> str:
        """Why it failed at every single seed, whatever the numbers; empty if it did not."""
        if all(pair.diverged for pair in self.pairs):
            return "diverged at every seed"
        ended = all(pair.never_reached and (pair.diverged or not pair.compared_at_epoch) for pair in self.pairs)
        return "never passed at any seed" if ended else ""


def _evidence(row: Run, trials: Sequence[Measured], *, proxy: bool) -> list[_Evidence]:
    """Of each promise of the row: first its mIoU or gain, then how soon."""
    expect = row.expect
    if expect is None:
        return []
    kind: Kind = "gain" if expect.miou is None else "miou"
    promises: list[tuple[Kind, str | None, tuple[float, float] | None]] = [
        (kind, expect.over, expect.miou or expect.gain)
    ]
    if expect.sooner_than is not None:
        promises.append(("sooner", expect.sooner_than, None))
    return [
        _gather(row.name, kind, reference, promised, expect.note, proxy, trials)
        for kind, reference, promised in promises
    ]


def _gather(
    run: str,
    kind: Kind,
    reference: str | None,
    promised: tuple[float, float] | None,
    note: str,
    proxy: bool,
    trials: Sequence[Measured],
) -> _Evidence:
    own = {trial.seed: trial for trial in trials if trial.run == run}
    # A level of mIoU is compared with nothing: its trials stand beside themselves.
    bars = own if reference is None else {trial.seed: trial for trial in trials if trial.run == reference}
    matched = [(own[seed], bars[seed]) for seed in sorted(own.keys() & bars.keys())]
    usable = [pair for pair in matched if all(trial.status != "failed" for trial in pair)]
    pairs = tuple(pair for trial, bar in usable if (pair := _pair(kind, trial, bar)) is not None)
    return _Evidence(
        run=run,
        kind=kind,
        reference=reference,
        promised=promised,
        note=note,
        proxy=proxy,
        pairs=pairs,
        test=_test(kind, promised, pairs),
        image_interval=_over_images(*usable[0]) if kind == "gain" and len(pairs) == len(usable) == 1 else None,
        pending=_names(usable, ("waiting", "running")),
        failed=_names(matched, ("failed",)),
        diverged=_names(usable, ("diverged",)),
    )


def _names(matched: Sequence[tuple[Measured, Measured]], statuses: Sequence[Status]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(trial.trial for pair in matched for trial in pair if trial.status in statuses))


def _pair(kind: Kind, own: Measured, bar: Measured) -> Pair | None:
    """None where there is nothing to compare (yet)."""
    if not (own.epochs and bar.epochs):
        return None
    pair: Pair | None
    match kind:
        case "gain":
            pair = _gain(own, bar)
        case "miou":
            miou = own.best(own.reached).miou
            pair = Pair(seed=own.seed, own=miou, reference=None, effect=miou, compared_at_epoch=own.ended_at)
        case "sooner":
            pair = _epochs_saved(own, bar)
        case _:
            assert_never(kind)
    if pair is None or not math.isfinite(pair.effect):
        return None
    return replace(pair, diverged=own.status == "diverged")


def _gain(own: Measured, bar: Measured) -> Pair:
    until = _compared_at(own, bar)
    value, reference = (trial.best(until or trial.reached).miou for trial in (own, bar))
    return Pair(seed=own.seed, own=value, reference=reference, effect=value - reference, compared_at_epoch=until)


def _compared_at(own: Measured, bar: Measured) -> int | None:
    """The last epoch both reached, if either ended early."""
    return min(own.reached, bar.reached) if own.ended_at or bar.ended_at else None


def _epochs_saved(own: Measured, bar: Measured) -> Pair | None:
    """None if the reference was stopped: it has no final value then."""
    if bar.ended_at and bar.status != "diverged":
        return None
    final = bar.best(bar.reached)
    reached = own.reaches(final.miou)
    epoch = own.reached + 1 if reached is None else reached
    return Pair(
        seed=own.seed,
        own=epoch,
        reference=final.epoch,
        effect=final.epoch - epoch,
        compared_at_epoch=own.ended_at if reached is None else None,
        never_reached=reached is None,
    )


def _test(kind: Kind, promised: tuple[float, float] | None, pairs: Sequence[Pair]) -> MeanTest | None:
    """Against what must be exceeded: nothing gained or saved, or the low end of a level."""
    if len(pairs) < 2:
        return None
    null = promised[0] if kind == "miou" and promised else 0.0
    return mean_test([pair.effect for pair in pairs], null=null, least_sd=EPOCHS_SD if kind == "sooner" else 0.0)


def _over_images(own: Measured, bar: Measured) -> tuple[float, float] | None:
    """None unless both have the counts of the very epochs that are compared, over two images or more."""
    until = _compared_at(own, bar)
    at_their_best = all(trial.best(until or trial.reached) == trial.best(trial.reached) for trial in (own, bar))
    if own.confusions is None or bar.confusions is None or len(own.confusions) < 2 or not at_their_best:
        return None
    return image_interval(own.confusions, bar.confusions)


# --- ruling ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Ruling:
    item: _Evidence
    p_holm: float | None
    verdict: Verdict
    reason: str


def _rule(item: _Evidence, p_holm: float | None) -> _Ruling:
    verdict, reason = _before_any_test(item) or _by_interval(item, p_holm)
    return _Ruling(item=item, p_holm=p_holm, verdict=verdict, reason=reason)


def _before_any_test(item: _Evidence) -> tuple[Verdict, str] | None:
    """What can be said without a t test, or why there is none."""
    if item.unjudged:
        return "not judged", "a proxy's mIoU is not that of the full runs"
    if item.pending:
        return "undecided", f"not ended: {', '.join(item.pending)}"
    if not item.pairs:
        return "undecided", f"no {item.reference} to compare with at a same seed" if item.reference else "no trial"
    if item.test is None:
        return "undecided", "one seed has no spread to judge by"
    if item.lost_everywhere:
        return "refuted", item.lost_everywhere
    if item.test.p is None:
        same = item.kind == "gain" and abs(item.test.mean) < NO_SPREAD
        return ("refuted", "the same to the last bit") if same else ("undecided", "equal seeds count as one")
    return None


def _by_interval(item: _Evidence, p_holm: float | None) -> tuple[Verdict, str]:
    assert item.test is not None
    assert p_holm is not None
    low, high = item.test.interval
    least, most = item.promised or (0.0, math.inf)
    null = least if item.kind == "miou" else 0.0
    if high <= null or high < least:
        return _short_of_it(item, low, high)
    if low <= null:
        return "undecided", "the interval is too wide"
    if p_holm >= ALPHA:
        return "undecided", f"not after Holm's correction over the table (p {p_holm:.2f})"
    if item.obstacle:
        return "undecided", item.obstacle
    return "confirmed", "more than promised" if low > most else ""


def _short_of_it(item: _Evidence, low: float, high: float) -> tuple[Verdict, str]:
    if item.kind == "sooner":
        return "refuted", "not sooner"
    if item.kind == "gain" and high <= 0:
        return "refuted", "no gain"
    if item.kind == "gain" and low > 0:
        return "refuted", "a gain, but less than promised"
    if item.kind == "miou" and any(pair.compared_at_epoch and not pair.diverged for pair in item.pairs):
        return "undecided", "stopped early, it could have risen"
    return "refuted", "less than promised"


# --- what it would cost to know -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Plan:
    seeds: int
    capped: bool
    spread: float
    assumed: bool
    hours: float | None


def _plan(ruling: _Ruling, alpha: float, hours: Mapping[str, float]) -> _Plan | None:
    """None where seeds are not what is missing."""
    item, test = ruling.item, ruling.item.test
    if ruling.verdict != "undecided" or item.pending or item.obstacle or (test and test.p is None):
        return None
    effect = _effect_to_find(item)
    if effect is None or effect < 0:
        return None
    spread = ASSUMED_SD if test is None else test.sd
    total = seeds_for_power(effect=effect, sd=spread, alpha=alpha, most=MOST_SEEDS + len(item.pairs))
    more = MOST_SEEDS if total is None else max(total - len(item.pairs), 1)
    return _Plan(
        seeds=more,
        capped=total is None,
        spread=spread,
        assumed=test is None,
        hours=_cost(more, [name for name in (item.run, item.reference) if name is not None], hours),
    )


def _effect_to_find(item: _Evidence) -> float | None:
    """The middle of the promise above what must be exceeded; for "sooner", what was measured."""
    if item.promised is None:
        return None if item.test is None else item.test.mean
    low, high = item.promised
    return (low + high) / 2 - (low if item.kind == "miou" else 0.0)


def _cost(seeds: int, names: Iterable[str], hours_per_seed: Mapping[str, float]) -> float | None:
    """In device hours; None while a row's speed is unknown."""
    hours = [hours_per_seed.get(name) for name in names]
    return None if None in hours else seeds * sum(hour for hour in hours if hour is not None)


def _hours_per_seed(rows: Iterable[Run], trials: Sequence[Measured], devices_per_trial: float) -> dict[str, float]:
    """Device hours of one trial that goes to its end; a row without epochs goes by those of all the others."""
    hours = {}
    for row in rows:
        known = [trial for trial in trials if trial.run == row.name and trial.epochs]
        known = known or [trial for trial in trials if trial.epochs]
        if known:
            seconds = [epoch.seconds for trial in known for epoch in trial.epochs]
            num_epochs = max(trial.num_epochs for trial in known)
            hours[row.name] = math.fsum(seconds) / len(seconds) * num_epochs * devices_per_trial / 3600
    return hours


# --- rows that differ in more than one thing ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A setting of a row that is not that of its reference."""

    setting: str
    """As `optimizer lr`."""
    before: object
    after: object
    is_a_thing: bool
    """False for a setting that only one of two kinds has: it comes and goes with the kind."""

    @property
    def words(self) -> str:
        return f"{self.setting} {_value(self.before)} → {_value(self.after)}"


def differences(row: Run, reference: Run) -> tuple[Difference, ...]:
    """Leaf by leaf, all but name, seed and expectation, in the order of the fields."""
    before, after = _leaves(reference), _leaves(row)
    return tuple(
        Difference(
            setting=setting,
            before=before.get(setting),
            after=after.get(setting),
            is_a_thing=setting in before and setting in after,
        )
        for setting in dict.fromkeys([*before, *after])
        if before.get(setting) != after.get(setting)
    )


def _leaves(run: Run) -> dict[str, object]:
    leaves: dict[str, object] = {}
    for name, value in run.model_dump(exclude={"name", "seed", "expect"}).items():
        leaves |= {f"{name} {key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return leaves


def _row_flags(rows: Mapping[str, Run]) -> dict[str, tuple[str, ...]]:
    """By row, whether it differs in more than one thing from its reference, else from the table's most common one."""
    references = {name: _reference(row) for name, row in rows.items()}
    baseline = Counter(name for name in references.values() if name).most_common(1)
    flags: dict[str, tuple[str, ...]] = {}
    for name, row in rows.items():
        reference = references[name] or (baseline[0][0] if baseline else name)
        found = differences(row, rows[reference]) if reference in rows else ()
        several = sum(difference.is_a_thing for difference in found) > 1
        words = ", ".join(difference.words for difference in found)
        flags[name] = (f"differs from {reference} in more than one thing: {words}",) if several else ()
    return flags


def _reference(row: Run) -> str | None:
    return (row.expect.over or row.expect.sooner_than) if row.expect else None


# --- words ----------------------------------------------------------------------------------------------------------


def _claim(ruling: _Ruling, plan: _Plan | None, row_flags: tuple[str, ...], unit: Unit) -> Claim:
    item, test = ruling.item, ruling.item.test
    estimate = math.fsum(pair.effect for pair in item.pairs) / len(item.pairs) if item.pairs else None
    return Claim(
        run=item.run,
        kind=item.kind,
        reference=item.reference,
        promised=item.promised,
        pairs=item.pairs,
        n_pairs=len(item.pairs),
        estimate=estimate,
        interval=test.interval if test else None,
        image_interval=item.image_interval,
        p=item.p,
        p_holm=ruling.p_holm,
        verdict=ruling.verdict,
        reason=ruling.reason,
        words=_words(ruling, plan, estimate, unit),
        compared_at_epoch=item.compared_at_epoch,
        flags=(*_flags(item, plan), *row_flags),
        note=item.note,
        seeds_needed=plan.seeds if plan else None,
        seeds_capped=plan is not None and plan.capped,
        spread=plan.spread if plan else None,
        spread_assumed=plan is not None and plan.assumed,
        cost_hours=plan.hours if plan else None,
    )


def _flags(item: _Evidence, plan: _Plan | None) -> list[str]:
    flags = {
        "proxy": item.proxy,
        f"compared at epoch {item.compared_at_epoch}": item.compared_at_epoch,
        f"not ended: {', '.join(item.pending)}": item.pending,
        f"diverged: {', '.join(item.diverged)}": item.diverged,
        f"failed, left out: {', '.join(item.failed)}": item.failed,
        f"never passed at {item.num_never} of {_count(len(item.pairs), 'seed')}, so an upper bound": item.num_never,
        f"spread of {ASSUMED_SD:g} points assumed": plan and plan.assumed,
    }
    return [words for words, holds in flags.items() if holds]


def _words(ruling: _Ruling, plan: _Plan | None, estimate: float | None, unit: Unit) -> str:
    item = ruling.item
    parts = [
        ("on a proxy, " if item.proxy else "") + _measured_words(item, estimate) + _basis_words(item),
        f": {ruling.verdict}",
        f", {ruling.reason}" if ruling.reason else "",
        f" ({', '.join(item.diverged)} diverged)" if item.diverged and item.obstacle != ruling.reason else "",
        f"; promised {_promise_words(item)}",
        _image_words(item),
        _plan_words(plan, unit),
    ]
    return "".join(parts)


def _measured_words(item: _Evidence, estimate: float | None) -> str:
    if estimate is None:
        return "nothing measured"
    match item.kind:
        case "gain":
            done = "gained" if estimate >= 0 else "lost"
            return f"{done} {abs(estimate):.2f} points {'over' if estimate >= 0 else 'against'} {item.reference}"
        case "miou":
            return f"reached {estimate:.2f} % mIoU"
        case "sooner":
            if all(pair.never_reached for pair in item.pairs):
                return f"never passed {item.reference}'s final mIoU"
            bound = "at best " if item.num_never else ""
            when = "sooner" if estimate >= 0 else "later"
            return f"passed {item.reference}'s final mIoU {bound}{abs(estimate):.1f} epochs {when}"
        case _:
            assert_never(item.kind)


def _basis_words(item: _Evidence) -> str:
    if not item.pairs:
        return ""
    digits = 1 if item.kind == "sooner" else 2
    parts = [
        *([f"95 % interval {_range(item.test.interval, f'.{digits}f')}"] if item.test else []),
        _count(len(item.pairs), "seed"),
        *([f"compared at epoch {item.compared_at_epoch}"] if item.compared_at_epoch else []),
    ]
    return f" ({', '.join(parts)})"


def _promise_words(item: _Evidence) -> str:
    if item.promised is None:
        return "sooner"
    return _range(item.promised, "+g") if item.kind == "gain" else f"{_range(item.promised, 'g')} %"


def _image_words(item: _Evidence) -> str:
    if item.image_interval is None:
        return ""
    return f"; over the validation images {_range(item.image_interval, '+.2f')} (95 %: data noise, not seed noise)"


def _plan_words(plan: _Plan | None, unit: Unit) -> str:
    if plan is None:
        return ""
    number = f"more than {plan.seeds} more seeds" if plan.capped else _count(plan.seeds, "more seed")
    cost = f" ({plan.hours:.3g} {unit})" if plan.hours is not None and not plan.capped else ""
    assumed = f" if seeds spread by {plan.spread:g} points" if plan.assumed else ""
    return f"; {number}{cost} would decide it at {100 * POWER:g} % power{assumed}"


def _range(bounds: tuple[float, float], form: str) -> str:
    low, high = bounds
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _value(value: object) -> str:
    return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
