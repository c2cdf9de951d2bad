"""What the page says and shows of a study, gathered once for page and Markdown alike."""

from dataclasses import dataclass

from tune_bisenet.report.confirmed import CAUTION, best_words, confirmed
from tune_bisenet.report.figures import Figure
from tune_bisenet.report.front import front_figure, front_view
from tune_bisenet.report.history import history
from tune_bisenet.report.importance import importance_figures, importance_view, importances
from tune_bisenet.report.landscape import parallel, slices, slices_words
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.report.samples import Sample, best_sample, samples
from tune_bisenet.report.source import to_python
from tune_bisenet.report.views import View

AS_A_ROW = "As a row to paste into the file of a space."
ON_A_PROXY = " It is on the scale of the space's own rows, of which this proxy trained a part."


@dataclass(frozen=True, kw_only=True)
class StudySections:
    """The sections that only a sampled search has."""

    best: str
    caution: str
    """Why not to trust that; empty where fresh seeds say how far."""
    source: str
    """Of the best trial; empty before there is one."""
    source_words: str
    fresh: list[View]
    front: View | None
    """None where mIoU is the only goal."""
    importance: View
    slices_words: str
    front_figure: Figure | None
    history: Figure | None
    importance_figures: list[Figure]
    parallel: Figure | None
    slices: list[Figure]

    @property
    def figures(self) -> list[Figure]:
        singles = [self.front_figure, self.history, self.parallel]
        return [*(one for one in singles if one), *self.importance_figures, *self.slices]


def study_sections(search: SearchRecord) -> StudySections | None:
    """None for a grid."""
    if search.study is None:
        return None
    of = samples(search)
    fresh, found = confirmed(search, of), importances(of)
    has_latency = "latency" in search.study.objectives
    num_trials = sum(one.miou is not None and not one.is_known for one in of)
    return StudySections(
        best=best_words(of, num_trials=num_trials),
        caution="" if fresh or not any(one.miou is not None for one in of) else CAUTION,
        source=_source(of),
        source_words=AS_A_ROW + (ON_A_PROXY if search.manifest.proxy else ""),
        fresh=fresh,
        front=front_view(of) if has_latency else None,
        importance=importance_view(found),
        slices_words=slices_words(of),
        front_figure=front_figure(of) if has_latency else None,
        history=history(of),
        importance_figures=importance_figures(found),
        parallel=parallel(of),
        slices=slices(of),
    )


def best_lines(search: SearchRecord) -> list[str]:
    """What a terminal says of the best of a study, a sentence or more a line; nothing of a grid."""
    if search.study is None:
        return []
    of = samples(search)
    num_trials = sum(one.miou is not None and not one.is_known for one in of)
    fresh = [view.words for view in confirmed(search, of)]
    return [best_words(of, num_trials=num_trials), *(fresh or [CAUTION] if num_trials else [])]


def _source(of: list[Sample]) -> str:
    best = best_sample(one for one in of if not one.is_known)
    if best is None:
        return ""
    row = best.suggested.row or best.run
    return to_python(row.model_copy(update={"name": "best", "expect": None}))
