"""From declared rows to the runs of one search: seeds, epochs, image size and the proportions of a proxy.

Pure arithmetic; all that is wrong with the rows is found here, together, before anything starts.
"""

import importlib
import importlib.util
import pkgutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Final, assert_never

from pydantic import ValidationError

import search_spaces
from tune_bisenet.config import OHEM, SGD, AdamW, CrossEntropy, Expect, Run, WeightedCrossEntropy
from tune_bisenet.text import counted

if TYPE_CHECKING:
    from optuna.trial import BaseTrial

    from tune_bisenet.records import Param


@dataclass(frozen=True)
class Grid:
    """Declared rows, each trained as it stands. ValueError if names repeat or an expectation points nowhere."""

    title: str
    runs: tuple[Run, ...]

    def __post_init__(self) -> None:
        problems = grid_problems(self.runs)
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def rows(self) -> tuple[Run, ...]:
        """The declared rows: all there is."""
        return self.runs

    @property
    def baseline(self) -> str | None:
        """The row most others are measured against; None if no row is."""
        over = Counter(run.expect.over for run in self.runs if run.expect and run.expect.over)
        return over.most_common(1)[0][0] if over else None


@dataclass(frozen=True, kw_only=True)
class LatencyRanges:
    """What decides how long a prediction takes: varied where latency is a goal of the search, and only there."""

    head_widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the hidden layer of the head that predicts."""
    input_scales: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Shares of the image size that the search is asked for."""


@dataclass(frozen=True)
class Sampled:
    """Runs drawn one by one: `sample` chooses by Optuna's `suggest_*`, and its conditions are plain `if`s.

    The name of a drawn run does not matter: the search gives it one. The rows of `around` are the first points; `point`
    says of each row which values `sample` must be given to draw it.
    """

    title: str
    sample: "Callable[[BaseTrial], Run]"
    around: Grid | None = None
    point: "Callable[[Run], Mapping[str, Param]] | None" = None
    latency: LatencyRanges = field(default_factory=LatencyRanges)

    def __post_init__(self) -> None:
        if (self.around is None) != (self.point is None):
            raise ValueError("a space around rows needs both: around=Grid(...), and point, from a row to its values.")

    @property
    def rows(self) -> tuple[Run, ...]:
        """The declared rows that it begins with."""
        return self.around.runs if self.around else ()

    @property
    def baseline(self) -> str | None:
        """The row others are measured against; None if there is none."""
        return self.around.baseline if self.around else None


Space = Grid | Sampled


class SpaceError(ValueError):
    """A space cannot be found or is not a space."""


def load_space(name: str) -> Space:
    """The space of a module in `search_spaces`, or of a Python file. Raises SpaceError saying what to do."""
    try:
        module = _module_of(name)
    except ValidationError as error:
        raise SpaceError(f"a row of the space {name} is wrong: {_sentences(error)}") from error
    except Exception as error:  # a space is the user's own code: whatever it raises is a mistake in it
        kind = "" if isinstance(error, (ImportError, ValueError)) else f"{type(error).__name__}: "
        raise SpaceError(f"the space {name} cannot be used: {kind}{error}") from error
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space):
        raise SpaceError(
            f"the space {name} defines no SPACE of type Grid or Sampled: "
            "end the file with SPACE = Grid(title, runs) or SPACE = Sampled(title, sample)."
        )
    return space


def space_names() -> list[str]:
    """The spaces that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(search_spaces.__path__))


def select_rows(space: Space, wanted: Sequence[str] | None) -> tuple[Run, ...]:
    """The rows named in `wanted` (None: all), in declared order. ValueError names those that do not exist."""
    if wanted is None:
        return space.rows
    declared = [run.name for run in space.rows]
    unknown = [name for name in wanted if name not in declared]
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)} in this space: it has {', '.join(declared) or 'none'}.")
    return tuple(run for run in space.rows if run.name in wanted)


def grid_problems(runs: tuple[Run, ...]) -> list[str]:
    """What is wrong with these rows as a whole, a sentence each."""
    counts = Counter(run.name for run in runs)
    problems = [
        f"the row {name} is declared {count} times: give each row its own name."
        for name, count in counts.items()
        if count > 1
    ]
    for run in runs:
        targets = (run.expect.over, run.expect.sooner_than) if run.expect else ()
        problems += [
            f"the expectation of {run.name} is measured against {target}, which is not a row of this space."
            for target in targets
            if target is not None and target not in counts
        ]
    return problems if runs else ["the space has no rows."]


# --- the table ----------------------------------------------------------------------------------------------------


def space_to_markdown(runs: Sequence[Run]) -> str:
    """The rows as a Markdown table, one line each, ending with a newline."""
    header = ("run", "optimizer", "schedule", "loss", "technique", "expected")
    rows = [header, *(_cells(run) for run in runs)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines) + "\n"


def _cells(run: Run) -> tuple[str, ...]:
    return (
        run.name,
        format_optimizer(run),
        format_schedule(run),
        format_loss(run),
        format_technique(run),
        _expect_words(run.expect),
    )


def format_optimizer(run: Run) -> str:
    optimizer = run.optimizer
    match optimizer:
        case SGD():
            return f"SGD lr {optimizer.lr:g}, momentum {optimizer.momentum:g}, wd {optimizer.weight_decay:g}"
        case AdamW():
            return f"AdamW lr {optimizer.lr:g}, wd {optimizer.weight_decay:g}"
        case _:
            assert_never(optimizer)


def format_schedule(run: Run) -> str:
    return f"warm-up {run.schedule.warmup_iterations} to {run.optimizer.lr:g}, poly {run.schedule.power:g}"


def format_loss(run: Run) -> str:
    loss = run.loss
    match loss:
        case CrossEntropy():
            name = "CE"
        case WeightedCrossEntropy():
            name = "class-weighted CE" if loss.exponent == 1 else f"class-weighted CE, exponent {loss.exponent:g}"
        case OHEM():
            name = f"OHEM below {loss.threshold:g}"
        case _:
            assert_never(loss)
    words = f"{name}, alpha {loss.aux_weight:.1f}"
    return words if loss.lovasz_after is None else f"{words}; after epoch {loss.lovasz_after} Lovász on main"


def format_technique(run: Run) -> str:
    techniques = []
    if run.accumulation > 1:
        techniques.append(f"gradient accumulation × {run.accumulation}")
    if run.max_grad_norm is not None:
        techniques.append(f"gradient clipping, max norm {run.max_grad_norm:.1f}")
    return ", ".join(techniques) or "–"


def _expect_words(expect: Expect | None) -> str:
    if expect is None:
        return "–"
    if expect.miou is not None:
        words = f"mIoU {_range(expect.miou)} %"
    else:
        words = f"{_range(expect.gain or (0.0, 0.0), sign='+')} over {expect.over}"
    return f"{words}, sooner than {expect.sooner_than}" if expect.sooner_than else words


def _range(bounds: tuple[float, float], sign: str = "") -> str:
    low, high = bounds
    return f"{sign}{low:g}" if low == high else f"{sign}{low:g} to {sign}{high:g}"


# --- finding a module -----------------------------------------------------------------------------------------------


def _module_of(name: str) -> ModuleType:
    if name.endswith(".py") or "/" in name:
        return _module_at(Path(name))
    if name not in space_names():
        raise ImportError(
            f"there is none of that name. There are {', '.join(space_names())}; a file is given by its path."
        )
    return importlib.import_module(f"search_spaces.{name}")


def _module_at(path: Path) -> ModuleType:
    if not path.is_file():
        raise ImportError(f"there is no file {path}.")
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _sentences(error: ValidationError) -> str:
    """Pydantic's findings as `optimizer.sgd.lr: Input should be greater than 0 (given -1)`."""
    findings = []
    for finding in error.errors():
        place = ".".join(str(part) for part in finding["loc"])
        message = finding["msg"].removeprefix("Value error, ")
        findings.append(f"{place}: {message} (given {finding['input']!r})" if place else message)
    return "; ".join(findings)


REFERENCE_ITERATIONS_PER_EPOCH: Final = 500
"""The table's own scale, "2500 iterations ≈ 5 epochs": what a proxy keeps the proportions of."""


@dataclass(frozen=True, kw_only=True)
class RowOverrides:
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


def resolve_runs(rows: Sequence[Run], settings: RowOverrides, data: DataFacts) -> tuple[Run, ...]:
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


def _resolve(row: Run, settings: RowOverrides, data: DataFacts) -> Run:
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
