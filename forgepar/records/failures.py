"""The failed attempts of a run, from its events."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterable

from forgepar.records.events import Event, WorkflowTaskFailed, WorkflowTaskRetried, WorkflowToolFallback
from forgepar.records.ledger import Ledger
from forgepar.records.table import FailedAttempt
from forgepar.workflow.plan import Plan


def failed_attempts(plan: Plan, ledger: Ledger, events: Iterable[Event]) -> list[FailedAttempt]:
    """Return every failed attempt. The times and the worker are known only for the last attempt of a task."""
    found: list[FailedAttempt] = []
    for event in events:
        match event:
            case WorkflowTaskRetried():
                attempt, is_last = event.attempt - 1, False
            case WorkflowToolFallback():
                attempt, is_last = event.attempt, False
            case WorkflowTaskFailed():
                attempt, is_last = event.attempt, True
            case _:
                continue
        task = plan.find(event.task)
        start, seconds, worker, trace = math.nan, math.nan, -1, ""
        if is_last and (error := ledger.errors.get(task)) is not None:
            start, seconds = float(ledger.start[task] - ledger.began), float(ledger.duration[task])
            worker, trace = int(ledger.worker[task]), "".join(traceback.format_exception(error))
        found.append(FailedAttempt(task, attempt, start, seconds, worker, event.error, trace))
    return found
