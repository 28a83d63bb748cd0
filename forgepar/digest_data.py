"""Takes containers, arrays and files apart, for their digests.

Dicts count with their order, sets without. Arrays count by type, shape and content, whatever their order in memory;
what pads their items does not count.
"""

from __future__ import annotations

import logging
import os
import pathlib
import random
import stat
from collections.abc import Callable, Mapping
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, ParamSpec, Protocol, TypeVar, TypeVarTuple

import numpy as np

from forgepar.inputs import File
from forgepar.merkle import DIGEST_BYTES, NoDigest, Walk

_CHUNK_BYTES = 1 << 20
_X87_BYTES = 10  # of a long double there; the rest of its 16 is whatever was in memory
_FIRST_OF_USERS = 256  # of the numbers of types that numpy did not always have
_IS_X87 = np.finfo(np.longdouble).nmant == 63


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def take_sequence(walk: Walk, value: tuple[Any, ...] | list[Any]) -> None:
    """Take a tuple or list apart."""
    walk.put(type(value).__name__, str(len(value)))
    for part in value:
        walk.visit(part)


def take_mapping(walk: Walk, value: Mapping[Any, Any]) -> None:
    """Take a dict apart."""
    walk.put("dict", str(len(value)))
    for key, part in value.items():
        walk.visit(key)
        walk.visit(part, f"its {key!r}" if type(key) is str else "")


def take_set(walk: Walk, value: set[Any] | frozenset[Any]) -> None:
    """Take a set apart, whose order depends on the process."""
    walk.put(type(value).__name__, str(len(value)))
    walk.disorder()
    for part in value:
        walk.visit(part)


def take_memoryview(walk: Walk, value: memoryview) -> None:
    """Take a view of memory apart."""
    walk.put("memoryview", f"{value.format} {value.shape}")
    walk.put("data", value.tobytes())


def take_path(walk: Walk, value: pathlib.PurePath) -> None:
    """Take a path apart, which may hold the same in other parts."""
    walk.put("path", type(value).__name__)
    walk.put("text", str(value))


def take_file(walk: Walk, value: File) -> None:
    """Read a file."""
    walk.put("file", os.path.basename(value.path))  # noqa: PTH119
    try:
        if not stat.S_ISREG(os.stat(value.path).st_mode):  # noqa: PTH116  (to open a pipe would wait)
            raise NoDigest(f"{value.path!r} is no file. Give the path of one, or the path itself as text")
        found = blake2b(digest_size=DIGEST_BYTES)
        with open(value.path, "rb", buffering=0) as file:  # noqa: PTH123
            while chunk := file.read(_CHUNK_BYTES):
                found.update(chunk)
    except OSError as error:
        raise NoDigest(f"the file {value.path!r} cannot be read ({error.strerror})") from None
    walk.put("data", found.digest())


def take_constant(walk: Walk, value: Any) -> None:
    """Take an object apart that there is but one of."""
    walk.put("constant", repr(value))


def take_type_variable(walk: Walk, value: Any) -> None:
    """Count a type variable by its name: types are not looked at when a function runs."""
    walk.put("type variable", value.__name__)


def take_logger(walk: Walk, _: logging.Logger) -> None:
    """Count a logger as any other: its name is often the module's, and no value depends on it."""
    walk.put("logger")


def take_environment(walk: Walk, _: Any) -> None:
    """Count the environment by its name, as if reached by that of its module."""
    walk.put("environment")


def take_random(walk: Walk, value: Any) -> None:
    """Take a source of random numbers apart; the one that all share, which begins anywhere, by its name."""
    if value is random._inst or value is np.random.mtrand._rand:
        walk.put("random", type(value).__module__)
    else:
        walk.put("state", type(value).__module__)
        walk.visit(value.getstate() if isinstance(value, random.Random) else value.get_state(legacy=False))


# Arrays


def take_array(walk: Walk, array: np.ndarray[Any, Any]) -> None:
    """Take an array apart."""
    array = np.asarray(array)
    walk.put("array", f"{_described(array.dtype)} {array.shape}")
    _take_content(walk, array)


def take_masked(walk: Walk, array: np.ma.MaskedArray[Any, Any]) -> None:
    """Take an array apart of which some items do not count."""
    walk.put("masked")
    walk.visit(np.ma.getdata(array))
    walk.visit(np.ma.getmaskarray(array))
    walk.visit(array.fill_value)  # the one of its type, before it is asked for and after


def take_scalar(walk: Walk, value: np.generic) -> None:
    """Take a numpy scalar apart."""
    walk.put("scalar", _described(value.dtype))
    array = np.empty((), value.dtype)
    array[()] = value
    _take_content(walk, array)


def take_dtype(walk: Walk, dtype: np.dtype[Any]) -> None:
    """Take the type of an array apart."""
    walk.put("dtype", _described(dtype))


def _take_content(walk: Walk, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.names is not None:
        for name in array.dtype.names:  # one by one, without what is between them
            _take_content(walk, array[name])
    elif array.dtype.hasobject:
        walk.visit(array.ravel().tolist(), "its items")
    else:
        found = blake2b(digest_size=DIGEST_BYTES)
        _feed(found, array)
        walk.put("data", found.digest())


def _feed(found: _Hash, array: np.ndarray[Any, Any]) -> None:
    """Read an array's items in the order of C; copies are no longer than a chunk, or one row."""
    if not array.nbytes:
        return
    if array.flags.c_contiguous or array.ndim == 0:
        raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        if _IS_X87 and array.dtype.char in "gG":
            raw = np.ascontiguousarray(raw.reshape(-1, 16)[:, :_X87_BYTES]).reshape(-1)
        found.update(raw.data)
        return
    n_rows = max(1, _CHUNK_BYTES * array.shape[0] // array.nbytes)
    for at in range(0, array.shape[0], n_rows):
        _feed(found, np.ascontiguousarray(array[at : at + n_rows]))


def _described(dtype: np.dtype[Any]) -> str:
    """Return what tells one type of items from another."""
    if dtype.names is not None:
        fields = [(name, *dtype.fields[name][1:], _described(dtype.fields[name][0])) for name in dtype.names]  # type: ignore[index]
        return f"{dtype.itemsize} {fields}"
    if dtype.subdtype is not None:
        return f"{dtype.shape} of {_described(dtype.subdtype[0])}"
    return dtype.str if dtype.num < _FIRST_OF_USERS else repr(dtype)


TAKERS: dict[type, Callable[[Walk, Any], None]] = {
    tuple: take_sequence,
    list: take_sequence,
    dict: take_mapping,
    MappingProxyType: take_mapping,
    set: take_set,
    frozenset: take_set,
    memoryview: take_memoryview,
    type(...): take_constant,
    type(NotImplemented): take_constant,
    **dict.fromkeys((TypeVar, ParamSpec, TypeVarTuple), take_type_variable),
    np.ndarray: take_array,
    np.memmap: take_array,
    np.ma.MaskedArray: take_masked,
    File: take_file,
    type(os.environ): take_environment,
    random.Random: take_random,
    np.random.RandomState: take_random,
    **dict.fromkeys(
        (
            pathlib.PurePosixPath,
            pathlib.PureWindowsPath,
            pathlib.PosixPath,
            pathlib.WindowsPath,
        ),
        take_path,
    ),
}
BASES: tuple[tuple[type, Callable[[Walk, Any], None]], ...] = (
    (logging.Logger, take_logger),
    (np.generic, take_scalar),
    (np.dtype, take_dtype),
)
