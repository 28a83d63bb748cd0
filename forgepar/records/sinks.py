"""The sinks of ``run(audit=...)``: files, loggers and functions. A sink that raises is dropped; the run continues."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeAlias

from forgepar._validate import check_path, has, is_async, refusal, shown
from forgepar.errors import WrongProcess, report, text_of
from forgepar.records.audit_log import JsonLines, event_text
from forgepar.records.events import (
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

# What can receive events: the path of a file, a logger, a function of an event, or a sink.
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


class LoggerSink:
    """A sink that logs events: failures as errors, retries and the like as warnings, tasks as debug, others as info.

    Args:
        logger: the logger; each of its records has the event as its attribute ``event``.

    Example:
        >>> LoggerSink(logging.getLogger("runs")).write([])
    """

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger

    def write(self, events: Sequence[Event]) -> None:
        """Log the events."""
        for event in events:
            level = _level(event)
            if self._logger.isEnabledFor(level):
                self._logger.log(level, "%s", event_text(event), extra={"event": event})

    def __repr__(self) -> str:
        return repr(self._logger)


class FunctionSink:
    """A sink that calls a function with each event.

    Args:
        function: the function, with an event as its argument.
    """

    def __init__(self, function: Callable[[Event], object]) -> None:
        self._function = function

    def write(self, events: Sequence[Event]) -> None:
        """Call the function."""
        for event in events:
            self._function(event)

    def __repr__(self) -> str:
        return repr(self._function)


class _GuardedSink:
    """A sink that does not raise: when the sink that it wraps raises, it warns and does not call that sink again.

    In a child process that the wrapped sink forks it raises `WrongProcess`, as the run belongs to the parent.
    """

    def __init__(self, sink: Sink, *, is_own: bool) -> None:
        self._sink = sink
        self._is_own = is_own
        self._is_dropped = False
        self._owner = os.getpid()

    def write(self, events: Sequence[Event]) -> None:
        self._check_owner()
        if not self._is_dropped:
            self._try(lambda: self._sink.write(events))

    def finish(self) -> None:
        """Flush the sink, and close it if it was opened here; do nothing in a forked child."""
        if os.getpid() != self._owner:
            return
        if not self._is_dropped:
            self._try(self._flush)
        if self._is_own and (close := getattr(self._sink, "close", None)) is not None:
            close()

    def _flush(self) -> None:
        if (flush := getattr(self._sink, "flush", None)) is not None:
            flush()

    def _try(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception as error:
            self._check_owner()
            self._is_dropped = True
            report(
                f"The audit sink {shown(self._sink)} raised {type(error).__name__}: {text_of(error)}. "
                "It gets no more events of this run, which continues."
            )
        self._check_owner()

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise WrongProcess.here(self._owner)


@contextmanager
def open_sinks(audit: Audit) -> Iterator[Sequence[Sink]]:
    """Open the sinks of a run; at its end, flush them and close the files that were opened.

    Args:
        audit: the argument of `Workflow.run`.

    Raises:
        ValueError: ``audit`` has something that cannot receive events, or a file that cannot be written.
    """
    sinks: list[_GuardedSink] = []
    try:
        for listener in _listed(audit):
            sink = _sink(listener)
            sinks.append(_GuardedSink(sink, is_own=sink is not listener))
        yield sinks
    finally:
        for guarded in sinks:
            guarded.finish()


def _listed(audit: Audit) -> Sequence[Listener]:
    if audit is None:
        return ()
    return audit if isinstance(audit, (list, tuple)) else (audit,)


def _sink(listener: Listener) -> Sink:
    if isinstance(listener, (str, os.PathLike)):
        return JsonLines(check_path("audit", listener))
    if isinstance(listener, logging.Logger):
        return LoggerSink(listener)
    if isinstance(listener, io.IOBase):
        raise ValueError(f"audit must not be an open file, got {shown(listener)}. Give its path.")
    if has(listener, "write") and not isinstance(listener, type):
        return listener  # type: ignore[return-value]
    if callable(listener) and not is_async(listener):
        return FunctionSink(listener)
    raise refusal(
        "audit",
        "a path, a logger, a function of an event, an object with a method write(events), or a list of these",
        listener,
    )


def _level(event: Event) -> int:
    if isinstance(event, WorkflowCompleted):
        return logging.ERROR if event.failed else logging.INFO
    return _LEVELS.get(type(event), logging.INFO)
