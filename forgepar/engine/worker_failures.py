"""What happens when a worker dies: which of its tasks fail, which run again, and with which error.

Also `raised`, which makes the error of a task that failed by itself.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from typing import Any

from forgepar.backends.base import UNKNOWN_POSITION, Lost
from forgepar.backends.messages import Failure
from forgepar.backends.worker_board import mark, unmark
from forgepar.engine.deadlines import PendingKill
from forgepar.engine.in_flight import Flight
from forgepar.engine.work_source import Work, WorkSource
from forgepar.errors import RemoteError, WorkerDied, text_of
from forgepar.machine import as_text, how_it_ended

_MOST_LOSSES = 3  # of its worker under a task, where nothing shows which task it ran; after the first it runs alone


def raised(failure: Failure) -> Exception:
    """Return what a task raised, or a `RemoteError` in its place if it could not be sent."""
    error = pickle.loads(failure.pickled) if failure.pickled is not None else None
    if isinstance(error, Exception):
        return error
    message = f"{failure.type_name}: {failure.text} (the exception itself cannot be sent)"
    return RemoteError(message, type_name=failure.type_name, text=failure.text)


def worker_died(lost: Lost, task: str, peak_rss: int, address: str = "", last_errors: str = "") -> WorkerDied:
    """Return the error of a task when its worker died.

    Args:
        lost: how the worker ended.
        task: the task's name.
        peak_rss: most memory that the worker reported, bytes; 0 if it reported none.
        address: the worker's address; empty on this machine.
        last_errors: the last lines that the task wrote to stderr.
    """
    place = f"{address}, " if address else ""
    error = WorkerDied(
        f"worker {lost.slot} ({place}pid {lost.pid}) {_how_it_ended(lost)} while it ran task {task!r}. "
        "Look for os._exit, a crash in C code or a lack of memory there; retries= runs it again.",
        exit_code=lost.exit_code,
        pid=lost.pid,
        peak_rss=peak_rss,
    )
    error.__cause__ = lost.fault
    if peak_rss:
        error.add_note(f"the worker's memory before: {as_text(peak_rss)} at most")
    if lost.dump:
        error.add_note("what it was at, as it told when it crashed:\n" + lost.dump.rstrip())
    if last_errors:
        error.add_note("the last that it wrote to stderr:\n" + last_errors)
    return error


def _how_it_ended(lost: Lost) -> str:
    exit_code = lost.exit_code
    if lost.fault is not None:
        return f"gave up ({type(lost.fault).__name__}: {text_of(lost.fault)})"
    if exit_code is None:
        return "ended"
    return how_it_ended(exit_code) + (", by the kernel for lack of memory," if lost.is_out_of_memory else "")


class Suspects:
    """Tasks under which a worker was lost, where nothing shows which task it ran."""

    def __init__(self) -> None:
        self.losses: dict[int, int] = {}  # by task, how often its worker was lost; read without a call in the loop

    def clear(self, tasks: Work) -> None:
        """Note that tasks have an outcome."""
        for task in self.losses.keys() & set(map(int, tasks)):
            del self.losses[task]

    def add(self, flight: Flight) -> int:
        """Note that a worker was lost amid a batch; return the mark of the task to blame, 0 if that is not certain."""
        for task in map(int, flight.tasks[flight.n_done : flight.n_own]):
            self.losses[task] = self.losses.get(task, 0) + 1
        first = int(flight.tasks[flight.n_done])
        if flight.n_own - flight.n_done != 1 or self.losses[first] < _MOST_LOSSES:  # 0: all of it was reclaimed
            return 0
        del self.losses[first]
        return mark(flight.id, flight.n_done)

    def n_apart(self, tasks: Work) -> int:
        """Return how many of some tasks may share a batch: a suspect runs alone, so that its next loss is certain."""
        before = next((place for place, task in enumerate(tasks) if int(task) in self.losses), len(tasks))
        return max(1, before)


class WorkerLoss:
    """A dead worker: what becomes of the tasks that it had.

    Args:
        lost: how the worker ended, and what it was at.
        source: where its tasks came from.
        pending: the kill of the worker, if it was killed.
        ends_tasks: whether the end of a worker ends its task.
    """

    def __init__(self, lost: Lost, source: WorkSource, pending: PendingKill | None, *, ends_tasks: bool) -> None:
        self._lost = lost
        self._source = source
        self._pending = pending
        self._ends_tasks = ends_tasks

    def settle(self, flights: Sequence[Flight], suspects: Suspects) -> Iterator[tuple[Flight, Any]]:
        """Hand out again what the worker had, except the task that it ran.

        Args:
            flights: the batches of the worker.
            suspects: tasks under which workers were lost before.

        Yields:
            Batch and task where the task fails as its worker died by itself.
        """
        source, lost = self._source, self._lost
        blamed: list[tuple[Flight, int]] = []
        for flight, place, n_begun in self._begun(flights, suspects):
            first = flight.n_done
            if place is not None:
                first = self._repeat(flight, first, min(place, flight.n_own))
                if place == first < flight.n_own:
                    blamed.append((flight, place))
                    first += 1
            if first < n_begun and source.has_effects(flight):
                # They may have ended, so only their retries may run them again.
                blamed += [(flight, place) for place in range(first, n_begun)]
                first = n_begun
            first = self._repeat(flight, first, n_begun)
            self._put_back(flight, first, flight.n_own)
        at = blamed[0][0].tasks[blamed[0][1]] if blamed else None
        source.died(lost, at, was_killed=self._pending is not None)
        for flight, place in blamed:
            if self._is_at_fault(flight, place):
                yield flight, flight.tasks[place]

    def _begun(self, flights: Sequence[Flight], suspects: Suspects) -> list[tuple[Flight, int | None, int]]:
        """Return for each batch the place of the task that the worker ran, and how many tasks it may have begun."""
        lost = self._lost
        is_unknown = lost.position == UNKNOWN_POSITION
        position = lost.position
        if is_unknown:
            may_repeat = bool(flights) and not self._source.has_effects(flights[0])
            position = suspects.add(flights[0]) if may_repeat else 0
        at_batch, at = unmark(position)
        also = dict(map(unmark, lost.also))
        found: list[tuple[Flight, int | None, int]] = []
        for flight in flights:
            end = flight.n_own
            n_begun = end if is_unknown or flight.id < at_batch else min(also.get(flight.id, -1) + 1, end)
            found.append((flight, at if flight.id == at_batch else None, n_begun))
        return found

    def _repeat(self, flight: Flight, first: int, end: int) -> int:
        """Hand out again what the worker may have run without a reply; return the place after it."""
        if first >= end:
            return first
        for task in flight.tasks[first:end]:
            self._source.repeated(task, self._lost, was_at=False)
        self._put_back(flight, first, end)
        return end

    def _put_back(self, flight: Flight, first: int, end: int) -> None:
        if first < end:
            self._source.put_back(flight.template, flight.tasks[first:end])

    def _is_at_fault(self, flight: Flight, place: int) -> bool:
        """Settle the task that the worker ran if the run was ended or the worker was killed; else return True."""
        source, pending, task = self._source, self._pending, flight.tasks[place]
        source.interrupted(task, self._lost)
        if pending is not None and pending.task == int(task):
            source.failed(self._lost.slot, flight.template, task, pending.error)
            return False
        # It began just after the one meant had ended. If it has effects and continues, it must not run twice at once.
        is_harmless = self._ends_tasks or not source.has_effects(flight)
        if (pending is not None and is_harmless) or source.is_over:
            source.repeated(task, self._lost, was_at=True)
            self._put_back(flight, place, place + 1)
            return False
        return True
