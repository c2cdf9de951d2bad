"""A search that is there already: found, gone on with as it was begun, and refused where it would become another.

Everything here raises a ValueError in words for the user.
"""

from collections.abc import Collection, Mapping
from typing import Any

from tune_bisenet import ledger
from tune_bisenet.arguments import DEFAULT_TRIALS, Arguments, Choices, Limits, asked_for
from tune_bisenet.config import Run
from tune_bisenet.flight import Survey
from tune_bisenet.spaces import Sampled, Space
from tune_bisenet.storage import Storage


def find(given: Arguments, folder: Storage, name: str) -> dict[str, Any] | None:
    """The manifest of the search that is gone on with; None for a new one."""
    if given.continues and given.name is None:
        raise ValueError("--resume, --add and --rerun need the --name of the search to go on with.")
    earlier = ledger.read_search(folder)
    if given.continues and earlier is None:
        raise ValueError(f"there is no search {name} in {given.storage} to go on with. Check --name and --storage.")
    if earlier is not None and not given.continues:
        raise ValueError(
            f"there is a search {name} in {given.storage} already. "
            "Go on with it by --resume, give it more trials by --add, or take another --name."
        )
    return earlier


def continued(given: Arguments, earlier: dict[str, Any]) -> Choices:
    """The choices of the search that is resumed or added to. ValueError if a flag asks for something else."""
    before = Choices.model_validate(earlier["choices"])
    changed = [name for name, value in asked_for(given).items() if value != getattr(before, name)]
    if not given.add:
        first = before.parts[0]
        changed += ["runs"] if given.runs not in (None, first.runs) else []
        changed += ["seeds"] if given.seeds not in (None, first.seeds) else []
    if changed:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in changed)
        raise ValueError(
            f"{flags} differs from what this search was started with. Leave it out to resume the search, "
            "give the search more trials by --add, or start another under another --name."
        )
    return before.with_part(runs=given.runs, seeds=given.seeds) if given.add else before


def limits(given: Arguments, earlier: dict[str, Any] | None, space: Space) -> Limits:
    """What is said now, or was when the search was started; a sampled search needs one of them."""
    said = Limits.model_validate((earlier or {}).get("limits") or {}).updated(given)
    bounded = (said.trials, said.time_budget, said.gpu_hours) != (None, None, None)
    if isinstance(space, Sampled) and not bounded:
        return said.model_copy(update={"trials": DEFAULT_TRIALS})
    return said


def check(planned: Survey) -> None:
    """ValueError if there is nothing to go on with, or other rows than before."""
    if planned.earlier:
        _check_something_to_do(planned, planned.earlier)
        _check_same_rows(planned.runs, planned.earlier)


def check_same_data(digests: Mapping[str, str], earlier: dict[str, Any]) -> None:
    """`digests` are of the packs that there are now."""
    before = earlier["data"]["digests"]
    if any(before.get(size, digest) != digest for size, digest in digests.items()):
        raise ValueError(
            f"the frames in {earlier['data']['name']} have changed since this search was started. "
            "Bring them back to resume it, or start another under another --name."
        )


def _check_something_to_do(planned: Survey, earlier: dict[str, Any]) -> None:
    """ValueError if `--add` names nothing new, or `--rerun` a row of which nothing has failed."""
    given = planned.arguments
    known = {(run["name"], run["seed"]) for run in earlier["trials"].values()}
    if given.add and all((run.name, run.seed) in known for run in planned.runs):
        raise ValueError("--add: this search has all these rows and seeds already. Name seeds or rows that are new.")
    standings = ledger.read_trials(planned.folder).standings
    failed = {standing.run for standing in standings if standing.status == "failed"}
    sound = [name for name in given.rerun or () if name not in failed]
    if sound:
        raise ValueError(
            f"--rerun {', '.join(sound)}: nothing of that has failed. "
            + (f"What has: {', '.join(sorted(failed))}." if failed else "Nothing has, in this search.")
        )


def _check_same_rows(runs: Collection[Run], earlier: dict[str, Any]) -> None:
    """A row edited since would go on under the old one's name and results. What is expected of it may be edited."""
    before = {(run["name"], run["seed"]): Run.model_validate(run).fingerprint() for run in earlier["trials"].values()}
    changed = {run.name for run in runs if before.get((run.name, run.seed), run.fingerprint()) != run.fingerprint()}
    if changed:
        raise ValueError(
            f"the space says other things of {', '.join(sorted(changed))} than when this search was started. "
            "Bring the rows back to resume it, or start another search under another --name."
        )
