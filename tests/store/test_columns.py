"""Columns of a run store: what is packed comes back, and rows are inserted whatever their number."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.store.columns import insert_all, pack_integers, pack_texts, unpack_integers, unpack_texts


@given(st.lists(st.text()))
def test_texts_come_back(texts):
    assert unpack_texts(pack_texts(texts)) == texts


@given(st.lists(st.lists(st.integers(-(2**31), 2**31 - 1)), min_size=1))
def test_integers_come_back(columns):
    arrays = [np.array(column, np.int32) for column in columns]
    assert unpack_integers(pack_integers(*arrays)).tolist() == [number for column in columns for number in column]


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, 100])
def test_all_rows_are_inserted_whatever_their_number(n):
    with closing(sqlite3.connect(":memory:", isolation_level=None)) as connection:
        connection.execute("CREATE TABLE t(a PRIMARY KEY, b)")
        insert_all(connection, "t", [(i, i * i) for i in range(n)])
        insert_all(connection, "t", [(0, 0)][:n])
        assert connection.execute("SELECT * FROM t ORDER BY a").fetchall() == [(i, i * i) for i in range(n)]
