"""What Ray is asked for: the whole machine, and nothing twice."""

import pytest

from tune_bisenet.arguments import Arguments
from tune_bisenet.ray_session import ClusterError, allot

# cluster, flags, trials -> CPUs a trial, GPUs a trial, trials at once
ALLOTTED = {
    "ten trials on two cores take one each": ({"CPU": 2}, {}, 10, (1, 0, 2)),
    "one trial takes all cores": ({"CPU": 2}, {"max_concurrent": 1}, 10, (2, 0, 1)),
    "three trials share 64 cores": ({"CPU": 64}, {}, 3, (21, 0, 3)),
    "a trial takes a GPU where there are any": ({"CPU": 16, "GPU": 4}, {}, 10, (4, 1, 4)),
    "a GPU is shared by four trials": ({"CPU": 16, "GPU": 1}, {"gpus_per_trial": 0.25}, 10, (4, 0.25, 4)),
    "GPUs may be left alone": ({"CPU": 16, "GPU": 4}, {"gpus_per_trial": 0}, 8, (2, 0, 8)),
    "cores asked for bound the trials": ({"CPU": 8}, {"cpus_per_trial": 3}, 10, (3, 0, 2)),
}


@pytest.mark.parametrize(("cluster", "flags", "num_trials", "expected"), ALLOTTED.values(), ids=ALLOTTED)
def test_resources_fit_the_machine(
    cluster: dict[str, float], flags: dict[str, object], num_trials: int, expected: tuple[int, float, int]
) -> None:
    found = allot(cluster, Arguments.model_validate(flags), num_trials=num_trials)
    assert (found.cpus_per_trial, found.gpus_per_trial, found.concurrency) == expected


@pytest.mark.parametrize("flags", [{"cpus_per_trial": 3}, {"gpus_per_trial": 1}])
def test_more_than_there_is_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ClusterError, match="Lower --cpus-per-trial or --gpus-per-trial"):
        allot({"CPU": 2}, Arguments.model_validate(flags), num_trials=10)
