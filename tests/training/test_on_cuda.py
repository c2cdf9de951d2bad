"""The engine on a card that is not there (fake_cuda.py): it never waits inside its loops, and does no more than it did.

Operations are those of torch 2.15. Fewer are welcome: then lower the number here.
"""

import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(
        torch.version.cuda is None or sys.platform != "linux" or platform.machine() != "x86_64",
        reason="torch here knows no CUDA, or its machine code is another",
    ),
]

MAX_OPERATIONS = {
    "ce fp32": 369,
    "ce bf16": 469,
    "weighted bf16": 472,
    "ohem bf16": 538,
    "lovasz fp32": 429,
    "lovasz bf16": 529,
    "accumulation bf16": 523.5,
    "clipping bf16": 474,
    "adamw bf16": 470,
    "spared bf16": 471,
}
"""Of a training iteration on the card."""
MAX_VALIDATION = {"fp32": 160, "bf16": 209}
MAX_PREDICTION = {"fp32": 131, "bf16": 174}
MAX_WAITS_OF_EPOCH = 20
"""For its draws, its measurements, its confusion matrices and its samples."""


@pytest.fixture(scope="module")
def found() -> dict[str, dict[str, Any]]:
    """What each combination was found to do, in one process."""
    script = Path(__file__).with_name("fake_cuda.py")
    done = subprocess.run(
        [sys.executable, str(script), *MAX_OPERATIONS], capture_output=True, text=True, check=False, timeout=1100
    )
    assert done.returncode == 0, done.stderr
    return {line["name"]: line for line in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", MAX_OPERATIONS)
def test_the_host_waits_only_before_and_after_the_iterations_of_an_epoch(
    name: str, found: dict[str, dict[str, Any]]
) -> None:
    for part in ("iteration", "validation", "prediction"):
        assert found[name][part]["waiting"] == [], part
    assert found[name]["waits_of_epoch"] <= MAX_WAITS_OF_EPOCH


@pytest.mark.parametrize("name", MAX_OPERATIONS)
def test_the_card_is_given_no_more_operations_than_before(name: str, found: dict[str, dict[str, Any]]) -> None:
    precision = name.split()[1]
    assert found[name]["iteration"]["operations"] <= MAX_OPERATIONS[name]
    assert found[name]["validation"]["operations"] <= MAX_VALIDATION[precision]
    assert found[name]["prediction"]["operations"] <= MAX_PREDICTION[precision]
