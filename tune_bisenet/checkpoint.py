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
from typing import Any, Final

import torch

from tune_bisenet.engine import Training
from tune_bisenet.results import BEST, LAST, PREVIOUS, Epoch
from tune_bisenet.storage import Storage

FORMAT: Final = 1
ASIDE: Final = ".damaged"

log = logging.getLogger(__name__)


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
    folder.write(BEST, to_bytes(_state(training, identity) | {"epoch": epoch.to_json()}))


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
            log.warning("%s/%s is put aside as %s%s: %s", folder.path, name, name, ASIDE, error)
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
