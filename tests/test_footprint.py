"""What a trial holds and leaves, against what it does hold and leave."""

from pathlib import Path

import pytest
import torch

from tune_bisenet.config import SGD, AdamW, Optimizer, Run
from tune_bisenet.data.packed import Packed
from tune_bisenet.estimate import footprint
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine
from tune_bisenet.training.model import BiSeNet


@pytest.mark.parametrize(
    "optimizer", [SGD(lr=0.01, momentum=0.9, weight_decay=1e-4), AdamW(lr=1e-3, weight_decay=1e-4)]
)
def test_checkpoints_are_as_large_as_foretold(
    tiny_run: Run, tiny_data: Packed, tmp_path: Path, optimizer: Optimizer
) -> None:
    run = tiny_run.model_copy(update={"optimizer": optimizer, "num_epochs": 1})
    training = engine.begin(run, tiny_data, device=torch.device("cpu"), precision="fp32", backbone=None)
    (end,) = engine.fit(training)
    folder = Storage.at(str(tmp_path))
    checkpoint.save(training, [end.epoch], folder, identity="x")
    checkpoint.save_best(training, end.epoch, folder, identity="x")
    foretold = footprint.of(run, precision="fp32")
    assert (tmp_path / checkpoint.LAST).stat().st_size == pytest.approx(foretold.last, rel=0.01)
    assert (tmp_path / checkpoint.BEST).stat().st_size == pytest.approx(foretold.best, rel=0.01)


def test_activations_are_those_that_a_real_forward_pass_keeps(tiny_run: Run) -> None:
    """On real tensors each storage's own address tells it apart."""
    model = BiSeNet()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(torch.zeros(tiny_run.batch_size, 3, *tiny_run.image_size))
    real = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in weights)
    assert footprint.of(tiny_run, precision="fp32").activations == pytest.approx(real, rel=0.02)


def test_activations_grow_with_the_pixels_and_shrink_with_the_precision(tiny_run: Run) -> None:
    small = footprint.of(tiny_run, precision="fp32")
    wide = footprint.of(tiny_run.model_copy(update={"image_size": (128, 256)}), precision="fp32")
    assert wide.activations == pytest.approx(4 * small.activations, rel=0.02)
    assert footprint.of(tiny_run, precision="bf16").activations == pytest.approx(small.activations / 2, rel=0.1)
    assert wide.last == small.last


def test_lovasz_and_a_second_moment_take_more(tiny_run: Run) -> None:
    plain = footprint.of(tiny_run, precision="fp32")
    loss = tiny_run.loss.model_copy(update={"lovasz_after": 1})
    lovasz = footprint.of(tiny_run.model_copy(update={"loss": loss}), precision="fp32")
    assert lovasz.training > plain.training
    adamw = tiny_run.model_copy(update={"optimizer": AdamW(lr=1e-3, weight_decay=0.0)})
    assert footprint.of(adamw, precision="fp32").optimizer == 2 * plain.optimizer
