"""The figures of a run as bars, drawn with rich: a few lines for a terminal or a notebook."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TextIO

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from forgepar.records.display import RunningTask
from forgepar.report.progress import wording
from forgepar.report.progress.figures import Figures
from forgepar.report.progress.terminal import Frame

_MOST_BAR, _LEAST_BAR = 60, 6  # columns
_LONG_SECONDS = 2.0  # tasks that have run for longer are named
_MOST_LONG = 3
_GAP = "  "
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


class Artist:
    """Makes frames for one terminal.

    Args:
        stream: the terminal; frames use its colours and encoding.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._console = Console(file=stream, highlight=False, force_jupyter=False)

    def frame(self, parts: RenderableType, columns: int, lines: int) -> Frame:
        """Draw something, cropped to the terminal."""
        # Some terminals wrap a line that fills the last column. Without a width, the console takes that of the standard
        # streams, which may be other terminals.
        self._console.width = max(1, columns - 1)
        with self._console.capture() as captured:
            self._console.print(parts, no_wrap=True, overflow="ellipsis", crop=True)
        drawn = captured.get().splitlines()[: lines - 1]
        return Frame("".join(f"{line}\n" for line in drawn), [cell_len(_COLOURS.sub("", line)) for line in drawn])

    def text(self, text: str, style: str) -> str:
        """Return a line with the codes of a style."""
        with self._console.capture() as captured:
            self._console.print(Text(text, style), soft_wrap=True)
        return captured.get()


def bars(figures: Figures, columns: int, *, with_longest: bool = True) -> RenderableType:
    """Lay out figures: a bar per open layer, one for the run, and numbers.

    Args:
        figures: the figures.
        columns: the width of the terminal.
        with_longest: whether to name the tasks that have run longest.
    """
    columns -= 1  # as `Artist.frame` does
    parts: list[RenderableType] = [_bar_table(figures, columns)]
    if (n_more := figures.n_open - len(figures.layers)) > 0:
        parts.append(
            Text(f"and {wording.counted(n_more, 'more layer')} begun", "dim", no_wrap=True, overflow="ellipsis")
        )
    parts += packed(numbers(figures), columns)
    long = [task for task in figures.running if task.seconds >= _LONG_SECONDS][:_MOST_LONG]
    if long and with_longest:
        names = ", ".join(of_running(task) for task in long)
        parts.append(Text(f"longest: {names}", "dim", no_wrap=True, overflow="ellipsis", end="\n"))
    return Group(*parts)


def of_running(task: RunningTask, *, with_time: bool = True) -> str:
    """Describe a running task: its name, its time, and the progress that it reported."""
    progress = [wording.as_percent(task.fraction)] if math.isfinite(task.fraction) else []
    progress += [wording.one_line(task.text, 40)] if task.text else []
    parts = [
        wording.one_line(task.task),
        wording.as_time(task.seconds) if with_time else "",
        f"({' '.join(progress)})" if progress else "",
    ]
    return " ".join(part for part in parts if part)


def numbers(figures: Figures) -> list[Text]:
    """Return the numbers of a run, the most important first."""
    counts = figures.counts
    found: list[Text] = []
    if counts.get("compensated"):
        found.append(Text(f"rollback: {counts['compensated']:,} undone", "yellow"))
    found.append(Text(f"{wording.as_time(figures.seconds_left)} left", "bold"))
    for status, style in (("failed", "bold red"), ("skipped", "yellow"), ("cancelled", "yellow"), ("cached", "blue")):
        if n := counts.get(status):
            found.append(Text(f"{n:,} {status}", style))
    if figures.n_layers_done:
        found.append(Text(f"{figures.n_layers_done:,} of {wording.counted(figures.n_layers, 'layer')} done"))
    if figures.pids:
        found.append(Text(f"{len(figures.running)} of {wording.counted(figures.n_workers, 'worker')} busy"))
    found += [Text(text) for text in (wording.as_rate(figures.rate), wording.held(figures.bytes_held)) if text]
    return found


def packed(parts: Sequence[Text], columns: int, most_lines: int = 2) -> list[Text]:
    """Join parts into lines of this width; cut the last line."""
    lines = [Text(no_wrap=True, overflow="ellipsis")]
    for part in parts:
        is_first = not lines[-1]
        if not is_first and len(lines) < most_lines and lines[-1].cell_len + len(_GAP) + part.cell_len > columns:
            lines.append(Text(no_wrap=True, overflow="ellipsis"))
            is_first = True
        lines[-1].append_text(part if is_first else Text(_GAP) + part)
    return lines


def _bar_table(figures: Figures, columns: int) -> RenderableType:
    rows = [
        (f"layer {layer.layer + 1} of {figures.n_layers}", layer.n_done, layer.n_tasks, "cyan", "")
        for layer in figures.layers
    ]
    style = "red" if figures.n_failed else "green"
    name = wording.one_line(figures.workflow, max(8, columns // 4))
    rows.append((name, figures.n_done, figures.n_tasks, style, wording.as_time(figures.elapsed_seconds)))
    cells = [(label, f"{n:,}/{of:,}", wording.as_percent(n / of), time) for label, n, of, _, time in rows]
    widths = [max(cell_len(row[i]) for row in cells) for i in range(4)]
    width = min(_MOST_BAR, columns - sum(widths) - 4)
    has_counts = sum(widths) + 3 <= columns
    table = Table.grid(padding=(0, 1, 0, 0))
    for (label, counts, percent, time), (_, n, of, style, _) in zip(cells, rows, strict=True):
        row: list[RenderableType] = [Text(label, "bold", no_wrap=True, overflow="ellipsis")]
        if width >= _LEAST_BAR:
            row.append(ProgressBar(of, n, width, style="grey37", complete_style=style, finished_style=style))
        if has_counts:
            row.append(Text(counts, justify="right"))
        table.add_row(*row, Text(percent, "bold", justify="right"), Text(time, "dim", justify="right"))
    for column in table.columns[1:]:
        column.no_wrap = True  # labels are cut first
    return table
