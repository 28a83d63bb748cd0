"""The events of a run in memory: those of tasks are made when somebody looks, so that a task costs next to nothing.

    Books ──> Journal.completed, not_run, tell ──> EventLog ──> RunResult.events
                                                      ├───────> sinks, where there are any
                                                      └───────> the keeper, which gets entries instead

An entry is an event, or the tasks of one reply, whose times, worker and size are in the ledger's columns already: a
task completes once, so that what these say of it is final.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Container, Iterator, Sequence
from dataclasses import replace
from typing import Any, overload

from forgepar.events import (
    Event,
    Sink,
    WorkflowTaskCached,
    WorkflowTaskCompleted,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
)
from forgepar.keeping import EARLIER_RUN, Entry, Keeper, NotRun
from forgepar.plan import IntArray, Plan, Tasks, as_index
from forgepar.result import Ledger


class EventLog(Sequence[Event]):
    """What happened in a run, in order; each event is made when it is looked at.

    Args:
        plan: knows the tasks' names.
        ledger: knows when, where and for how long they ran.

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
        self._ends = array("q")  # the number behind the last event of each entry
        self._n_events = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plan": self._plan.outline}

    def grow(self, plan: Plan) -> None:
        """Know the names of more tasks; those there were keep theirs."""
        self._plan = plan

    def add(self, entry: Entry, n_events: int) -> None:
        """Note an entry that stands for so many events."""
        self._entries.append(entry)
        self._n_events += n_events
        self._ends.append(self._n_events)

    @property
    def n_entries(self) -> int:
        """How many entries there are."""
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
            begin, behind = self._ends[place - 1] if place else 0, min(self._ends[place], end)
            yield from self._made(self._entries[place], begin, first, behind)
            first, place = behind, place + 1

    def _made(self, entry: Entry, begin: int, first: int, end: int) -> Sequence[Event]:
        """Make the events of the numbers ``first`` to ``end`` of an entry whose own begin at ``begin``."""
        if isinstance(entry, Event):
            return (entry,)
        if isinstance(entry, NotRun):
            return self._of_not_run(entry._replace(tasks=entry.tasks[first - begin : end - begin]), first)
        place = (first - begin) // 2
        events = self.of_completed(entry[place : (end - begin + 1) // 2], begin + 2 * place)
        skipped = first - begin - 2 * place
        return events[skipped : skipped + end - first]

    def of_completed(self, tasks: Tasks, seq: int) -> list[Event]:
        """Make two events a task; numbers go up from ``seq``."""
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

    def _of_not_run(self, entry: NotRun, seq: int) -> list[Event]:
        name, run_id, at = self._plan.name, self._ledger.run_id, entry.at
        numbered = enumerate(entry.tasks.tolist(), seq)
        if entry.cause == EARLIER_RUN:
            return [WorkflowTaskCached(at, name(task), seq=number, run_id=run_id) for number, task in numbered]
        waited_for = name(entry.cause)
        return [WorkflowTaskSkipped(at, name(task), waited_for, seq=number, run_id=run_id) for number, task in numbered]


class Journal:
    """Notes the events of a run, and tells the sinks.

    Args:
        plan: the workflow.
        ledger: the run's columns, to be filled before `completed` is called.
        sinks: who listens; they raise nothing.
        keeper: who keeps the run, if anybody does.

    Attributes:
        events: what was noted.
    """

    def __init__(self, plan: Plan, ledger: Ledger, sinks: Sequence[Sink], keeper: Keeper | None = None) -> None:
        self.events = EventLog(plan, ledger)
        self._sinks = sinks
        self._keeper = keeper
        self._run_id = ledger.run_id
        self._n_delivered = self._n_kept = 0

    def tell(self, event: Event) -> None:
        """Note an event, which gets its number and the run's id."""
        self.events.add(replace(event, seq=len(self.events), run_id=self._run_id), 1)

    def completed(self, tasks: Tasks) -> None:
        """Note that tasks began and completed, one after the other; what the ledger says of them is never changed."""
        if len(tasks):
            self.events.add(tasks, 2 * len(tasks))

    def returned(self, tasks: Tasks, cancelled: Container[int]) -> None:
        """Note the same of tasks of which the ledger may yet say otherwise, and of some only that they began."""
        for place, task in enumerate(map(int, tasks)):
            began, ended = self.events.of_completed(tasks[place : place + 1], 0)
            self.tell(began)
            if task not in cancelled:
                self.tell(ended)

    def ended(self, task: int) -> None:
        """Note that a task completed which was told to have begun."""
        self.tell(self.events.of_completed(range(task, task + 1), 0)[1])

    def not_run(self, at: float, tasks: IntArray, cause: int) -> None:
        """Note that tasks will not run, for the sake of another one or because an earlier run did them."""
        self.events.add(NotRun(at, tasks, cause), len(tasks))

    def deliver(self) -> None:
        """Give the sinks what was noted since the last time; where there are none, nothing is made for them."""
        if self._keeper is not None and self._n_kept < self.events.n_entries:
            self._keeper.take(self.events.entries(self._n_kept))
            self._n_kept = self.events.n_entries
        if self._sinks and self._n_delivered < len(self.events):
            events = self.events[self._n_delivered :]
            self._n_delivered = len(self.events)
            for sink in self._sinks:
                sink.write(events)
