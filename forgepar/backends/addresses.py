"""Sockets with paths of any length: systems allow about 100 bytes, and a temporary folder may have more."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

_LONGEST = 100  # bytes: every system allows paths of this length
_OPEN_FILES = "/proc/self/fd"


@contextmanager
def short_address(address: str) -> Iterator[str]:
    """Return a path of at most `_LONGEST` bytes to the same file, through the descriptor of its open folder.

    If the system has no folder of open files, this is the path itself.
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
    """A socket that binds and connects with short paths."""

    def bind(self, address: Any, /) -> None:
        with short_address(address) as path:
            super().bind(path)

    def connect(self, address: Any, /) -> None:
        with short_address(address) as path:
            super().connect(path)
