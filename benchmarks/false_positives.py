"""Simulate how often a search confirms a claim when nothing is better, and how often when the claim is true.

The ten rows have the expectations of runs10. Trials of one seed share noise (the same data order and augmentation), and
each trial and each epoch adds its own. For false positives all rows are alike, at a level at which none of the 13
claims is true, except at its edge: the mean best mIoU is the low end of the lowest expected level. For power every gain
is the middle of its expected range.

    python benchmarks/false_positives.py [--searches 2000] [--seeds 3,5]
"""

import argparse
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search_spaces.runs10 import SPACE
from tune_bisenet.records import Epoch, TrialSpec, TrialState
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.verdicts import Judgement, judge

NUM_EPOCHS = 10
SHARED_SD, OWN_SD, WIGGLE_SD = 0.7, 0.4, 0.2
"""In points of mIoU: between seeds, between trials of a seed, between epochs of a trial."""

LEVEL = 55.0


def draw_curves(rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    """Return mIoU in percent, shape x epochs; the curve is nearly flat at its end, as under a poly schedule."""
    progress = 1 - (1 - np.arange(1, NUM_EPOCHS + 1) / NUM_EPOCHS) ** 2
    return 40 + 15 * progress + rng.normal(0, OWN_SD, (*shape, 1)) + rng.normal(0, WIGGLE_SD, (*shape, NUM_EPOCHS))


BIAS = float(draw_curves(np.random.default_rng(1), 200_000).max(axis=-1).mean()) - LEVEL
"""How far the best epoch of a curve is, on average, above LEVEL."""


def simulate_trials(rng: np.random.Generator, num_seeds: int, gains: Mapping[str, float]) -> list[ReportedTrial]:
    """Return the trials of one search, in which a row has its points of `gains` more than the others."""
    curves = draw_curves(rng, len(SPACE.runs), num_seeds) - BIAS + rng.normal(0, SHARED_SD, (num_seeds, 1))
    trials = []
    for row, by_seed in zip(SPACE.runs, curves.tolist(), strict=True):
        for seed, curve in enumerate(by_seed):
            run = row.model_copy(update={"seed": seed, "num_epochs": NUM_EPOCHS})
            spec = TrialSpec(trial=f"{run.name}-s{seed}", run=run)
            state = TrialState.of_run(spec.trial, run, status="finished")
            gain = gains.get(run.name, 0)
            epochs = [make_epoch(number, miou + gain) for number, miou in enumerate(curve, start=1)]
            trials.append(ReportedTrial(spec=spec, state=state, epochs=epochs))
    return trials


def make_epoch(number: int, miou: float) -> Epoch:
    """Return epoch `number` with this mIoU in percent."""
    return Epoch(
        epoch=number,
        iterations=number,
        loss=1.0,
        loss_main=1.0,
        loss_aux1=0.0,
        loss_aux2=0.0,
        lr=0.01,
        grad_norm=1.0,
        miou=miou,
        iou=(),
        pixel_accuracy=0.0,
        images_per_second=1.0,
        train_seconds=60.0,
        val_seconds=0.0,
    )


def judge_searches(num_searches: int, num_seeds: int, *, proxy: bool, gains: Mapping[str, float]) -> list[Judgement]:
    """Return the judgement of each simulated search."""
    rng = np.random.default_rng((num_searches, num_seeds, proxy, len(gains)))
    return [judge(SPACE.runs, simulate_trials(rng, num_seeds, gains), proxy=proxy) for _ in range(num_searches)]


def num_false(judgements: list[Judgement]) -> int:
    """Return the number of searches in which any claim is confirmed."""
    return sum(any(claim.verdict == "confirmed" for claim in judgement.claims) for judgement in judgements)


def expected_gains() -> dict[str, float]:
    """Return, by row, the middle of the gain that it expects."""
    return {run.name: sum(run.expect.gain) / 2 for run in SPACE.runs if run.expect and run.expect.gain}


def format_share(hits: int, total: int) -> str:
    """Return a share with its Clopper-Pearson interval."""
    low, high = stats.binomtest(hits, total).proportion_ci(0.95)
    return f"{hits / total:6.2%} (95 % interval {low:.2%} to {high:.2%}, {hits} of {total})"


def run(num_searches: int, seeds: list[int]) -> None:
    """Print false positives, then power, by number of seeds."""
    print("searches of ten equal rows with any false confirmed:")
    for num_seeds in seeds:
        for proxy in (False, True):
            judgements = judge_searches(num_searches, num_seeds, proxy=proxy, gains={})
            claims = f"{judgements[0].family} claims{' (proxy)' if proxy else ''}"
            print(f"  {num_seeds} seeds, {claims}: {format_share(num_false(judgements), num_searches)}")
    print("verdicts on a gain that is the middle of its expected range:")
    for num_seeds in [*seeds, 10, 20]:
        judgements = judge_searches(max(num_searches // 10, 1), num_seeds, proxy=True, gains=expected_gains())
        for name, gain in expected_gains().items():
            verdicts = Counter(c.verdict for j in judgements for c in j.claims if (c.run, c.kind) == (name, "gain"))
            shares = ", ".join(f"{verdict} {verdicts[verdict] / len(judgements):.0%}" for verdict in sorted(verdicts))
            print(f"  {num_seeds} seeds, {name} gains {gain:g}: {shares} (n = {len(judgements)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=2000)
    parser.add_argument("--seeds", default="3,5")
    arguments = parser.parse_args()
    run(arguments.searches, [int(seeds) for seeds in arguments.seeds.split(",")])
