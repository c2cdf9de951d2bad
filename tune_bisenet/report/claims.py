"""From what a row is expected to reach and what its trials measured to a `Claim` with a verdict.

A claim is made in three steps, each a function of claims: `claims_of` pairs trials by seed and tests the pairs,
`decided` gives the verdict once Holm's correction over the table is known, `verdicts` adds the seeds still needed.
The rules are in `verdicts`. mIoU is in percent, gains are in percentage points.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, assert_never

from tune_bisenet.config import Run, format_size
from tune_bisenet.records import Status
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import ALPHA, NO_SPREAD, MeanTest, image_interval, mean_test
from tune_bisenet.text import counted

Kind = Literal["gain", "miou", "sooner"]
Verdict = Literal["confirmed", "refuted", "undecided", "not judged"]
Range = tuple[float, float]

EPOCHS_SD: Final = (2 / 12) ** 0.5
"""The least spread of a difference of two whole epochs: each is rounded, with a variance of 1/12."""

ASSUMED_SD: Final = 0.5
"""Points of mIoU, the spread assumed where one seed has measured none: repeats of a run differ by 0.5 to 2."""


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


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """How many more seeds would decide a claim."""

    seeds: int
    is_capped: bool
    """More than `seeds`."""
    spread: float
    """The standard deviation over seeds that this is computed from."""
    is_assumed: bool
    hours: float | None
    """Device hours of `seeds` seeds, those of the reference included; None while a row's speed is unknown."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One expectation of one row, and what became of it."""

    run: str
    kind: Kind
    reference: str | None
    expected: Range | None
    """Points, or percent for a level of mIoU; None for "sooner"."""
    note: str = ""
    on_proxy: bool = False
    pairs: tuple[Pair, ...] = ()
    test: MeanTest | None = None
    """Student's t over the pairs; None with fewer than two."""
    image_interval: Range | None = None
    """At 95 %, over validation images, of one seed's gain: the noise of the data, not that of seeds."""
    pending: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    diverged: tuple[str, ...] = ()
    """Names of trials, those of the reference among them."""
    confounded: str = ""
    """The settings in which the row differs from its reference, if they are several."""
    p_holm: float | None = None
    verdict: Verdict = "undecided"
    reason: str = ""
    sample_size: SampleSize | None = None
    """None where the claim is decided, or where seeds alone would not decide it."""

    @property
    def is_judged(self) -> bool:
        return not (self.on_proxy and self.kind == "miou")

    @property
    def must_exceed(self) -> float:
        """What is tested against: no gain, no epoch saved, or the low end of a level."""
        return self.expected[0] if self.kind == "miou" and self.expected else 0.0

    @property
    def estimate(self) -> float | None:
        """The mean over the pairs: points, percent, or epochs saved."""
        return math.fsum(pair.effect for pair in self.pairs) / len(self.pairs) if self.pairs else None

    @property
    def interval(self) -> Range | None:
        """At 95 %, over seeds."""
        return self.test.interval if self.test else None

    @property
    def p(self) -> float | None:
        """None also while trials are pending: what changes with every look is no test."""
        return None if self.test is None or self.pending else self.test.p

    @property
    def compared_at_epoch(self) -> int | None:
        """The earliest epoch at which a pair was compared; None if all trials completed."""
        return min((pair.compared_at_epoch for pair in self.pairs if pair.compared_at_epoch), default=None)

    @property
    def never_reached(self) -> str:
        """At how many seeds the row never reached the reference's final mIoU; empty if at none."""
        number = sum(pair.never_reached for pair in self.pairs)
        return f"never passed at {number} of {counted(len(self.pairs), 'seed')}" if number else ""

    @property
    def obstacle(self) -> str:
        """Why no number of seeds could confirm it; empty if some could."""
        return f"{', '.join(self.diverged)} diverged" if self.diverged else self.never_reached

    @property
    def remarks(self) -> list[str]:
        """What to know before believing it."""
        size = self.sample_size
        remarks = {
            "proxy": self.on_proxy,
            f"compared at epoch {self.compared_at_epoch}": self.compared_at_epoch,
            f"not ended: {', '.join(self.pending)}": self.pending,
            f"diverged: {', '.join(self.diverged)}": self.diverged,
            f"failed, left out: {', '.join(self.failed)}": self.failed,
            f"{self.never_reached}, so an upper bound": self.never_reached,
            f"spread of {ASSUMED_SD:g} points assumed": size and size.is_assumed,
            f"differs from its reference in more than one setting: {self.confounded}": self.confounded,
            self.note: self.note,
        }
        return [remark for remark, holds in remarks.items() if holds]


def claims_of(row: Run, trials: Sequence[ReportedTrial], *, proxy: bool) -> list[Claim]:
    """Return a claim for each expectation of the row, measured but undecided: first its mIoU or gain, then how soon."""
    expect = row.expect
    if expect is None:
        return []
    claims = [
        Claim(
            run=row.name,
            kind="gain" if expect.miou is None else "miou",
            reference=expect.over,
            expected=expect.miou or expect.gain,
            note=expect.note,
            on_proxy=proxy,
        )
    ]
    if expect.sooner_than is not None:
        claims.append(replace(claims[0], kind="sooner", reference=expect.sooner_than, expected=None))
    return [_measured(claim, trials) for claim in claims]


def _measured(claim: Claim, trials: Sequence[ReportedTrial]) -> Claim:
    own = {trial.run.seed: trial for trial in trials if trial.run.name == claim.run}
    # A level of mIoU is compared with nothing: its trials are paired with themselves.
    reference = claim.reference or claim.run
    bars = {trial.run.seed: trial for trial in trials if trial.run.name == reference}
    matched = [(own[seed], bars[seed]) for seed in sorted(own.keys() & bars.keys())]
    usable = [pair for pair in matched if all(trial.state.status != "failed" for trial in pair)]
    pairs = [pair for trial, bar in usable if (pair := _pair(claim.kind, trial, bar)) is not None]
    test = None
    if len(pairs) > 1:
        least_sd = EPOCHS_SD if claim.kind == "sooner" else 0.0
        test = mean_test([pair.effect for pair in pairs], null=claim.must_exceed, least_sd=least_sd)
    return replace(
        claim,
        pairs=tuple(pairs),
        test=test,
        image_interval=_over_images(*usable[0]) if claim.kind == "gain" and len(pairs) == len(usable) == 1 else None,
        pending=_names(usable, ("waiting", "running")),
        failed=_names(matched, ("failed",)),
        diverged=_names(usable, ("diverged",)),
    )


def _names(matched: Sequence[tuple[ReportedTrial, ReportedTrial]], statuses: Sequence[Status]) -> tuple[str, ...]:
    trials = [trial.state for pair in matched for trial in pair]
    return tuple(dict.fromkeys(trial.trial for trial in trials if trial.status in statuses))


def _pair(kind: Kind, own: ReportedTrial, bar: ReportedTrial) -> Pair | None:
    """Return None where there is nothing to compare (yet)."""
    if not (own.epochs and bar.epochs):
        return None
    pair: Pair | None
    match kind:
        case "gain":
            until = _compared_at(own, bar)
            value, reference = (trial.best(until or trial.reached).miou for trial in (own, bar))
            effect = value - reference
            pair = Pair(seed=own.run.seed, own=value, reference=reference, effect=effect, compared_at_epoch=until)
        case "miou":
            miou = own.best(own.reached).miou
            pair = Pair(seed=own.run.seed, own=miou, reference=None, effect=miou, compared_at_epoch=own.ended_at)
        case "sooner":
            pair = _epochs_saved(own, bar)
        case _:
            assert_never(kind)
    if pair is None or not math.isfinite(pair.effect):
        return None
    return replace(pair, diverged=own.state.status == "diverged")


def _compared_at(own: ReportedTrial, bar: ReportedTrial) -> int | None:
    """Return the last epoch both reached, if either ended early."""
    return min(own.reached, bar.reached) if own.ended_at or bar.ended_at else None


def _epochs_saved(own: ReportedTrial, bar: ReportedTrial) -> Pair | None:
    """Return None if the reference was stopped: it has no final value then."""
    if bar.ended_at and bar.state.status != "diverged":
        return None
    final = bar.best(bar.reached)
    reached = next((epoch.epoch for epoch in own.epochs if not epoch.diverged and epoch.miou >= final.miou), None)
    epoch = own.reached + 1 if reached is None else reached
    return Pair(
        seed=own.run.seed,
        own=epoch,
        reference=final.epoch,
        effect=final.epoch - epoch,
        compared_at_epoch=own.ended_at if reached is None else None,
        never_reached=reached is None,
    )


def _over_images(own: ReportedTrial, bar: ReportedTrial) -> Range | None:
    """Return None unless both have the counts of the very epochs that are compared, over two images or more."""
    until = _compared_at(own, bar)
    at_their_best = all(trial.best(until or trial.reached) == trial.best(trial.reached) for trial in (own, bar))
    if own.confusions is None or bar.confusions is None or len(own.confusions) < 2 or not at_their_best:
        return None
    return image_interval(own.confusions, bar.confusions)


def decided(claim: Claim, p_holm: float | None) -> Claim:
    """Return the claim with its verdict, and the reason in a few words."""
    verdict, reason = _before_any_test(claim) or _by_interval(claim, p_holm)
    return replace(claim, p_holm=p_holm, verdict=verdict, reason=reason)


def _before_any_test(claim: Claim) -> tuple[Verdict, str] | None:
    """Return what can be said without a t test, or why there is none."""
    if not claim.is_judged:
        return "not judged", "a proxy's mIoU is not that of the full runs"
    if claim.pending:
        return "undecided", f"not ended: {', '.join(claim.pending)}"
    if not claim.pairs:
        return "undecided", f"no {claim.reference} to compare with at a same seed" if claim.reference else "no trial"
    if claim.test is None:
        return "undecided", "one seed has no spread to judge by"
    if all(pair.diverged for pair in claim.pairs):
        return "refuted", "diverged at every seed"
    if all(pair.never_reached and (pair.diverged or not pair.compared_at_epoch) for pair in claim.pairs):
        return "refuted", "never passed at any seed"
    if claim.test.p is None:
        same = claim.kind == "gain" and abs(claim.test.mean) < NO_SPREAD
        return ("refuted", "the same to the last bit") if same else ("undecided", "equal seeds count as one")
    return None


def _by_interval(claim: Claim, p_holm: float | None) -> tuple[Verdict, str]:
    assert claim.test is not None
    assert p_holm is not None
    low, high = claim.test.interval
    least, most = claim.expected or (0.0, math.inf)
    if high <= claim.must_exceed or high < least:
        if claim.kind == "sooner":
            return "refuted", "not sooner"
        if claim.kind == "gain" and high <= 0:
            return "refuted", "no gain"
        if claim.kind == "gain" and low > 0:
            return "refuted", "a gain, but less than expected"
        if claim.kind == "miou" and any(pair.compared_at_epoch and not pair.diverged for pair in claim.pairs):
            return "undecided", "stopped early, it could have risen"
        return "refuted", "less than expected"
    if low <= claim.must_exceed:
        return "undecided", "the interval is too wide"
    if p_holm >= ALPHA:
        return "undecided", f"not after Holm's correction over the table (p {p_holm:.2f})"
    if claim.obstacle:
        return "undecided", claim.obstacle
    return "confirmed", "more than expected" if low > most else ""


def settings(run: Run) -> dict[str, Any]:
    """Return every setting that decides how a row is trained, by a name such as `optimizer lr`."""
    leaves: dict[str, Any] = {}
    for name, value in run.model_dump(exclude={"name", "seed", "expect"}).items():
        leaves |= {f"{name} {key}": leaf for key, leaf in value.items()} if isinstance(value, dict) else {name: value}
    return leaves | {"image_size": format_size(run.image_size)}


def format_setting(row: Mapping[str, Any], name: str) -> str:
    """Format one of a row's `settings`; `–` for one that only another kind of row has."""
    value = row.get(name)
    if value is None:
        return "none" if name in row else "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def differences(row: Run, reference: Run) -> dict[str, str]:
    """Return each setting of a row that is not its reference's, as `0.01 → 0.015`."""
    before, after = settings(reference), settings(row)
    return {
        name: f"{format_setting(before, name)} → {format_setting(after, name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name) != after.get(name)
    }


def confounded_rows(rows: Mapping[str, Run]) -> dict[str, str]:
    """Return, by row, the settings in which it differs from its reference, if they are several; else empty.

    A row without a reference is compared with the table's most common one. Settings that only one of two kinds of
    optimizer or loss has come and go with the kind, and do not count.
    """
    references = {
        name: (row.expect.over or row.expect.sooner_than) if row.expect else None for name, row in rows.items()
    }
    common = Counter(name for name in references.values() if name).most_common(1)
    confounded = {}
    for name, row in rows.items():
        reference = rows.get(references[name] or (common[0][0] if common else name), row)
        changed = differences(row, reference)
        shared = settings(row).keys() & settings(reference).keys()
        several = sum(setting in shared for setting in changed) > 1
        confounded[name] = ", ".join(f"{setting} {change}" for setting, change in changed.items()) if several else ""
    return confounded
