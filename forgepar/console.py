"""What tasks print, log and warn of, shown by the process that runs the workflow, whole lines at a time.

Nothing that is to be shown ends a run: a stream that is full, closed or absent, one that lacks a character, a reader
that has gone, a function, a logging handler or a hook for warnings that raises.
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

from forgepar.backends.output import LOG, PROGRESS, STDERR, STREAMS, UNKNOWN_TASK, WARNING, Said
from forgepar.contexts import inside
from forgepar.errors import WrongProcess, text_of
from forgepar.escaping import escaped_line, escaped_output, write_text
from forgepar.plan import Plan
from forgepar.sinks import report

_MOST_ERRORS = 20  # lines of stderr that are remembered of each slot, for when its worker dies
_MOST_WARNINGS = 4096  # that are remembered as told, before they may be told again


@dataclass(frozen=True, slots=True)
class OutputLine:
    """A line that a task printed.

    Attributes:
        task: the task's name; None where that is not known: a child process that outlived its task wrote it.
        stream: "stdout" or "stderr".
        text: the line, without its end.
    """

    task: str | None
    stream: str
    text: str


class Escaping:
    """A way to show lines on a terminal that obeys nothing in them: escape sequences are shown as text.

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
    """Shows what tasks of one run tell.

    Lines go to `sys.stdout` and `sys.stderr` as they are at that moment, records to the logger of the same name, with
    the task's name as their attribute ``task``, and warnings to `warnings.showwarning`. Where one of these raises, a
    warning tells of it, once, and what comes next is tried as before; a line that a function does not take is shown
    plainly.

    Args:
        plan: the workflow.
        show: "plain", "tagged" (each line begins with its task's name), or what is called with each `OutputLine`.
        contained: what of this is kept from the caller; the rest, as `KeyboardInterrupt`, is raised.

    Raises:
        WrongProcess: what was called forked this process, which has no part in the run.
    """

    def __init__(self, plan: Plan, show: Show = "plain", contained: type[BaseException] = Exception) -> None:
        self._plan = plan
        self._show = show
        self._contained = contained
        self._owner = os.getpid()
        self._complained: set[str] = set()
        self._errors: dict[int, deque[tuple[int, str]]] = {}
        self._warned: dict[bytes, int] = {}  # by what was told, who told it first
        self.progress: dict[int, tuple[float, str]] = {}

    def grow(self, plan: Plan) -> None:
        """Go on with a plan that has more tasks."""
        self._plan = plan

    def hear(self, slot: int, said: Sequence[Said], at: int) -> None:
        """Show what a slot told.

        Args:
            slot: which.
            said: what.
            at: the task it is at, for what names none; `UNKNOWN_TASK` for none.
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
        """Return the last lines that a slot's task wrote to stderr."""
        return "\n".join(line for of, line in self._errors.get(slot, ()) if of == task)

    @contextmanager
    def replacing_streams(self) -> Iterator[None]:
        """Show what tasks that run in this process print as if they ran in another."""
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
        """Have a stream write what it holds."""
        self._tried(f"sys.{stream}", to.flush)

    def _tried(self, what: str, call: Callable[..., object], *arguments: object) -> bool:
        """Call what shows something; return whether it did.

        Args:
            what: names it to the user, should it raise.
            call: what to call.
            *arguments: what with.
        """
        try:
            call(*arguments)
        except self._contained as error:
            self._check_owner()
            # Who reads what the program writes, as `head` does, has read enough: that is no fault.
            if what not in self._complained and not (isinstance(error, BrokenPipeError) and what.startswith("sys.")):
                self._complained.add(what)
                report(
                    f"{what} raised {type(error).__name__} ({text_of(error)}), so that not all is shown of what tasks "
                    "print, log and warn of. The run goes on.",
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
        record.levelname = logging.getLevelName(record.levelno)  # workers do not know names that the program added
        logger = logging.getLogger(record.name)
        if logger.isEnabledFor(record.levelno):
            logger.handle(record)

    def _warn(self, slot: int, payload: bytes) -> None:
        """Show a warning, which the filters let through in its worker, once and not for each worker.

        If the same worker gives it again, the filters want all of them.
        """
        if len(self._warned) >= _MOST_WARNINGS:
            self._warned.clear()
        if self._warned.setdefault(payload, slot) == slot:
            category, text, filename, lineno = pickle.loads(payload)
            warnings.showwarning(text, category, filename, lineno)

    def _note_progress(self, task: int, payload: bytes) -> None:
        self.progress[task] = pickle.loads(payload)

    def _name(self, task: int) -> str | None:
        return None if task == UNKNOWN_TASK else self._plan.name(task)


class _Here(io.TextIOBase):
    """A stream of this process: what a task writes goes to the console line by line, all else where it went before."""

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
        """Put an end to a line that has none."""
        if self._part:
            part, self._part = self._part, ""
            self._console.show(self._task, self._stream, part + "\n", self._original)
