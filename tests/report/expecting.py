"""Rows with expectations, and trials with the mIoUs that a test gives them: what verdicts by hand are made of."""

import math
from collections.abc import Sequence

from helpers.rows import plain_epoch

from search_spaces.runs10 import SPACE
from tune_bisenet.config import Expect, Run
from tune_bisenet.records import Epoch, Status, TrialSpec, TrialState
from tune_bisenet.report.claims import Claim, Kind
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.report.verdicts import Judgement, judge

ROWS = {run.name: run for run in SPACE.runs}


def row(name: str, expect: Expect | None = None) -> Run:
    return ROWS["r01"].model_copy(update={"name": name, "expect": expect})


R01 = row("r01")


def gaining(low: float, high: float) -> list[Run]:
    """Return r01, and a row `x` that is expected to gain this over it."""
    return [R01, row("x", Expect(gain=(low, high), over="r01"))]


def epoch(number: int, miou: float, *, diverged: bool = False) -> Epoch:
    """Return an epoch of 36 seconds: a hundredth of an hour."""
    loss = math.nan if diverged else 1.0
    return plain_epoch(number, miou, iterations=10 * number, loss=loss, train_seconds=30.0, val_seconds=6.0)


def trial(name: str, seed: int, mious: Sequence[float], *, status: Status = "finished", of: int = 0) -> ReportedTrial:
    """Return a trial with these mIoUs after its epochs; `of` is how many epochs it was to have."""
    num_epochs = of or len(mious)
    run = row(name).model_copy(update={"seed": seed, "num_epochs": num_epochs})
    spec = TrialSpec(trial=f"{name}-s{seed}", run=run)
    return ReportedTrial(
        spec=spec,
        state=TrialState.of_run(spec.trial, run, status=status),
        epochs=[epoch(number, miou) for number, miou in enumerate(mious, start=1)],
    )


def trials(name: str, finals: Sequence[float]) -> list[ReportedTrial]:
    """Return one finished trial a seed, with these last mIoUs, each after a first epoch that was worse."""
    return [trial(name, seed, [final - 10, final]) for seed, final in enumerate(finals)]


def claim(judgement: Judgement, run: str = "x", kind: Kind = "gain") -> Claim:
    (found,) = [claim for claim in judgement.claims if (claim.run, claim.kind) == (run, kind)]
    return found


def gain_claim(low: float, high: float, gains: Sequence[float]) -> Claim:
    """Return the claim of a row that gained this over r01, whose seeds differ."""
    bars = [55 + seed for seed in range(len(gains))]
    own = [bar + gain for bar, gain in zip(bars, gains, strict=True)]
    return claim(judge(gaining(low, high), trials("r01", bars) + trials("x", own)))


def level_claim(low: float, high: float, mious: Sequence[float], *, proxy: bool = False) -> Claim:
    return claim(judge([row("x", Expect(miou=(low, high)))], trials("x", mious), proxy=proxy), kind="miou")
