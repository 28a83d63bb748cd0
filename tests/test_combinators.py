"""Shapes declared in one call."""

from __future__ import annotations

import math

import pytest
from conftest import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp


def double(x):
    return 2 * x


def add(a, b):
    return a + b


# Chains


def test_a_sequence_hands_values_on(either_backend):
    wf = fp.Workflow()
    last = fp.sequence(wf, wf.add(int, "3"), double, fp.task(double).options(name="again"), str)
    assert wf.execution_layers() == [["int"], ["double"], ["again"], ["str"]]
    assert wf.run(**either_backend)[last] == "12"


def test_a_sequence_without_steps_is_refused():
    with pytest.raises(fp.WorkflowError, match="has no steps"):
        fp.sequence(fp.Workflow(), 1)


# Side by side


def test_parallel_tasks_run_side_by_side(tmp_path):
    def meet(mine, other):
        (tmp_path / mine).touch()
        wait_until((tmp_path / other).exists, "the other task, beside this one")
        return mine

    wf = fp.Workflow()
    gate = wf.add(abs, 1)
    both = fp.ParallelTasks([(meet, "a", "b"), (meet, "b", "a")]).add_to(wf, after=[gate])
    joined = wf.add("".join, both)
    assert wf.execution_layers() == [["abs"], ["meet", "meet-1"], ["join"]]
    assert wf.run(workers=2)[joined] == "ab"


def test_parallel_tasks_fail_fast(either_backend):
    def fail():
        raise ValueError("no")

    wf = fp.Workflow()
    both = fp.parallel(wf, fail, (abs, -1))
    wf.add(sum, both)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**either_backend)
    assert [type(error) for error in caught.value.exceptions] == [ValueError]
    assert caught.value.result.status_counts()["cancelled"] >= 1


def test_what_they_wait_for_is_added_to_what_they_waited_for():
    wf = fp.Workflow()
    a, b = wf.add(abs, 1), wf.add(abs, 2)
    fp.ParallelTasks([fp.task(double).options(after=a)]).add_to(wf, after=[b])
    assert wf.plan().graph.successors(a.index).tolist() == wf.plan().graph.successors(b.index).tolist() == [2]


@pytest.mark.parametrize("calls", [[], [3], [()], [(3, abs)]])
def test_what_is_no_task_is_refused(calls):
    with pytest.raises(fp.WorkflowError, match=r"has no tasks|is no task"):
        fp.ParallelTasks(calls).add_to(fp.Workflow())


# Trees


@given(st.integers(1, 200), st.integers(2, 9))
@settings(deadline=None)
def test_map_reduce_is_a_tree_of_the_least_depth(n, fan_in):
    wf = fp.Workflow()
    fp.map_reduce(wf, double, range(n), sum, fan_in=fan_in)
    layers = wf.execution_layers()
    assert len(layers[0]) == n
    widths = [len(layer) for layer in layers[1:]]
    assert widths[-1] == 1
    assert all(after == math.ceil(before / fan_in) for before, after in zip([n, *widths], widths, strict=False))


def test_map_reduce_keeps_the_order_of_items(either_backend):
    wf = fp.Workflow()
    text = fp.map_reduce(wf, str, range(30), "".join, fan_in=4)
    one = fp.map_reduce(wf, str, [7], "".join)
    result = wf.run(**either_backend)
    assert result[text] == "".join(map(str, range(30)))
    assert result[one] == "7"


def test_map_reduce_of_nothing_is_refused():
    with pytest.raises(fp.WorkflowError, match="no items"):
        fp.map_reduce(fp.Workflow(), abs, [], sum)
    with pytest.raises(fp.WorkflowError, match="fan_in=1"):
        fp.map_reduce(fp.Workflow(), abs, [1], sum, fan_in=1)


# Workflows in workflows


def diamond(name="diamond"):
    wf = fp.Workflow(name)
    top = wf.add(fp.task(abs).options(name="top"), -1)
    sides = wf.map(add, [top, top], [10, 20])
    wf.add(fp.task(sum).options(name="bottom", retries=1, after=top), sides)
    return wf


def test_an_included_workflow_keeps_its_shape_under_its_name(either_backend):
    outer = fp.Workflow()
    outer.add(abs, -5)
    inner = diamond()
    once, twice = outer.include(inner), outer.include(inner)
    last = outer.add(add, once["bottom"], twice[inner.handle("bottom")])
    assert outer.execution_layers() == [
        ["abs", "diamond/top", "diamond-1/top"],
        ["diamond/add-0", "diamond/add-1", "diamond-1/add-0", "diamond-1/add-1"],
        ["diamond/bottom", "diamond-1/bottom"],
        ["add"],
    ]
    assert outer.run(**either_backend)[last] == 64
    assert list(once) == ["top", "add-0", "add-1", "bottom"]
    assert inner.execution_layers() == [["top"], ["add-0", "add-1"], ["bottom"]]


def test_tasks_may_be_bound_to_handles_and_values(either_backend):
    outer = fp.Workflow()
    five = outer.add(abs, -5)
    bound = outer.include(diamond(), top=five, prefix="by-handle")
    given = outer.include(diamond(), {"add-0": 100}, prefix="by-value")
    result = outer.run(**either_backend, outputs="all")
    assert result[bound["bottom"]] == 15 + 25
    assert result[given["bottom"]] == 100 + 21
    assert bound["top"].index == five.index
    assert "by-handle/top" not in [name for layer in outer.execution_layers() for name in layer]


def test_branches_are_included_too(either_backend):
    inner = fp.Workflow("inner")
    flag = inner.add(fp.task(bool).options(name="flag"), 0)
    inner.add(
        fp.task(str).options(name="last"), fp.when(inner, flag, lambda: inner.add(abs, -1), lambda: inner.add(abs, -2))
    )
    for value, expected in ((True, "1"), (False, "2")):
        outer = fp.Workflow()
        included = outer.include(inner, flag=outer.add(bool, value))
        assert outer.run(**either_backend)[included["last"]] == expected


def test_what_does_not_fit_is_refused():
    outer, inner = fp.Workflow("outer"), diamond()
    with pytest.raises(fp.UnknownTask, match="no task named 'nothing'"):
        outer.include(inner, nothing=1)
    outer.include(inner, prefix="x")
    with pytest.raises(fp.DuplicateTaskName, match="prefix 'x'"):
        outer.include(inner, prefix="x")
    with pytest.raises(fp.ForeignHandle):
        outer.include(inner, top=fp.Workflow().add(abs, 1))
    with pytest.raises(fp.WorkflowError, match="cannot include itself"):
        outer.include(outer)


@st.composite
def random_workflows(draw):
    n = draw(st.integers(1, 15))
    return [
        (
            draw(st.lists(st.integers(0, i - 1), max_size=3)) if i else [],
            draw(st.lists(st.integers(0, i - 1), max_size=2)) if i else [],
            draw(st.booleans()),
        )
        for i in range(n)
    ]


def declare(wf, rows, prefix=""):
    handles = []
    for number, (takes, after, is_named) in enumerate(rows):
        name = f"{prefix}named-{number}" if is_named else None
        function = fp.task(lambda *values, number=number: (number, values))
        options = function.options(name=name or f"{prefix}f{number}", after=[handles[i] for i in after])
        handles.append(wf.add(options, number, [handles[i] for i in takes]))
    return handles


@pytest.fixture(scope="module")
def executor():
    with fp.WorkflowExecutor(backend="inline") as executor:
        executor._backend.open()
        yield executor


@settings(deadline=None, max_examples=50)
@given(random_workflows())
def test_to_include_is_to_declare_by_hand(executor, rows):
    inner, outer, by_hand = fp.Workflow("inner"), fp.Workflow(), fp.Workflow()
    handles = declare(inner, rows)
    outer.add(abs, 1)
    by_hand.add(abs, 1)
    included = outer.include(inner)
    expected = declare(by_hand, rows, "inner/")
    assert outer.execution_layers() == by_hand.execution_layers()
    first, second = executor.run(outer, outputs="all"), executor.run(by_hand, outputs="all")
    assert [first[included[handle]] for handle in handles] == second[expected]
