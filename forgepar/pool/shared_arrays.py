"""Large arrays that several jobs of a `ForgeExecutor` take: written once, read by all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from forgepar.pool.jobs import JobFuture
from forgepar.pool.submissions import Submissions
from forgepar.system.forking import fork_safe
from forgepar.values.arena import Arena
from forgepar.values.pickling import Dependencies
from forgepar.values.segments import LEAST_KEPT, SegmentSlice


class Sharing:
    """Submits jobs that take the same large arrays. `ForgeExecutor.sharing` returns one.

    When an array of 1 MiB or more is in the arguments a second time, at any depth, it is written to shared memory. This
    job and all later ones read it from there, so do not change the array until `close`. Arrays that are passed once are
    freed with their job.
    """

    def __init__(self, arena: Arena, submissions: Submissions, submit: Callable[..., JobFuture]) -> None:
        self._arena = arena
        self._submissions = submissions
        self._submit = submit
        self._lock = fork_safe(threading.RLock())
        self._seen: set[tuple[int, int]] = set()
        self._parts: dict[tuple[int, int], tuple[SegmentSlice, memoryview]] = {}
        self._stored: list[Any] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> JobFuture:
        """Submit a job; see `ForgeExecutor.submit`."""
        return self._submit(fn, args, kwargs, self._find)

    def submit_pickled(self, found: Dependencies, fn: Callable[..., Any], /, *args: Any) -> JobFuture:
        """Submit a job with arguments that contain pickled functions and classes, which are listed in ``found``."""
        return self._submit(fn, args, {}, self._find, found)

    def close(self) -> None:
        """Free the arrays. Jobs that take them and have not started will fail."""
        with self._lock:
            self._seen.clear()
            self._parts.clear()
            self._stored.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _find(self, buffer: memoryview) -> SegmentSlice | None:
        """Return the segment part of a buffer that was passed before; write it there the second time."""
        if len(buffer) < LEAST_KEPT:
            return None
        key = (_address(buffer), len(buffer))
        with self._lock:
            if key not in self._parts:
                if key not in self._seen:
                    self._seen.add(key)
                    return None
                segment = self._arena.write([buffer])
                self._stored.append(self._submissions.store(segment, is_shared=False))
                # The reference to the buffer prevents that its address is reused.
                self._parts[key] = ((segment[0], 0, len(buffer)), buffer)
            return self._parts[key][0]


def _address(buffer: memoryview) -> int:
    import numpy as np  # buffers of this size come from numpy arrays

    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
