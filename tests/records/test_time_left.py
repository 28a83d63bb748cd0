"""Estimates of the time left, from counts and durations."""

from __future__ import annotations

import math

import numpy as np
import pytest

import forgepar as fp
from forgepar.records import time_left
from forgepar.records.time_left import Groups, seconds_left


def left(layer, seconds, done, todo, *, workers=2, elapsed=10.0, ahead=()):
    columns = (np.array(layer), np.array(seconds, float), np.array(done), np.array(todo))
    return seconds_left(*columns, workers, elapsed, ahead)


def test_what_is_left_takes_as_long_as_what_is_done_took():
    # 10 s for 10 of 20 tasks, whatever they are said to take: a clock that is off by a factor does not matter.
    assert left([0], [2.0], [10], [10]) == pytest.approx(10.0)
    assert left([0], [0.5], [10], [10]) == pytest.approx(10.0)
    assert left([0], [2.0], [10], [30]) == pytest.approx(30.0)


def test_callables_count_by_their_own_durations():
    # Of one layer: 10 tasks of 1 s on 2 workers took the 5 s they should; 10 tasks of 8 s are left.
    assert left([0, 0], [1.0, 8.0], [10, 0], [0, 10], elapsed=5.0) == pytest.approx(40.0)


def test_a_narrow_layer_takes_a_round_however_many_workers_there_are():
    # A chain of 5 tasks of 1 s, 2 of them done in 2 s: eight workers do not make the others quicker.
    assert left(range(5), [1.0] * 5, [1, 1, 0, 0, 0], [0, 0, 1, 1, 1], workers=8, elapsed=2.0) == pytest.approx(3.0)
    assert left([0, 1], [1.0, 1.0], [8, 0], [0, 9], workers=8, elapsed=1.0) == pytest.approx(2.0)


def test_overhead_is_part_of_what_is_left():
    # Tasks of 1 us that are done at a hundredth of the speed that they would allow.
    assert left([0], [1e-6], [50_000], [50_000], elapsed=2.5) == pytest.approx(2.5, rel=0.1)


def test_what_runs_already_is_taken_off():
    # Rounds of 10 s; both workers are 5 s into the second of three.
    assert left([0], [10.0], [2], [4], elapsed=15.0, ahead=[5.0, 5.0]) == pytest.approx(15.0)


def test_one_that_runs_for_ever_does_not_make_it_negative():
    assert left([0], [1.0], [1], [1], elapsed=1000.0, ahead=[999.0]) >= 0


def test_while_nothing_is_known_nothing_is_told():
    assert math.isnan(left([0], [math.nan], [0], [10]))
    assert math.isnan(left([0], [1.0], [1], [10], elapsed=math.nan))
    assert left([0], [1.0], [10], [0]) == 0.0


def test_groups_count_each_status_by_layer_and_template():
    groups = Groups(np.array([0, 0, 1, 1, 1], np.int32), np.array([0, 1, 1, 1, 0], np.int32))
    counts = groups.counts(np.array([2, 0, 2, 3, 1], np.int8))
    found = {(a, b): row.tolist() for a, b, row in zip(groups.layer, groups.template, counts, strict=True)}
    assert found == {
        (0, 0): [0, 0, 1, 0, 0, 0, 0, 0],
        (0, 1): [1, 0, 0, 0, 0, 0, 0, 0],
        (1, 0): [0, 1, 0, 0, 0, 0, 0, 0],
        (1, 1): [0, 0, 1, 1, 0, 0, 0, 0],
    }


def test_a_table_that_is_done_has_no_time_left():
    wf = fp.Workflow("w")
    wf.map(abs, wf.map(abs, range(6)))
    table = wf.run(backend="inline").table()
    groups = Groups(table.layer, table.callable_of)
    assert time_left.of_table(table, groups, groups.counts(table.status_of)) == 0.0


def test_the_first_start_is_unknown_until_a_task_starts():
    assert time_left.first_start(np.array([math.nan, 3.0, 2.0])) == 2.0
    assert math.isnan(time_left.first_start(np.array([math.nan])))
