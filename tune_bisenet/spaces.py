"""Search spaces: declared rows, or a function that draws runs; how one is found, and how its rows become runs.

A space is a Python module that defines `SPACE`. Rows become the runs of a search by its seeds, epochs, image size and
the proportions of a proxy.
"""

import importlib
import importlib.util
import pkgutil
import re
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType, ModuleType
from typing import TYPE_CHECKING, Final, assert_never

from pydantic import ValidationError

import search_spaces
from tune_bisenet.config import OHEM, SGD, AdamW, CrossEntropy, Expect, Param, Run, WeightedCrossEntropy
from tune_bisenet.options import CONTROL, STREETS, InputError, SearchConfig
from tune_bisenet.text import counted, in_words, markdown_table

if TYPE_CHECKING:
    from optuna.trial import BaseTrial


MAX_SPACE_SECONDS: Final = 40.0
"""How long loading a space, or drawing from it before a search, may take: what it imports may be on a slow disk."""

MEASURED_SHARE: Final = 0.1
"""A tenth of the epochs."""

REFERENCE_ITERATIONS_PER_EPOCH: Final = 500
"""The table's own scale, "2500 iterations ≈ 5 epochs": what a proxy keeps the proportions of."""

PUBLISHED_MIOU: Final = 75
"""In percent on Cityscapes' validation images at one scale: CoinCheung/BiSeNet 75.4, PaddleSeg 75.2."""
PUBLISHED_CROPS: Final = 16 * 80_000
"""Batch size times iterations of these."""
PUBLISHED_MIOU_AT_4: Final = 68
"""With batches of 4: one user's, TorchSeg's issue 22."""


@dataclass(frozen=True)
class Grid:
    """Declared rows, each trained as it stands. ValueError if names repeat, or if something named does not exist."""

    title: str
    runs: tuple[Run, ...]
    measured_share: float = MEASURED_SHARE
    """The share of the epochs, the last ones, whose mean mIoU expectations are judged by; of 50 epochs five."""
    second_measure: tuple[str, ...] = ()
    """Names of classes by whose mean IoU gains are judged, too: those that hold little of the noise, say."""

    def __post_init__(self) -> None:
        counts = Counter(run.name for run in self.runs)
        problems = [] if self.runs else ["the space has no rows."]
        if not 0 < self.measured_share <= 1:
            problems.append(f"measured_share {self.measured_share:g} is no share of the epochs: 0.1 is a tenth.")
        problems += [
            f"second_measure names {name} {count} times: name each class once."
            for name, count in Counter(self.second_measure).items()
            if count > 1
        ]
        problems += [
            f"the row {name} is declared {count} times: give each row its own name."
            for name, count in counts.items()
            if count > 1
        ]
        problems += [
            f"the expectation of {run.name} is measured against {target}, which is not a row of this space."
            for run in self.runs
            for target in ((run.expect.over, run.expect.sooner_than) if run.expect else ())
            if target is not None and target not in counts
        ]
        problems += [
            f"{' against '.join(circle)} against {circle[0]}: expectations go in a circle. Measure one of these rows "
            "against another row, or state its miou."
            for circle in _circles(self.runs)
        ]
        if problems:
            raise ValueError("\n".join(problems))

    @property
    def rows(self) -> tuple[Run, ...]:
        return self.runs

    @property
    def baseline(self) -> str | None:
        """Return the row most others are measured against; None if no row is."""
        over = Counter(run.expect.over for run in self.runs if run.expect and run.expect.over)
        return over.most_common(1)[0][0] if over else None


def _circles(runs: Iterable[Run]) -> list[tuple[str, ...]]:
    """Return each circle of rows of which one is measured against the next; a row against itself is one, too."""
    circles: dict[frozenset[str], tuple[str, ...]] = {}
    expected = {run.name: run.expect for run in runs if run.expect}
    for targets in (
        {name: expect.over for name, expect in expected.items()},
        {name: expect.sooner_than for name, expect in expected.items()},
    ):
        for name in targets:
            path: list[str] = []
            row: str | None = name
            while row is not None and row not in path:
                path.append(row)
                row = targets.get(row)
            if row == name:
                circles.setdefault(frozenset(path), tuple(path))
    return list(circles.values())


def with_control(grid: Grid) -> Grid:
    """Return the grid with one more row: its baseline again, expected to gain nothing. ValueError if that cannot be.

    It draws other random numbers at the same seed: on a CPU, equal ones would give equal weights.
    """
    baseline = next((row for row in grid.runs if row.name == grid.baseline), None)
    if baseline is None:
        raise ValueError("--control repeats the row that others are measured against, and this space has none.")
    if any(row.name == CONTROL for row in grid.runs):
        raise ValueError(f"--control adds a row {CONTROL}, and this space has one: give that another name.")
    note = f"{grid.baseline} again, with other random numbers: what no difference looks like"
    expect = Expect(gain=(0, 0), over=grid.baseline, note=note)
    control = baseline.model_copy(update={"name": CONTROL, "stream": baseline.stream + 1, "expect": expect})
    return replace(grid, runs=(*grid.runs, control))


@dataclass(frozen=True)
class Sampled:
    """Runs drawn one by one: `sample` chooses by Optuna's `suggest_*`, and its conditions are plain `if`s.

    The name of a drawn run does not matter: the search gives it one. The rows of `around` are the first points; `point`
    says of each row which values `sample` must be given to draw it. Widths and scales decide how long a prediction
    takes: they are varied where latency is a goal of the search, and only there.
    """

    title: str
    sample: "Callable[[BaseTrial], Run]"
    around: Grid | None = None
    point: "Callable[[Run], Mapping[str, Param]] | None" = None
    head_widths: tuple[int, ...] = (64, 128, 256)
    """Channels of the hidden layer of the head that predicts."""
    input_scales: tuple[float, ...] = (0.5, 0.75, 1.0)
    """Shares of the image size that the search is asked for."""

    def __post_init__(self) -> None:
        if (self.around is None) != (self.point is None):
            raise ValueError("a space around rows needs both: around=Grid(...), and point, from a row to its values.")
        if drawn := [row.name for row in self.rows if re.fullmatch(r"t\d{4,}", row.name)]:
            raise ValueError(f"the row {drawn[0]} is named like a drawn trial, t and a number: choose another name.")

    @property
    def rows(self) -> tuple[Run, ...]:
        """Return the declared rows that it begins with."""
        return self.around.runs if self.around else ()

    @property
    def baseline(self) -> str | None:
        """Return the row others are measured against; None if there is none."""
        return self.around.baseline if self.around else None

    @property
    def measured_share(self) -> float:
        return self.around.measured_share if self.around else MEASURED_SHARE

    @property
    def second_measure(self) -> tuple[str, ...]:
        return self.around.second_measure if self.around else ()


Space = Grid | Sampled


class SpaceError(InputError):
    """The code of a space is wrong: other parameters, rows or flags would not help."""


class _OverdueError(BaseException):
    """A space's code takes too long. No Exception, so that the code itself does not catch it."""


@contextmanager
def running_code_of(name: str) -> Iterator[None]:
    """Raise SpaceError if the code of the space, run meanwhile, takes too long, exits or raises what is no ValueError.

    A person's Ctrl-C is passed on. In a thread other than the main one there is no time limit.
    """

    def overdue(_number: int, _frame: FrameType | None) -> None:
        raise _OverdueError(f"it takes longer than {MAX_SPACE_SECONDS:.0f} s. Is there a loop without an end?")

    is_main = threading.current_thread() is threading.main_thread()
    if is_main:
        handler = signal.signal(signal.SIGALRM, overdue)
        timer = signal.setitimer(signal.ITIMER_REAL, MAX_SPACE_SECONDS)
    try:
        yield
    except BaseException as error:
        is_in_words = isinstance(error, InputError | ValidationError) or type(error) is ValueError
        may_be_a_persons = signal.getsignal(signal.SIGINT) is signal.default_int_handler
        if is_in_words or (isinstance(error, KeyboardInterrupt) and may_be_a_persons):
            raise
        kind = "" if isinstance(error, ImportError | _OverdueError) else f"its code raises {type(error).__name__}: "
        raise SpaceError(f"the space {name} cannot be used: {kind}{error}") from error
    finally:
        if is_main:
            signal.setitimer(signal.ITIMER_REAL, *timer)
            signal.signal(signal.SIGALRM, handler or signal.SIG_DFL)


def load_space(name: str) -> Space:
    """Return the space of a module in `search_spaces`, or of a Python file. Raises InputError, saying what to do."""
    try:
        with running_code_of(name):
            module = _load_module(name)
    except InputError:
        raise
    except ValidationError as error:
        findings = [
            f"{'.'.join(map(str, finding['loc']))}: {in_words(finding['msg'])} (given {finding['input']!r})"
            if finding["loc"]
            else in_words(finding["msg"])
            for finding in error.errors()
        ]
        raise InputError(f"a row of the space {name} is wrong: {'; '.join(findings)}") from error
    except ValueError as error:
        raise InputError(f"the space {name} cannot be used: {error}") from error
    space = getattr(module, "SPACE", None)
    if not isinstance(space, Space):
        raise InputError(
            f"the space {name} defines no SPACE of type Grid or Sampled: "
            "end the file with SPACE = Grid(title, runs) or SPACE = Sampled(title, sample)."
        )
    return space


def space_names() -> list[str]:
    """Return the names of the spaces that come with the package."""
    return sorted(module.name for module in pkgutil.iter_modules(search_spaces.__path__))


def _load_module(name: str) -> ModuleType:
    if not name.endswith(".py") and "/" not in name:
        if name not in space_names():
            names = ", ".join(space_names())
            raise ImportError(f"there is none of that name. There are {names}; a file is given by its path.")
        return importlib.import_module(f"search_spaces.{name}")
    path = Path(name)
    spec = importlib.util.spec_from_file_location(f"space_{path.stem}", path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file." if path.is_file() else f"there is no file {path}.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@dataclass(frozen=True, kw_only=True)
class RowOverrides:
    """Holds what the command line says about the rows as a whole; None keeps what a row says."""

    seeds: tuple[int, ...] = (0,)
    num_epochs: int | None = None
    max_epochs: int | None = None
    """The most epochs that a row may have; `num_epochs` overrides both."""
    image_size: tuple[int, int] | None = None
    proxy: bool = False


@dataclass(frozen=True)
class DataFacts:
    """Holds what the runs of a search depend on in its data."""

    num_train: int
    num_val: int
    suggested_image_size: tuple[int, int]


def select_rows(space: Space, wanted: Sequence[str] | None) -> tuple[Run, ...]:
    """Return the rows named in `wanted` (None: all), in declared order. ValueError names those that do not exist."""
    declared = [run.name for run in space.rows]
    unknown = [name for name in wanted or () if name not in declared]
    if unknown:
        raise ValueError(f"no row {', '.join(unknown)} in this space: it has {', '.join(declared) or 'none'}.")
    return tuple(run for run in space.rows if wanted is None or run.name in wanted)


def resolve_runs(rows: Sequence[Run], overrides: RowOverrides, data: DataFacts) -> tuple[Run, ...]:
    """Return every row at every seed, seed by seed, ready to train. Raises InputError with the problems of all rows."""
    resolved, problems = [], []
    for row in rows:
        try:
            run = _resolve(row, overrides, data)
        except ValidationError as error:
            problems += [f"{row.name}: {finding['msg'].removeprefix('Value error, ')}" for finding in error.errors()]
            continue
        per_epoch = iterations_per_epoch(run, data)
        total = run.num_epochs * per_epoch
        if per_epoch == 0:
            problems.append(f"{run.name}: {data.num_train} training images do not fill one batch of {run.batch_size}.")
        elif run.schedule.warmup_iterations >= total:
            problems.append(
                f"{run.name}: a warm-up of {run.schedule.warmup_iterations} iterations does not fit into {total} "
                f"({counted(run.num_epochs, 'epoch')} of {per_epoch}). "
                "Train longer, or pass --proxy to keep the table's proportions."
            )
        resolved.append(run)
    if problems:
        raise InputError(*problems)
    return tuple(run.model_copy(update={"seed": seed}) for seed in overrides.seeds for run in resolved)


def iterations_per_epoch(run: Run, data: DataFacts) -> int:
    """Return the number of full batches in the training split; the rest of a permutation is not trained on."""
    return data.num_train // run.batch_size


def proxy_caption(run: Run, data: DataFacts) -> str:
    """Return the sentence that goes with every table, plot and page made from a proxy."""
    per_epoch = iterations_per_epoch(run, data)
    return (
        f"Proxy: {counted(run.num_epochs, 'epoch')} of {counted(per_epoch, 'iteration')} stand for the table's own "
        f"scale of {REFERENCE_ITERATIONS_PER_EPOCH} an epoch, warm-up and loss switch in proportion. "
        "Its mIoU is not that of the full runs."
    )


def published_levels(runs: Iterable[Run], config: SearchConfig, *, num_train: int) -> str:
    """Return what published trainings reached, and how many of their crops those rows see that expect a level of mIoU.

    Empty where it compares with nothing: on the built-in streets, of a proxy, and if no row expects a level.
    """
    ranges = {run: run.expect.miou for run in runs if run.expect is not None and run.expect.miou is not None}
    if not ranges or config.proxy or config.data == STREETS:
        return ""
    crops = [run.num_epochs * (num_train // run.batch_size) * run.batch_size for run in ranges]
    bounds = sorted({min(crops), max(crops)})
    counts = " to ".join(f"{bound:,}" for bound in bounds)
    shares = " to ".join(f"{100 * bound / PUBLISHED_CROPS:.3g}" for bound in bounds)
    is_lower = max(high for _low, high in ranges.values()) < PUBLISHED_MIOU_AT_4
    return (
        f"BiSeNet V1 on Cityscapes reached about {PUBLISHED_MIOU_AT_4} % with batches of 4, by one report (TorchSeg, "
        f"issue 22), and {PUBLISHED_MIOU} % with 16 x 80,000 iterations. A row here sees {counts} crops, {shares} % of "
        f"those {PUBLISHED_CROPS:,}."
        + (" At full length, levels above the expected ranges are therefore likely." if is_lower else "")
    )


def _resolve(row: Run, overrides: RowOverrides, data: DataFacts) -> Run:
    """Return the run; in a proxy, warm-up keeps its share of the iterations and the loss switch that of the epochs."""
    num_epochs = overrides.num_epochs or min(row.num_epochs, overrides.max_epochs or row.num_epochs)
    declared_size = row.image_size if "image_size" in row.model_fields_set else data.suggested_image_size
    image_size = overrides.image_size or declared_size
    changes: dict[str, object] = {"num_epochs": num_epochs, "image_size": image_size}
    if overrides.proxy:
        iterations = num_epochs * iterations_per_epoch(row, data)
        scale = iterations / (row.num_epochs * REFERENCE_ITERATIONS_PER_EPOCH)
        warmup = round(row.schedule.warmup_iterations * scale)
        changes["schedule"] = row.schedule.model_copy(update={"warmup_iterations": warmup})
        if row.loss.lovasz_after is not None:
            switch = min(round(row.loss.lovasz_after * num_epochs / row.num_epochs), num_epochs - 1)
            changes["loss"] = row.loss.model_copy(update={"lovasz_after": switch})
    return Run.model_validate(row.model_dump() | changes)


def space_to_markdown(runs: Sequence[Run]) -> str:
    """Return the rows as a Markdown table, one line each, ending with a newline."""
    columns = ("run", "optimizer", "schedule", "loss", "technique", "expected")
    return markdown_table(columns, [_format_row(run) for run in runs]) + "\n"


def _format_row(run: Run) -> tuple[str, ...]:
    schedule = f"warm-up {run.schedule.warmup_iterations} to {run.optimizer.lr:g}, poly {run.schedule.power:g}"
    techniques = [f"gradient accumulation × {run.accumulation}"] if run.accumulation > 1 else []
    techniques += [] if run.max_grad_norm is None else [f"gradient clipping, max norm {run.max_grad_norm:.1f}"]
    technique = ", ".join(techniques) or "–"
    return run.name, _format_optimizer(run), schedule, _format_loss(run), technique, format_expectation(run.expect)


def _format_optimizer(run: Run) -> str:
    optimizer = run.optimizer
    match optimizer:
        case SGD():
            return f"SGD lr {optimizer.lr:g}, momentum {optimizer.momentum:g}, wd {optimizer.weight_decay:g}"
        case AdamW():
            return f"AdamW lr {optimizer.lr:g}, wd {optimizer.weight_decay:g}"
        case _:
            assert_never(optimizer)


def _format_loss(run: Run) -> str:
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
    switch = "" if loss.lovasz_after is None else f"; after epoch {loss.lovasz_after} Lovász on main"
    return f"{name}, alpha {loss.aux_weight:.1f}{switch}"


def format_expectation(expect: Expect | None) -> str:
    """Return what a row states, as `+0.3 to +0.5 over r01`."""
    if expect is None:
        return "–"
    (low, high), sign = (expect.miou, "") if expect.miou is not None else (expect.gain or (0.0, 0.0), "+")
    ends = f"{sign}{low:g}" if low == high else f"{sign}{low:g} to {sign}{high:g}"
    text = f"mIoU {ends} %" if expect.miou is not None else f"{ends} over {expect.over}"
    return f"{text}, sooner than {expect.sooner_than}" if expect.sooner_than else text
