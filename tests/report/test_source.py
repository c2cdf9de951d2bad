"""A run as source: what is executed is the same run."""

import pytest

from search_spaces.runs10 import SPACE
from tune_bisenet import config
from tune_bisenet.config import OHEM, AdamW, Augment, Run, WarmupPoly
from tune_bisenet.report.source import to_python

PLAIN = SPACE.runs[0].model_copy(update={"expect": None})

CHANGED = Run(
    name="changed",
    optimizer=AdamW(lr=0.0012345678901234567, weight_decay=0.0),
    schedule=WarmupPoly(warmup_iterations=7, power=1.1, start_lr=0.0),
    loss=OHEM(aux_weight=0.4, threshold=0.6, lovasz_after=3),
    accumulation=4,
    max_grad_norm=0.5,
    num_epochs=12,
    image_size=(64, 128),
    augment=Augment(flip=0.0),
    decay_norms_and_biases=False,
    seed=3,
)


@pytest.mark.parametrize("run", [*SPACE.runs, CHANGED], ids=lambda run: run.name)
def test_what_is_executed_is_the_same_run(run: Run) -> None:
    again = eval(to_python(run), {name: getattr(config, name) for name in dir(config)})
    assert again == run
    assert again.fingerprint() == run.fingerprint()


def test_defaults_are_left_out_but_for_the_columns_of_the_table() -> None:
    assert to_python(PLAIN) == (
        "Run(\n"
        '    name="r01",\n'
        "    optimizer=SGD(lr=0.01, momentum=0.9, weight_decay=0.0001),\n"
        "    schedule=WarmupPoly(warmup_iterations=1100, power=0.9),\n"
        "    loss=CrossEntropy(aux_weight=1.0),\n"
        "    accumulation=1,\n"
        "    max_grad_norm=None,\n"
        ")"
    )
