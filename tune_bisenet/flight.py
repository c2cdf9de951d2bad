"""What has passed the checks: a `Flight` that can start, or a `Survey` of one that is only planned."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tune_bisenet import plan, spaces
from tune_bisenet.arguments import Arguments, Choices, Limits
from tune_bisenet.config import Job, Run, size_words
from tune_bisenet.data.packed import Packed
from tune_bisenet.data.source import Source
from tune_bisenet.rehearsal import Sampling
from tune_bisenet.storage import Storage


@dataclass(frozen=True, kw_only=True)
class Flight:
    """A search that has nothing wrong with it, ready for resources."""

    name: str
    folder: Storage
    arguments: Arguments
    choices: Choices
    limits: Limits
    space: spaces.Space
    runs: tuple[Run, ...]
    """All trials of a grid; the declared rows that a sampled search begins with."""
    facts: plan.DataFacts
    packs: dict[tuple[int, int], Packed]  # by image size
    cache_dir: Path
    backbone_digest: str
    earlier: dict[str, Any] | None  # the manifest of the search that is resumed
    sampling: Sampling | None
    """Of a sampled search."""
    shared_packs: Storage | None = None
    """Where nodes find the packs of this one; None if each packs for itself."""

    @property
    def example(self) -> Run:
        """A run such as this search trains."""
        return self.sampling.example if self.sampling else self.runs[0]

    @property
    def num_trials(self) -> int | None:
        """How many there will be, as far as it is known."""
        return self.limits.trials if self.sampling else len(self.runs)

    @property
    def captions(self) -> list[str]:
        """What every table of this search must say."""
        return [plan.proxy_caption(self.example, self.facts)] if self.choices.proxy else []

    def job(self, *, cpus_per_trial: int, use_gpu: bool) -> Job:
        """What each trial is told besides its run."""
        return Job(
            data=self.choices.data,
            packs={size_words(size): str(pack.path) for size, pack in self.packs.items()},
            data_digests={size_words(size): pack.digest for size, pack in self.packs.items()},
            shared_packs=self.shared_packs.uri if self.shared_packs else None,
            cache_dir=str(self.cache_dir),
            backbone=self.choices.backbone,
            backbone_digest=self.backbone_digest,
            precision=self.choices.precision,
            storage=self.folder.uri,
            cpus_per_trial=cpus_per_trial,
            use_gpu=use_gpu,
            plain_seed=self.choices.plain_seed,
            measures_latency="latency" in self.choices.objectives,
        )


@dataclass(frozen=True, kw_only=True)
class Survey:
    """A search that has nothing wrong with it as far as one sees from a listing of its data."""

    name: str
    folder: Storage
    arguments: Arguments
    choices: Choices
    limits: Limits
    space: spaces.Space
    runs: tuple[Run, ...]
    """As in a `Flight`."""
    drawn: tuple[Run, ...]
    """Such as a sampled search may draw; empty for a grid."""
    facts: plan.DataFacts
    source: Source
    cache_dir: Path

    @property
    def example(self) -> Run:
        """A run such as this search trains."""
        return self.drawn[0] if self.drawn else self.runs[0]

    @property
    def captions(self) -> list[str]:
        """What every table of this search must say."""
        return [plan.proxy_caption(self.example, self.facts)] if self.choices.proxy else []
