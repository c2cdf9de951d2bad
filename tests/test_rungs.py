"""Where a run may be judged, who is stopped there, and what that is expected to save and to cost."""

import json
import math
import pickle
import random
from functools import partial
from typing import Any

import numpy as np
import pytest
from rows import plain_row

from tune_bisenet.config import Expect, Run
from tune_bisenet.rungs import Rungs, Verdict, forecast, no_rungs, quantile, rung_epochs, spared_rows

ITERATIONS_PER_EPOCH = 743
RUNGS_OF = partial(rung_epochs, iterations_per_epoch=ITERATIONS_PER_EPOCH)


def row(name: str = "r02", *, num_epochs: int = 50, **fields: Any) -> Run:
    return plain_row(name, num_epochs=num_epochs, **fields)


def rows(count: int, **fields: Any) -> list[Run]:
    return [row(f"x{number:03}", **fields) for number in range(count)]


def judge(rungs: Rungs, run: Run, epoch: int, miou: float, **more: Any) -> Verdict:
    return rungs.judge(run, more.pop("trial", run.name), epoch=epoch, miou=miou, **more)


def survivors(rungs: Rungs, mious: list[float], epoch: int = 20) -> list[float]:
    """Which of these go on, where each comes from a trial of its own and they arrive in this order."""
    return [miou for run, miou in zip(rows(len(mious)), mious, strict=True) if not judge(rungs, run, epoch, miou).stop]


# --- where the rungs are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fields", "rungs"),
    [
        *((f"r{number:02}", {}, (20, 40)) for number in (1, 2, 3, 4, 6, 7, 9, 10)),
        ("r05", {"lovasz_after": 35}, (40,)),
        ("r08", {"warmup": 2500}, (20, 40)),
    ],
)
def test_the_ten_rows_are_judged_after_20_and_40_epochs_and_the_loss_switch_only_after_40(
    name: str, fields: dict[str, Any], rungs: tuple[int, ...]
) -> None:
    assert RUNGS_OF(row(name, **fields)) == rungs


@pytest.mark.parametrize(
    ("num_epochs", "rungs"),
    [(1, ()), (2, (1,)), (3, (2,)), (4, (2,)), (5, (2, 4)), (6, (3,)), (10, (4, 8)), (15, (6, 12)), (100, (40, 80))],
)
def test_the_first_rung_is_at_two_fifths_and_rungs_double_before_the_last_epoch(
    num_epochs: int, rungs: tuple[int, ...]
) -> None:
    assert rung_epochs(row(num_epochs=num_epochs, warmup=0), iterations_per_epoch=100) == rungs


@pytest.mark.parametrize(("warmup", "rungs"), [(2000, (20, 40)), (2001, (40,)), (4000, (40,)), (4001, ())])
def test_a_rung_before_the_end_of_warmup_is_dropped(warmup: int, rungs: tuple[int, ...]) -> None:
    assert rung_epochs(row(warmup=warmup), iterations_per_epoch=100) == rungs


@pytest.mark.parametrize(
    ("num_epochs", "lovasz_after", "rungs"),
    [(50, 0, (20, 40)), (50, 15, (20, 40)), (50, 16, (40,)), (50, 36, ()), (6, 2, (3,)), (6, 4, ()), (30, 9, (12, 24))],
)
def test_a_rung_needs_a_tenth_of_the_epochs_after_the_loss_switch_and_one_at_least(
    num_epochs: int, lovasz_after: int, rungs: tuple[int, ...]
) -> None:
    assert RUNGS_OF(row(num_epochs=num_epochs, lovasz_after=lovasz_after)) == rungs


def test_other_shares_and_factors_move_the_rungs() -> None:
    assert RUNGS_OF(row(num_epochs=80), first_share=0.125, reduction_factor=3) == (10, 30)
    assert RUNGS_OF(row(num_epochs=100), first_share=0.55) == (55,)  # 0.55 * 100 is 55.00000000000001


def test_no_rung_is_at_or_after_the_last_epoch_whatever_the_length() -> None:
    for num_epochs in range(1, 300):
        assert all(0 < rung < num_epochs for rung in RUNGS_OF(row(num_epochs=num_epochs)))


# --- the rule ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([7.0], 0.5, 7.0), ([1.0, 2.0], 0.5, 1.5), ([9.0, 1.0, 4.0], 0.5, 4.0), ([10.0, 20.0, 40.0, 80.0], 0.75, 50.0)],
)
def test_the_quantile_equals_hand_computed_ones(values: list[float], share: float, expected: float) -> None:
    assert quantile(values, share) == expected


def test_the_quantile_equals_numpys() -> None:
    rng = np.random.default_rng(1)
    for size in range(1, 40):
        values = rng.normal(size=size)
        for share in (0.5, 2 / 3, 0.75):
            assert quantile(values.tolist(), share) == pytest.approx(np.quantile(values, share), rel=1e-12, abs=1e-12)


def test_ascending_arrivals_all_go_on_and_descending_ones_all_stop_but_the_first() -> None:
    ascending = [float(miou) for miou in range(10)]
    assert survivors(Rungs(rungs_of=RUNGS_OF, min_others=1), ascending) == ascending
    assert survivors(Rungs(rungs_of=RUNGS_OF, min_others=1), ascending[::-1]) == [9.0]


def test_nobody_is_held_against_fewer_than_three_others() -> None:
    assert survivors(Rungs(rungs_of=RUNGS_OF), [60.0, 50.0, 40.0, 30.0]) == [60.0, 50.0, 40.0]


def test_a_mixed_arrival_is_judged_by_the_median_of_those_before_it() -> None:
    # medians met:             -     50    40    45    50    50
    assert survivors(Rungs(rungs_of=RUNGS_OF, min_others=1), [50.0, 30.0, 60.0, 50.0, 49.0, 50.0]) == [
        50.0,
        60.0,
        50.0,
        50.0,
    ]


def test_with_factor_4_only_the_best_quarter_goes_on() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1, reduction_factor=4)
    assert survivors(rungs, [10.0, 20.0, 40.0, 80.0, 49.9]) == [10.0, 20.0, 40.0, 80.0]
    assert rungs.stops["x004"] == "mIoU 49.90 at epoch 20, below 50.00, the 75% quantile of 4 others (ASHA)"


def test_ties_go_on() -> None:
    assert survivors(Rungs(rungs_of=RUNGS_OF, min_others=1), [31.7] * 7) == [31.7] * 7


def test_a_stop_explains_itself() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    survivors(rungs, [33.0, 35.0, 37.0])
    assert judge(rungs, row("r07"), 20, 31.2) == Verdict(
        stop=True, reason="mIoU 31.20 at epoch 20, below 35.00, the median of 3 others (ASHA)"
    )
    judge(rungs, row("r08"), 40, 50.0)
    assert judge(rungs, row("r09"), 40, 49.0).reason.endswith("below 50.00, the median of 1 other (ASHA)")


def test_between_rungs_nothing_is_judged_or_recorded() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    for epoch in (*range(1, 20), *range(21, 40), *range(41, 51)):
        assert survivors(rungs, [50.0, 1.0], epoch) == [50.0, 1.0]
    assert rungs.seen == {}


# --- fairness ---------------------------------------------------------------------------------------------------


def test_runs_of_another_length_are_not_compared() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    assert not judge(rungs, row("long", num_epochs=100), 40, 50.0).stop
    assert not judge(rungs, row("short", num_epochs=50), 40, 10.0).stop
    assert judge(rungs, row("long2", num_epochs=100), 40, 49.0).stop


def test_a_trial_that_jumps_over_a_rung_is_not_recorded_there_late() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    for epoch in (19, 21, 39):
        judge(rungs, row("resumed"), epoch, 55.0)
    assert not judge(rungs, row("fresh"), 20, 30.0).stop
    assert rungs.seen == {(50, 20): {"fresh": 30.0}}


def test_a_trial_whose_loss_switch_lies_ahead_is_neither_judged_nor_recorded() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    judge(rungs, row("r01"), 20, 40.0)
    assert not judge(rungs, row("r05", lovasz_after=35), 20, 1.0).stop
    assert rungs.seen == {(50, 20): {"r01": 40.0}}
    judge(rungs, row("r01"), 40, 50.0)
    assert judge(rungs, row("r05", lovasz_after=35), 40, 1.0).stop


def test_rows_that_others_are_measured_against_are_spared() -> None:
    runs = [
        row("r01", expect=Expect(miou=(55, 57))),
        row("r02", expect=Expect(miou=(56, 58), sooner_than="r09")),
        row("r04", expect=Expect(gain=(0.5, 0.5), over="r01")),
        row("r05"),
    ]
    assert spared_rows(runs) == {"r01", "r09"}


def test_every_seed_of_a_spared_row_is_recorded_but_never_stopped() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1, spared=frozenset({"r01"}))
    assert not judge(rungs, row("r02"), 20, 50.0).stop
    assert not judge(rungs, row("r01"), 20, 1.0, trial="r01").stop
    assert not judge(rungs, row("r01", seed=1), 20, 2.0, trial="r01-s1").stop
    assert rungs.seen == {(50, 20): {"r02": 50.0, "r01": 1.0, "r01-s1": 2.0}}
    assert (
        judge(rungs, row("r03"), 20, 1.5).reason == "mIoU 1.50 at epoch 20, below 2.00, the median of 3 others (ASHA)"
    )


def test_seeds_of_one_row_are_trials_of_their_own() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    judge(rungs, row("r02", seed=0), 20, 50.0, trial="r02-s0")
    assert judge(rungs, row("r02", seed=1), 20, 49.0, trial="r02-s1").stop
    assert rungs.stops.keys() == {"r02-s1"}


def test_a_diverged_trial_stops_at_once_even_a_spared_one_and_is_not_recorded() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1, spared=frozenset({"r01"}))
    for run, epoch in ((row("r01"), 3), (row("r02"), 20)):
        verdict = judge(rungs, run, epoch, 2.0, diverged=True)
        assert verdict == Verdict(stop=True, reason=f"the loss was no longer a number at epoch {epoch}")
    assert rungs.seen == {}


def test_without_rungs_only_divergence_stops() -> None:
    rungs = Rungs(rungs_of=no_rungs)
    assert survivors(rungs, [50.0, 1.0]) == [50.0, 1.0]
    assert judge(rungs, row(), 20, 1.0, diverged=True).stop


def test_a_miou_that_is_no_number_is_a_broken_promise() -> None:
    with pytest.raises(AssertionError, match="trial r02 reported mIoU nan at epoch 7"):
        judge(Rungs(rungs_of=RUNGS_OF, min_others=1), row(), 7, math.nan)


# --- restarts ---------------------------------------------------------------------------------------------------


def test_a_replay_is_neither_judged_against_itself_nor_recorded_twice() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    survivors(rungs, [30.0, 40.0])
    before = rungs.to_json()
    assert not judge(rungs, rows(1)[0], 20, 30.0).stop  # 30 would be stopped now; it went on when it came
    assert not judge(rungs, rows(1)[0], 20, 29.0).stop
    assert rungs.to_json() == before


def test_a_stopped_trial_stays_stopped_wherever_it_resumes() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    judge(rungs, row("r02"), 20, 40.0)
    verdict = judge(rungs, row("r03"), 20, 30.0)
    for epoch in (19, 20, 21, 40):
        assert judge(rungs, row("r03"), epoch, 60.0) == verdict
    assert rungs.seen == {(50, 20): {"r02": 40.0, "r03": 30.0}}


def reload(rungs: Rungs) -> Rungs:
    record = json.loads(json.dumps(rungs.to_json(), allow_nan=False))
    return Rungs.from_json(
        record,
        rungs_of=rungs.rungs_of,
        spared=rungs.spared,
        reduction_factor=rungs.reduction_factor,
        min_others=rungs.min_others,
    )


def test_a_judge_interrupted_at_any_time_judges_like_one_never_stopped() -> None:
    chance = random.Random(7)
    runs = [row(f"x{number}", num_epochs=chance.choice([6, 50])) for number in range(12)]
    for _ in range(50):
        straight = Rungs(
            rungs_of=RUNGS_OF, min_others=1, spared=frozenset({"x0"}), reduction_factor=chance.choice([2, 3])
        )
        interrupted = reload(straight)
        for _ in range(100):
            run = chance.choice(runs)
            epoch = chance.choice([3, 19, 20, 21, 40])
            miou, diverged = chance.uniform(0, 60), chance.random() < 0.02
            verdicts = [judge(rungs, run, epoch, miou, diverged=diverged) for rungs in (straight, interrupted)]
            assert verdicts[0] == verdicts[1]
            if chance.random() < 0.2:
                interrupted = reload(interrupted)
        assert interrupted == straight
        assert straight.stops


def test_the_state_is_readable_and_is_a_copy() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    survivors(rungs, [30.0])
    state = rungs.to_json()
    survivors(rungs, [30.0, 20.0])
    assert state == {"seen": [{"num_epochs": 50, "epoch": 20, "trial": "x000", "miou": 30.0}], "stops": {}}


def test_the_judge_can_be_pickled() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    survivors(rungs, [30.0, 20.0])
    copied = pickle.loads(pickle.dumps(rungs))
    assert copied.to_json() == rungs.to_json()
    assert copied.rungs_of(row()) == (20, 40)


# --- what is known from an earlier search -----------------------------------------------------------------------


def test_a_known_trial_counts_among_the_others_at_the_rungs_it_came_to() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    rungs.know(row("r02"), "before/r02", [1.0] * 19 + [50.0] + [2.0] * 10)
    assert rungs.seen == {(50, 20): {"before/r02": 50.0}}
    assert (
        judge(rungs, row("r03"), 20, 49.0).reason == "mIoU 49.00 at epoch 20, below 50.00, the median of 1 other (ASHA)"
    )
    assert not judge(rungs, row("r03"), 40, 1.0, trial="r03-s1").stop


def test_knowing_twice_changes_nothing_and_stops_nobody() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF, min_others=1)
    judge(rungs, row("r02"), 20, 50.0)
    for miou in (1.0, 2.0):
        rungs.know(row("r03"), "before/r03", [miou] * 50)
    assert rungs.seen == {(50, 20): {"r02": 50.0, "before/r03": 1.0}, (50, 40): {"before/r03": 1.0}}
    assert rungs.stops == {}


def test_a_known_trial_that_came_to_no_rung_leaves_no_trace() -> None:
    rungs = Rungs(rungs_of=RUNGS_OF)
    rungs.know(row("r02"), "before/r02", [50.0] * 19)
    rungs.know(row("r05", lovasz_after=35), "before/r05", [50.0] * 39)
    assert rungs.to_json() == {"seen": [], "stops": {}}


# --- the forecast -----------------------------------------------------------------------------------------------


def test_the_best_of_two_is_stopped_as_often_as_sheppards_formula_says() -> None:
    # One rung: the best is stopped if it comes second and its rung's score is lower, so P = acos(r) / 2 pi.
    for correlation in (0.0, 0.3, 0.7, 0.95):
        seen = forecast(
            rows(2, num_epochs=6), ITERATIONS_PER_EPOCH, correlation=correlation, min_others=1, simulations=20_000
        )
        assert seen.probability_best_stopped == pytest.approx(math.acos(correlation) / (2 * math.pi), abs=0.01)
        assert seen.epochs_share_saved == pytest.approx(0.5 * 3 / 12, abs=0.01)


@pytest.mark.parametrize("count", [2, 4, 9])
def test_one_rung_stops_every_second_trial_after_the_first(count: int) -> None:
    # A score less the median of others alike is symmetric about 0: each but the first falls below it half the time.
    seen = forecast(rows(count, num_epochs=6), ITERATIONS_PER_EPOCH, min_others=1, simulations=5_000)
    assert seen.epochs_share_saved == pytest.approx((count - 1) / 2 * 3 / (6 * count), abs=0.005)


def test_a_forecast_of_two_rungs_equals_a_brute_force_one() -> None:
    runs = [*rows(6), row("r04", expect=Expect(gain=(0.5, 0.5), over="r01")), row("r01")]
    seen = forecast(runs, ITERATIONS_PER_EPOCH, correlation=0.6, min_others=1, simulations=5_000)
    saved, best_stopped = brute_force(count=len(runs), correlation=0.6, simulations=20_000)
    assert seen.epochs_share_saved == pytest.approx(saved, abs=0.01)
    assert seen.probability_best_stopped == pytest.approx(best_stopped, abs=0.02)


def brute_force(*, count: int, correlation: float, simulations: int) -> tuple[float, float]:
    """All searches at once, rungs at 20 and 40 of 50 epochs, the last row spared: (share saved, P(best stopped))."""
    rng = np.random.default_rng(5)
    final = rng.standard_normal((simulations, count))
    noise = rng.standard_normal((2, simulations, count))
    first, second = correlation * final + np.sqrt(1 - correlation**2) * noise
    epochs = np.full((simulations, count), 50)
    for trial in range(1, count - 1):
        epochs[first[:, trial] < np.median(first[:, :trial], axis=1), trial] = 20
        second[epochs[:, trial] == 20, trial] = np.nan  # never gets there
        epochs[second[:, trial] < np.nanmedian(second[:, :trial], axis=1), trial] = 40
    best = epochs[np.arange(simulations), final.argmax(axis=1)]
    return 1 - float(epochs.mean()) / 50, float((best < 50).mean())


def test_a_rung_that_tells_the_end_never_stops_the_best_and_a_poorer_one_does_more_often() -> None:
    stopped = [
        forecast(rows(10), ITERATIONS_PER_EPOCH, correlation=correlation).probability_best_stopped
        for correlation in (1.0, 0.9, 0.7, 0.5, 0.3, 0.0)
    ]
    assert stopped[0] == 0
    assert stopped == sorted(stopped)
    assert stopped[-1] > 0.4


def test_runs_that_are_never_judged_save_nothing_and_lose_nothing() -> None:
    seen = forecast(rows(3, num_epochs=1), ITERATIONS_PER_EPOCH)
    assert (seen.epochs_share_saved, seen.probability_best_stopped) == (0, 0)


def test_a_forecast_is_repeatable_and_large_searches_are_simulated_less_often() -> None:
    small, large = rows(10), rows(100)
    assert forecast(small, ITERATIONS_PER_EPOCH) == forecast(small, ITERATIONS_PER_EPOCH)
    assert forecast(small, ITERATIONS_PER_EPOCH).simulations == 2000
    assert forecast(large, ITERATIONS_PER_EPOCH).simulations == 500


def test_a_forecast_reads_as_a_sentence() -> None:
    assert str(forecast(rows(3, num_epochs=1), ITERATIONS_PER_EPOCH)) == (
        "may save 0% of the epochs; if a rung's mIoU correlates 0.7 with the final one, "
        "it stops the truly best row in 0% of searches"
    )
