"""What it costs to show a run as it goes: 100,000 tasks with and without bars on a pseudo-terminal, and with lines.

Runs alternate in one process, on warm workers. The ratio is that of medians and has the noise of the machine in it;
"% shown" is the share of the run that its loop spent in the display, measured within the run: the target is about that.
Tasks that do nothing are over before the first bar is due; those of 50 us are there for the bars.

    python -m benchmarks.progress.run [--small]
"""

from __future__ import annotations

import contextlib
import io
import os
import pty
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

import forgepar as fp
from benchmarks._common import Row, main, target
from benchmarks._measure import apart, interleaved, spread, timed
from benchmarks.patterns import Kernel, noop, spin, stencil
from benchmarks.systems.system_forgepar import ForgeparRunner
from forgepar.records.display import FailedTask, RunView
from forgepar.report.progress.display import BarProgress, has_rich
from forgepar.report.progress.plain import PlainProgress

TITLE = "Progress: seconds of a run, stencil graph, 2 workers"
COLUMN, SHARE = "seconds", "% shown"
DEPTH, WIDTH, SMALL_WIDTH = 20, 5000, 500
SPIN_SECONDS = 5e-5
MOST_PERCENT = 1.0


def rows(small: bool, repeat: int) -> list[Row]:
    """Measure runs of tasks that do nothing, and of short ones, with each display."""
    width = SMALL_WIDTH if small else WIDTH
    found: list[Row] = []
    for name, seconds in (("no-op", 0.0), (f"{SPIN_SECONDS * 1e6:.0f} us", SPIN_SECONDS)):
        samples = apart(costs, width, seconds, repeat)
        base = statistics.median(wall for wall, _ in samples["none"])
        for display, taken in samples.items():
            row: Row = {"task": name, "tasks": width * DEPTH, "display": display}
            row |= spread(COLUMN, [wall for wall, _ in taken])
            row["x none"] = row[COLUMN] / base
            if display != "none":
                row[SHARE] = statistics.median(100 * shown / wall for wall, shown in taken)
                row = row if small else target(row, SHARE, MOST_PERCENT)
            found.append(row)
    return found


class Timed:
    """A display that notes how long another one takes.

    Args:
        display: the other.
    """

    def __init__(self, display: Any) -> None:
        self._display = display
        self.look_at = display.look_at
        self.seconds = 0.0

    def begin(self, look: Callable[[], RunView]) -> None:
        self._note(self._display.begin, look)

    def beat(self, now: float) -> None:
        self._note(self._display.beat, now)

    def failed(self, failure: FailedTask) -> None:
        self._note(self._display.failed, failure)

    def close(self) -> None:
        self._note(self._display.close)

    def _note(self, call: Callable[..., None], *arguments: Any) -> None:
        begin = time.perf_counter()
        call(*arguments)
        self.look_at = self._display.look_at
        self.seconds += time.perf_counter() - begin


def costs(width: int, seconds: float, repeat: int) -> dict[str, list[tuple[float, float]]]:
    """Return by display the seconds of runs, and those of them that went into the display."""
    kernel: Kernel = spin(seconds) if seconds else noop
    with fp.WorkflowExecutor(workers=2) as executor, terminal() as stream:
        runner = ForgeparRunner(executor, "layers")
        runner.run(runner.declare(stencil(100, 10), noop))
        workflow, _ = runner.declare(stencil(width, DEPTH), kernel)

        def run(display: Any) -> tuple[float, float]:
            wall, _ = timed(lambda: executor.run(workflow, progress=display))
            return wall, 0.0 if display is None else display.seconds

        subjects: dict[str, Callable[[], tuple[float, float]]] = {"none": lambda: run(None)}
        if has_rich():
            subjects["bars"] = lambda: run(Timed(BarProgress(stream)))
        subjects["lines"] = lambda: run(Timed(PlainProgress(io.StringIO())))
        return interleaved(subjects, repeat)


@contextlib.contextmanager
def terminal() -> Iterator[TextIO]:
    """Open a pseudo-terminal that another process reads, as a terminal's own would."""
    own, other = pty.openpty()
    with subprocess.Popen(["cat"], stdin=own, stdout=subprocess.DEVNULL) as reader:  # noqa: S607
        os.close(own)
        with open(other, "w") as stream:  # noqa: PTH123
            yield stream
        reader.wait()


if __name__ == "__main__":
    raise SystemExit(main(TITLE, rows))
