"""What a store has of each run as a whole: `RunFacts`, made from the rows of table ``runs``.

A run that was killed still has status "running" in its row. Its lock file shows whether its program is alive.
"""

from __future__ import annotations

import socket
import sqlite3
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from forgepar._validate import MOST_WORKERS
from forgepar.machine import kernel_id, start_time
from forgepar.store.columns import INTEGER, MOST_SECONDS, NONE, NUMBER, TEXT, check_columns
from forgepar.store.lock import life_file
from forgepar.system.life_locks import NO_LOCK, is_held, kernel_of
from forgepar.version import public

SELECT_FACTS = (
    "SELECT id, run_id, workflow, status, began, wall_seconds, cpu_seconds, peak_rss, n_tasks, n_layers, workers, "
    "schedule, resumed, host, pid, pid_started, python, forgepar, seen FROM runs"
)
_TYPES = (
    *(INTEGER, TEXT, TEXT, TEXT, NUMBER, NUMBER + NONE, NUMBER + NONE, INTEGER + NONE),
    *(INTEGER, INTEGER, INTEGER, TEXT, INTEGER, TEXT, INTEGER, TEXT, TEXT, TEXT, NUMBER),
)


@public
@dataclass(frozen=True, slots=True)
class RunFacts:
    """Facts of a run as a whole, from a store.

    Attributes:
        number: of the run in the store, from 1.
        run_id: the run's own id.
        workflow: the workflow's name.
        status: "running", "completed", "failed", "cancelled" or "interrupted" (ended from outside, or killed).
        began_at: seconds since the epoch (UTC).
        wall_seconds: duration; so far, if the run is running.
        cpu_seconds: CPU time of its workers; 0 while it is running.
        peak_rss: largest resident memory of a worker, bytes; 0 while it is running.
        n_tasks: number of tasks of the workflow that are known so far.
        n_layers: number of layers.
        n_workers: number of workers.
        schedule: "layers" or "eager".
        is_resumed: whether the run could use values of earlier runs.
        host: name of the machine.
        pid: of the program.
        python: its version.
        forgepar: its version.
    """

    number: int
    run_id: str
    workflow: str
    status: str
    began_at: float
    wall_seconds: float
    cpu_seconds: float
    peak_rss: int
    n_tasks: int
    n_layers: int
    n_workers: int
    schedule: str
    is_resumed: bool
    host: str
    pid: int
    python: str
    forgepar: str


def facts_of_runs(connection: sqlite3.Connection, folder: Path) -> list[RunFacts]:
    """Return the facts of all runs, in the order in which they began.

    Args:
        connection: to the store.
        folder: of the store's files.
    """
    return [facts_of_run(row, folder) for row in connection.execute(f"{SELECT_FACTS} ORDER BY id")]


def facts_of_run(row: tuple[Any, ...], folder: Path) -> RunFacts:
    """Return the facts of a run from a row of `SELECT_FACTS`.

    Raises:
        ValueError: the row is damaged.
    """
    check_columns([row], _TYPES)
    number, run_id, workflow, status, began, wall, cpu, rss, n_tasks, n_layers, workers, schedule, *rest = row
    resumed, host, pid, started, python, forgepar, seen = rest
    if not 0 <= began < MOST_SECONDS or not (0 <= workers <= MOST_WORKERS) or n_tasks < 0 or n_layers < 0:
        raise ValueError(f"run {number} has an impossible time or count")
    if any(value is not None and not 0 <= value < MOST_SECONDS for value in (wall, cpu)):
        raise ValueError(f"run {number} has an impossible duration")
    if status == "running" and not _is_alive(life_file(folder, run_id), host, pid, started):
        status = "interrupted"
    if wall is None:
        wall = max(0.0, (time.time() if status == "running" else seen) - began)  # the clock may have been set back
    of_workers = (cpu or 0.0, rss or 0, n_tasks, n_layers, workers, schedule, bool(resumed))
    return RunFacts(number, run_id, workflow, status, began, wall, *of_workers, host, pid, python, forgepar)


def _is_alive(path: str, host: str, pid: int, started: str) -> bool:
    """Return whether the program of a run is alive; also True if that cannot be known from here.

    Args:
        path: the lock file of the run, which is missing if an older version wrote the run.
        host: name of its machine.
        pid: of the program on that machine.
        started: when the program started.
    """
    kernel, is_here = kernel_of(path), host == socket.gethostname()
    if kernel is None:
        return not is_here or start_time(pid) == started
    if is_here and kernel not in (NO_LOCK, kernel_id()):
        return False  # this machine has been restarted since
    return bool(is_held(path))
