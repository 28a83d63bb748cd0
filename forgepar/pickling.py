"""Pickling by value, so that what is defined in a script reaches a process that has no such script.

cloudpickle does it, but for one thing: from 3.1.3 on it takes the name of its file from a function's code, and without
that no traceback, warning or crash dump of a worker shows the line that it is about. Here code keeps it.
"""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections.abc import Callable, Iterable
from pickle import READONLY_BUFFER, PickleBuffer
from typing import Any

_CUT = {"READONLY_BUFFER": 1, "FRAME": 9}  # bytes that each takes


def dumps_by_value(value: Any, keep_out: Callable[[PickleBuffer], object] | None = None) -> bytes:
    """Pickle a value with all functions and classes in it that could not be imported elsewhere.

    Args:
        value: any picklable object.
        keep_out: gets the buffers that are to travel beside the pickle; None: they are in it.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    with io.BytesIO() as file:
        _pickler()(file, protocol=5, buffer_callback=keep_out).dump(value)
        return file.getvalue()


def loads_own(data: bytes | memoryview, buffers: Iterable[Any]) -> Any:
    """Unpickle a value into copies of its buffers, which can be written even if what was pickled could not.

    An array that is a view of memory which others read is pickled with a mark that makes it read-only again.
    """
    data = bytes(data)
    return pickle.loads(_unmarked(data) if READONLY_BUFFER in data else data, buffers=map(bytearray, buffers))


def _unmarked(data: bytes) -> bytes:
    """Return a pickle without the marks that make buffers read-only, and without frames, as it is shorter by them."""
    import pickletools

    kept, begin = list[bytes](), 0
    for opcode, _, at in pickletools.genops(data):
        if at is not None and opcode.name in _CUT:
            kept.append(data[begin:at])
            begin = at + _CUT[opcode.name]
    return b"".join([*kept, data[begin:]])


@functools.cache
def _pickler() -> Callable[..., Any]:
    import cloudpickle  # a worker that returns plain values need not load it

    take_apart = cloudpickle.Pickler.dispatch_table[types.CodeType]

    def reduce_code(code: types.CodeType) -> tuple[Any, ...]:
        _, arguments = take_apart(code)
        return _as_code, (code.co_filename, *arguments)

    table = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: reduce_code})
    made: Callable[..., Any] = type("_Pickler", (cloudpickle.Pickler,), {"dispatch_table": table})
    return made


def _as_code(filename: str, *arguments: Any) -> types.CodeType:
    return types.CodeType(*arguments).replace(co_filename=filename)
