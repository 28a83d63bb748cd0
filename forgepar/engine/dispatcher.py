"""The loop of a run: its tasks become batches, and replies become outcomes.

Dispatcher        the loop; what ends a run: deadlines, cancellation, failure; and its rollback
SlotScheduler     what each slot has (`engine.slots`)
RunSource         what may run, and what becomes of it (`engine.run_source`)
UndoSource        the same for undoing, after the run
RunServices       store, display, console, sinks, cancellation (`engine.services`)
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator

from forgepar.backends.base import Backend
from forgepar.engine.batches import BatchWriter
from forgepar.engine.deadlines import GOES_ON, Deadlines
from forgepar.engine.memory import Memory
from forgepar.engine.recorder import Recorder
from forgepar.engine.run_source import RunSource, UndoSource
from forgepar.engine.services import RunServices
from forgepar.engine.slots import SlotScheduler
from forgepar.errors import RunTimeout, WrongProcess
from forgepar.records.events import WorkflowCancelled, WorkflowDeadlockTimeout, WorkflowRolledBack
from forgepar.records.result import RunResult
from forgepar.scheduling.durations import Durations
from forgepar.scheduling.rollback import RollbackReport
from forgepar.scheduling.run_state import RunPolicy
from forgepar.workflow.plan import Plan

# A batch of at most twice what batches aim at: behind it a second one saves its round trip, else 1 % at most.
_SHORT = 2.0
_MOST_NAMES = 5  # of tasks in a message


class Dispatcher:
    """Runs one plan on one backend.

    Args:
        plan: the workflow.
        policy: the run's rules.
        backend: an open backend.
        run_id: the run's id.
        batch_writer: writes the batches.
        next_batch: returns ever larger numbers for the life of the backend.
        memory: what may run at once.
        services: what the run reports to and listens to.

    Attributes:
        version: even while this waits and nothing changes, odd while it works; each value occurs once.
        slots: the batches of each slot.
        tasks: the tasks of the run.
        undoing: the rollback; None before it, and if there is nothing to undo.
        ended_by: the timeout that ended the run, if one did.
        was_cancelled: whether the run was cancelled.
    """

    def __init__(
        self,
        plan: Plan,
        policy: RunPolicy,
        backend: Backend,
        run_id: str,
        batch_writer: BatchWriter,
        next_batch: Callable[[], int],
        memory: Memory,
        services: RunServices,
    ) -> None:
        self.run_id = run_id
        self.version = 1
        self._policy = policy
        self._services = services
        self._batch_writer = batch_writer
        self._owner = os.getpid()
        batch_seconds = backend.traits.batch_seconds
        self.slots = SlotScheduler(
            backend,
            Deadlines(plan, policy, backend),
            memory,
            services.console,
            Durations(len(plan.callables), batch_seconds),
            next_batch,
            _SHORT * batch_seconds,
            policy.recycling,
        )
        recorder = Recorder(plan, run_id, services.sinks, backend.n_slots, backend.arena, services.keeper)
        recorder.ledger.schedule = policy.schedule
        self.tasks = RunSource(plan, policy, batch_writer, recorder, services, self.slots)
        self.undoing: UndoSource | None = None
        self.ended_by: RunTimeout | None = None
        self.was_cancelled = False
        self._is_ending = self._is_killed = False

    @property
    def backend(self) -> Backend:
        """What runs the batches."""
        return self.slots.backend

    def run(self) -> None:
        """Run the plan to its end, whatever that is; `tasks` has the outcome.

        An exception out of here (an interrupt, workers that do not start) leaves slots with work: close the backend.
        """
        try:
            self._run()
        finally:
            self.version += 1  # at rest, for those that still ask
            del self.slots.source  # they refer to each other: values and descriptors would wait for the collector

    def result(self) -> RunResult:
        """Return the result of the run, with the values that it keeps; all others are freed."""
        tasks, undoing = self.tasks, self.undoing
        outputs = tasks.values.outputs(tasks.state.status, self._services.keeper.load)
        undone = RollbackReport() if undoing is None else undoing.rollback.report()
        recorder = tasks.recorder
        return RunResult(tasks.plan, tasks.state.status, recorder.ledger, outputs, recorder.events, undone)

    def _run(self) -> None:
        state, recorder, deadlines = self.tasks.state, self.tasks.recorder, self.slots.deadlines
        recorder.start_clock()
        restored = self._services.keeper.begin(recorder.ledger, self.backend.arena)
        recorder.begin()
        for joined in self.backend.joined():
            self.slots.join(joined)
        deadlines.begin(recorder.ledger.began)
        if (ends_at := self._services.cancel.ends_at) is not None:
            deadlines.cancel_at = time.perf_counter() + ends_at - time.monotonic()
        self.tasks.restore(restored)
        self.tasks.note(state.begin())
        self._loop(self.tasks)
        if state.halted:
            state.end()
        if state.status_is_bad and self._policy.rollback != "none":
            self._roll_back()
        self.slots.take(self.backend.wait(0.0))  # what was printed before the last reply
        self.slots.take(self.backend.rest())
        self._check_owner()
        self._batch_writer.close()
        self.slots.send_drops()
        recorder.end(state.status)

    def _loop(self, source: RunSource | UndoSource) -> None:
        services, slots, state = self._services, self.slots, self.tasks.state
        weighs = self._policy.schedule == "eager"
        while True:
            self._check_owner()
            if state.halted and not self._is_ending:  # a task failed
                self._end()
            if services.cancel.is_cancelled and self.undoing is None:
                self._cancel(kills=services.cancel.kills)
            for task in slots.deadlines.due_retries():
                source.retry(task)
            if weighs:
                source.weigh()
            slots.hand_out()
            if not slots.deadlines.is_idle:
                self._check_time()
            if slots.memory.is_declared:
                slots.check_memory()
            if self.tasks.values.has_coded:
                slots.send_drops()
            # After the batches went out: workers wait for those, and nothing waits for this.
            self.tasks.recorder.keep()
            now = time.perf_counter()
            services.keeper.beat(now)
            services.display.beat(now)
            self._check_owner()
            # A slot whose tasks were reclaimed still answers for them: the next run must not get that answer.
            if source.finished or source.is_over:
                if slots.is_idle:
                    break
                if source.finished:
                    slots.withdraw()
            self.backend.tell(self.tasks.plan.n_tasks, state.n_settled, state.n_out, state.layer)
            patience = slots.patience(min(services.keeper.look_at, services.display.look_at))
            self.version += 1
            notices = slots.wait(patience)
            self.version += 1
            slots.take(notices)

    def _check_owner(self) -> None:
        """Raise in a child that a callback has forked: the run is its parent's."""
        if os.getpid() != self._owner:
            raise WrongProcess.here(self._owner)

    def _roll_back(self) -> None:
        """Undo what was done, where a function does that."""
        self.undoing = undoing = UndoSource(self.tasks, self._policy, self._services, self.slots)
        if undoing.finished:
            return
        self.slots.deadlines.begin_rollback(time.perf_counter())
        self.backend.call_off(is_off=False)
        self._loop(undoing)
        report = undoing.rollback.report()
        event = WorkflowRolledBack(time.time(), len(report.compensated), len(report.failed), report.n_without)
        self.tasks.recorder.event(event)

    # By the clock

    def _check_time(self) -> None:
        """End what takes too long: single tasks, a layer, the run, the rollback."""
        self.slots.check_deadlines()
        deadlines = self.slots.deadlines
        now = time.perf_counter()
        if (ended := deadlines.run_out(now)) is not None and not self.tasks.state.halted:
            self._run_out_of_time(*ended)
        if self.undoing is not None and deadlines.rollback_ran_out(now):
            self._end_rollback(self.undoing)
        if now >= deadlines.end_at:
            deadlines.end_at = math.inf
            self.slots.kill_all()

    def _run_out_of_time(self, layer: int, seconds: float) -> None:
        slots = {slot: int(task) for slot, task in self._running()}
        name = self.tasks.plan.name
        stacks = {name(slots[slot]): stack for slot, stack in self.backend.where(list(slots)).items()}
        running = tuple(map(name, slots.values()))
        what = "the run" if layer < 0 else f"layer {layer}"
        self.tasks.recorder.event(WorkflowDeadlockTimeout(time.time(), layer, seconds, running))
        at = ", ".join(map(repr, running[:_MOST_NAMES])) or "nothing"
        more = f" and {len(running) - _MOST_NAMES} more" if len(running) > _MOST_NAMES else ""
        self.ended_by = RunTimeout(
            f"{what} took longer than the {seconds:g} s it was given, and was ended; running then: {at}{more}",
            seconds=seconds,
            running=running,
            stacks=stacks,
        )
        if running and not self.backend.traits.ends_tasks:
            self.ended_by.add_note(f"what does not return within {self._policy.grace_seconds:g} s: {GOES_ON}")
        for task, stack in stacks.items():
            self.ended_by.add_note(f"where {task!r} was, innermost call first:\n{stack}")
        self._halt()

    def _end_rollback(self, undoing: UndoSource) -> None:
        """Give up undoing, as its time is over."""
        seconds = self._policy.rollback_seconds or 0.0
        undoing.rollback.give_up(
            RunTimeout(
                f"this was not undone within the {seconds:g} s that the rollback was given. Undo it yourself, and give "
                "it more time with rollback_timeout=.",
                seconds=seconds,
                running=self._names_running(),
                stacks={},
            )
        )
        self._end()

    def _running(self) -> Iterator[tuple[int, int]]:
        """Yield each slot that runs a task, and the task."""
        for slot in range(self.backend.n_slots):
            if (task := self.slots.task_at(slot)) is not None:
                yield slot, int(task)

    def _names_running(self) -> tuple[str, ...]:
        return tuple(self.tasks.plan.name(task) for _, task in self._running())

    # Ending

    def _cancel(self, *, kills: bool) -> None:
        """End the run as its token says; once more if what runs is to be killed after all."""
        self.slots.deadlines.cancel_at = math.inf
        if not self.tasks.state.halted:
            self.was_cancelled = True
            self.tasks.recorder.event(WorkflowCancelled(time.time(), kills, self._names_running()))
            self._halt()
            self.slots.deadlines.end_at = math.inf
        if kills and not self._is_killed:
            self._is_killed = True
            self.slots.kill_all()

    def _halt(self) -> None:
        self.tasks.note(self.tasks.state.halt())
        self._end()

    def _end(self) -> None:
        """Let no slot begin another task, and give what runs some time."""
        self._is_ending = True
        self.backend.call_off()
        self.slots.stealing.limit_all()
        self.slots.deadlines.end_at = time.perf_counter() + self._policy.grace_seconds
