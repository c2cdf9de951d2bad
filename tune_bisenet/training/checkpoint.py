"""Save and load a run's state: whole or not at all, versioned, checked, and with no code in it.

A trial that goes on keeps three files: `last.pt` to go on from, `previous.pt` should that one be damaged, and
`best.pt`, the weights of its best epoch; that alone stays when the trial has ended (`endings`). Each is an archive
as torch writes it, followed by its SHA-256, which torch.load skips. The archive's own CRC-32 sums do not cover its
directory, where one flipped bit makes torch load anything as weights.
"""

import hashlib
import io
import logging
import pickle
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from tune_bisenet.options import NO_BACKBONE
from tune_bisenet.records import BEST_WEIGHTS, LAST, PREVIOUS, Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.training.engine import Training
from tune_bisenet.training.model import backbone_problems

_log = logging.getLogger(__name__)

IMAGENET: Final = "imagenet"
_WEIGHTS: Final = ResNet18_Weights.IMAGENET1K_V1


class BackboneError(ValueError):
    """The weights cannot be had or do not fit."""


def load_backbone(backbone: str) -> dict[str, Tensor] | None:
    """The weights of `imagenet`, of a file, or None for `none`. Raises BackboneError saying what to do."""
    if backbone == NO_BACKBONE:
        return None
    weights = _fetched() if backbone == IMAGENET else _read(Path(backbone))
    features = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    problems = backbone_problems(features)
    if problems:
        raise BackboneError(
            f"--backbone {backbone} is not a ResNet-18 under torchvision's names: {'; '.join(problems)}."
        )
    return features


def backbone_digest(backbone: str) -> str:
    """What stands for the weights in a run's identity: the same on every machine that has the same weights."""
    if backbone == NO_BACKBONE:
        return NO_BACKBONE
    if backbone == IMAGENET:
        return f"torchvision {_WEIGHTS}"
    return hashlib.sha256(Path(backbone).read_bytes()).hexdigest()[:16]


def _fetched() -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = _WEIGHTS.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # from the network, or as in `_read`
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(_WEIGHTS.url).name
        if cached.exists():
            raise BackboneError(f"{cached} cannot be read ({error}): delete it, and it is fetched again.") from error
        raise BackboneError(
            f"torchvision's ImageNet weights cannot be fetched from {_WEIGHTS.url} ({error}). Without a network, "
            "pass --backbone FILE with a ResNet-18 saved elsewhere, or --backbone none to train from scratch."
        ) from error
    return weights


def _read(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BackboneError(f"--backbone {path}: there is no such file. Pass imagenet, none or a file.") from error
    except Exception as error:  # a file of another kind is taken for a pickle, whose reader fails in any way it likes
        raise BackboneError(f"--backbone {path} cannot be read as weights saved by torch.save: {error}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise BackboneError(f"--backbone {path} does not hold a state dict of tensors.")
    return weights


FORMAT: Final = 1
ASIDE: Final = ".damaged"


class CheckpointError(ValueError):
    """The file is damaged, of another format, or of another run."""


class DamagedError(CheckpointError):
    """The file's bytes are not those that were written."""


def save(training: Training, history: list[Epoch], folder: Storage, *, identity: str) -> None:
    """Write `last.pt`, keeping the one before as `previous.pt`. `identity` says which run, data and precision."""
    state = _state(training, identity) | {
        "optimizer": training.optimizer.state_dict(),
        "history": [epoch.to_json() for epoch in history],
    }
    content = to_bytes(state)
    if folder.exists(LAST):
        folder.move(LAST, PREVIOUS)
    folder.write(LAST, content)


def save_best(training: Training, epoch: Epoch, folder: Storage, *, identity: str) -> None:
    """Write `best.pt`: the weights of this epoch, and what they scored."""
    folder.write(BEST_WEIGHTS, to_bytes(_state(training, identity) | {"epoch": epoch.to_json()}))


def _state(training: Training, identity: str) -> dict[str, Any]:
    """What every file holds: the weights, and what they are of."""
    return {
        "format": FORMAT,
        "identity": identity,
        "run": training.run.model_dump(mode="json"),
        "model": training.model.state_dict(),
    }


def resume(training: Training, folder: Storage, *, identity: str) -> list[Epoch]:
    """Bring `training` to where `folder` left it and return its epochs so far; an empty list if nothing is there.

    A damaged `last.pt` costs one epoch: `previous.pt` takes its place; if both are, the run begins anew. Raises
    CheckpointError if the state belongs to another run, which must never be trained on under this one's name.
    """
    for name in (LAST, PREVIOUS):
        content = folder.read(name)
        if content is None:
            continue
        try:
            state = from_bytes(content)
        except DamagedError as error:
            _log.warning("%s/%s is put aside as %s%s: %s", folder.path, name, name, ASIDE, error)
            folder.move(name, f"{name}{ASIDE}")  # or the next save would put it in place of the one that is whole
            continue
        _check_identity(state, identity, f"{folder.path}/{name}")
        return _restore(training, state)
    return []


def to_bytes(state: dict[str, Any]) -> bytes:
    """`state`, of tensors and plain values, as an archive and its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getvalue()


def from_bytes(content: bytes) -> dict[str, Any]:
    """The state `to_bytes` was given; runs no code from it. DamagedError, or CheckpointError if it is another thing."""
    digest_size = hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(content)[:-digest_size]).digest() != content[-digest_size:]:
        raise DamagedError("damaged: its SHA-256 is another")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError("not a state of plain values, and nothing else is ever loaded") from error
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"not of format {FORMAT}")
    return state


def _check_identity(state: dict[str, Any], identity: str, path: str) -> None:
    if state["identity"] != identity:
        raise CheckpointError(
            f"{path} was written by another run (identity {state['identity']}, this one is {identity}): its settings, "
            "data, backbone or precision differ. Give this search another --name, or move that folder away."
        )


def _restore(training: Training, state: dict[str, Any]) -> list[Epoch]:
    training.model.load_state_dict(state["model"])
    training.optimizer.load_state_dict(state["optimizer"])
    history = [Epoch.from_json(record) for record in state["history"]]
    training.epochs_done = len(history)
    return history
