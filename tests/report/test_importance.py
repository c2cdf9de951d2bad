"""Which parameters mattered: the one that did is found, and what cannot be told is said."""

import logging
from dataclasses import replace
from pathlib import Path

import pytest
from searches import RANGES, write_study

from tune_bisenet.report.importance import (
    MAX_FANOVA_TRIALS,
    MIN_TRIALS,
    Importance,
    importance_figures,
    importance_view,
    importances,
)
from tune_bisenet.report.read import read_search
from tune_bisenet.report.samples import Sample, samples


@pytest.fixture(scope="module")
def of(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    return samples(read_search(write_study(tmp_path_factory.mktemp("study"), trials=48)))


def by_given(of: list[Sample]) -> dict[str, Importance]:
    return {one.given: one for one in importances(of)}


def test_the_parameter_that_decides_leads_by_both_measures(of: list[Sample]) -> None:
    sgd = by_given(of)["optimizer = sgd"]
    for measure in ("PED-ANOVA", "fANOVA"):
        shares = sgd.shares[measure]
        assert max(shares, key=lambda name: shares[name]) == "sgd_lr"
        assert sum(shares.values()) == pytest.approx(1)


def test_parameters_of_a_choice_are_measured_within_it(of: list[Sample]) -> None:
    found = by_given(of)
    assert list(found) == ["", "optimizer = sgd", "optimizer = adamw"]
    assert set(found["optimizer = sgd"].names) == {"sgd_lr", "sgd_momentum"}
    assert found["optimizer = adamw"].names == ["adamw_lr"]
    assert set(found[""].names) == {"optimizer", "aux_weight", "accumulation", "warmup_iterations"}


def test_only_trials_that_went_to_their_end_count(of: list[Sample]) -> None:
    complete = sum(one.is_complete for one in of)
    assert by_given(of)[""].num_trials == complete < len(of)


def test_a_low_decade_weighs_as_much_as_a_high_one(of: list[Sample]) -> None:
    """An effect at rates under 0.004 alone, which are 3 % of the range but a third of its logarithm."""
    sgd = [one for one in of if "sgd_lr" in one.params and one.is_complete]
    mious = [40.0 if float(one.params["sgd_lr"] or 0) < 0.004 else 50.0 for one in sgd]
    (found,) = importances(
        [replace(one, standing=replace(one.standing, best_miou=miou)) for one, miou in zip(sgd, mious, strict=True)]
    )
    assert found.shares["fANOVA"]["sgd_lr"] > 0.8


def test_the_same_trials_give_the_same_shares(of: list[Sample]) -> None:
    assert importances(of) == importances(of)


def test_a_choice_among_many_trials_tells_what_decides(tmp_path: Path) -> None:
    many = samples(read_search(write_study(tmp_path, trials=MAX_FANOVA_TRIALS + 300)))
    sgd = [one for one in many if "sgd_lr" in one.params and one.is_complete]
    (found,) = importances(sgd)
    assert found.num_trials == len(sgd) > MAX_FANOVA_TRIALS
    assert all(max(shares, key=lambda name: shares[name]) == "sgd_lr" for shares in found.shares.values())
    assert f"fANOVA looks at {MAX_FANOVA_TRIALS} of them" in importance_figures([found])[0].caption


def test_few_trials_are_told_in_a_sentence(of: list[Sample]) -> None:
    few = [one for one in of if one.is_complete][: MIN_TRIALS - 1]
    assert all(one.why_not for one in importances(few))
    assert importance_figures(importances(few)) == []
    view = importance_view(importances(few))
    assert view.rows == ()
    assert f"9 of the {MIN_TRIALS} complete trials" in view.words


def test_equal_values_are_told_in_a_sentence(of: list[Sample]) -> None:
    equal = [replace(one, standing=replace(one.standing, best_miou=50.0)) for one in of if one.is_complete]
    assert "all trials reached the same mIoU" in importance_view(importances(equal)).words


def test_without_a_complete_trial_nothing_is_known() -> None:
    assert "nothing is known" in importance_view(importances([])).words


def test_the_table_warns_that_this_is_no_cause(of: list[Sample]) -> None:
    view = importance_view(importances(of))
    assert "not what caused it" in view.words
    assert {row[0].text for row in view.rows} == set(RANGES)


def test_optuna_announces_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        importances(samples(read_search(write_study(tmp_path))))
    assert not caplog.records
