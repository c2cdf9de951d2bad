"""`tune-bisenet predict`: coloured masks and overlays of pictures, and overlays of videos.

A picture gives `NAME_mask.png` and `NAME_overlay.png`, a video `NAME_overlay.mp4`, in the folder that `--out` names.
What cannot be read is named and skipped.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from tune_bisenet.errors import FAILED, OK, print_problems, run_command
from tune_bisenet.inference.model import Model, import_extra, load
from tune_bisenet.options import InputError
from tune_bisenet.text import counted

PICTURE_SUFFIXES: Final = frozenset((".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"))
VIDEO_SUFFIXES: Final = frozenset((".mp4", ".mov", ".mkv", ".avi", ".webm", ".m4v"))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_command(lambda: _predict(arguments))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tune-bisenet predict",
        description="Label pictures and videos of any size: each picture becomes NAME_mask.png, in the colours of the "
        "classes, and NAME_overlay.png, each video NAME_overlay.mp4.",
        epilog="exit codes: 0 all are labelled; 1 some could not be read, and the others are labelled; 2 wrong input",
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="a search's folder, a best.pt, or an exported model")
    parser.add_argument("files", metavar="FILE_OR_FOLDER", nargs="+", help="pictures, videos, or folders of them")
    parser.add_argument("--out", metavar="DIR", required=True, help="where to write")
    parser.add_argument("--run", metavar="NAME", help="of a search: this row's best trial, or this trial")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="of a best.pt (default: that of its training)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    return parser


def _predict(arguments: argparse.Namespace) -> int:
    out = Path(arguments.out)
    targets = find_targets([Path(name) for name in arguments.files], out)
    if any(path.suffix.lower() in VIDEO_SUFFIXES for path in targets):
        import_extra("av", "video")
    model = load(arguments.model, arguments.run, device=arguments.device, precision=arguments.precision)
    problems: list[str] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("labelled", total=len(targets))
        for path, target in targets.items():
            try:
                label_file(model, path, target)
            except InputError as error:
                problems += error.problems
            progress.advance(task)
    print_problems([f"{problem} It was skipped." for problem in problems])
    sys.stdout.write(f"{counted(len(targets) - len(problems), 'file')} labelled: {out}\n")
    return FAILED if problems else OK


def find_targets(given: Sequence[Path], out: Path) -> dict[Path, Path]:
    """Return, by picture or video, what its outputs' names begin with; folders are searched at any depth.

    Raises InputError for what does not exist, for folders without pictures, and for names that would meet.
    """
    targets: dict[Path, Path] = {}
    problems = []
    for path in given:
        if path.is_dir():
            found = list(_listed(path, besides=out))
            targets |= {file: out / file.relative_to(path).with_suffix("") for file in found}
            problems += [] if found else [f"{path} holds neither pictures nor videos: name their folder."]
        elif path.exists():
            targets[path] = out / path.stem
        else:
            problems.append(f"there is no {path}.")
    for target, count in Counter(targets.values()).items():
        if count > 1:
            names = ", ".join(str(path) for path, other in targets.items() if other == target)
            problems.append(f"{names} would all be written to {target}_*: label them in several calls.")
    if problems:
        raise InputError(*problems)
    return targets


def _listed(folder: Path, *, besides: Path) -> Iterator[Path]:
    """Yield the pictures and videos in a folder, but not what was written to `besides` before."""
    for path in sorted(folder.rglob("*")):
        is_wanted = path.suffix.lower() in PICTURE_SUFFIXES | VIDEO_SUFFIXES and not path.name.startswith(".")
        if is_wanted and path.is_file() and not path.is_relative_to(besides):
            yield path


def label_file(model: Model, path: Path, target: Path) -> None:
    """Write what a model sees in a picture or a video. Raises InputError if it cannot be read."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in VIDEO_SUFFIXES:
        label_video(model, path, target.with_name(f"{target.name}_overlay.mp4"))
        return
    prediction = model.predict(path)
    prediction.mask.save(target.with_name(f"{target.name}_mask.png"))
    prediction.overlay.save(target.with_name(f"{target.name}_overlay.png"))


def label_video(model: Model, path: Path, target: Path) -> None:
    """Write a video with the mask laid over each frame: H.264 at the video's own size and rate, without its sound.

    Raises InputError, and leaves nothing, if it is damaged or holds no picture.
    """
    av = import_extra("av", "video")
    part = target.with_name(f".{target.name}")
    try:
        with av.open(str(path)) as source, av.open(str(part), "w", format="mp4") as sink:
            if not source.streams.video:
                raise InputError(f"{path} holds no video.")
            _copy_labelled(model, av, source, sink)
        part.replace(target)
    except av.error.FFmpegError as error:
        raise InputError(f"{path} cannot be read as a video: {error}.") from error
    finally:
        part.unlink(missing_ok=True)


def _copy_labelled(model: Model, av: Any, source: Any, sink: Any) -> None:
    stream = source.streams.video[0]
    encoder = sink.add_stream("libx264", rate=stream.average_rate or Fraction(25))
    encoder.width, encoder.height = stream.width // 2 * 2, stream.height // 2 * 2  # colours are stored at half the size
    encoder.pix_fmt = "yuv420p"
    for decoded in source.decode(stream):
        overlay = model.predict(decoded.to_ndarray(format="rgb24")).overlay
        frame = av.VideoFrame.from_image(overlay.crop((0, 0, encoder.width, encoder.height)))
        sink.mux(encoder.encode(frame))
    sink.mux(encoder.encode())
