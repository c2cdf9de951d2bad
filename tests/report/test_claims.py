"""Claims by hand, seed by seed: what keeps them, what breaks them, what leaves them open."""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from expecting import R01, claim, epoch, gain_claim, gaining, level_claim, row, trial, trials
from scipy import stats

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect
from tune_bisenet.report.claims import Claim, measure_window
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import strictness
from tune_bisenet.report.verdicts import format_interval, judge

NEARLY = [-0.001, 0.0, 0.001]
"""Three seeds, one claim: from 0.0022 below their mean to 0.029 above. (sd 0.001; t at 0.969 and 0.9998 with 2 df.)"""


def around(gain: float) -> list[float]:
    return [gain + little for little in NEARLY]


@pytest.mark.parametrize(
    ("expected", "gains", "verdict", "reason"),
    [
        ((0.5, 1), around(0.8), "kept", ""),
        ((0.5, 0.5), around(0.45), "kept", ""),  # less than the margin is no difference
        ((0.5, 1), around(0.35), "kept", ""),
        ((0.5, 1), around(0.301), "gained", "a gain; its size is open"),  # 0.2988 to 0.330, about 0.3
        ((0.5, 1), around(0.2), "broken", "a gain, but less than expected"),
        ((0.5, 1), around(0.001), "broken", "less than expected"),
        ((0.5, 1), around(-0.1), "broken", "no gain"),
        ((0.1, 0.5), around(0.8), "exceeded", "more than expected"),
        ((0.1, 0.5), around(0.001), "open", "the interval is too wide"),  # within the margin, but no gain is shown
        ((0.0, 0.0), around(-0.1), "kept", ""),  # a control row: as good, give or take the margin
        ((0.0, 0.0), around(0.1), "exceeded", "a gain where none was expected"),
        ((0.0, 0.0), around(-0.3), "broken", "less than expected"),
        ((0.5, 1), [0.0, 0.5, 1.0], "open", "the interval is too wide"),
        ((0.5, 1), [0.7, 0.7, 0.7], "open", "equal seeds count as one"),
        ((0.5, 1), [0.0, 0.0, 0.0], "broken", "the same to the last bit"),
        ((0.5, 1), [3.0], "open", "one seed has no spread to judge by"),
    ],
)
def test_the_verdict_on_a_gain_follows_its_interval(
    expected: tuple[float, float], gains: list[float], verdict: str, reason: str
) -> None:
    found = gain_claim(*expected, gains)
    assert (found.verdict, found.reason) == (verdict, reason)


def test_a_row_that_is_its_reference_to_the_last_bit_gains_nothing_however_noisy_the_others() -> None:
    rows = [*gaining(0.5, 1), row("y", Expect(gain=(0.5, 1), over="r01"))]
    bars = [55.0, 56.0]
    judgement = judge(rows, [*trials("r01", bars), *trials("x", bars), *trials("y", [50.0, 70.0])])
    assert (claim(judgement).verdict, claim(judgement).reason) == ("broken", "the same to the last bit")
    assert claim(judgement, "y").verdict == "open"


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (55, 57, "kept"),
        (56, 58, "kept"),  # on its edge
        (56.1, 58, "kept"),
        (54, 55.9, "kept"),  # above by less than the margin
        (53, 55, "above"),
        (57, 59, "below"),
        (56.19, 58, "below"),
    ],
)
def test_the_verdict_on_a_level_follows_its_interval(low: float, high: float, verdict: str) -> None:
    # 0.001 / sqrt(3), times t at 1 - 0.0002 / 2 and 2 df, 70.7: 56 -+ 0.0408
    assert level_claim(low, high, [55.999, 56.0, 56.001]).verdict == verdict


def test_a_wide_interval_leaves_a_level_open() -> None:
    assert level_claim(55, 57, [54.0, 56.0, 58.0]).verdict == "open"


def test_pairs_are_matched_by_seed_and_one_claim_is_a_paired_t_test() -> None:
    bars, own = [54.0, 57.0, 55.5, 56.2], [54.9, 57.6, 56.5, 56.9]
    shuffled = [trials("x", own)[seed] for seed in (2, 0, 3, 1)]
    found = claim(judge(gaining(0.5, 1), trials("r01", bars) + shuffled))
    truth = stats.ttest_rel(own, bars)
    low, high = (
        truth.confidence_interval(1 - 2 * error) for error in (strictness(4).gain_error, strictness(4).broken_error)
    )
    assert found.interval == pytest.approx((low.low, high.high))
    assert [(pair.seed, pair.own) for pair in found.pairs] == list(enumerate(own))


def test_the_mean_of_the_last_tenth_counts_and_the_best_epoch_stands_beside_it() -> None:
    flat, restless = [55.0] * 20, [55.0] * 17 + [58.0, 54.0, 57.0]
    found = claim(judge(gaining(0.5, 1), [trial("r01", 0, flat), trial("x", 0, restless)]))
    assert found.estimate == pytest.approx(0.5)  # two of 20 epochs: 54 and 57
    assert found.best_estimate == pytest.approx(3.0)


@pytest.mark.parametrize(("num_epochs", "window"), [(1, 1), (8, 1), (15, 2), (50, 5)])
def test_the_measure_is_a_tenth_of_the_epochs_at_least_one(num_epochs: int, window: int) -> None:
    assert measure_window(num_epochs, 0.1) == window


def test_a_space_can_measure_over_more_epochs() -> None:
    measured = [trial("r01", 0, [50, 54, 56]), trial("x", 0, [50, 55, 58])]
    assert claim(judge(gaining(0.5, 1), measured, measured_share=0.67)).estimate == pytest.approx(1.5)


def test_every_claim_of_its_kind_widens_an_interval_measured_or_not() -> None:
    others = [row(f"y{number}", Expect(gain=(0.5, 1), over="r01")) for number in range(11)]
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8, 57.9])
    alone, one_of_twelve = claim(judge(gaining(0.5, 1), measured)), claim(judge([*gaining(0.5, 1), *others], measured))
    assert alone.interval
    assert one_of_twelve.interval
    assert one_of_twelve.interval[0] < alone.interval[0]


def test_rows_that_claim_nothing_sharpen_the_intervals_of_those_that_do() -> None:
    rng = np.random.default_rng(0)
    measured = trials("r01", [55.1, 54.8, 55.2]) + trials("x", [56.2, 55.9, 55.9])
    others = [one for name in "abcdefgh" for one in trials(name, (55 + rng.normal(0, 0.2, 3)).tolist())]
    alone, among_ten = claim(judge(gaining(0.5, 1), measured)), claim(judge(gaining(0.5, 1), measured + others))
    assert alone.interval
    assert among_ten.interval
    assert among_ten.interval[0] > alone.interval[0]
    assert among_ten.estimate == alone.estimate


def _with_counts(record: ReportedTrial, hits: int, *, groups: Sequence[str] = "abcdefghijkl") -> ReportedTrial:
    """Twelve images of two classes; of ten pixels a class, `hits` or one more are right."""
    right = np.array([hits + image % 2 for image in range(12)])
    counts = np.zeros((12, 2, 2), np.int32)
    counts[:, 0, 0] = counts[:, 1, 1] = right
    counts[:, 0, 1] = counts[:, 1, 0] = 10 - right
    return replace(record, confusions=counts, groups=tuple(groups))


def test_one_seed_with_its_counts_has_an_interval_over_images() -> None:
    pair = [_with_counts(trial("r01", 0, [50, 55]), 6), _with_counts(trial("x", 0, [50, 56]), 8)]
    found = claim(judge(gaining(0.5, 1), pair))
    assert (found.verdict, found.interval) == ("open", None)
    # IoU of 6.5 in 10 is 6.5 / 13.5 = 48.1 %, of 8.5 it is 8.5 / 11.5 = 73.9 %: some 25.8 in all draws.
    assert found.image_interval == pytest.approx((25.8, 25.8), abs=1.5)
    assert "over 12 images at the best epochs" in format_interval(found)


@pytest.mark.parametrize(
    ("groups", "interval", "remark"), [("aaaabbbbcccc", "over 3 cities", False), ("a" * 12, "", True)]
)
def test_images_of_few_cities_are_drawn_by_city_and_those_of_one_not_at_all(
    groups: str, interval: str, remark: bool
) -> None:
    pair = [_with_counts(trial(name, 0, [50, 55]), hits, groups=groups) for name, hits in (("r01", 6), ("x", 8))]
    found = claim(judge(gaining(0.5, 1), pair))
    assert interval in format_interval(found)
    assert (found.image_interval is None) == remark
    assert ("no interval over images: all are of one city or sequence" in found.remarks) == remark


def test_counts_of_an_epoch_that_is_not_compared_are_not_used() -> None:
    # x stopped after one epoch: r01's counts are those of its second.
    stopped = trial("x", 0, [51], status="stopped", of=2)
    found = claim(judge(gaining(0.5, 1), [_with_counts(trial("r01", 0, [50, 55]), 6), _with_counts(stopped, 8)]))
    assert (found.estimate, found.image_interval) == (pytest.approx(1.0), None)


def test_several_seeds_need_no_interval_over_images() -> None:
    pairs = [_with_counts(measured, 6) for measured in trials("r01", [55, 56]) + trials("x", [56, 58])]
    assert claim(judge(gaining(0.5, 1), pairs)).image_interval is None


def test_a_trial_stopped_early_is_described_at_the_last_epoch_both_reached_and_not_judged() -> None:
    early = [trial("x", seed, [41 + seed, 46 + seed], status="stopped", of=3) for seed in (0, 1)]
    whole = [trial("r01", seed, [40 + seed, 45, 60]) for seed in (0, 1)]
    found = claim(judge(gaining(0.5, 1), early + whole))
    assert [pair.effect for pair in found.pairs] == pytest.approx([1.0, 2.0])
    assert (found.verdict, found.interval, found.sample_size) == ("open", None, None)
    assert found.stopped == ("x-s0", "x-s1")
    assert "compared at epoch 2" in found.remarks


def test_one_stopped_seed_leaves_a_row_unjudged_whichever_way() -> None:
    measured = trials("r01", [55, 56, 57]) + trials("x", [45.7, 46.8])
    measured.append(trial("x", 2, [30], status="stopped", of=2))
    assert claim(judge(gaining(0.5, 1), measured)).verdict == "open"


def test_a_reference_stopped_early_bounds_the_comparison_too() -> None:
    measured = [trial("x", 0, [41, 46, 60]), trial("r01", 0, [40, 45], status="stopped", of=3)]
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.estimate, found.compared_at_epoch) == (pytest.approx(1.0), 2)


def test_while_a_trial_runs_its_claim_is_open() -> None:
    measured = trials("r01", [55, 56, 57]) + trials("x", [55.7, 56.8])
    measured.append(trial("x", 2, [47.9], status="running", of=2))
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.verdict, found.interval, found.sample_size, found.pending) == ("open", None, None, ("x-s2",))


def test_a_reason_names_a_few_trials_and_counts_the_others() -> None:
    waiting = [trial(name, seed, [], of=2, status="waiting") for name in ("r01", "x") for seed in (1, 2)]
    found = claim(judge(gaining(1, 2), [*trials("r01", [55]), *trials("x", [56]), *waiting]))
    assert found.reason == "not ended: x-s1, r01-s1, x-s2 and 1 more"


def test_a_failed_trial_is_left_out_and_named() -> None:
    measured = trials("r01", [55, 56, 57, 58]) + trials("x", [55.79, 56.8, 57.81])
    measured.append(trial("x", 3, [20], status="failed", of=2))
    found = claim(judge(gaining(0.5, 1), measured))
    assert (found.verdict, len(found.pairs), found.failed) == ("kept", 3, ("x-s3",))


def _blown_up(name: str, seed: int, mious: Sequence[float]) -> ReportedTrial:
    """Diverged in the epoch after these, of four; what it predicts then is no measure."""
    measured = trial(name, seed, mious, status="diverged", of=4)
    return replace(measured, epochs=[*measured.epochs, epoch(len(mious) + 1, 99.0, diverged=True)])


def test_a_row_that_diverged_at_one_seed_is_not_judged() -> None:
    whole = [trial("r01", seed, [40 + seed, 50, 51, 52]) for seed in range(3)]
    own = [trial("x", 0, [40, 50, 51, 52.7]), trial("x", 1, [41, 50, 51, 52.8]), _blown_up("x", 2, [50.9])]
    found = claim(judge(gaining(0.5, 1), whole + own))
    # At epoch 2, the last both reached, its last sound epoch has 50.9 against 50.
    assert [pair.effect for pair in found.pairs] == pytest.approx([0.7, 0.8, 0.9])
    assert (found.verdict, found.blown_up, found.sample_size) == ("open", ("x-s2",), None)


@pytest.mark.parametrize("expect", [Expect(gain=(0.5, 1), over="r01"), Expect(miou=(57, 59))])
def test_a_row_that_diverged_at_every_seed_blew_up(expect: Expect) -> None:
    whole = [trial("r01", seed, [40, 50, 51, 52]) for seed in range(2)]
    judgement = judge([R01, row("x", expect)], [*whole, _blown_up("x", 0, [45]), _blown_up("x", 1, [46])])
    assert [found.verdict for found in judgement.claims] == ["blew up"]


def test_a_gain_over_a_reference_that_diverged_is_open() -> None:
    own = [trial("x", seed, [40, 40.7 + seed / 10, 51, 52]) for seed in range(3)]
    found = claim(judge(gaining(0.5, 1), [*own, *(_blown_up("r01", seed, [40]) for seed in range(3))]))
    assert found.estimate == pytest.approx(0.8)  # at epoch 2: 0.7, 0.8, 0.9 over 40
    assert (found.verdict, found.blown_up) == ("open", ("r01-s0", "r01-s1", "r01-s2"))


def test_diverged_trials_have_no_part_in_the_noise() -> None:
    whole = trials("r01", [55, 56, 57]) + trials("x", [55.79, 56.8, 57.81])
    noise = judge(gaining(0.5, 1), whole).noise
    blown_up = [_blown_up("wild", seed, [float(seed * 20)]) for seed in range(3)]
    assert judge(gaining(0.5, 1), whole + blown_up).noise == noise


def test_without_a_reference_nothing_is_measured() -> None:
    found = claim(judge(gaining(0.5, 1), trials("x", [55, 56])))
    assert (found.verdict, found.estimate, found.pairs) == ("open", None, ())


def test_a_search_that_has_not_begun_has_nothing_but_expectations() -> None:
    judgement = judge(SPACE.runs, [])
    assert {claim.verdict for claim in judgement.claims} == {"open"}
    assert (judgement.seeds, judgement.noise) == ((), None)
    assert all(claim.sample_size is None for claim in judgement.claims)


def test_a_proxy_judges_no_level() -> None:
    assert level_claim(55, 57, [55.9, 56.0, 56.1], proxy=True).verdict == "not judged"
    judgement = judge(gaining(0.5, 1), trials("r01", [55, 56, 57]) + trials("x", [55.79, 56.8, 57.81]), proxy=True)
    assert (claim(judgement).verdict, claim(judgement).on_proxy) == ("kept", True)


def sooner_claim(own: Sequence[ReportedTrial], bars: Sequence[ReportedTrial], *, low: float = 55) -> Claim:
    rows = [R01, row("x", Expect(miou=(low, 99), sooner_than="r01"))]
    return claim(judge(rows, [*own, *bars]), kind="sooner")


def rising(name: str, *firsts: int, end: float = 60.0) -> list[ReportedTrial]:
    """Ten epochs at each seed: a point an epoch up to `end`, which this epoch is the first to reach."""
    return [
        trial(name, seed, [end + min(0, number - first) for number in range(1, 11)])
        for seed, first in enumerate(firsts)
    ]


def test_epochs_saved_are_counted_to_the_level_that_the_row_names() -> None:
    # 55 is five points below the ends, five epochs before them: 9 - 4, 9 - 3, 10 - 3 all the same.
    found = sooner_claim(rising("x", 7, 7, 6, 7, 7), rising("r01", 9, 10, 10, 9, 10))
    assert [(pair.own, pair.reference, pair.effect) for pair in found.pairs[:3]] == [(2, 4, 2), (2, 5, 3), (1, 5, 4)]
    effects = [2, 3, 4, 2, 3]
    half = float(stats.t.ppf(1 - strictness(5).sooner_error / 2, 4)) * statistics.stdev(effects) / 5**0.5
    assert found.interval == pytest.approx((2.8 - half, 2.8 + half))


def test_no_more_epochs_can_be_saved_than_a_run_has() -> None:
    assert sooner_claim(rising("x", 7, 6), rising("r01", 9, 10)).interval == (-10, 10)


def test_a_row_that_ends_below_the_level_is_measured_at_its_own_end() -> None:
    found = sooner_claim(rising("x", 6, 6, 6, 6, 6), rising("r01", 9, 9, 9, 9, 9), low=70)
    assert [(pair.own, pair.reference) for pair in found.pairs] == [(6, 9)] * 5
    assert found.verdict == "kept"


def test_a_row_that_ends_higher_and_is_no_faster_is_not_sooner() -> None:
    # It passes 55 three epochs before r01 does, and nears its own end no sooner.
    higher = rising("x", 9, 9, 9, 9, 9, end=63.0)
    found = sooner_claim(higher, rising("r01", 9, 9, 9, 9, 9))
    assert (found.estimate, found.verdict) == (0, "open")


def test_equal_epochs_saved_are_not_known_to_be_equal() -> None:
    # 3, 3, ...: each between two rounded epochs, sd sqrt(1/6) = 0.40825.
    found = sooner_claim(rising("x", 6, 6, 6, 6, 6), rising("r01", 9, 9, 9, 9, 9))
    half = float(stats.t.ppf(1 - strictness(5).sooner_error / 2, 4)) * 0.40825 / 5**0.5
    assert found.interval == pytest.approx((3 - half, 3 + half), abs=1e-4)
    assert found.verdict == "kept"


def test_a_later_row_breaks_its_promise_of_speed() -> None:
    later = sooner_claim(rising("x", 9, 9, 9, 9, 9), rising("r01", 5, 5, 5, 5, 5), low=59.9)
    assert (later.verdict, later.reason, later.estimate) == ("broken", "later", -4)


def test_speed_is_not_judged_where_a_trial_was_stopped() -> None:
    own = [trial("x", seed, [50.0] * 3, status="stopped", of=10) for seed in range(2)]
    found = sooner_claim(own, rising("r01", 9, 10))
    assert (found.verdict, found.pairs) == ("open", ())
