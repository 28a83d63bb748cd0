"""The report in a real browser, opened from its file with no network: Debian's chromium, driven by its own driver.

FORGEPAR_ARTIFACTS names a folder in which pictures of the reports are kept.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import PATIENCE
from reports import a_large_table, a_table

from forgepar.records.table import FailedAttempt
from forgepar.report.html.report import write_report
from forgepar.scheduling.run_state import Status

pytest.importorskip("bokeh", reason="bokeh is in the extra report")
webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is in the extra test")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
if not (BROWSER and DRIVER):
    pytest.skip(
        "chromium or its driver is not there: apt-get install chromium chromium-driver", allow_module_level=True
    )

from selenium.webdriver.common.action_chains import ActionChains  # noqa: E402
from selenium.webdriver.common.actions.wheel_input import ScrollOrigin  # noqa: E402
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import WebDriverWait  # noqa: E402

OPTIONS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--window-size=1280,1100",
    "--host-resolver-rules=MAP * ~NOTFOUND",
)
MOST_SECONDS, MOST_BYTES = 3.0, 15 * 2**20  # that a report of 100,000 tasks takes to open, and has
# Where the middle of a task's bar is on the screen, once its chart is in view.
PLACE_OF = """
const [task, name] = arguments
const plot = forgepar.plot("timeline"), source = forgepar.drawn(name).data_source
const i = task < 0 ? 0 : Array.from(source.data.number).findIndex(
  (n, i) => n == task || (n < 0 && task == source.data.number.length - 1))
const view = Bokeh.index.find_one ? Bokeh.index.find_one(plot) : Object.values(Bokeh.index).find((v) => v.model == plot)
view.el.scrollIntoView({block: "center"})
const box = view.el.getBoundingClientRect()
const middle = (source.data.left[i] + source.data.right[i]) / 2
return [box.left + view.frame.x_scale.compute(middle), box.top + view.frame.y_scale.compute(source.data.row[i])]
"""
RANGE = 'const range = forgepar.plot("timeline").x_range; return [range.start, range.end]'


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for option in (*OPTIONS, f"--user-data-dir={tmp_path_factory.mktemp('browser')}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=DRIVER))
    driver.set_page_load_timeout(PATIENCE)
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Where the reports are; each is written once, and its picture taken."""
    return tmp_path_factory.mktemp("reports")


@pytest.fixture
def opened(browser, folder):
    """Opens a report, written under its name if it is not there; gives the seconds that it took to be drawn."""
    browser.get("about:blank")
    browser.get_log("browser")

    def open_report(table, name: str) -> float:
        path = folder / f"{name}.html"
        is_new = not path.exists()
        if is_new:
            write_report(table, path)
        begin = time.perf_counter()
        browser.get(path.as_uri())
        WebDriverWait(browser, PATIENCE, 0.01).until(lambda _: is_drawn(browser))
        seconds = time.perf_counter() - begin
        if is_new:
            keep_picture(browser, artifacts(folder) / f"report-{name}.png")
        return seconds

    yield open_report
    assert not errors(browser)


def artifacts(folder: Path) -> Path:
    """Where pictures are kept: beside the reports unless FORGEPAR_ARTIFACTS names a folder."""
    kept = Path(os.environ.get("FORGEPAR_ARTIFACTS") or folder)
    kept.mkdir(parents=True, exist_ok=True)
    return kept


def is_drawn(browser) -> bool:
    return browser.execute_script("return document.documentElement.dataset.ready !== undefined")


def keep_picture(browser, path: Path) -> None:
    """Keep a picture of the whole page."""
    height = browser.execute_script("return document.documentElement.scrollHeight")
    browser.set_window_size(1280, min(height + 150, 4000))
    assert browser.save_screenshot(str(path))
    browser.set_window_size(1280, 1100)


def errors(browser) -> list[str]:
    """What the browser complains of; a page that asks for something from elsewhere is refused that, and complains."""
    logged = [entry["message"] for entry in browser.get_log("browser")]
    return [text for text in logged if '"[bokeh' not in text or "rror" in text]


def n_bars(browser, name: str = "tasks") -> int:
    return browser.execute_script(f"return forgepar.drawn('{name}').data_source.get_length()")


def point_at(browser, task: int, name: str = "tasks") -> None:
    """Move the mouse to the middle of a task's bar."""
    x, y = browser.execute_script(PLACE_OF, task, name)
    action = ActionChains(browser, duration=0)
    action.w3c_actions.pointer_action.move_to_location(1, 1)
    action.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    action.perform()


def zoom_to(browser, number: int) -> None:
    """Show the bar of the task with a number in its name so near that it is a bar."""
    browser.execute_script(
        "const {number, left, right} = forgepar.drawn('tasks').data_source.data;"
        "const i = number.indexOf(arguments[0]), wide = right[i] - left[i];"
        "forgepar.plot('timeline').x_range.setv({start: left[i] - 3 * wide, end: right[i] + 3 * wide})",
        number,
    )


def tooltip(browser, start: str = "") -> str:
    """What is shown beside the mouse, once it is, and begins so."""
    find = """
        const texts = [], seen = [document]
        while (seen.length) for (const el of seen.pop().querySelectorAll("*")) {
          if (el.shadowRoot) seen.push(el.shadowRoot)
          if (el.classList.contains("bk-tooltip-content") && el.offsetParent !== null) texts.push(el.innerText)
        }
        return texts.join("|").split(/\\s+/).join(" ").trim()
    """

    def shown(_: object) -> str:
        text: str = browser.execute_script(find)
        return text if text.startswith(start) else ""

    return WebDriverWait(browser, PATIENCE, 0.02).until(shown)


def test_it_opens_from_its_file_and_asks_for_nothing(browser, opened):
    opened(a_table(), "small")
    assert browser.title == "nightly: completed"
    assert n_bars(browser) == 3
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    script = "const done = arguments[0]; fetch('http://localhost:1/').then(() => done('there'), () => done('refused'))"
    assert browser.execute_async_script(script) == "refused"
    assert "Content Security Policy" in "".join(errors(browser))


def test_pointing_at_a_bar_tells_its_task(browser, opened):
    opened(a_table(), "small")
    told = {
        "load-0": "callable: load layer: 0 attempt: 1 status: completed began after: 500 ms took: 2.00 s value: 100 B",
        "load-1": "callable: load layer: 0 attempt: 1 status: completed began after: 500 ms took: 1.00 s value: 1000 B",
        "join": "callable: join layer: 1 attempt: 1 status: completed began after: 3.00 s took: 2.50 s value: 50 B",
    }
    for task, (name, rest) in enumerate(told.items()):
        point_at(browser, task)
        assert tooltip(browser, f"task: {name} ") == f"task: {name} {rest}"


@pytest.mark.slow
def test_pointing_at_a_failed_attempt_tells_its_error(browser, opened):
    failed = FailedAttempt(2, 1, 2.6, 0.3, 0, "OSError: <b>once</b>", "")
    opened(a_table(failures=[failed], attempt=np.array([1, 1, 2], np.int32)), "attempts")
    assert n_bars(browser, "failed attempts") == 1
    point_at(browser, -1, "failed attempts")
    assert tooltip(browser) == "failed attempt: 1 task: join error: OSError: <b>once</b>"


def test_the_wheel_zooms_and_dragging_moves(browser, opened):
    opened(a_table(), "small")
    start, end = browser.execute_script(RANGE)
    x, y = map(round, browser.execute_script(PLACE_OF, 0, "tasks"))
    wheel = ActionChains(browser).key_down(Keys.CONTROL)
    wheel.scroll_from_origin(ScrollOrigin.from_viewport(x, y), 0, -240).key_up(Keys.CONTROL).perform()
    WebDriverWait(browser, PATIENCE, 0.02).until(lambda _: browser.execute_script(RANGE) != [start, end])
    near, far = browser.execute_script(RANGE)
    assert start < near < far < end
    drag = ActionChains(browser, duration=0)
    pointer = drag.w3c_actions.pointer_action
    pointer.move_to_location(x, y)
    pointer.pointer_down()
    for step in range(1, 5):
        pointer.move_to_location(x - 10 * step, y)
    pointer.pointer_up()
    drag.perform()
    WebDriverWait(browser, PATIENCE, 0.02).until(lambda _: browser.execute_script(RANGE)[0] > near)
    moved = browser.execute_script(RANGE)
    assert moved[1] - moved[0] == pytest.approx(far - near)
    # The charts below move with it.
    same = "return ['use', 'memory'].every((name) => forgepar.plot(name).x_range === forgepar.plot('timeline').x_range)"
    assert browser.execute_script(same)


def test_colours_the_critical_path_and_a_traceback_on_demand(browser, opened):
    status = np.array([Status.COMPLETED, Status.FAILED, Status.CACHED], np.int8)
    failed = FailedAttempt(1, 1, 0.5, 1.0, 1, "ValueError: x", "Traceback\n  <script>boom()</script>")
    opened(a_table(status="failed", status_of=status, failures=[failed]), "failed")
    field = "return forgepar.drawn('tasks').glyph.fill_color.field"
    assert (browser.execute_script(field), keys(browser)) == ("by_callable", ["load", "join"])
    browser.find_element(By.CSS_SELECTOR, "input[value=status]").click()
    assert (browser.execute_script(field), keys(browser)) == ("status", ["completed", "failed", "cached"])

    visible = "return forgepar.drawn('critical path').visible"
    assert (browser.execute_script(visible), n_bars(browser, "critical path")) == (False, 2)
    browser.find_element(By.ID, "show-path").click()
    assert browser.execute_script(visible)

    trace = browser.find_element(By.CSS_SELECTOR, ".failure pre")
    assert not trace.is_displayed()
    browser.find_element(By.CSS_SELECTOR, ".failure summary").click()
    assert trace.is_displayed()
    assert trace.text == "Traceback\n  <script>boom()</script>"


def keys(browser) -> list[str]:
    """What the timeline's legend names."""
    found = browser.find_elements(By.CSS_SELECTOR, ".keys .key")
    return [key.text.strip() for key in found if key.is_displayed()]


def test_names_with_markup_do_nothing(browser, opened):
    evil = "</script><script>document.title = 'taken'</script><img src=x onerror=\"document.title='taken'\">&amp;"
    table = a_table(workflow=evil, names=[evil, "load-1", "join"], callables=[evil, "join"])
    opened(replace(table, names=[f"{evil}-0", "load-1", "join"]), "markup")
    assert browser.title == f"{evil}: completed"
    point_at(browser, 0)
    assert tooltip(browser).startswith(f"task: {evil}-0 callable: {evil} layer: 0")
    assert browser.title == f"{evil}: completed"


@pytest.mark.parametrize("schedule", ["layers", pytest.param("eager", marks=pytest.mark.slow)])
def test_thousands_of_tasks(browser, opened, schedule):
    table = replace(a_large_table(10, 300), schedule=schedule)
    opened(table, f"thousands-{schedule}")
    assert n_bars(browser) == 3000
    zoom_to(browser, 1234)
    point_at(browser, 1234)
    assert tooltip(browser).startswith(f"task: {table.names[1234]} callable: step_4 layer: 4 attempt: 1")


@pytest.mark.slow
def test_a_dark_page_has_light_axes(browser, opened):
    dark = {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", dark)
    try:
        opened(a_table(), "dark")
        ink = "return forgepar.plot('timeline').below[0].major_label_text_color"
        assert browser.execute_script(ink) == "#aab2bc"
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.mark.slow
def test_a_hundred_thousand_tasks_open_in_time(browser, opened, folder):
    table = a_large_table(100, 1000)
    seconds = min(opened(table, "hundred-thousand") for _ in range(3))
    size = (folder / "hundred-thousand.html").stat().st_size
    (artifacts(folder) / "report-hundred-thousand.txt").write_text(f"{seconds:.2f} s to open, {size:,} bytes\n")
    assert n_bars(browser) == 100_000
    assert size < MOST_BYTES
    assert seconds < MOST_SECONDS
    zoom_to(browser, 54_321)
    point_at(browser, 54_321)
    assert tooltip(browser).startswith("task: step_6-54321 callable: step_6 layer: 54")
