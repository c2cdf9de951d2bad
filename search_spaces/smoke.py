"""Three short rows that touch every kind of optimizer, loss and technique: to see that a set-up works."""

from tune_bisenet.config import SGD, AdamW, Augment, Expect, Run
from tune_bisenet.config import CrossEntropy as CE
from tune_bisenet.config import WarmupPoly as Poly
from tune_bisenet.config import WeightedCrossEntropy as WeightedCE
from tune_bisenet.spaces import Grid

PLAIN = Augment(min_scale=1.0, max_scale=1.0, jitter=0.0)

# fmt: off
SPACE = Grid("Three rows to see that a set-up works", (
    Run(name="a", optimizer=SGD(lr=0.01, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=2, power=0.9), loss=CE(aux_weight=1.0),                 accumulation=1, max_grad_norm=None, num_epochs=2, augment=PLAIN),
    Run(name="b", optimizer=AdamW(lr=0.001,            weight_decay=1e-4), schedule=Poly(warmup_iterations=2, power=0.9), loss=WeightedCE(aux_weight=0.4),         accumulation=2, max_grad_norm=1.0,  num_epochs=2, augment=PLAIN, expect=Expect(gain=(0, 5), over="a")),
    Run(name="c", optimizer=SGD(lr=0.01, momentum=0.9, weight_decay=1e-4), schedule=Poly(warmup_iterations=2, power=0.9), loss=CE(aux_weight=1.0, lovasz_after=1), accumulation=1, max_grad_norm=None, num_epochs=2, augment=PLAIN, expect=Expect(gain=(0, 5), over="a")),
))
# fmt: on
