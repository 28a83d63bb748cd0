"""Where a run and its tasks stand: what a log of events and the run's own result tell alike."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from forgepar.errors import text_of


class TaskStanding(NamedTuple):
    """Where a task stands.

    Attributes:
        status: "running", "pending" (it waits to be tried again), "completed", "failed", "skipped", "cached" (an
            earlier run did it), "cancelled" or "compensated".
        attempt: which attempt was the last, or is the next; 0 if there is none.
        worker: the slot that it ran on, -1 for none.
        error: what it failed with, None if it did not.
    """

    status: str
    attempt: int = 0
    worker: int = -1
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a run stands.

    Attributes:
        run_id: the run's id.
        workflow: the workflow's name.
        status: "completed", "failed", "cancelled", or "running" where nothing tells of an end.
        task_count: how many tasks there are, with those that joined the run.
        counts: how many of them there are of each status; those that nothing was told of are "pending", or "cancelled"
            once the run has ended.
        tasks: by name, the tasks that something was told of.
    """

    run_id: str
    workflow: str
    status: str
    task_count: int
    counts: Mapping[str, int]
    tasks: Mapping[str, TaskStanding]


def error_text(error: BaseException) -> str:
    """Return an exception as events tell it."""
    return f"{type(error).__name__}: {text_of(error)}"
