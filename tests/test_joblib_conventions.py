"""What users of joblib expect of a backend: writable arrays, memory maps, initializers, its name inside of tasks."""

from __future__ import annotations

import functools
import inspect
import multiprocessing
import os
import sys
import threading
from concurrent.futures.process import BrokenProcessPool
from operator import attrgetter

import numpy as np
import pytest
from conftest import wait_until

import forgepar as fp

joblib = pytest.importorskip("joblib", reason="joblib is not installed: pip install 'forgepar[joblib]'")
import forgepar.joblib  # noqa: E402

METHODS = ["forkserver", "spawn", "fork"]
MIB = 1 << 20
HAS_KEYWORDS = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(joblib.Parallel).parameters.values())


@pytest.fixture(scope="module", autouse=True)
def none_stay():
    yield
    forgepar.joblib.close()


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """In place of what other tests have: workers stay from call to call, at most two."""
    yield
    wait_until(lambda: len(multiprocessing.active_children()) <= 2, "children to end")


def run(function, *columns, backend="forgepar", keywords=None, **options):
    with joblib.parallel_config(backend=backend, **(keywords or {})):
        parallel = joblib.Parallel(**{"n_jobs": 2, **options})
        return parallel(joblib.delayed(function)(*row) for row in zip(*columns, strict=True))


def is_writable(array):
    return array.flags.writeable


def add_one(array, i):
    array += 1
    return float(array[0]) + 0 * i


# Arrays


@pytest.mark.parametrize("n_bytes", [8, 1000, MIB - 8, MIB])
def test_arrays_up_to_the_limit_are_private_copies(n_bytes):
    array = np.zeros(n_bytes // 8)
    for batch_size in (1, 4):
        assert run(add_one, [array] * 8, range(8), batch_size=batch_size) == [1.0] * 8
    assert not array.any()


def test_larger_arrays_are_read_only():
    array = np.zeros(MIB // 8 + 1)
    assert run(is_writable, [array] * 4) == [False] * 4
    with pytest.raises(ValueError, match="read-only"):
        run(add_one, [array] * 2, range(2))


def test_an_array_that_cannot_be_written_stays_so():
    array = np.zeros(MIB // 8)
    array.flags.writeable = False
    assert run(is_writable, [array, array[:10]]) == [False, False]


SIZES = (800, 1000, 1024, 1200, MIB // 2, MIB, MIB + 8)
LIMITS = [
    ({}, MIB),
    ({"max_nbytes": None}, 2 * MIB),
    ({"max_nbytes": "1K"}, 1024),
    ({"max_nbytes": 1000, "mmap_mode": "r"}, 1000),
    ({"max_nbytes": 1000, "mmap_mode": "c"}, 2 * MIB),
    ({"max_nbytes": 1000.5}, 1000),
    ({"max_nbytes": "0.5M"}, MIB // 2),
    ({"max_nbytes": "2M"}, 2 * MIB),
    ({"max_nbytes": 1000, "mmap_mode": None}, 2 * MIB),
]
N_ASKED_OF_LOKY = 5  # it starts workers for each, and does not know how to have no mmap_mode


@pytest.mark.parametrize(("settings", "limit"), LIMITS, ids=str)
def test_max_nbytes_and_mmap_mode(settings, limit):
    arrays = [np.zeros(size // 8) for size in SIZES]
    expected = [size <= limit for size in SIZES]
    assert run(is_writable, arrays, **settings) == expected
    with joblib.parallel_config(backend="forgepar", **settings):
        assert joblib.Parallel(n_jobs=2)(joblib.delayed(is_writable)(array) for array in arrays) == expected


def test_they_mean_what_they_mean_to_loky():
    arrays = [np.zeros(size // 8) for size in SIZES]
    look = attrgetter("flags.writeable")  # its workers cannot import this module
    try:
        for settings, limit in LIMITS[:N_ASKED_OF_LOKY]:
            assert run(look, arrays, backend="loky", **settings) == [size <= limit for size in SIZES]
    finally:
        joblib.externals.loky.get_reusable_executor().shutdown(wait=True)


@pytest.mark.parametrize("mode", ["c", None])
def test_copies_on_write_are_private(mode):
    array = np.zeros(MIB)
    assert run(add_one, [array] * 4, range(4), mmap_mode=mode) == [1.0] * 4
    assert not array.any()


@pytest.mark.parametrize("mode", ["r+", "w+"])
def test_memory_that_tasks_share_and_write_to_is_refused(mode):
    with pytest.raises(ValueError, match=f"got '{mode[0]}.': tasks of the backend 'forgepar' share no writable memory"):
        run(is_writable, [np.zeros(10)] * 2, mmap_mode=mode)


@pytest.mark.parametrize(
    ("settings", "match"),
    [({"mmap_mode": "x"}, "mmap_mode must be"), ({"max_nbytes": "1X"}, "1X"), ({"max_nbytes": "M"}, "M")],
)
def test_settings_that_cannot_be(settings, match):
    with pytest.raises(ValueError, match=match):
        run(is_writable, [np.zeros(10)] * 2, **settings)


def fill_part(out, part, i):
    out[i] = i
    part[...] = -i
    return type(out).__name__


def test_what_tasks_write_to_a_memory_map_is_in_its_file(tmp_path):
    for batch_size in (1, 4):
        out = np.memmap(tmp_path / "out", np.float64, "w+", shape=(300_000,))
        grid = np.memmap(tmp_path / "grid", np.int32, "w+", shape=(8, 6))
        parts = [grid[i, ::-2] for i in range(8)]
        assert run(fill_part, [out] * 8, parts, range(8), batch_size=batch_size) == ["memmap"] * 8
        assert out[:9].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0]
        assert grid.tolist() == [[0, -i, 0, -i, 0, -i] for i in range(8)]


def test_parts_of_a_memory_map_arrive_as_they_are(tmp_path):
    grid = np.memmap(tmp_path / "grid", np.int64, "w+", shape=(6, 8))
    grid[:] = np.arange(48).reshape(6, 8)
    views = [grid, grid[1], grid[::2, ::-3], grid.T, np.asarray(grid)[::-1], grid[3:3], grid[2:, 1].copy()]
    for view, found in zip(views, run(lambda view: view, views), strict=True):
        assert np.array_equal(view, found)
        assert found.flags.writeable
    read = np.memmap(tmp_path / "grid", np.int64, "r", shape=(6, 8))
    private = np.memmap(tmp_path / "grid", np.int64, "c", shape=(6, 8))
    private[0] = -1  # which the file does not have
    assert run(lambda view: (view.flags.writeable, int(view[0, 0])), [read, private]) == [(False, 0), (True, -1)]


def test_results_can_be_written():
    large, small = np.zeros(MIB), np.zeros(10)
    for array in run(lambda array: array, [large, small]) + run(lambda array: array[:5], [large, small]):
        assert array.flags.writeable


# Calls of one batch


class Bag:
    def __init__(self):
        self.items = []


def grown(acc, i):
    (acc.items if isinstance(acc, Bag) else acc).append(i)
    return len(acc.items if isinstance(acc, Bag) else acc)


@pytest.mark.parametrize("batch_size", [1, 5, "auto"])
def test_no_call_sees_what_another_did_to_its_arguments(batch_size):
    for acc in ([], Bag()):
        assert run(grown, [acc] * 20, range(20), batch_size=batch_size) == [1] * 20
        assert run(functools.partial(grown, acc), range(20), batch_size=batch_size) == [1] * 20


# Workers


def read(name):
    return os.environ.get(name)


def set_variable(name, value):
    os.environ[name] = value


def pid(_):
    return os.getpid()


def keywords_of(**keywords):
    """Return both ways to hand keywords to a backend, where this joblib has both."""
    ways = [{"keywords": keywords}]
    return [*ways, keywords] if HAS_KEYWORDS else ways


def test_an_initializer_is_called_in_each_worker():
    for way in keywords_of(initializer=set_variable, initargs=("FROM_INIT", "yes")):
        assert run(read, ["FROM_INIT"] * 8, batch_size=1, **way) == ["yes"] * 8
    assert "FROM_INIT" not in os.environ


def test_a_call_without_it_gets_workers_that_have_not_called_it():
    way = {"keywords": {"initializer": set_variable, "initargs": ["FROM_INIT", "yes"]}}
    assert run(read, ["FROM_INIT"] * 4, **way) == ["yes"] * 4
    assert run(read, ["FROM_INIT"] * 4) == [None] * 4


def test_calls_with_the_same_initializer_share_workers():
    def pids(value, table=None):
        keywords = {"initializer": set_variable, "initargs": ("A", value)}
        if table is not None:
            keywords = {"initializer": np.sum, "initargs": (table,)}
        return set(run(pid, range(20), batch_size=1, keywords=keywords))

    first = pids("1")
    assert len(first | pids("1")) <= 2
    assert not first & pids("2")
    table = np.zeros(3)
    assert len(pids("", table) | pids("", table)) <= 2
    assert not pids("", table) & pids("", table.copy())  # whether these are equal arrays do not say


def test_an_initializer_that_fails_is_told():
    def bad():
        raise OSError("no licence")

    with pytest.raises(BrokenProcessPool):
        run(pid, range(4), keywords={"initializer": bad})
    assert len(run(pid, range(4))) == 4


def test_threads_are_limited_before_an_initializer_is_unpickled():
    def note():
        os.environ["SEEN"] = os.environ["OMP_NUM_THREADS"]

    keywords = {"initializer": note, "inner_max_num_threads": 3}
    assert run(read, ["SEEN"] * 4, keywords=keywords) == ["3"] * 4


def test_workers_that_are_idle_end():
    run(pid, range(4), keywords={"idle_worker_timeout": 0.2})
    wait_until(lambda: not multiprocessing.active_children(), "workers to end")
    assert len(run(pid, range(4), keywords={"idle_worker_timeout": 3600})) == 4
    assert any(isinstance(thread, threading.Timer) for thread in threading.enumerate())
    forgepar.joblib.close()
    assert not any(isinstance(thread, threading.Timer) and thread.is_alive() for thread in timers())


def timers():
    found = [thread for thread in threading.enumerate() if isinstance(thread, threading.Timer)]
    for thread in found:
        thread.join(10)
    return found


def test_workers_are_replaced_after_so_many_batches():
    pids = run(pid, range(6), batch_size=1, keywords={"maxtasksperchild": 1})
    assert len(set(pids)) == 6
    forgepar.joblib.close()


# Keywords


def test_keywords_without_effect_are_taken(tmp_path):
    keywords = {"temp_folder": str(tmp_path), "prefer": "processes", "verbose": 0}
    assert run(abs, [-1, -2], **keywords) == [1, 2]
    with joblib.parallel_config(backend="forgepar", **keywords):
        assert joblib.Parallel(n_jobs=2)(joblib.delayed(abs)(i) for i in (-1, -2)) == [1, 2]
    assert run(abs, [-1, -2], keywords={"context": multiprocessing.get_context("spawn"), "prewarm": "auto"}) == [1, 2]
    assert not list(tmp_path.iterdir())


def test_tasks_that_need_the_callers_memory_are_none_of_ours():
    with joblib.parallel_config(backend="forgepar", n_jobs=2):
        here = joblib.Parallel(require="sharedmem")(joblib.delayed(os.getpid)() for _ in range(3))
    assert here == [os.getpid()] * 3
    with pytest.raises(ValueError, match="shared memory"):
        joblib.Parallel(n_jobs=2, backend="forgepar", require="sharedmem")


@pytest.mark.parametrize("name", ["initialiser", "timeout", "forward_reducers", "start_method"])
def test_keywords_that_are_not_known_are_refused(name):
    with pytest.raises(TypeError, match=f"{name}"):
        joblib.parallel_config(backend="forgepar", **{name: 1})
    parallel = {name: 1}
    if HAS_KEYWORDS and name != "timeout":
        with pytest.raises(TypeError, match=f"{name}= is not an option of the backend 'forgepar'"):
            run(abs, [-1], n_jobs=1, **parallel)


@pytest.mark.parametrize(
    ("keywords", "error"),
    [
        ({"initializer": 5}, TypeError),
        ({"idle_worker_timeout": 0}, ValueError),
        ({"idle_worker_timeout": "1"}, ValueError),
        ({"executor": object(), "initializer": print}, ValueError),
        ({"executor": object(), "idle_worker_timeout": 1}, ValueError),
    ],
)
def test_values_that_cannot_be_are_refused(keywords, error):
    with pytest.raises(error, match=list(keywords)[-1]):
        joblib.parallel_config(backend="forgepar", **keywords)


# The name inside of tasks. What is local to a function travels by value, so that no worker imports this module.


@pytest.fixture(params=METHODS)
def start_method(request):
    forgepar.joblib.close()
    return request.param


def test_the_name_is_known_inside_of_joblibs_tasks(start_method):
    def inner(i):
        import os

        from joblib import Parallel, delayed, parallel_config

        found = Parallel(n_jobs=2, backend="forgepar")(delayed(abs)(-j) for j in range(i))
        with parallel_config(backend="forgepar", n_jobs=2):
            pids = Parallel()(delayed(os.getpid)() for _ in range(3))
        return found, set(pids) == {os.getpid()}

    with fp.ForgeExecutor(2, start_method=start_method) as executor:
        found = run(inner, range(1, 4), keywords={"executor": executor})
    assert found == [([0], True), ([0, 1], True), ([0, 1, 2], True)]


def test_the_name_is_known_inside_of_a_workflows_tasks_and_of_jobs(start_method):
    def inner(i):
        import os

        import joblib

        pids = joblib.Parallel(n_jobs=2, backend="forgepar")(joblib.delayed(os.getpid)() for _ in range(3))
        with joblib.parallel_config("forgepar", n_jobs=2, initializer=print, max_nbytes="1K"):
            nested = joblib.Parallel()(joblib.delayed(abs)(-j) for j in range(i))
        return set(pids) == {os.getpid()}, nested

    wf = fp.Workflow()
    handles = wf.map(inner, range(3))
    assert wf.run(workers=1, start_method=start_method)[handles] == [(True, list(range(i))) for i in range(3)]
    with fp.ForgeExecutor(1, start_method=start_method) as executor:
        assert executor.submit(inner, 2).result() == (True, [0, 1])


@pytest.mark.parametrize("method", ["forkserver", "spawn"])
def test_workers_start_without_joblib_and_find_it_as_ever(method):
    def look():
        import sys

        before = [name for name in ("joblib", "forgepar.joblib", "numpy") if name in sys.modules]
        from importlib.util import find_spec

        import joblib

        again = find_spec("joblib")
        has = "forgepar" in joblib.parallel.BACKENDS
        return before, has, "forgepar.joblib" in sys.modules, again.name, joblib.__spec__.origin == joblib.__file__

    wf = fp.Workflow()
    handle = wf.add(look)
    assert wf.run(workers=1, start_method=method)[handle] == ([], True, False, "joblib", True)


def test_this_process_imports_nothing_otherwise():
    assert [finder for finder in sys.meta_path if type(finder).__module__.startswith("forgepar")] == []
