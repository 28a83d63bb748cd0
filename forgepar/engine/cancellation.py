"""Cancel a run from outside: from another thread, from a signal handler, or after a time."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable

from forgepar._validate import check_callable, check_flag, check_instance, check_seconds
from forgepar.system.forking import fork_safe
from forgepar.version import public


@public
class CancellationToken:
    """Cancels what it was given to: runs, and child tokens.

    A child is cancelled with its parent, not the other way round. A parent keeps a child alive only while the child, or
    a child of its own, has a callback, so a parent may have any number of children in its life. All methods may be
    called from any thread and from signal handlers.

    Args:
        parent: cancels this token when it is cancelled itself.

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
        self._children: weakref.WeakSet[CancellationToken] = weakref.WeakSet()
        self._kept: set[CancellationToken] = set()  # of the children, those that have something to call
        self._parent = parent
        if parent is not None:
            check_instance("parent", parent, CancellationToken, "a CancellationToken, or None")
            self._ends_at = parent.ends_at
            parent._adopt(self)

    @classmethod
    def with_timeout(cls, seconds: float, parent: CancellationToken | None = None) -> CancellationToken:
        """Return a token that is cancelled after some seconds, if not before.

        Raises:
            ValueError: ``seconds`` is not greater than 0.
        """
        if seconds is None:
            raise ValueError("seconds must be a number greater than 0, got None.")
        seconds = check_seconds("seconds", seconds)
        token = cls(parent)
        ends_at = time.monotonic() + seconds
        token._ends_at = ends_at if token._ends_at is None else min(ends_at, token._ends_at)
        return token

    def child(self) -> CancellationToken:
        """Return a token that is cancelled with this one."""
        return CancellationToken(self)

    def cancel(self, *, kill: bool = False) -> None:
        """Cancel the token and its children: nothing more starts.

        Args:
            kill: also end what runs, instead of waiting until it returns.

        Raises:
            ValueError: ``kill`` is neither True nor False; nothing was cancelled.
        """
        check_flag("kill", kill)
        kill = bool(kill)
        with self._lock:
            if self._is_cancelled and (self._kills or not kill):
                return
            self._is_cancelled = True
            self._kills = self._kills or kill
            children, callbacks = list(self._children), list(self._callbacks)
        for child in children:
            child.cancel(kill=self._kills)
        for callback in callbacks:
            callback()

    @property
    def is_cancelled(self) -> bool:
        """Whether it was cancelled, or its time is over."""
        return self._is_cancelled or (self._ends_at is not None and time.monotonic() >= self._ends_at)

    @property
    def kills(self) -> bool:
        """Whether what runs is ended, too."""
        return self._kills

    @property
    def ends_at(self) -> float | None:
        """When its time is over, `time.monotonic` seconds; None: never."""
        return self._ends_at

    def on_cancel(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call a function when the token is cancelled (not when its time is over); at once if it was already.

        It is called again if `cancel` is called later with ``kill=True``.

        Returns:
            A function that removes the callback.
        """
        check_callable("callback", callback)
        with self._lock:
            self._callbacks.append(callback)
            self._show_use()
            is_late = self._is_cancelled
        if is_late:
            callback()

        def forget() -> None:
            with self._lock:
                if callback in self._callbacks:
                    self._callbacks.remove(callback)
                    self._show_use()

        return forget

    def _adopt(self, child: CancellationToken) -> None:
        """Have a child cancelled with this token."""
        with self._lock:
            self._children.add(child)
            is_late = self._is_cancelled
        if is_late:
            child.cancel(kill=self._kills)

    def _show_use(self) -> None:
        """Have the parent keep this token while it has callbacks; the lock of this one is held.

        Locks are only taken from a child to its parent, so two threads cannot deadlock.
        """
        if self._parent is not None:
            self._parent._keep(self, is_used=bool(self._callbacks or self._kept))

    def _keep(self, child: CancellationToken, *, is_used: bool) -> None:
        with self._lock:
            if is_used:
                self._kept.add(child)
            else:
                self._kept.discard(child)
            self._show_use()
