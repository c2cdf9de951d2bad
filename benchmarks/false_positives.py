"""How often a search says "confirmed" when nothing is better, and how often when a promise is true: by simulation.

Ten rows with the promises of runs10. Trials of one seed share noise (the same data order and augmentation) and have
their own; epochs wiggle. For false positives every row is the same, at a level at which none of the 13 claims is true
but for the edge: the mean best mIoU is the low end of the lowest promised level. For power every gain is the middle of
its promise.

    python benchmarks/false_positives.py [--searches 2000] [--seeds 3,5]
"""

import argparse
from collections import Counter
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from search_spaces.runs10 import SPACE
from tune_bisenet.records import Epoch
from tune_bisenet.report.verdicts import Judgement, Measured, judge

NUM_EPOCHS = 10
SHARED_SD, OWN_SD, WIGGLE_SD = 0.7, 0.4, 0.2
"""Points of mIoU: of a seed, of a trial, of an epoch."""

LEVEL = 55.0


def curves_of(rng: np.random.Generator, *shape: int) -> NDArray[np.float64]:
    """In percent, by shape x epochs; learning is all but over at the end, as under a poly schedule."""
    progress = 1 - (1 - np.arange(1, NUM_EPOCHS + 1) / NUM_EPOCHS) ** 2
    return 40 + 15 * progress + rng.normal(0, OWN_SD, (*shape, 1)) + rng.normal(0, WIGGLE_SD, (*shape, NUM_EPOCHS))


BIAS = float(curves_of(np.random.default_rng(1), 200_000).max(axis=-1).mean()) - LEVEL
"""How far the best of the curve above is, on average, from the level wanted."""


def simulated(rng: np.random.Generator, num_seeds: int, gains: Mapping[str, float]) -> list[Measured]:
    """The trials of one search; rows gain what `gains` says over the others."""
    curves = curves_of(rng, len(SPACE.runs), num_seeds) - BIAS + rng.normal(0, SHARED_SD, (num_seeds, 1))
    return [
        Measured(
            trial=f"{run.name}-s{seed}",
            run=run.name,
            seed=seed,
            status="finished",
            num_epochs=NUM_EPOCHS,
            epochs=[epoch(number, miou + gains.get(run.name, 0)) for number, miou in enumerate(curve, start=1)],
        )
        for run, by_seed in zip(SPACE.runs, curves.tolist(), strict=True)
        for seed, curve in enumerate(by_seed)
    ]


def epoch(number: int, miou: float) -> Epoch:
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


def searches(number: int, num_seeds: int, *, proxy: bool, gains: Mapping[str, float]) -> list[Judgement]:
    rng = np.random.default_rng((number, num_seeds, proxy, len(gains)))
    return [judge(SPACE.runs, simulated(rng, num_seeds, gains), proxy=proxy) for _ in range(number)]


def num_false(judgements: list[Judgement]) -> int:
    """Searches in which any claim is confirmed."""
    return sum(any(claim.verdict == "confirmed" for claim in judgement.claims) for judgement in judgements)


def promised_gains() -> dict[str, float]:
    """By row, the middle of its promise."""
    return {run.name: sum(run.expect.gain) / 2 for run in SPACE.runs if run.expect and run.expect.gain}


def share(hits: int, of: int) -> str:
    """With its Clopper-Pearson interval."""
    low, high = stats.binomtest(hits, of).proportion_ci(0.95)
    return f"{hits / of:6.2%} (95 % interval {low:.2%} to {high:.2%}, {hits} of {of})"


def run(number: int, seeds: list[int]) -> None:
    print("searches of ten equal rows with any false confirmed:")
    for num_seeds in seeds:
        for proxy in (False, True):
            judgements = searches(number, num_seeds, proxy=proxy, gains={})
            claims = f"{judgements[0].family} claims{' (proxy)' if proxy else ''}"
            print(f"  {num_seeds} seeds, {claims}: {share(num_false(judgements), number)}")
    print("verdicts on a gain that is the middle of its promise:")
    for num_seeds in [*seeds, 10, 20]:
        judgements = searches(max(number // 10, 1), num_seeds, proxy=True, gains=promised_gains())
        for name, gain in promised_gains().items():
            verdicts = Counter(c.verdict for j in judgements for c in j.claims if (c.run, c.kind) == (name, "gain"))
            told = ", ".join(f"{verdict} {verdicts[verdict] / len(judgements):.0%}" for verdict in sorted(verdicts))
            print(f"  {num_seeds} seeds, {name} gains {gain:g}: {told} (n = {len(judgements)})")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--searches", type=int, default=2000)
    parser.add_argument("--seeds", default="3,5")
    arguments = parser.parse_args()
    run(arguments.searches, [int(seeds) for seeds in arguments.seeds.split(",")])
