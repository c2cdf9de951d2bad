"""What a search writes and reads back: what was never measured, and what is damaged."""

import math

from helpers.rows import plain_epoch

from tune_bisenet.records import best_of, measure

DIVERGED = plain_epoch(3, 99.0, loss=math.nan)


def test_a_diverged_epoch_has_no_scores_whatever_it_predicted() -> None:
    for spoilt in ({"loss": math.nan}, {"grad_norm": math.inf}, {"miou": math.nan}):
        epoch = plain_epoch(**({"number": 1, "miou": 99.0} | spoilt))
        assert epoch.diverged
        assert math.isnan(epoch.miou)
        assert math.isnan(epoch.pixel_accuracy)
        assert epoch.iou == (None,)


def test_the_best_epoch_is_the_first_of_highest_miou_among_those_that_did_not_diverge() -> None:
    first, second = plain_epoch(1, 40.0), plain_epoch(2, 40.0)
    assert best_of([first, second, DIVERGED]) is first
    assert best_of([DIVERGED]) is None
    assert best_of([]) is None


def test_a_trial_that_diverged_has_measured_what_it_measured_before() -> None:
    names = ("epochs", "best_miou", "best_epoch", "last_miou", "pixel_accuracy")
    assert [measure([plain_epoch(1, 40.0), DIVERGED])[name] for name in names] == [3, 40.0, 1, None, None]
    assert [measure([plain_epoch(1, 99.0, loss=math.nan)])[name] for name in names] == [1, None, None, None, None]
