"""Output of tasks in a process that forgepar did not start: a worker of Dask, or of some executor.

    thread that runs a batch ──> sys.stdout, logging, warnings ──> OutputRouter ──> HostedOutput of its batch
    any other thread         ──> sys.stdout, logging, warnings ──> OutputRouter ──> where it went before

The routes are in place only while batches run. What C code and child processes write to descriptors 1 and 2 is not
captured.
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TextIO, TypeAlias

from forgepar.backends.output_capture import (
    LOG,
    NO_RULES,
    STDERR,
    STDOUT,
    STREAMS,
    WARNING,
    Capture,
    FrameWriter,
    LoggingRules,
    OutputRecord,
    apply_rules,
    pickled_record,
    pickled_warning,
)
from forgepar.backends.worker import be_inside, inside_worker
from forgepar.system.forking import fork_safe

# How a process logs while batches run:
#   "off"        as it does; nothing is captured. For the caller's own process.
#   "as_host"    with its own handlers, levels and warning filters
#   "as_caller"  with the handlers, levels and warning filters of the caller
CaptureMode: TypeAlias = Literal["off", "as_host", "as_caller"]

# Threads of a Dask worker that run no tasks; a task starts its own threads under other names.
_HOST_THREADS = ("MainThread", "IO loop", "Profile", "AsyncProcess")


class OutputBuffer(FrameWriter):
    """Records of task output, collected until `take` is called.

    Args:
        task: returns the number of the task that runs.
    """

    def __init__(self, task: Callable[[], int]) -> None:
        self.task = task
        self._records: list[OutputRecord] = []

    def write(self, kind: int, payload: bytes, task: int | None = None) -> None:
        self._records.append(OutputRecord(kind, self.task() if task is None else task, payload))

    def take(self) -> list[OutputRecord]:
        """Return the records since the last call."""
        taken, self._records[: len(self._records)] = self._records[:], []
        return taken


class LineBuffer:
    """Text that the tasks of one worker write to one stream, cut into whole lines.

    Args:
        records: receives the lines.
        kind: STDOUT or STDERR.
    """

    def __init__(self, records: OutputBuffer, kind: int) -> None:
        self._records = records
        self._kind = kind
        self._task = 0
        self._part = b""
        self._lock = fork_safe(threading.RLock())  # threads of one task write at the same time

    def write(self, data: bytes) -> None:
        """Append bytes, and record the lines that they complete."""
        with self._lock:
            if (task := self._records.task()) != self._task:
                self.finish()
                self._task = task
            lines, end, self._part = (self._part + data).rpartition(b"\n")
            if end:
                self._records.write(self._kind, lines + end, self._task)

    def finish(self) -> None:
        """Record an incomplete line, with an end of line added."""
        with self._lock:
            if self._part:
                part, self._part = self._part, b""
                self._records.write(self._kind, part + b"\n", self._task)


class HostedOutput(Capture):
    """Captured output of one hosted worker, which runs one batch at a time.

    Args:
        task: returns the number of the task that runs.

    Attributes:
        records: the output so far.
        lines: a buffer for each stream.
        thread: identifier of the thread that runs the batch.
    """

    def __init__(self, task: Callable[[], int]) -> None:
        self.records = OutputBuffer(task)
        self.lines = {kind: LineBuffer(self.records, kind) for kind in STREAMS}
        self.thread = 0

    def flush(self) -> None:
        for lines in self.lines.values():
            lines.finish()

    def apply_rules(self, rules: LoggingRules, since: LoggingRules) -> None:
        """Do nothing: `OutputRouter` applies the rules, as they hold for the whole process."""


class OutputRouter:
    """Routes the output of this process by thread: to the batch that the thread runs, or to where it went before."""

    def __init__(self) -> None:
        self._lock = fork_safe(threading.RLock())
        self._outputs: dict[int, HostedOutput] = {}  # by thread
        self._streams: Sequence[_RoutedStream] = ()
        self._handler = _RoutingHandler(self)
        self._show_warning = warnings.showwarning
        self._host_logging: _HostLogging | None = None
        self._was_inside = False

    @contextmanager
    def capturing(self, output: HostedOutput, rules: LoggingRules, *, as_caller: bool) -> Iterator[None]:
        """Capture what the thread of ``output``, and threads that its tasks start, write in the meantime.

        Args:
            output: receives the output.
            rules: how the caller logs and warns.
            as_caller: whether to apply all of them in this process; else only the level of task loggers is set.
        """
        with self._lock:
            if not self._outputs:
                self._install(rules, as_caller=as_caller)
            self._outputs[output.thread] = output
        if not as_caller:
            levels = [rules.levels.get(name, 0) for name in ("forgepar.tasks", "forgepar", "")]
            logging.getLogger("forgepar.tasks").setLevel(next(filter(None, levels), logging.NOTSET))
        try:
            yield
        finally:
            with self._lock:
                self._outputs.pop(output.thread, None)
                if not self._outputs:
                    self._restore()

    def here(self) -> HostedOutput | None:
        """Return the output of the batch that this thread belongs to.

        A thread that a task has started belongs to the only batch that runs; if several run, it belongs to none.
        """
        outputs = self._outputs
        found = outputs.get(threading.get_ident())
        if found is None and len(outputs) == 1 and threading.current_thread().name not in _HOST_THREADS:
            return next(iter(outputs.values()), None)
        return found

    def log(self, record: logging.LogRecord) -> None:
        """Capture a log record, or pass it to the host's handlers if it belongs to no batch."""
        output, host = self.here(), self._host_logging
        if output is not None and (host is not None or not record.name.startswith("distributed")):
            output.records.write(LOG, pickled_record(record))
        elif host is not None:
            host.handle(record)

    def _install(self, rules: LoggingRules, *, as_caller: bool) -> None:
        self._host_logging = _HostLogging(rules) if as_caller else None
        self._streams = _RoutedStream(self, STDOUT, sys.stdout), _RoutedStream(self, STDERR, sys.stderr)
        sys.stdout, sys.stderr = self._streams
        logging.getLogger().addHandler(self._handler)
        self._show_warning = warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]  # it forwards any arguments
        self._was_inside = inside_worker()
        be_inside()

    def _restore(self) -> None:
        """Remove the routes; on a host with its own logging, keep what others have replaced in the meantime."""
        for name, stream in zip(("stdout", "stderr"), self._streams, strict=True):
            if getattr(sys, name) is stream or self._host_logging is not None:
                setattr(sys, name, stream.original)
        if warnings.showwarning == self._warn:
            warnings.showwarning = self._show_warning
        logging.getLogger().removeHandler(self._handler)
        if self._host_logging is not None:
            self._host_logging.restore()
        be_inside(is_inside=self._was_inside)

    def _warn(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        output = self.here()
        if output is None:
            self._show_warning(message, category, filename, lineno, *more)
        else:
            output.records.write(WARNING, pickled_warning(message, category, filename, lineno))


class _HostLogging:
    """Log handlers, levels and warning filters of this process, while those of the caller replace them.

    Args:
        rules: how the caller logs and warns; applied at once.
    """

    def __init__(self, rules: LoggingRules) -> None:
        root = logging.getLogger()
        self._handlers = root.handlers[:]
        self._levels = {name: logging.getLogger(name).level for name in rules.levels if name != "-"}
        self._disabled = logging.Logger.manager.disable
        self._warnings = warnings.catch_warnings()
        self._warnings.__enter__()
        root.handlers.clear()
        apply_rules(rules, NO_RULES)

    def handle(self, record: logging.LogRecord) -> None:
        """Pass a record to the handlers of the host."""
        for handler in self._handlers:
            if record.levelno >= handler.level:
                handler.handle(record)

    def restore(self) -> None:
        self._warnings.__exit__(None, None, None)
        logging.getLogger().handlers[:] = self._handlers
        logging.disable(self._disabled)
        for name, level in self._levels.items():
            logging.getLogger(name).setLevel(level)


def _flush(stream: TextIO | None) -> None:
    """Flush a stream of the host, if it has one that is open; it may be closed before a routed one is collected."""
    if stream is not None and not getattr(stream, "closed", False):
        stream.flush()


class _RoutedBytes(io.BufferedIOBase):
    """``sys.stdout.buffer`` or ``sys.stderr.buffer`` while batches run."""

    def __init__(self, router: OutputRouter, kind: int, original: TextIO | None) -> None:
        self._router = router
        self._kind = kind
        self._original = original

    def writable(self) -> bool:
        return True

    def flush(self) -> None:
        _flush(self._original)

    def close(self) -> None:
        """Do nothing but flush: later tasks use the same stream."""
        self.flush()

    def write(self, data: Any) -> int:
        output = self._router.here()
        if output is None:
            return len(data) if self._original is None else self._original.buffer.write(data)
        written = bytes(data)
        output.lines[self._kind].write(written)
        return len(written)


class _RoutedStream(io.TextIOBase):
    """``sys.stdout`` or ``sys.stderr`` while batches run."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, router: OutputRouter, kind: int, original: TextIO | None) -> None:
        self._router = router
        self._kind = kind
        self.original = original
        self.buffer = _RoutedBytes(router, kind, original)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self.original is None:
            raise io.UnsupportedOperation(f"this program has no sys.{STREAMS[self._kind]}")
        return self.original.fileno()

    def flush(self) -> None:
        _flush(self.original)

    def close(self) -> None:
        """Do nothing but flush: later tasks use the same stream."""
        self.flush()

    def write(self, text: str) -> int:
        output = self._router.here()
        if output is None:
            return len(text) if self.original is None else self.original.write(text)
        output.lines[self._kind].write(text.encode("utf-8", "backslashreplace"))
        return len(text)


class _RoutingHandler(logging.Handler):
    def __init__(self, router: OutputRouter) -> None:
        super().__init__()
        self._router = router

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._router.log(record)
        except Exception:
            self.handleError(record)


router = OutputRouter()
