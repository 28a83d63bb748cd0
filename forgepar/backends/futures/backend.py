"""Any `concurrent.futures.Executor` as workers: threads, other pools, other interpreters, other machines.

    FuturesBackend ── slot 0 ── one batch at a time ──submit──> executor
          │    └───── slot 1 ── one batch at a time ──submit──> executor
          └ events <── future done, in any thread

A slot has a share of the executor, not a worker of its own: each batch may run on another worker. So every batch
travels with all that it needs, large values included. Workers on this machine share a board with this process, which
shows the task that each runs; of workers elsewhere only the start and the end of a whole batch are known.

The backend cannot end a worker of the executor. A task over its time or memory continues, and its slot gets no work
until it returns.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, CancelledError, Executor, Future
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any

from forgepar._validate import MOST_WORKERS, check_count, has, is_async, shown
from forgepar.backends.base import Joined, Lost, Notice, OutputNotice, Traits
from forgepar.backends.futures.message_arena import MessageArena
from forgepar.backends.futures.run_batch import BatchRequest, BatchResult, interpreter_id, run_batch, shifted
from forgepar.backends.hosted_worker import batch_segments
from forgepar.backends.messages import Batch, Reply
from forgepar.backends.worker_board import CALLED_OFF, LIMIT, POSITION, STARTED, Board, mark, unmark
from forgepar.errors import add_note
from forgepar.system.forking import fork_safe
from forgepar.values.arena import Arena
from forgepar.values.arena_folders import open_arena, remove_arena
from forgepar.version import public
from forgepar.workflow.binding import call_error

_Event = tuple[int, "Future[BatchResult]"]


@dataclass
class FuturesSlot:
    """A share of the executor that runs one batch at a time.

    Attributes:
        number: the slot's number.
        words: its row of the board, as integers.
        times: the same row, as floats.
        pid: process that ran its last batch.
        waiting: batches that are submitted once the current one is done.
        batch: the batch that is submitted.
        future: the executor's future for it.
        executor: where it was submitted.
        runs_since: when the future was first seen to run.
        is_lost: whether `FuturesBackend.wait` has still to report a loss.
        abandoned: futures of batches that were given up and still run.
    """

    number: int
    words: memoryview
    times: memoryview[float]
    pid: int
    waiting: deque[Batch] = field(default_factory=deque)
    batch: Batch | None = None
    future: Future[BatchResult] | None = None
    executor: Executor | None = None
    runs_since: float | None = None
    is_lost: bool = False
    abandoned: set[Future[BatchResult]] = field(default_factory=set)

    def clear(self) -> None:
        """Forget all batches."""
        self.waiting.clear()
        self.batch = self.future = self.executor = self.runs_since = None


@public
class FuturesBackend:
    """Runs workflows on the workers of a `concurrent.futures.Executor`.

    Args:
        executor: an executor, which stays open and is not shut down; or a function without arguments that makes one.
            An executor that the backend makes is shut down by `close`, and is replaced if it breaks.
        workers: how many batches run at once; None: the executor's number of workers, if it states one.

    Raises:
        ValueError: ``executor`` is neither, or does not state how many workers it has.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> power = wf.add(pow, 2, 5)
        >>> with ThreadPoolExecutor(2) as threads:
        ...     wf.run(backend=FuturesBackend(threads))[power]
        32
    """

    name = "futures"
    traits = Traits(remembers=False, ends_tasks=False, ends_workers=False, may_run_here=True, tells_at_end=True)

    arena: Arena

    def __init__(self, executor: Executor | Callable[[], Executor], workers: int | None = None) -> None:
        if workers is not None:
            check_count("workers", workers, 1, MOST_WORKERS)
        is_maker = isinstance(executor, type) or not has(executor, "submit")
        if is_maker and (not callable(executor) or is_async(executor)):
            raise ValueError(
                f"executor must have a submit() method, got {shown(executor)}. Pass a concurrent.futures.Executor, "
                "or a function that makes one."
            )
        self._make: Callable[[], Executor] | None = executor if is_maker else None  # type: ignore[assignment]
        self._executor: Executor | None = None if is_maker else executor  # type: ignore[assignment]
        if self._make is not None and (fault := call_error(self._make, 0, ())) is not None:
            raise ValueError(
                f"executor must be callable without arguments, got {shown(executor)}: {fault[0]}. Pass a "
                "concurrent.futures.Executor, or a function that makes one."
            )
        self.lock = fork_safe(threading.RLock())
        running = self._running()
        if not has(running, "submit"):
            raise ValueError(
                f"executor must make an object with a submit() method, got {shown(executor)}, which made "
                f"{shown(running)}. Pass a function that makes a concurrent.futures.Executor."
            )
        self.n_slots = workers or _n_workers(running)
        self._is_open = False
        self._slots: list[FuturesSlot] = []
        self._events: SimpleQueue[_Event | None] = SimpleQueue()

    # Opening and closing

    def open(self, n_wanted: int = 1) -> None:  # noqa: ARG002
        """Create the board and the arena; the executor starts its own workers."""
        if self._is_open:
            for slot in self._slots:
                slot.words[CALLED_OFF] = 0
            return
        self._files = open_arena(budget=0)
        self.arena = self._message_arena = MessageArena(int.from_bytes(os.urandom(6)), self._files.place.spill_folder)
        self._board_path = str(self._files.folder / "board")
        board = Board.create(self._board_path, self.n_slots)
        self._run = board.run
        self._series = os.urandom(8).hex()
        self._slots = [
            FuturesSlot(number, board.integers(number), board.floats(number), os.getpid())
            for number in range(self.n_slots)
        ]
        self._events = SimpleQueue()
        self._ready: list[Notice] = []
        self._worker_numbers: dict[Any, int] = {}  # by `BatchResult.ran_by`, least recently seen first
        self._sees_all = True
        self._is_open = True

    def close(self) -> None:
        """Cancel the batches that have not begun, and remove the board. Tasks that run end unobserved."""
        if not self._is_open:
            return
        self._is_open = False
        for slot in self._slots:
            slot.words[CALLED_OFF], slot.words[LIMIT] = 1, 0
            if slot.future is not None:
                slot.future.cancel()
            slot.clear()
        self._message_arena.empty()
        remove_arena(self._files)
        if self._make is not None and self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def joined(self) -> Sequence[Joined]:
        """Return the slots that can take a batch."""
        return [Joined(slot.number, slot.pid) for slot in self._slots if not slot.abandoned]

    # Batches

    def send(self, slot: int, batch: Batch) -> None:
        """Submit a batch, or queue it until the slot's current one is done."""
        entry = self._slots[slot]
        if batch.n_tasks and not entry.is_lost:
            entry.waiting.append(batch)
            self._submit_next(entry)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened; if nothing does within ``timeout`` seconds, an empty list."""
        notices, self._ready = self._ready, []
        with suppress(Empty):
            event = self._events.get(timeout=0.0 if notices else timeout)
            while True:
                if event is not None:
                    notices += self._settle(self._slots[event[0]], event[1])
                event = self._events.get_nowait()
        notices += self._ready
        self._ready = []
        for notice in notices:
            if type(notice) is Lost:
                self._slots[notice.slot].is_lost = False
        return notices

    def _running(self) -> Executor:
        if self._executor is None:
            assert self._make is not None
            try:
                self._executor = self._make()
            except Exception as error:
                add_note(error, "raised by the function that was passed as executor to FuturesBackend")
                raise
        return self._executor

    def _submit_next(self, slot: FuturesSlot) -> None:
        """Submit the next queued batch of an idle slot; answer for batches that must not begin."""
        while slot.future is None and slot.waiting:
            batch = slot.waiting.popleft()
            if mark(batch.id, 0) >= slot.words[LIMIT]:
                self._ready.append(_unbegun(slot.number, batch))
                continue
            slot.batch, slot.runs_since, slot.executor = batch, None, self._running()
            try:
                future = slot.executor.submit(run_batch, self._request(slot.number, batch))
            except (BrokenExecutor, RuntimeError) as error:  # RuntimeError: it was shut down
                self._ready += self._lose(slot, error, mark(batch.id, 0))
                return
            slot.future = future
            future.add_done_callback(partial(_put_done, self._events, slot.number))

    def _request(self, slot: int, batch: Batch) -> BatchRequest:
        return BatchRequest(
            interpreter_id(),
            self._series,
            self._board_path,
            self.n_slots,
            slot,
            tuple(batch),
            self._message_arena.pack({segment[0] for segment in batch_segments(batch)}),
            self._files.place.spill_folder,
            time.perf_counter(),
        )

    def _settle(self, slot: FuturesSlot, future: Future[BatchResult]) -> Iterator[Notice]:
        """Yield the outcome of a future that is done, and submit the slot's next batch."""
        if future is not slot.future:
            if future in slot.abandoned:
                slot.abandoned.remove(future)
                if not slot.abandoned:
                    yield Joined(slot.number, slot.pid)
            return
        batch = slot.batch
        assert batch is not None
        try:
            result = future.result()
        except CancelledError:
            slot.batch = slot.future = None
            self._submit_next(slot)
            yield _unbegun(slot.number, batch)
            return
        except BaseException as error:
            yield from self._lose(slot, error, self._last_seen(slot, batch))
            return
        yield from self._notices(slot, batch, result)
        slot.batch = slot.future = None
        self._submit_next(slot)

    def _notices(self, slot: FuturesSlot, batch: Batch, result: BatchResult) -> Iterator[Notice]:
        """Convert a result to notices, with times of this process's clock."""
        self._sees_all &= result.sees_board
        self._message_arena.take_in(result.parts)
        if result.ran_by[1] != slot.pid:
            slot.pid = result.ran_by[1]
            yield Joined(slot.number, slot.pid)
        if result.output:
            yield OutputNotice(slot.number, result.output, mark(batch.id, batch.n_tasks - 1))
        worker = self._worker_number(result.ran_by)
        offset = 0.0 if result.sees_board else time.perf_counter() - result.finished
        for fields in result.replies:
            reply = Reply._make(fields)._replace(worker=worker)
            yield reply._replace(marks=shifted(reply.marks, offset)) if offset else reply

    def _worker_number(self, ran_by: Any) -> int:
        """Return the number of the worker that ran a batch: always the same for one worker, and below ``n_slots``.

        If more workers appear than there are slots, a new one gets the number of the one that was seen least recently.
        """
        numbers = self._worker_numbers
        number = numbers.pop(ran_by, None)
        if number is None:
            if len(numbers) < self.n_slots:
                number = next(free for free in range(self.n_slots) if free not in numbers.values())
            else:
                number = numbers.pop(next(iter(numbers)))
        numbers[ran_by] = number
        return number

    # Loss

    def _last_seen(self, slot: FuturesSlot, batch: Batch) -> int:
        """Return the mark of the task that a lost batch was at; 0 if it had not begun."""
        position: int = slot.words[POSITION]
        if unmark(position)[0] == batch.id:
            return position
        return 0 if self._sees_all else mark(batch.id, 0)

    def _lose(self, slot: FuturesSlot, error: BaseException, position: int) -> list[Notice]:
        """Give up the batches of a slot.

        If the backend made the executor, and it is broken, the next batch makes another one.
        """
        now = time.perf_counter()
        started = min(slot.times[STARTED], now) if slot.words[POSITION] == position else now
        # Without a board the batch may have been at any task, up to the last.
        batch = slot.batch
        is_unseen = batch is not None and slot.future is not None and not self._sees_all
        also = (mark(batch.id, batch.n_tasks - 1),) if is_unseen and batch is not None else ()
        lost = Lost(slot.number, slot.pid, None, position, started, error, also=also)
        executor = slot.executor
        if self._make is not None and isinstance(error, BrokenExecutor) and executor is self._executor is not None:
            self._executor.shutdown(wait=False)
            self._executor = None
        slot.clear()
        slot.is_lost = True
        return [lost, Joined(slot.number, slot.pid)]

    def _leave(self, number: int) -> None:
        """Give up the batches of a slot, and use it again once the task that it runs has returned."""
        slot = self._slots[number]
        if slot.future is None or slot.batch is None:
            return
        future, position, started = slot.future, self._last_seen(slot, slot.batch), self.started(number)
        slot.clear()
        slot.is_lost = True
        self._ready.append(Lost(number, slot.pid, None, position, started, None))
        if future.cancel():
            self._ready.append(Joined(number, slot.pid))
            return
        slot.abandoned.add(future)
        warnings.warn(
            f"The task on worker {number} of {type(self._executor).__name__} cannot be ended from here. It continues, "
            "and its worker gets no batch until it returns. Use backend='process' to have tasks ended.",
            RuntimeWarning,
            stacklevel=2,
        )

    def terminate(self, slot: int) -> None:
        """Give up the batches of the slot, with a warning: the backend cannot end a worker of the executor."""
        self._leave(slot)

    def kill(self, slot: int) -> None:
        """Do the same as `terminate`."""
        self._leave(slot)

    # Progress, limits and positions

    def rest(self) -> Sequence[OutputNotice]:
        """Return nothing: output arrives in whole lines."""
        return ()

    def wake(self) -> None:
        """Make `wait` return soon."""
        self._events.put(None)

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Publish the progress of the run to tasks on this machine."""
        row = self._run
        row[0], row[1], row[2], row[3] = n_tasks, n_settled, n_out, -1 if layer is None else layer

    def call_off(self, *, is_off: bool = True) -> None:
        """Set the cancelled flag of tasks on this machine, and cancel batches that have not begun."""
        for slot in self._slots:
            slot.words[CALLED_OFF] = is_off
            if is_off and (future := slot.future) is not None:
                future.cancel()
        self.wake()

    def position(self, slot: int) -> int:
        """Return the mark of the task that the slot runs.

        A batch that was not seen to begin may run on another machine. Its last mark is returned, so that none of its
        tasks is reclaimed.
        """
        entry = self._slots[slot]
        position: int = entry.words[POSITION]
        if entry.batch is None or unmark(position)[0] == entry.batch.id:
            return position
        return mark(entry.batch.id, entry.batch.n_tasks - 1)

    def may_be_at(self, slot: int) -> int | None:
        """Return `position`: a worker sees a limit at once."""
        return self.position(slot)

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark, and all later ones."""
        self._slots[slot].words[LIMIT] = mark

    def withdraw(self, slot: int) -> None:
        """Cancel the slot's batch if the executor has not begun it; the slot then answers for it."""
        future = self._slots[slot].future
        if future is not None:
            future.cancel()

    def started(self, slot: int) -> float:
        """Return when the slot began the task that it runs.

        On another machine that is unknown. Then the batch may use the sum of the timeouts of its tasks.
        """
        entry, now = self._slots[slot], time.perf_counter()
        batch = entry.batch
        if batch is None or unmark(entry.words[POSITION])[0] == batch.id:
            return entry.times[STARTED]
        if self._sees_all or entry.future is None or not entry.future.running():
            return now
        if entry.runs_since is None:
            entry.runs_since = now
        return entry.runs_since + (batch.n_tasks - 1) * (batch.templates[0].timeout or 0.0)

    def where(self, slots: Sequence[int]) -> dict[int, str]:  # noqa: ARG002
        """Return nothing: workers of the executor report no stacks."""
        return {}

    def n_given(self, slot: int) -> int:  # noqa: ARG002
        """Return 0: workers of the executor are not recycled."""
        return 0

    def renew(self, slot: int) -> None:
        """Report the slot as joined, with the same worker."""
        self._ready.append(Joined(slot, self._slots[slot].pid))


def _put_done(events: SimpleQueue[_Event | None], slot: int, done: Future[BatchResult]) -> None:
    """Report that the future of a slot is done; called in any thread."""
    events.put((slot, done))


def _n_workers(executor: Executor) -> int:
    for name in ("num_workers", "_max_workers"):  # mpi4py; standard library and loky, which have no public name
        count = getattr(executor, name, None)
        if isinstance(count, int) and count > 0:
            return count
    raise ValueError(
        f"workers must be given, as {type(executor).__name__} does not state how many workers it has. Pass it, as in "
        "FuturesBackend(executor, workers=8)."
    )


def _unbegun(slot: int, batch: Batch) -> Reply:
    """Return the reply for a batch that has not begun."""
    return Reply(slot, batch.id, 0, [], array("d", [time.perf_counter()]).tobytes(), None, True, 0.0, 0)
