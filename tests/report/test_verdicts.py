"""Verdicts by hand, seed by seed: what confirms, what refutes, what decides nothing, and what it costs to know."""

import json
import math
import shlex
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from rows import plain_epoch
from scipy import stats
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.power import TTestPower

from benchmarks.false_positives import num_false, searches
from search_spaces.runs10 import BATCHNORM, SPACE
from tune_bisenet.config import SGD, AdamW, Augment, Expect, Run
from tune_bisenet.plan import DataFacts, Settings, plan_runs
from tune_bisenet.report.verdicts import (
    Claim,
    Judgement,
    Kind,
    Measured,
    differences,
    judge,
    more_seeds,
    next_command,
)
from tune_bisenet.results import Epoch, Status

ROWS = {run.name: run for run in SPACE.runs}
DATA = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))


def row(name: str, expect: Expect | None = None) -> Run:
    return ROWS["r01"].model_copy(update={"name": name, "expect": expect})


R01 = row("r01")


def gaining(low: float, high: float) -> list[Run]:
    """r01, and a row `x` that promises to gain this over it."""
    return [R01, row("x", Expect(gain=(low, high), over="r01"))]


def epoch(number: int, miou: float, *, diverged: bool = False) -> Epoch:
    """An epoch of 36 seconds: a hundredth of an hour."""
    return plain_epoch(
        number,
        miou,
        iterations=10 * number,
        loss=math.nan if diverged else 1.0,
        train_seconds=30.0,
        val_seconds=6.0,
    )


def trial(name: str, seed: int, mious: Sequence[float], *, status: Status = "finished", of: int = 0) -> Measured:
    """A trial with these mIoUs after its epochs; `of` is how many epochs it was to have."""
    epochs = [epoch(number, miou) for number, miou in enumerate(mious, start=1)]
    return Measured(
        trial=f"{name}-s{seed}", run=name, seed=seed, status=status, num_epochs=of or len(epochs), epochs=epochs
    )


def trials(name: str, finals: Sequence[float]) -> list[Measured]:
    """One finished trial a seed, with these best mIoUs, each after a first epoch that was worse."""
    return [trial(name, seed, [final - 10, final]) for seed, final in enumerate(finals)]


def claim(judgement: Judgement, run: str = "x", kind: Kind = "gain") -> Claim:
    (found,) = [claim for claim in judgement.claims if (claim.run, claim.kind) == (run, kind)]
    return found


def gain_claim(low: float, high: float, gains: Sequence[float]) -> Claim:
    """The claim of a row that gained this over r01, whose seeds differ."""
    bars = [55 + seed for seed in range(len(gains))]
    own = [bar + gain for bar, gain in zip(bars, gains, strict=True)]
    return claim(judge(gaining(low, high), trials("r01", bars) + trials("x", own)))


# --- gains ----------------------------------------------------------------------------------------------------------


def test_a_gain_within_the_promise_is_confirmed() -> None:
    # 0.7, 0.8, 0.9: mean 0.8, sd 0.1, error 0.057735, times t(0.975, 2 df) = 4.30265 is 0.24842.
    found = gain_claim(0.5, 1, [0.7, 0.8, 0.9])
    assert found.verdict == "confirmed"
    assert found.estimate == pytest.approx(0.8)
    assert found.interval == pytest.approx((0.55158, 1.04842), abs=1e-4)
    assert found.words == (
        "gained 0.80 points over r01 (95 % interval 0.55 to 1.05, 3 seeds): confirmed; promised +0.5 to +1"
    )


def test_a_gain_above_the_promise_is_confirmed_and_says_so() -> None:
    found = gain_claim(0.1, 0.5, [0.7, 0.8, 0.9])
    assert (found.verdict, found.reason) == ("confirmed", "more than promised")


def test_a_gain_below_the_promise_is_refuted_and_says_that_it_gains() -> None:
    found = gain_claim(1.1, 2, [0.7, 0.8, 0.9])
    assert (found.verdict, found.reason) == ("refuted", "a gain, but less than promised")


def test_an_interval_under_zero_is_refuted() -> None:
    found = gain_claim(0.5, 1, [-0.7, -0.8, -0.9])
    assert (found.verdict, found.reason) == ("refuted", "no gain")
    assert found.words.startswith("lost 0.80 points against r01 (95 % interval -1.05 to -0.55, 3 seeds): refuted")


def test_an_interval_around_zero_but_below_the_promise_is_refuted() -> None:
    # Mean 0, sd 0.1: -0.248 to 0.248.
    found = gain_claim(0.5, 1, [-0.1, 0.0, 0.1])
    assert (found.verdict, found.reason) == ("refuted", "less than promised")


def test_an_interval_that_holds_zero_and_the_promise_is_undecided() -> None:
    # Mean 0.5, sd 0.5: 0.5 -+ 1.242.
    found = gain_claim(0.5, 1, [0.0, 0.5, 1.0])
    assert (found.verdict, found.reason) == ("undecided", "the interval is too wide")


def test_pairs_are_matched_by_seed_and_agree_with_scipys_paired_t_test() -> None:
    bars, own = [54.0, 57.0, 55.5, 56.2], [54.9, 57.6, 56.5, 56.9]
    shuffled = [trials("x", own)[seed] for seed in (2, 0, 3, 1)]
    found = claim(judge(gaining(0.5, 1), trials("r01", bars) + shuffled))
    truth = stats.ttest_rel(own, bars)
    assert found.p == pytest.approx(truth.pvalue)
    assert found.interval == pytest.approx(tuple(truth.confidence_interval(0.95)))
    assert [(pair.seed, pair.own) for pair in found.pairs] == list(enumerate(own))


def test_the_best_epoch_counts_not_the_last() -> None:
    found = claim(judge(gaining(0.5, 1), [trial("r01", 0, [50, 55, 54]), trial("x", 0, [56, 50, 51])]))
    assert found.estimate == pytest.approx(1.0)


def test_holm_is_over_every_claim_of_the_table_measured_or_not() -> None:
    rows = [R01, *(row(name, Expect(gain=(0.5, 1), over="r01")) for name in ("a", "b", "c"))]
    measured = [*trials("r01", [55, 56, 57]), *trials("a", [55.7, 56.8, 57.9]), *trials("b", [55.4, 56.9, 57.3])]
    judgement = judge(rows, measured)
    p_values = [claim(judgement, "a").p, claim(judgement, "b").p, 1.0]
    corrected = multipletests(p_values, method="holm")[1]
    assert judgement.family == 3
    assert [claim(judgement, name).p_holm for name in "abc"] == [*map(pytest.approx, corrected[:2]), None]


def test_what_only_holm_holds_back_is_undecided_and_says_so() -> None:
    # Alone p = 0.0052 confirms 0.7, 0.8, 0.9; with eleven more claims in the table it is 12 x 0.0052 = 0.062.
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(11)]
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9])
    found = claim(judge([*gaining(0.5, 1), *others], measured))
    assert found.verdict == "undecided"
    assert found.reason == "not after Holm's correction over the table (p 0.06)"


def test_the_same_gain_at_every_seed_counts_as_one_seed() -> None:
    found = gain_claim(0.5, 1, [0.7, 0.7, 0.7])
    assert (found.verdict, found.p, found.seeds_needed) == ("undecided", None, None)
    assert found.reason == "equal seeds count as one"


def test_no_difference_at_all_at_any_seed_is_refuted() -> None:
    found = gain_claim(0.5, 1, [0.0, 0.0, 0.0])
    assert (found.verdict, found.reason, found.interval) == ("refuted", "the same to the last bit", (0.0, 0.0))


# --- one seed -------------------------------------------------------------------------------------------------------


def test_one_seed_gives_a_difference_and_no_verdict() -> None:
    found = gain_claim(0.5, 1, [3.0])
    assert (found.verdict, found.estimate, found.interval, found.p) == ("undecided", pytest.approx(3.0), None, None)
    assert found.image_interval is None


def _with_counts(measured: Measured, hits: int) -> Measured:
    """Twelve images of two classes; of ten pixels a class, `hits` or one more are right."""
    right = np.array([hits + image % 2 for image in range(12)])
    counts = np.zeros((12, 2, 2), int)
    counts[:, 0, 0] = counts[:, 1, 1] = right
    counts[:, 0, 1] = counts[:, 1, 0] = 10 - right
    return replace(measured, confusions=counts)


def test_one_seed_with_its_counts_tells_the_noise_of_the_data_as_such() -> None:
    pair = [_with_counts(trial("r01", 0, [50, 55]), 6), _with_counts(trial("x", 0, [50, 56]), 8)]
    found = claim(judge(gaining(0.5, 1), pair))
    assert found.verdict == "undecided"
    assert found.image_interval is not None
    # IoU of 6.5 in 10 is 6.5 / 13.5 = 48.1 %, of 8.5 it is 8.5 / 11.5 = 73.9 %: some 25.8 in all draws.
    assert found.image_interval == pytest.approx((25.8, 25.8), abs=1.5)
    assert "data noise, not seed noise" in found.words


def test_counts_of_an_epoch_that_is_not_compared_are_not_used() -> None:
    # x stopped after one epoch: r01's counts are those of its second.
    pair = [
        _with_counts(trial("r01", 0, [50, 55]), 6),
        _with_counts(trial("x", 0, [51], status="stopped", of=2), 8),
    ]
    found = claim(judge(gaining(0.5, 1), pair))
    assert (found.estimate, found.image_interval) == (pytest.approx(1.0), None)


def test_several_seeds_need_no_noise_of_the_data() -> None:
    pairs = [_with_counts(measured, 6) for measured in trials("r01", [55, 56]) + trials("x", [56, 58])]
    assert claim(judge(gaining(0.5, 1), pairs)).image_interval is None


# --- trials that did not go to their end ----------------------------------------------------------------------------


def test_a_trial_stopped_early_is_compared_at_the_last_epoch_both_reached() -> None:
    early = [trial("x", seed, [41 + seed, 46 + seed], status="stopped", of=3) for seed in (0, 1)]
    whole = [trial("r01", seed, [40 + seed, 45, 60]) for seed in (0, 1)]
    found = claim(judge(gaining(0.5, 1), early + whole))
    assert [pair.effect for pair in found.pairs] == pytest.approx([1.0, 2.0])
    assert found.compared_at_epoch == 2
    assert "compared at epoch 2" in found.flags
    assert "compared at epoch 2" in found.words


def test_a_reference_stopped_early_bounds_the_comparison_too() -> None:
    measured = [trial("x", 0, [41, 46, 60]), trial("r01", 0, [40, 45], status="stopped", of=3)]
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.estimate, found.compared_at_epoch) == (pytest.approx(1.0), 2)


def test_while_a_trial_runs_its_claim_is_undecided() -> None:
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8])
    measured.append(trial("x", 2, [47.9], status="running", of=2))
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.verdict, found.p, found.seeds_needed) == ("undecided", None, None)
    assert found.flags == ("compared at epoch 1", "not ended: x-s2")


def test_a_failed_trial_is_left_out_and_named() -> None:
    measured = trials("r01", [55, 56, 57, 58]) + trials("x", [55.7, 56.8, 57.9])
    measured.append(trial("x", 3, [20], status="failed", of=2))
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.verdict, found.n_pairs) == ("confirmed", 3)
    assert found.flags == ("failed, left out: x-s3",)


def _blown_up(name: str, seed: int, mious: Sequence[float]) -> Measured:
    """Diverged in the epoch after these, of four; what it predicts then is no measure."""
    measured = trial(name, seed, mious, status="diverged", of=4)
    return replace(measured, epochs=[*measured.epochs, epoch(len(mious) + 1, 99.0, diverged=True)])


def test_a_row_that_diverged_at_one_seed_is_never_confirmed() -> None:
    whole = [trial("r01", seed, [40 + seed, 50, 51, 52]) for seed in range(3)]
    own = [trial("x", 0, [40, 50, 51, 52.7]), trial("x", 1, [41, 50, 51, 52.8]), _blown_up("x", 2, [50.9])]
    found = claim(judge(gaining(0.5, 1), whole + own))
    # At epoch 2, the last both reached, its best is 50.9 against 50; the epoch that diverged does not count.
    assert [pair.effect for pair in found.pairs] == pytest.approx([0.7, 0.8, 0.9])
    assert (found.verdict, found.reason, found.compared_at_epoch) == ("undecided", "x-s2 diverged", 2)
    assert found.seeds_needed is None
    assert "diverged: x-s2" in found.flags


def test_a_row_that_diverged_at_every_seed_is_refuted() -> None:
    whole = [trial("r01", seed, [40, 50, 51, 52]) for seed in range(2)]
    found = claim(judge(gaining(0.5, 1), [*whole, _blown_up("x", 0, [45]), _blown_up("x", 1, [46])]))
    assert (found.verdict, found.reason) == ("refuted", "diverged at every seed")


def test_a_gain_over_a_reference_that_diverged_is_not_confirmed() -> None:
    own = [trial("x", seed, [40, 40.7 + seed / 10, 51, 52]) for seed in range(3)]
    found = claim(judge(gaining(0.5, 1), [*own, *(_blown_up("r01", seed, [40]) for seed in range(3))]))
    # At epoch 2: 0.7, 0.8, 0.9 over 40.
    assert found.estimate == pytest.approx(0.8)
    assert (found.verdict, found.reason) == ("undecided", "r01-s0, r01-s1, r01-s2 diverged")


def test_without_a_reference_nothing_is_claimed() -> None:
    found = claim(judge(gaining(0.5, 1), trials("x", [55, 56])))
    assert (found.verdict, found.estimate, found.n_pairs) == ("undecided", None, 0)
    assert found.words.startswith("nothing measured: undecided, no r01 to compare with at a same seed; promised")


def test_a_search_that_has_not_begun_has_nothing_but_promises() -> None:
    judgement = judge(SPACE.runs, [])
    assert {claim.verdict for claim in judgement.claims} == {"undecided"}
    assert judgement.seeds == ()
    assert {claim.cost_hours for claim in judgement.claims} == {None}


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


# --- what it would cost to know -------------------------------------------------------------------------------------


def test_seeds_needed_agree_with_statsmodels_for_the_middle_of_the_promise() -> None:
    # Differences of sd 0.5, the promise's middle at 0.75, one claim in the table.
    found = gain_claim(0.5, 1, [0.0, 0.5, 1.0])
    total = math.ceil(TTestPower().solve_power(effect_size=0.75 / 0.5, alpha=0.05, power=0.8))
    assert found.spread == pytest.approx(0.5)
    assert (found.seeds_needed, found.spread_assumed) == (total - 3, False)


def test_seeds_needed_look_for_what_is_measured_where_that_is_more_than_was_promised() -> None:
    # Differences 1, 2, 6: mean 3, sd sqrt(7); the promise's middle is 0.75.
    found = gain_claim(0.5, 1, [1.0, 2.0, 6.0])
    total = math.ceil(TTestPower().solve_power(effect_size=3 / math.sqrt(7), alpha=0.05, power=0.8))
    assert found.verdict == "undecided"
    assert found.seeds_needed == total - 3


def test_seeds_needed_count_holms_correction() -> None:
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(9)]
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    total = math.ceil(TTestPower().solve_power(effect_size=0.75 / 0.5, alpha=0.05 / 10, power=0.8))
    assert claim(judge([*gaining(0.5, 1), *others], measured)).seeds_needed == total - 3


def test_seeds_of_the_row_and_of_its_reference_are_paid() -> None:
    # Two epochs of 36 s are 0.02 h; a row and its reference at a quarter of a GPU each: 0.01 h a seed.
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.0, 56.5, 58.0])
    judgement = judge(gaining(0.5, 1), measured, devices_per_trial=0.25)
    found = claim(judgement)
    assert judgement.hours_per_seed == pytest.approx({"r01": 0.005, "x": 0.005})
    assert found.seeds_needed is not None
    assert found.cost_hours == pytest.approx(found.seeds_needed * 0.01)
    assert f"{found.seeds_needed} more seeds ({found.cost_hours:.3g} GPU-hours) would decide it" in found.words


def test_a_trial_stopped_early_is_costed_to_its_end() -> None:
    judgement = judge([R01], [trial("r01", 0, [50.0], status="stopped", of=50)])
    assert judgement.hours_per_seed == pytest.approx({"r01": 0.5})


def test_one_seed_plans_with_an_assumed_spread_and_says_so() -> None:
    # 0.5 / 0.5 at alpha 0.05 needs 10 pairs; one is there.
    found = gain_claim(0.5, 0.5, [3.0])
    assert (found.seeds_needed, found.spread, found.spread_assumed) == (9, 0.5, True)
    assert "spread of 0.5 points assumed" in found.flags
    assert "if seeds spread by 0.5 points" in found.words


def test_more_than_a_hundred_seeds_are_not_counted() -> None:
    found = gain_claim(0.1, 0.1, [-3, 0, 3])
    assert (found.seeds_needed, found.seeds_capped) == (100, True)
    assert "more than 100 more seeds would decide it" in found.words


def test_the_next_command_runs_undecided_rows_and_their_references_at_new_seeds() -> None:
    rows = [
        *gaining(0.5, 1),
        row("sure", Expect(gain=(0.5, 1), over="r01")),
        row("hopeless", Expect(gain=(0.01, 0.01), over="r01")),
    ]
    measured = [
        *trials("r01", [55, 56, 57]),
        *trials("x", [55.3, 56.75, 58.2]),
        *trials("sure", [55.79, 56.8, 57.81]),
        *trials("hopeless", [52, 56, 60]),
    ]
    judgement = judge(rows, measured)
    found, more = claim(judgement), more_seeds(judgement)
    assert claim(judgement, "sure").verdict == "confirmed"
    assert more is not None
    assert more.runs == ("r01", "x")
    assert more.seeds == tuple(range(3, 3 + (found.seeds_needed or 0)))
    assert more.hours == pytest.approx(len(more.seeds) * 0.04)
    command = next_command(judgement, space="my space", name="n")
    seeds = ",".join(map(str, more.seeds))
    assert command is not None
    assert shlex.split(command) == [
        *("python", "-m", "tune_bisenet.run", "--space", "my space", "--name", "n", "--add"),
        *("--runs", "r01,x", "--seeds", seeds),
    ]


def test_where_all_is_decided_there_is_no_next_command() -> None:
    judgement = judge(gaining(0.5, 1), trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9]))
    assert more_seeds(judgement) is None
    assert next_command(judgement, space="runs10", name="n") is None


# --- the ten rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("proxy", [False, True])
def test_of_the_ten_rows_only_r09_differs_from_r01_in_more_than_one_thing(proxy: bool) -> None:
    rows = plan_runs(SPACE.runs, Settings(seeds=(0, 1), num_epochs=50, proxy=proxy), DATA)
    flagged = {
        claim.run: claim.flags[-1] for claim in judge(rows, []).claims if "more than one" in "".join(claim.flags)
    }
    assert flagged == {
        "r09": "differs from r01 in more than one thing: optimizer kind sgd → adamw, optimizer lr 0.01 → 0.001, "
        "optimizer momentum 0.9 → none"
    }


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("r02", "optimizer lr 0.01 → 0.015"),
        ("r03", "optimizer lr 0.01 → 0.025"),
        ("r04", "loss aux_weight 1 → 0.4"),
        ("r05", "loss lovasz_after none → 35"),
        ("r06", "accumulation 1 → 2"),
        ("r07", "max_grad_norm none → 1"),
        ("r08", "schedule warmup_iterations 1100 → 2500"),
        ("r10", "loss kind ce → weighted_ce"),
    ],
)
def test_a_row_of_the_ten_differs_from_r01_in_one_thing(name: str, words: str) -> None:
    found = [difference.words for difference in differences(ROWS[name], ROWS["r01"]) if difference.is_a_thing]
    assert found == [words]


def test_name_seed_and_expectation_are_no_difference() -> None:
    assert differences(R01.model_copy(update={"name": "y", "seed": 3, "expect": Expect(miou=(1, 2))}), R01) == ()


def test_a_setting_that_comes_with_its_kind_is_no_thing_of_its_own() -> None:
    adamw = R01.model_copy(update={"optimizer": AdamW(lr=0.01, weight_decay=1e-4)})
    assert [(found.setting, found.is_a_thing) for found in differences(adamw, R01)] == [
        ("optimizer kind", True),
        ("optimizer momentum", False),
    ]


def test_settings_within_settings_count_each() -> None:
    optimizer = SGD(lr=0.01, momentum=0.8, weight_decay=1e-4)
    changed = row("y").model_copy(update={"optimizer": optimizer, "augment": Augment(flip=0.0)})
    assert [found.setting for found in differences(changed, R01)] == ["optimizer momentum", "augment flip"]


def test_the_note_of_a_row_goes_with_its_verdict() -> None:
    notes = {claim.run: claim.note for claim in judge(SPACE.runs, []).claims}
    assert notes["r06"] == BATCHNORM
    assert notes["r04"] == ""


def test_the_ten_rows_make_thirteen_claims_nine_on_a_proxy() -> None:
    kinds = [(claim.run, claim.kind) for claim in judge(SPACE.runs, []).claims]
    assert kinds[:3] == [("r01", "miou"), ("r02", "miou"), ("r02", "sooner")]
    assert judge(SPACE.runs, []).family == len(kinds) == 13
    assert judge(SPACE.runs, [], proxy=True).family == 9


def test_a_judgement_is_strict_json() -> None:
    measured = [*trials("r01", [55, 56]), *trials("r04", [56, 57]), *trials("r02", [57, 55]), *trials("r09", [58])]
    record = judge(SPACE.runs, measured).to_json()
    assert json.loads(json.dumps(record, allow_nan=False))["claims"][0]["verdict"] == "undecided"


# --- by simulation --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("num_seeds", [3, 5])
def test_ten_equal_rows_are_falsely_confirmed_in_no_more_than_a_twentieth_of_searches(num_seeds: int) -> None:
    judgements = searches(2000, num_seeds, proxy=False, gains={})
    # At a true rate of 5 % the upper end of a 95 % interval would lie above 5 % almost always.
    assert stats.binomtest(num_false(judgements), 2000).proportion_ci(0.95).high < 0.05
