"""What has passed the checks: a `Survey`, which is enough for a plan, and a `Flight`, of which the data are packed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_bisenet import frames, plan
from tune_bisenet.arguments import Arguments, Choices, Limits
from tune_bisenet.config import Job, Run, size_words
from tune_bisenet.data.source import Source
from tune_bisenet.spaces import Space
from tune_bisenet.storage import Storage
from tune_bisenet.study.place import StudyPlace
from tune_bisenet.study.sampling import Point
from tune_bisenet.study.study import Question
from tune_bisenet.suggested import Known, Suggested


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A space that has been drawn from."""

    question: Question
    points: tuple[Point, ...]
    """Drawn at random."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The declared rows, and runs such as the search may draw."""
        return (*(run for run, _point in self.question.rows.values()), *self.drawn)

    @property
    def drawn(self) -> tuple[Run, ...]:
        return tuple(point.run for point in self.points)


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A search that has nothing wrong with it, as far as one sees without decoding a frame."""

    name: str
    folder: Storage
    arguments: Arguments
    choices: Choices
    limits: Limits
    space: Space
    runs: tuple[Run, ...]
    """All trials of a grid; the declared rows that a sampled search begins with."""
    source: Source
    facts: plan.DataFacts
    cache_dir: Path
    backbone_digest: str
    earlier: dict[str, Any] | None
    """The manifest of the search that is resumed."""
    draft: Draft | None = None
    """Of a sampled search."""

    @property
    def drawn(self) -> tuple[Run, ...]:
        """Such as a sampled search may draw; empty for a grid."""
        return self.draft.drawn if self.draft else ()

    @property
    def example(self) -> Run:
        """A run such as this search trains."""
        return self.drawn[0] if self.draft else self.runs[0]

    @property
    def num_trials(self) -> int | None:
        """How many there will be, as far as it is known."""
        return self.limits.trials if self.draft else len(self.runs)

    @property
    def captions(self) -> list[str]:
        """What every table of this search must say."""
        return [plan.proxy_caption(self.example, self.facts)] if self.choices.proxy else []


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What a sampled search goes by, and goes on from."""

    question: Question
    suggested: Mapping[str, Suggested]
    """The trials that it has had already, by number; fresh seeds last."""
    known: tuple[Known, ...]
    left_out: Mapping[str, str]
    """Trials of `--warm-start` that are not known here, and why."""
    place: StudyPlace


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A search that has nothing wrong with it, ready for resources."""

    survey: Survey
    packs: frames.Packs
    sampling: Sampling | None
    """Of a sampled search."""
    shared_packs: Storage | None = None
    """Where nodes find the packs of this one; None if each packs for itself."""

    def job(self, *, cpus_per_trial: int, use_gpu: bool) -> Job:
        """What each trial is told besides its run."""
        survey, choices = self.survey, self.survey.choices
        return Job(
            data=choices.data,
            packs={size_words(size): str(pack.path) for size, pack in self.packs.items()},
            data_digests=frames.digests(self.packs),
            shared_packs=self.shared_packs.uri if self.shared_packs else None,
            cache_dir=str(survey.cache_dir),
            backbone=choices.backbone,
            backbone_digest=survey.backbone_digest,
            precision=choices.precision,
            storage=survey.folder.uri,
            cpus_per_trial=cpus_per_trial,
            use_gpu=use_gpu,
            plain_seed=choices.plain_seed,
            measures_latency="latency" in choices.objectives,
        )
