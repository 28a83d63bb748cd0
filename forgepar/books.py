"""What a run writes down as it goes: the columns of its ledger, and its events.

Notes are only queued while workers wait for batches, and written after those are out.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence

import numpy as np

from forgepar.backends.base import Lost
from forgepar.backends.wire import Reply
from forgepar.events import (
    Event,
    Sink,
    WorkflowCompleted,
    WorkflowStarted,
    WorkflowTaskFailed,
    WorkflowTaskParallelCompleted,
    WorkflowTaskParallelStarted,
    WorkflowTaskRetried,
    WorkflowTasksAdded,
    WorkflowToolFallback,
    WorkflowValueSpilled,
    WorkflowWorkerDied,
)
from forgepar.plan import Plan, Tasks, as_index
from forgepar.result import Ledger
from forgepar.runstate import Effect, FellBack, LayerCompleted, LayerStarted, Retried, Skipped, Status, TaskFailed
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment, wire_bytes
from forgepar.values.segment import is_reused, is_spilled, names_of

_TWO_FLOATS = struct.Struct("dd")


class Books:
    """Writes a run's ledger and events.

    Args:
        plan: the workflow.
        sinks: who gets the events.
        n_slots: how many workers the run has.
        arena: where large values are.
    """

    def __init__(self, plan: Plan, sinks: Sequence[Sink], n_slots: int, arena: Arena) -> None:
        self._arena = arena
        self.ledger = Ledger(plan.n_tasks)
        self.ledger.n_slots = n_slots
        self._plan = plan
        self._sinks = sinks
        self._read()
        self._replies: list[tuple[Tasks, Reply]] = []
        self._effects: list[Effect] = []

    def _read(self) -> None:
        # A single row is written through these: numpy would take five times as long.
        self._start_at, self._duration_at = self.ledger.start.data, self.ledger.duration.data
        self._worker_at = self.ledger.worker.data

    def grow(self, plan: Plan, task: int) -> None:
        """Go on with a plan that has more tasks, as a task turned out to be some."""
        n_new = plan.n_tasks - self._plan.n_tasks
        self.keep()
        self._plan = plan
        self.ledger.grow(plan.n_tasks)
        self._read()
        self._emit([WorkflowTasksAdded(time.time(), plan.name(task), n_new, plan.n_layers)])

    def begin(self) -> None:
        """Note the start of the run."""
        plan = self._plan
        self.ledger.began = time.perf_counter()
        self._arena.reset_peak()
        self._emit([WorkflowStarted(time.time(), plan.workflow_name, plan.n_tasks, plan.n_layers)])

    def reply(self, tasks: Tasks, reply: Reply) -> None:
        """Queue what a reply tells of the tasks it is about."""
        self._replies.append((tasks, reply))

    def effects(self, effects: Sequence[Effect]) -> None:
        """Queue what followed from outcomes."""
        self._effects += effects

    def failure(self, task: int, error: Exception, slot: int) -> None:
        """Write down at once what a task's attempt failed with."""
        self.ledger.errors[task] = error
        self.ledger.worker[task] = slot

    def cut_short(self, task: int, started: float) -> None:
        """Write down the time of an attempt that its worker did not live to tell of."""
        self.ledger.start[task] = started
        self.ledger.duration[task] = time.perf_counter() - started

    def event(self, event: Event) -> None:
        """Note an event now, behind what is queued."""
        self.keep()
        self._emit([event])

    def death(self, lost: Lost, blamed: int | None) -> None:
        """Note that a worker ended, and which task was blamed."""
        name = None if blamed is None else self._plan.name(blamed)
        self.event(WorkflowWorkerDied(time.time(), lost.slot, lost.pid, lost.exit_code, name))

    def keep(self) -> None:
        """Write what is queued."""
        for tasks, reply in self._replies:
            self._write(tasks, reply)
        self._replies.clear()
        if self._effects:
            now = time.time()
            events = [event for effect in self._effects if (event := self._event(effect, now)) is not None]
            self._effects.clear()
            self._emit(events)

    def end(self, status: np.ndarray[tuple[int], np.dtype[np.int8]], attempts: dict[int, int]) -> None:
        """Write what is queued, and note the end of the run."""
        self.keep()
        self.ledger.attempts = attempts
        self.ledger.bytes_peak = self._arena.usage().peak
        self.ledger.wall_seconds = time.perf_counter() - self.ledger.began
        counts = np.bincount(status, minlength=len(Status)).tolist()
        n_completed, n_failed = counts[Status.COMPLETED], counts[Status.FAILED]
        is_good = n_completed + counts[Status.SKIPPED] == self._plan.n_tasks
        self._emit([WorkflowCompleted(time.time(), is_good, n_completed, n_failed)])

    def _write(self, tasks: Tasks, reply: Reply) -> None:
        ledger = self.ledger
        ledger.cpu_seconds += reply.cpu_seconds
        if reply.peak_rss > ledger.peak_rss:
            ledger.peak_rss = reply.peak_rss
        if len(tasks) == 1:
            start, end = _TWO_FLOATS.unpack(reply.marks)
            task = int(tasks[0])
            self._start_at[task], self._duration_at[task], self._worker_at[task] = start, end - start, reply.slot
        elif len(tasks):
            rows, times = as_index(tasks), np.frombuffer(reply.marks)
            ledger.worker[rows] = reply.slot
            ledger.start[rows] = times[:-1]
            ledger.duration[rows] = times[1:] - times[:-1]
        if tuple in set(map(type, reply.values)):
            for task, value in zip(tasks, reply.values, strict=True):
                if type(value) is tuple:
                    self._weigh_value(int(task), value)

    def _weigh_value(self, task: int, value: Wire) -> None:
        ledger, n_bytes = self.ledger, wire_bytes(value)
        ledger.bytes[task] = n_bytes
        if not is_segment(value):
            return
        names = names_of(value)
        if any(map(is_reused, names)):
            ledger.bytes_recycled += n_bytes
        if any(map(is_spilled, names)):
            if not ledger.bytes_spilled:
                place = self._arena.place
                self._emit([WorkflowValueSpilled(time.time(), self._plan.name(task), place.spill_folder, place.budget)])
            ledger.bytes_spilled += n_bytes

    def _event(self, effect: Effect, now: float) -> Event | None:
        match effect:
            case LayerStarted(layer, n_tasks):
                return WorkflowTaskParallelStarted(now, layer, n_tasks)
            case LayerCompleted(layer, n_tasks):
                return WorkflowTaskParallelCompleted(now, layer, n_tasks)
            case Retried(task, attempt):
                del self.ledger.errors[task]
                return WorkflowTaskRetried(now, self._plan.name(task), attempt)
            case FellBack(task, attempt, step):
                error = self.ledger.errors.pop(task)
                taken = str(self._plan.spec(task).options.fallback[step])
                self.ledger.fallbacks[task] = taken
                told = f"{type(error).__name__}: {error}"
                return WorkflowToolFallback(now, self._plan.name(task), attempt, told, taken)
            case TaskFailed(task, attempt):
                error = self.ledger.errors[task]
                return WorkflowTaskFailed(now, self._plan.name(task), attempt, f"{type(error).__name__}: {error}")
            case Skipped(tasks, cause):
                if self.ledger.skipped_for is None:
                    self.ledger.skipped_for = np.full(self._plan.n_tasks, -1, np.int32)
                self.ledger.skipped_for[tasks] = cause
        return None

    def _emit(self, events: Sequence[Event]) -> None:
        self.ledger.events += events
        for sink in self._sinks:
            sink.write(events)
