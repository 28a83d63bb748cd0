"""Who listens to a run, as ``run(audit=...)`` says: files, loggers, functions; and what shields the run from them."""

from __future__ import annotations

import io
import logging
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeAlias

from forgepar.audit import JsonLines, names_of
from forgepar.errors import WrongProcess
from forgepar.events import (
    Event,
    Sink,
    WorkflowCancelled,
    WorkflowCompleted,
    WorkflowDeadlockTimeout,
    WorkflowMemoryLow,
    WorkflowTaskCached,
    WorkflowTaskCompleted,
    WorkflowTaskFailed,
    WorkflowTaskMemoryExceeded,
    WorkflowTaskRetried,
    WorkflowTaskSkipped,
    WorkflowTaskStarted,
    WorkflowTaskTimedOut,
    WorkflowWorkerDied,
)
from forgepar.validation import check_path

# One who may listen: the path of a file, a logger, a function of an event, or a sink.
Listener: TypeAlias = str | os.PathLike[str] | logging.Logger | Callable[[Event], object] | Sink
Audit: TypeAlias = Listener | Sequence[Listener] | None

_LEVELS: dict[type[Event], int] = {
    WorkflowTaskFailed: logging.ERROR,
    WorkflowDeadlockTimeout: logging.ERROR,
    WorkflowTaskRetried: logging.WARNING,
    WorkflowTaskTimedOut: logging.WARNING,
    WorkflowTaskMemoryExceeded: logging.WARNING,
    WorkflowMemoryLow: logging.WARNING,
    WorkflowCancelled: logging.WARNING,
    WorkflowWorkerDied: logging.WARNING,
    WorkflowTaskStarted: logging.DEBUG,
    WorkflowTaskCompleted: logging.DEBUG,
    WorkflowTaskSkipped: logging.DEBUG,
    WorkflowTaskCached: logging.DEBUG,
}
_IN_EVERY_RECORD = ("at", "seq", "run_id")


class Logging:
    """A sink that logs events: what fails as errors, what is mended as warnings, tasks for debugging, all else as info.

    Args:
        logger: gets them; each record has the event as its attribute ``event``.

    Example:
        >>> Logging(logging.getLogger("runs")).write([])
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, events: Sequence[Event]) -> None:
        """Log the events."""
        for event in events:
            level = _level(event)
            if self._logger.isEnabledFor(level):
                self._logger.log(level, "%s", _text(event), extra={"event": event})

    def __repr__(self) -> str:
        return repr(self._logger)


class Calls:
    """A sink that calls a function with each event.

    Args:
        function: what to call.
    """

    def __init__(self, function: Callable[[Event], object]) -> None:
        self._function = function

    def write(self, events: Sequence[Event]) -> None:
        """Call the function."""
        for event in events:
            self._function(event)

    def __repr__(self) -> str:
        return repr(self._function)


class _Shielded:
    """A sink that raises nothing: what the other one raises first is reported, and that one left alone.

    But in a child of this process that the other one forks: that has no part in the run, and gets `WrongProcess`.
    """

    def __init__(self, sink: Sink, *, is_own: bool) -> None:
        self._sink = sink
        self._is_own = is_own
        self._is_dropped = False
        self._owner = os.getpid()

    def write(self, events: Sequence[Event]) -> None:
        self._check_owner()
        if not self._is_dropped:
            self._try(self._sink.write, events)

    def finish(self) -> None:
        """Flush it, and close it if it was opened here; in its own process alone."""
        if os.getpid() != self._owner:
            return
        if not self._is_dropped and (flush := getattr(self._sink, "flush", None)) is not None:
            self._try(flush)
        if self._is_own and (close := getattr(self._sink, "close", None)) is not None:
            close()

    def _try(self, method: Callable[..., object], *arguments: object) -> None:
        try:
            method(*arguments)
        except Exception as error:
            self._check_owner()
            self._is_dropped = True
            report(
                f"the audit sink {self._sink!r} raised {type(error).__name__}: {error}. "
                "It gets nothing more of this run, which goes on."
            )
        self._check_owner()

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise WrongProcess.here(self._owner)


@contextmanager
def open_sinks(audit: Audit) -> Iterator[Sequence[Sink]]:
    """Have those who are to listen ready, and flushed behind a run; files that were opened for it are closed.

    Args:
        audit: who is to listen.

    Raises:
        ValueError: something that cannot listen, or a file that cannot be written.
    """
    sinks: list[_Shielded] = []
    try:
        for listener in _listed(audit):
            sink = _sink(listener)
            sinks.append(_Shielded(sink, is_own=sink is not listener))
        yield sinks
    finally:
        for shielded in sinks:
            shielded.finish()


def _listed(audit: Audit) -> Sequence[Listener]:
    if audit is None:
        return ()
    return audit if isinstance(audit, (list, tuple)) else (audit,)


def _sink(listener: Listener) -> Sink:
    if isinstance(listener, (str, os.PathLike)):
        return JsonLines(check_path("audit", listener))
    if isinstance(listener, logging.Logger):
        return Logging(listener)
    if isinstance(listener, io.IOBase):
        raise ValueError(f"audit={listener!r} is an open file. Give its path.")
    if hasattr(listener, "write"):
        return listener
    if callable(listener):
        return Calls(listener)
    raise ValueError(
        f"audit={listener!r} cannot listen. Give a path, a logger, a function of an event, an object with a method "
        "write(events), or a list of these."
    )


def _level(event: Event) -> int:
    if isinstance(event, WorkflowCompleted):
        return logging.ERROR if event.failed else logging.INFO
    return _LEVELS.get(type(event), logging.INFO)


def _text(event: Event) -> str:
    names = [name for name in names_of(type(event)) if name not in _IN_EVERY_RECORD]
    return " ".join([type(event).__name__, *(f"{name}={getattr(event, name)!r}" for name in names)])


def report(text: str, category: type[Warning] = RuntimeWarning, logger: str = "forgepar.audit") -> None:
    """Warn of what does not end a run; where warnings are errors, or cannot be shown, it is logged."""
    try:
        warnings.warn(text, category, stacklevel=3)
    except Exception:
        with suppress(Exception):  # standard error is closed: nobody is to be told
            logging.getLogger(logger).error(text)
