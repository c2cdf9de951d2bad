"""docs/messages.md: what the likeliest mistakes and faults say, from real runs. None of them starts Ray.

`make snapshots` writes the page again; the diff in git is what to review.
"""

import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import numpy as np
import pytest
from helpers.searches import move_into, write_frames, write_space
from PIL import Image
from test_snapshots import compare

from tune_bisenet import run, spaces
from tune_bisenet.config import Resources
from tune_bisenet.options import parse_options
from tune_bisenet.records import write_manifest
from tune_bisenet.report import __main__ as report_command
from tune_bisenet.search import driver, forecast
from tune_bisenet.search.prepare import prepare_search
from tune_bisenet.search.state import exclusive
from tune_bisenet.storage import Storage

ROOT: Final = Path(__file__).parent.parent

INTRODUCTION: Final = """\
# Messages

What the likeliest mistakes and faults say, as the program says it: `tests/test_messages.py` makes each and compares.
`/mine` stands for the folder in which the command is called; `SIZE`, `PROCESS` and `HOST` for what differs by machine.
A message says what was given, what is allowed and what to do; several mistakes are reported together. After `Nothing
was started` no trial has run, nothing was written to `--storage`, and the same command can be given again.
"""

ON_FRAMES: Final = "--space space.py --data frames --backbone none"
PROXY: Final = f"{ON_FRAMES} --proxy"
RESUME: Final = "--resume --name mine"
RESOURCES: Final = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)
FIRST: Final = "frames/leftImg8bit/train/town"

MASKS: Final = {
    r"process \d+ on \S+, since [-\d]+ [:\d]+ \w+,": "process PROCESS on HOST, since YYYY-MM-DD HH:MM:SS UTC,",
    r"\d+ bytes? too long": "SIZE bytes too long",
    r"it takes longer than \d+ s": f"it takes longer than {spaces.MAX_SPACE_SECONDS:.0f} s",
}


@dataclass(frozen=True)
class Case:
    """A mistake: how it is made in a folder with `frames` and `space.py`, and the flags that meet it."""

    title: str
    flags: str
    make: Callable[[], object] = lambda: None
    shown: str = ""
    """The beginnings of the lines of stdout that are shown; none of them otherwise."""
    module: str = "run"
    around: Callable[[pytest.MonkeyPatch], object] | None = None
    """What holds while the command runs."""


def first(pattern: str = f"{FIRST}/*.png") -> Path:
    return min(Path().glob(pattern))


def save_16_bit(path: Path) -> None:
    """Write colours of 16 bits, which Pillow itself cannot."""
    import struct
    import zlib

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 64, 32, 16, 2, 0, 0, 0)
    rows = zlib.compress(bytes(1 + 64 * 6) * 32)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def relabel(ids: np.ndarray, *, splits: tuple[str, ...] = ("train", "val"), kind: str = "labelTrainIds") -> None:
    """Give every label of the splits these ids, and all labels this kind of name."""
    for path in Path("frames/gtFine").rglob("*.png"):
        if path.parts[2] in splits:
            Image.fromarray(np.resize(ids.astype(np.uint8), (32, 64))).save(path)
        path.rename(path.with_name(path.name.replace("labelTrainIds", kind)))


def unknown_ids() -> None:
    relabel(np.array([7]), kind="labelIds")
    Image.fromarray(np.full((32, 64), 40, np.uint8)).save(first("frames/gtFine/train/town/*.png"))


def rename_all(pattern: str, suffix: str, every: int = 1) -> None:
    for path in sorted(Path().glob(pattern))[::every]:
        path.rename(path.with_suffix(suffix))


def write_row(**changes: str) -> None:
    """Let the row of space.py have these values instead of its own."""
    write_space(Path("space.py"), {"a": 0.01, "b": 0.02}, num_epochs=2, baseline="a")
    text = Path("space.py").read_text()
    for name, value in changes.items():
        text = re.sub(rf"\b{name}=[-\w.]+", f"{name}={value}", text, count=1)
    Path("space.py").write_text(text)


def write_reserved() -> None:
    write_space(Path("space.py"), {"tables": 0.01}, num_epochs=2)


def write_circle() -> None:
    write_row()
    text = Path("space.py").read_text().replace("row('a', 0.01, over=None)", "row('a', 0.01, over='b')")
    Path("space.py").write_text(text)


def write_drawn(code: str) -> None:
    """Write a sampled space that runs this code in every draw."""
    Path("space.py").write_text(
        "from search_spaces.around10 import *\n\n\n"
        f"def draw(trial):\n    luck = trial.suggest_float('luck', 0, 1)\n    {code}\n    return sample(trial)\n\n\n"
        "SPACE = Sampled('mine', draw)\n"
    )


def start() -> None:
    """Leave a search of two rows whose driver ended before the first trial."""
    flags = {"space": "space.py", "data": "frames", "backbone": "none", "name": "mine"}
    options, mistyped = parse_options(flags)
    search = prepare_search(options, mistyped, default_name="", progress=lambda _done, _total: None)
    write_manifest(search.folder, driver._make_manifest(search, RESOURCES, ("python",)))


def after_start(change: Callable[[], object]) -> Callable[[], None]:
    def make() -> None:
        start()
        change()

    return make


def move() -> None:
    Path("frames").rename("elsewhere")
    Path("space.py").rename("rows.py")


def exchange() -> None:
    shutil.copyfile(sorted(Path(FIRST).iterdir())[1], first())


def edit_manifest() -> None:
    path = Path("results/mine/search.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "trials": 5}))


def copy_grid() -> None:
    shutil.copytree(ROOT / "tests/fixtures/grid", "results/grid")
    path = Path("results/grid/r05-s0/trial.json")
    path.write_bytes(path.read_bytes()[:1000])


@contextmanager
def other_driver(_patch: pytest.MonkeyPatch) -> Iterator[None]:
    with exclusive(Storage.at("results") / "mine"):
        yield


@contextmanager
def little_room(patch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the disk be nearly full, and the driver come as far as Ray."""

    def run_search(search: object, *_: object) -> int:
        forecast.estimate_search(search, RESOURCES, []).check_storage()  # type: ignore[arg-type]
        raise AssertionError("there is room")

    patch.setattr(forecast.shutil, "disk_usage", lambda _path: SimpleNamespace(free=10**8))
    patch.setattr(driver, "run_search", run_search)
    yield


@contextmanager
def long_tmpdir(patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setenv(
        "RAY_TMPDIR", str(Path("a_job_directory_as_batch_systems_make_them/of_a_user_with_a_name/x").absolute())
    )
    yield


@contextmanager
def short_patience(patch: pytest.MonkeyPatch) -> Iterator[None]:
    patch.setattr(spaces, "MAX_SPACE_SECONDS", 1.0)
    yield


OWN_IDS: Final = np.arange(7)
TWO_ROADS: Final = '{"classes": [{"name": "road", "id": 7}, {"name": "road", "id": 300}], "void": [7]}'
NO_CLASSES: Final = '{"classes": [{"name": "road", "id": "7"}, {"id": 8}], "colours": []}'
STREET: Final = np.array([0, 1, 2, 8, 10, 13, 255])

CASES: Final[dict[str, list[Case]]] = {
    "Data": [
        Case("A folder that is not there", "--space space.py --data cityscapes --backbone none"),
        Case("A folder too deep", "--space space.py --data frames/leftImg8bit --backbone none"),
        Case("A JPEG named .png", ON_FRAMES, lambda: Image.new("RGB", (64, 32)).save(first(), format="JPEG")),
        Case("An empty file", ON_FRAMES, lambda: first().write_bytes(b"")),
        Case("A file that was cut off", ON_FRAMES, lambda: first().write_bytes(first().read_bytes()[:-25])),
        Case("16 bits a colour", ON_FRAMES, lambda: save_16_bit(first())),
        Case("An image without label", ON_FRAMES, lambda: first("frames/gtFine/train/town/*.png").unlink()),
        Case("Images of another kind", ON_FRAMES, lambda: rename_all("frames/leftImg8bit/*/*/*.png", ".jpg")),
        Case(
            "Pictures that are not used",
            f"{ON_FRAMES} --plan --images-per-second 10",
            lambda: (
                rename_all("frames/gtFine/train/*/*.png", ".PNG", 2),
                rename_all(f"{FIRST}/*.png", ".PNG", 2),
            ),
            shown="note       not used",
        ),
        Case("Ids of one's own", ON_FRAMES, lambda: relabel(OWN_IDS, kind="labelIds")),
        Case("Validation labels that are all void", ON_FRAMES, lambda: relabel(np.array([255]), splits=("val",))),
        Case("trainIds under the name of labelIds", ON_FRAMES, lambda: relabel(STREET, kind="labelIds")),
        Case("Ids that Cityscapes does not have", ON_FRAMES, unknown_ids),
        Case("Mistakes in classes.json", ON_FRAMES, lambda: Path("frames/classes.json").write_text(TWO_ROADS)),
        Case("A classes.json of other keys", ON_FRAMES, lambda: Path("frames/classes.json").write_text(NO_CLASSES)),
    ],
    "Flags": [
        Case("Several at once", "--epochs 0 --image-size 100x200 --scheduler best --seeds 0,,1 --name a/b"),
        Case("Absurd sizes", "--epochs 10000000000000 --image-size 1000000x1000000"),
        Case("An unknown row", "--space runs10 --runs r01,r99"),
        Case("A flag of sampled spaces for a grid", "--space runs10 --sampler tpe --trials 3"),
        Case("A warm-up that does not fit", f"{ON_FRAMES} --epochs 1", lambda: write_row(warmup_iterations="1000")),
        Case("A storage that is a file", f"{ON_FRAMES} --storage notes.txt", lambda: Path("notes.txt").touch()),
    ],
    "Spaces": [
        Case("An unknown space", "--space run10"),
        Case("A value that cannot be", ON_FRAMES, lambda: write_row(weight_decay="-1")),
        Case("A name of a search's own files", ON_FRAMES, write_reserved),
        Case("Expectations in a circle", ON_FRAMES, write_circle),
        Case("A loop without an end", PROXY, lambda: write_drawn("while True: pass"), around=short_patience),
        Case("An exit", PROXY, lambda: write_drawn("raise SystemExit(0)")),
        Case("An error in some draws", PROXY, lambda: write_drawn("if luck > 0.9: raise KeyError('head')")),
    ],
    "Searches": [
        Case("A name that is taken", f"{ON_FRAMES} --name mine", start),
        Case("A search that is not there", "--resume --name other"),
        Case("A flag that differs", f"{RESUME} --epochs 3", start),
        Case("A row that has changed", RESUME, after_start(lambda: write_row(momentum="0.8"))),
        Case("Data and space that have moved", RESUME, after_start(move)),
        Case("Frames that have changed", RESUME, after_start(exchange)),
        Case("A damaged search.json", RESUME, after_start(edit_manifest)),
        Case("A damaged trial.json", "results/grid", copy_grid, shown="note", module="report"),
        Case("Two drivers", RESUME, start, around=other_driver),
        Case("No room on the disk", f"{ON_FRAMES} --name mine", around=little_room),
        Case("A temporary folder too long for Ray", ON_FRAMES, around=long_tmpdir),
    ],
}  # fmt: skip


def answer(case: Case, capsys: pytest.CaptureFixture[str]) -> str:
    """Return what the command line says to a case, as a section of the page."""
    write_frames(Path("frames"))
    write_row()
    case.make()
    capsys.readouterr()
    command = report_command.main if case.module == "report" else run.main
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        if case.around:
            stack.enter_context(case.around(patch))  # type: ignore[arg-type]
        before = sorted(Path().glob("results/**/*"))
        code = command(shlex.split(case.flags))
        assert code == 0 or sorted(Path().glob("results/**/*")) == before, "a command that is refused leaves no trace"
    out, err = capsys.readouterr()
    lines = [line for line in out.splitlines() if case.shown and line.startswith(case.shown)]
    text = "\n".join([*lines, *err.splitlines()]).replace(str(Path.cwd()), "/mine")
    for pattern, mask in MASKS.items():
        text = re.sub(pattern, mask, text)
    shown = "\n".join(f"{line.rstrip()}" for line in text.splitlines())
    told = f"python -m tune_bisenet.{case.module} {case.flags}\n{shown}"
    return f"### {case.title}\n\nExit code {code}.\n\n```text\n$ {told}\n```\n"


@pytest.mark.timeout(900)
def test_the_page_of_messages_is_what_the_program_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = [INTRODUCTION]
    for part, cases in CASES.items():
        page.append(f"## {part}\n")
        for number, case in enumerate(cases):
            place = tmp_path / f"{part}{number}"
            place.mkdir()
            move_into(place, monkeypatch)
            monkeypatch.delenv("RAY_TMPDIR", raising=False)
            monkeypatch.setenv("TMPDIR", "/tmp")
            page.append(answer(case, capsys))
    compare(ROOT / "docs" / "messages.md", "\n".join(page))
