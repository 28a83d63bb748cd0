"""The columns of a frozen workflow against a plain reading of how it was declared."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.workflow.plan import Plan, as_index, as_tasks


def red(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


def blue(*args: Any, **kwargs: Any) -> Any:
    return args, kwargs


FUNCTIONS = [red, blue, fp.task(red, retries=2), fp.task(blue, name="green")]


class Declared(NamedTuple):
    """What was declared, task by task, beside the workflow itself."""

    workflow: fp.Workflow
    names: list[str]
    values_of: list[list[int]]
    waits_for: list[set[int]]
    first_constant: list[Any]
    retries: list[int]


@st.composite
def declared(draw: st.DrawFn) -> Declared:
    """A workflow of adds and maps in any order, with every kind of argument and dependency."""
    wf = fp.Workflow("random")
    out = Declared(wf, [], [], [], [], [])
    counters: dict[str, int] = {}
    for step in range(draw(st.integers(0, 10))):
        n_before = len(wf)
        some = st.lists(st.integers(0, n_before - 1), max_size=3) if n_before else st.just([])
        after = draw(some)
        number = draw(st.integers(0, len(FUNCTIONS)))
        fn = FUNCTIONS[number] if number < len(FUNCTIONS) else fp.task(red, name=f"own{step}")
        retries = 2 if number == 2 else 0
        base = ["red", "blue", "red", "green", f"own{step}"][number]
        if after:
            fn = fp.task(fn).options(after=[fp.TaskHandle(wf, task) for task in after])
        mapped = draw(st.booleans()) or number == 3  # a given name is for one task, or for those of maps
        if mapped:
            n_tasks = draw(st.integers(0, 4))
            plain = draw(st.booleans())
            rows = [[] if plain else draw(some) for _ in range(n_tasks)]
            # A column of constants, and one of lists of handles or of nothing but constants.
            column = (
                [[fp.TaskHandle(wf, task) for task in row] for row in rows] if not plain else list("abcd"[:n_tasks])
            )
            wf.map(fn, range(n_tasks), column, extra=step)
            first = counters.get(base, 0)
            out.names.extend(f"{base}-{first + i}" for i in range(n_tasks))
            counters[base] = first + n_tasks
        else:
            n_tasks, rows = 1, [draw(some)]
            handles = [fp.TaskHandle(wf, task) for task in rows[0]]
            wf.add(fn, 7, *handles[:1], rest=handles[1:])
            count = counters.get(base, 0)
            out.names.append(base if number == 4 or not count else f"{base}-{count}")
            counters[base] = count + 1
        for i, row in enumerate(rows):
            out.values_of.append(row)
            out.waits_for.append({*row, *after})
            out.first_constant.append(i if mapped else 7)
            out.retries.append(retries)
    return out


def oracle_layers(waits_for: list[set[int]]) -> list[int]:
    layers: list[int] = []
    for tasks in waits_for:
        layers.append(1 + max((layers[task] for task in tasks), default=-1))
    return layers


@settings(deadline=None)
@given(declared())
def test_columns_say_what_was_declared(given):
    plan = Plan(given.workflow)
    n = len(given.names)
    assert plan.n_tasks == len(given.workflow) == n
    for task in range(n):
        references = plan.references[plan.reference_start[task] : plan.reference_start[task + 1]]
        assert references.tolist() == given.values_of[task]
        assert plan.spec(task).options.retries == given.retries[task]
        assert plan.constants[plan.constant_start[task]] == given.first_constant[task]
    assert plan.reference_start[-1] == len(plan.references)
    assert plan.constant_start[-1] == len(plan.constants)


@settings(deadline=None)
@given(declared())
def test_edges_are_values_and_order_together(given):
    plan = Plan(given.workflow)
    before = plan.graph.reversed()
    assert [set(before.successors(task).tolist()) for task in range(plan.n_tasks)] == given.waits_for


@settings(deadline=None)
@given(declared())
def test_layers_equal_the_oracle(given):
    plan = Plan(given.workflow)
    layers = oracle_layers(given.waits_for)
    assert plan.layers.tolist() == layers
    assert plan.n_layers == max(layers, default=-1) + 1
    assert plan.tasks_by_layer() == [
        [task for task in range(plan.n_tasks) if layers[task] == layer] for layer in range(plan.n_layers)
    ]


@settings(deadline=None)
@given(declared())
def test_the_order_goes_by_layer_then_template_then_number(given):
    plan = Plan(given.workflow)
    keys = [(plan.layers[task], plan.template_of[task], task) for task in plan.order]
    assert keys == sorted(keys)
    assert sorted(plan.order.tolist()) == list(range(plan.n_tasks))
    for place, (layer, template, _) in enumerate(keys):
        end = int(plan.group_end[place])
        assert {key[:2] for key in keys[place:end]} == {(layer, template)}
        assert end == plan.n_tasks or keys[end][:2] != (layer, template)
    starts = [next(i for i, key in enumerate(keys) if key[0] == layer) for layer in range(plan.n_layers)]
    assert plan.layer_start == [*starts, plan.n_tasks]


@settings(deadline=None)
@given(declared())
def test_leaves_are_the_tasks_whose_value_nobody_takes(given):
    plan = Plan(given.workflow)
    taken = {task for row in given.values_of for task in row}
    assert set(plan.leaves.tolist()) == set(range(plan.n_tasks)) - taken


@settings(deadline=None)
@given(declared())
def test_every_name_is_as_declared_and_leads_back(given):
    plan = Plan(given.workflow)
    plan.check_names()
    found = [plan.name(task) for task in range(plan.n_tasks)]
    assert found == given.names
    assert [plan.find(name) for name in found] == list(range(plan.n_tasks))
    assert [given.workflow.task_name(task) for task in range(plan.n_tasks)] == found
    for name in ("red-99", "green", "yellow", "blue-00", "own-1") if found else ():
        with pytest.raises(fp.UnknownTask):
            plan.find(name)


@settings(deadline=None)
@given(declared(), st.integers(0, 2**32 - 1))
def test_what_is_added_later_is_not_in_an_earlier_plan(given, seed):
    wf, rng = given.workflow, np.random.default_rng(seed)
    early, never_read = Plan(wf), Plan(wf)
    before = (early.n_tasks, early.order.tolist(), early.leaves.tolist(), early.layer_start)
    handles = [fp.TaskHandle(wf, int(task)) for task in rng.integers(0, max(len(wf), 1), 3) if len(wf)]
    new = wf.map(red, [*handles, 1, [2, handles]])
    wf.add(fp.task(blue, name="latecomer", after=new), new[0])
    if handles:
        wf.add_dependency(new[-1], after=handles[0])
    for plan in (early, never_read):
        assert (plan.n_tasks, plan.order.tolist(), plan.leaves.tolist(), plan.layer_start) == before
        for name in ("latecomer", new[-1].name) if plan.n_tasks else ():
            with pytest.raises(fp.UnknownTask):
                plan.find(name)
    assert wf.plan().n_tasks == early.n_tasks + len(new) + 1


def test_a_workflow_is_frozen_again_only_when_it_has_changed():
    wf = fp.Workflow()
    handles = [wf.add(red), *wf.map(blue, range(2))]
    changes = [
        lambda: wf.add(red),
        lambda: wf.map(red, range(2)),
        lambda: wf.add_dependency(handles[0], after=handles[1]),
    ]
    for change in changes:
        before = wf.plan()
        assert wf.plan() is before
        change()
        assert wf.plan() is not before


def test_an_empty_plan_has_no_layers():
    plan = Plan(fp.Workflow())
    assert (plan.n_tasks, plan.n_layers, plan.layer_start) == (0, 0, [0])
    assert plan.order.tolist() == plan.group_end.tolist() == plan.leaves.tolist() == []
    assert plan.tasks_by_layer() == []


def test_an_empty_plan_knows_no_name():
    with pytest.raises(fp.UnknownTask):
        Plan(fp.Workflow()).find("red")


def test_order_without_data_leaves_both_tasks_leaves():
    wf = fp.Workflow()
    first, second = wf.add(red), wf.add(blue)
    wf.add_dependency(second, after=first)
    assert wf.plan().leaves.tolist() == [0, 1]


def test_a_cycle_is_told_on_the_first_look_at_the_layers():
    wf = fp.Workflow()
    first = wf.add(red)
    second = wf.add(blue, first)
    wf.add_dependency(first, after=second)
    plan = Plan(wf)
    assert plan.find("blue") == 1
    for _ in range(2):
        with pytest.raises(fp.CyclicWorkflow) as caught:
            plan.layers  # noqa: B018
    assert sorted(caught.value.cycle) == ["blue", "red"]


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [([3], range(3, 4)), ([3, 4, 5], range(3, 6)), ([0, 1], range(2)), ([3, 5], [3, 5]), ([0, 2, 3], [0, 2, 3])],
)
def test_consecutive_tasks_become_a_range(numbers, expected):
    tasks = as_tasks(np.array(numbers, np.int32))
    assert type(tasks) is (range if isinstance(expected, range) else np.ndarray)
    assert list(tasks) == list(expected)
    assert np.arange(10)[as_index(tasks)].tolist() == numbers


@given(st.sets(st.integers(0, 60), min_size=1))
def test_tasks_pick_the_rows_they_number(numbers):
    tasks = as_tasks(np.array(sorted(numbers), np.int32))
    assert list(tasks) == sorted(numbers)
    assert np.arange(61)[as_index(tasks)].tolist() == sorted(numbers)
