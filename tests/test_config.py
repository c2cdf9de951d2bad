"""Rows are frozen, strict and portable; a mistake in one is named with its place and the rule."""

from typing import Any

import pytest
from pydantic import ValidationError

from search_spaces.runs10 import SPACE as RUNS10
from tune_bisenet.config import (
    SGD,
    AdamW,
    Expect,
    Run,
    TrialContext,
    check_image_size,
    fingerprint,
    parting_epochs,
    shared_beginnings,
    trial_name,
)

ROW: dict[str, Any] = {
    "name": "r01",
    "optimizer": {"kind": "sgd", "lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
    "schedule": {"warmup_iterations": 1100, "power": 0.9},
    "loss": {"kind": "ce", "aux_weight": 1.0},
    "accumulation": 1,
    "max_grad_norm": None,
}
ADAMW = {"kind": "adamw", "lr": 0.001, "weight_decay": 0.1}


def row(**changes: object) -> Run:
    return Run.model_validate(ROW | changes)


# --- a row ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("column", ["optimizer", "name"])
def test_a_row_has_a_name_and_an_optimizer(column: str) -> None:
    fields = {key: value for key, value in ROW.items() if key != column}
    with pytest.raises(ValidationError, match=rf"(?m)^{column}\n  Field required"):
        Run.model_validate(fields)


def test_a_row_is_an_immutable_value() -> None:
    run = row()
    with pytest.raises(ValidationError, match="frozen"):
        run.num_epochs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        run.optimizer.lr = 3.0  # type: ignore[misc]
    assert len({row(), row(), row(seed=1)}) == 2


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        ({"expect": {"gain": (0.3, 0.5), "over": "r00"}, "max_grad_norm": 1.0, "image_size": (64, 128)}, SGD),
        ({"optimizer": ADAMW, "loss": {"kind": "weighted_ce", "aux_weight": 0.4}}, AdamW),
    ],
)
def test_a_row_survives_the_way_through_plain_values(changes: dict[str, Any], kind: type) -> None:
    run = row(**changes)
    assert isinstance(run.optimizer, kind)
    assert Run.model_validate(run.model_dump()) == run
    assert Run.model_validate(run.model_dump(mode="json")) == run
    assert Run.model_validate(run.model_dump(mode="json")).fingerprint() == run.fingerprint()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"learning_rate": 0.1}, r"learning_rate\n  Extra inputs"),
        ({"optimizer": ROW["optimizer"] | {"nesterov": True}}, r"optimizer\.sgd\.nesterov\n  Extra inputs"),
        ({"optimizer": ROW["optimizer"] | {"lr": -1}}, r"optimizer\.sgd\.lr\n  .*greater than 0"),
        ({"optimizer": ROW["optimizer"] | {"lr": float("nan")}}, r"optimizer\.sgd\.lr\n  .*finite"),
        ({"optimizer": ROW["optimizer"] | {"momentum": 1.0}}, r"optimizer\.sgd\.momentum\n  .*less than 1"),
        ({"optimizer": ROW["optimizer"] | {"kind": "lion"}}, r"optimizer\n  .*'lion' .*'sgd', 'adamw'"),
        ({"optimizer": ADAMW | {"momentum": 0.9}}, r"momentum\n  Extra inputs"),
        ({"schedule": {"warmup_iterations": -1, "power": 0.9}}, r"schedule\.warmup_iterations\n"),
        ({"loss": {"kind": "ce", "aux_weight": -0.1}}, r"loss\.ce\.aux_weight\n"),
        ({"accumulation": 0}, r"accumulation\n  .*greater than 0"),
        ({"max_grad_norm": 0}, r"max_grad_norm\n  .*greater than 0"),
        ({"batch_size": 1}, r"batch_size\n  .*equal to 2"),
        ({"num_epochs": 0}, r"num_epochs\n  .*greater than 0"),
        ({"seed": -1}, r"seed\n  .*equal to 0"),
        ({"name": "../r01"}, r"name\n"),
        ({"name": "r01-s1"}, r"name\n  .*r01-s1"),
        ({"augment": {"min_scale": 2.0, "max_scale": 1.0}}, r"min_scale 2\.0 .* max_scale 1\.0"),
        ({"image_size": (500, 1000)}, r"500x1000 .* 32 .*480x992 and 512x1024"),
        ({"loss": ROW["loss"] | {"lovasz_after": 35}, "num_epochs": 35}, r"epoch 35 .*35 epochs.*--proxy"),
    ],
)
def test_a_wrong_row_is_refused_with_the_place_and_the_rule(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        row(**changes)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, r"either miou=\(low, high\) or gain=\(low, high\)"),
        ({"miou": (55, 57), "gain": (1, 2), "over": "r01"}, r"either miou=\(low, high\) or gain=\(low, high\)"),
        ({"gain": (0.3, 0.5)}, r'gain=\(0.3, 0.5\), over="r01"'),
        ({"miou": (55, 57), "over": "r01"}, "a gain needs the row"),
        ({"miou": (57, 55)}, r"\(57, 55\)"),
    ],
)
def test_an_expectation_is_one_range_or_one_gain_over_a_row(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        Expect.model_validate(fields)
    assert Expect(miou=(55, 57)).miou == (55.0, 57.0)
    assert Expect(gain=(0.0, 0.0), over="r01", sooner_than="r01").over == "r01"


@pytest.mark.parametrize(
    ("size", "down", "up"),
    [((33, 64), "32x64", "64x64"), ((512, 1000), "512x992", "512x1024"), ((-5, 1), "32x32", "32x32")],
)
def test_other_sizes_are_refused_naming_their_neighbours(size: tuple[int, int], down: str, up: str) -> None:
    with pytest.raises(ValueError, match=rf"{down} and {up}\."):
        check_image_size(size)


# --- fingerprints -----------------------------------------------------------------------------------------------

OTHER_TRAINING: dict[str, Any] = {
    "optimizer lr": {"optimizer": ROW["optimizer"] | {"lr": 0.02}},
    "optimizer momentum": {"optimizer": ROW["optimizer"] | {"momentum": 0.8}},
    "optimizer weight_decay": {"optimizer": ROW["optimizer"] | {"weight_decay": 0.0}},
    "optimizer kind": {"optimizer": {"kind": "adamw", "lr": 0.01, "weight_decay": 1e-4}},
    "schedule warmup_iterations": {"schedule": ROW["schedule"] | {"warmup_iterations": 1099}},
    "schedule power": {"schedule": ROW["schedule"] | {"power": 1.0}},
    "schedule start_lr": {"schedule": ROW["schedule"] | {"start_lr": 0.0}},
    "loss aux_weight": {"loss": ROW["loss"] | {"aux_weight": 0.4}},
    "loss lovasz_after": {"loss": ROW["loss"] | {"lovasz_after": 35}},
    "loss kind": {"loss": ROW["loss"] | {"kind": "weighted_ce"}},
    "accumulation": {"accumulation": 2},
    "max_grad_norm": {"max_grad_norm": 1.0},
    "num_epochs": {"num_epochs": 49},
    "batch_size": {"batch_size": 8},
    "image_size": {"image_size": (256, 512)},
    "augment min_scale": {"augment": {"min_scale": 0.5}},
    "augment max_scale": {"augment": {"max_scale": 1.5}},
    "augment flip": {"augment": {"flip": 0.0}},
    "augment jitter": {"augment": {"jitter": 0.0}},
    "head_width": {"head_width": 64},
    "decay_norms_and_biases": {"decay_norms_and_biases": False},
    "seed": {"seed": 1},
    "stream": {"stream": 1},
}


def test_each_field_that_decides_what_is_trained_changes_the_fingerprint() -> None:
    prints = [row().fingerprint(), *(row(**changes).fingerprint() for changes in OTHER_TRAINING.values())]
    assert len(set(prints)) == len(prints)


def test_the_list_above_knows_every_field() -> None:
    listed = {place.split()[0] for place in OTHER_TRAINING}
    assert listed == set(Run.model_fields) - {"name", "expect"}
    run = row()
    for part in ("optimizer", "schedule", "loss", "augment"):
        assert {place.split()[1] for place in OTHER_TRAINING if place.startswith(part)} == set(
            run.model_dump()[part]
        ) | ({"kind"} if part in ("optimizer", "loss") else set())


def test_name_and_expectation_do_not_change_the_fingerprint() -> None:
    assert row().fingerprint() == row(name="other", expect={"miou": (55, 57)}).fingerprint()


def test_equal_numbers_have_one_fingerprint_however_they_are_written() -> None:
    assert row(max_grad_norm=1).fingerprint() == row(max_grad_norm=1.0).fingerprint()
    assert row(image_size=[512, 1024]).fingerprint() == row().fingerprint()


def test_a_fingerprint_is_16_hex_digits_and_does_not_heed_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1})
    assert len(row().fingerprint()) == 16
    int(row().fingerprint(), 16)


# --- where a run is trained -------------------------------------------------------------------------------------------


def context(**changes: object) -> TrialContext:
    fields: dict[str, Any] = {
        "data": "streets",
        "packs": {"512x1024": "/cache/pack"},
        "data_digests": {"512x1024": "abc", "256x512": "def"},
        "cache_dir": "/cache",
        "backbone": "none",
        "backbone_digest": "none",
        "precision": "fp32",
        "storage": "/results/search",
        "threads_per_trial": 1,
        "gpu_share": 0.0,
    }
    return TrialContext.model_validate(fields | changes)


def test_the_identity_follows_everything_that_decides_the_weights_and_nothing_else() -> None:
    same = context().identity(row())
    others = [
        context().identity(row(seed=1)),
        context(data_digests={"512x1024": "other"}).identity(row()),
        context(backbone_digest="other").identity(row()),
        context(precision="bf16").identity(row()),
    ]
    assert len({same, *others}) == 5
    elsewhere = context(cache_dir="/tmp", storage="s3://bucket", threads_per_trial=8, gpu_share=0.5)
    assert elsewhere.identity(row(name="other")) == same
    small = row(image_size=(256, 512))
    assert context().identity(small) == context(data_digests={"256x512": "def"}).identity(small)


def test_a_trial_is_named_by_its_row_and_by_a_seed_that_is_not_the_default() -> None:
    assert [trial_name(row(seed=seed), default_seed=2) for seed in (2, 3)] == ["r01", "r01-s3"]
    assert trial_name(row(seed=2), default_seed=None) == "r01-s2"


# --- rows that begin as the same training -----------------------------------------------------------------------------


def test_of_the_ten_rows_only_r01_and_r05_begin_alike() -> None:
    runs = [run.model_copy(update={"seed": seed}) for seed in (0, 1) for run in RUNS10.runs]
    pairs = parting_epochs({(run.name, run.seed): run for run in runs})
    assert pairs == {(("r01", seed), ("r05", seed)): 35 for seed in (0, 1)}
    assert shared_beginnings(runs) == {runs[0].beginning(): (35,)}


def test_rows_part_at_the_earlier_switch_and_equal_ones_never() -> None:
    def switching(after: int | None, **changes: object) -> Run:
        return row(loss={"kind": "ce", "aux_weight": 1.0, "lovasz_after": after}, **changes)

    runs = {"never": switching(None), "late": switching(30), "early": switching(20), "again": switching(None)}
    at_once = {"at once": switching(0), "other chance": switching(30, stream=1)}
    assert parting_epochs(runs | at_once) == {
        ("never", "late"): 30,
        ("never", "early"): 20,
        ("never", "again"): 50,
        ("late", "early"): 20,
        ("late", "again"): 30,
        ("early", "again"): 20,
    }
    assert shared_beginnings([*runs.values(), *at_once.values()]) == {row().beginning(): (20, 30)}
