"""`tune-bisenet benchmark`: latency and images per second of a model on this machine, beside what others published.

One picture after the other, from uint8 pixels on the device to a class for each pixel there: normalisation, network,
upsampling. Reading pictures and copying them to a GPU are not in the times.
"""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import torch

from tune_bisenet.config import Precision, format_size
from tune_bisenet.errors import OK, run_command
from tune_bisenet.inference.model import Form, Model, find_model, in_torch, load, read_checkpoint
from tune_bisenet.options import InputError
from tune_bisenet.records import BEST_WEIGHTS, Latency
from tune_bisenet.text import counted, markdown_table
from tune_bisenet.training import engine, losses
from tune_bisenet.training.alone import choose_device
from tune_bisenet.training.benchmark import NUM_WARMUPS, repeat_timing, summarize

SIZES: Final = ((512, 1024), (1024, 2048))
"""Half and full frames of Cityscapes."""


class Published(NamedTuple):
    """A speed of BiSeNet V1 with a ResNet-18, as others measured it on their hardware."""

    size: str
    images_per_second: float
    hardware: str
    source: str


PUBLISHED: Final = (
    Published("768x1536", 65.5, "Titan Xp", "the paper, arXiv 1808.00897"),
    Published("512x1024", 88.0, "RTX 2080", "zh320/realtime-semantic-segmentation-pytorch"),
    Published("1024x2048", 68.0, "Tesla T4, TensorRT fp16", "CoinCheung/BiSeNet"),
    Published("1024x2048", 23.0, "Tesla T4, TensorRT fp32", "CoinCheung/BiSeNet"),
    Published("Cityscapes frames", 31.77, "V100", "open-mmlab/mmsegmentation"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _benchmark(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune-bisenet benchmark",
        description="Time a model on this machine, one picture after the other: a best.pt in each precision that the "
        "device has, an exported model as it is. Beside the times stand those that others published.",
        epilog="exit codes: 0 timed; 2 wrong input",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a search's folder, a best.pt, or an exported model")
    parser.add_argument("--run", metavar="NAME", help="of a search: this row's best trial, or this trial")
    parser.add_argument("--sizes", metavar="HxW,...", type=_sizes, default=SIZES, help="default: 512x1024,1024x2048")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: all there are")
    return parser


def _sizes(text: str) -> tuple[tuple[int, int], ...]:
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        if not (
            height.isdigit()
            and width.isdigit()
            and all(0 < int(s) <= 8192 and int(s) % 32 == 0 for s in (height, width))
        ):
            raise argparse.ArgumentTypeError(f"{part}: give height x width, multiples of 32, such as 512x1024.")
        sizes.append((int(height), int(width)))
    return tuple(sizes)


def _benchmark(arguments: argparse.Namespace) -> int:
    devices = [choose_device("cpu")] if arguments.device != "cuda" else []
    if arguments.device != "cpu" and (torch.cuda.is_available() or arguments.device == "cuda"):
        devices.append(choose_device("cuda"))
    rows = [
        _format_row(name, size, time_model(model, size))
        for name, model in _variants(arguments.model, arguments.run, devices)
        for size in arguments.sizes
    ]
    published = [[one.size, f"{one.images_per_second:g}", one.hardware, one.source] for one in PUBLISHED]
    sys.stdout.write(
        markdown_table(_COLUMNS, rows, numbers=_COLUMNS[2:])
        + "\nmedian and quartiles; other work on the machine is in them\n\n"
        + "published, on other hardware and with other code:\n"
        + markdown_table(["size", "images/s", "hardware", "source"], published, numbers=["images/s"])
    )
    return OK


_FORM_NAMES: Final[dict[Form, str]] = {
    "onnx": "ONNX Runtime fp32",
    "torch": "exported program fp32",
    "safetensors": "torch fp32",
}
_COLUMNS: Final = ["computed by", "size", "ms", "ms, quartiles", "images/s", "repeats"]


def _format_row(name: str, size: tuple[int, int], latency: Latency) -> list[str]:
    return [
        f"{name}, {latency.device}",
        format_size(size),
        f"{latency.median_ms:.2f}",
        f"{latency.low_ms:.2f} to {latency.high_ms:.2f}",
        f"{1000 / latency.median_ms:.1f}",
        str(latency.repeats),
    ]


def _variants(address: str, run: str | None, devices: Sequence[torch.device]) -> Iterator[tuple[str, Model]]:
    """Yield what is timed and its name: each precision of a checkpoint on each device; an exported model as it is."""
    folder, file_name = find_model(address, run)
    if file_name != BEST_WEIGHTS and not file_name.endswith(".pt"):
        for device in devices:
            model = load(f"{folder.uri}/{file_name}", device="cuda" if device.type == "cuda" else "cpu")
            if model.device == device:  # ONNX Runtime may have no GPU
                yield _FORM_NAMES[model.card.form], model
        return
    for device in devices:
        precisions: tuple[Precision, ...] = ("fp32", "bf16") if engine.supports_bf16(device) else ("fp32",)
        for precision in precisions:
            card, network = read_checkpoint(folder, file_name)
            yield f"torch {precision}", Model(card, in_torch(network, device, precision), device)
        if device.type == "cuda":
            card, network = read_checkpoint(folder, file_name)
            scores = in_torch(network, device, precisions[-1])
            network.compile()
            yield f"torch {precisions[-1]}, compiled", Model(card, scores, device)


def time_model(model: Model, size: tuple[int, int]) -> Latency:
    """Time a model on one picture of noise of that size (H, W). Raises InputError where memory does not suffice."""
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, *size), generator=noise, dtype=torch.uint8).to(model.device)

    def time_once() -> float:
        _wait_for(model.device)
        started = time.perf_counter()
        output = model.network(image)
        if output.ndim == 4:
            losses.argmax(output, size)
        _wait_for(model.device)
        return time.perf_counter() - started

    try:
        for _ in range(NUM_WARMUPS):
            time_once()
        seconds = repeat_timing(time_once)
    except torch.OutOfMemoryError as error:
        raise InputError(f"the GPU's memory does not suffice for {format_size(size)}: give smaller --sizes.") from error
    name = f"CPU, {counted(torch.get_num_threads(), 'thread')}"
    return summarize(seconds, device=torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else name)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
