"""Drawing on a terminal that others print to: a footer below their output, or a full screen.

    frame ──> Footer.show ──> stream                     (erase the last frame, write this one)
    print, logging ──> Diverted ──> Footer ──> stream    (erase the frame, write the text, write the frame again)
                                └─> FullScreen           (keep the text until the screen closes)

A footer changes no mode of the terminal, so a killed process leaves a working one. A full screen uses the alternate
screen, which `close` leaves however the run ends.

`rich.live.Live` does not replace the footer: it hides the cursor, erases too few rows after the terminal got narrower,
prints what goes to a redirected stream on its own terminal, and delays text until its line ends.
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

from forgepar.system.forking import fork_safe

_FALLBACK = (80, 24)
_MOST_HELD = 1 << 20  # characters that a full screen keeps of what is printed meanwhile


class Frame:
    """Lines to draw on a terminal.

    Args:
        text: the lines with their line ends and colours.
        widths: the width of each line, columns.
    """

    def __init__(self, text: str, widths: Sequence[int]) -> None:
        self.text = text
        self._widths = widths

    def n_rows(self, columns: int) -> int:
        """Return how many rows the lines take on a terminal of this width, which wraps long ones."""
        return sum(max(1, -(-width // columns)) for width in self._widths)


def size_of(stream: TextIO) -> tuple[int, int]:
    """Return the columns and lines of a terminal; 80 and 24 if they are not known."""
    try:
        columns, lines = os.get_terminal_size(stream.fileno())
    except (OSError, ValueError, AttributeError):
        columns, lines = 0, 0
    return columns or _FALLBACK[0], lines or _FALLBACK[1]


class Footer:
    """A frame below the output of a terminal; what is printed meanwhile goes above it.

    Args:
        stream: the terminal.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._frame: Frame | None = None
        self._is_shown = False
        self._is_amid_line = False  # the last text did not end its line, as a prompt
        self._lock = fork_safe(threading.RLock())  # any thread may print
        self._diversion = Diversion(self)

    @property
    def size(self) -> tuple[int, int]:
        """Columns and lines of the terminal."""
        return size_of(self._stream)

    def open(self) -> None:
        """Start to write what is printed above the frame."""
        self._diversion.open()

    def show(self, frame: Frame) -> None:
        """Replace the frame. In the middle of a line, wait for its end."""
        with self._lock:
            erasing = self._erasing()
            self._frame = frame
            if not self._is_amid_line:
                self._is_shown = True
                self._write(erasing + frame.text)

    def take(self, text: str, to: TextIO | None = None) -> None:
        """Write a text above the frame.

        Args:
            text: the text.
            to: the stream, if it is another one to the same terminal.
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
        """Erase the frame, write a last text, and restore the standard streams."""
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
    """Frames on a full screen; what is printed meanwhile is kept until it closes.

    Args:
        stream: the terminal.
        keys: the stream to read keys from; ignored unless it is a terminal.
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
        """Switch to the alternate screen."""
        self._is_open = True
        self._write("\x1b[?1049h\x1b[?25l\x1b[H\x1b[2J")
        self._diversion.open()
        self._keys.open()

    def key(self, seconds: float = 0.0) -> str:
        """Wait for keys for at most this time; return them, or an empty text."""
        return self._keys.read(seconds)

    def show(self, frame: Frame) -> None:
        """Replace the frame."""
        if self._is_open:
            lines = frame.text.removesuffix("\n").replace("\n", "\x1b[K\n")
            self._write(f"\x1b[H{lines}\x1b[K\x1b[J")

    def take(self, text: str, to: TextIO) -> None:
        """Keep a text for later."""
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
        """Leave the alternate screen, and print what was kept."""
        if not self._is_open:
            return
        self._is_open = False
        self._keys.close()
        self._diversion.close()
        self._write("\x1b[?25h\x1b[?1049l")
        with self._lock:
            held, self._held = self._held, deque()
        if self._n_dropped:
            self._write(f"forgepar: dropped the first {self._n_dropped:,} characters of the output\n")
        for text, stream in held:
            stream.write(text)
            stream.flush()

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


class Keys:
    """A reader of single keys. Keys of signals, such as Ctrl-C, still send their signals.

    Args:
        stream: the terminal; None or another kind of stream has no keys.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self._before: Any = None
        self._descriptor = -1

    def open(self) -> None:
        """Turn off line buffering and echo."""
        if self._stream is None or not is_terminal(self._stream):
            return
        descriptor = self._stream.fileno()
        if _is_in_background(descriptor):  # changing the mode would stop the process
            return
        with suppress(termios.error):
            self._before = termios.tcgetattr(descriptor)
            tty.setcbreak(descriptor)
            self._descriptor = descriptor

    def read(self, seconds: float) -> str:
        """Wait for keys for at most this time; return them, or an empty text."""
        if self._descriptor < 0:
            time.sleep(seconds)
            return ""
        readable, _, _ = select.select([self._descriptor], [], [], seconds)
        return os.read(self._descriptor, 64).decode(errors="replace") if readable else ""

    def close(self) -> None:
        """Restore the mode of the terminal."""
        if self._before is not None:
            termios.tcsetattr(self._descriptor, termios.TCSADRAIN, self._before)
            self._before, self._descriptor = None, -1


class Taker(Protocol):
    """A receiver of printed text."""

    def take(self, text: str, to: TextIO) -> None:
        """Take a text that was written to a stream."""


class Diversion:
    """Sends to a taker what is printed to `sys.stdout` and `sys.stderr`, and logged there, if these are terminals.

    Args:
        taker: receives the texts.
    """

    def __init__(self, taker: Taker) -> None:
        self._taker = taker
        self._replaced: list[tuple[str, TextIO, Diverted]] = []
        self._handlers: list[tuple[logging.StreamHandler[Any], Any]] = []

    def open(self) -> None:
        """Replace the streams, also in logging handlers that use them."""
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
        """Restore the streams."""
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers.clear()
        for name, stream, diverted in self._replaced:
            if getattr(sys, name) is diverted:  # else other code replaced it, and will restore it
                setattr(sys, name, stream)
            diverted.free()
        self._replaced.clear()


class Diverted:
    """A standard stream that sends its texts to a taker; everything else is the stream's own.

    Args:
        taker: receives the texts.
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
        """Write to the stream from now on, for code that kept this object."""
        self._taker = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal that can move its cursor."""
    if stream is None or isinstance(stream, Diverted) or os.environ.get("TERM", "") in ("dumb", "unknown"):
        return False
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def _is_in_background(descriptor: int) -> bool:
    """Return whether the foreground job of a terminal is another process group."""
    try:
        return os.tcgetpgrp(descriptor) != os.getpgrp()
    except OSError:  # not the controlling terminal of this process
        return False


def _stream_handlers() -> Iterator[logging.StreamHandler[Any]]:
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in loggers:
        for handler in getattr(logger, "handlers", ()):
            if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
                yield handler
