"""Tell a claim in words: its flags, and all of it in one sentence."""

from typing import assert_never

from tune_bisenet.report.claims import Unit
from tune_bisenet.report.cost import ASSUMED_SD, Plan
from tune_bisenet.report.pairs import Evidence
from tune_bisenet.report.ruling import Ruling, never_passed, obstacle
from tune_bisenet.report.statistics import POWER
from tune_bisenet.text import counted


def flags_of(item: Evidence, plan: Plan | None) -> list[str]:
    flags = {
        "proxy": item.proxy,
        f"compared at epoch {item.compared_at_epoch}": item.compared_at_epoch,
        f"not ended: {', '.join(item.pending)}": item.pending,
        f"diverged: {', '.join(item.diverged)}": item.diverged,
        f"failed, left out: {', '.join(item.failed)}": item.failed,
        f"{never_passed(item)}, so an upper bound": item.num_never,
        f"spread of {ASSUMED_SD:g} points assumed": plan and plan.assumed,
    }
    return [words for words, holds in flags.items() if holds]


def sentence(ruling: Ruling, plan: Plan | None, *, unit: Unit) -> str:
    """All of a claim: what was measured, the verdict and why, the promise, and what would decide it."""
    item = ruling.item
    parts = [
        ("on a proxy, " if item.proxy else "") + _measured_words(item) + _basis_words(item),
        f": {ruling.verdict}",
        f", {ruling.reason}" if ruling.reason else "",
        f" ({', '.join(item.diverged)} diverged)" if item.diverged and obstacle(item) != ruling.reason else "",
        f"; promised {_promise_words(item)}",
        _image_words(item),
        _plan_words(plan, unit),
    ]
    return "".join(parts)


def _measured_words(item: Evidence) -> str:
    estimate = item.estimate
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


def _basis_words(item: Evidence) -> str:
    if not item.pairs:
        return ""
    digits = 1 if item.kind == "sooner" else 2
    parts = [
        *([f"95 % interval {_range(item.test.interval, f'.{digits}f')}"] if item.test else []),
        counted(len(item.pairs), "seed"),
        *([f"compared at epoch {item.compared_at_epoch}"] if item.compared_at_epoch else []),
    ]
    return f" ({', '.join(parts)})"


def _promise_words(item: Evidence) -> str:
    if item.promised is None:
        return "sooner"
    return _range(item.promised, "+g") if item.kind == "gain" else f"{_range(item.promised, 'g')} %"


def _image_words(item: Evidence) -> str:
    if item.image_interval is None:
        return ""
    return f"; over the validation images {_range(item.image_interval, '+.2f')} (95 %: data noise, not seed noise)"


def _plan_words(plan: Plan | None, unit: Unit) -> str:
    if plan is None:
        return ""
    number = f"more than {plan.seeds} more seeds" if plan.capped else counted(plan.seeds, "more seed")
    cost = f" ({plan.hours:.3g} {unit})" if plan.hours is not None and not plan.capped else ""
    assumed = f" if seeds spread by {plan.spread:g} points" if plan.assumed else ""
    return f"; {number}{cost} would decide it at {100 * POWER:g} % power{assumed}"


def _range(bounds: tuple[float, float], form: str) -> str:
    low, high = bounds
    return f"{low:{form}}" if low == high else f"{low:{form}} to {high:{form}}"
