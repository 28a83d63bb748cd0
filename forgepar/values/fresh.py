"""What a task may change without another task seeing it: each gets such a value as it was given.

    constants of a map     unpickled again for each task     (`Worker._make_call`)
    arguments of a partial ┐
    rows of one chunk      ┘ copied for each call            (`Original`)

A value that cannot be changed (`is_frozen`) is one object for all tasks of a worker. So is a callable: what a function
keeps in its defaults or closure, or an object in its attributes, stays from call to call on that worker.
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

from forgepar.arguments import ATOMS
from forgepar.forking import in_one_process
from forgepar.values.arena import Arena
from forgepar.values.codec import FIXED, is_plain

_MOST_LOOKED_AT = 10_000  # objects of a row; a copy of it takes less time than a look at more
_BY_REFERENCE = (type, FunctionType, ModuleType, CodeType)  # one object in all copies
_FROZEN = ATOMS | {range, FunctionType, ModuleType, CodeType, type(...), type(NotImplemented)}
_FROZEN_NAMES = frozenset(  # of types that a worker need not have loaded
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
    """Tell whether a value cannot be changed: by its exact type, and so all that is in it.

    Read-only arrays of numbers count, where nothing makes them writable; instances of classes of the user's never do.
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
    enum = sys.modules.get("enum")  # an Enum has been loaded by whoever made one
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
    # An array that owns its memory, or has it of something that may be written, can be made writable again.
    return value is not None and memoryview(value).readonly


def _is_in_a_file(value: Any) -> bool:
    """Tell whether a value is an array in a file that is mapped, as a `numpy.memmap` is: it stands for the file."""
    np = sys.modules.get("numpy")
    if np is None:
        return False
    while isinstance(value, np.ndarray):
        value = value.base
    return type(value) is mmap.mmap


class Original:
    """A value as it was given, to be copied as often as it is needed.

    Classes, functions and modules are the same objects in all copies; so is memory that cannot be written, and memory
    of a mapped file.

    Args:
        value: any value that came pickled.
        kept: what is the same object in all copies as well.
        limit: bytes of an array from which on copies are read-only views of one array; None: arrays that can be written
            are copied whatever their size.
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
        """How many bytes each copy takes, without the memory that all share."""
        return len(self._data)

    def copy(self) -> Any:
        """Return one more of it."""
        if self._kept:
            return _Unpickler(self._data, self._buffers, self._kept).load()
        return pickle.loads(self._data, buffers=self._buffers)

    def _keeps_in(self, buffer: pickle.PickleBuffer) -> bool:
        """Tell whether a buffer is copied with the rest; note it if it is not."""
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
    import cloudpickle  # a worker that gets plain values need not load it

    class Copying(cloudpickle.Pickler):  # type: ignore[misc]  # it has no types
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
    """A function of several rows of arguments that calls another for each, no row of which sees what others changed."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn = fn

    def __call__(self, rows: Sequence[tuple[Any, ...]]) -> list[Any]:
        return [self.fn(*row) for row in in_one_process(fresh_rows(rows))]


def fresh_rows(rows: Sequence[Any]) -> Iterable[Any]:
    """Return rows that came in one pickle, as if each had come in its own."""
    if not _share(rows):
        return rows
    try:
        originals = [Original(row) for row in rows]
    except Exception:
        return rows  # something came by pickle and cannot go by it again
    return (original.copy() for original in originals)


def renewing(fn: Callable[..., Any], *, owns: bool = False) -> Callable[..., Any]:
    """Return a callable that gives a partial's function the arguments in it as they were given, each time.

    Anything but a partial is returned as it is, and so is a partial of arguments that cannot be changed.

    Args:
        fn: what a task calls.
        owns: whether large arrays among the arguments are private copies, too, instead of read-only views.
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
    """Tell whether two rows have something in them that can be changed and is the same object in both."""
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
    """Return the ids of what can be changed in a value, up to a few more than `_MOST_LOOKED_AT`."""
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
