"""Values in the form in which messages carry them.

    scalar   None, bool, int, float, short str and bytes    itself
    blob     anything else up to 32 KiB pickled             (pickle,)
    shared   anything larger                                (segment name, each part, ...): see arena.py

No scalar is a tuple, so a tuple in a message is always a blob or shared. Tuples, not classes: a message holds thousands
of values, and pickling an instance takes 1 us, a tuple 0.1 us.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from forgepar.values.arena import Arena
from forgepar.values.pickling import Dependencies, dumps_by_value, loads_own
from forgepar.values.segments import SegmentSlice, segment_bytes

# One value in a message. Any: mypy cannot tell a scalar from a tuple by its position.
Wire: TypeAlias = Any

BLOB_LIMIT = Arena.blob_limit
SHORT = 1024  # maximum length of a str or bytes that is a scalar
FIXED = frozenset((type(None), bool, int, float))  # scalars whatever their value
ATOMIC = FIXED | {str, bytes}  # scalars as constants, of any length
_LEAVES = FIXED | {str, bytes, complex, bytearray, range}


def encode(
    value: Any,
    arena: Arena,
    where: Callable[[memoryview], SegmentSlice | None] | None = None,
    found: Dependencies | None = None,
) -> Wire:
    """Convert a value to the form in which messages carry it.

    Args:
        value: any picklable object.
        arena: where a large value is written.
        where: returns the (name, offset, length) of a buffer that lies in a segment already, else None. Default:
            `Arena.granted`.
        found: gets the functions and classes that the pickle refers to.

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
    """Convert a value back from what `encode` returned. Arrays of a shared value are read-only views of its segment.

    Arrays of datetime64 and timedelta64 are copies: numpy pickles them without buffers.
    """
    if type(wire) is not tuple:
        return wire
    if type(wire[0]) is bytes:
        return pickle.loads(wire[0])
    stream, *buffers = arena.read(wire)
    return pickle.loads(stream, buffers=buffers)


def decode_own(wire: Wire, arena: Arena) -> Any:
    """Convert a value back from what `encode` returned; its arrays are writable copies."""
    return loads_own(*parts_of(wire, arena)) if type(wire) is tuple else wire


def parts_of(wire: Wire, arena: Arena) -> tuple[Any, Sequence[Any]]:
    """Return the pickle and the buffers of a value that is not a scalar."""
    if type(wire[0]) is bytes:
        return wire[0], ()
    stream, *buffers = arena.read(wire)
    return stream, buffers


def dumps(value: Any, buffers: list[pickle.PickleBuffer] | None = None, found: Dependencies | None = None) -> bytes:
    """Pickle a value: with plain pickle if that is safe, else with cloudpickle, which takes ten times as long.

    Plain pickle is safe only without classes: it would pickle an instance of a class of the user's script as
    ``__main__.Name``, which no worker can find.
    """
    keep_out = None if buffers is None else buffers.append
    if is_plain(value):
        return pickle.dumps(value, protocol=5, buffer_callback=keep_out)
    return dumps_by_value(value, keep_out, found)


def is_plain(value: Any) -> bool:
    """Return whether a value consists of builtin types (two levels deep) or is a numpy array of numbers."""
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
    """Return whether a value is shared."""
    return type(wire) is tuple and type(wire[0]) is str


def wire_bytes(wire: Wire) -> int:
    """Return the payload of a blob or shared value in bytes, 0 for a scalar."""
    if type(wire) is not tuple:
        return 0
    return len(wire[0]) if type(wire[0]) is bytes else segment_bytes(wire)
