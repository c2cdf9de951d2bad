"""The page and its Markdown: what is on them, what must not happen, and how they are kept current."""

import logging
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from helpers.rows import CONFIG, SESSION
from searches import (
    PROXY,
    RUNS,
    STUDY,
    begin,
    best,
    cut,
    epochs,
    state_of,
    write_search,
    write_study,
    write_trial,
)

from tune_bisenet import records
from tune_bisenet.config import Expect
from tune_bisenet.records import (
    BEST_PREDICTIONS,
    KNOWN,
    TRIAL,
    TRIALS,
    Environment,
    TrialSpec,
    TrialState,
    predictions_to_bytes,
    read_trial,
)
from tune_bisenet.report.__main__ import main as report_main
from tune_bisenet.report.page import (
    HTML,
    MARKDOWN,
    SECONDS_BETWEEN_PAGES,
    Report,
    refreshed,
    write_safely,
)
from tune_bisenet.storage import Storage

SECTIONS = [
    "verdicts",
    "noise",
    "settings",
    "curves",
    "classes",
    "confusion",
    "pictures",
    "ends",
    "cost",
    "leaderboard",
    "winner",
    "made",
]
STUDY_SECTIONS = ["best", "front", "history", "importance", "parameters"]

HOSTILE = "</script></style>\"'><img src=x onerror=alert(1)><script>alert(2)</script>"


class Elements(HTMLParser):
    """Every element with its attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._raw = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._raw = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._raw = False

    def handle_data(self, data: str) -> None:
        self.text += "" if self._raw else data

    def attributes(self, name: str) -> list[str | None]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]

    @property
    def sections(self) -> list[str | None]:
        return [attributes["id"] for tag, attributes in self.elements if tag == "h2"]


def page_of(folder: Storage) -> str:
    uri = Report.of(folder).write(folder)
    assert uri == f"{folder.uri}/{HTML}"
    return (Path(folder.path) / HTML).read_text(encoding="utf-8")


def markdown_of(folder: Storage) -> str:
    return (Path(folder.path) / MARKDOWN).read_text(encoding="utf-8")


def test_a_study_has_sections_of_its_own(tmp_path: Path) -> None:
    folder = write_study(tmp_path, known=3, latency=True, fresh_seeds=2)
    first, second = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page_of(folder)) for _ in range(2))
    assert first == second, "the same search gives the same page but for the time"
    assert Elements(first).sections == [*STUDY_SECTIONS, *SECTIONS]
    one_goal = Elements(page_of(write_study(tmp_path / "one goal")))
    assert "front" not in one_goal.sections
    assert "--confirm K trains it" in one_goal.text
    assert Report.of(folder).next_command is None, "a study has one seed: its rows are decided by a grid"


def test_a_study_whose_rows_expect_nothing_has_no_verdicts(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    for name in ("r01", "r02"):
        record = read_trial(folder / name)
        assert record
        spec = replace(record.spec, run=record.spec.run.model_copy(update={"expect": None}))
        write_trial(folder, name, record.epochs, spec=spec)
    assert "verdicts" not in Elements(page_of(folder)).sections


@pytest.mark.parametrize("threads", [1, 2])
def test_pairs_that_do_not_share_their_noise_are_named_with_what_trials_were_trained_in(
    tmp_path: Path, threads: int
) -> None:
    alike = {name: run.model_copy(update={"accumulation": 1}) for name, run in RUNS.items()}
    folder = write_search(tmp_path, trials=alike)
    for name, run in RUNS.items():
        used = threads if run.name == "r02" else 1
        environment = Environment(threads=used, device="CPU", torch="2.15.0", numpy="2.4.6", python="3.11.9")
        record = read_trial(folder / name)
        assert record
        records.write_trial(folder, replace(record, environments=(environment,)))
    page, markdown = Elements(page_of(folder)).text, markdown_of(folder)
    assert "r02-s0 must equal r01-s0 until epoch 3, but parts at epoch 1 (32.00 against 30.00 %)" in page
    assert "r02-s1 must equal r01-s1" in markdown
    others = "Compared, but trained with 2 threads against 1 thread: r02-s0 and r01-s0, r02-s1 and r01-s1."
    assert (others in page, others in markdown) == (threads == 2, threads == 2)
    lines = [line for line in markdown.splitlines() if line.startswith("| trained with")]
    one = "1 thread, CPU, torch 2.15.0, numpy 2.4.6, Python 3.11.9"
    two = one.replace("1 thread", "2 threads")
    expected = [one] if threads == 1 else [f"{one}: r01-s0, r01-s1", f"{two}: r02-s0, r02-s1"]
    assert [line.split("|")[2].strip() for line in lines] == expected


def test_of_a_trial_that_was_moved_the_page_says_which_epochs_were_trained_where(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    card = Environment(
        threads=1, device="A10G", torch="2.15.0", cuda="13.2", numpy="2.4.6", python="3.11.9", first_epoch=1
    )
    for name in RUNS:
        record = read_trial(folder / name)
        assert record
        moved = (card, replace(card, device="L4", first_epoch=2, eager="a training step cannot be recorded: no"))
        environments = moved if name == "r01-s0" else (card,)
        records.write_trial(folder, replace(record, environments=environments))
    page_of(folder)
    lines = [line.split("|")[2] for line in markdown_of(folder).splitlines() if line.startswith("| trained with")]
    assert [line.rpartition(": ")[2].strip() for line in lines] == [
        "r01-s0 (epoch 1), r02-s0, r01-s1, r02-s1",
        "r01-s0 (epochs 2 to 3)",
    ]
    assert "L4 without CUDA graphs (a training step cannot be recorded: no)" in markdown_of(folder)


def test_what_trials_warned_of_is_on_the_page(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    manifest = records.read_manifest(folder)
    assert manifest
    warned = manifest.sessions[-1].model_copy(update={"warnings": ("r01-s0: its kernels are launched one by one",)})
    records.write_manifest(folder, manifest.model_copy(update={"sessions": (warned,)}))
    assert "r01-s0: its kernels are launched one by one" in Elements(page_of(folder)).text


def test_a_proxy_is_labelled_everywhere(tmp_path: Path) -> None:
    folder = write_search(tmp_path, proxy=PROXY)
    page = page_of(folder)
    assert all("proxy" in heading for heading in re.findall(r"<h2 [^>]*>.*?</h2>", page))
    assert PROXY in page
    assert PROXY in markdown_of(folder)
    assert 'class="proxy"' not in page_of(write_search(tmp_path / "full"))


def test_published_levels_stand_beside_the_verdicts_on_levels(tmp_path: Path) -> None:
    config = CONFIG | {"data": "/data/cityscapes"}
    told = "A row here sees 120 crops"  # three epochs of the 40 training images
    assert told in page_of(write_search(tmp_path / "full", config=config))
    assert told not in page_of(write_search(tmp_path / "streets"))
    assert told not in page_of(write_search(tmp_path / "proxy", config=config | {"proxy": True}, proxy=PROXY))


@pytest.mark.parametrize("expect", [None, Expect(miou=(40, 60))])
def test_a_space_without_expectations_or_without_a_baseline_has_a_page(tmp_path: Path, expect: Expect | None) -> None:
    trials = {name: run.model_copy(update={"expect": expect}) for name, run in RUNS.items()}
    space = {"title": "Two rows", "baseline": None, "measured_share": 0.1}
    assert Elements(page_of(write_search(tmp_path, trials=trials, space=space))).sections == SECTIONS


def test_a_search_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    folder = begin(tmp_path / "grid", sessions=[SESSION | {"ended": None}])
    assert Elements(page_of(folder)).sections == [name for name in SECTIONS if name not in ("noise", "winner")], (
        "nothing repeats, and there is no best"
    )
    study = Elements(page_of(write_study(tmp_path / "study", trials=0, latency=True)))
    assert study.sections[:5] == STUDY_SECTIONS


def test_code_that_changed_between_sessions_is_said_on_the_page_and_in_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = SESSION | {"commit": "fedcba9876543210<b>", "packages": {"torch": "2.16.0"}}
    folder = write_search(tmp_path, sessions=[SESSION, SESSION, newer])
    told = "Code changed between sessions: commit 0123456789ab → fedcba987654; torch 2.15.0 → 2.16.0"
    assert told in page_of(folder)
    assert report_main([str(tmp_path)]) == 0
    assert told in capsys.readouterr().out
    assert "fedcba987654; torch 2.15.0 → 2.16.0" in (tmp_path / "report.md").read_text()
    assert "Code changed" not in page_of(write_search(tmp_path / "same", sessions=[SESSION, SESSION]))


@pytest.mark.parametrize("name", ["what?now", "it's", "$HOME"])
def test_the_next_command_holds_for_any_folder(tmp_path: Path, name: str) -> None:
    write_search(tmp_path / name / "small")
    command = Report.of(Storage.at(str(tmp_path / name / "small"))).next_command
    assert command
    words = shlex.split(command)
    assert words[words.index("--storage") + 1] == str(tmp_path / name)


@pytest.mark.parametrize(
    ("where", "name"),
    [("r02-s0", TRIAL), ("r02-s0", BEST_PREDICTIONS), (".", TRIALS), ("t0004", TRIAL), (".", KNOWN)],
)
def test_a_truncated_file_costs_a_note_never_the_page(tmp_path: Path, where: str, name: str) -> None:
    is_study = name == KNOWN or where.startswith("t")
    folder = write_study(tmp_path, known=1, trials=12) if is_study else write_search(tmp_path)
    cut(folder / where, name)
    assert f"{name} cannot be read" in Elements(page_of(folder)).text
    assert f"{name} cannot be read" in markdown_of(folder)


def test_a_run_that_diverged_has_its_curves_up_to_there(tmp_path: Path) -> None:
    history = [*epochs(52)[:2], replace(epochs(52)[2], loss=float("nan"), grad_norm=float("inf"))]
    diverged = replace(state_of("r02-s0", history), status="diverged")
    folder = write_search(tmp_path, states={"r02-s0": diverged})
    write_trial(folder, "r02-s0", history, state=diverged)
    page = page_of(folder)
    assert "NaN" not in re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[0]
    assert "blew up: r02-s0" in page


def test_no_words_of_a_search_can_become_code(tmp_path: Path) -> None:
    failed = replace(state_of("r02-s0", []), status="failed", error=HOSTILE)
    folder = write_search(
        tmp_path,
        name=HOSTILE,
        proxy=HOSTILE,
        config=CONFIG | {"space": HOSTILE, "data": HOSTILE, "backbone": HOSTILE},
        space={"title": HOSTILE, "baseline": "r01", "measured_share": 0.1},
        data={"digests": {HOSTILE: HOSTILE}, "train_images": 1, "val_images": 1},
        sessions=[SESSION | {"command": [HOSTILE], "commit": HOSTILE, "limit": HOSTILE}],
        states={"r02-s0": failed},
    )
    for number, name in enumerate(RUNS):
        pictures = predictions_to_bytes(replace(best(number), names=(HOSTILE, "street two"), groups=(HOSTILE, HOSTILE)))
        (folder / name).write(BEST_PREDICTIONS, pictures)
    hostile_study = STUDY | {"name": HOSTILE, "url": HOSTILE, "sampler": HOSTILE, "warm_start": [HOSTILE]}
    for searched in (folder, write_study(tmp_path / "study", study=hostile_study)):
        assert HOSTILE in assert_harmless(searched).text


def test_no_name_of_a_row_a_trial_or_a_parameter_can_become_code(tmp_path: Path) -> None:
    """A results folder may be somebody else's: what this program never writes can be there."""
    name = "<img src=x onerror=alert(1)>"
    failed = TrialState(trial=name, run=name, seed=0, num_epochs=3, status="failed", error="no memory")
    folder = write_search(tmp_path, trials=RUNS | {name: RUNS["r01-s0"]}, states={name: failed})
    assert name in assert_harmless(folder).text
    studied = write_study(tmp_path / "study")
    for trial in studied.folder_names():
        record = read_trial(studied / trial)
        assert record
        renamed = {name if key == "aux_weight" else key: value for key, value in record.spec.params.items()}
        ranges = {name if key == "aux_weight" else key: value for key, value in record.spec.distributions.items()}
        ranges["optimizer"] = ranges["optimizer"].replace("sgd", name)
        if renamed["optimizer"] == "sgd":
            renamed["optimizer"] = name
        spec = replace(record.spec, params=renamed, distributions=ranges)
        records.write_trial(studied, replace(record, spec=spec))
    assert name in assert_harmless(studied).text


def assert_harmless(folder: Storage) -> Elements:
    """Check that page and Markdown have no element or script but their own; return the page's elements."""
    elements = Elements(page_of(folder))
    assert [tag for tag, _ in elements.elements].count("script") == 3  # the figures, Plotly, the page's own
    assert all((source or "").startswith("data:image/") for source in elements.attributes("src"))
    assert not any(name.startswith("on") for _, attributes in elements.elements for name in attributes)
    markdown = markdown_of(folder).splitlines()
    assert not [line for line in markdown if "<" in line and not line.startswith("    ")]
    return elements


def test_the_page_points_nowhere_but_into_itself(tmp_path: Path) -> None:
    elements = Elements(page_of(write_search(tmp_path)))
    assert all((link or "").startswith("#") for link in elements.attributes("href"))
    assert [(source or "")[:11] for source in elements.attributes("src")] == ["data:image/"] * 8
    assert "link" not in {tag for tag, _ in elements.elements}
    (policy,) = (content for content in elements.attributes("content") if content and "default-src" in content)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_pages_stay_small(tmp_path: Path) -> None:
    """Ten rows of three seeds with pictures of noise, which no format can compress."""
    runs = {
        f"r{number:02d}-s{seed}": RUNS["r01-s0"].model_copy(update={"name": f"r{number:02d}", "seed": seed})
        for number in range(1, 11)
        for seed in range(3)
    }
    folder = begin(tmp_path / "grid", trials=runs)
    rng = np.random.default_rng(0)
    noise = replace(
        best(),
        names=("a", "b", "c", "d"),
        images=rng.integers(0, 256, (4, 3, 256, 512), dtype=np.uint8),
        labels=rng.integers(0, 19, (4, 256, 512), dtype=np.uint8),
        predictions=rng.integers(0, 19, (4, 256, 512), dtype=np.uint8),
    )
    content = predictions_to_bytes(noise)
    fifty = [replace(epochs(50)[0], epoch=epoch, miou=epoch + rng.random()) for epoch in range(1, 51)]
    for name in runs:
        write_trial(folder, name, fifty, spec=TrialSpec(trial=name, run=runs[name]))
        if name.endswith("-s0"):  # of each row one trial's are shown
            (folder / name).write(BEST_PREDICTIONS, content)
    assert len(page_of(folder).encode()) < 15e6


def test_the_report_can_go_to_another_folder(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search")
    before = sorted(path.name for path in (tmp_path / "search").iterdir())
    out = tmp_path / "made" / "by us"
    assert Report.of(folder).write(Storage.at(str(out))) == str(out / HTML)
    assert {HTML, MARKDOWN, "tables"} == {path.name for path in out.iterdir()}
    assert {"verdicts.csv", "epochs.parquet"} <= {path.name for path in (out / "tables").iterdir()}
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == before


def wait_for(condition: Callable[[], bool], *, seconds: float = 250) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_page_follows_what_trials_leave_on_storage(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    table = Path(folder.path) / "tables" / "epochs.csv"
    with refreshed(folder, every_seconds=0.05, max_share=1.0):
        wait_for(table.exists)
        assert "61.25" not in table.read_text()
        write_trial(folder, "r02-s0", epochs(61.25))
        wait_for(lambda: "61.25" in table.read_text())
    assert SECONDS_BETWEEN_PAGES < 60 - 10  # never older than a minute, with the seconds that a page may take


def test_the_page_says_which_looks_were_planned_and_what_the_next_takes(tmp_path: Path) -> None:
    page_of(write_search(tmp_path, config=CONFIG | {"looks": [2, 3]}))
    text = markdown_of(Storage.at(str(tmp_path)))
    assert "Looks were planned at 2, 3 seeds" in text
    assert "The next look takes 1 more seed of each of r01, r02" in text
    assert "no longer guarded" not in text


def test_the_page_says_where_trials_were_added_outside_the_plan(tmp_path: Path) -> None:
    groups = [{"runs": None, "seeds": [0]}, {"runs": None, "seeds": [1]}]
    page_of(write_search(tmp_path, config=CONFIG | {"groups": groups}))
    assert "no longer guarded" in markdown_of(Storage.at(str(tmp_path)))


def test_a_page_that_cannot_be_written_harms_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nothing = Storage.at(str(tmp_path / "nothing"))
    with caplog.at_level(logging.WARNING), refreshed(nothing, every_seconds=0.01):
        wait_for(lambda: "the report could not be written" in caplog.text)
    assert write_safely(nothing) is None
    folder = write_search(tmp_path)
    assert write_safely(folder)
    assert (tmp_path / HTML).exists()
