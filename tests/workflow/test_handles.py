"""A handle stands for a task of the workflow that made it, and for nothing else, at every door that takes one."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from operator import neg

import pytest

import forgepar as fp
from forgepar.workflow.combinators import ParallelTasks, map_reduce, parallel, sequence

NAMES = [("mine", "theirs"), ("same", "same")]


@pytest.fixture(params=NAMES, ids=["other names", "equal names"])
def two(request):
    """Return two workflows with tasks of equal names, each with one handle and with those of several tasks."""
    made = []
    for name in request.param:
        wf = fp.Workflow(name)
        made.append((wf, wf.add(abs, -len(made) - 1), wf.map(neg, [1, 2, 3])))
    return made


def run(wf, **rules):
    return wf.run(backend="inline", **rules)


def test_a_result_refuses_handles_of_another_workflow(two):
    (mine, own, own_many), (_, other, others) = two
    result = run(mine)
    for key in (other, others, others[1:], others[2:2], others[::-1], [own, other], [own_many, others]):
        with pytest.raises(fp.ForeignHandle):
            result[key]
    with pytest.raises(fp.ForeignHandle):
        result.record(other)
    assert (result[own], result[own_many], result[own_many[1:]], result[own_many[2:2]]) == (
        1,
        [-1, -2, -3],
        [-2, -3],
        [],
    )


def test_the_error_names_the_handle_and_both_workflows(two):
    (mine, _, _), (_, other, others) = two
    result = run(mine)
    to = "theirs', not to 'mine'" if mine.name == "mine" else "another workflow of the same name, 'same'"
    with pytest.raises(fp.ForeignHandle, match=f"<TaskHandle 'abs'> belongs to .*{to}"):
        result[other]
    with pytest.raises(fp.ForeignHandle, match=f"<TaskHandles of 3 tasks> starting with 'neg-0' belongs to .*{to}"):
        result[others]


DOORS = {
    "add": lambda wf, own, other: wf.add(abs, other),
    "add, nested": lambda wf, own, other: wf.add(sum, [own, {"a": (other,)}]),
    "add, by keyword": lambda wf, own, other: wf.add(print, end=other),
    "map": lambda wf, own, other: wf.map(abs, [own, other]),
    "map, over a value": lambda wf, own, other: wf.map(abs, other),
    "map, a constant": lambda wf, own, other: wf.map(print, [1], end=other),
    "after": lambda wf, own, other: wf.add(fp.task(abs).options(after=[own, other]), -1),
    "after, of a map": lambda wf, own, other: wf.map(fp.task(abs).options(after=other), [-1]),
    "add_dependency, first": lambda wf, own, other: wf.add_dependency(own, other),
    "add_dependency, second": lambda wf, own, other: wf.add_dependency(other, own),
    "index_of": lambda wf, own, other: wf.index_of(other),
    "include, the value of a binding": lambda wf, own, other: wf.include(inner(), {"abs": other}),
    "include, deep in a binding": lambda wf, own, other: wf.include(inner(), {"abs": [other]}),
    "include, the task of a binding": lambda wf, own, other: wf.include(inner(), {other: own}),
    "a mapping that include gave": lambda wf, own, other: wf.include(inner())[other],
    "when, the condition": lambda wf, own, other: fp.when(wf, other, lambda: own),
    "when, a branch": lambda wf, own, other: fp.when(wf, own, lambda: other),
    "map_reduce": lambda wf, own, other: map_reduce(wf, abs, [own, other], sum),
    "sequence": lambda wf, own, other: sequence(wf, other, abs),
    "parallel": lambda wf, own, other: parallel(wf, (abs, own), (abs, other)),
    "ParallelTasks, after": lambda wf, own, other: ParallelTasks([(abs, -1)]).add_to(wf, after=other),
    "Subflow": lambda wf, own, other: fp.Subflow(wf, {"a": other}),
    "shell": lambda wf, own, other: wf.add(fp.shell("echo {x}"), x=other),
    "outputs": lambda wf, own, other: run(wf, outputs=other),
    "outputs, several": lambda wf, own, other: run(wf, outputs=["abs", [other]]),
}


MADE = []


def split_here():
    """Return a subflow, and keep a handle of it in this process."""
    wf = fp.Workflow()
    MADE.append(wf.add(abs, -7))
    return fp.Subflow(wf, MADE[-1])


def inner():
    wf = fp.Workflow("inner")
    wf.add(neg, wf.add(abs, -3))
    return wf


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("several", [False, True], ids=["one", "several"])
def test_every_door_refuses_them(two, door, several):
    (mine, own, own_many), (_, other, others) = two
    if several and door in (
        "add_dependency, first",
        "add_dependency, second",
        "index_of",
        "include, the task of a binding",
    ):
        pytest.skip("it takes one handle")
    with pytest.raises(fp.ForeignHandle, match="belongs to"):
        DOORS[door](mine, own, others if several else other)
    assert run(mine)[own_many] == [-1, -2, -3]  # what was refused left the workflow fit to run


def test_names_alone_choose_tasks_of_earlier_runs(two):
    (_, own, _), _ = two
    for field in ("rerun", "start_from"):
        with pytest.raises(fp.WorkflowError, match=f"{field} of Resume must be names of tasks"):
            fp.Resume(**{field: own})


@pytest.mark.parametrize("key", [3, None, ("abs",), 1.5])
def test_what_is_no_handle_and_no_name_is_refused(two, key):
    result = run(two[0][0])
    for look in (result.__getitem__, result.record):
        with pytest.raises(fp.WorkflowError, match="key must be a handle or the name of a task, got"):
            look(key)


def test_a_workflow_that_grew_after_the_run():
    wf = fp.Workflow("grows")
    first = wf.add(abs, -1)
    result = run(wf)
    late, more = wf.add(abs, -2), wf.map(neg, [1, 2])
    assert result[first] == 1
    for key in (late, more, more[1:], more[::-1]):
        with pytest.raises(fp.UnknownTask, match="was added to workflow 'grows' after this run began"):
            result[key]
    with pytest.raises(fp.UnknownTask, match="after this run began"):
        result.record(late)
    assert run(wf)[[first, late, more]] == [1, 2, [-1, -2]]


def test_a_task_added_later_is_not_taken_for_one_of_a_subflow():
    def split():
        inner = fp.Workflow()
        return fp.Subflow(inner, inner.add(abs, -7))

    wf = fp.Workflow()
    whole = wf.add(split)
    result = run(wf, outputs="all")
    late = wf.add(neg, 5)  # has the number that the subflow's first task has in the run
    assert result[whole] == 7
    with pytest.raises(fp.UnknownTask, match="after this run began"):
        result[late]


def test_handles_inside_of_a_subflow_are_not_those_of_the_result():
    wf = fp.Workflow()
    whole = wf.add(split_here)
    result = run(wf)
    assert result[whole] == 7
    with pytest.raises(fp.ForeignHandle):
        result[MADE.pop()]


def test_tasks_of_an_included_workflow_go_by_what_include_gave():
    inner_wf = fp.Workflow("inner")
    number = inner_wf.add(int, "7")
    squares = inner_wf.map(pow, [2, 3], [2, 2])
    outer = fp.Workflow("outer")
    shift = outer.add(abs, -100)
    included = outer.include(inner_wf)
    result = run(outer)
    assert (result[included[number]], result[included[squares]], result[shift]) == (7, [4, 9], 100)
    for key in (number, squares):
        with pytest.raises(fp.ForeignHandle, match=r"included\[handle\]"):
            result[key]
    late = inner_wf.map(abs, [-1])
    for key in (late, late[0], "abs-0"):
        with pytest.raises(fp.UnknownTask, match="after 'outer' had included it"):
            included[key]


COPIES = {"copy": copy.copy, "deepcopy": copy.deepcopy, "pickle": lambda wf: pickle.loads(pickle.dumps(wf))}


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_a_workflow_of_its_own(how):
    wf = fp.Workflow("one")
    first, many = wf.add(abs, -1), wf.map(neg, [1, 2])
    twin = COPIES[how](wf)
    own = twin.add(abs, -5)
    assert len(wf) == 3
    assert len(twin) == 4
    result, of_twin = run(wf), run(twin)
    assert of_twin[[own, twin.handle("abs"), "neg-1"]] == [5, 1, -2]
    for key in (first, many):
        with pytest.raises(fp.ForeignHandle):
            of_twin[key]
        with pytest.raises(fp.ForeignHandle):
            twin.add(sum, [key])
    with pytest.raises(fp.ForeignHandle):
        result[own]
    assert result[[first, many]] == [1, [-1, -2]]
    assert wf.add(abs, -8).name == "abs-1"


def test_a_copy_is_independent_in_all_that_it_declares():
    wf = fp.Workflow()
    first = wf.add(fp.task(abs).options(name="first"), -1)
    twin = copy.copy(wf)
    twin.add_dependency(twin.add(neg, 1), "first")
    twin.add(fp.task(abs).options(name="second"), -2)
    wf.add(fp.task(abs).options(name="second"), first)
    assert [len(layer) for layer in twin.execution_layers()] == [2, 1]
    assert wf.execution_layers() == [["first"], ["second"]]


@pytest.mark.parametrize("how", COPIES)
def test_a_copied_result_knows_the_handles_of_its_workflow(how):
    wf = fp.Workflow()
    first = wf.add(abs, -1)
    result = COPIES[how](run(wf))
    assert result[first] == 1
    with pytest.raises(fp.ForeignHandle):
        result[fp.Workflow().add(abs, -1)]


def test_a_result_keeps_no_workflow_alive():
    wf = fp.Workflow()
    first = wf.add(abs, -1)
    result, name = run(wf), first.name
    known = weakref.ref(wf)
    del wf, first
    gc.collect()
    assert known() is None
    assert result[name] == 1
    for _ in range(50):  # a new workflow may have the address of the old one
        with pytest.raises(fp.ForeignHandle):
            result[fp.Workflow().add(abs, -1)]


@pytest.mark.parametrize("start_method", ["forkserver", "spawn", "fork"])
def test_results_of_worker_processes_refuse_them_as_well(two, start_method):
    (mine, own, _), (_, other, others) = two
    with fp.WorkflowExecutor(workers=1, start_method=start_method) as executor:
        result, again = executor.run(mine), executor.run(mine)
    for found in (result, again):
        assert found[own] == 1
        for key in (other, others):
            with pytest.raises(fp.ForeignHandle):
                found[key]


def test_the_partial_result_of_a_failed_run_refuses_them(two):
    (mine, own, _), (_, other, _) = two
    mine.add(divmod, own, 0)
    with pytest.raises(fp.WorkflowFailed) as failed:
        run(mine, outputs="all")
    assert failed.value.result[own] == 1
    with pytest.raises(fp.ForeignHandle):
        failed.value.result[other]
