"""Keep a search's page current while it runs. A page that cannot be written never harms the search."""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from tune_bisenet.storage import Storage

SECONDS_BETWEEN_PAGES: Final = 45.0
"""With the seconds it takes to write one, never older than a minute, but for searches of many hundred trials."""

MAX_SHARE: Final = 0.1
"""Of the driver's time: a page over thousands of trials takes seconds of the processor that reports wait for."""

log = logging.getLogger(__name__)


@contextmanager
def kept_current(
    folder: Storage, *, every_seconds: float = SECONDS_BETWEEN_PAGES, max_share: float = MAX_SHARE
) -> Iterator[None]:
    """Write the report of the search in `folder` again and again while the block runs."""
    done = threading.Event()

    def keep() -> None:
        pause = every_seconds
        while not done.wait(pause):
            began = time.thread_time()  # waiting for storage keeps nobody from working
            write_safely(folder.hurried())
            pause = max(every_seconds, (time.thread_time() - began) / max_share)

    thread = threading.Thread(target=keep, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_safely(folder: Storage) -> str | None:
    """Write the report and say where its page is; None, and a line in the log, if that fails for whatever reason."""
    try:
        from tune_bisenet.report.page import write_report  # late: plotly takes half a second

        return write_report(folder)
    except Exception as error:  # a search of days must not end because of its picture
        log.warning("the report could not be written: %s: %s", type(error).__name__, error)
        return None


def best_safely(folder: Storage) -> list[str]:
    """What the report says of the best of a sampled search; nothing, and a line in the log, if that fails."""
    try:
        from tune_bisenet.report.read import read_search
        from tune_bisenet.report.sampled import best_lines  # late: Optuna takes half a second

        return best_lines(read_search(folder))
    except Exception as error:  # as above
        log.warning("the best of the search could not be told: %s: %s", type(error).__name__, error)
        return []
