"""The ten runs as their table has them, typed in again by hand; grids, files with spaces, and rows resolved to runs."""

import signal
from pathlib import Path
from typing import Any

import pytest
from helpers.rows import plain_row

from tune_bisenet import spaces
from tune_bisenet.config import Expect, Run
from tune_bisenet.options import InputError, SearchConfig
from tune_bisenet.spaces import (
    DataFacts,
    Grid,
    RowOverrides,
    Sampled,
    iterations_per_epoch,
    published_levels,
    resolve_runs,
    with_control,
)


def row(name: str = "a", **fields: Any) -> Run:
    return plain_row(name, **fields)


# --- the ten runs -----------------------------------------------------------------------------------------------

SGD_010 = {"kind": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 0.0001}
SGD_015 = {"kind": "sgd", "lr": 0.015, "momentum": 0.9, "weight_decay": 0.0001}
SGD_025 = {"kind": "sgd", "lr": 0.025, "momentum": 0.9, "weight_decay": 0.0001}
ADAMW = {"kind": "adamw", "lr": 0.001, "weight_decay": 0.0001}
CE_10 = {"kind": "ce", "aux_weight": 1.0, "lovasz_after": None}
CE_04 = {"kind": "ce", "aux_weight": 0.4, "lovasz_after": None}
CE_LOVASZ = {"kind": "ce", "aux_weight": 1.0, "lovasz_after": 35}
WEIGHTED = {"kind": "weighted_ce", "aux_weight": 1.0, "exponent": 1.0, "lovasz_after": None}

# fmt: off
TABLE = [
    # name  optimizer  warm-up  loss       accumulation  clipping
    ("r01", SGD_010,   1100,    CE_10,     1,            None),
    ("r02", SGD_015,   1100,    CE_10,     1,            None),
    ("r03", SGD_025,   1100,    CE_10,     1,            None),
    ("r04", SGD_010,   1100,    CE_04,     1,            None),
    ("r05", SGD_010,   1100,    CE_LOVASZ, 1,            None),
    ("r06", SGD_010,   1100,    CE_10,     2,            None),
    ("r07", SGD_010,   1100,    CE_10,     1,            1.0),
    ("r08", SGD_010,   2500,    CE_10,     1,            None),
    ("r09", ADAMW,     1100,    CE_10,     1,            None),
    ("r10", SGD_010,   1100,    WEIGHTED,  1,            None),
]
EXPECTED = [
    # name  mIoU          gain        over   sooner than
    ("r01", (55, 57),     None,       None,  None),
    ("r02", (56, 58),     None,       None,  "r01"),
    ("r03", (57, 59),     None,       None,  None),
    ("r04", None,         (0.5, 0.5), "r01", None),
    ("r05", None,         (1.0, 1.0), "r01", None),
    ("r06", None,         (1.0, 2.0), "r01", None),
    ("r07", None,         (0.3, 0.5), "r01", None),
    ("r08", None,         (0.5, 0.5), "r01", None),
    ("r09", (57.5, 58.5), None,       None,  "r01"),
    ("r10", None,         (0.5, 1.0), "r01", None),
]
# fmt: on


def test_the_ten_runs_are_those_of_the_table() -> None:
    found = [
        (
            run.name,
            run.optimizer.model_dump(),
            run.schedule.warmup_iterations,
            run.loss.model_dump(),
            run.accumulation,
            run.max_grad_norm,
        )
        for run in spaces.load_space("runs10").runs
    ]
    assert found == TABLE


def test_the_ten_runs_share_what_the_table_says_of_all() -> None:
    for run in spaces.load_space("runs10").runs:
        assert (run.schedule.power, run.schedule.start_lr) == (0.9, 1e-6)
        assert (run.num_epochs, run.batch_size, run.seed) == (50, 4, 0)
        assert run.decay_norms_and_biases
        assert run.augment == spaces.load_space("runs10").runs[0].augment


def test_the_ten_runs_are_expected_to_do_what_the_table_says() -> None:
    found = [
        (run.name, run.expect.miou, run.expect.gain, run.expect.over, run.expect.sooner_than)
        for run in spaces.load_space("runs10").runs
        if run.expect is not None
    ]
    assert found == EXPECTED


# --- a grid -----------------------------------------------------------------------------------------------------------


def test_all_mistakes_in_a_grid_are_reported_together() -> None:
    rows = (row("a"), row("a"), row("b", expect=Expect(gain=(0, 1), over="c")))
    with pytest.raises(ValueError, match=r"(?s)row a .*2 times.*\bb is measured against c"):
        Grid("twice and nowhere", rows)
    with pytest.raises(ValueError, match=r"\ba is measured against b"):
        Grid("nowhere", (row("a", expect=Expect(miou=(0, 1), sooner_than="b")),))
    with pytest.raises(ValueError, match="no rows"):
        Grid("empty", ())


def test_the_classes_of_a_second_measure_are_named_once() -> None:
    with pytest.raises(ValueError, match="road 2 times"):
        Grid("one row", (row(),), second_measure=("road", "sky", "road"))


def test_no_row_is_named_like_a_drawn_trial() -> None:
    with pytest.raises(ValueError, match="t0003"):
        Sampled(title="", sample=lambda _trial: row("a"), around=Grid("", (row("t0003"),)), point=lambda _row: {})


def test_the_baseline_is_the_row_most_others_are_measured_against() -> None:
    assert spaces.load_space("runs10").baseline == "r01"
    assert Grid("no promise", (row("a"), row("b"))).baseline is None


def test_a_control_row_is_the_baseline_with_other_random_numbers() -> None:
    rows = (row("x"), row("y", expect=Expect(gain=(0, 1), over="x"), lr=0.02))
    grid = with_control(Grid("two", rows, measured_share=0.2))
    assert (grid.runs[:2], grid.baseline, grid.measured_share) == (rows, "x", 0.2)
    control = grid.runs[2]
    assert (control.name, control.expect and control.expect.gain) == ("aa", (0, 0))
    assert control.model_copy(update={"name": "x", "stream": 0, "expect": None}) == rows[0]
    assert control.fingerprint() != rows[0].fingerprint()
    assert len({control.random_seed, control.model_copy(update={"seed": 1}).random_seed, 0, 1}) == 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ((row("x"),), "this space has none"),
        ((row("aa"), row("y", expect=Expect(gain=(0, 1), over="aa"))), "adds a row aa, and this space has one"),
    ],
)
def test_a_control_row_needs_a_baseline_and_a_name_of_its_own(rows: tuple[Run, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_control(Grid("rows", rows))


def test_rows_are_selected_by_name_and_stay_in_declared_order() -> None:
    grid = Grid("three", (row("a"), row("b"), row("c")))
    assert [run.name for run in spaces.select_rows(grid, ["c", "a"])] == ["a", "c"]
    assert spaces.select_rows(grid, None) == grid.runs
    with pytest.raises(ValueError, match=r"\bx, y\b.*a, b, c"):
        spaces.select_rows(grid, ["a", "x", "y"])


# --- a file with a space ----------------------------------------------------------------------------------------------

A_SPACE = """
from tune_bisenet.config import SGD, CrossEntropy, Run, WarmupPoly
from tune_bisenet.spaces import Grid

SPACE = Grid("Mine", (
    Run(name="mine", optimizer=SGD(lr={lr}, momentum=0.9, weight_decay=0),
        schedule=WarmupPoly(warmup_iterations=5, power=1), loss=CrossEntropy(aux_weight=1),
        accumulation=1, max_grad_norm=None),
))
"""


def load(path: Path, text: str) -> spaces.Space:
    path.write_text(text)
    return spaces.load_space(str(path))


@pytest.mark.parametrize("name", spaces.space_names())
def test_every_space_that_comes_with_the_package_can_be_loaded(name: str) -> None:
    assert isinstance(spaces.load_space(name), Grid | Sampled)


def test_a_space_of_ones_own_is_given_by_its_path_and_read_again_when_it_changes(tmp_path: Path) -> None:
    for lr in (0.5, 0.25):
        space = load(tmp_path / "my_space.py", A_SPACE.format(lr=lr))
        assert space.title == "Mine"
        assert [(run.name, run.optimizer.lr) for run in space.rows] == [("mine", lr)]


BROKEN = {
    "a text without a space": ("my_space.py", "SPACE = 3", "SPACE of type Grid or Sampled"),
    "no Python": ("my_space.py", "SPACE = Grid(", "my_space.py"),
    "no Python file": ("space.txt", "hello", "space.txt is not a Python file"),
    "an unknown name": ("my_space.py", "SPACE = Gird('x', ())", "Gird"),
    "a missing module": ("my_space.py", "import nosuch_module", "nosuch_module"),
    "a wrong value": ("my_space.py", A_SPACE.format(lr=-1), r"lr: .*greater than 0 .*-1"),
    "a wrong grid": ("my_space.py", A_SPACE.format(lr=1) + "SPACE = Grid('x', SPACE.runs * 2)\n", "mine .*2 times"),
}


@pytest.mark.parametrize(("name", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_space_is_refused_with_the_reason(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load(tmp_path / name, text)


# --- the table --------------------------------------------------------------------------------------------------


# --- rows resolved to runs --------------------------------------------------------------------------------------------

CITYSCAPES = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))
STREETS = DataFacts(num_train=96, num_val=24, suggested_image_size=(96, 192))  # 24 iterations an epoch


def resolved(run: Run, data: DataFacts = CITYSCAPES, **settings: Any) -> Run:
    (found,) = resolve_runs([run], RowOverrides(**settings), data)
    return found


def test_rows_are_kept_as_declared_and_overridden_by_the_command_line_only() -> None:
    declared = row(lovasz_after=35, image_size=(512, 1024))
    assert resolved(declared) == declared
    changed = resolved(declared, num_epochs=40, image_size=(256, 512))
    assert (changed.num_epochs, changed.image_size, changed.schedule.warmup_iterations) == (40, (256, 512), 1100)
    small = DataFacts(2975, 500, (352, 480))
    assert resolved(row(), small).image_size == (352, 480), "the data suggest a size where none is given"
    assert resolved(declared, small).image_size == (512, 1024), "a row's own size is kept even if it is the default"
    assert not RowOverrides().proxy


def test_every_row_is_resolved_with_every_seed_seed_by_seed() -> None:
    runs = resolve_runs([row("a"), row("b")], RowOverrides(seeds=(3, 5)), CITYSCAPES)
    assert [(run.name, run.seed) for run in runs] == [("a", 3), ("b", 3), ("a", 5), ("b", 5)]


def test_iterations_are_full_batches() -> None:
    assert iterations_per_epoch(row(), CITYSCAPES) == 743
    assert iterations_per_epoch(row(batch_size=8), CITYSCAPES) == 371


UNFIT = {
    "a long warm-up": (row(), STREETS, {"num_epochs": 8}, r"^a: .*1100 .*192 \(8 epochs of 24\).*--proxy"),
    "a warm-up to the end": (row(warmup=192), STREETS, {"num_epochs": 8}, r"^a: .*192 iterations .*192"),
    "a late switch": (row(warmup=10, lovasz_after=35), STREETS, {"num_epochs": 8}, r"^a: .*35 .*8 epochs.*--proxy"),
    "too few images": (row(warmup=0), DataFacts(3, 1, (64, 64)), {}, r"^a: 3 .*batch of 4"),
    "a size off the grid": (row(), CITYSCAPES, {"image_size": (100, 200)}, r"^a: .*100x200 .*96x192 and 128x224"),
}


@pytest.mark.parametrize(("run", "data", "settings", "message"), UNFIT.values(), ids=UNFIT)
def test_a_row_that_does_not_fit_the_data_is_refused(
    run: Run, data: DataFacts, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        resolved(run, data, **settings)


def test_a_warmup_leaves_at_least_one_iteration() -> None:
    assert resolved(row(warmup=191), STREETS, num_epochs=8).schedule.warmup_iterations == 191


def test_the_mistakes_of_all_rows_are_reported_together() -> None:
    rows = [row("long"), row("fine", warmup=10), row("late", warmup=10, lovasz_after=35), row("longer", warmup=2500)]
    with pytest.raises(InputError) as refusal:
        resolve_runs(rows, RowOverrides(num_epochs=8), STREETS)
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["long", "late", "longer"]


# --- a proxy ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("warmup", "num_epochs", "expected"),
    [
        (1100, 8, 8),  # 1100 * 192 / 25000 = 8.448
        (2500, 8, 19),  # 2500 * 192 / 25000 = 19.2
        (1100, 50, 53),  # 1100 * 1200 / 25000 = 52.8
        (2500, 50, 120),  # 5 epochs of 24
        (1100, 1, 1),  # 1100 * 24 / 25000 = 1.056
        (2500, 1, 2),  # 2500 * 24 / 25000 = 2.4
        (0, 8, 0),
    ],
)
def test_a_proxy_keeps_the_warmups_share_of_all_iterations(warmup: int, num_epochs: int, expected: int) -> None:
    found = resolved(row(warmup=warmup), STREETS, num_epochs=num_epochs, proxy=True)
    assert found.schedule.warmup_iterations == expected
    assert found.schedule.power == 0.9


@pytest.mark.parametrize(
    ("num_epochs", "switch"),
    [(8, 6), (50, 35), (10, 7), (2, 1), (1, 0)],  # 35 of 50: 5.6, 35, 7, 1.4, 0.7 (which must leave an epoch)
)
def test_a_proxy_keeps_the_loss_switchs_share_of_the_epochs(num_epochs: int, switch: int) -> None:
    found = resolved(row(lovasz_after=35), STREETS, num_epochs=num_epochs, proxy=True)
    assert found.loss.lovasz_after == switch


def test_a_proxy_on_the_tables_own_scale_changes_nothing() -> None:
    scale_of_the_table = DataFacts(num_train=2000, num_val=500, suggested_image_size=(512, 1024))
    declared = row(warmup=2500, lovasz_after=35, image_size=(512, 1024))
    assert resolved(declared, scale_of_the_table, proxy=True) == declared


def test_a_proxy_changes_nothing_but_what_is_counted_in_iterations_or_epochs() -> None:
    declared = row(lovasz_after=35)
    found = resolved(declared, STREETS, num_epochs=8, proxy=True)
    changed = {key for key, value in found.model_dump().items() if value != declared.model_dump()[key]}
    assert changed == {"num_epochs", "image_size", "schedule", "loss"}
    assert found.loss.aux_weight == declared.loss.aux_weight


def published(*runs: Run, num_train: int = 2975, **changes: Any) -> str:
    fields = {"space": "x", "data": "/data", "backbone": "none", "groups": [{"runs": None, "seeds": [0]}]}
    how: dict[str, Any] = {"proxy": False, "scheduler": "fifo", "precision": "fp32"}
    return published_levels(runs, SearchConfig.model_validate(fields | how | changes), num_train=num_train)


def test_published_levels_are_told_with_the_crops_of_the_rows_that_expect_a_level() -> None:
    level, gain = row(expect=Expect(miou=(55, 57))), row(num_epochs=10, expect=Expect(gain=(1, 1), over="a"))
    text = published(level, gain)
    assert "sees 148,600 crops, 11.6 % of those 1,280,000" in text  # 50 epochs of 743 batches of 4
    assert "likely" in text
    both = published(level, level.model_copy(update={"num_epochs": 100}))
    assert "sees 148,600 to 297,200 crops, 11.6 to 23.2 %" in both
    assert "likely" not in published(row(expect=Expect(miou=(55, 70))))


def test_published_levels_are_not_told_where_they_compare_with_nothing() -> None:
    level = row(expect=Expect(miou=(55, 57)))
    assert published(level)
    assert not published(level, proxy=True)
    assert not published(level, data="streets")
    assert not published(row(expect=Expect(gain=(1, 1), over="a")), row())


# --- what a space may not be ------------------------------------------------------------------------------------------


CIRCLES = {
    "over itself": {"a": Expect(gain=(0, 1), over="a")},
    "sooner than itself": {"a": Expect(miou=(0, 1), sooner_than="a")},
    "two over each other": {"a": Expect(gain=(0, 1), over="b"), "b": Expect(gain=(0, 1), over="a")},
    "three, and one beside": {
        "d": Expect(gain=(0, 1), over="a"),
        "a": Expect(gain=(0, 1), over="b"),
        "b": Expect(gain=(0, 1), over="c"),
        "c": Expect(gain=(0, 1), over="a"),
    },
}


@pytest.mark.parametrize("case", CIRCLES)
def test_expectations_in_a_circle_are_refused_once(case: str) -> None:
    with pytest.raises(ValueError, match="in a circle") as refused:
        Grid("rows", tuple(row(name, expect=expect) for name, expect in CIRCLES[case].items()))
    assert str(refused.value).count("in a circle") == 1
    assert "d against" not in str(refused.value)


def test_a_row_may_be_sooner_than_one_that_is_expected_to_gain_over_it() -> None:
    first = row("a", expect=Expect(miou=(0, 1), sooner_than="b"))
    assert Grid("rows", (first, row("b", expect=Expect(gain=(0, 1), over="a")))).baseline == "a"


FAULTS = {
    "import sys; sys.exit(0)": "SystemExit: 0",
    "raise KeyboardInterrupt": "KeyboardInterrupt",
    "raise BaseException('odd')": "BaseException: odd",
    "b'x'.decode('nosuch')": "LookupError: unknown encoding: nosuch",
    "b'\\xff'.decode()": "UnicodeDecodeError: 'utf-8' codec",
    "while True:\n    pass": "it takes longer than 1 s. Is there a loop",
    "while True:\n    try:\n        pass\n    except Exception:\n        pass": "it takes longer than 1 s.",
}


@pytest.mark.parametrize("text", FAULTS)
def test_whatever_a_space_does_is_told_as_its_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setattr(spaces, "MAX_SPACE_SECONDS", 1.0)
    alarm = signal.getsignal(signal.SIGALRM), signal.getitimer(signal.ITIMER_REAL)[0]
    (tmp_path / "mine.py").write_text(text)
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)  # as in a driver: its signals raise no KeyboardInterrupt
    try:
        with pytest.raises(InputError) as refused:
            spaces.load_space(str(tmp_path / "mine.py"))
    finally:
        signal.signal(signal.SIGINT, before)
    assert str(refused.value).startswith(f"the space {tmp_path}/mine.py cannot be used: ")
    assert FAULTS[text] in str(refused.value)
    assert signal.getsignal(signal.SIGALRM) == alarm[0]
    assert (signal.getitimer(signal.ITIMER_REAL)[0] > 0) == (alarm[1] > 0)  # that of the test's own time limit


def test_a_person_may_interrupt_a_space(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nwhile True:\n    pass")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            spaces.load_space(str(tmp_path / "mine.py"))
    finally:
        signal.signal(signal.SIGINT, before)
