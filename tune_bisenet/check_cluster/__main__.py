"""The command line: name everything that is wrong with these files.

python -m tune_bisenet.check_cluster cluster/gpu.yaml
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tune_bisenet.check_cluster import kubernetes, launcher
from tune_bisenet.check_cluster.reading import UnreadableError, documents, placeholders

OK, WRONG = 0, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tune_bisenet.check_cluster",
        description="Name what is wrong with a file for `ray up` or KubeRay, or still to be filled in: what Ray itself "
        "checks, and what it does not. Give the command in the folder where `ray up` is given. No cloud is asked.",
        epilog="exit codes: 0 nothing is wrong; 2 something is",
        allow_abbrev=False,
    )
    parser.add_argument("files", metavar="FILE", nargs="+")
    count = 0
    for name in parser.parse_args(argv).files:
        for problem in problems(Path(name)):
            sys.stdout.write(f"{name}: {problem}\n")
            count += 1
    sys.stdout.write(f"{count} to mend.\n" if count else "Nothing is wrong.\n")
    return WRONG if count else OK


def problems(path: Path) -> Iterator[str]:
    """Everything wrong with one file, a sentence each."""
    try:
        content = documents(path)
    except UnreadableError as error:
        yield str(error)
        return
    yield from placeholders(content)
    if any("apiVersion" in document for document in content):
        yield from kubernetes.problems(content)
    else:
        yield from launcher.problems(content[0])


if __name__ == "__main__":
    sys.exit(main())
