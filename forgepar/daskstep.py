"""A node of a Dask graph as it runs in a worker: a task of ours."""

from __future__ import annotations

import io
import pickle
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forgepar.errors import text_of
from forgepar.pickling import Found, dumps_by_value, loads_own
from forgepar.values.namespaces import travels_by_value

IN_MESSAGE = (
    32 * 1024
)  # bytes of pickle; a larger node, or one with buffers, goes as an object, so that arrays are mapped


class Node(NamedTuple):
    """A node, and what its arguments are called.

    Attributes:
        call: the node; called with a mapping, it computes its value.
        names: keys of the values that come as arguments.
        known: values of other keys.
    """

    call: Any
    names: Sequence[Any]
    known: Mapping[Any, Any]


class Kept:
    """Something that is handed on as it is, without a look inside."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content

    def __reduce__(self) -> tuple[Any, ...]:
        return Kept, (self.content,)


class Step:
    """Computes nodes of one kind, which take about as long as each other.

    Args:
        name: what its tasks are called.
    """

    def __init__(self, name: str) -> None:
        self.__name__ = name

    def __call__(self, node: bytes | Kept, *values: Any) -> Any:
        """Compute a node from its arguments."""
        call, names, known = pickle.loads(node) if isinstance(node, bytes) else node.content
        values = tuple(value.content if type(value) is Kept else value for value in values)
        try:
            return call({**known, **dict(zip(names, values, strict=True))})
        except ValueError as error:
            if "read-only" not in text_of(error):
                raise
        # It writes to its arguments, which are views of memory that others read. Dask's tasks may be run again.
        return call({**known, **dict(zip(names, _copied(values), strict=True))})


def _copied(values: Any) -> Any:
    """Return values with buffers of their own, that can be written."""
    buffers: list[pickle.PickleBuffer] = []
    data = dumps_by_value(values, buffers.append)
    return loads_own(data, buffers)


class _ByName(pickle.Pickler):
    """Pickles functions and classes by their names, and notes which."""

    def __init__(self, file: io.BytesIO, keep_out: Callable[[pickle.PickleBuffer], object]) -> None:
        super().__init__(file, protocol=5, buffer_callback=keep_out)
        self.named: list[Any] = []

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, (types.FunctionType, type)):
            self.named.append(value)
        return NotImplemented


def packed(node: Node, found: Found | None = None) -> bytes | Kept:
    """Return a node as it travels.

    Args:
        node: the node.
        found: takes in the functions and classes in it.

    Raises:
        Exception: whatever its pickling raises.
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
    if by_value or b"__main__" in data:  # plain pickle, ten times as fast, would only name what is the script's
        buffers.clear()
        data = dumps_by_value(tuple(node), buffers.append, found)
    elif found is not None:
        found.add_named(pickler.named)
    return Kept(tuple(node)) if buffers or len(data) > IN_MESSAGE else data
