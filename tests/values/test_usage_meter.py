"""What several processes count adds up."""

from __future__ import annotations

import pytest

from forgepar.values.usage_meter import MeterRow, UsageMeter


@pytest.fixture
def columns(tmp_path):
    UsageMeter.create(str(tmp_path / "meter"), 3)
    return [UsageMeter(str(tmp_path / "meter"), 3, column) for column in range(3)]


def test_totals_are_over_all_columns(columns):
    for amount, column in enumerate(columns, 1):
        column.add(MeterRow.MADE, amount)
    columns[2].add(MeterRow.REMOVED, 2)
    assert {column.total(MeterRow.MADE) for column in columns} == {6}
    assert {column.held for column in columns} == {4}


def test_idle_is_what_was_kept_and_neither_used_nor_removed(columns):
    columns[0].add(MeterRow.RETIRED, 10)
    columns[1].add(MeterRow.REUSED, 3)
    columns[2].add(MeterRow.EVICTED, 4)
    assert columns[0].idle == 3


def test_the_peak_is_the_most_that_anyone_saw(columns):
    columns[1].add(MeterRow.MADE, 10)
    columns[1].see_peak(1 << 60)
    columns[2].add(MeterRow.REMOVED, 8)
    columns[0].see_peak(1 << 60)
    assert columns[2].peak == 10
    columns[0].reset_peak()
    assert columns[2].peak == 2


def test_without_a_file_a_process_counts_for_itself(tmp_path):
    meter = UsageMeter(str(tmp_path / "missing"), 1, 0)
    meter.add(MeterRow.MADE, 5)
    assert meter.held == 5
    assert list(tmp_path.iterdir()) == []


def test_a_new_process_goes_on_where_the_one_before_it_stopped(columns, tmp_path):
    columns[1].add(MeterRow.MADE, 5)
    again = UsageMeter(str(tmp_path / "meter"), 3, 1)
    again.add(MeterRow.MADE, 2)
    assert columns[0].held == 7
