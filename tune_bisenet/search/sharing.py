"""Find how many trials should share a GPU, for `--gpus-per-trial auto`: by timing them side by side on one."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Final

from tune_bisenet.config import Resources
from tune_bisenet.options import Options
from tune_bisenet.search.forecast import find_workload, time_trial
from tune_bisenet.search.prepare import PreparedSearch
from tune_bisenet.search.resources import Cluster, allocate, this_machine
from tune_bisenet.text import counted, format_bytes

if TYPE_CHECKING:
    from tune_bisenet.training.benchmark import TrainingBenchmark

MAX_PACKING: Final = 3
"""The most trials on one GPU that are tried."""
MIN_GAIN: Final = 0.1
"""What sharing must gain in images a second, as a share of those of one trial: it costs each trial memory."""


def settle_sharing(search: PreparedSearch) -> PreparedSearch:
    """Return the search with what `--gpus-per-trial auto` stands for in its options, and why in its `sharing`.

    A share that was measured is kept in the configuration, and later sessions go by it unless they are given another.
    Trains on a GPU of this machine for some seconds per packing. Raise InputError if no trial fits.
    """
    options, kept = search.options, search.config.auto_gpus_per_trial
    if options.gpus_per_trial not in (None, "auto"):
        return search
    if kept is not None and options.device != "cpu":
        packing = round(1 / kept)
        return _with_share(search, kept, f"{_format_packing(packing)}, as was measured when --gpus-per-trial was auto")
    if options.gpus_per_trial is None:
        return search
    runs = find_workload(search, ()).runs
    reason = _why_not_measurable(options)
    possible = {} if reason else possible_packings(this_machine(), options, num_trials=len(runs))
    if len(possible) == 1:
        reason = "no two trials would run on one GPU at once"
    measured: dict[int, TrainingBenchmark] = {}
    if not reason:
        measured, reason = measure_packings(search, possible)
    if not measured:
        return _with_share(search, None, f"--gpus-per-trial auto measured nothing, and is as if left out: {reason}")
    packing = choose_packing(measured)
    config = search.config.model_copy(update={"auto_gpus_per_trial": 1 / packing})
    return _with_share(replace(search, config=config), 1 / packing, format_choice(packing, measured, reason))


def _with_share(search: PreparedSearch, share: float | None, text: str) -> PreparedSearch:
    return replace(search, options=search.options.model_copy(update={"gpus_per_trial": share}), sharing=text)


def _why_not_measurable(options: Options) -> str:
    if options.device == "cpu":
        return "with --device cpu no trial trains on a GPU"
    if options.address is not None:
        return "the GPUs of a cluster are not this machine's"
    if options.gpus is not None:
        return "the GPUs of --gpus are not there"
    return "" if any(node.gpus for node in this_machine().nodes) else "this machine has no GPU"


def possible_packings(cluster: Cluster, options: Options, *, num_trials: int) -> dict[int, Resources]:
    """Return what each trial gets if so many share a GPU, as far as trials, cores and --max-concurrent suffice."""
    possible = {}
    num_gpus = sum(int(node.gpus) for node in cluster.nodes)
    for packing in range(1, MAX_PACKING + 1):
        shared = options.model_copy(update={"gpus_per_trial": 1 / packing})
        resources = allocate(cluster, shared, num_trials=num_trials)
        if packing == 1 or math.ceil(resources.concurrency / num_gpus) >= packing:
            possible[packing] = resources
    return possible


def measure_packings(
    search: PreparedSearch, possible: Mapping[int, Resources]
) -> "tuple[dict[int, TrainingBenchmark], str]":
    """Return what was measured of each packing up to one that fails, and why that one did."""
    from tune_bisenet.training.benchmark import BenchmarkError  # late, as torch takes two seconds

    runs, measured = find_workload(search, ()).runs, {}
    for packing, resources in possible.items():
        try:
            _run, measured[packing] = time_trial(search, runs, resources)
        except BenchmarkError as error:
            return measured, f"{packing} failed: {error}"
    return measured, ""


def choose_packing(measured: "Mapping[int, TrainingBenchmark]") -> int:
    """Return how many trials should share a GPU, given a benchmark by the number that trained side by side.

    It is the number with the most images a second in all, of those whose memory fits its share of the GPU, if that is
    over MIN_GAIN more than of one trial; else 1. A number that is missing has failed.
    """
    in_all = {
        packing: packing * benchmark.images_per_second
        for packing, benchmark in measured.items()
        if benchmark.memory_bytes <= benchmark.available_bytes
    }
    if 1 not in in_all:
        return 1
    best = max(in_all, key=lambda packing: in_all[packing])
    return best if in_all[best] > (1 + MIN_GAIN) * in_all[1] else 1


def format_choice(packing: int, measured: "Mapping[int, TrainingBenchmark]", problem: str) -> str:
    """Return the choice, what it gains, and the figures of each packing that was tried, on one line."""
    gain = packing * measured[packing].images_per_second / measured[1].images_per_second
    why = (
        f"more do not fit, or gain {MIN_GAIN:.0%} at most"
        if packing == 1
        else f"{gain:.2f} x the images a second of one"
    )
    figures = [
        f"{number}: {number * benchmark.images_per_second:.3g} images/s in all, "
        f"{format_bytes(benchmark.memory_bytes)} of {format_bytes(benchmark.available_bytes)} each"
        for number, benchmark in measured.items()
    ]
    return f"{_format_packing(packing)}: {why} ({'; '.join([*figures, *([problem] if problem else [])])})"


def _format_packing(packing: int) -> str:
    return f"{counted(packing, 'trial')} {'has a GPU to itself' if packing == 1 else 'share a GPU'}"
