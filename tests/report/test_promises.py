"""The verdict table's words and bars, from claims made by hand."""

from dataclasses import replace

import pytest
from searches import RUNS

from tune_bisenet.report.promises import BAR_MARGIN, BAR_WIDTH, Promise, promises
from tune_bisenet.report.verdicts import Claim, Judgement, judge

GAIN = Claim(
    run="r02",
    kind="gain",
    reference="r01",
    promised=(0.5, 1.0),
    pairs=(),
    n_pairs=3,
    estimate=0.75,
    interval=(0.25, 1.25),
    image_interval=None,
    p=0.01,
    p_holm=0.0201,
    verdict="confirmed",
    reason="",
    words="gained 0.75 points over r01",
    compared_at_epoch=None,
    flags=("proxy",),
    note="It still sees two images.",
    seeds_needed=None,
    seeds_capped=False,
    spread=0.2,
    spread_assumed=False,
    cost_hours=None,
)
NOTHING = replace(GAIN, n_pairs=0, estimate=None, interval=None, p=None, p_holm=None, verdict="undecided")


def shown(*claims: Claim, price: float | None = None) -> list[Promise]:
    judgement = Judgement(
        claims=claims, family=len(claims), proxy=False, seeds=(0, 1, 2), hours_per_seed={}, unit="GPU-hours"
    )
    return promises(judgement, [RUNS["r01-s0"], RUNS["r02-s0"]], baseline="r01", price=price)


def test_a_gain_is_told_in_points() -> None:
    (promise,) = shown(GAIN)
    assert (promise.promised, promise.measured, promise.interval) == ("+0.5 to +1 over r01", "+0.75", "+0.25 to +1.25")
    assert promise.evidence == "3 seeds, p 0.020 after Holm"
    assert promise.changed == "accumulation 1 → 2"
    assert promise.remarks == ("proxy", "It still sees two images.")
    assert promise.symbol == "✓"


def test_a_level_is_told_in_percent_and_sooner_in_epochs() -> None:
    level = replace(GAIN, kind="miou", reference=None, promised=(55, 57), estimate=56.1, interval=(55.5, 56.7))
    later = replace(GAIN, kind="sooner", promised=None, estimate=-2.0, interval=(-4.0, 0.0))
    first, second = shown(level, later)
    assert (first.promised, first.measured, first.interval) == ("mIoU 55 to 57 %", "56.10 %", "55.50 to 56.70")
    assert (second.promised, second.measured, second.interval) == (
        "sooner than r01",
        "2.0 epochs later",
        "-4.0 to +0.0",
    )


def test_what_seeds_cost_is_told_in_hours_and_money() -> None:
    needs = replace(GAIN, verdict="undecided", seeds_needed=4, cost_hours=12.34)
    assert shown(needs)[0].to_decide == "4 more seeds, 12.3 GPU-hours"
    assert shown(needs, price=2.5)[0].to_decide == "4 more seeds, 12.3 GPU-hours, 30.85 to pay"
    assert shown(replace(needs, seeds_needed=100, seeds_capped=True))[0].to_decide == "more than 100 more seeds"
    assert shown(GAIN)[0].to_decide == ""


def test_one_seed_shows_the_interval_over_images_as_what_it_is() -> None:
    one = replace(GAIN, n_pairs=1, interval=None, image_interval=(0.1, 0.9))
    (promise,) = shown(one)
    assert promise.interval == "+0.10 to +0.90 over images, no seed noise"
    assert promise.bar
    assert promise.bar.interval is None


def test_nothing_measured_has_no_bar() -> None:
    (promise,) = shown(NOTHING)
    assert (promise.measured, promise.bar) == ("nothing yet", None)


# --- bars -----------------------------------------------------------------------------------------------------------


def test_a_bar_keeps_the_order_of_what_it_shows() -> None:
    bar = shown(GAIN)[0].bar
    assert bar
    assert bar.interval
    assert bar.promise
    assert bar.zero
    assert bar.zero < bar.interval[0] < bar.promise[0] < bar.estimate < bar.promise[1] < bar.interval[1]
    assert not bar.cut_low
    assert not bar.cut_high


def test_bars_of_a_kind_share_an_axis() -> None:
    first, second = (promise.bar for promise in shown(GAIN, replace(GAIN, estimate=0.9)))
    assert first
    assert second
    assert (first.promise, first.zero, first.ticks) == (second.promise, second.zero, second.ticks)


def test_a_huge_interval_is_cut_and_says_so() -> None:
    wide = replace(GAIN, interval=(-40.0, 41.5))
    bars = [promise.bar for promise in shown(GAIN, wide)]
    assert bars[0]
    assert bars[1]
    assert bars[1].interval == (BAR_MARGIN, BAR_WIDTH - BAR_MARGIN)
    assert (bars[1].cut_low, bars[1].cut_high) == (True, True)
    assert bars[0].promise
    assert bars[0].promise[1] - bars[0].promise[0] > 20  # still to be seen


@pytest.mark.parametrize("estimate", [0.0, 1e-12, 0.75, -3.0, 1234.5])
def test_ticks_are_few_round_and_inside(estimate: float) -> None:
    bar = shown(replace(GAIN, estimate=estimate, interval=None))[0].bar
    assert bar
    assert 2 <= len(bar.ticks) <= 6
    assert all(0 <= place <= BAR_WIDTH for place, _ in bar.ticks)
    assert "0" in [words for _, words in bar.ticks]


def test_a_judgement_without_trials_is_shown() -> None:
    rows = list(RUNS.values())
    found = promises(judge(rows, []), rows, baseline="r01", price=None)
    assert [promise.measured for promise in found] == ["nothing yet"] * 2
