"""Claims by hand, seed by seed: what confirms them, what refutes them, what decides nothing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from expecting import R01, claim, epoch, gain_claim, gaining, row, trial, trials
from scipy import stats
from statsmodels.stats.multitest import multipletests

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect
from tune_bisenet.report.claims import Claim
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.verdicts import judge


def test_a_gain_by_hand() -> None:
    # 0.7, 0.8, 0.9: mean 0.8, sd 0.1, error 0.057735, times t(0.975, 2 df) = 4.30265 is 0.24842.
    found = gain_claim(0.5, 1, [0.7, 0.8, 0.9])
    assert found.estimate == pytest.approx(0.8)
    assert found.interval == pytest.approx((0.55158, 1.04842), abs=1e-4)


@pytest.mark.parametrize(
    ("expected", "gains", "verdict", "reason"),
    [
        ((0.5, 1), [0.7, 0.8, 0.9], "confirmed", ""),
        ((0.1, 0.5), [0.7, 0.8, 0.9], "confirmed", "more than expected"),
        ((1.1, 2), [0.7, 0.8, 0.9], "refuted", "a gain, but less than expected"),
        ((0.5, 1), [-0.7, -0.8, -0.9], "refuted", "no gain"),
        ((0.5, 1), [-0.1, 0.0, 0.1], "refuted", "less than expected"),  # -0.248 to 0.248
        ((0.5, 1), [0.0, 0.5, 1.0], "undecided", "the interval is too wide"),  # 0.5 -+ 1.242
        ((0.5, 1), [0.7, 0.7, 0.7], "undecided", "equal seeds count as one"),
        ((0.5, 1), [0.0, 0.0, 0.0], "refuted", "the same to the last bit"),
        ((0.5, 1), [3.0], "undecided", "one seed has no spread to judge by"),
    ],
)
def test_the_verdict_follows_the_interval(
    expected: tuple[float, float], gains: list[float], verdict: str, reason: str
) -> None:
    found = gain_claim(*expected, gains)
    assert (found.verdict, found.reason) == (verdict, reason)


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


def test_what_only_holm_holds_back_is_undecided() -> None:
    # Alone p = 0.0052 confirms 0.7, 0.8, 0.9; with eleven more claims in the table it is 12 x 0.0052 = 0.062.
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(11)]
    found = claim(judge([*gaining(0.5, 1), *others], trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9])))
    assert found.verdict == "undecided"
    assert "Holm" in found.reason
    assert found.p_holm == pytest.approx(0.062, abs=5e-4)


def _with_counts(record: ReportedTrial, hits: int) -> ReportedTrial:
    """Twelve images of two classes; of ten pixels a class, `hits` or one more are right."""
    right = np.array([hits + image % 2 for image in range(12)])
    counts = np.zeros((12, 2, 2), np.int32)
    counts[:, 0, 0] = counts[:, 1, 1] = right
    counts[:, 0, 1] = counts[:, 1, 0] = 10 - right
    return replace(record, confusions=counts)


def test_one_seed_with_its_counts_has_an_interval_over_images() -> None:
    pair = [_with_counts(trial("r01", 0, [50, 55]), 6), _with_counts(trial("x", 0, [50, 56]), 8)]
    found = claim(judge(gaining(0.5, 1), pair))
    assert (found.verdict, found.interval) == ("undecided", None)
    # IoU of 6.5 in 10 is 6.5 / 13.5 = 48.1 %, of 8.5 it is 8.5 / 11.5 = 73.9 %: some 25.8 in all draws.
    assert found.image_interval == pytest.approx((25.8, 25.8), abs=1.5)


def test_counts_of_an_epoch_that_is_not_compared_are_not_used() -> None:
    # x stopped after one epoch: r01's counts are those of its second.
    stopped = trial("x", 0, [51], status="stopped", of=2)
    found = claim(judge(gaining(0.5, 1), [_with_counts(trial("r01", 0, [50, 55]), 6), _with_counts(stopped, 8)]))
    assert (found.estimate, found.image_interval) == (pytest.approx(1.0), None)


def test_several_seeds_need_no_interval_over_images() -> None:
    pairs = [_with_counts(measured, 6) for measured in trials("r01", [55, 56]) + trials("x", [56, 58])]
    assert claim(judge(gaining(0.5, 1), pairs)).image_interval is None


def test_a_trial_stopped_early_is_compared_at_the_last_epoch_both_reached() -> None:
    early = [trial("x", seed, [41 + seed, 46 + seed], status="stopped", of=3) for seed in (0, 1)]
    whole = [trial("r01", seed, [40 + seed, 45, 60]) for seed in (0, 1)]
    found = claim(judge(gaining(0.5, 1), early + whole))
    assert [pair.effect for pair in found.pairs] == pytest.approx([1.0, 2.0])
    assert found.compared_at_epoch == 2
    assert "compared at epoch 2" in found.remarks


def test_a_reference_stopped_early_bounds_the_comparison_too() -> None:
    measured = [trial("x", 0, [41, 46, 60]), trial("r01", 0, [40, 45], status="stopped", of=3)]
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.estimate, found.compared_at_epoch) == (pytest.approx(1.0), 2)


def test_while_a_trial_runs_its_claim_is_undecided() -> None:
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8])
    measured.append(trial("x", 2, [47.9], status="running", of=2))
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.verdict, found.p, found.sample_size, found.pending) == ("undecided", None, None, ("x-s2",))


def test_a_failed_trial_is_left_out_and_named() -> None:
    measured = trials("r01", [55, 56, 57, 58]) + trials("x", [55.7, 56.8, 57.9])
    measured.append(trial("x", 3, [20], status="failed", of=2))
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.verdict, len(found.pairs), found.failed) == ("confirmed", 3, ("x-s3",))


def _blown_up(name: str, seed: int, mious: Sequence[float]) -> ReportedTrial:
    """Diverged in the epoch after these, of four; what it predicts then is no measure."""
    measured = trial(name, seed, mious, status="diverged", of=4)
    return replace(measured, epochs=[*measured.epochs, epoch(len(mious) + 1, 99.0, diverged=True)])


def test_a_row_that_diverged_at_one_seed_is_never_confirmed() -> None:
    whole = [trial("r01", seed, [40 + seed, 50, 51, 52]) for seed in range(3)]
    own = [trial("x", 0, [40, 50, 51, 52.7]), trial("x", 1, [41, 50, 51, 52.8]), _blown_up("x", 2, [50.9])]
    found = claim(judge(gaining(0.5, 1), whole + own))
    # At epoch 2, the last both reached, its best is 50.9 against 50; the epoch that diverged does not count.
    assert [pair.effect for pair in found.pairs] == pytest.approx([0.7, 0.8, 0.9])
    assert (found.verdict, found.diverged, found.compared_at_epoch) == ("undecided", ("x-s2",), 2)
    assert found.sample_size is None


def test_a_row_that_diverged_at_every_seed_is_refuted() -> None:
    whole = [trial("r01", seed, [40, 50, 51, 52]) for seed in range(2)]
    found = claim(judge(gaining(0.5, 1), [*whole, _blown_up("x", 0, [45]), _blown_up("x", 1, [46])]))
    assert (found.verdict, found.reason) == ("refuted", "diverged at every seed")


def test_a_gain_over_a_reference_that_diverged_is_not_confirmed() -> None:
    own = [trial("x", seed, [40, 40.7 + seed / 10, 51, 52]) for seed in range(3)]
    found = claim(judge(gaining(0.5, 1), [*own, *(_blown_up("r01", seed, [40]) for seed in range(3))]))
    assert found.estimate == pytest.approx(0.8)  # at epoch 2: 0.7, 0.8, 0.9 over 40
    assert (found.verdict, found.diverged) == ("undecided", ("r01-s0", "r01-s1", "r01-s2"))


def test_without_a_reference_nothing_is_measured() -> None:
    found = claim(judge(gaining(0.5, 1), trials("x", [55, 56])))
    assert (found.verdict, found.estimate, found.pairs) == ("undecided", None, ())


def test_a_search_that_has_not_begun_has_nothing_but_expectations() -> None:
    judgement = judge(SPACE.runs, [])
    assert {claim.verdict for claim in judgement.claims} == {"undecided"}
    assert judgement.seeds == ()
    assert all(claim.sample_size is None or claim.sample_size.hours is None for claim in judgement.claims)


def level_claim(low: float, high: float, mious: Sequence[float], *, proxy: bool = False) -> Claim:
    return claim(judge([row("x", Expect(miou=(low, high)))], trials("x", mious), proxy=proxy), kind="miou")


def test_a_level_is_tested_against_its_low_end() -> None:
    mious = [55.9, 56.0, 56.1]
    found, truth = level_claim(55, 57, mious), stats.ttest_1samp(mious, 55)
    assert found.p == pytest.approx(truth.pvalue)
    assert found.interval == pytest.approx(tuple(truth.confidence_interval(0.95)))


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [(55, 57, "confirmed"), (53, 55, "confirmed"), (57, 59, "refuted"), (56, 58, "undecided")],
)
def test_the_verdict_on_a_level_follows_its_interval(low: float, high: float, verdict: str) -> None:
    assert level_claim(low, high, [55.9, 56.0, 56.1]).verdict == verdict


def test_a_level_stopped_early_can_be_confirmed_but_not_refuted() -> None:
    stopped = [trial("x", seed, [56 + seed / 10], status="stopped", of=2) for seed in range(3)]
    above, below = (judge([row("x", Expect(miou=miou))], stopped) for miou in ((55, 57), (58, 59)))
    assert claim(above, kind="miou").verdict == "confirmed"
    assert claim(below, kind="miou").verdict == "undecided"


def test_a_proxy_judges_no_level_and_labels_every_gain() -> None:
    assert level_claim(55, 57, [55.9, 56.0, 56.1], proxy=True).verdict == "not judged"
    judgement = judge(gaining(0.5, 1), trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9]), proxy=True)
    assert (claim(judgement).verdict, claim(judgement).remarks) == ("confirmed", ["proxy"])


def sooner_claim(own: Sequence[ReportedTrial], bars: Sequence[ReportedTrial]) -> Claim:
    rows = [R01, row("x", Expect(miou=(55, 57), sooner_than="r01"))]
    return claim(judge(rows, [*own, *bars]), kind="sooner")


def rising(name: str, *firsts: int) -> list[ReportedTrial]:
    """Ten epochs at each seed, of which this is the first to reach 60 %."""
    return [
        trial(name, seed, [60.0 if number >= first else 40 + number for number in range(1, 11)])
        for seed, first in enumerate(firsts)
    ]


def test_epochs_saved_are_counted_to_the_references_final_miou() -> None:
    # 9 - 4, 9 - 3, 10 - 3 = 5, 6, 7: mean 6, sd 1, 6 -+ 2.48414.
    found = sooner_claim(rising("x", 4, 3, 3), rising("r01", 9, 9, 10))
    assert [(pair.own, pair.reference, pair.effect) for pair in found.pairs] == [(4, 9, 5), (3, 9, 6), (3, 10, 7)]
    assert found.interval == pytest.approx((3.51586, 8.48414), abs=1e-4)
    assert found.verdict == "confirmed"


def test_equal_epochs_saved_are_not_known_to_be_equal() -> None:
    # 5, 5, 5, each between two rounded epochs: sd sqrt(1/6) = 0.40825, error 0.23570, times 4.30265 = 1.01415.
    found = sooner_claim(rising("x", 4, 4, 4), rising("r01", 9, 9, 9))
    assert found.interval == pytest.approx((3.98585, 6.01415), abs=1e-4)
    assert found.verdict == "confirmed"


def test_a_row_equal_to_its_reference_is_undecided_and_a_later_one_is_refuted() -> None:
    equal = sooner_claim(rising("x", 9, 9, 9), rising("r01", 9, 9, 9))
    assert (equal.estimate, equal.verdict) == (0, "undecided")
    later = sooner_claim(rising("x", 9, 9, 9), rising("r01", 5, 5, 5))
    assert (later.verdict, later.reason, later.estimate) == ("refuted", "not sooner", -4)


def test_a_seed_that_never_got_there_bounds_the_epochs_and_bars_a_confirmation() -> None:
    found = sooner_claim([*rising("x", 2, 2, 2), trial("x", 3, [50.0] * 10)], rising("r01", 10, 10, 10, 10))
    # The last counts as epoch 11, the first at which it could have.
    assert [pair.effect for pair in found.pairs] == [8, 8, 8, -1]
    assert (found.verdict, found.sample_size) == ("undecided", None)
    assert "1 of 4 seeds" in found.never_reached


def test_a_row_that_never_got_there_at_any_seed_is_refuted() -> None:
    own = [trial("x", seed, [50.0 + seed] * 10) for seed in range(2)]
    assert sooner_claim(own, rising("r01", 10, 10)).reason == "never passed at any seed"


def test_a_row_stopped_before_it_got_there_is_not_refuted() -> None:
    own = [trial("x", seed, [50.0] * 3, status="stopped", of=10) for seed in range(2)]
    found = sooner_claim(own, rising("r01", 9, 10))
    assert (found.verdict, found.compared_at_epoch) == ("undecided", 3)


def test_a_reference_stopped_early_has_no_final_miou() -> None:
    bars = [trial("r01", seed, [50.0] * 3, status="stopped", of=10) for seed in range(2)]
    assert sooner_claim(rising("x", 2, 2), bars).pairs == ()
