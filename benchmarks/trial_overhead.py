"""Measure what a trial costs beside its training, after the first one of a worker: it must stay under a second.

Runs a real search of one-epoch trials, one after another in one worker. The overhead of trial k is the time from the
end of trial k-1 (its folder says how it ended) to the end of trial k, less the seconds that k trained and validated.

    python benchmarks/trial_overhead.py [--trials 8]
"""

import argparse
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from tune_bisenet.records import TRIAL, read_trial
from tune_bisenet.run import main
from tune_bisenet.storage import Storage


def overheads(search: Path) -> list[float]:
    """Return seconds by trial in the order in which they ended, without the first, which imports torch."""
    ends = sorted((path.stat().st_mtime, path.parent) for path in search.glob(f"*/{TRIAL}"))
    return [end - before - trained_seconds(folder) for (before, _), (end, folder) in pairwise(ends)]


def trained_seconds(folder: Path) -> float:
    """Return how long the trial in `folder` trained and validated."""
    record = read_trial(Storage.at(str(folder)))
    assert record is not None
    return record.state.seconds


def run(num_trials: int) -> None:
    """Run the search in a temporary folder, and print the overhead of its trials."""
    seeds = ",".join(map(str, range(num_trials)))
    with tempfile.TemporaryDirectory() as directory:
        flags = f"--space smoke --runs a --epochs 1 --max-concurrent 1 --seeds {seeds} --name n --storage {directory}"
        main([*flags.split(), "--scheduler", "fifo", "--data", "streets"])
        seconds = overheads(Path(directory) / "n")
    print(
        f"overhead of a trial: median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s, n = {len(seconds)}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    run(parser.parse_args().trials)
