"""The thread of a `ForgeExecutor`: it owns the workers and sends them the submitted jobs.

    submit, in any thread ──inbox──> PoolScheduler ──Batch──> Backend
    JobFuture <───────────────────────────┘ <──Reply, Joined, Lost──┘

An idle worker gets one batch of queued jobs, with some milliseconds of work. To keep submissions cheap, there is no
plan, no layers and no record of events.

PoolScheduler   the thread
JobTable        the open jobs and their outcomes
PoolSource      the jobs as work for slots, and their batches
SlotScheduler   the batches of each worker (`forgepar.engine.slots`)
"""

from __future__ import annotations

import itertools
import os
import threading
import weakref
from collections import deque
from collections.abc import Sequence

from forgepar.backends.base import Backend, Notice
from forgepar.backends.exit_hooks import at_exit, is_interrupted
from forgepar.backends.limits import why
from forgepar.backends.process import ProcessBackend  # noqa: F401  (see `at_exit` below)
from forgepar.backends.worker_board import mark
from forgepar.engine.console import Console
from forgepar.engine.slots import SlotScheduler
from forgepar.errors import WorkerStartFailed, WrongProcess, forget_frames
from forgepar.pool.batches import PoolSource
from forgepar.pool.errors import PoolBroken, PoolWorkerDied
from forgepar.pool.job_table import JobTable
from forgepar.pool.jobs import Job
from forgepar.scheduling.durations import Durations
from forgepar.scheduling.run_state import RecycleLimits
from forgepar.system.forking import in_child
from forgepar.values.arena import Arena
from forgepar.values.segments import Segment

_SHORT_SECONDS = 0.1  # a worker gets a second batch if its first is expected to take no longer than this
_NUMBER_LIMIT = 1 << 31  # messages contain job numbers as int32


class PoolScheduler:
    """Runs jobs on a backend, in its own thread.

    Args:
        backend: the workers.
        most_tasks: the number of jobs after which a worker is replaced; None for no limit.

    Attributes:
        backend: the workers.
        broken: why no more jobs can be run; None if they can.
        owner: id of the process that started the workers; 0 before that.
        is_foreign: whether this process is a forked child of the owner, and so has neither the thread nor workers.
    """

    def __init__(self, backend: Backend, most_tasks: int | None = None) -> None:
        self.backend = backend
        self.broken: PoolBroken | None = None
        self._most_tasks = most_tasks
        self._lock = threading.RLock()  # reentrant: garbage collection may call `close` while it is locked
        self._inbox: deque[Job] = deque()
        self._cancelled_jobs: deque[Job] = deque()
        self._kill_requests: deque[Job] = deque()
        self._doomed: list[Job] = []  # jobs to be killed that still need an outcome
        self._freed: deque[tuple[Segment, bool]] = deque()
        self._is_asleep = self._is_closing = self._is_over = False
        self._cancels = self._kills = False
        self.owner = 0
        self.is_foreign = False
        self._thread: threading.Thread | None = None
        self._numbers = itertools.count()

    def start(self, n_workers: int) -> Arena:
        """Open the backend with ``n_workers`` workers, and start the thread.

        Returns:
            The arena for large values.

        Raises:
            PoolBroken: a worker or the thread cannot be started.
            RuntimeError: the interpreter is shutting down.
        """
        self.owner = os.getpid()
        try:
            with self.backend.lock:  # at exit, another thread closes it
                return self._start(n_workers)
        except BaseException as error:
            if self._thread is not None:  # an interrupt came when it had perhaps started; it must not hold the backend
                self.close(kills=True)
            self.backend.close()
            self._thread = None
            _open_schedulers.discard(self)  # last: if an interrupt ends this, the end of the program continues
            if isinstance(error, WorkerStartFailed):
                forget_frames(error)  # the frames refer to the executor, which would never be collected
                self.broken = _broken_by(error)
                check_not_exiting()  # at exit, this is the reason, not the system
                raise _broken_by(error) from error
            raise

    def _start(self, n_workers: int) -> Arena:
        self.backend.open(n_workers)
        self._arena = self.backend.arena
        jobs = self._job_table = JobTable(self.backend, self._arena)
        self._slots = SlotScheduler(
            self.backend,
            jobs.deadlines,
            jobs.memory,
            Console(jobs, contained=BaseException),  # nothing in this thread catches what a log handler raises
            Durations(0),
            itertools.count(1).__next__,
            _SHORT_SECONDS,
            RecycleLimits(self._most_tasks),
        )
        self._source = PoolSource(self.backend, jobs, self._slots, n_workers)
        thread = threading.Thread(target=self._run, name="forgepar-executor")
        _open_schedulers.add(self)
        check_not_exiting()  # after `add`: so that either this check or `_finish_all` sees the other
        self._thread = thread
        try:
            thread.start()
        except RuntimeError as error:
            self._thread = None
            raise WorkerStartFailed(f"The executor's own thread cannot be started. {why(error)}") from error
        return self._arena

    # From other threads

    def new_number(self) -> int:
        """Return the number for a new job or value."""
        return next(self._numbers) % _NUMBER_LIMIT

    def put(self, job: Job) -> None:
        """Queue a job.

        Raises:
            PoolBroken: the executor cannot run any more jobs.
            RuntimeError: the executor was shut down.
        """
        with self._lock:
            self.check_open()
            self._inbox.append(job)
        self._wake()

    def check_owner(self) -> None:
        """Raise `WrongProcess` in a forked child of the process that started the workers."""
        if self.is_foreign:
            raise WrongProcess.here(self.owner)

    def check_open(self) -> None:
        """Raise if no more jobs are accepted."""
        self.check_owner()
        if self.broken is not None:
            # A new one each time: its traceback refers to the callers' frames.
            raise _broken_by(self.broken.__cause__ or self.broken)
        if self._is_closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def cancelled(self, job: Job) -> None:
        """Record that the future of a job was cancelled."""
        self._cancelled_jobs.append(job)
        self._wake()

    def request_kill(self, job: Job) -> None:
        """Request that a job is killed."""
        self._kill_requests.append(job)
        self._wake()

    def made(self, segment: Segment) -> None:
        """Record that a segment made by a worker contains a result."""
        self._source.made(segment)

    def release(self, segment: Segment, *, keep: bool) -> None:
        """Free a segment soon."""
        if not self._is_over:
            self._freed.append((segment, keep))
            self._wake()

    def close(self, *, cancels: bool = False, kills: bool = False) -> None:
        """Accept no more jobs, and end the thread when no job is open. Do not wait for that.

        Args:
            cancels: cancel the jobs that no worker has yet.
            kills: cancel these, and kill the running jobs.
        """
        if self.is_foreign:
            return
        with self._lock:
            self._is_closing = True
            self._cancels |= cancels or kills
            self._kills |= kills
        self._wake()

    def join(self) -> None:
        """Wait for the thread to end; return at once in the thread itself, where a callback may call this."""
        if self._thread is not None and self._thread is not threading.current_thread() and not self.is_foreign:
            self._thread.join()

    def leave_to_parent(self) -> None:
        """Mark the scheduler as foreign, in a forked child: the child does not have its thread."""
        _open_schedulers.discard(self)
        self.is_foreign = self._is_over = True
        self._is_asleep = False

    def _wake(self) -> None:
        if self._is_asleep:
            try:
                self._is_asleep = False
                self.backend.wake()
            except BaseException:  # an interrupt: the next call must wake it
                self._is_asleep = True
                raise

    # The loop

    @property
    def _is_done(self) -> bool:
        return self._is_closing and not self._inbox and not self._job_table.jobs

    def _run(self) -> None:
        with self.backend.lock:  # other threads close the backend only after this
            try:
                self._loop()
            except BaseException as error:
                self._break(error)
            finally:
                self._is_over = True
                self.backend.close()
                del self._slots.source  # they refer to each other
                _open_schedulers.discard(self)

    def _loop(self) -> None:
        slots = self._slots
        while True:
            self._take_in()
            self._job_table.retry_due()
            self._source.open()
            slots.hand_out()
            if not slots.deadlines.is_idle:
                slots.check_deadlines()
            if slots.memory.is_declared:
                slots.check_memory()
            slots.send_drops()
            if self._is_done:
                break
            self._take(self._wait())
        self._take(self.backend.wait(0.0))  # output that was printed before the last reply
        self._take(self.backend.rest())

    def _wait(self) -> list[Notice]:
        """Wait for notices, a deadline, or a wake-up by a thread that queued something."""
        patience = self._slots.patience()
        self._is_asleep = True  # before this check, so that a thread that queues something after it calls `wake`
        if self._inbox or self._cancelled_jobs or self._kill_requests or self._freed or self._cancels or self._is_done:
            patience = 0.0
        try:
            return self._slots.wait(patience)
        finally:
            self._is_asleep = False

    def _take(self, notices: Sequence[Notice]) -> None:
        self._slots.take(notices)
        self._slots.console.progress.clear()  # not used here

    def _take_in(self) -> None:
        while self._inbox:
            self._job_table.enter(self._inbox.popleft())
        while self._cancelled_jobs:
            self._job_table.cancelled(self._cancelled_jobs.popleft())
        if self._cancels:
            self._cancels = False
            if not self._kills:
                self._source.mark_next_running()
            self._job_table.cancel_all()
        if self._kills and not self._job_table.is_killed:
            self._kill_all()
        if self._kill_requests or self._doomed:
            self._kill_requested()
        while self._freed:
            segment, keep = self._freed.popleft()
            self._source.free(segment, keep=keep)

    def _kill_all(self) -> None:
        """Kill the workers that have jobs, and fail all other jobs, also those that wait for a retry."""
        self._job_table.is_killed = True
        self._slots.kill_all()
        held = self._held()
        for job in list(self._job_table.jobs.values()):
            if job.number not in held:
                self._job_table.kill(job)

    def _kill_requested(self) -> None:
        """End the jobs to be killed: kill their workers, or reclaim them from slots that have not begun them."""
        while self._kill_requests:
            job = self._kill_requests.popleft()
            job.is_to_be_killed = True
            self._doomed.append(job)
        held = self._held()
        for job in self._doomed:
            slot, at = held.get(job.number, (-1, 0))
            if job.is_over or slot in self._slots.deadlines.pending_kills:
                continue
            position = self.backend.position(slot) if slot >= 0 else 0
            if slot < 0:
                self._job_table.kill(job)
            elif at == position:
                error = PoolWorkerDied(
                    f"Job {self._job_table.name(job.number)!r} was killed with its worker, as kill() requested."
                )
                self._slots.kill(slot, job.number, error)
            elif at > position:  # else it has run, and its reply comes
                self._slots.stealing.claim(slot)
        self._doomed = [job for job in self._doomed if not job.is_over]

    def _held(self) -> dict[int, tuple[int, int]]:
        """Return slot and mark of each job that a slot has: it has no outcome, and was not reclaimed."""
        return {
            job.number: (slot, mark(flight.id, place))
            for slot, flights in enumerate(self._slots.flights)
            for flight in flights
            for place, job in enumerate(flight.tasks[flight.n_done : flight.n_own], flight.n_done)
        }

    def _break(self, error: BaseException) -> None:
        """Fail all jobs, because no more can be run."""
        broken = _broken_by(error)
        with self._lock:
            self.broken = broken
            jobs = [*self._job_table.jobs.values(), *self._inbox]
            self._inbox.clear()
        for job in jobs:
            self._job_table.give_up(job, broken)


def _broken_by(error: BaseException) -> PoolBroken:
    broken = PoolBroken(f"The executor cannot run any more jobs ({type(error).__name__}: {error}).")
    broken.__cause__ = error
    return broken


_open_schedulers: weakref.WeakSet[PoolScheduler] = weakref.WeakSet()
_is_exiting = False
_is_killing = False  # whether an interrupt came while jobs were waited for at exit, or ended the program


def check_not_exiting() -> None:
    """Raise `RuntimeError` if the interpreter is shutting down."""
    if _is_exiting:
        raise RuntimeError("cannot schedule new futures after interpreter shutdown")


def _finish_all() -> None:
    """Wait for all submitted jobs before the interpreter exits, as the standard library's executors do.

    If an interrupt ends the program, kill the running jobs.
    """
    global _is_exiting, _is_killing  # flags of the process
    _is_exiting = True
    _is_killing = _is_killing or is_interrupted()
    schedulers, kills = list(_open_schedulers), _is_killing
    for scheduler in schedulers:
        scheduler.close(kills=kills)
    try:
        for scheduler in schedulers:
            scheduler.join()
    except KeyboardInterrupt:
        _is_killing = True  # for the next call, if another interrupt ends this one
        for scheduler in schedulers:
            scheduler.close(kills=True)
        raise


def _leave_all_to_parent() -> None:
    for scheduler in list(_open_schedulers):
        scheduler.leave_to_parent()


at_exit(_finish_all)  # registered after that of `backends.open_backends`, and so called before it
in_child(_leave_all_to_parent)
