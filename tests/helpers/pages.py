"""Pages of docs/ that are run as they stand."""

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from helpers.processes import PROJECT, environment


def blocks(page: str, language: str) -> list[str]:
    """Return what stands between the fences of a language in docs/`page`."""
    text = (PROJECT / "docs" / page).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def run_lines(lines: Sequence[str], place: Path) -> list[str]:
    """Run each line, which begins with `python`, in a folder; return what each printed. All must succeed."""
    outputs = []
    for line in lines:
        command = [sys.executable, *line.split()[1:]]
        variables = environment(place) | {"PYTHONPATH": str(PROJECT)}
        answer = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, f"{line}\n{answer.stdout}\n{answer.stderr}"
        outputs.append(answer.stdout + answer.stderr)
    return outputs
