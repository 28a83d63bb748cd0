"""The jobs of a `ForgeExecutor` as work for slots, and the batches that carry them to workers."""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence
from typing import Any

from forgepar.backends.base import Backend, Joined, Lost
from forgepar.backends.messages import Batch, Reply, Template
from forgepar.engine.in_flight import Flight
from forgepar.engine.slots import SlotScheduler
from forgepar.engine.worker_cache import WorkerCache
from forgepar.errors import TaskError
from forgepar.pool.errors import in_pool
from forgepar.pool.job_table import JobTable, raised_by_job
from forgepar.pool.jobs import NOT_KEPT, Job, JobFuture, JobTemplate
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, encode, is_segment
from forgepar.values.segments import Segment, names_of
from forgepar.workflow.context import RunContext

_MOST_CALLABLES = 4096  # templates sent before all workers must forget their callables
_MOST_BYTES = 32 << 20  # of pickled callables sent before all workers must forget them
_MOST_KINDS = 4096  # of callables with a measured duration, before all durations are discarded
_NO_KEY = object()


class PoolSource:
    """The jobs of a pool as a `WorkSource`.

    Args:
        backend: the open backend.
        job_table: the open jobs.
        slots: the scheduler that runs the jobs; its source is set to this.
        n_opened: the number of workers that were started.
    """

    alone = frozenset[int]()

    def __init__(self, backend: Backend, job_table: JobTable, slots: SlotScheduler, n_opened: int) -> None:
        self._backend = backend
        self._arena: Arena = backend.arena
        self._job_table = job_table
        self._ready = job_table.ready
        self._slots = slots
        self._n_opened = n_opened
        self._caches = [WorkerCache() for _ in range(backend.n_slots)]
        self._kinds, self._first_kind = dict[Any, int](), 0
        self._run = 0
        self._sent: set[int] = set()
        self._n_sent_bytes = 0
        self._facts = RunContext(os.urandom(8).hex(), "executor", 0, math.inf)
        self._results: dict[str, Segment] = {}  # segments made by workers, by name
        slots.source = self

    # Ready jobs

    @property
    def is_over(self) -> bool:
        """Whether no more jobs are handed out."""
        return False

    def head(self) -> tuple[int, int] | None:
        """Return the template of the jobs to hand out next and the number of ready jobs, or None if none is ready."""
        job_template = self._ready.head()
        return None if job_template is None else (job_template.number, len(self._ready))

    def kind(self, template: int) -> int:  # noqa: ARG002  (always the head's)
        """Return the number by which `Durations` knows the callable of the head's template."""
        job_template = self._ready.head()
        assert job_template is not None
        kind = self._kinds.get(job_template.sent_callable.kind)
        if kind is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
                self._first_kind = _MOST_KINDS - self._first_kind  # late replies have the former numbers
                self._slots.durations.forget()
            kind = self._kinds[job_template.sent_callable.kind] = self._first_kind + len(self._kinds)
            self._slots.durations.grow(kind + 1)
        return kind

    def take(self, most: int) -> list[Job]:
        """Hand out up to ``most`` jobs of the head's template, without those that were cancelled."""
        return [job for job in self._ready.take(most) if self._job_table.starts(job)]

    def put_back(self, template: int, tasks: Sequence[Job]) -> None:  # noqa: ARG002  (jobs have it)
        """Make jobs ready again that were handed out and did not start."""
        self._job_table.put_back(tasks)

    def park(self) -> None:
        """Set the head's jobs aside until `unpark`."""
        self._ready.park()

    def unpark(self) -> None:
        """Make the jobs that were set aside ready again."""
        self._ready.unpark()

    def open(self) -> None:
        """Start more workers if there are jobs for them."""
        n_wanted = min(self._backend.n_slots, len(self._job_table.jobs))
        if n_wanted > self._n_opened and self._ready:
            self._n_opened = n_wanted
            self._backend.open(n_wanted)

    def mark_next_running(self) -> None:
        """Mark as running one ready job for each idle or starting worker, so that `cancel_all` does not cancel it."""
        n_idle = self._n_opened - sum(map(bool, self._slots.flights))
        marked: list[Job] = []
        while len(marked) < n_idle and self._ready.head() is not None:
            marked += self.take(n_idle - len(marked))
        self._job_table.put_back(marked)

    # Outcomes

    def settle(self, slot: int, template: int, tasks: Sequence[Job], reply: Reply) -> None:  # noqa: ARG002
        """Set the results and the errors of the jobs of a reply."""
        n_good = len(tasks) - (reply.failure is not None)
        subflows = dict(reply.subflows)
        for place, job in enumerate(tasks[:n_good]):
            wire, number = reply.values[place], job.number
            if place not in subflows:
                self._made(slot, number, wire, is_needed=self._job_table.complete(job, wire))
                continue
            error = TypeError(f"{self.name(number)!r} returned a Subflow. Return one only from tasks of a workflow.")
            self._job_table.fail(job, error)
            if is_segment(subflows[place]):
                self._arena.free(subflows[place])
        if reply.failure is not None:
            self._job_table.fail(tasks[-1], raised_by_job(reply.failure))

    def failed(self, slot: int, template: int, task: Job, error: Exception) -> None:  # noqa: ARG002
        """Fail a job whose worker died or was killed."""
        if task.is_to_be_killed:
            self._job_table.give_up(task, in_pool(error))
        else:
            self._job_table.fail(task, in_pool(error))

    def _made(self, slot: int, number: int, wire: Wire, *, is_needed: bool) -> None:
        """Record that a worker made a small value: it keeps the value if other jobs wait for it, else drops it."""
        if type(wire) is tuple and not is_segment(wire):
            if is_needed:
                self._caches[slot].add(number, wire)
            else:
                self._caches[slot].lets_go(number)

    # Workers

    def joined(self, joined: Joined) -> None:
        """Do nothing: the pool keeps no record of its workers."""

    def repeated(self, task: Job, lost: Lost, *, was_at: bool) -> None:  # noqa: ARG002
        """Record that a job runs again because its worker was lost."""
        self._job_table.repeated(task)

    def interrupted(self, task: Job, lost: Lost) -> None:
        """Do nothing: the pool keeps no record of attempts."""

    def died(self, lost: Lost, task: Job | None, *, was_killed: bool) -> None:  # noqa: ARG002
        """Free the segments that a dead worker did not finish."""
        named = (names_of(segment) for segment in self._results.values())
        self._arena.free_strays(lost.pid, frozenset(name for names in named for name in names))

    def killing(self, slot: int, task: int, error: TaskError) -> None:
        """Do nothing: `failed` gives the error to the job's future."""

    def memory_is_low(self) -> None:
        """Do nothing: the jobs wait."""

    def has_effects(self, flight: Flight) -> bool:
        """Return whether the jobs of a batch must not run twice."""
        has_effects: bool = flight.tasks[0].job_template.options.effects
        return has_effects

    def name(self, task: int) -> str:
        """Return a job's name."""
        return self._job_table.name(task)

    # Values

    def made(self, segment: Segment) -> None:
        """Record that a segment made by a worker contains a result."""
        self._results[str(segment[0])] = segment

    def free(self, segment: Segment, *, keep: bool) -> None:
        """Free a segment, and have the workers unmap it."""
        self._results.pop(str(segment[0]), None)
        self._arena.free(segment, keep=keep)
        for cache in self._caches:
            cache.freed(segment)

    # Messages

    def forget(self, slot: int) -> None:
        """Record that a slot gets a new worker with an empty cache."""
        self._caches[slot] = WorkerCache()

    def drops(self, slot: int) -> Batch | None:
        """Return a batch without jobs that tells an idle worker which segments to unmap; None if there are none."""
        cache = self._caches[slot]
        return Batch(0, self._run, 0, 0, 0, (), (), b"", (), (), cache.drops()) if cache.is_to_unmap else None

    def message(self, slot: int, number: int, template: int, tasks: Sequence[Job]) -> Batch:
        """Return the batch of these jobs for a slot."""
        jobs, job_template = tasks, tasks[0].job_template
        self._count_callable(job_template)
        cache = self._caches[slot]
        facts = None
        if job_template.surroundings is not cache.surroundings:
            cache.surroundings = job_template.surroundings
            facts = (self._facts, job_template.surroundings.packed)
        callables, templates = _new_for_worker(cache, job_template)
        constants = [wire for job in jobs for wire in job.constants]
        for wire in filter(is_segment, constants):
            cache.maps(wire)
        return Batch(
            number,
            self._run,
            template,
            len(jobs),
            _as_column([job.number for job in jobs]),
            constants,
            self._values(cache, [source for job in jobs for source in job.sources]),
            b"",
            callables,
            templates,
            cache.drops(),
            _as_column([job.ordinal for job in jobs]),
            0,
            [(place, job.attempt) for place, job in enumerate(jobs) if job.attempt > 1],
            facts,
        )

    def _values(self, cache: WorkerCache, sources: Sequence[JobFuture]) -> Sequence[Wire]:
        if not sources:
            return ()
        return cache.thin([source.number for source in sources], [self._wire_of(source) for source in sources])

    def _wire_of(self, source: JobFuture) -> Wire:
        wire = source.wire
        return encode(source.result(), self._arena) if wire is NOT_KEPT else wire

    def _count_callable(self, job_template: JobTemplate) -> None:
        """Count a template that is sent; after too many, have workers forget all callables to bound their memory."""
        if job_template.number in self._sent:
            return
        self._sent.add(job_template.number)
        self._n_sent_bytes += len(job_template.sent_callable.pickled)
        if len(self._sent) > _MOST_CALLABLES or self._n_sent_bytes > _MOST_BYTES:
            self._run += 1
            self._sent = {job_template.number}
            self._n_sent_bytes = len(job_template.sent_callable.pickled)
            for cache in self._caches:
                cache.forget_run()


def _new_for_worker(
    cache: WorkerCache, job_template: JobTemplate
) -> tuple[Sequence[tuple[int, bytes]], Sequence[Template]]:
    """Return the callable, the template and the module state that a worker lacks."""
    sent_callable, layout = job_template.sent_callable, job_template.layout
    callables = _new_state(cache, job_template)
    if job_template.number in cache.templates:
        return callables, ()
    cache.templates.add(job_template.number)
    if sent_callable.number not in cache.callables:
        cache.callables.add(sent_callable.number)
        if not callables or callables[-1][0] != sent_callable.number:
            callables.append((sent_callable.number, sent_callable.pickled))
    columns, options = (layout.kinds, layout.keywords), job_template.options
    parts = tuple([part.number for part in job_template.parts])
    template = Template(
        job_template.number,
        sent_callable.number,
        columns,
        {},
        sent_callable.base,
        options.timeout,
        options.writable,
        parts,
        options.effects,
    )
    return callables, [template]


def _new_state(cache: WorkerCache, job_template: JobTemplate) -> list[tuple[int, bytes]]:
    """Return the parts of module state that a worker lacks or has in another version.

    A job submitted before the caller assigned a global may run after one submitted later, so each batch carries the
    state of its own template. Globals of the script are pickled with the callable, which is then sent again.
    """
    new: list[tuple[int, bytes]] = []
    for part in job_template.parts:
        if cache.parts.get(part.key) != part.number:
            cache.parts[part.key] = part.number
            new.append((part.number, part.pickled))
    sent_callable = job_template.sent_callable
    is_changed = False
    for name, key in sent_callable.state.keys:
        if cache.keys.get(name, _NO_KEY) != key:
            cache.keys[name] = key
            is_changed = True
    if is_changed:
        new.append((sent_callable.number, sent_callable.pickled))
    return new


def _as_column(numbers: Sequence[int]) -> int | bytes:
    """Return the first number if they are consecutive, else all of them as int32."""
    first = numbers[0]
    if numbers[-1] - first == len(numbers) - 1 and all(map(int.__eq__, numbers, range(first, first + len(numbers)))):
        return first
    return array("i", numbers).tobytes()
