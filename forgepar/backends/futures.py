"""Any `concurrent.futures.Executor` as workers: threads, other pools, other interpreters, other machines.

    FuturesBackend ── slot 0 ── one batch at a time ──submit──> executor
          │    └───── slot 1 ── one batch at a time ──submit──> executor
          └ events <── future done, in whatever thread

A slot is a claim to one of the executor's workers, whichever that is each time: so every batch travels with all that
it takes, large values included, and comes back whole. Where the executor's workers are on this machine, they share a
board with this process, which tells what each is at; elsewhere only a whole batch is known to run, or to be done.

What others own is not ended: a task over its time or memory goes on, and its worker is not used until it returns.
"""

from __future__ import annotations

import os
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

from forgepar.backends.base import Joined, Lost, Notice, Told, Traits
from forgepar.backends.board import CALLED_OFF, LIMIT, POSITION, STARTED, Board, mark, unmark
from forgepar.backends.parcel import Answer, Parcel, here, on_clock, run_parcel
from forgepar.backends.wire import Batch, Reply, Template
from forgepar.validation import MOST_WORKERS, check_count
from forgepar.values.arena import Arena
from forgepar.values.baggage import Baggage
from forgepar.values.codec import Wire, is_segment
from forgepar.values.folders import open_arena, remove_arena

_Event = tuple[int, "Future[Answer]"]


class _Luggage:
    """What a slot's batches have brought so far, so that each can be sent with all that it takes."""

    def __init__(self) -> None:
        self._run = -1
        self._forget()

    def _forget(self) -> None:
        self._callables: dict[int, bytes] = {}
        self._templates: dict[int, Template] = {}
        self._kept: dict[int | str, Wire] = {}
        self._facts: Any = None

    def complete(self, batch: Batch) -> Batch:
        """Return a batch with what earlier ones of its slot brought."""
        if batch.run != self._run:
            self._forget()
            self._run = batch.run
        self._callables.update(batch.callables)
        self._templates.update((template.number, template) for template in batch.templates)
        self._facts = batch.facts or self._facts
        values = [self._whole(wire) for wire in batch.values]
        for name in batch.drop:
            self._kept.pop(name, None)
        if not batch.n_tasks:
            return batch
        template = self._templates[batch.template]
        known = [(template.callable, self._callables[template.callable])]
        return batch._replace(values=values, callables=known, templates=[template], facts=self._facts, drop=())

    def keep(self, task: int, wire: Wire) -> None:
        """Note a small value that the slot made: later batches may only name it."""
        if type(wire) is tuple and type(wire[0]) is bytes:
            self._kept[task] = (wire[0], task)

    def _whole(self, wire: Wire) -> Wire:
        if type(wire) is tuple:
            if type(wire[0]) is int:
                return self._kept[wire[0]]
            if type(wire[0]) is bytes:
                self._kept[wire[1]] = wire
        return wire


@dataclass
class _Slot:
    """A claim to one worker: the batch that runs, and those behind it."""

    number: int
    words: memoryview
    times: memoryview[float]
    pid: int
    waiting: deque[Batch] = field(default_factory=deque)
    batch: Batch | None = None
    future: Future[Answer] | None = None
    executor: Executor | None = None  # where that is submitted
    runs_since: float | None = None
    is_lost: bool = False  # and `wait` has not said so
    luggage: _Luggage = field(default_factory=_Luggage)
    left_behind: set[Future[Answer]] = field(default_factory=set)

    def clear(self) -> None:
        """Forget the worker and what it had."""
        self.waiting.clear()
        self.batch = self.future = self.executor = self.runs_since = None
        self.luggage = _Luggage()


class FuturesBackend:
    """Workers that a `concurrent.futures.Executor` has.

    Args:
        executor: the executor, which stays the caller's own and is not shut down; or what makes one, called without
            arguments: that one is shut down by `close`, and another is made where it breaks.
        workers: how many batches it runs at once; None: as many as it has workers, where it tells.

    Raises:
        ValueError: this is no executor, or it does not tell how many workers it has.

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
    ends_workers = False
    traits = Traits(tells_at_end=True)

    arena: Arena

    def __init__(self, executor: Executor | Callable[[], Executor], workers: int | None = None) -> None:
        if workers is not None:
            check_count("workers", workers, 1, MOST_WORKERS)
        is_maker = isinstance(executor, type) or not hasattr(executor, "submit")
        if is_maker and not callable(executor):
            raise ValueError(
                f"executor={executor!r} has no submit(). Give a concurrent.futures.Executor, or a function making one."
            )
        self._make: Callable[[], Executor] | None = executor if is_maker else None  # type: ignore[assignment]
        self._executor: Executor | None = None if is_maker else executor  # type: ignore[assignment]
        running = self._running()
        if not hasattr(running, "submit"):
            raise ValueError(f"executor={executor!r} made {running!r}, which has no submit(). Give one that makes one.")
        self.n_slots = workers or _n_workers(running)
        self._is_open = False
        self._slots: list[_Slot] = []
        self._events: SimpleQueue[_Event | None] = SimpleQueue()

    # Opening and closing

    def open(self, n_wanted: int = 1) -> None:  # noqa: ARG002
        """Make the board; the executor starts its workers by itself."""
        if self._is_open:
            for slot in self._slots:
                slot.words[CALLED_OFF] = 0
            return
        self._room = open_arena(budget=0)
        self.arena = self._baggage = Baggage(int.from_bytes(os.urandom(6)), self._room.place.spill_folder)
        self._board_path = str(self._room.folder / "board")
        board = Board.create(self._board_path, self.n_slots)
        self._run = board.run
        self._series = os.urandom(8).hex()
        self._slots = [
            _Slot(number, board.integers(number), board.floats(number), os.getpid()) for number in range(self.n_slots)
        ]
        self._events = SimpleQueue()
        self._ready: list[Notice] = []
        self._seats: dict[Any, int] = {}
        self._sees_all = True
        self._is_open = True

    def close(self) -> None:
        """Call off what has not begun, and remove the board; what runs comes to its end, unheard."""
        if not self._is_open:
            return
        self._is_open = False
        for slot in self._slots:
            slot.words[CALLED_OFF], slot.words[LIMIT] = 1, 0
            if slot.future is not None:
                slot.future.cancel()
            slot.clear()
        self._baggage.empty()
        remove_arena(self._room)
        if self._make is not None and self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def joined(self) -> Sequence[Joined]:
        """Tell the slots whose worker can be had."""
        return [Joined(slot.number, slot.pid) for slot in self._slots if not slot.left_behind]

    # Batches

    def send(self, slot: int, batch: Batch) -> None:
        """Submit a batch, or keep it until the slot's last one is done."""
        entry = self._slots[slot]
        if entry.is_lost:
            return
        whole = entry.luggage.complete(batch)
        if batch.n_tasks:
            entry.waiting.append(whole)
            self._submit_next(entry)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened, after at most ``timeout`` seconds if nothing does."""
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
            self._executor = self._make()
        return self._executor

    def _submit_next(self, slot: _Slot) -> None:
        """Submit the next batch of a slot that has none; what is not to begin is answered here."""
        while slot.future is None and slot.waiting:
            batch = slot.waiting.popleft()
            if mark(batch.id, 0) >= slot.words[LIMIT]:
                self._ready.append(_unbegun(slot.number, batch))
                continue
            slot.batch, slot.runs_since, slot.executor = batch, None, self._running()
            try:
                future = slot.executor.submit(run_parcel, self._parcel(slot.number, batch))
            except (BrokenExecutor, RuntimeError) as error:  # the latter where it was shut down
                self._ready += self._lose(slot, error, mark(batch.id, 0))
                return
            slot.future = future
            future.add_done_callback(partial(_tell, self._events, slot.number))

    def _parcel(self, slot: int, batch: Batch) -> Parcel:
        return Parcel(
            here(),
            self._series,
            self._board_path,
            self.n_slots,
            slot,
            tuple(batch),
            self._baggage.pack(_names(batch)),
            self._room.place.spill_folder,
            time.perf_counter(),
        )

    def _settle(self, slot: _Slot, future: Future[Answer]) -> Iterator[Notice]:
        """Say what came of a future that is done, and submit what waits behind it."""
        if future is not slot.future:
            if future in slot.left_behind:
                slot.left_behind.remove(future)
                if not slot.left_behind:
                    yield Joined(slot.number, slot.pid)
            return
        batch = slot.batch
        assert batch is not None
        try:
            answer = future.result()
        except CancelledError:
            slot.batch = slot.future = None
            self._submit_next(slot)
            yield _unbegun(slot.number, batch)
            return
        except BaseException as error:
            yield from self._lose(slot, error, self._last_seen(slot, batch))
            return
        yield from self._heard(slot, batch, answer)
        slot.batch = slot.future = None
        self._submit_next(slot)

    def _heard(self, slot: _Slot, batch: Batch, answer: Answer) -> Iterator[Notice]:
        """Turn an answer into notices."""
        self._sees_all &= answer.sees_board
        self._baggage.take_in(answer.parts)
        if answer.who[1] != slot.pid:
            slot.pid = answer.who[1]
            yield Joined(slot.number, slot.pid)
        if answer.said:
            yield Told(slot.number, answer.said, mark(batch.id, batch.n_tasks - 1))
        worker = self._seat(answer.who)
        offset = 0.0 if answer.sees_board else time.perf_counter() - answer.told
        for fields in answer.replies:
            reply = Reply._make(fields)._replace(worker=worker)
            if offset:
                reply = reply._replace(marks=on_clock(reply.marks, offset))
            for place, wire in enumerate(reply.values, reply.first):
                slot.luggage.keep(_number(batch, place), wire)
            yield reply

    def _seat(self, who: Any) -> int:
        """Return the number of whoever ran a batch: the same each time, and below ``n_slots``.

        Where more come than there are slots, as others left, a new one gets the number of who was not seen for longest.
        """
        seat = self._seats.pop(who, None)
        if seat is None:
            if len(self._seats) < self.n_slots:
                seat = next(number for number in range(self.n_slots) if number not in self._seats.values())
            else:
                seat = self._seats.pop(next(iter(self._seats)))
        self._seats[who] = seat
        return seat

    # Loss

    def _last_seen(self, slot: _Slot, batch: Batch) -> int:
        """Return where a batch was when it was lost; 0 where it had not begun."""
        position: int = slot.words[POSITION]
        if unmark(position)[0] == batch.id:
            return position
        return 0 if self._sees_all else mark(batch.id, 0)

    def _lose(self, slot: _Slot, error: BaseException, position: int) -> list[Notice]:
        """Give up what a slot has; where the executor is ours and broken, the next batch has another one made."""
        now = time.perf_counter()
        started = min(slot.times[STARTED], now) if slot.words[POSITION] == position else now
        # Where nothing tells how far the batch was, it may have been at its end.
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
        """Do without a slot's worker until what it runs has returned."""
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
        slot.left_behind.add(future)
        warnings.warn(
            f"what runs on worker {number} of {type(self._executor).__name__} cannot be ended from here: it goes on "
            "until it returns, and its worker is not used until then. Only the workers of backend='process' are ended.",
            RuntimeWarning,
            stacklevel=2,
        )

    def terminate(self, slot: int) -> None:
        """Do without the slot's worker: what others own is not ended. A warning says so."""
        self._leave(slot)

    def kill(self, slot: int) -> None:
        """Do as `terminate` does."""
        self._leave(slot)

    # Telling

    def rest(self) -> Sequence[Told]:
        """Return nothing: lines come whole."""
        return ()

    def wake(self) -> None:
        """Have `wait` return soon."""
        self._events.put(None)

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Let tasks on this machine know, if they ask, how the run stands."""
        row = self._run
        row[0], row[1], row[2], row[3] = n_tasks, n_settled, n_out, -1 if layer is None else layer

    def call_off(self, *, is_off: bool = True) -> None:
        """Let tasks on this machine know, if they ask; what has not begun never does."""
        for slot in self._slots:
            slot.words[CALLED_OFF] = is_off
            if is_off and (future := slot.future) is not None:
                future.cancel()
        self.wake()

    def position(self, slot: int) -> int:
        """Return the mark of the task that the slot is at; of a batch that was not seen to begin, the last one's.

        It may run where it cannot be seen, so none of its tasks may be taken back.
        """
        entry = self._slots[slot]
        position: int = entry.words[POSITION]
        if entry.batch is None or unmark(position)[0] == entry.batch.id:
            return position
        return mark(entry.batch.id, entry.batch.n_tasks - 1)

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark and whatever comes behind it."""
        self._slots[slot].words[LIMIT] = mark

    def withdraw(self, slot: int) -> None:
        """Have the slot answer early for the batch that its executor has not begun."""
        future = self._slots[slot].future
        if future is not None:
            future.cancel()

    def started(self, slot: int) -> float:
        """Tell when the slot began the task that it is at.

        Where that cannot be seen, its batch is taken to use all the time that its tasks have together.
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
        """Return nothing: others' workers are not asked."""
        return {}

    def n_given(self, slot: int) -> int:  # noqa: ARG002
        """Count nothing: others' workers are not renewed."""
        return 0

    def renew(self, slot: int) -> None:
        """Go on with the same."""
        self._ready.append(Joined(slot, self._slots[slot].pid))


def _tell(events: SimpleQueue[_Event | None], slot: int, done: Future[Answer]) -> None:
    """Note that a slot's future is done; called in any thread, so it does nothing else."""
    events.put((slot, done))


def _n_workers(executor: Executor) -> int:
    for name in ("num_workers", "_max_workers"):  # mpi4py's; those of the standard library and loky tell no other way
        count = getattr(executor, name, None)
        if isinstance(count, int) and count > 0:
            return count
    raise ValueError(
        f"{type(executor).__name__} does not tell how many workers it has. Say so: FuturesBackend(executor, workers=8)."
    )


def _names(batch: Batch) -> set[str]:
    """Return the names of the large values that a batch refers to."""
    shared = (wire for template in batch.templates for wire in template.shared.values())
    return {wire[0] for part in (batch.values, batch.constants, shared) for wire in part if is_segment(wire)}


def _number(batch: Batch, place: int) -> int:
    """Return the number of a batch's task."""
    return batch.tasks + place if isinstance(batch.tasks, int) else array("i", batch.tasks)[place]


def _unbegun(slot: int, batch: Batch) -> Reply:
    """Answer for a batch of which nothing was begun."""
    return Reply(slot, batch.id, 0, [], array("d", [time.perf_counter()]).tobytes(), None, True, 0.0, 0)
