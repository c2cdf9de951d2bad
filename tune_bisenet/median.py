"""When a trial ends early, the gentler way: its best mIoU so far lies below what others like it had on average.

The median stopping rule (Golovin et al., 2017, "Google Vizier: A Service for Black-Box Optimization", section 3.2.2),
judged after every epoch. mIoU grows, so the others' averages lag behind what they have by now: only who is far behind
is stopped. Vizier compares with completed trials; here count all that have come as far, since trials that run side by
side would else all go to their end. Plain data, as in `rungs`. Epochs count from 1; mIoU is in percent.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from tune_bisenet.config import Run
from tune_bisenet.rungs import (
    FIRST_SHARE,
    GO_ON,
    MIN_OTHERS,
    Verdict,
    diverged_at,
    earliest_fair_epoch,
    epochs_of,
    quantile,
)


def first_judged_epoch(run: Run, *, iterations_per_epoch: int, first_share: float = FIRST_SHARE) -> int:
    """The first epoch after which `run` may be stopped: 20 of 50, but 40 if the loss switches after epoch 35."""
    return max(epochs_of(first_share, run.num_epochs), earliest_fair_epoch(run, iterations_per_epoch))


@dataclass(kw_only=True)
class MedianRule:
    """The judge of one search, a `rungs.Judge`: what each trial had after each epoch, and who was stopped.

    Trials go by their unique name, rows by theirs, and only trials with the same number of epochs are compared.
    """

    judged_from: Callable[[Run], int]
    """`partial(first_judged_epoch, iterations_per_epoch=743)`."""
    spared: frozenset[str] = frozenset()
    """Rows that others are compared with, but that are stopped only if their loss diverges."""
    min_others: int = MIN_OTHERS
    seen: dict[int, dict[str, dict[int, float]]] = field(default_factory=dict)
    """mIoU by num_epochs, then by trial, then by epoch; missing is what a driver that died did not hear of."""
    stops: dict[str, str] = field(default_factory=dict)
    """Why each stopped trial was stopped."""

    def judge(self, run: Run, trial: str, *, epoch: int, miou: float, diverged: bool = False) -> Verdict:
        """The verdict on `trial` after `epoch`, whose mIoU is recorded; the last epoch is not worth one.

        A verdict stands: a restarted trial that reports an epoch again, or goes on where it was stopped, gets the same.
        """
        assert math.isfinite(miou), f"trial {trial} reported mIoU {miou} at epoch {epoch}"
        if trial in self.stops:
            return Verdict(stop=True, reason=self.stops[trial])
        if diverged:
            return self._stop(trial, diverged_at(epoch))
        own = self._curve(run, trial)
        if epoch in own:
            return GO_ON
        own[epoch] = miou
        if run.name in self.spared or not self.judged_from(run) <= epoch < run.num_epochs:
            return GO_ON
        return self._compare(run, trial, epoch)

    def know(self, run: Run, trial: str, curve: Sequence[float]) -> None:
        """As `Judge.know`; all of `curve`."""
        own = self._curve(run, trial)
        for epoch, miou in enumerate(curve, start=1):
            own.setdefault(epoch, miou)

    def to_json(self) -> dict[str, Any]:
        """What was seen and decided, not the settings. `curve` holds epochs 1, 2, ...; null where nothing was heard."""
        rows = [
            {"num_epochs": num_epochs, "trial": trial, "curve": [curve.get(n) for n in range(1, max(curve) + 1)]}
            for num_epochs, curves in self.seen.items()
            for trial, curve in curves.items()
            if curve
        ]
        return {"seen": rows, "stops": dict(self.stops)}

    @classmethod
    def from_json(
        cls,
        record: Mapping[str, Any],
        *,
        judged_from: Callable[[Run], int],
        spared: frozenset[str] = frozenset(),
        min_others: int = MIN_OTHERS,
    ) -> Self:
        """Go on from `to_json`. The settings come from the space, which may have grown since."""
        seen: dict[int, dict[str, dict[int, float]]] = {}
        for row in record["seen"]:
            heard = {epoch: miou for epoch, miou in enumerate(row["curve"], start=1) if miou is not None}
            seen.setdefault(row["num_epochs"], {})[row["trial"]] = heard
        return cls(
            judged_from=judged_from, spared=spared, min_others=min_others, seen=seen, stops=dict(record["stops"])
        )

    def _curve(self, run: Run, trial: str) -> dict[int, float]:
        return self.seen.setdefault(run.num_epochs, {}).setdefault(trial, {})

    def _compare(self, run: Run, trial: str, epoch: int) -> Verdict:
        """Hold the best heard of `trial` against the median of the others; ties and the first few to arrive go on."""
        curves = self.seen[run.num_epochs]
        sums = [_sum(curve, epoch) for other, curve in curves.items() if other != trial and _is_whole(curve, epoch)]
        if len(sums) < self.min_others:
            return GO_ON
        best = max(miou for number, miou in curves[trial].items() if number <= epoch)
        median_sum = quantile(sums, 0.5)
        # Not divided: rounding could let a curve that is flat lie below the average of one just like it.
        if best * epoch >= median_sum:
            return GO_ON
        return self._stop(trial, _below(best, epoch, median_sum / epoch, len(sums)))

    def _stop(self, trial: str, reason: str) -> Verdict:
        self.stops[trial] = reason
        return Verdict(stop=True, reason=reason)


def _is_whole(curve: Mapping[int, float], epoch: int) -> bool:
    """Whether all epochs until `epoch` are known: an average over the later ones alone would be too high."""
    return all(number in curve for number in range(1, epoch + 1))


def _sum(curve: Mapping[int, float], epoch: int) -> float:
    return math.fsum(curve[number] for number in range(1, epoch + 1))


def _below(best: float, epoch: int, cutoff: float, num_others: int) -> str:
    others = "other's running average" if num_others == 1 else "others' running averages"
    return f"best mIoU {best:.2f} until epoch {epoch}, below {cutoff:.2f}, the median of {num_others} {others}"
