"""What `cluster.submit` sends, and what it refuses before anything is sent. No test here needs a cluster."""

import logging
import os
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.processes import PROJECT
from helpers.searches import write_space

from tune_bisenet import spaces
from tune_bisenet.cluster.submit import Submission, main, prepare_submission
from tune_bisenet.options import InputError, build_parser, parse_options

STORAGE = ["--storage", "s3://bucket/searches"]


def problems(*words: str) -> str:
    with pytest.raises(InputError) as refused:
        prepare_submission([*words])
    return str(refused.value)


def flags_there(submission: Submission) -> dict[str, object]:
    """Return the flags as the run on the cluster reads them from the job's command."""
    words = shlex.split(submission.entrypoint)
    assert words[:6] == ["exec", "python", "-m", "tune_bisenet.run", "--address", "auto"]
    return vars(build_parser().parse_args(words[4:]))


# --- flags ----------------------------------------------------------------------------------------------------------


def test_the_run_gets_its_flags_the_cluster_and_a_name() -> None:
    submission = prepare_submission(["--runs", "r01,r02", "--data", "/srv/the data; rm -rf $HOME", *STORAGE])
    there = flags_there(submission)
    assert there.pop("name") == submission.name
    assert there == {
        "address": "auto",
        "runs": "r01,r02",
        "data": "/srv/the data; rm -rf $HOME",
        "storage": "s3://bucket/searches",
    }
    assert submission.name.startswith("runs10-20")
    assert parse_options({"name": submission.name})[1] == {}, "a name that the run takes"
    for name in (["--name", "paper"], ["--name=paper"]):
        assert flags_there(prepare_submission([*name, *STORAGE]))["name"] == "paper"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--address", "auto", *STORAGE], "--address"),
        (["--resume", *STORAGE], "--name"),
        ([], "--storage is needed"),
        (["--storage", "results"], "--storage results"),
        (["--data", "~/frames", *STORAGE], "--data ~/frames"),
        (["--backbone", "resnet.pt", *STORAGE], "--backbone resnet.pt"),
        (["--study", "sqlite:///study.db", *STORAGE], "--study"),
        (["--space", "nosuch.py", *STORAGE], "nosuch.py"),
        (["--runs", "r99", *STORAGE], "r99"),
        (["--epochs", "0", *STORAGE], "--epochs 0"),
        (["--show"], "--show"),
        (["--plan", *STORAGE], "--plan"),
    ],
)
def test_what_cannot_work_there_is_refused_here(words: list[str], expected: str) -> None:
    assert expected in problems(*words)


def test_all_problems_are_reported_together() -> None:
    found = problems("--epochs", "0", "--runs", "r99", "--data", "frames", "--address", "x:1").splitlines()
    assert len(found) == 5, "and that the storage is missing"


@pytest.mark.parametrize(
    "words",
    [
        ["--study", "postgresql://me:GEHEIM@host/studies"],
        ["--study=postgresql://me:GE/HEIM@host/studies"],
        ["--warm-start", "s3://bucket/x?secret_key=GEHEIM"],
    ],
)
def test_a_password_is_not_sent_and_not_shown(words: list[str]) -> None:
    found = problems("--epochs", "0", "--name", "x", *words, *STORAGE)
    assert "password" in found
    assert "$TUNE_BISENET_STUDY" in found
    assert "HEIM" not in found


def test_local_paths_and_variables_that_are_not_sent_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNE_BISENET_STUDY", "postgresql://me:GEHEIM@host/studies")
    submission = prepare_submission(["--storage", "/mnt/shared", "--backbone", "file:///mnt/resnet.pt"])
    notes = "\n".join(submission.notes)
    for noted in ("--storage /mnt/shared, --backbone /mnt/resnet.pt", "$CITYSCAPES_DATASET", "$TUNE_BISENET_STUDY"):
        assert noted in notes
    assert "GEHEIM" not in notes + submission.entrypoint
    monkeypatch.delenv("TUNE_BISENET_STUDY")
    assert prepare_submission(["--data", "streets", "--backbone", "none", *STORAGE]).notes == ()


# --- files ----------------------------------------------------------------------------------------------------------


def test_the_two_packages_are_sent_whole_and_nothing_else(tmp_path: Path) -> None:
    prepare_submission(STORAGE).stage(tmp_path)
    sent = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    paths = [path for name in ("tune_bisenet", "search_spaces") for path in (PROJECT / name).rglob("*")]
    files = {path.relative_to(PROJECT).as_posix() for path in paths if path.is_file()}
    assert sent == {name for name in files if "__pycache__" not in name and "/." not in name}


def test_what_is_sent_runs_by_itself_with_a_space_given_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    write_space(here / "mine.py", {"a": 0.01, "b": 0.02}, num_epochs=3)
    (here / "rates.py").write_text("RATE = 0.25\n")
    with (here / "mine.py").open("a") as file:
        file.write("import rates\nSPACE = Grid('of a helper', (row('z', rates.RATE),))\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    submission = prepare_submission(["--space", "mine.py", *STORAGE])
    monkeypatch.delitem(sys.modules, "rates")
    submission.stage(there)
    assert flags_there(submission)["space"] == "mine"
    assert submission.name.startswith("mine-20")
    where = "import sys; sys.path.insert(0, ''); import tune_bisenet, search_spaces.mine, rates; "
    where += "print(tune_bisenet.__file__, search_spaces.__file__, rates.__file__)"
    assert alone(there, "-c", where).count(str(there)) == 3
    assert "| z   | SGD lr 0.25" in alone(there, "-m", "tune_bisenet.run", "--show", "--space", "mine")


def alone(folder: Path, *words: str) -> str:
    """Return what Python prints in that folder, without this project in its path."""
    rest = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run([sys.executable, *words], cwd=folder, env=rest, capture_output=True, text=True, check=True)
    return ran.stdout


def test_a_space_whose_name_is_taken_or_no_modules_name_is_refused(tmp_path: Path) -> None:
    write_space(tmp_path / "runs10.py", {"a": 0.01}, num_epochs=1)
    assert "another runs10" in problems("--space", str(tmp_path / "runs10.py"), *STORAGE)
    same = prepare_submission(["--space", str(PROJECT / "search_spaces" / "runs10.py"), *STORAGE])
    assert flags_there(same)["space"] == "runs10"
    (tmp_path / "my.space.py").write_text((tmp_path / "runs10.py").read_text())
    assert "Rename it" in problems("--space", str(tmp_path / "my.space.py"), *STORAGE)


def test_every_space_of_the_package_can_be_sent() -> None:
    for name in spaces.space_names():
        assert flags_there(prepare_submission(["--space", name, *STORAGE]))["space"] == name


# --- the command line -----------------------------------------------------------------------------------------------


def test_a_wrong_command_line_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for words in ("", "list -- --space smoke", "stop", "list x", "--no-wait list"):
        with pytest.raises(SystemExit, match="2"):
            main(words.split())
    assert main(["--", "--epochs", "0"]) == 2
    for address in ("auto", "127.0.0.1:8265", "ray://host:10001", "http://", ""):
        assert main(["--address", address, "list"]) == 2
    assert main(["--address", "https://me:GEHEIM@host:8265", "list"]) == 2
    assert "GEHEIM" not in capsys.readouterr().err


def test_no_cluster_at_the_address_is_reported_with_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as deaf:
        deaf.bind(("127.0.0.1", 0))  # so that nothing else listens at the port
        address = f"http://127.0.0.1:{deaf.getsockname()[1]}"
        try:
            assert main(["--address", address, "list"]) == 2
        finally:
            logging.disable(logging.NOTSET)  # what the command has disabled
    printed = capsys.readouterr().err
    assert address in printed
    assert "--resume" in printed


def test_without_the_extra_the_message_says_what_to_install() -> None:
    code = "import sys; sys.modules['aiohttp'] = None; from tune_bisenet.cluster import submit; "
    code += "sys.exit(submit.main(['list']))"
    ran = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "ray[default]" in ran.stderr
    assert "Traceback" not in ran.stderr
