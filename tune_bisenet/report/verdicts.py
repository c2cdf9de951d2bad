"""Did each row keep its promise: confirmed, refuted or undecided, how sure is that, and what would it cost to know?

Pure functions over rows and what their trials measured; no files, neither Ray nor torch. mIoU is in percent, gains are
in percentage points. A trial's measure is its best mIoU. Evidence is gathered in `pairs`, ruled on in `ruling`, told in
`wording`; `cost` has the seeds still needed. The rules:

- **Pairs.** A row and its reference are compared seed by seed. If either ended before its last epoch, both count up to
  the last epoch that both reached, and the claim says so. A trial that failed is left out; while one is still to come
  or running, its claims are undecided, so that looking often finds nothing that is not there.
- **A gain** is confirmed when its 95 % interval (paired t) lies above 0 and meets the promised range or lies above it,
  and p after Holm's correction is under 0.05. It is refuted when the interval lies at or under 0, or below the range.
- **A level of mIoU** is confirmed when its interval (one-sample t) lies within or above the range, tested against the
  range's low end with the same correction; refuted when it lies below. A trial stopped early could still have risen:
  it can confirm, not refute. On a proxy a level is not judged.
- **Sooner** counts epochs saved: when the reference reached its own final (best) mIoU, less when the row first did. A
  row that never did counts as if in the epoch after its last, which is an upper bound: such a pair can refute, not
  confirm; none at any seed of runs that went to their end refutes. Whole epochs are a spread of their own.
- **Holm's family** is every claim of the table that this search can judge, whether or not it is measured yet. It guards
  what is confirmed; a refutation goes by its own interval alone.
- **Diverged** runs ended there. A claim with one, of the row or of its reference, is never confirmed; a row that
  diverged at every seed (two or more) is refuted.
- **One seed** has no verdict; neither have seeds that changed nothing. Only no gain at all, to the last bit at every
  seed, is refuted.
- **Seeds needed** find what is measured so far, but no less than the middle of the promise (for "sooner", the epochs
  measured), at a power of 80 %, at the spread measured and at the level of Holm's next step.
"""

import shlex
from collections.abc import Sequence

from tune_bisenet.config import Run
from tune_bisenet.report.claims import Claim, Judgement, Kind, Measured, MoreSeeds, Pair, Unit, Verdict
from tune_bisenet.report.cost import ASSUMED_SD, MOST_SEEDS, Plan, hours_of, measured_hours_per_seed, plan_seeds
from tune_bisenet.report.differences import Difference, differences, row_flags
from tune_bisenet.report.pairs import evidence_of
from tune_bisenet.report.ruling import Ruling, rule
from tune_bisenet.report.statistics import ALPHA, holm
from tune_bisenet.report.wording import flags_of, sentence

__all__ = [
    "ASSUMED_SD",
    "MOST_SEEDS",
    "Claim",
    "Difference",
    "Judgement",
    "Kind",
    "Measured",
    "MoreSeeds",
    "Pair",
    "Unit",
    "Verdict",
    "differences",
    "judge",
    "more_seeds",
    "next_command",
]


def judge(
    rows: Sequence[Run],
    trials: Sequence[Measured],
    *,
    proxy: bool = False,
    devices_per_trial: float = 1.0,
    unit: Unit = "GPU-hours",
) -> Judgement:
    """The rows of a search (one Run each, or one a seed) against its trials.

    `devices_per_trial` is the share of a GPU, or of the machine, that a trial has to itself.
    """
    declared = {row.name: row for row in rows}
    evidence = [item for row in declared.values() for item in evidence_of(row, trials, proxy=proxy)]
    family = [item for item in evidence if not item.unjudged]
    p_holm = iter(holm([item.p for item in family]))
    rulings = [rule(item, None if item.unjudged else next(p_holm)) for item in evidence]
    num_open = len(family) - sum(ruling.verdict == "confirmed" for ruling in rulings)
    hours = measured_hours_per_seed(declared.values(), trials, devices_per_trial=devices_per_trial)
    plans = [plan_seeds(ruling, alpha=ALPHA / max(num_open, 1), hours_per_seed=hours) for ruling in rulings]
    flags = row_flags(declared)
    return Judgement(
        claims=tuple(
            _claim(ruling, plan, also_flags=flags[ruling.item.run], unit=unit)
            for ruling, plan in zip(rulings, plans, strict=True)
        ),
        family=len(family),
        proxy=proxy,
        seeds=tuple(sorted({trial.seed for trial in trials})),
        hours_per_seed=hours,
        unit=unit,
    )


def _claim(ruling: Ruling, plan: Plan | None, *, also_flags: Sequence[str], unit: Unit) -> Claim:
    item, test = ruling.item, ruling.item.test
    return Claim(
        run=item.run,
        kind=item.kind,
        reference=item.reference,
        promised=item.promised,
        pairs=item.pairs,
        n_pairs=len(item.pairs),
        estimate=item.estimate,
        interval=test.interval if test else None,
        image_interval=item.image_interval,
        p=item.p,
        p_holm=ruling.p_holm,
        verdict=ruling.verdict,
        reason=ruling.reason,
        words=sentence(ruling, plan, unit=unit),
        compared_at_epoch=item.compared_at_epoch,
        flags=(*flags_of(item, plan), *also_flags),
        note=item.note,
        seeds_needed=plan.seeds if plan else None,
        seeds_capped=plan is not None and plan.capped,
        spread=plan.spread if plan else None,
        spread_assumed=plan is not None and plan.assumed,
        cost_hours=plan.hours if plan else None,
    )


def more_seeds(judgement: Judgement) -> MoreSeeds | None:
    """The rows that 100 more seeds or fewer would decide, with their references; None if there are none."""
    wanted = [claim for claim in judgement.claims if claim.seeds_needed is not None and not claim.seeds_capped]
    if not wanted:
        return None
    # One command: every row gets as many seeds as the one that needs most.
    most = max(claim.seeds_needed or 0 for claim in wanted)
    first = max(judgement.seeds, default=-1) + 1
    names = sorted({name for claim in wanted for name in (claim.run, claim.reference) if name is not None})
    return MoreSeeds(
        runs=tuple(names),
        seeds=tuple(range(first, first + most)),
        hours=hours_of(most, names, hours_per_seed=judgement.hours_per_seed),
        unit=judgement.unit,
    )


def next_command(judgement: Judgement, *, space: str, name: str) -> str | None:
    """The command that runs `more_seeds`."""
    more = more_seeds(judgement)
    if more is None:
        return None
    runs, seeds = ",".join(more.runs), ",".join(map(str, more.seeds))
    command = ["python", "-m", "tune_bisenet.run", "--space", space, "--name", name, "--add"]
    return shlex.join([*command, "--runs", runs, "--seeds", seeds])
