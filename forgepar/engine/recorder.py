"""The recorder of a run: writes the columns of its ledger, and its events.

While workers wait for batches, notes are only queued; they are written after the batches went out.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple, TypeAlias

import numpy as np

from forgepar.backends.base import Joined, Lost
from forgepar.backends.messages import Reply
from forgepar.errors import error_text
from forgepar.records.event_log import EventRecorder
from forgepar.records.events import (
    Event,
    Sink,
    WorkflowCompleted,
    WorkflowDeadlockCheck,
    WorkflowStarted,
    WorkflowTaskCompleted,
    WorkflowTaskFailed,
    WorkflowTaskParallelCompleted,
    WorkflowTaskParallelStarted,
    WorkflowTaskRetried,
    WorkflowTasksAdded,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
    WorkflowToolFallback,
    WorkflowValueSpilled,
    WorkflowWorkerDied,
    WorkflowWorkerJoined,
)
from forgepar.records.keeper import EARLIER_RUN, Keeper
from forgepar.records.ledger import Ledger
from forgepar.scheduling.effects import Effect, FellBack, LayerCompleted, LayerStarted, Retried, Skipped, TaskFailed
from forgepar.scheduling.run_state import Status
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment, wire_bytes
from forgepar.values.segments import is_reused, is_spilled, names_of
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_index

_UNREPORTED = "the worker ended before it reported this attempt"
_TWO_FLOATS = struct.Struct("dd")


class _NewEffect(NamedTuple):
    at: float
    effect: Effect


_Note: TypeAlias = tuple[Tasks, Reply] | _NewEffect | Event


class Recorder:
    """Writes the ledger and the events of a run.

    Args:
        plan: the workflow.
        run_id: the run's id.
        sinks: get the events; they raise nothing.
        n_slots: number of workers of the run.
        arena: where large values are.
        keeper: keeps the run.
    """

    def __init__(
        self,
        plan: Plan,
        run_id: str,
        sinks: Sequence[Sink],
        n_slots: int,
        arena: Arena,
        keeper: Keeper,
    ) -> None:
        self._arena = arena
        self._keeper = keeper
        self.ledger = Ledger(plan.n_tasks)
        self.ledger.n_slots = n_slots
        self.ledger.run_id = run_id
        self._plan = plan
        self._event_recorder = EventRecorder(plan, self.ledger, sinks, keeper)
        self.events = self._event_recorder.events
        self._notes: list[_Note] = []  # in the order in which the parent received them
        self._cancelled: set[int] = set()  # tasks that returned, but are not done
        self._begun: dict[int, int] = {}  # by slot, the task with a start event before any reply
        self._read()

    def _read(self) -> None:
        # Single rows are written through these: numpy would take five times as long.
        self._start_at, self._duration_at = self.ledger.start.data, self.ledger.duration.data
        self._worker_at = self.ledger.worker.data

    def grow(self, plan: Plan, task: int) -> IntArray:
        """Continue with a plan that has more tasks, as a task returned a workflow.

        Returns:
            Those of the new tasks that an earlier run did.
        """
        n_new = plan.n_tasks - self._plan.n_tasks
        self.keep()
        self._plan = plan
        self.ledger.grow(plan.n_tasks)
        self._read()
        self.events.grow(plan)
        self.event(WorkflowTasksAdded(self._now(), plan.name(task), n_new, plan.n_layers))
        return self._keeper.grow(plan)

    def start_clock(self) -> None:
        """Start the clock of the run."""
        self.ledger.began, self.ledger.began_at = time.perf_counter(), time.time()
        self._arena.reset_peak()

    def begin(self) -> None:
        """Record the start of the run, at the time from which the starts of tasks are counted."""
        plan = self._plan
        self._notes.append(WorkflowStarted(self.ledger.began_at, plan.workflow_name, plan.n_tasks, plan.n_layers))
        self.event(WorkflowDeadlockCheck(self._now(), plan.n_tasks, plan.n_layers))

    def restored(self, tasks: IntArray) -> None:
        """Record that an earlier run did these tasks."""
        if len(tasks):
            self.keep()
            self._event_recorder.not_run(self._now(), tasks, EARLIER_RUN)
            self._event_recorder.deliver()

    def reply(self, tasks: Tasks, reply: Reply) -> None:
        """Queue what a reply says about its tasks."""
        self._notes.append((tasks, reply))

    def effects(self, effects: Sequence[Effect]) -> None:
        """Queue the effects of outcomes."""
        if effects:
            now = self._now()
            self._notes += [_NewEffect(now, effect) for effect in effects]

    def failure(self, task: int, error: Exception, slot: int) -> None:
        """Record at once the error of an attempt."""
        self.ledger.errors[task] = error
        self.ledger.worker[task] = slot

    def begun(self, task: int, slot: int, started: float) -> None:
        """Record the start of a task that may never get a reply."""
        self._begun[slot] = task
        # While its function is being unpickled, its start is in the far future.
        self._notes.append(self._started(task, slot, min(started, time.perf_counter())))

    def cut_short(self, task: int, lost: Lost) -> None:
        """Record the time of an attempt during which its worker died."""
        ledger = self.ledger
        ledger.start[task] = lost.started
        ledger.duration[task] = time.perf_counter() - lost.started
        ledger.worker[task] = lost.slot
        if self._begun.pop(lost.slot, None) != task:
            self._notes.append(self._started(task, lost.slot, lost.started))

    def repeated(self, task: int, lost: Lost, attempt: int) -> None:
        """Record that a task runs again, as a lost worker may have run it without a reply.

        Args:
            task: the task.
            lost: the worker.
            attempt: the number of the next attempt.
        """
        self.ledger.worker[task] = lost.slot
        if self._begun.get(lost.slot) == task:
            del self._begun[lost.slot]
        else:
            self._notes.append(self._started(task, lost.slot, min(lost.started, time.perf_counter())))
        self.repeated_after_cut(task, attempt)

    def repeated_after_cut(self, task: int, attempt: int) -> None:
        """Record the same for a task after `cut_short`."""
        self.ledger.attempts[task] = attempt
        self._notes.append(WorkflowTaskRetried(self._now(), self._plan.name(task), attempt, _UNREPORTED))

    def cancelled(self, task: int) -> None:
        """Record that a task of the last reply is not completed, as it returned a workflow and the run was ended."""
        self._cancelled.add(task)

    def event(self, event: Event) -> None:
        """Record an event after what is queued, with the present time by the clock of the tasks."""
        self._notes.append(replace(event, at=self._now()))
        self.keep()

    def joined(self, joined: Joined) -> None:
        """Record where a worker is."""
        if joined.address:
            self.ledger.addresses[joined.slot] = joined.address
            self.event(WorkflowWorkerJoined(self._now(), joined.slot, joined.pid, joined.address))

    def death(self, lost: Lost, blamed: int | None) -> None:
        """Record that a worker ended, and which task was blamed."""
        name = None if blamed is None else self._plan.name(blamed)
        self.event(WorkflowWorkerDied(self._now(), lost.slot, lost.pid, lost.exit_code, name))

    def keep(self) -> None:
        """Write what is queued."""
        if not self._notes:
            return
        for note in self._notes:
            if isinstance(note, Event):
                self._event_recorder.tell(note)
            elif isinstance(note, _NewEffect):
                self._tell(note.effect, note.at)
            else:
                self._write(*note)
        self._notes.clear()
        self._event_recorder.deliver()

    def end(self, status: np.ndarray[tuple[int], np.dtype[np.int8]]) -> None:
        """Write what is queued, and record the end of the run."""
        self.keep()
        self.ledger.bytes_peak = self._arena.usage().peak
        self.ledger.wall_seconds = time.perf_counter() - self.ledger.began
        counts = np.bincount(status, minlength=len(Status)).tolist()
        n_completed, n_failed = counts[Status.COMPLETED], counts[Status.FAILED]
        is_good = n_completed + counts[Status.SKIPPED] + counts[Status.CACHED] == self._plan.n_tasks
        self.event(WorkflowCompleted(self._now(), is_good, n_completed, n_failed))

    def _now(self) -> float:
        """Return the UTC seconds by the clock of the tasks, which is never set during a run."""
        return self._utc(time.perf_counter())

    def _utc(self, seconds: float) -> float:
        return self.ledger.began_at + (seconds - self.ledger.began)

    def _started(self, task: int, slot: int, started: float) -> WorkflowTaskStarted:
        attempt = self.ledger.attempts.get(task, 1)
        return WorkflowTaskStarted(
            self._utc(started), self._plan.name(task), int(self._plan.layers[task]), attempt, slot
        )

    def _write(self, tasks: Tasks, reply: Reply) -> None:
        ledger = self.ledger
        ledger.cpu_seconds += reply.cpu_seconds
        if reply.peak_rss > ledger.peak_rss:
            ledger.peak_rss = reply.peak_rss
        if len(tasks) == 1:
            start, end = _TWO_FLOATS.unpack(reply.marks)
            task = int(tasks[0])
            self._start_at[task], self._duration_at[task], self._worker_at[task] = start, end - start, reply.ran_by
        elif len(tasks):
            rows, times = as_index(tasks), np.frombuffer(reply.marks)
            ledger.worker[rows] = reply.ran_by
            ledger.start[rows] = times[:-1]
            ledger.duration[rows] = times[1:] - times[:-1]
        if tuple in set(map(type, reply.values)):
            for task, value in zip(tasks, reply.values, strict=True):
                if type(value) is tuple:
                    self._weigh_value(int(task), value)
        self._tell_tasks(tasks, reply)

    def _tell_tasks(self, tasks: Tasks, reply: Reply) -> None:
        """Record that tasks began and completed, except one that failed."""
        n_good = len(tasks) - (reply.failure is not None)
        good, failing = tasks[:n_good], tasks[n_good:]
        # A task that returned a workflow can still fail, if that cannot join the run, and complete in another attempt.
        tell = (
            partial(self._event_recorder.returned, cancelled=self._cancelled)
            if reply.subflows
            else self._event_recorder.completed
        )
        if self._begun and self._begun.get(reply.slot) in tasks:
            # Its start was recorded at its timeout, and its reply was on the way by then.
            begun = self._begun.pop(reply.slot)
            place = [int(task) for task in tasks].index(begun)
            tell(good[:place])
            if place < n_good and begun not in self._cancelled:
                self._event_recorder.ended(begun)
            good, failing = good[place + 1 :], failing[: place != n_good]
        tell(good)
        for task in failing:
            self._event_recorder.tell(self._started(int(task), reply.ran_by, self._start_at[task]))

    def _fall_back(self, at: float, task: int, attempt: int, place: int) -> None:
        """Record that a task failed, which fallback follows, and its outcome where no worker is needed for that."""
        ledger, step, name = self.ledger, self._plan.spec(task).options.fallback[place], self._plan.name(task)
        error, taken = ledger.errors.pop(task), str(step)
        ledger.fallbacks[task] = taken
        self._event_recorder.tell(WorkflowToolFallback(at, name, attempt, error_text(error), taken, step.kind))
        if step.kind == "retry":
            ledger.attempts[task] = attempt + 1
        elif step.kind == "skip":
            self._event_recorder.tell(WorkflowTaskSkipped(at, name, None))
        elif step.kind != "call":
            worker = int(ledger.worker[task])
            self._event_recorder.tell(WorkflowTaskCompleted(at, name, attempt, worker, 0.0, int(ledger.bytes[task])))

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
                name = self._plan.name(task)
                self._event_recorder.tell(WorkflowValueSpilled(self._now(), name, place.spill_folder, place.budget))
            ledger.bytes_spilled += n_bytes

    def _tell(self, effect: Effect, at: float) -> None:
        ledger, tell = self.ledger, self._event_recorder.tell
        match effect:
            case LayerStarted(layer, n_tasks):
                tell(WorkflowTaskParallelStarted(at, layer, n_tasks))
            case LayerCompleted(layer, n_tasks):
                tell(WorkflowTaskParallelCompleted(at, layer, n_tasks))
            case Retried(task, attempt):
                ledger.attempts[task] = attempt
                tell(WorkflowTaskRetried(at, self._plan.name(task), attempt, error_text(ledger.errors.pop(task))))
            case FellBack(task, attempt, step):
                self._fall_back(at, task, attempt, step)
            case TaskFailed(task, attempt):
                tell(WorkflowTaskFailed(at, self._plan.name(task), attempt, error_text(ledger.errors[task])))
            case Skipped(tasks, cause):
                if ledger.skipped_for is None:
                    ledger.skipped_for = np.full(self._plan.n_tasks, -1, np.int32)
                ledger.skipped_for[tasks] = cause
                self._event_recorder.not_run(at, tasks, cause)
