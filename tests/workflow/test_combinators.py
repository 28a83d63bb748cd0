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
    with pytest.raises(fp.WorkflowError, match="needs at least one step after the value 1, got none"):
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
    fp.ParallelTasks([(fp.task(double).options(after=a), 1)]).add_to(wf, after=[b])
    assert wf.plan().graph.successors(a.index).tolist() == wf.plan().graph.successors(b.index).tolist() == [2]


def test_they_wait_for_one_handle_or_for_several():
    wf = fp.Workflow()
    first = wf.map(abs, range(3))
    for after in (first, list(first), first[0], [first[:1], first[1:]]):
        side = fp.ParallelTasks([(double, 1), (double, 2)]).add_to(wf, after=after)
        assert {handle.index for handle in side} <= set(wf.plan().graph.successors(first[0].index).tolist())


def test_they_may_be_declared_twice_however_they_were_given():
    wf, both = fp.Workflow(), fp.ParallelTasks((double, number) for number in range(2))
    assert [len(both.add_to(wf)) for _ in range(2)] == [2, 2]
    assert len({name for layer in wf.execution_layers() for name in layer}) == 4


@pytest.mark.parametrize("calls", [[], [3], [()], [(3, abs)]])
def test_what_is_no_task_is_refused(calls):
    with pytest.raises(
        fp.WorkflowError, match=r"calls must be .*functions, or tuples of a function and its arguments, got"
    ):
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


@pytest.mark.parametrize(("n", "names"), [(1, ["total"]), (4, ["total"]), (5, ["total-0", "total-1", "total"])])
def test_the_last_of_a_tree_has_the_name_that_was_given(n, names):
    wf = fp.Workflow()
    last = fp.map_reduce(wf, abs, range(n), fp.task(sum).options(name="total"), fan_in=4)
    assert [name for layer in wf.execution_layers()[1:] for name in layer] == names
    assert last == wf.handle("total")


def test_map_reduce_takes_handles_as_items():
    wf = fp.Workflow()
    rows = wf.map(abs, range(10))
    total = fp.map_reduce(wf, double, rows, sum, fan_in=3)
    assert wf.run(backend="inline")[total] == 90


def test_map_reduce_of_what_is_not_known_yet_is_refused():
    wf = fp.Workflow()
    items = wf.add(list, [1, 2])
    with pytest.raises(fp.WorkflowError, match=r"items must be known .*; got <TaskHandle 'list'>.*Workflow\.map"):
        fp.map_reduce(wf, abs, items, sum)


def test_map_reduce_of_nothing_is_refused():
    with pytest.raises(fp.WorkflowError, match=r"items must not be empty, got \[\]"):
        fp.map_reduce(fp.Workflow(), abs, [], sum)
    with pytest.raises(fp.WorkflowError, match="fan_in must be an integer of at least 2, got 1"):
        fp.map_reduce(fp.Workflow(), abs, [1], sum, fan_in=1)


# Workflows in workflows


def diamond(name="diamond"):
    wf = fp.Workflow(name)
    top = wf.add(fp.task(abs).options(name="top"), -1)
    sides = wf.map(add, [top, top], [10, 20])
    wf.add(fp.task(sum).options(name="bottom", retries=1, after=top), sides)
    return wf


def branched():
    """A workflow of which either `abs` or `abs-1` runs, as the value of `flag` says."""
    wf = fp.Workflow("inner")
    flag = wf.add(fp.task(bool).options(name="flag"), 0)
    either = fp.when(wf, flag, lambda: wf.add(abs, -1), lambda: wf.add(abs, -2))
    wf.add(fp.task(str).options(name="last"), either)
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
    inner = branched()
    for value, expected in ((True, "1"), (False, "2")):
        outer = fp.Workflow()
        included = outer.include(inner, flag=outer.add(bool, value))
        assert outer.run(**either_backend)[included["last"]] == expected


@pytest.mark.parametrize(("gate", "expected", "ran"), [([1, 2], "1", "abs"), ([], "2", "abs-1")])
def test_branches_whose_gates_are_bound_to_one_handle_are_decided_each(gate, expected, ran):
    outer, inner = fp.Workflow(), branched()
    decides = outer.add(list, gate)  # as by bool of it
    included = [outer.include(inner, condition=decides) for _ in range(2)]
    result = outer.run(backend="inline", outputs="all")
    assert [result[each["last"]] for each in included] == [expected] * 2
    skipped = {"abs", "abs-1"} - {ran}
    assert {result.record(each[name]).status for each in included for name in skipped} == {"skipped"}


def test_what_joins_branches_cannot_be_replaced():
    outer = fp.Workflow()
    with pytest.raises(fp.WorkflowError, match="'either' of 'inner' joins two branches"):
        outer.include(branched(), either=1)
    assert len(outer) == 0


def test_a_value_that_is_bound_has_the_name_of_the_task_that_it_replaces():
    outer = fp.Workflow()
    outer.include(diamond(), {"add-0": 100, "top": [1, 2]})
    names = {name for layer in outer.execution_layers() for name in layer}
    assert names == {f"diamond/{name}" for name in ("top", "add-0", "add-1", "bottom")}


def test_handles_of_a_map_are_found_together():
    inner, outer = fp.Workflow("inner"), fp.Workflow()
    rows = inner.map(double, range(4))
    outer.add(abs, 1)
    whole, in_part = outer.include(inner), outer.include(inner, {"double-1": 7})
    assert isinstance(whole[rows], fp.TaskHandles)
    sums = [outer.add(list, whole[rows]), outer.add(list, in_part[rows]), outer.add(list, whole[rows[:0]])]
    result = outer.run(backend="inline")
    assert [result[handle] for handle in sums] == [[0, 2, 4, 6], [0, 7, 4, 6], []]
    with pytest.raises(fp.ForeignHandle):
        whole[outer.map(abs, [1])]


def test_prefixes_are_numbered_on():
    outer, inner = fp.Workflow(), diamond("a/b")
    outer.add(fp.task(abs).options(name="a/b-2/mine"), 1)
    for _ in range(3):
        outer.include(inner)
    tops = [name for name in outer.execution_layers()[0] if name.endswith("top")]
    assert tops == ["a/b/top", "a/b-1/top", "a/b-3/top"]
    assert outer.has_prefix("a")
    assert not outer.has_prefix("b")


def test_an_included_workflow_is_as_it_was_then():
    outer, inner = fp.Workflow(), diamond()
    included = outer.include(inner)
    inner.add(abs, 1)
    assert len(outer) == len(included) == 4
    outer.add(add, included["bottom"], 1)
    assert [len(layer) for layer in inner.execution_layers()] == [2, 2, 1]


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
    with pytest.raises(fp.WorkflowError, match="prefix must be a non-empty string, got ''"):
        outer.include(inner, prefix="")


def test_what_is_refused_leaves_nothing_behind():
    outer = fp.Workflow("outer")
    foreign = fp.Workflow().add(abs, 1)
    for bindings in ({"top": 1, "nothing": 2}, {"top": 1, "bottom": foreign}):
        with pytest.raises(fp.WorkflowError):
            outer.include(diamond(), bindings)
    with pytest.raises(
        fp.WorkflowError, match="calls must be functions, or tuples of a function and its arguments, got 3"
    ):
        fp.parallel(outer, (abs, 1), 3)
    with pytest.raises(fp.ForeignHandle):
        fp.ParallelTasks([(abs, 1)]).add_to(outer, after=foreign)
    assert len(outer) == 0


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


def declare(wf, rows, prefix="", bound=None):
    handles = []
    for number, (takes, after, is_named) in enumerate(rows):
        if bound and number in bound:
            handles.append(bound[number])
            continue
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
@given(random_workflows(), st.sets(st.integers(0, 14)))
def test_to_include_is_to_declare_by_hand(executor, rows, bound):
    inner, outer, by_hand = fp.Workflow("inner"), fp.Workflow(), fp.Workflow()
    handles = declare(inner, rows)
    mine, other = outer.add(abs, 1), by_hand.add(abs, 1)
    bound = {number for number in bound if number < len(rows)}
    included = outer.include(inner, {handles[number].name: mine for number in bound})
    expected = declare(by_hand, rows, "inner/", dict.fromkeys(bound, other))
    assert outer.execution_layers() == by_hand.execution_layers()
    first, second = executor.run(outer, outputs="all"), executor.run(by_hand, outputs="all")
    assert [first[included[handle]] for handle in handles] == second[expected]
