"""The plots' numbers: means, bands, differences, shares."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from searches import MIOU, RUNS, best, epochs, write_search, write_trial

from tune_bisenet.data.classes import CLASSES, VOID
from tune_bisenet.records import BEST_PREDICTIONS, predictions_to_bytes
from tune_bisenet.report.figures import BASELINE_COLOUR, Trace, curves, row_colours
from tune_bisenet.report.heatmaps import confusion_matrix, iou_heatmap
from tune_bisenet.report.pictures import LEGEND, WIDTH, gallery
from tune_bisenet.report.read import SearchRecord, read_search


@pytest.fixture
def search(tmp_path: Path) -> SearchRecord:
    return read_search(write_search(tmp_path))


def traces(search: SearchRecord, figure: str) -> dict[str, Trace]:
    (found,) = (one for one in curves(search) if one.name == figure)
    return {trace["name"]: trace for trace in found.data}


def test_seeds_are_a_mean_within_a_band(search: SearchRecord) -> None:
    drawn = traces(search, "miou")
    assert (drawn["r02"]["x"], drawn["r02"]["y"]) == ([1, 2, 3], [32.75, 42.75, 52.75])
    band = drawn["r02, lowest to highest seed"]
    assert band["x"] == [1, 2, 3, 3, 2, 1]
    assert band["y"] == [33.5, 43.5, 53.5, 52.0, 42.0, 32.0]


def test_seeds_that_agree_have_no_band(search: SearchRecord) -> None:
    assert list(traces(search, "lr")) == ["r01", "r02"]


def test_gains_are_paired_by_seed_and_epoch(search: SearchRecord) -> None:
    drawn = traces(search, "gain")
    assert drawn["r02"]["y"] == [2.25, 2.25, 2.25]
    assert drawn["r02"]["customdata"][0][:2] == [2.0, 2.5]
    assert "r01" not in drawn


def test_what_is_no_number_is_not_drawn(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    broken = [*epochs(52)[:2], replace(epochs(52)[2], loss=math.nan, grad_norm=math.inf)]
    write_trial(folder / "r02-s0", broken)
    write_trial(folder / "r02-s1", broken)
    assert traces(read_search(folder), "loss")["r02"]["x"] == [1, 2]


def test_without_epochs_there_are_no_curves(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    for name in RUNS:
        write_trial(folder / name, [])
    search = read_search(folder)
    assert curves(search) == []
    assert iou_heatmap(search) is None


def test_the_baseline_is_grey_and_rows_keep_their_colours(search: SearchRecord) -> None:
    colours = row_colours(search)
    assert colours["r01"] == BASELINE_COLOUR != colours["r02"]
    for figure in ("miou", "loss", "lr"):
        assert traces(search, figure)["r02"]["line"]["color"] == colours["r02"]


def test_the_heat_map_shows_points_against_the_baseline(search: SearchRecord) -> None:
    figure = iou_heatmap(search)
    assert figure
    (heat,) = figure.data
    assert (heat["y"], heat["z"]) == (["r02"], [[2.25] * 18 + [None]])
    assert heat["customdata"][0][0] == ("52.8 %", "50.5 %")
    assert heat["customdata"][0][-1] == ("does not occur", "does not occur")
    assert figure.layout["coloraxis"]["cmin"] == -figure.layout["coloraxis"]["cmax"]


def test_the_confusion_matrix_is_the_best_trials_and_each_line_is_a_hundred_percent(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    counts = best().confusions.copy()
    counts[:, 5] = 0  # a class without a pixel
    (folder / "r02-s1").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), confusions=counts)))
    figure = confusion_matrix(read_search(folder))
    assert figure
    assert figure.title.endswith("r02-s1")
    (heat,) = figure.data
    assert heat["z"][0][:3] == [25.0, 75.0, 0.0]  # 10 of 40 pixels right, 30 taken for the next class
    assert heat["z"][5] == [None] * 19
    assert heat["customdata"][0][1] == 60  # over both images


# --- pictures -------------------------------------------------------------------------------------------------------


def test_pictures_have_a_bounded_size(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    large = replace(best(), images=np.zeros((2, 3, 1024, 2048), np.uint8))
    for name in RUNS:
        (folder / name).write(BEST_PREDICTIONS, predictions_to_bytes(large))
    shown = gallery(read_search(folder))
    assert {(panel.width, panel.height) for _, panels in shown.frames for panel in panels} == {(WIDTH, WIDTH // 2)}


def test_the_baseline_comes_before_the_best(search: SearchRecord) -> None:
    (_, panels), *_ = gallery(search).frames
    assert [panel.title.split(",")[0].split(":")[0] for panel in panels] == ["image", "label", "r01-s1", "r02-s1"]
    assert MIOU["r02-s1"] > MIOU["r02-s0"]


def test_a_frame_that_one_trial_lacks_is_shown_without_it(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    (folder / "r02-s1").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), names=("street one", "another"))))
    first, second = gallery(read_search(folder)).frames
    assert (len(first[1]), len(second[1])) == (4, 3)


def test_the_legend_has_every_class_and_void() -> None:
    assert [name for name, _ in LEGEND] == [*(one.name for one in CLASSES), "not scored"]
    assert LEGEND[0] == ("road", "#804080")
    assert VOID == 255
