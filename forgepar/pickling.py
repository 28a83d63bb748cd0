"""Pickling by value, so that what is defined in a script reaches a process that has no such script.

cloudpickle does it, but for one thing: from 3.1.3 on it takes the name of its file from a function's code, and without
that no traceback, warning or crash dump of a worker shows the line that it is about. Here code keeps it.
"""

from __future__ import annotations

import functools
import io
import pickle
import types
from collections import ChainMap
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


def dumps_referring(value: Any, refer: Callable[[Any], object], most: int | None = None) -> bytes:
    """Pickle a value as `dumps_by_value` does, but for parts of it that are only referred to.

    Args:
        value: any picklable object.
        refer: called with each part; returns what an unpickler's ``persistent_load`` gets for it, or None to pickle it.
        most: bytes that the pickle may have; None: any number.

    Raises:
        Exception: whatever the value's own pickling raises, or ValueError for more than ``most`` bytes.
    """
    with io.BytesIO() if most is None else _Limited(most) as file:
        pickler = _referring_pickler()(file, protocol=5)
        pickler.refer = refer
        pickler.dump(value)
        return file.getvalue()


class _Limited(io.BytesIO):
    """A file that takes no more than so many bytes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self._most:
            raise ValueError(f"the pickle has more than {self._most} bytes")
        return super().write(data)


class Prepared:
    """A call to make in another process, pickled by value even where plain pickle does it.

    What is called is unpickled when it is called, so that something may be done there before its module is imported.

    Args:
        fn: what to call.
        args: with what.
    """

    def __init__(self, fn: Callable[..., object], args: tuple[Any, ...]) -> None:
        self._call = (fn, args)

    def __call__(self) -> object:
        fn, args = self._call
        return fn(*args)

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import ForkingPickler  # it knows how what belongs to processes is handed over

        with io.BytesIO() as file:
            by_value = _pickler()
            table = ChainMap(by_value.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table)
            type("_HandingOver", (by_value,), {"dispatch_table": table})(file, protocol=5).dump(self._call)
            return Prepared, (_call_pickled, (file.getvalue(),))


def _call_pickled(data: bytes) -> object:
    fn, args = pickle.loads(data)
    return fn(*args)


def loads_own(data: bytes | memoryview, buffers: Iterable[Any]) -> Any:
    """Unpickle a value into copies of its buffers, which can be written even if what was pickled could not.

    An array that is a view of memory which others read is pickled with a mark that makes it read-only again; a small
    one as bytes, which cannot be written.
    """
    data = bytes(data)
    data, own = _unmarked(data) if READONLY_BUFFER in data else data, map(bytearray, buffers)
    return (
        _OwnArrays(io.BytesIO(data), buffers=own).load() if b"_frombuffer" in data else pickle.loads(data, buffers=own)
    )


class _OwnArrays(pickle.Unpickler):
    """Makes numpy's arrays of memory that can be written."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return functools.partial(_writable, found) if name == "_frombuffer" and module.startswith("numpy.") else found


def _writable(make: Callable[..., Any], buffer: Any, *shape: Any) -> Any:
    return make(bytearray(buffer) if memoryview(buffer).readonly else buffer, *shape)


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
def _pickler() -> Any:
    import cloudpickle  # a worker that returns plain values need not load it

    take_apart = cloudpickle.Pickler.dispatch_table[types.CodeType]

    def reduce_code(code: types.CodeType) -> tuple[Any, ...]:
        _, arguments = take_apart(code)
        return _as_code, (code.co_filename, *arguments)

    table = cloudpickle.Pickler.dispatch_table.new_child({types.CodeType: reduce_code})
    return type("_Pickler", (cloudpickle.Pickler,), {"dispatch_table": table})


@functools.cache
def _referring_pickler() -> Any:
    return type("_Referring", (_pickler(),), {"persistent_id": lambda self, part: self.refer(part)})


def _as_code(filename: str, *arguments: Any) -> types.CodeType:
    return types.CodeType(*arguments).replace(co_filename=filename)
