"""The thread of a `ForgeExecutor`: it owns the workers, and feeds them what was submitted.

    submit, in any thread ──inbox──> Feeder ──Batch──> Backend
    JobFuture <────────────────────────┘ <──Reply, Joined, Lost──┘

What is queued when a worker is free goes to it in one batch, as much as takes some milliseconds. It is the dispatcher
of jobs that nobody has declared before: without plan, layers or records, so that a submission costs little.

Feeder   the thread
Roll     the jobs, and what comes of each
Supply   what goes to which worker
"""

from __future__ import annotations

import itertools
import math
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from typing import cast

from forgepar.backends.base import Backend, Joined, Lost, Notice, Told
from forgepar.backends.board import unmark
from forgepar.backends.limits import why
from forgepar.backends.output import UNKNOWN_TASK
from forgepar.backends.starting import at_exit
from forgepar.backends.wire import Reply
from forgepar.console import Console
from forgepar.errors import WorkerStartFailed, WrongProcess, forget_frames
from forgepar.faults import raised_by_job, worker_died
from forgepar.flight import own_part
from forgepar.forking import in_child
from forgepar.jobs import Job
from forgepar.plan import Plan
from forgepar.poolerrors import PoolBroken, PoolWorkerDied, in_pool
from forgepar.roll import Roll
from forgepar.supply import JobFlight, Supply
from forgepar.values.arena import Arena
from forgepar.values.codec import is_segment
from forgepar.values.segment import Segment, names_of
from forgepar.watch import Sentence

_MOST_NUMBER = 1 << 31  # a message holds numbers of tasks as int32


class Feeder:
    """Runs jobs on a backend, in a thread of its own.

    Args:
        backend: the workers.
        most_tasks: how many jobs a worker gets before it is replaced; None: any number.

    Attributes:
        backend: the workers.
        broken: why nothing more can be run; None while all is well.
        owner: the process whose workers these are, once there are any.
        is_foreign: whether this process was forked from that one, and so has no such thread and workers.
    """

    def __init__(self, backend: Backend, most_tasks: int | None = None) -> None:
        self.backend = backend
        self.broken: PoolBroken | None = None
        self._most_tasks = most_tasks
        self._lock = threading.RLock()  # an executor may be collected, and so closed, wherever this is held
        self._inbox: deque[Job] = deque()
        self._called_off: deque[Job] = deque()
        self._condemned: deque[Job] = deque()
        self._freed: deque[tuple[Segment, bool]] = deque()
        self._results: dict[str, Segment] = {}  # those in segments that workers made, by the segment's name
        self._is_asleep = self._is_closing = self._is_over = False
        self._cancels = self._kills = False
        self.owner = 0
        self.is_foreign = False
        self._thread: threading.Thread | None = None
        self._numbers = itertools.count()

    def start(self, n_workers: int) -> Arena:
        """Open the backend, with so many workers, and start the thread; return where large values go.

        Raises:
            PoolBroken: the system lets this process have no worker, or no thread.
        """
        self.owner = os.getpid()
        try:
            return self._start(n_workers)
        except BaseException as error:
            self._thread = None
            _live.discard(self)
            self.backend.close()
            if isinstance(error, WorkerStartFailed):
                forget_frames(error)  # they have the executor, which would never be collected
                self.broken = _broken_by(error)
                raise _broken_by(error) from error
            raise

    def _start(self, n_workers: int) -> Arena:
        self.backend.open(n_workers)
        self._arena = self.backend.arena
        self._roll = Roll(self.backend, self._arena)
        self._supply = Supply(self.backend, self._roll, n_workers, self._most_tasks)
        self._watch, self._memory, self._claims = self._roll.watch, self._roll.memory, self._supply.claims
        self._flights, self._pids = self._supply.flights, self._supply.pids
        self._peaks = [0] * self.backend.n_slots
        # As far as it looks at a plan. In this thread, nobody waits for what a handler raises.
        self._console = Console(cast("Plan", self._roll), contained=BaseException)
        self._thread = threading.Thread(target=self._live, name="forgepar-executor")
        _live.add(self)
        try:
            self._thread.start()
        except RuntimeError as error:
            raise WorkerStartFailed(f"The executor's own thread cannot be started. {why(error)}") from error
        return self._arena

    # From other threads

    def new_number(self) -> int:
        """Return a number for a job or value."""
        return next(self._numbers) % _MOST_NUMBER

    def put(self, job: Job) -> None:
        """Take in a job.

        Raises:
            PoolBroken: nothing more can be run.
            RuntimeError: the executor was shut down.
        """
        with self._lock:
            self.check_open()
            self._inbox.append(job)
        self._nudge()

    def check_owner(self) -> None:
        """Raise `WrongProcess` where the workers are those of another process."""
        if self.is_foreign:
            raise WrongProcess.here(self.owner)

    def check_open(self) -> None:
        """Raise where no more jobs are taken."""
        self.check_owner()
        if self.broken is not None:
            raise _broken_by(self.broken.__cause__ or self.broken)  # another each time: one has its callers' frames
        if self._is_closing:
            raise RuntimeError("cannot schedule new futures after shutdown")

    def cancelled(self, job: Job) -> None:
        """Note that the future of a job was cancelled."""
        self._called_off.append(job)
        self._nudge()

    def condemned(self, job: Job) -> None:
        """Note that a job is to be ended."""
        self._condemned.append(job)
        self._nudge()

    def made(self, segment: Segment) -> None:
        """Note that a segment that a worker made holds a result."""
        self._results[str(segment[0])] = segment

    def release(self, segment: Segment, *, keep: bool) -> None:
        """Free a segment soon."""
        if not self._is_over:
            self._freed.append((segment, keep))
            self._nudge()

    def close(self, *, cancels: bool = False, kills: bool = False) -> None:
        """Take no more jobs, and end when those there are have ended; or, but for those that run, are cancelled.

        Args:
            cancels: cancel what no worker has yet.
            kills: end what runs, too.
        """
        if self.is_foreign:
            return
        with self._lock:
            self._is_closing = True
            self._cancels |= cancels or kills
            self._kills |= kills
        self._nudge()

    def join(self) -> None:
        """Wait for the end; not in the thread itself, where a callback may call this."""
        if self._thread is not None and self._thread is not threading.current_thread() and not self.is_foreign:
            self._thread.join()

    def leave_to_parent(self) -> None:
        """In a forked child, keep nothing for a thread that is not there."""
        _live.discard(self)
        self.is_foreign = self._is_over = True
        self._is_asleep = False

    def _nudge(self) -> None:
        if self._is_asleep:
            self._is_asleep = False
            self.backend.wake()

    # The loop

    @property
    def _is_done(self) -> bool:
        return self._is_closing and not self._inbox and not self._roll.jobs

    def _live(self) -> None:
        with getattr(self.backend, "lock", nullcontext()):  # who closes the backend waits for that
            try:
                self._loop()
            except BaseException as error:
                self._break(error)
            finally:
                self._is_over = True
                self.backend.close()
                _live.discard(self)

    def _loop(self) -> None:
        while True:
            self._take_in()
            self._put_back_due()
            self._supply.fill()
            if not self._watch.is_idle:
                self._obey_the_clock()
            if self._memory.is_declared:
                self._end_what_exceeds()
            self._supply.tell_what_to_drop()
            if self._is_done:
                break
            self._take(self._wait())
        self._take(self.backend.wait(0.0))  # what was printed before the last reply
        self._hear(self.backend.rest())

    def _put_back_due(self) -> None:
        """Make ready what has waited long enough for its next attempt, and what slots are not to begin after all.

        Not in the loop itself: what its variables refer to would live on while it sleeps.
        """
        self._roll.retry_due()
        for flight, first, end in self._claims.step(is_wanted=self._roll.ready.head() is None):
            self._put_back(cast("JobFlight", flight), first, end)

    def _wait(self) -> list[Notice]:
        """Sleep until there is something to do. Who puts something in a box looks whether this sleeps after that."""
        patience = self._patience()
        self._is_asleep = True
        if self._inbox or self._called_off or self._condemned or self._freed or self._cancels or self._is_done:
            patience = 0.0
        began = time.perf_counter()
        try:
            return self.backend.wait(patience)
        finally:
            self._is_asleep = False
            if not self._watch.is_idle:
                firsts = [has[0] if has else None for has in self._flights]
                self._watch.slept(patience, began, time.perf_counter(), firsts)

    def _patience(self) -> float | None:
        patience = self._claims.patience(is_over=False)
        next_look = self._memory.next_look(self._flights)
        if self._supply.is_paused:
            next_look = min(next_look, self._memory.guard.look_at)
        if not self._watch.is_idle:
            next_look = min(next_look, self._watch.next_look())
        if next_look == math.inf:
            return patience
        left = self._watch.patience(next_look, time.perf_counter())
        return left if patience is None else min(left, patience)

    def _take_in(self) -> None:
        while self._inbox:
            self._roll.enter(self._inbox.popleft())
        while self._called_off:
            self._roll.cancelled(self._called_off.popleft())
        if self._cancels:
            self._cancels = False
            if not self._kills:
                self._supply.commit()
            self._roll.cancel_all()
        if self._kills and not self._roll.is_killed:
            self._roll.is_killed = True
            for slot, has in enumerate(self._flights):
                if has:
                    self.backend.kill(slot)
        if self._condemned:
            self._condemn()
        while self._freed:
            segment, keep = self._freed.popleft()
            self._results.pop(str(segment[0]), None)
            self._arena.free(segment, keep=keep)
            self._supply.freed(segment)

    def _condemn(self) -> None:
        """End jobs, with their workers where these are at them."""
        while self._condemned:
            self._condemned.popleft().is_condemned = True
        for slot in range(len(self._flights)):
            job = self._job_at(slot, self.backend.position(slot))
            if job is not None and job.is_condemned and slot not in self._watch.sentences:
                error = PoolWorkerDied(
                    f"job {self._roll.name(job.number)!r} was ended with its worker, as was asked for"
                )
                self._watch.sentences[slot] = Sentence(job.number, error, math.inf)
                self.backend.kill(slot)

    # Outcomes

    def _take(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            if type(notice) is Reply:
                self._take_reply(notice)
            elif type(notice) is Joined:
                self._pids[notice.slot] = notice.pid
            elif type(notice) is Lost:
                self._take_loss(notice)
            elif type(notice) is Told:
                self._hear([notice])

    def _hear(self, told: Sequence[Told]) -> None:
        for notice in told:
            at = self._job_at(notice.slot, notice.position)
            self._console.hear(notice.slot, notice.said, UNKNOWN_TASK if at is None else at.number)
        self._console.progress.clear()  # nobody asks for it

    def _take_reply(self, reply: Reply) -> None:
        slot = reply.slot
        if not self._flights[slot] or self._flights[slot][0].id != reply.batch:
            return  # the slot was given up meanwhile, and what it had handed out again
        flight = self._flights[slot][0]
        if reply.first != flight.n_done or reply.first + len(reply.values) > flight.n_own:
            reply = self._own_part(flight, reply)
        jobs = flight.jobs[reply.first : reply.first + len(reply.values)]
        if jobs:
            marks = memoryview(reply.marks).cast("d")
            self._supply.observe(jobs, marks[-1] - marks[0])
            flight.n_done += len(jobs)
        self._peaks[slot] = reply.peak_rss or self._peaks[slot]
        if reply.ended:
            self._flights[slot].popleft()
            if flight.n_done < flight.n_own:
                self._put_back(flight, flight.n_done, flight.n_own)
            if not self._flights[slot] and self._claims.is_limited(slot):
                self._claims.lift(slot)
        if self._flights[slot]:
            self._flights[slot][0].since = time.perf_counter()
        self._settle(slot, jobs, reply)

    def _own_part(self, flight: JobFlight, reply: Reply) -> Reply:
        """Return what of a reply counts, and free what does not."""
        part, left_out = own_part(flight, reply)
        others = dict(reply.subflows)
        for place in left_out:
            for wire in filter(is_segment, (reply.values[place], others.get(place))):
                self._arena.free(wire)
        return part

    def _settle(self, slot: int, jobs: Sequence[Job], reply: Reply) -> None:
        """Let jobs be done, or fail, as a reply says."""
        n_good = len(jobs) - (reply.failure is not None)
        others = dict(reply.subflows)
        for place, job in enumerate(jobs[:n_good]):
            wire, number = reply.values[place], job.number
            if place not in others:
                self._supply.made(slot, number, wire, is_taken=self._roll.complete(job, wire))
                continue
            self._roll.fail(job, TypeError(f"{self._roll.name(number)!r} returned a Subflow, which is for workflows"))
            if is_segment(others[place]):
                self._arena.free(others[place])
        if reply.failure is not None:
            self._roll.fail(jobs[-1], raised_by_job(reply.failure))

    def _put_back(self, flight: JobFlight, first: int, end: int) -> None:
        self._roll.put_back(flight.jobs[first:end])

    # Loss

    def _take_loss(self, lost: Lost) -> None:
        """Blame the job that a dead worker was at; hand out the rest of what it had again."""
        slot, flights = lost.slot, list(self._flights[lost.slot])
        self._flights[slot].clear()
        self._supply.forget(slot)
        sentence = self._watch.sentences.pop(slot, None)
        at_batch, at = unmark(lost.position)
        blamed: Job | None = None
        for flight in flights:
            first = flight.n_done
            if flight.id == at_batch:
                if first < (ended := min(at, flight.n_own)):  # and the worker had not told of these
                    self._roll.repeated(flight.jobs[first:ended])
                    self._put_back(flight, first, ended)
                    first = ended
                if first == at < flight.n_own:
                    blamed = flight.jobs[at]
                    first += 1
            self._put_back(flight, first, flight.n_own)
        self._claims.lift(slot)
        # What it had begun to write, and told nobody of, is nobody's.
        named = (names_of(segment) for segment in self._results.values())
        self._arena.free_strays(lost.pid, frozenset(name for names in named for name in names))
        if blamed is not None:
            self._blame(blamed, lost, sentence)
        self._pids[slot] = self._peaks[slot] = 0

    def _blame(self, job: Job, lost: Lost, sentence: Sentence | None) -> None:
        if sentence is not None and sentence.task == job.number:
            give_up = self._roll.give_up if job.is_condemned else self._roll.fail
            give_up(job, sentence.error)
        elif sentence is not None:  # begun just after the one meant had ended
            self._roll.repeated([job])
            self._roll.put_back([job])
        else:
            error = worker_died(lost, self._roll.name(job.number), self._peaks[lost.slot])
            if told := self._console.last_errors(lost.slot, job.number):
                error.add_note("the last that it wrote to stderr:\n" + told)
            self._roll.fail(job, in_pool(error))

    def _break(self, error: BaseException) -> None:
        """Let all jobs fail, as nothing more can be run."""
        broken = _broken_by(error)
        with self._lock:
            self.broken = broken
            jobs = [*self._roll.jobs.values(), *self._inbox]
            self._inbox.clear()
        for job in jobs:
            self._roll.give_up(job, broken)

    # By the clock

    def _obey_the_clock(self) -> None:
        watch, now = self._watch, time.perf_counter()
        for slot, number in watch.overdue([has[0] if has else None for has in self._flights], now):
            stack = self.backend.where([slot]).get(slot, "")
            error = watch.condemn(slot, number, now)
            if stack:
                error.add_note("where it was, innermost call first:\n" + stack)
            self.backend.terminate(slot)
        for slot in watch.due_kills(now):
            self.backend.kill(slot)

    def _end_what_exceeds(self) -> None:
        for slot, number, error in self._memory.exceeding(self._flights, self._pids, time.perf_counter()):
            if slot not in self._watch.sentences:
                self._watch.sentences[slot] = Sentence(number, error, math.inf)
                self.backend.kill(slot)

    def _job_at(self, slot: int, position: int) -> Job | None:
        batch, at = unmark(position)
        for flight in self._flights[slot]:
            if flight.id == batch:
                return flight.jobs[at]
        return None


def _broken_by(error: BaseException) -> PoolBroken:
    broken = PoolBroken(f"the executor can run nothing more ({type(error).__name__}: {error})")
    broken.__cause__ = error
    return broken


_live: weakref.WeakSet[Feeder] = weakref.WeakSet()
_is_over = False


def is_over() -> bool:
    """Tell whether the interpreter is on its way out, so that nothing new may begin."""
    return _is_over


def _finish_all() -> None:
    """Let what was submitted come to its end before the interpreter does, as the standard library's executors do."""
    global _is_over  # there is one interpreter
    _is_over = True
    feeders = list(_live)
    for feeder in feeders:
        feeder.close()
    try:
        for feeder in feeders:
            feeder.join()
    except KeyboardInterrupt:
        for feeder in feeders:
            feeder.close(kills=True)
        raise


def _leave_all_to_parent() -> None:
    for feeder in list(_live):
        feeder.leave_to_parent()


at_exit(_finish_all)  # after that of `backends.process`, which closes all workers, and so called before it
in_child(_leave_all_to_parent)
