"""Live progress of a search: bars in a terminal, plain lines anywhere else, and an estimate of the time left.

`Progress` is told of standings and epochs and shows them; it asks nobody and imports neither Ray nor torch. What is
shown is computed by pure functions of the standings. A terminal that fails is left alone: the search goes on unseen.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Final, Self, assert_never

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tune_bisenet.records import Epoch, TrialState

NEWS: Final = 5
"""Lines about ended trials that stay in view, so that the display fits a small terminal."""

REFRESHES_PER_SECOND: Final = 2


class Progress:
    """What a search shows while it runs; a context manager.

    `console` defaults to standard output. `clock` gives seconds; the session's time counts from here on.
    """

    def __init__(self, console: Console | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._started = self._last_epoch_at = clock()
        # The display reads these from a thread of its own: they are replaced, never changed in place.
        self._standings: Mapping[str, TrialState] = {}
        self._tally = Tally()
        self._epochs: Mapping[str, Epoch] = {}
        self._news: tuple[str, ...] = ()
        self._epochs_done_at_start: int | None = None
        self._live: Live | None = None
        self._broken = False

    def __enter__(self) -> Self:
        if self._console.is_terminal and not self._console.is_dumb_terminal:
            self._live = Live(
                get_renderable=self._picture, console=self._console, refresh_per_second=REFRESHES_PER_SECOND
            )
            with self._unharmed():
                self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            with self._unharmed():
                self._live.stop()

    def update(self, standings: Sequence[TrialState]) -> None:
        """Take over how all trials stand, and announce those that have ended since the last time."""
        before = self._standings
        self._take({standing.trial: standing for standing in standings}, tally_of(standings))
        if self._epochs_done_at_start is None:
            self._begin(standings)
            return
        for standing in standings:
            if has_ended(standing) and not (standing.trial in before and has_ended(before[standing.trial])):
                self._announce(ending_in_words(standing))

    def epoch_done(self, trial: str, epoch: Epoch) -> None:
        """Show an epoch as soon as it is measured. A trial that no `update` has named yet is passed over."""
        if trial not in self._standings:
            return
        standing = self._standings[trial]
        self._epochs = {**self._epochs, trial: epoch}
        if not has_ended(standing):  # a report may arrive after the news that its trial was stopped
            running = replace(standing, status="running", epochs=epoch.epoch)
            self._take({**self._standings, trial: running}, self._tally.after(epoch.epoch - standing.epochs))
        self._say(f"{epoch_in_words(standing, epoch)}  | {search_in_words(self._tally, self._seconds_left())}")

    # --- inside -------------------------------------------------------------------------------------------------

    def _take(self, standings: Mapping[str, TrialState], tally: "Tally") -> None:
        if tally.done != self._tally.done:
            self._last_epoch_at = self._clock()
        self._standings, self._tally = standings, tally

    def _begin(self, standings: Sequence[TrialState]) -> None:
        self._epochs_done_at_start = self._tally.done
        if self._tally.done:
            ended = sum(map(has_ended, standings))
            self._announce(
                f"resumed: {ended} of {len(standings)} trials had ended, "
                f"{self._tally.done} of {self._tally.in_all} epochs were done"
            )

    def _seconds_left(self) -> float | None:
        """Estimated when the last epoch was done, counted down since: it does not grow while an epoch runs."""
        left = seconds_left(
            self._tally,
            elapsed_seconds=self._last_epoch_at - self._started,
            epochs_done_at_start=self._epochs_done_at_start or 0,
        )
        return None if left is None else max(0.0, left - (self._clock() - self._last_epoch_at))

    def _announce(self, line: str) -> None:
        self._news = (*self._news, line)[-NEWS:]
        self._say(line)

    def _say(self, line: str) -> None:
        """Print a plain line, where no live display shows the same."""
        if self._live is None and not self._broken:
            with self._unharmed():
                self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _unharmed(self) -> Iterator[None]:
        """A display is never worth a search: whatever breaks in it silences it. rich exits on a broken pipe."""
        try:
            yield
        except (Exception, SystemExit):
            self._broken = True

    def _picture(self) -> RenderableType:
        return picture(
            list(self._standings.values()),
            self._epochs,
            news=self._news,
            elapsed_seconds=self._clock() - self._started,
            seconds_left=self._seconds_left(),
        )


# --- what is shown ----------------------------------------------------------------------------------------------


def picture(
    standings: Sequence[TrialState],
    epochs: Mapping[str, Epoch],
    *,
    news: Sequence[str],
    elapsed_seconds: float,
    seconds_left: float | None,
) -> RenderableType:
    """The live display: a bar for the search, a line for each running trial (its last epoch), the latest news."""
    overall, so_far = Table.grid(padding=(0, 1)), tally_of(standings)
    overall.add_row(
        ProgressBar(total=max(so_far.in_all, 1), completed=so_far.done, width=24),
        _text(f"{search_in_words(so_far, seconds_left)}, {format_duration(elapsed_seconds)} elapsed"),
    )
    running = Table.grid(padding=(0, 2))
    for standing in standings:
        if standing.status == "running":
            running.add_row(*map(_text, _running_cells(standing, epochs.get(standing.trial))))
    counts = Counter("ended" if has_ended(standing) else standing.status for standing in standings)
    summary = ", ".join(f"{counts[state]} {state}" for state in ("running", "waiting", "ended"))
    return Group(overall, _text(summary), running, *(_text(line, style="dim") for line in news))


def _running_cells(standing: TrialState, epoch: Epoch | None) -> list[str]:
    place = [standing.trial, f"epoch {standing.epochs}/{standing.num_epochs}"]
    if epoch is None:
        return place
    measured = [f"mIoU {epoch.miou:.1f} %", f"loss {epoch.loss:.3f}", f"{epoch.images_per_second:.1f} img/s"]
    return place + measured


def _text(words: str, style: str = "") -> Text:
    """One line, cut where the terminal ends. Text, not markup: an error's words may hold brackets."""
    return Text(words, style=style, no_wrap=True, overflow="crop")


def epoch_in_words(standing: TrialState, epoch: Epoch) -> str:
    """As `r03  epoch 4/8  loss 1.234  mIoU 21.3 %  3.2 s`."""
    return (
        f"{standing.trial}  epoch {epoch.epoch}/{standing.num_epochs}  loss {epoch.loss:.3f}  "
        f"mIoU {epoch.miou:.1f} %  {epoch.seconds:.1f} s"
    )


def search_in_words(tally: "Tally", seconds_left: float | None) -> str:
    """As `search 31 %, about 2 min 10 s left`."""
    percent = 100 * tally.done // max(tally.in_all, 1)
    left = "" if seconds_left is None else f", about {format_duration(seconds_left)} left"
    return f"search {percent} %{left}"


def ending_in_words(standing: TrialState) -> str:
    """As `r03 finished: best mIoU 24.1 % at epoch 8` or `r05 stopped after epoch 2 of 8 (ASHA): best mIoU ...`."""
    after = f"after epoch {standing.epochs} of {standing.num_epochs}"
    reason = f" ({standing.stopped_by})" if standing.stopped_by else ""
    match standing.status:
        case "finished":
            what = "finished"
        case "stopped" | "diverged":
            what = f"{standing.status} {after}{reason}"
        case "failed":
            return f"{standing.trial} failed {after}: {' '.join(standing.error.split()) or 'no reason was given'}"
        case "waiting" | "running":
            what = f"is {standing.status}"
        case _:
            assert_never(standing.status)
    best = (
        "" if standing.best_miou is None else f": best mIoU {standing.best_miou:.1f} % at epoch {standing.best_epoch}"
    )
    return f"{standing.trial} {what}{best}"


# --- numbers ----------------------------------------------------------------------------------------------------


def has_ended(standing: TrialState) -> bool:
    return standing.status not in ("waiting", "running")


@dataclass(frozen=True)
class Tally:
    """How far a search is, in epochs: kept along, as adding them up for each news would slow a search of thousands."""

    done: int = 0
    in_all: int = 0
    """Done and still to do: what an ended trial has left undone counts no more."""

    def after(self, epochs: int) -> "Tally":
        """The same, so many epochs later."""
        return replace(self, done=self.done + epochs)


def tally_of(standings: Iterable[TrialState]) -> Tally:
    done = in_all = 0
    for standing in standings:
        done += standing.epochs
        in_all += standing.epochs if has_ended(standing) else standing.num_epochs
    return Tally(done, in_all)


def seconds_left(tally: Tally, *, elapsed_seconds: float, epochs_done_at_start: int) -> float | None:
    """What the epochs to do will take at this session's rate; None until the session has done one.

    The rate is that of all trials together, so trials that run side by side need no extra thought.
    """
    fresh = tally.done - epochs_done_at_start
    return (tally.in_all - tally.done) * elapsed_seconds / fresh if fresh > 0 else None


def format_duration(seconds: float) -> str:
    """As `12 s`, `2 min 10 s`, `1 h 5 min` or `2 d 3 h`: the two largest units, rounded to whole seconds."""
    whole = round(seconds)
    minutes, hours, days = whole // 60, whole // 3600, whole // 86400
    if days:
        return f"{days} d {hours % 24} h"
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {whole % 60} s" if minutes else f"{whole} s"
