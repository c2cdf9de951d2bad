"""`tune-bisenet export`: the winner as one ONNX file, an exported PyTorch program or safetensors, checked, with a card.

Normalisation and upsampling are inside the first two: RGB uint8 B x 3 x H x W in, H and W multiples of 32; logits, or
with `--argmax` class ids, out at the same size. What was written is opened again and compared with the network on
painted streets at two sizes. A folder appears whole, or not at all.
"""

import argparse
import contextlib
import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import torch
from torch import Tensor, nn

from tune_bisenet.config import STRIDE, format_size
from tune_bisenet.data.batches import IMAGENET_MEAN, IMAGENET_STD
from tune_bisenet.data.streets import scene
from tune_bisenet.errors import OK, CommandError, run_command
from tune_bisenet.inference.model import (
    CARD,
    CARD_JSON,
    FILE_NAMES,
    Check,
    Form,
    Model,
    ModelCard,
    Network,
    find_model,
    import_extra,
    load,
    read_checkpoint,
    scored_classes,
    to_card_json,
)
from tune_bisenet.options import InputError
from tune_bisenet.records import BEST_WEIGHTS
from tune_bisenet.text import format_bytes, markdown_table
from tune_bisenet.training.model import BiSeNet, upsample

OPSET: Final = 20
SAME_CLASS: Final = 0.999
"""The share of pixels whose class an exported form must share with the network it was made of."""
CARD_MARKDOWN: Final = "MODEL.md"
NUM_CHECKED: Final = 2
"""Painted streets of the first size; the second size is checked by one, so that batches differ, too."""

LICENCE: Final = (
    "A network is made from its data: their licence says what it may be used for. Cityscapes, CamVid and most street "
    "data allow research and teaching, not commercial use."
)


class PixelNetwork(nn.Module):
    """BiSeNet from pixels to pixels: uint8 B x 3 x H x W to logits B x C x H x W, or to class ids, uint8 B x H x W."""

    mean: Tensor  # 3 x 1 x 1
    std: Tensor

    def __init__(self, network: BiSeNet, *, argmax: bool) -> None:
        super().__init__()
        self.network, self.argmax = network, argmax
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(IMAGENET_STD).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        normalised = (images.float() / 255.0 - self.mean) / self.std
        logits = upsample(self.network(normalised).main, (images.shape[2], images.shape[3]))
        return logits.argmax(dim=1).to(torch.uint8) if self.argmax else logits


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _export(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune-bisenet export",
        description="Write the best network of a search, without its auxiliary heads, as one file with a card of what "
        "it is. The file is opened again and compared with the network before it gets its name.",
        epilog="exit codes: 0 written; 1 the check failed, and nothing is left; 2 wrong input",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a search's folder (STORAGE/NAME), a trial's, or a best.pt")
    parser.add_argument("--run", metavar="NAME", help="of a search: this row's best trial, or this trial")
    parser.add_argument("--to", choices=list(FILE_NAMES), default="onnx", help="the form (default: onnx)")
    parser.add_argument("--argmax", action="store_true", help="class ids come out, uint8, in place of logits")
    parser.add_argument("--out", metavar="DIR", help="a new folder (default: models/SEARCH-TRIAL-FORM)")
    return parser


def _export(arguments: argparse.Namespace) -> int:
    folder, name = find_model(arguments.model, arguments.run)
    if name != BEST_WEIGHTS and not name.endswith(".pt"):
        raise InputError(f"{name} has been exported already: give the search's folder, or a best.pt.")
    card, network = read_checkpoint(folder, name)
    form: Form = arguments.to
    stem = "-".join(filter(None, [card.search, card.trial or card.run.name, form]))
    out = Path(arguments.out or f"models/{stem}")
    card, num_bytes = export_model(network, card, form, out, argmax=arguments.argmax)
    assert card.check
    difference = card.check.max_difference
    sys.stdout.write(
        f"{out / FILE_NAMES[form]}: {card.title}, {card.miou:.2f} % mIoU, {format_bytes(num_bytes)}\n"
        f"checked at {' and '.join(card.check.sizes)}: {100 * card.check.same_class:.4f} % of pixels have the same "
        f"class{'' if difference is None else f', logits differ by {difference:.2g} at most'}\n"
    )
    return OK


def export_model(
    network: BiSeNet, card: ModelCard, form: Form, out: Path, *, argmax: bool = False
) -> tuple[ModelCard, int]:
    """Write the network in a form, and its card, to the new folder `out`; return the card and the file's bytes.

    Raises InputError, and CommandError where the form does not do what the network does; then nothing is left.
    """
    if out.exists():
        raise InputError(f"{out} exists: give another folder with --out, or remove it.")
    if argmax and form == "safetensors":
        raise InputError(
            "--argmax: safetensors hold weights alone, which give logits. Leave it out, or export to onnx."
        )
    if form == "torch" and min(card.run.image_size) < 2 * STRIDE:
        raise InputError(
            f"an exported PyTorch program takes sides of {2 * STRIDE} pixels or more, and this network was trained at "
            f"{format_size(card.run.image_size)}: export it to onnx or safetensors."
        )
    if form != "torch":
        import_extra("safetensors" if form == "safetensors" else "onnxruntime", "export")
    card = card.model_copy(update={"form": form, "output": "classes" if argmax else "logits"})
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        path = part / FILE_NAMES[form]
        _write(network, card, path)
        card = card.model_copy(update={"check": check_export(load(path, device="cpu"), network)})
        (part / CARD_JSON).write_text(to_card_json(card), encoding="utf-8")
        (part / CARD_MARKDOWN).write_text(card_to_markdown(card, path), encoding="utf-8")
        num_bytes = path.stat().st_size
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return card, num_bytes


def _write(network: BiSeNet, card: ModelCard, path: Path) -> None:
    text = card.model_dump_json()
    if card.form == "safetensors":
        weights = {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
        path.write_bytes(import_extra("safetensors.torch", "export").save(weights, metadata={CARD: text}))
        return
    program = _to_program(PixelNetwork(network, argmax=card.output == "classes").eval())
    if card.form == "torch":
        torch.export.save(program, path, extra_files={CARD: text})
        return
    import_extra("onnxscript", "export")
    with contextlib.redirect_stdout(io.StringIO()):  # torch tells each of its steps
        onnx = torch.onnx.export(
            program,
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=["images"],
            output_names=[card.output],
        )
    assert onnx is not None
    onnx.model.metadata_props[CARD] = text
    onnx.save(path, external_data=False)


def _to_program(network: PixelNetwork) -> torch.export.ExportedProgram:
    """Return the program for any batch, and for any height and width that are multiples of 32."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    sizes = {0: batch, 2: STRIDE * height, 3: STRIDE * width}
    example = torch.zeros((2, 3, 2 * STRIDE, 3 * STRIDE), dtype=torch.uint8)  # a size of 1 would be taken for fixed
    with torch.no_grad():
        return torch.export.export(network, (example,), dynamic_shapes={"images": sizes})


def check_export(exported: Model, network: BiSeNet) -> Check:
    """Compare an exported form with the network on painted streets at two sizes. Raises CommandError if they differ."""
    is_ids = exported.card.output == "classes"
    reference = PixelNetwork(network, argmax=is_ids).eval()
    size = exported.card.run.image_size
    smaller = (max(2 * STRIDE, size[0] // 64 * STRIDE), max(2 * STRIDE, size[1] // 64 * STRIDE))
    if smaller == size:
        smaller = (size[0] + STRIDE, size[1] + STRIDE)
    num_same, num_pixels, largest = 0, 0, 0.0
    for height, width, batch in ((*size, NUM_CHECKED), (*smaller, 1)):
        frames = [scene(0, "val", index, size=(height, width)).image for index in range(batch)]
        images = torch.stack([torch.from_numpy(frame).permute(2, 0, 1) for frame in frames])
        with torch.no_grad():
            expected, found = reference(images), _at_full_size(exported.network, images)
        if found.shape != expected.shape or found.dtype != expected.dtype:
            raise CommandError(
                f"the {exported.card.form} form gives {found.dtype} {tuple(found.shape)}, not {expected.dtype} "
                f"{tuple(expected.shape)}: nothing was kept."
            )
        largest = max(largest, (found.float() - expected.float()).abs().max().item())
        same = found == expected if is_ids else found.argmax(dim=1) == expected.argmax(dim=1)
        num_same, num_pixels = num_same + int(same.sum()), num_pixels + same.numel()
    share = num_same / num_pixels
    if not share >= SAME_CLASS:
        raise CommandError(
            f"the {exported.card.form} form agrees with the network on {100 * share:.2f} % of pixels, and "
            f"{100 * SAME_CLASS:g} % are asked for: nothing was kept."
        )
    return Check(
        sizes=(format_size(size), format_size(smaller)), same_class=share, max_difference=None if is_ids else largest
    )


def _at_full_size(network: Network, images: Tensor) -> Tensor:
    """Return what a form gives, its logits at the images' size."""
    output = network(images)
    size = (images.shape[2], images.shape[3])
    return upsample(output, size) if output.ndim == 4 and output.shape[2:] != size else output


def card_to_markdown(card: ModelCard, path: Path) -> str:
    """Return the card for people to read. It has been checked."""
    assert card.check
    height, width = card.run.image_size
    give = {"logits": f"float32, B x {len(card.classes)} x H x W: logits", "classes": "uint8, B x H x W: class ids"}
    wanted = f"uint8, B x 3 x H x W: RGB, H and W multiples of {STRIDE}; trained at {height} x {width}"
    facts: dict[str, str | None] = {
        "file": f"`{path.name}`, {format_bytes(path.stat().st_size)}",
        "in": wanted
        if card.form != "safetensors"
        else f"weights for `BiSeNet(num_classes={len(card.classes)}, head_width={card.run.head_width}, "
        "auxiliary_heads=False)`; images normalised with ImageNet's mean and deviation",
        "out": give[card.output] if card.form != "safetensors" else "logits at 1/8 of the resolution",
        "checked": f"{100 * card.check.same_class:.4f} % of pixels as the network it was made of",
        "search, trial": card.search and f"{card.search}, {card.trial}",
        "row, seed": f"{card.run.name}, {card.run.seed}",
        "best epoch": f"{card.epoch} of {card.run.num_epochs}",
        "mIoU": f"{card.miou:.2f} % on the validation split",
        "data": card.data,
        "digest of the data": card.data_digest,
        "commit": card.commit,
        "versions": ", ".join(f"{name} {version}" for name, version in card.packages.items()) or None,
    }
    rows = [[name, value] for name, value in facts.items() if value]
    iou = [[name, "–" if value is None else f"{value:.2f}"] for name, value in scored_classes(card, card.iou)]
    blocks = [
        f"# BiSeNet, {card.title}",
        markdown_table(["", ""], rows),
        "## IoU by class",
        markdown_table(["class", "IoU in %"], iou, numbers=["IoU in %"]),
        "## Row",
        "```json\n" + card.run.model_dump_json(indent=1) + "\n```",
        "## Licence",
        LICENCE,
    ]
    return "\n\n".join(block.rstrip("\n") for block in blocks) + "\n"
