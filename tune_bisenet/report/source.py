"""A run as the Python source of a row, to paste into the file of a search space."""

import json

from tune_bisenet.config import Frozen, Run

COLUMNS = ("optimizer", "schedule", "loss", "accumulation", "max_grad_norm")
"""Of the table: a row always states them."""


def to_python(run: Run) -> str:
    """The call that makes this run; fields at their defaults are left out, the table's columns are not."""
    fields = ["name", *COLUMNS, *(name for name in Run.model_fields if name not in ("name", *COLUMNS))]
    stated = [name for name in fields if name in ("name", *COLUMNS) or not _is_default(run, name)]
    lines = [f"    {name}={_source(getattr(run, name))},\n" for name in stated]
    return f"Run(\n{''.join(lines)})"


def _is_default(value: Frozen, name: str) -> bool:
    return bool(getattr(value, name) == type(value).model_fields[name].default)


def _source(value: object) -> str:
    if isinstance(value, Frozen):
        stated = [name for name in type(value).model_fields if not _is_default(value, name)]
        return f"{type(value).__name__}({', '.join(f'{name}={_source(getattr(value, name))}' for name in stated)})"
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
