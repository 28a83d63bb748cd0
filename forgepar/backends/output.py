"""What tasks print, log and warn of: how it gets from a worker to the parent.

    print, logging, warnings ──> Voice ──frames──> pipe ──> Ear ──> Said, Said, ...
    C code, child processes  ──> descriptors 1, 2 ──> pipes ──> Ear ──> Said, Said, ...

A frame names the task that wrote it. It is one write of at most PIPE_BUF bytes, which the kernel keeps whole, so that
threads and forked children may write at any time without a lock. What reaches descriptors 1 and 2 by itself names none.
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, NoReturn

from forgepar.pickling import dumps_by_value
from forgepar.values.namespaces import travels_by_value

STDOUT, STDERR, LOG, WARNING, PROGRESS = 1, 2, 3, 4, 5
STREAMS = {STDOUT: "stdout", STDERR: "stderr"}
UNKNOWN_TASK = -1  # of what no frame tells
PIPES = ("told", "out", "err")  # of each slot, in the arena's folder: frames, and what goes to descriptors 1 and 2

_FRAME = struct.Struct("=BBiqH")  # kind, whether more follows, task, writer, bytes that follow
_PIPE_BUF = 4096 if sys.platform == "linux" else 512  # what POSIX grants everywhere
_PIECE = _PIPE_BUF - _FRAME.size
_READ = 1 << 16  # bytes: what a pipe holds
_LONGEST_LINE = 1 << 20  # bytes; a line that is longer is handed on in parts


class Said(NamedTuple):
    """Something that a task told.

    Attributes:
        kind: STDOUT or STDERR (whole lines), LOG, WARNING or PROGRESS (pickled).
        task: the task's number, `UNKNOWN_TASK` where that is not known.
        payload: what.
    """

    kind: int
    task: int
    payload: bytes


class Rules(NamedTuple):
    """How a worker is to log and warn: as the parent does.

    Attributes:
        levels: the level of each logger that has one of its own, by name ("" is the root), and "-" what is disabled.
        filters: those of `warnings`, pickled.
        disabled: names of loggers that are disabled.

    Handlers do not count here: the parent hands records to its own, whose levels at that moment decide what is shown.
    """

    levels: dict[str, int]
    filters: bytes
    disabled: frozenset[str] = frozenset()


UNRULED = Rules({"-": -1}, b"")  # since these all of any other rules is new


# The worker's end


class Voice:
    """Writes frames.

    Args:
        descriptor: the pipe.
        task: tells the number of the task that runs.
    """

    def __init__(self, descriptor: int, task: Callable[[], int]) -> None:
        self._descriptor = descriptor
        self.task = task

    def say(self, kind: int, payload: bytes, task: int | None = None) -> None:
        """Tell the parent something, for the task that runs or another one."""
        task = self.task() if task is None else task
        writer = (os.getpid() << 40) ^ (threading.get_ident() & 0xFFFFFFFFFF)
        for at in range(0, len(payload), _PIECE):
            piece = payload[at : at + _PIECE]
            header = _FRAME.pack(kind, at + _PIECE < len(payload), task, writer & 0x7FFFFFFFFFFFFFFF, len(piece))
            os.write(self._descriptor, header + piece)


class _Raw(io.RawIOBase):
    def __init__(self, voice: Voice, kind: int) -> None:
        self._voice = voice
        self._kind = kind
        self.name = f"<{STREAMS[kind]}>"
        self.task = UNKNOWN_TASK
        self.is_amid_line = False

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._kind

    def write(self, data: Any) -> int:
        text = bytes(data)
        self._voice.say(self._kind, text, self.task)
        self.is_amid_line = not text.endswith(b"\n")
        return len(text)


class _Stream(io.TextIOWrapper):
    """`sys.stdout` or `sys.stderr` of a worker: as any, but what one task left unfinished is not another's."""

    def __init__(self, voice: Voice, kind: int) -> None:
        self._raw = _Raw(voice, kind)
        # No buffer between: a child forked while another thread holds its lock would wait for that for ever.
        super().__init__(self._raw, "utf-8", "backslashreplace", line_buffering=True)
        self._task_of = voice.task

    def write(self, text: str) -> int:
        task = self._task_of()
        if task != self._raw.task:
            self.end_line()
            self._raw.task = task
        return super().write(text)

    def close(self) -> None:
        """Send what was written so far. A worker's streams stay open: the tasks that come later have them, too."""
        self.flush()

    def detach(self) -> NoReturn:
        """Refuse to part with what it writes to, for the same reason."""
        raise io.UnsupportedOperation("the standard streams of a worker cannot be detached")

    def end_line(self) -> None:
        """Send what was written so far; if that ends amid a line, so does the line."""
        self.flush()
        if self._raw.is_amid_line:
            self._raw.write(b"\n")


class _Handler(logging.Handler):
    def __init__(self, voice: Voice) -> None:
        super().__init__()
        self._voice = voice

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._voice.say(LOG, pickled_record(record))
        except Exception:
            self.handleError(record)


class Capture:
    """Sends what this process prints, logs and warns of by a voice.

    Args:
        voice: says it.
    """

    def __init__(self, voice: Voice) -> None:
        self._voice = voice
        self._streams: tuple[_Stream, ...] = ()
        self._descriptors: list[tuple[int, int]] = []
        self._flush_c: Callable[[None], object] | None = None

    def begin(self) -> None:
        """Put streams, a logging handler and a hook for warnings in place."""
        self._streams = sys.stdout, sys.stderr = _Stream(self._voice, STDOUT), _Stream(self._voice, STDERR)
        self._descriptors = [(kind, os.dup(kind)) for kind in STREAMS]
        for logger in logging.Logger.manager.loggerDict.values():  # under fork the parent's are here
            if isinstance(logger, logging.Logger):
                logger.handlers.clear()
                logger.propagate = True
        logging.getLogger().handlers[:] = [_Handler(self._voice)]
        warnings.showwarning = self._show_warning

    def flush(self) -> None:
        """Send what was printed so far, as whole lines."""
        for stream in self._streams:
            stream.end_line()
        for name, own in zip(("stdout", "stderr"), self._streams, strict=True):
            if getattr(getattr(sys, name), "closed", False):  # a task put a stream in its place, and closed that
                setattr(sys, name, own)
        for descriptor, copy in self._descriptors:
            try:
                os.fstat(descriptor)
            except OSError:  # a task closed it: what is opened next would get what programs print
                os.dup2(copy, descriptor)
        if self._flush_c is None and "ctypes" in sys.modules:  # as with numpy; to load it for this would take 5 ms
            self._flush_c = sys.modules["ctypes"].pythonapi.fflush
        if self._flush_c is not None:
            self._flush_c(None)

    def follow(self, rules: Rules, since: Rules) -> None:
        """Log and warn as the parent does; see `follow_rules`."""
        follow_rules(rules, since)

    def _show_warning(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: Any = None,  # noqa: ARG002
        line: str | None = None,  # noqa: ARG002
    ) -> None:
        self._voice.say(WARNING, pickled_warning(message, category, filename, lineno))


class Notes(Voice):
    """A voice that is heard once a batch is done.

    Args:
        task: tells the number of the task that runs.

    Attributes:
        said: what was told.
    """

    def __init__(self, task: Callable[[], int]) -> None:
        self.said = list[Said]()
        self.task = task

    def say(self, kind: int, payload: bytes, task: int | None = None) -> None:
        self.said.append(Said(kind, self.task() if task is None else task, payload))


@contextmanager
def overheard(rules: Rules, notes: Notes) -> Iterator[None]:
    """Write down what is printed, logged and warned of meanwhile, in a process that others use as well.

    What reaches descriptors 1 and 2 by itself goes where it went before.

    Args:
        rules: how to log and warn meanwhile.
        notes: where it goes.
    """
    root = logging.getLogger()
    capture, streams, handlers = Capture(notes), (sys.stdout, sys.stderr), root.handlers[:]
    before = {name: logging.getLogger(name).level for name in rules.levels if name != "-"}
    disabled = logging.Logger.manager.disable
    out, err = _Stream(notes, STDOUT), _Stream(notes, STDERR)
    try:
        with warnings.catch_warnings():
            sys.stdout, sys.stderr = out, err
            root.handlers[:] = [_Handler(notes)]
            capture.follow(rules, UNRULED)
            warnings.showwarning = capture._show_warning
            yield
    finally:
        for stream in (out, err):
            with suppress(ValueError):  # a task closed it
                stream.end_line()
        sys.stdout, sys.stderr = streams
        root.handlers[:] = handlers
        logging.disable(disabled)
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def pickled_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int) -> bytes:
    """Pickle a warning, as one of no class of its own if that cannot travel."""
    return _dumps((category, str(message), filename, lineno), (UserWarning, str(message), "", 0))


def pickled_record(record: logging.LogRecord) -> bytes:
    """Pickle a record with its message made up, and what it holds beside if that can travel."""
    fields = {**record.__dict__, "msg": record.getMessage(), "args": None, "exc_info": None}
    if record.exc_info and not record.exc_text:
        fields["exc_text"] = "".join(traceback.format_exception(*record.exc_info)).rstrip()
    plain = {name: value for name, value in fields.items() if isinstance(value, (str, int, float, type(None)))}
    return _dumps(fields, plain)


def _dumps(value: object, instead: object) -> bytes:
    try:
        data = pickle.dumps(value, protocol=5)
        if b"__main__" not in data:  # a class of the script: plain pickle would only name it
            return data
        return dumps_by_value(value)
    except Exception:
        return pickle.dumps(instead, protocol=5)


def follow_rules(rules: Rules, since: Rules) -> None:
    """Log and warn by other rules.

    Args:
        rules: these.
        since: what held before; what they share is not touched.
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
    global _last_filters  # there is one list of them
    warnings.resetwarnings()
    for action, message, category, module, lineno in pickle.loads(pickled):
        warnings.filterwarnings(action, message, category, module, lineno, append=True)
    _last_filters = warnings.filters[:], pickled


def rules_here() -> Rules:
    """Return how this process logs and warns."""
    manager = logging.Logger.manager
    loggers = [(name, logger) for name, logger in manager.loggerDict.items() if isinstance(logger, logging.Logger)]
    levels = {name: logger.level for name, logger in loggers if logger.level} | {"": logging.getLogger().level}
    if manager.disable:
        levels["-"] = manager.disable
    return Rules(levels, _pickled_filters(), frozenset([name for name, logger in loggers if logger.disabled]))


_last_filters: tuple[Sequence[Any], bytes] = ((), b"")  # they seldom change, and take long to pickle


def _pickled_filters() -> bytes:
    global _last_filters  # there is one list of them
    known, pickled = _last_filters
    if warnings.filters == known:
        return pickled
    given = warnings.filters[:]
    filters = [
        (action, _pattern(message), category, _pattern(module), lineno)
        for action, message, category, module, lineno in given
    ]
    # Not by a look for "__main__" in the pickle, as for records: a filter of the interpreter's own names that module,
    # and each worker would load cloudpickle for it, which takes 60 ms.
    by_value = any(travels_by_value(category.__module__) for _, _, category, _, _ in filters)
    try:
        pickled = dumps_by_value(filters) if by_value else pickle.dumps(filters, protocol=5)
    except Exception:
        pickled = pickle.dumps([], protocol=5)
    _last_filters = given, pickled
    return pickled


def _pattern(given: Any) -> str:
    """Return the pattern of a filter's part: it is compiled, None, or in the interpreter's own filters a plain name."""
    if given is None:
        return ""
    return given + r"\Z" if isinstance(given, str) else str(given.pattern)


# The parent's end


class Ear:
    """Makes whole lines, records and warnings of what comes out of a worker's three pipes."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._parts: dict[tuple[int, int, int], bytearray] = {}  # by kind, task and writer

    def hear(self, pipe: int, data: bytes) -> list[Said]:
        """Take in what one of `PIPES` brought; return what is whole by now."""
        if pipe:  # descriptor 1 or 2 itself
            return self._lines((pipe, UNKNOWN_TASK, 0), data)
        self._bytes += data
        said, at = list[Said](), 0
        while at + _FRAME.size <= len(self._bytes):
            kind, goes_on, task, writer, n_bytes = _FRAME.unpack_from(self._bytes, at)
            end = at + _FRAME.size + n_bytes
            if end > len(self._bytes):
                break
            piece = bytes(self._bytes[at + _FRAME.size : end])
            at = end
            key = (kind, task, writer)
            if kind in STREAMS:
                said += self._lines(key, piece)
            elif goes_on or key in self._parts:
                self._parts.setdefault(key, bytearray()).extend(piece)
                if not goes_on:
                    said.append(Said(kind, task, bytes(self._parts.pop(key))))
            else:
                said.append(Said(kind, task, piece))
        del self._bytes[:at]
        return said

    def rest(self) -> list[Said]:
        """Return the lines that have not ended and never will, with an end put to them."""
        rest = [
            Said(kind, task, bytes(part) + b"\n") for (kind, task, _), part in self._parts.items() if kind in STREAMS
        ]
        self._parts.clear()
        return rest

    def _lines(self, key: tuple[int, int, int], data: bytes) -> list[Said]:
        held = self._parts.pop(key, None)
        whole = (bytes(held) if held else b"") + data
        cut = whole.rfind(b"\n") + 1 if len(whole) < _LONGEST_LINE else len(whole)
        if cut < len(whole):
            self._parts[key] = bytearray(whole[cut:])
        return [Said(key[0], key[1], whole[:cut])] if cut else []


def read_pipe(descriptor: int) -> bytes | None:
    """Read what a pipe that does not block has: empty at its end, None where nothing is there."""
    try:
        return os.read(descriptor, _READ)
    except BlockingIOError:
        return None


def make_pipes(folder: str, slot: int) -> Sequence[int]:
    """Make the named pipes of a slot and open them to read; anew, as a child of its last worker may have the old ones.

    Returns:
        Their descriptors, as in `PIPES`.
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
    """Open the named pipes of a slot to write.

    Raises:
        OSError: the parent reads them no more; a blocking open would wait for it for ever.
    """
    found = []
    for name in PIPES:
        found.append(os.open(f"{folder}/{name}-{slot}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC))
        os.set_blocking(found[-1], True)
    return found
