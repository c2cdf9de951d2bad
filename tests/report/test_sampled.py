"""What a sampled search found: its samples, the best at fresh seeds, and the plots of its study."""

import itertools
import logging
import math
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
from searches import RANGES, write_search, write_study

from search_spaces.runs10 import SPACE
from tune_bisenet import config
from tune_bisenet.config import OHEM, AdamW, Augment, Run, WarmupPoly
from tune_bisenet.report.figures import MAX_LINES
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.sampled import (
    Sample,
    best_sample,
    fresh_seed_tables,
    samples_of,
    to_python,
)
from tune_bisenet.report.study_plots import (
    BELOW_AXIS,
    MIN_TRIALS,
    distributions_of,
    history,
    importances,
    parallel,
    pareto_front,
    slices,
)
from tune_bisenet.report.tables import Table
from tune_bisenet.report.verdicts import judge_search


def search_of(folder: Path, **options: object) -> SearchRecord:
    return read_search(write_study(folder, **options))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    folder = tmp_path_factory.mktemp("study")
    return samples_of(search_of(folder, trials=48, known=3, latency=True, fresh_seeds=1))


def with_mious(samples: list[Sample], mious: list[float]) -> list[Sample]:
    pairs = zip(samples, mious, strict=True)
    return [replace(sample, state=replace(sample.state, best_miou=miou)) for sample, miou in pairs]


def test_earlier_searches_come_right_before_the_first_trial_and_fresh_seeds_are_no_samples(tmp_path: Path) -> None:
    samples = samples_of(search_of(tmp_path, trials=4, known=3, fresh_seeds=2))
    assert [sample.number for sample in samples] == [0, 1, 2, 3, 4, 5, 6]
    assert [sample.is_known for sample in samples] == [True] * 3 + [False] * 4
    assert samples[0].trial == "earlier/t0000"
    assert samples_of(read_search(write_search(tmp_path / "grid"))) == []


def test_the_best_is_one_that_completed(samples: list[Sample]) -> None:
    best = best_sample(samples)
    assert best
    assert best.miou == max(sample.miou or 0 for sample in samples if sample.is_complete)


def test_a_parameter_has_the_widest_range_and_all_choices(samples: list[Sample]) -> None:
    found = distributions_of(samples)
    assert found.keys() == RANGES.keys()
    assert found["sgd_lr"] == RANGES["sgd_lr"]
    assert found["accumulation"] == RANGES["accumulation"]


def fresh_table(folder: Path, **options: object) -> Table:
    (table,) = fresh_seed_tables(search_of(folder, **options))
    return table


def test_gains_are_paired_by_fresh_seed_without_the_seed_it_was_chosen_by(tmp_path: Path) -> None:
    table = fresh_table(tmp_path, fresh_seeds=3)
    over_r01, over_r02 = table.lines
    low, high = map(float, over_r01["interval"].split(" to "))
    assert low < 0.7 < high
    assert over_r01 == {
        "over": "r01",
        "gain": "+0.70",
        "interval": over_r01["interval"],
        "at each seed": "+0.60, +0.70, +0.80",
        "so it is": "better",
        "remarks": over_r01["remarks"],
    }
    assert (over_r02["over"], over_r02["gain"]) == ("r02", "+0.60")
    assert f"50.70 ± {statistics.stdev([50.6, 50.7, 50.8]):.2f} %" in table.text


def test_one_fresh_seed_or_an_interval_around_zero_decides_nothing(tmp_path: Path) -> None:
    one = fresh_table(tmp_path / "one", fresh_seeds=1).lines[0]
    assert (one["interval"], one["so it is"]) == ("", "open")
    assert fresh_table(tmp_path / "two", fresh_seeds=2, gain_on_fresh=0.25).lines[0]["so it is"] == "open"


@pytest.mark.parametrize(("status", "word"), [("running", "not ended: r01-s3"), ("failed", "left out: r01-s3")])
def test_a_fresh_seed_that_is_missing_is_named(tmp_path: Path, status: str, word: str) -> None:
    search = search_of(tmp_path, fresh_seeds=3)
    record = search.trials["r01-s3"]
    changed = replace(record, state=replace(record.state, status=status))  # type: ignore[arg-type]
    (table,) = fresh_seed_tables(replace(search, trials=search.trials | {"r01-s3": changed}))
    assert word in table.lines[0]["remarks"]
    assert table.lines[0]["so it is"] == "open"  # two seeds are left


def test_a_row_that_was_chosen_is_judged_by_its_fresh_seeds_alone(tmp_path: Path) -> None:
    search = search_of(tmp_path, fresh_seeds=3)
    claims = {claim.run: claim for claim in judge_search(search).claims}
    assert claims.keys() == {"r01", "r02"}
    assert [pair.seed for pair in claims["r02"].pairs] == [1, 2, 3]
    assert [pair.seed for pair in claims["r01"].pairs] == [0, 1, 2, 3]


CHANGED = Run(
    name="changed",
    optimizer=AdamW(lr=0.0012345678901234567, weight_decay=0.0),
    schedule=WarmupPoly(warmup_iterations=7, power=1.1, start_lr=0.0),
    loss=OHEM(aux_weight=0.4, threshold=0.6, lovasz_after=3),
    accumulation=4,
    max_grad_norm=0.5,
    num_epochs=12,
    image_size=(64, 128),
    augment=Augment(flip=0.0),
    decay_norms_and_biases=False,
    seed=3,
)


@pytest.mark.parametrize("run", [*SPACE.runs, CHANGED], ids=lambda run: run.name)
def test_the_source_of_a_run_makes_the_same_run(run: Run) -> None:
    again = eval(to_python(run), {name: getattr(config, name) for name in dir(config)})
    assert again == run
    assert again.fingerprint() == run.fingerprint()


def test_the_history_has_stopped_trials_too_and_the_best_so_far_never_falls(samples: list[Sample]) -> None:
    figure = history(samples)
    assert figure
    points, best_so_far = figure.data
    measured = [sample for sample in samples if sample.miou is not None]
    assert points["x"] == [sample.number for sample in measured]
    symbols = dict(zip(points["x"], points["marker"]["symbol"], strict=True))
    assert (symbols[5], symbols[6], symbols[13]) == ("circle", "x", "circle-open")
    assert all(before <= after for before, after in itertools.pairwise(best_so_far["y"]))
    assert best_so_far["y"][-1] == max(sample.miou or 0 for sample in samples)


def test_an_axis_does_not_bend_to_a_few_far_below(samples: list[Sample]) -> None:
    mious = [50.0, 51.0, 52.0, 53.0, 50.5, 51.5, 52.5, 3.0]
    figure = history(with_mious(samples[:8], mious))
    assert figure
    floor = 50.125 - 1.5 * (52.375 - 50.125)  # from the quartiles
    assert figure.layout["yaxis"]["range"][0] == pytest.approx(floor - 0.06 * (53 - floor))
    assert "1 trial below" in figure.caption


def test_every_parameter_has_a_slice_of_the_trials_that_have_it(samples: list[Sample]) -> None:
    figures = {figure.title: figure for figure in slices(samples)}
    assert figures.keys() == RANGES.keys()
    having = [sample for sample in samples if "sgd_lr" in sample.spec.params and sample.miou is not None]
    (dots,) = figures["sgd_lr"].data
    assert sorted(dots["x"]) == sorted(float(sample.spec.params["sgd_lr"] or 0) for sample in having)
    assert figures["sgd_lr"].layout["xaxis"]["type"] == "log"


def test_parallel_axes_have_every_trial_and_a_place_for_what_does_not_apply(samples: list[Sample]) -> None:
    figure = parallel(samples)
    assert figure
    *lines, _ticks = figure.data
    assert len(lines) == sum(sample.miou is not None for sample in samples)
    axis = figure.layout["xaxis"]["ticktext"].index("adamw_lr")
    without = sum("adamw_lr" not in sample.spec.params for sample in samples if sample.miou is not None)
    assert sum(line["y"][axis] == BELOW_AXIS for line in lines) == without
    assert lines[-1]["y"][-1] == max(line["y"][-1] for line in lines), "the best is drawn on top"
    assert all(0 <= height <= 1 or height == BELOW_AXIS for line in lines for height in line["y"])


def test_of_thousands_of_trials_the_best_are_drawn_without_a_gap(samples: list[Sample]) -> None:
    some = [sample for sample in samples if sample.miou is not None]
    many = [some[number % len(some)] for number in range(1000)]
    figure = parallel(with_mious(many, [float(number) for number in range(1000)]))
    assert figure
    assert len(figure.data) == MAX_LINES + 1
    assert f"{MAX_LINES} of 1000" in figure.caption


def test_the_front_is_what_no_other_beats(samples: list[Sample]) -> None:
    table, figure = pareto_front(samples)
    assert figure
    complete = [sample for sample in samples if sample.is_complete and not sample.is_known]
    points = {sample.trial: (sample.state.latency_ms or math.inf, -(sample.miou or 0)) for sample in complete}
    unbeaten = {
        trial
        for trial, point in points.items()
        if not any(other != point and other[0] <= point[0] and other[1] <= point[1] for other in points.values())
    }
    assert [line["trial"] for line in table.lines] == sorted(unbeaten, key=lambda trial: points[trial])
    assert sum(len(trace["x"]) for trace in figure.data) == len(complete)


def test_without_an_miou_there_are_no_plots() -> None:
    assert (history([]), parallel([]), slices([])) == (None, None, [])
    assert pareto_front([])[1] is None


def test_trials_whose_latency_is_of_another_device_are_not_on_the_front(samples: list[Sample]) -> None:
    first = next(sample.trial for sample in samples if sample.is_complete and not sample.is_known)
    best = next(line["trial"] for line in pareto_front(samples)[0].lines if line["trial"] != first)
    moved = [replace(sample, latency_device="L4") if sample.trial == best else sample for sample in samples]
    table, figure = pareto_front(moved)
    assert figure
    assert best not in [line["trial"] for line in table.lines]
    assert f"{best} (L4)" in table.text
    assert "L4" not in pareto_front(samples)[0].text


def test_the_parameter_that_decides_leads_though_only_some_trials_have_it(samples: list[Sample]) -> None:
    table, figure = importances(samples)
    assert figure
    shares = {line["parameter"]: float(line["share"].removesuffix(" %")) for line in table.lines}
    assert shares.keys() == RANGES.keys()
    assert max(shares, key=lambda name: shares[name]) == "sgd_lr"
    assert sum(shares.values()) == pytest.approx(100, abs=3)
    trials = {line["parameter"]: int(line["trials"]) for line in table.lines}
    assert trials["sgd_lr"] + trials["adamw_lr"] == trials["optimizer"] == sum(one.is_complete for one in samples)
    assert importances(samples)[0] == table


def test_few_trials_or_equal_ones_have_no_importances(samples: list[Sample]) -> None:
    complete = [sample for sample in samples if sample.is_complete]
    few, figure = importances(complete[: MIN_TRIALS - 1])
    assert (few.lines, figure) == ((), None)
    equal, figure = importances(with_mious(complete, [50.0] * len(complete)))
    assert (equal.lines, figure) == ((), None)


def test_optuna_announces_nothing(samples: list[Sample], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        importances(samples)
    assert not caplog.records
