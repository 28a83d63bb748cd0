"""Rows and columns of a run store: how rows are inserted, checked, and how one column holds many texts or integers."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ROWS_PER_STATEMENT = 32

# Types of columns, for `check_columns`.
INTEGER: tuple[type, ...] = (int,)
NUMBER: tuple[type, ...] = (int, float)
TEXT: tuple[type, ...] = (str,)
NONE: tuple[type, ...] = (type(None),)
MOST_SECONDS = 250_000_000_000.0  # the largest time of a run: the year 9892, which `datetime` can still represent


def insert_all(connection: sqlite3.Connection, table: str, rows: Sequence[tuple[Any, ...]]) -> None:
    """Insert rows, or replace those with the same key.

    Several rows go into one statement, which takes two thirds of the time of one statement per row.

    Args:
        connection: of the store, within a transaction.
        table: its name.
        rows: of equal length.
    """
    if not rows:
        return
    form = f"({','.join('?' * len(rows[0]))})"
    insert = f'INSERT OR REPLACE INTO "{table}" VALUES '  # noqa: S608  (a name of this program)
    several = insert + ",".join([form] * _ROWS_PER_STATEMENT)
    n_full = len(rows) // _ROWS_PER_STATEMENT * _ROWS_PER_STATEMENT
    for first in range(0, n_full, _ROWS_PER_STATEMENT):
        connection.execute(several, list(chain.from_iterable(rows[first : first + _ROWS_PER_STATEMENT])))
    connection.executemany(insert + form, rows[n_full:])


def check_columns(rows: Sequence[tuple[Any, ...]], kinds: Sequence[tuple[type, ...]]) -> None:
    """Check that each column has only values of the types allowed for it.

    Raises:
        ValueError: one has not; the message has its position.
    """
    for place, (column, allowed) in enumerate(zip(zip(*rows, strict=True), kinds, strict=True) if rows else ()):
        if found := set(map(type, column)).difference(allowed):
            raise ValueError(f"column {place} of its rows has a {found.pop().__name__}")


def pack_texts(texts: Sequence[str]) -> bytes:
    """Return texts as the value of one column: compressed JSON."""
    return zlib.compress(json.dumps(list(texts), ensure_ascii=False).encode("utf-8", "surrogatepass"), 1)


def unpack_texts(data: bytes) -> list[str]:
    """Return the texts that `pack_texts` packed."""
    texts: list[str] = json.loads(zlib.decompress(data).decode("utf-8", "surrogatepass"))
    return texts


def plain_text(text: str) -> str:
    """Return a text that SQLite accepts: surrogates, as in file names that are not UTF-8, are escaped."""
    return text.encode("utf-8", "backslashreplace").decode()


def pack_integers(*columns: NDArray[np.integer[Any]]) -> bytes:
    """Return arrays of integers, concatenated, as the value of one column: compressed little-endian int32."""
    return zlib.compress(np.concatenate(columns).astype("<i4").tobytes(), 1)


def unpack_integers(data: bytes) -> NDArray[np.int32]:
    """Return the integers that `pack_integers` packed, as one array."""
    return np.frombuffer(zlib.decompress(data), "<i4").astype(np.int32)
