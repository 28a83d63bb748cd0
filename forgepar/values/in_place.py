"""Arrays that a task fills directly in shared memory, so that returning them copies nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from forgepar._validate import as_list, checked_by, refusal
from forgepar.system.thread_scope import ThreadScope
from forgepar.values.arena import Arena
from forgepar.values.codec import BLOB_LIMIT
from forgepar.version import public

if TYPE_CHECKING:
    from numpy.typing import DTypeLike, NDArray

_MOST_ITEMS = 1 << 48  # per axis; more than fits into the memory of any machine
_current: ThreadScope[Arena] = ThreadScope()
here = _current.here  # context manager: sets the arena for the tasks that a thread runs


def use(arena: Arena | None) -> None:
    """Set the arena in which `empty` allocates in this process's tasks; None for ordinary arrays."""
    _current.of_process = arena


@public
def empty(shape: int | Sequence[int], dtype: DTypeLike = float) -> NDArray[Any]:
    """Make an array, uninitialised as by `numpy.empty`, that a task can return without a copy.

    In a task, the array and all views of it lie in shared memory, where the tasks that take the value read it. Return
    it once and do not write to it afterwards: those tasks would see the change. An array of 32 KiB or less, or one
    made outside of a task, is an ordinary array.

    Args:
        shape: number of elements along each axis.
        dtype: type of the elements, not `object`.

    Returns:
        The array.

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
        raise ValueError(
            f"dtype must be a type without Python objects, which shared memory cannot hold; got {kind}. "
            "Use numpy.empty."
        )
    is_one = isinstance(shape, (int, np.integer))
    axes = (shape,) if is_one else tuple(as_list("shape", shape, "an integer or integers"))
    for axis in axes:
        if not isinstance(axis, (int, np.integer)) or isinstance(axis, bool) or not 0 <= axis <= _MOST_ITEMS:
            raise refusal("shape", f"integers from 0 to {_MOST_ITEMS}", shape)
    n_bytes = int(np.prod(axes, dtype=object)) * kind.itemsize
    arena = _current.own()  # not another thread's: that frees its unused grants
    if arena is None or n_bytes <= BLOB_LIMIT:
        return np.empty(axes, kind)
    return np.frombuffer(arena.grant(n_bytes), kind).reshape(axes)


@public
def empty_like(
    prototype: Any, dtype: DTypeLike | None = None, shape: int | Sequence[int] | None = None
) -> NDArray[Any]:
    """Make an array as `empty` does, with the shape and type of another array unless they are given.

    Args:
        prototype: the other array.
        dtype: type of the elements; None for that of ``prototype``.
        shape: number of elements along each axis; None for that of ``prototype``.

    Returns:
        The array.

    Raises:
        ValueError: the type has Python objects, which cannot lie in shared memory.
        ArenaFull: neither shared memory nor the temporary folder has room.

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
