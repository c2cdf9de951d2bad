"""How many inputs the properties in tests/fuzz are tried on, and how what the program wrote is damaged.

2,000 inputs in all, the same ones each time; `make fuzz` tries 100,000 others. What failed is kept in .hypothesis and
tried first the next time; what taught us something is an `@example` of its test.
"""

import json
import os
from collections.abc import Callable
from typing import Any, TypeVar

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st

INPUTS_VARIABLE = "TUNE_BISENET_FUZZ_INPUTS"
NUM_INPUTS = int(os.environ.get(INPUTS_VARIABLE, "2000"))
IS_FUZZING = INPUTS_VARIABLE in os.environ

_Test = TypeVar("_Test", bound=Callable[..., Any])


def inputs(of_thousand: float) -> Callable[[_Test], _Test]:
    """Try a property on that many of each thousand inputs. Without fuzzing, nothing is left to chance or to time."""
    return settings(
        max_examples=max(1, round(of_thousand * NUM_INPUTS / 1000)),
        deadline=None,
        derandomize=not IS_FUZZING,
        database=settings.default.database if IS_FUZZING else None,
        phases=[*Phase] if IS_FUZZING else [Phase.explicit, Phase.generate, Phase.shrink],
        suppress_health_check=[*HealthCheck],
        print_blob=True,
    )


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """Return the bytes with up to four damages, as disks, copies and hands do them; none of them is also possible."""
    damage = bytearray(content)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(damage)))
        end = min(len(damage), start + draw(st.integers(0, 64)))
        match draw(st.sampled_from(["flip", "flip", "overwrite", "cut", "insert", "repeat", "truncate"])):
            case "flip" if start < len(damage):
                damage[start] ^= 1 << draw(st.integers(0, 7))
            case "overwrite":
                damage[start:end] = draw(st.binary(min_size=end - start, max_size=end - start))
            case "cut":
                del damage[start:end]
            case "insert":
                damage[start:start] = draw(st.binary(max_size=64))
            case "repeat":
                damage[start:start] = damage[start:end]
            case "truncate":
                del damage[start:]
    return bytes(damage)


ODD_TEXTS = st.sampled_from(
    ["", " ", ",", "..", "-1", "1e999", "nan", "None", "a/b", "%20?#'\"", "é\u202e", "\x00", "r01"]
)
ODD_NUMBERS = st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**40, -0.0, 1e-320, 1e308, float("inf"), float("nan")])
ODD_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | ODD_NUMBERS | ODD_TEXTS | st.text(max_size=8),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(ODD_TEXTS | st.text(max_size=8), parts, max_size=3),
    max_leaves=6,
)


@st.composite
def damaged_json(draw: st.DrawFn, content: bytes) -> bytes:
    """Return JSON in which up to three values are lost, exchanged or doubled, or damaged bytes."""
    if draw(st.integers(0, 3)) == 0:
        return draw(damaged(content))
    document = json.loads(content)
    for _ in range(draw(st.integers(1, 3))):
        document = _with_damage(draw, document)
    return json.dumps(document).encode()


def _with_damage(draw: st.DrawFn, value: Any) -> Any:
    """Return the value with one place in it damaged: each level is as likely to be the place."""
    if not isinstance(value, dict | list) or not value or draw(st.integers(0, 3)) == 0:
        return draw(ODD_VALUES)
    keys = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = draw(st.sampled_from(keys))
    match draw(st.sampled_from(["deeper", "deeper", "deeper", "deeper", "lose", "double", "exchange"])):
        case "deeper":
            value[key] = _with_damage(draw, value[key])
        case "lose":
            del value[key]
        case "double":
            if isinstance(value, dict):
                value[draw(ODD_TEXTS)] = value[key]
            else:
                value.insert(key, value[key])
        case "exchange":
            value[key] = value[draw(st.sampled_from(keys))]
    return value
