"""Milliseconds of one prediction at batch 1, on the device it is trained on. Knows nothing of Ray or storage.

What is timed is what validation does for one image: normalise, the network, the likeliest class of each pixel. The
network has no auxiliary heads, for nobody predicts with them, and weights of its own, for speed does not depend on
them. Who else works on the device meanwhile is in the number: compare trials that had as much of it.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

import torch
from pydantic import PositiveFloat, PositiveInt, TypeAdapter

from tune_bisenet.config import Precision, Run
from tune_bisenet.text import counted
from tune_bisenet.training import engine
from tune_bisenet.training.model import BiSeNet

NUM_WARMUPS: Final = 5
"""Predictions before the first that counts: caches fill, cuDNN chooses its algorithms, clocks rise."""
MIN_REPEATS: Final = 10
MAX_REPEATS: Final = 50
MAX_SECONDS: Final = 5.0
"""No repeat beyond `MIN_REPEATS` begins after this time."""


@dataclass(frozen=True, kw_only=True)
class Latency:
    """How long one prediction takes: median and quartiles of `repeats`, in milliseconds."""

    median_ms: PositiveFloat
    low_ms: PositiveFloat
    """A quarter of the repeats took no longer."""
    high_ms: PositiveFloat
    """A quarter of the repeats took at least as long."""
    repeats: PositiveInt
    device: str
    """The GPU's name, or how many threads of the CPU."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: Any) -> Self:
        """ValueError if `record` is anything else than what `to_json` gives."""
        return TypeAdapter(cls).validate_python(record)


def measure_latency(run: Run, *, device: torch.device, precision: Precision) -> Latency:
    """Time predictions of one image of the run's size, with `run.head_width`; takes some seconds.

    Training is not disturbed: torch's global generators are left as they were.
    """
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        model = BiSeNet(head_width=run.head_width, auxiliary_heads=False)
    engine.place(model, device)
    noise = torch.Generator().manual_seed(0)
    image = torch.randint(256, (1, 3, *run.image_size), generator=noise, dtype=torch.uint8).to(device)

    def predict_once() -> float:
        _wait_for(device)
        started = time.perf_counter()
        engine.predict(model, image, run.image_size, precision=precision)
        _wait_for(device)
        return time.perf_counter() - started

    for _ in range(NUM_WARMUPS):
        predict_once()
    return _summary(_repeated(predict_once), device=_name_of(device))


def _repeated(once: Callable[[], float]) -> list[float]:
    """The seconds that `once` returns, time after time until they are enough."""
    seconds: list[float] = []
    while len(seconds) < MIN_REPEATS or (len(seconds) < MAX_REPEATS and sum(seconds) < MAX_SECONDS):
        seconds.append(once())
    return seconds


def _summary(seconds: list[float], *, device: str) -> Latency:
    low, median, high = (1000.0 * quartile for quartile in statistics.quantiles(seconds, n=4, method="inclusive"))
    return Latency(median_ms=median, low_ms=low, high_ms=high, repeats=len(seconds), device=device)


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _name_of(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {counted(torch.get_num_threads(), 'thread')}"
