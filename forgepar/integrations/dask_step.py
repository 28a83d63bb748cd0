"""The task that computes a node of a Dask graph in a worker."""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forgepar.errors import text_of
from forgepar.values.origins import travels_by_value
from forgepar.values.pickling import Dependencies, dumps_by_value, loads_own

# Bytes of pickle. A larger node, or one with buffers, is passed as an object, so that workers map its arrays.
IN_MESSAGE = 32 * 1024


class GraphNode(NamedTuple):
    """A node and the keys of its arguments.

    Attributes:
        call: the node; called with a mapping of values by key, it computes its value.
        names: keys of the values that are arguments of the task.
        known: values of other keys.
    """

    call: Any
    names: Sequence[Any]
    known: Mapping[Any, Any]


class KeptValue:
    """An argument that is not searched for handles."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return KeptValue, (self.content,)


class GraphStep:
    """Computes nodes of one kind, which take similar times.

    Args:
        name: base of the names of its tasks.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, node: bytes | KeptValue, *values: Any) -> Any:
        """Compute a node from its arguments."""
        call, names, known = pickle.loads(node) if isinstance(node, bytes) else node.content
        values = tuple(value.content if type(value) is KeptValue else value for value in values)
        try:
            return call({**known, **dict(zip(names, values, strict=True))})
        except ValueError as error:
            if "read-only" not in text_of(error):
                raise
        # The node writes to its arguments, which are views of shared memory. Dask's tasks may be run again.
        return call({**known, **dict(zip(names, _copied(values), strict=True))})


def _copied(values: Any) -> Any:
    """Return copies of values with private, writable buffers."""
    buffers: list[pickle.PickleBuffer] = []
    data = dumps_by_value(values, buffers.append)
    return loads_own(data, buffers)


class _ByName(pickle.Pickler):
    """Pickles functions and classes by name, and lists them in ``named``."""

    def __init__(self, file: io.BytesIO, keep_out: Callable[[pickle.PickleBuffer], object]) -> None:
        super().__init__(file, protocol=5, buffer_callback=keep_out)
        self.named: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (types.FunctionType, type)):
            self.named.append(value)
        return NotImplemented


def packed(node: GraphNode, found: Dependencies | None = None) -> bytes | KeptValue:
    """Return a node as an argument of its task: pickled, or wrapped if it is large or has buffers.

    Args:
        node: the node.
        found: receives the functions and classes in it.

    Raises:
        Exception: what pickling the node raises.
    """
    buffers: list[pickle.PickleBuffer] = []
    with io.BytesIO() as file:
        pickler = _ByName(file, buffers.append)
        try:
            pickler.dump(tuple(node))
            by_value = any(travels_by_value(str(value.__module__)) for value in pickler.named)
        except Exception:
            by_value = True
        data = file.getvalue()
    if by_value or b"__main__" in data:  # plain pickle is 10 times as fast, but only names what a script defines
        buffers.clear()
        data = dumps_by_value(tuple(node), buffers.append, found)
    elif found is not None:
        found.add_named(pickler.named)
    return KeptValue(tuple(node)) if buffers or len(data) > IN_MESSAGE else data
