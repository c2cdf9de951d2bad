"""The stopping rules: when a run may be judged, which trials stop, and what that is expected to save and to cost."""

import json
import math
import pickle
import random
import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from helpers.rows import plain_row

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect, Run
from tune_bisenet.rungs import (
    AshaRule,
    MedianRule,
    Stopper,
    StoppingRule,
    forecast,
    protected_rows,
    quantile,
    simulate_ends,
)

ITERATIONS_PER_EPOCH = 743
RUNGS = AshaRule(min_peers=1)
RUNS10 = SPACE.runs


def row(name: str = "r02", *, num_epochs: int = 50, warmup: int = 1100, **fields: Any) -> Run:
    return plain_row(name, num_epochs=num_epochs, warmup=warmup, **fields)


def rows(count: int, **fields: Any) -> list[Run]:
    return [row(f"x{number:03}", **fields) for number in range(count)]


def iterations_per_epoch(_run: Run) -> int:
    return ITERATIONS_PER_EPOCH


def stopper_of(rule: StoppingRule | None = RUNGS, **fields: Any) -> Stopper:
    return Stopper(rule=rule, iterations_per_epoch=iterations_per_epoch, **fields)


def decide(stopper: Stopper, run: Run, epoch: int, miou: float, **more: Any) -> str:
    return stopper.decide(run, more.pop("trial", run.name), epoch=epoch, miou=miou, **more)


def survivors(stopper: Stopper, mious: list[float], epoch: int = 20) -> list[float]:
    """Return those that continue, where each comes from a trial of its own and they arrive in this order."""
    return [miou for run, miou in zip(rows(len(mious)), mious, strict=True) if not decide(stopper, run, epoch, miou)]


# --- where the rungs are ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "rungs"), [({}, (20, 40)), ({"lovasz_after": 35}, (40,)), ({"warmup": 2500}, (20, 40))]
)
def test_the_ten_rows_are_judged_after_20_and_40_epochs(fields: dict[str, Any], rungs: tuple[int, ...]) -> None:
    assert RUNGS.judged_epochs(row(**fields), ITERATIONS_PER_EPOCH) == rungs


@pytest.mark.parametrize(
    ("num_epochs", "rungs"),
    [(1, ()), (2, (1,)), (3, (2,)), (4, (2,)), (5, (2, 4)), (6, (3,)), (10, (4, 8)), (15, (6, 12)), (100, (40, 80))],
)
def test_the_first_rung_is_at_two_fifths_and_rungs_double(num_epochs: int, rungs: tuple[int, ...]) -> None:
    assert RUNGS.judged_epochs(row(num_epochs=num_epochs, warmup=0), 100) == rungs


@pytest.mark.parametrize(("warmup", "rungs"), [(2000, (20, 40)), (2001, (40,)), (4000, (40,)), (4001, ())])
def test_a_rung_before_the_end_of_warmup_is_dropped(warmup: int, rungs: tuple[int, ...]) -> None:
    assert RUNGS.judged_epochs(row(warmup=warmup), 100) == rungs


@pytest.mark.parametrize(
    ("num_epochs", "lovasz_after", "rungs"),
    [(50, 0, (20, 40)), (50, 15, (20, 40)), (50, 16, (40,)), (50, 36, ()), (6, 2, (3,)), (6, 4, ()), (30, 9, (12, 24))],
)
def test_a_rung_needs_a_tenth_of_the_epochs_after_the_loss_switch(
    num_epochs: int, lovasz_after: int, rungs: tuple[int, ...]
) -> None:
    run = row(num_epochs=num_epochs, lovasz_after=lovasz_after)
    assert RUNGS.judged_epochs(run, ITERATIONS_PER_EPOCH) == rungs


def test_other_shares_and_factors_move_the_rungs() -> None:
    assert AshaRule(first_share=0.125, reduction_factor=3).judged_epochs(row(num_epochs=80), 743) == (10, 30)
    assert AshaRule(first_share=0.55).judged_epochs(row(num_epochs=100), 743) == (55,)  # 0.55 * 100 > 55


def test_no_rung_is_at_or_after_the_last_epoch() -> None:
    for num_epochs in range(1, 300):
        assert all(0 < rung < num_epochs for rung in RUNGS.judged_epochs(row(num_epochs=num_epochs), 743))


# --- ASHA -------------------------------------------------------------------------------------------------------


def test_the_quantile_equals_numpys() -> None:
    rng = np.random.default_rng(1)
    for size in range(1, 40):
        values = rng.normal(size=size)
        for share in (0.5, 2 / 3, 0.75):
            assert quantile(values.tolist(), share) == pytest.approx(np.quantile(values, share), rel=1e-12, abs=1e-12)


def test_ascending_arrivals_all_continue_and_descending_ones_all_stop_but_the_first() -> None:
    ascending = [float(miou) for miou in range(10)]
    assert survivors(stopper_of(), ascending) == ascending
    assert survivors(stopper_of(), ascending[::-1]) == [9.0]


def test_no_trial_is_compared_with_fewer_than_three_peers() -> None:
    assert survivors(stopper_of(AshaRule()), [60.0, 50.0, 40.0, 30.0]) == [60.0, 50.0, 40.0]


def test_a_mixed_arrival_is_judged_by_the_median_of_those_before_it() -> None:
    # medians met:  -     50    40    45    50    50
    mious = [50.0, 30.0, 60.0, 50.0, 49.0, 50.0]
    assert survivors(stopper_of(), mious) == [50.0, 60.0, 50.0, 50.0]


def test_with_factor_4_only_the_best_quarter_continues() -> None:
    stopper = stopper_of(AshaRule(min_peers=1, reduction_factor=4))
    assert survivors(stopper, [10.0, 20.0, 40.0, 80.0, 49.9]) == [10.0, 20.0, 40.0, 80.0]
    assert "below 50.00, the 75% quantile of 4 others" in stopper.stops["x004"]


def test_ties_continue() -> None:
    assert survivors(stopper_of(), [31.7] * 7) == [31.7] * 7


def test_between_rungs_nothing_is_judged_or_recorded() -> None:
    stopper = stopper_of()
    for epoch in (*range(1, 20), *range(21, 40), *range(41, 51)):
        assert survivors(stopper, [50.0, 1.0], epoch) == [50.0, 1.0]
    assert stopper.seen == {}


def test_runs_of_another_length_are_not_compared() -> None:
    stopper = stopper_of()
    assert not decide(stopper, row("long", num_epochs=100), 40, 50.0)
    assert not decide(stopper, row("short", num_epochs=50), 40, 10.0)
    assert decide(stopper, row("long2", num_epochs=100), 40, 49.0)


def test_a_trial_that_jumps_over_a_rung_is_not_recorded_there_late() -> None:
    stopper = stopper_of()
    for epoch in (19, 21, 39):
        decide(stopper, row("resumed"), epoch, 55.0)
    assert not decide(stopper, row("fresh"), 20, 30.0)
    assert stopper.seen == {50: {"fresh": {20: 30.0}}}


def test_a_trial_whose_loss_switch_lies_ahead_is_neither_judged_nor_recorded() -> None:
    stopper = stopper_of()
    decide(stopper, row("r01"), 20, 40.0)
    assert not decide(stopper, row("r05", lovasz_after=35), 20, 1.0)
    assert stopper.seen == {50: {"r01": {20: 40.0}}}
    decide(stopper, row("r01"), 40, 50.0)
    assert decide(stopper, row("r05", lovasz_after=35), 40, 1.0)


# --- the median rule --------------------------------------------------------------------------------------------


def short(name: str = "r02", *, num_epochs: int = 5, **fields: Any) -> Run:
    return row(name, num_epochs=num_epochs, warmup=0, **fields)


def median_stopper(*known: Sequence[float], min_peers: int = 1, **fields: Any) -> Stopper:
    """Return a stopper that judges five epochs from the second on, and knows these curves."""
    stopper = stopper_of(MedianRule(min_peers=min_peers), **fields)
    for number, curve in enumerate(known):
        stopper.add_known(short(), f"known{number}", curve)
    return stopper


def train(stopper: Stopper, curve: Sequence[float], run: Run | None = None, trial: str = "new") -> int:
    """Return after how many epochs the trial ends."""
    for epoch, miou in enumerate(curve, start=1):
        if stopper.decide(run or short(), trial, epoch=epoch, miou=miou):
            return epoch
    return len(curve)


@pytest.mark.parametrize(
    ("run", "first"),
    [
        (row(warmup=0), 20),
        (row(warmup=2001), 21),
        (row(warmup=0, lovasz_after=35), 40),
        (row(warmup=0, lovasz_after=1), 20),
    ],
)
def test_the_median_rule_waits_for_grace_warmup_and_loss_switch(run: Run, first: int) -> None:
    assert MedianRule().judged_epochs(run, 100) == range(first, 50)
    assert MedianRule(first_share=0.1).judged_epochs(row(warmup=0), 100) == range(5, 50)


def test_a_hopeless_trial_is_stopped_at_the_first_judged_epoch_and_not_at_its_last() -> None:
    assert train(median_stopper([50.0] * 5), [1.0] * 5) == 2
    assert not median_stopper([50.0] * 5).decide(short(), "new", epoch=5, miou=1.0)
    assert train(median_stopper([50.0] * 5), [1.0] * 5, short(lovasz_after=3)) == 4


def test_the_best_until_an_epoch_is_compared_with_the_median_of_averages_since_the_first_judged() -> None:
    # averages since epoch 2, the first judged: until epoch 2: 20, 30, 40; until epoch 3: 25, 35, 45
    others = [10.0, 20.0, 30.0], [20.0, 30.0, 40.0], [30.0, 40.0, 50.0]
    assert train(median_stopper(*others), [31.0, 1.0, 1.0]) == 3  # its best, 31, is above 30 but below 35
    stopper = median_stopper(*others)
    assert train(stopper, [29.9, 1.0, 1.0]) == 2
    assert "best mIoU 29.90 until epoch 2, below 30.00, the median of 3 others" in stopper.stops["new"]


def test_flat_curves_that_are_alike_continue_whatever_rounding_does() -> None:
    for miou in (0.1, 31.7, 100 / 3, 2.6315789473684212):
        for num_epochs in range(2, 60):
            stopper = median_stopper()
            for trial in ("one", "two", "three"):
                assert train(stopper, [miou] * num_epochs, short(num_epochs=num_epochs), trial) == num_epochs


def test_decisions_equal_those_of_the_rule_as_it_is_written_down() -> None:
    chance = random.Random(3)
    for _ in range(200):
        others = [[chance.uniform(0, 60) for _ in range(chance.randint(1, 9))] for _ in range(chance.randint(0, 6))]
        own = [chance.uniform(0, 40) for _ in range(10)]
        stopper = stopper_of(MedianRule())
        for number, curve in enumerate(others):
            stopper.add_known(short(num_epochs=10), str(number), curve)
        assert train(stopper, own, short(num_epochs=10)) == as_written(own, others)


def as_written(own: list[float], others: list[list[float]]) -> int:
    for epoch in range(4, 10):
        averages = [statistics.mean(curve[3:epoch]) for curve in others if len(curve) >= epoch]
        if len(averages) >= 3 and max(own[:epoch]) < statistics.median(averages):
            return epoch
    return 10


def test_only_trials_that_have_come_as_far_and_are_as_long_count() -> None:
    stopper = median_stopper([50.0], [50.0])
    stopper.add_known(short(num_epochs=50), "longer", [50.0] * 50)
    assert train(stopper, [1.0] * 5) == 5


def test_a_stopped_trial_still_counts_as_far_as_it_came() -> None:
    stopper = median_stopper([50.0] * 5)
    assert train(stopper, [40.0] * 5, trial="stopped") == 2
    assert train(stopper, [42.0] * 5, trial="next") == 2
    assert "below 45.00, the median of 2 others" in stopper.stops["next"]


def test_a_trial_with_an_epoch_never_reported_counts_only_until_there() -> None:
    stopper = median_stopper()
    for epoch in (1, 2, 4):
        stopper.decide(short(), "gap", epoch=epoch, miou=50.0)
    for epoch in (1, 3, 4):
        assert not stopper.decide(short(), "late", epoch=epoch, miou=1.0)
    assert train(stopper, [1.0] * 5) == 2


# --- both rules -------------------------------------------------------------------------------------------------


def test_rows_that_others_are_measured_against_are_protected() -> None:
    runs = [
        row("r01", expect=Expect(miou=(55, 57))),
        row("r02", expect=Expect(miou=(56, 58), sooner_than="r09")),
        row("r04", expect=Expect(gain=(0.5, 0.5), over="r01")),
        row("r05"),
    ]
    assert protected_rows(runs) == {"r01", "r09"}


def test_every_seed_of_a_protected_row_is_recorded_but_never_stopped() -> None:
    stopper = stopper_of(protected=frozenset({"r01"}))
    assert not decide(stopper, row("r02"), 20, 50.0)
    assert not decide(stopper, row("r01"), 20, 1.0, trial="r01")
    assert not decide(stopper, row("r01", seed=1), 20, 2.0, trial="r01-s1")
    assert "below 2.00, the median of 3 others" in decide(stopper, row("r03"), 20, 1.5)
    median = median_stopper([50.0] * 5, protected=frozenset({"r01"}))
    assert train(median, [1.0] * 5, short("r01"), "r01") == 5
    assert train(median, [20.0] * 5) == 2


@pytest.mark.parametrize("rule", [None, RUNGS, MedianRule(min_peers=1)], ids=str)
def test_a_diverged_trial_stops_at_once_even_a_protected_one_and_is_not_recorded(rule: StoppingRule | None) -> None:
    stopper = stopper_of(rule, protected=frozenset({"r01"}))
    for run, epoch in ((row("r01"), 3), (row("r02"), 20)):
        assert decide(stopper, run, epoch, math.nan, diverged=True).endswith(f"epoch {epoch}")
    assert stopper.to_json()["seen"] == []


def test_without_a_rule_only_divergence_stops() -> None:
    assert survivors(stopper_of(None), [50.0, 1.0]) == [50.0, 1.0]


def test_a_miou_that_is_no_number_is_a_broken_invariant() -> None:
    with pytest.raises(AssertionError, match="trial r02 reported mIoU nan at epoch 7"):
        decide(stopper_of(), row(), 7, math.nan)


@pytest.mark.parametrize("rule", [RUNGS, MedianRule(min_peers=1)], ids=str)
def test_an_epoch_reported_again_is_neither_judged_nor_recorded_again(rule: StoppingRule) -> None:
    stopper = stopper_of(rule)
    for epoch in range(1, 21):
        survivors(stopper, [30.0, 40.0], epoch)
    stopper.add_known(row(), "better", [60.0] * 50)
    before = stopper.to_json()
    assert not decide(stopper, rows(1)[0], 20, 1.0)  # it continued when this came
    assert stopper.to_json() == before


@pytest.mark.parametrize("rule", [RUNGS, MedianRule(min_peers=1)], ids=str)
def test_a_stopped_trial_stays_stopped_wherever_it_resumes(rule: StoppingRule) -> None:
    stopper = stopper_of(rule)
    stopper.add_known(row(), "before", [50.0] * 50)
    decision = decide(stopper, row("r03"), 20, 30.0)
    assert decision
    assert {decide(stopper, row("r03"), epoch, 60.0) for epoch in (19, 20, 21, 40)} == {decision}


def test_known_trials_count_as_peers_as_far_as_they_came_and_stop_no_trial_by_themselves() -> None:
    stopper = stopper_of()
    decide(stopper, row("r02"), 20, 50.0)
    for miou in (1.0, 2.0):
        stopper.add_known(row("r03"), "before/r03", [miou] * 30)
    stopper.add_known(row("r02"), "r02", [99.0] * 30)
    stopper.add_known(row("r05", lovasz_after=35), "before/r05", [50.0] * 39)
    assert stopper.seen == {50: {"r02": {20: 50.0}, "before/r03": {20: 1.0}}}
    assert stopper.stops == {}


def reload(stopper: Stopper) -> Stopper:
    return stopper_of(stopper.rule, protected=stopper.protected).restored(
        json.loads(json.dumps(stopper.to_json(), allow_nan=False))
    )


@pytest.mark.parametrize("rule", [RUNGS, AshaRule(min_peers=1, reduction_factor=3), MedianRule(min_peers=1)], ids=str)
def test_a_stopper_interrupted_at_any_time_decides_like_one_never_interrupted(rule: StoppingRule) -> None:
    chance = random.Random(7)
    runs = [row(f"x{number}", num_epochs=chance.choice([6, 50])) for number in range(12)]
    for _ in range(25):
        straight = stopper_of(rule, protected=frozenset({"x0"}))
        interrupted = reload(straight)
        for _ in range(200):
            run = chance.choice(runs)
            epoch = chance.choice([1, 2, 3, 4, 5, 6, 20, 21, 40])
            miou, diverged = chance.uniform(0, 60), chance.random() < 0.02
            decisions = [decide(stopper, run, epoch, miou, diverged=diverged) for stopper in (straight, interrupted)]
            assert decisions[0] == decisions[1]
            if chance.random() < 0.2:
                interrupted = reload(interrupted)
        assert interrupted == straight
        assert straight.stops


def test_the_state_is_a_copy_and_a_stopper_can_be_pickled() -> None:
    stopper = stopper_of()
    survivors(stopper, [30.0])
    state = stopper.to_json()
    survivors(stopper, [30.0, 20.0])
    assert state == {"seen": [{"num_epochs": 50, "trial": "x000", "miou": {"20": 30.0}}], "stops": {}}
    assert pickle.loads(pickle.dumps(stopper)) == stopper


# --- the forecast -----------------------------------------------------------------------------------------------


def test_the_best_of_two_is_stopped_as_often_as_sheppards_formula_says() -> None:
    # One rung: the best is stopped if it comes second and its rung's score is lower, so P = acos(r) / 2 pi.
    correlations = (0.0, 0.3, 0.7, 0.95)
    seen = forecast(rows(2, num_epochs=6), ITERATIONS_PER_EPOCH, rule=RUNGS, correlations=correlations)
    for correlation in correlations:
        truth = math.acos(correlation) / (2 * math.pi)
        assert seen.best_stopped[correlation] == pytest.approx(truth, abs=0.01)
        assert list(seen.risk_by_row[correlation].values()) == pytest.approx([0, 2 * truth], abs=0.02)
    assert seen.epochs_share_saved == pytest.approx(0.5 * 3 / 12, abs=0.01)
    assert seen.never_stopped == ("x000",)


@pytest.mark.parametrize("count", [2, 4, 9])
def test_one_rung_stops_every_second_trial_after_the_first(count: int) -> None:
    # A score less the median of others alike is symmetric about 0: each but the first falls below it half the time.
    seen = forecast(rows(count, num_epochs=6), ITERATIONS_PER_EPOCH, rule=RUNGS)
    assert seen.epochs_share_saved == pytest.approx((count - 1) / 2 * 3 / (6 * count), abs=0.005)


def test_a_forecast_of_two_rungs_equals_a_brute_force_one() -> None:
    runs = [*rows(6), row("r04", expect=Expect(gain=(0.5, 0.5), over="r01")), row("r01")]
    seen = forecast(runs, ITERATIONS_PER_EPOCH, rule=RUNGS, correlations=[0.6])
    saved, best_stopped, by_row = brute_force(count=len(runs), correlation=0.6, simulations=40_000)
    assert seen.epochs_share_saved == pytest.approx(saved, abs=0.01)
    assert seen.best_stopped[0.6] == pytest.approx(best_stopped, abs=0.01)
    assert list(seen.risk_by_row[0.6].values()) == pytest.approx(by_row, abs=0.04)
    assert seen.never_stopped == ("x000", "r01")


def brute_force(*, count: int, correlation: float, simulations: int) -> tuple[float, float, list[float]]:
    """All searches at once, rungs at 20 and 40 of 50 epochs, the last row protected.

    Returns the share saved, P(best stopped), and the same for each row in searches in which it is best.
    """
    rng = np.random.default_rng(5)
    final = rng.standard_normal((simulations, count))
    noise = rng.standard_normal((2, simulations, count))
    first, second = correlation * final + np.sqrt(1 - correlation**2) * noise
    epochs = np.full((simulations, count), 50)
    for trial in range(1, count - 1):
        epochs[first[:, trial] < np.median(first[:, :trial], axis=1), trial] = 20
        second[epochs[:, trial] == 20, trial] = np.nan  # never gets there
        epochs[second[:, trial] < np.nanmedian(second[:, :trial], axis=1), trial] = 40
    best = final.argmax(axis=1)
    stopped = epochs[np.arange(simulations), best] < 50
    by_row = [float(stopped[best == trial].mean()) for trial in range(count)]
    return 1 - float(epochs.mean()) / 50, float(stopped.mean()), by_row


@pytest.mark.parametrize("rule", [AshaRule(), AshaRule(min_peers=1, reduction_factor=3, first_share=0.1)], ids=str)
def test_simulated_searches_end_as_a_stopper_ends_them(rule: AshaRule) -> None:
    runs = [*RUNS10, *rows(3, num_epochs=20), *RUNS10[:4], *rows(3, num_epochs=20)]
    rungs = [rule.judged_epochs(run, ITERATIONS_PER_EPOCH) for run in runs]
    scores = np.random.default_rng(3).standard_normal((40, len(runs), max(map(len, rungs))))
    ends = simulate_ends(runs, rungs, rule, scores)
    for search, of_search in enumerate(scores.tolist()):
        stopper = stopper_of(rule, protected=protected_rows(runs))
        for trial, run in enumerate(runs):
            at_rungs = zip(rungs[trial], of_search[trial], strict=False)
            stopped = [epoch for epoch, miou in at_rungs if stopper.decide(run, str(trial), epoch=epoch, miou=miou)]
            assert ends[search, trial] == min(stopped, default=run.num_epochs)
    assert len(np.unique(ends)) >= 5


def test_the_poorer_a_rung_predicts_the_end_the_more_often_the_best_is_stopped() -> None:
    correlations = (1.0, 0.9, 0.7, 0.5, 0.3, 0.0)
    stopped = list(forecast(rows(10), ITERATIONS_PER_EPOCH, correlations=correlations).best_stopped.values())
    assert stopped[0] == 0
    assert stopped == sorted(stopped)
    assert stopped[-1] > 0.4


def test_the_ten_rows_do_not_share_the_risk_alike() -> None:
    seen = forecast(RUNS10, 743)
    assert seen.never_stopped == ("r01", "r02", "r03")
    for risks in seen.risk_by_row.values():
        assert [risks[name] for name in seen.never_stopped] == [0, 0, 0]
        assert min(risks, key=lambda name: risks[name] or 1) == "r05"  # its only rung is at epoch 40
    assert "never r01, r02, r03" in seen.bearers


def test_seeds_of_a_row_bear_its_risk_together() -> None:
    seen = forecast([*rows(10), *rows(10)], ITERATIONS_PER_EPOCH, correlations=[0.5])
    assert seen.never_stopped == ()
    assert len(seen.risk_by_row[0.5]) == 10
    assert 0 < seen.risk_by_row[0.5]["x000"] < seen.risk_by_row[0.5]["x003"]  # its first seed is the first of all


def test_the_range_over_rows_is_shown_where_it_is_no_chance() -> None:
    assert "% to " in forecast(rows(10), ITERATIONS_PER_EPOCH).bearers
    assert "%" not in forecast(rows(60), ITERATIONS_PER_EPOCH).bearers


def test_runs_that_are_never_judged_save_nothing_and_lose_nothing() -> None:
    seen = forecast(rows(3, num_epochs=1), ITERATIONS_PER_EPOCH)
    assert (seen.epochs_share_saved, set(seen.best_stopped.values()), seen.bearers) == (0, {0}, "")
    assert "none" in str(seen)
