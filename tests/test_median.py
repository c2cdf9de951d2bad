"""The median stopping rule: from when on it judges, by whom, and what it keeps over restarts."""

import json
import math
import pickle
import random
import statistics
from functools import partial
from typing import Any

import pytest
from rows import plain_row

from tune_bisenet.config import Run
from tune_bisenet.rungs import Judge, MedianRule, Verdict, first_judged_epoch

JUDGED_FROM = partial(first_judged_epoch, iterations_per_epoch=100)


def row(name: str = "r02", *, num_epochs: int = 5, warmup: int = 0, lovasz_after: int | None = None) -> Run:
    return plain_row(name, num_epochs=num_epochs, warmup=warmup, lovasz_after=lovasz_after)


def rule(*known: list[float], **settings: Any) -> MedianRule:
    """Judges five epochs from the second on, and knows these curves."""
    judge = MedianRule(judged_from=JUDGED_FROM, **({"min_others": 1} | settings))
    for number, curve in enumerate(known):
        judge.know(row(), f"known{number}", curve)
    return judge


def train(judge: Judge, curve: list[float], run: Run | None = None, trial: str = "new") -> int:
    """After how many epochs it ends."""
    run = run or row()
    for epoch, miou in enumerate(curve, start=1):
        if judge.judge(run, trial, epoch=epoch, miou=miou).stop:
            return epoch
    return len(curve)


# --- from when on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run", "epoch"),
    [
        (row(num_epochs=50), 20),
        (row(num_epochs=50, warmup=2001), 21),
        (row(num_epochs=50, lovasz_after=35), 40),
        (row(num_epochs=50, lovasz_after=1), 20),
        (row(num_epochs=1), 1),
    ],
)
def test_nobody_is_judged_before_the_grace_share_nor_during_warmup_nor_just_after_a_loss_switch(
    run: Run, epoch: int
) -> None:
    assert JUDGED_FROM(run) == epoch


def test_another_share_moves_the_first_judged_epoch() -> None:
    assert first_judged_epoch(row(num_epochs=50), iterations_per_epoch=100, first_share=0.1) == 5


def test_a_hopeless_trial_is_stopped_at_the_first_judged_epoch_and_not_at_its_last() -> None:
    assert train(rule([50.0] * 5), [1.0] * 5) == 2
    judge = rule([50.0] * 5)
    assert not judge.judge(row(), "new", epoch=5, miou=1.0).stop
    assert train(rule([50.0] * 5), [1.0] * 5, row(lovasz_after=3)) == 4


# --- the rule ---------------------------------------------------------------------------------------------------


def test_the_best_until_an_epoch_is_held_against_the_median_of_averages_until_it() -> None:
    # averages until epoch 2: 15, 25, 35; until epoch 3: 20, 30, 40
    others = [10.0, 20.0, 30.0], [20.0, 30.0, 40.0], [30.0, 40.0, 50.0]
    assert train(rule(*others), [26.0, 1.0, 1.0]) == 3  # its best, 26, is above 25 but below 30
    judge = rule(*others)
    assert train(judge, [24.9, 1.0, 1.0]) == 2
    assert judge.stops == {
        "new": "best mIoU 24.90 until epoch 2, below 25.00, the median of 3 others' running averages"
    }


def test_the_median_of_an_even_number_lies_in_the_middle_and_one_other_is_called_so() -> None:
    judge = rule([10.0, 20.0], [20.0, 40.0])
    train(judge, [22.0, 22.0])
    assert judge.stops["new"].endswith("below 22.50, the median of 2 others' running averages")
    judge = rule([10.0, 20.0])
    train(judge, [14.0, 14.0])
    assert judge.stops["new"].endswith("below 15.00, the median of 1 other's running average")


def test_flat_curves_that_are_alike_go_on_whatever_rounding_does() -> None:
    for miou in (0.1, 31.7, 100 / 3, 2.6315789473684212):
        for num_epochs in range(2, 60):
            curve = [miou] * num_epochs
            judge = rule(min_others=1)
            for trial in ("one", "two", "three"):
                assert train(judge, curve, row(num_epochs=num_epochs), trial) == num_epochs
            assert judge.stops == {}


def test_verdicts_equal_those_of_the_rule_as_it_is_written_down() -> None:
    chance = random.Random(3)
    for _ in range(200):
        others = [[chance.uniform(0, 60) for _ in range(chance.randint(1, 9))] for _ in range(chance.randint(0, 6))]
        own = [chance.uniform(0, 40) for _ in range(10)]
        judge = MedianRule(judged_from=JUDGED_FROM)
        for number, curve in enumerate(others):
            judge.know(row(num_epochs=10), str(number), curve)
        assert train(judge, own, row(num_epochs=10)) == as_written(own, others)


def as_written(own: list[float], others: list[list[float]]) -> int:
    for epoch in range(4, 10):
        averages = [statistics.mean(curve[:epoch]) for curve in others if len(curve) >= epoch]
        if len(averages) >= 3 and max(own[:epoch]) < statistics.median(averages):
            return epoch
    return 10


def test_nobody_is_held_against_fewer_than_three_others() -> None:
    assert train(MedianRule(judged_from=JUDGED_FROM), [1.0] * 5) == 5
    two, three = [[50.0] * 5] * 2, [[50.0] * 5] * 3
    assert train(rule(*two, min_others=3), [1.0] * 5) == 5
    assert train(rule(*three, min_others=3), [1.0] * 5) == 2


def test_only_those_that_have_come_as_far_and_are_as_long_count() -> None:
    judge = rule([50.0], [50.0])
    judge.know(row(num_epochs=50), "longer", [50.0] * 50)
    assert train(judge, [1.0] * 5) == 5


def test_a_stopped_trial_still_counts_as_far_as_it_came() -> None:
    judge = rule([50.0] * 5)
    assert train(judge, [40.0] * 5, trial="stopped") == 2
    assert train(judge, [42.0] * 5, trial="next") == 2
    assert judge.stops["next"].endswith("below 45.00, the median of 2 others' running averages")


def test_a_spared_row_is_compared_with_but_never_stopped() -> None:
    judge = rule([50.0] * 5, spared=frozenset({"r01"}))
    assert train(judge, [1.0] * 5, row("r01"), "r01") == 5
    assert train(judge, [20.0] * 5) == 2
    assert judge.stops["new"].endswith("below 25.50, the median of 2 others' running averages")


def test_a_diverged_trial_stops_at_once_even_a_spared_one_and_that_epoch_is_not_recorded() -> None:
    judge = rule(spared=frozenset({"r02"}))
    verdict = judge.judge(row(), "new", epoch=1, miou=2.0, diverged=True)
    assert verdict == Verdict(stop=True, reason="the loss was no longer a number at epoch 1")
    assert judge.to_json()["seen"] == []


def test_a_miou_that_is_no_number_is_a_broken_promise() -> None:
    with pytest.raises(AssertionError, match="trial new reported mIoU nan at epoch 1"):
        train(rule(), [math.nan])


# --- restarts ---------------------------------------------------------------------------------------------------


def test_an_epoch_that_is_reported_again_is_neither_judged_nor_recorded_again() -> None:
    judge = rule()
    train(judge, [10.0, 11.0, 12.0])
    judge.know(row(), "better", [50.0] * 5)
    before = judge.to_json()
    assert not judge.judge(row(), "new", epoch=3, miou=1.0).stop  # it went on when this came
    assert judge.to_json() == before
    assert judge.judge(row(), "new", epoch=4, miou=13.0).stop


def test_a_stopped_trial_stays_stopped_wherever_it_resumes() -> None:
    judge = rule([50.0] * 5)
    train(judge, [1.0, 1.0])
    verdicts = {judge.judge(row(), "new", epoch=epoch, miou=99.0) for epoch in (1, 2, 3, 5)}
    assert verdicts == {Verdict(stop=True, reason=judge.stops["new"])}


def test_a_trial_with_an_epoch_unheard_of_counts_only_until_there() -> None:
    judge = rule()
    for epoch in (1, 2, 4):
        judge.judge(row(), "gap", epoch=epoch, miou=50.0)
    for epoch, stops in ((1, False), (3, False), (4, False)):
        assert judge.judge(row(), "late", epoch=epoch, miou=1.0).stop is stops
    assert train(judge, [1.0] * 5) == 2


def test_a_trial_first_heard_of_late_is_judged_by_what_was_heard_of_it() -> None:
    judge = rule([50.0] * 5)
    assert not judge.judge(row(), "well", epoch=3, miou=60.0).stop
    assert judge.judge(row(), "badly", epoch=3, miou=40.0).stop


def test_known_trials_stop_nobody_by_themselves_and_what_was_heard_first_stands() -> None:
    judge = rule()
    train(judge, [1.0, 1.0, 1.0])
    for miou in (50.0, 60.0):
        judge.know(row(), "before/r02", [miou] * 4)
    judge.know(row(), "new", [99.0] * 2)
    judge.know(row(), "empty", [])
    assert judge.stops == {}
    assert judge.to_json()["seen"] == [
        {"num_epochs": 5, "trial": "new", "curve": [1.0, 1.0, 1.0]},
        {"num_epochs": 5, "trial": "before/r02", "curve": [50.0] * 4},
    ]


def reload(judge: MedianRule) -> MedianRule:
    record = json.loads(json.dumps(judge.to_json(), allow_nan=False))
    return MedianRule.from_json(record, judged_from=judge.judged_from, spared=judge.spared, min_others=judge.min_others)


def test_a_judge_interrupted_at_any_time_judges_like_one_never_stopped() -> None:
    chance = random.Random(7)
    runs = [row(f"x{number}", num_epochs=chance.choice([5, 9])) for number in range(12)]
    reasons = set()
    for _ in range(50):
        straight = rule(spared=frozenset({"x0"}))
        interrupted = reload(straight)
        reached = dict.fromkeys(runs, 0)
        for _ in range(100):
            run, miou, diverged = chance.choice(runs), chance.uniform(0, 60), chance.random() < 0.02
            step = chance.choices([0, 1, 2], [10, 89, 1])[0]  # reported again, the next, one unheard of
            epoch = reached[run] = min(max(reached[run] + step, 1), run.num_epochs)
            verdicts = [
                judge.judge(run, run.name, epoch=epoch, miou=miou, diverged=diverged)
                for judge in (straight, interrupted)
            ]
            assert verdicts[0] == verdicts[1]
            if chance.random() < 0.2:
                interrupted = reload(interrupted)
        assert interrupted == straight
        reasons |= {reason.split()[0] for reason in straight.stops.values()}
    assert reasons == {"best", "the"}  # the rule's own, and divergence


def test_the_state_is_small_readable_and_a_copy() -> None:
    judge = rule()
    judge.judge(row(), "r02", epoch=1, miou=30.0)
    judge.judge(row(), "r02", epoch=3, miou=40.0)
    state = judge.to_json()
    judge.judge(row(), "r02", epoch=4, miou=50.0)
    assert state == {"seen": [{"num_epochs": 5, "trial": "r02", "curve": [30.0, None, 40.0]}], "stops": {}}


def test_a_search_begins_with_an_empty_state_and_the_judge_can_be_pickled() -> None:
    judge = MedianRule.from_json({"seen": [], "stops": {}}, judged_from=JUDGED_FROM)
    assert judge == MedianRule(judged_from=JUDGED_FROM)
    train(judge, [30.0])
    copied = pickle.loads(pickle.dumps(judge))
    assert copied.to_json() == judge.to_json()
    assert copied.judged_from(row()) == 2
