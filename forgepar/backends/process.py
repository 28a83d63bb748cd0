"""Local workers: one `ProcessPoolExecutor` with one process per slot, each with its own connection.

    ProcessBackend ── slot 0 ── ProcessPoolExecutor(1) ── process that runs worker_process.serve
          │    └───── slot 1 ── ProcessPoolExecutor(1) ── process that runs worker_process.serve
          └ selector: the listening socket, and per worker a connection and three pipes

The executor starts the process, notices its death and shuts it down. Batches go over the connection, which costs a
fifth of a `submit` and needs no thread in the parent. A death breaks one executor, and so one slot.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import selectors
import shutil
import signal
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import BrokenExecutor
from contextlib import suppress
from pathlib import Path

from forgepar._validate import shown
from forgepar.backends import executor_internals, limits, open_backends, orphans
from forgepar.backends.base import Joined, Lost, Notice, OutputNotice, Traits
from forgepar.backends.messages import Batch, Reply, listen, pack, segment_of, unpack
from forgepar.backends.output_capture import OutputRecord
from forgepar.backends.process_slots import EXIT_SECONDS, ProcessSlot, receive
from forgepar.backends.worker_board import CALLED_OFF, LIMIT, POSITION, STARTED, Board
from forgepar.backends.worker_process import END_OF_STACK, STACK_SIGNAL, own_part
from forgepar.backends.worker_starter import WorkerStarter, start_failed
from forgepar.errors import WrongProcess
from forgepar.machine import hold_standard_descriptors, n_memory_kills
from forgepar.system.forking import fork_safe
from forgepar.values.arena import Arena
from forgepar.values.arena_folders import open_arena, remove_arena
from forgepar.values.pickling import PickledCall

START_METHODS = ("forkserver", "spawn", "fork")
_START_POLL_SECONDS = 0.05  # only its executor shows that a worker has ended before it connected
_MADE = ("arena", "_listener", "_waker", "_woken", "_selector")  # created each time the backend is opened
_STACK_SECONDS = 0.05  # a worker writes its stack within 1 ms, but not on a busy machine
_STACK_STEP_SECONDS = 0.0005


class ProcessBackend:
    """Workers on this machine.

    Args:
        n_slots: how many workers.
        start_method: "forkserver", "spawn" or "fork"; None: forkserver if available, else spawn.
        budget: most bytes of large values in shared memory; None: half of the available memory.
        prepare: a function that each worker calls before its first batch. It is pickled while a process starts, so it
            may contain queues and locks of `multiprocessing`, which can be pickled only then.
        gives_way: whether a worker that this process wakes leaves it its core for the moment. This makes layers of
            short tasks faster. Beside other programs that want all cores, it may make long tasks slower.

    Attributes:
        lock: held by the thread that runs tasks, from before `open` until they are done, and while closing.

    Example:
        >>> backend = ProcessBackend(2)
        >>> backend.open(2)
        >>> backend.close()
    """

    name = "process"
    traits = Traits()

    arena: Arena

    def __init__(
        self,
        n_slots: int,
        start_method: str | None = None,
        budget: int | None = None,
        prepare: PickledCall | None = None,
        *,
        gives_way: bool = True,
    ) -> None:
        self.n_slots = n_slots
        available = multiprocessing.get_all_start_methods()
        if start_method is None:
            start_method = next(m for m in START_METHODS if m in available)
        if not isinstance(start_method, str) or start_method not in available:
            raise ValueError(
                f"start_method must be one of {available} on this system, got {shown(start_method)}. "
                "Leave it out to use the default."
            )
        self.start_method = start_method
        self._budget = budget
        self._owner = 0
        self._slots = [ProcessSlot(number) for number in range(n_slots)]
        self._starter = WorkerStarter(start_method, prepare, gives_way)
        self._pending: list[Notice] = []  # for the next `wait`
        self._n_memory_kills = 0
        self._is_open = self._is_closing = self._gives_up = False
        self.lock = fork_safe(threading.RLock())

    @property
    def is_foreign(self) -> bool:
        """Whether the workers belong to another process, from which this one was forked."""
        return self._is_open and self._owner != os.getpid()

    def open(self, n_wanted: int) -> None:
        """Create the arena, and start workers for those of the first ``n_wanted`` slots that have none.

        If the system allows fewer workers, there is one warning, and the next call tries again.

        Raises:
            WrongProcess: another process, from which this one was forked, has opened it.
            WorkerStartFailed: no worker can be started.
        """
        if self.is_foreign:
            raise WrongProcess.here(self._owner)
        if self._is_closing:
            self.close()  # it was interrupted
        starter = self._starter
        starter.caller = threading.get_native_id()
        missing = [slot for slot in self._slots[:n_wanted] if not self._is_open or slot.executor is None]
        shared = 0 if self._is_open else limits.SHARED
        if missing or shared:
            room = limits.make_room(
                shared + limits.PER_WORKER * len(missing) + limits.DURING_START + starter.n_starting
            )
            if shared and room < shared + limits.PER_WORKER + limits.DURING_START:
                raise start_failed(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        if not self._is_open:
            self._open_all()
        for slot in self._slots:
            slot.integers[CALLED_OFF] = 0
        starter.start_missing(n_wanted)

    def _open_all(self) -> None:
        try:
            self._make_shared()
        except OSError as error:
            self._close()
            if limits.is_limit(error):
                raise start_failed(error) from error
            raise

    def _make_shared(self) -> None:
        """Create what all workers share."""
        open_backends.close_dropped()
        hold_standard_descriptors()
        self._owner = os.getpid()
        for name in _MADE:
            self.__dict__.pop(name, None)
        self._is_open = True  # from here on, `close` has something to close
        open_backends.register(self)
        self.arena = open_arena(self.n_slots, self._budget)
        board = Board.create(str(self.arena.folder / "board"), self.n_slots)
        self._run = board.run
        self._gives_up = False
        self._slots = [ProcessSlot(number) for number in range(self.n_slots)]  # the old ones may be a parent's
        self._address = str(self.arena.folder / "socket")
        self._listener = listen(self._address, self.n_slots)  # in a folder that only this user may enter
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._woken)
        self._starter.open(self._slots, self.arena, board, self._selector, self._address)
        orphans.begin(self)
        self._n_memory_kills = n_memory_kills()

    def joined(self) -> Sequence[Joined]:
        """Return the slots that have a worker at this moment."""
        return [Joined(slot.number, slot.pid) for slot in self._slots if slot.connection is not None]

    def send(self, slot: int, batch: Batch) -> None:
        """Send a batch to a slot that has joined."""
        entry = self._slots[slot]
        assert entry.connection is not None, f"slot {slot} has no worker"
        message = pack(batch, self.arena)
        entry.n_given += batch.n_tasks
        if batch.n_tasks:
            entry.outstanding.append(segment_of(message))
        with suppress(OSError):  # the worker died: `wait` reads the end of its connection and reports it
            entry.connection.send(message)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened, after at most ``timeout`` seconds if nothing does."""
        if self.is_foreign:
            raise WrongProcess.here(self._owner)  # a callback of a run has forked this process
        if self._pending:
            pending, self._pending = self._pending, []
            return pending
        deadline = None if timeout is None else time.perf_counter() + timeout
        starter = self._starter
        while True:
            if starter.shortage is not None and timeout != 0.0 and not starter.n_starting and not starter.n_executors():
                raise start_failed(starter.shortage) from starter.shortage
            starting = starter.n_starting > 0
            step = None if deadline is None else max(0.0, deadline - time.perf_counter())
            if starting:
                step = _START_POLL_SECONDS if step is None else min(step, _START_POLL_SECONDS)
            notices: list[Notice] = []
            is_woken = False
            for key, _ in self._selector.select(step):
                if key.data is self._woken:
                    is_woken = True
                    self._woken.recv(1024)
                    continue
                notice: Notice | None
                if key.data is None:
                    notice = starter.accept(self._listener)
                elif key.fd in key.data.pipes:
                    notice = key.data.read_output(key.fd, self._selector)
                else:
                    notice = self._receive(key.data, notices)
                if notice is not None:
                    notices.append(notice)
                if type(notice) is Lost:
                    break  # later events may belong to the worker that is gone; the next `select` returns the rest
            if self._gives_up:
                raise RuntimeError("The program is ending and was interrupted, so it no longer waits for its tasks.")
            if starting:
                starter.check()
            if notices or is_woken or (deadline is not None and time.perf_counter() >= deadline):
                return notices

    def rest(self) -> Sequence[OutputNotice]:
        """Return unfinished lines as if they had ended."""
        return [
            OutputNotice(slot.number, records, slot.integers[POSITION])
            for slot in self._slots
            if (records := slot.reader.rest())
        ]

    def wake(self) -> None:
        """Make `wait` return soon."""
        with suppress(OSError):  # the buffer is full of wake-ups, or the backend is closed
            self._waker.send(b"!")

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Publish the progress of the run to tasks."""
        row = self._run
        row[0], row[1], row[2], row[3] = n_tasks, n_settled, n_out, -1 if layer is None else layer

    def call_off(self, *, is_off: bool = True) -> None:
        """Publish to tasks whether the run was cancelled, and wake."""
        for slot in self._slots:
            slot.integers[CALLED_OFF] = is_off
        self.wake()

    def position(self, slot: int) -> int:
        """Return the mark of the slot's current task."""
        mark: int = self._slots[slot].integers[POSITION]
        return mark

    def may_be_at(self, slot: int) -> int | None:
        """Return the mark of the slot's current task, since the slot sees a limit at once."""
        return self.position(slot)

    def withdraw(self, slot: int) -> None:
        """Do nothing: the slot replies without being asked."""

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark or a later one."""
        self._slots[slot].integers[LIMIT] = mark

    def started(self, slot: int) -> float:
        """Return when the slot began its current task."""
        return self._slots[slot].times[STARTED]

    def where(self, slots: Sequence[int]) -> dict[int, str]:
        """Return the current stacks of workers, of those that answer within a moment.

        A signal makes `faulthandler` write the stack, also in C code; a worker that sleeps in the kernel writes none.
        """
        asked = {
            slot: self.arena.folder / f"stack-{slot}" for slot in slots if self._slots[slot].connection is not None
        }
        for slot, path in asked.items():
            path.write_bytes(b"")
            with suppress(ProcessLookupError):
                os.kill(self._slots[slot].pid, STACK_SIGNAL)
        until, stacks = time.perf_counter() + _STACK_SECONDS, dict[int, str]()
        while len(stacks) < len(asked) and time.perf_counter() < until:
            time.sleep(_STACK_STEP_SECONDS)
            for slot, path in asked.items():
                text = path.read_text(errors="replace")
                if text.endswith("\n") and END_OF_STACK in text:
                    stacks[slot] = own_part(text)
        return stacks

    def n_given(self, slot: int) -> int:
        """Return the number of tasks that the slot's worker has received since it started."""
        return self._slots[slot].n_given

    def renew(self, slot: int) -> None:
        """Start a new worker for the slot; the old one ends when its connection closes."""
        entry = self._slots[slot]
        assert entry.connection is not None
        assert entry.executor is not None
        self._selector.unregister(entry.connection)
        entry.connection.close()
        if records := entry.read_rest(self._selector):
            self._pending.append(OutputNotice(slot, records, entry.integers[POSITION]))
        entry.executor.shutdown(wait=False)
        entry.leaving = [thread for thread in entry.leaving + entry.threads if thread.is_alive()]
        self._starter.start_again(entry)

    def terminate(self, slot: int) -> None:
        """Ask the slot's worker and all its child processes to end."""
        self._slots[slot].send_signal(signal.SIGTERM)

    def kill(self, slot: int) -> None:
        """Kill the slot's worker and all its child processes."""
        self._slots[slot].send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End all workers and remove the arena: idle ones exit by themselves, busy ones are killed.

        If another thread runs tasks on the workers, this waits for it. An interrupt may end this method at any line;
        the next call continues, and the end of the program makes one.
        """
        if self.is_foreign:
            return
        with self.lock:
            if self._is_open or self._is_closing:
                self._close()

    def _close(self) -> None:
        self._is_closing = True
        for slot in self._slots:
            if slot.outstanding:
                self.kill(slot.number)
            slot.close_descriptors()  # with open pipes, a worker that prints as it exits could block
        self._close_ends()
        for slot in self._slots:
            if slot.executor is not None:
                executor_internals.shut_down(slot.executor)
        until = time.perf_counter() + EXIT_SECONDS  # for all of them together
        for slot in self._slots:
            slot.shut_down(until)
            slot.connection = slot.process = slot.executor = slot.job = None
            # An exception that the caller keeps refers to the slots, and would keep these alive.
            slot.threads.clear()
            slot.leaving.clear()
            slot.outstanding.clear()
        orphans.end(self)
        if "arena" in self.__dict__:
            remove_arena(self.arena)
        # In this order, an interrupt between two lines leaves what `close` and `open` recognize as unfinished.
        open_backends.unregister(self)
        self._is_open = False
        self._is_closing = False

    def give_up(self) -> None:
        """Make the thread that waits for tasks fail soon, as the program ends."""
        self._gives_up = True
        self.wake()

    def _close_ends(self) -> None:
        """Close the sockets and the selector; an interrupt may have come before all of them were created."""
        for name in _MADE[1:]:
            end = self.__dict__.get(name)
            if end is not None:
                end.close()

    def leave_to_parent(self) -> None:
        """In a forked child, close copies of the descriptors that connect the parent to its workers.

        Otherwise a worker does not see its parent end while the child lives. The selector is not changed: the child
        shares it with the parent.
        """
        open_backends.unregister(self)
        for slot in self._slots:
            slot.close_descriptors()
            executor_internals.abandon(slot.threads + slot.leaving)
            own = ProcessSlot(slot.number)
            slot.integers, slot.times = own.integers, own.times  # the old ones are shared with the parent
        self._run = memoryview(bytearray(64)).cast("q")
        self._close_ends()

    def _receive(self, slot: ProcessSlot, notices: list[Notice]) -> Notice | None:
        assert slot.connection is not None
        message = receive(slot.connection)
        if not message:
            lost, records = self._lose(slot)
            if records:
                notices.append(OutputNotice(slot.number, records, lost.position))
            return lost
        reply = unpack(message, Reply, self.arena)
        if reply.ended:
            slot.outstanding.popleft()
        return reply

    def _lose(self, slot: ProcessSlot) -> tuple[Lost, list[OutputRecord]]:
        """Clean up after a slot's dead worker and start another; return the loss and the worker's last output."""
        assert slot.connection is not None
        self._selector.unregister(slot.connection)
        slot.connection.close()
        pid, process, job = slot.pid, slot.process, slot.job
        position, started = slot.integers[POSITION], min(slot.times[STARTED], time.perf_counter())
        slot.wait_for_end()
        records = slot.read_rest(self._selector)
        for folder in Path(self.arena.place.spill_folder).glob(f"scratch-{slot.number}-*"):  # tasks' own folders
            shutil.rmtree(folder, ignore_errors=True)
        for segment in filter(None, slot.outstanding):
            self.arena.free(segment)
        dump, is_out_of_memory = self._crash(slot.number), self._sees_kills_for_memory()
        fault = job.exception() if job is not None and job.done() and not job.cancelled() else None
        self._starter.start_again(slot)
        exit_code = process.exitcode if process else None
        fault = None if isinstance(fault, BrokenExecutor) else fault
        is_out_of_memory = is_out_of_memory and exit_code == -signal.SIGKILL
        return Lost(slot.number, pid, exit_code, position, started, fault, dump, is_out_of_memory), records

    def _crash(self, slot: int) -> str:
        """Return the stacks that a worker wrote when it crashed."""
        with suppress(OSError):
            return (self.arena.folder / f"crash-{slot}").read_text(errors="replace")
        return ""

    def _sees_kills_for_memory(self) -> bool:
        """Return whether the kernel has killed processes for lack of memory since the last call."""
        before, self._n_memory_kills = self._n_memory_kills, n_memory_kills()
        return self._n_memory_kills > before
