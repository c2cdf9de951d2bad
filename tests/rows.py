"""A plain row: what the tests say of a run is how it differs from this one."""

from typing import Any

from tune_bisenet.config import SGD, CrossEntropy, Run, WarmupPoly


def plain_row(
    name: str = "r02", *, lr: float = 0.01, warmup: int = 1100, lovasz_after: int | None = None, **fields: Any
) -> Run:
    """SGD, cross-entropy, neither accumulation nor clipping: but for its name the first of the ten runs."""
    plain = {
        "optimizer": SGD(lr=lr, momentum=0.9, weight_decay=1e-4),
        "schedule": WarmupPoly(warmup_iterations=warmup, power=0.9),
        "loss": CrossEntropy(aux_weight=1.0, lovasz_after=lovasz_after),
        "accumulation": 1,
        "max_grad_norm": None,
    }
    return Run(name=name, **(plain | fields))
