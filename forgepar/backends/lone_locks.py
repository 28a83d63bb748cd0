"""Locks for the queues of an executor that has one process: each end of such a queue has one user, so they do nothing.

`multiprocessing` has semaphores of the system there, which need a /dev/shm that can be written to, and a process that
removes what others leave of them.
"""

from __future__ import annotations

from typing import Any


class LoneLock:
    """A lock that is always free, or a semaphore that never comes to nothing."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._semlock = self  # where a queue looks how many more it may take

    def acquire(self, *_: Any, **__: Any) -> bool:
        """Return at once."""
        return True

    def release(self) -> None:
        """Do nothing."""

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass

    def __reduce__(self) -> Any:
        return LoneLock, ()

    def _is_zero(self) -> bool:
        return False
