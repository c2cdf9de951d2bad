"""The package in a notebook: a few names, imported when used, that change nothing global."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from winners import STREETS

import tune_bisenet
from tune_bisenet import Run, fit, load
from tune_bisenet.config import SGD, WarmupPoly
from tune_bisenet.data import packing
from tune_bisenet.options import InputError

ROW = Run(
    name="mine", optimizer=SGD(lr=0.02), schedule=WarmupPoly(warmup_iterations=1), num_epochs=2, image_size=(32, 64)
)


@pytest.fixture
def _small_streets(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(packing.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(packing, "Streets", lambda: STREETS)


@pytest.mark.usefixtures("_small_streets")
def test_a_row_of_ones_own_is_trained_without_ray_and_its_best_is_loaded(tmp_path: Path) -> None:
    epochs = list(fit(ROW, data="streets", device="cpu", out=tmp_path / "mine"))
    again = list(fit(ROW, data="streets", device="cpu"))
    assert [epoch.epoch for epoch in epochs] == [1, 2]
    assert all(math.isfinite(epoch.miou) for epoch in epochs)
    assert [epoch.loss for epoch in again] == [epoch.loss for epoch in epochs]
    model = load(tmp_path / "mine")
    assert model.card.miou == max(epoch.miou for epoch in epochs)
    assert model.predict(STREETS.load("val", 0).image).overlay.size == (192, 96)


@pytest.mark.usefixtures("_small_streets")
def test_what_cannot_be_trained_is_refused_before_the_first_epoch() -> None:
    with pytest.raises(InputError, match="a warm-up of 1100 iterations does not fit"):
        fit(ROW.model_copy(update={"schedule": WarmupPoly()}))
    if not torch.cuda.is_available():
        with pytest.raises(InputError, match="torch finds no GPU"):
            fit(ROW, device="cuda")


def test_a_name_and_an_optimizer_make_the_row_r01() -> None:
    from search_spaces.runs10 import SPACE

    assert Run(name="mine", optimizer=SGD(lr=0.01)).fingerprint() == SPACE.rows[0].fingerprint()


def test_every_public_name_is_there_and_others_are_not() -> None:
    assert all(getattr(tune_bisenet, name) for name in tune_bisenet.__all__)
    assert set(tune_bisenet.__all__) <= set(dir(tune_bisenet))
    with pytest.raises(AttributeError, match="no attribute nothing"):
        tune_bisenet.nothing  # noqa: B018


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_importing_the_package_imports_nothing_heavy() -> None:
    heavy = "{'torch', 'ray', 'numpy', 'pydantic', 'PIL'}"
    assert run_python(f"import sys, tune_bisenet; print(sorted({heavy} & set(sys.modules)))") == "[]"


def test_importing_every_module_sets_nothing_global() -> None:
    """Libraries are imported first: what they set is theirs."""
    assert (
        run_python(
            """
import importlib, logging, os, pkgutil, signal, warnings
import numpy, optuna, PIL.Image, PIL.ImageFile, plotly, pyarrow.fs, ray.tune, rich, torch, torchvision, tensorboard
import ray.job_submission, torch.utils.tensorboard, boto3, yaml, fsspec, jinja2, scipy.stats, sqlalchemy
import optuna.importance, optuna.visualization, sklearn.ensemble, torch.utils.deterministic
def state():
    return {
        "pixels": PIL.Image.MAX_IMAGE_PIXELS,
        "truncated": PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
        "warnings": [str(entry) for entry in warnings.filters],
        "environment": dict(os.environ),
        "handlers": (list(logging.root.handlers), logging.root.level),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "threads": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": torch.backends.cudnn.benchmark,
        "random": torch.get_rng_state().tolist(),
    }
before = state()
import tune_bisenet
names = [module.name for module in pkgutil.walk_packages(tune_bisenet.__path__, "tune_bisenet.")]
names.remove("tune_bisenet.training.kernels")  # needs Triton
for name in names:
    importlib.import_module(name)
print([key for key, value in state().items() if value != before[key]], len(names) > 50)
"""
        )
        == "[] True"
    )
