"""What the terminal says before and after a search: complete, and fit to be copied."""

import io
from collections.abc import Sequence
from pathlib import Path

import pytest
from driving import write_frames, write_sampled_space, write_space
from rich.console import Console

from tune_bisenet import briefing, options
from tune_bisenet.config import Resources, Run
from tune_bisenet.records import TrialState
from tune_bisenet.search import prepare
from tune_bisenet.search.prepare import CACHE_VARIABLE, PreparedSearch
from tune_bisenet.search.tuner import SessionOutcome

TWO_CORES = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)


def flight_of(place: Path, **flags: object) -> PreparedSearch:
    asked, mistyped = options.parse_options(
        {
            "space": str(place / "space.py"),
            "data": str(place / "frames"),
            "backbone": "none",
            "storage": str(place / "a long name [of a folder] for many results"),
            "name": "mine",
            **flags,
        }
    )
    return prepare.prepare_search(asked, mistyped, default_name="default", progress=lambda _done, _total: None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path / "cache"))
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {f"r{row:02}": 0.01 for row in range(1, 6)}, num_epochs=4, baseline="r01")
    return tmp_path


def runs_of(flight: PreparedSearch) -> dict[str, Run]:
    return {f"{run.name}-s{run.seed}": run for run in flight.survey.runs}


def plan_of(
    flight: PreparedSearch, resources: Resources = TWO_CORES, standings: Sequence[TrialState] = ()
) -> dict[str, str]:
    """The page by its titles."""
    runs = {} if flight.sampling else runs_of(flight)
    outlook = briefing.flight_outlook(flight, resources, standings)
    return dict(briefing.plan_lines(flight, outlook, runs))


def test_the_plan_says_what_where_and_with_what(place: Path) -> None:
    plan = plan_of(flight_of(place))
    assert plan["search"] == "mine: rows of a test"
    assert "5 (r01-s0, r02-s0, r03-s0, r04-s0, r05-s0), 20 epochs, 40 iterations in all" in plan["trials"]
    assert "8 training and 3 validation images, 32x64" in plan["data"]
    assert plan["backbone"] == "ResNet-18, from scratch"
    assert plan["device"] == "2 trials at once, 1 CPU core each, fp32"
    assert plan["results"] in plan["watch"]
    assert "--resume --name mine --storage" in plan["resume"]
    assert "note" not in plan


def test_many_trials_are_shortened(place: Path) -> None:
    plan = plan_of(flight_of(place, seeds="0,1,2"))
    assert "15 (r01-s0, r02-s0, r03-s0, r04-s0, … r05-s2)" in plan["trials"]


def test_a_proxy_is_said_to_be_one(place: Path) -> None:
    assert plan_of(flight_of(place, proxy=True))["note"].startswith("Proxy: 4 epochs")


def test_the_plan_says_what_the_scheduler_may_cost(place: Path) -> None:
    assert "stops the truly best row in" in plan_of(flight_of(place))["scheduler"]
    assert "every run is trained to its end" in plan_of(flight_of(place, scheduler="fifo"))["scheduler"]


def test_shares_of_a_gpu_are_shown(place: Path) -> None:
    resources = Resources(cpus_per_trial=4, gpus_per_trial=0.5, max_concurrent=None, concurrency=2)
    assert plan_of(flight_of(place), resources)["device"] == "2 trials at once, 0.5 GPU, 4 CPU cores each, fp32"


def test_paths_and_commands_survive_a_narrow_terminal(place: Path) -> None:
    flight = flight_of(place)
    screen = io.StringIO()
    briefing.print_plan(Console(file=screen, width=40), flight, TWO_CORES, runs_of(flight), [])
    said = screen.getvalue()
    for title, words in plan_of(flight).items():
        if title != "disk":  # what is free there changes meanwhile
            assert words in said, "whole, on one line, brackets included"


# --- what it will take ----------------------------------------------------------------------------------------------

ONE_GPU_EACH = Resources(cpus_per_trial=4, gpus_per_trial=1, max_concurrent=None, concurrency=2)


def test_without_a_speed_the_page_says_how_to_get_one(place: Path) -> None:
    plan = plan_of(flight_of(place))
    assert "--plan times some iterations, --images-per-second X states it" in plan["speed"]
    assert not {"time", "cost"} & set(plan)


def test_a_given_speed_gives_time_and_hours(place: Path) -> None:
    """Five trials of four epochs: 8 images to train on and 3 to validate, a third as dear, so 9 s at 1 image/s."""
    plan = plan_of(flight_of(place, images_per_second="1", scheduler="fifo"))
    assert plan["speed"].startswith("1 images per second")
    assert plan["time"] == "about 2 min 0 s for all to their end, 2 at once, after Ray's start"  # three rounds of 38.64
    assert plan["cost"] == f"{5 * 38.64 / 2 / 3600:.3g} machine-hours"


def test_gpu_hours_have_a_price_and_more_gpus_take_less_time(place: Path) -> None:
    flight = flight_of(place, images_per_second="0.01", scheduler="fifo", price_per_gpu_hour="2.5")
    plan = plan_of(flight, ONE_GPU_EACH)
    hours = 5 * (4 * 900.6 + 0.24) / 3600
    assert plan["cost"] == f"{hours:.3g} GPU-hours = {hours * 2.5:,.2f} to pay"
    assert plan["time"] == (
        "about 3 h 0 min for all to their end, 2 at once, after Ray's start; 2 h 0 min with 2 times as many GPUs; "
        "1 h 0 min with 4 times as many GPUs"
    )
    assert "of a card for a trial's tensors (estimated)" in plan["memory"]


def test_a_price_without_gpus_is_said_to_buy_nothing(place: Path) -> None:
    plan = plan_of(flight_of(place, images_per_second="1", price_per_gpu_hour="2.5"))
    assert "to pay" not in plan["cost"]
    assert "no price: trials here have no GPU" in plan["cost"]


def test_what_asha_saves_is_told_in_time_and_hours(place: Path) -> None:
    plan = plan_of(flight_of(place, images_per_second="1"))
    assert "never r01" in plan["scheduler"]
    assert "if asha saves what it may" in plan["time"]
    assert "if asha saves what it may" in plan["cost"]


def test_limits_that_come_first_are_said_to(place: Path) -> None:
    flight = flight_of(place, images_per_second="1", time_budget="1m", gpu_hours="0.01")
    plan = plan_of(flight, ONE_GPU_EACH)
    assert "--time-budget 1m ends it before that" in plan["time"]
    assert "--gpu-hours 0.01 ends it before that" in plan["cost"]


def test_a_resumed_search_goes_by_the_speed_it_had_and_counts_what_is_left(place: Path) -> None:
    done = [standing(f"r{row:02}", status="finished", epochs=4, seconds=80.0) for row in range(1, 5)]
    plan = plan_of(flight_of(place, scheduler="fifo"), standings=done)
    assert plan["speed"] == "20.0 s an epoch, as in earlier sessions of this search"
    assert plan["time"].startswith("about 1 min 23 s for all to their end")
    everything = [standing(f"r{row:02}", status="finished", epochs=4, seconds=80.0) for row in range(1, 6)]
    assert plan_of(flight_of(place), standings=everything)["time"] == "nothing is left to train"


def test_disk_is_told_for_nodes_and_storage(place: Path) -> None:
    """Of SGD's 13.4 million weights of four bytes, `last.pt` has two of each, `best.pt` one."""
    disk = plan_of(flight_of(place))["disk"]
    assert "of packed frames on every node" in disk
    assert "53.8 MB a trial, 215 MB more until it has ended: at most 699 MB in all" in disk


def page(flight: PreparedSearch, *, width: int = 100) -> str:
    screen = io.StringIO()
    runs = {} if flight.sampling else runs_of(flight)
    briefing.print_plan(Console(file=screen, width=width), flight, TWO_CORES, runs, [])
    return screen.getvalue()


def test_every_promise_has_its_power_on_the_page(place: Path) -> None:
    said = page(flight_of(place))
    assert "one seed confirms nothing" in said
    (line,) = (line for line in said.splitlines() if line.split()[:1] == ["r03"])
    assert "0 to +5 over r01" in line
    assert line.split()[-2:] == ["3", "seeds"]
    several = page(flight_of(place, seeds="0,1,2"))
    assert "one seed confirms nothing" not in several
    (line,) = (line for line in several.splitlines() if line.split()[:1] == ["r03"])
    assert " 3  " in line


def test_the_page_of_ten_rows_fits_a_screen(place: Path) -> None:
    said = page(flight_of(place, space="runs10", proxy=True, images_per_second="1"), width=120)
    assert len(said.splitlines()) <= 45


def test_in_a_terminal_prose_is_broken_under_itself_and_paths_are_not(place: Path) -> None:
    flight = flight_of(place)
    screen = io.StringIO()
    console = Console(file=screen, width=60, force_terminal=True, color_system=None)
    briefing.print_plan(console, flight, TWO_CORES, runs_of(flight), [])
    lines = screen.getvalue().splitlines()
    assert f"results    {flight.survey.folder.uri}" in lines
    start = next(number for number, line in enumerate(lines) if line.startswith("scheduler"))
    assert len(lines[start]) <= 60
    assert lines[start + 1].startswith(" " * 11)


def standing(trial: str, **known: object) -> TrialState:
    return TrialState.from_json({"trial": trial, "run": trial, "seed": 0, "num_epochs": 4, **known})


def test_at_the_end_it_says_what_failed_and_how_to_go_on(place: Path) -> None:
    flight = flight_of(place)
    standings = [standing("r01", status="finished", epochs=4, best_miou=12.3, best_epoch=4, last_miou=12.3)]
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    failed = standing("r02", status="failed", error="[no] memory")
    briefing.print_results(console, flight, [*standings, failed], page="there/report.html", outcome=SessionOutcome())
    assert "report:  there/report.html" in screen.getvalue()
    said = screen.getvalue()
    assert "12.30" in said
    assert "[no] memory" in " ".join(said.split())
    assert "failed: r02. Try these again with --resume --name mine --storage " in said
    assert f"results: {flight.survey.folder.uri}" in said
    assert "interrupted" not in said


def test_after_a_signal_it_says_how_to_go_on(place: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=40)
    briefing.print_results(
        console, flight_of(place), [standing("r01")], page=None, outcome=SessionOutcome(signal_number=15)
    )
    assert "interrupted. Go on with --resume --name mine --storage " in screen.getvalue()
    assert "failed" not in screen.getvalue()


# --- a sampled search -----------------------------------------------------------------------------------------------


def sampled_flight(place: Path, **flags: object) -> PreparedSearch:
    write_sampled_space(place / "sampled.py", num_epochs=4)
    return flight_of(place, space=str(place / "sampled.py"), **flags)


def endings(flight: PreparedSearch, outcome: SessionOutcome, *standings: TrialState) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    briefing.print_results(console, flight, standings, page=None, best=["t0003 is the best."], outcome=outcome)
    return screen.getvalue()


def test_the_plan_of_a_sampled_search_says_what_bounds_it_and_where_its_study_is(place: Path) -> None:
    flight = sampled_flight(place, trials="7", time_budget="90m", gpu_hours="2")
    plan = plan_of(flight)
    assert plan["trials"] == "7, the rows a, b first, 4 epochs of 2 iterations each"
    assert plan["sampler"] == "tpe, for miou"
    assert plan["limits"] == "ends after 1h30m of time or 2 GPU-hours, whichever comes first"
    assert plan["study"] == f"optuna-dashboard sqlite:///{flight.survey.folder.path}/study.db"


def test_without_any_limit_a_sampled_search_has_forty_trials(place: Path) -> None:
    assert plan_of(sampled_flight(place))["trials"].startswith("40, ")
    flight = sampled_flight(place, time_budget="8h")
    assert plan_of(flight)["trials"].startswith("as many as time allows, ")


def test_a_sampled_search_says_what_it_will_take(place: Path) -> None:
    flight = sampled_flight(place, trials="7", confirm="2", images_per_second="1", scheduler="fifo")
    plan = plan_of(flight)
    assert "then up to 6 with fresh seeds" in plan["trials"]
    assert plan["time"].startswith("about 4 min 30 s for all to their end, 2 at once")  # 13 trials, 7 rounds
    assert "confirms nothing; --confirm K trains its best anew" in page(flight)


def test_a_search_that_only_time_ends_says_how_many_trials_fit(place: Path) -> None:
    plan = plan_of(sampled_flight(place, time_budget="1h", images_per_second="1"))
    assert "the limits have room for some 186" in plan["time"]  # an hour of 38.64 s trials, two at once


def test_at_its_end_a_sampled_search_says_why_it_ended_and_what_may_follow(place: Path) -> None:
    flight = sampled_flight(place, trials="7")
    said = endings(flight, SessionOutcome(), standing("a"))
    assert "t0003 is the best." in said
    assert "ended: --trials 7 have been run." in said
    assert "--resume --name mine" in said
    assert "--confirm 3" in said
    assert "ended: --time-budget 1h was used up." in endings(
        flight, SessionOutcome(limit="--time-budget 1h was used up")
    )


def test_with_nothing_to_confirm_it_says_so(place: Path) -> None:
    flight = sampled_flight(place, trials="2", confirm="3")
    assert "there is nothing to confirm" in endings(flight, SessionOutcome(), standing("a"), standing("b"))
