"""Write tests/fixtures: a small grid search and a small sampled search, as the program itself leaves them.

`make fixtures` runs the real command line on the built-in streets, some minutes on two cores, and keeps all files that
are small. Seconds and speeds in them are those of that run. It runs in a folder of its own, so that no path of this
machine is written down, and what is kept is searched for some.
"""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

PROJECT: Final = Path(__file__).parent.parent
FIXTURES: Final = PROJECT / "tests" / "fixtures"
WORKSHOP: Final = Path("/tmp/searches")
"""Paths in the fixtures begin with this. It must not exist yet, and is removed at the end."""

MAX_BYTES: Final = 1_500_000
EVENT_FILES_OF: Final = {"grid": "r01-s0", "sampled": "r02"}
"""The one trial of each search whose TensorBoard files are kept."""

COMMON: Final = "--epochs 5 --image-size 32x64 --max-concurrent 2 --cpus-per-trial 1 --precision fp32"
SEARCHES: Final = {
    "grid": "--space runs10 --runs r01,r05,r07,r09,r10 --seeds 0,1",
    "sampled": "--space around10 --runs r01,r02 --warm-start results/grid --trials 6 --confirm 1",
}


def main() -> None:
    WORKSHOP.mkdir()
    try:
        for name, flags in SEARCHES.items():
            run_search(f"--name {name} {flags} {COMMON}")
        shutil.rmtree(FIXTURES, ignore_errors=True)
        for name in SEARCHES:
            keep(WORKSHOP / "results" / name, FIXTURES / name)
    finally:
        shutil.rmtree(WORKSHOP)
    check()


def run_search(flags: str) -> None:
    foreign = ("RAY_", "TUNE_", "CITYSCAPES")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    ours = {
        "PYTHONPATH": str(PROJECT),
        "RAY_TMPDIR": str(WORKSHOP),
        "TUNE_BISENET_CACHE": str(WORKSHOP / "cache"),
        "COLUMNS": "120",
    }
    subprocess.run(
        [sys.executable, "-m", "tune_bisenet.run", *flags.split()], cwd=WORKSHOP, env=kept | ours, check=True
    )


def keep(search: Path, fixture: Path) -> None:
    """Copy what is small. The report is left out, as it is made from the rest; so is what Ray Tune wrote for itself."""
    for path in files_in(search):
        relative = path.relative_to(search)
        trial_or_file = relative.parts[0]
        is_event_file = path.name.startswith("events.out.tfevents.")
        if (
            path.suffix == ".pt"
            or trial_or_file in ("tune", "tables", "report.html", "report.md")
            or (is_event_file and trial_or_file != EVENT_FILES_OF[search.name])
        ):
            continue
        target = fixture / str(relative).replace(f".{socket.gethostname()}.", ".host.")  # of event files
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def check() -> None:
    """Exit if the fixtures are too large, or name a folder of this machine."""
    size = sum(path.stat().st_size for path in files_in(FIXTURES))
    folders = {str(Path.home()), str(PROJECT), sys.prefix}
    naming = [
        f"{path} names {folder}"
        for path in files_in(FIXTURES)
        for folder in folders
        if folder.encode() in path.read_bytes()
    ]
    if size > MAX_BYTES or naming:
        sys.exit("\n".join([f"{FIXTURES} has {size:,} bytes of at most {MAX_BYTES:,}", *naming]))


def files_in(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


if __name__ == "__main__":
    main()
