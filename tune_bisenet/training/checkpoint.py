"""Save and load a run's state, whole or not at all, versioned, checked and without code; load backbone weights.

A running trial has three files: `last.pt` and `previous.pt`, the states after its last two epochs, and `best.pt`, the
weights of its best epoch, which alone remains when the trial has ended. The first two are written in turns, so that a
save is one file written whole, and never a rename, which object storage does not have; what they hold says which is
newer. Where rows are the same training until the loss of one switches, the first to come there keeps its state for the
others, in a folder beside the trials'. Each file is an archive as torch writes it, followed by its SHA-256, which
torch.load skips. The archive's own CRC-32 sums do not cover its directory, where one flipped bit makes torch load
anything as weights.
"""

import hashlib
import io
import logging
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

import torch
from pydantic import TypeAdapter
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.config import Run
from tune_bisenet.options import NO_BACKBONE, InputError
from tune_bisenet.records import BEST_PREDICTIONS, BEST_WEIGHTS, LAST, PREVIOUS, Epoch
from tune_bisenet.storage import Storage
from tune_bisenet.text import one_line
from tune_bisenet.training.engine import Training

_log = logging.getLogger(__name__)

FORMAT: Final = 1
DAMAGED_SUFFIX: Final = ".damaged"
_EPOCHS: Final = TypeAdapter(list[Epoch])
IMAGENET: Final = "imagenet"
_WEIGHTS: Final = ResNet18_Weights.IMAGENET1K_V1


class CheckpointError(ValueError):
    """The file is damaged, of another format, or of another run."""


class DamagedError(CheckpointError):
    """The file's bytes are not those that were written, or hold more than `save` writes."""


@dataclass(frozen=True)
class State:
    """Holds what a training changes. It changes with the training, unless it is a copy."""

    run: Run
    classes: ClassSet
    model: dict[str, Tensor]
    optimizer: dict[str, Any]

    def copied(self) -> Self:
        """Return a copy on the CPU."""
        return type(self)(self.run, self.classes, _copied(self.model), _copied(self.optimizer))


def state_of(training: Training) -> State:
    """Return the weights and the optimizer's numbers as they are now."""
    return State(training.run, training.classes, training.model.state_dict(), training.optimizer.state_dict())


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    return [_copied(item) for item in value] if isinstance(value, list) else value


def save(state: State, history: Sequence[Epoch], folder: Storage, *, identity: str) -> None:
    """Write the state over that of two epochs ago. `identity` names run, data and precision."""
    folder.write(LAST if len(history) % 2 else PREVIOUS, to_bytes(_whole_content(state, history, identity)))


def save_best(state: State, epoch: Epoch, folder: Storage, *, identity: str) -> None:
    """Write `best.pt`: the weights of this epoch, and what they scored."""
    folder.write(BEST_WEIGHTS, to_bytes(_content(state, identity) | {"epoch": _EPOCHS.dump_python([epoch])[0]}))


def save_beginning(
    state: State, history: Sequence[Epoch], folder: Storage, kept: Storage, *, trial: str, identity: str
) -> None:
    """Write the state of `trial` to `kept`, with what its own `folder` has of its best epoch."""
    kept.make()
    for name in (BEST_WEIGHTS, BEST_PREDICTIONS):
        content = folder.read(name)
        assert content is not None, f"{trial} has no {name} after epoch {len(history)}"
        kept.write(name, content)
    # Last, as it says that the rest is there.
    kept.write(LAST, to_bytes(_whole_content(state, history, identity) | {"trial": trial}))


def load_beginning(
    training: Training, folder: Storage, kept: Storage, *, identity: str, kept_identity: str
) -> tuple[str, list[Epoch]]:
    """Begin `training` from the state in `kept`; return the trial that trained it and its epochs.

    The best epoch so far is written to the trial's own `folder`, as of `identity`. There are no epochs if the state is
    missing or damaged: the trial then trains them itself. Raises CheckpointError as `resume` does.
    """
    contents = [kept.read(name) for name in (LAST, BEST_WEIGHTS, BEST_PREDICTIONS)]
    if None in contents:
        return "", []
    try:
        state, best = (from_bytes(content or b"") for content in contents[:2])
        if state.get("identity") != kept_identity:
            raise CheckpointError(f"of another beginning (identity {state.get('identity')})")
    except CheckpointError as error:
        _log.warning("%s is not used, and the trial trains all its epochs: %s", kept.path, error)
        return "", []
    history = _load(training, [state], kept)
    folder.write(BEST_WEIGHTS, to_bytes(best | {"identity": identity, "run": training.run.model_dump(mode="json")}))
    folder.write(BEST_PREDICTIONS, contents[2] or b"")
    return state["trial"], history


def _whole_content(state: State, history: Sequence[Epoch], identity: str) -> dict[str, Any]:
    """Return all that a training needs to continue."""
    return _content(state, identity) | {"optimizer": state.optimizer, "history": _EPOCHS.dump_python(list(history))}


def _content(state: State, identity: str) -> dict[str, Any]:
    """Return what every file holds: the weights, which run they belong to, and the classes if not Cityscapes' own."""
    own_classes = {} if state.classes == CITYSCAPES else {"classes": state.classes.model_dump(mode="json")}
    return own_classes | {
        "format": FORMAT,
        "identity": identity,
        "run": state.run.model_dump(mode="json"),
        "model": state.model,
    }


def resume(training: Training, folder: Storage, *, identity: str) -> list[Epoch]:
    """Restore `training` from `folder` and return its epochs so far; an empty list if there is no state.

    The newer of the two states counts. If that is damaged, or holds code, it costs one epoch: the other replaces it; if
    both are, the run starts again. Raises CheckpointError if a state is of another format, or belongs to another run,
    which must never be continued under this one's name, or does not fit into the training, which may then be half
    restored.
    """
    states = []
    for name in (LAST, PREVIOUS):
        content = folder.read(name)
        if content is None:
            continue
        try:
            state = from_bytes(content)
            if not {"optimizer", "history"} <= state.keys():
                raise DamagedError("not a state to resume from")
        except DamagedError as error:
            _log.warning("%s/%s is renamed to %s%s: %s", folder.path, name, name, DAMAGED_SUFFIX, error)
            folder.move(name, f"{name}{DAMAGED_SUFFIX}")
            continue
        except CheckpointError as error:
            raise CheckpointError(
                f"{folder.path}/{name} is {error}: another version of tune_bisenet wrote it. Resume with that version, "
                "give this search another --name, or move that folder away."
            ) from None
        if state.get("identity") != identity:
            raise CheckpointError(
                f"{folder.path}/{name} was written by another run (identity {state.get('identity')}, this one is "
                f"{identity}): its settings, data, backbone or precision differ. Give this search another --name, or "
                "move that folder away."
            )
        states.append(state)
    return _load(training, states, folder) if states else []


def _load(training: Training, states: Sequence[dict[str, Any]], folder: Storage) -> list[Epoch]:
    """Let `training` continue from the newest of states that were read from `folder`, and return its epochs."""
    try:
        state = max(states, key=lambda state: len(state["history"]))
        training.model.load_state_dict(state["model"])
        training.optimizer.load_state_dict(state["optimizer"])
        history = _EPOCHS.validate_python(state["history"])
    except torch.OutOfMemoryError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:  # torch has no class for it
        raise CheckpointError(
            f"the state in {folder.path} is not what a training saves ({one_line(error)}), though its checksum is "
            "right. Move that folder away: the trial then starts again."
        ) from error
    training.epochs_done = len(history)
    return history


def to_bytes(state: dict[str, Any]) -> bytes:
    """Return `state`, of tensors and plain values, as an archive and its SHA-256."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    return buffer.getvalue()


def from_bytes(content: bytes) -> dict[str, Any]:
    """Return the state passed to `to_bytes`. Raises DamagedError, also for code; CheckpointError for another format."""
    digest_size = hashlib.sha256().digest_size
    if hashlib.sha256(memoryview(content)[:-digest_size]).digest() != content[-digest_size:]:
        raise DamagedError("damaged: its SHA-256 does not match")
    try:
        state = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle can fail in any way; torch then advises to load it all the same
        if isinstance(error, MemoryError) or "allocate memory" in str(error):
            raise
        raise DamagedError("not a state of plain values, and nothing else is loaded") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise CheckpointError(f"not of format {FORMAT}")
    return state


def load_backbone(backbone: str) -> dict[str, Tensor] | None:
    """Return the weights of `imagenet` or of a file; None for `none`. Raises InputError with what to do."""
    if backbone == NO_BACKBONE:
        return None
    weights = _load_imagenet() if backbone == IMAGENET else _load_file(Path(backbone))
    resnet = resnet18(weights=None)
    resnet.fc = nn.Identity()  # the classifier is not part of BiSeNet
    features = {key: value for key, value in weights.items() if not key.startswith("fc.")}
    wanted = {key: tuple(value.shape) for key, value in resnet.state_dict().items()}
    problems = [f"{key} is missing" for key in wanted if key not in features]
    problems += [f"{key} is unknown" for key in features if key not in wanted]
    problems += [
        f"{key} has shape {tuple(features[key].shape)} and should have {shape}"
        for key, shape in wanted.items()
        if key in features and features[key].shape != shape
    ]
    if problems:
        listed = "; ".join(problems[:5])  # another network has hundreds
        raise InputError(f"--backbone {backbone} is not a ResNet-18 under torchvision's names: {listed}.")
    return features


def backbone_digest(backbone: str) -> str:
    """Return what identifies the weights: equal on all machines that have the same ones."""
    if backbone == NO_BACKBONE:
        return NO_BACKBONE
    if backbone == IMAGENET:
        return f"torchvision {_WEIGHTS}"
    return hashlib.sha256(Path(backbone).read_bytes()).hexdigest()[:16]


def _load_imagenet() -> dict[str, Tensor]:
    try:
        weights: dict[str, Tensor] = _WEIGHTS.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # from the network, or as in `_load_file`
        cached = Path(torch.hub.get_dir()) / "checkpoints" / Path(_WEIGHTS.url).name
        if cached.exists():
            raise InputError(f"{cached} cannot be read ({_reason(error)}): delete it to fetch it again.") from None
        raise InputError(
            f"torchvision's ImageNet weights cannot be fetched from {_WEIGHTS.url} ({error}). Without a network, "
            "pass --backbone FILE with a ResNet-18 saved elsewhere, or --backbone none to train from scratch."
        ) from error
    return weights


def _reason(error: Exception) -> str:
    """Return why weights were not loaded, without torch's advice, which is to run the code that is in the file."""
    is_refused = isinstance(error, pickle.UnpicklingError)
    return "it does not hold tensors alone, and nothing else is loaded" if is_refused else str(error)


def _load_file(path: Path) -> dict[str, Tensor]:
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise InputError(f"--backbone {path}: there is no such file. Pass imagenet, none or a file.") from error
    except Exception as error:  # a file of another kind is read as a pickle, which can fail in any way
        raise InputError(f"--backbone {path} cannot be read as weights saved by torch.save: {_reason(error)}") from None
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise InputError(f"--backbone {path} does not hold a state dict of tensors.")
    return weights
