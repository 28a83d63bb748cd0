"""Lazy imports by one thread at a time, with interrupts deferred until they are complete.

Modules of the standard library that import each other, such as those of `multiprocessing`, are seen incomplete by
threads that begin with different ones. An interrupt (SIGINT) in the middle of an import can leave a module incomplete,
or appear as another error: numpy reports an `ImportError` about a broken installation.
"""

from __future__ import annotations

import _signal  # type: ignore[import-not-found]  # `signal` adds enums, which takes 1 ms per start
import _thread
import contextlib
import math
import os
import time
from typing import Any

_HANGS_SECONDS = 1.0  # an interrupt this long after the first stops the import, which may hang


class _InterruptDeferrer:
    """Handler of SIGINT while the main thread imports modules: defers interrupts until they are loaded.

    An interrupt that comes a second or more after the first takes effect at once, so that an import that hangs can be
    stopped.
    """

    __slots__ = ("arguments", "depth", "first", "handler", "thread")

    def __init__(self, handler: Any) -> None:
        self.handler = handler
        self.thread = _thread.get_ident()
        self.depth = 1
        self.first = math.inf  # when the first interrupt came
        self.arguments: tuple[Any, ...] | None = None

    def __call__(self, *arguments: Any) -> None:
        now = time.monotonic()
        if now - self.first >= _HANGS_SECONDS:
            self.handler(*arguments)
        self.first = min(self.first, now)
        self.arguments = arguments

    def leave(self) -> None:
        """At the end of the outermost block, restore the previous handler and call it for a deferred interrupt."""
        self.depth -= 1
        if not self.depth:
            _signal.signal(_signal.SIGINT, self.handler)
            if self.arguments is not None:
                self.handler(*self.arguments)


def _current_deferrer() -> _InterruptDeferrer | None:
    """Return the handler that defers interrupts for the calling thread, or None."""
    handler = _signal.getsignal(_signal.SIGINT)
    return handler if isinstance(handler, _InterruptDeferrer) and handler.thread == _thread.get_ident() else None


class _ImportLock:
    """Context manager that holds a reentrant lock, and in the main thread defers interrupts.

    Interrupts are deferred from before the lock is taken until it is released, so that none leaves it held.
    """

    def __init__(self) -> None:
        self.lock = _thread.RLock()

    def __enter__(self) -> None:
        nested, handler = _current_deferrer(), _signal.getsignal(_signal.SIGINT)
        if nested is not None:
            nested.depth += 1
        elif callable(handler) and not isinstance(handler, _InterruptDeferrer):
            with contextlib.suppress(ValueError):  # only the main thread may set handlers
                _signal.signal(_signal.SIGINT, _InterruptDeferrer(handler))
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        deferrer = _current_deferrer()
        if deferrer is not None:
            deferrer.leave()

    def free_in_child(self) -> None:
        """After a fork by a thread that does not import, free the lock and restore the handler of SIGINT."""
        if self.lock._is_owned():  # type: ignore[attr-defined]
            return
        self.lock._at_fork_reinit()  # type: ignore[attr-defined]
        handler = _signal.getsignal(_signal.SIGINT)
        if isinstance(handler, _InterruptDeferrer):
            _signal.signal(_signal.SIGINT, handler.handler)


loading = _ImportLock()
os.register_at_fork(after_in_child=loading.free_in_child)
