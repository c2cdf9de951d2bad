"""What trials request from Ray: the whole cluster, and no core twice; more than there is where the cluster grows."""

import stat
import sys
from pathlib import Path

import pytest
from helpers.processes import LoggedProcess, environment

from tune_bisenet.config import Resources
from tune_bisenet.options import InputError, Options
from tune_bisenet.search import resources
from tune_bisenet.search.resources import Cluster, Node, allocate, find_bf16, ray_session


def cluster(*nodes: tuple[float, float], autoscales: bool = False) -> Cluster:
    """A cluster of nodes with these CPUs and GPUs."""
    return Cluster(tuple(Node(cpus=cpus, gpus=gpus) for cpus, gpus in nodes), autoscales=autoscales)


def options(**flags: object) -> Options:
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
    found = allocate(cluster(*nodes), options(**flags), num_trials=num_trials)
    assert (found.cpus_per_trial, found.gpus_per_trial, found.concurrency) == expected


def test_a_trial_has_as_many_threads_as_cores_unless_its_search_began_with_others() -> None:
    first = allocate(cluster((2, 0)), options(), num_trials=1)
    assert (first.cpus_per_trial, first.threads_per_trial) == (2, 2)
    later = allocate(cluster((2, 0)), options(), num_trials=2, threads_per_trial=first.threads_per_trial)
    assert (later.cpus_per_trial, later.threads_per_trial) == (1, 2)


@pytest.mark.parametrize("flags", [{"cpus_per_trial": 3}, {"gpus_per_trial": 1}, {"device": "cuda"}])
def test_a_request_that_is_too_large_is_refused(flags: dict[str, object]) -> None:
    with pytest.raises(InputError, match="Lower --cpus-per-trial or --gpus-per-trial"):
        allocate(cluster((2, 0)), options(**flags), num_trials=10)


def test_a_request_that_no_single_node_holds_is_refused() -> None:
    with pytest.raises(InputError, match="the largest of Ray's 2 nodes has 4 and 0"):
        allocate(cluster((4, 0), (2, 0)), options(cpus_per_trial=6), num_trials=10)


def test_a_device_without_a_gpu_for_it_is_refused() -> None:
    with pytest.raises(InputError, match="exclude each other"):
        allocate(cluster((2, 1)), options(device="cuda", gpus_per_trial=0), num_trials=10)


# --- the token of a Ray that is started here --------------------------------------------------------------------------


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a token that everyone can read, as Ray makes it, in a home of its own."""
    for variable in ("RAY_AUTH_MODE", *resources.TOKEN_VARIABLES):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / ".ray" / "auth_token"
    path.parent.mkdir()
    path.write_text("the token")
    path.chmod(0o644)
    return path


def test_a_token_that_others_can_read_is_made_private_and_kept(token: Path) -> None:
    resources._make_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert token.read_text() == "the token"


@pytest.mark.parametrize(
    ("variable", "value"),
    [("RAY_AUTH_MODE", "disabled"), ("RAY_AUTH_TOKEN", "another"), ("RAY_AUTH_TOKEN_PATH", "/run/secrets/token")],
)
def test_what_the_user_says_of_tokens_holds(
    token: Path, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    resources._make_token_private()
    assert stat.S_IMODE(token.stat().st_mode) == 0o644


def test_a_home_without_room_for_a_token_is_named_before_ray_starts(
    token: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(token))
    with pytest.raises(InputError, match=r"\.ray/auth_token .*RAY_AUTH_TOKEN"), ray_session(None):
        pass


# --- a Ray that hangs -------------------------------------------------------------------------------------------------


@pytest.mark.ray
@pytest.mark.slow
def test_a_ray_that_does_not_come_up_is_given_up_with_what_to_do(tmp_path: Path) -> None:
    wait = "resources.START_SECONDS = 0.2"  # no Ray is as fast
    code = f"from tune_bisenet.search import resources; {wait}; resources.ray_session(None).__enter__()"
    env = environment(tmp_path) | {"RAY_TMPDIR": "/tmp"}  # Ray's sockets demand a short name
    with LoggedProcess([sys.executable, "-c", code], log=tmp_path / "log", env=env) as process:
        assert process.end() == 2
        assert "Ray has not started within 0 s. Are there memory" in process.log


# --- a cluster that starts nodes for waiting trials -------------------------------------------------------------------


def test_on_an_empty_autoscaling_cluster_a_trial_requests_a_gpu_and_a_core() -> None:
    found = allocate(cluster(autoscales=True), options(), num_trials=10)
    assert (found.cpus_per_trial, found.gpus_per_trial, found.concurrency, found.grows) == (1, 1, 1, True)


def test_on_an_autoscaling_cluster_flags_hold_even_if_no_node_has_as_much_yet() -> None:
    found = allocate(cluster((4, 1), autoscales=True), options(gpus_per_trial=0.5, cpus_per_trial=16), num_trials=10)
    assert (found.cpus_per_trial, found.gpus_per_trial) == (16, 0.5)


def test_a_plan_for_gpus_takes_them_to_have_bf16_and_a_trial_without_one_asks_the_cpu() -> None:
    on_cpu = find_bf16(options(device="cpu"))
    assert on_cpu == bool({"avx512_bf16", "amx_bf16"} & set(Path("/proc/cpuinfo").read_text().split()))
    assert find_bf16(options(gpus=4))
    assert find_bf16(options(gpus=4, gpus_per_trial=0)) == on_cpu


def test_an_empty_cluster_that_does_not_autoscale_is_refused() -> None:
    with pytest.raises(InputError, match="Ray has no node with a CPU"):
        allocate(cluster(), options(), num_trials=10)


def test_one_trial_more_than_fits_makes_an_autoscaling_cluster_grow() -> None:
    each = Resources(cpus_per_trial=1, gpus_per_trial=0.5, max_concurrent=None, concurrency=1, grows=True)
    sizes = [cluster(*[(4.0, 1.0)] * count, autoscales=True).max_in_flight(each) for count in (0, 1, 3)]
    assert sizes == [1, 3, 7]


def test_max_concurrent_is_requested_at_once_only_where_the_cluster_autoscales() -> None:
    each = Resources(cpus_per_trial=1, gpus_per_trial=1, max_concurrent=8, concurrency=1)
    assert cluster((4, 1), autoscales=True).max_in_flight(each) == 8
    assert cluster((4, 2)).max_in_flight(each) == 2
    assert cluster(*[(4.0, 4.0)] * 4).max_in_flight(each) == 8


def test_a_cluster_that_has_lost_all_nodes_still_gets_one_trial() -> None:
    assert (
        cluster().max_in_flight(Resources(cpus_per_trial=1, gpus_per_trial=1, max_concurrent=None, concurrency=1)) == 1
    )
