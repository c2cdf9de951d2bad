"""The command line of the main job: check everything, say what will happen, search, say what came of it.

torch and ray are imported late: `--show` and a mistyped flag must not wait for them.
"""

import argparse
import logging
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

    from tune_bisenet.config import Resources, Run
    from tune_bisenet.plan import DataFacts
    from tune_bisenet.preflight import Flight
    from tune_bisenet.results import Standing
    from tune_bisenet.stopping import EarlyStopping

OK: Final = 0
SOME_FAILED: Final = 1
WRONG_INPUT: Final = 2

EPILOG: Final = """\
exit codes: 0 all trials ended well (finished, stopped by the scheduler, or diverged and told so); 1 at least one
failed, the rest completed; 2 the input was wrong and nothing was started; 75 Ray died, go on with --resume;
130 and 143 interrupted by a signal, go on with --resume.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    flags = vars(_parser().parse_args(argv))
    if flags.pop("show", False):
        return _show(flags)
    from rich.console import Console

    from tune_bisenet import arguments, preflight

    console = Console()
    try:
        asked, mistyped = arguments.parse(flags)
        name = f"{Path(asked.space or 'runs10').stem}-{time.strftime('%Y%m%d-%H%M%S')}"
        flight = preflight.check(asked, mistyped, default_name=name, progress=_packing(console))
    except arguments.InputError as error:
        return _refuse(list(error.problems))
    command = ["python", "-m", "tune_bisenet.run", *(sys.argv[1:] if argv is None else argv)]
    return _search(flight, console, command)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.run",
        description="Train the rows of a search space under Ray Tune and compare what they reach.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    what = parser.add_argument_group("what is trained")
    add = what.add_argument
    add("--space", metavar="NAME", help="a module of search_spaces, or the path of a Python file (default: runs10)")
    add("--runs", metavar="r01,r05", help="only these rows")
    add("--seeds", metavar="0,1,2", help="every row once with each of these seeds (default: 0)")
    add(
        "--data",
        metavar="DIR|streets",
        help="Cityscapes or other data in its layout (default: $CITYSCAPES_DATASET, else the built-in streets)",
    )
    add(
        "--backbone",
        metavar="imagenet|none|FILE",
        help="where the ResNet-18 starts (default: imagenet with real data, none with streets)",
    )
    add("--epochs", metavar="N", help="instead of what the rows say (streets: 8)")
    add("--image-size", metavar="HxW", help="train and predict at this size (default: fits the frames into 512x1024)")
    add(
        "--proxy",
        action="store_true",
        help="a short search: warm-up and loss switch keep the table's proportions (streets imply it)",
    )
    add(
        "--scheduler",
        metavar="asha|fifo",
        help="asha stops hopeless runs early; fifo trains all to the end, for judging expectations (default: asha)",
    )
    add("--precision", metavar="fp32|bf16", help="default: fp32")
    where = parser.add_argument_group("where and how")
    add = where.add_argument
    add(
        "--gpus-per-trial", metavar="X", help="may be a fraction: trials then share a GPU (default: 1 if there are any)"
    )
    add("--cpus-per-trial", metavar="N", help="default: the machine's cores divided by the trials that run at once")
    add("--max-concurrent", metavar="N", help="at most so many trials at once")
    add("--storage", metavar="DIR_OR_URI", help="where searches are kept (default: results)")
    add("--name", metavar="NAME", help="of this search, a folder in the storage (default: the space and the time)")
    add("--resume", action="store_true", help="go on with the search of that name; failed trials are tried again")
    add(
        "--add",
        action="store_true",
        help="give that search more trials: with --seeds for its rows, with --runs other rows",
    )
    add("--rerun", metavar="r03", help="go on with that search, but only with what failed of these rows")
    add("--address", metavar="ADDR", help="a running Ray cluster (default: a Ray of its own on this machine)")
    parser.add_argument("--show", action="store_true", help="print the space as a Markdown table and end")
    return parser


def _show(flags: dict[str, Any]) -> int:
    from tune_bisenet import spaces

    try:
        grid = spaces.load(flags.get("space", "runs10"))
        wanted = flags["runs"].split(",") if "runs" in flags else None
        sys.stdout.write(spaces.to_markdown(spaces.select(grid, wanted)))
    except ValueError as error:
        return _refuse([str(error)])
    return OK


def _refuse(problems: list[str]) -> int:
    """Say all that is wrong with the input; nothing was started."""
    lines = [f"error: {problem}" for problem in problems]
    sys.stderr.write("\n".join(lines) + "\nNothing was started.\n")
    return WRONG_INPUT


def _packing(console: "Console") -> Any:
    """A line at every tenth of the frames that are packed: a first search on Cityscapes decodes for minutes."""

    def say(done: int, total: int) -> None:
        if done == total or (done * 10) // total > ((done - 1) * 10) // total:
            console.print(f"packing frames, once for this data and size: {done} of {total}", highlight=False)

    return say


# --- the search -----------------------------------------------------------------------------------------------------


def _search(flight: "Flight", console: "Console", command: list[str]) -> int:
    from tune_bisenet import ledger, search

    try:
        with ledger.exclusive(flight.folder), search.ray_session(flight.arguments.address) as cluster:
            resources = search.allot(cluster, flight.arguments, num_trials=len(flight.runs))
            return _fly(flight, resources, console, command)
    except (ledger.InUseError, search.ClusterError) as error:
        return _refuse([str(error)])


def _fly(flight: "Flight", resources: "Resources", console: "Console", command: list[str]) -> int:
    from tune_bisenet import briefing, ledger, manifest, search
    from tune_bisenet.progress import Progress
    from tune_bisenet.report import keeper

    job = flight.job(cpus_per_trial=resources.cpus_per_trial, use_gpu=resources.gpus_per_trial > 0)
    runs = {job.trial_name(run): run for run in flight.runs}
    earlier, scheduler_state = ledger.read_trials(flight.folder)
    scheduler = _scheduler(flight, scheduler_state)
    book = ledger.Ledger(
        flight.folder,
        [ledger.carried_over(name, run, earlier, only=flight.arguments.rerun) for name, run in runs.items()],
        captions=flight.captions,
        baseline=flight.grid.baseline,
        only=flight.arguments.rerun,
        scheduler_state=scheduler.state,
    )
    record = manifest.opened(flight, runs, command=command, resources=resources)
    manifest.write(flight.folder, record)
    book.write()
    search.write_board(flight.folder, runs)
    briefing.print_plan(console, flight, resources, runs)
    with Progress(console) as progress, keeper.kept_current(flight.folder):
        progress.update(book.standings)
        outcome = search.search(runs, job, resources, scheduler=scheduler, ledger=book, progress=progress)
    manifest.write(flight.folder, manifest.closed(record, outcome.signal_number))
    page = keeper.write_safely(flight.folder)
    briefing.print_results(console, flight, book.standings, page=page, signal_number=outcome.signal_number)
    return _exit_code(book.standings, outcome.signal_number)


def _scheduler(flight: "Flight", state: dict[str, Any] | None) -> "EarlyStopping":
    """ASHA, or first in first out, going on from what an earlier driver saw."""
    from tune_bisenet import rungs
    from tune_bisenet.stopping import EarlyStopping

    rungs_of = rungs.no_rungs
    if flight.choices.scheduler == "asha":
        rungs_of = partial(_rungs_on, flight.facts)
    return EarlyStopping(
        rungs.Rungs.from_json(
            state or {"seen": [], "stops": {}}, rungs_of=rungs_of, spared=rungs.spared_rows(flight.grid.runs)
        )
    )


def _rungs_on(facts: "DataFacts", run: "Run") -> tuple[int, ...]:
    from tune_bisenet import plan, rungs

    return rungs.rung_epochs(run, iterations_per_epoch=plan.iterations_per_epoch(run, facts))


def _exit_code(standings: "Sequence[Standing]", signal_number: int | None) -> int:
    if signal_number is not None:
        return 128 + signal_number
    return SOME_FAILED if any(standing.status == "failed" for standing in standings) else OK


if __name__ == "__main__":
    sys.exit(main())
