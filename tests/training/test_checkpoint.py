"""A state is restored exactly as it was saved, or not at all; backbone weights load, or the error says what to do."""

import hashlib
import io
import math
import pickle
import random
import socket
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.rows import plain_epoch
from torch import Tensor
from torchvision.models import resnet18
from trainings import begin, small, trial_folder

from tune_bisenet import storage
from tune_bisenet.config import Run
from tune_bisenet.data.packed import Packed
from tune_bisenet.options import InputError
from tune_bisenet.records import BEST_WEIGHTS, LAST, PREVIOUS, Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.training import checkpoint
from tune_bisenet.training.checkpoint import CheckpointError, DamagedError, from_bytes, to_bytes
from tune_bisenet.training.engine import Training

folder = pytest.fixture(trial_folder)


@pytest.fixture
def training(tiny_run: Run, small_data: Packed) -> Training:
    """Give a run before its first epoch."""
    return begin(small(tiny_run), small_data)


def history_of(num_epochs: int) -> list[Epoch]:
    return [plain_epoch(number, 10.0) for number in range(1, num_epochs + 1)]


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
        checkpoint.save(checkpoint.state_of(training), history_of(number), folder, identity="one")


def local(folder: Storage, name: str) -> Path:
    return Path(folder.path) / name


def epochs_kept(folder: Storage) -> set[int]:
    """Return the number of epochs of each state."""
    return {len(from_bytes(local(folder, name).read_bytes())["history"]) for name in (LAST, PREVIOUS)}


def newest(folder: Storage) -> Path:
    """Return the newest state. A search's own program goes by what they hold, as a copy's times say nothing."""
    return max((local(folder, name) for name in (LAST, PREVIOUS)), key=lambda path: path.stat().st_mtime_ns)


# --- resuming ---------------------------------------------------------------------------------------------------


def test_a_run_resumes_from_the_last_saved_epoch_and_the_one_before_is_kept(
    training: Training, folder: Storage
) -> None:
    assert checkpoint.resume(training, folder, identity="one") == []
    assert training.epochs_done == 0, "nothing was saved"
    save_epochs(training, folder, 3)
    mark(training, -1.0)
    assert checkpoint.resume(training, folder, identity="one") == history_of(3)
    assert training.epochs_done == 3
    assert mark_of(training) == 3.0
    assert sorted(path.name for path in Path(folder.path).iterdir()) == [LAST, PREVIOUS]
    assert epochs_kept(folder) == {2, 3}
    checkpoint.save(checkpoint.state_of(training), history_of(4), folder, identity="one")
    assert epochs_kept(folder) == {3, 4}
    assert len(checkpoint.resume(training, folder, identity="one")) == 4


def test_a_save_writes_one_file_and_moves_none(training: Training, folder: Storage) -> None:
    class WriteOnly(Storage):
        """A folder of which nothing is renamed, deleted or looked up."""

        def _refuse(self, *_: Any) -> Any:
            raise AssertionError("a save is one file that is written")

        move = delete = exists = stat = read = _refuse

    save_epochs(training, WriteOnly.at(folder.path), 3)
    assert epochs_kept(folder) == {2, 3}


def test_nan_and_missing_scores_are_restored(training: Training, folder: Storage) -> None:
    strange = plain_epoch(1, 10.0, loss=math.nan, grad_norm=math.inf, iou=(None, 12.5, None))
    checkpoint.save(
        checkpoint.state_of(training), [plain_epoch(1, 10.0, iou=(None, 12.5, None))], folder, identity="one"
    )
    assert checkpoint.resume(training, folder, identity="one")[0].iou == (None, 12.5, None)
    checkpoint.save(checkpoint.state_of(training), [strange], folder, identity="one")
    (found,) = checkpoint.resume(training, folder, identity="one")
    assert math.isnan(found.loss)
    assert math.isnan(found.grad_norm)  # an infinity has no place in JSON and comes back as NaN
    assert found.diverged
    assert math.isnan(found.miou)
    assert found.loss_main == 1.0


# --- damage -----------------------------------------------------------------------------------------------------


def die_while_saving(training: Training, folder: Storage) -> None:
    """Save the third epoch in a process that dies when half of the file is written."""
    put = storage._put

    def put_half(filesystem: Any, path: str, content: bytes, metadata: Any = None) -> None:
        put(filesystem, path, content[: len(content) // 2], metadata)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, "_put", put_half)
        with pytest.raises(KeyboardInterrupt):
            checkpoint.save(checkpoint.state_of(training), history_of(3), folder, identity="one")


def test_a_process_that_dies_while_saving_loses_that_epoch_only(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    mark(training, 3.0)
    die_while_saving(training, folder)
    assert epochs_kept(folder) == {1, 2}
    assert len(checkpoint.resume(training, folder, identity="one")) == 2
    assert mark_of(training) == 2.0
    checkpoint.save(checkpoint.state_of(training), history_of(3), folder, identity="one")
    assert len(checkpoint.resume(training, folder, identity="one")) == 3
    assert epochs_kept(folder) == {2, 3}


@pytest.mark.parametrize("damage", ["cut short", "emptied", "a byte flipped", "not a state at all", "best.pt"])
def test_a_damaged_state_costs_one_epoch(
    training: Training, folder: Storage, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    save_epochs(training, folder, 2)
    path = newest(folder)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 1
    path.write_bytes(
        {
            "cut short": bytes(content[:-1000]),
            "emptied": b"",
            "a byte flipped": bytes(content),
            "not a state at all": b"<html>503 Service Unavailable</html>",
            "best.pt": to_bytes({"format": checkpoint.FORMAT, "identity": "one", "model": {}, "epoch": {}}),
        }[damage]
    )
    assert len(checkpoint.resume(training, folder, identity="one")) == 1
    assert mark_of(training) == 1.0
    assert f"{path.name}.damaged" in caplog.text
    checkpoint.save(checkpoint.state_of(training), history_of(2), folder, identity="one")
    assert epochs_kept(folder) == {1, 2}


def test_a_damaged_older_state_costs_nothing(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 3)
    newest(folder).with_name(PREVIOUS).write_bytes(b"")
    assert len(checkpoint.resume(training, folder, identity="one")) == 3
    assert mark_of(training) == 3.0


def small_state() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    return {
        "format": checkpoint.FORMAT,
        "identity": "one",
        "model": {"weight": torch.randn(8, 9, generator=generator), "steps": torch.tensor(7)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.randn(8, 9, generator=generator)}}},
        "history": [asdict(plain_epoch(1, 10.0))],
    }


def same(left: Any, right: Any) -> bool:
    if isinstance(left, Tensor):
        return isinstance(right, Tensor) and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    return bool(left == right)


def test_a_state_comes_back_as_it_was_and_torch_itself_can_read_it() -> None:
    content = to_bytes(small_state())
    assert same(from_bytes(content), small_state())
    assert same(torch.load(io.BytesIO(content), weights_only=True), small_state())


def test_every_flipped_bit_and_every_missing_end_is_noticed() -> None:
    """Not even in the archive's directory, where torch would load whatever lies in memory silently."""
    content = to_bytes(small_state())
    bits = random.Random(0)
    for position in range(len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << bits.randrange(8)
        with pytest.raises(CheckpointError):
            from_bytes(bytes(damaged))
    for length in (0, 1, 31, 32, 33, 1000, -1):
        with pytest.raises(CheckpointError, match="damaged"):
            from_bytes(content[:length])


def test_the_bit_that_makes_torch_load_random_memory_is_noticed() -> None:
    content = bytearray(to_bytes(small_state()))
    entry = content.rindex(b"archive/data/0") - 46  # in the archive's directory, behind a header of 46 bytes
    content[entry + 38] ^= 0x10  # "is a folder", among the attributes no checksum covers
    silently = torch.load(io.BytesIO(bytes(content)), weights_only=True)
    assert silently.keys() == small_state().keys()  # the weight's memory is never written to: it may hold anything
    with pytest.raises(CheckpointError, match="damaged"):
        from_bytes(bytes(content))


# --- what must never be loaded ----------------------------------------------------------------------------------


class Exploit:
    """Creates a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


def test_code_in_a_state_does_not_run_and_the_state_before_replaces_it(
    training: Training, folder: Storage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trace = tmp_path / "the code ran"
    pickle.loads(pickle.dumps(Exploit(trace)))
    assert trace.exists(), "the exploit works"
    trace.unlink()

    save_epochs(training, folder, 2)
    hostile = {
        "in a state": to_bytes(small_state() | {"extra": Exploit(trace)}),
        "a pickle": sealed(pickle.dumps(Exploit(trace), protocol=2)),
        "nothing at all": sealed(b""),
        "half an archive": sealed(to_bytes(small_state())[:1000]),
    }
    for kind, content in hostile.items():
        with pytest.raises(DamagedError, match="not a state of plain values") as refused:
            from_bytes(content)
        shown = "".join(traceback.format_exception(refused.value))
        assert "weights_only" not in shown, f"{kind}: torch's advice is to run it"
        folder.write(PREVIOUS, content)
        assert len(checkpoint.resume(training, folder, identity="one")) == 1, f"{kind}: last.pt replaces it"
        assert mark_of(training) == 1.0
    assert caplog.text.count("previous.pt.damaged: not a state of plain values") == len(hostile)
    assert not trace.exists()
    for name in (LAST, PREVIOUS):
        folder.write(name, hostile["a pickle"])
    assert checkpoint.resume(training, folder, identity="one") == [], "begins again"
    assert not trace.exists()


def sealed(content: bytes) -> bytes:
    """Return what has a right checksum, whatever it is."""
    return content + hashlib.sha256(content).digest()


def test_the_state_of_another_run_is_refused_saying_what_to_do(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    mark(training, -1.0)
    with pytest.raises(CheckpointError, match=r"last\.pt .*identity one, this one is two.*--name"):
        checkpoint.resume(training, folder, identity="two")
    folder.delete(LAST)
    with pytest.raises(CheckpointError, match=r"previous\.pt"):
        checkpoint.resume(training, folder, identity="two")
    assert (training.epochs_done, mark_of(training)) == (0, -1.0)


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {}},
        {"model": [1]},
        {"model": {"head.1.bias": torch.zeros(1)}},
        {"optimizer": None},
        {"optimizer": {"state": {}, "param_groups": []}},
        {"history": [{}]},
        {"history": 3},
    ],
    ids=str,
)
def test_a_state_that_does_not_fit_is_refused_saying_what_to_do(
    training: Training, folder: Storage, changes: dict[str, Any]
) -> None:
    whole = checkpoint._content(checkpoint.state_of(training), "one") | {
        "optimizer": training.optimizer.state_dict(),
        "history": [],
    }
    folder.write(LAST, to_bytes(whole | changes))
    with pytest.raises(CheckpointError, match="Move that folder away"):
        checkpoint.resume(training, folder, identity="one")


@pytest.mark.parametrize("state", [{"format": checkpoint.FORMAT + 1}, {"format": None}, {}, [1, 2]])
def test_another_format_is_refused(state: Any) -> None:
    with pytest.raises(CheckpointError, match=f"not of format {checkpoint.FORMAT}"):
        from_bytes(to_bytes(state))


def test_a_state_of_another_format_is_left_alone_saying_what_to_do(training: Training, folder: Storage) -> None:
    save_epochs(training, folder, 2)
    folder.write(LAST, to_bytes({"format": checkpoint.FORMAT + 1}))
    with pytest.raises(CheckpointError, match=r"last\.pt is not of format .* --name"):
        checkpoint.resume(training, folder, identity="one")
    assert folder.exists(LAST)


def test_the_best_weights_come_with_their_score(training: Training, folder: Storage) -> None:
    mark(training, 4.0)
    checkpoint.save_best(checkpoint.state_of(training), plain_epoch(4, 33.0), folder, identity="one")
    state = from_bytes(local(folder, BEST_WEIGHTS).read_bytes())
    assert state["identity"] == "one"
    assert Run.model_validate(state["run"]) == training.run
    assert state["epoch"]["miou"] == 33.0
    training.model.load_state_dict(state["model"])
    assert mark_of(training) == 4.0
    assert not folder.exists(LAST)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(resnet18(weights=None).state_dict())


def saved(folder: Path, content: Any) -> str:
    path = folder / "weights.pt"
    torch.save(content, path)
    return str(path)


@pytest.fixture
def torch_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give an empty cache for what torchvision downloads, on a machine without a network."""

    def refuse(*_arguments: object, **_options: object) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


# --- backbone weights from a file -------------------------------------------------------------------------------


@pytest.mark.parametrize("with_classifier", [True, False])
def test_a_file_gives_the_features_of_a_resnet(
    weights: dict[str, Tensor], tmp_path: Path, with_classifier: bool
) -> None:
    content = {key: value for key, value in weights.items() if with_classifier or not key.startswith("fc.")}
    loaded = checkpoint.load_backbone(saved(tmp_path, content))
    assert loaded is not None
    assert loaded.keys() == weights.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


NO_WEIGHTS = (b"", b"hello", b"PK\x03\x04 and no more")


def test_what_is_no_file_of_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    for refused in (tmp_path / "nowhere.pt", tmp_path):
        with pytest.raises(InputError, match=refused.name):
            checkpoint.load_backbone(str(refused))
    for content in (*NO_WEIGHTS, pickle.dumps({"a": [1]}, protocol=2)):
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"weights\.pt"):
            checkpoint.load_backbone(str(path))
    for state in ([1, 2], {"state_dict": {}, "epoch": 3}, {"conv1.weight": 1.0}):
        with pytest.raises(InputError, match="state dict of tensors"):
            checkpoint.load_backbone(saved(tmp_path, state))


def test_missing_strange_and_misshapen_tensors_are_named(weights: dict[str, Tensor], tmp_path: Path) -> None:
    changed = weights | {"layer5.conv.weight": torch.zeros(1), "conv1.weight": torch.zeros(64, 4, 7, 7)}
    del changed["layer1.0.conv1.weight"]
    with pytest.raises(InputError, match="ResNet-18") as refusal:
        checkpoint.load_backbone(saved(tmp_path, changed))
    assert "layer1.0.conv1.weight is missing" in str(refusal.value)
    assert "layer5.conv.weight is unknown" in str(refusal.value)
    assert "conv1.weight has shape (64, 4, 7, 7) and should have (64, 3, 7, 7)" in str(refusal.value)
    content = {f"module.{key}": value for key, value in weights.items()}
    with pytest.raises(InputError, match=r"conv1\.weight is missing") as refusal:
        checkpoint.load_backbone(saved(tmp_path, content))
    assert str(refusal.value).count(" is missing") == 5


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "the code ran"
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Exploit(trace), protocol=2))
    for file in (str(path), saved(tmp_path, {"conv1.weight": Exploit(trace)})):
        with pytest.raises(InputError, match="nothing else is loaded") as refused:
            checkpoint.load_backbone(file)
        shown = "".join(traceback.format_exception(refused.value))
        assert "weights_only" not in shown, "torch's advice is to run it"
    assert not trace.exists()


@pytest.mark.usefixtures("torch_cache")
def test_without_a_network_imagenet_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(InputError, match=r"https://.*--backbone FILE .* --backbone none"):
        checkpoint.load_backbone("imagenet")


def test_cached_weights_need_no_network(weights: dict[str, Tensor], torch_cache: Path) -> None:
    torch.save(weights, torch_cache / "resnet18-f37072fd.pth")
    loaded = checkpoint.load_backbone("imagenet")
    assert loaded is not None
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


@pytest.mark.parametrize("content", NO_WEIGHTS)
def test_a_damaged_cache_is_named(torch_cache: Path, content: bytes) -> None:
    (torch_cache / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(InputError, match=r"resnet18-f37072fd\.pth .* delete it"):
        checkpoint.load_backbone("imagenet")


def test_the_digest_depends_on_the_content_and_not_on_the_path(tmp_path: Path) -> None:
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("c.pt", b"two")):
        (tmp_path / name).write_bytes(content)
    first, same, other = (checkpoint.backbone_digest(str(tmp_path / name)) for name in ("a.pt", "b.pt", "c.pt"))
    assert first == same
    assert len({first, other, checkpoint.backbone_digest("none"), checkpoint.backbone_digest("imagenet")}) == 4
