"""Rows that are the same training until a loss switches, and what is said where they part."""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from expecting import epoch, gaining, trial
from helpers.rows import plain_row

from tune_bisenet.records import Beginning, Environment, TrialSpec
from tune_bisenet.report.pairing import environment_differences, mixed_pairs, shared_pairs, unequal_pairs
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.verdicts import judge

ONE_THREAD = Environment(threads=1, device="CPU", torch="2.15.0", numpy="2.4.6", python="3.11.7")
TWO_THREADS = replace(ONE_THREAD, threads=2)
GPU = replace(ONE_THREAD, device="H200", cuda="12.8")
MIOUS = [10.0, 20.0, 30.0, 40.0]


def trained(
    name: str,
    mious: Sequence[float] = MIOUS,
    *,
    seed: int = 0,
    switch: int | None = None,
    environments: tuple[Environment, ...] = (),
    **changes: object,
) -> ReportedTrial:
    run = plain_row(name, lovasz_after=switch, num_epochs=4, seed=seed, **changes)
    spec = TrialSpec(trial=f"{name}-s{seed}", run=run)
    return replace(trial(name, seed, mious), spec=spec, environments=environments)


def test_rows_that_differ_in_the_switch_alone_are_equal_until_it() -> None:
    assert unequal_pairs([trained("r01"), trained("r05", [10, 20, 31, 41], switch=2)]) == []
    (sentence,) = unequal_pairs([trained("r01"), trained("r05", [10, 21, 31, 41], switch=2)])
    assert sentence.startswith("r05-s0 must equal r01-s0 until epoch 2, but parts at epoch 2 (21.00 against 20.00 %)")


def test_the_earlier_of_two_switches_counts() -> None:
    assert unequal_pairs([trained("a", switch=1), trained("b", [10, 21, 31, 41], switch=3)]) == []
    assert unequal_pairs([trained("a", switch=2), trained("b", [10, 21, 31, 41], switch=3)])


def test_rows_without_any_difference_are_equal_to_the_last_epoch() -> None:
    assert unequal_pairs([trained("r01"), trained("same")]) == []
    (sentence,) = unequal_pairs([trained("r01"), trained("same", [10, 20, 30, 40.001])])
    assert "until epoch 4" in sentence
    assert "by less than 0.01 points" in sentence


@pytest.mark.parametrize("other", [{"seed": 1}, {"stream": 1}, {"accumulation": 2}, {"lr": 0.02}])
def test_other_rows_and_other_seeds_may_differ(other: dict[str, int]) -> None:
    assert unequal_pairs([trained("r01"), trained("x", [11, 21, 31, 41], **other)]) == []  # type: ignore[arg-type]


def test_a_loss_that_differs_is_seen_at_equal_miou() -> None:
    own = trained("same")
    other = replace(own, epochs=[replace(own.epochs[0], loss=2.0), *own.epochs[1:]])
    assert "at epoch 1" in unequal_pairs([trained("r01"), other])[0]


def test_trials_are_compared_as_far_as_both_came_and_where_both_diverged() -> None:
    assert unequal_pairs([trained("r01"), trained("same", [10, 20])]) == []
    diverged = [epoch(1, 10), epoch(2, math.nan, diverged=True)]
    assert unequal_pairs([replace(trained(name), epochs=diverged) for name in ("r01", "same")]) == []


@pytest.mark.parametrize(
    ("environments", "reason"),
    [
        ((TWO_THREADS, ONE_THREAD), "trained with 2 threads against 1 thread."),
        ((replace(GPU, torch="2.16.0"), GPU), "trained with torch 2.16.0, CUDA 12.8 against torch 2.15.0, CUDA 12.8."),
        ((GPU, GPU), "usual on GPUs"),
        ((ONE_THREAD, ONE_THREAD), "noise of their seed."),
    ],
)
def test_the_reason_is_said_where_the_environments_show_it(
    environments: tuple[Environment, Environment], reason: str
) -> None:
    own, bar = environments
    parted = trained("r05", [11, 21, 31, 41], switch=2, environments=(own,))
    (sentence,) = unequal_pairs([trained("r01", environments=(bar,)), parted])
    assert reason in sentence
    assert ("GPU" in sentence) == (own == bar == GPU)


def test_a_resumed_trial_is_compared_by_all_that_trained_it() -> None:
    resumed, other = (
        trained("a", environments=(ONE_THREAD, TWO_THREADS)),
        trained("b", environments=(ONE_THREAD,)),
    )
    assert environment_differences(resumed, other) == "1 thread and 2 threads against 1 thread"
    assert environment_differences(resumed, resumed) == environment_differences(resumed, trained("b")) == ""


def test_compared_trials_that_were_trained_differently_are_named() -> None:
    environments = {0: (TWO_THREADS,), 1: (ONE_THREAD,), 2: ()}
    trials = [
        replace(trial(name, seed, [50, 60]), environments=environments[seed] if name == "x" else (ONE_THREAD,))
        for name in ("r01", "x")
        for seed in environments
    ]
    claims = judge(gaining(1, 2), trials).claims
    (sentence,) = mixed_pairs(claims, trials)
    assert sentence == "Compared, but trained with 2 threads against 1 thread: x-s0 and r01-s0."


def test_pairs_of_which_one_took_over_epochs_of_the_other_are_named_with_their_seeds() -> None:
    seeds = (0, 1)
    r01 = [trained("r01", seed=seed) for seed in seeds]
    r05 = [
        replace(trained("r05", switch=2, seed=seed), beginning=Beginning(trial=f"r01-s{seed}", epochs=2))
        for seed in seeds
    ]
    (sentence,) = shared_pairs([*r01, *r05, trained("r05", switch=2, seed=2)])
    assert sentence.startswith("r05 took over epochs 1 to 2 of r01 (seed 0, 1)")
    assert shared_pairs(r01) == []
