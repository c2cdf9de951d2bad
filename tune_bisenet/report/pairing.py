"""Whether trials that are paired by seed share its noise: a pair that does not makes its gain as noisy as two seeds.

Rows that differ in nothing but when their loss switches are the same training until the earlier switch, so their epochs
must be equal there; what they were trained in (`records.Environment`) may say why they are not.
"""

from collections.abc import Iterable, Sequence

from tune_bisenet.config import parting_epochs
from tune_bisenet.records import Environment
from tune_bisenet.report.claims import Claim
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.text import counted


def environment_parts(environment: Environment) -> tuple[str, str, str, str, str]:
    """Return threads, device and versions as texts, in this order."""
    cuda = f", CUDA {environment.cuda}" if environment.cuda else ""
    return (
        counted(environment.threads, "thread"),
        environment.device + (f" without CUDA graphs ({environment.eager})" if environment.eager else ""),
        f"torch {environment.torch}{cuda}",
        f"numpy {environment.numpy}",
        f"Python {environment.python}",
    )


def environment_differences(own: ReportedTrial, bar: ReportedTrial) -> str:
    """Return in what two trials were trained differently, as "2 threads against 1 thread"; empty if in nothing known.

    A trial that was resumed elsewhere has several environments, so "1 thread and 2 threads" may be said of one.
    """
    if not (own.environments and bar.environments):
        return ""
    sides = ([" and ".join(dict.fromkeys(parts)) for parts in _by_part(trial)] for trial in (own, bar))
    return ", ".join(f"{ours} against {theirs}" for ours, theirs in zip(*sides, strict=True) if ours != theirs)


def _by_part(trial: ReportedTrial) -> Iterable[tuple[str, ...]]:
    return zip(*map(environment_parts, trial.environments), strict=True)


def unequal_pairs(trials: Iterable[ReportedTrial]) -> list[str]:
    """Return a sentence for each two trials that must be equal up to an epoch, but part before it."""
    by_name = {trial.spec.trial: trial for trial in trials}
    pairs = parting_epochs({name: trial.run for name, trial in by_name.items()})
    parted = (_parting(by_name[own], by_name[bar], until) for (bar, own), until in pairs.items())
    return [sentence for sentence in parted if sentence]


def _parting(own: ReportedTrial, bar: ReportedTrial, until: int) -> str:
    """Return where two trials part before they may; empty if they are equal as far as both came."""
    for ours, theirs in zip(own.epochs[:until], bar.epochs[:until], strict=False):
        if ours.diverged and theirs.diverged:  # a loss that is no number equals nothing, not even itself
            return ""
        if (ours.loss, ours.miou) != (theirs.loss, theirs.miou):
            mious = f"{ours.miou:.2f} against {theirs.miou:.2f} %"
            if ours.diverged or theirs.diverged:
                mious = "one diverged"
            elif f"{ours.miou:.2f}" == f"{theirs.miou:.2f}":
                mious = "by less than 0.01 points of mIoU"
            return (
                f"{own.spec.trial} must equal {bar.spec.trial} until epoch {until}, but parts at epoch {ours.epoch} "
                f"({mious}): they do not share the noise of their seed.{_reason(own, bar)}"
            )
    return ""


def _reason(own: ReportedTrial, bar: ReportedTrial) -> str:
    differences = environment_differences(own, bar)
    if differences:
        return f" They were trained with {differences}."
    if any(environment.cuda for trial in (own, bar) for environment in trial.environments):
        return " This is usual on GPUs, whose kernels are not repeatable to the last bit."
    return ""


def shared_pairs(trials: Sequence[ReportedTrial]) -> list[str]:
    """Return a sentence for each two rows of which one took over epochs of the other, and with which seeds."""
    rows = {trial.spec.trial: trial.run.name for trial in trials}
    seeds: dict[tuple[str, str, int], list[str]] = {}
    for trial in trials:
        if begun := trial.beginning:
            pair = trial.run.name, rows.get(begun.trial, begun.trial), begun.epochs
            seeds.setdefault(pair, []).append(str(trial.run.seed))
    return [
        f"{row} took over epochs 1 to {epochs} of {other} (seed {', '.join(numbers)}), the same training until then: "
        "they were trained once, so their noise is common to both."
        for (row, other, epochs), numbers in seeds.items()
    ]


def mixed_pairs(claims: Sequence[Claim], trials: Iterable[ReportedTrial]) -> list[str]:
    """Return a sentence for each way in which trials that the claims compare were trained differently."""
    by_seed = {(trial.run.name, trial.run.seed): trial for trial in trials}
    named: dict[str, list[str]] = {}
    compared = [(claim.run, claim.reference, pair.seed) for claim in claims if claim.reference for pair in claim.pairs]
    for run, reference, seed in dict.fromkeys(compared):
        own, bar = by_seed[run, seed], by_seed[reference, seed]
        if differences := environment_differences(own, bar):
            named.setdefault(differences, []).append(f"{own.spec.trial} and {bar.spec.trial}")
    return [f"Compared, but trained with {differences}: {', '.join(names)}." for differences, names in named.items()]
