"""The pictures in the README: progress bars and report of a real run, made PNGs by a headless chromium.

python -m benchmarks.pictures FOLDER
"""

from __future__ import annotations

import argparse
import io
import math
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import forgepar as fp
from forgepar.records.display import FailedTask, RunView
from forgepar.report.progress import wording
from forgepar.report.progress.figures import RunMeter

COLUMNS = 100
REPORT_SIZE = (1280, 900)  # pixels
MOST_BYTES = 100_000
_MOMENT = 0.92  # of the run, at which it is drawn
_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
    "--virtual-time-budget=5000",  # until the report is drawn
)


def main(argv: Sequence[str] | None = None) -> int:
    """Make the picture."""
    parser = argparse.ArgumentParser(description="Make the pictures of the README.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where to put them")
    folder = parser.parse_args(argv).folder
    browser = next(filter(None, map(shutil.which, _BROWSERS)), None)
    if browser is None:
        print(f"there is none of {', '.join(_BROWSERS)}; Debian's package is chromium", file=sys.stderr)
        return 2
    folder.mkdir(parents=True, exist_ok=True)
    moment = Moment()
    result = nightly().run(workers=8, progress=moment)
    pictures = {"progress.png": progress_page(moment), "report.png": report_page(result)}
    for name, page in pictures.items():
        photograph(browser, page, folder / name)
        print(f"{folder / name}: {(folder / name).stat().st_size:,} bytes")
    return 0 if all((folder / name).stat().st_size <= MOST_BYTES for name in pictures) else 1


class Page(NamedTuple):
    """What is to be photographed: HTML, and the size of its picture in pixels."""

    html: str
    width: int
    height: int


class Moment:
    """A display that keeps what there was to see at one moment of a run."""

    def __init__(self) -> None:
        self.look_at = math.inf
        self.failures: list[FailedTask] = []
        self.figures: Any = None
        self._meter = RunMeter()

    def begin(self, look: Callable[[], RunView]) -> None:
        self._look = look
        self.look_at = 0.0

    def beat(self, now: float) -> None:
        figures = self._meter.of_view(self._look())
        if self.figures is None or figures.fraction < _MOMENT:
            self.figures = figures
        self.look_at = now + 0.05

    def failed(self, failure: FailedTask) -> None:
        self.failures.append(failure)

    def close(self) -> None:
        self.look_at = math.inf


def work(part: int) -> bytes:
    """Take a moment, and fail for one part of all."""
    time.sleep(random.Random(part).uniform(0.05, 0.1))
    if part == 371:
        raise LookupError(f"no rows in part {part}")
    return bytes(40_000)


def merge(parts: list[bytes]) -> bytes:
    """Take long, and tell how far it is."""
    for step in range(1, 21):
        time.sleep(0.2)
        fp.context().progress(step / 20)
    return b"".join(parts)


def nightly() -> fp.Workflow:
    """Make a workflow of three layers."""
    wf = fp.Workflow("nightly")
    loaded = wf.map(fp.task(work).options(name="load", fallback=b""), range(400))
    merged = [wf.add(fp.task(merge).options(name=f"merge-{i}"), loaded[i : i + 20]) for i in range(0, 60, 20)]
    cleaned = [wf.add(fp.task(work).options(name=f"clean-{i}", after=loaded), 1000 + i) for i in range(200)]
    wf.add(fp.task(merge).options(name="publish", after=cleaned), merged)
    return wf


def progress_page(moment: Moment) -> Page:
    """Return what the bars looked like amid the run."""
    from rich.console import Console
    from rich.text import Text

    from forgepar.report.progress.bars import bars

    console = Console(file=io.StringIO(), record=True, width=COLUMNS, highlight=False, force_terminal=True)
    console.print(Text("$ forgepar run pipeline.py:nightly -w 8", "bold"))
    for failure in moment.failures:
        console.print(Text(wording.of_failure(failure), "yellow" if failure.goes_on else "red"))
    console.print(bars(moment.figures, COLUMNS))
    svg = console.export_svg(title="forgepar")
    size = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)
    assert size is not None
    width, height = (math.ceil(float(number)) for number in size.groups())
    # Fonts that would be fetched are left out: the picture is to be the same without a network.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    return Page(f'<body style="margin:0">{svg}</body>', width, height)


def report_page(result: fp.RunResult) -> Page:
    """Return the upper part of the run's report."""
    from forgepar.report.html.report import report_html

    return Page(report_html(result.table()), *REPORT_SIZE)


def photograph(browser: str, page: Page, png: Path) -> None:
    """Have a browser draw a page into a PNG."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "page.html")
        file.write_text(page.html, encoding="utf-8")
        size = f"--window-size={page.width},{page.height}"
        command = [browser, *_FLAGS, f"--screenshot={png.resolve()}", size, file.as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    sys.exit(main())
