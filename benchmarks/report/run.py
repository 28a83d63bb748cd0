"""The HTML report of a large run: seconds to write it, its size, and seconds until a browser has drawn it.

The run is real: a stencil graph of tasks that do nothing, 2 workers. The browser is chromium, headless, without a
network; where it, its driver or selenium is missing, that row says so.

    python -m benchmarks report [--small]
"""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import timed
from benchmarks.patterns import noop, stencil
from benchmarks.systems.system_forgepar import ForgeparRunner
from forgepar.records.table import RunTable
from forgepar.report.forecast import plan_table

TITLE = "Report: writing and opening the HTML file of a run"
DEPTH = 20
WIDTH = 5000
SMALL_WIDTH = 100
MOST_MIB, MOST_OPEN_SECONDS, MOST_WRITE_SECONDS = 15.0, 3.0, 10.0
PATIENCE = 60.0
OPTIONS = ("headless=new", "no-sandbox", "disable-gpu", "no-first-run", "disable-sync", "disable-dev-shm-usage")
OFFLINE = ("disable-background-networking", "disable-component-update", "host-resolver-rules=MAP * ~NOTFOUND")


def rows(small: bool, repeat: int) -> list[Row]:
    """Write a report, and open it."""
    if importlib.util.find_spec("bokeh") is None:
        return [{"tasks": 0, "note": "skipped: bokeh is not installed; pip install 'forgepar[report]'"}]
    table = run(SMALL_WIDTH if small else WIDTH)
    with tempfile.TemporaryDirectory() as folder:
        return measured(table, Path(folder, "run.html"), repeat)


def run(width: int) -> RunTable:
    """Run a stencil graph."""
    with fp.WorkflowExecutor(workers=2) as executor:
        runner = ForgeparRunner(executor, "layers")
        runner.run(runner.declare(stencil(100, 10), noop))
        workflow, _ = runner.declare(stencil(width, DEPTH), noop)
        return executor.run(workflow).table()


def measured(table: RunTable, path: Path, repeat: int) -> list[Row]:
    """Return a row each for writing, size and opening."""
    from forgepar.report.html.report import write_report

    write_report(table, path)  # loads bokeh
    writes = [timed(write_report, table, path)[0] for _ in range(repeat)]
    simulated = [timed(plan_table, table)[0] for _ in range(repeat)]
    opened, note = opening(path, repeat)
    mib = path.stat().st_size / 2**20
    n = len(table)
    found = [
        target({"what": "writing", "tasks": n, "figure": median(writes), "unit": "s"}, "figure", MOST_WRITE_SECONDS),
        {"what": "simulating other workers, of that", "tasks": n, "figure": median(simulated), "unit": "s"},
        target({"what": "size", "tasks": n, "figure": mib, "unit": "MiB"}, "figure", MOST_MIB),
    ]
    if note:
        return [*found, {"what": "opening", "tasks": n, "note": note}]
    row: Row = {"what": "opening", "tasks": n, "figure": median(opened), "unit": "s", "first": opened[0]}
    return [*found, target(row, "figure", MOST_OPEN_SECONDS)]


def opening(path: Path, repeat: int) -> tuple[list[float], str]:
    """Return the seconds until a browser has drawn a report, each time it opens it; or why there are none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver or importlib.util.find_spec("selenium") is None:
        return [], "skipped: it takes chromium, chromium-driver and selenium"
    with started(browser, driver) as chrome:
        return [seconds_to_open(chrome, path) for _ in range(repeat)], ""


@contextmanager
def started(browser: str, driver: str) -> Iterator[Any]:
    """Start a browser with a profile of its own."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = browser
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        for option in (*OPTIONS, *OFFLINE, f"user-data-dir={profile}"):
            options.add_argument(f"--{option}")
        chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(executable_path=driver))
        try:
            yield chrome
        finally:
            chrome.quit()


def seconds_to_open(chrome: Any, path: Path) -> float:
    """Open a report; return the seconds until all of it is drawn."""
    from selenium.webdriver.support.ui import WebDriverWait

    begin = time.perf_counter()
    chrome.get(path.as_uri())
    drawn = "return document.documentElement.dataset.ready !== undefined"
    WebDriverWait(chrome, PATIENCE, 0.01).until(lambda _: chrome.execute_script(drawn))
    return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
