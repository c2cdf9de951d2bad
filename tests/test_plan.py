"""From rows to runs: seeds, epochs, sizes, and a proxy's proportions worked out by hand."""

from typing import Any

import pytest
from rows import plain_row

from tune_bisenet.config import Run
from tune_bisenet.spaces import DataFacts, PlanError, RowOverrides, iterations_per_epoch, proxy_caption, resolve_runs

CITYSCAPES = DataFacts(num_train=2975, num_val=500, suggested_image_size=(512, 1024))
STREETS = DataFacts(num_train=96, num_val=24, suggested_image_size=(96, 192))  # 24 iterations an epoch


def row(name: str = "a", **fields: Any) -> Run:
    return plain_row(name, **fields)


def planned(run: Run, data: DataFacts = CITYSCAPES, **settings: Any) -> Run:
    (found,) = resolve_runs([run], RowOverrides(**settings), data)
    return found


# --- what the command line changes ------------------------------------------------------------------------------


def test_a_row_that_fits_is_planned_as_it_is_declared() -> None:
    declared = row(lovasz_after=35, image_size=(512, 1024))
    assert planned(declared) == declared


def test_iterations_are_full_batches() -> None:
    assert iterations_per_epoch(row(), CITYSCAPES) == 743
    assert iterations_per_epoch(row(batch_size=8), CITYSCAPES) == 371


def test_every_row_is_planned_with_every_seed_seed_by_seed() -> None:
    runs = resolve_runs([row("a"), row("b")], RowOverrides(seeds=(3, 5)), CITYSCAPES)
    assert [(run.name, run.seed) for run in runs] == [("a", 3), ("b", 3), ("a", 5), ("b", 5)]


def test_without_a_size_anywhere_the_data_suggests_one() -> None:
    assert planned(row(), DataFacts(2975, 500, (352, 480))).image_size == (352, 480)


def test_a_rows_own_size_is_kept_even_if_it_is_the_default() -> None:
    assert planned(row(image_size=(512, 1024)), DataFacts(2975, 500, (352, 480))).image_size == (512, 1024)


def test_a_size_on_the_command_line_overrides_both() -> None:
    assert planned(row(image_size=(512, 1024)), image_size=(256, 512)).image_size == (256, 512)


def test_epochs_on_the_command_line_override_the_rows() -> None:
    assert planned(row(), num_epochs=20).num_epochs == 20


# --- literal iterations -----------------------------------------------------------------------------------------


def test_without_a_proxy_iterations_mean_what_they_say() -> None:
    assert planned(row(), num_epochs=20).schedule.warmup_iterations == 1100


def test_a_warmup_that_does_not_fit_is_an_error_that_names_the_proxy() -> None:
    with pytest.raises(
        PlanError, match=r"a: a warm-up of 1100 iterations does not fit into 192 \(8 epochs of 24\).*--proxy"
    ):
        planned(row(), STREETS, num_epochs=8)


def test_a_warmup_needs_at_least_one_iteration_after_it() -> None:
    assert planned(row(warmup=191), STREETS, num_epochs=8).schedule.warmup_iterations == 191
    with pytest.raises(PlanError, match="a warm-up of 192 iterations does not fit into 192"):
        planned(row(warmup=192), STREETS, num_epochs=8)


def test_a_loss_switch_that_does_not_fit_is_an_error_that_names_the_proxy() -> None:
    with pytest.raises(PlanError, match=r"a: the switch to Lovász after epoch 35 lies outside .*8 epochs.*--proxy"):
        planned(row(warmup=10, lovasz_after=35), num_epochs=8)


def test_data_that_do_not_fill_one_batch_are_an_error() -> None:
    with pytest.raises(PlanError, match="a: 3 training images do not fill one batch of 4"):
        planned(row(warmup=0), DataFacts(3, 1, (64, 64)))


def test_a_size_off_the_grid_is_an_error_that_names_its_neighbours() -> None:
    with pytest.raises(PlanError, match=r"a: image size 100x200 is not a multiple of 32.* 96x192 and 128x224"):
        planned(row(), image_size=(100, 200))


def test_all_problems_of_all_rows_come_together() -> None:
    rows = [row("long"), row("fine", warmup=10), row("late", warmup=10, lovasz_after=35), row("longer", warmup=2500)]
    with pytest.raises(PlanError) as refusal:
        resolve_runs(rows, RowOverrides(num_epochs=8), STREETS)
    assert [problem.split(":")[0] for problem in refusal.value.problems] == ["long", "late", "longer"]
    assert str(refusal.value) == "\n".join(refusal.value.problems)


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
    found = planned(row(warmup=warmup), STREETS, num_epochs=num_epochs, proxy=True)
    assert found.schedule.warmup_iterations == expected
    assert found.schedule.power == 0.9


@pytest.mark.parametrize(
    ("num_epochs", "switch"),
    [(8, 6), (50, 35), (10, 7), (2, 1), (1, 0)],  # 35 of 50: 5.6, 35, 7, 1.4, 0.7 (which must leave an epoch)
)
def test_a_proxy_keeps_the_loss_switchs_share_of_the_epochs(num_epochs: int, switch: int) -> None:
    found = planned(row(lovasz_after=35), STREETS, num_epochs=num_epochs, proxy=True)
    assert found.loss.lovasz_after == switch


def test_a_proxy_on_the_tables_own_scale_changes_nothing() -> None:
    scale_of_the_table = DataFacts(num_train=2000, num_val=500, suggested_image_size=(512, 1024))
    declared = row(warmup=2500, lovasz_after=35, image_size=(512, 1024))
    assert planned(declared, scale_of_the_table, proxy=True) == declared


def test_a_proxy_changes_nothing_but_what_is_counted_in_iterations_or_epochs() -> None:
    declared = row(lovasz_after=35)
    found = planned(declared, STREETS, num_epochs=8, proxy=True)
    changed = {key for key, value in found.model_dump().items() if value != declared.model_dump()[key]}
    assert changed == {"num_epochs", "image_size", "schedule", "loss"}
    assert found.loss.aux_weight == declared.loss.aux_weight


def test_a_proxy_is_never_guessed() -> None:
    assert not RowOverrides().proxy


def test_a_proxy_says_so_with_its_scale() -> None:
    run = planned(row(), STREETS, num_epochs=8, proxy=True)
    caption = proxy_caption(run, STREETS)
    assert caption.startswith("Proxy: 8 epochs of 24 iterations")
    assert "500 an epoch" in caption
