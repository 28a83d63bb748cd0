"""The open jobs of a `ForgeExecutor`: dependencies, readiness, outcomes and retries.

    enter ──> waits for its sources ──> ready ──> starts ──> complete, fail ──> over
                                          ↑                             │
                                          └─ tried again, put back  <───┘

All methods are called from one thread.
"""

from __future__ import annotations

import pickle
import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from forgepar.backends.base import Backend
from forgepar.backends.messages import Failure
from forgepar.engine.deadlines import Deadlines
from forgepar.engine.memory import Memory, MemoryMonitor
from forgepar.engine.worker_failures import raised
from forgepar.errors import InsufficientMemory, RemoteError, UnpicklableResult, add_note, is_system_error
from forgepar.pool.errors import PoolWorkerDied, exited, in_pool, unreadable, with_traceback
from forgepar.pool.jobs import Job, JobTemplate, ReadyJobs, outcome_of
from forgepar.scheduling.run_state import RunPolicy
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.values.exceptions import is_kind

_MOST_NAMES = 4096  # in each of two dicts of counts, about 1 MB together


class _ByTemplate:
    """Values of one option by template number; templates that are not in use have a default.

    Args:
        option: the name of the option.
        otherwise: the default.
    """

    def __init__(self, option: str, otherwise: Any) -> None:
        self._option = option
        self._otherwise = otherwise
        self._templates: weakref.WeakValueDictionary[int, JobTemplate] = weakref.WeakValueDictionary()

    def __getitem__(self, number: int) -> Any:
        job_template = self._templates.get(number)
        return self._otherwise if job_template is None else getattr(job_template.options, self._option)

    def __iter__(self) -> Iterator[Any]:
        return iter([getattr(job_template.options, self._option) for job_template in self._templates.values()])

    def add(self, job_template: JobTemplate) -> None:
        self._templates[job_template.number] = job_template


class _Ordinals:
    """Counts of jobs by name, for the names used most recently.

    A forgotten name continues after the highest forgotten count, so no two jobs have the same name and ordinal.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._earlier: dict[str, int] = {}  # names not used since `_counts` was last full
        self._forgotten = 0

    def next(self, name: str) -> int:
        """Return the ordinal of a new job."""
        ordinal = self._counts.get(name)
        if ordinal is None:
            ordinal = self._earlier.pop(name, self._forgotten)
            if len(self._counts) >= _MOST_NAMES:
                self._forgotten = max(self._forgotten, *self._earlier.values(), 0)
                self._earlier, self._counts = self._counts, {}
        self._counts[name] = ordinal + 1
        return ordinal


class JobTable:
    """The open jobs: a `TaskCatalog` that grows.

    Args:
        backend: the workers.
        arena: the shared memory for large values.

    Attributes:
        jobs: all open jobs, by number.
        ready: the jobs that can be handed out.
        deadlines: timeouts, pending kills, and delayed retries.
        memory: the memory that jobs may use.
        timeouts: in seconds, by template.
        memories: declared bytes, by template.
        is_killed: whether no more jobs are started.
    """

    def __init__(self, backend: Backend, arena: Arena) -> None:
        self.jobs: dict[int, Job] = {}
        self.ready = ReadyJobs()
        self.timeouts = _ByTemplate("timeout", None)
        self.memories = _ByTemplate("memory", 0)
        self.is_killed = False
        self._uncounted: dict[int, int] = {}  # by job, the attempts that do not count as retries
        self._arena = arena
        self._ordinals = _Ordinals()
        self.deadlines = Deadlines(self, RunPolicy(), backend)
        self.memory = Memory(self, backend, MemoryMonitor(), watches=backend.traits.ends_workers)

    def name(self, number: int) -> str:
        """Return a job's name, such as "square-3"."""
        job = self.jobs.get(number)
        return f"job-{number}" if job is None else f"{job.job_template.sent_callable.base}-{job.ordinal}"

    def spec(self, number: int) -> JobTemplate:
        """Return a job's template."""
        return self.jobs[number].job_template

    def needs(self) -> Iterator[tuple[str, int]]:
        """Yield nothing: the memory that a job declares is checked by `enter`."""
        return iter(())

    def enter(self, job: Job) -> None:
        """Add a job: it is ready, waits for its sources, or fails if a source failed."""
        job.ordinal = self._ordinals.next(job.job_template.sent_callable.base)
        self.jobs[job.number] = job
        if not self._check_limits(job):
            return
        for source in set(job.sources):
            if not source.done():
                source.dependents.append(job)
                job.n_waits += 1
                continue
            error, is_cancelled = outcome_of(source)
            if is_cancelled or error is not None:
                self.give_up(job, error)
                return
        if not job.n_waits:
            self.ready.add(job)

    def starts(self, job: Job) -> bool:
        """Mark a job as handed out and return True, or return False if it was cancelled."""
        if job.is_over:
            return False
        if not job.is_out:
            if not job.future.set_running_or_notify_cancel():
                dependents, job.future.dependents = job.future.dependents, []
                self._end(job)
                for dependent in dependents:
                    self.give_up(dependent, None)
                return False
            job.is_out = True
        return True

    def complete(self, job: Job, wire: Wire) -> bool:
        """Set the result of a job; return whether other jobs waited for it."""
        future = job.future
        dependents, future.dependents = future.dependents, []
        self._end(job)
        future.fulfil(wire, self._arena)
        for dependent in dependents:
            dependent.n_waits -= 1
            if not dependent.n_waits and not dependent.is_over:
                self.ready.add(dependent)
        return bool(dependents)

    def fail(self, job: Job, error: BaseException) -> None:
        """Record that an attempt failed: schedule the next one, or give up the job."""
        options = job.job_template.options
        tries = job.attempt - self._uncounted.get(job.number, 0)
        is_killed = self.is_killed or job.is_to_be_killed
        if tries <= options.retries and is_kind(error, options.retry_on) and not is_killed:
            self.deadlines.delay(job.number, tries, time.perf_counter())
            job.attempt += 1
            return
        self.give_up(job, error)

    def retry_due(self) -> None:
        """Make the jobs ready that have waited for their next attempt long enough."""
        for number in self.deadlines.due_retries():
            if (job := self.jobs.get(number)) is not None:  # else it was killed while it waited
                self.ready.add(job)

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Make jobs ready again that a worker did not start, before the jobs with higher numbers."""
        for job in reversed(jobs):
            if self.is_killed or job.is_to_be_killed:
                self.kill(job)
            else:
                self.ready.add(job)

    def repeated(self, job: Job) -> None:
        """Record a lost worker that may have started a job; the next attempt does not count as a retry."""
        job.attempt += 1
        self._uncounted[job.number] = self._uncounted.get(job.number, 0) + 1

    def give_up(self, job: Job, error: BaseException | None) -> None:
        """Fail a job, or cancel it if there is no error, and do the same with all jobs that wait for its value."""
        pending = [job]
        while pending:
            job = pending.pop()
            if job.is_over:
                continue
            future = job.future
            self._end(job)
            pending += future.dependents
            future.dependents = []
            if not job.is_out and error is None:
                future.cancel()
            if (job.is_out or future.set_running_or_notify_cancel()) and error is not None:
                future.set_exception(error)

    def kill(self, job: Job) -> None:
        """Fail a job that no worker has, as it was killed."""
        again = "again" if job.attempt > 1 else "at all"
        name = self.name(job.number)
        self.give_up(job, PoolWorkerDied(f"Job {name!r} was killed before a worker began it {again}."))

    def cancelled(self, job: Job) -> None:
        """Remove a job that was cancelled before it was handed out."""
        if job.future.cancelled():
            self.give_up(job, None)

    def cancel_all(self) -> None:
        """Cancel all jobs that were never handed out."""
        for job in [job for job in self.jobs.values() if not job.is_out]:
            job.future.cancel()
            self.cancelled(job)

    def _check_limits(self, job: Job) -> bool:
        """Register the timeout and the memory of a job's template; return whether this machine has that memory."""
        number, options = job.job_template.number, job.job_template.options
        if options.timeout is not None and self.timeouts[number] is None:
            self.timeouts.add(job.job_template)
            self.deadlines.grow(self)
        if options.memory is None or self.memories[number]:
            return True
        try:
            self.memory.check("job", self.name(job.number), options.memory)
        except InsufficientMemory as error:
            self.give_up(job, error)
            return False
        self.memories.add(job.job_template)
        self.memory.grow(self)
        return True

    def _end(self, job: Job) -> None:
        """Remove a job, and release its arguments."""
        job.is_over = True
        self.jobs.pop(job.number, None)
        if self._uncounted:
            self._uncounted.pop(job.number, None)
        job.future.job = None
        job.constants = job.sources = job.stored = ()


def raised_by_job(failure: Failure) -> BaseException:
    """Return the exception for a job's future: as `raised`, but `KeyboardInterrupt` and the like unchanged."""
    error = raised(failure)
    if failure.is_unread:
        if is_system_error(error):
            add_note(error, "raised while an argument was being unpickled in the worker")
            return with_traceback(error, failure.traceback)
        return unreadable(error)
    if failure.original is None:
        return with_traceback(in_pool(error) if isinstance(error, UnpicklableResult) else error, failure.traceback)
    original: BaseException | None = pickle.loads(failure.original[0])
    traceback = failure.original[1]
    if type(original) is SystemExit:
        return with_traceback(exited(original, str(error)), traceback)
    if original is None or isinstance(original, RemoteError):  # the original cannot be pickled
        original = error
    return with_traceback(original, traceback)
