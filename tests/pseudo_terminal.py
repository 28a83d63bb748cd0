"""A terminal for tests: a pseudo-terminal whose other end is read by a thread and interpreted by pyte."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest
from conftest import wait_until

pyte = pytest.importorskip("pyte", reason="pyte, of the extra test, interprets what is drawn")


class PseudoTerminal:
    """What a person would see: `lines` are the last rows, `history` those above, and `raw` all that was written."""

    def __init__(self, columns: int, lines: int) -> None:
        self.own, self.other = pty.openpty()
        self.screen = pyte.HistoryScreen(columns, lines, history=10_000, ratio=0.5)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self.resize(columns, lines)
        self.stream = os.fdopen(os.dup(self.other), "w", encoding="utf-8")
        self._lock = threading.Lock()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def resize(self, columns: int, lines: int) -> None:
        """Give it another size, as dragging the corner of its window does."""
        fcntl.ioctl(self.other, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)

    def type(self, text: str) -> None:
        os.write(self.own, text.encode())

    @property
    def lines(self) -> list[str]:
        """The rows that are not empty."""
        with self._lock:
            return [line.rstrip() for line in self.screen.display if line.strip()]

    @property
    def text(self) -> str:
        """All rows, those that scrolled away as well."""
        with self._lock:
            above = [
                "".join(row[column].data for column in range(self.screen.columns)).rstrip()
                for row in self.screen.history.top
            ]
        return "\n".join([*above, *self.lines])

    def wait_for(self, text: str) -> None:
        try:
            wait_until(lambda: text in self.text, f"{text!r} on the terminal")
        except AssertionError as error:
            error.add_note(f"it shows\n{self.text}")
            raise

    def settle(self) -> None:
        """Wait until all is shown that was written."""
        mark = f"\x1b]2;{os.urandom(4).hex()}\x07"
        self.stream.write(mark)
        self.stream.flush()
        wait_until(lambda: self.screen.title == mark[4:-1], "the terminal to show all")

    def close(self) -> None:
        self.stream.close()
        with suppress(OSError):
            os.close(self.other)
        self._reader.join()
        os.close(self.own)

    def _read(self) -> None:
        # The end of what is written shows as an error.
        with suppress(OSError):
            while data := os.read(self.own, 65536):
                with self._lock:
                    self.raw += data
                    self._stream.feed(data)


@contextmanager
def pseudo_terminal(columns: int = 80, lines: int = 24) -> Iterator[PseudoTerminal]:
    terminal = PseudoTerminal(columns, lines)
    try:
        yield terminal
    finally:
        terminal.close()
