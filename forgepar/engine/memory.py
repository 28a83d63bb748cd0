"""Memory of tasks: admit what they declare, end what takes more, and wait while the machine has none available.

The memory of a task is what its worker has more than before it got the task, plus that of all processes it started.
Shared memory does not count: many tasks read the same inputs, and the arena's budget bounds what large values take.
"""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from forgepar.backends.base import Backend
from forgepar.backends.worker_board import unmark
from forgepar.engine.in_flight import Flight
from forgepar.errors import InsufficientMemory, TaskMemoryExceeded
from forgepar.machine import as_text, available_memory, total_memory
from forgepar.workflow.catalog import TaskCatalog

LEAST_SHARE = 0.05  # of all memory; with less than that available, nothing is handed out
_LOOK_SECONDS = 0.02  # between two measurements: a process takes 0.5 s to fill a GiB, so 40 MiB in that time
_TREE_COST = 20  # to measure process trees reads all of /proc: it may take a 20th of the time
_MONITOR_SECONDS = 0.1  # between two checks of what is available


class MemoryMonitor:
    """Checks now and then whether memory is scarce; one for all runs of an executor, as runs may be short.

    Attributes:
        look_at: when to check again, seconds of `time.perf_counter`.
    """

    def __init__(self) -> None:
        self.look_at = -math.inf
        self._is_scarce = False

    @functools.cached_property
    def total(self) -> int:
        """All memory of the machine, bytes."""
        return total_memory()

    def is_scarce(self, now: float) -> bool:
        """Return whether so little memory is available that nothing should be handed out."""
        if now >= self.look_at:
            self.look_at = now + _MONITOR_SECONDS
            self._is_scarce = available_memory() < LEAST_SHARE * self.total
        return self._is_scarce


class Memory:
    """The memory of the tasks of one run.

    Args:
        catalog: the tasks.
        backend: reports what each slot runs.
        guard: checks whether memory is scarce.
        watches: whether to measure what tasks have; False where no task can be ended for it.

    Raises:
        InsufficientMemory: a task declares more than is available, so it could never run.
    """

    def __init__(self, catalog: TaskCatalog, backend: Backend, guard: MemoryMonitor, *, watches: bool = True) -> None:
        self.guard = guard
        self._watches = watches
        self._backend = backend
        self._available = 0
        self._look_at = self._tree_at = -math.inf
        self._processes: dict[int, Any] = {}  # psutil's, by slot
        self._trees: dict[int, list[Any]] = {}
        self._idle: dict[int, int] = {}
        self._is_local = backend.traits.is_local
        if not self._is_local and any(catalog.memories):
            warnings.warn(
                f"memory= of tasks is not watched by the backend {backend.name!r}, whose workers are elsewhere. "
                "Limit their memory where they are started.",
                stacklevel=5,
            )
        self.grow(catalog)

    def grow(self, catalog: TaskCatalog) -> None:
        """Continue with more tasks.

        Raises:
            InsufficientMemory: one of them declares more than is available; nothing was changed.
        """
        self.check_all(catalog)
        self._catalog = catalog
        self._declared = catalog.memories
        self.is_declared = self._is_local and any(catalog.memories)

    def check_all(self, catalog: TaskCatalog) -> None:
        """Raise `InsufficientMemory` where a task declares more than is available."""
        if self._is_local and any(catalog.memories):
            self._available = self._available or available_memory()
            for name, need in catalog.needs():
                self.check("task", name, need)

    def check(self, noun: str, name: str, need: int) -> None:
        """Raise `InsufficientMemory` where a task declares more than all that run at once may have together."""
        available = self._available or available_memory()
        if need > available:
            raise InsufficientMemory(
                f"{noun} {name!r} declares memory={as_text(need)}, but only {as_text(available)} is available. "
                "Declare less, free some, or use a machine with more memory.",
                task=name,
                needed=need,
                available=available,
            )

    # Admission

    def is_scarce(self, now: float) -> bool:
        """Return whether so little memory is available that nothing should be handed out."""
        return self._is_local and self.guard.is_scarce(now)

    def fits(self, slot: int, template: int, flights: Sequence[Sequence[Flight]]) -> bool:
        """Return whether a slot may get a batch of a template; the tasks of a slot run one after another."""
        need = self._declared[template]
        if not need:
            return True
        held = [max((self._declared[flight.template] for flight in has), default=0) for has in flights]
        held[slot] = max(held[slot], need)
        return sum(held) <= self._available

    def weigh_idle(self, slot: int, pid: int, template: int) -> None:
        """Measure an idle worker (modules, leftovers of earlier tasks) before it gets a task with a limit."""
        if self._declared[template]:
            self._idle[slot] = self._of_process(slot, pid)

    # The limit

    def next_look(self, flights: Sequence[Sequence[Flight]]) -> float:
        """Return when to measure tasks next; infinity while none with a limit runs."""
        runs = self._watches and self.is_declared and any(has and self._declared[has[0].template] for has in flights)
        return self._look_at + _LOOK_SECONDS if runs else math.inf

    def exceeding(
        self, flights: Sequence[Sequence[Flight]], pids: Sequence[int], now: float
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
            f"task {self._catalog.name(task)!r} had {as_text(used)} of memory, more than the {as_text(limit)} that it "
            "declares (memory=), so its worker was ended. Declare more, or give it less to do at once.",
            used=used,
            limit=limit,
        )

    # Measuring

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
    """Return the resident memory that a process shares with no other, bytes; all of it where that is not known."""
    info = process.memory_info()
    own: int = info.rss - getattr(info, "shared", 0)
    return own
