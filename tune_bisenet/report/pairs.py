"""Collect the evidence for each promise of a row: its trials paired by seed with those of its reference, and tested."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, assert_never

from tune_bisenet.config import Run
from tune_bisenet.records import Status
from tune_bisenet.report.claims import Kind, Measured, Pair
from tune_bisenet.report.statistics import MeanTest, image_interval, mean_test

EPOCHS_SD: Final = (2 / 12) ** 0.5
"""The least spread of a difference of two whole epochs: each is rounded, with a variance of 1/12."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """One promise and all that was measured of it."""

    run: str
    kind: Kind
    reference: str | None
    promised: tuple[float, float] | None
    note: str
    proxy: bool
    pairs: tuple[Pair, ...]
    test: MeanTest | None
    """None with fewer than two pairs."""
    image_interval: tuple[float, float] | None
    pending: tuple[str, ...]
    failed: tuple[str, ...]
    diverged: tuple[str, ...]
    """Names of trials, those of the reference among them."""

    @property
    def unjudged(self) -> bool:
        return self.proxy and self.kind == "miou"

    @property
    def p(self) -> float | None:
        """None also while trials are pending: what changes with every look is no test."""
        return None if self.test is None or self.pending else self.test.p

    @property
    def compared_at_epoch(self) -> int | None:
        return min((pair.compared_at_epoch for pair in self.pairs if pair.compared_at_epoch), default=None)

    @property
    def estimate(self) -> float | None:
        """The mean over the pairs: points, percent, or epochs saved."""
        return math.fsum(pair.effect for pair in self.pairs) / len(self.pairs) if self.pairs else None

    @property
    def num_never(self) -> int:
        """Seeds at which the row never reached the reference's final mIoU."""
        return sum(pair.never_reached for pair in self.pairs)


def evidence_of(row: Run, trials: Sequence[Measured], *, proxy: bool) -> list[Evidence]:
    """Of each promise of the row: first its mIoU or gain, then how soon."""
    expect = row.expect
    if expect is None:
        return []
    kind: Kind = "gain" if expect.miou is None else "miou"
    promises: list[tuple[Kind, str | None, tuple[float, float] | None]] = [
        (kind, expect.over, expect.miou or expect.gain)
    ]
    if expect.sooner_than is not None:
        promises.append(("sooner", expect.sooner_than, None))
    return [
        _gather(row.name, kind, reference, promised, expect.note, proxy, trials)
        for kind, reference, promised in promises
    ]


def _gather(
    run: str,
    kind: Kind,
    reference: str | None,
    promised: tuple[float, float] | None,
    note: str,
    proxy: bool,
    trials: Sequence[Measured],
) -> Evidence:
    own = {trial.seed: trial for trial in trials if trial.run == run}
    # A level of mIoU is compared with nothing: its trials stand beside themselves.
    bars = own if reference is None else {trial.seed: trial for trial in trials if trial.run == reference}
    matched = [(own[seed], bars[seed]) for seed in sorted(own.keys() & bars.keys())]
    usable = [pair for pair in matched if all(trial.status != "failed" for trial in pair)]
    pairs = tuple(pair for trial, bar in usable if (pair := _pair(kind, trial, bar)) is not None)
    return Evidence(
        run=run,
        kind=kind,
        reference=reference,
        promised=promised,
        note=note,
        proxy=proxy,
        pairs=pairs,
        test=_test(kind, promised, pairs),
        image_interval=_over_images(*usable[0]) if kind == "gain" and len(pairs) == len(usable) == 1 else None,
        pending=_names(usable, ("waiting", "running")),
        failed=_names(matched, ("failed",)),
        diverged=_names(usable, ("diverged",)),
    )


def _names(matched: Sequence[tuple[Measured, Measured]], statuses: Sequence[Status]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(trial.trial for pair in matched for trial in pair if trial.status in statuses))


def _pair(kind: Kind, own: Measured, bar: Measured) -> Pair | None:
    """None where there is nothing to compare (yet)."""
    if not (own.epochs and bar.epochs):
        return None
    pair: Pair | None
    match kind:
        case "gain":
            pair = _gain(own, bar)
        case "miou":
            miou = own.best(own.reached).miou
            pair = Pair(seed=own.seed, own=miou, reference=None, effect=miou, compared_at_epoch=own.ended_at)
        case "sooner":
            pair = _epochs_saved(own, bar)
        case _:
            assert_never(kind)
    if pair is None or not math.isfinite(pair.effect):
        return None
    return replace(pair, diverged=own.status == "diverged")


def _gain(own: Measured, bar: Measured) -> Pair:
    until = _compared_at(own, bar)
    value, reference = (trial.best(until or trial.reached).miou for trial in (own, bar))
    return Pair(seed=own.seed, own=value, reference=reference, effect=value - reference, compared_at_epoch=until)


def _compared_at(own: Measured, bar: Measured) -> int | None:
    """The last epoch both reached, if either ended early."""
    return min(own.reached, bar.reached) if own.ended_at or bar.ended_at else None


def _epochs_saved(own: Measured, bar: Measured) -> Pair | None:
    """None if the reference was stopped: it has no final value then."""
    if bar.ended_at and bar.status != "diverged":
        return None
    final = bar.best(bar.reached)
    reached = own.reaches(final.miou)
    epoch = own.reached + 1 if reached is None else reached
    return Pair(
        seed=own.seed,
        own=epoch,
        reference=final.epoch,
        effect=final.epoch - epoch,
        compared_at_epoch=own.ended_at if reached is None else None,
        never_reached=reached is None,
    )


def _test(kind: Kind, promised: tuple[float, float] | None, pairs: Sequence[Pair]) -> MeanTest | None:
    """Against what must be exceeded: nothing gained or saved, or the low end of a level."""
    if len(pairs) < 2:
        return None
    null = promised[0] if kind == "miou" and promised else 0.0
    return mean_test([pair.effect for pair in pairs], null=null, least_sd=EPOCHS_SD if kind == "sooner" else 0.0)


def _over_images(own: Measured, bar: Measured) -> tuple[float, float] | None:
    """None unless both have the counts of the very epochs that are compared, over two images or more."""
    until = _compared_at(own, bar)
    at_their_best = all(trial.best(until or trial.reached) == trial.best(trial.reached) for trial in (own, bar))
    if own.confusions is None or bar.confusions is None or len(own.confusions) < 2 or not at_their_best:
        return None
    return image_interval(own.confusions, bar.confusions)
