"""How the process backend starts workers, tries again, and continues with fewer if the system does not allow more."""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures.process import ProcessPoolExecutor

from forgepar.backends import limits
from forgepar.backends.base import Joined
from forgepar.backends.executor_internals import start_thread
from forgepar.backends.messages import Hello, accept, unpack
from forgepar.backends.output_capture import OutputRecord
from forgepar.backends.process_slots import ProcessSlot, receive
from forgepar.backends.start_state import StartState
from forgepar.backends.starting import begin_start, context, make_ready, process_of, processes_of
from forgepar.backends.surroundings import here
from forgepar.backends.worker_board import Board
from forgepar.backends.worker_process import begin, serve
from forgepar.errors import WorkerStartFailed, forget_frames
from forgepar.machine import available_cpus
from forgepar.system.forking import holds, no_forks
from forgepar.values.arena import Arena
from forgepar.values.pickling import PickledCall

_START_ATTEMPTS = 3  # workers of one slot that may end before they join, in a row
_RETRIES = 10  # of a start that the system refused: another process that ends makes room
_RETRY_SECONDS = 0.05


class WorkerStarter:
    """Starts the workers of a backend's slots.

    Args:
        start_method: "forkserver", "spawn" or "fork".
        prepare: see `ProcessBackend`.
        gives_way: see `ProcessBackend`.

    Attributes:
        n_starting: slots with a worker that has started and not joined, or that is to be started again.
        shortage: the error of the last start that the system refused.
        caller: the native id of the thread that workers take their state from.
    """

    def __init__(self, start_method: str, prepare: PickledCall | None, gives_way: bool) -> None:
        self._start_method, self._prepare, self._gives_way = start_method, prepare, gives_way
        self._has_warned_of_refused = False
        self.n_starting = self.caller = 0

    def open(
        self,
        slots: Sequence[ProcessSlot],
        arena: Arena,
        board: Board,
        selector: selectors.BaseSelector,
        address: str,
    ) -> None:
        """Set the slots, and what their workers share."""
        self._slots, self._arena, self._board = slots, arena, board
        self._selector, self._address = selector, address
        self._n_wanted = self.n_starting = 0
        self._has_warned_of_shortage = False
        self.shortage: BaseException | None = None

    def n_executors(self) -> int:
        """Return the number of slots with a worker."""
        return sum(slot.executor is not None for slot in self._slots)

    def start_missing(self, n_wanted: int) -> None:
        """Start workers for those of the first slots that have none, until a start fails.

        Raises:
            WorkerStartFailed: no worker can be started.
        """
        self._n_wanted = max(self._n_wanted, min(n_wanted, len(self._slots)))
        n_retries = 0
        for slot in self._slots[:n_wanted]:
            while slot.executor is None and slot.retry_at is None and not self._start(slot):
                assert self.shortage is not None
                if self.n_executors():
                    if not limits.is_at_the_end(self.shortage):  # when the program ends, this is usual
                        self._warn_of_shortage()
                    return
                if n_retries == _RETRIES or not limits.is_limit(self.shortage):
                    raise start_failed(self.shortage) from self.shortage
                n_retries += 1
                time.sleep(_RETRY_SECONDS)  # another executor may be about to end

    def start_again(self, slot: ProcessSlot) -> None:
        """Start a worker in place of another; if the system refuses, try again soon."""
        if not self._start(slot):
            slot.retry_at = time.perf_counter() + _RETRY_SECONDS
            self.n_starting += 1

    def _start(self, slot: ProcessSlot) -> bool:
        """Start a slot's worker; it joins later.

        Returns:
            False if the system refuses; `shortage` is the reason, and nothing is left of the start.

        Raises:
            WorkerStartFailed: this is a signal handler that interrupts a start.
        """
        if holds(no_forks):
            raise WorkerStartFailed(
                "Workers cannot be started by a signal handler that interrupts the start of others. "
                "Have the handler only take a note, and do its work after the start."
            )
        try:
            with no_forks:  # a forked child would get half a worker, and locks of the standard library that are held
                slot.start = begin_start()
                self._launch(slot)
        except (OSError, EOFError, RuntimeError) as error:
            slot.discard_start(self._selector)
            forget_frames(error)
            self.shortage = error
            return False
        if slot.retry_at is None:
            self.n_starting += 1
        slot.retry_at, slot.n_retries = None, 0
        return True

    def _launch(self, slot: ProcessSlot) -> None:
        surroundings = here(is_strict=False)  # without a working directory, only jobs that need it fail
        slot.reset(self._board)
        limits.require_room(limits.PER_WORKER + limits.DURING_START + self.n_starting)  # these have yet to connect
        make_ready(self._start_method)
        for name in ("crash", "stack"):
            (self._arena.folder / f"{name}-{slot.number}").write_bytes(b"")
        slot.open_pipes(str(self._arena.folder), self._selector)
        threads = max(1, available_cpus() // len(self._slots))
        prepare: Callable[[], object] | None = self._prepare
        if self._prepare is not None and self._start_method == "fork":
            prepare = self._prepare.for_fork()
        initargs = (StartState.here(self.caller), threads, surroundings, prepare)
        mp_context = context(self._start_method)
        slot.executor = ProcessPoolExecutor(1, mp_context=mp_context, initializer=begin, initargs=initargs)
        start_thread(slot.executor)
        before = threading.enumerate()
        place = self._arena.place
        slot.job = slot.executor.submit(serve, self._address, slot.number, place, threads, self._gives_way)
        slot.threads = [
            thread
            for thread in threading.enumerate()
            if thread not in before and type(thread).__module__ == ProcessPoolExecutor.__module__
        ]

    def accept(self, listener: socket.socket) -> Joined | None:
        """Accept the connection of a worker; return None if the worker ended before it sent its first message."""
        try:
            connection = accept(listener)
        except OSError as error:
            if limits.make_room(limits.DURING_START) < limits.DURING_START:
                raise start_failed(error) from error
            return None  # there is room now, and the worker still waits
        message = receive(connection)
        if not message:
            connection.close()
            return None
        hello = unpack(message, Hello, self._arena)
        slot, process = self._slots[hello.slot], process_of(hello.pid)
        if process not in processes_of(slot.start):  # its start was considered failed
            connection.close()
            return None
        slot.connection, slot.process = connection, process
        slot.failed_starts = 0
        self.n_starting -= 1
        self._selector.register(connection, selectors.EVENT_READ, slot)
        if hello.refused and not self._has_warned_of_refused:
            self._has_warned_of_refused = True
            _warn(
                f"Workers could not take over from process {os.getpid()}: {'; '.join(hello.refused)}. Tasks run with "
                "the workers' own values. Set these before the first worker starts, or use start_method='spawn'."
            )
        return Joined(slot.number, hello.pid)

    def check(self) -> None:
        """Start again workers that ended before they joined or could not be started; give up after a few times."""
        now = time.perf_counter()
        for slot in self._slots:
            if slot.retry_at is not None:
                if now >= slot.retry_at:
                    self._retry(slot)
            elif slot.connection is None and slot.has_ended():
                self._start_after_failure(slot)

    def _retry(self, slot: ProcessSlot) -> None:
        """Try again to start a worker; after a few refusals, leave the slot empty."""
        if self._start(slot):
            return
        assert self.shortage is not None
        slot.n_retries += 1
        slot.retry_at = time.perf_counter() + _RETRY_SECONDS
        if slot.n_retries >= _RETRIES or not limits.is_limit(self.shortage):
            self._give_up_on(slot)

    def _give_up_on(self, slot: ProcessSlot) -> None:
        """Leave a slot empty; `ProcessBackend.wait` raises if all are."""
        slot.retry_at, slot.n_retries, slot.failed_starts = None, 0, 0
        self.n_starting -= 1
        if self.n_executors():
            self._warn_of_shortage()

    def _start_after_failure(self, slot: ProcessSlot) -> None:
        assert slot.job is not None
        slot.failed_starts += 1
        reason = slot.job.exception() if slot.job.done() else RuntimeError("its executor's thread has ended")
        slot.shut_down()
        records = slot.read_rest(self._selector)
        self.n_starting -= 1
        if slot.failed_starts < _START_ATTEMPTS:
            self.start_again(slot)
            return
        if self.n_executors() > 1 and (limits.is_limit(reason) or limits.is_limit(self.shortage)):
            slot.executor = slot.job = None
            self.shortage = reason if limits.is_limit(reason) else self.shortage
            self.n_starting += 1
            self._give_up_on(slot)
            return
        raise self._repeated_failure(slot, reason, records) from reason

    def _repeated_failure(
        self, slot: ProcessSlot, reason: BaseException | None, records: Sequence[OutputRecord]
    ) -> WorkerStartFailed:
        failure = WorkerStartFailed(
            f"worker {slot.number} ended {slot.failed_starts} times in a row before it could take work "
            f"(start method {self._start_method!r}): {reason!r}. Look at what it printed, or run without "
            "workers: backend='inline'."
        )
        if records:
            failure.add_note(b"".join(record.payload for record in records).decode(errors="replace").rstrip())
        return failure

    def _warn_of_shortage(self) -> None:
        """Warn once that there are fewer workers than requested."""
        assert self.shortage is not None
        if not self._has_warned_of_shortage:
            self._has_warned_of_shortage = True
            _warn(
                f"Tasks run on {self.n_executors()} of {self._n_wanted} workers, as no more can be started. "
                f"{limits.why(self.shortage)}"
            )


def start_failed(error: BaseException) -> WorkerStartFailed:
    """Return the exception for a start that failed with an error."""
    return WorkerStartFailed(f"No worker can be started. {limits.why(error)}")


def _warn(message: str) -> None:
    """Warn the caller; if filters turn the warning into an error, only show it."""
    try:
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    except RuntimeWarning:
        warnings.showwarning(message, RuntimeWarning, __file__, 1)
