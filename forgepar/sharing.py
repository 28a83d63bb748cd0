"""Large arrays that more than one job of a `ForgeExecutor` takes: written once, read by all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self

from forgepar.forking import fork_safe
from forgepar.jobs import JobFuture
from forgepar.pickling import Found
from forgepar.recipes import Recipes
from forgepar.values.arena import Arena
from forgepar.values.segment import LEAST_KEPT, Part


class Sharing:
    """Submits jobs whose arguments hold the same large arrays, made by `ForgeExecutor.sharing`.

    An array of 1 MiB or more that is seen a second time, wherever in the arguments, is written to shared memory and
    read from there by this job and all that follow, as it was then: do not change it meanwhile. Those that are seen
    once are freed with their job, as ever.
    """

    def __init__(self, arena: Arena, recipes: Recipes, submit: Callable[..., JobFuture]) -> None:
        self._arena = arena
        self._recipes = recipes
        self._submit = submit
        self._lock = fork_safe(threading.RLock())
        self._seen: set[tuple[int, int]] = set()
        self._parts: dict[tuple[int, int], tuple[Part, memoryview]] = {}
        self._stored: list[Any] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> JobFuture:
        """Do as `ForgeExecutor.submit`."""
        return self._submit(fn, args, kwargs, self._find)

    def submit_pickled(self, found: Found, fn: Callable[..., Any], /, *args: Any) -> JobFuture:
        """Do as `submit` for arguments that hold functions and classes in a pickled form."""
        return self._submit(fn, args, {}, self._find, found)

    def close(self) -> None:
        """Free the arrays; jobs that were not begun would not find them any more."""
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

    def _find(self, buffer: memoryview) -> Part | None:
        """Return where a buffer lies, if it was seen before; it is written there if this is the second time."""
        if len(buffer) < LEAST_KEPT:
            return None
        key = (_address(buffer), len(buffer))
        with self._lock:
            if key not in self._parts:
                if key not in self._seen:
                    self._seen.add(key)
                    return None
                segment = self._arena.write([buffer])
                self._stored.append(self._recipes.store(segment, is_shared=False))
                # Together with the buffer, so that nothing else comes to lie at its address.
                self._parts[key] = ((segment[0], 0, len(buffer)), buffer)
            return self._parts[key][0]


def _address(buffer: memoryview) -> int:
    import numpy as np  # it is numpy's arrays that are so large

    address: int = np.frombuffer(buffer, np.uint8).__array_interface__["data"][0]
    return address
