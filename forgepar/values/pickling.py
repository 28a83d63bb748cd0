"""Pickling by value, so that functions and classes of a script reach a process that does not have the script.

by_value.py decides how functions and classes are pickled; namespaces.py makes them when they are unpickled.
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

_CUT = {"READONLY_BUFFER": 1, "FRAME": 9}  # length in bytes of the opcodes to remove


def dumps_by_value(
    value: Any,
    keep_out: Callable[[PickleBuffer], object] | None = None,
    found: Dependencies | None = None,
    pickler: Any = None,
) -> bytes:
    """Pickle a value with all functions and classes in it that other processes cannot import.

    Args:
        value: any picklable object.
        keep_out: gets the buffers that are sent beside the pickle; None to include them.
        found: gets the functions and classes that the pickle refers to.
        pickler: a class that `pickler_with` made; None for one without further reducers.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    with io.BytesIO() as file:
        made = (pickler or _pickler())(file, protocol=5, buffer_callback=keep_out)
        made.found = found
        made.dump(value)
        return file.getvalue()


def dumps_part(value: Any, scope: dict[str, Any], found: Dependencies, *, leaves_out: bool = False) -> bytes:
    """Pickle an object of a module, with its functions by value even if other processes can import the module.

    Args:
        value: the object.
        scope: the module's namespace.
        found: gets the functions and classes that the pickle refers to.
        leaves_out: whether to replace attributes of a class that cannot be pickled; the receiver keeps its own.

    Raises:
        Exception: whatever the value's own pickling raises.
    """
    with io.BytesIO() as file:
        pickler = _pickler()(file, protocol=5)
        pickler.found, pickler.scope, pickler.root, pickler.leaves_out = found, scope, value, leaves_out
        pickler.dump(value)
        return file.getvalue()


def dumps_referring(value: Any, refer: Callable[[Any], object], most: int | None = None) -> bytes:
    """Pickle a value as `dumps_by_value` does, but some of its parts by reference.

    Args:
        value: any picklable object.
        refer: called with each part; returns the argument for an unpickler's ``persistent_load``, or None to pickle
            the part.
        most: maximum bytes of the pickle; None for no limit.

    Raises:
        Exception: whatever the value's own pickling raises, or ValueError for more than ``most`` bytes.
    """
    with io.BytesIO() if most is None else _LimitedBuffer(most) as file:
        pickler = _referring_pickler()(file, protocol=5)
        pickler.refer = refer
        pickler.dump(value)
        return file.getvalue()


class _LimitedBuffer(io.BytesIO):
    """Buffer that accepts a limited number of bytes."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def write(self, data: Any) -> int:
        if self.tell() + memoryview(data).nbytes > self._most:
            raise ValueError(f"The pickle is longer than {self._most} bytes.")
        return super().write(data)


def pickler_with(reducers: Mapping[type, Callable[[Any], Any]]) -> Any:
    """Return a class that pickles by value, with these functions as reducers of some types."""
    table = _ReducerTable({**_pickler().dispatch_table, **reducers})
    return type("_PicklerWith", (_pickler(),), {"dispatch_table": table})


class _ReducerTable(dict[type, Callable[[Any], Any]]):
    """Reducers by type, with a fallback to those registered with `copyreg`.

    A lookup in a `ChainMap` takes 2 us per object.
    """

    def __missing__(self, kind: type) -> Callable[[Any], Any]:
        return copyreg.dispatch_table[kind]


class PickledCall:
    """Call to make in another process, pickled by value even where plain pickle suffices.

    The callable is unpickled just before the call, so that its module's state can be prepared before it is imported.

    Args:
        fn: the callable.
        args: its arguments.
        parts_of: returns the state of the caller's modules to take over first; see `worker_modules.take_part`.
    """

    def __init__(
        self,
        fn: Callable[..., object],
        args: tuple[Any, ...],
        parts_of: Callable[[Dependencies], list[bytes]] | None = None,
    ) -> None:
        self._call = (fn, args)
        self._parts_of = parts_of

    def __call__(self) -> object:
        fn, args = self._call
        return fn(*args)

    def for_fork(self) -> Callable[[], object]:
        """Return the call for a forked process, which inherits the arguments.

        The function is pickled all the same, so that it is made in the namespace that later jobs of the worker use.
        """
        fn, args = self._call
        found = Dependencies()
        data = dumps_by_value(fn, found=found)
        parts = self._parts_of(found) if self._parts_of is not None else []
        return functools.partial(_call, data, parts, args)

    def __reduce__(self) -> Any:
        from multiprocessing.reduction import ForkingPickler  # it can pickle locks and connections

        with io.BytesIO() as file:
            by_value = _pickler()
            table = ChainMap(by_value.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table)
            found = Dependencies()
            pickler = type("_PicklerForProcess", (by_value,), {"dispatch_table": table})(file, protocol=5)
            pickler.found = found
            pickler.dump(self._call)
            parts = self._parts_of(found) if self._parts_of is not None else []
            return PickledCall, (_call, (file.getvalue(), parts))


def _call(data: bytes, parts: list[bytes], args: tuple[Any, ...] | None = None) -> object:
    for part in parts:
        worker_modules.take_part(part)
    made = pickle.loads(data)
    fn, args = made if args is None else (made, args)
    return fn(*args)


def loads_own(data: bytes | memoryview, buffers: Iterable[Any]) -> Any:
    """Unpickle a value into copies of its buffers, which are writable even if the pickled ones were not.

    An array that is a view of shared memory is pickled with a mark that makes it read-only again; a small one is
    pickled as bytes, which are read-only. Both are made writable.
    """
    data = bytes(data)
    data, own = _unmarked(data) if READONLY_BUFFER in data else data, map(bytearray, buffers)
    return (
        _OwnArrays(io.BytesIO(data), buffers=own).load() if b"_frombuffer" in data else pickle.loads(data, buffers=own)
    )


class _OwnArrays(pickle.Unpickler):
    """Unpickler that makes numpy arrays in writable memory."""

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        return functools.partial(_writable, found) if name == "_frombuffer" and module.startswith("numpy.") else found


def _writable(make: Callable[..., Any], buffer: Any, *shape: Any) -> Any:
    return make(bytearray(buffer) if memoryview(buffer).readonly else buffer, *shape)


def _unmarked(data: bytes) -> bytes:
    """Return a pickle without the marks that make buffers read-only, and without frames, whose lengths change."""
    import pickletools

    pieces, begin = list[bytes](), 0
    for opcode, _, at in pickletools.genops(data):
        if at is not None and opcode.name in _CUT:
            pieces.append(data[begin:at])
            begin = at + _CUT[opcode.name]
    return b"".join([*pieces, data[begin:]])


class Dependencies:
    """Functions, classes and modules that a pickle refers to, which the receiver may need as well.

    Attributes:
        functions: functions that were pickled by value.
        named: functions, classes and modules that were pickled by name.
        keys: by module and name, the keys of the globals that were pickled; a key changes when the caller changes the
            value.
        left_out: attributes of classes that were left out.
    """

    def __init__(self) -> None:
        self.left_out: list[Any] = []
        self.functions: list[types.FunctionType] = []
        self.named: list[Any] = []
        self.keys: dict[tuple[str, str], Any] = {}
        self._seen: set[int] = set()

    def add_named(self, values: Iterable[Any]) -> None:
        """Add functions and classes that were pickled by name, each once."""
        for value in values:
            if id(value) not in self._seen:
                self._seen.add(id(value))
                self.named.append(value)


@functools.cache
def _pickler() -> Any:
    import cloudpickle  # a worker that returns plain values does not need it

    from forgepar.values.by_value import pickler_from

    return pickler_from(cloudpickle)


@functools.cache
def _referring_pickler() -> Any:
    return type("_Referring", (_pickler(),), {"persistent_id": lambda self, part: self.refer(part)})
