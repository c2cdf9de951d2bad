"""What a study asked to be trained, and what it knew before it began: plain values, and the files that keep them.

A sampled search learns its trials while it runs, so each trial's folder says what is trained there.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal, Self

from tune_bisenet.config import Run
from tune_bisenet.results import Epoch, Standing

RUN: Final = "run.json"
"""What a trial of a sampled search trains; in the trial's folder, written before it starts."""
KNOWN: Final = "known.json"
"""Trials of earlier searches that the study began with; in the search's folder, if there are any."""

Param = float | int | bool | str | None
Origin = Literal["row", "sampled", "confirm"]
"""A declared row, a point the sampler chose, or a fresh seed of either that the study is not told of."""


@dataclass(frozen=True, kw_only=True)
class Suggested:
    """A run, and the point of the space that it stands for."""

    trial: str
    run: Run
    origin: Origin
    number: int | None
    """Of the study's trial; None for one that the study is not told of."""
    params: dict[str, Param]
    """By name, as the space's `sample` was given them; empty where the study is not told."""
    distributions: dict[str, str]
    """The range of each parameter, in Optuna's JSON."""
    row: Run | None = None
    """What a space file would say of it, on the rows' own scale; None where the study is not told."""

    def to_json(self) -> dict[str, Any]:
        row = self.row and self.row.model_dump(mode="json")
        return vars(self) | {"run": self.run.model_dump(mode="json"), "row": row}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        row = record.get("row")
        runs = {"run": Run.model_validate(record["run"]), "row": row and Run.model_validate(row)}
        return cls(**(record | runs))


@dataclass(frozen=True, kw_only=True)
class Known:
    """A trial of an earlier search: what it was, how it ended, its learning curve."""

    suggested: Suggested
    standing: Standing
    epochs: tuple[Epoch, ...]
    source: str
    """The folder of the trial."""

    def to_json(self) -> dict[str, Any]:
        return {
            "suggested": self.suggested.to_json(),
            "standing": self.standing.to_json(),
            "epochs": [epoch.to_json() for epoch in self.epochs],
            "source": self.source,
        }

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Self:
        return cls(
            suggested=Suggested.from_json(record["suggested"]),
            standing=Standing.from_json(record["standing"]),
            epochs=tuple(Epoch.from_json(epoch) for epoch in record["epochs"]),
            source=record["source"],
        )
