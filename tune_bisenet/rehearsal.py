"""What a sampled search needs before its first trial: a space to draw from, what is known, a study that answers.

Everything here raises a ValueError in words for the user.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pyarrow.fs import FileSelector, FileType

from tune_bisenet import sampling, warm
from tune_bisenet.arguments import STUDY_VARIABLE, Arguments, Choices
from tune_bisenet.config import Run
from tune_bisenet.plan import DataFacts, Settings
from tune_bisenet.report.read import read_search
from tune_bisenet.sampling import Point
from tune_bisenet.secrets import HIDDEN, hidden
from tune_bisenet.spaces import Sampled
from tune_bisenet.storage import Storage
from tune_bisenet.study import Question
from tune_bisenet.study_place import StudyPlace, study_place
from tune_bisenet.suggested import KNOWN, RUN, Known, Suggested


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A space that has been drawn from."""

    question: Question
    points: tuple[Point, ...]
    """Drawn at random."""

    @property
    def runs(self) -> tuple[Run, ...]:
        """The declared rows, and runs such as the search may draw."""
        return (*(run for run, _point in self.question.rows.values()), *(point.run for point in self.points))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """A sampled search that has nothing wrong with it."""

    question: Question
    drawn: tuple[Run, ...]
    """Such as this search may draw."""
    suggested: Mapping[str, Suggested]
    """The trials that it has had already, by number; fresh seeds last."""
    known: tuple[Known, ...]
    left_out: Mapping[str, str]
    """Trials of `--warm-start` that are not known here, and why."""
    place: StudyPlace

    @property
    def example(self) -> Run:
        """The first of them."""
        return self.drawn[0]


def rehearse(space: Sampled, runs: Sequence[Run], choices: Choices, settings: Settings, facts: DataFacts) -> Draft:
    """Draw the rows, which are `runs` as they will be trained, and many points besides."""
    sampling.check_rows(space)
    seed = choices.parts[0].seeds[0]
    draw = sampling.draw_with(space, settings, facts, choices.objectives)
    declared = {row.name: row for row in space.rows}
    rows = {run.name: (run, sampling.point_of(declared[run.name], space, draw, choices.objectives)) for run in runs}
    question = Question(draw=draw, rows=rows, objectives=choices.objectives, sampler=choices.sampler, seed=seed)
    return Draft(question=question, points=tuple(sampling.rehearse(draw, seed=seed)))


def prepare(
    draft: Draft,
    given: Arguments,
    choices: Choices,
    *,
    name: str,
    folder: Storage,
    is_new: bool,
    data_digests: Mapping[str, str],
    backbone_digest: str,
    cache_dir: Path,
) -> Sampling:
    """Everything else. ValueError with the first thing that is wrong: the database, the earlier search, the space."""
    place = study_place(folder, url=_study_url(given, choices), cache_dir=cache_dir)
    place.check(name, is_new=is_new)
    suggested = {} if is_new else read_suggested(folder)
    _check_same_draws(suggested, draft.question)
    here = warm.Here(
        draw=draft.question.draw,
        rows=draft.question.rows,
        data_digests=data_digests,
        backbone_digest=backbone_digest,
        precision=choices.precision,
        objectives=choices.objectives,
    )
    taken = _known(folder, given.warm_start or choices.warm_start, here)
    return Sampling(
        question=draft.question,
        drawn=tuple(point.run for point in draft.points),
        suggested=suggested,
        known=taken.known,
        left_out=taken.left_out,
        place=place,
    )


def _study_url(given: Arguments, choices: Choices) -> str | None:
    """With its password, which only the command line or the environment has; None for a file of the search's own."""
    address = given.study or choices.study
    if address is None or HIDDEN not in address:
        return address
    variable = os.environ.get(STUDY_VARIABLE)
    if variable is not None and hidden(variable) == address:
        return variable
    raise ValueError(
        f"the study lies in {address}, and nothing of its password is kept. "
        f"Give the address with its password by --study, or in ${STUDY_VARIABLE}."
    )


def _known(folder: Storage, warm_start: str | None, here: warm.Here) -> warm.Taken:
    """As it was taken over when the search began, or now."""
    content = folder.read(KNOWN)
    if content is not None:
        return warm.Taken(known=tuple(Known.from_json(record) for record in json.loads(content)), left_out={})
    if warm_start is None:
        return warm.Taken(known=(), left_out={})
    return warm.take_over(read_search(Storage.at(warm_start)), here)


# --- the trials it has had ------------------------------------------------------------------------------------------


def read_suggested(folder: Storage) -> dict[str, Suggested]:
    """Of every trial in the search's folder that says what it trains, by number; fresh seeds last.

    A damaged file is passed over: the study still has the trial, and the file is written anew from it.
    """
    places = [
        info for info in folder.filesystem.get_file_info(FileSelector(folder.path)) if info.type == FileType.Directory
    ]
    found = [one for place in places if (one := _read_run(folder / place.base_name)) is not None]
    in_order = sorted(found, key=lambda one: (one.number is None, one.number or 0, one.trial))
    return {one.trial: one for one in in_order}


def _read_run(folder: Storage) -> Suggested | None:
    try:
        content = folder.read(RUN)
        return None if content is None else Suggested.from_json(json.loads(content))
    except (ValueError, LookupError, TypeError, AttributeError):
        return None


def _check_same_draws(suggested: Mapping[str, Suggested], question: Question) -> None:
    """A space edited since would draw other runs from the values that its trials were drawn with."""
    changed = [name for name, one in suggested.items() if one.params and not _is_drawn(one, question)]
    if changed:
        raise ValueError(
            f"the space draws other runs than when this search was started, as of {', '.join(changed[:3])}. "
            "Bring it back to resume the search, or start another under another --name."
        )


def _is_drawn(suggested: Suggested, question: Question) -> bool:
    try:
        drawn = sampling.point_at(suggested.params, question.draw).run
    except Exception:  # the space is the user's own code
        return False
    return drawn.model_copy(update={"seed": suggested.run.seed}).fingerprint() == suggested.run.fingerprint()
