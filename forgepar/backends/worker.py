"""What runs batches: in worker processes, and for the inline backend in the caller's process.

    Batch ──> Worker.run ──> Reply, Reply, ...

A `Worker` has no connection; `worker_process` does. A child that a task forks has no connection either, and ends when
it returns from the task's function.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, NoReturn

from forgepar.backends import run_cache
from forgepar.backends.messages import Batch, Failure, Reply
from forgepar.backends.output_capture import PROGRESS, UNKNOWN_TASK, Capture, FrameWriter
from forgepar.backends.run_cache import RunCache
from forgepar.backends.task_failure import failure_of, traceback_of
from forgepar.backends.worker_board import CALLED_OFF, LIMIT, POSITION, STARTED, Board, mark, unmark
from forgepar.errors import UnpicklableResult, add_note, is_system_error, text_of
from forgepar.system.forking import in_child
from forgepar.values.arena import Arena
from forgepar.values.codec import FIXED, Wire, encode
from forgepar.values.in_place import use
from forgepar.workflow.context import RunProgress, TaskContext
from forgepar.workflow.fresh_values import renewing

REPLY_SECONDS = 0.010  # of work between replies: after a death, tasks that ended since the last reply run again
PREPARE_SECONDS = 60.0  # beyond the timeout, for what unpickling a task's function imports
OWN_FILES = (__file__, run_cache.__file__, renewing.__code__.co_filename)  # with the frames that call a task's function
_SAMPLE_SECONDS = 0.001  # between two samples of this process's usage: each takes 1 us
_inside = False


def inside_worker() -> bool:
    """Return whether this process is a worker: a run in it must not start workers of its own."""
    return _inside


def be_inside(*, is_inside: bool = True) -> None:
    """Set whether this process is a worker; a process that belongs to others is one only while it runs batches."""
    global _inside
    _inside = is_inside


class Worker:
    """Runs batches, and keeps callables, templates and small values for later ones.

    Args:
        slot: the slot's number, which each reply contains.
        arena: the arena with the large values.
        board: the board on which to write which task runs.
        interruptible: whether to let `KeyboardInterrupt` out instead of reporting it as the task's failure.
        reply_seconds: seconds of work between replies; None: `REPLY_SECONDS`.

    Attributes:
        slot: the slot's number; it changes between batches if several slots share a worker.
        output: sends output and progress of tasks to the parent; None: nothing is sent.
        capture: redirects the process's output to ``output``.
    """

    output: FrameWriter | None = None
    capture: Capture | None = None
    is_forked = False  # whether this is a copy in a child that a task has forked

    def __init__(
        self,
        slot: int,
        arena: Arena,
        board: Board,
        *,
        interruptible: bool = False,
        reply_seconds: float | None = None,
    ) -> None:
        self._reply_seconds = reply_seconds
        self._arena = arena
        self.set_slot(slot, board)
        self._interruptible = interruptible
        self._cpu, _ = _usage()
        self._sampled_at = time.perf_counter()
        self._run = -1
        self._batch: Batch | None = None
        self._subflows: list[tuple[int, Wire]] = []
        self._cache = RunCache(arena)
        self._context: TaskContext | None = None
        self._context_at = 0
        _workers.add(self)

    def set_slot(self, slot: int, board: Board) -> None:
        """Set the slot and the board for the next batches."""
        self.slot = slot
        self._integers = board.integers(slot)
        self._times = board.floats(slot)
        self._run_integers = board.run

    def context(self) -> TaskContext | None:
        """Return the context of the task that runs; it is created on the first call."""
        at = self._integers[POSITION]
        if self._context is None or self._context_at != at:
            self._end_context()
            if self._batch is not None:
                self._context, self._context_at = self._make_context(self._batch, unmark(at)[1]), at
        return self._context

    def task_number(self) -> int:
        """Return the number of the task that runs or ran last."""
        if self._batch is None or not self._batch.n_tasks:
            return UNKNOWN_TASK
        return _task_number(self._batch, unmark(self._integers[POSITION])[1])

    def without_known(self, batch: Batch) -> Batch:
        """Return a self-contained batch without the callables and templates that this worker already has."""
        self._begin_run(batch.run)
        cache = self._cache
        cache.values.clear()
        return batch._replace(
            callables=[pair for pair in batch.callables if pair[0] not in cache.callables],
            templates=[template for template in batch.templates if template.number not in cache.calls],
        )

    def run(self, batch: Batch) -> Iterator[Reply]:
        """Run a batch and yield its replies as they fall due.

        The batch ends early at a failure and at the board's limit; the last reply then has fewer outcomes than the
        batch has tasks. This is one long function because a call per batch or per task would be measurable.
        """
        cache = self._cache
        if not batch.n_tasks:
            cache.drop(batch.drop)
            self._begin_run(batch.run)
            return
        self._batch = batch
        clock = time.perf_counter
        integers, times = self._integers, self._times
        here = mark(batch.id, 0)
        times[STARTED] = clock() + PREPARE_SECONDS
        integers[POSITION] = here  # before anything is unpickled: if that ends the process, the first task is to blame
        try:
            self._begin_run(batch.run)
            call, rows = cache.prepare(batch, self.capture)
        except BaseException as error:
            if self.is_forked:
                _end_forked(error)
            at_once = self._failure(0, error)
            self._end_batch()
            yield self._reply(batch, 0, [None], array("d", [clock()] * 2), at_once, ended=True)
            return
        if self.is_forked:
            _end_forked(None)
        now = clock()  # imports do not count as time of the tasks
        marks, values, first = array("d", (now,)), list[Wire](), 0
        step = REPLY_SECONDS if self._reply_seconds is None else self._reply_seconds
        if cache.calls[batch.template].has_effects and self._reply_seconds is None:
            step = 0.0  # one reply per task: a task that ended must never run again
        due, last = now + step, here + batch.n_tasks - 1
        failure: Failure | None = None
        for here, row in enumerate(rows, here):  # noqa: B020  (it continues to count)
            times[STARTED] = now  # before the position: a reader of both may see the task too young, never too old
            integers[POSITION] = here
            if here >= integers[LIMIT]:
                break
            try:
                value = call(*row)
                if self.is_forked:
                    _end_forked(None)
                if type(value) not in FIXED:
                    value = self._result(value, batch, first + len(values))
                    if self.is_forked:
                        _end_forked(None)
            except BaseException as error:
                if self.is_forked:
                    _end_forked(error)
                failure, value = self._failure(first + len(values), error), None
            values.append(value)
            now = clock()
            marks.append(now)
            if failure is not None:
                break
            if now >= due and here < last:
                yield self._reply(batch, first, values, marks, None, ended=False)
                first += len(values)
                now = clock()  # the time of the reply does not count as time of a task
                marks, values, due = array("d", (now,)), [], now + step
        times[STARTED] = clock() + PREPARE_SECONDS  # sending the reply may take longer than a timeout
        self._arena.take_back()
        self._end_batch()
        yield self._reply(batch, first, values, marks, failure, ended=True)

    def _begin_run(self, run: int) -> None:
        """Forget the last run if this is another one."""
        if run != self._run:
            self._cache.clear()
            self._run, self._sampled_at = run, 0.0

    def _end_batch(self) -> None:
        """Send what tasks printed, before the reply: a parent that has the reply has all output."""
        if self.capture is not None:
            self.capture.flush()
        if self._context is not None:
            self._end_context()

    def _end_context(self) -> None:
        if self._context is not None:
            self._context.close()
            self._context = None

    def _make_context(self, batch: Batch, position: int) -> TaskContext:
        call, integers = self._cache.calls.get(batch.template), self._integers
        base, timeout = (call.base, call.timeout) if call is not None else ("", None)
        ordinal = _nth(batch.ordinals, position)
        if isinstance(batch.ordinals, int):
            ordinal += position
        return TaskContext(
            self._cache.context,
            base if ordinal < 0 else f"{base}-{ordinal}",
            _nth(batch.layers, position),
            dict(batch.attempts).get(position, 1),
            self.slot,
            ends_at=self._times[STARTED] + timeout if timeout is not None else float("inf"),
            is_cancelled=lambda: bool(integers[CALLED_OFF]),
            say=self._send_progress,
            look=lambda: RunProgress(*self._run_integers[:4]),
            folder=self._arena.place.spill_folder,
        )

    def _send_progress(self, fraction: float, text: str) -> None:
        if self.output is not None:
            self.output.write(PROGRESS, pickle.dumps((fraction, text)))

    def _result(self, value: Any, batch: Batch, position: int) -> Wire:
        kind = type(value)
        if kind.__name__ == "Subflow" and kind.__module__ == "forgepar":
            self._subflows.append((position, self._encoded(value.workflow)))
            return None
        wire = self._encoded(value)
        if type(wire) is tuple and type(wire[0]) is bytes:
            self._cache.values[_task_number(batch, position)] = wire
        return wire

    def _encoded(self, value: Any) -> Wire:
        try:
            return encode(value, self._arena)
        except Exception as error:
            kind = f"{type(value).__module__}.{type(value).__qualname__}"
            if is_system_error(error):
                add_note(error, f"raised while the task's result, a {kind}, was being sent back")
                raise
            message = (
                f"the task returned a {kind} that cannot be pickled ({type(error).__name__}: {text_of(error)}). "
                "Return plain data, and open files, connections and locks inside the task that uses them."
            )
            raise UnpicklableResult(message) from error

    def _failure(self, position: int, error: BaseException) -> Failure:
        is_unread, self._cache.unreadable = error is self._cache.unreadable, None
        if isinstance(error, KeyboardInterrupt) and self._interruptible:
            raise error
        return failure_of(error, position, OWN_FILES, is_unread=is_unread)

    def _reply(
        self,
        batch: Batch,
        first: int,
        values: list[Wire],
        marks: array[float],
        failure: Failure | None,
        *,
        ended: bool,
    ) -> Reply:
        spent, rss = 0.0, 0
        if marks[-1] - self._sampled_at >= _SAMPLE_SECONDS:
            self._sampled_at = marks[-1]
            cpu, rss = _usage()
            spent, self._cpu = cpu - self._cpu, cpu
        subflows: Sequence[tuple[int, Wire]] = ()
        if self._subflows:
            subflows = [(position - first, wire) for position, wire in self._subflows]
            self._subflows = []
        return Reply(self.slot, batch.id, first, values, marks.tobytes(), failure, ended, spent, rss, subflows)


def _task_number(batch: Batch, position: int) -> int:
    return batch.tasks + position if isinstance(batch.tasks, int) else array("i", batch.tasks)[position]


def _nth(numbers: int | bytes, position: int) -> int:
    """Return one of a batch's numbers: all tasks share one, or each has its own as int32."""
    return numbers if isinstance(numbers, int) else array("i", numbers)[position]


def _end_forked(error: BaseException | None) -> NoReturn:
    """End a child that a task forked, when it returns from the task's function.

    Args:
        error: the exception that the function raised; None: it returned.
    """
    code = 0
    with suppress(BaseException):
        if isinstance(error, SystemExit) and (error.code is None or isinstance(error.code, int)):
            code = (error.code or 0) & 0xFF
        elif error is not None:
            code = 1
            sys.stderr.write(f"{error.code}\n" if isinstance(error, SystemExit) else traceback_of(error))
    for stream in (sys.stdout, sys.stderr):
        with suppress(BaseException):
            stream.flush()
    os._exit(code)


def _mark_forked() -> None:
    """In a forked child, have workers end the process instead of replying, and stop using the parent's arena."""
    for worker in list(_workers):
        worker.is_forked = True
    use(None)


_workers: weakref.WeakSet[Worker] = weakref.WeakSet()
in_child(_mark_forked)


def _usage() -> tuple[float, int]:
    """Return this process's CPU seconds and largest resident memory so far, bytes (0 if unknown)."""
    return time.process_time(), 0


try:
    import resource
except ImportError:
    pass
else:
    _RSS_UNIT = 1 if sys.platform == "darwin" else 1024

    def _usage() -> tuple[float, int]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime, used.ru_maxrss * _RSS_UNIT
