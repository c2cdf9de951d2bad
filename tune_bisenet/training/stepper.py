"""Give a GPU the work of a whole call at once: a function is recorded as a CUDA graph, and each call replays it.

A GPU is otherwise given hundreds of kernels one by one from Python, which may take longer than they do. A replay reads
and writes the same memory each time, so inputs are copied to where the recorded ones were, and results from where they
are written. What else a function reads must stay where it is; numbers of Python are those of the recording, and what it
does on the host is not done again.

It knows nothing of networks, optimizers and losses.
"""

import contextlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from tune_bisenet.config import StepMode
from tune_bisenet.text import one_line

Batch = tuple[Tensor, ...]
Function = Callable[[Sequence[Batch]], list[Tensor]]

WARMUP_CALLS: Final = 2
"""Calls before the one that is recorded: the first makes what lasts, such as momentum; the second is as all others."""

MAX_SHAPES: Final = 4
"""Recordings of a kind, each of which holds memory: frames of a hundred sizes must not make a hundred."""

_cuda: Any = torch.cuda  # some of it has no types
_log = logging.getLogger(__name__)


class CaptureError(ValueError):
    """A function cannot be recorded, and `--step graph` allows nothing else."""


class Stepper:
    """Calls functions as `mode` says: `eager` as they are, `graph` by replays, `auto` by replays on a GPU if it can be.

    On a CPU, which has no graphs, `graph` does all the same but for the recording: a replay calls the function.
    """

    def __init__(self, mode: StepMode, device: torch.device) -> None:
        self._mode = mode
        self._device = device
        self.is_eager = mode == "eager" or (mode == "auto" and device.type == "cpu")
        self._recordings: dict[tuple[object, ...], _Recording] = {}
        self._recorder: _Recorder | None = None
        self.eager_because = ""
        """Why functions are called as they are though `mode` is `auto`; empty if they are not."""

    def call(
        self,
        function: Function,
        batches: Sequence[Batch],
        *,
        kind: str,
        variant: object = None,
        undone: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
    ) -> list[Tensor]:
        """Return `function(batches)`.

        There is a recording for each `kind` and shape of batches, for the first MAX_SHAPES of them; another `variant`
        of it replaces the one before. It takes some calls of the function, which are made within `undone`: that puts
        back all that they have changed.
        Raises CaptureError, or OutOfMemoryError, if `mode` is `graph` and it cannot be made.
        """
        if self.is_eager:
            return function(batches)
        key = (kind, *(tensor.shape for batch in batches for tensor in batch))
        found = self._recordings.get(key)
        if found is None and [recorded for recorded, *_ in self._recordings].count(kind) == MAX_SHAPES:
            return function(batches)
        if found is None or found.variant != variant:
            try:
                # The one before is dropped only then, so that both share their memory.
                self._recordings[key] = found = self._record(function, batches, variant, undone)
            except Exception as error:  # of CUDA, cuDNN, Triton, torch: they share no class
                self._give_up(kind, error)
                return function(batches)
        return found.replay(batches)

    def _record(
        self,
        function: Function,
        batches: Sequence[Batch],
        variant: object,
        undone: Callable[[], contextlib.AbstractContextManager[None]],
    ) -> "_Recording":
        inputs = [tuple(tensor.clone() for tensor in batch) for batch in batches]
        run = partial(function, inputs)
        with undone():
            if self._device.type == "cuda":
                self._recorder = self._recorder or _Recorder()
                return _Recording(variant, inputs, self._recorder.record(run))
            for _ in range(WARMUP_CALLS + 1):
                run()
            return _Recording(variant, inputs, run)

    def _give_up(self, kind: str, error: Exception) -> None:
        """Call functions as they are from now on. Raises if that is not allowed."""
        if self._mode == "graph":
            if isinstance(error, torch.OutOfMemoryError):
                raise error
            raise CaptureError(
                f"{kind} cannot be recorded as a CUDA graph ({one_line(error)}), and --step graph allows nothing else. "
                "Start another search without that flag: kernels are then launched one by one where they have to be."
            ) from error
        self.is_eager = True
        self._recordings.clear()
        if self._device.type == "cuda":
            _cuda.empty_cache()
        self.eager_because = f"{kind} cannot be recorded: {one_line(error)}"
        _log.warning("Kernels are launched one by one instead of as a CUDA graph, as %s", self.eager_because)


class _Recorder:
    """Makes graphs that share a stream and memory, as never two are replayed at once."""

    def __init__(self) -> None:
        self._stream = _cuda.Stream()
        self._pool = _cuda.graph_pool_handle()

    def record(self, run: Callable[[], list[Tensor]]) -> Callable[[], list[Tensor]]:
        """Return what replays `run`, and gives the same tensors each time. It keeps nothing of `run` alive."""
        current = _cuda.current_stream()
        self._stream.wait_stream(current)
        try:
            with _cuda.stream(self._stream):
                for _ in range(WARMUP_CALLS):
                    run()
        finally:
            current.wait_stream(self._stream)  # before anything is put back
        graph = _cuda.CUDAGraph()
        # Other threads may use the GPU's driver meanwhile: they read frames ahead and keep epochs.
        with _cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            results = run()

        def replay() -> list[Tensor]:
            graph.replay()
            return results

        return replay


@dataclass(frozen=True)
class _Recording:
    """Holds what replays a function, and where it reads its batches."""

    variant: object
    inputs: list[Batch]
    run: Callable[[], list[Tensor]]

    def replay(self, batches: Sequence[Batch]) -> list[Tensor]:
        """Return what the function does for batches of the recorded shapes."""
        for inputs, batch in zip(self.inputs, batches, strict=True):
            for own, tensor in zip(inputs, batch, strict=True):
                own.copy_(tensor, non_blocking=True)
        return [result.clone() for result in self.run()]
