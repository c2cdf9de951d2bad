"""Simulate how often a table of verdicts says something false, and how often it shows what is true.

Searches of the ten rows of runs10 are drawn from known truths and judged by the report's own statistics. A statement is
false if a gain is called kept or exceeded though it is below its promise less the margin (or its range), gained though
it is none, or broken though it is as large as promised; and likewise for levels. "Speed" draws learning curves and
judges how soon they rise.

    python benchmarks/verdicts.py errors [--searches 3000]
    python benchmarks/verdicts.py power [--searches 3000]
    python benchmarks/verdicts.py speed [--searches 300]
"""

import argparse
from collections.abc import Sequence
from itertools import product
from typing import Final

import numpy as np
from numpy.typing import NDArray

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect, Run
from tune_bisenet.records import Epoch, TrialSpec, TrialState
from tune_bisenet.report.claims import measure_window
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import Means, compare_rows, estimate_levels, fit_noise
from tune_bisenet.report.verdicts import judge
from tune_bisenet.spaces import MEASURED_SHARE

Floats = NDArray[np.float64]

MARGIN: Final = 0.2
EXPECTED: Final = [run.expect for run in SPACE.runs if run.expect]
GAINS: Final = [index for index, expect in enumerate(EXPECTED) if expect.gain]
LEVELS: Final = [index for index, expect in enumerate(EXPECTED) if expect.miou]
GAIN_RANGES: Final = np.array([EXPECTED[index].gain for index in GAINS], dtype=float)
LEVEL_RANGES: Final = np.array([EXPECTED[index].miou for index in LEVELS], dtype=float)
NUM_EPOCHS: Final = 50


def truths(where: str) -> tuple[Floats, Floats]:
    """Return true gains and levels: at the low end, middle or top of what is promised, or those of ten equal rows."""
    if where == "equal":
        return np.zeros(len(GAINS)), np.full(len(LEVELS), 55.0)
    share = {"low": 0.0, "middle": 0.5, "top": 1.0}[where]
    of = [ranges[:, 0] + share * (ranges[:, 1] - ranges[:, 0]) for ranges in (GAIN_RANGES, LEVEL_RANGES)]
    return of[0], of[1]


def draw(
    rng: np.random.Generator, searches: int, seeds: int, *, sd: float, shared: float, noisy: int | None, skewed: bool
) -> Floats:
    """Return the noise of S x 10 x N measures; row `noisy` has four times the sd."""

    def standard(*shape: int) -> Floats:
        return 1.0 - rng.exponential(1.0, shape) if skewed else rng.standard_normal(shape)

    own, common = standard(searches, len(EXPECTED), seeds), standard(searches, 1, seeds)
    noise = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    if noisy is not None:
        noise[:, noisy] *= 4
    return sd * noise


def judged(values: Floats) -> tuple[Means, Means]:
    """Return gains and levels with their intervals, by the report's own statistics."""
    noise = fit_noise(values)
    baseline = LEVELS[0]
    gains = compare_rows(values, [(row, baseline) for row in GAINS], noise, family=len(GAINS))
    return gains, estimate_levels(values, LEVELS, noise, family=len(LEVELS))


def false_statements(values: Floats, gains: Floats, levels: Floats) -> tuple[Floats, Floats]:
    """Return, by search, whether any statement on a gain and on a level is false."""
    (gain, level) = judged(values)
    low, high = gain.mean - gain.half_width, gain.mean + gain.half_width
    least, most = GAIN_RANGES.T
    broken = (high < least - MARGIN) | (high <= 0)
    kept = (low >= least - MARGIN) & (low > 0) & ~broken
    is_false = broken & (gains >= least - MARGIN) & (gains > 0)
    is_false |= kept & (gains < least - MARGIN)
    is_false |= (low > most) & (gains <= most)
    is_false |= (low > 0) & (gains <= 0)
    low, high = level.mean - level.half_width, level.mean + level.half_width
    least, most = LEVEL_RANGES.T
    kept = (low >= least - MARGIN) & (high <= most + MARGIN)
    level_false = kept & ((levels < least - MARGIN) | (levels > most + MARGIN))
    level_false |= ~kept & (low > most) & (levels <= most)
    level_false |= ~kept & (high < least) & (levels >= least)
    return is_false.any(1), level_false.any(1)


def errors(searches: int, seeds: Sequence[int]) -> None:
    """Print, by seeds and kind of noise, the worst share of searches with any false statement, over all truths."""
    print(f"worst share of searches with any false statement on a gain or a level, {searches} searches a cell:")
    kinds = {"alike": (None, False), "r01 x 4": (0, False), "r06 x 4": (5, False), "skewed": (None, True)}
    for number, (kind, (noisy, skewed)) in product(seeds, kinds.items()):
        worst = (-1.0, 0.0, 0.0, "")
        for sd, shared, where in product((0.2, 0.5, 1.0), (0.0, 0.5), ("low", "middle", "top", "equal")):
            rng = np.random.default_rng((number, int(10 * sd), int(10 * shared), len(where), noisy or 0, skewed))
            values = draw(rng, searches, number, sd=sd, shared=shared, noisy=noisy, skewed=skewed)
            gains, levels = truths(where)
            values[:, GAINS] += (levels[0] + gains)[None, :, None]
            values[:, LEVELS] += levels[None, :, None]
            of_gain, of_level = false_statements(values, gains, levels)
            share = float((of_gain | of_level).mean())
            worst = max(worst, (share, float(of_gain.mean()), float(of_level.mean()), f"sd {sd}, {shared}, {where}"))
        print(f"  {number:2} seeds, {kind:8} {worst[0]:6.2%} (gains {worst[1]:.2%}, levels {worst[2]:.2%}; {worst[3]})")


def power(searches: int, seeds: Sequence[int]) -> None:
    """Print the share of gains of +1 that are shown, at a trial's sd of 0.3, nothing shared by equal seeds."""
    print(f"share of true gains of +1 that are shown, sd 0.3, {searches} searches:")
    for number in seeds:
        rng = np.random.default_rng(number)
        values = draw(rng, searches, number, sd=0.3, shared=0.0, noisy=None, skewed=False)
        values[:, GAINS] += 1.0
        gain, _level = judged(values)
        print(f"  {number:2} seeds: {float((gain.mean - gain.half_width > 0).mean()):.3f}")


def curve(rng: np.random.Generator, *, end: float, delay: float) -> list[float]:
    """Return the mIoU after each epoch of a run that rises to `end`, `delay` epochs later than others, give or take.

    A difference of two runs has a spread of 2 epochs.
    """
    shift = delay + rng.normal(0, 2.0 / np.sqrt(2))
    time = np.maximum(np.arange(1, NUM_EPOCHS + 1) - shift, 0.0)
    own_end = end + rng.normal(0, 0.3)
    wiggle = rng.normal(0, 0.2, NUM_EPOCHS)
    return list(own_end - 40.0 * np.exp(-time / 6.0) + wiggle)


def speed(searches: int, seeds: Sequence[int]) -> None:
    """Print how often "sooner" is kept and broken for rows that differ in speed and in level."""
    kinds = {
        "equal": (57.0, 0.0),
        "5 epochs faster, equal end": (57.0, -5.0),
        "5 epochs faster, +0.7": (57.7, -5.0),
        "3 epochs slower, +0.5": (57.5, 3.0),
    }
    bar = SPACE.runs[0].model_copy(update={"expect": None})
    row = SPACE.runs[1].model_copy(update={"expect": Expect(miou=(56, 58), sooner_than=bar.name)})
    other = SPACE.runs[8].model_copy(update={"expect": Expect(miou=(57.5, 58.5), sooner_than=bar.name)})
    print(f"'sooner' of one of two claims, {searches} searches: kept, broken")
    window = measure_window(NUM_EPOCHS, MEASURED_SHARE)
    for (kind, (end, delay)), number in product(kinds.items(), seeds):
        rng = np.random.default_rng((number, int(10 * end)))
        verdicts = []
        for _ in range(searches):
            trials = [
                simulated_trial(run, seed, curve(rng, end=level, delay=late))
                for seed in range(number)
                for run, level, late in ((bar, 57.0, 0.0), (row, end, delay))
            ]
            claims = judge([bar, row, other], trials).claims
            verdicts += [claim.verdict for claim in claims if (claim.run, claim.kind) == (row.name, "sooner")]
        shares = [verdicts.count(word) / searches for word in ("kept", "broken")]
        print(f"  {kind}, {number} seeds (mean of {window} epochs): {shares[0]:.1%}, {shares[1]:.1%}")


def simulated_trial(row: Run, seed: int, mious: Sequence[float]) -> ReportedTrial:
    """Return a trial that completed with these mIoUs (percent) after its epochs."""
    run = row.model_copy(update={"seed": seed, "num_epochs": len(mious)})
    spec = TrialSpec(trial=f"{run.name}-s{seed}", run=run)
    state = TrialState.of_run(spec.trial, run, status="finished")
    epochs = [simulated_epoch(number, miou) for number, miou in enumerate(mious, start=1)]
    return ReportedTrial(spec=spec, state=state, epochs=epochs)


def simulated_epoch(number: int, miou: float) -> Epoch:
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "power", "speed"))
    parser.add_argument("--searches", type=int, default=3000)
    parser.add_argument("--seeds", default="2,3,5,10")
    arguments = parser.parse_args()
    run_it = {"errors": errors, "power": power, "speed": speed}[arguments.what]
    run_it(arguments.searches, [int(seeds) for seeds in arguments.seeds.split(",")])
