"""The console: shows what tasks print, log and warn in the process that runs the workflow, in whole lines.

Nothing that fails here ends a run: a stream that is full, closed, absent or cannot encode a character, a reader that
went away, a function, logging handler or warnings hook that raises.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from typing import Literal, TextIO, TypeAlias

from forgepar.backends.output_capture import LOG, PROGRESS, STDERR, STREAMS, UNKNOWN_TASK, WARNING, OutputRecord
from forgepar.errors import WrongProcess, report, text_of
from forgepar.system.escaping import escaped_line, escaped_output, write_text
from forgepar.version import public
from forgepar.workflow.catalog import TaskCatalog
from forgepar.workflow.context import inside

_MOST_ERRORS = 20  # lines of stderr kept per slot, for the error when its worker dies
_MOST_WARNINGS = 4096  # kept as already shown, before they may be shown again


@public
@dataclass(frozen=True, slots=True)
class OutputLine:
    """A line that a task printed.

    Attributes:
        task: the task's name; None if it is not known, as a child process wrote the line after its task ended.
        stream: "stdout" or "stderr".
        text: the line, without its end.
    """

    task: str | None
    stream: str
    text: str


class Escaping:
    """Writes lines to a terminal with their escape sequences as text, so that the terminal does not obey them.

    Args:
        has_tags: whether each line begins with its task's name.
    """

    def __init__(self, *, has_tags: bool) -> None:
        self.has_tags = has_tags

    def __call__(self, line: OutputLine) -> None:
        """Write a line to the standard stream of the same name."""
        tag = f"[{escaped_line(line.task)}] " if self.has_tags and line.task is not None else ""
        write_text(getattr(sys, line.stream), f"{tag}{escaped_output(line.text)}\n")


Show: TypeAlias = Literal["plain", "tagged"] | Callable[[OutputLine], object]


class Console:
    """Shows the output of the tasks of one run.

    Lines go to the present `sys.stdout` and `sys.stderr`, records to the logger of the same name, with the task's name
    as their attribute ``task``, and warnings to `warnings.showwarning`. If one of these raises, a warning says so,
    once, and later output is tried as before. A line that a function refuses is shown plainly.

    Args:
        catalog: the tasks.
        show: "plain", "tagged" (each line begins with its task's name), or a function of an `OutputLine`.
        contained: exceptions that are not raised to the caller; others, such as `KeyboardInterrupt`, are.

    Raises:
        WrongProcess: a function forked this process, which has no part in the run.
    """

    def __init__(self, catalog: TaskCatalog, show: Show = "plain", contained: type[BaseException] = Exception) -> None:
        self._catalog = catalog
        self._show = show
        self._contained = contained
        self._owner = os.getpid()
        self._complained: set[str] = set()
        self._errors: dict[int, deque[tuple[int, str]]] = {}
        self._warned: dict[bytes, int] = {}  # by warning, the slot that gave it first
        self.progress: dict[int, tuple[float, str]] = {}

    def grow(self, catalog: TaskCatalog) -> None:
        """Continue with more tasks."""
        self._catalog = catalog

    def hear(self, slot: int, said: Sequence[OutputRecord], at: int) -> None:
        """Show the output of a slot.

        Args:
            slot: the slot.
            said: the records.
            at: the task of records that name none; `UNKNOWN_TASK` if it is not known.
        """
        for kind, task, payload in said:
            task = at if task == UNKNOWN_TASK else task
            if kind in STREAMS:
                self._show_text(slot, kind, task, payload.decode(errors="backslashreplace"))
            elif kind == LOG:
                self._tried("logging", self._log, task, slot, payload)
            elif kind == WARNING:
                self._tried("warnings.showwarning", self._warn, slot, payload)
            elif kind == PROGRESS:
                self._tried("progress", self._note_progress, task, payload)

    def last_errors(self, slot: int, task: int) -> str:
        """Return the last lines that a task of a slot wrote to stderr."""
        return "\n".join(line for of, line in self._errors.get(slot, ()) if of == task)

    @contextmanager
    def replacing_streams(self) -> Iterator[None]:
        """Show what tasks print that run in this process as if they ran in another."""
        if self._show == "plain":
            yield
            return
        out, err = _Here(self, "stdout", sys.stdout), _Here(self, "stderr", sys.stderr)
        with redirect_stdout(out), redirect_stderr(err):
            yield
            out.finish()
            err.finish()

    def show(self, task: str | None, stream: str, text: str, to: TextIO | None = None) -> None:
        """Show whole lines of one task."""
        show = self._show
        if isinstance(show, Escaping):  # many lines at once
            text, show = escaped_output(text), "tagged" if show.has_tags else "plain"
        if callable(show):
            left = [
                line for line in text.splitlines() if not self._tried("show=", show, OutputLine(task, stream, line))
            ]
            text = "".join(f"{line}\n" for line in left)
        elif show == "tagged" and task is not None:
            tag = escaped_line(task)
            text = "".join(f"[{tag}] {line}" for line in text.splitlines(keepends=True))
        if text:
            self._tried(f"sys.{stream}", write_text, to or getattr(sys, stream), text)

    def flush(self, stream: str, to: TextIO) -> None:
        """Flush a stream."""
        self._tried(f"sys.{stream}", to.flush)

    def _tried(self, what: str, call: Callable[..., object], *arguments: object) -> bool:
        """Call a function; return whether it did not raise.

        Args:
            what: its name in the warning, if it raises.
            call: the function.
            *arguments: its arguments.
        """
        try:
            call(*arguments)
        except self._contained as error:
            self._check_owner()
            # A reader that went away, such as `head`, is not an error.
            if what not in self._complained and not (isinstance(error, BrokenPipeError) and what.startswith("sys.")):
                self._complained.add(what)
                report(
                    f"{what} raised {type(error).__name__} ({text_of(error)}), so that not all is shown of what tasks "
                    "print, log and warn of. The run continues.",
                    logger="forgepar.run",
                )
            return False
        self._check_owner()
        return True

    def _check_owner(self) -> None:
        if os.getpid() != self._owner:
            raise WrongProcess.here(self._owner)

    def _show_text(self, slot: int, kind: int, task: int, text: str) -> None:
        if kind == STDERR:
            last = self._errors.setdefault(slot, deque(maxlen=_MOST_ERRORS))
            last += [(task, line) for line in text.splitlines()[-_MOST_ERRORS:]]
        self.show(self._name(task), STREAMS[kind], text)

    def _log(self, task: int, slot: int, payload: bytes) -> None:
        record = logging.makeLogRecord({**pickle.loads(payload), "task": self._name(task), "worker": slot})
        record.levelname = logging.getLevelName(
            record.levelno
        )  # workers do not have the level names that the program added
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)

    def _warn(self, slot: int, payload: bytes) -> None:
        """Show a warning that passed the filters in its worker; once, not per worker.

        If one worker gives it again, the filters ask for all of them.
        """
        if len(self._warned) >= _MOST_WARNINGS:
            self._warned.clear()
        if self._warned.setdefault(payload, slot) == slot:
            category, text, filename, lineno = pickle.loads(payload)
            warnings.showwarning(text, category, filename, lineno)

    def _note_progress(self, task: int, payload: bytes) -> None:
        self.progress[task] = pickle.loads(payload)

    def _name(self, task: int) -> str | None:
        return None if task == UNKNOWN_TASK else self._catalog.name(task)


class _Here(io.TextIOBase):
    """A stream of this process: lines of tasks go to the console, all else to the original stream."""

    def __init__(self, console: Console, stream: str, original: TextIO | None) -> None:
        self._console = console
        self._stream = stream
        self._original = original
        self._task: str | None = None
        self._part = ""

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        if self._original is None:
            raise io.UnsupportedOperation(f"this program has no sys.{self._stream}")
        return self._original.fileno()

    def flush(self) -> None:
        if self._original is not None:
            self._console.flush(self._stream, self._original)

    def write(self, text: str) -> int:
        running = inside()
        if running is None:
            write_text(self._original, text)
            return len(text)
        if running.task != self._task:
            self.finish()
            self._task = running.task
        whole, end, self._part = (self._part + text).rpartition("\n")
        if end:
            self._console.show(self._task, self._stream, whole + end, self._original)
        return len(text)

    def finish(self) -> None:
        """Show a line that has no end yet."""
        if self._part:
            part, self._part = self._part, ""
            self._console.show(self._task, self._stream, part + "\n", self._original)
