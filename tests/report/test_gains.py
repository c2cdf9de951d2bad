"""Promises of a gain, by hand, seed by seed: what confirms them, what refutes them, what decides nothing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from promising import R01, claim, epoch, gain_claim, gaining, row, trial, trials
from scipy import stats
from statsmodels.stats.multitest import multipletests

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect
from tune_bisenet.report.verdicts import Measured, judge

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
