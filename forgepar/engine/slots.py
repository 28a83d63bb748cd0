"""The slot scheduler: hands out batches, takes in replies, and ends what takes too long or too much memory.

    WorkSource.head, take, message ──> Batch ──> Backend.send      breadth first, up to two batches per slot
    WorkSource.settle, failed, put_back  <── Reply, Joined, Lost <── Backend.wait

The run of a workflow (`engine.dispatcher`) and a pool (`pool.scheduler`) are its users. Each brings a `WorkSource`,
which decides what runs next and what an outcome means.

SlotScheduler   the batches of each slot
Flight          one of them
WorkStealing    reclaims from slots what they have not begun
WorkerLoss      which tasks of a dead worker are blamed, and which run again
Durations       how many tasks make a batch
Deadlines       timeouts, retries that wait, pending kills
Memory          admission by declared memory, and the end of what takes more
Console         what tasks print, log and warn
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from forgepar.backends.base import Backend, Joined, Lost, Notice, OutputNotice
from forgepar.backends.messages import Reply
from forgepar.backends.output_capture import UNKNOWN_TASK
from forgepar.backends.worker_board import unmark
from forgepar.engine.console import Console
from forgepar.engine.deadlines import Deadlines, PendingKill
from forgepar.engine.in_flight import Flight, own_part
from forgepar.engine.memory import Memory
from forgepar.engine.work_source import WorkSource
from forgepar.engine.work_stealing import WorkStealing
from forgepar.engine.worker_failures import Suspects, WorkerLoss, worker_died
from forgepar.errors import TaskError
from forgepar.scheduling.durations import Durations
from forgepar.scheduling.run_state import RecycleLimits
from forgepar.values.codec import is_segment
from forgepar.workflow.catalog import TaskCatalog

IN_FLIGHT = 2  # batches per slot: the second hides the round trip of the first


class SlotScheduler:
    """Keeps the slots of an open backend at work.

    Args:
        backend: the slots.
        deadlines: the clock.
        memory: what may run at once.
        console: shows what tasks print and log.
        durations: how long tasks take.
        next_batch: returns ever larger numbers for the life of the backend.
        short_seconds: a batch expected to take no longer gets a second one behind it.
        recycling: when a worker is replaced.

    Attributes:
        source: provides the work; to be set before anything else.
        flights: by slot, the batches that it has.
        pids: by slot, its worker's process; 0 if it has none.
        is_paused: whether nothing is handed out because the machine lacks memory.
    """

    def __init__(
        self,
        backend: Backend,
        deadlines: Deadlines,
        memory: Memory,
        console: Console,
        durations: Durations,
        next_batch: Callable[[], int],
        short_seconds: float,
        recycling: RecycleLimits,
    ) -> None:
        self.backend = backend
        self.source: WorkSource
        self.deadlines = deadlines
        self.memory = memory
        self.console = console
        self.durations = durations
        self.flights: list[deque[Flight]] = [deque() for _ in range(backend.n_slots)]
        self.pids = [0] * backend.n_slots
        self.stealing = WorkStealing(backend, self.flights, self.pids)
        self.is_paused = False
        self._next_batch = next_batch
        self._short_seconds = short_seconds
        self._recycling = recycling
        self._recycles = recycling != RecycleLimits()
        self._has_parked = False
        self._suspects = Suspects()
        self._peaks = [0] * backend.n_slots
        self._addresses = [""] * backend.n_slots

    # Handing out

    def hand_out(self) -> None:
        """Reclaim what slots stall on, and give every slot its share of what is ready."""
        source = self.source
        for flight, first, end in self.stealing.step(is_wanted=not source.is_over and source.head() is None):
            self._put_back(flight, first, end)
        # A new worker is of use only for what is ready, or was set aside until memory is free.
        if self._recycles and (self._has_parked or source.head() is not None):
            self._recycle_workers()
        self._fill()

    def _fill(self) -> None:
        """Give every slot its share, then a second batch to those that are soon done with the first.

        A slot with a long task gets none: what waits behind it could run on the slot that is free next.
        """
        source, flights = self.source, self.flights
        if self.memory.is_scarce(time.perf_counter()) and (self._has_parked or source.head() is not None):
            self._hold_back()
            return
        self.is_paused = False
        if self._has_parked:
            source.unpark()
            self._has_parked = False
        for depth in range(1, self._most_in_flight + 1):
            head = source.head()
            if head is None:
                break
            # Fixed for the round: the first slots are not to get more than the last.
            share = -(-head[1] // len(flights))
            for slot, has in enumerate(flights):
                if len(has) < depth and self.pids[slot] and not self.stealing.is_limited(slot) and _is_soon_free(has):
                    self._give(slot, share)

    def _give(self, slot: int, share: int) -> None:
        """Send a slot a batch; where tasks of one template are too few for it, a second one of the next."""
        source, has = self.source, self.flights[slot]
        while share > 0 and len(has) < self._most_in_flight and (head := source.head()) is not None:
            template, kind = head[0], source.kind(head[0])
            if self.memory.is_declared and not self._admits(slot, template):
                continue
            size = 1 if template in source.alone else self.durations.batch_size(kind, share, 1)
            if self._recycles and (size := min(size, self._n_left(slot))) < 1:
                return
            tasks = source.take(size)
            if self._suspects.losses and (n_apart := self._suspects.n_apart(tasks)) < len(tasks):
                source.put_back(template, tasks[n_apart:])
                tasks = tasks[:n_apart]
            if not len(tasks):
                continue
            is_short = self.durations.seconds[kind] * len(tasks) <= self._short_seconds  # False for nan: unknown
            number = self._next_batch()
            batch = source.message(slot, number, template, tasks)
            has.append(Flight(number, template, kind, tasks, is_short))
            self.backend.send(slot, batch)
            share -= len(tasks)
            if len(tasks) == size or not is_short:
                return

    @property
    def _most_in_flight(self) -> int:
        """Batches per slot; one while there are suspects, as a lost worker may take the reply before with it."""
        return 1 if self._suspects.losses else IN_FLIGHT

    def _admits(self, slot: int, template: int) -> bool:
        """Return whether a slot may get tasks of a template; set them aside where there is no memory for them now."""
        if not self.memory.fits(slot, template, self.flights):
            self.source.park()
            self._has_parked = True
            return False
        if not self.flights[slot]:
            self.memory.weigh_idle(slot, self.pids[slot], template)
        return True

    def _hold_back(self) -> None:
        """While memory is low, start nothing; if nothing is running, start one batch so that the run cannot stall."""
        if not self.is_paused:
            self.is_paused = True
            self.source.memory_is_low()
        if not any(self.flights):
            for slot, pid in enumerate(self.pids):
                if pid:
                    self._give(slot, 1)
                    return

    def _n_left(self, slot: int) -> int:
        """Count the tasks that a slot's worker may still get before it is replaced."""
        limits = self._recycling
        if limits.most_memory is not None and self._peaks[slot] >= limits.most_memory:
            return 0
        return 1 << 31 if limits.most_tasks is None else limits.most_tasks - self.backend.n_given(slot)

    def _recycle_workers(self) -> None:
        for slot, has in enumerate(self.flights):
            if self.pids[slot] and not has and self._n_left(slot) < 1:
                self.pids[slot] = self._peaks[slot] = 0
                self.source.forget(slot)
                self.backend.renew(slot)

    def send_drops(self) -> None:
        """Send idle slots which segments to unmap; others get that with their next batch."""
        for slot, has in enumerate(self.flights):
            if not has and self.pids[slot] and (batch := self.source.drops(slot)) is not None:
                self.backend.send(slot, batch)

    # Waiting

    def wait(self, patience: float | None) -> list[Notice]:
        """Return what slots report, after ``patience`` seconds at most (None: whenever they do)."""
        began = time.perf_counter()
        notices = self.backend.wait(patience)
        if patience is not None and self.deadlines.has_timeouts:
            firsts = [has[0] if has else None for has in self.flights]
            self.deadlines.slept(patience, began, time.perf_counter(), firsts)
        return notices

    def patience(self, look_at: float = math.inf) -> float | None:
        """Return how long `wait` may take; None while nothing is due and no slot idles beside tasks that wait.

        Args:
            look_at: when the caller has something to do, seconds of `time.perf_counter`.
        """
        patience = self.stealing.patience(is_over=self.source.is_over)
        look_at = min(look_at, self.memory.next_look(self.flights))
        if self.is_paused:
            look_at = min(look_at, self.memory.guard.look_at)
        look_at = min(look_at, self.deadlines.next_look())
        if look_at == math.inf:
            return patience
        left = self.deadlines.patience(look_at, time.perf_counter())
        return left if patience is None else min(left, patience)

    # Outcomes

    def take(self, notices: Sequence[Notice]) -> None:
        """Take in what slots reported."""
        for notice in notices:
            if type(notice) is Reply:
                self._take_reply(notice)
            elif type(notice) is Joined:
                self.join(notice)
            elif type(notice) is Lost:
                self._take_loss(notice)
            else:
                assert isinstance(notice, OutputNotice)
                at = self.task_at(notice.slot, notice.position)
                self.console.hear(notice.slot, notice.records, UNKNOWN_TASK if at is None else int(at))

    def join(self, joined: Joined) -> None:
        """Note that a slot has a worker."""
        self.pids[joined.slot] = joined.pid
        self._addresses[joined.slot] = joined.address
        self.source.joined(joined)

    def _take_reply(self, reply: Reply) -> None:
        slot, has = reply.slot, self.flights[reply.slot]
        if not has or (flight := has[0]).id != reply.batch:
            later = [other for other in has if other.id == reply.batch]
            if not later:
                return  # the slot was given up meanwhile, and what it had was handed out again
            flight = later[0]
        if reply.first != flight.n_done or reply.first + len(reply.values) > flight.n_own:
            reply = self._own_part(flight, reply)
        tasks = flight.tasks[reply.first : reply.first + len(reply.values)]
        if len(tasks):
            marks = memoryview(reply.marks).cast("d")
            self.durations.observe(flight.kind, marks[-1] - marks[0], len(tasks))
            flight.n_done += len(tasks)
            if self._suspects.losses:
                self._suspects.clear(tasks)
        if reply.peak_rss:
            self._peaks[slot] = reply.peak_rss
        if reply.ended:
            has.remove(flight)
            if flight.n_done < flight.n_own:
                self._put_back(flight, flight.n_done, flight.n_own)
            if not has and self.stealing.is_limited(slot):
                self.stealing.lift(slot)
        if has:
            has[0].since = time.perf_counter()
        self.source.settle(slot, flight.template, tasks, reply)

    def _own_part(self, flight: Flight, reply: Reply) -> Reply:
        """Return what of a reply counts, and free what does not."""
        part, left_out = own_part(flight, reply)
        others = dict(reply.subflows)
        for place in left_out:
            for wire in filter(is_segment, (reply.values[place], others.get(place))):
                self.backend.arena.free(wire)
        return part

    def _put_back(self, flight: Flight, first: int, end: int) -> None:
        if first < end:
            self.source.put_back(flight.template, flight.tasks[first:end])

    def _take_loss(self, lost: Lost) -> None:
        """Settle the tasks of a slot that lost its worker; the slot has none until it joins again."""
        slot = lost.slot
        flights = list(self.flights[slot])
        self.flights[slot].clear()
        self.source.forget(slot)
        pending = self.deadlines.pending_kills.pop(slot, None)
        self.stealing.lift(slot)
        loss = WorkerLoss(lost, self.source, pending, ends_tasks=self.backend.traits.ends_tasks)
        for flight, task in loss.settle(flights, self._suspects):
            name, last_errors = self.source.name(int(task)), self.console.last_errors(slot, int(task))
            error = worker_died(lost, name, self._peaks[slot], self._addresses[slot], last_errors)
            self.source.failed(slot, flight.template, task, error)
        self.pids[slot] = self._peaks[slot] = 0

    # By the clock

    def check_deadlines(self) -> None:
        """End the workers of tasks that have run for too long; kill those that were asked to end and did not."""
        now = time.perf_counter()
        for slot, task in self.deadlines.overdue([has[0] if has else None for has in self.flights], now):
            self._time_out(slot, task, now)
        for slot in self.deadlines.due_kills(now):
            self.backend.kill(slot)

    def check_memory(self) -> None:
        """Kill the workers of tasks that have more memory than they declare."""
        for slot, task, error in self.memory.exceeding(self.flights, self.pids, time.perf_counter()):
            if slot not in self.deadlines.pending_kills:
                self.source.killing(slot, task, error)
                self.kill(slot, task, error)

    def _time_out(self, slot: int, task: int, now: float) -> None:
        """Ask a worker to end whose task takes too long; the task fails when the worker is gone."""
        stack = self.backend.where([slot]).get(slot, "")
        error = self.deadlines.plan_kill(slot, task, now)
        if stack:
            error.add_note("where it was, innermost call first:\n" + stack)
        self.source.killing(slot, task, error)
        self.backend.terminate(slot)

    def kill(self, slot: int, task: int, error: TaskError) -> None:
        """End a worker at once; its task fails with this error when the worker is gone."""
        self.deadlines.pending_kills[slot] = PendingKill(task, error, math.inf)
        self.backend.kill(slot)

    def kill_all(self) -> None:
        """End all workers that have work."""
        for slot, has in enumerate(self.flights):
            if has:
                self.backend.kill(slot)

    def withdraw(self) -> None:
        """Have slots report that they do not run what was reclaimed from them."""
        for slot, has in enumerate(self.flights):
            if has:
                self.backend.withdraw(slot)

    def make_room(self, catalog: TaskCatalog, n_wanted: int) -> None:
        """Start workers for more tasks, before `grow`.

        Raises:
            InsufficientMemory: one of the tasks declares more than there is.
            WorkerStartFailed: no worker can be started.
        """
        self.memory.check_all(catalog)
        self.backend.open(n_wanted)

    def grow(self, catalog: TaskCatalog, n_kinds: int) -> None:
        """Continue with more tasks, of so many kinds; `make_room` did not raise."""
        self.memory.grow(catalog)
        self.deadlines.grow(catalog)
        self.console.grow(catalog)
        self.durations.grow(n_kinds)

    # What slots do

    @property
    def is_idle(self) -> bool:
        """Whether no slot has a batch."""
        return not any(self.flights)

    def task_at(self, slot: int, position: int | None = None) -> Any | None:
        """Return the task that a slot runs, or ran at a position; None if it has none that still needs an outcome."""
        batch, at = unmark(self.backend.position(slot) if position is None else position)
        for flight in self.flights[slot]:
            if flight.id == batch:
                return flight.tasks[at]
        return None

    def place(self, slot: int) -> str:
        """Return where a slot's worker is, for messages."""
        address = self._addresses[slot]
        return f"{address}, pid {self.pids[slot]}" if address else f"pid {self.pids[slot]}"


def _is_soon_free(flights: deque[Flight]) -> bool:
    return not flights or flights[0].is_short
