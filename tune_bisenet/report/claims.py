"""The values a verdict is made from and made into: a trial as measured, a pair, a claim, the judgement of a table."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from tune_bisenet.records import Epoch, Status, best_of
from tune_bisenet.report.statistics import Counts

Kind = Literal["gain", "miou", "sooner"]
Verdict = Literal["confirmed", "refuted", "undecided", "not judged"]
Unit = Literal["GPU-hours", "machine-hours"]


# --- what comes in --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One trial: its epochs in order, and the counts of its best epoch (images x 19 x 19, labels by rows) if kept."""

    trial: str
    run: str
    seed: int
    status: Status
    num_epochs: int
    epochs: Sequence[Epoch]
    confusions: Counts | None = field(default=None, compare=False, repr=False)

    @property
    def reached(self) -> int:
        return self.epochs[-1].epoch if self.epochs else 0

    @property
    def ended_at(self) -> int | None:
        """The epoch it came to, if that is not its last."""
        return self.reached if self.reached < self.num_epochs else None

    def best(self, until: int) -> Epoch:
        return best_of([epoch for epoch in self.epochs if epoch.epoch <= until])

    def reaches(self, miou: float) -> int | None:
        """The first epoch at which its mIoU is no less than `miou`."""
        return next((epoch.epoch for epoch in self.epochs if not epoch.diverged and epoch.miou >= miou), None)


# --- what comes out -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One seed's part of a claim: mIoU in percent, or for "sooner" the epochs at which the final mIoU was reached."""

    seed: int
    own: float
    reference: float | None
    """None for a level of mIoU, which is compared with nothing."""
    effect: float
    """Points gained, epochs saved, or the row's own mIoU."""
    compared_at_epoch: int | None = None
    """Set where a trial ended early."""
    never_reached: bool = False
    """For "sooner": `own` is the epoch after the last, so `effect` is an upper bound."""
    diverged: bool = False
    """The row's own trial did."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """One promise of one row, and what became of it."""

    run: str
    kind: Kind
    reference: str | None
    promised: tuple[float, float] | None
    """Points, or percent for a level of mIoU; None for "sooner"."""
    pairs: tuple[Pair, ...]
    n_pairs: int
    estimate: float | None
    """The mean over the pairs: points, percent, or epochs saved."""
    interval: tuple[float, float] | None
    """At 95 %, over seeds; None with fewer than two."""
    image_interval: tuple[float, float] | None
    """At 95 %, over validation images, of one seed's gain: the noise of the data, not that of seeds."""
    p: float | None
    p_holm: float | None
    verdict: Verdict
    reason: str
    """Why it is so, in a few words."""
    words: str
    """All of it in one sentence."""
    compared_at_epoch: int | None
    """The earliest epoch at which a pair was compared; None if all went to their end."""
    flags: tuple[str, ...]
    note: str
    seeds_needed: int | None
    """How many more would decide it; None where it is decided or where seeds alone would not."""
    seeds_capped: bool
    """More than `seeds_needed`."""
    spread: float | None
    """The standard deviation over seeds that `seeds_needed` goes by."""
    spread_assumed: bool
    cost_hours: float | None
    """Of `seeds_needed`, those of the reference included."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """Every claim of a table, in declared order."""

    claims: tuple[Claim, ...]
    family: int
    """How many claims Holm's correction is over."""
    proxy: bool
    seeds: tuple[int, ...]
    """All that were run."""
    hours_per_seed: Mapping[str, float]
    """What one more seed of a row costs at the speed measured; empty before anything was."""
    unit: Unit

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class MoreSeeds:
    """What would decide every claim that up to 100 more seeds can decide."""

    runs: tuple[str, ...]
    seeds: tuple[int, ...]
    hours: float | None
    unit: Unit
