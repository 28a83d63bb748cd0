"""Pickling by value, so that what is defined in a script reaches a process that has no such script.

byvalue.py says what becomes of functions and classes; values/namespaces.py, where they come to life.
"""

from __future__ import annotations

import copyreg
import functools
import io
import pickle
import types
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from pickle import READONLY_BUFFER, PickleBuffer
from typing import Any

from forgepar.values import worker_modules

_CUT = {"READONLY_BUFFER": 1, "FRAME": 9}  # bytes that each takes


def dumps_by_value(
    value: Any,
    keep_out: Callable[[PickleBuffer], object] | None = None,
    found: Found | None = None,
    pickler: Any = None,
) -> bytes:
    """Pickle a value with all functions and classes in it that could not be imported elsewhere.

    Args:
        value: any picklable object.
        keep_out: gets the buffers that are to travel beside the pickle; None: they are in it.
        found: takes in what was come across.
        pickler: a class that `pickler_with` made; None: one that pickles by value, and nothing else.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    with io.BytesIO() as file:
        made = (pickler or _pickler())(file, protocol=5, buffer_callback=keep_out)
        made.found = found
        made.dump(value)
        return file.getvalue()


def dumps_part(value: Any, scope: dict[str, Any], found: Found, *, leaves_out: bool = False) -> bytes:
    """Pickle what a module has under a name, with its functions by value even if others can import the module.

    Args:
        value: what it has.
        scope: its names.
        found: takes in what was come across.
        leaves_out: whether a class goes without what in it cannot be pickled; where it arrives, that stays as it is.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    with io.BytesIO() as file:
        pickler = _pickler()(file, protocol=5)
        pickler.found, pickler.scope, pickler.root, pickler.leaves_out = found, scope, value, leaves_out
        pickler.dump(value)
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


def pickler_with(reducers: Mapping[type, Callable[[Any], Any]]) -> Any:
    """Return a class that pickles by value, and instances of some types as these functions take them apart."""
    table = _Table({**_pickler().dispatch_table, **reducers})
    return type("_PicklerWith", (_pickler(),), {"dispatch_table": table})


class _Table(dict[type, Callable[[Any], Any]]):
    """Reducers by type, and those that were registered later; a look into a `ChainMap` takes 2 us for each object."""

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        return copyreg.dispatch_table[kind]


class Prepared:
    """A call to make in another process, pickled by value even where plain pickle does it.

    What is called is unpickled when it is called, so that something may be done there before its module is imported.

    Args:
        fn: what to call.
        args: with what.
        parts_of: returns what of the caller's modules is to be taken in before; see `values.worker_modules.take_part`.
    """

    def __init__(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        parts_of: Callable[[Found], list[bytes]] | None = None,
    ) -> None:
        self._call = (fn, args)
        self._parts_of = parts_of

    def __call__(self) -> object:
        fn, args = self._call
        return fn(*args)

    def for_fork(self) -> Callable[[], object]:
        """Return the call for a forked process, which gets its arguments as they are.

        The function is pickled all the same, so that it comes to life in the module that jobs of the worker will see.
        """
        fn, args = self._call
        found = Found()
        data = dumps_by_value(fn, found=found)
        parts = self._parts_of(found) if self._parts_of is not None else []
        return functools.partial(_call_forked, data, parts, args)

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import ForkingPickler  # it knows how what belongs to processes is handed over

        with io.BytesIO() as file:
            by_value = _pickler()
            table = ChainMap(by_value.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table)
            found = Found()
            pickler = type("_HandingOver", (by_value,), {"dispatch_table": table})(file, protocol=5)
            pickler.found = found
            pickler.dump(self._call)
            parts = self._parts_of(found) if self._parts_of is not None else []
            return Prepared, (_call_pickled, (file.getvalue(), parts))


def _call_pickled(data: bytes, parts: list[bytes]) -> object:
    for part in parts:
        worker_modules.take_part(part)
    fn, args = pickle.loads(data)
    return fn(*args)


def _call_forked(data: bytes, parts: list[bytes], args: tuple[Any, ...]) -> object:
    for part in parts:
        worker_modules.take_part(part)
    return pickle.loads(data)(*args)


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


class Found:
    """What a pickler came across that its user may have to send as well.

    Attributes:
        functions: functions that travelled by value.
        named: functions, classes and modules that travelled by name.
        keys: for each global name that was sent, by module and name: what tells whether the caller has changed it.
        left_out: what in a class stayed behind.
    """

    def __init__(self) -> None:
        self.left_out: list[Any] = []
        self.functions: list[types.FunctionType] = []
        self.named: list[Any] = []
        self.keys: dict[tuple[str, str], Any] = {}
        self._seen: set[int] = set()

    def add_named(self, values: Iterable[Any]) -> None:
        """Note functions and classes that travelled by name, each once."""
        for value in values:
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self.named.append(value)


@functools.cache
def _pickler() -> Any:
    import cloudpickle  # a worker that returns plain values need not load it

    from forgepar.byvalue import pickler_from

    return pickler_from(cloudpickle)


@functools.cache
def _referring_pickler() -> Any:
    return type("_Referring", (_pickler(),), {"persistent_id": lambda self, part: self.refer(part)})
