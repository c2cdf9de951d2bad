"""Trainings on 32 x 64 pixels, and what can be seen of them."""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tune_bisenet.config import Precision, Run
from tune_bisenet.data.packed import Packed
from tune_bisenet.records import Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.training import engine
from tune_bisenet.training.engine import EpochEnd, Training

SIZE = (32, 64)
CPU = torch.device("cpu")


def small(tiny_run: Run) -> Run:
    """Return what tests that train have as their fixture `run`."""
    return tiny_run.model_copy(update={"image_size": SIZE})


def trial_folder(tmp_path: Path) -> Iterator[Storage]:
    """Give a trial's folder; emptied at once, for each state takes 100 MB."""
    path = tmp_path / "trial"
    path.mkdir()
    yield Storage.at(str(path))
    shutil.rmtree(path)


def begin(run: Run, data: Packed, precision: Precision = "fp32") -> Training:
    return engine.begin(run, data, device=CPU, precision=precision, backbone=None)


def trained(run: Run, data: Packed) -> list[EpochEnd]:
    return list(engine.fit(begin(run, data)))


def weights_of(training: Training) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in training.model.named_parameters()}


def recorded_inputs(training: Training) -> list[Tensor]:
    """Return a list that fills with what the network of `training` is given to learn from."""
    inputs: list[Tensor] = []

    def record(network: nn.Module, given: tuple[Tensor]) -> None:
        if network.training:
            inputs.append(given[0].detach().clone())

    training.model.register_forward_pre_hook(record)
    return inputs


def rate_by_hand(base_lr: float, warmup: int, iteration: int, total: int) -> float:
    if iteration < warmup:
        return 1e-6 + (base_lr - 1e-6) * iteration / warmup
    return base_lr * (1 - (iteration - warmup) / (total - warmup)) ** 0.9


def flat(state: Any, place: str = "") -> dict[str, Any]:
    """Return every tensor and value of a nested state under its path; tensors as their bytes."""
    if isinstance(state, Tensor):
        return {place: (state.dtype, tuple(state.shape), state.numpy().tobytes())}
    if isinstance(state, dict | list | tuple):
        items = state.items() if isinstance(state, dict) else enumerate(state)
        return {key: value for name, part in items for key, value in flat(part, f"{place}/{name}").items()}
    return {place: state}


def measurements(epochs: Sequence[Epoch]) -> list[dict[str, Any]]:
    """Return all but how long it took."""
    timings = {"train_seconds", "val_seconds", "images_per_second"}
    return [{key: value for key, value in asdict(epoch).items() if key not in timings} for epoch in epochs]


def assert_same_state(left: Training, right: Training) -> None:
    assert left.epochs_done == right.epochs_done
    for first, second in ((left.model, right.model), (left.optimizer, right.optimizer)):
        found, expected = flat(first.state_dict()), flat(second.state_dict())
        assert found.keys() == expected.keys()
        assert [key for key, value in found.items() if value != expected[key]] == []
