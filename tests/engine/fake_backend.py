"""A backend, a source of work and a clock that the tests turn: slot schedulers without processes."""

from __future__ import annotations

import itertools
import math
from array import array
from types import SimpleNamespace

import forgepar as fp
from forgepar.backends.base import Joined, Lost, Traits
from forgepar.backends.messages import Reply
from forgepar.backends.worker_board import NO_LIMIT, mark
from forgepar.engine import in_flight, slots, work_stealing
from forgepar.engine.deadlines import Deadlines
from forgepar.engine.slots import SlotScheduler
from forgepar.scheduling.durations import Durations
from forgepar.scheduling.run_state import RecycleLimits, RunPolicy


class Clock:
    """Stands in for the module `time`."""

    def __init__(self, monkeypatch):
        self.now = 1000.0
        for module in (in_flight, slots, work_stealing):
            monkeypatch.setattr(module, "time", self)

    def perf_counter(self):
        return self.now


class FakeBackend:
    """Slots that do what a test says, and note what the scheduler asks of them."""

    def __init__(self, n_slots, **traits):
        self.n_slots = n_slots
        self.traits = Traits(**traits)
        self.positions = [0] * n_slots
        self.starts = [0.0] * n_slots
        self.limits = [NO_LIMIT] * n_slots
        self.given = [0] * n_slots
        self.sent: list[tuple[int, SimpleNamespace]] = []
        self.renewed: list[int] = []
        self.killed: list[int] = []
        self.answers: dict[int, int | None] = {}  # of slots that are far away
        self.arena = SimpleNamespace(free=lambda _: None)

    def position(self, slot):
        return self.positions[slot]

    def may_be_at(self, slot):
        return self.answers.get(slot) if self.traits.is_far else self.positions[slot]

    def started(self, slot):
        return self.starts[slot]

    def limit(self, slot, at):
        self.limits[slot] = at

    def n_given(self, slot):
        return self.given[slot]

    def send(self, slot, batch):
        self.sent.append((slot, batch))
        self.given[slot] += len(batch.tasks)

    def renew(self, slot):
        self.renewed.append(slot)
        self.given[slot] = 0

    def kill(self, slot):
        self.killed.append(slot)


class FakeSource:
    """Tasks of one template, by number."""

    alone = frozenset()
    is_over = False

    def __init__(self, tasks):
        self.ready = list(tasks)
        self.settled: list[int] = []
        self.failures: list[tuple[int, Exception]] = []
        self.forgotten: list[int] = []

    def head(self):
        return (0, len(self.ready)) if self.ready else None

    def kind(self, _):
        return 0

    def take(self, most):
        taken, self.ready = self.ready[:most], self.ready[most:]
        return taken

    def put_back(self, _, tasks):
        self.ready = sorted([*self.ready, *tasks])

    def message(self, _slot, number, _template, tasks):
        return SimpleNamespace(id=number, tasks=list(tasks))

    def settle(self, _slot, _template, tasks, _reply):
        self.settled += tasks

    def failed(self, _slot, _template, task, error):
        self.failures.append((task, error))

    def forget(self, slot):
        self.forgotten.append(slot)

    def has_effects(self, _):
        return False

    def name(self, task):
        return f"t{task}"

    def drops(self, _):
        return None

    def ignore(self, *_, **__):
        """Take note of nothing."""

    joined = repeated = interrupted = died = killing = ignore


class Machine:
    """A slot scheduler over fakes.

    Args:
        clock: the clock.
        n_slots: how many slots; all have joined.
        tasks: the numbers of the ready tasks.
        seconds: how long tasks are known to take; None: unknown.
        most_tasks: after how many a worker is replaced.
    """

    def __init__(self, clock, n_slots, tasks, *, seconds=1e-6, most_tasks=None, **traits):
        self.clock, self.backend, self.source = clock, FakeBackend(n_slots, **traits), FakeSource(tasks)
        wf = fp.Workflow()
        wf.map(abs, range(100))
        durations = Durations(1)
        if seconds is not None:
            durations.observe(0, seconds * 100, 100)
        self.deadlines = Deadlines(wf.plan(), RunPolicy(), self.backend)
        memory = SimpleNamespace(is_declared=False, is_scarce=lambda _: False, next_look=lambda _: math.inf)
        console = SimpleNamespace(last_errors=lambda *_: "")
        number = itertools.count(1).__next__
        self.slots = SlotScheduler(
            self.backend, self.deadlines, memory, console, durations, number, 0.1, RecycleLimits(most_tasks)
        )
        self.slots.source = self.source
        for slot in range(n_slots):
            self.slots.join(Joined(slot, 100 + slot))

    def begin(self, slot, place, batch=None):
        """Have a slot begin a task of a batch, its first if none is named."""
        batch = self.slots.flights[slot][0].id if batch is None else batch
        self.backend.positions[slot] = mark(batch, place)
        self.backend.starts[slot] = self.clock.now

    def reply(self, slot, n_values, *, ended, batch=None):
        """Have a slot report outcomes of a batch, its first if none is named."""
        flights = self.slots.flights[slot]
        flight = next(one for one in flights if batch is None or one.id == batch)
        marks = array("d", [0.0] * (n_values + 1)).tobytes()
        values = [None] * n_values
        self.slots.take([Reply(slot, flight.id, flight.n_done, values, marks, None, ended, 0.0, 0, ())])

    def lose(self, slot):
        """Have a slot lose its worker."""
        self.slots.take([Lost(slot, 100 + slot, -9, self.backend.positions[slot], self.clock.now, None)])

    def tasks_of(self, slot):
        """Return the tasks that a slot has, batch by batch."""
        return [list(flight.tasks[flight.n_done : flight.n_own]) for flight in self.slots.flights[slot]]
