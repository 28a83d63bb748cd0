"""Handlers that digest containers, arrays and files.

The order of dicts counts, that of sets does not. Arrays are digested by dtype, shape and content. Their memory order
and the padding of their items do not count.
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

from forgepar.store.fingerprint.merkle import DIGEST_BYTES, NoDigest, Walk
from forgepar.workflow.file import File

_CHUNK_BYTES = 1 << 20
_X87_BYTES = 10  # of a long double on x87; the other 6 of its 16 bytes are arbitrary
_FIRST_OF_USERS = 256  # dtypes with type numbers from here have no unique `str`: user-defined ones, StringDType
_IS_X87 = np.finfo(np.longdouble).nmant == 63


class _Hash(Protocol):
    def update(self, data: Any, /) -> None: ...


def digest_sequence(walk: Walk, value: tuple[Any, ...] | list[Any]) -> None:
    """Digest a tuple or list."""
    walk.put(type(value).__name__, str(len(value)))
    for part in value:
        walk.visit(part)


def digest_mapping(walk: Walk, value: Mapping[Any, Any]) -> None:
    """Digest a dict."""
    walk.put("dict", str(len(value)))
    for key, part in value.items():
        walk.visit(key)
        walk.visit(part, f"its {key!r}" if type(key) is str else "")


def digest_set(walk: Walk, value: set[Any] | frozenset[Any]) -> None:
    """Digest a set; its order depends on the process."""
    walk.put(type(value).__name__, str(len(value)))
    walk.ignore_order()
    for part in value:
        walk.visit(part)


def digest_memoryview(walk: Walk, value: memoryview) -> None:
    """Digest a memoryview."""
    walk.put("memoryview", f"{value.format} {value.shape}")
    walk.put("data", value.tobytes())


def digest_path(walk: Walk, value: pathlib.PurePath) -> None:
    """Digest a path by its text; equal paths may have different parts."""
    walk.put("path", type(value).__name__)
    walk.put("text", str(value))


def digest_file(walk: Walk, value: File) -> None:
    """Digest a file by its name and content."""
    walk.put("file", os.path.basename(value.path))  # noqa: PTH119
    try:
        if not stat.S_ISREG(os.stat(value.path).st_mode):  # noqa: PTH116  (opening a pipe would block)
            raise NoDigest(f"{value.path!r} is not a regular file. Give one, or pass the path as a string")
        found = blake2b(digest_size=DIGEST_BYTES)
        with open(value.path, "rb", buffering=0) as file:  # noqa: PTH123
            while chunk := file.read(_CHUNK_BYTES):
                found.update(chunk)
    except OSError as error:
        raise NoDigest(f"the file {value.path!r} cannot be read ({error.strerror})") from None
    walk.put("data", found.digest())


def digest_constant(walk: Walk, value: Any) -> None:
    """Digest a singleton."""
    walk.put("constant", repr(value))


def digest_type_variable(walk: Walk, value: Any) -> None:
    """Digest a type variable by its name; its bounds have no effect at run time."""
    walk.put("type variable", value.__name__)


def digest_logger(walk: Walk, _: logging.Logger) -> None:
    """Digest a logger like any other: its name is often the module's, and no value depends on it."""
    walk.put("logger")


def digest_environment(walk: Walk, _: Any) -> None:
    """Digest ``os.environ`` by its name, not its content, as when it is reached through ``os``."""
    walk.put("environment")


def digest_random(walk: Walk, value: Any) -> None:
    """Digest a random number generator by its state; the global ones, which start anywhere, by name."""
    if value is random._inst or value is np.random.mtrand._rand:
        walk.put("random", type(value).__module__)
    else:
        walk.put("state", type(value).__module__)
        walk.visit(value.getstate() if isinstance(value, random.Random) else value.get_state(legacy=False))


# Arrays


def digest_array(walk: Walk, array: np.ndarray[Any, Any]) -> None:
    """Digest an array."""
    array = np.asarray(array)
    walk.put("array", f"{_described(array.dtype)} {array.shape}")
    _digest_content(walk, array)


def digest_masked(walk: Walk, array: np.ma.MaskedArray[Any, Any]) -> None:
    """Digest a masked array."""
    walk.put("masked")
    walk.visit(np.ma.getdata(array))
    walk.visit(np.ma.getmaskarray(array))
    walk.visit(array.fill_value)  # also the default of the dtype, which numpy sets on first access


def digest_scalar(walk: Walk, value: np.generic) -> None:
    """Digest a numpy scalar."""
    walk.put("scalar", _described(value.dtype))
    array = np.empty((), value.dtype)
    array[()] = value
    _digest_content(walk, array)


def digest_dtype(walk: Walk, dtype: np.dtype[Any]) -> None:
    """Digest a dtype."""
    walk.put("dtype", _described(dtype))


def _digest_content(walk: Walk, array: np.ndarray[Any, Any]) -> None:
    if array.dtype.names is not None:
        for name in array.dtype.names:  # one by one, without the padding between them
            _digest_content(walk, array[name])
    elif array.dtype.hasobject:
        walk.visit(array.ravel().tolist(), "its items")
    else:
        found = blake2b(digest_size=DIGEST_BYTES)
        _feed(found, array)
        walk.put("data", found.digest())


def _feed(found: _Hash, array: np.ndarray[Any, Any]) -> None:
    """Update a hash with an array's items in C order; a copy has at most `_CHUNK_BYTES`, or one row."""
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
    """Return a text that identifies a dtype."""
    if dtype.names is not None:
        fields = [(name, *dtype.fields[name][1:], _described(dtype.fields[name][0])) for name in dtype.names]  # type: ignore[index]
        return f"{dtype.itemsize} {fields}"
    if dtype.subdtype is not None:
        return f"{dtype.shape} of {_described(dtype.subdtype[0])}"
    return dtype.str if dtype.num < _FIRST_OF_USERS else repr(dtype)


HANDLERS: dict[type, Callable[[Walk, Any], None]] = {
    tuple: digest_sequence,
    list: digest_sequence,
    dict: digest_mapping,
    MappingProxyType: digest_mapping,
    set: digest_set,
    frozenset: digest_set,
    memoryview: digest_memoryview,
    type(...): digest_constant,
    type(NotImplemented): digest_constant,
    **dict.fromkeys((TypeVar, ParamSpec, TypeVarTuple), digest_type_variable),
    np.ndarray: digest_array,
    np.memmap: digest_array,
    np.ma.MaskedArray: digest_masked,
    File: digest_file,
    type(os.environ): digest_environment,
    random.Random: digest_random,
    np.random.RandomState: digest_random,
    **dict.fromkeys((pathlib.PurePosixPath, pathlib.PureWindowsPath), digest_path),
    **dict.fromkeys((pathlib.PosixPath, pathlib.WindowsPath), digest_path),
}
BASES: tuple[tuple[type, Callable[[Walk, Any], None]], ...] = (
    (logging.Logger, digest_logger),
    (np.generic, digest_scalar),
    (np.dtype, digest_dtype),
)
