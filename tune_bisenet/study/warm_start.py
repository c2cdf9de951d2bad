"""Trials of other origin: those of an earlier search that a study may begin with, and fresh seeds for its best.

Only what was trained as it would be trained in this search is taken over: the same frames, backbone, precision, epochs
and size. A curve of another scale would mislead the sampler and early stopping.
"""

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

from tune_bisenet.config import Run, format_size
from tune_bisenet.records import ENDED_WELL, TrialRecord, TrialSpec, TrialState
from tune_bisenet.report.read import SearchRecord
from tune_bisenet.study.sampling import sample_at
from tune_bisenet.study.study import StudySetup


def warm_start(
    setup: StudySetup,
    search: SearchRecord,
    *,
    data_digests: Mapping[str, str],
    backbone_digest: str,
    precision: str,
) -> StudySetup:
    """Return `setup` with the trials of an earlier search. Raise ValueError if none can be used, saying why.

    `data_digests` are this search's, by image size.
    """
    manifest = search.manifest
    digests = manifest.data.digests
    problems = []
    if not digests.keys() & data_digests.keys():
        problems.append(f"its images were {' and '.join(digests)} and are {' and '.join(data_digests)} here.")
    if any(digests[size] != digest for size, digest in data_digests.items() if size in digests):
        problems.append(f"its frames ({manifest.config.data}) are not those of this search.")
    if manifest.backbone_digest != backbone_digest:
        problems.append(f"its backbone ({manifest.config.backbone}) is not that of this search.")
    if manifest.config.precision != precision:
        problems.append(f"its precision was {manifest.config.precision} and is {precision} here.")
    if problems:
        raise ValueError(f"--warm-start {search.folder.uri}: {' '.join(problems)}")
    known, left_out = [], {}
    for name in search.trials:
        taken = _known_trial(name, search, setup, data_digests)
        if isinstance(taken, str):
            left_out[name] = taken
        else:
            known.append(taken)
    if not known:
        reasons = " ".join(f"{name}: {reason}." for name, reason in list(left_out.items())[:3])
        raise ValueError(f"--warm-start {search.folder.uri}: none of its trials can be used here. {reasons}")
    return replace(setup, known=tuple(known), left_out=left_out)


def fresh_runs(
    trials: Iterable[tuple[TrialSpec, TrialState]], rows: Mapping[str, Run], *, baseline: str | None, count: int
) -> list[Run]:
    """Return `count` runs each of the best sampled run, the best row and the baseline, with seeds none of them had.

    The best of many looks better than it is, so it is trained again before it is believed. `trials` are all trials, of
    earlier searches too. Empty if no sampled trial was trained to its end.
    """
    candidates = [(spec, state) for spec, state in trials if spec.origin != "confirm"]
    mious: dict[str, list[float]] = {}
    runs: dict[str, dict[str, Run]] = {"row": {}, "sampled": {}}
    for spec, state in candidates:
        if state.status == "finished" and state.best_miou is not None:
            mious.setdefault(spec.run.name, []).append(state.best_miou)
            runs[spec.origin][spec.run.name] = spec.run
    # By the mean over seeds: of a row with several, the luckiest trial would flatter it.
    best = {
        origin: max(by_name.values(), key=lambda run: statistics.fmean(mious[run.name]))
        for origin, by_name in runs.items()
        if by_name
    }
    if "sampled" not in best:
        return []
    compared = [best["sampled"]]
    compared += [rows[baseline]] if baseline is not None and baseline in rows else []
    compared += [best["row"]] if "row" in best else []
    different = {run.name: run for run in compared}.values()
    first_seed = 1 + max(spec.run.seed for spec, _state in candidates)
    return [run.model_copy(update={"seed": first_seed + index}) for index in range(count) for run in different]


def _known_trial(name: str, search: SearchRecord, setup: StudySetup, sizes: Mapping[str, str]) -> TrialRecord | str:
    """Return the trial as this search knows it, or why it cannot be used."""
    record = search.trials[name]
    run, state = record.run, record.state
    if state.status not in ENDED_WELL or not record.epochs:
        return f"it has not ended well ({state.status})"
    if "latency" in setup.space.objectives and state.latency_ms is None:
        return "its latency was not measured"
    if format_size(run.image_size) not in sizes:
        return f"its images were {format_size(run.image_size)}"
    is_row = run.name in setup.rows
    if is_row:
        sampled = setup.rows[run.name]
    elif not record.spec.params:
        return "it is no row of this space"
    else:
        try:
            sampled = sample_at(record.spec.params, setup.space.sample_run)
        except Exception as error:  # this space was not written for its parameters
            return f"it is no point of this space: {error}"
    ignored = {"name", "expect", "seed"}  # another seed is another sample of the same run
    before, now = (one.model_dump(exclude=ignored) for one in (run, sampled.run))
    differing = [f"{field} {before[field]}, here {now[field]}" for field in before if before[field] != now[field]]
    if differing:
        return f"it was trained otherwise ({', '.join(differing)})"
    prefix = "" if is_row else "earlier-"  # because this search has a `t0012` of its own
    taken = replace(sampled, run=run.model_copy(update={"name": prefix + run.name}))
    return TrialRecord(
        spec=taken.spec(prefix + name, origin="row" if is_row else "sampled"),
        state=replace(state, trial=prefix + name, run=prefix + run.name),
        epochs=tuple(record.epochs),
        environments=record.environments,
        source=(search.folder / name).uri,
    )
