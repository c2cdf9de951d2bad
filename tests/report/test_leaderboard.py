"""The leaderboard: ranking, gains by seed, and its files to the digit."""

import io
from dataclasses import replace
from typing import Any

from rich.console import Console

from tune_bisenet.records import Status, TrialState
from tune_bisenet.report.leaderboard import best_first, gains, seed_table, to_csv, to_markdown, to_rich


def state(run: str, best: float | None, *, seed: int = 0, status: Status = "finished", **more: Any) -> TrialState:
    trial = f"{run}-{seed}"
    return TrialState(trial=trial, run=run, seed=seed, status=status, num_epochs=8, best_miou=best, **more)


R01 = state("r01", 24.1, epochs=8, best_epoch=7, last_miou=23.987, pixel_accuracy=80.123, seconds=3725.44)
R02 = state("r02", 24.52, status="stopped", stopped_by="ASHA, epoch 2", epochs=2, best_epoch=2, last_miou=24.0)
R03 = state("r03", None, status="failed", error="OSError: [Errno 28] No space\nleft | on /disk")
TWO_SEEDS = [state("r01", 20.0), state("r01", 22.0, seed=1), state("r02", 21.0), state("r02", 25.0, seed=1)]


def shown(states: list[TrialState], *, captions: tuple[str, ...] = (), encoding: str = "utf-8") -> str:
    """Return what a terminal of 80 columns shows."""
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding=encoding, write_through=True), width=80)
    console.print(to_rich(states, captions=captions, baseline="r01"))
    return written.getvalue().decode()


def test_the_best_come_first_and_those_without_a_miou_last() -> None:
    twin = state("r04", 24.52)
    assert best_first([R03, R01, R02, twin]) == [R02, twin, R01, R03]


def test_a_gain_is_measured_against_the_baseline_of_the_same_seed() -> None:
    states = [
        state("r01", 20.0),
        state("r01", 30.0, seed=1),
        state("r02", 20.5),
        state("r02", 29.0, seed=1),
        state("r02", 99.0, seed=2),
        state("r03", None),
    ]
    # r02-2 has no baseline at its seed
    differences = {"r01-0": None, "r01-1": None, "r02-0": 0.5, "r02-1": -1.0, "r02-2": None, "r03-0": None}
    assert gains(states, baseline="r01") == differences
    assert set(gains(states, baseline="r09").values()) == {None}


def test_a_row_over_seeds_has_mean_and_sample_deviation_of_those_that_completed() -> None:
    # mIoU 21 and 25; gains of 1 and 3; the row stopped at seed 2 does not count
    columns, rows = seed_table([*TWO_SEEDS, state("r02", 90.0, seed=2, status="stopped")], baseline="r01")
    assert columns == ["run", "seeds", "best mIoU", "over r01"]
    assert rows == [["r02", "2 of 3", "23.00 ± 2.83", "+2.00 ± 1.41"], ["r01", "2 of 2", "21.00 ± 1.41", ""]]
    assert seed_table([R01, R03], baseline=None)[1] == [["r01", "1 of 1", "24.10"], ["r03", "0 of 1", ""]]


def test_the_csv_has_one_line_a_trial_in_declared_order() -> None:
    assert to_csv([R01, R02, R03], baseline="r01").split("\n") == [
        "run,seed,status,stopped_by,epochs,best_miou,best_epoch,last_miou,pixel_accuracy,seconds,"
        "trial,num_epochs,gain_over_r01,latency_ms,error",
        "r01,0,finished,,8,24.10,7,23.99,80.12,3725.4,r01-0,8,,,",
        'r02,0,stopped,"ASHA, epoch 2",2,24.52,2,24.00,,0.0,r02-0,8,0.42,,',
        "r03,0,failed,,0,,,,,0.0,r03-0,8,,,OSError: [Errno 28] No space left | on /disk",
        "",
    ]
    assert to_csv([], baseline="r05").endswith(",trial,num_epochs,gain_over_r05,latency_ms,error\n")
    assert "gain" not in to_csv([R01], baseline=None)


def test_the_markdown_table_is_aligned_best_first_and_marks_what_did_not_complete() -> None:
    assert to_markdown([R01, R02], baseline="r01", captions=["Proxy: 8 epochs."]) == (
        "Proxy: 8 epochs.\n"
        "\n"
        "| # | run | status                 | epochs | best mIoU | at |  last | over r01 | h:mm:ss |\n"
        "|--:|-----|------------------------|-------:|----------:|---:|------:|---------:|--------:|\n"
        "| 1 | r02 | stopped: ASHA, epoch 2 |    2/8 |   24.52 * |  2 | 24.00 |    +0.42 | 0:00:00 |\n"
        "| 2 | r01 | finished               |    8/8 |   24.10   |  7 | 23.99 |          | 1:02:05 |\n"
        "\n"
        "*: not trained to its last epoch, so its best is no final result.\n"
    )
    assert "*" not in to_markdown([R01], baseline="r01")
    assert "over" not in to_markdown([R01], baseline=None)
    assert r"No space left \| on /disk" in to_markdown([R03], baseline="r01")


def test_a_tiny_loss_is_not_written_as_minus_zero() -> None:
    assert "+0.00" in to_markdown([R01, state("r02", 24.099)], baseline="r01")


def test_the_terminals_table_fits_80_columns_and_lists_why_trials_ended_early() -> None:
    text = shown([R01, R02, R03], captions=("A long caption " * 10,))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("stopped: ASHA, epoch 2", "24.52 *", "+0.42", "1:02:05", "[Errno 28]", "A long caption"):
        assert words in text
    assert "24.52 *" in shown([R01, R02, R03], encoding="ascii")


def test_many_reasons_are_counted_instead_of_listed() -> None:
    text = shown([state(f"t{number:04d}", 10.0, status="stopped", stopped_by="too slow") for number in range(20)])
    assert "20 trials ended early" in text
    assert "t0003 stopped: too slow" not in text


def test_long_names_are_cut_with_a_sign_and_numbers_stay_whole() -> None:
    name = "sgd_lr0.025_warmup2500_poly0.9" * 2
    numbers: dict[str, Any] = {"epochs": 12, "best_epoch": 11, "last_miou": 59.36, "seconds": 12347.0}
    rows = [state(run, 59.86, seed=seed, **numbers) for run in ("r01", name) for seed in (0, 1)]
    for baseline in ("r01", name):
        file = io.StringIO()
        table = to_rich([replace(row, num_epochs=12) for row in rows], baseline=baseline)
        Console(file=file, width=80).print(table)
        lines = file.getvalue().splitlines()
        assert all(len(line) <= 80 for line in lines)
        cells = [set(line.split()) for line in lines if "finished" in line]
        assert len(cells) == 4
        assert all({"12/12", "59.86", "11", "59.36", "3:25:47"} <= row for row in cells)
        assert sum("…" in line for line in lines) >= 2
