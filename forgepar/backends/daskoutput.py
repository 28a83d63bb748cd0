"""What tasks on a Dask worker print, log and warn of: told by the thread that does, as others use the process too.

thread of a batch ──> streams, logging, warnings of the process ──> its `Speaker` ──> the caller
any other thread  ──> the same                                  ──> where it went before
"""

from __future__ import annotations

import io
import logging
import sys
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TextIO

from forgepar import contexts
from forgepar.backends.output import (
    LOG,
    STDERR,
    STDOUT,
    WARNING,
    Capture,
    Rules,
    Said,
    Voice,
    pickled_record,
    pickled_warning,
)
from forgepar.backends.worker import be_inside

# Threads of Dask's own in a worker process, beside those that run tasks.
_OF_DASK = ("MainThread", "IO loop", "Profile", "AsyncProcess")


class Speaker(Protocol):
    """Runs batches, one at a time.

    Attributes:
        voice: takes what its tasks say.
        lines: takes what they print, by stream.
        thread: which thread runs its batch.
        context: returns the context of the task that runs.
    """

    voice: Echo
    lines: Mapping[int, Lines]
    thread: int
    context: Callable[[], contexts.TaskContext | None]


class Echo(Voice):
    """Keeps what tasks say until the caller is told.

    Args:
        task: tells the number of the task that runs.
    """

    def __init__(self, task: Callable[[], int]) -> None:
        self.task = task
        self._said: list[Said] = []

    def say(self, kind: int, payload: bytes, task: int | None = None) -> None:
        self._said.append(Said(kind, self.task() if task is None else task, payload))

    def take(self) -> list[tuple[int, int, bytes]]:
        """Return what was said since the last time."""
        taken, self._said[: len(self._said)] = self._said[:], []
        return [(said.kind, said.task, said.payload) for said in taken]


class Lines:
    """What one speaker's tasks print on one stream, told line by line.

    Args:
        voice: is told.
        kind: STDOUT or STDERR.
    """

    def __init__(self, voice: Voice, kind: int) -> None:
        self._voice = voice
        self._kind = kind
        self._task = 0
        self._part = ""
        self._lock = threading.Lock()  # a task's threads print as well

    def write(self, text: str) -> None:
        with self._lock:
            if (task := self._voice.task()) != self._task:
                self._finish()
                self._task = task
            whole, end, self._part = (self._part + text).rpartition("\n")
            if end:
                self._voice.say(self._kind, (whole + end).encode(errors="backslashreplace"), self._task)

    def finish(self) -> None:
        """Put an end to a line that has none."""
        with self._lock:
            self._finish()

    def _finish(self) -> None:
        if self._part:
            part, self._part = self._part, ""
            self._voice.say(self._kind, (part + "\n").encode(errors="backslashreplace"), self._task)


class SpeakersCapture(Capture):
    """What a `Worker` knows of the capture of its output, which here is the whole process's.

    Args:
        speaker: whose.
    """

    def __init__(self, speaker: Speaker) -> None:
        self._speaker = speaker

    def flush(self) -> None:
        for lines in self._speaker.lines.values():
            lines.finish()

    def follow(self, rules: Rules, since: Rules) -> None:  # noqa: ARG002  (all of it is set each time)
        """Log as the caller does, below "forgepar.tasks"; other loggers and the filters of warnings are Dask's."""
        levels = [rules.levels.get(name, 0) for name in ("forgepar.tasks", "forgepar", "")]
        logging.getLogger("forgepar.tasks").setLevel(next(filter(None, levels), logging.NOTSET))


class Output:
    """What this process prints, logs and warns of: that of a thread that runs a batch goes to its speaker."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._speakers: dict[int, Speaker] = {}
        self._streams: list[_Stream] = []
        self._handler = _Handler()
        self._showwarning = warnings.showwarning

    def here(self) -> Speaker | None:
        """Return the speaker of this thread; one that a task started belongs to it where only one task runs."""
        speakers = self._speakers
        found = speakers.get(threading.get_ident())
        if found is None and len(speakers) == 1 and threading.current_thread().name not in _OF_DASK:
            return next(iter(speakers.values()), None)
        return found

    def begin(self, speaker: Speaker) -> None:
        with self._lock:
            if not self._speakers:
                self._install()
            self._speakers[speaker.thread] = speaker

    def end(self, speaker: Speaker) -> None:
        with self._lock:
            self._speakers.pop(speaker.thread, None)
            if not self._speakers:
                self._restore()

    def context(self) -> contexts.TaskContext | None:
        speaker = self.here()
        return speaker.context() if speaker is not None else None

    def _install(self) -> None:
        self._streams = [_Stream(STDOUT, sys.stdout), _Stream(STDERR, sys.stderr)]
        sys.stdout, sys.stderr = self._streams
        self._showwarning = warnings.showwarning
        warnings.showwarning = self._warn  # type: ignore[assignment]  # it passes on whatever it is given
        logging.getLogger().addHandler(self._handler)
        contexts.use(self.context)
        be_inside()

    def _restore(self) -> None:
        """Put back what nobody else has changed meanwhile."""
        for name, stream in zip(("stdout", "stderr"), self._streams, strict=True):
            if getattr(sys, name) is stream:
                setattr(sys, name, stream.original)
        if warnings.showwarning == self._warn:
            warnings.showwarning = self._showwarning
        logging.getLogger().removeHandler(self._handler)
        contexts.use(None)
        be_inside(is_inside=False)

    def _warn(self, message: Warning | str, category: type[Warning], filename: str, lineno: int, *more: Any) -> None:
        speaker = self.here()
        if speaker is None:
            self._showwarning(message, category, filename, lineno, *more)
            return
        speaker.voice.say(WARNING, pickled_warning(message, category, filename, lineno))


class _Stream(io.TextIOBase):
    def __init__(self, kind: int, original: TextIO) -> None:
        self._kind = kind
        self.original = original

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.original.fileno()

    def flush(self) -> None:
        self.original.flush()

    def write(self, text: str) -> int:
        speaker = output.here()
        if speaker is None:
            return self.original.write(text)
        speaker.lines[self._kind].write(text)
        return len(text)


class _Handler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        speaker = output.here()
        if speaker is None or record.name.startswith("distributed"):
            return
        try:
            speaker.voice.say(LOG, pickled_record(record))
        except Exception:
            self.handleError(record)


output = Output()
