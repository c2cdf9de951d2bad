"""A state comes back as it was saved, or it does not come back at all."""

import io
import math
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trainings import trial_folder

from tune_bisenet.config import Run
from tune_bisenet.data.packed import Packed
from tune_bisenet.records import Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint, engine
from tune_bisenet.training.checkpoint import BEST_WEIGHTS, LAST, PREVIOUS, CheckpointError, from_bytes, to_bytes
from tune_bisenet.training.engine import Training

folder = pytest.fixture(trial_folder)


@pytest.fixture
def training(tiny_run: Run, small_data: Packed) -> Training:
    """A run before its first epoch."""
    return fresh(tiny_run, small_data)


def fresh(run: Run, data: Packed) -> Training:
    run = run.model_copy(update={"image_size": data.image_size})
    return engine.begin(run, data, device=torch.device("cpu"), precision="fp32", backbone=None)


def epoch(number: int, **values: Any) -> Epoch:
    fields: dict[str, Any] = {
        "epoch": number, "iterations": 3 * number, "loss": 3.0, "loss_main": 1.0, "loss_aux1": 1.0, "loss_aux2": 1.0,
        "lr": 0.01, "grad_norm": 2.0, "miou": 10.0, "iou": (50.0, None, 0.0), "pixel_accuracy": 60.0,
        "images_per_second": 12.0, "train_seconds": 1.0, "val_seconds": 0.5,
    }  # fmt: skip
    return Epoch(**fields | values)


def history_of(num_epochs: int) -> list[Epoch]:
    return [epoch(number) for number in range(1, num_epochs + 1)]


def mark(training: Training, value: float) -> None:
    """Make the weights recognisable."""
    with torch.no_grad():
        training.model.head[1].bias.fill_(value)


def mark_of(training: Training) -> float:
    (value,) = training.model.head[1].bias.unique().tolist()
    return float(value)


def save_epochs(training: Training, folder: Storage, num_epochs: int) -> None:
    for number in range(1, num_epochs + 1):
        mark(training, number)
        checkpoint.save(training, history_of(number), folder, identity="one")


def local(folder: Storage, name: str) -> Path:
    return Path(folder.path) / name


# --- going on ---------------------------------------------------------------------------------------------------


def test_where_nothing_was_saved_a_run_begins(training: Training, folder: Storage) -> None:
    assert checkpoint.resume(training, folder, identity="one") == []
    assert training.epochs_done == 0


def test_a_run_goes_on_from_the_last_epoch_saved(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 3)
    mark(training, -1.0)
    assert checkpoint.resume(training, folder, identity="one") == history_of(3)
    assert training.epochs_done == 3
    assert mark_of(training) == 3.0


def test_the_epoch_before_is_kept(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 3)
    assert len(from_bytes(local(folder, PREVIOUS).read_bytes())["history"]) == 2
    assert sorted(path.name for path in Path(folder.path).iterdir()) == [LAST, PREVIOUS]


def test_numbers_that_are_none_and_classes_without_a_score_come_back(training: Training, folder: Storage) -> None:
    strange = epoch(1, loss=math.nan, grad_norm=math.inf, iou=(None, 12.5, None))
    checkpoint.save(training, [strange], folder, identity="one")
    (found,) = checkpoint.resume(training, folder, identity="one")
    assert math.isnan(found.loss)
    assert math.isnan(found.grad_norm)  # an infinity has no place in JSON and comes back as NaN
    assert found.diverged
    assert found.iou == (None, 12.5, None)
    assert found.loss_main == 1.0


# --- damage -----------------------------------------------------------------------------------------------------


class Dying(Storage):
    """A process that dies when half of a file is written."""

    def _put(self, name: str, content: bytes) -> None:
        super()._put(name, content[: len(content) // 2])
        raise KeyboardInterrupt


def test_a_process_that_dies_while_saving_loses_that_epoch_only(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    mark(training, 3.0)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(training, history_of(3), Dying.at(folder.path), identity="one")
    assert not folder.exists(LAST)
    assert len(checkpoint.resume(training, folder, identity="one")) == 2
    assert mark_of(training) == 2.0


def test_after_such_a_death_saving_goes_on(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(training, history_of(3), Dying.at(folder.path), identity="one")
    checkpoint.save(training, history_of(3), folder, identity="one")
    assert len(checkpoint.resume(training, folder, identity="one")) == 3
    assert len(from_bytes(local(folder, PREVIOUS).read_bytes())["history"]) == 2


@pytest.mark.parametrize("damage", ["cut short", "emptied", "a byte flipped", "not a state at all"])
def test_a_damaged_state_costs_one_epoch(
    training: Training, folder: Storage, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_epochs(training, folder, 2)
    path = local(folder, LAST)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(
        {
            "cut short": bytes(content[:-1000]),
            "emptied": b"",
            "a byte flipped": bytes(content),
            "not a state at all": b"<html>503 Service Unavailable</html>",
        }[damage]
    )
    assert len(checkpoint.resume(training, folder, identity="one")) == 1
    assert mark_of(training) == 1.0
    assert "last.pt is put aside" in caplog.text


def small_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "format": checkpoint.FORMAT,
        "identity": "one",
        "model": {"weight": torch.randn(8, 9, generator=generator), "steps": torch.tensor(7)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(8, 9, generator=generator)}}},
        "history": [epoch(1).to_json()],
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def test_a_state_comes_back_as_it_was() -> None:
    assert same(from_bytes(to_bytes(small_state())), small_state())


def test_no_flipped_bit_anywhere_goes_unnoticed() -> None:
    """Not even in the archive's directory, where torch would load whatever lies in memory without a word."""
    content = to_bytes(small_state())
    bits = random.Random(0)
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << bits.randrange(8)
        with pytest.raises(CheckpointError):
            from_bytes(bytes(damaged))


def test_the_bit_that_makes_torch_load_what_lies_in_memory_is_noticed() -> None:
    content = bytearray(to_bytes(small_state()))
    entry = content.rindex(b"archive/data/0") - 46  # in the archive's directory, behind a header of 46 bytes
    content[entry + 38] ^= 0x10  # "is a folder", among the attributes no checksum covers
    silently = torch.load(io.BytesIO(bytes(content)), weights_only=True)
    assert silently.keys() == small_state().keys()  # the weight's memory is never written to: it may hold anything
    with pytest.raises(CheckpointError, match="damaged"):
        from_bytes(bytes(content))


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 1000])
def test_a_state_cut_short_is_refused(length: int) -> None:
    content = to_bytes(small_state())
    with pytest.raises(CheckpointError, match="damaged"):
        from_bytes(content[:length])
    with pytest.raises(CheckpointError, match="damaged"):
        from_bytes(content[:-1])


def test_torch_itself_can_read_what_is_saved(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    path.write_bytes(to_bytes(small_state()))
    assert same(torch.load(path, weights_only=True), small_state())


# --- what must never be loaded ----------------------------------------------------------------------------------


class Exploit:
    """What unpickling it would do: leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


def test_code_in_a_state_is_refused_and_does_not_run(training: Training, folder: Storage, tmp_path: Path) -> None:
    trace = tmp_path / "the code ran"
    pickle.loads(pickle.dumps(Exploit(trace)))
    assert trace.exists(), "the exploit is none"
    trace.unlink()

    content = to_bytes(small_state() | {"extra": Exploit(trace)})
    with pytest.raises(CheckpointError, match="not a state of plain values"):
        from_bytes(content)
    folder.write(LAST, content)
    with pytest.raises(CheckpointError, match="nothing else is ever loaded"):
        checkpoint.resume(training, folder, identity="one")
    assert not trace.exists()


def test_the_state_of_another_run_is_refused_saying_what_to_do(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    mark(training, -1.0)
    with pytest.raises(
        CheckpointError, match=r"last.pt was written by another run \(identity one, this one is two\)"
    ) as refusal:
        checkpoint.resume(training, folder, identity="two")
    assert "Give this search another --name, or move that folder away" in str(refusal.value)
    assert (training.epochs_done, mark_of(training)) == (0, -1.0)


def test_another_runs_older_state_is_refused_too(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    folder.delete(LAST)
    with pytest.raises(CheckpointError, match=r"previous.pt was written by another run"):
        checkpoint.resume(training, folder, identity="two")


@pytest.mark.parametrize("state", [{"format": checkpoint.FORMAT + 1}, {"format": None}, {}, [1, 2]])
def test_another_format_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match=f"not of format {checkpoint.FORMAT}"):
        from_bytes(to_bytes(state))


# --- the best weights -------------------------------------------------------------------------------------------


def test_the_best_weights_come_with_what_they_scored_and_how(training: Training, folder: Storage) -> None:
    mark(training, 4.0)
    checkpoint.save_best(training, epoch(4, miou=33.0), folder, identity="one")
    state = from_bytes(local(folder, BEST_WEIGHTS).read_bytes())
    assert state["identity"] == "one"
    assert Run.model_validate(state["run"]) == training.run
    assert Epoch.from_json(state["epoch"]).miou == 33.0
    training.model.load_state_dict(state["model"])
    assert mark_of(training) == 4.0
    assert not folder.exists(LAST)
