"""Sockets whose paths may be of any length: systems take some 100 bytes, and a temporary folder may have more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST = 100  # bytes that the path of a socket may have on every system
_OPEN_FILES = "/proc/self/fd"


@contextmanager
def short_address(address: str) -> Iterator[str]:
    """Give a path of at most `_LONGEST` bytes to the same file, by the number of its open folder.

    Where the system does not show open files as a folder, it is the path itself.
    """
    if len(os.fsencode(address)) <= _LONGEST or not os.path.isdir(_OPEN_FILES):  # noqa: PTH112
        yield address
        return
    folder, name = os.path.split(address)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield f"{_OPEN_FILES}/{number}/{name}"
    finally:
        os.close(number)


class ShortSocket(socket.socket):
    """A socket that is bound and connected by such paths."""

    def bind(self, address: Any, /) -> None:
        with short_address(address) as path:
            super().bind(path)

    def connect(self, address: Any, /) -> None:
        with short_address(address) as path:
            super().connect(path)
