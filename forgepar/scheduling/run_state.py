"""The pure state machine of a run. It receives outcomes, and returns tasks to start and effects.

    take() ──> tasks handed out ──> completed(tasks) | failed(task) | put_back(tasks) ──> effects

A ready queue decides which tasks are ready. With `LayeredQueue`, a layer starts when all tasks of the previous layer
are settled. With `EagerQueue`, a task is ready as soon as its dependencies are done, and the task with the longest
remaining path runs first.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from forgepar.scheduling.eager import EagerQueue
from forgepar.scheduling.effects import Effect, FellBack, Halted, Retried, Skipped, TaskFailed
from forgepar.scheduling.layers import LayeredQueue
from forgepar.scheduling.ready_queue import ReadyQueue
from forgepar.version import public
from forgepar.workflow.columns import Branching
from forgepar.workflow.plan import IntArray, Plan, Tasks, as_index


@public
class Status(enum.IntEnum):
    """The status of a task."""

    PENDING = 0
    RUNNING = 1
    COMPLETED = 2
    FAILED = 3
    SKIPPED = 4  # a dependency failed or was skipped, or a gate chose the other branch
    CANCELLED = 5  # the run ended before the task did
    COMPENSATED = 6  # it completed, and was undone when the run failed or was cancelled
    CACHED = 7  # its value comes from an earlier run


class SecondOutcome(RuntimeError):
    """An outcome arrived for a task that is not handed out. This is a bug in the engine, not in a workflow."""


_RUNNING, _COMPLETED = int(Status.RUNNING), int(Status.COMPLETED)


@dataclass(frozen=True, slots=True)
class RecycleLimits:
    """When a worker is replaced by a new one. None means no limit.

    Attributes:
        most_tasks: the number of tasks after which a worker is replaced.
        most_memory: replace a worker after its memory reached this many bytes.
    """

    most_tasks: int | None = None
    most_memory: int | None = None


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """The settings of one run.

    Attributes:
        outputs: the tasks to keep the values of: "leaves" (tasks without dependents), "all", or task numbers.
        schedule: "layers" or "eager".
        fail_fast: halt the run at the first failure, instead of running all tasks that do not depend on the failed one.
        grace_seconds: seconds that running tasks may continue after a failure halted the run.
        timeout: most seconds that the run may take; None for no limit.
        layer_timeout: most seconds that each layer may take, with the schedule "layers"; None for no limit.
        rollback_seconds: most seconds that the rollback may take; None for no limit.
        rollback: which completed tasks to undo when the run fails or is cancelled.
        seed: the seed of the random generators of tasks.
        recycling: when workers are replaced.
    """

    outputs: Literal["leaves", "all"] | tuple[int, ...] = "leaves"
    schedule: Literal["layers", "eager"] = "layers"
    fail_fast: bool = True
    grace_seconds: float = 1.0
    timeout: float | None = None
    layer_timeout: float | None = None
    rollback_seconds: float | None = None
    rollback: Literal["all", "upstream", "none"] | Callable[[str], object] = "all"
    seed: int = 0
    recycling: RecycleLimits = RecycleLimits()


class InvalidState(RuntimeError):
    """The state of a run breaks an invariant of `RunState.validate`. This is a bug in the engine, not in a workflow."""


class RunState:
    """The status of every task of a run, and the tasks that may run next.

    A task is PENDING at first. These methods change its status:

        from       to           by
        PENDING    RUNNING      take
        PENDING    CACHED       restore
        PENDING    SKIPPED      failed, decide, left_out
        PENDING    CANCELLED    failed, halt
        PENDING    COMPLETED    replaced
        RUNNING    COMPLETED    completed
        RUNNING    PENDING      put_back, failed
        RUNNING    FAILED       failed
        RUNNING    CANCELLED    put_back, cancelled, end
        COMPLETED  COMPENSATED  compensated

    Args:
        plan: the workflow.
        policy: the settings of the run.

    Attributes:
        status: (n_tasks,) int8, the `Status` of each task.
        attempts: by task, the number of the current attempt, from the second attempt on.
        halted: whether the run was halted, so that no more tasks are handed out.
    """

    def __init__(self, plan: Plan, policy: RunPolicy) -> None:
        self._plan = plan
        self._policy = policy
        self._queue: ReadyQueue = LayeredQueue(plan) if policy.schedule == "layers" else EagerQueue(plan)
        self._bytes = bytearray(plan.n_tasks)
        self.status = np.frombuffer(self._bytes, np.int8)  # a view of the same memory
        self.attempts: dict[int, int] = {}
        self._uncounted: dict[int, int] = {}  # by task, the attempts that do not count as retries
        self._steps: dict[int, int] = {}
        self._joins = _joins_of(plan)
        self._decided: dict[int, range] = {}  # by gate, the tasks of the branch that runs
        self._lost: dict[int, list[tuple[int, int]]] = {}  # by gate, lost tasks of its branches, and the cause
        self.halted = False
        self._unsettled = plan.n_tasks
        self._out = 0

    @property
    def n_settled(self) -> int:
        """The number of tasks that will not run again."""
        return self._plan.n_tasks - self._unsettled

    @property
    def n_out(self) -> int:
        """The number of tasks that are handed out."""
        return self._out

    @property
    def layer(self) -> int | None:
        """The current layer; None with the schedule "eager"."""
        return self._queue.layer

    @property
    def finished(self) -> bool:
        """Whether no task runs and none will be handed out."""
        return not self._out and (self.halted or not self._unsettled)

    @property
    def status_is_bad(self) -> bool:
        """Whether a task failed or the run was halted."""
        return self.halted or bool((self.status == Status.FAILED).any())

    def restore(self, tasks: IntArray) -> None:
        """Record that the values of these tasks come from an earlier run. None of them may be ready yet.

        Call this before `begin` or after `grow`. Then call `decide` for the gates among them, and `pass_on`.
        """
        self.status[tasks] = Status.CACHED
        self._unsettled -= len(tasks)

    def pass_on(self, tasks: IntArray) -> list[Effect]:
        """Make the tasks that waited only for these restored tasks ready."""
        return self._queue.drop(self._left_out(), tasks)

    def begin(self) -> list[Effect]:
        """Start the run."""
        return self._queue.begin()

    def head(self) -> tuple[int, int] | None:
        """Return the template of the tasks to hand out next and the number of ready tasks, or None if none is ready."""
        return None if self.halted else self._queue.head()

    def take(self, most: int) -> Tasks:
        """Hand out up to ``most`` tasks of the head's template, and mark them as running."""
        tasks = self._queue.take(most)
        self._out += len(tasks)
        self._mark(tasks, _RUNNING)
        return tasks

    def park(self) -> None:
        """Set the head's tasks aside until `unpark`: there is no memory for them now, but there may be for others."""
        self._queue.park()

    def unpark(self) -> None:
        """Make the tasks that were set aside ready again, before all others."""
        self._queue.unpark()

    def put_back(self, template: int, tasks: Tasks) -> None:
        """Return tasks of one template that were handed out and did not start."""
        if self.halted:
            self.cancelled(tasks)
            return
        self._check_out(tasks)
        self._out -= len(tasks)
        self.status[as_index(tasks)] = Status.PENDING
        self._queue.put_back(template, tasks)

    def repeated(self, task: int) -> int:
        """Record that the outcome of a task that may have started is lost. `put_back` follows.

        Returns:
            The number of the next attempt, which does not count as a retry.
        """
        self._check_out(range(task, task + 1))
        self.attempts[task] = attempt = self.attempts.get(task, 1) + 1
        self._uncounted[task] = self._uncounted.get(task, 0) + 1
        return attempt

    def tries(self, task: int) -> int:
        """Return the number of the current attempt of a task, as retries and backoff count attempts."""
        return self.attempts.get(task, 1) - self._uncounted.get(task, 0)

    def completed(self, tasks: Tasks) -> list[Effect]:
        """Record that tasks completed.

        Raises:
            SecondOutcome: one of the tasks is not handed out.
        """
        n_tasks = len(tasks)
        if n_tasks == 1 and type(tasks) is range and self._bytes[tasks.start] == _RUNNING:
            self._bytes[tasks.start] = _COMPLETED  # the same as below, 0.5 us faster
        else:
            self._check_out(tasks)
            self._mark(tasks, _COMPLETED)
        self._out -= n_tasks
        self._unsettled -= n_tasks
        return [] if self.halted else self._queue.settle(tasks)

    def failed(self, task: int, *, may_retry: bool = True) -> list[Effect]:
        """Record that a task failed. If it has no retry or fallback left, settle it and skip its descendants.

        A task with a retry left is pending until `retry` is called; one with a fallback, until `retry`, `stand_in`,
        `replaced` or `left_out` is called.

        Raises:
            SecondOutcome: the task is not handed out.
        """
        self._check_out(range(task, task + 1))
        self._out -= 1
        attempt = self.attempts.get(task, 1)
        if may_retry and self.tries(task) <= self._plan.spec(task).options.retries and not self.halted:
            self.attempts[task] = attempt + 1
            self.status[task] = Status.PENDING
            return [Retried(task, attempt + 1)]
        step, fallback = self._steps.get(task, 0), self._plan.spec(task).options.fallback
        if step < len(fallback) and not self.halted:
            self._steps[task] = step + 1
            if fallback[step].kind == "retry":
                self.attempts[task] = attempt + 1
            self.status[task] = Status.PENDING
            return [FellBack(task, attempt, step)]
        self.status[task] = Status.FAILED
        self._unsettled -= 1
        effects: list[Effect] = [TaskFailed(task, attempt)]
        if self._policy.fail_fast:
            return effects if self.halted else [*effects, *self.halt()]
        return [*effects, *self._skip([], task), *self._queue.settle(range(task, task + 1))]

    def decide(self, gate: int, *, is_true: bool) -> list[Effect]:
        """Skip the branch that a gate did not choose. Call this before `completed` for the gate."""
        branching = self._plan.branchings[gate]
        taken, left = (branching.then, branching.otherwise) if is_true else (branching.otherwise, branching.then)
        self._decided[gate] = taken
        lost = self._lost.pop(gate, [])
        effects = next((list(self._skip([branching.join], cause)) for task, cause in lost if task in taken), [])
        graph = self._plan.graph
        out = graph.descendants(list(left)) & ~graph.descendants([*taken, branching.join])
        out[branching.join] = False
        out[left.start : left.stop] = True
        out &= self.status == Status.PENDING
        tasks = np.flatnonzero(out).astype(np.int32)
        if len(tasks):
            self.status[tasks] = Status.SKIPPED
            self._unsettled -= len(tasks)
            effects.append(Skipped(tasks, gate))
        passed = np.union1d(tasks, [task for task, _ in lost if task in left]).astype(np.int32)
        return [*effects, *self._queue.drop(self._left_out(), passed)] if len(passed) else effects

    def grow(self, plan: Plan) -> None:
        """Continue with a plan that appends tasks to the current one; see `Plan.spliced`."""
        n_new = plan.n_tasks - self._plan.n_tasks
        self._plan = plan
        self._joins = _joins_of(plan)
        self._bytes = self._bytes + bytearray(n_new)
        self.status = np.frombuffer(self._bytes, np.int8)
        self._unsettled += n_new
        self._queue.grow(plan)

    def retry(self, task: int) -> None:
        """Make a task ready for its next attempt; do nothing if the run was halted."""
        if not self.halted:
            self._queue.put_back(int(self._plan.template_of[task]), range(task, task + 1))

    def stand_in(self, task: int, template: int) -> None:
        """Make a failed task ready to run by the template of its fallback; do nothing if the run was halted."""
        if not self.halted:
            self._queue.put_back(template, range(task, task + 1))

    def replaced(self, task: int) -> list[Effect]:
        """Record that a fallback gave a failed task a value."""
        self._out += 1
        self.status[task] = Status.RUNNING
        return self.completed(range(task, task + 1))

    def left_out(self, task: int) -> list[Effect]:
        """Skip a failed task and its descendants, as its fallback requires."""
        self.status[task] = Status.SKIPPED
        self._unsettled -= 1
        return [*self._skip([], task), *self._queue.settle(range(task, task + 1))]

    def cancelled(self, tasks: Tasks) -> None:
        """Record that tasks that were handed out were stopped with the run.

        Raises:
            SecondOutcome: one of the tasks is not handed out.
        """
        self._check_out(tasks)
        self._out -= len(tasks)
        self.status[as_index(tasks)] = Status.CANCELLED

    def compensated(self, tasks: Tasks) -> None:
        """Record that completed tasks were undone."""
        self.status[as_index(tasks)] = Status.COMPENSATED

    def end(self) -> None:
        """Record that a halted run has no running tasks any more."""
        self.status[self.status == Status.RUNNING] = Status.CANCELLED
        self._out = 0

    def halt(self) -> list[Effect]:
        """Halt the run: cancel pending tasks, and hand out no more."""
        self.halted = True
        self.status[self.status == Status.PENDING] = Status.CANCELLED
        return [Halted()]

    def weigh(self, seconds: Sequence[float]) -> None:
        """Set the expected duration of the tasks of each template; nan stands for the mean of the other templates."""
        known = np.asarray(seconds, np.float64)
        observed = known[np.isfinite(known)]
        typical = float(observed.mean()) if len(observed) else 1.0
        self.weigh_tasks(np.where(np.isfinite(known), known, typical)[self._plan.template_of])

    def weigh_tasks(self, seconds: NDArray[np.float64]) -> None:
        """Set the expected duration of each task: (n_tasks,) seconds."""
        self._queue.weigh(seconds)

    def validate(self) -> None:
        """Check the invariants of this state, for tests and debugging; O(tasks + dependencies).

        - The number of RUNNING tasks is the number of tasks handed out.
        - The tasks counted as unsettled are those that are PENDING, RUNNING or CANCELLED.
        - No task is PENDING after the run was halted.
        - All dependencies of a task that runs or ran are done, except the branch not taken of a join.
        - With layers, all tasks of lower layers are settled while a task runs.

        Raises:
            InvalidState: one of these invariants is broken.
        """
        status, graph = self.status, self._plan.graph
        running, pending = status == Status.RUNNING, status == Status.PENDING
        if int(running.sum()) != self._out:
            raise InvalidState(f"{int(running.sum())} tasks are running, but {self._out} are handed out.")
        is_open = running | pending | (status == Status.CANCELLED)
        if int(is_open.sum()) != self._unsettled:
            raise InvalidState(f"{int(is_open.sum())} tasks are open, but {self._unsettled} are counted as unsettled.")
        if self.halted and pending.any():
            raise InvalidState(f"The run was halted, but {self._name(pending)} is still pending.")
        is_done = (status == Status.COMPLETED) | (status == Status.COMPENSATED) | (status == Status.CACHED)
        sources, targets = graph.edges()
        has_run = running | (status == Status.COMPLETED) | (status == Status.COMPENSATED)
        is_early = has_run[targets] & ~is_done[sources] & ~np.isin(targets, list(self._joins))
        if is_early.any():
            edge = int(np.argmax(is_early))
            name, other = self._plan.name(int(targets[edge])), self._plan.name(int(sources[edge]))
            raise InvalidState(f"Task {name!r} has started, but its dependency {other!r} is not done.")
        if self.layer is not None and self._out:
            is_late = is_open & (self._plan.layers < int(self._plan.layers[running].max()))
            if is_late.any():
                raise InvalidState(f"A layer has started, but {self._name(is_late)} of a lower layer is not settled.")

    def _name(self, which: NDArray[np.bool_]) -> str:
        return f"task {self._plan.name(int(np.argmax(which)))!r}"

    def _check_out(self, tasks: Tasks) -> None:
        """Raise `SecondOutcome` unless all tasks are handed out: whatever a backend sends, a task has one outcome."""
        if type(tasks) is range:
            n_out = self._bytes.count(_RUNNING, tasks.start, tasks.stop)
        else:
            n_out = self.status[as_index(tasks)].tobytes().count(_RUNNING)
        if n_out != len(tasks):
            settled = next(task for task in map(int, tasks) if self.status[task] != Status.RUNNING)
            name, status = self._plan.name(settled), Status(int(self.status[settled])).name.lower()
            raise SecondOutcome(f"Got an outcome of a task that is not handed out: task {name!r} is {status}.")

    def _mark(self, tasks: Tasks, status: int) -> None:
        if type(tasks) is range and len(tasks) == 1:
            self._bytes[tasks.start] = status  # without numpy, which takes longer for one element
        else:
            self.status[as_index(tasks)] = status

    def _skip(self, tasks: Sequence[int], cause: int) -> Iterable[Effect]:
        """Skip tasks and their descendants; without tasks, skip the descendants of the cause."""
        after = self._plan.graph.descendants(tasks or [cause])
        if self._joins and any(after[join] for join in self._joins):
            after = self._reached(tasks or [cause], cause)
        after[list(tasks)] = True
        after &= self.status == Status.PENDING
        if not after.any():
            return ()
        self.status[after] = Status.SKIPPED
        self._unsettled -= int(after.sum())
        return (Skipped(np.flatnonzero(after).astype(np.int32), cause), *self._queue.drop(self._left_out()))

    def _reached(self, tasks: Sequence[int], cause: int) -> NDArray[np.bool_]:
        """Return the descendants of tasks: (n_tasks,) bool. A join is reached only through the branch that runs.

        While the gate is undecided, `_lost` records the tasks of both branches that will not run. `decide` then
        skips the join if one of them is in the branch taken. The other branch must not affect the workflow's value.
        """
        reached = np.zeros(self._plan.n_tasks, np.bool_)
        front = list(tasks)
        while front:
            task = front.pop()
            for after in self._plan.graph.successors(task).tolist():
                branching = self._joins.get(after)
                if branching is not None and (task in branching.then or task in branching.otherwise):
                    taken = self._decided.get(branching.gate)
                    if taken is None:
                        self._lost.setdefault(branching.gate, []).append((task, cause))
                    if taken is None or task not in taken:
                        continue
                if not reached[after]:
                    reached[after] = True
                    front.append(after)
        return reached

    def _left_out(self) -> NDArray[np.bool_]:
        """Return the tasks that never become ready in this run: (n_tasks,) bool."""
        found: NDArray[np.bool_] = (self.status == Status.SKIPPED) | (self.status == Status.CACHED)
        return found


def _joins_of(plan: Plan) -> dict[int, Branching]:
    """Return the branchings of a plan by the number of their join."""
    return {branching.join: branching for branching in plan.branchings.values()}


def kept_tasks(plan: Plan, policy: RunPolicy) -> NDArray[np.bool_]:
    """Return the tasks of which the result keeps the value: (n_tasks,) bool."""
    kept = np.full(plan.n_tasks, policy.outputs == "all")
    if policy.outputs == "leaves":
        kept[plan.leaves] = True
    elif policy.outputs != "all":
        kept[list(policy.outputs)] = True
    return kept
