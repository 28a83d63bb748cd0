"""The slots of the process backend: each has one executor, the executor's process, its pipes and its connection."""

from __future__ import annotations

import os
import selectors
import signal
import threading
import time
from collections import deque
from concurrent.futures import Future
from concurrent.futures.process import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from typing import Any

from forgepar.backends import executor_internals
from forgepar.backends.base import OutputNotice
from forgepar.backends.messages import Channel
from forgepar.backends.output_capture import FrameReader, OutputRecord, make_pipes, read_pipe
from forgepar.backends.starting import processes_of
from forgepar.backends.worker_board import POSITION, Board
from forgepar.values.segments import Segment

EXIT_SECONDS = 2.0  # how long an idle worker may take to exit
_DEATH_SECONDS = 0.5  # how long a worker that closed its connection may take to end


@dataclass
class ProcessSlot:
    """One executor, its process and the connection to it; all but the number change with the worker."""

    number: int
    executor: ProcessPoolExecutor | None = None
    job: Future[None] | None = None
    process: BaseProcess | None = None
    connection: Channel | None = None
    integers: memoryview = field(default_factory=lambda: memoryview(bytearray(64)).cast("q"))
    times: memoryview[float] = field(default_factory=lambda: memoryview(bytearray(64)).cast("d"))
    doomed: list[Any] = field(default_factory=list)  # a worker that is being ended, and its children
    start: object = None  # the mark of the last start, see `begin_start`
    retry_at: float | None = None  # when to try to start a worker again
    threads: list[threading.Thread] = field(default_factory=list)  # the executor's
    leaving: list[threading.Thread] = field(default_factory=list)  # threads of earlier executors, see `renew`
    failed_starts: int = 0
    n_retries: int = 0
    n_given: int = 0
    reader: FrameReader = field(default_factory=FrameReader)
    pipes: dict[int, int] = field(default_factory=dict)  # index in `output_capture.PIPES` by descriptor
    outstanding: deque[Segment | None] = field(default_factory=deque)  # per batch, the segment that carries it

    @property
    def pid(self) -> int:
        return (self.process and self.process.pid) or 0

    def reset(self, board: Board) -> None:
        """Clear what belongs to the last worker, before another starts."""
        board.reset(self.number)
        self.integers, self.times = board.integers(self.number), board.floats(self.number)
        self.executor = self.job = self.connection = self.process = None
        self.doomed, self.threads = [], []
        self.n_given = 0
        self.outstanding.clear()

    # Output

    def open_pipes(self, folder: str, selector: selectors.BaseSelector) -> None:
        """Create and open the pipes of a new worker."""
        self.reader = FrameReader()
        self.pipes = {descriptor: pipe for pipe, descriptor in enumerate(make_pipes(folder, self.number))}
        for descriptor in self.pipes:
            selector.register(descriptor, selectors.EVENT_READ, self)

    def close_pipes(self, selector: selectors.BaseSelector) -> None:
        """Close all pipes."""
        for descriptor in list(self.pipes):
            self._close_pipe(descriptor, selector)

    def close_descriptors(self) -> None:
        """Close the connection and all pipes; a selector keeps them."""
        if self.connection is not None:
            self.connection.close()
        while self.pipes:
            with suppress(OSError):
                os.close(self.pipes.popitem()[0])

    def read_output(self, descriptor: int, selector: selectors.BaseSelector) -> OutputNotice | None:
        """Read one pipe; close it if the worker, and all processes that it started, have closed it."""
        data = read_pipe(descriptor)
        if data == b"":
            self._close_pipe(descriptor, selector)
        records = self.reader.feed(self.pipes[descriptor], data) if data else ()
        return OutputNotice(self.number, records, self.integers[POSITION]) if records else None

    def read_rest(self, selector: selectors.BaseSelector) -> list[OutputRecord]:
        """Read all that a worker that is gone has sent, and close the pipes."""
        records = list[OutputRecord]()
        for descriptor in list(self.pipes):
            while data := read_pipe(descriptor):
                records += self.reader.feed(self.pipes[descriptor], data)
        self.close_pipes(selector)
        return records + self.reader.rest()

    def _close_pipe(self, descriptor: int, selector: selectors.BaseSelector) -> None:
        with suppress(KeyError):  # the start failed before it was registered
            selector.unregister(descriptor)
        del self.pipes[descriptor]  # first: a child forked in between would close another file of this number
        os.close(descriptor)

    # The worker's end

    def has_ended(self) -> bool:
        """Return whether a worker that has not joined never will: its job is over, or no thread can send the job."""
        if self.job is None:
            return False
        return self.job.done() or not any(thread.is_alive() for thread in self.threads)

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal to the worker and all its child processes."""
        if self.pid:
            self.doomed += _process_tree(self.pid)  # once the worker is dead, its children cannot be found
            _send_signal(number, self.doomed)

    def shut_down(self, until: float = 0.0) -> None:
        """Shut the executor down and wait for its process until a time; kill the process if it still lives then.

        The executor's own wait has no limit, and at interpreter exit no timer thread can be started to set one.
        """
        if self.executor is not None:
            executor_internals.shut_down(self.executor)
        for process in processes_of(self.start):
            if process is not self.process:  # it has not joined yet, or an interrupt ended its start
                _end(process)
        left = max(0.0, until - time.perf_counter())
        if self.process is not None and not wait([self.process.sentinel], left):
            _kill_tree(self.pid)
            wait([self.process.sentinel], EXIT_SECONDS)
        # At interpreter exit `concurrent.futures` wakes its threads, and fails on one that is closing its wakeup pipe.
        for thread in self.threads + self.leaving:
            thread.join(EXIT_SECONDS)

    def wait_for_end(self) -> None:
        """Shut down the executor of a worker that closed its connection, so that its exit code can be read.

        The exit code can be read once the executor's thread has ended: that thread collects it too, and under
        forkserver the second reader gets 255. The thread waits for the process, so the process must be dead first.
        """
        assert self.executor is not None
        assert self.job is not None
        if self.process is not None and (self.job.done() or not wait([self.process.sentinel], _DEATH_SECONDS)):
            _kill_tree(self.pid)  # it closed the connection but lives
        self.executor.shutdown(wait=True, cancel_futures=True)
        _send_signal(signal.SIGKILL, self.doomed)

    def discard_start(self, selector: selectors.BaseSelector) -> None:
        """Remove what is left of a failed start."""
        for process in processes_of(self.start):
            process.kill()  # the executor has started it but does not watch it
            process.join()
        self.close_pipes(selector)
        if self.executor is not None:
            executor_internals.shut_down(self.executor)
        self.executor = self.job = None


def receive(connection: Channel) -> bytes:
    """Return the next message; empty if the other end is gone and all that it sent was received."""
    with suppress(OSError):
        try:
            return connection.receive()
        except ConnectionResetError:
            # The worker left a message unread. For packets, the kernel reports that before it delivers what was sent.
            return connection.receive()
    return b""


def _end(process: BaseProcess) -> None:
    """Kill a process if it is still running; its pid may belong to another process by now."""
    if process.pid is not None and not wait([process.sentinel], 0.0):
        _kill_tree(process.pid)
        wait([process.sentinel], EXIT_SECONDS)


def _kill_tree(pid: int) -> None:
    _send_signal(signal.SIGKILL, _process_tree(pid))


def _process_tree(pid: int) -> list[Any]:
    """Return a process and its descendants, as psutil's processes; empty if it is gone."""
    import psutil

    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return [process, *process.children(recursive=True)]
    return []


def _send_signal(number: signal.Signals, processes: list[Any]) -> None:
    """Send a signal to processes; psutil skips a process that got the pid of one that has ended."""
    if processes:
        import psutil

        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
