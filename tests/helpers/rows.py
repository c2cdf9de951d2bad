"""A plain row, epoch, trial and manifest: tests say only how theirs differ from these."""

from typing import Any

from tune_bisenet.config import SGD, CrossEntropy, Run, WarmupPoly
from tune_bisenet.records import Epoch, Manifest, TrialState

SESSION: dict[str, Any] = {
    "started": "2026-03-01T10:00:00+00:00",
    "ended": "2026-03-01T12:00:00+00:00",
    "command": ["python", "-m", "tune_bisenet.run", "--name", "small search"],
    "commit": "0123456789abcdef",
    "python": "3.11.9",
    "packages": {"torch": "2.15.0"},
    "cpus_per_trial": 4,
    "threads_per_trial": 4,
    "gpus_per_trial": 0.5,
    "trials_at_once": 2,
}

CONFIG: dict[str, Any] = {
    "space": "small",
    "data": "streets",
    "backbone": "none",
    "groups": [{"runs": None, "seeds": [0, 1]}],
    "epochs": None,
    "image_size": None,
    "proxy": False,
    "scheduler": "fifo",
    "precision": "fp32",
}


def plain_row(
    name: str = "r02", *, lr: float = 0.01, warmup: int = 1100, lovasz_after: int | None = None, **fields: Any
) -> Run:
    """Return a row of SGD and cross-entropy, without accumulation and clipping: that of r01 but for its name."""
    plain = {
        "optimizer": SGD(lr=lr, momentum=0.9, weight_decay=1e-4),
        "schedule": WarmupPoly(warmup_iterations=warmup, power=0.9),
        "loss": CrossEntropy(aux_weight=1.0, lovasz_after=lovasz_after),
        "accumulation": 1,
        "max_grad_norm": None,
    }
    return Run(name=name, **(plain | fields))


def plain_epoch(number: int, miou: float, **fields: Any) -> Epoch:
    """Return an epoch of one iteration and two seconds, in which all went well."""
    plain: dict[str, Any] = {
        "iterations": number,
        "loss": 1.0,
        "loss_main": 1.0,
        "loss_aux1": 0.0,
        "loss_aux2": 0.0,
        "lr": 0.01,
        "grad_norm": 1.0,
        "iou": (miou,),
        "pixel_accuracy": 90.0,
        "images_per_second": 10.0,
        "train_seconds": 1.0,
        "val_seconds": 1.0,
    }
    return Epoch(epoch=number, miou=miou, **(plain | fields))


def plain_state(trial: str, **fields: Any) -> TrialState:
    """Return the state of a waiting trial of four epochs, whose row has its name."""
    return TrialState(**({"trial": trial, "run": trial, "seed": 0, "num_epochs": 4} | fields))


def plain_manifest(**fields: Any) -> Manifest:
    """Return how a grid search without trials was made, in one session; `fields` may be plain values."""
    plain: dict[str, Any] = {
        "name": "earlier",
        "config": CONFIG,
        "space": {"title": "Two rows", "baseline": "r01", "measured_share": 0.1},
        "trials": {},
        "data": {"digests": {"32x64": "feedbeef"}, "train_images": 8, "val_images": 3},
        "backbone_digest": "none",
        "proxy": None,
        "sessions": [SESSION],
    }
    return Manifest.model_validate(plain | fields)
