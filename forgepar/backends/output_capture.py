"""How output, log records and warnings of tasks get from a worker to the parent.

    print, logging, warnings ──> FrameWriter ──frames──> pipe ──> FrameReader ──> OutputRecord, ...
    C code, child processes  ──> descriptors 1, 2 ──> pipes ──> FrameReader ──> OutputRecord, ...

A frame contains the number of the task that wrote it. Each frame is one write of at most PIPE_BUF bytes, which the
kernel does not split, so threads and forked children may write at any time without a lock. Output that reaches
descriptors 1 and 2 directly has no task number.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import struct
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, NoReturn

from forgepar.values.origins import travels_by_value
from forgepar.values.pickling import dumps_by_value

STDOUT, STDERR, LOG, WARNING, PROGRESS = 1, 2, 3, 4, 5
STREAMS = {STDOUT: "stdout", STDERR: "stderr"}
UNKNOWN_TASK = -1  # of output without a frame
PIPES = ("frames", "out", "err")  # of each slot, in the arena's folder: frames, descriptor 1, descriptor 2

_FRAME = struct.Struct("=BBiqH")  # kind, whether more frames follow, task, writer, length
_PIPE_BUF = 4096 if sys.platform == "linux" else 512  # POSIX guarantees 512
_PIECE = _PIPE_BUF - _FRAME.size
_READ = 1 << 16  # bytes: the capacity of a pipe
_LONGEST_LINE = 1 << 20  # bytes; a longer line is passed on in parts


class OutputRecord(NamedTuple):
    """One output of a task.

    Attributes:
        kind: STDOUT or STDERR (whole lines), LOG, WARNING or PROGRESS (pickled).
        task: the task's number, or `UNKNOWN_TASK`.
        payload: the output.
    """

    kind: int
    task: int
    payload: bytes


class LoggingRules(NamedTuple):
    """How a process logs and warns. Workers do it as their caller does.

    Attributes:
        levels: the level of each logger that has its own, by name ("" is the root), and of `logging.disable` as "-".
        filters: the pickled filters of `warnings`.
        disabled: names of disabled loggers.

    Handlers are not included: the parent passes records to its own handlers, and their levels decide what is shown.
    """

    levels: dict[str, int]
    filters: bytes
    disabled: frozenset[str] = frozenset()


NO_RULES = LoggingRules({"-": -1}, b"")  # differs from all others in everything


# The worker's end


class FrameWriter:
    """Writes frames to a pipe.

    Args:
        descriptor: the pipe.
        task: returns the number of the task that runs.
    """

    def __init__(self, descriptor: int, task: Callable[[], int]) -> None:
        self._descriptor = descriptor
        self.task = task

    def write(self, kind: int, payload: bytes, task: int | None = None) -> None:
        """Send an output of the task that runs, or of another one, to the parent."""
        task = self.task() if task is None else task
        writer = (os.getpid() << 40) ^ (threading.get_ident() & 0xFFFFFFFFFF)
        for at in range(0, len(payload), _PIECE):
            piece = payload[at : at + _PIECE]
            header = _FRAME.pack(kind, at + _PIECE < len(payload), task, writer & 0x7FFFFFFFFFFFFFFF, len(piece))
            os.write(self._descriptor, header + piece)


class _RawStream(io.RawIOBase):
    def __init__(self, writer: FrameWriter, kind: int) -> None:
        self._writer = writer
        self._kind = kind
        self.name = f"<{STREAMS[kind]}>"
        self.task = UNKNOWN_TASK
        self.has_open_line = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._kind

    def write(self, data: Any) -> int:
        text = bytes(data)
        self._writer.write(self._kind, text, self.task)
        self.has_open_line = not text.endswith(b"\n")
        return len(text)


class _Stream(io.TextIOWrapper):
    """`sys.stdout` or `sys.stderr` of a worker. A line that one task leaves unfinished ends before the next task's."""

    def __init__(self, writer: FrameWriter, kind: int) -> None:
        self._raw = _RawStream(writer, kind)
        # No buffer: a child that is forked while another thread uses one would wait for its lock forever.
        super().__init__(self._raw, "utf-8", "backslashreplace", line_buffering=True)
        self._task_of = writer.task

    def write(self, text: str) -> int:
        task = self._task_of()
        if task != self._raw.task:
            self.end_line()
            self._raw.task = task
        return super().write(text)

    def close(self) -> None:
        """Send what was written. The stream stays open, since later tasks use it too."""
        self.flush()

    def detach(self) -> NoReturn:
        """Raise `io.UnsupportedOperation`, since later tasks use the stream too."""
        raise io.UnsupportedOperation("the standard streams of a worker cannot be detached")

    def end_line(self) -> None:
        """Send what was written, with a line end if it has none."""
        self.flush()
        if self._raw.has_open_line:
            self._raw.write(b"\n")


class _Handler(logging.Handler):
    def __init__(self, writer: FrameWriter) -> None:
        super().__init__()
        self._writer = writer

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._writer.write(LOG, pickled_record(record))
        except Exception:
            self.handleError(record)


class Capture:
    """Sends output, log records and warnings of this process to a writer.

    Args:
        writer: the writer.
    """

    def __init__(self, writer: FrameWriter) -> None:
        self._writer = writer
        self._streams: tuple[_Stream, ...] = ()
        self._descriptors: list[tuple[int, int]] = []
        self._flush_c: Callable[[None], object] | None = None

    def begin(self) -> None:
        """Install streams, a logging handler and a hook for warnings."""
        self._streams = sys.stdout, sys.stderr = _Stream(self._writer, STDOUT), _Stream(self._writer, STDERR)
        self._descriptors = [(kind, os.dup(kind)) for kind in STREAMS]
        for logger in logging.Logger.manager.loggerDict.values():  # under fork, handlers of the parent are here
            if isinstance(logger, logging.Logger):
                logger.handlers.clear()
                logger.propagate = True
        logging.getLogger().handlers[:] = [_Handler(self._writer)]
        warnings.showwarning = self._show_warning

    def flush(self) -> None:
        """Send what was printed, as whole lines."""
        for stream in self._streams:
            stream.end_line()
        for name, own in zip(("stdout", "stderr"), self._streams, strict=True):
            if getattr(getattr(sys, name), "closed", False):  # a task replaced the stream and closed its own
                setattr(sys, name, own)
        for descriptor, copy in self._descriptors:
            try:
                os.fstat(descriptor)
            except OSError:  # a task closed it: the next file that is opened would receive output
                os.dup2(copy, descriptor)
        if self._flush_c is None and "ctypes" in sys.modules:  # numpy loads it; loading it here would take 5 ms
            self._flush_c = sys.modules["ctypes"].pythonapi.fflush
        if self._flush_c is not None:
            self._flush_c(None)

    def apply_rules(self, rules: LoggingRules, since: LoggingRules) -> None:
        """Log and warn as the parent does; see `output_capture.apply_rules`."""
        apply_rules(rules, since)

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,  # noqa: ARG002
        line: str | None = None,  # noqa: ARG002
    ) -> None:
        self._writer.write(WARNING, pickled_warning(message, category, filename, lineno))


def pickled_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int) -> bytes:
    """Pickle a warning; as a `UserWarning` if its class cannot be pickled."""
    return _dumps((category, str(message), filename, lineno), (UserWarning, str(message), "", 0))


def pickled_record(record: logging.LogRecord) -> bytes:
    """Pickle a record with its formatted message; of its other fields, only plain ones if not all can be pickled."""
    fields = {**record.__dict__, "msg": record.getMessage(), "args": None, "exc_info": None}
    if record.exc_info and not record.exc_text:
        fields["exc_text"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
    plain = {name: value for name, value in fields.items() if isinstance(value, (str, int, float, type(None)))}
    return _dumps(fields, plain)


def _dumps(value: object, fallback: object) -> bytes:
    try:
        data = pickle.dumps(value, protocol=5)
        if b"__main__" not in data:  # a class of the script, which plain pickle only names
            return data
        return dumps_by_value(value)
    except Exception:
        return pickle.dumps(fallback, protocol=5)


def apply_rules(rules: LoggingRules, since: LoggingRules) -> None:
    """Log and warn by other rules.

    Args:
        rules: the rules.
        since: the rules until now; what is equal in both is not changed.
    """
    for name in rules.levels.keys() | since.levels.keys():
        level = rules.levels.get(name, 0)
        if level == since.levels.get(name, 0):
            continue
        if name == "-":
            logging.disable(level)
        else:
            logging.getLogger(name).setLevel(level)
    for name in rules.disabled ^ since.disabled:
        logging.getLogger(name).disabled = name in rules.disabled
    if rules.filters != since.filters:
        _set_filters(rules.filters)


def _set_filters(pickled: bytes) -> None:
    global _last_filters
    warnings.resetwarnings()
    for action, message, category, module, lineno in pickle.loads(pickled):
        warnings.filterwarnings(action, message, category, module, lineno, append=True)
    _last_filters = warnings.filters[:], pickled


def rules_here() -> LoggingRules:
    """Return how this process logs and warns."""
    manager = logging.Logger.manager
    loggers = [(name, logger) for name, logger in manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    levels = {name: logger.level for name, logger in loggers if logger.level} | {"": logging.getLogger().level}
    if manager.disable:
        levels["-"] = manager.disable
    return LoggingRules(levels, _pickled_filters(), frozenset([name for name, logger in loggers if logger.disabled]))


_last_filters: tuple[Sequence[Any], bytes] = ((), b"")  # filters seldom change, and take long to pickle


def _pickled_filters() -> bytes:
    global _last_filters
    known, pickled = _last_filters
    if warnings.filters == known:
        return pickled
    given = warnings.filters[:]
    filters = [
        (action, _pattern(message), category, _pattern(module), lineno)
        for action, message, category, module, lineno in given
    ]
    # Do not look for "__main__" in the pickle, as for records: one of the interpreter's filters names that module, and
    # each worker would load cloudpickle for it, which takes 60 ms.
    by_value = any(travels_by_value(category.__module__) for _, _, category, _, _ in filters)
    try:
        pickled = dumps_by_value(filters) if by_value else pickle.dumps(filters, protocol=5)
    except Exception:
        pickled = pickle.dumps([], protocol=5)
    _last_filters = given, pickled
    return pickled


def _pattern(given: Any) -> str:
    """Return the pattern of a filter's field: it is compiled, None, or in the interpreter's filters a plain name."""
    if given is None:
        return ""
    return given + r"\Z" if isinstance(given, str) else str(given.pattern)


# The parent's end


class FrameReader:
    """Assembles whole lines, records and warnings from the bytes of a worker's three pipes."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._parts: dict[tuple[int, int, int], bytearray] = {}  # by kind, task and writer

    def feed(self, pipe: int, data: bytes) -> list[OutputRecord]:
        """Add bytes from one of `PIPES`; return what is complete."""
        if pipe:  # descriptor 1 or 2
            return self._lines((pipe, UNKNOWN_TASK, 0), data)
        self._bytes += data
        records, at = list[OutputRecord](), 0
        while at + _FRAME.size <= len(self._bytes):
            kind, has_more, task, writer, n_bytes = _FRAME.unpack_from(self._bytes, at)
            end = at + _FRAME.size + n_bytes
            if end > len(self._bytes):
                break
            piece = bytes(self._bytes[at + _FRAME.size : end])
            at = end
            key = (kind, task, writer)
            if kind in STREAMS:
                records += self._lines(key, piece)
            elif has_more or key in self._parts:
                self._parts.setdefault(key, bytearray()).extend(piece)
                if not has_more:
                    records.append(OutputRecord(kind, task, bytes(self._parts.pop(key))))
            else:
                records.append(OutputRecord(kind, task, piece))
        del self._bytes[:at]
        return records

    def rest(self) -> list[OutputRecord]:
        """Return unfinished lines, with a line end added."""
        rest = [
            OutputRecord(kind, task, bytes(part) + b"\n")
            for (kind, task, _), part in self._parts.items()
            if kind in STREAMS
        ]
        self._parts.clear()
        return rest

    def _lines(self, key: tuple[int, int, int], data: bytes) -> list[OutputRecord]:
        unfinished = self._parts.pop(key, None)
        whole = (bytes(unfinished) if unfinished else b"") + data
        cut = whole.rfind(b"\n") + 1 if len(whole) < _LONGEST_LINE else len(whole)
        if cut < len(whole):
            self._parts[key] = bytearray(whole[cut:])
        return [OutputRecord(key[0], key[1], whole[:cut])] if cut else []


def read_pipe(descriptor: int) -> bytes | None:
    """Read from a non-blocking pipe; return b"" at its end, None if it is empty."""
    try:
        return os.read(descriptor, _READ)
    except BlockingIOError:
        return None


def make_pipes(folder: str, slot: int) -> Sequence[int]:
    """Create the named pipes of a slot and open them for reading.

    They are new for each worker, because a child of the last one may still write to its pipes.

    Returns:
        Their descriptors, in the order of `PIPES`.
    """
    found: list[int] = []
    try:
        for name in PIPES:
            path = f"{folder}/{name}-{slot}"
            with suppress(FileNotFoundError):
                os.unlink(path)  # noqa: PTH108
            os.mkfifo(path, 0o600)
            found.append(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC))
    except BaseException:
        for descriptor in found:
            os.close(descriptor)
        raise
    return found


def open_pipes(folder: str, slot: int) -> Sequence[int]:
    """Open the named pipes of a slot for writing.

    Raises:
        OSError: the parent no longer reads them. The open does not block, since it would wait for a reader forever.
    """
    found = []
    for name in PIPES:
        found.append(os.open(f"{folder}/{name}-{slot}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        os.set_blocking(found[-1], True)
    return found
