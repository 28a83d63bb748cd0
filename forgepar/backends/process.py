"""Local workers: one `ProcessPoolExecutor` of one process a slot, each with a connection of its own.

    ProcessBackend ── slot 0 ── ProcessPoolExecutor(1) ── process running worker.serve
          │    └───── slot 1 ── ProcessPoolExecutor(1) ── process running worker.serve
          └ selector: the listening socket, and a connection a worker

The executor starts the process, notices its death and shuts it down; batches go over the connection, which costs a
fifth of a `submit` and runs no thread in the parent. A death breaks one executor, so one slot.
"""

from __future__ import annotations

import errno
import multiprocessing
import os
import selectors
import shutil
import signal
import socket
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import BrokenExecutor, Future
from concurrent.futures.process import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from forgepar.backends import limits, orphans
from forgepar.backends.base import Joined, Lost, Notice, Told
from forgepar.backends.board import CALLED_OFF, LIMIT, POSITION, STARTED, Board
from forgepar.backends.output import Ear, Said, make_pipes, read_pipe
from forgepar.backends.starting import (
    abandon,
    at_exit,
    begin_start,
    context,
    let_go,
    make_ready,
    process_of,
    processes_of,
    start_thread,
)
from forgepar.backends.surroundings import here
from forgepar.backends.wire import Batch, Channel, Hello, Reply, accept, listen, pack, segment_of, unpack
from forgepar.backends.worker import END_OF_STACK, STACK_SIGNAL, begin, own_part, serve
from forgepar.errors import WorkerStartFailed, WrongProcess, forget_frames
from forgepar.forking import fork_safe, holds, in_child, no_forks
from forgepar.machine import available_cpus, hold_standard_descriptors, n_memory_kills
from forgepar.pickling import Prepared
from forgepar.startstate import StartState
from forgepar.values.arena import Arena
from forgepar.values.folders import open_arena, remove_arena
from forgepar.values.segment import Segment

START_METHODS = ("forkserver", "spawn", "fork")
_START_ATTEMPTS = 3  # workers of one slot that may end before they join, in a row
_RETRIES = 10  # of a start that the system did not let be: what ends meanwhile, a worker before it, makes room
_RETRY_SECONDS = 0.05
_START_POLL_SECONDS = 0.05  # a worker that ends before it connects is only seen by asking its executor
_MADE = ("arena", "_listener", "_waker", "_woken", "_selector")  # each time that workers are to be started
_EXIT_SECONDS = 2.0  # what an idle worker may take to exit when asked to
_STACK_SECONDS = 0.05  # a worker writes its stack within 1 ms, but on a busy machine
_STACK_STEP_SECONDS = 0.0005
_DEATH_SECONDS = 0.5  # from a worker's end of file to its death, at most


@dataclass
class _Slot:
    """One executor, its process and the connection to it; all but the number change when its worker does."""

    number: int
    executor: ProcessPoolExecutor | None = None
    job: Future[None] | None = None
    process: BaseProcess | None = None
    connection: Channel | None = None
    words: memoryview = field(default_factory=lambda: memoryview(bytearray(64)).cast("q"))
    times: memoryview[float] = field(default_factory=lambda: memoryview(bytearray(64)).cast("d"))
    doomed: list[Any] = field(default_factory=list)  # psutil's processes: the worker being ended, and its children
    start: object = None  # what the last start is known by
    retry_at: float | None = None  # when to try again to start a worker, which the system did not let be
    threads: list[threading.Thread] = field(default_factory=list)  # the executor's own
    leaving: list[threading.Thread] = field(default_factory=list)  # those of executors before it that `renew` let go
    failed_starts: int = 0
    n_retries: int = 0
    n_given: int = 0
    ear: Ear = field(default_factory=Ear)
    pipes: dict[int, int] = field(default_factory=dict)  # by descriptor, which of `output.PIPES` it is
    outstanding: deque[Segment | None] = field(default_factory=deque)  # a batch each, and the segment that carries it

    @property
    def pid(self) -> int:
        return (self.process and self.process.pid) or 0


class ProcessBackend:
    """Workers on this machine.

    Args:
        n_slots: how many workers.
        start_method: "forkserver", "spawn" or "fork"; None takes forkserver where there is one, else spawn.
        budget: most bytes of large values in shared memory; None: half of the memory that is available.
        prepare: what each worker calls before it takes work. It pickles while a process is started, so that it may hold
            what can be handed over then only: queues and locks of `multiprocessing`.
        gives_way: whether a worker that this process wakes lets it have the core for the moment: layers of short tasks
            are quicker for it. Beside other programs that want all cores, long tasks may be slower for it.

    Attributes:
        lock: held by the thread that runs tasks on the workers, from before `open` until they are done, and to close.

    Example:
        >>> backend = ProcessBackend(2)
        >>> backend.open(2)
        >>> backend.close()
    """

    name = "process"
    ends_workers = True

    arena: Arena

    def __init__(
        self,
        n_slots: int,
        start_method: str | None = None,
        budget: int | None = None,
        prepare: Prepared | None = None,
        *,
        gives_way: bool = True,
    ) -> None:
        self.n_slots = n_slots
        self._gives_way = gives_way
        self._prepare_worker = prepare
        available = multiprocessing.get_all_start_methods()
        if start_method is None:
            start_method = next(m for m in START_METHODS if m in available)
        self.start_method = start_method
        if not isinstance(self.start_method, str) or self.start_method not in available:
            raise ValueError(
                f"start_method={start_method!r} is not one of {available}, which this system has. Leave it out."
            )
        self._budget = budget
        self._owner = 0
        self._caller = 0
        self._slots = [_Slot(number) for number in range(n_slots)]
        self._n_starting = 0
        self._overheard: list[Notice] = []
        self._n_memory_kills = 0
        self._is_open = self._is_closing = self._has_warned = self._has_told_of_shortage = False
        self._n_asked = 0
        self._shortage: BaseException | None = None  # what the last start failed with that the system did not let be
        self._gives_up = False
        self.lock = fork_safe(threading.RLock())

    @property
    def is_foreign(self) -> bool:
        """Whether the workers are those of another process, which this one was forked from."""
        return self._is_open and self._owner != os.getpid()

    def open(self, n_wanted: int) -> None:
        """Make the arena, and start workers for the first ``n_wanted`` slots; does nothing where that is done.

        Where the system lets this process have fewer, there is one warning, and the next call tries again.

        Raises:
            WrongProcess: it was opened by another process, which this one was forked from.
            WorkerStartFailed: no worker can be started.
        """
        if self.is_foreign:
            raise WrongProcess.here(self._owner)
        if self._is_closing:
            self.close()  # it was interrupted
        self._caller = threading.get_native_id()
        missing = [slot for slot in self._slots[:n_wanted] if not self._is_open or slot.executor is None]
        shared = 0 if self._is_open else limits.SHARED
        if missing or shared:
            room = limits.make_room(shared + limits.PER_WORKER * len(missing) + limits.AMID_START + self._n_starting)
            if shared and room < shared + limits.PER_WORKER + limits.AMID_START:
                raise _start_failed(OSError(errno.EMFILE, os.strerror(errno.EMFILE)))
        if not self._is_open:
            self._open_all()
        for slot in self._slots:
            slot.words[CALLED_OFF] = 0
        self._n_asked = max(self._n_asked, min(n_wanted, self.n_slots))
        self._start_missing(n_wanted)

    def _open_all(self) -> None:
        try:
            self._prepare()
        except OSError as error:
            self._close()
            if limits.is_limit(error):
                raise _start_failed(error) from error
            raise

    def _start_missing(self, n_wanted: int) -> None:
        """Start workers for the slots that have none, up to the first that cannot be started."""
        n_retries = 0
        for slot in self._slots[:n_wanted]:
            while slot.executor is None and slot.retry_at is None and not self._start(slot):
                assert self._shortage is not None
                if self._n_executors():
                    if not limits.is_at_the_end(self._shortage):  # else it does with those that there are, as is usual
                        self._tell_of_shortage()
                    return
                if n_retries == _RETRIES or not limits.is_limit(self._shortage):
                    raise _start_failed(self._shortage) from self._shortage
                n_retries += 1
                time.sleep(_RETRY_SECONDS)  # what another executor had may be about to end

    def _n_executors(self) -> int:
        return sum(slot.executor is not None for slot in self._slots)

    def _prepare(self) -> None:
        """Make what all workers share."""
        hold_standard_descriptors()
        self._owner = os.getpid()
        for name in _MADE:
            self.__dict__.pop(name, None)
        self._is_open = True  # from here on there is something to close
        _live.add(self)
        self.arena = open_arena(self.n_slots, self._budget)
        self._board = Board.create(str(self.arena.folder / "board"), self.n_slots)
        self._run = self._board.run
        self._gives_up = self._has_told_of_shortage = False
        self._n_starting = self._n_asked = 0
        self._shortage = None
        self._slots = [_Slot(number) for number in range(self.n_slots)]  # those there are may be a parent's
        self._address = str(self.arena.folder / "socket")
        self._listener = listen(self._address, self.n_slots)  # in a folder that no other user may enter
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._waker, self._woken = socket.socketpair()
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ, self._woken)
        orphans.begin(self)
        self._n_memory_kills = n_memory_kills()

    def joined(self) -> Sequence[Joined]:
        """Tell the slots that have a worker at this moment."""
        return [Joined(slot.number, slot.pid) for slot in self._slots if slot.connection is not None]

    def send(self, slot: int, batch: Batch) -> None:
        """Hand a batch to a slot that has joined."""
        entry = self._slots[slot]
        assert entry.connection is not None, f"slot {slot} has no worker"
        message = pack(batch, self.arena)
        entry.n_given += batch.n_tasks
        if batch.n_tasks:
            entry.outstanding.append(segment_of(message))
        with suppress(OSError):  # the worker died: its connection is at its end and `wait` will say so
            entry.connection.send(message)

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened, after at most ``timeout`` seconds if nothing does."""
        if self.is_foreign:
            raise WrongProcess.here(self._owner)  # a callback of a run has forked this process
        if self._overheard:
            overheard, self._overheard = self._overheard, []
            return overheard
        deadline = None if timeout is None else time.perf_counter() + timeout
        while True:
            if self._shortage is not None and timeout != 0.0 and not self._n_starting and not self._n_executors():
                raise _start_failed(self._shortage) from self._shortage
            starting = self._n_starting > 0
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
                    notice = self._accept()
                elif key.fd in key.data.pipes:
                    notice = self._hear(key.data, key.fd)
                else:
                    notice = self._receive(key.data, notices)
                if notice is not None:
                    notices.append(notice)
                if type(notice) is Lost:
                    break  # what follows may be of the worker that is gone; the rest is told at the next look
            if self._gives_up:
                raise RuntimeError("This program ends, and was interrupted: its tasks are not waited for any more.")
            if starting:
                self._check_starts()
            if notices or is_woken or (deadline is not None and time.perf_counter() >= deadline):
                return notices

    def rest(self) -> Sequence[Told]:
        """Return the lines that were begun and not ended so far, as if they were."""
        return [Told(slot.number, said, slot.words[POSITION]) for slot in self._slots if (said := slot.ear.rest())]

    def wake(self) -> None:
        """Have `wait` return soon."""
        with suppress(OSError):  # as many wake-ups wait as it takes, or the backend is closed
            self._waker.send(b"!")

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Let tasks know, if they ask, how the run stands."""
        row = self._run
        row[0], row[1], row[2], row[3] = n_tasks, n_settled, n_out, -1 if layer is None else layer

    def call_off(self, *, is_off: bool = True) -> None:
        """Let tasks know, if they ask, that the run was called off, and wake."""
        for slot in self._slots:
            slot.words[CALLED_OFF] = is_off
        self.wake()

    def position(self, slot: int) -> int:
        """Return the mark of the task that the slot is at."""
        mark: int = self._slots[slot].words[POSITION]
        return mark

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark and whatever comes behind it."""
        self._slots[slot].words[LIMIT] = mark

    def started(self, slot: int) -> float:
        """Tell when the slot began the task that it is at."""
        return self._slots[slot].times[STARTED]

    def where(self, slots: Sequence[int]) -> dict[int, str]:
        """Return the stacks of what workers are at, of those that tell within a moment.

        A signal has `faulthandler` write them, in C code too; a worker that sleeps in the kernel tells nothing.
        """
        asked = {slot: self._stack_file(slot) for slot in slots if self._slots[slot].connection is not None}
        for slot, path in asked.items():
            path.write_bytes(b"")
            with suppress(ProcessLookupError):
                os.kill(self._slots[slot].pid, STACK_SIGNAL)
        until, told = time.perf_counter() + _STACK_SECONDS, dict[int, str]()
        while len(told) < len(asked) and time.perf_counter() < until:
            time.sleep(_STACK_STEP_SECONDS)
            for slot, path in asked.items():
                text = path.read_text(errors="replace")
                if text.endswith("\n") and END_OF_STACK in text:
                    told[slot] = own_part(text)
        return told

    def _stack_file(self, slot: int) -> Path:
        return self.arena.folder / f"stack-{slot}"

    def n_given(self, slot: int) -> int:
        """Count the tasks that the slot's worker was handed since it started."""
        return self._slots[slot].n_given

    def renew(self, slot: int) -> None:
        """Let the slot's worker go, which ends by itself at the end of its connection, and start another."""
        entry = self._slots[slot]
        assert entry.connection is not None
        assert entry.executor is not None
        self._selector.unregister(entry.connection)
        entry.connection.close()
        if said := self._hear_rest(entry):
            self._overheard.append(Told(slot, said, entry.words[POSITION]))
        entry.executor.shutdown(wait=False)
        entry.leaving = [thread for thread in entry.leaving + entry.threads if thread.is_alive()]
        self._start_again(entry)

    def terminate(self, slot: int) -> None:
        """Ask the slot's worker and all its child processes to end."""
        self._signal(slot, signal.SIGTERM)

    def kill(self, slot: int) -> None:
        """End the slot's worker and all its child processes at once."""
        self._signal(slot, signal.SIGKILL)

    def _signal(self, slot: int, number: signal.Signals) -> None:
        entry = self._slots[slot]
        if entry.pid:
            entry.doomed += _tree(entry.pid)  # children of a dead worker would not be found any more
            _send(number, entry.doomed)

    def close(self) -> None:
        """End all workers and remove the arena: idle ones exit by themselves, busy ones are killed.

        From another thread than the one that runs tasks on them, it waits for these. An interrupt may end it anywhere;
        the next call goes on where it was, and the end of the program makes one.
        """
        if self.is_foreign:
            return
        with self.lock:
            if self._is_open:
                self._close()

    def _close(self) -> None:
        self._is_closing = True
        for slot in self._slots:
            if slot.outstanding:
                self.kill(slot.number)
            if slot.connection is not None:
                slot.connection.close()
            _close_all_of(slot.pipes)  # else a worker that prints as it goes could block
        self._close_ends()
        for slot in self._slots:
            _shut_down(slot)
            slot.connection = slot.process = slot.executor = slot.job = None
            # An exception that is kept would keep them, and this, with it.
            slot.threads.clear()
            slot.leaving.clear()
            slot.outstanding.clear()
        orphans.end(self)
        if "arena" in self.__dict__:
            remove_arena(self.arena)
        self._is_open = self._is_closing = False
        _live.discard(self)

    def give_up(self) -> None:
        """Have the thread that waits for tasks fail soon: nothing is to keep the program any more."""
        self._gives_up = True
        self.wake()

    def _close_ends(self) -> None:
        """Close what workers connect to and wake; an interrupt may have come before it was all made."""
        for name in _MADE[1:]:
            end = self.__dict__.get(name)
            if end is not None:
                end.close()

    def leave_to_parent(self) -> None:
        """In a forked child, close the copies of what the parent reaches its workers by.

        Else a worker would not see its parent go while the child lives. The selector is not told: the child shares it.
        """
        _live.discard(self)
        for slot in self._slots:
            if slot.connection is not None:
                slot.connection.close()
            _close_all_of(slot.pipes)
            abandon(slot.threads + slot.leaving)
            slot.words, slot.times = _Slot(0).words, _Slot(0).times  # those are shared with the parent
        self._run = memoryview(bytearray(64)).cast("q")
        self._close_ends()

    def _start(self, slot: _Slot) -> bool:
        """Start a slot's worker; it joins later.

        Returns:
            False if the system does not let it be; `_shortage` is why, and nothing is left of it.

        Raises:
            WorkerStartFailed: this is a signal handler, and what it interrupts is a start.
        """
        if holds(no_forks):
            raise WorkerStartFailed(
                "Workers cannot be started by a signal handler that interrupts the start of others. "
                "Have the handler note what came, and run it after that."
            )
        try:
            with no_forks:  # a child would get locks of the standard library that are held, and half of a worker
                slot.start = begin_start()
                self._start_alone(slot)
        except (OSError, EOFError, RuntimeError) as error:
            self._do_without(slot)
            forget_frames(error)
            self._shortage = error
            return False
        if slot.retry_at is None:
            self._n_starting += 1
        slot.retry_at, slot.n_retries = None, 0
        return True

    def _start_again(self, slot: _Slot) -> None:
        """Start a worker in the place of another; where the system does not let it be, try again soon."""
        if not self._start(slot):
            slot.retry_at = time.perf_counter() + _RETRY_SECONDS
            self._n_starting += 1

    def _start_alone(self, slot: _Slot) -> None:
        surroundings = here(is_strict=False)  # jobs that need a folder which is gone fail by themselves
        self._board.reset(slot.number)
        slot.words, slot.times = self._board.integers(slot.number), self._board.floats(slot.number)
        slot.doomed = []
        slot.n_given = 0
        slot.executor = slot.job = slot.connection = slot.process = None
        slot.threads = []
        slot.outstanding.clear()
        limits.require_room(limits.PER_WORKER + limits.AMID_START + self._n_starting)  # those have yet to connect
        make_ready(self.start_method)
        for path in (self.arena.folder / f"crash-{slot.number}", self._stack_file(slot.number)):
            path.write_bytes(b"")
        self._open_pipes(slot)
        threads = max(1, available_cpus() // self.n_slots)
        prepare: Callable[[], object] | None = self._prepare_worker
        if self._prepare_worker is not None and self.start_method == "fork":
            prepare = self._prepare_worker.for_fork()
        initargs = (StartState.here(self._caller), threads, surroundings, prepare)
        slot.executor = ProcessPoolExecutor(
            1, mp_context=context(self.start_method), initializer=begin, initargs=initargs
        )
        start_thread(slot.executor)
        before = threading.enumerate()
        place, gives_way = self.arena.place, self._gives_way
        slot.job = slot.executor.submit(serve, self._address, slot.number, place, threads, gives_way)
        slot.threads = [
            thread
            for thread in threading.enumerate()
            if thread not in before and type(thread).__module__ == ProcessPoolExecutor.__module__
        ]

    def _do_without(self, slot: _Slot) -> None:
        """Clear away what there is of a worker that could not be started."""
        for process in processes_of(slot.start):
            process.kill()  # the executor had started it, and would not look after it
            process.join()
        self._close_pipes(slot)
        if slot.executor is not None:
            let_go(slot.executor)
        slot.executor = slot.job = None

    def _tell_of_shortage(self) -> None:
        """Warn that there are fewer workers than were asked for, once."""
        assert self._shortage is not None
        if not self._has_told_of_shortage:
            self._has_told_of_shortage = True
            _warn(
                f"Tasks run on {self._n_executors()} of {self._n_asked} workers, as no more can be started. "
                f"{limits.why(self._shortage)}"
            )

    def _accept(self) -> Joined | None:
        """Take in a worker that connects; None if it ended before it could say who it is."""
        try:
            connection = accept(self._listener)
        except OSError as error:
            if limits.make_room(limits.AMID_START) < limits.AMID_START:
                raise _start_failed(error) from error
            return None  # there is room now, and it is still waiting
        message = _received(connection)
        if not message:
            connection.close()
            return None
        hello = unpack(message, Hello, self.arena)
        slot, process = self._slots[hello.slot], process_of(hello.pid)
        if process not in processes_of(slot.start):  # its start was taken for one that had failed
            connection.close()
            return None
        slot.connection, slot.process = connection, process
        slot.failed_starts = 0
        self._n_starting -= 1
        self._selector.register(connection, selectors.EVENT_READ, slot)
        if hello.refused and not self._has_warned:
            self._has_warned = True
            _warn_of(hello.refused)
        return Joined(slot.number, hello.pid)

    def _open_pipes(self, slot: _Slot) -> None:
        slot.ear = Ear()
        slot.pipes = {number: pipe for pipe, number in enumerate(make_pipes(str(self.arena.folder), slot.number))}
        for number in slot.pipes:
            self._selector.register(number, selectors.EVENT_READ, slot)

    def _close_pipes(self, slot: _Slot) -> None:
        for number in list(slot.pipes):
            self._close_pipe(slot, number)

    def _close_pipe(self, slot: _Slot, number: int) -> None:
        with suppress(KeyError):  # its start failed before
            self._selector.unregister(number)
        del slot.pipes[number]  # first: a child forked between the two would close a number that others may have by now
        os.close(number)

    def _hear(self, slot: _Slot, number: int) -> Told | None:
        """Read one of a slot's pipes; close it where its worker, and all that it started, has."""
        data = read_pipe(number)
        if data == b"":
            self._close_pipe(slot, number)
        said = slot.ear.hear(slot.pipes[number], data) if data else ()
        return Told(slot.number, said, slot.words[POSITION]) if said else None

    def _hear_rest(self, slot: _Slot) -> list[Said]:
        """Read what a worker that is gone has told before, to the end."""
        said = list[Said]()
        for number in list(slot.pipes):
            while data := read_pipe(number):
                said += slot.ear.hear(slot.pipes[number], data)
        self._close_pipes(slot)
        return said + slot.ear.rest()

    def _receive(self, slot: _Slot, notices: list[Notice]) -> Notice | None:
        assert slot.connection is not None
        message = _received(slot.connection)
        if not message:
            lost, said = self._lose(slot)
            if said:
                notices.append(Told(slot.number, said, lost.position))
            return lost
        reply = unpack(message, Reply, self.arena)
        if reply.ended:
            slot.outstanding.popleft()
        return reply

    def _lose(self, slot: _Slot) -> tuple[Lost, list[Said]]:
        """Clear away a slot's dead worker and start another; return what it had still told, too."""
        assert slot.connection is not None
        self._selector.unregister(slot.connection)
        slot.connection.close()
        pid, process, job = slot.pid, slot.process, slot.job
        position, started = slot.words[POSITION], min(slot.times[STARTED], time.perf_counter())
        _bury(slot)
        _send(signal.SIGKILL, slot.doomed)
        said = self._hear_rest(slot)
        self._remove_scratch(slot)
        for segment in filter(None, slot.outstanding):
            self.arena.free(segment)
        dump, is_out_of_memory = self._crash(slot.number), self._sees_kills_for_memory()
        fault = job.exception() if job is not None and job.done() and not job.cancelled() else None
        self._start_again(slot)
        exit_code = process.exitcode if process else None
        fault = None if isinstance(fault, BrokenExecutor) else fault
        is_out_of_memory = is_out_of_memory and exit_code == -signal.SIGKILL
        return Lost(slot.number, pid, exit_code, position, started, fault, dump, is_out_of_memory), said

    def _remove_scratch(self, slot: _Slot) -> None:
        """Remove the folders that tasks of a worker that is gone had to themselves."""
        for folder in Path(self.arena.place.spill_folder).glob(f"scratch-{slot.number}-*"):
            shutil.rmtree(folder, ignore_errors=True)

    def _crash(self, slot: int) -> str:
        """Read what a worker told when it crashed."""
        with suppress(OSError):
            return (self.arena.folder / f"crash-{slot}").read_text(errors="replace")
        return ""

    def _sees_kills_for_memory(self) -> bool:
        """Tell whether the kernel has ended processes for lack of memory since the last look."""
        before, self._n_memory_kills = self._n_memory_kills, n_memory_kills()
        return self._n_memory_kills > before

    def _check_starts(self) -> None:
        """Start again what ended before it joined, or could not be started; give up after a few times."""
        now = time.perf_counter()
        for slot in self._slots:
            if slot.retry_at is not None:
                if now >= slot.retry_at:
                    self._retry(slot)
            elif slot.connection is None and _has_ended(slot):
                self._start_after_failure(slot)

    def _retry(self, slot: _Slot) -> None:
        """Try again to start a worker that the system did not let be; go on without it after a few times."""
        if self._start(slot):
            return
        assert self._shortage is not None
        slot.n_retries += 1
        slot.retry_at = time.perf_counter() + _RETRY_SECONDS
        if slot.n_retries >= _RETRIES or not limits.is_limit(self._shortage):
            self._give_up_on(slot)

    def _give_up_on(self, slot: _Slot) -> None:
        """Have a slot be empty; `wait` raises if all are."""
        slot.retry_at, slot.n_retries, slot.failed_starts = None, 0, 0
        self._n_starting -= 1
        if self._n_executors():
            self._tell_of_shortage()

    def _start_after_failure(self, slot: _Slot) -> None:
        assert slot.job is not None
        slot.failed_starts += 1
        reason = slot.job.exception() if slot.job.done() else RuntimeError("its executor's thread has ended")
        _shut_down(slot)
        said = self._hear_rest(slot)
        self._n_starting -= 1
        if slot.failed_starts < _START_ATTEMPTS:
            self._start_again(slot)
            return
        if self._n_executors() > 1 and (limits.is_limit(reason) or limits.is_limit(self._shortage)):
            slot.executor = slot.job = None
            self._shortage = reason if limits.is_limit(reason) else self._shortage
            self._n_starting += 1
            self._give_up_on(slot)
            return
        failure = WorkerStartFailed(
            f"worker {slot.number} ended {slot.failed_starts} times in a row before it could take work "
            f"(start method {self.start_method!r}): {reason!r}. What it printed says why; "
            "backend='inline' runs without workers."
        )
        if said:
            failure.add_note(b"".join(line.payload for line in said).decode(errors="replace").rstrip())
        raise failure from reason


def _received(connection: Channel) -> bytes:
    """Return the next message, empty where the other end is gone and all that it sent was received."""
    with suppress(OSError):
        try:
            return connection.receive()
        except ConnectionResetError:
            # It left a message of ours unread. Of packets the kernel tells that first, and then what it had sent.
            return connection.receive()
    return b""


def _close_all_of(descriptors: dict[int, int]) -> None:
    while descriptors:
        with suppress(OSError):
            os.close(descriptors.popitem()[0])


def _shut_down(slot: _Slot) -> None:
    """Shut a slot's executor down and wait for its process, which is killed if it takes long.

    The executor's own wait has no limit, and at interpreter exit no timer thread can be started to set one.
    """
    if slot.executor is not None:
        let_go(slot.executor)
    for process in processes_of(slot.start):
        if process is not slot.process:  # it was to join, or an interrupt ended its start
            _end(process)
    if slot.process is not None and not wait([slot.process.sentinel], _EXIT_SECONDS):
        _kill_tree(slot.pid)
        wait([slot.process.sentinel], _EXIT_SECONDS)
    # At interpreter exit `concurrent.futures` wakes its threads, and fails on one that is closing what it sleeps on.
    for thread in slot.threads + slot.leaving:
        thread.join(_EXIT_SECONDS)


def _end(process: BaseProcess) -> None:
    """Kill a process that may have ended long ago, and may be another one by now."""
    if process.pid is not None and not wait([process.sentinel], 0.0):
        _kill_tree(process.pid)
        wait([process.sentinel], _EXIT_SECONDS)


def _bury(slot: _Slot) -> None:
    """Shut down the executor of a worker that hung up; its exit code can be had after that.

    Only once the executor's thread has ended: it collects the exit code too, and under forkserver whoever reads it
    second gets 255. The thread waits for the process, so that is dead before it is waited for.
    """
    assert slot.executor is not None
    assert slot.job is not None
    if slot.process is not None and (slot.job.done() or not wait([slot.process.sentinel], _DEATH_SECONDS)):
        _kill_tree(slot.pid)  # it let go of the connection but lives, of no more use
    slot.executor.shutdown(wait=True, cancel_futures=True)


def _kill_tree(pid: int) -> None:
    _send(signal.SIGKILL, _tree(pid))


def _tree(pid: int) -> list[Any]:
    """Return a process and all that it started, and those did, as psutil has them; empty if it is gone."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _send(number: signal.Signals, processes: list[Any]) -> None:
    """Signal processes; psutil knows another one of the same pid from the one that is meant."""
    if processes:
        import psutil

        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def _has_ended(slot: _Slot) -> bool:
    """Tell whether a worker that has not joined never will: its job is over, or nobody is left to hand it out."""
    if slot.job is None:
        return False
    return slot.job.done() or not any(thread.is_alive() for thread in slot.threads)


def _start_failed(error: BaseException) -> WorkerStartFailed:
    return WorkerStartFailed(f"No worker can be started. {limits.why(error)}")


def _warn_of(refused: Sequence[str]) -> None:
    """Warn the caller of what a worker could not take over."""
    _warn(
        f"Workers could not take over from process {os.getpid()}: {'; '.join(refused)}. Tasks run with what the "
        "workers have. Set this before the first worker starts, or use start_method='spawn'."
    )


def _warn(message: str) -> None:
    """Warn the caller; where that would be an error, show it and go on."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        warnings.showwarning(message, RuntimeWarning, __file__, 1)


_live: weakref.WeakSet[ProcessBackend] = weakref.WeakSet()


def _close_all() -> None:
    """Close all that is open, at the end of the program; runs in other threads come to their end before."""
    for backend in list(_live):
        while backend in _live:
            try:
                backend.close()
            except KeyboardInterrupt:
                backend.give_up()
    if getattr(sys, "last_type", None) is KeyboardInterrupt:
        _remember_the_interrupt()


def _remember_the_interrupt() -> None:
    """Have a program that an interrupt ended exit as such, with SIGINT.

    CPython forgets it where text is evaluated meanwhile, as named tuples do that psutil makes when it is imported, and
    notes it where that ends by an interrupt.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    with suppress(KeyboardInterrupt):
        eval("interrupt()", {"interrupt": interrupt})  # noqa: S307


def _leave_all_to_parent() -> None:
    for backend in list(_live):
        backend.leave_to_parent()


at_exit(_close_all)
in_child(_leave_all_to_parent)
