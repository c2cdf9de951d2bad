"""A trained network as something that labels pictures: found in a search, or read from a file that was exported.

    load("results/paper")             the best trial of a search
    load("results/paper", run="r05")  the best trial of a row, or a trial by its name
    load("best.pt")                   one checkpoint; also model.onnx, model.pt2, model.safetensors, or their folder

Every form carries its `ModelCard`, so a file can be moved without losing what it is.

Shapes: B images, C classes, H x W pixels given to the network, h x w pixels of a picture.
"""

import json
import math
import os
import tempfile
from collections.abc import Callable, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps
from pydantic import Field
from torch import Tensor

from tune_bisenet.classes import CITYSCAPES, ClassSet
from tune_bisenet.config import STRIDE, Frozen, Precision, Run, format_size
from tune_bisenet.data.packing import resize_image
from tune_bisenet.options import InputError
from tune_bisenet.records import BEST_WEIGHTS, SEARCH, DamagedFileError, Manifest, read_manifest
from tune_bisenet.report.leaderboard import best_of_run
from tune_bisenet.report.read import read_search
from tune_bisenet.storage import Storage
from tune_bisenet.text import redact
from tune_bisenet.training import engine, losses
from tune_bisenet.training.alone import Device, choose_device
from tune_bisenet.training.checkpoint import CheckpointError, from_bytes
from tune_bisenet.training.model import BiSeNet

Form = Literal["checkpoint", "onnx", "torch", "safetensors"]
Output = Literal["logits", "classes"]

FILE_NAMES: Final[dict[Form, str]] = {"onnx": "model.onnx", "torch": "model.pt2", "safetensors": "model.safetensors"}
CARD: Final = "card"
"""Under which name an exported file holds its card, as JSON."""
CARD_JSON: Final = "model.json"

OVERLAY: Final = 0.55
"""How much of an overlay is the mask."""

Network = Callable[[Tensor], Tensor]
"""Takes uint8 B x 3 x H x W; returns logits, float B x C at any resolution, or class ids, uint8 B x H x W."""


class Check(Frozen):
    """Says how far an exported form was found to be from the network it was made of, on painted streets."""

    sizes: tuple[str, ...]
    same_class: float
    """The share of pixels with the same class."""
    max_difference: float | None
    """The largest difference of two logits; None where only class ids leave the form."""


class ModelCard(Frozen):
    """Says what a model is, where it comes from and what it scored. IoU and mIoU are in percent."""

    run: Run
    """The row as it was trained."""
    epoch: int
    miou: float
    """On the validation split, at the resolution of its labels."""
    iou: tuple[float | None, ...]
    """By class; None for one that occurs neither in labels nor in predictions."""
    classes: ClassSet = CITYSCAPES
    precision: Precision
    """That of the training and its validation."""
    search: str | None = None
    """These are None for a checkpoint outside of its search's folder."""
    trial: str | None = None
    data: str | None = None
    data_digest: str | None = None
    commit: str | None = None
    packages: dict[str, str] = Field(default_factory=dict)
    form: Form = "checkpoint"
    output: Output = "logits"
    check: Check | None = None

    @property
    def title(self) -> str:
        """Return search, trial and epoch, as far as they are known."""
        return " ".join(filter(None, [self.search, self.trial or self.run.name, f"epoch {self.epoch}"]))


@dataclass(frozen=True, eq=False)
class Prediction:
    """Holds what a model sees in one picture, at the picture's own size."""

    picture: NDArray[np.uint8]  # h x w x 3, RGB
    class_ids: NDArray[np.uint8]  # h x w: indices into the model's classes
    classes: ClassSet

    @cached_property
    def mask(self) -> Image.Image:
        """Return each pixel in the colour of its class."""
        return Image.fromarray(self.classes.palette()[self.class_ids])

    @cached_property
    def overlay(self) -> Image.Image:
        """Return the picture with the mask laid over it."""
        return Image.blend(Image.fromarray(self.picture), self.mask, OVERLAY)


@dataclass(frozen=True, eq=False)
class Model:
    """A network on a device, ready to label pictures."""

    card: ModelCard
    network: Network
    device: torch.device

    @property
    def classes(self) -> ClassSet:
        """Return the classes in the order of the ids that it predicts."""
        return self.card.classes

    def predict(self, picture: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor") -> Prediction:
        """Label a picture of any size.

        An array is RGB uint8, h x w x 3; a tensor 3 x h x w. Raises InputError if it is none, or a file is damaged.
        """
        pixels = read_picture(picture)
        size = network_size((pixels.shape[0], pixels.shape[1]), self.card.run.image_size)
        image = torch.from_numpy(resize_image(pixels, size))[None]
        ids = self.segment(image, (pixels.shape[0], pixels.shape[1]))
        return Prediction(pixels, ids[0].numpy(), self.classes)

    def segment(self, images: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the likeliest class of each pixel, as validation does: uint8 B x 3 x H x W to B x h x w, on the CPU.

        `size` is (h, w). A form that gives class ids is enlarged to it by the nearest pixel.
        """
        output = self.network(images.to(self.device))
        if output.ndim == 4:
            return losses.argmax(output, size).cpu()
        return F.interpolate(output[:, None].float(), size=size, mode="nearest-exact")[:, 0].to(torch.uint8).cpu()


def load(
    model: "str | os.PathLike[str]",
    run: str | None = None,
    *,
    device: Device = "auto",
    precision: Precision | None = None,
) -> Model:
    """Load the best trial of a search, or of a row or a trial named `run`; or one file, or the folder it is in.

    `precision` is that of the training unless given, where the device has it; exported forms compute in fp32. Raises
    InputError, and StorageError where object storage does not answer.
    """
    place = choose_device(device)
    folder, name = find_model(os.fspath(model), run)
    if name == BEST_WEIGHTS or name.endswith(".pt"):
        card, network = read_checkpoint(folder, name)
        if precision is None:
            precision = card.precision if card.precision == "fp32" or engine.supports_bf16(place) else "fp32"
        return Model(card, in_torch(network, place, precision), place)
    if precision == "bf16":
        raise InputError(f"{name} computes in fp32: --precision bf16 is for a checkpoint (best.pt).")
    with _local_file(folder, name) as path:
        return _OPENERS[path.suffix](path, place)


def network_size(size: tuple[int, int], image_size: tuple[int, int]) -> tuple[int, int]:
    """Return at which size (H, W) a picture of `size` is given to a network trained at `image_size`.

    As many pixels as it was trained on, in the picture's proportions, each side the nearest multiple of 32: objects
    then have about the size that they had in training, and frames of the training's proportions exactly that. No side
    is below 64 pixels unless training's was, since an exported PyTorch program takes none.
    """
    scale = math.sqrt(math.prod(image_size) / math.prod(size))
    least = min(2, min(image_size) // STRIDE)
    height, width = (max(least, round(side * scale / STRIDE)) * STRIDE for side in size)
    return height, width


# --- find a model ---------------------------------------------------------------------------------------------------


def find_model(address: str, run: str | None = None) -> tuple[Storage, str]:
    """Return the folder and the name of the file that `address` and `run` mean. Raises InputError with what to do."""
    place = Storage.at(address, fail_fast=True)
    suffix = Path(place.name).suffix
    if suffix in (".pt", *_OPENERS) and not place.exists(BEST_WEIGHTS):
        if run:
            raise InputError(f"{place.uri} is one model, and --run {run} chooses one of a search: leave --run out.")
        if not place.parent.exists(place.name):
            raise InputError(f"there is no file {place.uri}. Give a search's folder, STORAGE/NAME, or a model's file.")
        return place.parent, place.name
    if place.exists(SEARCH):
        return _find_trial(place, run), BEST_WEIGHTS
    if run:
        raise InputError(f"there is no search in {place.uri} for --run {run} to choose from: expected {SEARCH} there.")
    for name in (BEST_WEIGHTS, *FILE_NAMES.values()):
        if place.exists(name):
            return place, name
    raise InputError(
        f"there is no model in {place.uri}: expected {SEARCH} of a search, {BEST_WEIGHTS} of a trial, or one of "
        f"{', '.join(FILE_NAMES.values())}."
    )


def _find_trial(folder: Storage, run: str | None) -> Storage:
    search = read_search(folder)
    best = best_of_run(search.states, run)
    if best is None and run:
        names = ", ".join(dict.fromkeys(state.run for state in search.states if state.best_miou is not None))
        have = f"those that have one are {names}" if names else "no trial has one yet"
        raise InputError(f"--run {run}: no trial or row of that name in {folder.uri} has an mIoU; {have}.")
    if best is None:
        raise InputError(f"no trial in {folder.uri} has an mIoU yet: let the search train at least one epoch.")
    trial = folder / best.trial
    if not trial.exists(BEST_WEIGHTS):
        raise InputError(f"{trial.uri} has no {BEST_WEIGHTS}: it was moved or deleted. Choose another row with --run.")
    return trial


# --- checkpoints ----------------------------------------------------------------------------------------------------


def read_checkpoint(folder: Storage, name: str) -> tuple[ModelCard, BiSeNet]:
    """Return a trial's best network, without auxiliary heads, and what it is. Raises InputError if it is damaged."""
    content = folder.read(name)
    if content is None:
        raise InputError(f"there is no {name} in {folder.uri}.")
    try:
        state = from_bytes(content)
        run = Run.model_validate(state["run"])
        classes = ClassSet.model_validate(state["classes"]) if "classes" in state else CITYSCAPES
        epoch = state["epoch"]
        with torch.device("meta"):  # no weights are drawn: the caller's random numbers are left alone
            network = BiSeNet(num_classes=len(classes), head_width=run.head_width, auxiliary_heads=False)
        weights = {key: value for key, value in state["model"].items() if not key.startswith(("aux8.", "aux16."))}
        network.load_state_dict(weights, assign=True)
    except (CheckpointError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"{folder.uri}/{name} is not the best epoch of a trial as a search writes it: {reason}."
        ) from error
    card = ModelCard(
        run=run,
        epoch=epoch["epoch"],
        miou=epoch["miou"],
        iou=tuple(epoch["iou"]),
        classes=classes,
        precision="fp32",
    )
    return _with_search(card, folder), network.eval()


def _with_search(card: ModelCard, folder: Storage) -> ModelCard:
    """Return the card with what the search above the trial's folder knows, if there is one that can be read."""
    manifest: Manifest | None = None
    with suppress(DamagedFileError):  # the weights are good without it
        manifest = read_manifest(folder.parent)
    if manifest is None or (folder.name not in manifest.trials and not manifest.study):
        return card
    last = manifest.sessions[-1]
    known = {
        "precision": manifest.config.precision,
        "search": manifest.name,
        "trial": folder.name,
        "data": redact(manifest.config.data),
        "data_digest": manifest.data.digests.get(format_size(card.run.image_size)),
        "commit": last.commit,
        "packages": last.packages,
    }
    return ModelCard.model_validate(dict(card) | known)


def in_torch(network: BiSeNet, device: torch.device, precision: Precision) -> Network:
    """Return a function that gives the network's logits at 1/8 of the images' resolution, as validation has them."""
    engine.place(network, device, precision)

    def scores(images: Tensor) -> Tensor:
        return engine.main_logits(network, images, precision=precision)

    return scores


# --- exported forms -------------------------------------------------------------------------------------------------


def _open_onnx(path: Path, device: torch.device) -> Model:
    runtime = import_extra("onnxruntime", "export")
    providers = ["CPUExecutionProvider"]
    if device.type == "cuda" and "CUDAExecutionProvider" in runtime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()  # as many as for every other form
    try:
        session = runtime.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # ONNX Runtime's own classes share no base but this
        raise InputError(f"{path} cannot be opened by ONNX Runtime: {str(error).splitlines()[0]}") from error
    card = _read_card(path, session.get_modelmeta().custom_metadata_map.get(CARD))

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return Model(card, run, torch.device("cpu"))  # ONNX Runtime is given and gives arrays, wherever it computes


def _open_program(path: Path, device: torch.device) -> Model:
    extra = {CARD: ""}
    try:
        program = torch.export.load(path, extra_files=extra).module().to(device)
    except Exception as error:  # a zip file that is damaged can fail in any way
        raise InputError(f"{path} cannot be opened as an exported PyTorch program: {error}") from error

    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        output: Tensor = program(images)
        return output

    return Model(_read_card(path, extra[CARD]), run, device)


def _open_safetensors(path: Path, device: torch.device) -> Model:
    safetensors = import_extra("safetensors", "export")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            card = _read_card(path, (file.metadata() or {}).get(CARD))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # it is no dict
        with torch.device("meta"):
            network = BiSeNet(num_classes=len(card.classes), head_width=card.run.head_width, auxiliary_heads=False)
        network.load_state_dict(weights, assign=True)
    except InputError:
        raise
    except Exception as error:  # a damaged file, or the weights of another network
        raise InputError(f"{path} does not hold the weights of a BiSeNet: {str(error).splitlines()[0]}") from error
    return Model(card, in_torch(network, device, "fp32"), device)


_OPENERS: Final[dict[str, Callable[[Path, torch.device], Model]]] = {
    ".onnx": _open_onnx,
    ".pt2": _open_program,
    ".safetensors": _open_safetensors,
}


def _read_card(path: Path, text: str | bytes | None) -> ModelCard:
    try:
        return ModelCard.model_validate_json(text or "")
    except ValueError as error:
        raise InputError(f"{path} holds no card of a model: it was not written by `tune_bisenet export`.") from error


def import_extra(module: str, extra: str) -> Any:
    """Import a package that is not always installed. Raises InputError with the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise InputError(f"{module} is not installed: pip install 'tune-bisenet[{extra}]'.") from error


@contextmanager
def _local_file(folder: Storage, name: str) -> Any:
    """Give the file's path on this machine, of a copy if it lies in object storage."""
    if folder.local_path:
        yield folder.local_path / name
        return
    with tempfile.TemporaryDirectory() as copy:
        folder.download(name, Path(copy) / name)
        yield Path(copy) / name


# --- pictures -------------------------------------------------------------------------------------------------------


def read_picture(picture: "str | os.PathLike[str] | Image.Image | NDArray[np.uint8] | Tensor") -> NDArray[np.uint8]:
    """Return RGB uint8 h x w x 3, turned as its camera was held. Raises InputError if it is no picture."""
    if isinstance(picture, Tensor):
        picture = picture.permute(1, 2, 0).cpu().numpy() if picture.ndim == 3 else picture.cpu().numpy()
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3 or 0 in picture.shape:
            raise InputError(
                f"a picture is uint8 RGB, an array h x w x 3 or a tensor 3 x h x w: this is {picture.dtype} of shape "
                f"{picture.shape}."
            )
        return np.ascontiguousarray(picture)
    if isinstance(picture, Image.Image):
        return np.asarray(ImageOps.exif_transpose(picture).convert("RGB"))
    try:
        with Image.open(picture) as opened:
            return np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:  # all that Pillow raises
        raise InputError(f"{os.fspath(picture)} cannot be read as a picture: {error}") from error


def scored_classes(card: ModelCard, iou: Iterable[float | None]) -> list[tuple[str, float | None]]:
    """Return each class's name with its IoU."""
    return list(zip(card.classes.names, iou, strict=True))


def to_card_json(card: ModelCard) -> str:
    """Return the card as JSON for a file and for people."""
    return json.dumps(card.model_dump(mode="json"), indent=1) + "\n"
