"""Of two branches one runs; the other is skipped, and what joins both still runs."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.values.codec import BLOB_LIMIT


def same(*values):
    return values


@pytest.mark.parametrize("schedule", ["layers", "eager"])
@pytest.mark.parametrize("decision", [True, False])
def test_one_branch_runs_and_the_value_is_its_own(either_backend, schedule, decision):
    wf = fp.Workflow()
    flag = wf.add(lambda: decision)
    yes, no = [], []

    def then():
        yes.extend([wf.add(same, 1), wf.add(same, 2)])
        yes.append(wf.add(same, yes))
        return {"value": yes[-1]}

    def otherwise():
        no.append(wf.add(same, 3))
        return no[0]

    value = fp.when(wf, flag, then, otherwise)
    joined = wf.add(lambda a, b: (a, b), yes[0], no[0])
    after = wf.add(lambda x: x, value)
    only_yes = wf.add(len, yes[1])
    result = wf.run(**either_backend, schedule=schedule, outputs="all")
    assert result.ok
    assert result[after] == ({"value": ([(1,), (2,)],)} if decision else (3,))
    assert result[joined] == ((1,), None) if decision else result[joined] == (None, (3,))
    ran, skipped = (yes, no) if decision else (no, yes)
    assert {result.record(task).status for task in ran} == {"completed"}
    assert {result.record(task).status for task in skipped} == {"skipped"}
    assert {result.record(task).skipped_for for task in skipped} == {"condition"}
    assert result.record(only_yes).status == ("completed" if decision else "skipped")
    with pytest.raises(fp.MissingResult, match="because 'condition' chose the other branch"):
        result[skipped[0]]


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_without_another_branch_the_value_is_none(either_backend, schedule):
    wf = fp.Workflow()
    values = [fp.when(wf, wf.add(abs, number), lambda: wf.add(same, "ran")) for number in (0, 1)]
    after = wf.add(same, *values)
    result = wf.run(**either_backend, schedule=schedule)
    assert result[after] == (None, ("ran",))


def test_names_are_those_of_the_shape():
    wf = fp.Workflow()
    fp.when(wf, wf.add(abs, 1), lambda: None)
    fp.when(wf, wf.add(abs, 1), lambda: None)
    assert [name for layer in wf.execution_layers() for name in layer] == [
        "abs", "abs-1", "condition", "condition-1", "either", "either-1",
    ]  # fmt: skip


@pytest.mark.parametrize("schedule", ["layers", "eager"])
def test_a_branch_that_fails_fails_what_joins_it(schedule):
    wf = fp.Workflow()
    value = fp.when(wf, wf.add(abs, 1), lambda: wf.add(int, "x"), lambda: wf.add(same))
    other = wf.add(abs, -2)
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1, fail_fast=False, schedule=schedule)
    result = caught.value.result
    assert result[other] == 2
    assert result.record(value).skipped_for == "int"


def test_a_condition_that_fails_runs_neither(either_backend):
    wf = fp.Workflow()
    value = fp.when(wf, wf.add(np.zeros, 2), lambda: wf.add(same, 1), lambda: wf.add(same, 2))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**either_backend, fail_fast=False)
    result = caught.value.result
    assert list(result.errors) == ["condition"]
    assert result.record(value).status == "skipped"


def test_values_that_only_the_other_branch_was_to_take_are_freed():
    with fp.WorkflowExecutor(backend="inline") as executor:
        wf = fp.Workflow()
        large = wf.add(np.zeros, BLOB_LIMIT)
        value = fp.when(wf, wf.add(abs, 0), lambda: wf.add(np.sum, large), lambda: wf.add(same, 1))
        executor._backend.open(1)
        folder = executor._backend.arena.folder
        left = wf.add(lambda _: sorted(path.name for path in folder.iterdir() if path.name[:2] in ("mn", "mr")), value)
        assert executor.run(wf)[left] == []


@st.composite
def programs(draw):
    """A nest of branches, as a list: a number is a task, a triple a decision with what it decides on."""
    leaf = st.integers(0, 9)
    return draw(
        st.recursive(
            st.lists(leaf, max_size=3),
            lambda inner: st.lists(st.one_of(leaf, st.tuples(st.booleans(), inner, inner)), max_size=3),
            max_leaves=12,
        )
    )


def build(wf, program, before=None):
    """Declare a program; each step takes the value of the one before."""
    value = before
    for step in program:
        if isinstance(step, tuple):
            decision, then, otherwise = step
            flag = wf.add(lambda _, decision=decision: decision, value)
            value = fp.when(
                wf, flag, lambda v=value, p=then: build(wf, p, v), lambda v=value, p=otherwise: build(wf, p, v)
            )
        else:
            value = wf.add(lambda x, step=step: (x, step), value)
    return value


def expected_of(program, before=None):
    value = before
    for step in program:
        if isinstance(step, tuple):
            value = expected_of(step[1] if step[0] else step[2], value)
        else:
            value = (value, step)
    return value


@pytest.fixture(scope="module")
def executor():
    with fp.WorkflowExecutor(backend="inline") as executor:
        executor._backend.open()  # here, as each test is to leave nothing behind
        yield executor


@settings(deadline=None, max_examples=60)
@given(programs(), st.sampled_from(["layers", "eager"]))
def test_nested_branches_give_what_plain_python_gives(executor, program, schedule):
    wf = fp.Workflow()
    value = wf.add(same, build(wf, program))
    result = executor.run(wf, schedule=schedule)
    assert result[value] == (expected_of(program),)
    assert result.ok
