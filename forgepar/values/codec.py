"""A value to and from what travels.

    scalar   None, bool, int, float, short str and bytes    itself
    blob     anything else up to 32 KiB pickled             (pickle,)
    shared   anything larger                                (segment name, each part, ...): see arena.py

No scalar is a tuple, so a tuple in a message is always one of the other two. Tuples, not classes: a message holds
thousands of values, and pickling an instance takes 1 us where a tuple takes 0.1.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from forgepar.pickling import Found, dumps_by_value, loads_own
from forgepar.values.arena import Arena
from forgepar.values.segment import Part, Segment, segment_bytes

# What a message holds for one value. Any: mypy cannot tell a scalar from a tuple by its position.
Wire: TypeAlias = Any

BLOB_LIMIT = Arena.blob_limit
SHORT = 1024  # bytes or characters of a str or bytes that travels as itself
FIXED = frozenset((type(None), bool, int, float))  # scalars by type alone
ATOMIC = FIXED | {str, bytes}  # of any length: as constants they travel as themselves
_LEAVES = FIXED | {str, bytes, complex, bytearray, range}


def encode(
    value: Any, arena: Arena, where: Callable[[memoryview], Part | None] | None = None, found: Found | None = None
) -> Wire:
    """Turn a value into what travels.

    Args:
        value: any picklable object.
        arena: where a large one is put.
        where: tells of a buffer where it lies already, None if nowhere; None: `Arena.granted`.
        found: takes in the functions and classes that were come across.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    kind = type(value)
    if kind in FIXED or ((kind is str or kind is bytes) and len(value) <= SHORT):
        return value
    buffers: list[pickle.PickleBuffer] = []
    stream = dumps(value, buffers, found)
    if not buffers and len(stream) <= arena.blob_limit:
        return (stream,)
    raw = [buffer.raw() for buffer in buffers]
    if len(stream) + sum(map(len, raw)) <= arena.blob_limit:
        return (dumps(value),)
    find = where or arena.granted
    segment = arena.write([stream, *(find(part) or part for part in raw)])
    arena.give(segment)
    return segment


def decode(wire: Wire, arena: Arena) -> Any:
    """Turn back what `encode` made. Arrays of a shared value are read-only views of its segment.

    Those of datetime64 and timedelta64 are copies: numpy pickles them without buffers.
    """
    if type(wire) is not tuple:
        return wire
    if type(wire[0]) is bytes:
        return pickle.loads(wire[0])
    stream, *buffers = arena.read(wire)
    return pickle.loads(stream, buffers=buffers)


def decode_own(wire: Wire, arena: Arena) -> Any:
    """Turn back what `encode` made into a value whose arrays have memory of their own, which can be written."""
    return loads_own(*parts_of(wire, arena)) if type(wire) is tuple else wire


def parts_of(wire: Wire, arena: Arena) -> tuple[Any, Sequence[Any]]:
    """Return the pickle of a value that is no scalar, and its buffers."""
    if type(wire[0]) is bytes:
        return wire[0], ()
    stream, *buffers = arena.read(wire)
    return stream, buffers


def dumps(value: Any, buffers: list[pickle.PickleBuffer] | None = None, found: Found | None = None) -> bytes:
    """Pickle a value: with plain pickle if that is safe, else with cloudpickle, which is ten times as slow.

    Plain pickle is safe only where no class can be meant by its name: it would pickle an instance of a class of the
    user's script as ``__main__.Name``, which no worker can find.
    """
    keep_out = None if buffers is None else buffers.append
    if is_plain(value):
        return pickle.dumps(value, protocol=5, buffer_callback=keep_out)
    return dumps_by_value(value, keep_out, found)


def is_plain(value: Any) -> bool:
    """Tell whether a value is built from builtin types (two levels deep) or is a numpy array of numbers."""
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind in (list, tuple, set, frozenset):
        return _LEAVES.issuperset(map(type, value)) or all(map(_is_flat, value))
    if kind is dict:
        return all(map(_is_flat, value)) and all(map(_is_flat, value.values()))
    return kind.__module__ == "numpy" and kind.__name__ == "ndarray" and value.dtype.kind in "biufcSUmM"


def _is_flat(value: Any) -> bool:
    kind = type(value)
    if kind in _LEAVES:
        return True
    if kind in (list, tuple, set, frozenset):
        return _LEAVES.issuperset(map(type, value))
    return kind is dict and _LEAVES.issuperset(map(type, value)) and _LEAVES.issuperset(map(type, value.values()))


def is_segment(wire: Wire) -> bool:
    """Tell whether a value lies in a segment."""
    return type(wire) is tuple and type(wire[0]) is str


def wire_bytes(wire: Wire) -> int:
    """Tell the payload of a blob or shared value in bytes, 0 for a scalar."""
    if type(wire) is not tuple:
        return 0
    return len(wire[0]) if type(wire[0]) is bytes else segment_bytes(_as_segment(wire))


def _as_segment(wire: Wire) -> Segment:
    segment: Segment = wire
    return segment
