"""Every command and every line of Python in docs/inference.md is run, on a small search."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import av
import pytest
from PIL import Image
from winners import STREETS

from tune_bisenet.__main__ import main

PAGE = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
COMMANDS = [
    line for block in re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL) for line in block.splitlines() if line.strip()
]


@pytest.fixture
def _place(search: Path, frames: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder with what the page speaks of: results/paper, DIR, pictures, street.png and drive.mp4."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUNE_BISENET_CACHE", str(tmp_path / "cache"))
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "paper").symlink_to(search)
    (tmp_path / "DIR").symlink_to(frames)
    (tmp_path / "pictures").mkdir()
    street = Image.fromarray(STREETS.load("val", 0).image)
    street.save("street.png")
    street.save("pictures/a.png")
    with av.open("drive.mp4", "w") as sink:
        stream = sink.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 192, 96, "yuv420p"
        sink.mux(stream.encode(av.VideoFrame.from_image(street)))
        sink.mux(stream.encode())


@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize(
    "command",
    [
        # To export to ONNX or a program takes half a minute.
        pytest.param(line, marks=[pytest.mark.slow] if re.search("onnx|to torch", line) else [])
        for line in COMMANDS
    ],
)
def test_each_command_of_the_page_succeeds(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *words = shlex.split(command)
    assert name == "tune-bisenet"
    if words == ["benchmark", "results/paper"]:
        words += ["--sizes", "64x128"]  # whole frames take two minutes
    assert main([word.replace("r05", "r02") for word in words]) == 0, capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("_place")
@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL))
def test_each_python_block_of_the_page_runs(code: str) -> None:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # two wait for each other where cores are shared
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, env=one_thread)


def test_the_page_has_every_verb_but_the_two_that_are_told_elsewhere() -> None:
    verbs = {shlex.split(command)[1] for command in COMMANDS}
    assert verbs == {"evaluate", "predict", "export", "benchmark"}
