"""A study as a new process opens it, its trials trained by arithmetic, and what they leave in folders."""

from dataclasses import replace
from pathlib import Path

import optuna
from light_space import curve_of, earlier_trials, ended, question
from optuna.trial import FrozenTrial

from tune_bisenet.records import TrialSpec, TrialState
from tune_bisenet.study.study import Question, Record, Study, open_storage
from tune_bisenet.study.translation import name_of

EARLIER = earlier_trials(11)


def url_in(place: Path) -> str:
    return f"sqlite:///{place / 'study.db'}"


def opened(url: str, asked: Question | None = None, *, limit: int | None = None) -> Study:
    """As a new process opens it."""
    return Study(
        open_storage(url),
        "test",
        asked or question(),
        limit=limit,
        checkpoint_of=lambda trial: f"/search/{trial}/best.pt",
    )


def trials_at(url: str) -> list[FrozenTrial]:
    return optuna.load_study(study_name="test", storage=url).trials


def trial_at(url: str, name: str) -> FrozenTrial:
    """The last one of that name."""
    return [trial for trial in trials_at(url) if name_of(trial) == name][-1]


def train(study: Study, one: TrialSpec) -> None:
    for epoch in curve_of(one.run):
        study.heard(one.trial, epoch.epoch, epoch.miou)
    study.ended(ended(one))


def train_next(study: Study, count: int) -> list[TrialSpec]:
    trained = []
    for _ in range(count):
        one = study.next()
        assert one is not None
        train(study, one)
        trained.append(one)
    return trained


def waiting(one: TrialSpec, epochs: int = 0) -> Record:
    standing = TrialState(trial=one.trial, run=one.run.name, seed=one.run.seed, num_epochs=one.run.num_epochs)
    return Record(suggested=one, standing=standing, epochs=curve_of(one.run)[:epochs])


def done(one: TrialSpec) -> Record:
    return Record(suggested=one, standing=ended(one), epochs=curve_of(one.run))


def failed(one: TrialSpec) -> TrialState:
    return replace(waiting(one).standing, status="failed", error="no memory")


def suggested(study: Study) -> TrialSpec:
    one = study.next()
    assert one is not None
    return one
