"""The plots' numbers: means, bands, differences, shares, intervals; and the pictures."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from searches import MIOU, RUNS, best, epochs, write_search, write_study, write_trial

from tune_bisenet.records import BEST_PREDICTIONS, predictions_to_bytes
from tune_bisenet.report.figures import (
    BASELINE_COLOUR,
    MAX_LINES,
    OTHERS,
    PICTURE_WIDTH,
    Figure,
    Trace,
    confusion_matrix,
    curves,
    gallery,
    intervals,
    iou_heatmap,
    row_colours,
    thinned,
)
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.verdicts import judge_search


@pytest.fixture
def search(tmp_path: Path) -> SearchRecord:
    return read_search(write_search(tmp_path))


def figure_named(search: SearchRecord, name: str) -> Figure:
    (found,) = [figure for figure in curves(search) if figure.name == name]
    return found


def traces(search: SearchRecord, name: str) -> dict[str, Trace]:
    return {trace["name"]: trace for trace in figure_named(search, name).data}


def test_seeds_are_a_mean_within_a_band(search: SearchRecord) -> None:
    drawn = traces(search, "miou")
    assert (drawn["r02"]["x"], drawn["r02"]["y"]) == ([1, 2, 3], [32.75, 42.75, 52.75])
    band = drawn["r02, lowest to highest seed"]
    assert band["x"] == [1, 2, 3, 3, 2, 1]
    assert band["y"] == [33.5, 43.5, 53.5, 52.0, 42.0, 32.0]
    assert list(traces(search, "lr")) == ["r01", "r02"], "seeds that agree have no band"


def test_gains_are_paired_by_seed_and_epoch(search: SearchRecord) -> None:
    drawn = traces(search, "gain")
    assert drawn["r02"]["y"] == [2.25, 2.25, 2.25]
    assert drawn["r02"]["customdata"][0][:2] == [2.0, 2.5]
    assert "r01" not in drawn


def test_what_is_no_number_is_not_drawn(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    broken = [*epochs(52)[:2], replace(epochs(52)[2], loss=math.nan, grad_norm=math.inf)]
    for seed in (0, 1):
        write_trial(folder, f"r02-s{seed}", broken)
    assert traces(read_search(folder), "loss")["r02"]["x"] == [1, 2]


def test_without_epochs_there_are_no_curves(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    for name in RUNS:
        write_trial(folder, name, [])
    search = read_search(folder)
    assert curves(search) == []
    assert iou_heatmap(search) is None


def test_the_baseline_is_grey_and_rows_keep_their_colours(search: SearchRecord) -> None:
    colours = row_colours(search)
    assert colours["r01"] == BASELINE_COLOUR != colours["r02"]
    assert {traces(search, name)["r02"]["line"]["color"] for name in ("miou", "loss", "lr")} == {colours["r02"]}


def test_rows_that_do_not_stand_out_are_muted_together(tmp_path: Path) -> None:
    search = read_search(write_study(tmp_path))
    metas = {trace["meta"] for trace in figure_named(search, "miou").data}
    assert OTHERS in metas
    assert metas == row_colours(search).keys()


@pytest.mark.parametrize("count", [1, MAX_LINES, MAX_LINES + 1, 1000])
def test_too_many_are_thinned_evenly_and_the_last_is_kept(count: int) -> None:
    kept = thinned(range(count), MAX_LINES)
    assert len(kept) == min(count, MAX_LINES)
    assert kept[-1] == count - 1
    steps = np.diff(kept)
    assert not len(steps) or steps.max() - steps.min() <= 1


def test_intervals_stand_over_what_was_expected(search: SearchRecord) -> None:
    gain, level = intervals(judge_search(search))
    expected, estimate = gain.data
    assert expected["x"] == [1, 3]
    assert (estimate["y"], estimate["x"]) == (["r02"], [pytest.approx(2.25)])
    # sd sqrt(1/8), t(1 - 0.001 / 4, 1 df)
    assert estimate["error_x"]["array"] == [pytest.approx(0.25 * 1273.24, rel=1e-4)]
    low, high = gain.layout["xaxis"]["range"]
    assert low < 0 < 3 < high
    assert high - low < 12, "a huge interval does not press the rest flat"
    assert level.data[-1]["y"] == ["r01"]


def test_the_heat_map_shows_points_against_the_baseline(search: SearchRecord) -> None:
    figure = iou_heatmap(search)
    assert figure
    (heat,) = figure.data
    assert (heat["y"], heat["z"]) == (["r02"], [[2.25] * 18 + [None]])
    assert figure.layout["coloraxis"]["cmin"] == -figure.layout["coloraxis"]["cmax"]


def test_the_confusion_matrix_is_the_best_trials_and_each_line_is_a_hundred_percent(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    counts = best().confusions.copy()
    counts[:, 5] = 0  # a class without a pixel
    (folder / "r02-s1").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), confusions=counts)))
    figure = confusion_matrix(read_search(folder))
    assert figure
    assert "r02-s1" in figure.title
    (heat,) = figure.data
    assert heat["z"][0][:3] == [25.0, 75.0, 0.0]  # 10 of 40 pixels right, 30 taken for the next class
    assert heat["z"][5] == [None] * 19
    assert heat["customdata"][0][1] == 60  # over both images


def test_pictures_have_a_bounded_size_and_the_baseline_comes_first(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    large = predictions_to_bytes(replace(best(), images=np.zeros((2, 3, 1024, 2048), np.uint8)))
    for name in RUNS:
        (folder / name).write(BEST_PREDICTIONS, large)
    shown, notes = gallery(read_search(folder))
    assert notes == []
    assert {(one.width, one.height) for panels in shown.values() for one in panels} == {
        (PICTURE_WIDTH, PICTURE_WIDTH // 2)
    }
    panels = next(iter(shown.values()))
    assert [panel.title.split(",")[0].split(":")[0] for panel in panels] == ["image", "label", "r01-s1", "r02-s1"]
    assert MIOU["r02-s1"] > MIOU["r02-s0"]


def test_a_frame_that_one_trial_lacks_is_shown_without_it(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    fewer = replace(best(), names=("street one", "another"))
    (folder / "r02-s1").write(BEST_PREDICTIONS, predictions_to_bytes(fewer))
    shown, _ = gallery(read_search(folder))
    assert [len(panels) for panels in shown.values()] == [4, 3]
