"""Whether trials that are paired by seed share its noise: a pair that does not makes its gain as noisy as two seeds.

Rows that differ in nothing but when their loss switches are the same training until the earlier switch, so their epochs
must be equal there; what they were trained in (`records.Environment`) may say why they are not.
"""

from collections.abc import Iterable, Sequence
from itertools import combinations

from tune_bisenet.records import Environment
from tune_bisenet.report.claims import Claim, settings
from tune_bisenet.report.read import ReportedTrial
from tune_bisenet.text import counted

SWITCH = "loss lovasz_after"
"""The setting in which rows may differ and still be the same training for a while."""


def environment_parts(environment: Environment) -> tuple[str, str, str, str, str]:
    """Return threads, device and versions as texts, in this order."""
    cuda = f", CUDA {environment.cuda}" if environment.cuda else ""
    return (
        counted(environment.threads, "thread"),
        environment.device,
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
    alike: dict[object, list[ReportedTrial]] = {}
    for trial in trials:
        same = {name: value for name, value in settings(trial.run).items() if name != SWITCH}
        alike.setdefault((trial.run.random_seed, *same.items()), []).append(trial)
    pairs = [(own, bar) for group in alike.values() for bar, own in combinations(group, 2)]
    return [sentence for own, bar in pairs if (sentence := _parting(own, bar))]


def _parting(own: ReportedTrial, bar: ReportedTrial) -> str:
    """Return where two trials part that must not; empty if they are equal as far as both came."""
    switches = {trial.run.loss.lovasz_after for trial in (own, bar)}
    until = own.run.num_epochs
    if len(switches) > 1:
        until = min(switch for switch in switches if switch is not None)
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
