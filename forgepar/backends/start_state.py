"""State that a worker takes over from its caller when it starts: umask, CPU affinity, niceness, soft resource limits.

Without this, a worker would have the state of the fork server, which may have started long ago, or the affinity and
niceness of the thread that starts it. So each start sends the caller's current state.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import NamedTuple, Self

try:
    import resource
except ImportError:  # this system has no such module
    _LIMITS: dict[str, int] = {}
else:
    _NAMES = {getattr(resource, name): name for name in reversed(dir(resource)) if name.startswith("RLIMIT_")}
    _LIMITS = {name: number for number, name in _NAMES.items()}  # each number once: some have two names

_STATUS = "/proc/self/status"


class StartState(NamedTuple):
    """The state that a worker takes over.

    Attributes:
        umask: None if the system does not show it; `os.umask` would change it for a moment.
        cpus: numbers of the CPUs that the process may use; None if unknown.
        niceness: as `os.getpriority` returns it.
        limits: the soft limit of each resource, by its name in `resource`.
    """

    umask: int | None
    cpus: frozenset[int] | None
    niceness: int
    limits: dict[str, int]

    @classmethod
    def here(cls, thread: int = 0) -> Self:
        """Return the state of this process, without changing it.

        Args:
            thread: native id of the thread with the affinity and niceness to return, as Linux has these per thread; 0:
                the calling thread. If the thread has ended, the main thread's are returned.
        """
        if thread and not os.path.exists(f"/proc/self/task/{thread}"):  # noqa: PTH110  (workers load no pathlib)
            thread = os.getpid() if os.path.exists("/proc/self/task") else 0  # noqa: PTH110
        cpus = frozenset(os.sched_getaffinity(thread)) if hasattr(os, "sched_getaffinity") else None
        limits = {name: resource.getrlimit(number)[0] for name, number in _LIMITS.items()}
        return cls(_umask(), cpus, os.getpriority(os.PRIO_PROCESS, thread), limits)

    def take_over(self) -> tuple[str, ...]:
        """Apply this state to the current process; return what could not be set, with reasons."""
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
    """Set a soft limit, or the highest that the hard limit of this process allows.

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
