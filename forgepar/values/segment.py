"""What a segment is called, and what that tells.

    m n - 100000 - 4711 - 0        m: in memory, d: on disk;  n: new, r: recycled;  size class (hexadecimal bytes);
                                   the process that wrote it;  its count

A segment travels as a plain tuple, which pickles small: its name, then the parts in it. A part is the length in bytes
of what lies behind the one before, or the (name, offset, length) of what lies in a segment of its own.
"""

from __future__ import annotations

import mmap
from typing import Any, TypeAlias

Segment: TypeAlias = tuple[Any, ...]  # Any: mypy cannot tell a name from parts by its position
Part: TypeAlias = tuple[str, int, int]

ALIGNMENT = 64  # bytes: a cache line, and the widest vector register numpy's kernels load
LEAST_KEPT = 1 << 20  # bytes: below, new pages cost less than the search for old ones
_PICKLE = 64 << 10  # bytes


def size_class(n_bytes: int) -> int:
    """Return the size that a segment for so many bytes counts with: at most an eighth more, or a page.

    Large classes lie a little above round sizes, as most large values are a round array and its pickle.
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
    """Tell the pid of the process that wrote a segment."""
    return int(name.split("-")[2])


def size_of(name: str) -> int:
    """Tell the size class of a segment, bytes, by its name."""
    return int(name.split("-")[1], 16)


def is_spilled(name: str) -> bool:
    """Tell by its name whether a segment is on disk."""
    return name[0] == "d"


def is_reused(name: str) -> bool:
    """Tell by its name whether a segment had a value before."""
    return name[1] == "r"


def names_of(segment: Segment) -> list[str]:
    """Return the names of all segments that parts of this one lie in, its own first."""
    others = {part[0]: None for part in segment[1:] if type(part) is tuple}
    return [str(segment[0]), *others]


def segment_bytes(segment: Segment) -> int:
    """Tell how many bytes of payload a segment has."""
    return sum(part[2] if type(part) is tuple else int(part) for part in segment[1:])
