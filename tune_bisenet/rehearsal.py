"""What a sampled search needs before its first trial: a space to draw from, what is known, a study that answers.

Everything here raises a ValueError in words for the user.
"""

import json
import os
from collections.abc import Mapping

from pyarrow.fs import FileSelector, FileType

from tune_bisenet.arguments import STUDY_VARIABLE, Arguments, Choices
from tune_bisenet.flight import Draft, Sampling, Survey
from tune_bisenet.plan import Settings
from tune_bisenet.report.read import read_search
from tune_bisenet.secrets import HIDDEN, hidden
from tune_bisenet.spaces import Sampled
from tune_bisenet.storage import Storage
from tune_bisenet.study import sampling, warm
from tune_bisenet.study.place import study_place
from tune_bisenet.study.study import Question
from tune_bisenet.suggested import KNOWN, RUN, Known, Suggested


def rehearse(survey: Survey, settings: Settings) -> Draft | None:
    """Draw the rows, as they will be trained, and many points besides; None for a grid, of which nothing is drawn."""
    space, choices = survey.space, survey.choices
    if not isinstance(space, Sampled):
        return None
    sampling.check_rows(space)
    seed = choices.parts[0].seeds[0]
    draw = sampling.draw_with(space, settings, survey.facts, choices.objectives)
    declared = {row.name: row for row in space.rows}
    rows = {
        run.name: (run, sampling.point_of(declared[run.name], space, draw, choices.objectives)) for run in survey.runs
    }
    question = Question(draw=draw, rows=rows, objectives=choices.objectives, sampler=choices.sampler, seed=seed)
    return Draft(question=question, points=tuple(sampling.rehearse(draw, seed=seed)))


def prepare(survey: Survey, draft: Draft, data_digests: Mapping[str, str]) -> Sampling:
    """Everything else. ValueError with the first thing that is wrong: the database, the earlier search, the space."""
    given, choices, is_new = survey.arguments, survey.choices, survey.earlier is None
    place = study_place(survey.folder, url=_study_url(given, choices), cache_dir=survey.cache_dir)
    place.check(survey.name, is_new=is_new)
    suggested = {} if is_new else read_suggested(survey.folder)
    _check_same_draws(suggested, draft.question)
    here = warm.Here(
        draw=draft.question.draw,
        rows=draft.question.rows,
        data_digests=data_digests,
        backbone_digest=survey.backbone_digest,
        precision=choices.precision,
        objectives=choices.objectives,
    )
    taken = _known(survey.folder, given.warm_start or choices.warm_start, here)
    return Sampling(
        question=draft.question, suggested=suggested, known=taken.known, left_out=taken.left_out, place=place
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
