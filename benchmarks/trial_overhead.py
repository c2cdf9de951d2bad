"""What a trial costs beside its training, after the first one of a worker: must stay under a second.

Runs a real search of one-epoch trials, one after another in one worker. The overhead of trial k is the time from the
end of trial k-1 (its epoch safe on storage) to the end of trial k, less the seconds trial k trained and validated.

    python benchmarks/trial_overhead.py [--trials 8]
"""

import argparse
import json
import statistics
import tempfile
from itertools import pairwise
from pathlib import Path

from tune_bisenet.run import main


def overheads(search: Path) -> list[float]:
    """Seconds by trial in the order they ended, the first (which imports torch) left out."""
    ends = sorted((path.stat().st_mtime, json.loads(path.read_text())) for path in search.glob("*/epochs.json"))
    return [
        end - before - sum(epoch["train_seconds"] + epoch["val_seconds"] for epoch in epochs)
        for (before, _), (end, epochs) in pairwise(ends)
    ]


def run(num_trials: int) -> None:
    seeds = ",".join(map(str, range(num_trials)))
    with tempfile.TemporaryDirectory() as place:
        flags = f"--space smoke --runs a --epochs 1 --max-concurrent 1 --seeds {seeds} --name n --storage {place}"
        main([*flags.split(), "--scheduler", "fifo", "--data", "streets"])
        seconds = overheads(Path(place) / "n")
    print(
        f"overhead of a trial: median {statistics.median(seconds):.2f} s, max {max(seconds):.2f} s, n = {len(seconds)}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=8)
    run(parser.parse_args().trials)
