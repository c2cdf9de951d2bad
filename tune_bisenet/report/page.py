"""The report of a search: one page that needs no network, the same as Markdown, its tables as files and for a terminal.

    read_search -> judge_search -> sections -> report.html, report.md; tables/*.csv, tables/*.parquet

What is shown comes from storage alone, so the search may run, have died, or be elsewhere. Neither Ray nor torch.
"""

import base64
import hashlib
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Final

import jinja2
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table as RichTable
from rich.text import Text

from tune_bisenet.records import HTML, MARKDOWN, TABLES
from tune_bisenet.report import figures, leaderboard, sampled, tables
from tune_bisenet.report.claims import format_measure
from tune_bisenet.report.figures import Block, Plots, PythonSource, Section, plots
from tune_bisenet.report.pairing import mixed_pairs, shared_pairs, unequal_pairs
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.tables import Badge, Marked, Table
from tune_bisenet.report.verdicts import Judgement, judge_search
from tune_bisenet.spaces import published_levels
from tune_bisenet.storage import Storage
from tune_bisenet.text import counted, markdown_table

SECONDS_BETWEEN_PAGES: Final = 45.0
"""With the seconds it takes to write one, a page is never older than a minute, but for many hundred trials."""
MAX_SHARE: Final = 0.1
"""The share of the driver's time that pages may take: over thousands of trials, each takes seconds."""

STYLES: Final = {"good": "green", "bad": "red", "open": "yellow", "off": "yellow", "none": "dim"}
"""Of a terminal, by a badge's style."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A search and its judgement. `price` is that of an hour of a device, if known."""

    search: SearchRecord
    judgement: Judgement
    price: float | None = None

    @classmethod
    def of(cls, folder: Storage, *, price: float | None = None) -> "Report":
        """Read it. ValueError, with what to do, if there is no search in the folder."""
        search = read_search(folder)
        return cls(search=search, judgement=judge_search(search), price=price)

    @property
    def next_command(self) -> str | None:
        """Return what would run the seeds that open claims need; None if no number up to 100 would decide any.

        A study has one seed, but for its choice: its rows are decided by a grid.
        """
        if self.search.is_sampled:
            return None
        folder, space = self.search.folder, self.search.manifest.config.space
        return self.judgement.next_command(space=space, name=folder.name, storage=folder.parent.uri)

    def write(self, out: Storage) -> str:
        """Write page, Markdown and tables; return the page's URI."""
        now = datetime.now(UTC)
        sections = self.sections()
        out.make()
        out.write(HTML, _render_html(self, sections, now).encode())
        out.write(MARKDOWN, _render_markdown(self, sections, now).encode())
        (out / TABLES).make()
        for name, content in tables.table_files(self.search, self.judgement):
            (out / TABLES).write(name, content)
        return self.uri(out)

    @staticmethod
    def uri(out: Storage) -> str:
        """Return where `write` puts the page."""
        return (out / HTML).uri

    def state(self, now: datetime) -> tuple[str, str]:
        """Return one of a few words, and a sentence: whether the search runs or how it ended; for a study its best."""
        word, sentence = tables.search_state(self.search, now)
        best = sampled.best_sample(one for one in sampled.samples_of(self.search) if not one.is_known)
        return word, sentence + (f" The best of them is {best.trial} with {best.miou:.2f} % mIoU." if best else "")

    def sections(self) -> list[Section]:
        """Return what page and Markdown are both made of."""
        search = self.search
        curves = figures.curves(search)
        heatmap, confusion = figures.iou_heatmap(search), figures.confusion_matrix(search)
        gallery, notes = figures.gallery(search)
        noise = tables.noise_table(search)
        curve_text = (
            "Lines are means over seeds, bands reach from the lowest to the highest. A mean may jump where a seed was "
            "stopped. Losses of rows with different losses do not compare."
        )
        return [
            *(self._study_sections() if search.is_sampled else []),
            *([self._verdicts()] if self.judgement.claims or not search.is_sampled else []),
            *([Section("noise", "How much repeats differ", [noise])] if noise.lines else []),
            Section("settings", "What the rows are", [tables.settings_table(search)]),
            Section(
                "curves",
                "Learning curves",
                [plots(*curves, text=curve_text, style="plots", colours=figures.row_colours(search))]
                if curves
                else ["No epoch has ended yet."],
            ),
            Section(
                "classes",
                "IoU by class",
                [plots(heatmap)] if heatmap else ["Nothing to compare yet: it takes the baseline and another row."],
            ),
            Section(
                "confusion",
                "Confusion matrix",
                [plots(confusion)] if confusion else ["No trial has kept the counts of its best epoch."],
            ),
            Section(
                "pictures",
                "The same frames, side by side",
                [*notes, gallery or "No trial has kept pictures of its best epoch."],
            ),
            Section("ends", "What ended early, and why", [tables.early_end_table(search)]),
            Section("cost", "Cost", [tables.cost_table(search, self.price)]),
            Section("leaderboard", "Leaderboard", [tables.leaderboard_table(search), tables.seed_means_table(search)]),
            *self._winner(),
            Section("made", "How it was made", [tables.provenance_table(search)]),
        ]

    def _winner(self) -> list[Section]:
        """Return what to do with the best trial; nothing before there is one."""
        best = leaderboard.best_of_run(self.search.states)
        if best is None:
            return []
        data = self.search.manifest.config.data
        commands = leaderboard.winner_commands(self.search.folder.uri, best.trial, data=data)
        text = (
            f"{best.trial} has the highest mIoU, {best.best_miou:.2f} %. Its network as one checked file, its score by "
            "class, masks and overlays of pictures of any size, and its speed on your machine:"
        )
        return [Section("winner", "What to do with the best", [text, PythonSource("\n".join(commands))])]

    def _verdicts(self) -> Section:
        name, title = "verdicts", "Did each row reach what was expected?"
        claims, more = self.judgement.claims, self.judgement.more_seeds
        if not claims:
            return Section(name, title, ["No row of this space expects anything, so there is nothing to judge."])
        counts = Counter(claim.verdict for claim in claims)
        blocks: list[Block] = [
            ", ".join(f"{counts[verdict]} {verdict}" for verdict in tables.VERDICT_SYMBOLS if counts[verdict]) + ".",
            tables.verdict_table(self.search, self.judgement, self.price),
            self._verdict_text(),
            *shared_pairs(list(self.search.trials.values())),
            *unequal_pairs(self.search.trials.values()),
            *mixed_pairs(claims, self.search.trials.values()),
        ]
        if self.next_command and more:
            hours = "" if more.hours is None else f": {more.hours:.3g} {self.judgement.unit}"
            cost = "" if more.hours is None or self.price is None else f", cost {more.hours * self.price:,.2f}"
            what = "The next look" if self.judgement.looks else "What up to 100 more seeds can decide, at 80 % power,"
            rows = ", ".join(more.runs)
            blocks += [
                f"{what} takes {counted(len(more.seeds), 'more seed')} of each of {rows}{hours}{cost}.",
                PythonSource(self.next_command),
            ]
        drawn = figures.intervals(self.judgement)
        if drawn:
            text = "Dots are means over seeds, lines their intervals, bands what was expected."
            blocks.append(plots(*drawn, text=text))
        return Section(name, title, blocks)

    def _verdict_text(self) -> str:
        """Say what is measured, how noisy it was, and what the verdicts are worth."""
        manifest, noise = self.search.manifest, self.judgement.noise
        share = manifest.space.measured_share
        sentences = [
            f"A trial is measured by the mean mIoU of its last epochs ({share:.0%} of them, at least one); gains are "
            "points, paired by seed. Intervals hold together: in 95 % of searches no verdict of the table is false.",
            *self._second_measure_sentences(),
            *self._look_sentences(),
            f"Repeats of {counted(noise.num_rows, 'row')} differ by {noise.within_sd:.2f} points (sd), "
            f"{noise.sd:.2f} without what equal seeds share."
            if noise
            else "",
            published_levels(self.search.rows, manifest.config, num_train=manifest.data.train_images),
        ]
        return " ".join(filter(None, sentences))

    def _second_measure_sentences(self) -> list[str]:
        classes = self.search.manifest.space.second_measure
        if not classes:
            return []
        left_out = [name for name in self.search.classes.names if name not in classes]
        are = f"all but {', '.join(left_out)}" if 0 < len(left_out) < len(classes) else ", ".join(classes)
        return [
            f"Gains are judged a second time by the {format_measure(classes)} ({are}), declared before the search. "
            "Both measures share the error."
        ]

    def _look_sentences(self) -> list[str]:
        """Say at which look the table was judged, and whether its error is still that of a plan."""
        judgement, config = self.judgement, self.search.manifest.config
        sentences = []
        if config.looks:
            looks = ", ".join(map(str, config.looks))
            sentences.append(f"Looks were planned at {looks} seeds and share the error; what one decides is final.")
            waiting = len(judgement.seeds) - judgement.looked_at
            if waiting or not judgement.looked_at:
                sentences.append(f"The last look was at {judgement.looked_at}; {counted(waiting, 'seed')} more wait.")
        if not config.is_planned:
            sentences.append("Trials were added outside the plan, so these verdicts are no longer guarded.")
        return sentences

    def _study_sections(self) -> list[Section]:
        from tune_bisenet.report import study_plots  # late: Optuna takes half a second

        search, samples = self.search, sampled.samples_of(self.search)
        source = sampled.best_source(search)
        on_a_proxy = " It is on the scale of the space's own rows, of which this proxy trained a part."
        paste = "As a row to paste into the file of a space:" + (on_a_proxy if search.manifest.proxy else "")
        importance_table, importance_plot = study_plots.importances(samples)
        history, parallel = study_plots.history(samples), study_plots.parallel(samples)
        fresh = sampled.fresh_seed_tables(search)
        best: list[Block] = [*sampled.best_lines(search)[: 1 if fresh else None], *fresh]
        best += [paste, PythonSource(source)] if source else []
        front = []
        if search.manifest.study and "latency" in search.manifest.study.objectives:
            table, plot = study_plots.pareto_front(samples)
            front = [Section("front", "Pareto front of mIoU and latency", [table, plots(plot)])]
        nothing = "No trial has an mIoU yet."
        slices = "Each by itself; the warmer the colour, the later in the search."
        return [
            Section("best", "The best of the search", best),
            *front,
            Section("history", "How the search went", [plots(history)] if history else [nothing]),
            Section("importance", "Which parameters mattered", [importance_table, plots(importance_plot)]),
            Section(
                "parameters",
                "mIoU over the parameters",
                [plots(parallel), plots(*study_plots.slices(samples), text=slices, style="slices")]
                if parallel
                else [nothing],
            ),
        ]


def _render_html(report: Report, sections: Sequence[Section], now: datetime) -> str:
    from plotly.offline import get_plotlyjs  # late: it takes half a second

    search = report.search
    word, sentence = report.state(now)
    blocks = [block for section in sections for block in section.blocks]
    shown = [figure for block in blocks if isinstance(block, Plots) for figure in block.figures]
    scripts = [get_plotlyjs(), _source("report.js")]
    # As a content security policy names a script: the browser then runs no other.
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tune_bisenet.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.tests["a"] = lambda value, name: type(value).__name__ == name
    return environment.get_template(HTML).render(
        manifest=search.manifest,
        code_changes=search.code_changes,
        notes=search.all_notes,
        now=tables.format_time(now),
        state=word,
        sentence=sentence,
        sections=sections,
        figures=[asdict(figure) for figure in shown],
        legend=figures.legend(search.classes),
        style=_source("report.css"),
        scripts=scripts,
        script_hashes=" ".join(f"'sha256-{digest}'" for digest in digests),
    )


def _source(name: str) -> str:
    return (resources.files("tune_bisenet.report") / "templates" / name).read_text(encoding="utf-8")


def _render_markdown(report: Report, sections: Sequence[Section], now: datetime) -> str:
    """Return the same without plots and pictures."""
    manifest, notes = report.search.manifest, report.search.all_notes
    _, sentence = report.state(now)
    blocks = [
        f"# {_escaped(manifest.name)}: {_escaped(manifest.space.title)}",
        f"{_escaped(sentence)} This page: {tables.format_time(now)}.",
        *([f"**{_escaped(manifest.proxy)}**"] if manifest.proxy else []),
        *([_escaped(report.search.code_changes)] if report.search.code_changes else []),
        *(["Not everything could be read. What follows is made from the rest."] if notes else []),
        *(f"- {_escaped(note)}" for note in notes),
    ]
    for section in sections:
        written = [_markdown_block(block) for block in section.blocks]
        if any(written):
            blocks += [f"## {section.title}{' (proxy)' if manifest.proxy else ''}", *filter(None, written)]
    return "\n\n".join(blocks) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Table():
            rows = [[f"**{_escaped(cell)}**" if isinstance(cell, Marked) else _escaped(cell) for cell in line.values()]
                    for line in block.lines]  # fmt: skip
            table = markdown_table(block.columns, rows, numbers=block.numbers) if rows else ""
            return "\n\n".join(filter(None, [_escaped(block.text), table]))
        case PythonSource():
            return "\n".join(f"    {line}" for line in block.text.splitlines())
        case str():
            return _escaped(block)
    return ""


def _escaped(text: str) -> str:
    """Return text that, as HTML, cannot break the page that shows the Markdown."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")


@contextmanager
def refreshed(
    folder: Storage, *, every_seconds: float = SECONDS_BETWEEN_PAGES, max_share: float = MAX_SHARE
) -> Iterator[None]:
    """Write the report of the search in `folder` again and again while the block runs; failing never harms it."""
    done = threading.Event()

    def refresh() -> None:
        pause = every_seconds
        while not done.wait(pause):
            began = time.thread_time()  # waiting for storage takes no processor
            write_safely(folder.fail_fast())
            pause = max(every_seconds, (time.thread_time() - began) / max_share)

    thread = threading.Thread(target=refresh, name="report", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def write_safely(folder: Storage) -> Report | None:
    """Write the report and return it; None, and a line in the log, if that fails for any reason."""
    try:
        report = Report.of(folder)
        report.write(folder)
        return report
    except Exception as error:  # a search of days must not end because of its page
        _log.warning("the report could not be written: %s: %s", type(error).__name__, error)
        return None


# --- for a terminal ---------------------------------------------------------------------------------------------------


def format_table(table: Table, *, left_out: Sequence[str] = ()) -> RenderableType:
    """Return the table and its sentence. Marked rows have a star, which needs no colour."""
    shown = RichTable(box=SIMPLE_HEAD, collapse_padding=True)
    kept = [title for title in table.columns if title not in left_out]
    for title in kept:
        shown.add_column(title, justify="right" if title in table.numbers else "left")
    for line in table.lines:
        marked = any(isinstance(cell, Marked) for cell in line.values())
        shown.add_row(*(_rich_cell(line[title]) for title in kept), style="bold" if marked else "")
    return Group(*([shown] if table.lines else []), *([Text(table.text)] if table.text else []))


def format_verdicts(report: Report) -> RenderableType:
    """Return a line for each claim; the page has the rest of what is known of it."""
    table = tables.verdict_table(report.search, report.judgement, report.price)
    return format_table(table, left_out=("to decide it", "seeds", "best epochs", "remarks"))


def _rich_cell(cell: str) -> Text:
    """As Text: a cell may hold brackets, which strings would turn into markup."""
    if isinstance(cell, Badge):
        return Text(cell, style=STYLES[cell.style])
    return Text(f"{cell}*" if isinstance(cell, Marked) else cell)
