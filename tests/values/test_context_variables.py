"""Context variables of the user's modules have in workers the values that they have in the caller's context."""

from __future__ import annotations

import contextvars
import functools
import importlib
import sys
import textwrap
import threading
import warnings

import pytest

import forgepar as fp
from forgepar.values.caller_values import KeptAsIs
from forgepar.values.context_variables import take_value

METHODS = ["forkserver", "spawn", "fork"]
MODULE = """
    import contextvars
    SCALE = contextvars.ContextVar("SCALE", default=1)
    NAME = contextvars.ContextVar("NAME")
    def scaled(x): return x * SCALE.get()
    def named(x): return NAME.get("none"), x
    def set_to(value):
        SCALE.set(value)
        return value
    def name_it(value):
        NAME.set(value)
        return value
    class Point:
        def __init__(self, x): self.x = x
    POINT = contextvars.ContextVar("POINT")
    def moved(x): return POINT.get().x + x
"""


@pytest.fixture
def steps(tmp_path, monkeypatch):
    name = f"steps_{tmp_path.name}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    yield importlib.import_module(name)
    del sys.modules[name]


def in_own_context(test):
    """Have what a test sets end with it."""
    return functools.wraps(test)(lambda *args, **kwargs: contextvars.copy_context().run(test, *args, **kwargs))


def run(executor, fn, value):
    wf = fp.Workflow()
    handle = wf.add(fn, value)
    return executor.run(wf)[handle]


@pytest.mark.parametrize("method", METHODS)
@in_own_context
def test_warm_workers_follow_the_caller(method, steps):
    with (
        fp.WorkflowExecutor(workers=1, start_method=method) as runs,
        fp.ForgeExecutor(1, start_method=method) as pool,
    ):

        def seen(fn, value):
            return run(runs, fn, value), pool.submit(fn, value).result()

        assert seen(steps.scaled, 2) == (2, 2)
        assert seen(steps.named, 2) == (("none", 2), ("none", 2))
        token = steps.SCALE.set(5)
        assert seen(steps.scaled, 2) == (10, 10)
        steps.SCALE.set(6)
        steps.NAME.set(["a", "b"])
        assert seen(steps.scaled, 2) == (12, 12)
        assert seen(steps.named, 2) == ((["a", "b"], 2), (["a", "b"], 2))
        steps.NAME.get().append("c")
        assert seen(steps.named, 2)[0] == seen(steps.named, 2)[1] == (["a", "b", "c"], 2)
        steps.SCALE.reset(token)
        assert seen(steps.scaled, 2) == (2, 2)
        steps.POINT.set(steps.Point(3))
        assert seen(steps.moved, 1) == (4, 4)


@pytest.mark.parametrize("method", METHODS)
@in_own_context
def test_a_value_from_before_the_workers_were_started_is_seen_and_can_be_taken_back(method, steps):
    token, token_of_name = steps.SCALE.set(5), steps.NAME.set("x")
    with fp.WorkflowExecutor(workers=1, start_method=method) as runs:
        assert run(runs, steps.scaled, 2) == 10
        steps.SCALE.reset(token)
        assert run(runs, steps.scaled, 2) == 2
        assert run(runs, steps.named, 2) == ("x", 2)
        if method != "fork":  # a forked worker was given the value with the context of the caller
            steps.NAME.reset(token_of_name)
            assert run(runs, steps.named, 2) == ("none", 2)


@in_own_context
def test_each_run_begins_with_the_callers_value(steps):
    with fp.WorkflowExecutor(workers=1) as runs:
        steps.SCALE.set(5)
        assert run(runs, steps.scaled, 2) == 10
        assert run(runs, steps.set_to, 9) == 9
        assert run(runs, steps.scaled, 2) == 10


@in_own_context
def test_tasks_may_set_what_the_caller_never_sets(steps):
    with fp.WorkflowExecutor(workers=1) as runs, warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [run(runs, steps.name_it, name) for name in "abc"] == ["a", "b", "c"]


@in_own_context
def test_joblib_and_dask_graphs_too(steps):
    joblib = pytest.importorskip("joblib")
    pytest.importorskip("dask")
    from forgepar.integrations.dask_graphs import close_workers

    backend = pytest.importorskip("forgepar.joblib")  # it registers the backend
    steps.SCALE.set(5)
    with joblib.parallel_config(backend="forgepar", n_jobs=2):
        assert joblib.Parallel()(joblib.delayed(steps.scaled)(i) for i in range(3)) == [0, 5, 10]
    backend.close()
    assert fp.dask_get({"a": (steps.scaled, 3)}, "a", workers=1) == 15
    close_workers()


@in_own_context
def test_a_value_that_cannot_be_pickled_is_told(steps):
    steps.SCALE.set(threading.Lock())
    with (
        fp.WorkflowExecutor(workers=1) as runs,
        pytest.warns(RuntimeWarning, match="context variable 'SCALE' of module .* has a _thread.lock, which cannot"),
    ):
        assert run(runs, steps.scaled, 2) == 2


def taken(variable, sent, *, is_new=True):
    take_value(variable, sent, ("steps", "V"), lambda data: data.decode(), is_new=is_new)
    return variable.get("unset")


@in_own_context
def test_a_value_that_a_task_has_set_stays_until_the_caller_sends_another():
    variable = contextvars.ContextVar("V")
    assert taken(variable, b"caller's") == "caller's"
    variable.set("task's")
    assert taken(variable, b"caller's", is_new=False) == "task's"
    assert taken(variable, b"caller's second") == "caller's second"
    assert taken(variable, None) == "unset"


@in_own_context
def test_each_thread_is_given_the_value():
    variable = contextvars.ContextVar("V")
    assert taken(variable, b"x") == "x"
    seen = []
    thread = threading.Thread(
        target=contextvars.Context().run, args=(lambda: seen.append(taken(variable, b"x", is_new=False)),)
    )
    thread.start()
    thread.join()
    assert seen == ["x"]


@in_own_context
def test_what_cannot_be_unset_is_told():
    variable = contextvars.ContextVar("V")
    variable.set("inherited")
    with pytest.warns(RuntimeWarning, match="'V' of module 'steps' has no value in the caller"):
        taken(variable, None)
    with pytest.warns(RuntimeWarning, match="has a Lock, which cannot be pickled"):
        taken(variable, KeptAsIs("Lock", ()))


@in_own_context
def test_one_with_a_default_gets_that():
    variable = contextvars.ContextVar("V", default="default")
    variable.set("inherited")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken(variable, None) == "default"
