"""Run the engine on a card that is not there: fake tensors on `cuda`, of real shapes, devices and strides.

    python tests/training/fake_cuda.py [--image 512x1024] [--label 1024x2048] [NAME ...]

Prints a line of JSON by combination of loss, technique and precision: what a training iteration, a validation batch
and one prediction do, in operations on the card (views left out; one on a list of tensors counts once), bytes that
these read and write, and how often the host waits for the card, with the lines that ask for it. Torch refuses tensors
of two devices in one operation, and whatever needs a number to know a shape. What this cannot show: kernels' own
errors, memory running out, races.

It needs a process of its own, since it changes what torch thinks of this machine.
"""

import argparse
import ctypes
import json
import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

import tune_bisenet
from tune_bisenet.config import OHEM, SGD, AdamW, CrossEntropy, Precision, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.data.batches import Frames
from tune_bisenet.data.packed import Packed, PackedSplit
from tune_bisenet.training import benchmark, engine
from tune_bisenet.training.engine import Training

PACKAGE = f"{Path(tune_bisenet.__file__).parent}/"
CARD = torch.device("cuda", 0)
FREE = ("_unsafe_view", "empty", "empty_like", "empty_strided", "lift_fresh")
PLAIN = Run(
    name="ce",
    optimizer=SGD(lr=0.01, momentum=0.9, weight_decay=1e-4),
    schedule=WarmupPoly(warmup_iterations=1, power=0.9),
    loss=CrossEntropy(aux_weight=1.0),
    accumulation=1,
    max_grad_norm=None,
    num_epochs=9,
)
CHANGES: dict[str, dict[str, Any]] = {
    "ce": {},
    "weighted": {"loss": WeightedCrossEntropy(aux_weight=1.0)},
    "ohem": {"loss": OHEM(aux_weight=1.0)},
    "lovasz": {"loss": CrossEntropy(aux_weight=1.0, lovasz_after=0)},
    "accumulation": {"accumulation": 2},
    "clipping": {"max_grad_norm": 1.0},
    "adamw": {"optimizer": AdamW(lr=0.001, weight_decay=1e-4)},
    "spared": {"decay_norms_and_biases": False},
}
COMBINATIONS: dict[str, tuple[Run, Precision]] = {
    f"{name} {precision}": (PLAIN.model_copy(update=change), precision)
    for name, change in CHANGES.items()
    for precision in ("fp32", "bf16")
}


@dataclass
class Work:
    """What the card was given to do, and what the host waited for, by line of the package."""

    operations: float = 0
    bytes: float = 0
    waits: Counter[str] = field(default_factory=Counter)

    def minus(self, other: "Work", batches: int) -> dict[str, Any]:
        """Return the difference for each of so many batches."""
        waits = Counter(self.waits)
        waits.subtract(other.waits)
        return {
            "operations": (self.operations - other.operations) / batches,
            "bytes": (self.bytes - other.bytes) / batches,
            "waits": sum(waits.values()) / batches,
            "waiting": sorted(line for line, count in waits.items() if count),
        }


class Watch(TorchDispatchMode):
    """Counts what reaches the card, and answers for operations whose result is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.work = Work()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name == "_local_scalar_dense":  # .item(), .tolist(), bool()
            self._wait(on_card(inputs))
            return {torch.bool: False}.get(inputs[0].dtype, 1.0 if inputs[0].is_floating_point() else 1)
        # Torch has no fake form of the fused optimizers, which change tensors in place.
        out = None if name.startswith("_fused_") else func(*args, **kwargs)
        if name.startswith("convolution") and any(map(is_channels_last, inputs)):  # what cuDNN answers, if it is there
            out = tree_map_only(Tensor, as_channels_last, out)
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_") and on_card(results) != on_card(inputs[-1:]):
            is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2 and args[2])
            self._wait(not is_asynchronous)
        is_view = bool(func._schema.returns) and all(
            result.alias_info and not result.alias_info.is_write for result in func._schema.returns
        )
        if on_card([*inputs, *results]) and not (is_view or func.namespace == "prim" or name in FREE):
            self.work.operations += 1
            touched = [tensor for tensor in (*inputs, *results) if on_card([tensor])]
            if name in ("gather", "index", "scatter_add_", "scatter"):  # these touch what they pick, not all of it
                touched = 3 * [min(touched, key=Tensor.numel) if name != "index" else results[0]]
            self.work.bytes += sum(tensor.numel() * tensor.element_size() for tensor in touched)
        return out

    def _wait(self, is_wait: bool) -> None:
        if is_wait:
            frame = sys._getframe(2)
            while frame.f_back and not frame.f_code.co_filename.startswith(PACKAGE):
                frame = frame.f_back
            self.work.waits[f"{frame.f_code.co_filename.removeprefix(PACKAGE)}:{frame.f_lineno}"] += 1


def on_card(tensors: list[Tensor]) -> bool:
    return any(tensor.device.type == "cuda" for tensor in tensors)


def is_channels_last(tensor: Tensor) -> bool:
    return tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last)


def as_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.ndim == 4 else tensor


def pretend_a_card() -> None:
    """Let what asks for a driver, a context or an array be answered without one."""
    # Autograd's engine asks whether there is a context on the card, and is to hear no instead of an error. What answers
    # is not exported: c10 jumps to it (`jmp [rip + offset]`).
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10_cuda.so"))
    caller = ctypes.cast(library["_ZN3c104cuda17hasPrimaryContextEa"], ctypes.c_void_p).value
    assert caller
    end = caller + ctypes.string_at(caller, 16).index(b"\xff\x25") + 6
    (offset,) = struct.unpack("<i", ctypes.string_at(end - 4, 4))
    answer_address = ctypes.c_uint64.from_address(end + offset).value
    readable_writable_executable = 7
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(answer_address & ~4095), 8192, readable_writable_executable) == 0
    ctypes.memmove(answer_address, b"\x31\xc0\xc3", 3)  # xor eax, eax; ret
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False  # type: ignore[assignment]
    answers = {"is_bf16_supported": True, "mem_get_info": (10**12, 10**12), "synchronize": None, "get_device_name": ""}
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    _foreach_utils._foreach_supported_types.append(FakeTensor)
    nn.Module._apply = replace_tensors  # type: ignore[method-assign]
    FakeTensor.numpy = lambda tensor: np.empty(tuple(tensor.shape), str(tensor.dtype)[6:])  # type: ignore[method-assign]
    empty = torch.empty
    torch.empty = lambda *args, pin_memory=False, **kwargs: empty(*args, **kwargs)


def replace_tensors(module: nn.Module, convert: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
    """Put converted tensors in the place of a module's own, since fake ones cannot be changed in place."""
    for part in module.modules() if recurse else [module]:
        part._parameters.update(
            {key: nn.Parameter(convert(value.detach())) for key, value in part._parameters.items() if value is not None}
        )
        part._buffers.update({key: convert(value) for key, value in part._buffers.items() if value is not None})
    return module


def split_of(count: int, image_size: tuple[int, int], label_size: tuple[int, int]) -> PackedSplit:
    image, label = (np.broadcast_to(np.uint8(3), shape) for shape in ((3, *image_size), label_size))
    return PackedSplit([""] * count, [image] * count, [label] * count)


def begin(run: Run, precision: Precision, label_size: tuple[int, int]) -> Training:
    """Return a training of two batches and one validation batch."""
    ones = np.ones(19, dtype=np.int64)
    train = split_of(2 * run.batch_size, run.image_size, run.image_size)
    val = split_of(run.batch_size, run.image_size, label_size)
    data = Packed(Path(), "fake", "", run.image_size, label_size, ones, ones, "", train, val)
    with Watch():
        return engine.begin(run, data, device=CARD, precision=precision, backbone=None)


class MarkedFrames(Frames):
    """Frames that are resident on the card. Keeps what was done before each batch that it returns."""

    def __init__(self, split: PackedSplit, watch: Watch) -> None:
        arrays = (split.images, split.labels)
        images, labels = (torch.empty((len(split), *part[0].shape), dtype=torch.uint8, device=CARD) for part in arrays)
        super().__init__(split, CARD, resident=(images, labels))
        self._watch = watch
        self.marks: list[Work] = []

    def batches(self, order: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        batches = super().batches(order, batch_size)
        for _ in range(0, len(order), batch_size):
            self.marks.append(replace(self._watch.work, waits=Counter(self._watch.work.waits)))
            yield next(batches)


def measure(run: Run, precision: Precision, label_size: tuple[int, int]) -> dict[str, Any]:
    """Return the work of an iteration, of a validation batch and of a prediction, and the waits of an epoch.

    The optimizer's state is made in the first two iterations, and there is a step in the next two. The second of the
    validation batches holds no sample to look at.
    """
    training = begin(run, precision, label_size)
    with Watch() as watch:
        training.train = train = MarkedFrames(split_of(5 * run.batch_size, run.image_size, run.image_size), watch)
        training.val = val = MarkedFrames(split_of(4 * run.batch_size, run.image_size, label_size), watch)
        uploaded = watch.work.waits.total()
        next(engine.fit(training))
    benchmark.NUM_WARMUPS, benchmark.MIN_REPEATS, benchmark.MAX_REPEATS = 1, 2, 2  # type: ignore[misc]
    predictions = []

    def predict(*args: Any, **kwargs: Any) -> Tensor:
        predictions.append(replace(timed.work, waits=Counter(timed.work.waits)))
        return real_predict(*args, **kwargs)

    real_predict, engine.predict = engine.predict, predict
    with Watch() as timed:
        benchmark.measure_latency(run, device=CARD, precision=precision)
    engine.predict = real_predict
    return {
        "iteration": train.marks[4].minus(train.marks[2], 2),
        "validation": val.marks[2].minus(val.marks[1], 1),
        "prediction": predictions[-1].minus(predictions[-2], 1),
        "waits_of_epoch": watch.work.waits.total() - uploaded,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--image", default="512x1024")
    parser.add_argument("--label", default="1024x2048")
    parser.add_argument("names", nargs="*", default=COMBINATIONS)
    given = parser.parse_args()
    (height, width), label_size = ([int(number) for number in text.split("x")] for text in (given.image, given.label))
    pretend_a_card()
    with FakeTensorMode(), torch.autograd.set_multithreading_enabled(False):
        for name in given.names:
            run, precision = COMBINATIONS[name]
            run = run.model_copy(update={"image_size": (height, width)})
            found = {"name": name} | measure(run, precision, tuple(label_size))
            sys.stdout.write(json.dumps(found) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
