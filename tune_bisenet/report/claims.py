"""From what a row is expected to reach and what its trials measured to a `Claim` with a verdict.

`claims_of` pairs trials by seed; `decided` gives the verdict once the interval is known, which takes all rows of the
table (`verdicts`). A trial's measure is its mean mIoU over the last epochs, that of some classes alone where the space
declares a second one. mIoU is in percent, gains are in points.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, Literal, assert_never

import numpy as np
from numpy.typing import NDArray

from tune_bisenet.config import Run, format_size
from tune_bisenet.records import Epoch, Status
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import NO_SPREAD, Floats, image_interval

Kind = Literal["gain", "miou", "sooner"]
Verdict = Literal["kept", "exceeded", "gained", "above", "below", "broken", "blew up", "open", "not judged"]
Range = tuple[float, float]

UNDECIDED: Final[tuple[Verdict, ...]] = ("open", "gained")
"""Verdicts that more seeds may change."""


MOST_NAMED_TRIALS: Final = 3
"""Trials that a reason names."""

ENOUGH_GROUPS: Final = 10
"""Cities or sequences over which a bootstrap covers nearly what it says: 90 % of 200 simulations; over three 75 %."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One seed's part of a claim: mIoU in percent, or for "sooner" the epochs until the level was reached."""

    seed: int
    own: float
    reference: float | None
    """None for a level of mIoU, which is compared with nothing."""
    effect: float
    """Points gained, epochs saved, or the row's own mIoU."""
    compared_at_epoch: int | None = None
    """Set where a trial ended early."""


@dataclass(frozen=True, kw_only=True)
class SampleSize:
    """Says how many more seeds would decide a claim."""

    seeds: int
    is_capped: bool
    """More than `seeds`."""
    spread: float
    """The standard deviation of a trial over seeds that this is computed from; of epochs saved for "sooner"."""
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
    margin: float
    """The smallest difference that matters, in points."""
    classes: tuple[str, ...] = ()
    """The classes whose mean IoU it is about, the space's second measure; empty for mIoU."""
    level: float | None = None
    """For "sooner": the mIoU in percent that is to be reached; None for each trial's own last."""
    note: str = ""
    on_proxy: bool = False
    pairs: tuple[Pair, ...] = ()
    best_estimate: float | None = None
    """As `estimate`, but of each trial's best epoch; None for "sooner"."""
    image_interval: Range | None = None
    """At 95 %, over validation images, of one seed's gain at the best epochs: the noise of the data, not of seeds."""
    drawn_from: str = ""
    """What that interval draws: `24 images` or `3 cities or sequences`; `one city or sequence` gives no interval."""
    pending: tuple[str, ...] = ()
    failed: tuple[str, ...] = ()
    stopped: tuple[str, ...] = ()
    blown_up: tuple[str, ...] = ()
    """Names of trials, those of the reference among them; the last of those whose loss diverged."""
    blew_up_everywhere: bool = False
    """Whether the row itself diverged at every seed, two or more."""
    confounded: str = ""
    """The settings in which the row differs from its reference, if they are several."""
    is_noisy: bool = False
    """Whether the row or its reference is far noisier than the others, and judged by its own noise."""
    interval: Range | None = None
    """Over seeds; it holds together with those of all claims of its kind. None where nothing can be judged yet."""
    verdict: Verdict = "open"
    reason: str = ""
    sample_size: SampleSize | None = None
    """None where the claim is decided, or where seeds alone would not decide it."""

    @property
    def is_judged(self) -> bool:
        return not (self.on_proxy and self.kind == "miou")

    @property
    def measure(self) -> str:
        return format_measure(self.classes)

    @property
    def estimate(self) -> float | None:
        """Return the mean over the pairs: points, percent, or epochs saved."""
        return math.fsum(pair.effect for pair in self.pairs) / len(self.pairs) if self.pairs else None

    @property
    def compared_at_epoch(self) -> int | None:
        """Return the earliest epoch at which a pair was compared; None if all trials completed."""
        return min((pair.compared_at_epoch for pair in self.pairs if pair.compared_at_epoch), default=None)

    @property
    def obstacle(self) -> str:
        """Return why the claim cannot be judged, whatever was measured; empty if it can."""
        if self.pending:
            return f"not ended: {_named(self.pending)}"
        if self.blown_up:
            return f"blew up: {_named(self.blown_up)}"
        if self.stopped:
            return f"stopped early, so described but not judged: {_named(self.stopped)}"
        if not self.pairs:
            return f"no {self.reference} to compare with at a same seed" if self.reference else "no trial"
        return "one seed has no spread to judge by" if len(self.pairs) == 1 else ""

    @property
    def is_blocked(self) -> bool:
        """Return whether seeds of the claim cannot be judged, however many more there are."""
        return bool(self.pending or self.blown_up or self.stopped)

    @property
    def remarks(self) -> list[str]:
        """Return what to know before believing the verdict."""
        size = self.sample_size
        remarks = {
            f"compared at epoch {self.compared_at_epoch}": self.compared_at_epoch,
            f"failed, left out: {_named(self.failed)}": self.failed,
            f"no interval over images: all are of {self.drawn_from}": self.drawn_from and not self.image_interval,
            "far noisier than the other rows, so judged by its own noise": self.is_noisy,
            f"spread of {size.spread if size else 0:g} points assumed": size and size.is_assumed,
            f"differs from its reference in more than one setting: {self.confounded}": self.confounded,
            self.note: self.note,
        }
        return [remark for remark, holds in remarks.items() if holds]


def format_measure(classes: Collection[str]) -> str:
    """Format as `mean IoU of 16 classes`, or `mIoU` if none are named."""
    return f"mean IoU of {len(classes)} class{'' if len(classes) == 1 else 'es'}" if classes else "mIoU"


def _named(trials: Sequence[str]) -> str:
    """Return the first few names, and how many more there are."""
    shown = ", ".join(trials[:MOST_NAMED_TRIALS])
    return shown + (f" and {len(trials) - MOST_NAMED_TRIALS} more" if len(trials) > MOST_NAMED_TRIALS else "")


def claims_of(
    row: Run,
    trials: Sequence[ReportedTrial],
    *,
    measured_share: float,
    proxy: bool,
    second_measure: tuple[str, ...] = (),
) -> list[Claim]:
    """Return a claim for each expectation of the row, measured but undecided: first its mIoU or gain, then how soon.

    `measured_share` is the share of the epochs, the last ones, over which mIoU is averaged. A gain is claimed once more
    of the mean IoU of the classes `second_measure`.
    """
    expect = row.expect
    if expect is None:
        return []
    first = Claim(
        run=row.name,
        kind="gain" if expect.miou is None else "miou",
        reference=expect.over,
        expected=expect.miou or expect.gain,
        margin=expect.margin,
        note=expect.note,
        on_proxy=proxy,
    )
    claims = [first]
    if second_measure and first.kind == "gain":
        claims.append(replace(first, classes=second_measure))
    if expect.sooner_than is not None:
        level = expect.miou and expect.miou[0]
        claims.append(replace(first, kind="sooner", reference=expect.sooner_than, expected=None, level=level))
    return [_measured(claim, trials, measured_share) for claim in claims]


def _measured(claim: Claim, trials: Sequence[ReportedTrial], share: float) -> Claim:
    own = {trial.run.seed: trial for trial in trials if trial.run.name == claim.run}
    # A level of mIoU is compared with nothing: its trials are paired with themselves.
    reference = claim.reference or claim.run
    bars = {trial.run.seed: trial for trial in trials if trial.run.name == reference}
    matched = [(own[seed], bars[seed]) for seed in sorted(own.keys() & bars.keys())]
    usable = [pair for pair in matched if all(trial.state.status != "failed" for trial in pair)]
    pairs = [pair for trial, bar in usable if (pair := _pair(claim, trial, bar, share)) is not None]
    diverged = [trial.state.status == "diverged" for trial, _bar in usable]
    is_single = claim.kind == "gain" and not claim.classes and len(pairs) == len(usable) == 1
    interval, drawn_from = _over_images(*usable[0]) if is_single else (None, "")
    return replace(
        claim,
        pairs=tuple(pairs),
        best_estimate=_best_estimate(claim, usable),
        image_interval=interval,
        drawn_from=drawn_from,
        pending=_names(usable, ("waiting", "running")),
        failed=_names(matched, ("failed",)),
        stopped=_names(usable, ("stopped",)),
        blown_up=_names(usable, ("diverged",)),
        blew_up_everywhere=len(diverged) > 1 and all(diverged),
    )


def _names(matched: Sequence[tuple[ReportedTrial, ReportedTrial]], statuses: Sequence[Status]) -> tuple[str, ...]:
    trials = [trial.state for pair in matched for trial in pair]
    return tuple(dict.fromkeys(trial.trial for trial in trials if trial.status in statuses))


def measure_window(num_epochs: int, share: float) -> int:
    """Return how many epochs a run's measure is the mean of: `share` of them, at least one."""
    return max(1, round(num_epochs * share))


def final_epochs(trial: ReportedTrial, share: float, *, until: int | None = None) -> list[Epoch]:
    """Return a trial's last epochs, or those up to `until`, that its measure is the mean of; diverged ones left out."""
    window = measure_window(trial.run.num_epochs, share)
    sound = [epoch for epoch in trial.epochs if not epoch.diverged and epoch.epoch <= (until or epoch.epoch)]
    return sound[-window:]


def final_miou(trial: ReportedTrial, share: float, *, until: int | None = None, classes: Collection[str] = ()) -> float:
    """Return the mean mIoU (percent) of a trial's `final_epochs`, or that of `classes` alone; NaN if it has none."""
    return _mean_miou(final_epochs(trial, share, until=until), _indices(trial, classes))


def _indices(trial: ReportedTrial, classes: Collection[str]) -> list[int]:
    """Return the trainIds of the classes of these names."""
    return [train_id for train_id, name in enumerate(trial.classes.names) if name in classes]


def _mean_miou(epochs: Sequence[Epoch], classes: Collection[int] = ()) -> float:
    return math.fsum(_miou(epoch, classes) for epoch in epochs) / len(epochs) if epochs else math.nan


def _miou(epoch: Epoch, classes: Collection[int]) -> float:
    """Return the mean IoU of those of `classes`, by trainId, that occur, NaN if none does; mIoU of no classes."""
    if not classes:
        return epoch.miou
    named = [iou for train_id in classes if (iou := epoch.iou[train_id]) is not None]
    return math.fsum(named) / len(named) if named else math.nan


def _pair(claim: Claim, own: ReportedTrial, bar: ReportedTrial, share: float) -> Pair | None:
    """Return None where there is nothing to compare (yet)."""
    if not (own.epochs and bar.epochs):
        return None
    until = min(own.reached, bar.reached) if own.ended_at or bar.ended_at else None
    reference: float | None = None
    match claim.kind:
        case "gain":
            value, bar_value = (final_miou(trial, share, until=until, classes=claim.classes) for trial in (own, bar))
            reference, effect = bar_value, value - bar_value
        case "miou":
            value = effect = final_miou(own, share)
        case "sooner":
            if until is not None:
                return None  # it takes the level at which both end
            value, bar_value = _epochs_until_level(claim, own, bar, share)
            reference, effect = bar_value, bar_value - value
        case _:
            assert_never(claim.kind)
    if not math.isfinite(effect):
        return None
    return Pair(seed=own.run.seed, own=value, reference=reference, effect=effect, compared_at_epoch=until)


def _epochs_until_level(claim: Claim, own: ReportedTrial, bar: ReportedTrial, share: float) -> tuple[float, float]:
    """Return the epoch at which each trial's running mean first came as near to its end as the level asks.

    The lower of the two ends some points above the level (or less than `margin`, where it does not reach it): both are
    to come so many points near their own end. So what counts is speed; a trial that ends higher has further to go.
    """
    own_end, bar_end = final_miou(own, share), final_miou(bar, share)
    level = math.inf if claim.level is None else claim.level
    distance = max(claim.margin, min(own_end, bar_end) - level)
    return _first_epoch_at(own, own_end - distance, share), _first_epoch_at(bar, bar_end - distance, share)


def _first_epoch_at(trial: ReportedTrial, level: float, share: float) -> float:
    """Return the first epoch at which the mean of the last epochs is at `level`; one after the last if none is."""
    window = measure_window(trial.run.num_epochs, share)
    for end in range(window, len(trial.epochs) + 1):
        if _mean_miou(trial.epochs[end - window : end]) >= level:
            return float(trial.epochs[end - 1].epoch)
    return float(trial.run.num_epochs + 1)


def _best_estimate(claim: Claim, usable: Sequence[tuple[ReportedTrial, ReportedTrial]]) -> float | None:
    if claim.kind == "sooner" or not usable:
        return None
    effects = []
    for pair in usable:
        end = min(trial.reached for trial in pair)
        own, bar = (
            _mean_miou([best] if (best := trial.best(end)) else [], _indices(trial, claim.classes)) for trial in pair
        )
        effects.append(own - bar if claim.kind == "gain" else own)
    mean = math.fsum(effects) / len(effects)
    return mean if math.isfinite(mean) else None


def _over_images(own: ReportedTrial, bar: ReportedTrial) -> tuple[Range | None, str]:
    """Return the interval over validation images and what it draws, if both completed and have their best's counts."""
    if own.ended_at or bar.ended_at or own.confusions is None or bar.confusions is None:
        return None, ""
    number = len(set(own.groups))
    too_few = ", too few for 95 %" if number < ENOUGH_GROUPS else ""
    several = f"{number} images" if number == len(own.groups) else f"{number} cities or sequences{too_few}"
    interval = image_interval(own.confusions, bar.confusions, own.groups)
    return interval, several if number > 1 else "one city or sequence"


def decided(claim: Claim) -> Claim:
    """Return the claim with its verdict, and the reason in a few words."""
    if not claim.is_judged:
        return replace(claim, verdict="not judged", reason="a proxy's mIoU is not that of the full runs")
    if claim.blew_up_everywhere and not claim.pending:
        return replace(claim, verdict="blew up", reason="its loss diverged at every seed")
    if claim.obstacle:
        return replace(claim, reason=claim.obstacle)
    if claim.kind == "gain" and all(abs(pair.effect) < NO_SPREAD for pair in claim.pairs):
        verdict, _ = judge_interval(claim, 0.0, 0.0)
        return replace(claim, verdict=verdict, reason="the same to the last bit")
    if claim.interval is None:
        return replace(claim, reason="equal seeds count as one")
    verdict, reason = judge_interval(claim, *claim.interval)
    return replace(claim, verdict=verdict, reason=reason)


def latest(earlier: Claim, later: Claim) -> Claim:
    """Return which of a claim's verdicts at two looks is final: a decided one, or a gain once it was shown."""
    return earlier if is_final(earlier.verdict, later.verdict) else later


def is_final(earlier: Any, later: Any) -> Any:
    """Return whether an earlier look's verdict outlasts a later one's; both are words, or arrays of them."""
    return ~np.isin(earlier, UNDECIDED) | ((earlier == "gained") & (later == "open"))


def judge_interval(claim: Claim, low: float, high: float) -> tuple[Verdict, str]:
    """Return the verdict, and its reason, on a claim whose interval has these ends; the rules are in `verdicts`."""
    found = ((verdict, reason) for holds, verdict, reason in _rules(claim, low, high) if holds)
    return next(found, ("open", "the interval is too wide"))


def judge_intervals(claim: Claim, low: Floats, high: Floats) -> NDArray[np.object_]:
    """Return the verdicts on a claim by the ends of its interval in many simulated searches; NaN leaves it open."""
    conditions, verdicts, _reasons = zip(*_rules(claim, low, high), strict=True)
    selected: NDArray[np.object_] = np.select(conditions, verdicts, "open").astype(object)
    return selected


def _rules(claim: Claim, low: Any, high: Any) -> list[tuple[Any, Verdict, str]]:
    """Return, in order, what makes which verdict, and why: the first that holds counts; where none does it is open.

    The ends are numbers or arrays; a condition is of the same shape.
    """
    least, most = claim.expected or (0.0, 0.0)
    bar = least - claim.margin
    match claim.kind:
        case "gain":
            return [
                ((least > 0) & (high <= 0), "broken", "no gain"),
                ((high < bar) & (low > 0), "broken", "a gain, but less than expected"),
                (high < bar, "broken", "less than expected"),
                (low > most, "exceeded", "more than expected" if most else "a gain where none was expected"),
                ((low >= bar) & ((low > 0) | (least <= 0)), "kept", ""),
                (low > 0, "gained", "a gain; its size is open"),
            ]
        case "miou":
            return [
                ((low >= bar) & (high <= most + claim.margin), "kept", ""),
                (low > most, "above", "more than expected"),
                (high < least, "below", "less than expected"),
            ]
        case "sooner":
            return [(low > 0, "kept", ""), (high < 0, "broken", "later")]
        case _:
            assert_never(claim.kind)


def settings(run: Run) -> dict[str, Any]:
    """Return every setting that decides how a row is trained, but for chance, by a name such as `optimizer lr`."""
    leaves: dict[str, Any] = {}
    for name, value in run.model_dump(exclude={"name", "seed", "stream", "expect"}).items():
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
