"""What a report says in words."""

from __future__ import annotations

import numpy as np
from reports import a_large_table, a_table

from forgepar.records.table import FailedAttempt, LayerRow
from forgepar.report.forecast import PlanRow
from forgepar.report.html import page
from forgepar.report.html.analysis import TaskIntervals
from forgepar.scheduling.run_state import Status

NAN = float("nan")
TIMES = "\N{MULTIPLICATION SIGN}"


def test_the_head_tells_the_runs_facts():
    table = a_table(status_of=np.array([Status.COMPLETED, Status.FAILED, Status.CACHED], np.int8))
    told = {fact.label: (fact.text, fact.note) for fact in page.facts(table, TaskIntervals.of(table))}
    assert told == {
        "wall time": ("6.00 s", "sum of tasks 5.50 s"),
        "tasks": ("3", "1 completed, 1 cached, 1 failed"),
        "workers": ("2", "busy 46% of the time"),
        "schedule": ("layers", "2 layers, a barrier between layers"),
        "CPU time": ("5.00 s", "of the workers"),
        "peak memory": ("1.0 MiB", "of the largest worker"),
        "began": ("2023-11-14", "22:13:20 UTC"),
    }


def test_what_is_not_known_is_said_so():
    table = a_table(peak_rss=0, n_workers=0, wall_seconds=0.0)
    told = {fact.label: (fact.text, fact.note) for fact in page.facts(table, TaskIntervals.of(table))}
    assert told["peak memory"][0] == "unknown"
    assert told["workers"] == ("0", "")


def test_failures_that_ended_a_task_come_first():
    failures = [
        FailedAttempt(0, 1, NAN, NAN, -1, "OSError: once", ""),
        FailedAttempt(1, 2, 0.5, 1.0, 1, "ValueError: twice\nmore", "Traceback: all of it"),
    ]
    status = np.array([Status.COMPLETED, Status.FAILED, Status.SKIPPED], np.int8)
    table = a_table(status_of=status, attempt=np.array([2, 2, 0], np.int32), failures=failures)
    first, second = page.failure_lines(table)
    assert (first.name, first.error, first.is_final) == ("load-1", "ValueError: twice", True)
    assert first.where == "attempt 2, layer 0, worker 1, after 1.00 s"
    assert first.traceback == "Traceback: all of it"
    assert (second.name, second.where, second.is_final) == ("load-0", "attempt 1, layer 0", False)
    assert page.n_failures(table) == 2


def test_an_error_of_which_no_attempt_is_known_is_told_all_the_same():
    status = np.array([Status.COMPLETED, Status.FAILED, Status.SKIPPED], np.int8)
    table = a_table(status_of=status, errors={1: "ValueError: x"})
    (line,) = page.failure_lines(table)
    assert (line.name, line.error, line.traceback, line.is_final) == ("load-1", "ValueError: x", "", True)
    assert page.n_failures(table) == 1


def test_many_failures_and_long_tracebacks_are_cut():
    failures = [FailedAttempt(1, 1, NAN, NAN, -1, "E: " + "m" * 1000, "t" * 100_000)] * 500
    table = a_table(failures=failures)
    lines = page.failure_lines(table)
    assert (len(lines), page.n_failures(table)) == (page.MOST_FAILURES, 500)
    assert all(len(line.traceback) < 21_000 and "80,000 characters left out" in line.traceback for line in lines)
    assert all(len(line.error) == 300 for line in lines)


def test_a_long_path_is_told_by_its_longest_tasks_in_order():
    table = a_large_table(60, 4)
    path = list(range(0, 240, 4))
    shown = page.path_shown(table, path)
    assert len(shown) == page.MOST_PATH
    assert shown == sorted(shown)
    assert min(table.seconds[shown]) >= max(table.seconds[sorted(set(path) - set(shown))])
    assert page.path_shown(table, path[:3]) == path[:3]


def test_of_many_layers_those_with_the_longest_walls_are_drawn():
    rows = [LayerRow(i, 1, float(i % 7), 1.0, "x", 1.0) for i in range(300)]
    shown = page.layers_shown(rows)
    assert len(shown) == page.MOST_LAYERS
    assert [row.layer for row in shown] == sorted(row.layer for row in shown)
    assert {row.wall_seconds for row in shown} == {2.0, 3.0, 4.0, 5.0, 6.0}


def test_other_numbers_of_workers_are_told_against_one():
    lines = page.plan_lines(a_table(), [PlanRow(1, 8.0, 8.0), PlanRow(2, 4.0, 2.0), PlanRow(4, 0.0, 0.0)])
    assert [(line.layered, line.layered_times, line.eager_times, line.is_measured) for line in lines] == [
        ("8.00 s", f"1.0{TIMES}", f"1.0{TIMES}", False),
        ("4.00 s", f"2.0{TIMES}", f"4.0{TIMES}", True),
        ("0 s", "", "", False),
    ]
    assert page.plan_workers(a_table(n_workers=6)) == [1, 2, 4, 6, 8, 16, 32, 64, 128]
