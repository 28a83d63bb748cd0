"""Arrays that a task fills where its value will lie, so that returning them copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgepar.current import Current
from forgepar.validation import as_list, checked_by, refusal
from forgepar.values.arena import Arena
from forgepar.values.codec import BLOB_LIMIT

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

_MOST_ITEMS = 1 << 48  # along an axis: above what any machine has memory for
_current: Current[Arena] = Current()
here = _current.here  # set by a thread while it runs tasks: where `empty` allocates in them


def use(arena: Arena | None) -> None:
    """Say where `empty` is to allocate in the tasks of this process; None: there are none."""
    _current.of_process = arena


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

    kind = checked_by("dtype", lambda: np.dtype(dtype), "a type of numpy", dtype)
    if kind.hasobject:
        raise ValueError(f"dtype={kind} has Python objects, which cannot lie in shared memory. Use numpy.empty.")
    is_one = isinstance(shape, (int, np.integer))
    axes = (shape,) if is_one else tuple(as_list("shape", shape, "an integer or integers"))
    for axis in axes:
        if not isinstance(axis, (int, np.integer)) or isinstance(axis, bool) or not 0 <= axis <= _MOST_ITEMS:
            raise refusal("shape", f"integers from 0 to {_MOST_ITEMS}", shape)
    n_bytes = int(np.prod(axes, dtype=object)) * kind.itemsize
    arena = _current.own()  # not of another thread: what that has no more use for is allocated again
    if arena is None or n_bytes <= BLOB_LIMIT:
        return np.empty(axes, kind)
    return np.frombuffer(arena.grant(n_bytes), kind).reshape(axes)


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

    like = checked_by("prototype", lambda: np.asarray(prototype), "an array", prototype)
    if dtype is None and like.dtype.hasobject:
        raise refusal("prototype", "an array without Python objects", prototype)
    return empty(like.shape if shape is None else shape, like.dtype if dtype is None else dtype)
