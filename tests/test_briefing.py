"""What the terminal says before and after a search: complete, and fit to be copied."""

import io
from pathlib import Path

import pytest
from driving import write_frames, write_sampled_space, write_space
from rich.console import Console

from tune_bisenet import arguments, briefing, preflight
from tune_bisenet.config import Resources, Run
from tune_bisenet.results import Standing
from tune_bisenet.search import Outcome

TWO_CORES = Resources(cpus_per_trial=1, gpus_per_trial=0, max_concurrent=None, concurrency=2)


def flight_of(place: Path, **flags: object) -> preflight.Flight:
    asked, mistyped = arguments.parse(
        {
            "space": str(place / "space.py"),
            "data": str(place / "frames"),
            "backbone": "none",
            "storage": str(place / "a long name [of a folder] for many results"),
            "name": "mine",
            **flags,
        }
    )
    return preflight.check(asked, mistyped, default_name="default", progress=lambda _done, _total: None)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(preflight.CACHE_VARIABLE, str(tmp_path / "cache"))
    write_frames(tmp_path / "frames")
    write_space(tmp_path / "space.py", {f"r{row:02}": 0.01 for row in range(1, 6)}, num_epochs=4, baseline="r01")
    return tmp_path


def runs_of(flight: preflight.Flight) -> dict[str, Run]:
    return {f"{run.name}-s{run.seed}": run for run in flight.runs}


def plan_of(flight: preflight.Flight, resources: Resources = TWO_CORES) -> dict[str, str]:
    return dict(briefing.plan_lines(flight, resources, runs_of(flight)))


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
    briefing.print_plan(Console(file=screen, width=40), flight, TWO_CORES, runs_of(flight))
    said = screen.getvalue()
    for words in plan_of(flight).values():
        assert words in said, "whole, on one line, brackets included"


def standing(trial: str, **known: object) -> Standing:
    return Standing.from_json({"trial": trial, "run": trial, "seed": 0, "num_epochs": 4, **known})


def test_at_the_end_it_says_what_failed_and_how_to_go_on(place: Path) -> None:
    flight = flight_of(place)
    standings = [standing("r01", status="finished", epochs=4, best_miou=12.3, best_epoch=4, last_miou=12.3)]
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    failed = standing("r02", status="failed", error="[no] memory")
    briefing.print_results(console, flight, [*standings, failed], page="there/report.html", outcome=Outcome())
    assert "report:  there/report.html" in screen.getvalue()
    said = screen.getvalue()
    assert "12.30" in said
    assert "[no] memory" in " ".join(said.split())
    assert "failed: r02. Try these again with --resume --name mine --storage " in said
    assert f"results: {flight.folder.uri}" in said
    assert "interrupted" not in said


def test_after_a_signal_it_says_how_to_go_on(place: Path) -> None:
    screen = io.StringIO()
    console = Console(file=screen, width=40)
    briefing.print_results(console, flight_of(place), [standing("r01")], page=None, outcome=Outcome(signal_number=15))
    assert "interrupted. Go on with --resume --name mine --storage " in screen.getvalue()
    assert "failed" not in screen.getvalue()


# --- a sampled search -----------------------------------------------------------------------------------------------


def sampled_flight(place: Path, **flags: object) -> preflight.Flight:
    write_sampled_space(place / "sampled.py", num_epochs=4)
    return flight_of(place, space=str(place / "sampled.py"), **flags)


def endings(flight: preflight.Flight, outcome: Outcome, *standings: Standing) -> str:
    screen = io.StringIO()
    console = Console(file=screen, width=100)
    briefing.print_results(console, flight, standings, page=None, best=["t0003 is the best."], outcome=outcome)
    return screen.getvalue()


def test_the_plan_of_a_sampled_search_says_what_bounds_it_and_where_its_study_is(place: Path) -> None:
    flight = sampled_flight(place, trials="7", time_budget="90m", gpu_hours="2")
    plan = dict(briefing.plan_lines(flight, TWO_CORES, {}))
    assert plan["trials"] == "7, the rows a, b first, 4 epochs of 2 iterations each"
    assert plan["sampler"] == "tpe, for miou"
    assert plan["limits"] == "ends after 1h30m of time or 2 GPU-hours, whichever comes first"
    assert plan["study"] == f"optuna-dashboard sqlite:///{flight.folder.path}/study.db"


def test_without_any_limit_a_sampled_search_has_forty_trials(place: Path) -> None:
    assert dict(briefing.plan_lines(sampled_flight(place), TWO_CORES, {}))["trials"].startswith("40, ")
    flight = sampled_flight(place, time_budget="8h")
    assert dict(briefing.plan_lines(flight, TWO_CORES, {}))["trials"].startswith("as many as time allows, ")


def test_at_its_end_a_sampled_search_says_why_it_ended_and_what_may_follow(place: Path) -> None:
    flight = sampled_flight(place, trials="7")
    said = endings(flight, Outcome(), standing("a"))
    assert "t0003 is the best." in said
    assert "ended: --trials 7 have been run." in said
    assert "--resume --name mine" in said
    assert "--confirm 3" in said
    assert "ended: --time-budget 1h was used up." in endings(flight, Outcome(limit="--time-budget 1h was used up"))


def test_with_nothing_to_confirm_it_says_so(place: Path) -> None:
    flight = sampled_flight(place, trials="2", confirm="3")
    assert "there is nothing to confirm" in endings(flight, Outcome(), standing("a"), standing("b"))
