"""From a search's records to the judgement of its declared rows."""

from collections.abc import Sequence

from tune_bisenet.report.read import SearchRecord, TrialRecord
from tune_bisenet.report.verdicts import Judgement, Measured, judge
from tune_bisenet.report.views import cost_basis


def judge_search(search: SearchRecord) -> Judgement:
    """The declared rows' promises against what their trials measured; what a sampler made up promises nothing."""
    devices, unit = cost_basis(search.manifest.sessions[-1])
    proxy = search.manifest.proxy is not None
    return judge(search.declared_rows, _judged(search), proxy=proxy, devices_per_trial=devices, unit=unit)


def measured(trial: str, record: TrialRecord) -> Measured:
    return Measured(
        trial=trial,
        run=record.run.name,
        seed=record.run.seed,
        status=record.standing.status,
        num_epochs=record.run.num_epochs,
        epochs=record.epochs,
        confusions=record.confusions,
    )


def fresh_trials(search: SearchRecord) -> dict[str, TrialRecord]:
    """Those at fresh seeds, trained after a study had made its choice."""
    study = search.study
    return {trial: record for trial, record in search.trials.items() if study and study.is_confirm(trial)}


def _judged(search: SearchRecord) -> Sequence[Measured]:
    """A row that got fresh seeds because it looked best is judged by them alone: the seed it was chosen by flatters."""
    fresh = fresh_trials(search)
    chosen = {record.run.name for record in fresh.values()} - {search.baseline}
    return [
        measured(trial, record)
        for trial, record in search.trials.items()
        if trial in fresh or record.run.name not in chosen
    ]
