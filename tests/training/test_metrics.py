"""Scores against a literal count and against cityscapesScripts, the referee."""

import importlib
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from tune_bisenet.classes import CITYSCAPES, MAX_CLASSES, VOID
from tune_bisenet.data.streets import Streets
from tune_bisenet.training import metrics
from tune_bisenet.training.metrics import confusion, iou_per_class, mean_iou, pixel_accuracy

CAR = CITYSCAPES.names.index("car")


def random_ids(*shape: int, classes: int = len(CITYSCAPES), void_share: float = 0.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(classes, shape, generator=generator, dtype=torch.uint8)
    return ids.masked_fill(torch.rand(shape, generator=generator) < void_share, VOID)


def matrix_of(entries: dict[tuple[int, int], int]) -> Tensor:
    """Return a confusion matrix with these counts at (label, prediction)."""
    matrix = torch.zeros(len(CITYSCAPES), len(CITYSCAPES), dtype=torch.int64)
    for place, count in entries.items():
        matrix[place] = count
    return matrix


def test_the_confusion_matrix_counts_each_labelled_pixel_of_each_image_once() -> None:
    labels, predictions = random_ids(3, 9, 7, void_share=0.2), random_ids(3, 9, 7, seed=1)
    literal = np.zeros((3, len(CITYSCAPES), len(CITYSCAPES)), np.int64)
    for image in range(3):
        pairs = zip(labels[image].flatten().tolist(), predictions[image].flatten().tolist(), strict=True)
        for label, prediction in pairs:
            if label != VOID:
                literal[image, label, prediction] += 1
    found = confusion(predictions, labels, len(CITYSCAPES))
    assert found.dtype == torch.int64
    assert found.tolist() == literal.tolist()


def test_counting_by_scattering_as_on_a_gpu_gives_the_same() -> None:
    codes = torch.randint(90, (1000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    counts = metrics._histogram_by_scattering(codes, 100)
    assert counts.dtype == torch.int64
    assert torch.equal(counts, metrics.histogram(codes, 100))


def test_predictions_at_void_pixels_change_nothing() -> None:
    labels, predictions = random_ids(2, 9, 7, void_share=0.5), random_ids(2, 9, 7, seed=1)
    others = predictions.where(labels != VOID, random_ids(2, 9, 7, seed=2))
    assert not torch.equal(predictions, others)
    assert torch.equal(confusion(predictions, labels, len(CITYSCAPES)), confusion(others, labels, len(CITYSCAPES)))


def test_an_image_of_nothing_but_void_counts_for_nothing() -> None:
    labels = torch.full((1, 4, 4), VOID, dtype=torch.uint8)
    matrix = confusion(torch.zeros_like(labels), labels, len(CITYSCAPES))[0]
    assert not matrix.any()
    assert iou_per_class(matrix) == [None] * len(CITYSCAPES)
    assert math.isnan(mean_iou(iou_per_class(matrix)))
    assert math.isnan(pixel_accuracy(matrix))


def test_counts_and_iou_stay_exact_beyond_what_float32_can_hold() -> None:
    side, many = 4099, 2**33 + 1  # 4099 ** 2 is odd and larger than 2 ** 24
    image = torch.full((1, side, side), 5, dtype=torch.uint8)
    assert side**2 > 2**24
    assert confusion(image, image, len(CITYSCAPES))[0, 5, 5].item() == side**2
    iou = iou_per_class(matrix_of({(0, 0): many, (0, 1): 1, (1, 1): 1}))
    assert iou[0] == pytest.approx(100 * many / (many + 1), abs=1e-12)
    assert iou[1] == 50.0


def test_iou_of_two_classes_by_hand() -> None:
    matrix = matrix_of({(0, 0): 6, (0, 1): 2, (1, 0): 1, (1, 1): 3})
    iou = iou_per_class(matrix)
    assert iou[:2] == pytest.approx([100 * 6 / 9, 100 * 3 / 6])
    assert mean_iou(iou) == pytest.approx((100 * 6 / 9 + 100 * 3 / 6) / 2)
    assert pixel_accuracy(matrix) == pytest.approx(100 * 9 / 12)


def test_a_class_in_neither_labels_nor_predictions_has_no_iou_and_no_part_in_the_mean() -> None:
    iou = iou_per_class(matrix_of({(0, 0): 3, (4, 0): 1}))
    assert iou[0] == 75.0
    assert iou[4] == 0.0  # labelled and never found
    assert [iou[train_id] for train_id in range(len(CITYSCAPES)) if train_id not in (0, 4)] == [None] * 17
    assert mean_iou(iou) == 37.5
    only_predicted = iou_per_class(matrix_of({(0, 0): 3, (0, 7): 1}))
    assert only_predicted[7] == 0.0
    assert mean_iou(only_predicted) == 37.5


def plausible_prediction(label: Tensor, seed: int) -> Tensor:
    """Return the label, moved by three pixels and with a twentieth of the pixels at random; some class at void too."""
    moved = label.roll(3, dims=1)
    noise = random_ids(*label.shape, seed=seed)
    random_places = torch.rand(label.shape, generator=torch.Generator().manual_seed(seed)) < 0.05
    return noise.where(random_places | (moved == VOID), moved)


def write_label_ids(path: Path, train_ids: Tensor) -> None:
    label_ids = np.zeros(256, np.uint8)  # void becomes labelId 0, "unlabeled"
    for train_id, street_class in enumerate(CITYSCAPES.classes):
        label_ids[train_id] = street_class.id
    Image.fromarray(label_ids[train_ids.numpy()]).save(path)


def referee_scores(predictions: list[Path], labels: list[Path], monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """Return IoU (0 to 1) by class, NaN where one never occurs, and `mean`, as cityscapesScripts finds them."""
    for variable in ("CITYSCAPES_DATASET", "CITYSCAPES_RESULTS", "CITYSCAPES_EXPORT_DIR"):
        monkeypatch.delenv(variable, raising=False)
    referee = importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")

    monkeypatch.setattr(referee.args, "evalInstLevelScore", False)  # needs np.in1d, which numpy 2.4 has no more
    monkeypatch.setattr(referee.args, "JSONOutput", False)
    monkeypatch.setattr(referee.args, "quiet", True)
    found = referee.evaluateImgLists([str(path) for path in predictions], [str(path) for path in labels], referee.args)
    return {**found["classScores"], "mean": found["averageScoreClasses"]}


@pytest.mark.parametrize("num_frames", [1, 4])
def test_cityscapes_scripts_find_the_same_scores(
    num_frames: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streets = Streets(num_train=1, num_val=num_frames, frame_size=(96, 192))
    matrix = torch.zeros(len(CITYSCAPES), len(CITYSCAPES), dtype=torch.int64)
    labels = [tmp_path / f"ulm_{index:06d}_000019_gtFine_labelIds.png" for index in range(num_frames)]
    predictions = [tmp_path / f"ulm_{index:06d}_000019_predicted.png" for index in range(num_frames)]
    for index in range(num_frames):
        label = torch.from_numpy(streets.load("val", index).label.copy())
        if num_frames == 1:
            label[label == CAR] = VOID  # so that it is only predicted
        prediction = plausible_prediction(label, seed=index)
        write_label_ids(labels[index], label)
        write_label_ids(predictions[index], prediction)
        matrix += confusion(prediction.unsqueeze(0), label.unsqueeze(0), len(CITYSCAPES))[0]

    referee = referee_scores(predictions, labels, monkeypatch)
    iou = iou_per_class(matrix)

    assert 20 < mean_iou(iou) < 95
    assert mean_iou(iou) / 100 == pytest.approx(referee["mean"], abs=1e-6)
    for name, value in zip(CITYSCAPES.names, iou, strict=True):
        if value is None:
            assert np.isnan(referee[name])
        else:
            assert value / 100 == pytest.approx(referee[name], abs=1e-6)


@pytest.mark.parametrize("num_classes", [2, 5, MAX_CLASSES])
def test_pairs_of_other_numbers_of_classes_are_counted(num_classes: int) -> None:
    labels = random_ids(2, 12, 9, classes=num_classes, void_share=0.2)
    predictions = random_ids(2, 12, 9, classes=num_classes, seed=1)
    literal = np.zeros((2, num_classes, num_classes), np.int64)
    for image, (row, column) in enumerate(zip(labels, predictions, strict=True)):
        for label, prediction in zip(row.flatten().tolist(), column.flatten().tolist(), strict=True):
            if label != VOID:
                literal[image, label, prediction] += 1
    assert confusion(predictions, labels, num_classes).tolist() == literal.tolist()
