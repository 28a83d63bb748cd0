"""The one loop of a run: what may run becomes batches, batches go to a backend, replies become outcomes.

RunState.take ──> Shipment.batch ──> Backend.send        (fill: breadth first, two batches a slot)
    ↑                                     │
completed, failed, put_back  <── Reply, Joined, Lost <── Backend.wait

Dispatcher   the loop, one thread
Flight       a batch that a slot has
Claims       what is taken back from slots that have not begun it
Durations    how many tasks make a batch
Books        the columns of the result, and the events
Holdings     the values
Console      what tasks print, log and warn of
Watch        what is done by the clock
Memory       what is admitted, and what is ended, for the memory it takes
Keeper       what earlier runs did, and what of this one is kept
Display      what is shown of the run as it goes
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from forgepar.backends.base import UNKNOWN_POSITION, Backend, Joined, Lost, Notice, Told, traits_of
from forgepar.backends.board import mark, unmark
from forgepar.backends.exceptions import is_kind
from forgepar.backends.output import UNKNOWN_TASK
from forgepar.backends.wire import Reply
from forgepar.batching import Durations
from forgepar.books import Books
from forgepar.cancellation import CancellationToken
from forgepar.claims import Claims
from forgepar.console import Console
from forgepar.displays import Display, FailedTask
from forgepar.effects import Effect, FellBack, LayerStarted, Retried, Skipped
from forgepar.errors import ArenaFull, RunTimeout, StoreError, WrongProcess, add_note
from forgepar.events import (
    Sink,
    WorkflowCancelled,
    WorkflowDeadlockTimeout,
    WorkflowMemoryLow,
    WorkflowRolledBack,
    WorkflowTaskMemoryExceeded,
    WorkflowTaskRolledBack,
    WorkflowTaskTimedOut,
)
from forgepar.faults import raised, worker_died
from forgepar.flight import Flight, own_part
from forgepar.holdings import Holdings
from forgepar.keeping import Keeper
from forgepar.machine import available_memory
from forgepar.memory import Memory
from forgepar.plan import IntArray, Plan, Tasks, as_index
from forgepar.result import Outputs
from forgepar.rollback import Rollback
from forgepar.runstate import RunPolicy, RunState, Status, Wear
from forgepar.shipping import Shipment
from forgepar.standing import error_text
from forgepar.values.codec import Wire, decode, encode, is_segment
from forgepar.watch import GOES_ON, Sentence, Watch

IN_FLIGHT = 2  # batches a slot: the second hides the round trip of the first
# A batch of at most twice what batches aim at: behind it a second one saves its round trip, else 1 % at most.
_SHORT = 2.0
_MOST_LOSSES = 3  # of its worker under a task, where nothing tells what that was at; after the first it runs alone
_WEIGH_SECONDS = 0.01  # between two weighings of an eager order, at least


class Dispatcher:
    """Runs one plan on one backend.

    Args:
        plan: the workflow.
        policy: the run's rules.
        backend: an open backend.
        run_id: the run's id.
        shipment: writes the batches.
        sinks: who gets the events.
        next_batch: gives ever larger numbers for the life of the backend.
        memory: says what may run at once for the memory that it takes.
        console: shows what tasks print and log.
        cancel: calls the run off.
        keeper: keeps the run, and has what earlier ones did.
        display: shows how the run stands; it raises nothing.

    Attributes:
        version: even while this waits and nothing changes, odd while it works; never the same twice.
        ended_by: what ended the run, where that was the clock.
        was_cancelled: whether it was called off.
        rollback: what was undone, where there was anything to be.
    """

    def __init__(
        self,
        plan: Plan,
        policy: RunPolicy,
        backend: Backend,
        run_id: str,
        shipment: Shipment,
        sinks: Sequence[Sink],
        next_batch: Callable[[], int],
        memory: Memory,
        console: Console,
        cancel: CancellationToken | None = None,
        keeper: Keeper | None = None,
        display: Display | None = None,
    ) -> None:
        self.plan = plan
        self.run_id = run_id
        self.version = 1
        self.state = RunState(plan, policy)
        self.books = Books(plan, run_id, sinks, backend.n_slots, backend.arena, keeper)
        self.books.ledger.schedule = policy.schedule
        self._keeper = keeper
        self._owner = os.getpid()
        self._display = display
        self._active: RunState | Rollback = self.state
        self.rollback: Rollback | None = None
        self._handled: dict[int, Exception] = {}
        self._holdings = Holdings(plan, policy, shipment, backend.arena)
        self._policy = policy
        self.backend = backend
        self._shipment = shipment
        self._next_batch = next_batch
        traits = traits_of(backend)
        self._remembers = traits.remembers
        self._ends_tasks = traits.ends_tasks
        self._short_seconds = _SHORT * traits.batch_seconds
        self._tells_at_end = traits.tells_at_end
        self._withdraw: Callable[[int], None] | None = getattr(backend, "withdraw", None)
        self._alone = self._find_alone()
        self._losses: dict[int, int] = {}  # by task, how often its worker was lost in the midst of its batch
        self.durations = Durations(len(plan.callables), traits.batch_seconds)
        self.flights: list[deque[Flight]] = [deque() for _ in range(backend.n_slots)]
        self.pids = [0] * backend.n_slots
        self._claims = Claims(backend, self.flights, self.pids)
        self._peaks = [0] * backend.n_slots
        self._wears = policy.wear != Wear()
        self._watch = Watch(plan, policy, backend)
        self._memory = memory
        self._may_be_parked = self._is_paused = False
        self.console = console
        self._cancel = cancel
        self.ended_by: RunTimeout | None = None
        self.was_cancelled = False
        self._is_killed = False
        self._weighed_at = 0.0
        self._weigh_seconds = 0.0

    def run(self) -> None:
        """Run the plan to its end, whatever that is; `state` and `ledger` say which.

        An exception out of here (an interrupt, workers that do not start) leaves slots with work: close the backend.
        """
        try:
            self._run()
        finally:
            self.version += 1  # at rest, for whoever still looks

    def _run(self) -> None:
        self.books.start_clock()
        restored = None if self._keeper is None else self._keeper.begin(self.books.ledger, self.backend.arena)
        self.books.begin()
        for joined in self.backend.joined():
            self._welcome(joined)
        self._watch.begin(self.books.ledger.began)
        if self._cancel is not None and self._cancel.ends_at is not None:
            self._watch.cancel_at = time.perf_counter() + self._cancel.ends_at - time.monotonic()
        if self._keeper is not None and restored is not None:
            self._restore(self._keeper, restored)
        self._note(self.state.begin())
        self._loop()
        if self.state.halted:
            self.state.end()
        if self.state.status_is_bad and self._policy.rollback != "none":
            self._roll_back()
        self._take(self.backend.wait(0.0))  # what was printed before the last reply
        self._take(self.backend.rest())
        self._check_owner()
        self._shipment.close()
        self._tell_what_to_drop()
        self.books.end(self.state.status)

    def _loop(self) -> None:
        while True:
            self._check_owner()
            if self._cancel is not None and self._cancel.is_cancelled and self.rollback is None:
                self._call_off(kills=self._cancel.kills)
            for task in self._watch.due_retries():
                self._active.retry(task)
            if self._wears:
                self._renew_the_worn()
            for flight, first, end in self._claims.step(is_wanted=self._idles_for_nothing()):
                self._put_back(flight, first, end)
            self._fill()
            if not self._watch.is_idle:
                self._obey_the_clock()
            if self._memory.is_declared:
                self._end_what_exceeds()
            if self._holdings.has_coded:
                self._tell_what_to_drop()
            self.books.keep()  # after the batches went out: workers wait for those, and nobody for this
            if self._keeper is not None:
                self._keeper.beat(time.perf_counter())
            if self._display is not None:
                self._display.beat(time.perf_counter())
            self._check_owner()
            # A slot whose tasks were claimed back still answers for them: the next run must not get that answer.
            if self._active.finished or self._active.halted:
                if not any(self.flights):
                    break
                if self._active.finished and self._withdraw is not None:
                    for slot in (slot for slot, has in enumerate(self.flights) if has):
                        self._withdraw(slot)
            self.backend.tell(self.plan.n_tasks, self.state.n_settled, self.state.n_out, self.state.layer)
            patience = self._patience()
            self.version += 1
            began = time.perf_counter()
            notices = self.backend.wait(patience)
            self.version += 1
            if not self._watch.is_idle:
                now, firsts = time.perf_counter(), [has[0] if has else None for has in self.flights]
                self._watch.slept(patience, began, now, firsts)
            self._take(notices)

    def _check_owner(self) -> None:
        """Raise in a child that a callback has forked: the run is its parent's."""
        if os.getpid() != self._owner:
            raise WrongProcess.here(self._owner)

    def _roll_back(self) -> None:
        """Undo what was done, where a function does that."""
        state, books = self.state, self.books
        failed = [task for task in books.ledger.errors if state.status[task] == Status.FAILED]
        status, lost = self._with_taken_over()
        rollback = Rollback(self.plan, status, self._policy.rollback, failed)
        rollback.errors |= lost
        self.rollback = self._active = rollback
        if rollback.finished:
            return
        self._watch.begin_rollback(time.perf_counter())
        self.backend.call_off(is_off=False)
        self._loop()
        report = rollback.report()
        books.event(WorkflowRolledBack(time.time(), len(report.compensated), len(report.failed), report.n_without))

    def _with_taken_over(self) -> tuple[NDArray[np.int8], dict[int, Exception]]:
        """Return where tasks stand, those as done that this run took over; and what keeps some from being undone."""
        status, lost = self.state.status, dict[int, Exception]()
        if self._keeper is not None and len(taken_over := self._keeper.taken_over()):
            status = status.copy()
            for task in taken_over.tolist():
                is_undone = int(self.plan.template_of[task]) in self.plan.stand_ins.undo
                try:
                    if is_undone and task in self._holdings.unloaded:
                        self._holdings.load_one(task, self._keeper.load)
                    status[task] = Status.COMPLETED
                except (StoreError, ArenaFull) as error:
                    lost[task] = error
        return status, lost

    def _restore(self, keeper: Keeper, tasks: IntArray) -> None:
        """Have tasks done that earlier runs did; what their values decide is decided now."""
        if not len(tasks):
            return
        self.books.restored(tasks)
        self._holdings.restore(tasks, self.plan)
        self.state.restore(tasks)
        for gate in sorted(self.plan.branchings.keys() & set(tasks.tolist()), key=self.plan.layers.__getitem__):
            self._holdings.unloaded.add(gate)
            self._holdings.load_one(gate, keeper.load)
            self._decide(range(gate, gate + 1))
        self._note(self.state.pass_on(tasks))

    def _keep(self, keeper: Keeper, tasks: Tasks, template: int, reply: Reply) -> None:
        """Let what tasks returned be kept: not what stands in for a value, nor that of a task which became others."""
        if template in self.plan.stand_ins.base_of:
            return
        if not reply.subflows:
            keeper.values(tasks, reply.values)
            return
        others = {place for place, _ in reply.subflows}
        for place, task in enumerate(map(int, tasks)):
            if place not in others:
                keeper.values(range(task, task + 1), [reply.values[place]])

    # Handing out

    def _fill(self) -> None:
        """Give every slot its share of what is ready, then a second batch to those that are soon done with the first.

        A slot with a long task gets none: what waits behind it could run on the slot that is free next.
        """
        state, flights = self._active, self.flights
        if self._memory.is_scarce(time.perf_counter()) and state.head() is not None:
            self._hold_back()
            return
        self._is_paused = False
        if self._may_be_parked:
            state.unpark()
            self._may_be_parked = False
        if self._policy.schedule == "eager":
            self._weigh()  # before the look at the head, which it may change
        for depth in range(1, self._most_in_flight + 1):
            head = state.head()
            if head is None:
                break
            # Fixed for the round: the first slots are not to get more than the last.
            share = -(-head[1] // len(flights))
            for slot, has in enumerate(flights):
                if len(has) < depth and self.pids[slot] and not self._claims.is_limited(slot) and _is_soon_free(has):
                    self._give(slot, share)

    def _give(self, slot: int, share: int) -> None:
        """Send a slot a batch; where tasks of one template are too few for it, a second one of the next."""
        while (
            share > 0 and len(self.flights[slot]) < self._most_in_flight and (head := self._active.head()) is not None
        ):
            template, called = head[0], self.plan.callable_of[head[0]]
            if self._memory.is_declared and not self._admits(slot, template):
                continue
            size = 1 if template in self._alone else self.durations.batch_size(called, share, 1)
            if self._wears and (size := min(size, self._n_left(slot))) < 1:
                return
            tasks = self._active.take(size)
            if self._losses:
                tasks = self._apart(template, tasks)
            seconds = self.durations.seconds[called] * len(tasks)
            is_short = seconds <= self._short_seconds  # False for nan: nothing is known
            number = self._next_batch()
            if self._holdings.unloaded and self._keeper is not None:
                self._holdings.load(tasks, self._keeper.load)
            if not self._remembers:
                self._shipment.forget(slot)
            batch = self._shipment.batch(slot, number, template, tasks, self._holdings.values, self.state.attempts)
            self.flights[slot].append(Flight(number, template, tasks, is_short))
            self.backend.send(slot, batch)
            share -= len(tasks)
            if len(tasks) == size or not is_short:
                return

    @property
    def _most_in_flight(self) -> int:
        """Batches a slot; while a task is suspected one, as the loss of a worker may take the reply before along."""
        return 1 if self._losses else IN_FLIGHT

    def _find_alone(self) -> frozenset[int]:
        """Return the templates whose tasks get a batch each.

        Those that may be ended amid a batch, or must not be repeated, where the outcomes of a batch come together:
        what had ended before in the batch would run again.
        """
        if not self._tells_at_end:
            return frozenset()
        options = [self.plan.specs[row.spec].options for row in self.plan.templates]
        alone = {number for number, mine in enumerate(options) if mine.effects or mine.timeout is not None}
        return frozenset(alone | set(self.plan.stand_ins.undo.values()))

    def _apart(self, template: int, tasks: Tasks) -> Tasks:
        """Have a task under which a worker was lost run alone, as the next loss is to tell whether it is to blame."""
        alone = next((place for place, task in enumerate(tasks) if int(task) in self._losses), len(tasks))
        n_kept = max(1, alone)
        if n_kept < len(tasks):
            self._active.put_back(template, tasks[n_kept:])
        return tasks[:n_kept]

    def _welcome(self, joined: Joined) -> None:
        self.pids[joined.slot] = joined.pid
        self.books.joined(joined)

    def _admits(self, slot: int, template: int) -> bool:
        """Tell whether a slot may get tasks of a template; set them aside where there is no memory for them now."""
        if not self._memory.fits(slot, template, self.flights):
            self._active.park()
            self._may_be_parked = True
            return False
        if not self.flights[slot]:
            self._memory.weigh_idle(slot, self.pids[slot], template)
        return True

    def _hold_back(self) -> None:
        """While memory is scarce, hand out nothing but, if nothing runs, one batch: it is not for us that it is."""
        if not self._is_paused:
            self._is_paused = True
            self.books.event(WorkflowMemoryLow(time.time(), available_memory(), self._memory.guard.total))
        if not any(self.flights):
            for slot, pid in enumerate(self.pids):
                if pid:
                    self._give(slot, 1)
                    return

    def _n_left(self, slot: int) -> int:
        """Count the tasks that a slot's worker may still get before it is renewed."""
        wear = self._policy.wear
        if wear.most_memory is not None and self._peaks[slot] >= wear.most_memory:
            return 0
        return self.plan.n_tasks if wear.most_tasks is None else wear.most_tasks - self.backend.n_given(slot)

    def _renew_the_worn(self) -> None:
        for slot, has in enumerate(self.flights):
            if self.pids[slot] and not has and self._n_left(slot) < 1:
                self._renew(slot)

    def _renew(self, slot: int) -> None:
        self.pids[slot] = self._peaks[slot] = 0
        self._shipment.forget(slot)
        self.backend.renew(slot)

    def _tell_what_to_drop(self) -> None:
        """Tell slots without work what nobody needs of what they have mapped; others hear it with their next batch."""
        for slot, has in enumerate(self.flights):
            if not has and self.pids[slot] and (batch := self._shipment.drops(slot)) is not None:
                self.backend.send(slot, batch)

    def _weigh(self) -> None:
        """Tell an eager order what was learnt of durations, in at most a twentieth of the time."""
        now = time.perf_counter()
        if now - self._weighed_at >= max(20 * self._weigh_seconds, _WEIGH_SECONDS):
            self._active.weigh([self.durations.seconds[number] for number in self.plan.callable_of])
            self._weighed_at = time.perf_counter()
            self._weigh_seconds = self._weighed_at - now

    def _idles_for_nothing(self) -> bool:
        """Tell whether nothing is ready for a slot that might idle."""
        return not self._active.halted and self._active.head() is None

    def _patience(self) -> float | None:
        """Return how long `wait` may block: forever, unless a slot idles while another has tasks it has not begun."""
        patience = self._claims.patience(is_over=self._active.halted)
        next_look = self._memory.next_look(self.flights)
        if self._is_paused:
            next_look = min(next_look, self._memory.guard.look_at)
        if not self._watch.is_idle:
            next_look = min(next_look, self._watch.next_look())
        if self._keeper is not None:
            next_look = min(next_look, self._keeper.look_at)
        if self._display is not None:
            next_look = min(next_look, self._display.look_at)
        if next_look == math.inf:
            return patience
        left = self._watch.patience(next_look, time.perf_counter())
        return left if patience is None else min(left, patience)

    # Outcomes

    def _take(self, notices: Sequence[Notice]) -> None:
        for notice in notices:
            if type(notice) is Reply:
                self._take_reply(notice)
            elif type(notice) is Joined:
                self._welcome(notice)
            elif type(notice) is Lost:
                self._take_loss(notice)
            else:
                assert isinstance(notice, Told)
                at = self._task_at(notice.slot, notice.position)
                self.console.hear(notice.slot, notice.said, UNKNOWN_TASK if at is None else at)

    def _take_reply(self, reply: Reply) -> None:
        slot, has = reply.slot, self.flights[reply.slot]
        if not has or (flight := has[0]).id != reply.batch:
            later = [other for other in has if other.id == reply.batch]
            if not later:
                return  # the slot was given up meanwhile, and what it had was handed out again
            flight = later[0]
        if reply.first != flight.n_done or reply.first + len(reply.values) > flight.n_own:
            reply = self._own_part(flight, reply)
        values = reply.values
        tasks = flight.tasks[reply.first : reply.first + len(values)]
        if len(tasks):
            marks = memoryview(reply.marks).cast("d")
            self.durations.observe(self.plan.callable_of[flight.template], marks[-1] - marks[0], len(tasks))
            flight.n_done += len(tasks)
            for task in self._losses.keys() & set(map(int, tasks)) if self._losses else ():
                del self._losses[task]
        if reply.peak_rss:
            self._peaks[slot] = reply.peak_rss
        n_good = len(tasks) - (reply.failure is not None)
        if self.rollback is not None:
            self._take_undone(tasks[:n_good])
        else:
            self.books.reply(tasks, reply)
            if n_good:
                if self._keeper is not None:
                    self._keep(self._keeper, tasks[:n_good], flight.template, reply)
                self._holdings.put(slot, tasks[:n_good], values)
                if reply.subflows:
                    self._complete_subflows(tasks[:n_good], flight.template, reply)
                else:
                    self._complete(tasks[:n_good])
        if reply.ended:
            has.remove(flight)
            if flight.n_done < flight.n_own:
                self._active.put_back(flight.template, flight.tasks[flight.n_done : flight.n_own])
            if not self.flights[slot] and self._claims.is_limited(slot):
                self._claims.lift(slot)
        if self.flights[slot]:
            self.flights[slot][0].since = time.perf_counter()
        if reply.failure is not None:
            error, trace = raised(reply.failure), reply.failure.traceback
            self._fail(int(tasks[-1]), flight.template, error, slot, trace, reply.ran_by)

    def _own_part(self, flight: Flight, reply: Reply) -> Reply:
        """Return what of a reply counts, and free what does not."""
        part, left_out = own_part(flight, reply)
        others = dict(reply.subflows)
        for place in left_out:
            for wire in filter(is_segment, (reply.values[place], others.get(place))):
                self.backend.arena.free(wire)
        return part

    def _complete(self, tasks: Tasks) -> None:
        if self.plan.branchings:
            self._decide(tasks)
        self._note(self.state.completed(tasks))

    def _complete_subflows(self, tasks: Tasks, template: int, reply: Reply) -> None:
        """Complete tasks of which some returned a workflow, when that has joined the run; fail those whose cannot."""
        pending, unfit = set(map(int, tasks)), list[tuple[int, Exception]]()
        for place, wire in reply.subflows:
            task = int(tasks[place])
            try:
                if self.state.halted:  # it has no value, as what was to make that never runs
                    pending.remove(task)
                    self.state.cancelled(range(task, task + 1))
                    self.books.cancelled(task)
                else:
                    self._splice(task, wire)
            except Exception as error:
                pending.remove(task)
                unfit.append((task, error))
            finally:
                if is_segment(wire):
                    self.backend.arena.free(wire)
        for task, fault in unfit:
            self._fail(task, template, fault, reply.slot, "")
        for task in sorted(pending):
            self._complete(range(task, task + 1))

    def _splice(self, task: int, wire: Wire) -> None:
        """Have the tasks of a workflow that a task returned join the run.

        Raises:
            Exception: they cannot; everything is as before.
        """
        plan = self.plan.spliced(task, decode(wire, self.backend.arena))
        self._memory.grow(plan)
        self._shipment.grow(plan)
        self.plan = plan
        self.state.grow(plan)
        self.books.grow(plan, task)
        self._holdings.grow(plan, self._policy)
        self._watch.grow(plan)
        self.durations.grow(len(plan.callables))
        self._alone = self._find_alone()
        self.console.grow(plan)
        if self._keeper is not None:
            self._restore(self._keeper, self._keeper.grow(plan))
        self.backend.open(max(end - begin for begin, end in pairwise(plan.layer_start)))

    def _decide(self, tasks: Tasks) -> None:
        """Leave out the branches that values just known are against."""
        for task in self.plan.branchings.keys() & set(map(int, tasks)):
            effects = self.state.decide(task, is_true=bool(self._holdings.values[task]))
            self._note(effects)
            for effect in effects:
                if isinstance(effect, Skipped):
                    self._holdings.pass_over(effect.tasks)

    def _take_undone(self, tasks: Tasks) -> None:
        assert self.rollback is not None
        if len(tasks):
            self.rollback.completed(tasks)
            self.state.status[as_index(tasks)] = Status.COMPENSATED
            for task in tasks:
                self.books.event(WorkflowTaskRolledBack(time.time(), self.plan.name(int(task)), None))

    def _fail(
        self, task: int, template: int, error: Exception, slot: int, traceback: str, worker: int | None = None
    ) -> None:
        plan, attempt = self.plan, self.state.attempts.get(task, 1)
        worker = slot if worker is None else worker
        add_note(
            error,
            f"task {plan.name(task)!r}, layer {plan.layers[task]}, attempt {attempt}, worker {worker} "
            f"({self._place(slot)}pid {self.pids[slot]})",
        )
        if traceback:
            add_note(error, "traceback in the worker:\n" + traceback.rstrip())
        if self.rollback is not None:
            if (wait := self.rollback.tries_again(task, error)) is not None:
                self._watch.delay_by(task, wait, time.perf_counter())
                return
            self.rollback.failed(task, error)
            self.books.event(WorkflowTaskRolledBack(time.time(), plan.name(task), error_text(error)))
            return
        self.books.failure(task, error, worker)
        was_halted = self.state.halted
        is_own = template not in plan.stand_ins.base_of
        if not is_own and error.__context__ is None:
            object.__setattr__(error, "__context__", self._handled[task])  # its class may refuse
        may_retry = is_own and is_kind(error, plan.spec(task).options.retry_on)
        self._note(self.state.failed(task, may_retry=may_retry))
        if self._display is not None:
            goes_on = self.state.status[task] != Status.FAILED
            self._display.failed(FailedTask(plan.name(task), attempt, error_text(error), goes_on))
        if self.state.halted and not was_halted:
            self._halt()

    def _take_loss(self, lost: Lost) -> None:
        """Blame the task that a dead worker was at; hand out the rest of what it had again."""
        slot, flights = lost.slot, self.flights[lost.slot]
        self.flights[slot] = deque()
        self._shipment.forget(slot)
        sentence = self._watch.sentences.pop(slot, None)
        is_unknown = lost.position == UNKNOWN_POSITION
        at_batch, at = unmark(self._suspected(flights) if is_unknown else lost.position)
        also = dict(map(unmark, lost.also))
        blamed: list[tuple[int, int]] = []
        for flight in flights:
            first, end = flight.n_done, flight.n_own
            if flight.id == at_batch:
                first = self._repeat(flight, first, min(at, end), lost)
                if at == first < end:
                    blamed.append((int(flight.tasks[at]), flight.template))
                    first += 1
            n_begun = end if is_unknown or flight.id < at_batch else min(also.get(flight.id, -1) + 1, end)
            if first < n_begun and self._has_effects(flight.template):
                # They may have ended, so they are not to run again but by their retries.
                blamed += [(int(task), flight.template) for task in flight.tasks[first:n_begun]]
                first = n_begun
            first = self._repeat(flight, first, n_begun, lost)
            self._put_back(flight, first, end)
        self._claims.lift(slot)
        self._holdings.free_strays(lost.pid)
        if sentence is None:
            self.books.death(lost, blamed[0][0] if blamed else None)
        for task, template in blamed:
            self._blame(task, template, lost, sentence)
        self.pids[slot] = self._peaks[slot] = 0

    def _has_effects(self, template: int) -> bool:
        has_effects: bool = self.plan.specs[self.plan.templates[template].spec].options.effects
        return has_effects or template in self.plan.stand_ins.undo.values()

    def _repeat(self, flight: Flight, first: int, end: int, lost: Lost) -> int:
        """Hand out again what a lost worker may have done and had not told of; return the place behind it."""
        if first >= end:
            return first
        if self.rollback is None and not self.state.halted:
            for task in map(int, flight.tasks[first:end]):
                self.books.repeated(task, lost, self.state.repeated(task))
        self._put_back(flight, first, end)
        return end

    def _suspected(self, flights: Sequence[Flight]) -> int:
        """Note what a worker was lost under; return the mark of the task to blame, if there is one by now."""
        if not flights or self._has_effects(flights[0].template):
            return 0
        flight = flights[0]
        for task in map(int, flight.tasks[flight.n_done : flight.n_own]):
            self._losses[task] = self._losses.get(task, 0) + 1
        is_alone = flight.n_own - flight.n_done == 1
        first = int(flight.tasks[flight.n_done])
        if not is_alone or self._losses[first] < _MOST_LOSSES:
            return 0
        del self._losses[first]
        return mark(flight.id, flight.n_done)

    def _place(self, slot: int) -> str:
        address = self.books.ledger.addresses.get(slot)
        return f"{address}, " if address else ""

    def _put_back(self, flight: Flight, first: int, end: int) -> None:
        if first < end:
            self._active.put_back(flight.template, flight.tasks[first:end])

    def _blame(self, task: int, template: int, lost: Lost, sentence: Sentence | None) -> None:
        """Let the task that a lost worker was at fail; not if the run ended it, or its worker was ended for another."""
        if self.rollback is None:
            self.books.cut_short(task, lost)
        if sentence is not None and sentence.task == task:
            self._fail(task, template, sentence.error, lost.slot, "")
            return
        # Begun just after the one meant had ended; if it has effects and goes on, it is not to be run beside itself.
        is_harmless = self._ends_tasks or not self._has_effects(template)
        if (sentence is not None and is_harmless) or self._active.halted:
            if self.rollback is None and not self.state.halted:
                self.books.repeated_after_cut(task, self.state.repeated(task))
            self._active.put_back(template, range(task, task + 1))
            return
        address = self.books.ledger.addresses.get(lost.slot, "")
        error = worker_died(lost, self.plan.name(task), self._peaks[lost.slot], address)
        if told := self.console.last_errors(lost.slot, task):
            error.add_note("the last that it wrote to stderr:\n" + told)
        self._fail(task, template, error, lost.slot, "")

    # By the clock

    def _note(self, effects: Sequence[Effect]) -> None:
        """Write effects down, and act on those that the clock has to do with."""
        self.books.effects(effects)
        for effect in effects:
            if type(effect) is LayerStarted:
                self._watch.layer_begins(effect.layer, time.perf_counter())
            elif type(effect) is Retried:
                self._watch.delay(effect.task, self.state.tries(effect.task) - 1, time.perf_counter())
            elif type(effect) is FellBack:
                self._fall_back(effect.task, effect.step)

    def _fall_back(self, task: int, place: int) -> None:
        """Take a step of a failed task's fallback."""
        plan, step = self.plan, self.plan.spec(task).options.fallback[place]
        error = self.books.ledger.errors[task]  # it is forgotten when the books are kept
        if step.kind == "retry":
            self._watch.delay_by(task, step.wait, time.perf_counter())
        elif step.kind == "call":
            self._handled[task] = error
            self._shipment.caught(task, error)
            self.state.stand_in(task, plan.stand_ins.catch[int(plan.template_of[task]), place])
        elif step.kind == "skip":
            self._note(self.state.left_out(task))
        else:
            self._holdings.put_one(task, encode(step.what, self.backend.arena))
            self._decide(range(task, task + 1))
            self._note(self.state.replaced(task))

    def _obey_the_clock(self) -> None:
        watch, now = self._watch, time.perf_counter()
        for slot, task in watch.overdue([has[0] if has else None for has in self.flights], now):
            self._time_out(slot, task, now)
        for slot in watch.due_kills(now):
            self.backend.kill(slot)
        if (ended := watch.run_out(now)) is not None and not self.state.halted:
            self._run_out_of_time(*ended)
        if self.rollback is not None and watch.rollback_ran_out(now):
            self._end_rollback(self.rollback)
        if now >= watch.end_at:
            watch.end_at = math.inf
            self._end_what_runs()

    def _time_out(self, slot: int, task: int, now: float) -> None:
        """Have the worker ended whose task takes too long; the task fails when that is gone."""
        stack = self.backend.where([slot]).get(slot, "")
        error = self._watch.condemn(slot, task, now)
        if stack:
            error.add_note("where it was, innermost call first:\n" + stack)
        attempt = self.state.attempts.get(task, 1)
        self._tell_begun(slot, task)
        self.books.event(WorkflowTaskTimedOut(time.time(), self.plan.name(task), attempt, slot, error.seconds))
        self.backend.terminate(slot)

    def _end_what_exceeds(self) -> None:
        """End the workers of tasks that have more memory than they declare: at once, as it grows on."""
        for slot, task, error in self._memory.exceeding(self.flights, self.pids, time.perf_counter()):
            if slot in self._watch.sentences:
                continue
            self._watch.sentences[slot] = Sentence(task, error, math.inf)
            attempt = self.state.attempts.get(task, 1)
            name = self.plan.name(task)
            self._tell_begun(slot, task)
            self.books.event(WorkflowTaskMemoryExceeded(time.time(), name, attempt, slot, error.used, error.limit))
            self.backend.kill(slot)

    def _tell_begun(self, slot: int, task: int) -> None:
        """Have it on record that a task began of which no reply may ever tell."""
        if self.rollback is None:
            self.books.begun(task, slot, self.backend.started(slot))

    def _run_out_of_time(self, layer: int, seconds: float) -> None:
        slots = {slot: task for slot in range(len(self.flights)) if (task := self._task_at(slot)) is not None}
        stacks = {self.plan.name(slots[slot]): stack for slot, stack in self.backend.where(list(slots)).items()}
        running = tuple(map(self.plan.name, slots.values()))
        what = "the run" if layer < 0 else f"layer {layer}"
        self.books.event(WorkflowDeadlockTimeout(time.time(), layer, seconds, running))
        at = ", ".join(map(repr, running[:5])) or "nothing"
        more = f" and {len(running) - 5} more" if len(running) > 5 else ""
        self.ended_by = RunTimeout(
            f"{what} took longer than the {seconds:g} s it was given, and was ended; running then: {at}{more}",
            seconds=seconds,
            running=running,
            stacks=stacks,
        )
        if running and not self._ends_tasks:
            self.ended_by.add_note(f"what does not return within {self._policy.grace_seconds:g} s: {GOES_ON}")
        for name, stack in stacks.items():
            self.ended_by.add_note(f"where {name!r} was, innermost call first:\n{stack}")
        self._note(self.state.halt())
        self._halt()

    def _end_rollback(self, rollback: Rollback) -> None:
        """Give up undoing, as its time is over."""
        seconds = self._policy.rollback_seconds or 0.0
        rollback.give_up(
            RunTimeout(
                f"this was not undone within the {seconds:g} s that the rollback was given. Undo it yourself, and give "
                "it more time with rollback_timeout=.",
                seconds=seconds,
                running=tuple(self._running()),
                stacks={},
            )
        )
        self._halt()

    def _running(self) -> Iterator[str]:
        """Yield the names of the tasks that workers are at."""
        for slot in range(len(self.flights)):
            if (task := self._task_at(slot)) is not None:
                yield self.plan.name(task)

    def _task_at(self, slot: int, position: int | None = None) -> int | None:
        """Return the task that a slot is at, None where it is at none that it has still to answer for."""
        batch, at = unmark(self.backend.position(slot) if position is None else position)
        for flight in self.flights[slot]:
            if flight.id == batch:
                return int(flight.tasks[at])
        return None

    # Ending

    def _call_off(self, *, kills: bool) -> None:
        """End the run for whoever holds its token; again, if what runs is to be killed after all."""
        self._watch.cancel_at = math.inf
        if not self.state.halted:
            self.was_cancelled = True
            self.books.event(WorkflowCancelled(time.time(), kills, tuple(self._running())))
            self._note(self.state.halt())
            self._halt()
            self._watch.end_at = math.inf
        if kills and not self._is_killed:
            self._is_killed = True
            self._end_what_runs()

    def _halt(self) -> None:
        """Let no slot begin another task, and give what runs its grace."""
        self.backend.call_off()
        self._claims.limit_all()
        self._watch.end_at = time.perf_counter() + self._policy.grace_seconds

    def _end_what_runs(self) -> None:
        for slot, has in enumerate(self.flights):
            if has:
                self.backend.kill(slot)

    def outputs(self) -> Outputs:
        """Return the values that the result keeps, and free all others."""
        return self._holdings.outputs(self.state.status, self._keeper.load if self._keeper is not None else None)


def _is_soon_free(flights: deque[Flight]) -> bool:
    return not flights or flights[0].is_short
