"""TensorBoard's table of hyper-parameters, one for a whole search."""

import logging
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from tune_bisenet.config import Run
from tune_bisenet.outages import StorageError
from tune_bisenet.storage import Storage
from tune_bisenet.tracking import write_experiment

SECONDS_BETWEEN_BOARDS: Final = 30.0
"""TensorBoard's table is written anew for each trial that a study adds, but not more often."""

log = logging.getLogger(__name__)


class Board:
    """TensorBoard's table of hyper-parameters in the search's folder, which grows with the search."""

    def __init__(self, folder: Storage, runs: Mapping[str, Run]) -> None:
        self._folder = folder
        self._runs = dict(runs)
        self._written_at = -SECONDS_BETWEEN_BOARDS
        self._is_due = bool(runs)

    def add(self, trial: str, run: Run) -> None:
        if trial not in self._runs:
            self._runs[trial] = run
            self._is_due = True
        if time.monotonic() - self._written_at >= SECONDS_BETWEEN_BOARDS:
            self.write()

    def write(self) -> None:
        """Bring the file up to date, if it is not."""
        if not self._is_due:
            return
        self._written_at = time.monotonic()
        try:
            self._write()
            self._is_due = False
        except StorageError as error:
            log.warning("TensorBoard's table is written later: %s", error)

    def _write(self) -> None:
        if self._folder.local_path is not None:
            write_experiment(self._folder.local_path, self._runs)
            return
        with tempfile.TemporaryDirectory() as place:
            write_experiment(Path(place), self._runs)
            for path in Path(place).iterdir():
                self._folder.hurried().write(path.name, path.read_bytes())
