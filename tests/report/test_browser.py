"""The page in a real browser: no error, no request, every plot with its lines, in a wide and in a phone's window."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from searches import write_search, write_study

from tune_bisenet.report.page import Report

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: make setup")
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

CHROMIUM, DRIVER = (shutil.which(name) for name in ("chromium", "chromedriver"))

pytestmark = [
    pytest.mark.skipif(
        not (CHROMIUM and DRIVER), reason="needs Debian's chromium and chromium-driver: apt-get install them"
    ),
    # selenium 4 leaves the pipe to a driver that has quit to the garbage collector
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]

CURVES = ["miou", "gain", "loss", "loss_main", "loss_aux1", "loss_aux2", "lr", "grad_norm"]

DRAWN = """return Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map((plot) => [
  plot.id.replace('plot-', ''),
  {
    traces: plot.data.map(({ type, name, y, z }) => [type, name, (y ?? z).length]),
    lines: plot.querySelectorAll('.scatterlayer .js-line').length,
    cells: plot.querySelectorAll('.heatmaplayer image').length,
    buttons: [...plot.querySelectorAll('.modebar-btn')].map((button) => button.dataset.title),
  },
]))"""

STUDY_PLOTS = {"front", "history", "parallel", "importance", *(f"slice-{index}" for index in range(7))}

CROSSING = """const plot = document.getElementById('plot-parallel');
plot.scrollIntoView();
const { xaxis, yaxis } = plot._fullLayout, { left, top } = plot.getBoundingClientRect(), curve = plot.data.length - 2;
return [left + xaxis._offset + xaxis.d2p(1), top + yaxis._offset + yaxis.d2p(plot.data[curve].y[1]), curve]"""
"""Where the best trial's line crosses the second axis."""


@pytest.fixture(scope="module")
def study_page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_study(tmp_path_factory.mktemp("study"), known=3, latency=True, fresh_seeds=2)
    return Report.of(folder).write(folder)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = write_search(tmp_path_factory.mktemp("small"))
    return Report.of(folder).write(folder)


@pytest.fixture(params=[1400, 390], ids=["wide", "phone"])
def width(request: pytest.FixtureRequest) -> int:
    """The width of the window, in pixels."""
    return int(request.param)


@pytest.fixture
def browser(width: int, tmp_path: Path, page: str) -> Iterator[Any]:
    """The page, opened; a wide window is light, and a phone's dark."""
    colours = "light" if width > 500 else "dark"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in [*FLAGS, f"--user-data-dir={tmp_path}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        media = {"features": [{"name": "prefers-color-scheme", "value": colours}]}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        driver.get(f"file://{page}")
        yield driver
    finally:
        driver.quit()


def test_every_plot_is_drawn_without_error_or_request_or_overflow(browser: Any, width: int, page: str) -> None:
    drawn = browser.execute_script(DRAWN)
    assert sorted(drawn) == sorted([*CURVES, "iou", "confusion", "intervals-gain", "intervals-miou"])
    for name in CURVES:
        rows = ["r02"] if name == "gain" else ["r01", "r02"]
        lines = [trace for trace in drawn[name]["traces"] if trace[1] in rows]
        assert lines == [["scatter", row, 3] for row in rows], name
        assert drawn[name]["lines"] >= len(rows), name
    assert drawn["iou"]["traces"] == [["heatmap", None, 1]]
    assert drawn["confusion"]["traces"] == [["heatmap", None, 19]]
    assert drawn["iou"]["cells"] == drawn["confusion"]["cells"] == 1
    assert all("hare" not in title for plot in drawn.values() for title in plot["buttons"])  # nothing uploads a chart
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [message["params"] for message in messages if message["method"] == "Network.requestWillBeSent"]
    resources = browser.execute_script("return performance.getEntriesByType('resource').map(({ name }) => name)")
    urls = {*(params["request"]["url"] for params in sent), *resources}
    # The browser's own first tab, and what is in the page itself, are no requests.
    assert {url for url in urls if not url.startswith(("data:", "blob:", "chrome:"))} <= {f"file://{page}"}


def test_a_row_can_be_hidden_in_all_curves_at_once(browser: Any) -> None:
    browser.execute_script("document.querySelector('.rows button[value=r02]').click()")
    visible = """return [...document.querySelectorAll('.plots .js-plotly-plot')].map((plot) =>
      [...new Set(plot.data.filter((trace) => trace.visible !== false).map((trace) => trace.meta))])"""
    assert browser.execute_script(visible) == [["r01"], [], *[["r01"]] * 6]


def test_plots_take_the_colours_of_the_page(browser: Any) -> None:
    ground = "return getComputedStyle(document.body).backgroundColor"
    paper = "return getComputedStyle(document.querySelector('#plot-miou .main-svg')).backgroundColor"
    before = browser.execute_script(ground)
    assert browser.execute_script(paper) == before
    other = "light" if before != "rgb(255, 255, 255)" else "dark"
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": other}]}
    )
    browser.execute_async_script("requestAnimationFrame(() => requestAnimationFrame(arguments[0]))")
    assert browser.execute_script(ground) != before
    assert browser.execute_script(paper) == browser.execute_script(ground)


def test_the_plots_of_a_study_are_drawn_without_error_or_overflow(browser: Any, width: int, study_page: str) -> None:
    browser.get(f"file://{study_page}")
    drawn = browser.execute_script("return [...document.querySelectorAll('.js-plotly-plot')].map(({ id }) => id)")
    assert {f"plot-{name}" for name in STUDY_PLOTS} <= set(drawn)
    marks = "return document.querySelectorAll('#plot-{} {}').length"
    assert browser.execute_script(marks.format("history", ".scatterlayer .point")) == 26
    assert browser.execute_script(marks.format("parallel", ".scatterlayer .js-line")) == 26
    assert browser.execute_script(marks.format("importance", ".bars .point")) == 7
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    assert browser.get_log("browser") == []


def test_a_line_that_is_pointed_at_comes_out_of_the_crowd(browser: Any, study_page: str) -> None:
    browser.get(f"file://{study_page}")
    x, y, curve = browser.execute_script(CROSSING)
    width = f"return document.getElementById('plot-parallel').data[{curve}].line.width"
    before = browser.execute_script(width)
    for place, is_wide in [((x, y), True), ((1, 1), False)]:
        browser.execute_cdp_cmd("Input.dispatchMouseEvent", {"type": "mouseMoved", "x": place[0], "y": place[1]})
        WebDriverWait(browser, 120).until(lambda page, wide=is_wide: (page.execute_script(width) > before) is wide)


def test_the_best_row_can_be_copied(browser: Any, study_page: str) -> None:
    browser.get(f"file://{study_page}")
    browser.execute_script("document.querySelector('.source button').click()")
    assert browser.execute_script("return getSelection().toString()").startswith('Run(\n    name="best"')
