"""The pure machine of a run: outcomes in, tasks to launch and effects out; no clock, no process, no I/O.

    take() ──> tasks handed out ──> completed(tasks) | failed(task) | put_back(tasks) ──> effects

What is ready is decided by an order: `Layered` (all of a layer is settled before the next begins) or `Eager` (a task is
ready as soon as what it waits for is done, the one with the most work behind it first). All else is the same for both.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from forgepar.effects import Effect, FellBack, Halted, Retried, Skipped, TaskFailed
from forgepar.orders import Eager, Layered, Order
from forgepar.plan import IntArray, Plan, Tasks, as_index
from forgepar.workflow import Branching


class Status(enum.IntEnum):
    """Where a task stands."""

    PENDING = 0
    RUNNING = 1
    COMPLETED = 2
    FAILED = 3
    SKIPPED = 4  # something it waits for failed
    CANCELLED = 5  # the run ended before it did
    COMPENSATED = 6  # it was done, and undone when the run failed or was called off
    CACHED = 7  # an earlier run did it, and its value was kept


class SecondOutcome(RuntimeError):
    """An outcome was told of a task that is not handed out. It is a fault of the engine, not of a workflow."""


_RUNNING, _COMPLETED = int(Status.RUNNING), int(Status.COMPLETED)


@dataclass(frozen=True, slots=True)
class Wear:
    """When a worker has done enough and is replaced by a new one; None: never.

    Attributes:
        most_tasks: after so many tasks.
        most_memory: after its memory was at so many bytes or more.
    """

    most_tasks: int | None = None
    most_memory: int | None = None


@dataclass(frozen=True, slots=True)
class RunPolicy:
    """The rules of one run.

    Attributes:
        outputs: "leaves" (tasks whose value no other takes), "all", or the numbers of the tasks to keep.
        schedule: "layers" or "eager".
        fail_fast: end the run at the first failure, instead of running all that does not depend on it.
        grace_seconds: how long running tasks may go on after a failure ended the run.
        timeout: how long the run may take, seconds; None: as long as it does.
        layer_timeout: how long each layer may take, seconds, under the schedule "layers".
        rollback_seconds: how long undoing may take; None: as long as it does.
        rollback: which completed tasks to undo when the run fails or is called off.
        seed: what chance in the run derives from.
        wear: when workers are renewed.
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
    wear: Wear = Wear()


class RunState:
    """Where every task of a run stands, and what may happen next.

    Args:
        plan: the workflow.
        policy: the run's rules.

    Attributes:
        status: int8, a `Status` a task.
        attempts: how often a task was tried, for those tried more than once.
        halted: nothing is handed out any more.
    """

    def __init__(self, plan: Plan, policy: RunPolicy) -> None:
        self._plan = plan
        self._policy = policy
        self._order: Order = Layered(plan) if policy.schedule == "layers" else Eager(plan)
        self._bytes = bytearray(plan.n_tasks)
        self.status = np.frombuffer(self._bytes, np.int8)  # the same memory, as a column
        self.attempts: dict[int, int] = {}
        self._free: dict[int, int] = {}  # by task, how many of these attempts its retries do not pay for
        self._steps: dict[int, int] = {}
        self._joins = _joins_of(plan)
        self._decided: dict[int, range] = {}  # by gate, the tasks of the branch that runs
        self._lost: dict[int, list[tuple[int, int]]] = {}  # by gate, tasks of its branches and what these are lost for
        self.halted = False
        self._unsettled = plan.n_tasks
        self._out = 0

    @property
    def n_settled(self) -> int:
        """How many tasks will not run again."""
        return self._plan.n_tasks - self._unsettled

    @property
    def n_out(self) -> int:
        """How many tasks are handed out."""
        return self._out

    @property
    def layer(self) -> int | None:
        """The layer that runs; None where tasks do not wait for layers."""
        return self._order.layer

    @property
    def finished(self) -> bool:
        """Whether nothing runs and nothing is to be handed out."""
        return not self._out and (self.halted or not self._unsettled)

    @property
    def status_is_bad(self) -> bool:
        """Whether something failed, or the run was ended before all was done."""
        return self.halted or bool((self.status == Status.FAILED).any())

    def restore(self, tasks: IntArray) -> None:
        """Note that an earlier run did these tasks, none of which is ready yet: before `begin`, or after `grow`.

        What their values decide is told next (`decide`), and then `pass_on` makes ready what waited for them alone.
        """
        self.status[tasks] = Status.CACHED
        self._unsettled -= len(tasks)

    def pass_on(self, tasks: IntArray) -> list[Effect]:
        """Have nothing wait any more for tasks that an earlier run did."""
        return self._order.drop(self._left_out(), tasks)

    def begin(self) -> list[Effect]:
        """Start the run."""
        return self._order.begin()

    def head(self) -> tuple[int, int] | None:
        """Return the template of the tasks to hand out next, and how many tasks are ready; None if none is."""
        return None if self.halted else self._order.head()

    def take(self, most: int) -> Tasks:
        """Hand out up to ``most`` tasks of the head's template; they are running then."""
        tasks = self._order.take(most)
        self._out += len(tasks)
        self._mark(tasks, _RUNNING)
        return tasks

    def park(self) -> None:
        """Set the head's tasks aside until `unpark`: what they need is not to be had now, but others may run."""
        self._order.park()

    def unpark(self) -> None:
        """Make ready again what was set aside, before all others."""
        self._order.unpark()

    def put_back(self, template: int, tasks: Tasks) -> None:
        """Take back tasks of one template that were handed out but never begun."""
        if self.halted:
            self.cancelled(tasks)
            return
        self._check_out(tasks)
        self._out -= len(tasks)
        self.status[as_index(tasks)] = Status.PENDING
        self._order.put_back(template, tasks)

    def repeated(self, task: int) -> int:
        """Note that a task which is handed out may have begun, but its outcome is lost; it is put back next.

        Returns:
            The attempt to come; the task's retries do not pay for it.
        """
        self._check_out(range(task, task + 1))
        self.attempts[task] = attempt = self.attempts.get(task, 1) + 1
        self._free[task] = self._free.get(task, 0) + 1
        return attempt

    def tries(self, task: int) -> int:
        """Return which try of a task is at hand, by the count that its retries and its backoff go by."""
        return self.attempts.get(task, 1) - self._free.get(task, 0)

    def completed(self, tasks: Tasks) -> list[Effect]:
        """Note that tasks are done.

        Raises:
            SecondOutcome: one of them is not handed out.
        """
        n_tasks = len(tasks)
        if n_tasks == 1 and type(tasks) is range and self._bytes[tasks.start] == _RUNNING:
            self._bytes[tasks.start] = _COMPLETED  # the same in half a microsecond less
        else:
            self._check_out(tasks)
            self._mark(tasks, _COMPLETED)
        self._out -= n_tasks
        self._unsettled -= n_tasks
        return [] if self.halted else self._order.settle(tasks)

    def failed(self, task: int, *, may_retry: bool = True) -> list[Effect]:
        """Note that a task failed: it may be tried again if its retries allow, else it and what follows are settled.

        One that may be tried again waits until `retry` makes it ready; one with a fallback until that is done for it:
        `retry`, `stand_in`, `replaced` or `left_out`.

        Raises:
            SecondOutcome: it is not handed out.
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
        return [*effects, *self._skip_after(task), *self._order.settle(range(task, task + 1))]

    def decide(self, gate: int, *, is_true: bool) -> list[Effect]:
        """Leave out the branch that a gate's value, just known, is against; the gate is `completed` only after this."""
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
        return [*effects, *self._order.drop(self._left_out(), passed)] if len(passed) else effects

    def grow(self, plan: Plan) -> None:
        """Go on with a plan that has more tasks behind those of the last one; see `Plan.spliced`."""
        n_new = plan.n_tasks - self._plan.n_tasks
        self._plan = plan
        self._joins = _joins_of(plan)
        self._bytes = self._bytes + bytearray(n_new)
        self.status = np.frombuffer(self._bytes, np.int8)
        self._unsettled += n_new
        self._order.grow(plan)

    def retry(self, task: int) -> None:
        """Make a task ready again that is to be retried; nothing happens once the run was ended."""
        if not self.halted:
            self._order.put_back(int(self._plan.template_of[task]), range(task, task + 1))

    def stand_in(self, task: int, template: int) -> None:
        """Make ready what a worker is to run for a task that failed, by another template."""
        if not self.halted:
            self._order.put_back(template, range(task, task + 1))

    def replaced(self, task: int) -> list[Effect]:
        """Note that a task that failed has a value nevertheless."""
        self._out += 1
        self.status[task] = Status.RUNNING
        return self.completed(range(task, task + 1))

    def left_out(self, task: int) -> list[Effect]:
        """Note that a task that failed is skipped, and so is what waits for it."""
        self.status[task] = Status.SKIPPED
        self._unsettled -= 1
        return [*self._skip_after(task), *self._order.settle(range(task, task + 1))]

    def cancelled(self, tasks: Tasks) -> None:
        """Note that tasks which were handed out were ended with the run.

        Raises:
            SecondOutcome: one of them is not handed out.
        """
        self._check_out(tasks)
        self._out -= len(tasks)
        self.status[as_index(tasks)] = Status.CANCELLED

    def end(self) -> None:
        """Note that nothing runs any more of a run that was ended."""
        self.status[self.status == Status.RUNNING] = Status.CANCELLED
        self._out = 0

    def halt(self) -> list[Effect]:
        """End the run: nothing is handed out any more."""
        self.halted = True
        self.status[self.status == Status.PENDING] = Status.CANCELLED
        return [Halted()]

    def weigh(self, seconds: Sequence[float]) -> None:
        """Take in the durations observed so far, a template each (nan: none, taken to be as long as the others)."""
        known = np.asarray(seconds, np.float64)
        observed = known[np.isfinite(known)]
        typical = float(observed.mean()) if len(observed) else 1.0
        self.weigh_tasks(np.where(np.isfinite(known), known, typical)[self._plan.template_of])

    def weigh_tasks(self, seconds: NDArray[np.float64]) -> None:
        """Take in how long each task is believed to take: (n_tasks,) seconds."""
        self._order.weigh(seconds)

    def _check_out(self, tasks: Tasks) -> None:
        """Refuse an outcome of tasks that are not handed out: each has one, whatever a backend tells."""
        if type(tasks) is range:
            n_out = self._bytes.count(_RUNNING, tasks.start, tasks.stop)
        else:
            n_out = self.status[as_index(tasks)].tobytes().count(_RUNNING)
        if n_out != len(tasks):
            settled = next(task for task in map(int, tasks) if self.status[task] != Status.RUNNING)
            name, status = self._plan.name(settled), Status(int(self.status[settled])).name.lower()
            raise SecondOutcome(f"task {name!r} is {status}, so it cannot have an outcome: it is not handed out.")

    def _mark(self, tasks: Tasks, status: int) -> None:
        if type(tasks) is range and len(tasks) == 1:
            self._bytes[tasks.start] = status  # without numpy, as for the order
        else:
            self.status[as_index(tasks)] = status

    def _skip_after(self, task: int) -> Iterable[Effect]:
        return self._skip([], task)

    def _skip(self, tasks: Sequence[int], cause: int) -> Iterable[Effect]:
        """Skip tasks, and what waits for them or, where there are none, for the cause."""
        after = self._plan.graph.descendants(tasks or [cause])
        if self._joins and any(after[join] for join in self._joins):
            after = self._reached(tasks or [cause], cause)
        after[list(tasks)] = True
        after &= self.status == Status.PENDING
        if not after.any():
            return ()
        self.status[after] = Status.SKIPPED
        self._unsettled -= int(after.sum())
        return (Skipped(np.flatnonzero(after).astype(np.int32), cause), *self._order.drop(self._left_out()))

    def _reached(self, tasks: Sequence[int], cause: int) -> NDArray[np.bool_]:
        """Mark what waits for tasks, but a join only by way of its branch that runs.

        Where that is not decided yet, what is lost of both is noted for then: to the value of a workflow it does not
        matter what happens in a branch that does not run, nor when.
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
        """Return which tasks are never to be ready in this run."""
        found: NDArray[np.bool_] = (self.status == Status.SKIPPED) | (self.status == Status.CACHED)
        return found


def _joins_of(plan: Plan) -> dict[int, Branching]:
    """Return the branchings of a plan by the task that joins the branches of each."""
    return {branching.join: branching for branching in plan.branchings.values()}
