"""A run on a full screen: workers, layers, failures and the output of tasks.

LiveProgress   displays a run of this process; `q` switches to bars
watch_table    displays a run of another process, from its store
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TextIO

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from forgepar.machine import as_text
from forgepar.records.display import FailedTask, RunningTask, RunView
from forgepar.records.table import RunTable
from forgepar.report.progress import wording
from forgepar.report.progress.bars import Artist, bars, of_running
from forgepar.report.progress.display import BarProgress, Pace
from forgepar.report.progress.figures import Figures, RunMeter
from forgepar.report.progress.processes import Processes, Usage
from forgepar.report.progress.terminal import FullScreen

_KEY_SECONDS = 0.2  # between two reads of the keys
_READ_SECONDS = 1.0  # between two reads of a store
_READ_SHARE = 10  # the pause after a read is at least ten times as long as the read
_MOST_FAILURES = 5
_LEAST_WORKERS = 3  # rows that are kept for workers, however long the output


class LiveProgress:
    """A display on the full screen.

    Args:
        stream: the terminal; None: standard error.
        keys: the stream to read keys from; None: standard input.
    """

    def __init__(self, stream: TextIO | None = None, keys: TextIO | None = None) -> None:
        self.look_at = math.inf
        self._stream = stream or sys.stderr
        self._screen = FullScreen(self._stream, keys or sys.stdin)
        self._artist = Artist(self._stream)
        self._meter = RunMeter()
        self._pace = Pace()
        self._processes = Processes()
        self._failures: deque[str] = deque(maxlen=_MOST_FAILURES)
        self._draw_at = 0.0
        self._look: Callable[[], RunView] | None = None
        self._bars: BarProgress | None = None  # after `q`

    def begin(self, look: Callable[[], RunView]) -> None:
        """Open the screen."""
        self._look = look
        self._screen.open()
        self.look_at = time.perf_counter()

    def beat(self, now: float) -> None:
        """Read keys, and draw if it is time."""
        if self._bars is not None:
            self._bars.beat(now)
            self.look_at = self._bars.look_at
            return
        if now < self.look_at or self._look is None:
            return
        if "q" in self._screen.key().lower():
            self._leave()
            return
        if now >= self._draw_at:
            self._draw(self._meter.of_view(self._look()))
            self._draw_at = self._pace.next_after(now, time.perf_counter())
        self.look_at = min(self._draw_at, time.perf_counter() + _KEY_SECONDS)

    def failed(self, failure: FailedTask) -> None:
        """Add a failure to the screen; the first few are drawn at once."""
        if self._bars is not None:
            self._bars.failed(failure)
            return
        self._failures.append(wording.of_failure(failure))
        if len(self._failures) < _MOST_FAILURES:
            self._draw_at = self.look_at = 0.0

    def close(self) -> None:
        """Close the screen, and print a last line."""
        self.look_at = math.inf
        self._screen.close()
        if self._bars is None and self._look is not None:
            self._bars = BarProgress(self._stream)
            self._bars.begin(self._look)
        self._look = None
        if self._bars is not None:
            self._bars.close()

    def _leave(self) -> None:
        assert self._look is not None
        self._screen.close()
        self._bars = BarProgress(self._stream)
        self._bars.begin(self._look)
        self.look_at = self._bars.look_at

    def _draw(self, figures: Figures) -> None:
        columns, lines = self._screen.size
        usage = self._processes.usage([pid for pid in figures.pids if pid])
        rows = worker_rows(figures, usage)
        parts = screen(
            figures, rows, list(self._failures), self._screen.last_lines(lines), columns, lines,
            "q: back to bars; Ctrl-C: end the run",
        )  # fmt: skip
        self._screen.show(self._artist.frame(parts, columns, lines + 1))


def watch_table(
    read: Callable[[], RunTable], pid: int | None = None, stream: TextIO | None = None, keys: TextIO | None = None
) -> Figures:
    """Show a run of another process on the full screen until it ends, or `q` or Ctrl-C is typed.

    Args:
        read: reads the table of the run.
        pid: the process of the run, if it is on this machine.
        stream: the terminal; None: standard output.
        keys: the stream to read keys from; None: standard input.

    Returns:
        The last figures of the run.
    """
    stream = stream or sys.stdout
    view, artist, meter, processes = FullScreen(stream, keys or sys.stdin), Artist(stream), RunMeter(), Processes()
    view.open()
    try:
        while True:
            begin = time.perf_counter()
            table = read()
            figures = meter.of_table(table)
            columns, lines = view.size
            usage = processes.usage_below(pid) if pid is not None else {}
            failures = [_of_failed_attempt(table, number) for number in range(len(table.failures))[-_MOST_FAILURES:]]
            parts = screen(
                figures, table_rows(table), failures, _totals(usage, pid), columns, lines, "q: leave; the run continues"
            )
            view.show(artist.frame(parts, columns, lines + 1))
            pause = max(_READ_SECONDS, _READ_SHARE * (time.perf_counter() - begin))
            if table.status != "running" or "q" in view.key(pause).lower():
                return figures
    finally:
        view.close()


# Contents of the screen


def screen(
    figures: Figures,
    rows: Sequence[tuple[str, ...]],
    failures: Sequence[str],
    output: Sequence[str],
    columns: int,
    lines: int,
    hint: str,
) -> RenderableType:
    """Lay out a screen: bars, a row per worker, failures, output and a hint; `worker_rows` makes the rows."""
    head: list[RenderableType] = [bars(figures, columns, with_longest=False), Text()]
    left = lines - len(figures.layers) - 6 - (len(failures) + 2 if failures else 0)
    n_rows = max(_LEAST_WORKERS, min(len(rows) - 1, left - min(len(output), left // 3)))
    head.append(_table(rows[: n_rows + 1]))
    if (n_more := len(rows) - 1 - n_rows) > 0:
        head.append(Text(f"and {wording.counted(n_more, 'more worker')}", "dim"))
    if failures:
        head += [Text(), *(_line(failure, "red") for failure in failures)]
    n_output = max(0, left - n_rows - 2)
    if shown := output[-n_output:] if n_output else ():
        head += [Text(), *(_line(wording.one_line(line) or " ", "") for line in shown)]
    return Group(*head, Text(), _line(hint, "dim"))


def worker_rows(figures: Figures, usage: dict[int, Usage]) -> list[tuple[str, ...]]:
    """Return a head and a row per worker: its CPU time and memory, its task, and how long that has run."""
    running = {task.worker: task for task in figures.running}
    rows: list[tuple[str, ...]] = [("worker", "pid", "CPU", "memory", "for", "task")]
    for slot, pid in enumerate(figures.pids):
        rows.append(
            (str(slot), str(pid or wording.UNKNOWN), *_usage_cells(usage.get(pid)), *_task_cells(running.get(slot)))
        )
    return rows


def table_rows(table: RunTable) -> list[tuple[str, ...]]:
    """Return a head and a row per worker: how much it did, and its last task."""
    rows: list[tuple[str, ...]] = [("worker", "tasks", "work", "busy", "ended", "last task")]
    for slot in range(table.n_workers):
        tasks = np.flatnonzero((table.worker == slot) & np.isfinite(table.seconds))
        if not len(tasks):
            rows.append((str(slot), "0", *[wording.UNKNOWN] * 4))
            continue
        ends = table.start[tasks] + table.seconds[tasks]
        last = int(tasks[np.argmax(ends)])
        work = float(table.seconds[tasks].sum())
        busy = min(1.0, work / table.wall_seconds) if table.wall_seconds else 0.0
        ago = max(0.0, table.wall_seconds - float(ends.max()))
        cells = (
            wording.as_time(work),
            wording.as_percent(busy),
            f"{wording.as_time(ago)} ago",
            wording.one_line(table.names[last]),
        )
        rows.append((str(slot), f"{len(tasks):,}", *cells))
    return rows


def _table(rows: Sequence[tuple[str, ...]]) -> Table:
    head, *body = rows
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold", show_edge=False)
    for place, name in enumerate(head):
        is_last = place == len(head) - 1
        table.add_column(name, justify="left" if is_last else "right", no_wrap=True, overflow="ellipsis")
    for row in body:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _usage_cells(usage: Usage | None) -> tuple[str, str]:
    return (wording.UNKNOWN, wording.UNKNOWN) if usage is None else (f"{usage.cpu:.0f} %", as_text(usage.memory))


def _task_cells(task: RunningTask | None) -> tuple[str, str]:
    if task is None:
        return wording.UNKNOWN, "idle"
    return wording.as_time(task.seconds), of_running(task, with_time=False)


def _line(text: str, style: str) -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _of_failed_attempt(table: RunTable, number: int) -> str:
    failed = table.failures[number]
    goes_on = failed.task not in table.errors
    return wording.of_failure(FailedTask(table.names[failed.task], failed.attempt, failed.error, goes_on))


def _totals(usage: dict[int, Usage], pid: int | None) -> list[str]:
    if not usage:
        return []
    cpu, memory = sum(one.cpu for one in usage.values()), sum(one.memory for one in usage.values())
    return [f"process {pid} and {len(usage) - 1} children: CPU {cpu:.0f} %, memory {as_text(memory)}"]
