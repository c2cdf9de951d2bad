"""The command line of the main job: check everything, print the plan, search, print the results.

torch and Ray are imported late: `--show` and a mistyped flag must not wait for them.
"""

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

from tune_bisenet.options import InputError, Options, build_parser, default_name, parse_options, problems_of

if TYPE_CHECKING:
    from rich.console import Console

WRONG_INPUT: Final = 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    arguments = sys.argv[1:] if argv is None else argv
    flags = vars(build_parser().parse_args(arguments))
    if flags.pop("show", False):
        return _show(flags)
    from rich.console import Console

    from tune_bisenet.storage import StorageError

    console = Console()
    options, mistyped = parse_options(flags)
    try:
        return (_plan if options.plan else _search)(options, mistyped, console, arguments)
    except InputError as error:
        return _refuse(list(error.problems))
    except StorageError as error:
        return _come_back(error, "run the same command again")


def _search(options: Options, mistyped: dict[str, str], console: "Console", arguments: Sequence[str]) -> int:
    """Run a session of a search. Raises InputError, and StorageError if storage does not answer before it begins."""
    from tune_bisenet.search.prepare import prepare_search
    from tune_bisenet.storage import StorageError
    from tune_bisenet.text import redact

    def show(done: int, total: int) -> None:
        """Print a line at every tenth of the frames: the first search on Cityscapes decodes for minutes."""
        if done == total or (done * 10) // total > ((done - 1) * 10) // total:
            console.print(f"packing frames, once for this data and size: {done} of {total}", highlight=False)

    search = prepare_search(options, mistyped, default_name=default_name(options.space), progress=show)
    from tune_bisenet.search.driver import run_search

    try:
        return run_search(search, console, ["python", "-m", "tune_bisenet.run", *map(redact, arguments)])
    except StorageError as error:
        return _come_back(error, "run the same command again with --resume")


def _plan(options: Options, mistyped: dict[str, str], console: "Console", _arguments: Sequence[str]) -> int:
    """Print what a search would take. Raises InputError, and StorageError if storage does not answer."""
    from tune_bisenet.search.prepare import survey_search

    search = survey_search(options, mistyped, default_name=default_name(options.space))
    from tune_bisenet.search.driver import OK, print_plan_page

    print_plan_page(console, search)
    return OK


def _show(flags: dict[str, Any]) -> int:
    from tune_bisenet import spaces

    try:
        space = spaces.load_space(flags.get("space", "runs10"))
        wanted = flags["runs"].split(",") if "runs" in flags else None
        tables = [spaces.space_to_markdown(rows)] if (rows := spaces.select_rows(space, wanted)) else []
        if isinstance(space, spaces.Sampled):
            from tune_bisenet.study import sampling

            with spaces.running_code_of(flags.get("space", "runs10")):
                sampling.check_rows(space)
                tables.append(sampling.parameters_to_markdown(space))
        sys.stdout.write("\n".join(tables))
    except ValueError as error:
        return _refuse(problems_of(error))
    return 0


def _come_back(error: OSError, advice: str) -> int:
    from tune_bisenet.search.resources import RESTARTABLE

    sys.stderr.write(f"{str(error).removesuffix('.')}. Nothing is lost: when it answers, {advice}.\n")
    return RESTARTABLE


def _refuse(problems: list[str]) -> int:
    """Print all that is wrong with the input; nothing was started."""
    sys.stderr.write("".join(f"error: {problem}\n" for problem in problems) + "Nothing was started.\n")
    return WRONG_INPUT


if __name__ == "__main__":
    sys.exit(main())
