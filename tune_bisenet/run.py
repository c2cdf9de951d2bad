"""The command line of the main job: check everything, say what will happen, search, say what came of it.

torch and ray are imported late: `--show` and a mistyped flag must not wait for them.
"""

import argparse
import logging
import os
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from rich.console import Console

    from tune_bisenet.options import Options


OK: Final = 0
SOME_FAILED: Final = 1
WRONG_INPUT: Final = 2

EPILOG: Final = """\
exit codes: 0 all trials ended well (finished, stopped by the scheduler, or diverged and told so); 1 at least one
failed, the rest completed; 2 the input was wrong and nothing was started; 75 Ray died, or storage or the
study's database was away for too long, go on with --resume; 130 and 143 interrupted by a signal, go on with --resume.
"""


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    if argv is None:
        _hide_password()
    words = sys.argv[1:] if argv is None else argv
    flags = vars(parser().parse_args(words))
    if flags.pop("show", False):
        return _show(flags)
    from rich.console import Console

    from tune_bisenet import options
    from tune_bisenet.search import prepare
    from tune_bisenet.storage import redact

    console = Console()
    try:
        asked, mistyped = options.parse_options(flags)
        if asked.plan:
            return _plan(asked, mistyped, console)
        flight = prepare.prepare_search(asked, mistyped, default_name=_default_name(asked), progress=_packing(console))
    except options.InputError as error:
        return _refuse(list(error.problems))
    from tune_bisenet.search.driver import CANNOT_BEGIN, run_search
    from tune_bisenet.search.resources import RESTARTABLE
    from tune_bisenet.storage import StorageError

    try:
        return run_search(flight, console, ["python", "-m", "tune_bisenet.run", *map(redact, words)])
    except CANNOT_BEGIN as error:
        return _refuse([str(error)])
    except StorageError as error:
        what = str(error).removesuffix(".")
        sys.stderr.write(f"{what}. Nothing is lost: when it answers, run the same command again with --resume.\n")
        return RESTARTABLE


def _plan(asked: "Options", mistyped: dict[str, str], console: "Console") -> int:
    """Say what the search would take. InputError if something is wrong with it."""
    from tune_bisenet.search import prepare

    survey = prepare.survey_search(asked, mistyped, default_name=_default_name(asked))
    from tune_bisenet.search import driver

    try:
        driver.print_plan_page(console, survey)
    except driver.CANNOT_PLAN as error:
        return _refuse(str(error).splitlines())
    return OK


def _default_name(asked: "Options") -> str:
    return f"{Path(asked.space or 'runs10').stem}-{time.strftime('%Y%m%d-%H%M%S')}"


def _hide_password() -> None:
    """Start over with the study's password in the environment: anyone may read a command line, and Ray notes it."""
    from tune_bisenet.options import STUDY_VARIABLE
    from tune_bisenet.storage import has_secret, redact

    studies = [word.removeprefix("--study=") for before, word in pairwise(sys.argv) if "--study" in (before, word[:7])]
    for address in filter(has_secret, studies):
        words = [word.replace(address, redact(address)) for word in sys.orig_argv[1:]]
        os.execve(sys.executable, [sys.executable, *words], os.environ | {STUDY_VARIABLE: address})


def parser() -> argparse.ArgumentParser:
    """Of the command line; `submit` reads a run's flags with it, too."""
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.run",
        description="Train the rows of a search space under Ray Tune and compare what they reach.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    for add_flags in (_add_what, _add_sampled, _add_limits, _add_where, _add_plan):
        add_flags(parser)
    parser.add_argument("--show", action="store_true", help="print the space as a Markdown table and end")
    return parser


def _add_what(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is trained").add_argument
    add("--space", metavar="NAME", help="a module of search_spaces, or the path of a Python file (default: runs10)")
    add("--runs", metavar="r01,r05", help="only these rows")
    add("--seeds", metavar="0,1,2", help="every row once with each of these seeds (default: 0)")
    add(
        "--data",
        metavar="DIR_OR_URI|streets",
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
        metavar="asha|median|fifo",
        help="asha stops hopeless runs early, median only those that were never near the others; fifo trains all to "
        "the end, for judging expectations (default: asha)",
    )
    add("--precision", metavar="fp32|bf16", help="default: fp32")


def _add_sampled(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("how a sampled space, such as around10, is searched").add_argument
    add("--trials", metavar="N", help="so many in all (default: 40, if no other limit is given)")
    add("--sampler", metavar="tpe|gp|cmaes|random|qmc", help="Optuna's sampler (default: tpe)")
    add(
        "--warm-start",
        metavar="DIR_OR_URI",
        help="begin with what that search measured, its curves too; rows it has are not run again",
    )
    add(
        "--objectives",
        metavar="miou[,latency]",
        help="with latency, milliseconds of one prediction are a second goal, and head width and input size are varied "
        "(default: miou)",
    )
    add("--confirm", metavar="K", help="then train the best, the best row and the baseline with K fresh seeds")
    add(
        "--study",
        metavar="URL",
        help="keep the study in that database, as postgresql://USER@HOST/NAME (default: a file in the search's folder; "
        "or the address in $TUNE_BISENET_STUDY goes on with a study there)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("when it ends by itself: at whichever comes first").add_argument
    add("--time-budget", metavar="8h", help="running time of all sessions together; what is cut off can be resumed")
    add("--gpu-hours", metavar="X", help="of all epochs trained")


def _add_where(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("where and how").add_argument
    add(
        "--gpus-per-trial", metavar="X", help="may be a fraction: trials then share a GPU (default: 1 if there are any)"
    )
    add(
        "--cpus-per-trial",
        metavar="N",
        help="default: the machine's cores divided by the trials that run at once; 1 on a cluster without nodes as yet",
    )
    add("--max-concurrent", metavar="N", help="at most so many trials at once")
    add(
        "--device",
        metavar="auto|cuda|cpu",
        help="cuda: no trial without a GPU; cpu: train on the CPU, whatever GPUs are asked for (default: auto, on the "
        "GPU where trials are given one)",
    )
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


def _add_plan(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what it will take: said before every search").add_argument
    add(
        "--plan",
        action="store_true",
        help="say it and end: nothing is started, packed, fetched or written. Trials are timed for some seconds on a "
        "few of the frames, unless --images-per-second is given",
    )
    add("--gpus", metavar="N", help="with --plan: of a cluster that is not there yet (default: what is there)")
    add(
        "--images-per-second",
        metavar="X",
        help="in training, of one trial at the size trained at, as a report or TensorBoard shows it",
    )
    add("--price-per-gpu-hour", metavar="X", help="in any currency: GPU-hours are told in money, too")


def _show(flags: dict[str, Any]) -> int:
    from tune_bisenet import spaces

    try:
        space = spaces.load_space(flags.get("space", "runs10"))
        wanted = flags["runs"].split(",") if "runs" in flags else None
        tables = [spaces.space_to_markdown(rows)] if (rows := spaces.select_rows(space, wanted)) else []
        if isinstance(space, spaces.Sampled):
            from tune_bisenet.study import sampling

            sampling.check_rows(space)
            tables.append(sampling.to_markdown(space))
        sys.stdout.write("\n".join(tables))
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


if __name__ == "__main__":
    sys.exit(main())
