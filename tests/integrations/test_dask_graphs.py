"""Graphs of Dask's on local workers: what Dask asks of a scheduler, its collections, failures, callbacks, workers."""

from __future__ import annotations

import os
import sys
import threading
from operator import add
from pathlib import Path

import numpy as np
import pytest

dask = pytest.importorskip("dask", reason="dask is in the extra dask")

from conftest import wait_until  # noqa: E402
from dask._task_spec import Alias, DataNode, Task, TaskRef  # noqa: E402
from dask.callbacks import Callback  # noqa: E402
from dask.diagnostics import ProgressBar  # noqa: E402
from dask.utils_test import GetFunctionTestMixin, inc  # noqa: E402
from daskcluster import restore_exceptions  # noqa: E402

import forgepar as fp  # noqa: E402
from forgepar.integrations import dask_graphs as daskgraphs  # noqa: E402
from forgepar.integrations.dask_step import GraphNode, KeptValue, packed  # noqa: E402

restore_exceptions()


@pytest.fixture(scope="module", autouse=True)
def two_workers():
    with dask.config.set(num_workers=2, scheduler=fp.dask_get):
        fp.dask_get({"x": (os.getpid,), "y": (inc, 1)}, ["x", "y"])
        yield
        daskgraphs.close_workers()


class TestGet(GetFunctionTestMixin):
    get = staticmethod(fp.dask_get)


class TestGetByLayers(GetFunctionTestMixin):
    @staticmethod
    def get(dsk, keys):
        return fp.dask_get(dsk, keys, schedule="layers", optimize_graph=False)

    test_get_stack_limit = None  # a task for each of ten thousand layers is not what layers are for


# Graphs


def test_todays_nodes_and_aliases():
    dsk = {
        "data": DataNode("data", [1, 2]),
        "same": Alias("same", "data"),
        "total": Task("total", sum, TaskRef("same")),
        "again": Alias("again", "total"),
        ("t", 0): Task(("t", 0), add, TaskRef("again"), 1),
    }
    assert fp.dask_get(dsk, [["same", "again"], [("t", 0)], "data"]) == (([1, 2], 3), (4,), [1, 2])


@pytest.mark.parametrize("optimize_graph", [True, False])
def test_nodes_whose_own_keys_are_others(optimize_graph):
    """As those of `dask.dataframe.from_delayed`, of which the graph goes by its own keys."""
    graph = {
        "a": DataNode("another", 1),
        "b": Task("one more", inc, TaskRef("a")),
        "c": Alias("the same", "b"),
        "d": Task("b", add, TaskRef("c"), TaskRef("b")),
    }
    assert fp.dask_get(graph, ["d", "c", "a"], optimize_graph=optimize_graph) == (4, 2, 1)


def test_no_more_is_computed_than_is_wanted(tmp_path):
    dsk = {"a": (inc, 1), "b": ((tmp_path / "made").touch,), "c": (inc, "a")}
    assert fp.dask_get(dsk, "c") == 3
    assert not (tmp_path / "made").exists()


def test_a_value_that_many_take_and_is_wanted_too():
    dsk = {"a": (np.arange, 100_000), **{f"s{i}": (np.sum, "a") for i in range(10)}}
    array, *sums = fp.dask_get(dsk, ["a", *(f"s{i}" for i in range(10))])
    assert sums == [array.sum()] * 10


def test_a_node_that_is_not_there():
    with pytest.raises(ValueError, match="Node 'b' needs 'nowhere', which the graph does not have"):
        fp.dask_get({"b": Task("b", inc, TaskRef("nowhere"))}, "b")


def test_nodes_that_need_each_other():
    with pytest.raises(ValueError, match=r"has a dependency cycle: ('a' -> 'b' -> 'a'|'b' -> 'a' -> 'b')"):
        fp.dask_get({"a": Task("a", inc, TaskRef("b")), "b": Task("b", inc, TaskRef("a"))}, "a", optimize_graph=False)


def test_nothing_to_compute_needs_no_worker(monkeypatch):
    monkeypatch.setattr(daskgraphs, "_executor", None)
    assert fp.dask_get({"x": 1, "y": "x"}, ["x", "y"]) == (1, 1)


def test_without_dask_an_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "dask.callbacks", None)
    with pytest.raises(ImportError, match=r"pip install 'forgepar\[dask\]'"):
        fp.dask_get({"x": 1}, "x")


def test_functions_and_classes_of_a_script_travel():
    factor = 3
    assert fp.dask_get({"x": 2, "y": (lambda x: x * factor, "x")}, "y") == 6


def test_large_data_goes_as_an_object_and_small_as_bytes():
    assert isinstance(packed(GraphNode(inc, ["x"], {})), bytes)
    assert isinstance(packed(GraphNode(Task("a", np.sum, np.zeros(10_000)), [], {})), KeptValue)


# Collections


def test_delayed():
    values = [dask.delayed(inc)(i) for i in range(20)]
    total = dask.delayed(sum)(values)
    assert dask.compute(total, values[3]) == (210, 4)


def test_bag():
    import dask.bag as db

    bag = db.from_sequence(range(100), npartitions=4)
    groups = dict(bag.groupby(lambda x: str(x % 5)).compute(shuffle="tasks"))
    assert {key: sorted(found) for key, found in groups.items()} == {
        str(key): list(range(key, 100, 5)) for key in range(5)
    }
    assert bag.map(inc).filter(lambda x: x % 2).sum().compute() == 2500


def test_array():
    import dask.array as da

    matrix = np.random.default_rng(0).random((300, 40))
    blocks = da.from_array(matrix, chunks=(60, 40))
    np.testing.assert_allclose((blocks.T @ blocks).compute(), matrix.T @ matrix)
    np.testing.assert_allclose(
        da.linalg.svd(blocks)[1].compute(), np.linalg.svd(matrix, compute_uv=False, full_matrices=False)
    )


def a_frame(pd):
    return pd.DataFrame({"key": np.arange(1000) % 7, "value": np.arange(1000) * 0.5, "text": ["a", "b"] * 500})


def test_pandas_frames():
    pd = pytest.importorskip("pandas", reason="pandas is in the extra test")
    frame = a_frame(pd)
    parts = [dask.delayed(frame.iloc[start : start + 250].copy()) for start in range(0, 1000, 250)]
    sums = dask.delayed(pd.concat)([part.groupby("key").value.sum() for part in parts])
    by_key = sums.groupby(level=0).sum().compute()
    pd.testing.assert_series_equal(by_key, frame.groupby("key").value.sum())
    back = dask.delayed(pd.concat)(parts).compute()
    pd.testing.assert_frame_equal(back, frame)


def test_data_frame():
    pd = pytest.importorskip("pandas", reason="pandas is in the extra test")
    # Some versions import it without pyarrow, and then raise where a column has text.
    pytest.importorskip("pyarrow", reason="dask.dataframe needs pyarrow, which is in the extra test")
    dd = pytest.importorskip("dask.dataframe", reason="dask.dataframe is in dask")
    frame = a_frame(pd)
    parts = dd.from_pandas(frame, npartitions=4)
    by_key = parts.groupby("key").value.agg(["sum", "mean", "max"]).compute()
    pd.testing.assert_frame_equal(by_key.sort_index(), frame.groupby("key").value.agg(["sum", "mean", "max"]))
    merged = parts.merge(parts.groupby("text").value.sum().reset_index(), on="text").compute()
    assert len(merged) == 1000


# What nodes are given and return


def test_what_is_returned_can_be_written():
    array, same = fp.dask_get({"x": (np.zeros, 100_000), "y": (np.asarray, "x")}, ["x", "y"])
    array += 1
    same += 2
    assert (array.sum(), same.sum()) == (100_000, 200_000)


def clear(array):
    array[:] = 0
    return array.sum()


def test_a_node_may_write_to_what_it_is_given_and_no_other_sees_it():
    dsk = {"x": (np.ones, 50_000), "cleared": (clear, "x"), "sum": (np.sum, "x"), "again": (clear, "x")}
    assert fp.dask_get(dsk, ["cleared", "sum", "again"]) == (0, 50_000, 0)


# Failures


class Odd(Exception):
    pass


def refuse(x):
    raise Odd(f"no {x}")


def test_an_error_is_the_nodes_own():
    with pytest.raises(Odd, match="no 2") as caught:
        fp.dask_get({"a": (inc, 1), ("b", 7): (refuse, "a")}, ("b", 7), optimize_graph=False)
    notes = "\n".join(caught.value.__notes__)
    assert "key of the Dask graph: ('b', 7)" in notes
    assert "in refuse\n    raise Odd" in notes
    assert caught.value.__cause__ is None
    assert fp.dask_get({"a": (inc, 1)}, "a") == 2


def test_a_worker_that_dies_fails_its_node_alone():
    with fp.WorkflowExecutor(2) as executor:
        with pytest.raises(fp.WorkerDied):
            fp.dask_get({"a": (os._exit, 3)}, "a", pool=executor)
        assert fp.dask_get({"a": (inc, 1)}, "a", pool=executor) == 2


def test_a_node_that_cannot_be_pickled():
    with pytest.raises(TypeError, match="cannot pickle") as caught:
        fp.dask_get({"a": (id, threading.Lock())}, "a")
    assert "node 'a' of the Dask graph cannot be pickled" in caught.value.__notes__[0]


# Callbacks


class Recorder(Callback):
    def __init__(self):
        self.told = []

    def _start(self, dsk):
        self.told.append(("start", set(dsk)))

    def _start_state(self, dsk, state):
        self.told.append(("start_state", set(state["waiting"])))

    def _pretask(self, key, dsk, state):
        assert key in state["running"]
        self.told.append(("pretask", key))

    def _posttask(self, key, result, dsk, state, worker_id):
        assert key in state["finished"]
        self.told.append(("posttask", key))

    def _finish(self, dsk, state, errored):
        self.told.append(("finish", errored, dict(state["cache"])))


def test_callbacks_hear_of_every_node():
    dsk = {"a": (inc, 1), "b": (inc, 2), "c": (add, "a", "b")}
    with Recorder() as recorder:
        assert fp.dask_get(dsk, "c") == 5
    kinds = [told[0] for told in recorder.told]
    assert kinds[:2] == ["start", "start_state"]
    assert kinds[-1] == "finish"
    assert recorder.told[1] == ("start_state", {"a", "b", "c"})
    assert recorder.told[-1] == ("finish", False, {"c": 5})
    for key in "abc":
        assert recorder.told.index(("pretask", key)) < recorder.told.index(("posttask", key))


def test_callbacks_hear_of_a_failure():
    with Recorder() as recorder, pytest.raises(Odd):
        fp.dask_get({"a": (refuse, 1)}, "a")
    assert recorder.told[-1][:2] == ("finish", True)


def test_what_a_callback_raises_ends_the_run():
    def raise_it(key, *_):
        raise Odd(key)

    graph = {"a": (inc, 1), "b": (inc, "a")}
    with (
        fp.WorkflowExecutor(2) as executor,
        Callback(posttask=raise_it),
        Recorder() as recorder,
        pytest.raises(Odd, match="a"),
    ):
        fp.dask_get(graph, "b", optimize_graph=False, pool=executor)
    assert recorder.told[-1][:2] == ("finish", True)


@pytest.mark.parametrize("which", ["pretask", "posttask"])
@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt])
def test_what_a_callback_raises_at_the_last_node_is_raised_and_no_other_is_called(which, kind):
    error, calls = kind("mine"), []

    def raise_it(key, *_):
        calls.append(key)
        if key == "b":
            raise error

    graph = {"a": (inc, 1), "b": (inc, "a")}
    others = Callback(**{which: lambda key, *_: calls.append(f"other {key}")})
    with Callback(**{which: raise_it}), others, Recorder() as recorder, pytest.raises(kind) as caught:
        fp.dask_get(graph, "b", optimize_graph=False)
    assert caught.value is error
    assert [call for call in calls if not call.startswith("other")] == ["a", "b"]
    assert recorder.told[-1][:2] == ("finish", True)


def hang(at_end):
    try:
        wait_until(lambda: False, "the end of this worker")
    finally:
        Path(at_end).touch()


def test_what_a_callback_raises_ends_the_nodes_that_run(tmp_path):
    def raise_it(key, *_):
        if key == "b":
            raise Odd(key)

    graph = {"a": (hang, str(tmp_path / "end")), "b": (inc, 2), "c": (list, ["a", "b"])}
    with Callback(posttask=raise_it), pytest.raises(Odd, match="b"):
        fp.dask_get(graph, "c", optimize_graph=False)
    assert not (tmp_path / "end").exists()


def refuse_any(*_):
    raise Odd("any")


@pytest.mark.parametrize("which", ["start", "start_state", "finish"])
def test_what_a_callback_raises_beside_the_nodes_is_raised_too(which):
    with Callback(**{which: refuse_any}), pytest.raises(Odd):
        fp.dask_get({"a": (inc, 1)}, "a")


def test_callbacks_that_began_are_told_of_the_end_where_another_cannot_begin():
    told = []
    first, last = ((None, None, None, None, lambda dsk, state, bad, n=n: told.append((n, bad))) for n in (1, 3))
    with pytest.raises(Odd):
        fp.dask_get({"a": (inc, 1)}, "a", callbacks=[first, (refuse_any, *[None] * 3, refuse_any), last])
    assert told == [(1, True)]


def test_what_a_callback_raises_at_the_start_ends_all():
    with Callback(start=refuse), pytest.raises(Odd):
        fp.dask_get({"a": (inc, 1)}, "a")


def test_a_progress_bar(capsys):
    with ProgressBar(dt=0.01):
        dask.compute(*[dask.delayed(inc)(i) for i in range(10)])
    assert "100% Completed" in capsys.readouterr().out


# Workers


def pids(**how):
    return set(fp.dask_get(dict.fromkeys(range(8), (os.getpid,)), list(range(8)), **how))


def test_workers_stay_for_the_next_call():
    assert pids() | pids() <= pids() | pids()
    assert len(pids() | pids() | pids()) <= 2
    assert os.getpid() not in pids()


def test_an_executor_can_be_given():
    with fp.WorkflowExecutor(1) as executor:
        assert len(pids(pool=executor) | pids(pool=executor)) == 1
        assert not pids(pool=executor) & pids()


def test_another_number_of_workers_takes_the_place_of_the_last():
    before = pids()
    assert len(pids(num_workers=1)) == 1
    assert len(daskgraphs._idle) == 1
    assert not before & pids()
    daskgraphs.close_workers()
    assert daskgraphs._idle == []


def test_the_number_of_workers_is_the_argument_else_dasks_else_that_of_cpus(monkeypatch):
    asked = []

    class Counted(fp.WorkflowExecutor):
        def __init__(self, workers):
            asked.append(workers)
            super().__init__(backend="inline")

    monkeypatch.setattr(daskgraphs, "WorkflowExecutor", Counted)
    monkeypatch.setattr(daskgraphs, "available_cpus", lambda: 7)
    daskgraphs.close_workers()
    graph = {"x": (inc, 1)}
    with dask.config.set(num_workers=5):
        assert fp.dask_get(graph, "x", num_workers=3) == 2
        assert fp.dask_get(graph, "x") == 2
    with dask.config.set(num_workers=None):
        assert fp.dask_get(graph, "x") == 2
        assert fp.dask_get(graph, "x", num_workers=7) == 2  # the same executor
    with Counted(9) as pool:
        assert fp.dask_get(graph, "x", num_workers=11, pool=pool) == 2
    assert asked == [3, 5, 7, 9]
    daskgraphs.close_workers()


def test_calls_from_several_threads_do_not_meet():
    found = {}

    def call(i):
        found[i] = fp.dask_get({"x": (inc, i)}, "x")

    threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: 1, 1: 2, 2: 3}
    assert len(daskgraphs._idle) == 1
    daskgraphs.close_workers()
