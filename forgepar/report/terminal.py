"""Drawing on a terminal while others print there: at its lower end, or on the whole of it.

    frame ──> Footer.show ──> stream                     (erase the last frame, write this one)
    print, logging ──> Diverted ──> Footer ──> stream    (erase, write the text, write the frame again)
                                └─> FullScreen           (hold the text back until the screen is left)

A footer hides and switches nothing, so a process that is killed leaves a terminal that works. A full screen is on the
terminal's second page, which `close` leaves however the run ends.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import sys
import termios
import threading
import time
import tty
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Protocol, TextIO

from forgepar.forking import fork_safe

_FALLBACK = (80, 24)
_MOST_HELD = 1 << 20  # characters that are held back while a full screen is up


class Frame:
    """Lines as a terminal shows them.

    Args:
        text: the lines, each with its end, with colours.
        widths: how many columns each takes.
    """

    def __init__(self, text: str, widths: Sequence[int]) -> None:
        self.text = text
        self._widths = widths

    def n_rows(self, columns: int) -> int:
        """Return how many rows the lines take when the terminal has so many columns: it wraps what is too long."""
        return sum(max(1, -(-width // columns)) for width in self._widths)


def size_of(stream: TextIO) -> tuple[int, int]:
    """Return columns and lines of a terminal."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        columns, lines = 0, 0
    return columns or _FALLBACK[0], lines or _FALLBACK[1]


class Footer:
    """Keeps a frame at the lower end of a terminal, and has what is printed meanwhile go above it.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._frame: Frame | None = None
        self._is_shown = False
        self._is_amid_line = False  # somebody wrote a line that has no end yet, as a prompt is
        self._lock = fork_safe(threading.RLock())  # any thread may print
        self._diversion = Diversion(self)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal."""
        return size_of(self._stream)

    def open(self) -> None:
        """Have what is printed from now on go above."""
        self._diversion.open()

    def show(self, frame: Frame) -> None:
        """Show a frame in place of the last."""
        with self._lock:
            erasing = self._erasing()
            self._frame = frame
            if not self._is_amid_line:
                self._is_shown = True
                self._write(erasing + frame.text)

    def take(self, text: str, to: TextIO | None = None) -> None:
        """Write a text above the frame.

        Args:
            text: what.
            to: another stream to the same terminal.
        """
        with self._lock:
            self._write(self._erasing())
            (to or self._stream).write(text)
            (to or self._stream).flush()
            self._is_amid_line = not text.endswith("\n")
            if self._frame is not None and not self._is_amid_line:
                self._is_shown = True
                self._write(self._frame.text)

    def close(self, last: str = "") -> None:
        """Take the frame away, write a last text, and give the standard streams back."""
        with self._lock:
            self._diversion.close()
            text = self._erasing() + ("\n" if self._is_amid_line and last else "") + last
            self._frame = None
            self._is_amid_line = False
            self._write(text)

    def _erasing(self) -> str:
        if not self._is_shown or self._frame is None:
            return ""
        self._is_shown = False
        rows = self._frame.n_rows(self.size[0])
        return f"\x1b[{rows}A\r\x1b[J"

    def _write(self, text: str) -> None:
        if text:
            self._stream.write(text)
            self._stream.flush()


class FullScreen:
    """Shows frames on the whole of a terminal, and holds back what is printed meanwhile.

    Args:
        stream: the terminal.
        keys: where keys are read from, if that is a terminal.
    """

    def __init__(self, stream: TextIO, keys: TextIO | None) -> None:
        self._stream = stream
        self._keys = Keys(keys)
        self._held: deque[tuple[str, TextIO]] = deque()
        self._n_held = self._n_dropped = 0
        self._is_open = False
        self._lock = fork_safe(threading.RLock())
        self._diversion = Diversion(self)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal."""
        return size_of(self._stream)

    def open(self) -> None:
        """Go to the terminal's second page."""
        self._is_open = True
        self._write("\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J")
        self._diversion.open()
        self._keys.open()

    def key(self, seconds: float = 0.0) -> str:
        """Return what was typed, waiting for it for so long; empty for nothing."""
        return self._keys.read(seconds)

    def show(self, frame: Frame) -> None:
        """Show a frame in place of the last."""
        if self._is_open:
            lines = frame.text.removesuffix("\n").replace("\n", "\x1b[K\n")
            self._write(f"\x1b[H{lines}\x1b[K\x1b[J")

    def take(self, text: str, to: TextIO) -> None:
        """Hold a text back."""
        with self._lock:
            self._held.append((text, to))
            self._n_held += len(text)
            while self._n_held > _MOST_HELD and len(self._held) > 1:
                self._n_held -= len(self._held[0][0])
                self._n_dropped += len(self._held.popleft()[0])

    def last_lines(self, most: int) -> list[str]:
        """Return the last lines that were printed."""
        with self._lock:
            texts = list(itertools.islice(reversed(self._held), 4 * most))
        return "".join(text for text, _ in reversed(texts)).splitlines()[-most:] if most > 0 else []

    def close(self) -> None:
        """Go back to the first page, and print there what was held back."""
        if not self._is_open:
            return
        self._is_open = False
        self._keys.close()
        self._diversion.close()
        self._write("\x1b[?25h\x1b[?1049l")
        with self._lock:
            held, self._held = self._held, deque()
        if self._n_dropped:
            self._write(f"forgepar: {self._n_dropped:,} characters that were printed before these are not kept\n")
        for text, stream in held:
            stream.write(text)
            stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Keys:
    """Reads single keys of a terminal; those of signals, as Ctrl-C, go on to make signals.

    Args:
        stream: the terminal; None, or what is none, has no keys.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._before: Any = None
        self._descriptor = -1

    def open(self) -> None:
        """Get keys as they are typed, unseen."""
        if self._stream is None or not is_terminal(self._stream):
            return
        descriptor = self._stream.fileno()
        if _is_in_background(descriptor):  # which would be stopped for this
            return
        with suppress(termios.error):
            self._before = termios.tcgetattr(descriptor)
            tty.setcbreak(descriptor)
            self._descriptor = descriptor

    def read(self, seconds: float) -> str:
        """Return what was typed, waiting for it for so long."""
        if self._descriptor < 0:
            time.sleep(seconds)
            return ""
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        return os.read(self._descriptor, 64).decode(errors="replace") if readable else ""

    def close(self) -> None:
        """Have the terminal as it was."""
        if self._before is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
            self._before, self._descriptor = None, -1


class Taker(Protocol):
    """Takes what is printed."""

    def take(self, text: str, to: TextIO) -> None:
        """Take a text that was to go to a stream."""


class Diversion:
    """Has someone take what is printed to `sys.stdout` and `sys.stderr`, where these are terminals, and logged there.

    Args:
        taker: who.
    """

    def __init__(self, taker: Taker) -> None:
        self._taker = taker
        self._replaced: list[tuple[str, TextIO, Diverted]] = []
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def open(self) -> None:
        """Replace the streams, and those of logging handlers that had them."""
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if is_terminal(stream):
                diverted = Diverted(self._taker, stream)
                setattr(sys, name, diverted)
                self._replaced.append((name, stream, diverted))
        new = {id(stream): diverted for _, stream, diverted in self._replaced}
        for handler in _stream_handlers():
            if (found := new.get(id(handler.stream))) is not None:
                self._handlers.append((handler, handler.stream))
                handler.setStream(found)

    def close(self) -> None:
        """Put the streams back."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        for name, stream, diverted in self._replaced:
            if getattr(sys, name) is diverted:  # else somebody replaced it again, and puts back what he found
                setattr(sys, name, stream)
            diverted.free()
        self._replaced.clear()


class Diverted:
    """A standard stream whose texts someone else takes; in all else it is the stream itself.

    Args:
        taker: who takes them.
        stream: the stream.
    """

    def __init__(self, taker: Taker, stream: TextIO) -> None:
        self._taker: Taker | None = taker
        self._stream = stream

    def write(self, text: str) -> int:
        """Write a text."""
        if self._taker is None:
            self._stream.write(text)
        elif text:
            self._taker.take(text, self._stream)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write texts."""
        self.write("".join(lines))

    def free(self) -> None:
        """Be the stream from now on, for those who kept this."""
        self._taker = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_terminal(stream: Any) -> bool:
    """Tell whether a stream is a terminal that can move its cursor."""
    if stream is None or isinstance(stream, Diverted) or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _is_in_background(descriptor: int) -> bool:
    """Tell whether a terminal's keys are for another job of its shell."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:  # it is not the terminal that this process was started from
        return False


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
