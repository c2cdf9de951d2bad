"""One run, trained for real on 32 x 64 pixels: it learns, it counts right, and it is scored right."""

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from trainings import SIZE, begin, flat, rate_by_hand, recorded_inputs, small, trained, weights_of

from tune_bisenet import spaces
from tune_bisenet.classes import CITYSCAPES, VOID, ClassSet
from tune_bisenet.config import OHEM, SGD, AdamW, Augment, CrossEntropy, Loss, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.data.batches import augment_batch, epoch_draw
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.packing import prepare_packed
from tune_bisenet.data.source import Frame, Split
from tune_bisenet.data.streets import Streets
from tune_bisenet.records import Epoch
from tune_bisenet.spaces import DataFacts, RowOverrides, resolve_runs
from tune_bisenet.training import engine, metrics
from tune_bisenet.training.model import BiSeNet

STEADY = WarmupPoly(warmup_iterations=0, power=0.9)
STILL = Augment(min_scale=1.0, max_scale=1.0, flip=0.0, jitter=0.0)

run = pytest.fixture(scope="session")(small)


# --- learning ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FourStreets:
    """Four frames, 32 of them for training and each once for validation; the labels trained on may be spoilt."""

    spoil: str  # "nothing", "shuffle" or "erase"
    num_train: int = 32
    frame_size: tuple[int, int] = SIZE
    classes: ClassSet = CITYSCAPES
    frame_sizes: Mapping[Split, Sequence[tuple[int, int]]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def name(self) -> str:
        return "four"

    @property
    def fingerprint(self) -> str:
        return f"{self}"

    def names(self, split: Split) -> Sequence[str]:
        return [str(index) for index in range({"train": self.num_train, "val": 4}[split])]

    def describe_labels(self, split: Split) -> tuple[str, bool]:
        return f"{split}: {self.spoil}", False

    def load(self, split: Split, index: int) -> Frame:
        frame = Streets(num_train=4, num_val=1, frame_size=self.frame_size).load("train", index % 4)
        label = frame.label.copy()
        if self.spoil == "shuffle" and split == "train":
            label = np.random.default_rng(index).permutation(label.ravel()).reshape(label.shape)
        if self.spoil == "erase":
            label[:] = VOID
        return Frame(frame.image, label)


def learning_curve(run: Run, cache_dir: Path, spoil: str) -> list[Epoch]:
    run = run.model_copy(update={"optimizer": AdamW(lr=0.002, weight_decay=0.0), "augment": STILL, "num_epochs": 6})
    data = prepare_packed(FourStreets(spoil), image_size=SIZE, cache_dir=cache_dir)
    return [end.epoch for end in trained(run, data)]


@pytest.mark.slow
def test_a_network_that_sees_four_images_again_and_again_learns_them(run: Run, tmp_path: Path) -> None:
    curve = learning_curve(run, tmp_path, "nothing")
    assert curve[-1].loss < 0.5 * curve[0].loss
    assert curve[-1].miou > curve[0].miou + 15
    assert curve[-1].pixel_accuracy > 75


@pytest.mark.slow
def test_a_network_learns_no_streets_from_shuffled_labels(run: Run, tmp_path: Path) -> None:
    curve = learning_curve(run, tmp_path, "shuffle")
    assert curve[-1].loss > 0.5 * curve[0].loss
    assert max(epoch.miou for epoch in curve) < 8


@pytest.mark.parametrize(
    "loss",
    [
        CrossEntropy(aux_weight=1.0),
        WeightedCrossEntropy(aux_weight=1.0),
        OHEM(aux_weight=1.0),
        CrossEntropy(aux_weight=1.0, lovasz_after=0),
    ],
    ids=["ce", "weighted", "ohem", "lovasz"],
)
def test_labels_of_nothing_but_void_move_no_weight(run: Run, tmp_path: Path, loss: Loss) -> None:
    optimizer = SGD(lr=0.1, momentum=0.9, weight_decay=0.0)
    changes = {"loss": loss, "optimizer": optimizer, "num_epochs": 1, "max_grad_norm": 1.0}
    data = prepare_packed(FourStreets("erase", num_train=8), image_size=SIZE, cache_dir=tmp_path)
    training = begin(run.model_copy(update=changes), data)
    before = weights_of(training)
    (end,) = engine.fit(training)
    assert (end.epoch.loss, end.epoch.grad_norm) == (0.0, 0.0)
    assert math.isnan(end.epoch.miou)
    assert all(torch.equal(before[name], weight) for name, weight in weights_of(training).items())


def test_the_first_stream_of_a_seed_draws_what_the_seed_alone_says(run: Run, small_data: Packed) -> None:
    training = begin(run.model_copy(update={"seed": 3}), small_data)
    torch.manual_seed(3)
    drawn = BiSeNet(head_width=run.head_width).state_dict()
    assert all(torch.equal(drawn[name], tensor) for name, tensor in training.model.state_dict().items())
    inputs = recorded_inputs(training)
    next(engine.fit(training))
    state = int(np.random.SeedSequence([3, 1, 0]).generate_state(1, np.uint64)[0])
    order = torch.randperm(len(small_data.train), generator=torch.Generator().manual_seed(state >> 1))
    batch = next(training.train.batches(order, run.batch_size))
    expected, _ = augment_batch(*batch, epoch_draw(run.augment, len(order), seed=3, epoch=1)[: run.batch_size])
    assert torch.equal(inputs[0], expected)


def test_another_stream_of_a_seed_is_another_sample_of_the_same_run(run: Run, small_data: Packed) -> None:
    first, second = (begin(run.model_copy(update={"stream": stream}), small_data) for stream in (0, 1))
    assert not any(
        torch.equal(tensor, weights_of(second)[name])
        for name, tensor in weights_of(first).items()
        if "conv" in name and name.endswith("weight") and tensor.std() > 0 and "norm" not in name
    )
    given = [recorded_inputs(training) for training in (first, second)]
    ends = [next(engine.fit(training)).epoch for training in (first, second)]
    assert ends[0].loss != ends[1].loss
    assert not torch.equal(given[0][0], given[1][0])
    again = begin(run.model_copy(update={"stream": 1}), small_data)
    assert next(engine.fit(again)).epoch.loss == ends[1].loss


def test_a_rate_far_too_high_is_told_as_diverged(run: Run, small_data: Packed) -> None:
    run = run.model_copy(
        update={
            "optimizer": SGD(lr=1e6, momentum=0.9, weight_decay=1e-4),
            "schedule": WarmupPoly(warmup_iterations=0, power=0.9),
        }
    )
    last = trained(run, small_data)[-1].epoch
    assert last.diverged
    assert not (math.isfinite(last.loss) and math.isfinite(last.grad_norm))
    assert math.isnan(last.miou)
    assert math.isnan(last.pixel_accuracy)
    assert set(last.iou) == {None}


@pytest.mark.parametrize(
    ("broken", "value"), [("lr", 1e12), ("running_var", math.inf), ("aux", math.nan)], ids=["step", "norm", "head"]
)
def test_an_epoch_whose_last_step_broke_the_weights_has_no_miou(
    run: Run, small_data: Packed, broken: str, value: float
) -> None:
    """Its loss and gradient are numbers: they were measured before the step."""
    training = begin(run.model_copy(update={"accumulation": 100, "schedule": STEADY}), small_data)
    if broken == "lr":  # weights stay finite, but what they predict does not
        training.run = training.run.model_copy(update={"optimizer": SGD(lr=value, momentum=0.0, weight_decay=1e-4)})
    else:
        spoilt = next(weight for name, weight in training.model.state_dict().items() if broken in name)
        training.optimizer.register_step_post_hook(lambda *_: spoilt.fill_(value))
    epoch = next(engine.fit(training)).epoch
    assert math.isfinite(epoch.loss)
    assert math.isfinite(epoch.grad_norm)
    assert epoch.diverged
    assert math.isnan(epoch.miou)


@pytest.mark.parametrize("name", [run.name for run in spaces.load_space("runs10").runs])
def test_every_one_of_the_ten_runs_trains(name: str, small_data: Packed) -> None:
    settings = RowOverrides(num_epochs=1, proxy=True)
    rows = spaces.select_rows(spaces.load_space("runs10"), [name])
    (run,) = resolve_runs(rows, settings, DataFacts(num_train=12, num_val=4, suggested_image_size=SIZE))
    training = begin(run, small_data)
    before = weights_of(training)
    (end,) = engine.fit(training)
    assert not end.epoch.diverged
    assert 0 < end.epoch.loss < 30
    assert all(not torch.equal(before[key], weight) for key, weight in weights_of(training).items())


@pytest.mark.slow
def test_bfloat16_trains_much_as_float32_does(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"num_epochs": 1})
    exact, rounded = (next(engine.fit(begin(run, small_data, precision))).epoch for precision in ("fp32", "bf16"))
    assert rounded.loss == pytest.approx(exact.loss, rel=0.05)
    assert rounded.loss != exact.loss


# --- what an epoch says -----------------------------------------------------------------------------------------


def test_an_epoch_counts_iterations_and_gives_the_rate_of_its_last_one(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"num_epochs": 3, "schedule": WarmupPoly(warmup_iterations=4, power=0.9)})
    epochs = [end.epoch for end in trained(run, small_data)]
    assert [epoch.epoch for epoch in epochs] == [1, 2, 3]
    assert [epoch.iterations for epoch in epochs] == [3, 6, 9]
    assert [epoch.lr for epoch in epochs] == pytest.approx([rate_by_hand(0.01, 4, last, 9) for last in (2, 5, 8)])


def test_an_epoch_is_told_completely(run: Run, small_data: Packed) -> None:
    run = run.model_copy(update={"num_epochs": 1, "loss": CrossEntropy(aux_weight=0.4)})
    (end,) = trained(run, small_data)
    epoch = end.epoch
    assert epoch.loss == pytest.approx(epoch.loss_main + 0.4 * (epoch.loss_aux1 + epoch.loss_aux2), rel=1e-5)
    assert min(epoch.loss_main, epoch.loss_aux1, epoch.loss_aux2, epoch.grad_norm) > 0
    assert len(epoch.iou) == len(CITYSCAPES)
    occurring = [value for value in epoch.iou if value is not None]
    assert epoch.miou == pytest.approx(sum(occurring) / len(occurring))
    assert epoch.images_per_second == pytest.approx(12 / epoch.train_seconds)
    assert epoch.seconds == epoch.train_seconds + epoch.val_seconds > 0


def test_images_that_fill_no_batch_are_left_for_another_epoch(run: Run, small_data: Packed) -> None:
    training = begin(run.model_copy(update={"batch_size": 5}), small_data)
    inputs = recorded_inputs(training)
    end = next(engine.fit(training))
    assert [len(images) for images in inputs] == [5, 5]
    assert end.epoch.iterations == 2


def test_clipping_bounds_what_a_step_can_change_but_not_the_norm_that_is_told(run: Run, small_data: Packed) -> None:
    one_step = {"batch_size": 12, "num_epochs": 1, "optimizer": SGD(lr=1.0, momentum=0.0, weight_decay=0.0)}
    one_step |= {"schedule": WarmupPoly(warmup_iterations=0, power=0.9)}
    free, clipped = (begin(run.model_copy(update=one_step | {"max_grad_norm": n}), small_data) for n in (None, 0.01))
    before = weights_of(clipped)
    norms = [next(engine.fit(training)).epoch.grad_norm for training in (free, clipped)]
    assert norms[0] > 0.01
    assert norms[1] == norms[0]
    moved = torch.cat([(weight - before[name]).flatten() for name, weight in weights_of(clipped).items()])
    assert moved.double().norm().item() == pytest.approx(0.01, rel=1e-3)


# --- validation -------------------------------------------------------------------------------------------------


def test_validation_scores_whole_images_at_the_resolution_of_their_labels(run: Run, small_data: Packed) -> None:
    training = begin(run.model_copy(update={"num_epochs": 1}), small_data)
    (end,) = engine.fit(training)
    training.model.eval()
    literal = np.zeros((4, len(CITYSCAPES), len(CITYSCAPES)), np.int64)
    for index in range(4):
        pixels = torch.from_numpy(small_data.val.images[index].copy()).float() / 255
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        normalised = ((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).unsqueeze(0)
        with torch.no_grad():
            main = training.model(normalised).main
        full_size = nn.functional.interpolate(main, size=(64, 128), mode="bilinear", align_corners=False)
        prediction, label = full_size.argmax(1)[0].numpy(), small_data.val.labels[index]
        np.add.at(literal[index], (label[label != VOID], prediction[label != VOID]), 1)
    assert literal.sum() > 0.8 * 4 * 64 * 128
    assert np.abs(end.confusion.numpy() - literal).sum() <= 4  # scores of one image alone differ in the last bit
    assert end.confusion.shape == (4, len(CITYSCAPES), len(CITYSCAPES))
    assert end.confusion.dtype == torch.int64
    labelled = [int((label != VOID).sum()) for label in small_data.val.labels]
    assert end.confusion.sum((1, 2)).tolist() == labelled
    hits = end.confusion.sum(0).trace().item()
    assert end.epoch.pixel_accuracy == pytest.approx(100 * hits / sum(labelled))


def test_validation_labels_of_different_sizes_are_each_scored_at_their_own(run: Run, small_data: Packed) -> None:
    sizes = [(64, 128), (64, 128), (40, 96), (64, 64)]
    labels = [label[-h:, :w] for label, (h, w) in zip(small_data.val.labels, sizes, strict=True)]
    mixed = replace(small_data, val=replace(small_data.val, labels=labels, label_sizes=sizes))
    training = begin(run.model_copy(update={"num_epochs": 1, "batch_size": 4}), mixed)
    (end,) = engine.fit(training)
    for index, (size, label) in enumerate(zip(sizes, labels, strict=True)):
        image = torch.from_numpy(small_data.val.images[index].copy()).unsqueeze(0)
        prediction = engine.predict(training.model, image, size, precision="fp32")
        counts = metrics.confusion(prediction, torch.from_numpy(label.copy()).unsqueeze(0), len(CITYSCAPES))[0]
        assert (end.confusion[index] - counts).abs().sum() <= 4  # scores of one image alone differ in the last bit
        assert index not in end.samples or end.samples[index].shape == size


def test_the_same_validation_images_are_handed_out_every_epoch(run: Run, small_data: Packed) -> None:
    for end in trained(run, small_data):
        assert sorted(end.samples) == [0, 2, 3]  # spread over the split of four
        for index, prediction in end.samples.items():
            assert (prediction.dtype, prediction.shape) == (torch.uint8, (64, 128))
            label = torch.from_numpy(small_data.val.labels[index].copy())
            hits = ((prediction == label) & (label != VOID)).sum()
            assert hits == end.confusion[index].trace()


def test_a_split_of_one_image_hands_out_that_one(run: Run, tmp_path: Path) -> None:
    source = Streets(num_train=4, num_val=1, frame_size=SIZE)
    training = begin(run, prepare_packed(source, image_size=SIZE, cache_dir=tmp_path))
    assert training.sample_indices == [0]


def test_validation_changes_nothing_in_the_network(run: Run, small_data: Packed) -> None:
    training = begin(run, small_data)
    before = flat(training.model.state_dict())
    images, labels = next(training.val.batches(torch.arange(4), 4))
    predictions = engine.predict(training.model, images, (labels.shape[1], labels.shape[2]), precision="fp32")
    assert predictions.shape == labels.shape
    assert flat(training.model.state_dict()) == before


def test_what_is_called_before_each_iteration_may_end_the_training_and_its_time_is_not_counted(
    run: Run, small_data: Packed
) -> None:
    training = begin(run, small_data)
    calls = itertools.count(1)

    def wait() -> None:
        time.sleep(0.2)
        if next(calls) > training.iterations_per_epoch:
            raise InterruptedError

    began = time.perf_counter()
    epochs = engine.fit(training, between=wait)
    measured = next(epochs).epoch
    assert next(calls) == training.iterations_per_epoch + 1
    spent = time.perf_counter() - began
    assert measured.seconds <= spent - 0.2 * training.iterations_per_epoch
    with pytest.raises(InterruptedError):
        next(epochs)
    assert training.epochs_done == 1
