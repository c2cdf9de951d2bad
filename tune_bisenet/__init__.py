"""tune_bisenet: run a table of planned BiSeNet trainings under Ray Tune and learn which expectation held.

In a notebook: `load` a search's best network and let it predict, `fit` one `Run` without Ray, or declare a space with
`Grid` and `Sampled`. Names are imported when they are first used: torch takes seconds.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tune_bisenet.config import Run
    from tune_bisenet.inference.model import load
    from tune_bisenet.spaces import Grid, Sampled
    from tune_bisenet.training.alone import fit_run as fit
    from tune_bisenet.training.model import BiSeNet

__version__ = "0.1.0"
__all__ = ["BiSeNet", "Grid", "Run", "Sampled", "fit", "load"]

_HOMES = {
    "BiSeNet": ("training.model", "BiSeNet"),
    "Grid": ("spaces", "Grid"),
    "Run": ("config", "Run"),
    "Sampled": ("spaces", "Sampled"),
    "fit": ("training.alone", "fit_run"),
    "load": ("inference.model", "load"),
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    module, attribute = _HOMES[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), attribute)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
