"""Jobs of a `ForgeExecutor`: the jobs, their templates and futures, and the queue of those that are ready.

submit ──> Submissions.job ──> Job ──> ReadyJobs ──batch──> worker ──reply──> JobFuture
                            ↑                                            │
                            └────────── a job that depends on it  <─────┘
"""

from __future__ import annotations

import heapq
import logging
import pickle
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from forgepar.backends.surroundings import PackedSurroundings
from forgepar.errors import add_note, is_system_error, text_of
from forgepar.pool.errors import PoolUnreadable
from forgepar.system.forking import fork_safe
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment
from forgepar.values.module_state import StatePart as ModulePart
from forgepar.values.pickling import loads_own
from forgepar.values.segments import Segment
from forgepar.workflow.arguments import ArgumentLayout
from forgepar.workflow.tasks import Options, base_name

if TYPE_CHECKING:
    from typing_extensions import TypeVar  # with a default: "JobFuture" means "JobFuture[Any]"

    R = TypeVar("R", default=Any)
else:
    from typing import TypeVar

    R = TypeVar("R")


class JobRunner(Protocol):
    """What a future needs of the object that runs its job.

    Attributes:
        is_foreign: whether this process is a forked child, and the jobs run for its parent.
    """

    is_foreign: bool

    def cancelled(self, job: Job) -> None:
        """Record that the future of a job was cancelled. May be called from any thread."""

    def request_kill(self, job: Job) -> None:
        """Request that a job is killed. May be called from any thread."""

    def made(self, segment: Segment) -> None:
        """Record that a segment made by a worker contains a result. Called from the thread that receives replies."""

    def release(self, segment: Segment, *, keep: bool) -> None:
        """Free a segment soon. May be called from any thread, and from finalizers at any point."""

    def check_owner(self) -> None:
        """Raise `WrongProcess` if `is_foreign`."""


class Stored:
    """A reference to a segment, which is freed when this object is collected.

    Args:
        owner: frees the segment.
        segment: the segment.
        keep: whether the segment may be reused for another value: not if this process has it mapped.
    """

    __slots__ = ("_keep", "_owner", "segment")

    def __init__(self, owner: JobRunner, segment: Segment, *, keep: bool) -> None:
        self._owner = owner
        self.segment = segment
        self._keep = keep

    def __del__(self) -> None:
        self._owner.release(self.segment, keep=self._keep)


class _Placeholder:
    """The type of placeholders for values."""


_LOGGER = logging.getLogger("concurrent.futures")  # where `Future` logs what callbacks raise
_NOT_LOADED: Any = _Placeholder()  # instead of a result that is still pickled
_DONE = ("FINISHED", "CANCELLED", "CANCELLED_AND_NOTIFIED")  # states of `concurrent.futures`
NOT_KEPT = _Placeholder()  # instead of the pickled form of a value, if that was discarded
_load_lock = fork_safe(threading.RLock())


class JobFuture(Future[R]):
    """The future of a job. The first thread that asks for the value unpickles it.

    As an argument of another job of the same executor, the future stands for its value.

    Attributes:
        copies: whether arrays in the value are writable copies instead of read-only views of shared memory.
    """

    def __init__(self, owner: JobRunner, number: int) -> None:
        super().__init__()
        self.owner = owner
        self.number = number
        self.copies = False
        self.job: Job | None = None
        self.dependents: list[Job] = []  # jobs that wait for the value
        self.wire: Wire = None  # the value as it was sent
        self.parts: Sequence[ModulePart] = ()  # module state of the caller that the value may refer to
        self._stored: Stored | None = None
        self._parts: Sequence[Any] = ()
        self._value: Any = None
        self._unreadable: BaseException | None = None

    def cancel(self) -> bool:
        """Cancel the job unless it was handed to a worker; return whether it is cancelled."""
        if self.owner.is_foreign:
            self._check_process()
        job = self.job
        if not super().cancel():
            return False
        if job is not None:
            self.owner.cancelled(job)
        return True

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Call a function with this future when it is done; see `concurrent.futures.Future.add_done_callback`.

        Exceptions of the function in the executor's thread are logged, `BaseException` included: a callback that asks
        for the result of a job that raised `KeyboardInterrupt` must not end that thread.
        """
        super().add_done_callback(fn if self.done() else partial(_call_shielded, fn))

    def kill(self) -> None:
        """Cancel the job, or kill its worker if it has one. The future shows the outcome later."""
        job = self.job
        if job is not None and not self.cancel():
            self.owner.request_kill(job)

    def result(self, timeout: float | None = None) -> R:
        """Wait for the value; see `concurrent.futures.Future.result`."""
        if self.owner.is_foreign:
            self._check_process()
        value = super().result(timeout)
        if value is _NOT_LOADED:
            self._load()
            if self._unreadable is not None:
                raise self._unreadable
            value = self._value
        return value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the job, and return its exception, or None if it succeeded."""
        if self.owner.is_foreign:
            self._check_process()
        error = super().exception(timeout)
        if error is None and super().result() is _NOT_LOADED:
            self._load()
            return self._unreadable
        return error

    def fulfil(self, wire: Wire, arena: Arena) -> None:
        """Set the result to a value as a worker sent it."""
        self.wire = wire
        if type(wire) is not tuple:
            self.set_result(wire)
            return
        if is_segment(wire):
            try:
                self._parts = arena.read(wire)  # mapped now: the arena may be closed before the value is used
            except OSError as error:
                add_note(error, "raised while the job's result was being read from shared memory")
                self.set_exception(error)
                return
            self._stored = Stored(self.owner, wire, keep=False)
            self.owner.made(wire)
        else:
            self._parts = wire
        self.set_result(_NOT_LOADED)

    def fulfil_with(self, value: Any, wire: Wire) -> None:
        """Set the result to a value of this process, and its pickled form for other jobs."""
        self.wire = wire
        if is_segment(wire):
            self._stored = Stored(self.owner, wire, keep=True)
        self.set_running_or_notify_cancel()
        self.set_result(value)

    def _check_process(self) -> None:
        """In a forked child, raise unless the future is done: no thread of the child would complete it."""
        if self._state not in _DONE:
            self.owner.check_owner()
        self._condition = threading.Condition()  # another thread may have locked the parent's at the fork

    def _load(self) -> None:
        with _load_lock:
            if self._parts:
                parts, self._parts = self._parts, ()
                try:
                    stream, *buffers = parts
                    own = self.copies
                    self._value = loads_own(stream, buffers) if own else pickle.loads(stream, buffers=buffers)
                except BaseException as error:  # SystemExit too: unpickling data may raise it
                    if is_system_error(error):
                        add_note(error, "raised while the job's result was being unpickled")
                        self._unreadable = error
                        return
                    self._unreadable = PoolUnreadable(
                        f"The job's result cannot be unpickled here ({type(error).__name__}: {text_of(error)}). "
                        "Return plain data, or objects of modules that this process can import."
                    )
                    self._unreadable.__cause__ = error
                if not is_segment(self.wire):
                    self.wire = NOT_KEPT  # seldom needed again, and the value can be pickled again


def _call_shielded(fn: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    try:
        fn(future)
    except Exception:
        raise  # `Future` logs it
    except BaseException:
        _LOGGER.exception("exception calling callback for %r", future)


class CallerState(NamedTuple):
    """The module state of the caller that a callable refers to, as it was when the callable was pickled.

    Attributes:
        reached: all names in importable modules that the callable refers to, directly or indirectly.
        parts: those names whose values must be sent.
        keys: for the script's globals pickled with the callable, keys that change when the globals change.
    """

    reached: tuple[ModulePart, ...] = ()
    parts: tuple[ModulePart, ...] = ()
    keys: tuple[tuple[tuple[str, str], Any], ...] = ()


class SentCallable:
    """A pickled callable.

    Attributes:
        number: the number by which workers know it.
        pickled: the pickle.
        options: the options of its task.
        base: the base name of its jobs.
        state: the module state that it refers to.
        kind: module and qualified name; callables with the same ones share a measured duration.
    """

    __slots__ = ("base", "job_templates", "kind", "number", "options", "pickled", "state")

    def __init__(
        self, number: int, fn: Callable[..., Any], pickled: bytes, options: Options, state: CallerState
    ) -> None:
        self.number = number
        self.state = state
        self.pickled = pickled
        self.options = options
        self.base = options.name or base_name(fn)
        self.kind = (getattr(fn, "__module__", ""), getattr(fn, "__qualname__", self.base))
        self.job_templates: dict[Any, JobTemplate] = {}


class JobTemplate:
    """What jobs with the same callable, argument layout and surroundings share.

    Attributes:
        number: the number by which workers know it.
        sent_callable: the callable.
        layout: which arguments are constants and which are futures.
        surroundings: the environment, working directory and so on of the caller when it submitted the jobs.
        parts: the state of importable modules that the callable and the arguments refer to.
    """

    __slots__ = ("__weakref__", "layout", "number", "options", "parts", "sent_callable", "surroundings")

    def __init__(
        self,
        number: int,
        sent_callable: SentCallable,
        layout: ArgumentLayout,
        surroundings: PackedSurroundings,
        parts: Sequence[ModulePart] = (),
    ) -> None:
        self.number = number
        self.sent_callable = sent_callable
        self.layout = layout
        self.surroundings = surroundings
        self.parts = parts
        self.options = sent_callable.options


class Job:
    """One submission.

    Attributes:
        number: its number within the executor, in the order of submission.
        ordinal: its number among the jobs with the same base name.
        constants: pickled arguments.
        sources: the futures among the arguments, in the order of the arguments.
        stored: segments of arguments, kept until the job is over.
        n_waits: the number of sources that are not done.
        attempt: the number of the current attempt, from 1.
        is_out: whether the job was ever handed to a worker.
        is_over: whether the job is done, failed or cancelled.
        is_to_be_killed: whether a kill of the job was requested.
    """

    __slots__ = (
        "attempt",
        "constants",
        "future",
        "is_out",
        "is_over",
        "is_to_be_killed",
        "job_template",
        "n_waits",
        "number",
        "ordinal",
        "sources",
        "stored",
    )

    def __init__(
        self,
        future: JobFuture,
        job_template: JobTemplate,
        constants: Sequence[Wire],
        sources: Sequence[JobFuture],
        stored: Sequence[Stored],
    ) -> None:
        self.future = future
        self.job_template = job_template
        self.constants = constants
        self.sources = sources
        self.stored = stored
        self.number = future.number
        self.ordinal = -1
        self.n_waits = 0
        self.attempt = 1
        self.is_out = self.is_over = self.is_to_be_killed = False

    def __int__(self) -> int:
        return self.number


class ReadyJobs:
    """A queue of ready jobs in the order of their numbers, except that jobs of one template are taken together."""

    def __init__(self) -> None:
        self._queues: dict[JobTemplate, deque[Job]] = {}
        self._heap: list[tuple[int, int, JobTemplate]] = []
        self._parked: list[JobTemplate] = []
        self._n_jobs = 0

    def __len__(self) -> int:
        return self._n_jobs

    def add(self, job: Job) -> None:
        """Add a job."""
        queue = self._queues.get(job.job_template)
        if queue is None:
            queue = self._queues[job.job_template] = deque()
        if queue and job.number < queue[0].number:
            queue.appendleft(job)
            self._push(job.job_template, queue)
        else:
            queue.append(job)
            if len(queue) == 1:
                self._push(job.job_template, queue)
        self._n_jobs += 1

    def head(self) -> JobTemplate | None:
        """Return the template of the next jobs; None if no job is ready."""
        while self._heap:
            number, _, job_template = self._heap[0]
            queue = self._queues.get(job_template)
            if queue and queue[0].number == number:
                return job_template
            heapq.heappop(self._heap)
        return None

    def take(self, most: int) -> list[Job]:
        """Remove and return up to ``most`` jobs of the head's template; some may be over."""
        job_template = self.head()
        assert job_template is not None
        heapq.heappop(self._heap)
        queue = self._queues[job_template]
        taken = [queue.popleft() for _ in range(min(most, len(queue)))]
        self._n_jobs -= len(taken)
        if queue:
            self._push(job_template, queue)
        else:
            del self._queues[job_template]
        return taken

    def park(self) -> None:
        """Skip the head's template until `unpark`."""
        job_template = self.head()
        assert job_template is not None
        heapq.heappop(self._heap)
        self._parked.append(job_template)

    def unpark(self) -> None:
        """Stop skipping templates."""
        for job_template in self._parked:
            if queue := self._queues.get(job_template):
                self._push(job_template, queue)
        self._parked.clear()

    def _push(self, job_template: JobTemplate, queue: deque[Job]) -> None:
        heapq.heappush(self._heap, (queue[0].number, job_template.number, job_template))


def outcome_of(future: JobFuture) -> tuple[BaseException | None, bool]:
    """Return the exception of a future that is done, and whether it was cancelled."""
    try:
        return Future.exception(future), False
    except CancelledError:
        return None, True
