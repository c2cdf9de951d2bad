"""The Triton kernels against float64, in Triton's interpreter, and compiled for cards that are not there."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tune_bisenet.classes import CITYSCAPES
from tune_bisenet.training import kernels

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)  # 20 CPU seconds, which a busy machine gives late
def test_loss_gradient_and_prediction_of_the_kernels_are_those_of_float64() -> None:
    """Measured 2026-11-29: loss within 2e-7, gradient 1.1e-7 of its norm; 2e-3 in bfloat16, which rounds it."""
    command = [sys.executable, str(ROOT / "tests" / "training" / "kernel_errors.py")]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stderr
    cases = json.loads(answer.stdout)
    assert {case["factor"] for case in cases} == {2, 4, 8, 16}
    for case in cases:
        assert case["supported"]
        assert max(case["loss"], case["mean"]) < 1e-6, case
        assert case["gradient"] < (1e-6 if case["dtype"] == "torch.float32" else 4e-3), case
        assert case["pixels"] < 1e-5, case
        assert (case["negative"], case["wrong"], case["void"]) == (0, 0, 0.0), case
        assert case["repeats"], case
        assert case["layout"], case


def compiled_usage(
    kernel: Any, types: dict[str, str], constants: dict[str, Any], target: GPUTarget, path: Path
) -> dict[str, int]:
    """Compile into `path`; return registers a thread, bytes of stack (spills), and of shared memory a program."""
    names = list(kernel.arg_names)
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    path.write_bytes(triton.compile(source, target=target, options=dict(kernels.OPTIONS)).asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"\b(REG|STACK|SHARED):(\d+)", listing)
    return {name: int(value) for name, value in found}


POINTERS = {"logits": "*bf16", "classes": "*i64", "weights": "*fp32", "corners": "*fp32", "sums": "*fp32", "out": "*u8"}
CELLS = {"C": len(CITYSCAPES), "S": 8, "PADDED": 32, "BLOCK": kernels.CELLS}
PIXELS = {"C": len(CITYSCAPES), "PADDED": 32, "BLOCK": kernels.PIXELS}


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_cards_without_spilling(
    capability: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured 2026-11-29 for sm_90, batches in bfloat16: 114 registers of 255, no stack, no shared memory."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    target = GPUTarget("cuda", capability, 32)
    usage = compiled_usage(kernels._cells, POINTERS, CELLS, target, tmp_path / "cells.cubin")
    assert usage["REG"] <= 128, "fewer than 16 warps fit on a multiprocessor"
    assert usage["STACK"] == 0
    assert usage["SHARED"] <= 1024, "classes meet in shared memory: a barrier for every pixel"
    usage = compiled_usage(kernels._pixels, POINTERS, PIXELS | {"classes": None}, target, tmp_path / "pixels.cubin")
    assert usage["REG"] <= 255
    assert usage["STACK"] == 0


def test_kernels_are_not_used_where_the_factor_is_odd_or_no_whole_number_or_on_a_cpu() -> None:
    logits = torch.zeros(1, len(CITYSCAPES), 2, 3)
    for size in [(16, 24), (16, 32), (6, 9), (3, 5), (1, 1), (17, 24)]:
        assert not kernels.supports(logits, size)
