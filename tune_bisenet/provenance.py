"""Which state of the project this is: its git commit, here or where a job was sent from."""

import os
import subprocess
from pathlib import Path
from typing import Final

COMMIT_VARIABLE: Final = "TUNE_BISENET_COMMIT"
"""Where a job finds the commit of the code that was sent with it: no checkout is sent."""


def commit() -> str | None:
    """The project's git commit, with `+changes` where the tree differs from it; None where nobody knows."""
    project = Path(__file__).resolve().parents[1]
    try:
        root, commit, changes = (
            subprocess.run(["git", *words], cwd=project, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--show-toplevel"], ["rev-parse", "HEAD"], ["status", "--porcelain", "-uno"])
        )
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get(COMMIT_VARIABLE)
    if Path(root) != project:  # installed inside somebody else's checkout
        return os.environ.get(COMMIT_VARIABLE)
    return f"{commit}+changes" if changes else commit
