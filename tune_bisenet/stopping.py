"""The Ray edge of early stopping: takes trials' results to a judge and its verdicts back to Tune.

Tune keeps no scheduler's state over a restart, so this one hands its own out, as JSON, and is built from it again.
It decides nothing itself: the rules, and what their state holds, are in `rungs` and `median`.
"""

from typing import Any, Final

from ray.tune.experiment import Trial
from ray.tune.result import DEFAULT_METRIC
from ray.tune.schedulers import FIFOScheduler, TrialScheduler

from tune_bisenet.config import Run
from tune_bisenet.rungs import Judge

METRIC: Final = "miou"
MODE: Final = "max"


class EarlyStopping(FIFOScheduler):
    """Start trials first in, first out; stop those that `judge` objects to.

    With `Rungs(rungs_of=no_rungs)` it is a plain FIFO scheduler that stops diverged trials.

    A result holds `epoch` (done, from 1), `miou` (percent, finite) and `diverged`; the trial's config holds the run's
    plain dict under "run", and `trial_name_creator` gives each trial a name that is unique in the search.
    """

    # Named, the metric would be demanded of every result, and a trial that resumes at its end and has nothing left to
    # report would end the whole search (seen in Ray 2.60). For the same reason leave it out of TuneConfig.
    _metric = DEFAULT_METRIC

    def __init__(self, judge: Judge) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.judge = judge

    @property
    def stops(self) -> dict[str, str]:
        """Why each stopped trial was stopped, by its name."""
        return self.judge.stops

    def state(self) -> dict[str, Any]:
        """For the judge's `from_json` in the next driver. Tune's callbacks get a result after it was judged here."""
        return self.judge.to_json()

    def set_search_properties(self, metric: str | None, mode: str | None, **_spec: Any) -> bool:
        """Whether `TuneConfig(metric=, mode=)` agrees: left out or the same. On False Tune raises a ValueError."""
        return metric in (None, METRIC) and mode in (None, MODE)

    def on_trial_result(self, _tune_controller: Any, trial: Trial, result: dict[str, Any]) -> str:
        if result.get("done"):
            # The trial has returned. Tune repeats its last result, which was judged when it came; of a trial that
            # resumed at its end and had nothing left to report, the result holds none of our keys.
            return TrialScheduler.CONTINUE
        missing = {"epoch", METRIC, "diverged"} - result.keys()
        assert not missing, f"trial {trial} reported no {', '.join(sorted(missing))}"
        verdict = self.judge.judge(
            Run.model_validate(trial.config["run"]),
            trial_name(trial),
            epoch=result["epoch"],
            miou=result[METRIC],
            diverged=result["diverged"],
        )
        return TrialScheduler.STOP if verdict.stop else TrialScheduler.CONTINUE

    def debug_string(self) -> str:
        return f"stopped early: {len(self.stops)}"


def trial_name(trial: Trial) -> str:
    """The name that outlives a restart. Ray's trial_id does not, nor does `str(trial)` where no name was given."""
    assert trial.custom_trial_name, "trials need TuneConfig(trial_name_creator=...)"
    return str(trial.custom_trial_name)
