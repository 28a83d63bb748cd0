"""Tasks that are known only when the workflow runs: they join it as if they had been declared."""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.records.events import WorkflowTasksAdded
from forgepar.values.codec import BLOB_LIMIT
from forgepar.workflow.plan import Plan


def numbers(n):
    return list(range(n))


def scaled(x, factor=1):
    return x * factor


def failure_of(wf, **rules) -> fp.WorkflowFailed:
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    return caught.value


# Fan-out over a list that a task makes


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@pytest.mark.parametrize("n", [0, 1, 300])
def test_a_map_over_a_list_known_only_at_run_time(either_backend, schedule, n):
    wf = fp.Workflow()
    listed = wf.add(numbers, n)
    mapped = wf.map(scaled, listed, factor=3)
    total = wf.add(sum, mapped)
    assert isinstance(mapped, fp.TaskHandle)
    result = wf.run(**either_backend, schedule=schedule)
    assert result[total] == 3 * sum(range(n))
    assert result.ok
    assert len(result.records) == 3 + n + 1
    if n:
        record = result.record(f"scaled/scaled-{n - 1}")
        assert (record.layer, record.status, record.attempt) == (2, "completed", 1)
        assert result.record(total).layer == 4
    (event,) = [event for event in result.events if isinstance(event, WorkflowTasksAdded)]
    assert (event.task, event.task_count, event.layer_count) == ("scaled", n + 1, 5 if n else 4)


def test_several_lists_and_plain_ones_go_side_by_side(either_backend):
    wf = fp.Workflow()
    both = wf.map(pow, wf.add(numbers, 4), [2, 2, 3, 3])
    assert wf.run(**either_backend)[both] == [0, 1, 8, 27]


def test_the_functions_options_are_those_of_the_tasks_to_come(either_backend, tmp_path):
    def second_time(i):
        path = tmp_path / str(i)
        if not path.exists():
            path.touch()
            raise OSError
        return fp.context().task, fp.context().attempt

    wf = fp.Workflow()
    first = wf.add(abs, 1)
    mapped = wf.map(fp.task(second_time).options(name="tried", retries=1, after=first), wf.add(numbers, 3))
    assert wf.run(**either_backend)[mapped] == [(f"tried/tried-{i}", 2) for i in range(3)]


@pytest.mark.parametrize("value", [3, None])
def test_what_is_no_list_fails_the_task(either_backend, value):
    wf = fp.Workflow()
    wf.map(abs, wf.add(lambda: value))
    assert isinstance(failure_of(wf, **either_backend).exceptions[0], TypeError)


def test_items_may_be_large(either_backend):
    wf = fp.Workflow()
    arrays = wf.add(lambda: [np.full(BLOB_LIMIT, i) for i in range(5)])
    sums = wf.map(lambda array: int(array.sum()), arrays)
    made = wf.map(lambda i: np.full(BLOB_LIMIT, i), wf.add(numbers, 5))
    result = wf.run(**either_backend)
    assert result[sums] == [i * BLOB_LIMIT for i in range(5)]
    assert [int(array[0]) for array in result[made]] == [0, 1, 2, 3, 4]


def test_a_result_knows_all_outputs(either_backend):
    wf = fp.Workflow()
    mapped = wf.map(scaled, wf.add(numbers, 3))
    wf.add(len, mapped)
    assert wf.run(**either_backend, outputs="all")["scaled/scaled-2"] == 2
    assert wf.run(**either_backend, outputs=[mapped])[mapped] == [0, 1, 2]
    with pytest.raises(fp.ResultReleased):
        wf.run(**either_backend)[mapped]


# Workflows that tasks return


def countdown(n):
    """A task that returns a workflow of itself, so many times."""
    if not n:
        return "lift off"
    wf = fp.Workflow()
    return fp.Subflow(wf, (n, wf.add(countdown, n - 1)))


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_subflows_may_return_subflows(either_backend, schedule):
    wf = fp.Workflow()
    done = wf.add(countdown, 5)
    after = wf.add(lambda value: str(value), done)
    result = wf.run(**either_backend, schedule=schedule)
    assert result[after] == "(5, (4, (3, (2, (1, 'lift off')))))"
    assert result.record("countdown/countdown/countdown").layer == 2


def test_without_an_output_the_leaves_values_are_it(either_backend):
    def make():
        inner = fp.Workflow()
        first = inner.add(abs, -1)
        inner.add(abs, first)
        inner.add(abs, -2)
        return fp.Subflow(inner)

    wf = fp.Workflow()
    made = wf.add(make)
    assert wf.run(**either_backend)[made] == [1, 2]


def test_order_shapes_and_branches_work_inside(either_backend):
    def make():
        inner = fp.Workflow()
        log = []
        first = inner.add(abs, 1)
        second = inner.add(fp.task(abs).options(name="second", after=first), 2)
        value = fp.when(inner, first, lambda: inner.add(str, second), lambda: inner.add(abs, log))
        fallen = inner.add(fp.attempt(int, catch=lambda error: "fell"), "x")
        return fp.Subflow(inner, {"value": value, "fallen": [fallen]})

    wf = fp.Workflow()
    made = wf.add(make)
    result = wf.run(**either_backend)
    assert result[made] == {"value": "2", "fallen": ["fell"]}
    assert result.status_counts()["skipped"] == 1
    assert result.record("make/second").layer > result.record("make/abs").layer


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_a_failure_inside_is_one_of_the_run_and_all_is_undone(either_backend, tmp_path, schedule):
    def note(value):
        with (tmp_path / "undone").open("a") as file:
            file.write(f"{value}\n")

    def fail(_):
        raise ValueError("no")

    def make():
        inner = fp.Workflow()
        done = inner.map(fp.task(abs).options(compensate=note), [-1, -2])
        return fp.Subflow(inner, inner.add(fail, done))

    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(name="first", compensate=note), -3)
    wf.add(fp.task(make).options(after=first))
    failure = failure_of(wf, **either_backend, schedule=schedule)
    assert list(failure.result.errors) == ["make/fail"]
    assert sorted(failure.result.rollback.compensated) == ["first", "make/abs-0", "make/abs-1"]
    assert (tmp_path / "undone").read_text().splitlines()[-1] == "3"


def test_without_fail_fast_what_waits_for_a_broken_subflow_is_skipped(either_backend):
    def make():
        inner = fp.Workflow()
        return fp.Subflow(inner, inner.add(int, "x"))

    wf = fp.Workflow()
    made = wf.add(make)
    after = wf.add(abs, made)
    other = wf.add(abs, -7)
    result = failure_of(wf, **either_backend, fail_fast=False).result
    assert result[other] == 7
    assert result.record(after).skipped_for == "make/int"


def cyclic():
    inner = fp.Workflow()
    a, b = inner.add(abs, 1), inner.add(abs, 2)
    inner.add_dependency(a, after=b)
    inner.add_dependency(b, after=a)
    return fp.Subflow(inner)


def too_large():
    inner = fp.Workflow()
    inner.add(fp.task(abs).options(memory="900TiB"), 1)
    return fp.Subflow(inner)


def locked():
    inner = fp.Workflow()
    inner.add(abs, threading.Lock())
    return fp.Subflow(inner)


@pytest.mark.parametrize(
    ("make", "kind"),
    [(cyclic, fp.CyclicWorkflow), (too_large, fp.InsufficientMemory), (locked, fp.UnpicklableResult)],
)
def test_a_subflow_that_cannot_run_fails_its_task_alone(either_backend, make, kind):
    wf = fp.Workflow()
    bad = wf.add(make)
    after = wf.add(abs, bad)
    good = wf.add(countdown, 2)
    result = failure_of(wf, **either_backend, fail_fast=False).result
    assert isinstance(result.errors[bad.name], kind)
    assert result.record(after).status == "skipped"
    assert result[good] == (2, (1, "lift off"))


def test_what_is_no_workflow_is_refused():
    with pytest.raises(fp.WorkflowError, match="workflow must be a Workflow, got"):
        fp.Subflow([1, 2])


def test_a_subflow_uses_workers_that_the_start_did_not_need():
    """The declared layers are one task wide, so one worker is started; those that join are two wide."""

    def meet(i, folder):
        (folder / str(i)).touch()
        from conftest import wait_until

        wait_until((folder / str(1 - i)).exists, "the other task, beside this one")
        return os.getpid()

    wf = fp.Workflow()

    def make(folder):
        inner = fp.Workflow()
        return fp.Subflow(inner, inner.map(meet, [0, 1], [folder] * 2))

    import pathlib
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        made = wf.add(make, pathlib.Path(folder))
        assert len(set(wf.run(workers=2)[made])) == 2


def test_a_worker_killed_inside_disturbs_nothing(tmp_path):
    def die_once(i):
        path = tmp_path / str(i)
        if i % 7 == 0 and not path.exists():
            path.touch()
            os._exit(1)
        return i

    wf = fp.Workflow()
    mapped = wf.map(fp.task(die_once).options(retries=1), wf.add(numbers, 50))
    assert wf.run(workers=2)[mapped] == list(range(50))


# The plan, beside one declared at once


@st.composite
def trees(draw):
    """A nest of lists: a list is a task that returns a workflow of a task an item, a number one that returns that."""
    return draw(st.recursive(st.integers(0, 9), lambda inner: st.lists(inner, max_size=4), max_leaves=15))


def grow(tree):
    if isinstance(tree, int):
        return tree
    wf = fp.Workflow()
    return fp.Subflow(wf, [wf.add(grow, part) for part in tree])


@pytest.fixture(scope="module")
def executor():
    with fp.WorkflowExecutor(backend="inline") as executor:
        executor._backend.open()
        yield executor


@settings(deadline=None, max_examples=50)
@given(st.lists(trees(), min_size=1, max_size=3), st.sampled_from(["layers", "eager"]))
def test_nested_subflows_give_the_nested_value_in_the_right_layers(executor, forest, schedule):
    wf = fp.Workflow()
    roots = [wf.add(grow, tree) for tree in forest]
    total = wf.add(lambda *values: list(values), *roots)
    result = executor.run(wf, schedule=schedule)
    assert result[total] == forest
    assert result.ok
    started = {event.task: event for event in result.events if isinstance(event, WorkflowTasksAdded)}
    for record in result.records:
        parent, _, _ = record.name.rpartition("/")
        if parent:
            assert parent in started
            assert record.layer > result.record(parent).layer


def test_splicing_leaves_the_old_plan_as_it_was():
    wf = fp.Workflow()
    first = wf.add(abs, 1)
    wf.add(abs, first)
    plan = Plan(wf)
    inner = fp.Workflow()
    inner.add(str, 5)
    before = (plan.n_tasks, plan.references.tolist(), len(plan.templates), list(plan.constants))
    new = plan.spliced(0, inner)
    assert (plan.n_tasks, plan.references.tolist(), len(plan.templates), list(plan.constants)) == before
    assert new.n_tasks == 3
    assert new.references.tolist() == [2]
    assert new.layers.tolist() == [0, 2, 1]
    assert [new.name(i) for i in range(3)] == ["abs", "abs-1", "abs/str"]
    assert new.find("abs/str") == 2
