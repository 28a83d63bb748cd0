"""What a worker takes over from its caller when it starts: umask, CPU affinity, niceness, soft resource limits.

A worker of a fork server starts with what that server had, which may have been started long ago; a worker that a thread
of ours starts has that thread's affinity and niceness. So each start sends what the caller has at that moment.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

try:
    import resource
except ImportError:  # no such thing on this system
    _LIMITS: dict[str, int] = {}
else:
    _NAMES = {getattr(resource, name): name for name in reversed(dir(resource)) if name.startswith("RLIMIT_")}
    _LIMITS = {name: number for number, name in _NAMES.items()}  # each once: some have two names

_STATUS = "/proc/self/status"


class StartState(NamedTuple):
    """State of a process that a worker takes over.

    Attributes:
        umask: None where it cannot be read: to ask `os.umask` changes it for a moment.
        cpus: numbers of the CPUs that may be used; None where the system does not tell.
        niceness: as `os.getpriority` has it.
        limits: the soft limit of each resource, by its name in `resource`.
    """

    umask: int | None
    cpus: frozenset[int] | None
    niceness: int
    limits: dict[str, int]

    @classmethod
    def here(cls, thread: int = 0) -> Self:
        """Return the state of this process, which is not changed for it.

        Args:
            thread: whose affinity and niceness, which Linux has for each thread: its `threading.get_native_id`. 0: the
                calling thread's. One that has ended stands for the main thread.
        """
        if thread and not os.path.exists(f"/proc/self/task/{thread}"):  # noqa: PTH110  (workers load no pathlib)
            thread = os.getpid() if os.path.exists("/proc/self/task") else 0  # noqa: PTH110
        cpus = frozenset(os.sched_getaffinity(thread)) if hasattr(os, "sched_getaffinity") else None
        limits = {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}
        return cls(_umask(), cpus, os.getpriority(os.PRIO_PROCESS, thread), limits)

    def take_over(self) -> tuple[str, ...]:
        """Make this the state of this process; return what could not be, each with its reason."""
        refused: list[str] = []
        if self.umask is not None:
            os.umask(self.umask)
        if self.cpus is not None and self.cpus != os.sched_getaffinity(0):
            _attempt(refused, f"CPU affinity {_listed(self.cpus)}", partial(os.sched_setaffinity, 0, self.cpus))
        if self.niceness != os.getpriority(os.PRIO_PROCESS, 0):
            change = partial(os.setpriority, os.PRIO_PROCESS, 0, self.niceness)
            _attempt(refused, f"niceness {self.niceness}", change)
        for name, soft in self.limits.items():
            if name in _LIMITS:
                _attempt(refused, f"{name} {soft}", partial(_limit, _LIMITS[name], soft))
        return tuple(refused)


def _attempt(refused: list[str], what: str, change: Callable[[], object]) -> None:
    try:
        change()
    except (OSError, ValueError) as error:
        refused.append(f"{what} ({error})")


def _limit(number: int, soft: int) -> None:
    """Set a soft limit, as near to the wanted one as this process's hard limit allows.

    Raises:
        ValueError: the hard limit is lower.
    """
    before, hard = resource.getrlimit(number)
    within = hard if _is_above(soft, hard) else soft
    if within != before:
        resource.setrlimit(number, (within, hard))
    if within != soft:
        raise ValueError(f"the worker's hard limit is {hard}")


def _is_above(soft: int, hard: int) -> bool:
    if hard == resource.RLIM_INFINITY:
        return False
    return soft == resource.RLIM_INFINITY or soft > hard


def _umask() -> int | None:
    try:
        with open(_STATUS) as file:  # noqa: PTH123
            return next((int(line.split()[1], 8) for line in file if line.startswith("Umask:")), None)
    except OSError:
        return None


def _listed(cpus: frozenset[int]) -> str:
    return ",".join(map(str, sorted(cpus)))
