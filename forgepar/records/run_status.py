"""The status of a run and its tasks, as both an audit log and a result report it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple


class TaskStatus(NamedTuple):
    """The status of a task.

    Attributes:
        status: "running", "pending" (it waits for a retry), "completed", "failed", "skipped", "cached" (an earlier run
            completed it), "cancelled" or "compensated".
        attempt: the number of the last attempt, or of the next one if it is pending; 0 if there is none.
        worker: the slot that it ran on, -1 for none.
        error: class and text of the exception, None if it did not fail.
    """

    status: str
    attempt: int = 0
    worker: int = -1
    error: str | None = None


@dataclass(frozen=True, slots=True)
class RunStatus:
    """The status of a run.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        status: "completed", "failed", "cancelled", or "running" if there is no event of its end.
        task_count: number of tasks, including those that joined during the run.
        counts: number of tasks of each status; tasks without an event are "pending", or "cancelled" once the run has
            ended.
        tasks: by name, the tasks that have events.
    """

    run_id: str
    workflow: str
    status: str
    task_count: int
    counts: Mapping[str, int]
    tasks: Mapping[str, TaskStatus]
