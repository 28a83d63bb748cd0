"""What a `ForgeExecutor` is given: jobs, what those of one kind share, and the futures that they fulfil.

submit ──> Recipes.job ──> Job ──> Ready ──batch──> worker ──reply──> JobFuture
                            ↑                                            │
                            └────────── a job that takes its value <─────┘
"""

from __future__ import annotations

import heapq
import itertools
import logging
import pickle
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, NamedTuple, Protocol

from forgepar.arguments import Layout
from forgepar.backends.surroundings import Moment
from forgepar.errors import add_note, is_system_error
from forgepar.forking import fork_safe
from forgepar.pickling import loads_own
from forgepar.poolerrors import PoolUnreadable
from forgepar.tasks import Options, base_name
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment
from forgepar.values.modulestate import Part as ModulePart
from forgepar.values.segment import Segment


class Owner(Protocol):
    """Whoever runs jobs, as far as a future needs to know it.

    Attributes:
        is_foreign: whether it runs them for another process, which this one was forked from.
    """

    is_foreign: bool

    def cancelled(self, job: Job) -> None:
        """Note that the future of a job was cancelled; from any thread."""

    def condemned(self, job: Job) -> None:
        """Note that a job is to be ended; from any thread."""

    def made(self, segment: Segment) -> None:
        """Note that a segment that a worker made holds a result; from the thread that hears of it."""

    def release(self, segment: Segment, *, keep: bool) -> None:
        """Free a segment, soon; from any thread, and amid anything."""

    def check_owner(self) -> None:
        """Raise `WrongProcess` where it is foreign."""


class Stored:
    """Holds a segment as long as anything refers to this.

    Args:
        owner: frees it.
        segment: which.
        keep: whether it may be used again for another value: not where this process has it mapped.
    """

    __slots__ = ("_keep", "_owner", "segment")

    def __init__(self, owner: Owner, segment: Segment, *, keep: bool) -> None:
        self._owner = owner
        self.segment = segment
        self._keep = keep

    def __del__(self) -> None:
        self._owner.release(self.segment, keep=self._keep)


class _Sealed:
    """In place of a result that nobody has looked at yet."""


_LOGGER = logging.getLogger("concurrent.futures")  # where `Future` logs what callbacks raise
_SEALED = _Sealed()
_DONE = ("FINISHED", "CANCELLED", "CANCELLED_AND_NOTIFIED")  # as `concurrent.futures` calls its states
GONE = _Sealed()  # in place of how a value travels, where that is not kept
_opening = fork_safe(threading.RLock())


class JobFuture(Future[Any]):
    """The future of a job. Its value is unpickled when it is first asked for, in the thread that asks.

    As an argument of another job of the same executor it stands for its value.

    Attributes:
        copies: whether arrays in the value are copies, which can be written, instead of views of shared memory.
    """

    def __init__(self, owner: Owner, number: int) -> None:
        super().__init__()
        self.owner = owner
        self.number = number
        self.copies = False
        self.job: Job | None = None
        self.takers: list[Job] = []  # jobs that wait for the value
        self.wire: Wire = None  # how it travels
        self.parts: Sequence[ModulePart] = ()  # of modules of the caller, which what is in the value may be of
        self._stored: Stored | None = None
        self._parts: Sequence[Any] = ()
        self._value: Any = None
        self._unreadable: BaseException | None = None

    def cancel(self) -> bool:
        """Cancel the job if no worker has it yet."""
        if self.owner.is_foreign:
            self._check_process()
        job = self.job
        if not super().cancel():
            return False
        if job is not None:
            self.owner.cancelled(job)
        return True

    def add_done_callback(self, fn: Callable[[Future[Any]], object]) -> None:
        """Have a function called with this when the job is over; see `concurrent.futures.Future.add_done_callback`.

        What it raises in the executor's thread is logged, `BaseException` included: asking for the result of a job that
        raised `KeyboardInterrupt` must not end that thread.
        """
        super().add_done_callback(fn if self.done() else partial(_call_shielded, fn))

    def kill(self) -> None:
        """Cancel the job, or, where a worker is at it, end it with its worker; the future tells how it came out."""
        job = self.job
        if job is not None and not self.cancel():
            self.owner.condemned(job)

    def result(self, timeout: float | None = None) -> Any:
        """Wait for the value; see `concurrent.futures.Future.result`."""
        if self.owner.is_foreign:
            self._check_process()
        value = super().result(timeout)
        if value is not _SEALED:
            return value
        self._open()
        if self._unreadable is not None:
            raise self._unreadable
        return self._value

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """Wait for the end, and return what the job failed with, None if it did not."""
        if self.owner.is_foreign:
            self._check_process()
        error = super().exception(timeout)
        if error is None and super().result() is _SEALED:
            self._open()
            return self._unreadable
        return error

    def fulfil(self, wire: Wire, arena: Arena) -> None:
        """Take in the value as it came."""
        self.wire = wire
        if type(wire) is not tuple:
            self.set_result(wire)
            return
        if is_segment(wire):
            try:
                self._parts = arena.read(wire)  # mapped now, as the arena may go before anybody looks
            except OSError as error:
                add_note(error, "raised while the job's result was being read from shared memory")
                self.set_exception(error)
                return
            self._stored = Stored(self.owner, wire, keep=False)
            self.owner.made(wire)
        else:
            self._parts = wire
        self.set_result(_SEALED)

    def fulfil_with(self, value: Any, wire: Wire) -> None:
        """Take in a value that this process has already."""
        self.wire = wire
        if is_segment(wire):
            self._stored = Stored(self.owner, wire, keep=True)
        self.set_running_or_notify_cancel()
        self.set_result(value)

    def _check_process(self) -> None:
        """Refuse in a forked child where nobody would fulfil this; what is done can be had there, too."""
        if self._state not in _DONE:
            self.owner.check_owner()
        self._condition = threading.Condition()  # the parent's may have been held when this process was forked

    def _open(self) -> None:
        with _opening:
            if self._parts:
                parts, self._parts = self._parts, ()
                try:
                    stream, *buffers = parts
                    own = self.copies
                    self._value = loads_own(stream, buffers) if own else pickle.loads(stream, buffers=buffers)
                except BaseException as error:  # SystemExit, too: it is data that raises it
                    if is_system_error(error):
                        add_note(error, "raised while the job's result was being unpickled")
                        self._unreadable = error
                        return
                    self._unreadable = PoolUnreadable(
                        f"the job's result cannot be unpickled here ({type(error).__name__}: {error}). "
                        "Return plain data, or what this process can import."
                    )
                    self._unreadable.__cause__ = error
                if not is_segment(self.wire):
                    self.wire = GONE  # it is seldom asked for again, and can be had from the value


def _call_shielded(fn: Callable[[Future[Any]], object], future: Future[Any]) -> None:
    try:
        fn(future)
    except Exception:
        raise  # `Future` logs it
    except BaseException:
        _LOGGER.exception("exception calling callback for %r", future)


class CallerState(NamedTuple):
    """What a callable refers to in modules of the caller, as it was when that was last looked at.

    Attributes:
        reached: all names in modules that workers can import that it refers to, however deep.
        parts: those of them of which something has to be sent.
        keys: of the script's globals that go with the callable itself: what tells whether they have changed.
    """

    reached: tuple[ModulePart, ...] = ()
    parts: tuple[ModulePart, ...] = ()
    keys: tuple[tuple[tuple[str, str], Any], ...] = ()


class Called:
    """A callable as it travels.

    Attributes:
        number: its own.
        pickled: the callable.
        options: what it is told as a task.
        base: what its jobs are called.
        state: what of the caller's modules it refers to.
        kind: what durations are counted by: callables of one place in the source are taken to be alike.
    """

    __slots__ = ("base", "kind", "number", "options", "pickled", "recipes", "state")

    def __init__(
        self, number: int, fn: Callable[..., Any], pickled: bytes, options: Options, state: CallerState
    ) -> None:
        self.number = number
        self.state = state
        self.pickled = pickled
        self.options = options
        self.base = options.name or base_name(fn)
        self.kind = (getattr(fn, "__module__", ""), getattr(fn, "__qualname__", self.base))
        self.recipes: dict[Any, Recipe] = {}


class Recipe:
    """What jobs of one callable, of one order of arguments and of one moment share.

    Attributes:
        number: its own.
        called: the callable.
        layout: what stands where in the arguments.
        surroundings: what the caller's process was when it submitted them.
        parts: what the callable and the arguments refer to in modules that workers can import.
    """

    __slots__ = ("__weakref__", "called", "layout", "number", "options", "parts", "surroundings")

    def __init__(
        self, number: int, called: Called, layout: Layout, surroundings: Moment, parts: Sequence[ModulePart] = ()
    ) -> None:
        self.number = number
        self.called = called
        self.layout = layout
        self.surroundings = surroundings
        self.parts = parts
        self.options = called.options


class Job:
    """One submission.

    Attributes:
        number: which one of the executor's, in the order of their submission.
        ordinal: which one of its base name's.
        constants: arguments as they travel.
        sources: futures whose values it takes, in the order of their places.
        n_waits: how many of these it still waits for.
        attempt: which attempt this is, from 1.
        is_out: whether it was handed to a worker, ever.
        is_over: whether nothing is to be done about it any more.
        is_condemned: whether it is to be ended.
    """

    __slots__ = (
        "attempt",
        "constants",
        "future",
        "held",
        "is_condemned",
        "is_out",
        "is_over",
        "n_waits",
        "number",
        "ordinal",
        "recipe",
        "sources",
    )

    def __init__(
        self,
        future: JobFuture,
        recipe: Recipe,
        constants: Sequence[Wire],
        sources: Sequence[JobFuture],
        held: Sequence[Stored],
    ) -> None:
        self.future = future
        self.recipe = recipe
        self.constants = constants
        self.sources = sources
        self.held = held
        self.number = future.number
        self.ordinal = -1
        self.n_waits = 0
        self.attempt = 1
        self.is_out = self.is_over = self.is_condemned = False


class Ready:
    """Jobs that wait for a worker: in the order of their numbers, but for those of one recipe, which go together."""

    def __init__(self) -> None:
        self._queues: dict[Recipe, deque[Job]] = {}
        self._heap: list[tuple[int, int, Recipe]] = []
        self._parked: list[Recipe] = []
        self._n_jobs = 0

    def __len__(self) -> int:
        return self._n_jobs

    def add(self, job: Job) -> None:
        """Take in a job."""
        queue = self._queues.get(job.recipe)
        if queue is None:
            queue = self._queues[job.recipe] = deque()
        if queue and job.number < queue[0].number:
            queue.appendleft(job)
            self._push(job.recipe, queue)
        else:
            queue.append(job)
            if len(queue) == 1:
                self._push(job.recipe, queue)
        self._n_jobs += 1

    def head(self) -> Recipe | None:
        """Return the recipe of the next jobs, None where none can be handed out."""
        while self._heap:
            number, _, recipe = self._heap[0]
            queue = self._queues.get(recipe)
            if queue and queue[0].number == number:
                return recipe
            heapq.heappop(self._heap)
        return None

    def take(self, most: int) -> list[Job]:
        """Return up to ``most`` jobs of the head's recipe; some may be over."""
        recipe = self.head()
        assert recipe is not None
        heapq.heappop(self._heap)
        queue = self._queues[recipe]
        taken = [queue.popleft() for _ in range(min(most, len(queue)))]
        self._n_jobs -= len(taken)
        if queue:
            self._push(recipe, queue)
        else:
            del self._queues[recipe]
        return taken

    def park(self) -> None:
        """Pass over the head's recipe until `unpark`."""
        recipe = self.head()
        assert recipe is not None
        heapq.heappop(self._heap)
        self._parked.append(recipe)

    def unpark(self) -> None:
        """Pass over nothing any more."""
        for recipe in self._parked:
            if queue := self._queues.get(recipe):
                self._push(recipe, queue)
        self._parked.clear()

    def clear(self) -> Iterator[Job]:
        """Yield all jobs, and hold none of them."""
        queues, self._queues = self._queues, {}
        self._heap, self._parked, self._n_jobs = [], [], 0
        return itertools.chain.from_iterable(queues.values())

    def _push(self, recipe: Recipe, queue: deque[Job]) -> None:
        heapq.heappush(self._heap, (queue[0].number, recipe.number, recipe))


def outcome_of(future: JobFuture) -> tuple[BaseException | None, bool]:
    """Return what a future that is done failed with, and whether it was cancelled."""
    try:
        return Future.exception(future), False
    except CancelledError:
        return None, True
