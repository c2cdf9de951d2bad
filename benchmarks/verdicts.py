"""Simulate how often a table of verdicts says something false, and how often it shows what is true.

Searches of the ten rows of runs10 are drawn from known truths and judged by the report's own statistics and rules, on
gains, levels and speed together; see `is_false` for what counts against them. "Errors" counts searches with a false
statement where the table is judged once, "looks" at any of several planned looks, both without a scheduler and with
ASHA. "Decide" compares `--decide` with all seeds for all rows, and "speed" draws rows that differ in speed and level.

    python benchmarks/verdicts.py errors [--searches 3000] [--scheduler asha] [--output FILE]
    python benchmarks/verdicts.py looks [--searches 3000] [--scheduler asha] [--output FILE]
    python benchmarks/verdicts.py power [--searches 3000]
    python benchmarks/verdicts.py speed [--searches 3000]
    python benchmarks/verdicts.py decide [--searches 1000]
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Final, get_args

import numpy as np

from search_spaces.runs10 import SPACE
from tune_bisenet.report.claims import Claim, Verdict, claims_of, is_final, judge_intervals, measure_window
from tune_bisenet.report.power import SHOWN, Verdicts, judge_at_looks, judge_values
from tune_bisenet.report.statistics import Flags, Floats, error_share, strictness, student_interval
from tune_bisenet.report.verdicts import EPOCHS_SD, trained_rows
from tune_bisenet.rungs import AshaRule, simulate_ends
from tune_bisenet.spaces import MEASURED_SHARE

EXPECTED: Final = [run.expect for run in SPACE.runs if run.expect]
GAINS: Final = [index for index, expect in enumerate(EXPECTED) if expect.gain]
LEVELS: Final = [index for index, expect in enumerate(EXPECTED) if expect.miou]
GAIN_RANGES: Final = np.array([EXPECTED[index].gain for index in GAINS], dtype=float)
LEVEL_RANGES: Final = np.array([EXPECTED[index].miou for index in LEVELS], dtype=float)
ALL_CLAIMS: Final = [
    claim
    for kind in ("gain", "miou", "sooner")
    for row in SPACE.runs
    for claim in claims_of(row, (), measured_share=MEASURED_SHARE, proxy=False)
    if claim.kind == kind
]
CLAIMS: Final = ALL_CLAIMS[: len(EXPECTED)]
"""On gains, then on levels."""
SOONER: Final = ALL_CLAIMS[len(EXPECTED) :]
NAMES: Final = [row.name for row in SPACE.runs]
ITERATIONS_PER_EPOCH: Final = 743
NUM_EPOCHS: Final = 50
WINDOW: Final = measure_window(NUM_EPOCHS, MEASURED_SHARE)
SPEED_SD: Final = 2.0 / np.sqrt(2)
"""Of the epochs by which a run is late: a difference of two runs has a spread of 2 epochs."""


def truths(where: str) -> tuple[Floats, Floats]:
    """Return true gains and levels: at the low end, middle or top of what is promised, or those of ten equal rows."""
    if where == "equal":
        return np.zeros(len(GAINS)), np.full(len(LEVELS), 55.0)
    share = {"low": 0.0, "middle": 0.5, "top": 1.0}[where]
    of = [ranges[:, 0] + share * (ranges[:, 1] - ranges[:, 0]) for ranges in (GAIN_RANGES, LEVEL_RANGES)]
    return of[0], of[1]


def draw(
    rng: np.random.Generator, searches: int, seeds: int, *, shared: float, noisy: int | None, skewed: bool
) -> Floats:
    """Return S x 10 x N noise of sd 1; row `noisy` has four times that."""

    def standard(*shape: int) -> Floats:
        return 1.0 - rng.exponential(1.0, shape) if skewed else rng.standard_normal(shape)

    own, common = standard(searches, len(EXPECTED), seeds), standard(searches, 1, seeds)
    noise: Floats = np.sqrt(1 - shared) * own + np.sqrt(shared) * common
    if noisy is not None:
        noise[:, noisy] *= 4
    return noise


def is_false(claim: Claim, verdict: Verdict, truth: float) -> bool:
    """Return whether a verdict says of a true gain (points), level (percent) or speed (epochs saved) what is not so."""
    if claim.kind == "sooner":
        return (verdict == "kept" and truth <= 0) or (verdict == "broken" and truth >= 0)
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


def false_statements(claims: Sequence[Claim], verdicts: Verdicts, truths: Sequence[float]) -> Flags:
    """Return, by search and claim, whether a verdict is false."""
    columns = []
    for claim, truth, column in zip(claims, truths, verdicts.T, strict=True):
        columns.append(np.isin(column, [word for word in get_args(Verdict) if is_false(claim, word, truth)]))
    return np.stack(columns, axis=1)


CELLS: Final = tuple(product((0.2, 0.5, 1.0), (0.0, 0.5), ("low", "middle", "top", "equal")))
"""The sd of a trial, the share of its variance that equal seeds share, and the truth."""

NOISES: Final = {
    "alike": (None, False),
    "r01 x 4": (0, False),
    "r06 x 4": (5, False),
    "r09 x 4": (8, False),
    "skewed": (None, True),
    "r01 x 4, skewed": (0, True),
}
"""Which row has four times the sd, and whether the noise is skewed."""


@dataclass(frozen=True, kw_only=True)
class Searches:
    """Holds what S simulated searches measure, and what is true."""

    measured: Floats
    """S x 10 x N: mIoU in percent; NaN where a trial was stopped early."""
    saved: Floats
    """S x claims x N: the epochs saved by the rows that are expected to be sooner; NaN as above."""
    truths: tuple[float, ...]
    """Of all claims: points, percent, epochs saved."""

    def stopped_early(self, noise: Floats, spread: Floats, correlation: float, seed: int) -> "Searches":
        """Return the searches under ASHA, whose rungs correlate so with the end over the seeds of a row.

        `noise` is the part of `measured` that differs over seeds, S x 10 x N, and `spread` its sd by row. Trials arrive
        in the declared order, all rows of the first seed first.
        """
        num_searches, num_rows, num_seeds = self.measured.shape
        runs = [run for _ in range(num_seeds) for run in SPACE.runs]
        rungs = [AshaRule().judged_epochs(run, ITERATIONS_PER_EPOCH) for run in runs]
        other = np.random.default_rng(seed).standard_normal((2, *noise.shape)) * spread[:, None]
        at_rungs = self.measured - noise + correlation * noise + np.sqrt(1 - correlation**2) * other
        scores = at_rungs.transpose(1, 3, 2, 0).reshape(num_searches, num_seeds * num_rows, 2)
        for trial, epochs in enumerate(rungs):
            scores[:, trial, : len(epochs)] = scores[:, trial, -len(epochs) :]
        ends = simulate_ends(runs, rungs, AshaRule(), scores)
        completed = (ends == NUM_EPOCHS).reshape(num_searches, num_seeds, num_rows).transpose(0, 2, 1)
        both = [completed[:, [NAMES.index(name) for name in trained_rows(claim)]].all(1) for claim in SOONER]
        return Searches(
            measured=np.where(completed, self.measured, np.nan),
            saved=np.where(np.stack(both, axis=1), self.saved, np.nan),
            truths=self.truths,
        )


def draw_cell(
    searches: int, seeds: int, cell: tuple[float, float, str], noise: str, *, correlation: float | None = None
) -> Searches:
    """Draw searches of all rows at equal speed; with a `correlation`, ASHA stops some trials."""
    (sd, shared, where), (noisy, skewed) = cell, NOISES[noise]
    seed = (seeds, int(100 * sd), int(10 * shared), len(where), *noise.encode())
    rng = np.random.default_rng(seed)
    ends, late = (draw(rng, searches, seeds, shared=shared, noisy=noisy, skewed=skewed) for _ in range(2))
    ends *= sd
    gains, levels = truths(where)
    rows = np.zeros(len(NAMES))
    rows[GAINS], rows[LEVELS] = levels[0] + gains, levels
    found = measure(rng, rows[:, None] + ends, SPEED_SD * late, (*gains, *levels, *(0.0 for _ in SOONER)))
    if correlation is None:
        return found
    spread = np.full(len(NAMES), sd)
    if noisy is not None:
        spread[noisy] *= 4
    return found.stopped_early(ends, spread, correlation, int(rng.integers(2**32)))


def measure(rng: np.random.Generator, ends: Floats, late: Floats, truths: Sequence[float]) -> Searches:
    """Return what runs that rise to `ends` (S x 10 x N), so many epochs `late`, measure."""
    rows = list(dict.fromkeys(NAMES.index(name) for claim in SOONER for name in trained_rows(claim)))
    curves = {row: running_means(rng, ends[:, row], late[:, row]) for row in rows}
    measured = ends.copy()
    for row, curve in curves.items():
        measured[:, row] = curve[..., -1]
    saved = []
    for claim in SOONER:
        own, bar = (curves[NAMES.index(name)] for name in trained_rows(claim))
        distance = np.maximum(claim.margin, np.minimum(own[..., -1], bar[..., -1]) - (claim.level or np.inf))
        own_first, bar_first = (first_epoch_at(curve, curve[..., -1] - distance) for curve in (own, bar))
        saved.append(bar_first - own_first)
    return Searches(measured=measured, saved=np.stack(saved, axis=1), truths=tuple(truths))


def running_means(rng: np.random.Generator, end: Floats, late: Floats) -> Floats:
    """Return S x N x epochs: the mean mIoU of the last epochs, from the first epoch that has so many on."""
    time = np.maximum(np.arange(1, NUM_EPOCHS + 1) - late[..., None], 0.0)
    curve = end[..., None] - 40.0 * np.exp(-time / 6.0) + rng.normal(0, 0.2, time.shape)
    sums = np.cumsum(curve, axis=-1)
    sums[..., WINDOW:] -= sums[..., :-WINDOW].copy()
    return np.asarray(sums[..., WINDOW - 1 :] / WINDOW)


def first_epoch_at(means: Floats, level: Floats) -> Floats:
    """Return the first epoch at which a running mean is at `level`."""
    return np.asarray((means >= level[..., None]).argmax(-1) + WINDOW, dtype=float)


def speed_verdicts(saved: Floats, spent: float = 1.0) -> Verdicts:
    """Return the verdicts on speed, S x claims; `spent` is the share of the error that they may use up."""
    error = strictness(saved.shape[2]).sooner_error * spent
    low, high = student_interval(saved, error=error, family=len(SOONER), least_sd=EPOCHS_SD)
    return np.stack(
        [judge_intervals(claim, low[:, index], high[:, index]) for index, claim in enumerate(SOONER)], axis=1
    )


def judge_searches(searches: Searches, looks: Sequence[int]) -> tuple[Verdicts, Flags]:
    """Judge at planned looks (or one); return all claims' verdicts, looks x S x claims, and which can be judged."""
    families = Counter(claim.kind for claim in ALL_CLAIMS)
    verdicts = np.full((len(searches.measured), len(ALL_CLAIMS)), "open", dtype=object)
    by_look = []
    for look in looks:
        seen, share = searches.measured[:, :, :look], error_share(look, num_looks=len(looks))
        of_level = judge_values(seen, CLAIMS, NAMES, families=families, spent=share)
        found = np.concatenate([of_level, speed_verdicts(searches.saved[:, :, :look], share)], axis=1)
        completed = ~np.isnan(seen).any(2)
        rows = [[NAMES.index(name) for name in trained_rows(claim)] for claim in ALL_CLAIMS]
        is_judged = np.stack([completed[:, of_claim].all(1) for of_claim in rows], axis=1)
        found[~is_judged] = "open"
        verdicts = np.where(is_final(verdicts, found), verdicts, found)
        by_look.append(verdicts)
    return np.stack(by_look), is_judged


CORRELATIONS: Final = (0.3, 0.5, 0.7, 0.9)
"""Between a rung's mIoU and the final one, over the seeds of a row."""


def count(searches: int, looks: Sequence[int], scheduler: str, output: Path | None) -> None:
    """Print, by kind of noise and of claim, the worst share of searches with any false statement, over all cells.

    `output` gets a line of JSON for every cell.
    """
    kinds = {kind: [claim.kind == kind for claim in ALL_CLAIMS] for kind in ("gain", "miou", "sooner")}
    for noise in NOISES:
        worst = (-1.0, "")
        for cell, correlation in product(CELLS, CORRELATIONS if scheduler == "asha" else (None,)):
            drawn = draw_cell(searches, looks[-1], cell, noise, correlation=correlation)
            by_look, is_judged = judge_searches(drawn, looks)
            wrong = np.stack([false_statements(ALL_CLAIMS, verdicts, drawn.truths) for verdicts in by_look]).any(0)
            of_kind = {kind: round(float(wrong[:, chosen].any(1).mean()), 5) for kind, chosen in kinds.items()}
            found = float(wrong.any(1).mean())
            worst = max(worst, (found, f"{cell}, {correlation}, {of_kind}, {is_judged.mean():.0%} judged"))
            if output:
                row = {"looks": looks, "noise": noise, "cell": cell, "correlation": correlation, "false": found}
                with output.open("a") as file:
                    file.write(json.dumps({**row, **of_kind, "judged": float(is_judged.mean())}) + "\n")
        print(f"  looks {looks}, {noise:15} {worst[0]:6.2%} ({worst[1]})", flush=True)


def errors(searches: int, seeds: Sequence[int], scheduler: str, output: Path | None) -> None:
    """Count false statements where the table is judged once, for each number of seeds."""
    print(f"worst share of searches with any false statement, {scheduler}, {searches} searches a cell:")
    for number in seeds:
        count(searches, [number], scheduler, output)


def looks(searches: int, planned: Sequence[int], scheduler: str, output: Path | None) -> None:
    """Count false statements at any of the planned looks."""
    print(f"worst share of searches with any false statement at any look, {scheduler}, {searches} searches a cell:")
    count(searches, planned, scheduler, output)


def power(searches: int, seeds: Sequence[int], *_others: object) -> None:
    """Print the share of gains of +1 that are shown, at a trial's sd of 0.3, nothing shared by equal seeds."""
    print(f"share of true gains of +1 that are shown, sd 0.3, {searches} searches:")
    for number in seeds:
        rng = np.random.default_rng(number)
        values = 0.3 * draw(rng, searches, number, shared=0.0, noisy=None, skewed=False)
        values[:, GAINS] += 1.0
        verdicts = judge_values(values, CLAIMS, NAMES, families=Counter(claim.kind for claim in CLAIMS))
        print(f"  {number:2} seeds: {np.isin(verdicts[:, : len(GAINS)], SHOWN).mean():.3f}")


def decide(searches: int, planned: Sequence[int], *_others: object) -> None:
    """Print what --decide trains, of all seeds of all rows, and which true gains it shows, against one look at all."""
    most, families = planned[-1] * len(NAMES), Counter(claim.kind for claim in CLAIMS)
    print(f"--decide at looks {planned} against {planned[-1]} seeds of all rows, {searches} searches a cell:")
    print("   sd, shared, truth: trials trained; gains and levels shown by it and by the fixed; any false statement")
    for cell in product((0.15, 0.3, 0.5, 1.0), (0.0,), ("middle", "equal")):
        drawn = draw_cell(searches, planned[-1], cell, "alike")
        by_look, trials = judge_at_looks(drawn.measured, CLAIMS, NAMES, planned, families=families, decides=True)
        fixed = judge_values(drawn.measured, CLAIMS, NAMES, families=families)
        shown = [np.isin(verdicts, SHOWN).mean() for verdicts in (by_look[-1], fixed)]
        true = drawn.truths[: len(CLAIMS)]
        wrong = [false_statements(CLAIMS, verdicts, true).any(1).mean() for verdicts in (by_look[-1], fixed)]
        trained = trials.mean() / most
        print(f"  {cell}: {trained:.0%}; {shown[0]:.1%}, {shown[1]:.1%}; {wrong[0]:.2%}, {wrong[1]:.2%}", flush=True)


def speed(searches: int, seeds: Sequence[int], *_others: object) -> None:
    """Print how often "sooner" is kept and broken for rows that differ in speed and in level."""
    kinds = {
        "equal": (57.0, 0.0),
        "5 epochs faster, equal end": (57.0, -5.0),
        "5 epochs faster, +0.7": (57.7, -5.0),
        "3 epochs slower, +0.5": (57.5, 3.0),
    }
    own = NAMES.index(SOONER[0].run)
    print(f"'sooner' of {SOONER[0].run}, one of two claims, {searches} searches: kept, broken")
    for (kind, (end, delay)), number in product(kinds.items(), seeds):
        rng = np.random.default_rng((number, int(10 * end)))
        ends, late = (draw(rng, searches, number, shared=0.0, noisy=None, skewed=False) for _ in range(2))
        ends, late = 57.0 + 0.3 * ends, SPEED_SD * late
        ends[:, own] += end - 57.0
        late[:, own] += delay
        verdicts = speed_verdicts(measure(rng, ends, late, ()).saved)[:, 0]
        print(f"  {kind}, {number} seeds: {(verdicts == 'kept').mean():.1%}, {(verdicts == 'broken').mean():.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("errors", "looks", "power", "speed", "decide"))
    parser.add_argument("--searches", type=int, default=3000)
    parser.add_argument("--seeds", help="default: 2,3,5,10; of looks and decide 3,5,8,12")
    parser.add_argument("--scheduler", choices=("fifo", "asha"), default="fifo")
    parser.add_argument("--output", type=Path, help="a file to append the figures of every cell to, as JSON lines")
    arguments = parser.parse_args()
    seeds = arguments.seeds or ("3,5,8,12" if arguments.what in ("looks", "decide") else "2,3,5,10")
    numbers = [int(number) for number in seeds.split(",")]
    globals()[arguments.what](arguments.searches, numbers, arguments.scheduler, arguments.output)
