"""Weights for the ResNet-18: from a file, or torchvision's, fetched once before trials start."""

import hashlib
from pathlib import Path
from typing import Final

import torch
from torch import Tensor
from torchvision.models import ResNet18_Weights

from tune_bisenet.arguments import NO_BACKBONE
from tune_bisenet.model import backbone_problems

IMAGENET: Final = "imagenet"
_WEIGHTS: Final = ResNet18_Weights.IMAGENET1K_V1


class BackboneError(ValueError):
    """The weights cannot be had or do not fit."""


def load(backbone: str) -> dict[str, Tensor] | None:
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


def digest(backbone: str) -> str:
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
