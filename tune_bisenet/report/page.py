"""The report of a search: one page that needs no network, the same as Markdown, and its tables as files.

    read_search -> judge_search -> views, figures, pictures -> report.html, report.md, tables/*.csv, tables/*.parquet

What is shown comes from storage alone, so the search may run, have died, or lie elsewhere. Neither Ray nor torch.
"""

import base64
import hashlib
import shlex
from collections import Counter
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib import resources
from typing import Any, Final

import jinja2
from plotly.offline import get_plotlyjs

from tune_bisenet.report import figures, heatmaps, pictures, promises, tables, views
from tune_bisenet.report.judging import judge_search
from tune_bisenet.report.promises import Promise
from tune_bisenet.report.read import SearchRecord, read_search
from tune_bisenet.report.sampled import StudySections, study_sections
from tune_bisenet.report.state import made, state, when
from tune_bisenet.report.verdicts import Judgement, more_seeds, next_command
from tune_bisenet.storage import Storage

HTML: Final = "report.html"
MARKDOWN: Final = "report.md"
TABLES: Final = "tables"


def write_report(folder: Storage) -> str:
    """Read the search in `folder` and write its report there; the page's URI. ValueError if there is no search."""
    return Report.of(folder).write(folder)


@dataclass(frozen=True, kw_only=True)
class Report:
    """A search and what became of its promises. `price` is that of an hour of a device, if known."""

    search: SearchRecord
    judgement: Judgement
    price: float | None = None

    @classmethod
    def of(cls, folder: Storage, *, price: float | None = None) -> "Report":
        """ValueError, saying what to do, if there is no search in the folder."""
        search = read_search(folder)
        return cls(search=search, judgement=judge_search(search), price=price)

    @property
    def promises(self) -> list[Promise]:
        """The verdict table, in declared order."""
        search = self.search
        return promises.promises(self.judgement, search.declared_rows, baseline=search.baseline, price=self.price)

    @property
    def next_command(self) -> str | None:
        """What would run the seeds that undecided promises need; None if no number up to 100 would decide any.

        A study has one seed, but for its choice: its rows are decided by a grid.
        """
        if self.search.study:
            return None
        storage, name = _parent_and_name(self.search.folder)
        command = next_command(self.judgement, space=self.search.manifest.space.name, name=name)
        return command and f"{command} --storage {shlex.quote(storage)}"

    def write(self, out: Storage) -> str:
        """Write page, Markdown and tables into a folder; the page's URI."""
        study = study_sections(self.search)
        words = _words(self, now=datetime.now(UTC)) | {"study": study}
        out.make()
        out.write(HTML, _rendered(HTML, words | _pictured(self.search, study)).encode())
        out.write(MARKDOWN, _rendered(MARKDOWN, words).encode())
        (out / TABLES).make()
        for name, content in tables.files(tables.tables(self.search, self.judgement)):
            (out / TABLES).write(name, content)
        return (out / HTML).uri


def _parent_and_name(folder: Storage) -> tuple[str, str]:
    """As `--storage` and `--name` take them."""
    base, query, options = folder.uri.partition("?")
    parent, _, name = base.rstrip("/").rpartition("/")
    return f"{parent}{query}{options}", name


# --- rendering ------------------------------------------------------------------------------------------------------


def _rendered(name: str, context: dict[str, Any]) -> str:
    """The template of that name, everything escaped in HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("tune_bisenet.report"),
        autoescape=jinja2.select_autoescape(["html"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = _markdown_cell
    return environment.get_template(name).render(context)


def _markdown_cell(text: str) -> str:
    """Words that can break neither a table nor, as HTML, the page that shows the Markdown."""
    return " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;").replace("|", r"\|")


def _words(report: Report, *, now: datetime) -> dict[str, Any]:
    """What page and Markdown both say."""
    search, more = report.search, more_seeds(report.judgement)
    counts = Counter(claim.verdict for claim in report.judgement.claims)
    return {
        "manifest": search.manifest,
        "baseline": search.baseline,
        "notes": search.all_notes,
        "now": when(now),
        "state": state(search, now),
        "summary": [(symbol, verdict, counts[verdict]) for verdict, symbol in promises.SYMBOLS.items()],
        "promises": report.promises,
        "judgement": report.judgement,
        "more": more,
        "money": more.hours * report.price if more and more.hours is not None and report.price is not None else None,
        "next_command": report.next_command,
        "settings": views.settings_view(search),
        "early_ends": views.early_ends(search),
        "costs": views.costs(search, report.price),
        "leaderboard": views.leaderboard(search),
        "row_means": views.row_means(search),
        "made": made(search),
    }


def _pictured(search: SearchRecord, study: StudySections | None) -> dict[str, Any]:
    """What the page alone shows, and the code it needs for that."""
    curves, heatmap, confusion = figures.curves(search), heatmaps.iou_heatmap(search), heatmaps.confusion_matrix(search)
    shown = [*(study.figures if study else []), *curves, *(figure for figure in (heatmap, confusion) if figure)]
    scripts = [get_plotlyjs(), _source("report.js")]
    return {
        "curves": curves,
        "heatmap": heatmap,
        "confusion": confusion,
        "gallery": pictures.gallery(search),
        "legend": pictures.LEGEND,
        "colours": figures.row_colours(search),
        "bar_width": promises.BAR_WIDTH,
        "figures": [asdict(figure) for figure in shown],
        "style": _source("report.css"),
        "scripts": scripts,
        "script_hashes": " ".join(f"'sha256-{_sha256(script)}'" for script in scripts),
    }


def _source(name: str) -> str:
    return (resources.files("tune_bisenet.report") / "templates" / name).read_text(encoding="utf-8")


def _sha256(script: str) -> str:
    """As a content security policy names a script: the browser then runs no other."""
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
