"""The plots of a study: history, parallel axes, slices, and the front of two goals."""

import itertools
import json
import random
from pathlib import Path

import pytest
from searches import write_study

from tune_bisenet.report.figures import OTHERS, curves, row_colours
from tune_bisenet.report.front import front, front_figure, front_view, pareto
from tune_bisenet.report.history import history
from tune_bisenet.report.landscape import NOT_THERE, measured, parallel, slices
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.samples import MAX_LINES, Sample, samples, thinned


@pytest.fixture(scope="module")
def search(tmp_path_factory: pytest.TempPathFactory) -> SearchRecord:
    place = tmp_path_factory.mktemp("study")
    return read_search(write_study(place, known=3, latency=True, fresh_seeds=1))


@pytest.fixture(scope="module")
def of(search: SearchRecord) -> list[Sample]:
    return samples(search)


# --- history --------------------------------------------------------------------------------------------------------


def test_the_history_tells_states_by_symbols_and_sets_earlier_searches_apart(of: list[Sample]) -> None:
    figure = history(of)
    assert figure
    traces = {trace["name"].split(",")[0]: trace for trace in figure.data}
    assert list(traces) == ["best declared row", "best so far", "earlier searches", "sampled", "declared rows"]
    assert (traces["earlier searches"]["x"], traces["declared rows"]["x"]) == ([0, 1, 2], [3, 4])
    symbols = dict(zip(traces["sampled"]["x"], traces["sampled"]["marker"]["symbol"], strict=True))
    assert (symbols[5], symbols[6], symbols[8], symbols[13]) == ("circle", "x", "triangle-down-open", "circle-open")


def test_the_best_so_far_never_falls(of: list[Sample]) -> None:
    figure = history(of)
    assert figure
    best = next(trace["y"] for trace in figure.data if trace["name"] == "best so far")
    assert all(before <= after for before, after in itertools.pairwise(best))
    assert best[-1] == round(max(one.miou or 0 for one in of), 3)


def test_without_an_miou_there_are_no_plots(of: list[Sample]) -> None:
    assert (history([]), parallel([]), slices([])) == (None, None, [])
    failed = [one for one in of if one.standing.status == "failed"]
    assert (history(failed), parallel(failed), slices(failed)) == (None, None, [])


# --- the parameters -------------------------------------------------------------------------------------------------


def test_parallel_axes_have_a_line_for_each_trial_the_best_on_top(of: list[Sample]) -> None:
    figure = parallel(of)
    assert figure
    *lines, ticks = figure.data
    assert len(lines) == sum(one.miou is not None for one in of)
    assert lines[-1]["y"][-1] == 1.0
    assert figure.layout["xaxis"]["ticktext"][-1] == "best mIoU in %"
    assert ticks["mode"] == "text"


def test_a_parameter_that_does_not_apply_lies_below_its_axis(of: list[Sample]) -> None:
    figure = parallel(of)
    assert figure
    *lines, ticks = figure.data
    axis = figure.layout["xaxis"]["ticktext"].index("adamw_lr")
    heights = {line["y"][axis] for line in lines}
    assert NOT_THERE in heights
    assert all(0 <= place <= 1 for place in heights - {NOT_THERE})
    words = {text.strip() for text, place in zip(ticks["text"], ticks["x"], strict=True) if place == axis}
    assert words == {"–", "0.0001", "0.001", "0.01"}


def test_each_parameter_has_a_slice_of_the_trials_that_have_it(of: list[Sample]) -> None:
    found = {figure.title: figure for figure in slices(of)}
    assert len(found) == 7
    having = [one for one in of if "sgd_lr" in one.params and one.miou is not None]
    assert found["sgd_lr"].data[0]["x"] == [one.params["sgd_lr"] for one in having]
    assert found["sgd_lr"].layout["xaxis"]["type"] == "log"
    assert found["optimizer"].layout["xaxis"]["ticktext"] == ["sgd", "adamw"]
    assert len({json.dumps(figure.layout["yaxis"]) for figure in found.values()}) == 1


# --- two goals ------------------------------------------------------------------------------------------------------


def test_the_front_against_brute_force() -> None:
    rng = random.Random(0)
    for _ in range(50):
        points = [(float(rng.randint(0, 9)), float(rng.randint(0, 9))) for _ in range(rng.randint(0, 20))]
        beaten = {
            index
            for index, (cost, gain) in enumerate(points)
            if any(c <= cost and g >= gain and (c, g) != (cost, gain) for c, g in points)
        }
        assert set(pareto(points)) == set(range(len(points))) - beaten


def test_the_front_goes_from_the_fastest_to_the_best(of: list[Sample]) -> None:
    found = front(of)
    assert [one.standing.latency_ms for one in found] == sorted(one.standing.latency_ms or 0 for one in found)
    assert [one.miou for one in found] == sorted(one.miou or 0 for one in found)
    assert not any(one.is_known for one in found)
    assert [row[0].text for row in front_view(of).rows] == [one.trial for one in found]
    figure = front_figure(of)
    assert figure
    assert figure.data[0]["y"] == [one.miou for one in found]


def test_without_a_latency_there_is_no_front(tmp_path: Path) -> None:
    of = samples(read_search(write_study(tmp_path)))
    assert front_figure(of) is None
    assert front_view(of).rows == ()


# --- curves ---------------------------------------------------------------------------------------------------------


def test_curves_of_many_trials_stand_back_behind_the_best(search: SearchRecord) -> None:
    colours = row_colours(search)
    assert list(colours)[-1] == OTHERS
    miou = curves(search)[0]
    muted = [trace for trace in miou.data if trace["meta"] == OTHERS]
    assert miou.data[: len(muted)] == muted
    assert len(muted) > 10
    assert {trace["meta"] for trace in miou.data} == set(colours)


# --- a search of many -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> SearchRecord:
    return read_search(write_study(tmp_path_factory.mktemp("many"), trials=MAX_LINES + 80))


def test_of_many_trials_a_picture_is_drawn_and_says_of_how_many(many: SearchRecord) -> None:
    of = samples(many)
    drawn, whole = parallel(of), measured(of)
    assert drawn is not None
    assert len(drawn.data) - 1 == MAX_LINES
    assert whole[-1].trial in drawn.data[-2]["text"][0]  # the best, on top
    assert f"{MAX_LINES} of {len(whole)} trials" in drawn.caption
    miou = curves(many)[0]
    muted = [trace for trace in miou.data if trace["meta"] == OTHERS]
    assert len(muted) == MAX_LINES
    assert f"{MAX_LINES} are drawn" in miou.caption


def test_a_choice_among_many_is_even_and_has_the_last() -> None:
    assert thinned(range(10), 20) == list(range(10))
    assert thinned(range(10), 5) == [1, 3, 5, 7, 9]
    assert thinned(range(1000), 3)[-1] == 999
