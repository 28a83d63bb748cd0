"""The events of a run in memory. Events of tasks are made on access, so that recording a task costs next to nothing.

    Recorder ──> EventRecorder.completed, not_run, tell ──> EventLog ──> RunResult.events
                                                               ├───────> sinks, if there are any
                                                               └───────> the keeper, which gets entries instead

An entry is an event, or the tasks of one reply. Their times, worker and sizes are in the columns of the ledger already,
and do not change: a task completes once.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

from forgepar.records.events import (
    Event,
    Sink,
    WorkflowTaskCached,
    WorkflowTaskCompleted,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
)
from forgepar.records.keeper import EARLIER_RUN, Entry, Keeper, NullKeeper, TasksNotRun
from forgepar.records.ledger import Ledger
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_index


class EventLog(Sequence[Event]):
    """The events of a run, in order; each is made on access.

    Args:
        plan: has the names of the tasks.
        ledger: has the time, the worker and the duration of each task.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> _ = wf.map(abs, range(3))
        >>> events = wf.run(backend="inline").events
        >>> len(events), events[4].task, type(events[-1]).__name__
        (11, 'abs-0', 'WorkflowCompleted')
    """

    def __init__(self, plan: Plan, ledger: Ledger) -> None:
        self._plan = plan
        self._ledger = ledger
        self._entries: list[Entry] = []
        self._ends = array("q")  # for each entry, one more than the number of its last event
        self._n_events = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": self._plan.outline}

    def grow(self, plan: Plan) -> None:
        """Take the names of tasks from a larger plan, in which earlier tasks keep their numbers."""
        self._plan = plan

    def add(self, entry: Entry, n_events: int) -> None:
        """Append an entry that stands for ``n_events`` events."""
        self._entries.append(entry)
        self._n_events += n_events
        self._ends.append(self._n_events)

    @property
    def n_entries(self) -> int:
        """The number of entries."""
        return len(self._entries)

    def entries(self, first: int) -> list[tuple[int, Entry]]:
        """Return the entries from one on, each with the number of its first event."""
        begins = [self._ends[first - 1] if first else 0, *self._ends[first:]]
        return list(zip(begins, self._entries[first:], strict=False))

    def __len__(self) -> int:
        return self._n_events

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> list[Event]: ...
    def __getitem__(self, index: int | slice) -> Event | list[Event]:
        wanted = range(self._n_events)[index]
        if isinstance(wanted, int):
            return next(self._between(wanted, wanted + 1))
        if wanted.step == 1:
            return list(self._between(wanted.start, wanted.stop))
        return [self[place] for place in wanted]

    def __iter__(self) -> Iterator[Event]:
        return self._between(0, self._n_events)

    def __repr__(self) -> str:
        return f"<EventLog of {self._n_events} events>"

    def _between(self, first: int, end: int) -> Iterator[Event]:
        place = bisect_right(self._ends, first)
        while first < end:
            begin, stop = self._ends[place - 1] if place else 0, min(self._ends[place], end)
            yield from self._made(self._entries[place], begin, first, stop)
            first, place = stop, place + 1

    def _made(self, entry: Entry, begin: int, first: int, end: int) -> Sequence[Event]:
        """Make the events numbered ``first`` to ``end - 1`` of an entry that begins at number ``begin``."""
        if isinstance(entry, Event):
            return (entry,)
        if isinstance(entry, TasksNotRun):
            return self._of_not_run(entry._replace(tasks=entry.tasks[first - begin : end - begin]), first)
        place = (first - begin) // 2
        events = self.of_completed(entry[place : (end - begin + 1) // 2], begin + 2 * place)
        skipped = first - begin - 2 * place
        return events[skipped : skipped + end - first]

    def of_completed(self, tasks: Tasks, seq: int) -> list[Event]:
        """Make two events per task, numbered from ``seq``."""
        plan, ledger, rows = self._plan, self._ledger, as_index(tasks)
        run_id, attempts, began_at = ledger.run_id, ledger.attempts, ledger.began_at
        columns = (ledger.duration, ledger.worker, ledger.bytes, plan.layers)
        starts = ledger.start[rows] - ledger.began
        events: list[Event] = []
        for task, start, seconds, worker, n_bytes, layer in zip(
            tasks if isinstance(tasks, range) else tasks.tolist(),
            starts.tolist(),
            *(column[rows].tolist() for column in columns),
            strict=True,
        ):
            name, attempt, at = plan.name(task), attempts.get(task, 1), began_at + start
            events += (
                WorkflowTaskStarted(at, name, layer, attempt, worker, seq=seq, run_id=run_id),
                WorkflowTaskCompleted(
                    at + seconds, name, attempt, worker, seconds, n_bytes, seq=seq + 1, run_id=run_id
                ),
            )
            seq += 2
        return events

    def _of_not_run(self, entry: TasksNotRun, seq: int) -> list[Event]:
        name, run_id, at = self._plan.name, self._ledger.run_id, entry.at
        numbered = enumerate(entry.tasks.tolist(), seq)
        if entry.cause == EARLIER_RUN:
            return [WorkflowTaskCached(at, name(task), seq=number, run_id=run_id) for number, task in numbered]
        waited_for = name(entry.cause)
        return [WorkflowTaskSkipped(at, name(task), waited_for, seq=number, run_id=run_id) for number, task in numbered]


class EventRecorder:
    """Records the events of a run, and sends them to the sinks and the keeper.

    Args:
        plan: the workflow.
        ledger: the columns of the run, to be filled before `completed` is called.
        sinks: receivers of events; they must not raise.
        keeper: what stores the run.

    Attributes:
        events: the events so far.
    """

    def __init__(self, plan: Plan, ledger: Ledger, sinks: Sequence[Sink], keeper: Keeper) -> None:
        self.events = EventLog(plan, ledger)
        self._sinks = sinks
        self._keeper = keeper
        self._is_kept = not isinstance(keeper, NullKeeper)  # entries are not made for that
        self._run_id = ledger.run_id
        self._n_delivered = self._n_kept = 0

    def tell(self, event: Event) -> None:
        """Record an event, with its number and the id of the run."""
        self.events.add(replace(event, seq=len(self.events), run_id=self._run_id), 1)

    def completed(self, tasks: Tasks) -> None:
        """Record that tasks began and completed, one after the other; their rows in the ledger are final."""
        if len(tasks):
            self.events.add(tasks, 2 * len(tasks))

    def returned(self, tasks: Tasks, cancelled: Container[int]) -> None:
        """Record the same of tasks that may run again; of those in ``cancelled``, only that they began.

        Their events are made now, as a further attempt changes their rows in the ledger.
        """
        for place, task in enumerate(map(int, tasks)):
            began, ended = self.events.of_completed(tasks[place : place + 1], 0)
            self.tell(began)
            if task not in cancelled:
                self.tell(ended)

    def ended(self, task: int) -> None:
        """Record that a task completed, after the event of its start."""
        self.tell(self.events.of_completed(range(task, task + 1), 0)[1])

    def not_run(self, at: float, tasks: IntArray, cause: int) -> None:
        """Record that tasks will not run because of the task ``cause``, or because an earlier run completed them."""
        self.events.add(TasksNotRun(at, tasks, cause), len(tasks))

    def deliver(self) -> None:
        """Send the sinks the events since the last call; without sinks, no events are made."""
        if self._is_kept and self._n_kept < self.events.n_entries:
            self._keeper.take(self.events.entries(self._n_kept))
            self._n_kept = self.events.n_entries
        if self._sinks and self._n_delivered < len(self.events):
            events = self.events[self._n_delivered :]
            self._n_delivered = len(self.events)
            for sink in self._sinks:
                sink.write(events)
