"""What is sent to a cluster, what is refused before anything is, and which id a search's job gets. Nothing runs Ray."""

import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from driving import PROJECT, write_space

from tune_bisenet import spaces
from tune_bisenet.jobs import submission
from tune_bisenet.jobs.job import Job, TakenError, checked_address, choose_id, is_local
from tune_bisenet.jobs.submission import Submission, prepare
from tune_bisenet.options import InputError, parse_options
from tune_bisenet.run import parser as run_parser

STORAGE = ["--storage", "s3://bucket/searches"]


def problems(*words: str) -> str:
    with pytest.raises(InputError) as refused:
        prepare([*words])
    return str(refused.value)


def flags_there(search: Submission) -> dict[str, object]:
    """The flags as the run on the cluster reads them from the job's command."""
    words = shlex.split(search.entrypoint)
    assert words[:6] == ["exec", "python", "-m", "tune_bisenet.run", "--address", "auto"]
    return vars(run_parser().parse_args(words[4:]))


# --- flags ----------------------------------------------------------------------------------------------------------


def test_the_run_gets_its_flags_the_cluster_and_a_name() -> None:
    search = prepare(["--runs", "r01,r02", "--data", "/srv/the data; rm -rf $HOME", *STORAGE])
    there = flags_there(search)
    assert there.pop("name") == search.name
    assert there == {
        "address": "auto",
        "runs": "r01,r02",
        "data": "/srv/the data; rm -rf $HOME",
        "storage": "s3://bucket/searches",
    }
    assert search.name.startswith("runs10-20")
    assert parse_options({"name": search.name})[1] == {}, "a name that the run takes"
    assert search.metadata == {"search": search.name, "storage": "s3://bucket/searches"}


def test_a_name_of_the_users_is_kept() -> None:
    for name in (["--name", "paper"], ["--name=paper"]):
        assert prepare([*name, *STORAGE]).name == "paper"
        assert flags_there(prepare([*name, *STORAGE]))["name"] == "paper"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--address", "auto", *STORAGE], "--address: the run will be on the cluster already"),
        (["--resume", *STORAGE], "need the --name"),
        ([], "--storage is needed"),
        (["--storage", "results"], "--storage results is a path from here on"),
        (["--data", "frames", *STORAGE], "--data frames is a path from here on"),
        (["--data", "~/frames", *STORAGE], "--data ~/frames is a path from here on"),
        (["--backbone", "resnet.pt", *STORAGE], "--backbone resnet.pt is a path from here on"),
        (["--warm-start", "results/paper", *STORAGE], "--warm-start results/paper is a path from here on"),
        (["--study", "sqlite:///study.db", *STORAGE], "--study: a relative path"),
        (["--space", "nosuch", *STORAGE], "there is none of that name"),
        (["--space", "nosuch.py", *STORAGE], "there is no file nosuch.py"),
        (["--runs", "r99", *STORAGE], "no row r99"),
        (["--epochs", "0", *STORAGE], "--epochs 0"),
        (["--name", "../x", *STORAGE], "is no name for a search"),
        (["--show"], "--show needs no cluster"),
        (["--plan", *STORAGE], "--plan starts nothing"),
    ],
)
def test_what_cannot_work_there_is_refused_here(words: list[str], said: str) -> None:
    assert said in problems(*words)


def test_all_that_is_wrong_is_said_at_once() -> None:
    said = problems("--epochs", "0", "--runs", "r99", "--data", "frames", "--address", "x:1").splitlines()
    assert len(said) == 5, "and that the storage is missing"


@pytest.mark.parametrize(
    "words",
    [
        ["--study", "postgresql://me:GEHEIM@host/studies"],
        ["--study=postgresql://me:GEHEIM@host/studies"],
        ["--study", "postgresql://me:GE/HEIM@host/studies"],
        ["--data", "s3://KEY:GEHEIM@bucket/data"],
        ["--warm-start", "s3://bucket/x?secret_key=GEHEIM"],
    ],
)
def test_a_password_is_not_sent_and_not_shown(words: list[str]) -> None:
    said = problems("--epochs", "0", "--name", "x", *words, *STORAGE)
    assert "holds a password" in said
    assert "$TUNE_BISENET_STUDY" in said
    assert "HEIM" not in said


def test_paths_there_and_variables_that_stay_here_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_BISENET_STUDY", "postgresql://me:GEHEIM@host/studies")
    search = prepare(["--storage", "/mnt/shared", "--backbone", "file:///mnt/resnet.pt"])
    said = "\n".join(search.cautions)
    assert "--storage /mnt/shared, --backbone /mnt/resnet.pt: on the cluster's machines" in said
    assert "$CITYSCAPES_DATASET of the head decides" in said
    assert "$TUNE_BISENET_STUDY is not sent" in said
    assert "GEHEIM" not in said + search.entrypoint
    monkeypatch.delenv("TUNE_BISENET_STUDY")
    assert prepare(["--data", "streets", "--backbone", "none", *STORAGE]).cautions == ()


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_two_packages_are_sent_whole_and_nothing_else() -> None:
    listing = subprocess.run(
        ["git", "ls-files", "tune_bisenet", "search_spaces"], cwd=PROJECT, capture_output=True, text=True, check=False
    )
    sent = prepare(STORAGE).files
    assert {place.partition("/")[0] for place in sent} == {"tune_bisenet", "search_spaces"}
    assert not [place for place in sent if "__pycache__" in place or place.endswith(".pyc")]
    if listing.returncode:
        pytest.skip("not a git checkout")
    assert set(listing.stdout.split()) <= set(sent)


def test_what_is_sent_runs_by_itself_with_a_space_given_by_its_path(tmp_path: Path) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_space(here / "mine.py", {"a": 0.01, "b": 0.02}, num_epochs=3)
    (here / "rates.py").write_text("RATE = 0.25\n")
    with (here / "mine.py").open("a") as file:
        file.write("import rates\nSPACE = Grid('of a helper', (row('z', rates.RATE),))\n")
    code = (
        "import sys; sys.path.insert(0, ''); from pathlib import Path; from tune_bisenet.jobs import submission; "
        "search = submission.prepare(sys.argv[2:]); submission.stage(search.files, Path(sys.argv[1])); "
        "print(search.entrypoint)"
    )
    prepared = subprocess.run(
        [sys.executable, "-c", code, str(there), "--space", "mine.py", *STORAGE],
        cwd=here,
        env=os.environ | {"PYTHONPATH": str(PROJECT)},
        capture_output=True,
        text=True,
        check=True,
    )
    words = shlex.split(prepared.stdout)
    assert words[words.index("--space") + 1] == "mine"
    assert words[words.index("--name") + 1].startswith("mine-20")
    where = "import sys; sys.path.insert(0, ''); import tune_bisenet, search_spaces.mine, rates; "
    where += "print(tune_bisenet.__file__, search_spaces.__file__, rates.__file__)"
    assert alone(there, "-c", where).count(str(there)) == 3
    assert "| z   | SGD lr 0.25" in alone(there, "-m", "tune_bisenet.run", "--show", "--space", "mine")


def alone(folder: Path, *words: str) -> str:
    """What Python prints in that folder, without this project in its path."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, *words], cwd=folder, env=rest, capture_output=True, text=True, check=True)
    return ran.stdout


def test_a_space_that_would_hide_one_of_the_package_is_refused(tmp_path: Path) -> None:
    write_space(tmp_path / "runs10.py", {"a": 0.01}, num_epochs=1)
    assert "has another runs10 already" in problems("--space", str(tmp_path / "runs10.py"), *STORAGE)
    same = prepare(["--space", str(PROJECT / "search_spaces" / "runs10.py"), *STORAGE])
    assert flags_there(same)["space"] == "runs10"
    (tmp_path / "my.space.py").write_text((tmp_path / "runs10.py").read_text())
    assert "Rename it" in problems("--space", str(tmp_path / "my.space.py"), *STORAGE)


def test_more_than_ray_takes_is_refused_by_its_largest_files(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"x")
    with large.open("wb") as file:
        file.truncate(submission.MAX_BYTES - 2)
    assert submission.size_problems({"p/small": small, "p/large": large}) == []
    with large.open("ab") as file:
        file.truncate(submission.MAX_BYTES)
    (said,) = submission.size_problems({"p/small": small, "p/large": large})
    assert "512 MiB; Ray takes less than 512. The largest files: p/large (512 MiB), p/small (0 MiB)" in said


# --- jobs -----------------------------------------------------------------------------------------------------------


def job(id: str, status: str, code: int | None = None, *, search: str = "paper", error: str | None = None) -> Job:  # noqa: A002
    details = SimpleNamespace(
        submission_id=id,
        job_id=None,
        status=SimpleNamespace(value=status),
        metadata={"search": search},
        start_time=1000,
        end_time=None,
        driver_exit_code=code,
        error_type=error,
        message=None,
    )
    return Job.of(details)


def chosen(*known: Job, continues: bool = False) -> str:
    return choose_id("paper", known, continues=continues, command=lambda verb, id: f"<{verb} {id}>")  # noqa: A006


def test_a_search_gets_its_name_as_id_and_a_number_when_it_goes_on() -> None:
    ended = job("paper", "STOPPED")
    assert chosen() == "paper"
    assert chosen(job("other", "RUNNING", search="other")) == "paper"
    assert chosen(ended, continues=True) == "paper-2"
    assert chosen(ended, job("paper-2", "FAILED", 143), continues=True) == "paper-3"
    assert chosen(ended, job("paper-2", "RUNNING", search="paper-2"), continues=True) == "paper-3"
    assert chosen(continues=True) == "paper", "on a new cluster, which knows nothing of the old one's jobs"


def test_a_search_that_runs_is_not_submitted_twice() -> None:
    for status in ("RUNNING", "PENDING"):
        for continues in (False, True):
            with pytest.raises(TakenError, match=r"Follow it: <logs paper-2>.*<stop paper-2>"):
                chosen(job("paper", "STOPPED"), job("paper-2", status), continues=continues)


def test_a_name_that_has_been_used_asks_for_resume() -> None:
    for ended in (job("paper", "SUCCEEDED", 0), job("paper", "FAILED", 1), job("paper", "STOPPED")):
        with pytest.raises(TakenError, match=r"submitted before, as job paper.*--resume"):
            chosen(ended)


def test_a_job_that_started_nothing_does_not_use_up_its_name() -> None:
    assert chosen(job("paper", "FAILED", 2)) == "paper-2"
    assert chosen(job("paper", "FAILED", error="RUNTIME_ENV_SETUP_FAILURE")) == "paper-2"


@pytest.mark.parametrize(
    ("status", "code", "gives"),
    [
        ("SUCCEEDED", 0, 0),
        ("FAILED", 2, 2),
        ("FAILED", 75, 75),
        ("FAILED", -9, 137),
        ("FAILED", None, 1),
        ("STOPPED", None, 130),
    ],
)
def test_the_exit_code_is_the_runs_where_it_is_known(status: str, code: int | None, gives: int) -> None:
    assert job("x", status, code).exit_code == gives


@pytest.mark.parametrize(
    "address", ["auto", "127.0.0.1:8265", "ray://127.0.0.1:10001", "http://", "http://host:x", "anyscale://me", ""]
)
def test_what_is_not_a_dashboards_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"write it as http://127\.0\.0\.1:8265"):
        checked_address(address)


def test_an_address_holds_no_password() -> None:
    assert checked_address("http://127.0.0.1:8265/") == "http://127.0.0.1:8265"
    with pytest.raises(ValueError, match="leave name and password out") as refused:
        checked_address("https://me:GEHEIM@host:8265")
    assert "GEHEIM" not in str(refused.value)


def test_this_machine_is_told_from_others() -> None:
    for address in ("http://127.0.0.1:8265", "http://localhost:8265", "http://[::1]:8265"):
        assert is_local(address)
    for address in ("http://10.0.0.7:8265", "http://head.example.org:8265", "http://localhost.example.org"):
        assert not is_local(address)


def test_every_space_of_the_package_can_be_sent() -> None:
    for name in spaces.space_names():
        assert flags_there(prepare(["--space", name, *STORAGE]))["space"] == name
