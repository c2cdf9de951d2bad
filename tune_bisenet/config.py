"""What is trained (`Run`) and where and with what (`TrialContext`): frozen, validated rows, and nothing that runs.

A `Run` is portable: it names no path, no device and no machine, so its fingerprint means the same everywhere.
"""

import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Mapping
from itertools import combinations
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

_Name = TypeVar("_Name", bound=Hashable)

STRIDE: Final = 32
"""BiSeNet halves its input five times: heights and widths are multiples of this."""
MAX_IMAGE_PIXELS: Final = 64 * 2**20
"""Of an image trained on, as many as a frame may have."""


class Frozen(BaseModel):
    """A value: frozen, hashable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Precision = Literal["fp32", "bf16"]
StepMode = Literal["auto", "graph", "eager"]
"""How a GPU is given a training step: as a CUDA graph, kernel by kernel, or as a graph if it can be recorded."""
Objective = Literal["miou", "latency"]
"""A goal: mIoU in percent, the higher the better; milliseconds of one prediction, the lower the better."""
Sampler = Literal["tpe", "gp", "cmaes", "random", "qmc"]
"""How a study chooses the next point, by Optuna's names."""
Param = float | int | bool | str | None
"""A value that a space's `sample` is given for one of its parameters."""


NumEpochs = Annotated[int, Field(gt=0, le=10**12)]
"""So few that 64 bits hold the number of iterations of all trials."""
Seed = Annotated[int, Field(ge=0, lt=2**63)]


class SGD(Frozen):
    """Stochastic gradient descent with (heavy-ball) momentum; one rate for all parameter groups."""

    kind: Literal["sgd"] = "sgd"
    lr: PositiveFloat
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    weight_decay: NonNegativeFloat = 1e-4


class AdamW(Frozen):
    """Adam with decoupled weight decay (Loshchilov and Hutter, 2019), betas 0.9 and 0.999."""

    kind: Literal["adamw"] = "adamw"
    lr: PositiveFloat
    weight_decay: NonNegativeFloat = 1e-4


Optimizer = Annotated[SGD | AdamW, Field(discriminator="kind")]


class WarmupPoly(Frozen):
    """A linear warm-up from `start_lr` to the base rate, then a polynomial decay to 0 at the run's last iteration."""

    warmup_iterations: NonNegativeInt = 1100
    power: PositiveFloat = 0.9
    start_lr: NonNegativeFloat = 1e-6


class CrossEntropy(Frozen):
    """`CE_main + aux_weight * (CE_aux1 + CE_aux2)`; with `lovasz_after`, the main head turns to Lovász-Softmax.

    `lovasz_after` is the number of epochs trained with cross-entropy first; the auxiliary heads keep it throughout.
    """

    kind: Literal["ce"] = "ce"
    aux_weight: NonNegativeFloat = 1.0
    lovasz_after: NonNegativeInt | None = None


class WeightedCrossEntropy(Frozen):
    """Cross-entropy with `weight[c] = (total / (num_classes * counts[c])) ** exponent` on all three heads.

    With exponent 0 all classes weigh the same, as in `CrossEntropy`; with 1 each class weighs the same in all.
    """

    kind: Literal["weighted_ce"] = "weighted_ce"
    aux_weight: NonNegativeFloat = 1.0
    exponent: Annotated[float, Field(ge=0, le=1)] = 1.0
    lovasz_after: NonNegativeInt | None = None


class OHEM(Frozen):
    """Cross-entropy over hard pixels alone, on all three heads (Shrivastava et al., 2016, https://arxiv.org/abs/1604.03540).

    A pixel is hard if its own class has a probability below `threshold`. Where fewer than `min_kept` of the labelled
    pixels of a micro-batch are, the hardest make up that share.
    """

    kind: Literal["ohem"] = "ohem"
    aux_weight: NonNegativeFloat = 1.0
    threshold: Annotated[float, Field(gt=0, lt=1)] = 0.7
    min_kept: Annotated[float, Field(gt=0, le=1)] = 1 / 16
    """A share of the labelled pixels."""
    lovasz_after: NonNegativeInt | None = None


Loss = Annotated[CrossEntropy | WeightedCrossEntropy | OHEM, Field(discriminator="kind")]


class Augment(Frozen):
    """Random scale, crop to the image size, horizontal flip, and brightness, contrast and saturation jitter."""

    min_scale: PositiveFloat = 0.75
    max_scale: PositiveFloat = 2.0
    flip: Annotated[float, Field(ge=0, le=1)] = 0.5
    jitter: Annotated[float, Field(ge=0, lt=1)] = 0.4

    @model_validator(mode="after")
    def _scales_in_order(self) -> Self:
        if self.min_scale > self.max_scale:
            raise ValueError(f"min_scale {self.min_scale} is larger than max_scale {self.max_scale}: swap them.")
        return self


class Expect(Frozen):
    """States what a row promises, in percentage points of mIoU on the validation split.

    Either an absolute range `miou=(low, high)` or a `gain=(low, high)` over the row named `over`.
    `sooner_than` names a row that takes more epochs to reach the low end of `miou`, or where there is none its own end.
    """

    miou: tuple[float, float] | None = None
    gain: tuple[float, float] | None = None
    over: str | None = None
    sooner_than: str | None = None
    margin: NonNegativeFloat = 0.2
    """The smallest difference that matters: +0.45 does not break +0.5."""
    note: str = ""
    """What a reader should know beside the verdict."""

    @model_validator(mode="after")
    def _one_promise(self) -> Self:
        if (self.miou is None) == (self.gain is None):
            raise ValueError("an expectation states either miou=(low, high) or gain=(low, high), not both or neither.")
        if (self.gain is None) != (self.over is None):
            raise ValueError('a gain needs the row it is measured against: gain=(0.3, 0.5), over="r01".')
        low, high = self.miou or self.gain or (0.0, 0.0)
        if low > high:
            raise ValueError(f"the range ({low:g}, {high:g}) is upside down: put the lower value first.")
        return self


def check_image_size(size: tuple[int, int]) -> tuple[int, int]:
    """Return `size` (H, W) in pixels if BiSeNet can take it. Raises ValueError, naming what it can take."""
    if size[0] * size[1] > MAX_IMAGE_PIXELS:
        raise ValueError(
            f"image size {size[0]}x{size[1]} has more than {MAX_IMAGE_PIXELS:,} pixels: choose a smaller one."
        )
    if all(side > 0 and side % STRIDE == 0 for side in size):
        return size
    down = tuple(max(side // STRIDE, 1) * STRIDE for side in size)
    up = tuple(max(-(-side // STRIDE), 1) * STRIDE for side in size)
    raise ValueError(
        f"image size {size[0]}x{size[1]} is not a multiple of {STRIDE} on both sides. "
        f"The nearest that are: {down[0]}x{down[1]} and {up[0]}x{up[1]}."
    )


def format_size(size: tuple[int, int]) -> str:
    """Return height, then width, as `512x1024`."""
    return f"{size[0]}x{size[1]}"


def _check_row_name(name: str) -> str:
    """Keep names of rows apart from those of trials: row r01 at seed 1 trains as `r01-s1`."""
    if re.search(r"-s\d+$", name):
        raise ValueError(f"the row name {name} ends like that of a trial at a seed (-s and a number): choose another.")
    return name


class Run(Frozen):
    """One row of the table: everything that decides what is trained, and what is expected of it.

    A name and an optimizer make a row: all else is by default as in most of the ten rows.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"), AfterValidator(_check_row_name)]
    optimizer: Optimizer
    schedule: WarmupPoly = WarmupPoly()
    loss: Loss = CrossEntropy()
    accumulation: PositiveInt = 1
    """Micro-batches whose mean gradient makes one optimizer step."""
    max_grad_norm: PositiveFloat | None = None
    expect: Expect | None = None
    num_epochs: NumEpochs = 50
    batch_size: Annotated[int, Field(ge=2)] = 4
    """Images in one micro-batch; BatchNorm needs at least two."""
    image_size: tuple[int, int] = (512, 1024)
    """Height and width in pixels of the images and crops trained on; multiples of 32."""
    augment: Augment = Augment()
    head_width: PositiveInt = 256
    """Channels of the hidden layer of the head that predicts."""
    decay_norms_and_biases: bool = True
    """Whether weight decay also acts on BatchNorm parameters and biases."""
    seed: Seed = 0
    stream: NonNegativeInt = 0
    """Which of the independent streams of random numbers of its seed it draws from."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        check_image_size(self.image_size)
        if self.loss.lovasz_after is not None and self.loss.lovasz_after >= self.num_epochs:
            raise ValueError(
                f"the switch to Lovász after epoch {self.loss.lovasz_after} lies outside {self.num_epochs} epochs. "
                "Train longer, switch earlier, or shrink the whole run with --proxy."
            )
        return self

    @property
    def random_seed(self) -> int:
        """Return what all its random numbers are derived from: its seed, or for another stream 32 bits of a hash."""
        return int(fingerprint([self.seed, self.stream])[:8], 16) if self.stream else self.seed

    def fingerprint(self) -> str:
        """Return 16 hex digits over everything that decides what is trained: not the name, not the expectation."""
        return fingerprint(self.model_dump(mode="json", exclude={"name", "expect"}))

    def beginning(self) -> str:
        """Return 16 hex digits over everything that decides what is trained but chance and when the loss switches."""
        values = self.model_dump(mode="json", exclude={"name", "expect", "seed", "stream"})
        del values["loss"]["lovasz_after"]
        return fingerprint(values)


def parting_epochs(runs: Mapping[_Name, Run]) -> dict[tuple[_Name, _Name], int]:
    """Return after how many epochs each two runs part that are the same training until the loss of one switches.

    Those that never part have all their epochs in common. `runs` are by any names, and pairs in their order.
    """
    alike: dict[tuple[str, int], list[_Name]] = {}
    for name, run in runs.items():
        alike.setdefault((run.beginning(), run.random_seed), []).append(name)
    parting = {}
    for pair in (pair for group in alike.values() for pair in combinations(group, 2)):
        switches = {runs[name].loss.lovasz_after for name in pair}
        earlier = min((switch for switch in switches if switch is not None), default=0)
        parting[pair] = earlier if len(switches) > 1 else runs[pair[0]].num_epochs
    return {pair: epochs for pair, epochs in parting.items() if epochs > 0}


def shared_beginnings(runs: Iterable[Run]) -> dict[str, tuple[int, ...]]:
    """Return, by `Run.beginning`, after which epochs runs part that begin as the same training."""
    found: dict[str, set[int]] = {}
    for run, others in partners({run: run for run in runs}).items():
        found.setdefault(run.beginning(), set()).update(others.values())
    return {beginning: tuple(sorted(epochs)) for beginning, epochs in found.items()}


def partners(runs: Mapping[_Name, Run]) -> dict[_Name, dict[_Name, int]]:
    """Return, by name, the others that begin as the same training, and after how many epochs each parts from it."""
    found: dict[_Name, dict[_Name, int]] = {}
    for (first, second), epochs in parting_epochs(runs).items():
        if epochs < runs[first].num_epochs:
            found.setdefault(first, {})[second] = epochs
            found.setdefault(second, {})[first] = epochs
    return found


class TrialContext(Frozen):
    """Says where and with what runs are trained: everything a trial needs that is not part of its row."""

    data: str
    """`streets`, or the absolute path or the URI of a folder in Cityscapes layout."""
    packs: dict[str, str]
    """By image size, the folder in which the driver's node has the frames; nodes that lack it fetch or pack them."""
    shared_packs: str | None = None
    """The URI under which nodes find the packs of the driver; None where each packs for itself."""
    data_digests: dict[str, str]
    """By image size, of the frames' content: a trial on another machine must find the same."""
    cache_dir: str
    """Where each node keeps packed data."""
    backbone: str
    """`imagenet`, `none`, or the absolute path of a ResNet-18 under torchvision's names."""
    backbone_digest: str
    precision: Precision
    storage: str
    """The search's own folder: a local path or a URI."""
    threads_per_trial: PositiveInt
    """CPU threads that torch uses: sums of another number of threads differ in their last bits."""
    gpu_share: Annotated[float, Field(ge=0, le=1)]
    """How much of one GPU's memory a trial may take; 0 trains on the CPU."""
    deterministic: bool = False
    """Whether a GPU uses only kernels that repeat their results."""
    step: StepMode = "auto"
    """How a GPU is given a training step."""
    measures_latency: bool = False
    """Whether each trial also measures how long one prediction takes."""
    shared_beginnings: dict[str, tuple[int, ...]] = {}
    """By `Run.beginning`, after which epochs a trial keeps its state for others that are the same training so far."""

    def identity(self, run: Run) -> str:
        """Return 16 hex digits over all that decides the weights a trial ends with."""
        return self._identity(run, run.fingerprint())

    def beginning_identity(self, run: Run) -> str:
        """Return 16 hex digits over all that decides the weights a trial has before its loss switches."""
        return self._identity(run, fingerprint([run.beginning(), run.random_seed]))

    def shared_epochs(self, run: Run) -> tuple[int, ...]:
        """Return the epochs before its loss switches after which others part from it that are the same until then."""
        until = run.num_epochs if run.loss.lovasz_after is None else run.loss.lovasz_after
        return tuple(epoch for epoch in self.shared_beginnings.get(run.beginning(), ()) if epoch <= until)

    def _identity(self, run: Run, trained: str) -> str:
        digest = self.data_digests[format_size(run.image_size)]
        return fingerprint([trained, digest, self.backbone_digest, self.precision])


def trial_name(run: Run, *, default_seed: int | None) -> str:
    """Return a trial's name, as `r01`, or `r01-s2` where the search has several seeds; later seeds rename nothing."""
    return run.name if run.seed == default_seed else f"{run.name}-s{run.seed}"


class Resources(Frozen):
    """Says what Ray gives each trial, what torch uses of it, and how many trials run at once."""

    cpus_per_trial: PositiveInt
    """CPU cores that Ray reserves."""
    threads_per_trial: PositiveInt = Field(default_factory=lambda fields: fields["cpus_per_trial"])
    """CPU threads that torch uses: as many, but for a search that began with another number of them."""
    gpus_per_trial: NonNegativeFloat
    max_concurrent: PositiveInt | None
    """A bound that was asked for; None for as many as fit."""
    concurrency: PositiveInt
    """How many trials fit at once."""
    grows: bool = False
    """Whether more will fit, as the cluster starts nodes for those that wait."""


def fingerprint(value: object) -> str:
    """Return 16 hex digits of the SHA-256 of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
