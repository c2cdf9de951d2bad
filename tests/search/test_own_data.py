"""docs/own-data.md as a person follows it: five classes of one's own, from the first file to the page."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from helpers.pages import blocks, run_lines
from helpers.processes import TIMEOUT_SECONDS
from helpers.searches import make_place
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tune_bisenet.classes import ClassSet
from tune_bisenet.report.read import read_best, read_search
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(2 * TIMEOUT_SECONDS)]

NAMES = ("field", "wood", "water", "road", "roof")

place = pytest.fixture(scope="module")(make_place)


@pytest.fixture(scope="module")
def printed(place: Path) -> list[str]:
    """What the commands of the page print, in their order."""
    (program,), (commands,) = blocks("own-data.md", "python"), blocks("own-data.md", "bash")
    (place / "draw.py").write_text(program)
    return run_lines(["python draw.py", *commands.splitlines()], place)


@pytest.fixture(scope="module")
def search(printed: list[str], place: Path) -> Path:
    assert printed
    return place / "results" / "aerial"


def test_the_page_describes_the_classes_that_it_draws(search: Path) -> None:
    (example,) = map(json.loads, blocks("own-data.md", "json"))
    drawn = json.loads((search.parents[1] / "aerial" / "classes.json").read_text())
    assert ClassSet.model_validate(drawn) == ClassSet.model_validate(example)


def test_the_plan_names_the_classes_and_the_sizes(printed: list[str]) -> None:
    trained = printed[2]
    text = " ".join(trained.split())
    assert "frames have 2 sizes, 80x64 to 64x96" in text
    assert re.search(r"classes training: \w+ \d+ %", text)
    assert all(name in text for name in NAMES)


def test_every_trial_learns_and_counts_five_classes(search: Path) -> None:
    record = read_search(Storage.at(str(search)))
    assert record.classes.names == NAMES
    assert not record.all_notes
    for name, trial in record.trials.items():
        assert trial.state.status == "finished"
        assert all(len(epoch.iou) == 5 for epoch in trial.epochs)
        assert trial.confusions is not None
        assert trial.confusions.shape == (3, 5, 5)
        head = checkpoint.from_bytes((search / name / "best.pt").read_bytes())["model"]["head.1.weight"]
        assert head.shape[0] == 5


def test_validation_counts_each_labelled_pixel_at_the_size_of_its_own_label(search: Path) -> None:
    record = read_search(Storage.at(str(search)))
    labels = sorted((search.parents[1] / "aerial" / "gtFine" / "val").rglob("*.png"))
    numbers = [np.bincount(np.asarray(Image.open(path)).ravel(), minlength=6)[1:6].tolist() for path in labels]
    for trial in record.trials.values():
        assert trial.confusions is not None
        assert trial.confusions.sum(axis=2).tolist() == numbers


def test_page_tables_and_tensorboard_name_the_five_classes(search: Path) -> None:
    page = (search / "report.html").read_text()
    assert all(name in page for name in NAMES)
    assert "motorcycle" not in page
    assert "#be503c" in page, "the colour of roofs"
    lines = list(csv.DictReader((search / "tables" / "iou.csv").read_text().splitlines()))
    assert [line["class"] for line in lines] == 2 * list(NAMES)
    events = EventAccumulator(str(search / "r01"))
    events.Reload()
    tags = {tag for tag in events.Tags()["scalars"] if tag.startswith("iou/")}
    assert tags
    assert tags <= {f"iou/{name}" for name in NAMES}


def test_pictures_of_frames_of_different_sizes_are_kept_at_one(search: Path) -> None:
    best = read_best(Storage.at(str(search)) / "r01")
    paths = sorted((search.parents[1] / "aerial" / "gtFine" / "val").rglob("*.png"))
    assert [np.asarray(Image.open(path)).shape for path in paths] == [(64, 96), (80, 64), (64, 96)], (
        "those of the pictures"
    )
    assert best.labels.shape == best.predictions.shape == (3, 64, 96)
    assert set(np.unique(best.labels).tolist()) <= {*range(5), 255}


def test_the_best_network_scores_and_labels_by_the_five_classes(printed: list[str], search: Path) -> None:
    scored, labelled = printed[4:]
    best = max(
        float(line["best_miou"]) for line in csv.DictReader((search / "leaderboard.csv").read_text().splitlines())
    )
    assert f"{best:.2f}" in scored
    assert all(name in scored for name in NAMES)
    assert "3 files labelled" in labelled
    colours = {tuple(colour) for colour in read_search(Storage.at(str(search))).classes.colours}
    masks = sorted((search.parents[1] / "labelled").rglob("*_mask.png"))
    assert len(masks) == 3
    for mask in masks:
        assert set(map(tuple, np.asarray(Image.open(mask)).reshape(-1, 3).tolist())) <= colours
