"""What Ray is asked for: the whole cluster, and nothing twice; more than there is, where more comes when asked for."""

import pytest

from tune_bisenet.config import Resources
from tune_bisenet.options import Options
from tune_bisenet.search.resources import Cluster, ClusterError, Node, allocate


def cluster(*nodes: tuple[float, float], grows: bool = False) -> Cluster:
    """Of nodes with so many CPUs and GPUs."""
    return Cluster(tuple(Node(id=f"n{i}", cpus=cpus, gpus=gpus) for i, (cpus, gpus) in enumerate(nodes)), grows=grows)


def asked(**flags: object) -> Options:
    return Options.model_validate(flags)


# nodes as (CPUs, GPUs), flags, trials -> CPUs a trial, GPUs a trial, trials at once
ALLOTTED = {
    "ten trials on two cores take one each": ([(2, 0)], {}, 10, (1, 0, 2)),
    "one trial takes all cores": ([(2, 0)], {"max_concurrent": 1}, 10, (2, 0, 1)),
    "three trials share 64 cores": ([(64, 0)], {}, 3, (21, 0, 3)),
    "a trial takes a GPU where there are any": ([(16, 4)], {}, 10, (4, 1, 4)),
    "a GPU is shared by four trials": ([(16, 1)], {"gpus_per_trial": 0.25}, 10, (4, 0.25, 4)),
    "GPUs may be left alone": ([(16, 4)], {"gpus_per_trial": 0}, 8, (2, 0, 8)),
    "cores asked for bound the trials": ([(8, 0)], {"cpus_per_trial": 3}, 10, (3, 0, 2)),
    "a trial runs on one node, so cores are not added up": ([(3, 0), (3, 0)], {"cpus_per_trial": 2}, 10, (2, 0, 2)),
    "three trials on two nodes: one shares its node": ([(4, 0), (4, 0)], {}, 3, (2, 0, 3)),
    "trials go where GPUs are": ([(32, 0), (8, 2)], {}, 10, (4, 1, 2)),
    "a part of a GPU is taken of one GPU": ([(16, 2)], {"gpus_per_trial": 0.6}, 10, (8, 0.6, 2)),
    "--device cpu takes no GPU": ([(8, 2)], {"device": "cpu"}, 4, (2, 0, 4)),
    "--device cpu on GPUs that were asked for": ([(8, 2)], {"device": "cpu", "gpus_per_trial": 1}, 4, (4, 1, 2)),
}


@pytest.mark.parametrize(("nodes", "flags", "num_trials", "expected"), ALLOTTED.values(), ids=ALLOTTED)
def test_resources_fit_the_machines(
    nodes: list[tuple[float, float]],
    flags: dict[str, object],
    num_trials: int,
    expected: tuple[int, float, int],
) -> None:
    found = allocate(cluster(*nodes), asked(**flags), num_trials=num_trials)
    assert (found.cpus_per_trial, found.gpus_per_trial, found.concurrency) == expected


@pytest.mark.parametrize("flags", [{"cpus_per_trial": 3}, {"gpus_per_trial": 1}, {"device": "cuda"}])
def test_more_than_there_is_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ClusterError, match="Lower --cpus-per-trial or --gpus-per-trial"):
        allocate(cluster((2, 0)), asked(**flags), num_trials=10)


def test_what_no_single_node_holds_is_refused() -> None:
    with pytest.raises(ClusterError, match="the largest of Ray's 2 nodes has 4 and 0"):
        allocate(cluster((4, 0), (2, 0)), asked(cpus_per_trial=6), num_trials=10)


def test_a_gpu_that_must_be_used_but_not_taken_is_refused() -> None:
    with pytest.raises(ClusterError, match="exclude each other"):
        allocate(cluster((2, 1)), asked(device="cuda", gpus_per_trial=0), num_trials=10)


# --- a cluster that starts nodes when they are asked for --------------------------------------------------------------


def test_an_empty_cluster_that_grows_is_asked_for_a_gpu_and_a_core_a_trial() -> None:
    found = allocate(cluster(grows=True), asked(), num_trials=10)
    assert (found.cpus_per_trial, found.gpus_per_trial, found.concurrency, found.grows) == (1, 1, 1, True)


def test_a_cluster_that_grows_is_asked_for_what_was_said_even_if_no_node_has_it_yet() -> None:
    found = allocate(cluster((4, 1), grows=True), asked(gpus_per_trial=4, cpus_per_trial=16), num_trials=10)
    assert (found.cpus_per_trial, found.gpus_per_trial) == (16, 4)


def test_an_empty_cluster_that_does_not_grow_is_refused() -> None:
    with pytest.raises(ClusterError, match="Ray has no node with a CPU"):
        allocate(cluster(), asked(), num_trials=10)


def test_a_study_asks_for_one_trial_more_than_fits_as_the_cluster_grows() -> None:
    each = Resources(cpus_per_trial=1, gpus_per_trial=0.5, max_concurrent=None, concurrency=1, grows=True)
    sizes = [cluster(*[(4.0, 1.0)] * count, grows=True).can_take(each) for count in (0, 1, 3)]
    assert sizes == [1, 3, 7]


def test_a_bound_is_asked_for_at_once_where_nodes_come_and_only_as_far_as_it_fits_where_not() -> None:
    each = Resources(cpus_per_trial=1, gpus_per_trial=1, max_concurrent=8, concurrency=1)
    assert cluster((4, 1), grows=True).can_take(each) == 8
    assert cluster((4, 2)).can_take(each) == 2
    assert cluster(*[(4.0, 4.0)] * 4).can_take(each) == 8


def test_a_cluster_whose_nodes_are_all_gone_can_still_take_one() -> None:
    assert cluster().can_take(Resources(cpus_per_trial=1, gpus_per_trial=1, max_concurrent=None, concurrency=1)) == 1


@pytest.mark.parametrize("flags", [{"device": "gpu"}, {"gpus_per_trial": 1.5}])
def test_flags_that_no_cluster_understands_are_refused(flags: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(flags))):
        asked(**flags)
