"""A model scores what its search says, and what Cityscapes' own evaluator says of the predictions it writes."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from winners import STREETS

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.data.packing import resize_image
from tune_bisenet.inference.evaluate import LabelledSplit, evaluate, main, open_split
from tune_bisenet.inference.model import load
from tune_bisenet.options import InputError
from tune_bisenet.training import metrics
from tune_bisenet.training.model import upsample

VAL = LabelledSplit(STREETS.names("val"), lambda index: STREETS.load("val", index), CITYSCAPES)


@pytest.mark.parametrize("run", ["r01", "r02"])
def test_a_search_scores_what_it_says_to_the_last_digit(search: Path, run: str) -> None:
    model = load(search, run=run)
    found = evaluate(model, VAL)
    assert found.miou == model.card.miou
    assert tuple(found.iou) == model.card.iou


def test_cityscapes_own_evaluator_scores_the_predictions_the_same(
    search: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "predictions"
    found = evaluate(load(search), open_split(str(frames), "val"), predictions=out)
    monkeypatch.setenv("CITYSCAPES_DATASET", str(frames))
    from cityscapesscripts.evaluation import evalPixelLevelSemanticLabeling as referee  # noqa: N813

    referee.args.evalInstLevelScore = False
    referee.args.quiet = True
    referee.args.JSONOutput = False
    labels = sorted((frames / "gtFine" / "val").rglob("*_labelIds.png"))
    referee.args.predictionPath, referee.args.predictionWalk = str(out), None
    predictions = [referee.getPrediction(referee.args, str(label)) for label in labels]
    result = referee.evaluateImgLists(predictions, [str(label) for label in labels], referee.args)
    assert found.miou == pytest.approx(100 * result["averageScoreClasses"], abs=0.01)


def test_several_scales_and_mirror_images_are_averaged(search: Path) -> None:
    """By hand for one frame: the class of the highest mean probability."""
    model = load(search)
    frame = STREETS.load("val", 3)
    one = LabelledSplit(["one"], lambda _index: frame, CITYSCAPES)
    sums = torch.zeros((1, 19, 96, 192))
    for size in ((32, 64), (64, 128)):
        image = torch.from_numpy(resize_image(frame.image, size))[None]
        for scores in (model.network(image), model.network(image.flip(3)).flip(3)):
            sums += upsample(scores, (96, 192)).softmax(dim=1)
    by_hand = metrics.confusion(sums.argmax(dim=1).to(torch.uint8), torch.from_numpy(frame.label)[None], 19)[0]
    assert torch.equal(evaluate(model, one, scales=(0.5, 1.0), flip=True).confusion, by_hand)
    assert not torch.equal(evaluate(model, one).confusion, by_hand)


def test_a_test_split_without_labels_gives_predictions_alone(
    search: Path, frames: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(load(search), open_split(str(frames), "test"))
    assert math.isnan(found.miou)
    flags = [str(search), "--data", str(frames), "--split", "test"]
    assert main(flags) == 2
    assert "no pixel of the test split" in capsys.readouterr().err
    assert main([*flags, "--predictions", str(tmp_path / "out")]) == 0
    (written,) = (tmp_path / "out").rglob("*.png")
    with Image.open(written) as picture:
        assert set(np.unique(np.asarray(picture))) <= {entry.id for entry in CITYSCAPES.classes}


def test_the_command_prints_each_class_and_what_the_search_scored(
    search: Path, frames: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(search), "--run", "r01", "--data", str(frames)]) == 0
    printed = capsys.readouterr().out
    card = load(search, run="r01").card
    assert f"mIoU {card.miou:.2f} %" in printed
    assert f"its search scored {card.miou:.2f} % at epoch {card.epoch}" in printed
    assert all(name in printed for name in CITYSCAPES.names)


def test_the_streets_have_no_test_split() -> None:
    with pytest.raises(InputError, match="Give val"):
        open_split("streets", "test")


@pytest.mark.parametrize("scales", ["", "0", "1,x", "9"])
def test_scales_are_checked(search: Path, scales: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([str(search), "--scales", scales])
    assert "give factors from 0.1 to 4" in capsys.readouterr().err
