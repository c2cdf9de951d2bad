"""Rule on the evidence for one promise, confirmed, refuted or undecided, with the reason in a few words."""

import math
from dataclasses import dataclass

from tune_bisenet.report.claims import Verdict
from tune_bisenet.report.pairs import Evidence
from tune_bisenet.report.statistics import ALPHA, NO_SPREAD
from tune_bisenet.text import counted


@dataclass(frozen=True, kw_only=True)
class Ruling:
    item: Evidence
    p_holm: float | None
    verdict: Verdict
    reason: str


def rule(item: Evidence, p_holm: float | None) -> Ruling:
    verdict, reason = _before_any_test(item) or _by_interval(item, p_holm)
    return Ruling(item=item, p_holm=p_holm, verdict=verdict, reason=reason)


def _before_any_test(item: Evidence) -> tuple[Verdict, str] | None:
    """What can be said without a t test, or why there is none."""
    if item.unjudged:
        return "not judged", "a proxy's mIoU is not that of the full runs"
    if item.pending:
        return "undecided", f"not ended: {', '.join(item.pending)}"
    if not item.pairs:
        return "undecided", f"no {item.reference} to compare with at a same seed" if item.reference else "no trial"
    if item.test is None:
        return "undecided", "one seed has no spread to judge by"
    if lost := _lost_everywhere(item):
        return "refuted", lost
    if item.test.p is None:
        same = item.kind == "gain" and abs(item.test.mean) < NO_SPREAD
        return ("refuted", "the same to the last bit") if same else ("undecided", "equal seeds count as one")
    return None


def _by_interval(item: Evidence, p_holm: float | None) -> tuple[Verdict, str]:
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
    if hindered := obstacle(item):
        return "undecided", hindered
    return "confirmed", "more than promised" if low > most else ""


def _short_of_it(item: Evidence, low: float, high: float) -> tuple[Verdict, str]:
    if item.kind == "sooner":
        return "refuted", "not sooner"
    if item.kind == "gain" and high <= 0:
        return "refuted", "no gain"
    if item.kind == "gain" and low > 0:
        return "refuted", "a gain, but less than promised"
    if item.kind == "miou" and any(pair.compared_at_epoch and not pair.diverged for pair in item.pairs):
        return "undecided", "stopped early, it could have risen"
    return "refuted", "less than promised"


def _lost_everywhere(item: Evidence) -> str:
    """Why it failed at every single seed, whatever the numbers; empty if it did not."""
    if all(pair.diverged for pair in item.pairs):
        return "diverged at every seed"
    ended = all(pair.never_reached and (pair.diverged or not pair.compared_at_epoch) for pair in item.pairs)
    return "never passed at any seed" if ended else ""


def obstacle(item: Evidence) -> str:
    """Why no number of seeds could confirm it; empty if some could."""
    return f"{', '.join(item.diverged)} diverged" if item.diverged else never_passed(item)


def never_passed(item: Evidence) -> str:
    """At how many seeds the row never reached the reference's final mIoU; empty if at none."""
    return f"never passed at {item.num_never} of {counted(len(item.pairs), 'seed')}" if item.num_never else ""
