"""What of a `ForgeExecutor`'s ready jobs goes to which worker, and in which message."""

from __future__ import annotations

import itertools
import math
import os
import time
from array import array
from collections import deque
from collections.abc import Sequence
from typing import Any

from forgepar.backends.base import Backend
from forgepar.backends.wire import Batch, Template
from forgepar.batching import Durations
from forgepar.claims import Claims
from forgepar.contexts import RunFacts
from forgepar.flight import Flight
from forgepar.jobs import GONE, Job, JobFuture, Recipe
from forgepar.roll import Roll
from forgepar.shipping import Held
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, encode, is_segment
from forgepar.values.segment import Segment

IN_FLIGHT = 2  # batches a slot: the second hides the round trip of the first
_SHORT_SECONDS = 0.1  # behind it a second batch waits; what stalls there goes to a slot that idles (claims.py)
_MOST_CALLABLES = 4096  # a worker holds, each layout and surroundings counted, before it is told to forget all
_MOST_BYTES = 32 << 20  # of callables, as they are pickled, that a worker has at once
_MOST_KINDS = 4096  # of callables with a duration, before all are forgotten and measured anew
_NO_KEY = object()


class JobFlight(Flight):
    """A batch of jobs that a slot has."""

    __slots__ = ("jobs",)

    def __init__(self, number: int, recipe: Recipe, jobs: Sequence[Job], is_short: bool) -> None:
        super().__init__(number, recipe.number, [job.number for job in jobs], is_short)  # type: ignore[arg-type]
        self.jobs = jobs


class Supply:
    """Hands out jobs.

    Args:
        backend: the workers, open.
        roll: the jobs.
        n_opened: how many workers were started.
        most_tasks: how many jobs a worker gets before it is replaced; None: any number.

    Attributes:
        flights: what each slot has.
        pids: the worker of each slot, 0 for none.
        claims: what is taken back from slots that have not begun it.
        is_paused: whether nothing is handed out for lack of memory.
    """

    def __init__(self, backend: Backend, roll: Roll, n_opened: int, most_tasks: int | None) -> None:
        n_slots = backend.n_slots
        self.flights: list[deque[JobFlight]] = [deque() for _ in range(n_slots)]
        self.pids = [0] * n_slots
        self.claims = Claims(backend, self.flights, self.pids)  # type: ignore[arg-type]  # a JobFlight is a Flight
        self.is_paused = False
        self._backend = backend
        self._arena: Arena = backend.arena
        self._roll = roll
        self._n_opened = n_opened
        self._most_tasks = most_tasks
        self._held = [Held() for _ in range(n_slots)]
        self._durations, self._kinds = Durations(0), dict[Any, int]()
        self._batches = itertools.count(1)
        self._run = 0
        self._sent: set[int] = set()
        self._n_sent_bytes = 0
        self._facts = RunFacts(os.urandom(8).hex(), "executor", 0, math.inf)
        self._is_parked = False

    def fill(self) -> None:
        """Give every slot its share of what is ready, then a second batch to those that are soon done."""
        ready, self.is_paused = self._roll.ready, False
        if not ready:
            return
        self._open()
        self.is_paused = self._roll.memory.guard.is_scarce(time.perf_counter())
        if self.is_paused and any(self.flights):
            return
        if self._is_parked:
            ready.unpark()
            self._is_parked = False
        for depth in range(1, IN_FLIGHT + 1):
            share = -(-len(ready) // len(self.flights))
            for slot, has in enumerate(self.flights):
                is_free = len(has) < depth and self.pids[slot] and not self.claims.is_limited(slot)
                if share and is_free and (not has or has[0].is_short):
                    self._give(slot, share)

    def commit(self) -> None:
        """Have jobs run, whatever comes, that workers without work would be given, or are being started for."""
        ready, n_idle = self._roll.ready, self._n_opened - sum(map(bool, self.flights))
        committed: list[Job] = []
        while len(committed) < n_idle and ready.head() is not None:
            committed += [job for job in ready.take(n_idle - len(committed)) if self._roll.starts(job)]
        self._roll.put_back(committed)

    def observe(self, jobs: Sequence[Job], seconds: float) -> None:
        """Take in how long jobs of one recipe took together."""
        self._durations.observe(self._kind(jobs[0].recipe), seconds, len(jobs))

    def made(self, slot: int, number: int, wire: Wire, *, is_taken: bool) -> None:
        """Note that a slot's worker has a small value that it made; it keeps it if others wait for that."""
        if type(wire) is tuple and not is_segment(wire):
            if is_taken:
                self._held[slot].add(number, wire)
            else:
                self._held[slot].lets_go(number)

    def freed(self, segment: Segment) -> None:
        """Note that a segment was freed: workers that have it mapped are to let go of it."""
        for held in self._held:
            held.freed(segment)

    def forget(self, slot: int) -> None:
        """Note that a slot gets a new worker, which holds nothing."""
        self._held[slot] = Held()

    def tell_what_to_drop(self) -> None:
        """Tell slots without work what nobody needs of what they have mapped; others hear it with their next batch."""
        for slot, has in enumerate(self.flights):
            if not has and self._held[slot].is_to_unmap and self.pids[slot]:
                dropped = self._held[slot].drops()
                self._backend.send(slot, Batch(0, self._run, 0, 0, 0, (), (), b"", (), (), dropped))

    def _open(self) -> None:
        """Start workers, if more can be used."""
        n_wanted = min(self._backend.n_slots, len(self._roll.jobs))
        if n_wanted > self._n_opened:
            self._n_opened = n_wanted
            self._backend.open(n_wanted)

    def _give(self, slot: int, share: int) -> None:
        """Send a slot a batch; where jobs of one recipe are too few for it, a second one of the next."""
        ready = self._roll.ready
        while share > 0 and len(self.flights[slot]) < IN_FLIGHT and (recipe := ready.head()) is not None:
            if self._roll.memory.is_declared and not self._admits(slot, recipe):
                continue
            kind = self._kind(recipe)
            size = self._durations.batch_size(kind, share, 1)
            if self._most_tasks is not None:
                size = min(size, self._most_tasks - self._backend.n_given(slot))
                if size < 1:
                    self._renew(slot)
                    return
            jobs = [job for job in ready.take(size) if self._roll.starts(job)]
            if not jobs:
                continue
            is_short = self._durations.seconds[kind] * len(jobs) <= _SHORT_SECONDS  # False for nan: nothing is known
            number = next(self._batches)
            self.flights[slot].append(JobFlight(number, recipe, jobs, is_short))
            self._backend.send(slot, self._batch(slot, number, recipe, jobs))
            share -= len(jobs)
            if len(jobs) == size or not is_short:
                return

    def _admits(self, slot: int, recipe: Recipe) -> bool:
        """Tell whether a slot may get jobs of a recipe; set them aside where there is no memory for them now."""
        memory = self._roll.memory
        if not memory.fits(slot, recipe.number, self.flights):
            self._roll.ready.park()
            self._is_parked = True
            return False
        if not self.flights[slot]:
            memory.weigh_idle(slot, self.pids[slot], recipe.number)
        return True

    def _renew(self, slot: int) -> None:
        """Replace a slot's worker once it has no work."""
        if not self.flights[slot]:
            self.pids[slot] = 0
            self.forget(slot)
            self._backend.renew(slot)

    def _kind(self, recipe: Recipe) -> int:
        kind = self._kinds.get(recipe.called.kind)
        if kind is None:
            if len(self._kinds) >= _MOST_KINDS:
                self._kinds.clear()
                self._durations = Durations(0)
            kind = self._kinds[recipe.called.kind] = len(self._kinds)
            self._durations.grow(len(self._kinds))
        return kind

    # Messages

    def _batch(self, slot: int, number: int, recipe: Recipe, jobs: Sequence[Job]) -> Batch:
        self._count_callable(recipe)
        held = self._held[slot]
        facts = None
        if recipe.surroundings is not held.surroundings:
            held.surroundings = recipe.surroundings
            facts = (self._facts, recipe.surroundings.packed)
        callables, templates = _news(held, recipe)
        constants = [wire for job in jobs for wire in job.constants]
        for wire in filter(is_segment, constants):
            held.maps(wire)
        return Batch(
            number,
            self._run,
            recipe.number,
            len(jobs),
            _as_column([job.number for job in jobs]),
            constants,
            self._values(held, [source for job in jobs for source in job.sources]),
            b"",
            callables,
            templates,
            held.drops(),
            _as_column([job.ordinal for job in jobs]),
            0,
            [(place, job.attempt) for place, job in enumerate(jobs) if job.attempt > 1],
            facts,
        )

    def _values(self, held: Held, sources: Sequence[JobFuture]) -> Sequence[Wire]:
        if not sources:
            return ()
        return held.thin([source.number for source in sources], [self._wire_of(source) for source in sources])

    def _wire_of(self, source: JobFuture) -> Wire:
        wire = source.wire
        return encode(source.result(), self._arena) if wire is GONE else wire

    def _count_callable(self, recipe: Recipe) -> None:
        """Have workers forget all callables now and then: they may have got many that are never called again."""
        if recipe.number in self._sent:
            return
        self._sent.add(recipe.number)
        self._n_sent_bytes += len(recipe.called.pickled)
        if len(self._sent) > _MOST_CALLABLES or self._n_sent_bytes > _MOST_BYTES:
            self._run += 1
            self._sent = {recipe.number}
            self._n_sent_bytes = len(recipe.called.pickled)
            for held in self._held:
                held.forget_run()


def _news(held: Held, recipe: Recipe) -> tuple[Sequence[tuple[int, bytes]], Sequence[Template]]:
    """Return the callable and the template, where a worker does not have them, and what it has of other state."""
    called, layout = recipe.called, recipe.layout
    callables = _state_news(held, recipe)
    if recipe.number in held.templates:
        return callables, ()
    held.templates.add(recipe.number)
    if called.number not in held.callables:
        held.callables.add(called.number)
        if not callables or callables[-1][0] != called.number:
            callables.append((called.number, called.pickled))
    columns, options = (layout.kinds, layout.keywords), recipe.options
    parts = tuple([part.number for part in recipe.parts])
    template = Template(
        recipe.number,
        called.number,
        columns,
        {},
        called.base,
        options.timeout,
        options.writable,
        parts,
        options.effects,
    )
    return callables, [template]


def _state_news(held: Held, recipe: Recipe) -> list[tuple[int, bytes]]:
    """Return what makes the modules of a worker what the caller had when it submitted jobs of a recipe.

    Jobs that were submitted before the caller assigned a global may run behind those submitted after it: whichever
    comes next brings its own state. The script's globals go with the callable, which is sent again for that.
    """
    news: list[tuple[int, bytes]] = []
    for part in recipe.parts:
        if held.parts.get(part.key) != part.number:
            held.parts[part.key] = part.number
            news.append((part.number, part.pickled))
    called = recipe.called
    is_changed = False
    for name, key in called.state.keys:
        if held.keys.get(name, _NO_KEY) != key:
            held.keys[name] = key
            is_changed = True
    if is_changed:
        news.append((called.number, called.pickled))
    return news


def _as_column(numbers: Sequence[int]) -> int | bytes:
    """Return the first of consecutive numbers, or all of them as int32."""
    first = numbers[0]
    if numbers[-1] - first == len(numbers) - 1 and all(map(int.__eq__, numbers, range(first, first + len(numbers)))):
        return first
    return array("i", numbers).tobytes()
