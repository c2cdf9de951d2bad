"""Weights for the ResNet-18: from a file, from torchvision's cache, or a clear word on why not."""

import pickle
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models import resnet18

from tune_bisenet.training import checkpoint
from tune_bisenet.training.checkpoint import BackboneError
from tune_bisenet.training.model import BiSeNet


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
    """An empty cache for what torchvision downloads, on a machine without a network."""

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


# --- from a file ------------------------------------------------------------------------------------------------


def test_none_means_training_from_scratch() -> None:
    assert checkpoint.load_backbone("none") is None


@pytest.mark.parametrize("with_classifier", [True, False])
def test_a_file_gives_the_features_of_a_resnet(
    weights: dict[str, Tensor], tmp_path: Path, with_classifier: bool
) -> None:
    content = {key: value for key, value in weights.items() if with_classifier or not key.startswith("fc.")}
    loaded = checkpoint.load_backbone(saved(tmp_path, content))
    assert loaded is not None
    assert loaded.keys() == weights.keys() - {"fc.weight", "fc.bias"}
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())
    BiSeNet().load_backbone(loaded)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"nowhere.pt: there is no such file. Pass imagenet, none or a file"):
        checkpoint.load_backbone(str(tmp_path / "nowhere.pt"))


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(BackboneError, match=r"cannot be read as weights saved by torch\.save"):
        checkpoint.load_backbone(str(tmp_path))


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"PK\x03\x04 and no more", pickle.dumps({"conv1.weight": [1, 2]}, protocol=2)]
)
def test_a_file_that_holds_no_weights_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    with pytest.raises(BackboneError, match=r"cannot be read as weights|does not hold a state dict of tensors"):
        checkpoint.load_backbone(str(path))


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}, "epoch": 3}, {"conv1.weight": 1.0}])
def test_a_file_with_something_else_is_refused(tmp_path: Path, content: Any) -> None:
    with pytest.raises(BackboneError, match="does not hold a state dict of tensors"):
        checkpoint.load_backbone(saved(tmp_path, content))


def test_another_network_is_refused_with_what_is_wrong(weights: dict[str, Tensor], tmp_path: Path) -> None:
    content = {f"module.{key}": value for key, value in weights.items()}
    with pytest.raises(BackboneError, match=r"not a ResNet-18 under torchvision's names: conv1.weight is missing"):
        checkpoint.load_backbone(saved(tmp_path, content))


def test_code_in_a_file_does_not_run(tmp_path: Path) -> None:
    trace = tmp_path / "the code ran"
    path = tmp_path / "weights.pt"
    path.write_bytes(pickle.dumps(Exploit(trace), protocol=2))
    with pytest.raises(BackboneError, match="cannot be read as weights"):
        checkpoint.load_backbone(str(path))
    with pytest.raises(BackboneError, match="cannot be read as weights"):
        checkpoint.load_backbone(saved(tmp_path, {"conv1.weight": Exploit(trace)}))
    assert not trace.exists()


class Exploit:
    """What unpickling it would do: leave a file behind."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return (Path.touch, (self.trace,))


# --- from torchvision -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("torch_cache")
def test_without_a_network_imagenet_is_an_error_that_says_what_to_pass() -> None:
    with pytest.raises(BackboneError, match=r"cannot be fetched from https://.*--backbone FILE .* --backbone none"):
        checkpoint.load_backbone("imagenet")


def test_weights_that_were_fetched_before_need_no_network(weights: dict[str, Tensor], torch_cache: Path) -> None:
    torch.save(weights, torch_cache / "resnet18-f37072fd.pth")
    loaded = checkpoint.load_backbone("imagenet")
    assert loaded is not None
    assert all(torch.equal(value, weights[key]) for key, value in loaded.items())


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and no more"])
def test_a_damaged_cache_is_an_error_in_words(torch_cache: Path, content: bytes) -> None:
    (torch_cache / "resnet18-f37072fd.pth").write_bytes(content)
    with pytest.raises(
        BackboneError, match=r"resnet18-f37072fd\.pth cannot be read .* delete it, and it is fetched again"
    ):
        checkpoint.load_backbone("imagenet")


# --- what stands for the weights --------------------------------------------------------------------------------


def test_the_digest_follows_the_content_and_not_the_path(tmp_path: Path) -> None:
    for name, content in (("a.pt", b"one"), ("b.pt", b"one"), ("c.pt", b"two")):
        (tmp_path / name).write_bytes(content)
    first, same, other = (checkpoint.backbone_digest(str(tmp_path / name)) for name in ("a.pt", "b.pt", "c.pt"))
    assert first == same != other


def test_every_kind_of_backbone_has_a_digest_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"one")
    digests = [checkpoint.backbone_digest(place) for place in ("none", "imagenet", str(tmp_path / "a.pt"))]
    assert len(set(digests)) == 3
