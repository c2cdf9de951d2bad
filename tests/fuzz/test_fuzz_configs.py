"""Whatever is typed: a value that is read back as it is, or an error in words that names what was given."""

import contextlib
import io
import math
import shlex
from typing import Any

from helpers.fuzz import ODD_NUMBERS, ODD_TEXTS, ODD_VALUES, inputs
from hypothesis import assume, example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from tune_bisenet.config import OHEM, SGD, AdamW, Augment, CrossEntropy, Run, WarmupPoly, WeightedCrossEntropy
from tune_bisenet.options import (
    InputError,
    Options,
    SearchConfig,
    build_parser,
    default_name,
    parse_options,
    problems_of,
    resolve_options,
)
from tune_bisenet.records import from_json, to_json
from tune_bisenet.spaces import DataFacts, Grid, RowOverrides, resolve_runs, space_to_markdown

PARTS = (SGD, AdamW, WarmupPoly, CrossEntropy, WeightedCrossEntropy, OHEM, Augment)
FACTS = DataFacts(num_train=12, num_val=4, suggested_image_size=(64, 96))

numbers = st.floats(0, 2) | st.integers(0, 100) | ODD_NUMBERS


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    """Return the fields of a row: sensible ones, a few of which may be exchanged for anything."""

    def part(*kinds: Any) -> dict[str, Any]:
        kind = draw(st.sampled_from(kinds))
        names = [name for name, field in kind.model_fields.items() if field.is_required() or draw(st.booleans())]
        return {name: kind.model_fields[name].default if name == "kind" else draw(numbers) for name in names}

    optimizer, loss = part(SGD, AdamW), part(CrossEntropy, WeightedCrossEntropy, OHEM)
    fields = {
        "name": draw(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,9}", fullmatch=True)),
        "optimizer": {"kind": "sgd" if "momentum" in optimizer else "adamw"} | optimizer,
        "schedule": part(WarmupPoly),
        "loss": {"kind": draw(st.sampled_from(["ce", "weighted_ce", "ohem"]))} | loss,
        "accumulation": draw(st.integers(1, 4)),
        "max_grad_norm": draw(st.none() | numbers),
        "augment": part(Augment),
    }
    extra = {name: draw(numbers | ODD_VALUES) for name in Run.model_fields if draw(st.integers(0, 9)) == 0}
    return fields | extra


@inputs(90)
@given(fields=rows(), overrides=st.dictionaries(st.sampled_from(["num_epochs", "max_epochs"]), st.integers(1, 10**12)))
def test_a_row_is_refused_or_read_back_and_resolved(fields: dict[str, Any], overrides: dict[str, Any]) -> None:
    try:
        row = Run.model_validate(fields)
    except ValidationError:
        return
    assert Run.model_validate_json(row.model_dump_json()) == row
    assert Run.model_validate_json(row.model_dump_json()).fingerprint() == row.fingerprint()
    assert row.name in space_to_markdown([row])
    with contextlib.suppress(InputError):
        for run in resolve_runs(Grid("one", (row,)).runs, RowOverrides(proxy=True, **overrides), FACTS):
            assert run.schedule.warmup_iterations < run.num_epochs * (FACTS.num_train // run.batch_size)


WORDS = ODD_TEXTS | st.sampled_from(
    [
        "r01,r02",
        "0,1",
        "3,5",
        "8",
        "1h30m",
        "64x96",
        "streets",
        "none",
        "imagenet",
        "asha",
        "miou,latency",
        "cpu",
        "0.5",
    ]
)


@st.composite
def flags(draw: st.DrawFn) -> dict[str, str | bool]:
    """Return flags with words that belong to one of them, numbers as people write them, or anything."""
    values = WORDS | st.text(max_size=12) | numbers.map(str) | st.lists(numbers.map(str), max_size=4).map(",".join)
    names = draw(st.lists(st.sampled_from(sorted(Options.model_fields)), max_size=6))
    is_switch = {name: field.json_schema_extra["metavar"] is None for name, field in Options.model_fields.items()}
    return {name: True if is_switch[name] else draw(values) for name in names}


@inputs(120)
@given(given_flags=flags())
@example(given_flags={"runs": ","})
@example(given_flags={"epochs": "1000000000000"})
def test_flags_are_options_or_mistakes_in_words(given_flags: dict[str, str | bool]) -> None:
    options, mistyped = parse_options(given_flags)
    assert set(mistyped) <= set(given_flags)
    assert all(f"--{name.replace('_', '-')}" in text for name, text in mistyped.items())
    left = {name: value for name, value in given_flags.items() if name not in mistyped}
    assert parse_options(left) == (options, {})
    assert default_name(options.space)
    try:
        config = resolve_options(options, default_data="streets")
    except ValueError as error:
        assert problems_of(error)
        return
    assert from_json(SearchConfig, to_json(config), path="x") == config
    assert all(not isinstance(value, float) or math.isfinite(value) for value in options.model_dump().values())


@inputs(20)
@given(
    words=st.lists(
        WORDS | st.sampled_from([f"--{name.replace('_', '-')}" for name in Options.model_fields]), max_size=8
    )
)
def test_a_command_line_is_read_or_ends_with_code_two(words: list[str]) -> None:
    assume("\x00" not in "".join(words))  # which no process can be given
    with contextlib.redirect_stderr(io.StringIO()) as told:
        try:
            given_flags = vars(build_parser().parse_args(words))
        except SystemExit as end:
            assert end.code == 2
            assert "error: " in told.getvalue(), shlex.join(words)
            return
    given_flags.pop("show", None)
    parse_options(given_flags)
