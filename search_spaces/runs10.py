"""The ten planned runs, row by row as in the table they come from. `--show` prints them as Markdown.

Expectations are percentage points of mIoU on the validation split; "about 58 %" is taken as 57.5 to 58.5.
"""

from tune_bisenet.config import SGD, AdamW, Expect, Run
from tune_bisenet.config import CrossEntropy as CE
from tune_bisenet.config import WarmupPoly as Poly
from tune_bisenet.config import WeightedCrossEntropy as WeightedCE
from tune_bisenet.spaces import Grid

BATCHNORM = "Accumulation does not make BatchNorm more robust: it still sees four images at a time."

# fmt: off
SPACE = Grid("The ten planned runs", (
    Run(name="r01", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=1, max_grad_norm=None, expect=Expect(miou=(55, 57))),
    Run(name="r02", optimizer=SGD(lr=0.015, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=1, max_grad_norm=None, expect=Expect(miou=(56, 58), sooner_than="r01")),
    Run(name="r03", optimizer=SGD(lr=0.025, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=1, max_grad_norm=None, expect=Expect(miou=(57, 59))),
    Run(name="r04", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=0.4),                  accumulation=1, max_grad_norm=None, expect=Expect(gain=(0.5, 0.5), over="r01")),
    Run(name="r05", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0, lovasz_after=35), accumulation=1, max_grad_norm=None, expect=Expect(gain=(1.0, 1.0), over="r01")),
    Run(name="r06", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=2, max_grad_norm=None, expect=Expect(gain=(1.0, 2.0), over="r01", note=BATCHNORM)),
    Run(name="r07", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=1, max_grad_norm=1.0,  expect=Expect(gain=(0.3, 0.5), over="r01")),
    Run(name="r08", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=2500, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=1, max_grad_norm=None, expect=Expect(gain=(0.5, 0.5), over="r01")),
    Run(name="r09", optimizer=AdamW(lr=0.001,             weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=CE(aux_weight=1.0),                  accumulation=1, max_grad_norm=None, expect=Expect(miou=(57.5, 58.5), sooner_than="r01")),
    Run(name="r10", optimizer=SGD(lr=0.010, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=1100, power=0.9), loss=WeightedCE(aux_weight=1.0),          accumulation=1, max_grad_norm=None, expect=Expect(gain=(0.5, 1.0), over="r01")),
))
# fmt: on
