"""The lock that the queues of a one-process executor use: each end of such a queue has one user, so it does nothing.

The semaphores that `multiprocessing` uses there need a writable /dev/shm, and a process that removes leftover ones.
"""

from __future__ import annotations

from typing import Any


class DummyLock:
    """A lock that is always free, or a semaphore that is never zero."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self._semlock = self  # a queue reads from it how many more items it may take

    def acquire(self, *_: Any, **__: Any) -> bool:
        """Return True at once."""
        return True

    def release(self) -> None:
        """Do nothing."""

    def __enter__(self) -> bool:
        return True

    def __exit__(self, *_: object) -> None:
        pass

    def __reduce__(self) -> Any:
        return DummyLock, ()

    def _is_zero(self) -> bool:
        return False
