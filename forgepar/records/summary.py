"""The summary of a run as text: counts, times, layers and failures."""

from __future__ import annotations

from collections.abc import Mapping

from forgepar.records.table import RunTable
from forgepar.system.escaping import escaped, escaped_line


def counts_text(counts: Mapping[str, int]) -> str:
    """Return the counts of tasks by status as text, such as "3 completed, 1 failed"."""
    return ", ".join(f"{n} {status}" for status, n in counts.items())


def summary_text(table: RunTable, notes: list[str]) -> str:
    """Return the summary of a run: a line for the run, one per layer, notes, and one per task that failed.

    Args:
        table: the run.
        notes: further lines, between those of the layers and those of the failures.
    """
    times = f"{_seconds(table.wall_seconds)} on {table.n_workers} workers, {_seconds(table.cpu_seconds)} of CPU"
    lines = [
        f"workflow {table.workflow!r}: {counts_text(table.status_counts())}; {times}",
        f"{'layer':>5} {'tasks':>8} {'wall':>10} {'longest':>10} {'work':>10}  longest task",
    ]
    lines += [
        f"{row.layer:>5} {row.n_tasks:>8} {_seconds(row.wall_seconds):>10} {_seconds(row.longest_seconds):>10} "
        f"{_seconds(row.work_seconds):>10}  {escaped_line(row.longest_task)}"
        for row in table.layer_table()
    ]
    failures = [f"failed: {escaped_line(table.names[task])}: {escaped(error)}" for task, error in table.errors.items()]
    return "\n".join([*lines, *notes, *failures])


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.1f} ms"
