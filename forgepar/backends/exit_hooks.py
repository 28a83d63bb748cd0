"""Functions that run when this process ends, before anything waits for its executors or its children.

This module uses private names of `threading`; tests/backends/test_starting.py checks them on each version of Python.
"""

from __future__ import annotations

import atexit
import concurrent.futures.process  # noqa: F401  (see `at_exit`)
import os
import sys
import threading
from collections.abc import Callable
from multiprocessing import util

_EXIT_PRIORITY = 1000  # before anything that `multiprocessing` does when a process exits
_callbacks: list[Callable[[], object]] = []
_registered_in = 0  # the process that `end_before_joins` was called in


def at_exit(callback: Callable[[], object]) -> None:
    """Register a function to be called when this process ends, before anything waits for its executors or children.

    It is called twice: by `threading`, and by `atexit` in case an interrupt keeps `threading` from calling it.

    `concurrent.futures` waits for running jobs in a callback of its own, before `atexit` calls any. Callbacks of
    `threading` run last in, first out, and that one was registered when this module imported it. A child that
    `multiprocessing` started waits for its own children even before that, see `end_before_joins`.
    """
    _callbacks.append(callback)
    threading._register_atexit(callback)  # type: ignore[attr-defined]
    atexit.register(callback)


def end_before_joins() -> None:
    """Have a process that `multiprocessing` started end its workers before it waits for its children.

    It waits before `threading` calls what `at_exit` registers, so it would wait for idle workers forever.
    """
    global _registered_in  # a forked child must register again
    if _registered_in != os.getpid():
        _registered_in = os.getpid()
        util.Finalize(None, _run_callbacks, exitpriority=_EXIT_PRIORITY)


def _run_callbacks() -> None:
    for callback in reversed(_callbacks):
        callback()


def is_interrupted() -> bool:
    """Return whether an interrupt that left the main program ends this process.

    In a child of `multiprocessing` the exception is still being handled, up to Python 3.12; later versions do not show
    it. Other programs have printed it. An interactive session continues after an interrupt.
    """
    shown = None if hasattr(sys, "ps1") else getattr(sys, "last_type", None)
    return any(isinstance(kind, type) and issubclass(kind, KeyboardInterrupt) for kind in (sys.exc_info()[0], shown))


def keep_interrupt_status() -> None:
    """Have a program that an interrupt ended exit as such, with SIGINT.

    CPython notes the interrupt when evaluated text raises it, and forgets it when other text is evaluated. Importing
    psutil does the latter, as it creates named tuples.
    """

    def interrupt() -> None:
        raise KeyboardInterrupt

    try:
        eval("interrupt()", {"interrupt": interrupt})  # noqa: S307
    except KeyboardInterrupt:
        return
