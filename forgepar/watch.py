"""What a run does by the clock: end what takes too long, and try again what has waited long enough.

The dispatcher asks when to look next, and at each look what is due. Nothing here waits or sends.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from forgepar.backends.base import Backend, traits_of
from forgepar.backends.board import unmark
from forgepar.errors import TaskError, TaskTimeout
from forgepar.plan import Plan, Tasks
from forgepar.runstate import RunPolicy

GOES_ON = "its thread cannot be ended from outside, and its slot gets no work until it returns"
_LONGEST_SLEEP_SECONDS = 86400.0  # system calls refuse times that a user may well give: 1e300
TERM_SECONDS = 0.5  # from asking a worker to end, which lets a task's own handler clean up, to ending it
_LONGEST_TIMED_SECONDS = 1.0  # while a task with a timeout runs: a stop of the program is seen to this precision
_LEAST_STOP_SECONDS = 0.25  # by which a wait that took longer than asked for was stopped, and not merely late
_SECOND_LOOK_SECONDS = 0.001  # a mark and a start are two words: one look may see them a task apart


class Held(Protocol):
    """A batch that a slot has, as far as a watch looks at it."""

    id: int
    template: int
    tasks: Tasks


class Sentence(NamedTuple):
    """A worker that is being ended, the task it is ended for, and what that fails with."""

    task: int
    error: TaskError
    kill_at: float


class Watch:
    """The clock's part of one run.

    Args:
        plan: the workflow.
        policy: the run's rules.
        backend: tells what each slot is at.

    Attributes:
        sentences: the workers that are being ended, by slot.
        end_at: when what still runs after the run was ended is killed.
        cancel_at: when the run is called off.
    """

    def __init__(self, plan: Plan, policy: RunPolicy, backend: Backend) -> None:
        self.sentences: dict[int, Sentence] = {}
        self.end_at = math.inf
        self.cancel_at = math.inf
        self._policy = policy
        self._backend = backend
        self._ends_tasks = traits_of(backend).ends_tasks
        self.grow(plan)
        self._retries: list[tuple[float, int]] = []
        self._run_ends_at = math.inf
        self._layer_ends_at = math.inf
        self._rollback_ends_at = math.inf
        self._layer = -1
        self._seen: dict[int, int] = {}
        self._overdue_after: dict[int, float] = {}  # by slot, what its task was given
        self._stopped: dict[int, tuple[int, float]] = {}  # by slot, the task at which the program was stopped, how long
        self._look_at = math.inf

    def grow(self, plan: Plan) -> None:
        """Go on with a plan that has more tasks."""
        self._plan = plan
        self._timeouts = plan.timeouts
        self._has_timeouts = any(timeout is not None for timeout in plan.timeouts)

    def begin(self, now: float) -> None:
        """Note the start of the run."""
        if self._policy.timeout is not None:
            self._run_ends_at = now + self._policy.timeout

    def layer_begins(self, layer: int, now: float) -> None:
        """Note the start of a layer."""
        if self._policy.layer_timeout is not None:
            self._layer, self._layer_ends_at = layer, now + self._policy.layer_timeout

    @property
    def is_idle(self) -> bool:
        """Whether nothing will ever be due as things stand."""
        return not self._has_timeouts and self.next_look() == math.inf

    def next_look(self) -> float:
        """Return when something may be due."""
        retry_at = self._retries[0][0] if self._retries else math.inf
        kill_at = min((sentence.kill_at for sentence in self.sentences.values()), default=math.inf)
        return min(
            retry_at,
            kill_at,
            self._look_at,
            self._run_ends_at,
            self._layer_ends_at,
            self._rollback_ends_at,
            self.end_at,
            self.cancel_at,
        )

    def patience(self, look_at: float, now: float) -> float:
        """Return how long to sleep at most until something is to be looked at, seconds."""
        longest = _LONGEST_SLEEP_SECONDS if self._look_at == math.inf else _LONGEST_TIMED_SECONDS
        return min(max(0.0, look_at - now), longest)

    # Retries

    def delay(self, task: int, attempt: int, now: float) -> None:
        """Let a task wait as its backoff says after an attempt that failed."""
        backoff = self._plan.spec(task).options.backoff
        chance = random.Random(f"{self._policy.seed} {self._plan.name(task)} {attempt}").random()
        heapq.heappush(self._retries, (now + backoff.wait_seconds(attempt, chance), task))

    def delay_by(self, task: int, seconds: float, now: float) -> None:
        """Let a task wait for some seconds."""
        heapq.heappush(self._retries, (now + seconds, task))

    def begin_rollback(self, now: float) -> None:
        """Forget what the run was given, and note what undoing is: as long again, if nothing else is said."""
        self._run_ends_at = self._layer_ends_at = self.end_at = self.cancel_at = math.inf
        self._retries.clear()
        if self._policy.rollback_seconds is not None:
            self._rollback_ends_at = now + self._policy.rollback_seconds

    def rollback_ran_out(self, now: float) -> bool:
        """Tell whether the time to undo things is over; told once."""
        is_over = now >= self._rollback_ends_at
        if is_over:
            self._rollback_ends_at = math.inf
        return is_over

    def due_retries(self, now: float | None = None) -> list[int]:
        """Return the tasks that have waited long enough, by now or by `time.perf_counter`."""
        if not self._retries:
            return []
        now = time.perf_counter() if now is None else now
        due = []
        while self._retries and self._retries[0][0] <= now:
            due.append(heapq.heappop(self._retries)[1])
        return due

    # Timeouts

    def slept(self, asked: float | None, began: float, now: float, firsts: Sequence[Held | None]) -> None:
        """Take in that a wait took longer than was asked for: the program was stopped, as by Ctrl-Z, with its workers.

        That time does not count against the timeouts of what runs. A wait is short while such tasks run, so that little
        of it goes unseen.

        Args:
            asked: how long the wait was to take at most, seconds.
            began: when it began.
            now: when it ended.
            firsts: the batch that each slot is at.
        """
        if asked is None or not self._has_timeouts or (seconds := now - began - asked) < _LEAST_STOP_SECONDS:
            return
        for slot, held in enumerate(firsts):
            if held is not None:
                mark = self._backend.position(slot)
                at, before = self._stopped.get(slot, (mark, 0.0))
                self._stopped[slot] = (mark, seconds + (before if at == mark else 0.0))

    def overdue(self, firsts: Sequence[Held | None], now: float) -> list[tuple[int, int]]:
        """Return slot and task where one has run for longer than its timeout, as two looks in a row have shown.

        Args:
            firsts: the batch that each slot is at.
            now: `time.perf_counter`, which workers tell the start of a task by as well.
        """
        found = []
        self._look_at = math.inf
        for slot, held in enumerate(firsts):
            timeout = self._timeouts[held.template] if held is not None else None
            if held is None or timeout is None or slot in self.sentences:
                continue
            mark = self._backend.position(slot)
            batch, at = unmark(mark)
            # A batch that has not begun yet is looked at again when its first task could be overdue.
            left = self._backend.started(slot) + timeout - now if batch == held.id else timeout
            if self._stopped and self._stopped.get(slot, (0, 0.0))[0] == mark:
                left += self._stopped[slot][1]
            if left <= 0 and self._seen.get(slot) == mark:
                self._overdue_after[slot] = timeout
                found.append((slot, int(held.tasks[at])))
            elif left <= 0:
                self._seen[slot] = mark
                left = _SECOND_LOOK_SECONDS
            # One whose function is being unpickled is said to start far ahead; it may start any moment.
            self._look_at = min(self._look_at, now + max(min(left, timeout), _SECOND_LOOK_SECONDS))
        return found

    def condemn(self, slot: int, task: int, now: float) -> TaskTimeout:
        """Sentence a worker whose task is overdue; the task is to fail with the error returned."""
        seconds = self._overdue_after.get(slot, self._plan.spec(task).options.timeout or 0.0)
        done = "its worker was ended" if self._ends_tasks else f"it was given up; {GOES_ON}"
        error = TaskTimeout(
            f"task {self._plan.name(task)!r} took longer than its timeout of {seconds:g} s, so {done}. "
            "Give it more time, or less to do; retries= tries it again.",
            seconds=seconds,
        )
        self.sentences[slot] = Sentence(task, error, now + TERM_SECONDS)
        return error

    def due_kills(self, now: float) -> list[int]:
        """Return the slots whose worker was asked to end and did not; each is told once."""
        due = [slot for slot, sentence in self.sentences.items() if sentence.kill_at <= now]
        for slot in due:
            self.sentences[slot] = self.sentences[slot]._replace(kill_at=math.inf)
        return due

    def run_out(self, now: float) -> tuple[int, float] | None:
        """Return the layer (-1: the run) whose time is over, and what it was given; told once."""
        for layer, ends_at, seconds in (
            (-1, self._run_ends_at, self._policy.timeout),
            (self._layer, self._layer_ends_at, self._policy.layer_timeout),
        ):
            if now >= ends_at:
                self._run_ends_at = self._layer_ends_at = math.inf
                return layer, seconds or 0.0
        return None
