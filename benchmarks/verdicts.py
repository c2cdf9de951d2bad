"""Simulate how often a table of verdicts says something false, and how often it shows what is true.

Searches of the ten rows of runs10 are drawn from known truths and judged by the report's own statistics and rules; see
`is_false` for what counts against them. "Speed" draws learning curves and judges how soon they rise. "Looks" counts
false statements at any of several planned looks, with the same seeds for all rows and with more for open rows only;
"decide" compares the latter with all seeds for all rows. "Asha" counts false statements where trials are stopped early.

    python benchmarks/verdicts.py errors [--searches 3000]
    python benchmarks/verdicts.py power [--searches 3000]
    python benchmarks/verdicts.py speed [--searches 300]
    python benchmarks/verdicts.py looks [--searches 1000]
    python benchmarks/verdicts.py decide [--searches 1000]
    python benchmarks/verdicts.py asha [--searches 1000]
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from itertools import product
from typing import Final

import numpy as np

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect, Run
from tune_bisenet.records import Epoch, TrialSpec, TrialState
from tune_bisenet.report.claims import Claim, Verdict, claims_of, measure_window
from tune_bisenet.report.power import SHOWN, Verdicts, judge_at_looks, judge_values
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.statistics import Flags, Floats
from tune_bisenet.report.verdicts import judge, trained_rows
from tune_bisenet.rungs import AshaRule, Stopper, protected_rows
from tune_bisenet.spaces import MEASURED_SHARE

EXPECTED: Final = [run.expect for run in SPACE.runs if run.expect]
GAINS: Final = [index for index, expect in enumerate(EXPECTED) if expect.gain]
LEVELS: Final = [index for index, expect in enumerate(EXPECTED) if expect.miou]
GAIN_RANGES: Final = np.array([EXPECTED[index].gain for index in GAINS], dtype=float)
LEVEL_RANGES: Final = np.array([EXPECTED[index].miou for index in LEVELS], dtype=float)
CLAIMS: Final = [
    claim
    for kind in ("gain", "miou")
    for row in SPACE.runs
    for claim in claims_of(row, (), measured_share=MEASURED_SHARE, proxy=False)
    if claim.kind == kind
]
"""On gains, then on levels."""
NAMES: Final = [row.name for row in SPACE.runs]
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


def is_false(claim: Claim, verdict: Verdict, truth: float) -> bool:
    """Return whether a verdict says of a true gain (points) or level (percent) what is not so."""
    least, most = claim.expected or (0.0, 0.0)
    is_gain = claim.kind == "gain"
    match verdict:
        case "kept":
            return truth < least - claim.margin or (not is_gain and truth > most + claim.margin)
        case "exceeded" | "above":
            return truth <= most
        case "gained":
            return truth <= 0
        case "broken":
            return truth >= least - claim.margin and truth > 0
        case "below":
            return truth >= least
        case _:
            return False


def false_statements(verdicts: Verdicts, gains: Floats, levels: Floats) -> Flags:
    """Return, by search and claim, whether a verdict is false."""
    return np.array(
        [
            [is_false(claim, verdict, truth) for verdict in verdicts[:, index]]
            for index, (claim, truth) in enumerate(zip(CLAIMS, [*gains.tolist(), *levels.tolist()], strict=True))
        ]
    ).T


CELLS: Final = tuple(product((0.2, 0.5, 1.0), (0.0, 0.5), ("low", "middle", "top", "equal")))
"""The sd of a trial, the share of its variance that equal seeds share, and the truth."""

NOISES: Final = {"alike": (None, False), "r01 x 4": (0, False), "r06 x 4": (5, False), "skewed": (None, True)}
"""Which row has four times the sd, and whether the noise is skewed."""


def draw_cell(searches: int, seeds: int, cell: tuple[float, float, str], noise: str) -> tuple[Floats, Floats, Floats]:
    """Return S x 10 x N measures with the true gains and levels."""
    (sd, shared, where), (noisy, skewed) = cell, NOISES[noise]
    rng = np.random.default_rng((seeds, int(10 * sd), int(10 * shared), len(where), noisy or 0, skewed))
    values = draw(rng, searches, seeds, sd=sd, shared=shared, noisy=noisy, skewed=skewed)
    gains, levels = truths(where)
    values[:, GAINS] += (levels[0] + gains)[None, :, None]
    values[:, LEVELS] += levels[None, :, None]
    return values, gains, levels


def errors(searches: int, seeds: Sequence[int]) -> None:
    """Print, by seeds and kind of noise, the worst share of searches with any false statement, over all truths."""
    print(f"worst share of searches with any false statement on a gain or a level, {searches} searches a cell:")
    families = Counter(claim.kind for claim in CLAIMS)
    for number, noise in product(seeds, NOISES):
        worst = (-1.0, 0.0, 0.0, "")
        for cell in CELLS:
            values, gains, levels = draw_cell(searches, number, cell, noise)
            wrong = false_statements(judge_values(values, CLAIMS, NAMES, families=families), gains, levels)
            parts = (wrong, wrong[:, : len(GAINS)], wrong[:, len(GAINS) :])
            found, of_gains, of_levels = (float(part.any(1).mean()) for part in parts)
            worst = max(worst, (found, of_gains, of_levels, str(cell)))
        print(
            f"  {number:2} seeds, {noise:8} {worst[0]:6.2%} (gains {worst[1]:.2%}, levels {worst[2]:.2%}; {worst[3]})"
        )


def power(searches: int, seeds: Sequence[int]) -> None:
    """Print the share of gains of +1 that are shown, at a trial's sd of 0.3, nothing shared by equal seeds."""
    print(f"share of true gains of +1 that are shown, sd 0.3, {searches} searches:")
    for number in seeds:
        rng = np.random.default_rng(number)
        values = draw(rng, searches, number, sd=0.3, shared=0.0, noisy=None, skewed=False)
        values[:, GAINS] += 1.0
        verdicts = judge_values(values, CLAIMS, NAMES, families=Counter(claim.kind for claim in CLAIMS))
        print(f"  {number:2} seeds: {np.isin(verdicts[:, : len(GAINS)], SHOWN).mean():.3f}")


def looks(searches: int, planned: Sequence[int]) -> None:
    """Print the worst share of searches with any false statement at any of the planned looks, over all truths."""
    print(f"worst share of searches with any false statement at looks {planned}, {searches} searches a cell:")
    for decides, noise in product((False, True), NOISES):
        worst = (-1.0, "")
        for cell in CELLS:
            values, gains, levels = draw_cell(searches, planned[-1], cell, noise)
            by_look, _ = judge_at_looks(values, CLAIMS, NAMES, planned, decides=decides)
            wrong = [false_statements(verdicts, gains, levels).any(1) for verdicts in by_look]
            worst = max(worst, (float(np.any(wrong, axis=0).mean()), str(cell)))
        who = "open rows continue" if decides else "all rows go on"
        print(f"  {who:15} {noise:8} {worst[0]:6.2%} ({worst[1]})", flush=True)


def decide(searches: int, planned: Sequence[int]) -> None:
    """Print what --decide trains, of all seeds of all rows, and which true gains it shows, against one look at all."""
    most, families = planned[-1] * len(NAMES), Counter(claim.kind for claim in CLAIMS)
    print(f"--decide at looks {planned} against {planned[-1]} seeds of all rows, {searches} searches a cell:")
    print("   sd, shared, truth: trials trained; gains and levels shown by it and by the fixed; any false statement")
    for cell in product((0.15, 0.3, 0.5, 1.0), (0.0,), ("middle", "equal")):
        values, gains, levels = draw_cell(searches, planned[-1], cell, "alike")
        by_look, trials = judge_at_looks(values, CLAIMS, NAMES, planned, decides=True)
        fixed = judge_values(values, CLAIMS, NAMES, families=families)
        shown = [np.isin(verdicts, SHOWN).mean() for verdicts in (by_look[-1], fixed)]
        wrong = [false_statements(verdicts, gains, levels).any(1).mean() for verdicts in (by_look[-1], fixed)]
        trained = trials.mean() / most
        print(f"  {cell}: {trained:.0%}; {shown[0]:.1%}, {shown[1]:.1%}; {wrong[0]:.2%}, {wrong[1]:.2%}", flush=True)


def asha(searches: int, seeds: Sequence[int]) -> None:
    """Print the share of searches with any false statement under ASHA, and how many claims it leaves to be judged."""
    print(f"any false statement under asha, {searches} searches a cell, sd 0.5: worst truth, claims judged")
    for number, correlation in product(seeds, (0.3, 0.5, 0.7, 0.9)):
        worst = (-1.0, 0.0, "")
        for where in ("low", "middle", "top", "equal"):
            values, gains, levels = draw_cell(searches, number, (0.5, 0.0, where), "alike")
            rng = np.random.default_rng(number)
            wrong, judged = [], []
            for measured in values:
                kept = stopped_early(rng, measured, correlation)
                verdicts = judge_values(kept[None], CLAIMS, NAMES, families=Counter(claim.kind for claim in CLAIMS))
                completed = ~np.isnan(kept).any(1)
                is_judged = [completed[[NAMES.index(name) for name in trained_rows(claim)]].all() for claim in CLAIMS]
                wrong.append(bool((false_statements(verdicts, gains, levels)[0] & is_judged).any()))
                judged.append(np.mean(is_judged))
            worst = max(worst, (float(np.mean(wrong)), float(np.mean(judged)), where))
        print(f"  {number:2} seeds, correlation {correlation}: {worst[0]:.2%} ({worst[2]}), {worst[1]:.0%}", flush=True)


def stopped_early(rng: np.random.Generator, measured: Floats, correlation: float) -> Floats:
    """Return 10 x N measures with NaN where ASHA stops a trial; a rung correlates so with the end, over seeds."""
    sd = measured.std(1, keepdims=True)
    noise = rng.standard_normal((2, *measured.shape)) * sd
    mean = measured.mean(1, keepdims=True)
    rungs = mean + correlation * (measured - mean) + np.sqrt(1 - correlation**2) * noise
    stopper = Stopper(rule=AshaRule(), iterations_per_epoch=lambda _run: 743, protected=protected_rows(SPACE.runs))
    kept = measured.copy()
    for seed, (row, run) in product(range(measured.shape[1]), enumerate(SPACE.runs)):
        epochs = AshaRule().judged_epochs(run, 743)
        scores = rungs[-len(epochs) :, row, seed].tolist()
        stops = [stopper.decide(run, f"{row}-{seed}", epoch=e, miou=m) for e, m in zip(epochs, scores, strict=True)]
        if any(stops):
            kept[row, seed] = np.nan
    return kept


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
    parser.add_argument("what", choices=("errors", "power", "speed", "looks", "decide", "asha"))
    parser.add_argument("--searches", type=int, default=3000)
    parser.add_argument("--seeds", help="default: 2,3,5,10; of looks and decide 3,5,8,12")
    arguments = parser.parse_args()
    run_it = globals()[arguments.what]
    seeds = arguments.seeds or ("3,5,8,12" if arguments.what in ("looks", "decide") else "2,3,5,10")
    run_it(arguments.searches, [int(number) for number in seeds.split(",")])
