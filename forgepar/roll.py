"""The jobs of a `ForgeExecutor` that are open: which wait, which are ready, and what comes of each.

    enter ──> waits for its sources ──> ready ──> starts ──> complete, fail ──> over
                                          ↑                             │
                                          └─ tried again, put back  <───┘

One thread calls all of it.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Sequence
from typing import Any, cast

from forgepar.backends.base import Backend
from forgepar.backends.exceptions import is_kind
from forgepar.errors import InsufficientMemory
from forgepar.jobs import Job, Ready, Recipe, outcome_of
from forgepar.machine import as_text
from forgepar.memory import Guard, Memory
from forgepar.plan import Plan
from forgepar.poolerrors import PoolWorkerDied
from forgepar.runstate import RunPolicy
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.watch import Watch

_MOST_NAMES = 4096  # that are remembered with their counts, twice: some 1 MB


class _ByRecipe:
    """A column by the number of a recipe: what those that are in use say for an option, and 0 or None for others.

    Args:
        option: the name of the option.
        otherwise: what all other recipes have.
    """

    def __init__(self, option: str, otherwise: Any) -> None:
        self._option = option
        self._otherwise = otherwise
        self._recipes: weakref.WeakValueDictionary[int, Recipe] = weakref.WeakValueDictionary()

    def __getitem__(self, number: int) -> Any:
        recipe = self._recipes.get(number)
        return self._otherwise if recipe is None else getattr(recipe.options, self._option)

    def __iter__(self) -> Iterator[Any]:
        return iter([getattr(recipe.options, self._option) for recipe in self._recipes.values()])

    def add(self, recipe: Recipe) -> None:
        self._recipes[recipe.number] = recipe


class _Ordinals:
    """Counts the jobs of each name, for as many names as were used of late.

    A name that was forgotten goes on behind the highest count of those, so that no two jobs have one name and ordinal.
    """

    def __init__(self) -> None:
        self._counts: dict[str, int] = {}
        self._earlier: dict[str, int] = {}  # those that were not used since `_counts` was last full
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


class Roll:
    """The open jobs. What watches tasks by the clock and for their memory takes it for a plan that grows.

    Args:
        backend: the workers.
        arena: where large values are.

    Attributes:
        jobs: all that are not over, by number.
        ready: those that could be handed out.
        watch: the clock's part.
        memory: the part that has to do with memory.
        timeouts: by recipe.
        memories: what jobs declare, by recipe.
        is_killed: whether nothing is to be begun any more.
    """

    def __init__(self, backend: Backend, arena: Arena) -> None:
        self.jobs: dict[int, Job] = {}
        self.ready = Ready()
        self.timeouts = _ByRecipe("timeout", None)
        self.memories = _ByRecipe("memory", 0)
        self.is_killed = False
        self._free: dict[int, int] = {}  # by job, how many attempts its retries do not pay for
        self._arena = arena
        self._ordinals = _Ordinals()
        self._plan = cast("Plan", self)  # as far as these look at one
        self.watch = Watch(self._plan, RunPolicy(), backend)
        self.memory = Memory(self._plan, backend, Guard(), watches=backend.ends_workers)

    def name(self, number: int) -> str:
        """Return a job's name, as tasks have them."""
        job = self.jobs.get(number)
        return f"job-{number}" if job is None else f"{job.recipe.called.base}-{job.ordinal}"

    def spec(self, number: int) -> Recipe:
        """Return what a job has in common with others."""
        return self.jobs[number].recipe

    def enter(self, job: Job) -> None:
        """Take in a job; it is ready, or waits for those whose values it takes."""
        job.ordinal = self._ordinals.next(job.recipe.called.base)
        self.jobs[job.number] = job
        if not self._heed(job):
            return
        for source in set(job.sources):
            if not source.done():
                source.takers.append(job)
                job.n_waits += 1
                continue
            error, is_cancelled = outcome_of(source)
            if is_cancelled or error is not None:
                self.give_up(job, error)
                return
        if not job.n_waits:
            self.ready.add(job)

    def starts(self, job: Job) -> bool:
        """Note that a job is handed out, and return True, unless it was cancelled."""
        if job.is_over:
            return False
        if not job.is_out:
            if not job.future.set_running_or_notify_cancel():
                takers, job.future.takers = job.future.takers, []
                self._end(job)
                for taker in takers:
                    self.give_up(taker, None)
                return False
            job.is_out = True
        return True

    def complete(self, job: Job, wire: Wire) -> bool:
        """Note what a job returned; tell whether others waited for it."""
        future = job.future
        takers, future.takers = future.takers, []
        self._end(job)
        future.fulfil(wire, self._arena)
        for taker in takers:
            taker.n_waits -= 1
            if not taker.n_waits and not taker.is_over:
                self.ready.add(taker)
        return bool(takers)

    def fail(self, job: Job, error: BaseException) -> None:
        """Let a job's attempt fail: it is tried again, or it is over."""
        options = job.recipe.options
        tries = job.attempt - self._free.get(job.number, 0)
        if tries <= options.retries and is_kind(error, options.retry_on) and not self.is_killed:
            self.watch.delay(job.number, tries, time.perf_counter())
            job.attempt += 1
            return
        self.give_up(job, error)

    def retry_due(self) -> None:
        """Make ready what has waited long enough for its next attempt."""
        for number in self.watch.due_retries():
            self.ready.add(self.jobs[number])

    def put_back(self, jobs: Sequence[Job]) -> None:
        """Make jobs ready again that a worker did not begin, before those behind them."""
        for job in reversed(jobs):
            if self.is_killed or job.is_condemned:
                self.give_up(job, PoolWorkerDied("the job was ended before it was begun"))
            else:
                self.ready.add(job)

    def repeated(self, jobs: Sequence[Job]) -> None:
        """Note that a worker was lost which may have run these jobs; their retries do not pay for that."""
        for job in jobs:
            job.attempt += 1
            self._free[job.number] = self._free.get(job.number, 0) + 1

    def give_up(self, job: Job, error: BaseException | None) -> None:
        """Let a job fail, or (without an error) be cancelled, and all that wait for its value likewise."""
        doomed = [job]
        while doomed:
            job = doomed.pop()
            if job.is_over:
                continue
            future = job.future
            self._end(job)
            doomed += future.takers
            future.takers = []
            if not job.is_out and error is None:
                future.cancel()
            if (job.is_out or future.set_running_or_notify_cancel()) and error is not None:
                future.set_exception(error)

    def cancelled(self, job: Job) -> None:
        """Take note of a job whose future was cancelled before it was handed out."""
        if job.future.cancelled():
            self.give_up(job, None)

    def cancel_all(self) -> None:
        """Cancel what no worker has had."""
        for job in [job for job in self.jobs.values() if not job.is_out]:
            job.future.cancel()
            self.cancelled(job)

    def _heed(self, job: Job) -> bool:
        """Take in what a job is limited to; return whether it can ever be run."""
        number, options = job.recipe.number, job.recipe.options
        if options.timeout is not None and self.timeouts[number] is None:
            self.timeouts.add(job.recipe)
            self.watch.grow(self._plan)
        if options.memory is None or self.memories[number]:
            return True
        if options.memory > (most := self.memory.most):
            name, text = self.name(job.number), as_text(options.memory)
            message = (
                f"job {name!r} declares memory={text}, but only {as_text(most)} can be had. Declare less, or free some."
            )
            self.give_up(job, InsufficientMemory(message, task=name, needed=options.memory, available=most))
            return False
        self.memories.add(job.recipe)
        self.memory.grow(self._plan)
        return True

    def _end(self, job: Job) -> None:
        """Forget a job, and let go of what it took."""
        job.is_over = True
        self.jobs.pop(job.number, None)
        if self._free:
            self._free.pop(job.number, None)
        job.future.job = None
        job.constants = job.sources = job.held = ()
