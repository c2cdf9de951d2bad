"""How much repeats differ: by mIoU and by class, the shares of its variance, and nothing where nothing repeats."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from expecting import trial

from tune_bisenet.classes import CITYSCAPES, ClassSet, LabelClass
from tune_bisenet.report.noise import repeat_noise
from tune_bisenet.report.read import ReportedTrial


def trained(name: str, seed: int, ious: Sequence[Sequence[float | None]]) -> ReportedTrial:
    """Return a finished trial with these IoUs after its epochs."""
    means = [float(np.mean([iou for iou in of_epoch if iou is not None] or [0.0])) for of_epoch in ious]
    made = trial(name, seed, means)
    epochs = [replace(epoch, iou=tuple(iou)) for epoch, iou in zip(made.epochs, ious, strict=True)]
    return replace(made, epochs=epochs)


def repeats(values: np.ndarray, *, name: str = "r01") -> list[ReportedTrial]:
    """Return trials of one epoch with IoUs, seeds x classes, after a first epoch without any of this noise."""
    return [trained(name, seed, [[0.0] * len(CITYSCAPES), iou.tolist()]) for seed, iou in enumerate(values)]


def test_shares_are_those_of_the_variance_of_miou_within_rows() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(50, np.linspace(0.1, 3, len(CITYSCAPES)), (2, 4, len(CITYSCAPES)))
    values[1] += 20  # rows differ: that is no noise
    noise = repeat_noise(repeats(values[0]) + repeats(values[1], name="x"), 0.5)
    assert noise is not None
    within = np.concatenate([row - row.mean(0) for row in values])
    means = within.mean(1)
    assert (noise.num_rows, noise.num_trials) == (2, 8)
    assert noise.sd == pytest.approx(np.sqrt((means**2).sum() / 6))
    shares = {of.name: of.share for of in noise.classes}
    sds = {of.name: of.sd for of in noise.classes}
    for index, name in enumerate(CITYSCAPES.names):
        covariance = (within[:, index] / len(CITYSCAPES) * means).sum() / 6
        assert shares[name] == pytest.approx(100 * covariance / noise.sd**2)
        assert sds[name] == pytest.approx(np.sqrt((within[:, index] ** 2).sum() / 6))
    assert sum(shares.values()) == pytest.approx(100)
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_one_class_can_be_all_of_the_noise_and_more() -> None:
    values = np.full((3, len(CITYSCAPES)), 60.0)
    values[:, 16] = [36, 74, 50]
    values[:, 15] = [61, 60, 60.5]
    noise = repeat_noise(repeats(values), 0.5)
    assert noise is not None
    assert noise.classes[0].name == "train"
    assert noise.classes[0].share > 100
    assert (noise.classes[-1].name, noise.classes[-1].share < 0) == ("bus", True)


def test_a_class_that_some_epoch_lacks_is_left_out() -> None:
    lacking = [[50.0] * 18 + [None], [52.0] * 18 + [None]]
    noise = repeat_noise([trained("r01", 0, lacking), trained("r01", 1, [[51.0] * 19, [55.0] * 19])], 1.0)
    assert noise is not None
    assert noise.left_out == ("bicycle",)
    assert len(noise.classes) == 18
    assert sum(of.share for of in noise.classes) == pytest.approx(100)


def test_nothing_is_known_where_nothing_repeats() -> None:
    values = np.random.default_rng(0).normal(50, 1, (2, len(CITYSCAPES)))
    once, other = repeats(values)[0], repeats(values, name="x")[1]
    assert repeat_noise([once, other], 0.5) is None
    stopped = replace(repeats(values)[1], state=replace(once.state, status="stopped"))
    assert repeat_noise([once, stopped], 0.5) is None
    assert repeat_noise(repeats(values[[0, 0]]), 0.5) is None, "the same to the last bit"
    absent = [trained("r01", seed, [[None] * len(CITYSCAPES), [None] * len(CITYSCAPES)]) for seed in (0, 1)]
    assert repeat_noise(absent, 0.5) is None


def test_noise_and_the_second_measure_go_by_the_classes_of_the_data() -> None:
    classes = ClassSet(classes=(LabelClass(name="field", id=1), LabelClass(name="wood", id=2)))
    ious = ([50.0, 60.0], [51.0, 57.0])
    repeated = [replace(trained("r01", seed, [values]), classes=classes) for seed, values in enumerate(ious)]
    noise = repeat_noise(repeated, 1.0, ("wood",))
    assert noise is not None
    assert [of.name for of in noise.classes] == ["wood", "field"]
    assert noise.second_sd == pytest.approx(np.std([60, 57], ddof=1))
    assert noise.sd == pytest.approx(np.std([55, 54], ddof=1))
