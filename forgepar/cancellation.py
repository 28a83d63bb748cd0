"""Calling a run off from outside: from another thread, a signal handler, or by the clock."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from forgepar.forking import fork_safe


class CancellationToken:
    """Says whether something was called off; whoever holds it may call it off.

    A child is called off with its parent, not the other way round. All methods may be called from any thread and from
    signal handlers.

    Args:
        parent: whose end is this token's as well.

    Example:
        >>> token = CancellationToken()
        >>> child = token.child()
        >>> token.cancel()
        >>> child.is_cancelled
        True
    """

    def __init__(self, parent: CancellationToken | None = None) -> None:
        # Reentrant: a signal handler may come while this very thread holds it.
        self._lock = fork_safe(threading.RLock())
        self._is_cancelled = self._kills = False
        self._ends_at: float | None = None
        self._callbacks: list[Callable[[], None]] = []
        if parent is not None:
            self._ends_at = parent.ends_at
            parent.on_cancel(lambda: self.cancel(kill=parent.kills))

    @classmethod
    def with_timeout(cls, seconds: float, parent: CancellationToken | None = None) -> CancellationToken:
        """Make a token that is called off some seconds from now, if not before.

        Raises:
            ValueError: the time is not above 0.
        """
        if not seconds > 0:
            raise ValueError(f"seconds={seconds!r} is no time. Give seconds above 0.")
        token = cls(parent)
        ends_at = time.monotonic() + seconds
        token._ends_at = ends_at if token._ends_at is None else min(ends_at, token._ends_at)
        return token

    def child(self) -> CancellationToken:
        """Make a token that is called off with this one."""
        return CancellationToken(self)

    def cancel(self, *, kill: bool = False) -> None:
        """Call it off.

        Args:
            kill: end what runs, too, instead of letting it come to its end.
        """
        with self._lock:
            if self._is_cancelled and (self._kills or not kill):
                return
            self._is_cancelled = True
            self._kills = self._kills or kill
            callbacks = list(self._callbacks)
        for callback in callbacks:
            callback()

    @property
    def is_cancelled(self) -> bool:
        """Whether it was called off, or its time is over."""
        return self._is_cancelled or (self._ends_at is not None and time.monotonic() >= self._ends_at)

    @property
    def kills(self) -> bool:
        """Whether what runs is to be ended, too."""
        return self._kills

    @property
    def ends_at(self) -> float | None:
        """When its time is over, `time.monotonic` seconds; None: never."""
        return self._ends_at

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Have something called when it is called off (not when its time is over), at once if it was already.

        It is called again if what was called off is to be killed later.

        Returns:
            what to call to have it no longer called.
        """
        with self._lock:
            self._callbacks.append(callback)
            is_late = self._is_cancelled
        if is_late:
            callback()

        def forget() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)

        return forget
