"""What is due by the clock: tasks that take too long, workers to kill, retries that have waited long enough.

The slot scheduler asks when to look next, and at each look what is due. Nothing here waits or sends.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Sequence
from typing import NamedTuple

from forgepar.backends.base import Backend
from forgepar.backends.worker_board import unmark
from forgepar.engine.in_flight import Flight
from forgepar.errors import TaskError, TaskTimeout
from forgepar.scheduling.run_state import RunPolicy
from forgepar.workflow.catalog import TaskCatalog

GOES_ON = "its thread cannot be ended from outside, and its slot gets no work until it returns"
_LONGEST_SLEEP_SECONDS = 86400.0  # system calls refuse long times such as 1e300, which a user may give
TERM_SECONDS = 0.5  # from SIGTERM, at which a task's own handler can clean up, to SIGKILL
_LONGEST_TIMED_SECONDS = 1.0  # while a task with a timeout runs: how precisely a stop of the program is seen
_LEAST_STOP_SECONDS = 0.25  # a wait that takes so much longer than asked for was stopped, and not merely late
_SECOND_LOOK_SECONDS = 0.001  # mark and start are two words: one look may see those of different tasks


class PendingKill(NamedTuple):
    """A worker that is being ended, the task it is ended for, and the error that the task fails with."""

    task: int
    error: TaskError
    kill_at: float


class Deadlines:
    """Timeouts, pending kills and retries of one run.

    Args:
        catalog: the tasks.
        policy: the run's rules.
        backend: reports what each slot runs.

    Attributes:
        pending_kills: by slot, the workers that are being ended.
        has_timeouts: whether any task has a timeout.
        end_at: when to kill what still runs after the run was ended.
        cancel_at: when the run is cancelled.
    """

    def __init__(self, catalog: TaskCatalog, policy: RunPolicy, backend: Backend) -> None:
        self.pending_kills: dict[int, PendingKill] = {}
        self.end_at = math.inf
        self.cancel_at = math.inf
        self._policy = policy
        self._backend = backend
        self._ends_tasks = backend.traits.ends_tasks
        self.grow(catalog)
        self._retries: list[tuple[float, int]] = []
        self._run_ends_at = math.inf
        self._layer_ends_at = math.inf
        self._rollback_ends_at = math.inf
        self._layer = -1
        self._seen: dict[int, int] = {}
        self._overdue_after: dict[int, float] = {}  # by slot, what its task was given
        self._stopped: dict[int, tuple[int, float]] = {}  # by slot, the task at which the program was stopped, how long
        self._look_at = math.inf

    def grow(self, catalog: TaskCatalog) -> None:
        """Continue with more tasks."""
        self._catalog = catalog
        self._timeouts = catalog.timeouts
        self.has_timeouts = any(timeout is not None for timeout in catalog.timeouts)

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
        return not self.has_timeouts and self.next_look() == math.inf

    def next_look(self) -> float:
        """Return when something may be due."""
        retry_at = self._retries[0][0] if self._retries else math.inf
        kill_at = min((pending_kill.kill_at for pending_kill in self.pending_kills.values()), default=math.inf)
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
        """Make a task wait for its next attempt, as long as its backoff says."""
        backoff = self._catalog.spec(task).options.backoff
        source = f"{self._policy.seed} {self._catalog.name(task)} {attempt}"
        chance = random.Random(source.encode(errors="surrogatepass")).random()  # of bytes as of text that has no others
        heapq.heappush(self._retries, (now + backoff.wait_seconds(attempt, chance), task))

    def delay_by(self, task: int, seconds: float, now: float) -> None:
        """Make a task wait for some seconds."""
        heapq.heappush(self._retries, (now + seconds, task))

    def begin_rollback(self, now: float) -> None:
        """Drop the deadlines of the run, and start the one of the rollback."""
        self._run_ends_at = self._layer_ends_at = self.end_at = self.cancel_at = math.inf
        self._retries.clear()
        if self._policy.rollback_seconds is not None:
            self._rollback_ends_at = now + self._policy.rollback_seconds

    def rollback_ran_out(self, now: float) -> bool:
        """Return whether the time for the rollback is over; True once."""
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

    def slept(self, asked: float | None, began: float, now: float, firsts: Sequence[Flight | None]) -> None:
        """Detect that the program and its workers were stopped (Ctrl-Z): a wait took longer than asked for.

        That time does not count against timeouts. Waits are short while tasks with timeouts run, so that little of it
        is missed.

        Args:
            asked: how long the wait was to take at most, seconds.
            began: when it began.
            now: when it ended.
            firsts: the batch that each slot runs.
        """
        if asked is None or not self.has_timeouts or (seconds := now - began - asked) < _LEAST_STOP_SECONDS:
            return
        for slot, held in enumerate(firsts):
            if held is not None:
                mark = self._backend.position(slot)
                at, before = self._stopped.get(slot, (mark, 0.0))
                self._stopped[slot] = (mark, seconds + (before if at == mark else 0.0))

    def overdue(self, firsts: Sequence[Flight | None], now: float) -> list[tuple[int, int]]:
        """Return slot and task where a task has run for longer than its timeout, by two looks in a row.

        Args:
            firsts: the batch that each slot runs.
            now: seconds of `time.perf_counter`, the clock of all workers.
        """
        found = []
        self._look_at = math.inf
        for slot, held in enumerate(firsts):
            timeout = self._timeouts[held.template] if held is not None else None
            if held is None or timeout is None or slot in self.pending_kills:
                continue
            mark = self._backend.position(slot)
            batch, at = unmark(mark)
            # Of a batch that has not begun, the first task can be overdue after its timeout at the earliest.
            left = self._backend.started(slot) + timeout - now if batch == held.id else timeout
            if self._stopped and (stopped := self._stopped.get(slot)) is not None and stopped[0] == mark:
                left += stopped[1]
            if left <= 0 and self._seen.get(slot) == mark:
                self._overdue_after[slot] = timeout
                found.append((slot, int(held.tasks[at])))
            elif left <= 0:
                self._seen[slot] = mark
                left = _SECOND_LOOK_SECONDS
            # A task whose function is being unpickled has a start in the far future; it may start any moment.
            self._look_at = min(self._look_at, now + max(min(left, timeout), _SECOND_LOOK_SECONDS))
        return found

    def plan_kill(self, slot: int, task: int, now: float) -> TaskTimeout:
        """Note that a worker is asked to end as its task is overdue; return the error that the task fails with."""
        seconds = self._overdue_after.get(slot, self._catalog.spec(task).options.timeout or 0.0)
        done = "its worker was ended" if self._ends_tasks else f"it was given up; {GOES_ON}"
        error = TaskTimeout(
            f"task {self._catalog.name(task)!r} took longer than its timeout of {seconds:g} s, so {done}. "
            "Give it more time, or less to do; retries= tries it again.",
            seconds=seconds,
        )
        self.pending_kills[slot] = PendingKill(task, error, now + TERM_SECONDS)
        return error

    def due_kills(self, now: float) -> list[int]:
        """Return the slots whose worker was asked to end and did not; each once."""
        due = [slot for slot, pending_kill in self.pending_kills.items() if pending_kill.kill_at <= now]
        for slot in due:
            self.pending_kills[slot] = self.pending_kills[slot]._replace(kill_at=math.inf)
        return due

    def run_out(self, now: float) -> tuple[int, float] | None:
        """Return the layer (-1: the run) whose time is over, and its timeout in seconds; once."""
        for layer, ends_at, seconds in (
            (-1, self._run_ends_at, self._policy.timeout),
            (self._layer, self._layer_ends_at, self._policy.layer_timeout),
        ):
            if now >= ends_at:
                self._run_ends_at = self._layer_ends_at = math.inf
                return layer, seconds or 0.0
        return None
