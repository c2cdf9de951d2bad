"""Latency: the right thing is timed, often enough, and training is left alone. Training: in processes of its own."""

import os
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

from tune_bisenet.config import Precision, Resources, Run
from tune_bisenet.training import benchmark, engine
from tune_bisenet.training.model import BiSeNet

if TYPE_CHECKING:
    from tune_bisenet.data.packed import Packed

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def run(tiny_run: Run) -> Run:
    return tiny_run.model_copy(update={"image_size": (32, 64), "head_width": 24})


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_latency_is_told_with_its_spread_and_device(run: Run, precision: Precision) -> None:
    found = benchmark.measure_latency(run, device=CPU, precision=precision)
    assert 0 < found.low_ms <= found.median_ms <= found.high_ms
    assert benchmark.MIN_REPEATS <= found.repeats <= benchmark.MAX_REPEATS
    assert found.device == "CPU, 1 thread"


def test_what_is_timed_is_the_prediction_of_one_image_by_a_network_that_only_predicts(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Any, ...]] = []
    real = engine.predict

    def predict(model: BiSeNet, images: Tensor, size: tuple[int, int], *, precision: Precision) -> Tensor:
        calls.append((model.aux8, model.aux16, model.head[1].in_channels, images.shape, images.dtype, size, precision))
        return real(model, images, size, precision=precision)

    monkeypatch.setattr(engine, "predict", predict)
    found = benchmark.measure_latency(run, device=CPU, precision="bf16")
    assert len(calls) == benchmark.NUM_WARMUPS + found.repeats
    assert set(calls) == {(None, None, 24, (1, 3, 32, 64), torch.uint8, (32, 64), "bf16")}


@pytest.mark.parametrize(("seconds", "repeats"), [(0.001, 50), (0.25, 20), (0.7, 10), (30.0, 10)])
def test_predictions_are_repeated_until_they_are_enough_or_take_too_long(seconds: float, repeats: int) -> None:
    assert benchmark.repeat_timing(lambda: seconds) == [seconds] * repeats


def test_median_and_quartiles_by_hand() -> None:
    found = benchmark.summarize([0.005, 0.001, 0.002, 0.100, 0.003], device="CPU, 1 thread")
    assert (found.low_ms, found.median_ms, found.high_ms) == pytest.approx((2.0, 3.0, 5.0))
    assert (found.repeats, found.device) == (5, "CPU, 1 thread")


def test_a_run_whose_latency_is_measured_equals_one_whose_is_not(
    run: Run, small_data: "Packed", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "MAX_REPEATS", benchmark.MIN_REPEATS)
    quiet, measured = (engine.begin(run, small_data, device=CPU, precision="fp32", backbone=None) for _ in range(2))
    before = torch.get_rng_state()
    benchmark.measure_latency(run, device=CPU, precision="fp32")
    assert torch.equal(torch.get_rng_state(), before)
    list(engine.fit(quiet))
    for _end in engine.fit(measured):
        benchmark.measure_latency(run, device=CPU, precision="fp32")
    expected = quiet.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in measured.model.state_dict().items())


def benchmark_of(run: Run, *, gpus_per_trial: float = 0, concurrency: int = 1) -> benchmark.TrainingBenchmark:
    resources = Resources(cpus_per_trial=1, gpus_per_trial=gpus_per_trial, max_concurrent=None, concurrency=concurrency)
    return benchmark.benchmark_training(
        run, frame_size=(64, 128), with_lovasz=True, resources=resources, precision="fp32"
    )


@pytest.mark.slow
def test_trials_are_timed_side_by_side_and_their_memory_is_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "BENCHMARK_SECONDS", 2.0)
    result = benchmark_of(run, concurrency=2)
    assert result.num_processes == min(2, os.cpu_count() or 1)
    assert 0 < result.images_per_second < result.val_images_per_second
    assert result.device == "CPU, 1 thread each"
    assert 100e6 < result.memory_bytes < 5e9
    assert result.available_bytes == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // result.num_processes


@pytest.mark.slow
def test_a_trial_that_cannot_be_trained_is_refused_with_the_reason(run: Run) -> None:
    with pytest.raises(benchmark.BenchmarkError, match="negative"):
        benchmark_of(run.model_copy(update={"head_width": -1}))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to time trials on")
def test_without_a_gpu_no_trial_is_timed_on_one(run: Run) -> None:
    with pytest.raises(benchmark.BenchmarkError, match="no GPU"):
        benchmark_of(run, gpus_per_trial=1)


def test_the_peak_of_a_process_is_its_own_and_not_of_the_one_that_started_it() -> None:
    code = "from tune_bisenet.training.benchmark import peak_bytes; print(peak_bytes())"
    large = "import subprocess, sys; held = b'1' * (2 * 10**9); "
    large += f"subprocess.run([sys.executable, '-c', {code!r}], check=True)"
    printed = subprocess.run([sys.executable, "-c", large], capture_output=True, text=True, check=True).stdout
    assert 1e8 < int(printed) < 2e9
