"""The verdict table as a person reads it: promise, measurement, verdict and cost of each claim in words, and its bar.

A bar shows the 95 % interval against the promised range, on one axis for all claims of a kind.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tune_bisenet.config import Run
from tune_bisenet.report.power import Power
from tune_bisenet.report.verdicts import Claim, Judgement, Kind, Verdict, differences
from tune_bisenet.text import counted

BAR_WIDTH: Final = 220.0
BAR_MARGIN: Final = 6.0
MAX_TICKS: Final = 5

SYMBOLS: Final[dict[Verdict, str]] = {"confirmed": "✓", "refuted": "✗", "undecided": "?", "not judged": "–"}
"""So that a verdict is told apart without its colour."""


@dataclass(frozen=True, kw_only=True)
class Bar:
    """Places along the axis in units of its drawing, 0 to BAR_WIDTH. What lies beyond an end is cut, and so marked."""

    ticks: tuple[tuple[float, str], ...]
    zero: float | None
    """Where nothing is gained; None where the axis does not show it."""
    promise: tuple[float, float] | None
    interval: tuple[float, float] | None
    cut_low: bool
    cut_high: bool
    estimate: float


@dataclass(frozen=True, kw_only=True)
class Promise:
    """One line of the verdict table, in words."""

    claim: Claim
    symbol: str
    changed: str
    """What sets the row apart from the baseline."""
    promised: str
    measured: str
    interval: str
    evidence: str
    to_decide: str
    remarks: tuple[str, ...]
    bar: Bar | None


def promises(judgement: Judgement, rows: Sequence[Run], *, baseline: str | None, price: float | None) -> list[Promise]:
    """All claims in declared order. `price` is that of a device hour."""
    runs = {row.name: row for row in rows}
    axes = {kind: _axis([claim for claim in judgement.claims if claim.kind == kind]) for kind in _kinds(judgement)}
    return [
        Promise(
            claim=claim,
            symbol=SYMBOLS[claim.verdict],
            changed=_changed(runs[claim.run], runs.get(baseline or "")),
            promised=promised_words(claim),
            measured=measured_words(claim),
            interval=_interval_words(claim),
            evidence=_evidence_words(claim),
            to_decide=to_decide_words(claim, judgement, price),
            remarks=(*claim.flags, *([claim.note] if claim.note else [])),
            bar=_bar(claim, axes[claim.kind]),
        )
        for claim in judgement.claims
    ]


def _kinds(judgement: Judgement) -> set[Kind]:
    return {claim.kind for claim in judgement.claims}


# --- words ----------------------------------------------------------------------------------------------------------


def promised_words(claim: Claim | Power) -> str:
    """As `+0.3 to +0.5 over r01`, `mIoU 55 to 57 %` or `sooner than r01`."""
    if claim.promised is None:
        return f"sooner than {claim.reference}"
    if claim.kind == "gain":
        return f"{_range(claim.promised, '+g')} over {claim.reference}"
    return f"mIoU {_range(claim.promised, 'g')} %"


def measured_words(claim: Claim) -> str:
    """The mean over seeds: as `+0.42`, `56.10 %` or `3.0 epochs sooner`."""
    if claim.estimate is None:
        return "nothing yet"
    match claim.kind:
        case "gain":
            return f"{claim.estimate:+z.2f}"
        case "miou":
            return f"{claim.estimate:.2f} %"
        case "sooner":
            return f"{abs(claim.estimate):.1f} epochs {'sooner' if claim.estimate >= 0 else 'later'}"


def _interval_words(claim: Claim) -> str:
    """The 95 % interval over seeds; over validation images where one seed has no other."""
    digits = "z.1f" if claim.kind == "sooner" else "z.2f"
    form = digits if claim.kind == "miou" else f"+{digits}"
    if claim.interval:
        return _range(claim.interval, form)
    return f"{_range(claim.image_interval, form)} over images, no seed noise" if claim.image_interval else ""


def _evidence_words(claim: Claim) -> str:
    seeds = counted(claim.n_pairs, "seed")
    return seeds if claim.p_holm is None else f"{seeds}, p {_p(claim.p_holm)} after Holm"


def to_decide_words(claim: Claim, judgement: Judgement, price: float | None) -> str:
    """As `4 more seeds, 12 GPU-hours, 30.00 to pay`; empty where seeds would not help."""
    if claim.seeds_needed is None:
        return ""
    if claim.seeds_capped:
        return f"more than {claim.seeds_needed} more seeds"
    parts = [counted(claim.seeds_needed, "more seed")]
    if claim.cost_hours is not None:
        parts.append(f"{claim.cost_hours:.3g} {judgement.unit}")
        parts += [] if price is None else [f"{claim.cost_hours * price:,.2f} to pay"]
    return ", ".join(parts)


def _changed(run: Run, bar: Run | None) -> str:
    return ", ".join(difference.words for difference in differences(run, bar)) if bar else ""


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _range(bounds: tuple[float, float], form: str) -> str:
    low, high = bounds
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"


# --- bars -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Axis:
    low: float
    high: float

    def place(self, value: float) -> float:
        """Where a value lies in the drawing; at an end if beyond it."""
        share = (min(max(value, self.low), self.high) - self.low) / (self.high - self.low)
        return round(BAR_MARGIN + share * (BAR_WIDTH - 2 * BAR_MARGIN), 1)


def _axis(claims: Sequence[Claim]) -> _Axis:
    """All that is promised or estimated, zero for differences, and of the intervals as much again to both sides.

    An interval from two seeds can be ten times as wide as everything else; it must not press the rest into a point.
    """
    anchors = [value for claim in claims for value in (*(claim.promised or ()), claim.estimate) if value is not None]
    anchors += [0.0] if any(claim.kind != "miou" for claim in claims) else []
    if not anchors:
        return _Axis(low=0.0, high=1.0)
    ends = [end for claim in claims for end in claim.interval or ()]
    low, high = min(anchors), max(anchors)
    room = max(high - low, 0.5)
    low, high = max(min([low, *ends]), low - room), min(max([high, *ends]), high + room)
    margin = max(0.04 * (high - low), 0.05)
    return _Axis(low=low - margin, high=high + margin)


def _bar(claim: Claim, axis: _Axis) -> Bar | None:
    if claim.estimate is None:
        return None
    low, high = claim.interval or (claim.estimate, claim.estimate)
    return Bar(
        ticks=tuple((axis.place(value), f"{value:z.10g}") for value in _ticks(axis)),
        zero=axis.place(0.0) if claim.kind != "miou" else None,
        promise=(axis.place(claim.promised[0]), axis.place(claim.promised[1])) if claim.promised else None,
        interval=(axis.place(low), axis.place(high)) if claim.interval else None,
        cut_low=low < axis.low,
        cut_high=high > axis.high,
        estimate=axis.place(claim.estimate),
    )


def _ticks(axis: _Axis) -> list[float]:
    """Round numbers within the axis, at most MAX_TICKS."""
    span = axis.high - axis.low
    power = 10.0 ** math.floor(math.log10(span / MAX_TICKS))
    step = next(factor * power for factor in (1, 2, 5, 10) if span / (factor * power) < MAX_TICKS)
    return [number * step for number in range(math.ceil(axis.low / step), math.floor(axis.high / step) + 1)]
