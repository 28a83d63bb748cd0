"""Arrays that a task fills where its value will lie, so that returning them copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgepar.values.arena import Arena
from forgepar.values.codec import BLOB_LIMIT

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

_arena: Arena | None = None


def use(arena: Arena | None) -> Arena | None:
    """Say where `empty` is to allocate, in the tasks of this process; return where it did before."""
    global _arena  # one for the whole process: a task's threads allocate as well
    before, _arena = _arena, arena
    return before


def empty(shape: int | Sequence[int], dtype: DTypeLike = float) -> NDArray[Any]:
    """Make an array, uninitialised as by `numpy.empty`, that a task can return without a copy.

    In a task it lies in shared memory, where the tasks that take the value read it; so does every view of it. Return
    it once and write to it no more: they see what is written. An array of 32 KiB or less, or one made outside of a
    task, is an ordinary one.

    Args:
        shape: number of elements along each axis.
        dtype: type of the elements, not `object`.

    Raises:
        ValueError: `dtype` has Python objects, which cannot lie in shared memory.
        ArenaFull: neither shared memory nor the temporary folder has room.

    Example:
        >>> def squares(n):
        ...     out = empty(n, "int64")
        ...     out[:] = range(n)
        ...     out *= out
        ...     return out
        >>> squares(4)
        array([0, 1, 4, 9])
    """
    import numpy as np

    kind = np.dtype(dtype)
    if kind.hasobject:
        raise ValueError(f"dtype={kind} has Python objects, which cannot lie in shared memory. Use numpy.empty.")
    axes = (shape,) if isinstance(shape, (int, np.integer)) else tuple(shape)
    n_bytes = int(np.prod(axes, dtype=object)) * kind.itemsize
    if _arena is None or n_bytes <= BLOB_LIMIT:
        return np.empty(axes, kind)
    return np.frombuffer(_arena.grant(n_bytes), kind).reshape(axes)


def empty_like(
    prototype: Any, dtype: DTypeLike | None = None, shape: int | Sequence[int] | None = None
) -> NDArray[Any]:
    """Make an array as `empty` does, of an array's shape and type but for what is given.

    Example:
        >>> import numpy
        >>> empty_like(numpy.zeros((2, 3), "float32")).shape
        (2, 3)
    """
    import numpy as np

    like = np.asarray(prototype)
    return empty(like.shape if shape is None else shape, like.dtype if dtype is None else dtype)
