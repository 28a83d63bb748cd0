"""The board: rows that several processes see at once, and marks that grow."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.backends.worker_board import LIMIT, NO_LIMIT, POSITION, STARTED, Board, mark, unmark

batches = st.integers(0, 2**31 - 1)
positions = st.integers(0, 2**32 - 1)


@given(batches, positions)
def test_marks_lead_back(batch, position):
    assert unmark(mark(batch, position)) == (batch, position)


@given(st.tuples(batches, positions), st.tuples(batches, positions))
def test_marks_are_ordered_as_batches_then_positions(one, other):
    assert (mark(*one) < mark(*other)) == (one < other)


@given(batches, positions)
def test_marks_fit_a_word_below_the_absence_of_a_limit(batch, position):
    assert 0 <= mark(batch, position) <= NO_LIMIT
    assert NO_LIMIT.bit_length() == 63


def test_a_new_board_limits_nobody(tmp_path):
    board = Board.create(tmp_path / "board", 3)
    for slot in range(3):
        assert board.integers(slot)[LIMIT] == NO_LIMIT
        assert board.integers(slot)[POSITION] == 0


def test_a_board_of_one_process_needs_no_file():
    board = Board.alone(2)
    assert [board.integers(slot)[LIMIT] for slot in range(2)] == [NO_LIMIT] * 2
    board.integers(0)[POSITION] = 7
    assert board.integers(1)[POSITION] == 0
    board.run[0] = 3
    assert (board.integers(1)[POSITION], board.run[0]) == (0, 3)


def test_what_one_writes_the_other_reads(tmp_path):
    mine = Board.create(tmp_path / "board", 2)
    yours = Board(tmp_path / "board")
    mine.integers(1)[LIMIT] = mark(5, 7)
    yours.integers(1)[POSITION] = mark(5, 6)
    yours.floats(1)[STARTED] = 0.25
    assert yours.integers(1)[LIMIT] == mark(5, 7)
    assert mine.integers(1)[POSITION] == mark(5, 6)
    assert mine.floats(1)[STARTED] == 0.25


def test_rows_are_apart(tmp_path):
    board = Board.create(tmp_path / "board", 3)
    board.integers(1)[POSITION] = board.integers(1)[LIMIT] = 9
    board.floats(1)[STARTED] = 9.0
    for slot in (0, 2):
        row = board.integers(slot)
        assert (row[POSITION], row[STARTED], row[LIMIT]) == (0, 0, NO_LIMIT)


def test_a_reset_clears_one_row(tmp_path):
    board = Board.create(tmp_path / "board", 2)
    for slot in range(2):
        board.integers(slot)[POSITION] = board.integers(slot)[LIMIT] = 9
    board.reset(0)
    assert (board.integers(0)[POSITION], board.integers(0)[LIMIT]) == (0, NO_LIMIT)
    assert (board.integers(1)[POSITION], board.integers(1)[LIMIT]) == (9, 9)


def test_a_row_fills_a_cache_line(tmp_path):
    Board.create(tmp_path / "board", 5)
    assert (tmp_path / "board").stat().st_size == (5 + 1) * 64  # the last is the run's


def test_a_board_is_made_once(tmp_path):
    Board.create(tmp_path / "board", 1)
    with pytest.raises(FileExistsError):
        Board.create(tmp_path / "board", 1)
