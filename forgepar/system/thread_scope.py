"""Values for the task that runs in a thread, such as its context, and for the threads that the task starts."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

from forgepar.system.forking import fork_safe

T = TypeVar("T")


class ThreadScope(Generic[T]):
    """Value that the tasks of a thread share.

    A thread that a task has started does not show which task that was. It gets the value of the one thread that runs
    tasks; if several do, the value of the process, if any, rather than perhaps another task's.

    Attributes:
        of_process: value where no thread has one: in a worker, which runs one task at a time.

    Example:
        >>> current = ThreadScope[str]()
        >>> with current.here("this"):
        ...     current.get()
        'this'
        >>> current.get() is None
        True
    """

    def __init__(self) -> None:
        self.of_process: T | None = None
        self._here = threading.local()
        self._lock = fork_safe(threading.RLock())
        self._running: list[tuple[int, T]] = []

    def own(self) -> T | None:
        """Return the value of this thread itself, or of the process."""
        own: T | None = getattr(self._here, "value", None)
        return own if own is not None else self.of_process

    def get(self) -> T | None:
        """Return the value for this thread, which a task may have started."""
        if getattr(self._here, "value", None) is None and self._running:
            with self._lock:
                if len({thread for thread, _ in self._running}) == 1:
                    return self._running[-1][1]
        return self.own()

    @contextmanager
    def here(self, value: T) -> Iterator[None]:
        """Set the value for this thread, and for threads that it starts, during the block."""
        before: T | None = getattr(self._here, "value", None)
        entry = (threading.get_ident(), value)
        with self._lock:
            self._running.append(entry)
        self._here.value = value
        try:
            yield
        finally:
            self._here.value = before
            with self._lock:
                self._running.remove(entry)
