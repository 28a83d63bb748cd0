"""`WorkflowExecutor` and `Workflow.run`: arguments, results, summaries."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

import forgepar as fp
from forgepar.records.result import LayerRow


@pytest.fixture
def executor():
    with fp.WorkflowExecutor(backend="inline") as executor:
        yield executor


@pytest.fixture
def wf():
    wf = fp.Workflow("nightly")
    loaded = wf.map(fp.task(int).options(name="load"), ["1", "2", "3"])
    wf.add(fp.task(sum).options(name="join"), loaded)
    return wf


def test_workflow_run_takes_both_sets_of_arguments(wf):
    result = wf.run(workers=1, backend="inline", outputs="all", fail_fast=False)
    assert result["load-1"] == 2
    assert result["join"] == 6


def test_workflow_run_refuses_an_unknown_argument(wf):
    with pytest.raises(TypeError, match="speed"):
        wf.run(backend="inline", speed=9)


@pytest.mark.parametrize("schedule", ["greedy", None])
def test_an_unknown_schedule(executor, wf, schedule):
    with pytest.raises(ValueError, match=r"schedule must be one of 'layers', 'eager', got"):
        executor.run(wf, schedule=schedule)


@pytest.mark.parametrize("outputs", ["no-such-task", ["join", "no-such-task"]])
def test_outputs_that_are_not_there(executor, wf, outputs):
    with pytest.raises(fp.UnknownTask, match="'no-such-task'"):
        executor.run(wf, outputs=outputs)


def test_outputs_of_another_workflow(executor, wf):
    other = fp.Workflow("other")
    foreign = other.map(abs, [1, 2])
    for outputs in (foreign, foreign[0], [foreign], [foreign[1]]):
        with pytest.raises(fp.ForeignHandle, match="'other'"):
            executor.run(wf, outputs=outputs)


def test_a_workflow_grows_between_runs(executor, wf):
    assert executor.run(wf)["join"] == 6
    doubled = wf.add(lambda x: 2 * x, wf.handle("join"))
    result = executor.run(wf)
    assert result[doubled] == 12
    assert len(result.records) == 5


def test_records_are_a_sequence(executor, wf):
    records = executor.run(wf).records
    assert [record.name for record in records] == ["load-0", "load-1", "load-2", "join"]
    assert records[-1].name == "join"
    assert [record.layer for record in records[1:]] == [0, 0, 1]
    with pytest.raises(IndexError):
        records[4]


def test_layer_table_puts_wall_beside_the_longest_task(executor, wf):
    rows = executor.run(wf).layer_table()
    assert [(row.layer, row.n_tasks) for row in rows] == [(0, 3), (1, 1)]
    for row in rows:
        assert isinstance(row, LayerRow)
        assert row.longest_seconds <= row.work_seconds <= row.wall_seconds + 1e-9
    assert rows[0].longest_task.startswith("load-")


def test_summary_tells_counts_layers_and_failures(executor, wf):
    wf.add(fp.task(lambda: 1 // 0).options(name="bad"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf, fail_fast=False)
    text = caught.value.result.summary()
    assert "workflow 'nightly': 4 completed, 1 failed" in text
    assert "failed: bad: ZeroDivisionError" in text
    assert repr(caught.value.result) == "<RunResult of 'nightly': 4 completed, 1 failed>"


def test_a_failure_can_be_split_and_keeps_its_result(executor, wf):
    wf.add(lambda: 1 // 0)
    wf.add(lambda: [][1])
    values = []
    try:
        executor.run(wf, fail_fast=False)
    except* ZeroDivisionError as part:
        values.append(part.result["join"])
    except* IndexError as part:
        values.append(part.result["join"])
    assert values == [6, 6]


def test_values_are_the_same_object_at_each_look(executor):
    wf = fp.Workflow()
    handle = wf.add(list, "abc")
    result = executor.run(wf)
    assert result[handle] is result[handle]


def test_large_results_outlive_the_executor():
    wf = fp.Workflow()
    handle = wf.add(np.arange, 100_000)
    result = wf.run(workers=1)
    np.testing.assert_array_equal(result[handle], np.arange(100_000))
    assert not result[handle].flags.writeable


def test_an_unknown_name_and_a_result_by_list(executor, wf):
    result = executor.run(wf, outputs="all")
    assert result[["join", "load-0"]] == [6, 1]
    with pytest.raises(fp.UnknownTask, match="'nope'"):
        result["nope"]


def test_errors_survive_pickling_with_their_notes(executor):
    wf = fp.Workflow()
    wf.add(lambda: int("x"))
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf)
    copy = pickle.loads(pickle.dumps(caught.value.exceptions[0]))
    assert "task 'lambda'" in copy.__notes__[0]


def test_an_interrupt_in_a_task_leaves_inline(executor):
    def interrupt():
        raise KeyboardInterrupt

    wf = fp.Workflow()
    wf.add(interrupt)
    with pytest.raises(KeyboardInterrupt):
        executor.run(wf)
    other = fp.Workflow()
    handle = other.add(abs, -1)
    assert executor.run(other)[handle] == 1
