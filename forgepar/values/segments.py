"""Names and sizes of segments.

    m n - 100000 - 4711 - 0        m: in memory, d: on disk;  n: new, r: reused;  size class (hexadecimal bytes);
                                   pid of the process that wrote it;  its counter

A segment is sent as a plain tuple, which pickles small: its name, then its parts. A part is a length in bytes, for data
that follows the part before it, or the (name, offset, length) of data in another segment.
"""

from __future__ import annotations

import mmap
from typing import Any, TypeAlias

Segment: TypeAlias = tuple[Any, ...]  # Any: mypy cannot tell a name from parts by its position
SegmentSlice: TypeAlias = tuple[str, int, int]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register that numpy uses
LEAST_KEPT = 1 << 20  # bytes; for less, new pages cost less than the search for an idle segment
_PICKLE = 64 << 10  # bytes; room for the pickle beside an array of a round size


def size_class(n_bytes: int) -> int:
    """Return the size that a segment of so many bytes is counted as: at most an eighth more, or a page.

    Large classes are slightly above round sizes, as most large values are an array of a round size plus its pickle.
    """
    if n_bytes < LEAST_KEPT:
        return _rounded_up(n_bytes, mmap.PAGESIZE)
    n_round = n_bytes - _PICKLE
    return _rounded_up(n_round, 1 << (n_round.bit_length() - 4)) + _PICKLE


def _rounded_up(size: int, step: int) -> int:
    return -(-size // step) * step


def name_of(kind: str, size: int, pid: int, count: int) -> str:
    """Return the name of a segment of this kind ("mn", "mr", "dn") and size class."""
    return f"{kind}-{size:x}-{pid}-{count}"


def maker_of(name: str) -> int:
    """Return the pid of the process that wrote a segment."""
    return int(name.split("-")[2])


def size_of(name: str) -> int:
    """Return the size class of a segment in bytes."""
    return int(name.split("-")[1], 16)


def is_spilled(name: str) -> bool:
    """Return whether a segment is on disk."""
    return name[0] == "d"


def is_reused(name: str) -> bool:
    """Return whether a segment held another value before."""
    return name[1] == "r"


def names_of(segment: Segment) -> list[str]:
    """Return the names of a segment and of the other segments that its parts refer to."""
    others = {part[0]: None for part in segment[1:] if type(part) is tuple}
    return [str(segment[0]), *others]


def segment_bytes(segment: Segment) -> int:
    """Return the payload of a segment in bytes."""
    return sum(part[2] if type(part) is tuple else int(part) for part in segment[1:])
