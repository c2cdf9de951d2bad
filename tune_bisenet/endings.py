"""How a trial ended, as its own folder tells it, once it has let go of what it would have gone on from.

`trials.json` says the same of all trials, but not at every moment, and may be lost.
"""

import json
from collections.abc import Iterable, Sequence

from tune_bisenet.results import ENDED, ENDED_WELL, LAST, PREVIOUS, Standing
from tune_bisenet.storage import Storage


def keep(folder: Storage, standing: Standing) -> None:
    """The trial in `folder` has ended well: nothing will go on from its last epoch. Its best weights stay."""
    folder.write(ENDED, json.dumps(standing.to_json(), ensure_ascii=False).encode())
    for name in (LAST, PREVIOUS):
        if folder.exists(name):
            folder.delete(name)


def completed(search: Storage, earlier: Sequence[Standing], trials: Iterable[str]) -> list[Standing]:
    """`earlier`, and in its place what the folders of `trials` say of ends that it has not heard of."""
    known = {standing.trial: standing for standing in earlier}
    for trial in trials:
        is_open = trial not in known or known[trial].status not in ENDED_WELL
        if is_open and (ending := read(search / trial)):
            known[trial] = ending
    return list(known.values())


def read(folder: Storage) -> Standing | None:
    """How the trial in `folder` ended; None if it has not, or the file is damaged."""
    try:
        return Standing.from_json(json.loads(folder.read(ENDED) or b"null"))
    except (ValueError, TypeError, AttributeError):  # no JSON, or JSON of another shape
        return None
