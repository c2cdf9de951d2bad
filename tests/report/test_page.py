"""The page: everything on it, whatever is missing or damaged, and nothing that runs or leaves it."""

import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from searches import (
    MIOU,
    PROXY,
    RUNS,
    SESSION,
    STUDY,
    best,
    cut,
    epochs,
    manifest,
    standing,
    write_json,
    write_search,
    write_study,
    write_trial,
)

from tune_bisenet.config import Expect
from tune_bisenet.records import BEST_PREDICTIONS, EPOCHS, KNOWN, RUN, SEARCH, TRIALS, predictions_to_bytes
from tune_bisenet.report.page import HTML, MARKDOWN, Report, write_report
from tune_bisenet.storage import Storage

SECTIONS = [
    "Did each row keep its promise?",
    "What the rows are",
    "Learning curves",
    "IoU by class",
    "What is taken for what",
    "The same frames, side by side",
    "What ended early, and why",
    "Cost",
    "Leaderboard",
    "How it was made",
]

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


def page_of(folder: Storage) -> str:
    uri = write_report(folder)
    assert uri == f"{folder.uri}/{HTML}"
    return (Path(folder.path) / HTML).read_text(encoding="utf-8")


def markdown_of(folder: Storage) -> str:
    write_report(folder)
    return (Path(folder.path) / MARKDOWN).read_text(encoding="utf-8")


# --- what is on it --------------------------------------------------------------------------------------------------


def test_the_sections_stand_in_order_the_verdicts_first(tmp_path: Path) -> None:
    assert re.findall(r"<h2 [^>]*>(.*?)</h2>", page_of(write_search(tmp_path))) == SECTIONS


def test_each_promise_is_told_with_measurement_and_verdict(tmp_path: Path) -> None:
    text = Elements(page_of(write_search(tmp_path))).text
    for words in ("+1 to +3 over r01", "+2.25", "accumulation 1 → 2", "2 seeds", "It still sees two images."):
        assert words in text


def test_page_and_markdown_tell_the_same(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    text, markdown = Elements(page_of(folder)).text, markdown_of(folder)
    for words in ("+1 to +3 over r01", "+2.25", "feedbeef", "0123456789abcdef", "53.50", "Python 3.11.9", "0.06"):
        assert words in text
        assert words in markdown
    assert "data:image" not in markdown


def test_the_frames_stand_side_by_side(tmp_path: Path) -> None:
    images = [attributes for tag, attributes in Elements(page_of(write_search(tmp_path))).elements if tag == "img"]
    assert [attributes["alt"] for attributes in images[:4]] == [
        "street one: image",
        "street one: label",
        "street one: r01-s1, baseline: 51.0 % mIoU",
        "street one: r02-s1: 53.5 % mIoU",
    ]
    assert len(images) == 8


def test_a_proxy_is_labelled_everywhere(tmp_path: Path) -> None:
    folder = write_search(tmp_path, proxy=PROXY)
    page = page_of(folder)
    assert all("proxy" in heading for heading in re.findall(r"<h2 [^>]*>.*?</h2>", page))
    assert PROXY in page
    assert PROXY in markdown_of(folder)
    assert 'class="proxy"' not in page_of(write_search(tmp_path / "full"))


def test_a_space_without_promises_says_so(tmp_path: Path) -> None:
    trials = {name: run.model_copy(update={"expect": None}).model_dump(mode="json") for name, run in RUNS.items()}
    folder = write_search(tmp_path, trials=trials)
    assert "No row of this space promises anything" in page_of(folder)
    assert "No row of this space promises anything" in markdown_of(folder)


def test_a_space_without_a_baseline_has_a_page(tmp_path: Path) -> None:
    trials = {
        name: run.model_copy(update={"expect": Expect(miou=(40, 60))}).model_dump(mode="json")
        for name, run in RUNS.items()
    }
    space = {"name": "small", "title": "Two rows", "baseline": None}
    assert "There is nothing to compare yet" in page_of(write_search(tmp_path, trials=trials, space=space))


# --- a sampled search -----------------------------------------------------------------------------------------------

STUDY_SECTIONS = [
    "The best of the search",
    "mIoU against latency",
    "How the search went",
    "Which parameters mattered",
    "mIoU over the parameters",
]


def test_a_study_is_told_before_its_promises(tmp_path: Path) -> None:
    folder = write_study(tmp_path, known=3, latency=True, fresh_seeds=2)
    page = page_of(folder)
    assert re.findall(r"<h2 [^>]*>(.*?)</h2>", page) == [*STUDY_SECTIONS, *SECTIONS]
    text, markdown = Elements(page).text, markdown_of(folder)
    for words in ("On fresh seeds", "over r02", 'name="best"', "not what caused it", "head width"):
        assert words in text
        assert words in markdown
    assert "optimizer = sgd" in page


def test_without_fresh_seeds_the_best_comes_with_a_caution(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    assert "--confirm K trains it" in page_of(folder)
    assert "--confirm K trains it" in markdown_of(folder)
    assert "--confirm K" not in page_of(write_study(tmp_path / "confirmed", fresh_seeds=2))


def test_a_study_for_miou_alone_has_no_front(tmp_path: Path) -> None:
    assert "mIoU against latency" not in page_of(write_study(tmp_path))


def test_a_study_without_promises_has_no_verdicts(tmp_path: Path) -> None:
    folder = write_study(tmp_path)
    for name in ("r01", "r02"):
        content = (folder / name).read(RUN)
        assert content
        record = json.loads(content)
        write_json(folder / name, RUN, record | {"run": record["run"] | {"expect": None}})
    page = page_of(folder)
    assert "Did each row keep its promise?" not in page
    assert "#verdicts" not in page
    assert "keep its promise" not in markdown_of(folder)


def test_the_row_to_paste_is_on_the_scale_of_the_space_and_not_on_that_of_the_proxy(tmp_path: Path) -> None:
    folder = write_study(tmp_path, proxy=PROXY)
    page = page_of(folder)
    assert all("proxy" in heading for heading in re.findall(r"<h2 [^>]*>.*?</h2>", page))
    for text in (page, markdown_of(folder)):
        assert "the scale of the space" in text
        assert "num_epochs" not in text.partition("Run(")[2].partition(")\n")[0], "50 epochs are the default"


def test_a_study_that_has_just_begun_has_a_page(tmp_path: Path) -> None:
    text = Elements(page_of(write_study(tmp_path, trials=0))).text
    assert "No trial has an mIoU yet." in text
    assert "nothing is known of the parameters" in text


@pytest.mark.parametrize(("place", "name"), [("t0004", RUN), ("t0004", EPOCHS), (".", KNOWN)])
def test_a_truncated_file_of_a_study_costs_a_note_never_the_page(tmp_path: Path, place: str, name: str) -> None:
    folder = write_study(tmp_path, known=1, trials=12)
    cut(folder / place, name)
    assert f"{name} cannot be read" in Elements(page_of(folder)).text


def test_forty_trials_of_fifty_epochs_stay_under_8_megabytes(tmp_path: Path) -> None:
    folder = write_study(tmp_path, trials=40)
    rng = np.random.default_rng(0)
    for place in range(2, 40):
        history = [replace(epochs(50)[0], epoch=epoch, miou=epoch + rng.random()) for epoch in range(1, 51)]
        write_trial(folder / f"t{place:04d}", history)
    assert len(page_of(folder).encode()) < 8e6


def test_no_words_of_a_study_can_become_code(tmp_path: Path) -> None:
    study = STUDY | {"name": HOSTILE, "url": HOSTILE, "sampler": HOSTILE, "warm_start": [HOSTILE]}
    folder = write_study(tmp_path, study=study, sessions=[SESSION | {"limit": HOSTILE}])
    elements = Elements(page_of(folder))
    assert [tag for tag, _ in elements.elements].count("script") == 3
    assert not any(name.startswith("on") for _, attributes in elements.elements for name in attributes)
    assert HOSTILE in elements.text


def test_a_study_suggests_no_grid_of_seeds(tmp_path: Path) -> None:
    assert Report.of(write_study(tmp_path)).next_command is None


# --- what is missing or damaged -------------------------------------------------------------------------------------


def test_sections_without_data_say_so(tmp_path: Path) -> None:
    folder = Storage.at(str(tmp_path))
    write_json(folder, SEARCH, manifest(sessions=[SESSION | {"ended": None}]))
    text = Elements(page_of(folder)).text
    for words in (
        "nothing yet",
        "No epoch has ended yet.",
        "There is nothing to compare yet",
        "there is no confusion matrix",
        "No trial has kept pictures",
        "nothing is known of speed and cost",
    ):
        assert words in text


@pytest.mark.parametrize(("place", "name"), [("r02-s0", EPOCHS), ("r02-s0", BEST_PREDICTIONS), (".", TRIALS)])
def test_a_truncated_file_costs_a_note_never_the_page(tmp_path: Path, place: str, name: str) -> None:
    folder = write_search(tmp_path)
    cut(folder / place, name)
    page = page_of(folder)
    assert f"{name} " in Elements(page).text
    assert "Not everything could be read." in page
    assert "Not everything could be read." in markdown_of(folder)
    assert "+2.50" in page  # seed 1 is whole


def test_pictures_that_cannot_be_shown_are_told(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    (folder / "r02-s1").write(BEST_PREDICTIONS, predictions_to_bytes(replace(best(), names=("only one",))))
    assert "r02-s1: best.npz holds pictures that do not belong together" in page_of(folder)


def test_a_run_that_diverged_has_its_curves_up_to_there(tmp_path: Path) -> None:
    folder = write_search(tmp_path, standings={"r02-s0": replace(standing("r02-s0", epochs(52)), status="diverged")})
    history = [*epochs(52)[:2], replace(epochs(52)[2], loss=float("nan"), grad_norm=float("inf"))]
    write_trial(folder / "r02-s0", history)
    page = page_of(folder)
    assert "NaN" not in re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)[0]
    assert "r02-s0 diverged" in page


def test_a_search_of_one_seed_has_a_page(tmp_path: Path) -> None:
    trials = {name: run.model_dump(mode="json") for name, run in RUNS.items() if run.seed == 0}
    page = page_of(write_search(tmp_path, trials=trials))
    assert "one seed has no spread to judge by" in page
    assert "over images, no seed noise" in page


# --- what must not happen -------------------------------------------------------------------------------------------


def test_no_words_of_a_search_can_become_code(tmp_path: Path) -> None:
    failed = replace(standing("r02-s0", []), status="failed", error=HOSTILE)
    session = SESSION | {"command": [HOSTILE], "commit": HOSTILE}
    folder = write_search(
        tmp_path,
        name=HOSTILE,
        proxy=HOSTILE,
        space={"name": HOSTILE, "title": HOSTILE, "baseline": "r01"},
        data={"name": HOSTILE, "digests": {HOSTILE: HOSTILE}, "train_images": 1, "val_images": 1},
        sessions=[session],
        standings={"r02-s0": failed},
    )
    for number, name in enumerate(RUNS):
        (folder / name).write(
            BEST_PREDICTIONS, predictions_to_bytes(replace(best(number), names=(HOSTILE, "street two")))
        )
    elements = Elements(page_of(folder))
    assert [tag for tag, _ in elements.elements].count("script") == 3  # the figures, Plotly, the page's own
    assert all((source or "").startswith("data:image/") for source in elements.attributes("src"))
    assert not any(name.startswith("on") for _, attributes in elements.elements for name in attributes)
    assert HOSTILE in elements.text
    assert not [line for line in markdown_of(folder).splitlines() if "<" in line and not line.startswith("    ")]


def test_the_page_points_nowhere_but_into_itself(tmp_path: Path) -> None:
    elements = Elements(page_of(write_search(tmp_path)))
    assert all((link or "").startswith("#") for link in elements.attributes("href"))
    assert all((source or "").startswith("data:image/") for source in elements.attributes("src"))
    assert "link" not in {tag for tag, _ in elements.elements}
    (policy,) = (content for content in elements.attributes("content") if content and "default-src" in content)
    assert "default-src 'none'" in policy
    assert "unsafe-eval" not in policy


def test_the_same_search_gives_the_same_page_but_for_the_time(tmp_path: Path) -> None:
    folder = write_search(tmp_path)
    first, second = (re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d UTC", "", page_of(folder)) for _ in range(2))
    assert first == second


def test_ten_rows_of_three_seeds_stay_under_15_megabytes(tmp_path: Path) -> None:
    """With pictures of noise, which no format can compress."""
    names = [f"r{number:02d}" for number in range(1, 11)]
    runs = {
        f"{name}-s{seed}": RUNS["r01-s0"].model_copy(update={"name": name, "seed": seed, "num_epochs": 50})
        for name in names
        for seed in range(3)
    }
    folder = Storage.at(str(tmp_path))
    write_json(folder, SEARCH, manifest(trials={name: run.model_dump(mode="json") for name, run in runs.items()}))
    rng = np.random.default_rng(0)
    noise = replace(
        best(),
        names=("a", "b", "c", "d"),
        images=rng.integers(0, 256, (4, 3, 256, 512), dtype=np.uint8),
        labels=rng.integers(0, 19, (4, 256, 512), dtype=np.uint8),
        predictions=rng.integers(0, 19, (4, 256, 512), dtype=np.uint8),
    )
    content = predictions_to_bytes(noise)
    for name in runs:
        history = [replace(epochs(50)[0], epoch=epoch, miou=epoch + rng.random()) for epoch in range(1, 51)]
        write_trial(folder / name, history)
        (folder / name).write(BEST_PREDICTIONS, content)
    assert len(page_of(folder).encode()) < 15e6


# --- where it goes --------------------------------------------------------------------------------------------------


def test_page_markdown_and_tables_lie_beside_the_search(tmp_path: Path) -> None:
    write_report(write_search(tmp_path))
    assert {HTML, MARKDOWN} <= {path.name for path in tmp_path.iterdir()}
    assert {"verdicts.csv", "epochs.parquet"} <= {path.name for path in (tmp_path / "tables").iterdir()}


def test_the_report_can_go_to_another_folder(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "search")
    before = sorted(path.name for path in (tmp_path / "search").iterdir())
    uri = Report.of(folder).write(Storage.at(str(tmp_path / "made" / "here")))
    assert Path(uri) == tmp_path / "made" / "here" / HTML
    assert sorted(path.name for path in (tmp_path / "search").iterdir()) == before


def test_the_next_command_names_search_and_storage(tmp_path: Path) -> None:
    folder = write_search(tmp_path / "with space" / "small")
    report = Report.of(folder)
    assert report.judgement.claims[1].verdict == "undecided", MIOU
    assert report.next_command is not None
    assert report.next_command.startswith("python -m tune_bisenet.run --space small --name small --add ")
    assert report.next_command.endswith(f" --storage '{tmp_path}/with space'")
