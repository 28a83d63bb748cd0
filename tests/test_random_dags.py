"""Random graphs through the whole engine: layers as a plain oracle has them, each task once and after its parents."""

from __future__ import annotations

import itertools

import pytest
from checked_states import check_states
from conftest import executor_arguments
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import forgepar as fp


@st.composite
def dags(draw, most=40):
    """Parents of each node, all with smaller numbers; duplicates allowed, as a task may take a value twice."""
    n = draw(st.integers(1, most))
    return [draw(st.lists(st.integers(0, node - 1), max_size=4)) if node else [] for node in range(n)]


def oracle_layers(parents):
    layer = []
    for mine in parents:
        layer.append(max((layer[parent] for parent in mine), default=-1) + 1)
    return layer


def oracle_values(parents):
    values = []
    for node, mine in enumerate(parents):
        values.append((node, sum(values[parent][1] for parent in mine) % 1_000_003 + 1))
    return values


def step(node, *inputs):
    return node, sum(value for _, value in inputs) % 1_000_003 + 1


def sum_list(node, inputs):
    return step(node, *inputs)


def declare(parents, shapes):
    """A workflow of the graph; each task takes its parents by one of several ways."""
    wf = fp.Workflow("random")
    handles = []
    for node, (mine, shape) in enumerate(zip(parents, itertools.cycle(shapes), strict=False)):
        inputs = [handles[parent] for parent in mine]
        if shape == "positional":
            handles.append(wf.add(step, node, *inputs))
        elif shape == "nested":
            handles.append(wf.add(sum_list, node, inputs=inputs))
        else:
            handles.append(wf.add(lambda node, inputs: step(node, *inputs["values"]), node, {"values": tuple(inputs)}))
    return wf, handles


@pytest.fixture(autouse=True)
def checked(monkeypatch):
    check_states(monkeypatch.setattr)


@pytest.fixture(scope="module", params=["inline", "forkserver"])
def executor(request):
    with fp.WorkflowExecutor(**executor_arguments(request.param)) as executor:
        warm = fp.Workflow()
        warm.map(step, [0, 0])  # a task for each worker: no more are started than a run can use
        executor.run(warm)
        yield executor


SHAPES = st.lists(st.sampled_from(["positional", "nested", "closure"]), min_size=1, max_size=4)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(dags(), SHAPES)
def test_layers_equal_the_oracle(parents, shapes):
    wf, handles = declare(parents, shapes)
    layer_of = {name: i for i, names in enumerate(wf.execution_layers()) for name in names}
    assert [layer_of[handle.name] for handle in handles] == oracle_layers(parents)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(parents=dags(), shapes=SHAPES, schedule=st.sampled_from(["layers", "eager"]))
def test_every_task_runs_once_after_its_parents_with_the_right_values(executor, parents, shapes, schedule):
    wf, handles = declare(parents, shapes)
    result = executor.run(wf, outputs="all", schedule=schedule)
    assert result[handles] == oracle_values(parents)
    records = [result.record(handle) for handle in handles]
    assert {(record.status, record.attempt) for record in records} == {("completed", 1)}
    for mine, record in zip(parents, records, strict=True):
        for parent in mine:
            assert records[parent].start + records[parent].duration <= record.start + 1e-9


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(parents=dags(), data=st.data())
def test_without_fail_fast_exactly_the_descendants_of_failures_are_skipped(executor, parents, data):
    failing = data.draw(st.sets(st.sampled_from(range(len(parents))), max_size=3))
    wf = fp.Workflow()
    handles = []
    for node, mine in enumerate(parents):
        handles.append(wf.add(step_or_fail, node, node in failing, *[handles[parent] for parent in mine]))
    doomed = set()
    for node, mine in enumerate(parents):
        if doomed.intersection(mine) or failing.intersection(mine):
            doomed.add(node)
    try:
        result = executor.run(wf, fail_fast=False, schedule=data.draw(st.sampled_from(["layers", "eager"])))
    except fp.WorkflowFailed as failure:
        result = failure.result
    expected = {
        node: "skipped" if node in doomed else "failed" if node in failing else "completed"
        for node in range(len(parents))
    }
    assert {node: result.record(handle).status for node, handle in enumerate(handles)} == expected


def step_or_fail(node, fails, *inputs):
    if fails:
        raise RuntimeError(str(node))
    return step(node, *inputs)
