import csv
import io

import pytest
from rich.console import Console

from tune_bisenet.records import Status, TrialState
from tune_bisenet.report.leaderboard import best_first, gains, over_seeds, status_in_words, to_csv, to_markdown, to_rich


def standing(run: str, best: float | None, *, seed: int = 0, status: Status = "finished", **more: object) -> TrialState:
    record = {"trial": f"{run}-{seed}", "run": run, "seed": seed, "status": status, "num_epochs": 8}
    return TrialState.from_json(record | {"best_miou": best} | more)


R01 = standing("r01", 24.1, epochs=8, best_epoch=7, last_miou=23.987, pixel_accuracy=80.123, seconds=3725.44)
R02 = standing("r02", 24.52, status="stopped", stopped_by="ASHA, epoch 2", epochs=2, best_epoch=2, last_miou=24.0)
R03 = standing("r03", None, status="failed", error="OSError: [Errno 28] No space\nleft | on /disk")


def shown(
    standings: list[TrialState],
    *,
    width: int = 100,
    encoding: str = "utf-8",
    captions: tuple[str, ...] = (),
    baseline: str | None = "r01",
) -> str:
    written = io.BytesIO()
    console = Console(file=io.TextIOWrapper(written, encoding=encoding, write_through=True), width=width)
    console.print(to_rich(standings, captions=captions, baseline=baseline))
    return written.getvalue().decode()


# --- views ------------------------------------------------------------------------------------------------------


def test_the_best_come_first_and_those_without_a_miou_last() -> None:
    twin = standing("r04", 24.52)
    assert best_first([R03, R01, R02, twin]) == [R02, twin, R01, R03]


def test_a_gain_is_measured_against_the_baseline_of_the_same_seed() -> None:
    standings = [
        standing("r01", 20.0),
        standing("r01", 30.0, seed=1),
        standing("r02", 20.5),
        standing("r02", 29.0, seed=1),
        standing("r02", 99.0, seed=2),
        standing("r03", None),
    ]
    assert gains(standings) == {
        "r01-0": None,
        "r01-1": None,
        "r02-0": 0.5,
        "r02-1": -1.0,
        "r02-2": None,  # no baseline at this seed
        "r03-0": None,
    }


def test_nothing_gains_over_a_row_that_is_not_there() -> None:
    assert gains([R01, R02], baseline="r09") == {"r01-0": None, "r02-0": None}


def test_a_row_over_seeds_has_mean_and_sample_deviation() -> None:
    standings = [
        standing("r01", 20.0),
        standing("r01", 22.0, seed=1),
        standing("r02", 21.0),
        standing("r02", 25.0, seed=1),
        standing("r02", 90.0, seed=2, status="stopped"),
    ]
    second, first = over_seeds(standings)
    assert (first.run, first.miou, first.gain, first.gain_sd) == ("r01", 21.0, None, None)
    assert (second.run, second.trials, second.finished, second.miou) == ("r02", 3, 2, 23.0)
    assert second.miou_sd == pytest.approx(8**0.5)
    assert second.gain == 2.0  # 1 at seed 0, 3 at seed 1
    assert second.gain_sd == pytest.approx(2**0.5)


def test_one_seed_has_no_deviation() -> None:
    (row,) = over_seeds([R01])
    assert (row.miou, row.miou_sd) == (24.1, None)


# --- CSV --------------------------------------------------------------------------------------------------------


def test_the_csv_has_one_line_a_trial_in_declared_order() -> None:
    assert to_csv([R01, R02, R03]).split("\n") == [
        "run,seed,status,stopped_by,epochs,best_miou,best_epoch,last_miou,pixel_accuracy,seconds,"
        "trial,num_epochs,gain_over_r01,latency_ms,error",
        "r01,0,finished,,8,24.10,7,23.99,80.12,3725.4,r01-0,8,,,",
        'r02,0,stopped,"ASHA, epoch 2",2,24.52,2,24.00,,0.0,r02-0,8,0.42,,',
        "r03,0,failed,,0,,,,,0.0,r03-0,8,,,OSError: [Errno 28] No space left | on /disk",
        "",
    ]


def test_the_csv_of_no_trials_is_its_header() -> None:
    assert to_csv([], baseline="r05").endswith(",trial,num_epochs,gain_over_r05,latency_ms,error\n")


def test_words_with_commas_and_quotes_come_back_from_the_csv() -> None:
    words = 'said "no", twice'
    (line,) = csv.DictReader(io.StringIO(to_csv([standing("r01", 1.0, status="stopped", stopped_by=words)])))
    assert line["stopped_by"] == words


# --- tables to read ---------------------------------------------------------------------------------------------


def test_the_markdown_table_is_aligned_best_first_and_marks_what_did_not_end() -> None:
    assert to_markdown([R01, R02], captions=["Proxy: 8 epochs."]) == (
        "Proxy: 8 epochs.\n"
        "\n"
        "| # | run | status                 | epochs | best mIoU | at |  last | over r01 | h:mm:ss |\n"
        "|--:|-----|------------------------|-------:|----------:|---:|------:|---------:|--------:|\n"
        "| 1 | r02 | stopped: ASHA, epoch 2 |    2/8 |   24.52 * |  2 | 24.00 |    +0.42 | 0:00:00 |\n"
        "| 2 | r01 | finished               |    8/8 |   24.10   |  7 | 23.99 |          | 1:02:05 |\n"
        "\n"
        "*: not trained to its last epoch, so its best is no final result.\n"
    )


def test_a_search_that_went_to_its_end_needs_no_note() -> None:
    assert "*" not in to_markdown([R01])


def test_a_bar_in_an_error_does_not_break_the_markdown_table() -> None:
    line = next(line for line in to_markdown([R01, R03]).splitlines() if "r03" in line)
    assert r"No space left \| on /disk" in line


def test_several_seeds_are_told_apart_and_summarised() -> None:
    standings = [
        standing("r01", 20.0),
        standing("r01", 22.0, seed=1),
        standing("r02", 21.0),
        standing("r02", 25.0, seed=1),
    ]
    text = to_markdown(standings)
    assert "| # | run | seed |" in text
    assert text.endswith(
        "| run |  seeds |    best mIoU |     over r01 |\n"
        "|-----|-------:|-------------:|-------------:|\n"
        "| r02 | 2 of 2 | 23.00 ± 2.83 | +2.00 ± 1.41 |\n"
        "| r01 | 2 of 2 | 21.00 ± 1.41 |              |\n"
    )


def test_a_tiny_loss_is_not_written_as_minus_zero() -> None:
    assert "+0.00" in to_markdown([R01, standing("r02", 24.099)])


def test_a_status_is_told_in_words() -> None:
    assert status_in_words(R01) == "finished"
    assert status_in_words(R02) == "stopped: ASHA, epoch 2"
    assert status_in_words(R03) == "failed: OSError: [Errno 28] No space left | on /disk"


def test_the_terminals_table_fits_80_columns_and_says_below_why_a_run_ended_early() -> None:
    text = shown([R01, R02, R03], width=80, captions=("A long caption " * 10,))
    assert max(map(len, text.splitlines())) <= 80
    for words in ("stopped: ASHA, epoch 2", "24.52 *", "+0.42", "1:02:05", "[Errno 28]", "A long caption"):
        assert words in text


def test_a_terminal_that_knows_only_ascii_can_show_the_table() -> None:
    assert "24.52 *" in shown([R01, R02, R03], width=80, encoding="ascii")


def test_without_a_baseline_no_table_speaks_of_gains() -> None:
    standings = [
        TrialState(trial="a", run="a", seed=0, num_epochs=2),
        TrialState(trial="b", run="b", seed=1, num_epochs=2),
    ]
    assert "gain" not in to_csv(standings, baseline=None)
    assert "| over" not in to_markdown(standings, baseline=None)
    assert "over" not in shown(standings, baseline=None)


def test_a_second_goal_stands_where_the_last_miou_would() -> None:
    fast = standing("r02", 24.5, latency_ms=12.34)
    text = shown([R01, fast, standing("r02", 24.0, seed=1)], width=80)
    assert " ms " in text
    assert "12.3" in text
    assert "last" not in text


def test_eighty_columns_hold_several_seeds_and_long_names() -> None:
    text = shown(
        [standing(name, 24.5, seed=seed, num_epochs=8, epochs=8) for name in ("r01", "t0011") for seed in (0, 1)],
        width=80,
    )
    assert "finished" in text
    assert "0:00:00" in text


def test_many_reasons_are_counted_instead_of_listed() -> None:
    text = shown([standing(f"t{number:04d}", 10.0, status="stopped", stopped_by="too slow") for number in range(20)])
    assert "20 trials ended early" in text
    assert "t0003 stopped: too slow" not in text
