"""The tasks of a run as work for slots, and what becomes of them; and the undoing of tasks after a run that failed.

    Reply ──> Recorder (columns, events) ──> Keeper (store) ──> ValueTable (values) ──> RunState (status, what is ready)

RunSource    the tasks of a run
UndoSource   what undoes them
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from forgepar.backends.base import Lost
from forgepar.backends.messages import Batch, Reply
from forgepar.engine.batches import BatchWriter
from forgepar.engine.in_flight import Flight
from forgepar.engine.recorder import Recorder
from forgepar.engine.services import RunServices
from forgepar.engine.slots import SlotScheduler
from forgepar.engine.value_table import ValueTable
from forgepar.engine.worker_failures import raised
from forgepar.errors import ArenaFull, StoreError, TaskError, TaskMemoryExceeded, TaskTimeout, add_note, error_text
from forgepar.machine import available_memory
from forgepar.records.display import FailedTask
from forgepar.records.events import (
    WorkflowMemoryLow,
    WorkflowTaskMemoryExceeded,
    WorkflowTaskRolledBack,
    WorkflowTaskTimedOut,
)
from forgepar.scheduling.effects import Effect, FellBack, LayerStarted, Retried, Skipped
from forgepar.scheduling.rollback import Rollback
from forgepar.scheduling.run_state import RunPolicy, RunState, Status
from forgepar.values.codec import Wire, decode, encode, is_segment
from forgepar.values.exceptions import is_kind
from forgepar.workflow.plan import IntArray, Plan, Tasks

_WEIGH_SECONDS = 0.01  # between two weighings of an eager queue, at least


class RunSource:
    """The tasks of a run as a `WorkSource`.

    Args:
        plan: the workflow.
        policy: the run's rules.
        batch_writer: writes the batches.
        recorder: writes the result's columns and the events.
        services: keeper and display.
        slots: run the tasks; this becomes their source.

    Attributes:
        plan: the workflow, with the tasks that were added so far.
        state: the status of each task.
        values: the values of tasks.
        alone: templates whose tasks get a batch each.
    """

    def __init__(
        self,
        plan: Plan,
        policy: RunPolicy,
        batch_writer: BatchWriter,
        recorder: Recorder,
        services: RunServices,
        slots: SlotScheduler,
    ) -> None:
        self.plan = plan
        self.state = RunState(plan, policy)
        self.recorder = recorder
        self.values = ValueTable(plan, policy, batch_writer, slots.backend.arena)
        self.alone = self._find_alone(slots)
        self._services = services
        self._slots = slots
        self._remembers = slots.backend.traits.remembers
        self._batch_writer = batch_writer
        self._handled: dict[int, Exception] = {}
        self._weighed_at = self._weigh_seconds = 0.0
        state = self.state
        self.head, self.take, self.put_back, self.retry = state.head, state.take, state.put_back, state.retry
        self.park, self.unpark = state.park, state.unpark
        self.drops, self.forget, self.joined = batch_writer.drops, batch_writer.forget, recorder.joined
        slots.source = self

    # What may run

    @property
    def is_over(self) -> bool:
        """Whether nothing is handed out any more."""
        return self.state.halted

    @property
    def finished(self) -> bool:
        """Whether nothing runs and nothing is to be handed out."""
        return self.state.finished

    def name(self, task: int) -> str:
        """Return a task's name."""
        return self.plan.name(task)

    def kind(self, template: int) -> int:
        """Return the number of the callable of a template."""
        return self.plan.callable_of[template]

    def weigh(self) -> None:
        """Give an eager queue the durations that are known, in at most a twentieth of the time."""
        now = time.perf_counter()
        if now - self._weighed_at >= max(20 * self._weigh_seconds, _WEIGH_SECONDS):
            seconds = self._slots.durations.seconds
            self.state.weigh([seconds[number] for number in self.plan.callable_of])
            self._weighed_at = time.perf_counter()
            self._weigh_seconds = self._weighed_at - now

    def _find_alone(self, slots: SlotScheduler) -> frozenset[int]:
        """Return the templates whose tasks get a batch each.

        Where the outcomes of a batch come together, those that may be ended amid a batch or must not be repeated: what
        had ended before them in the batch would run again.
        """
        if not slots.backend.traits.tells_at_end:
            return frozenset()
        options = [self.plan.specs[row.spec].options for row in self.plan.templates]
        alone = {number for number, mine in enumerate(options) if mine.effects or mine.timeout is not None}
        return frozenset(alone | set(self.plan.stand_ins.undo.values()))

    # Messages

    def message(self, slot: int, number: int, template: int, tasks: Tasks) -> Batch:
        """Return the batch of these tasks for a slot."""
        if self.values.unloaded:
            self.values.load(tasks, self._services.keeper.load)
        if not self._remembers:
            self._batch_writer.forget(slot)
        return self._batch_writer.batch(slot, number, template, tasks, self.values.values, self.state.attempts)

    # Outcomes

    def restore(self, tasks: IntArray) -> None:
        """Count tasks as done that earlier runs did, and decide what their values decide."""
        if not len(tasks):
            return
        self.recorder.restored(tasks)
        self.values.restore(tasks, self.plan)
        self.state.restore(tasks)
        for gate in sorted(self.plan.branchings.keys() & set(tasks.tolist()), key=self.plan.layers.__getitem__):
            self.values.unloaded.add(gate)
            self.values.load_one(gate, self._services.keeper.load)
            self._decide(range(gate, gate + 1))
        self.note(self.state.pass_on(tasks))

    def settle(self, slot: int, template: int, tasks: Tasks, reply: Reply) -> None:
        """Take in the outcomes of tasks; of the last one a failure, if the reply has one."""
        self.recorder.reply(tasks, reply)
        good = tasks[:-1] if reply.failure is not None else tasks
        if len(good):
            self._keep(good, template, reply)
            self.values.put(slot, good, reply.values)
            if reply.subflows:
                self._complete_subflows(slot, template, good, reply.subflows)
            else:
                self._complete(good)
        if reply.failure is not None:
            error = raised(reply.failure)
            self.failed(slot, template, int(tasks[-1]), error, reply.failure.traceback, reply.ran_by)

    def _keep(self, tasks: Tasks, template: int, reply: Reply) -> None:
        """Have values kept; not what stands in for one, nor the value of a task that returned a workflow."""
        keeper = self._services.keeper
        if template in self.plan.stand_ins.base_of:
            return
        if not reply.subflows:
            keeper.values(tasks, reply.values)
            return
        others = {place for place, _ in reply.subflows}
        for place, task in enumerate(map(int, tasks)):
            if place not in others:
                keeper.values(range(task, task + 1), [reply.values[place]])

    def _complete(self, tasks: Tasks) -> None:
        if self.plan.branchings:
            self._decide(tasks)
        self.note(self.state.completed(tasks))

    def _decide(self, tasks: Tasks) -> None:
        """Leave out the branches that new values exclude."""
        for task in self.plan.branchings.keys() & set(map(int, tasks)):
            effects = self.state.decide(task, is_true=bool(self.values.values[task]))
            self.note(effects)
            for effect in effects:
                if isinstance(effect, Skipped):
                    self.values.pass_over(effect.tasks)

    def failed(
        self, slot: int, template: int, task: Any, error: Exception, traceback: str = "", worker: int | None = None
    ) -> None:
        """Take in that a task failed: it runs again, falls back, or is over."""
        task, plan = int(task), self.plan
        attempt = self.state.attempts.get(task, 1)
        self.explain(slot, task, error, traceback, worker)
        self.recorder.failure(task, error, slot if worker is None else worker)
        is_own = template not in plan.stand_ins.base_of
        if not is_own and error.__context__ is None:
            object.__setattr__(error, "__context__", self._handled[task])  # its class may refuse
        may_retry = is_own and is_kind(error, plan.spec(task).options.retry_on)
        self.note(self.state.failed(task, may_retry=may_retry))
        is_open = self.state.status[task] != Status.FAILED
        self._services.display.failed(FailedTask(plan.name(task), attempt, error_text(error), is_open))

    def explain(self, slot: int, task: int, error: Exception, traceback: str, worker: int | None) -> None:
        """Add to an error which attempt of which task raised it, and where."""
        attempt, layer = self.state.attempts.get(task, 1), self.plan.layers[task]
        add_note(
            error,
            f"task {self.plan.name(task)!r}, layer {layer}, attempt {attempt}, worker "
            f"{slot if worker is None else worker} ({self._slots.place(slot)})",
        )
        if traceback:
            add_note(error, "traceback in the worker:\n" + traceback.rstrip())

    def note(self, effects: Sequence[Effect]) -> None:
        """Record effects, and do what they ask for."""
        self.recorder.effects(effects)
        deadlines = self._slots.deadlines
        for effect in effects:
            if type(effect) is LayerStarted:
                deadlines.layer_begins(effect.layer, time.perf_counter())
            elif type(effect) is Retried:
                deadlines.delay(effect.task, self.state.tries(effect.task) - 1, time.perf_counter())
            elif type(effect) is FellBack:
                self._fall_back(effect.task, effect.step)

    def _fall_back(self, task: int, place: int) -> None:
        """Take a step of a failed task's fallback."""
        plan, step = self.plan, self.plan.spec(task).options.fallback[place]
        error = self.recorder.ledger.errors[task]  # the recorder forgets it when it writes
        if step.kind == "retry":
            self._slots.deadlines.delay_by(task, step.wait, time.perf_counter())
        elif step.kind == "call":
            self._handled[task] = error
            self._batch_writer.caught(task, error)
            self.state.stand_in(task, plan.stand_ins.catch[int(plan.template_of[task]), place])
        elif step.kind == "skip":
            self.note(self.state.left_out(task))
        else:
            self.values.put_one(task, encode(step.what, self._slots.backend.arena))
            self._decide(range(task, task + 1))
            self.note(self.state.replaced(task))

    # Workflows that tasks return

    def _complete_subflows(self, slot: int, template: int, tasks: Tasks, subflows: Sequence[tuple[int, Wire]]) -> None:
        """Complete tasks of which some returned a workflow, when that has joined the run; fail those whose cannot."""
        pending, unfit = set(map(int, tasks)), list[tuple[int, Exception]]()
        arena = self._slots.backend.arena
        for place, wire in subflows:
            task = int(tasks[place])
            try:
                if self.state.halted:  # it has no value, as what was to make that never runs
                    pending.remove(task)
                    self.state.cancelled(range(task, task + 1))
                    self.recorder.cancelled(task)
                else:
                    self._grow(task, self.plan.spliced(task, decode(wire, arena)))
            except Exception as error:
                pending.remove(task)
                unfit.append((task, error))
            finally:
                if is_segment(wire):
                    arena.free(wire)
        for task, fault in unfit:
            self.failed(slot, template, task, fault)
        for task in sorted(pending):
            self._complete(range(task, task + 1))

    def _grow(self, task: int, plan: Plan) -> None:
        """Continue with a plan that has more tasks, as a task returned a workflow.

        Raises:
            Exception: the tasks cannot join the run; it continues without them.
        """
        self._slots.make_room(plan, plan.widest_layer)
        self.values.grow(plan)
        self._slots.grow(plan, len(plan.callables))
        self.plan = plan
        self.state.grow(plan)
        self.alone = self._find_alone(self._slots)
        self.restore(self.recorder.grow(plan, task))

    # Workers

    def repeated(self, task: Any, lost: Lost, *, was_at: bool) -> None:
        """Record that a task runs again as its worker was lost."""
        if self.state.halted:
            return
        task = int(task)
        attempt = self.state.repeated(task)
        if was_at:
            self.recorder.repeated_after_cut(task, attempt)
        else:
            self.recorder.repeated(task, lost, attempt)

    def interrupted(self, task: Any, lost: Lost) -> None:
        """Record the attempt that a lost worker was at."""
        self.recorder.cut_short(int(task), lost)

    def died(self, lost: Lost, task: Any | None, *, was_killed: bool) -> None:
        """Record that a worker ended by itself; free what it had begun to write."""
        self.values.free_strays(lost.pid)
        if not was_killed:
            self.recorder.death(lost, None if task is None else int(task))

    def killing(self, slot: int, task: int, error: TaskError) -> None:
        """Record that a worker is about to be ended for its task."""
        # No reply may ever show that the task began.
        self.recorder.begun(task, slot, self._slots.backend.started(slot))
        self.record_kill(slot, task, error)

    def record_kill(self, slot: int, task: int, error: TaskError) -> None:
        """Record the event of a timeout or of too much memory."""
        name, attempt, now = self.plan.name(task), self.state.attempts.get(task, 1), time.time()
        if isinstance(error, TaskTimeout):
            self.recorder.event(WorkflowTaskTimedOut(now, name, attempt, slot, error.seconds))
        elif isinstance(error, TaskMemoryExceeded):
            self.recorder.event(WorkflowTaskMemoryExceeded(now, name, attempt, slot, error.used, error.limit))

    def memory_is_low(self) -> None:
        """Record that little is handed out until more memory is available."""
        self.recorder.event(WorkflowMemoryLow(time.time(), available_memory(), self._slots.memory.guard.total))

    def has_effects(self, flight: Flight) -> bool:
        """Return whether the tasks of a batch must not run twice."""
        plan, template = self.plan, flight.template
        has_effects: bool = plan.specs[plan.templates[template].spec].options.effects
        return has_effects or template in plan.stand_ins.undo.values()


class UndoSource:
    """What undoes the tasks of a run, as a `WorkSource`: after it failed or was cancelled.

    Args:
        run: the run's tasks, none of which runs any more.
        policy: the run's rules.
        services: keeper.
        slots: run what undoes; this becomes their source.

    Attributes:
        rollback: what is still to be undone, and what became of the rest.
        alone: templates whose tasks get a batch each.
    """

    def __init__(self, run: RunSource, policy: RunPolicy, services: RunServices, slots: SlotScheduler) -> None:
        self._run = run
        self._slots = slots
        self.alone = run.alone
        failed = [task for task in run.recorder.ledger.errors if run.state.status[task] == Status.FAILED]
        status, lost = _with_taken_over(run, services)
        self.rollback = Rollback(run.plan, status, policy.rollback, failed)
        self.rollback.errors |= lost
        slots.source = self
        # The rest is as for the run's own tasks.
        self.kind, self.message, self.drops, self.forget = run.kind, run.message, run.drops, run.forget
        self.has_effects, self.name, self.memory_is_low = run.has_effects, run.plan.name, run.memory_is_low
        self.joined, self.died = run.joined, run.died
        self.head, self.take, self.put_back = self.rollback.head, self.rollback.take, self.rollback.put_back
        self.park, self.unpark = self.rollback.park, self.rollback.unpark
        self.killing = run.record_kill

    @property
    def is_over(self) -> bool:
        """Whether nothing is handed out any more."""
        return self.rollback.halted

    @property
    def finished(self) -> bool:
        """Whether everything is undone, or failed to be."""
        return self.rollback.finished

    def retry(self, task: int) -> None:
        """Make ready what has waited for its next attempt."""
        self.rollback.retry(task)

    def weigh(self) -> None:
        """Do nothing: layers go back one by one."""

    def settle(self, slot: int, template: int, tasks: Tasks, reply: Reply) -> None:
        """Take in what was undone, and what failed to be."""
        good = tasks[:-1] if reply.failure is not None else tasks
        if len(good):
            self.rollback.completed(good)
            self._run.state.compensated(good)
            for task in good:
                self._tell(int(task), None)
        if reply.failure is not None:
            error = raised(reply.failure)
            self.failed(slot, template, int(tasks[-1]), error, reply.failure.traceback, reply.ran_by)

    def failed(
        self,
        slot: int,
        template: int,  # noqa: ARG002
        task: Any,
        error: Exception,
        traceback: str = "",
        worker: int | None = None,
    ) -> None:
        """Take in that an attempt to undo a task failed."""
        task = int(task)
        self._run.explain(slot, task, error, traceback, worker)
        if (wait := self.rollback.tries_again(task, error)) is not None:
            self._slots.deadlines.delay_by(task, wait, time.perf_counter())
            return
        self.rollback.failed(task, error)
        self._tell(task, error_text(error))

    def repeated(self, task: Any, lost: Lost, *, was_at: bool) -> None:
        """Do nothing: attempts to undo are not recorded."""

    def interrupted(self, task: Any, lost: Lost) -> None:
        """Do nothing, likewise."""

    def _tell(self, task: int, error: str | None) -> None:
        self._run.recorder.event(WorkflowTaskRolledBack(time.time(), self._run.plan.name(task), error))


def _with_taken_over(run: RunSource, services: RunServices) -> tuple[Any, dict[int, Exception]]:
    """Return the status of tasks, with those as done that this run took over; and what keeps some from being undone."""
    status, lost = run.state.status, dict[int, Exception]()
    taken_over = services.keeper.taken_over()
    if len(taken_over):
        status = status.copy()
        for task in taken_over.tolist():
            is_undone = int(run.plan.template_of[task]) in run.plan.stand_ins.undo
            try:
                if is_undone and task in run.values.unloaded:
                    run.values.load_one(task, services.keeper.load)
                status[task] = Status.COMPLETED
            except (StoreError, ArenaFull) as error:
                lost[task] = error
    return status, lost
