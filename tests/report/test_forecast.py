"""What a run would take: against the run's own state machine, cases by hand, and what runs measured."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest

import forgepar as fp
from forgepar.errors import WorkflowFailed
from forgepar.records.table import FailedAttempt
from forgepar.report.forecast import Delays, Forecast, parse_workers, plan_table, plan_text
from forgepar.report.simulate import simulated_seconds

NONE = Delays()


def timed(workflow: fp.Workflow, seconds, **changes):
    """The table of a run of a workflow as if its tasks had taken so long."""
    table = workflow.run(backend="inline").table()
    # Of an eager run the order within a layer is the plan's, whatever the clock said.
    return replace(table, seconds=np.array(seconds, np.float64), schedule="eager", **changes)


def random_workflow(chance: random.Random) -> fp.Workflow:
    wf, n = fp.Workflow(), chance.randrange(1, 60)
    handles = wf.map(abs, range(n))
    handles = [*handles, *wf.map(int, range(n))]
    for later in range(1, 2 * n):
        for earlier in chance.sample(range(later), min(later, chance.randrange(3))):
            wf.add_dependency(handles[later], after=handles[earlier])
    return wf


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_it_agrees_with_the_runs_own_state_machine(seed, schedule):
    chance = random.Random(seed)
    wf = random_workflow(chance)
    seconds = [chance.uniform(0.1, 5.0) for _ in range(len(wf))]
    forecast = Forecast(timed(wf, seconds), NONE)
    for workers in (1, 2, 3, 7, 200):
        expected = simulated_seconds(wf.plan(), seconds, workers, schedule)
        assert forecast.seconds(workers, schedule) == pytest.approx(expected), workers


def chain_and_crowd():
    """A chain of two beside three tasks on their own."""
    wf = fp.Workflow()
    wf.add(abs, wf.add(abs, 1))
    wf.map(int, range(3))
    return wf


@pytest.mark.parametrize(
    ("workers", "schedule", "expected"),
    [(1, "layers", 9.0), (2, "layers", 4 + 2), (8, "layers", 3 + 2), (2, "eager", 5.0), (8, "eager", 5.0)],
)
def test_a_case_by_hand(workers, schedule, expected):
    # The chain takes 3 and 2; the others 1, 1 and 2: with two workers and barriers 3 + 1 beside 1 + 2, then 2.
    assert Forecast(timed(chain_and_crowd(), [3, 2, 1, 2, 1]), NONE).seconds(workers, schedule) == expected


def test_delays_count_where_they_stood():
    table = timed(chain_and_crowd(), [3, 2, 1, 2, 1])
    delays = Delays(head=100, following=0.5, woken=0.25, tail=1000)
    # Two workers, by layers: 3 + 0.5 + 1 is the longest; then a barrier, and 2.
    assert Forecast(table, delays).seconds(2, "layers") == 1100 + 4.5 + 0.25 + 2
    # Eager: the second of the chain was ready when its worker was done with the first, and not before.
    assert Forecast(table, delays).seconds(2, "eager") == 1100 + 3 + 0.25 + 2


def test_delays_are_measured():
    wf = chain_and_crowd()
    columns = {
        "worker": np.array([0, 0, 1, 1, 1], np.int32),
        "start": np.array([1.0, 7.5, 1.0, 2.25, 4.5]),
        "wall_seconds": 10.0,
    }
    table = replace(timed(wf, [3, 2, 1, 2, 1], **columns), schedule="layers")
    # On worker 1 the tasks end at 2, 4.25 and 5.5, and the next begin 0.25 later; the layer ends at 5.5, the next
    # begins at 7.5; the run ends half a second behind the last task.
    assert Delays.measured(table) == Delays(head=1.0, following=0.25, woken=2.0, tail=0.5, joining=(0.0,))
    # Laid out, the last of layer 0 goes to worker 0, which is free first, and ends at 1 + 4.25.
    assert Forecast(table).seconds(2, "layers") == 1 + 4.25 + 2 + 2 + 0.5
    # Without barriers the second of the chain could have begun at 4, when its worker was free: it waited for 3.5.
    following = (0.25 + 0.25 + 3.5) / 3
    assert Delays.measured(replace(table, schedule="eager")) == Delays(
        1.0, following, woken=0.0, tail=0.5, joining=(0.0,)
    )


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_workers_that_come_later_begin_later(schedule):
    wf = fp.Workflow()
    wf.map(abs, range(4))
    columns = {"worker": np.array([0, 1, 1, 0], np.int32), "start": np.array([1.0, 3.5, 4.5, 3.0])}
    table = replace(timed(wf, [2, 1, 1, 2], wall_seconds=6.0, **columns), schedule=schedule)
    assert Delays.measured(table) == Delays(1.0, 0.0, 0.0, 0.5, joining=(2.5,))
    forecast = Forecast(table)
    assert forecast.seconds(1, schedule) == 1 + 6 + 0.5
    assert forecast.seconds(2, schedule) == 1 + 4.5 + 0.5
    # A third comes when the second does.
    assert forecast.seconds(3, schedule) == 1 + 4 + 0.5


def test_tasks_that_did_not_run_take_no_time_and_no_worker():
    table = timed(chain_and_crowd(), [np.nan, 2, 1, np.nan, 1])
    assert Forecast(table, NONE).seconds(1, "layers") == 4
    assert Forecast(table, NONE).seconds(1, "eager") == 4
    assert Forecast(table, NONE).seconds(9, "eager") == 2


def test_a_run_in_which_nothing_ran_takes_what_it_took():
    table = timed(chain_and_crowd(), [np.nan] * 5, wall_seconds=0.75)
    assert [tuple(row) for row in plan_table(table, [1, 4])] == [(1, 0.75, 0.75), (4, 0.75, 0.75)]


def test_earlier_attempts_take_their_time_where_it_is_known():
    failed = [FailedAttempt(0, 1, 0.0, 10.0, 0, "x", ""), FailedAttempt(1, 1, np.nan, np.nan, -1, "x", "")]
    attempt = np.array([2, 2, 1, 1, 1], np.int32)
    table = timed(chain_and_crowd(), [3, 2, 1, 2, 1], attempt=attempt, failures=failed)
    assert Forecast(table, NONE).seconds(1, "layers") == 19


def test_a_failed_run_is_laid_out_as_far_as_it_got():
    wf = fp.Workflow()
    wf.add(abs, wf.add(int, wf.add(int, "x")))
    with pytest.raises(WorkflowFailed) as caught:
        wf.run(backend="inline")
    table = caught.value.result.table()
    (row,) = plan_table(table, [2])
    assert row.layered_seconds == pytest.approx(table.wall_seconds)


def test_workers_below_one_are_refused():
    with pytest.raises(ValueError, match=r"^workers must be an integer of at least 1, got 0\.$"):
        plan_table(timed(chain_and_crowd(), [1] * 5), [0])


def test_more_workers_never_make_layers_slower_where_nothing_is_added():
    chance = random.Random(7)
    wf = random_workflow(chance)
    rows = plan_table(timed(wf, [chance.uniform(1, 2) for _ in range(len(wf))]), parse_workers("1..128"))
    assert [row.workers for row in rows] == [1, 2, 4, 8, 16, 32, 64, 128]
    walls = [row.layered_seconds for row in rows]
    assert walls == sorted(walls, reverse=True)


@pytest.mark.parametrize(
    ("text", "workers"),
    [
        ("4", [4]),
        ("1,2,8", [1, 2, 8]),
        ("1..128", [1, 2, 4, 8, 16, 32, 64, 128]),
        ("3..7", [3, 6, 7]),
        ("5..5", [5]),
        ("1..4,4,9", [1, 2, 4, 9]),
        (" 2 , 3", [2, 3]),
    ],
)
def test_numbers_of_workers_are_read(text, workers):
    assert parse_workers(text) == workers


@pytest.mark.parametrize("text", ["", "0", "-1", "x", "1..", "..4", "8..1", "1,,2", "1.5", "²", "9999999999", "1...3"])
def test_what_is_no_number_of_workers_is_refused(text):
    with pytest.raises(ValueError, match="workers") as caught:
        parse_workers(text)
    assert repr(text) in str(caught.value)


def test_the_table_is_told_in_lines():
    table = timed(chain_and_crowd(), [3, 2, 1, 2, 1], wall_seconds=6.0)
    head, columns, *lines = plan_text(table, plan_table(table, [1, 2])).splitlines()
    assert "measured 6 s on 1 workers" in head
    assert columns.split() == ["workers", "by", "layers", "eager", "barriers", "cost"]
    assert [line.split()[0] for line in lines] == ["1", "2"]
