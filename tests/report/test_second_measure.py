"""A second measure, the mean IoU of declared classes: gains are judged by it, too, and both share the error."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from expecting import R01, claim, gaining, row, trial
from searches import write_search

from search_spaces.runs10 import SPACE
from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.config import Expect, Run
from tune_bisenet.report.claims import Claim
from tune_bisenet.report.page import Report
from tune_bisenet.report.power import expected_trials, powers
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.tables import file_tables
from tune_bisenet.report.verdicts import Judgement, format_expected, judge

QUIET = tuple(name for name in CITYSCAPES.names if name not in ("truck", "bus", "train"))


def trained(name: str, seed: int, quiet: float | None, *, loud: float) -> ReportedTrial:
    """Return a finished trial whose 16 quiet classes have this IoU, and the other three the loud one."""
    ious = [quiet if name in QUIET else loud for name in CITYSCAPES.names]
    known = [iou for iou in ious if iou is not None]
    made = trial(name, seed, [sum(known) / len(known)])
    return replace(made, epochs=[replace(epoch, iou=tuple(ious)) for epoch in made.epochs])


def searched(gains: Sequence[float], louds: Sequence[float]) -> list[ReportedTrial]:
    """Return r01 and a row x whose quiet classes gain this over it, at each seed; its loud ones differ."""
    bars = [trained("r01", seed, 55 + seed / 10, loud=50) for seed in range(len(gains))]
    own = [trained("x", seed, 55 + seed / 10 + gain, loud=louds[seed]) for seed, gain in enumerate(gains)]
    return bars + own


def both(judgement: Judgement) -> tuple[Claim, Claim]:
    first, second = (found for found in judgement.claims if found.kind == "gain")
    assert (first.classes, second.classes) == ((), QUIET)
    return first, second


def test_a_gain_that_mious_noise_hides_is_shown_by_the_quiet_classes() -> None:
    first, second = both(judge(gaining(0.5, 1), searched([0.98, 1, 1.02], [30, 60, 50]), second_measure=QUIET))
    assert (first.verdict, second.verdict) == ("open", "kept")
    assert second.estimate == pytest.approx(1)
    assert [pair.reference for pair in second.pairs] == pytest.approx([55, 55.1, 55.2])
    assert first.sample_size is not None
    assert (second.sample_size, second.expected) == (None, first.expected)
    assert second.best_estimate == pytest.approx(1)
    assert [format_expected(found) for found in (first, second)] == [
        "+0.5 to +1 over r01",
        "+0.5 to +1 over r01, mean IoU of 16 classes",
    ]


def test_both_measures_share_the_error() -> None:
    """As if there were two looks: each of them has half of the error, as each measure has."""
    rows = [*gaining(0.5, 1), row("y", Expect(miou=(50, 60), sooner_than="r01"))]
    gains = [0.5, 1, 2, 1.5, 0.7, 1.1, 0.9, 1.3]
    trials = searched(gains, [50 + seed % 3 for seed in range(8)])
    trials += [trained("y", seed, 52 + seed, loud=50) for seed in range(8)]
    shared, alone, halved = (
        judge(rows, trials, second_measure=QUIET),
        judge(rows, trials),
        judge(rows, trials, looks=(8, 12)),
    )
    for kind, run in (("gain", "x"), ("miou", "y"), ("sooner", "y")):
        (found,) = [of for of in shared.claims if (of.kind, of.run, of.classes) == (kind, run, ())]
        assert found.interval == claim(halved, run, kind).interval
        assert found.interval != claim(alone, run, kind).interval


def test_each_measure_has_a_noise_of_its_own() -> None:
    judgement = judge(gaining(0.5, 1), searched([0.5, 1, 1.5], [50, 50, 50]), second_measure=QUIET)
    first, second = both(judgement)
    ratio = 16 / 19  # three classes stand still
    assert first.interval is not None
    assert second.interval is not None
    assert np.ptp(first.interval) == pytest.approx(ratio * np.ptp(second.interval))


def test_levels_and_speed_are_judged_by_miou_alone() -> None:
    claims = judge(SPACE.runs, [], second_measure=QUIET).claims
    assert [found.run for found in claims if found.classes] == ["r04", "r05", "r06", "r07", "r08", "r10"]
    assert len(claims) == len(judge(SPACE.runs, []).claims) + 6


def test_classes_that_no_epoch_has_leave_the_second_claim_open() -> None:
    trials = [trained(name, seed, None, loud=50 + seed) for name in ("r01", "x") for seed in range(3)]
    first, second = both(judge(gaining(0.5, 1), trials, second_measure=QUIET))
    assert (second.pairs, second.verdict, second.best_estimate) == ((), "open", None)
    assert len(first.pairs) == 3


def test_the_forecast_leaves_half_of_the_error_to_the_second_measure() -> None:
    rows: list[Run] = [R01, row("x", Expect(gain=(2, 2), over="r01"))]
    seeds = {run.name: range(8) for run in rows}
    (whole,), (half,) = (powers(rows, seeds, proxy=False, spent=spent) for spent in (1.0, 0.5))
    assert (half.share or 0) < (whole.share or 0) - 0.03
    fewer, more = (expected_trials(rows, (3, 5, 8), proxy=False, spent=spent) for spent in (1.0, 0.1))
    assert fewer is not None
    assert more is not None
    assert fewer.if_kept < more.if_kept


def test_page_and_tables_say_which_measure_is_meant(tmp_path: Path) -> None:
    space = {"title": "Two rows", "baseline": "r01", "measured_share": 0.1, "second_measure": QUIET}
    report = Report.of(write_search(tmp_path, space=space))
    tables = file_tables(report.search, report.judgement)
    assert [line["measure"] for line in tables["verdicts"]] == ["mIoU", "mIoU", "mean IoU of 16 classes"]
    assert [line["measure"] for line in tables["noise"]][:2] == ["mIoU", "mean IoU of 16 classes"]
    report.write(report.search.folder)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "+1 to +3 over r01, mean IoU of 16 classes" in text
    assert "all but truck, bus, train" in text
