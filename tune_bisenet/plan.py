"""From declared rows to the runs of one search: seeds, epochs, image size and the proportions of a proxy.

Pure arithmetic; all that is wrong with the rows is found here, together, before anything starts.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from pydantic import ValidationError

from tune_bisenet.config import Run
from tune_bisenet.words import counted

REFERENCE_ITERATIONS_PER_EPOCH: Final = 500
"""The table's own scale, "2500 iterations ≈ 5 epochs": what a proxy keeps the proportions of."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the command line says about the rows as a whole; None keeps what a row says."""

    seeds: tuple[int, ...] = (0,)
    num_epochs: int | None = None
    max_epochs: int | None = None
    """A bound on what rows say; `num_epochs` overrides both."""
    image_size: tuple[int, int] | None = None
    proxy: bool = False


@dataclass(frozen=True)
class DataFacts:
    """What a plan needs to know of the data."""

    num_train: int
    num_val: int
    suggested_image_size: tuple[int, int]


class PlanError(ValueError):
    """The rows cannot be run as asked. `problems` holds one sentence each."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = tuple(problems)


def plan_runs(rows: Sequence[Run], settings: Settings, data: DataFacts) -> tuple[Run, ...]:
    """Every row times every seed, seed by seed, ready to train. Raises PlanError with all problems of all rows."""
    resolved, problems = [], []
    for row in rows:
        try:
            run = _resolve(row, settings, data)
        except ValidationError as error:
            problems += [f"{row.name}: {finding['msg'].removeprefix('Value error, ')}" for finding in error.errors()]
            continue
        problems += run_problems(run, data)
        resolved.append(run)
    if problems:
        raise PlanError(problems)
    return tuple(run.model_copy(update={"seed": seed}) for seed in settings.seeds for run in resolved)


def iterations_per_epoch(run: Run, data: DataFacts) -> int:
    """Full batches in the training split; what is left over of a permutation is not trained on."""
    return data.num_train // run.batch_size


def run_problems(run: Run, data: DataFacts) -> list[str]:
    """Why `run` cannot be trained on this data, a sentence each."""
    per_epoch = iterations_per_epoch(run, data)
    if per_epoch == 0:
        return [f"{run.name}: {data.num_train} training images do not fill one batch of {run.batch_size}."]
    total = run.num_epochs * per_epoch
    if run.schedule.warmup_iterations >= total:
        return [
            f"{run.name}: a warm-up of {run.schedule.warmup_iterations} iterations does not fit into {total} "
            f"({counted(run.num_epochs, 'epoch')} of {per_epoch}). "
            "Train longer, or pass --proxy to keep the table's proportions."
        ]
    return []


def proxy_caption(run: Run, data: DataFacts) -> str:
    """The sentence that goes with every table, plot and page made from a proxy."""
    per_epoch = iterations_per_epoch(run, data)
    return (
        f"Proxy: {counted(run.num_epochs, 'epoch')} of {counted(per_epoch, 'iteration')} stand for the table's own "
        f"scale of {REFERENCE_ITERATIONS_PER_EPOCH} an epoch, warm-up and loss switch in proportion. "
        "Its mIoU is not that of the full runs."
    )


def _resolve(row: Run, settings: Settings, data: DataFacts) -> Run:
    num_epochs = settings.num_epochs or min(row.num_epochs, settings.max_epochs or row.num_epochs)
    image_size = settings.image_size or row.image_size
    if settings.image_size is None and "image_size" not in row.model_fields_set:
        image_size = data.suggested_image_size
    changes = {"num_epochs": num_epochs, "image_size": image_size}
    if settings.proxy:
        changes |= _proportions(row, num_epochs, data.num_train // row.batch_size)
    return Run.model_validate(row.model_dump() | changes)


def _proportions(row: Run, num_epochs: int, per_epoch: int) -> dict[str, object]:
    """Warm-up at its share of all iterations, the loss switch at its share of the epochs."""
    scale = num_epochs * per_epoch / (row.num_epochs * REFERENCE_ITERATIONS_PER_EPOCH)
    warmup = round(row.schedule.warmup_iterations * scale)
    changes: dict[str, object] = {"schedule": row.schedule.model_copy(update={"warmup_iterations": warmup})}
    if row.loss.lovasz_after is not None:
        switch = min(round(row.loss.lovasz_after * num_epochs / row.num_epochs), num_epochs - 1)
        changes["loss"] = row.loss.model_copy(update={"lovasz_after": switch})
    return changes
