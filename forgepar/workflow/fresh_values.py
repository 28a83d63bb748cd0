"""Copies of mutable arguments, so that no task sees what another has changed.

    constants of a map     unpickled again for each task     (`Worker._make_call`)
    arguments of a partial ┐
    rows of one chunk      ┘ copied for each call            (`Original`)

Immutable values (`is_frozen`) are one object for all tasks of a worker. So are callables: the defaults and closure of a
function, and the attributes of a callable object, persist from call to call on that worker.
"""

from __future__ import annotations

import functools
import gc
import io
import itertools
import mmap
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from forgepar.system.forking import in_one_process
from forgepar.values.arena import Arena
from forgepar.values.codec import FIXED, is_plain
from forgepar.workflow.arguments import ATOMS

_MOST_LOOKED_AT = 10_000  # objects of a row; copying the row takes less time than searching more of them
_BY_REFERENCE = (type, FunctionType, ModuleType, CodeType)  # the same object in all copies
_FROZEN = ATOMS | {range, FunctionType, ModuleType, CodeType, type(...), type(NotImplemented)}
_FROZEN_NAMES = frozenset(  # by name, as a worker need not load these types
    (
        *(f"datetime.{name}" for name in ("date", "datetime", "time", "timedelta", "timezone")),
        *(f"pathlib.{name}" for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")),
        *(
            f"pathlib._local.{name}"
            for name in ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
        ),
        "decimal.Decimal",
        "fractions.Fraction",
        "functools._lru_cache_wrapper",
        "re.Pattern",
        "uuid.UUID",
        "zoneinfo.ZoneInfo",
    )
)


def is_frozen(value: Any) -> bool:
    """Return whether a value and all that it contains is immutable, judged by exact types.

    Read-only arrays of numbers are, unless they can be made writable. Instances of a user's classes never are.
    """
    kind = type(value)
    if kind in _FROZEN:
        return True
    if kind is tuple or kind is frozenset:
        return _FROZEN.issuperset(map(type, value)) or all(map(is_frozen, value))
    if isinstance(value, type):
        return True
    if kind is MethodType or kind is BuiltinFunctionType:
        return value.__self__ is None or is_frozen(value.__self__)
    if kind is functools.partial:
        return is_frozen((value.func, *value.args, *value.keywords.values())) and not value.__dict__
    if f"{kind.__module__}.{kind.__qualname__}" in _FROZEN_NAMES:
        return is_frozen(getattr(value, "tzinfo", None))
    enum = sys.modules.get("enum")  # loaded if the value is an Enum
    if enum is not None and isinstance(value, enum.Enum):
        return True
    return kind.__module__.startswith("numpy") and _is_frozen_of_numpy(value)


def _is_frozen_of_numpy(value: Any) -> bool:
    np = sys.modules["numpy"]
    if isinstance(value, np.generic):
        return not isinstance(value, (np.void, np.object_))
    if type(value) is not np.ndarray or value.dtype.hasobject:
        return isinstance(value, np.dtype)
    while type(value) is np.ndarray:
        if value.flags.writeable:
            return False
        value = value.base
    # An array can be made writable again if it owns its memory, or has it from a writable object.
    return value is not None and memoryview(value).readonly


def _is_in_a_file(value: Any) -> bool:
    """Return whether a value is an array in a mapped file, such as a `numpy.memmap`: it stands for the file."""
    np = sys.modules.get("numpy")
    if np is None:
        return False
    while isinstance(value, np.ndarray):
        value = value.base
    return type(value) is mmap.mmap


class Original:
    """A value to copy as often as needed.

    Classes, functions and modules are the same objects in all copies; so is read-only memory, and memory of a mapped
    file.

    Args:
        value: any value that was unpickled.
        kept: further objects that are the same in all copies.
        limit: bytes of an array, from which on copies are read-only views of one array; None to copy writable arrays of
            any size.
    """

    def __init__(self, value: Any, kept: Sequence[Any] = (), limit: int | None = None) -> None:
        self._kept = list(kept)
        self._buffers: list[memoryview] = []
        self._limit = limit
        if not kept and is_plain(value):
            self._data = pickle.dumps(value, protocol=5, buffer_callback=self._keeps_in)
        else:
            with io.BytesIO() as file:
                _copying()(file, self._kept, self._keeps_in).dump(value)
                self._data = file.getvalue()

    @property
    def n_bytes(self) -> int:
        """The number of bytes of each copy, without shared memory."""
        return len(self._data)

    def copy(self) -> Any:
        """Return a new copy."""
        if self._kept:
            return _Unpickler(self._data, self._buffers, self._kept).load()
        return pickle.loads(self._data, buffers=self._buffers)

    def _keeps_in(self, buffer: pickle.PickleBuffer) -> bool:
        """Return whether a buffer is part of the copied data; store it as shared if not."""
        raw = buffer.raw()
        if not raw.readonly and (self._limit is None or raw.nbytes < self._limit):
            return True
        self._buffers.append(raw.toreadonly())
        return False


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, buffers: Iterable[Any], kept: Sequence[Any]) -> None:
        super().__init__(io.BytesIO(data), buffers=buffers)
        self._kept = kept

    def persistent_load(self, number: Any) -> Any:
        return self._kept[number]


@functools.cache
def _copying() -> Any:
    import cloudpickle  # workers need not load it for plain values

    class Copying(cloudpickle.Pickler):  # type: ignore[misc]  # cloudpickle has no types
        def __init__(self, file: io.BytesIO, kept: list[Any], keeps_in: Callable[[pickle.PickleBuffer], bool]) -> None:
            super().__init__(file, protocol=5, buffer_callback=keeps_in)
            self._kept = kept
            self._numbers = {id(value): number for number, value in enumerate(kept)}

        def persistent_id(self, value: Any) -> int | None:
            number = self._numbers.get(id(value))
            if number is None and (isinstance(value, _BY_REFERENCE) or _is_in_a_file(value)):
                number = self._numbers[id(value)] = len(self._kept)
                self._kept.append(value)
            return number

    return Copying


class EachOf:
    """Function of a list of argument rows: calls another function for each row, with fresh copies of shared values."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [self.fn(*row) for row in in_one_process(fresh_rows(rows))]


def fresh_rows(rows: Sequence[Any]) -> Iterable[Any]:
    """Return rows that were unpickled together as if each had been unpickled alone."""
    if not _share(rows):
        return rows
    try:
        originals = [Original(row) for row in rows]
    except Exception:
        return rows  # an unpickled value cannot be pickled again
    return (original.copy() for original in originals)


def renewing(fn: Callable[..., Any], *, owns: bool = False) -> Callable[..., Any]:
    """Return a callable that passes fresh copies of a partial's arguments at each call.

    Other callables, and partials with immutable arguments, are returned unchanged.

    Args:
        fn: the callable of a task.
        owns: whether large arrays in the arguments are copied too, instead of being read-only views.
    """
    if type(fn) is EachOf:
        return EachOf(renewing(fn.fn, owns=owns))
    if not isinstance(fn, functools.partial):
        return fn
    bound = (*fn.args, *fn.keywords.values())
    if is_frozen(bound):
        return fn
    kept = [value for value in bound if type(value) not in FIXED and is_frozen(value)]
    try:
        original = Original((fn.args, fn.keywords), kept, None if owns else Arena.blob_limit)
    except Exception:
        return fn  # as in `fresh_rows`
    inner = fn.func

    def call(*args: Any, **keywords: Any) -> Any:
        own_args, own_keywords = original.copy()
        return inner(*own_args, *args, **{**own_keywords, **keywords})

    return call


def _share(rows: Sequence[Any]) -> bool:
    """Return whether two rows contain the same mutable object."""
    if len(rows) < 2:
        return False
    if {tuple}.issuperset(map(type, rows)) and _FROZEN.issuperset(map(type, itertools.chain.from_iterable(rows))):
        return False
    seen: set[int] = set()
    for row in rows:
        own = _changeable(row)
        if len(own) > _MOST_LOOKED_AT or not seen.isdisjoint(own):
            return True
        seen |= own
    return False


def _changeable(value: Any) -> set[int]:
    """Return the ids of the mutable objects in a value, up to slightly more than `_MOST_LOOKED_AT`."""
    found: set[int] = set()
    waiting = [value]
    while waiting and len(found) <= _MOST_LOOKED_AT:
        value = waiting.pop()
        kind = type(value)
        if kind in _FROZEN or isinstance(value, _BY_REFERENCE) or id(value) in found:
            continue
        if kind is not tuple and kind is not frozenset:
            if is_frozen(value) or _is_in_a_file(value):
                continue
            found.add(id(value))
        if kind.__module__ == "numpy" and kind.__name__ == "ndarray":
            waiting += [value.base] if value.base is not None else []
            waiting += value.ravel().tolist() if value.dtype.hasobject else []
        elif not (kind in (list, tuple) and _FROZEN.issuperset(map(type, value))):
            waiting += gc.get_referents(value)
    return found
