"""What a run does about memory: admit what tasks declare, end what takes more, and wait while there is none to be had.

Memory of a task is what its worker has more than before it got the task, and what all that it started has. Shared
memory is left out: inputs are read by many at once, and what large values take is bounded by the arena's budget.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from forgepar.backends.base import Backend, traits_of
from forgepar.backends.board import unmark
from forgepar.errors import InsufficientMemory, TaskMemoryExceeded
from forgepar.machine import as_text, available_memory, total_memory
from forgepar.plan import Plan
from forgepar.watch import Held

LEAST_SHARE = 0.05  # of all memory: with less than that available nothing is handed out
_LOOK_SECONDS = 0.02  # between two looks at what tasks have: a process takes 0.5 s for a GiB, so 40 MiB more
_TREE_COST = 20  # looks at whole process trees read all of /proc: they may take one of so many parts of the time
_GUARD_SECONDS = 0.1  # between two looks at what is available


class Guard:
    """Looks now and then whether memory is scarce; one for all runs of an executor, as they may be short.

    Attributes:
        look_at: when to look again, `time.perf_counter` seconds.
    """

    def __init__(self) -> None:
        self.look_at = -math.inf
        self._is_scarce = False

    @functools.cached_property
    def total(self) -> int:
        """All the memory that there is, bytes."""
        return total_memory()

    def is_scarce(self, now: float) -> bool:
        """Tell whether so little memory is available that nothing is to be handed out."""
        if now >= self.look_at:
            self.look_at = now + _GUARD_SECONDS
            self._is_scarce = available_memory() < LEAST_SHARE * self.total
        return self._is_scarce


class Memory:
    """The part of one run that has to do with memory.

    Args:
        plan: the workflow.
        backend: tells what each slot is at.
        guard: looks whether memory is scarce.
        watches: whether to look at what tasks have; not where nothing can be done about it.

    Raises:
        InsufficientMemory: a task declares more than that, so could never run.
    """

    def __init__(self, plan: Plan, backend: Backend, guard: Guard, *, watches: bool = True) -> None:
        self.guard = guard
        self._watches = watches
        self._backend = backend
        self._available = 0
        self._look_at = self._tree_at = -math.inf
        self._processes: dict[int, Any] = {}  # psutil's, by slot
        self._trees: dict[int, list[Any]] = {}
        self._idle: dict[int, int] = {}
        self._is_local = traits_of(backend).is_local
        if not self._is_local and any(plan.memories):
            warnings.warn(
                f"memory= of tasks is not watched by the backend {backend.name!r}, whose workers are elsewhere. "
                "Limit their memory where they are started.",
                stacklevel=5,
            )
        self.grow(plan)

    def grow(self, plan: Plan) -> None:
        """Go on with a plan that has more tasks.

        Raises:
            InsufficientMemory: one of them declares more than can be had.
        """
        declared = plan.memories if self._is_local else [0] * len(plan.memories)
        if any(declared):
            self._available = self.most
        available = self._available
        for template, need in enumerate(declared):
            if need > available:
                name = plan.name(int((plan.template_of == template).argmax()))
                raise InsufficientMemory(
                    f"task {name!r} declares memory={as_text(need)}, but only {as_text(available)} can be had here. "
                    "Declare less, free some, or run it on a larger machine.",
                    task=name,
                    needed=need,
                    available=available,
                )
        self._plan = plan
        self._declared = declared
        self.is_declared = any(declared)

    @property
    def most(self) -> int:
        """What all that run at once may declare together, bytes: what is available when it is first asked for."""
        return self._available or available_memory()

    # Admission

    def is_scarce(self, now: float) -> bool:
        """Tell whether so little memory is available that nothing is to be handed out."""
        return self._is_local and self.guard.is_scarce(now)

    def fits(self, slot: int, template: int, flights: Sequence[Sequence[Held]]) -> bool:
        """Tell whether a slot may get a batch of a template: tasks of a slot run one after the other."""
        need = self._declared[template]
        if not need:
            return True
        held = [max((self._declared[flight.template] for flight in has), default=0) for has in flights]
        held[slot] = max(held[slot], need)
        return sum(held) <= self._available

    def weigh_idle(self, slot: int, pid: int, template: int) -> None:
        """Note what an idle worker has, modules and leftovers of earlier tasks, before it gets a task with a limit."""
        if self._declared[template]:
            self._idle[slot] = self._of_process(slot, pid)

    # The limit

    def next_look(self, flights: Sequence[Sequence[Held]]) -> float:
        """Return when to look at what tasks have; infinite while none with a limit runs."""
        runs = self._watches and self.is_declared and any(has and self._declared[has[0].template] for has in flights)
        return self._look_at + _LOOK_SECONDS if runs else math.inf

    def exceeding(
        self, flights: Sequence[Sequence[Held]], pids: Sequence[int], now: float
    ) -> list[tuple[int, int, TaskMemoryExceeded]]:
        """Return slot, task and error where one has more memory than it declared."""
        if now < self.next_look(flights):
            return []
        self._look_at = now
        found = []
        sees_trees = now >= self._tree_at
        for slot, has in enumerate(flights):
            limit = self._declared[has[0].template] if has else 0
            if not limit or not pids[slot]:
                continue
            mark = self._backend.position(slot)
            used = self._of_tree(slot, pids[slot], look=sees_trees)
            batch, at = unmark(mark)
            if used > limit and batch == has[0].id and self._backend.position(slot) == mark:
                task = int(has[0].tasks[at])
                found.append((slot, task, self._exceeded(task, used, limit)))
        if sees_trees:
            after = time.perf_counter()
            self._tree_at = after + _TREE_COST * (after - now)
        return found

    def _exceeded(self, task: int, used: int, limit: int) -> TaskMemoryExceeded:
        return TaskMemoryExceeded(
            f"task {self._plan.name(task)!r} had {as_text(used)} of memory, more than the {as_text(limit)} that it "
            "declares (memory=), so its worker was ended. Declare more, or give it less to do at once.",
            used=used,
            limit=limit,
        )

    # Looking

    def _of_process(self, slot: int, pid: int) -> int:
        import psutil

        process = self._processes.get(slot)
        with suppress(psutil.Error):
            if process is None or process.pid != pid:
                process = self._processes[slot] = psutil.Process(pid)
                self._trees.pop(slot, None)
            return _own_bytes(process)
        return 0

    def _of_tree(self, slot: int, pid: int, *, look: bool) -> int:
        import psutil

        used = self._of_process(slot, pid) - self._idle.get(slot, 0)
        if look and slot in self._processes:
            with suppress(psutil.Error):
                self._trees[slot] = self._processes[slot].children(recursive=True)
        for child in self._trees.get(slot, ()):
            with suppress(psutil.Error):
                used += _own_bytes(child)
        return used


def _own_bytes(process: Any) -> int:
    """Tell a process's resident memory that it shares with nobody (where that is not told: all of it)."""
    info = process.memory_info()
    own: int = info.rss - getattr(info, "shared", 0)
    return own
