"""Promises of a level of mIoU, or to reach one sooner, by hand: what confirms them, what refutes them."""

from collections.abc import Sequence

import pytest
from promising import R01, claim, gaining, row, trial, trials
from scipy import stats

from tune_bisenet.config import Expect
from tune_bisenet.report.verdicts import Claim, Measured, judge

# --- levels of mIoU -------------------------------------------------------------------------------------------------


def level_claim(low: float, high: float, mious: Sequence[float], *, proxy: bool = False) -> Claim:
    return claim(judge([row("x", Expect(miou=(low, high)))], trials("x", mious), proxy=proxy), kind="miou")


def test_a_level_is_tested_against_its_low_end() -> None:
    mious = [55.9, 56.0, 56.1]
    found, truth = level_claim(55, 57, mious), stats.ttest_1samp(mious, 55)
    assert found.p == pytest.approx(truth.pvalue)
    assert found.interval == pytest.approx(tuple(truth.confidence_interval(0.95)))
    assert (found.verdict, found.reason) == ("confirmed", "")
    assert found.words == "reached 56.00 % mIoU (95 % interval 55.75 to 56.25, 3 seeds): confirmed; promised 55 to 57 %"


def test_a_level_above_the_promise_is_confirmed_and_says_so() -> None:
    found = level_claim(53, 55, [55.9, 56.0, 56.1])
    assert (found.verdict, found.reason) == ("confirmed", "more than promised")


def test_a_level_below_the_promise_is_refuted() -> None:
    assert level_claim(57, 59, [55.9, 56.0, 56.1]).verdict == "refuted"


def test_a_level_whose_interval_holds_the_low_end_is_undecided() -> None:
    assert level_claim(56, 58, [55.9, 56.0, 56.1]).verdict == "undecided"


def test_a_level_stopped_early_can_be_confirmed_but_not_refuted() -> None:
    stopped = [trial("x", seed, [56 + seed / 10], status="stopped", of=2) for seed in range(3)]
    above, below = (judge([row("x", Expect(miou=miou))], stopped) for miou in ((55, 57), (58, 59)))
    assert claim(above, kind="miou").verdict == "confirmed"
    assert claim(below, kind="miou").reason == "stopped early, it could have risen"
    assert claim(below, kind="miou").compared_at_epoch == 1


def test_a_proxy_judges_no_level_and_labels_every_gain() -> None:
    assert level_claim(55, 57, [55.9, 56.0, 56.1], proxy=True).verdict == "not judged"
    judgement = judge(gaining(0.5, 1), trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9]), proxy=True)
    assert claim(judgement).verdict == "confirmed"
    assert claim(judgement).flags == ("proxy",)
    assert claim(judgement).words.startswith("on a proxy, gained 0.80 points")


# --- sooner ---------------------------------------------------------------------------------------------------------

SOONER = [R01, row("x", Expect(miou=(55, 57), sooner_than="r01"))]


def sooner_claim(own: Sequence[Measured], bars: Sequence[Measured]) -> Claim:
    return claim(judge(SOONER, [*own, *bars]), kind="sooner")


def rising(name: str, seed: int, at: int) -> Measured:
    """Ten epochs, of which `at` is the first to reach 60 %."""
    return trial(name, seed, [60.0 if number >= at else 40 + number for number in range(1, 11)])


def test_epochs_saved_are_counted_to_the_references_final_miou() -> None:
    # 9 - 4, 9 - 3, 10 - 3 = 5, 6, 7: mean 6, sd 1, 6 -+ 2.48414.
    own = [rising("x", seed, at) for seed, at in enumerate((4, 3, 3))]
    bars = [rising("r01", seed, at) for seed, at in enumerate((9, 9, 10))]
    found = sooner_claim(own, bars)
    assert [(pair.own, pair.reference, pair.effect) for pair in found.pairs] == [(4, 9, 5), (3, 9, 6), (3, 10, 7)]
    assert found.interval == pytest.approx((3.51586, 8.48414), abs=1e-4)
    assert found.verdict == "confirmed"
    assert "passed r01's final mIoU 6.0 epochs sooner (95 % interval 3.5 to 8.5, 3 seeds)" in found.words


def test_equal_epochs_saved_are_not_known_to_be_equal() -> None:
    # 5, 5, 5, each between two rounded epochs: sd sqrt(1/6) = 0.40825, error 0.23570, times 4.30265 = 1.01415.
    found = sooner_claim([rising("x", s, 4) for s in range(3)], [rising("r01", s, 9) for s in range(3)])
    assert found.interval == pytest.approx((3.98585, 6.01415), abs=1e-4)
    assert found.verdict == "confirmed"


def test_a_row_equal_to_its_reference_is_not_sooner() -> None:
    found = sooner_claim([rising("x", s, 9) for s in range(3)], [rising("r01", s, 9) for s in range(3)])
    assert (found.estimate, found.verdict) == (0, "undecided")


def test_later_is_refuted() -> None:
    found = sooner_claim([rising("x", s, 9) for s in range(3)], [rising("r01", s, 5) for s in range(3)])
    assert (found.verdict, found.reason) == ("refuted", "not sooner")
    assert "4.0 epochs later" in found.words


def test_a_seed_that_never_got_there_bounds_the_epochs_and_bars_a_confirmation() -> None:
    own = [rising("x", 0, 2), rising("x", 1, 2), rising("x", 2, 2), trial("x", 3, [50.0] * 10)]
    found = sooner_claim(own, [rising("r01", seed, 10) for seed in range(4)])
    # The last counts as epoch 11, the first at which it could have.
    assert [pair.effect for pair in found.pairs] == [8, 8, 8, -1]
    assert found.verdict == "undecided"
    assert found.seeds_needed is None
    assert "never passed at 1 of 4 seeds, so an upper bound" in found.flags
    assert "at best 5.8 epochs sooner" in found.words


def test_a_row_that_never_got_there_at_any_seed_is_refuted() -> None:
    own = [trial("x", seed, [50.0 + seed] * 10) for seed in range(2)]
    found = sooner_claim(own, [rising("r01", seed, 10) for seed in range(2)])
    assert (found.verdict, found.reason) == ("refuted", "never passed at any seed")
    assert found.words.startswith("never passed r01's final mIoU")


def test_a_row_stopped_before_it_got_there_is_not_refuted() -> None:
    own = [trial("x", seed, [50.0] * 3, status="stopped", of=10) for seed in range(2)]
    found = sooner_claim(own, [rising("r01", seed, 9 + seed) for seed in range(2)])
    assert (found.verdict, found.compared_at_epoch) == ("undecided", 3)


def test_a_reference_stopped_early_has_no_final_miou() -> None:
    bars = [trial("r01", seed, [50.0] * 3, status="stopped", of=10) for seed in range(2)]
    found = sooner_claim([rising("x", seed, 2) for seed in range(2)], bars)
    assert (found.verdict, found.n_pairs) == ("undecided", 0)
