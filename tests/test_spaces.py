"""The ten runs as their table has them, typed in again by hand; and how a space is found, checked and printed."""

from pathlib import Path

import pytest
from rows import plain_row

from tune_bisenet import spaces
from tune_bisenet.config import Expect, Run
from tune_bisenet.spaces import Grid, Sampled, SpaceError


def row(name: str, expect: Expect | None = None) -> Run:
    return plain_row(name, warmup=10, expect=expect)


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
    ("r03", (57, 59),     None,       None,  "r01"),
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


def test_the_verdict_on_accumulation_says_what_it_cannot_do() -> None:
    notes = {run.name: run.expect.note for run in spaces.load_space("runs10").runs if run.expect and run.expect.note}
    assert list(notes) == ["r06"]
    assert "BatchNorm" in notes["r06"]


def test_no_two_of_the_ten_runs_train_the_same() -> None:
    assert len({run.fingerprint() for run in spaces.load_space("runs10").runs}) == 10


def test_the_baseline_is_the_row_most_others_are_measured_against() -> None:
    assert spaces.load_space("runs10").baseline == "r01"
    assert Grid("no promise", (row("a"), row("b"))).baseline is None


# --- a grid -----------------------------------------------------------------------------------------------------


def test_names_must_differ() -> None:
    with pytest.raises(ValueError, match="the row a is declared 2 times: give each row its own name"):
        Grid("twice", (row("a"), row("b"), row("a")))


def test_an_expectation_must_point_at_a_row() -> None:
    with pytest.raises(
        ValueError, match="the expectation of a is measured against r01, which is not a row of this space"
    ):
        Grid("nowhere", (row("a", Expect(gain=(0, 1), over="r01")),))
    with pytest.raises(ValueError, match="the expectation of a is measured against b, which is not a row"):
        Grid("nowhere", (row("a", Expect(miou=(0, 1), sooner_than="b")),))


def test_a_grid_needs_a_row() -> None:
    with pytest.raises(ValueError, match="the space has no rows"):
        Grid("empty", ())


def test_all_that_is_wrong_with_a_grid_is_said_at_once() -> None:
    with pytest.raises(ValueError, match=r"(?s)the row a is declared 2 times.*measured against c"):
        Grid("twice and nowhere", (row("a"), row("a"), row("b", Expect(gain=(0, 1), over="c"))))


def test_rows_are_selected_by_name_and_stay_in_declared_order() -> None:
    grid = Grid("three", (row("a"), row("b"), row("c")))
    assert [run.name for run in spaces.select_rows(grid, ["c", "a"])] == ["a", "c"]
    assert spaces.select_rows(grid, None) == grid.runs


def test_unknown_rows_are_named_with_those_there_are() -> None:
    grid = Grid("two", (row("a"), row("b")))
    with pytest.raises(ValueError, match="no row x, y in this space: it has a, b"):
        spaces.select_rows(grid, ["a", "x", "y"])


# --- finding a space --------------------------------------------------------------------------------------------

A_SPACE = """
from tune_bisenet.config import SGD, CrossEntropy, Run, WarmupPoly
from tune_bisenet.spaces import Grid

SPACE = Grid("Mine", (
    Run(name="mine", optimizer=SGD(lr={lr}, momentum=0.9, weight_decay=0),
        schedule=WarmupPoly(warmup_iterations=5, power=1), loss=CrossEntropy(aux_weight=1),
        accumulation=1, max_grad_norm=None),
))
"""


def written(folder: Path, text: str) -> str:
    path = folder / "my_space.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("name", spaces.space_names())
def test_every_space_that_comes_with_the_package_can_be_loaded(name: str) -> None:
    assert isinstance(spaces.load_space(name), Grid | Sampled)


def test_the_ten_runs_come_with_the_package() -> None:
    assert "runs10" in spaces.space_names()


def test_a_space_of_ones_own_is_given_by_its_path(tmp_path: Path) -> None:
    space = spaces.load_space(written(tmp_path, A_SPACE.format(lr=0.5)))
    assert space.title == "Mine"
    assert [(run.name, run.optimizer.lr) for run in space.runs] == [("mine", 0.5)]


def test_a_space_that_was_changed_is_read_again(tmp_path: Path) -> None:
    spaces.load_space(written(tmp_path, A_SPACE.format(lr=0.5)))
    assert spaces.load_space(written(tmp_path, A_SPACE.format(lr=0.25))).runs[0].optimizer.lr == 0.25


def test_an_unknown_space_is_answered_with_those_there_are() -> None:
    with pytest.raises(
        SpaceError, match=r"the space runs11 cannot be used: there is none of that name.*runs10.*by its path"
    ):
        spaces.load_space("runs11")


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"there is no file .*nowhere\.py"):
        spaces.load_space(str(tmp_path / "nowhere.py"))


@pytest.mark.parametrize("text", ["x = 1", "SPACE = 3", ""])
def test_a_file_without_a_space_is_refused_saying_what_to_write(tmp_path: Path, text: str) -> None:
    with pytest.raises(
        SpaceError, match=r"defines no SPACE of type Grid or Sampled: end the file with SPACE = Grid\(title, runs\)"
    ):
        spaces.load_space(written(tmp_path, text))


def test_a_file_that_is_no_python_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"my_space\.py cannot be used"):
        spaces.load_space(written(tmp_path, "SPACE = Grid("))


def test_a_text_that_is_no_python_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "space.txt"
    path.write_text("hello")
    with pytest.raises(SpaceError, match=r"space.txt is not a Python file"):
        spaces.load_space(str(path))


def test_a_wrong_value_in_a_space_is_named_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(SpaceError, match=r"lr: Input should be greater than 0 \(given -1\)"):
        spaces.load_space(written(tmp_path, A_SPACE.format(lr=-1)))


def test_a_wrong_grid_in_a_file_is_refused_with_its_reason(tmp_path: Path) -> None:
    text = A_SPACE.format(lr=1) + "SPACE = Grid('Twice', SPACE.runs * 2)\n"
    with pytest.raises(SpaceError, match="the row mine is declared 2 times"):
        spaces.load_space(written(tmp_path, text))


# --- the table --------------------------------------------------------------------------------------------------


def test_the_table_of_the_ten_runs_says_all_that_tells_them_apart() -> None:
    lines = spaces.space_to_markdown(spaces.load_space("runs10").runs).splitlines()
    cells = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in lines}
    assert cells["r01"] == [
        "SGD lr 0.01, momentum 0.9, wd 0.0001",
        "warm-up 1100 to 0.01, poly 0.9",
        "CE, alpha 1.0",
        "–",
        "mIoU 55 to 57 %",
    ]
    assert cells["r04"][2] == "CE, alpha 0.4"
    assert cells["r05"][2] == "CE, alpha 1.0; after epoch 35 Lovász on main"
    assert cells["r06"][3:] == ["gradient accumulation × 2", "+1 to +2 over r01"]
    assert cells["r07"][3:] == ["gradient clipping, max norm 1.0", "+0.3 to +0.5 over r01"]
    assert cells["r08"][1] == "warm-up 2500 to 0.01, poly 0.9"
    assert cells["r09"][0] == "AdamW lr 0.001, wd 0.0001"
    assert cells["r09"][4] == "mIoU 57.5 to 58.5 %, sooner than r01"
    assert cells["r10"][2] == "class-weighted CE, alpha 1.0"


def test_the_table_is_markdown_with_aligned_columns() -> None:
    text = spaces.space_to_markdown(spaces.load_space("runs10").runs)
    lines = text.splitlines()
    assert text.endswith("|\n")
    assert len(lines) == 12
    assert len({len(line) for line in lines}) == 1
    assert set(lines[1]) == set("|- ")
