"""Workflows on workers that others own: the contract of every backend, and what is special to these."""

from __future__ import annotations

import concurrent.futures
import logging
import multiprocessing
import os
import sys
import threading
import time
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pytest
from test_contract import Contract, identity

import forgepar as fp


def process_pool(workers=2, initializer=None):
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer)


def loky_pool(workers=2):
    loky = pytest.importorskip("loky", reason="loky is not installed")
    return loky.ProcessPoolExecutor(workers)


@pytest.fixture(scope="class")
def executor(request):
    """In place of the contract's own: an executor on a pool, which is shut down by whoever made it."""
    with request.cls.make_pool() as pool:
        with fp.WorkflowExecutor(backend=fp.FuturesBackend(pool)) as executor:
            warm = fp.Workflow()
            warm.map(identity, [1, 2])
            executor.run(warm)
            yield executor
        assert pool.submit(abs, -1).result() == 1, "the pool was not ours to close"


class TestThreads(Contract):
    make_pool = staticmethod(lambda: ThreadPoolExecutor(2))


class TestProcessPool(Contract):
    make_pool = staticmethod(process_pool)


class TestLoky(Contract):
    make_pool = staticmethod(loky_pool)


# What is special to them

release = threading.Event()
running = threading.Event()


@pytest.fixture(autouse=True)
def released():
    release.clear()
    running.clear()
    yield
    release.set()


def hold(*_):
    running.set()
    assert release.wait(30), "nobody released it"
    return "released"


def whereabouts(_):
    return os.getpid(), threading.get_ident()


def leave(code):
    os._exit(code)


def leave_once(path):
    if not path.exists():
        path.touch()
        os._exit(7)
    return path.name


def say(word):
    sys.stdout.write(f"says {word}\n")
    logging.getLogger("tests.said").warning("logs %s", word)
    fp.context().progress(0.5, word)
    return word


def told(_):
    context = fp.context()
    return context.task, context.attempt, context.cancelled(), context.seed, float(context.rng().random())


def clock_of(_):
    return fp.context().deadline - time.monotonic()


@dataclass
class Elsewhere(Executor):
    """Stands for an executor on another machine: its workers cannot open the files of this one."""

    pool: Executor

    def submit(self, fn, request, /):
        return self.pool.submit(fn, request._replace(board="/no/such/board"))


def set_clock():
    ours = time.perf_counter
    time.perf_counter = lambda: ours() + 1e6


def started_at(backend):
    wf = fp.Workflow()
    wf.map(identity, range(4))
    result = wf.run(backend=backend)
    return [(record.start, record.duration, result.wall_seconds) for record in result.records]


def test_a_run_starts_the_executor_and_leaves_it_open():
    with ThreadPoolExecutor(2) as pool:
        backend = fp.FuturesBackend(pool)
        for _ in range(3):  # the same backend, opened anew by each run
            wf = fp.Workflow()
            total = wf.add(sum, wf.map(identity, range(10)))
            assert wf.run(backend=backend)[total] == 45
        assert pool.submit(abs, -1).result() == 1


def test_what_makes_an_executor_has_it_shut_down():
    made = []

    def make():
        made.append(ThreadPoolExecutor(2))
        return made[-1]

    wf = fp.Workflow()
    wf.map(identity, [1, 2])
    assert wf.run(backend=fp.FuturesBackend(make)).ok
    assert len(made) == 1
    with pytest.raises(RuntimeError, match="shutdown"):
        made[0].submit(abs, 1)


def test_records_number_threads_and_processes():
    with ThreadPoolExecutor(3) as pool, fp.WorkflowExecutor(backend=fp.FuturesBackend(pool)) as executor:
        seen = {}
        for _ in range(3):
            wf = fp.Workflow()
            handles = wf.map(whereabouts, range(30))
            result = executor.run(wf)
            for handle in handles:
                worker = result.record(handle).worker
                assert seen.setdefault(result[handle], worker) == worker
        assert len(set(seen.values())) == len(seen)
        assert set(seen.values()) <= {0, 1, 2}


def test_threads_know_which_task_they_run():
    with ThreadPoolExecutor(4) as pool:
        wf = fp.Workflow()
        handles = wf.map(told, range(50))
        result = wf.run(backend=fp.FuturesBackend(pool))
    inline = fp.Workflow()
    same = inline.map(told, range(50))
    assert result[handles] == inline.run(backend="inline")[same]
    with pytest.raises(fp.NotInTask):
        fp.context()


def test_large_values_travel_and_are_read_only():
    array = np.arange(100_000)

    def write(values):
        values[0] = 1

    with process_pool() as pool, fp.WorkflowExecutor(backend=fp.FuturesBackend(pool)) as executor:
        wf = fp.Workflow()
        sums = wf.map(lambda values, i: int(values.sum()) + i, [wf.add(identity, array)] * 8, range(8))
        scaled = wf.map(lambda i, by: by * i, range(4), by=array)
        result = executor.run(wf)
        assert result[sums] == [int(array.sum()) + i for i in range(8)]
        np.testing.assert_array_equal(result[scaled][3], 3 * array)
        bad = fp.Workflow()
        bad.add(write, bad.add(identity, array))
        with pytest.raises(fp.WorkflowFailed, match="read-only"):
            executor.run(bad)
        assert executor._backend.arena.names() == []
        assert result.bytes.written > 0


@pytest.mark.parametrize("make", [process_pool, loky_pool])
def test_a_worker_that_dies_fails_its_task_and_the_run_ends(make):
    with make() as pool:
        wf = fp.Workflow()
        done = wf.add(identity, 5)
        wf.add(fp.task(leave).options(name="leaver"), 3)
        after = wf.map(identity, [done] * 5)
        with pytest.raises(fp.WorkflowFailed) as caught:
            wf.run(backend=fp.FuturesBackend(pool), fail_fast=False)
        result = caught.value.result
        assert isinstance(result.errors["leaver"], fp.WorkerDied)
        assert isinstance(result.errors["leaver"].__cause__, BrokenExecutor)
        # Nobody is left to run the rest, and each says why.
        assert {type(result.errors[task.name]) for task in after if task.name in result.errors} <= {fp.WorkerDied}
        assert all(record.status in ("completed", "failed", "skipped") for record in result.records)


def test_an_executor_that_was_made_here_is_made_anew_when_it_breaks(tmp_path):
    wf = fp.Workflow()
    name = wf.add(fp.task(leave_once).options(retries=1), tmp_path / "a")
    others = wf.map(fp.task(identity).options(retries=1), range(20))  # a pool that breaks takes what else runs along
    result = wf.run(backend=fp.FuturesBackend(process_pool))
    assert result[name] == "a"
    assert result[others] == list(range(20))


def test_an_executor_that_is_shut_down_says_so():
    pool = ThreadPoolExecutor(1)
    pool.shutdown()
    wf = fp.Workflow()
    wf.add(identity, 1)
    with pytest.raises(fp.WorkflowFailed, match="cannot schedule new futures after shutdown"):
        wf.run(backend=fp.FuturesBackend(pool))


def test_a_task_over_its_time_fails_and_goes_on_unused():
    with ThreadPoolExecutor(2) as pool, fp.WorkflowExecutor(backend=fp.FuturesBackend(pool)) as executor:
        wf = fp.Workflow()
        held = wf.add(fp.task(hold).options(timeout=0.05))
        others = wf.map(identity, range(50))
        with (
            pytest.warns(RuntimeWarning, match="cannot be ended from here"),
            pytest.raises(fp.WorkflowFailed) as caught,
        ):
            executor.run(wf, fail_fast=False)
        result = caught.value.result
        assert isinstance(result.errors[held.name], fp.TaskTimeout)
        assert result[others] == list(range(50))
        assert result.record(held).status == "failed"
        again = fp.Workflow()
        more = again.map(whereabouts, range(10))
        assert len(set(executor.run(again)[more])) == 1  # the other thread is still at it
        release.set()
        both = fp.Workflow()
        total = both.add(sum, both.map(identity, range(10)))
        assert executor.run(both)[total] == 45


def test_fail_fast_ends_while_another_task_goes_on():
    with ThreadPoolExecutor(2) as pool:
        wf = fp.Workflow()
        held = wf.add(hold)
        wf.add(fail_after_running)
        with pytest.warns(RuntimeWarning, match="cannot be ended"), pytest.raises(fp.WorkflowFailed) as caught:
            wf.run(backend=fp.FuturesBackend(pool))
        assert caught.value.result.record(held).status == "cancelled"
        assert not release.is_set()
        release.set()


def fail_after_running():
    assert running.wait(30)
    raise ValueError("now")


def test_a_run_that_is_called_off_begins_nothing_more():
    token = fp.CancellationToken()
    with ThreadPoolExecutor(1) as pool:
        wf = fp.Workflow()
        held = wf.add(hold)
        rest = wf.map(identity, range(20))
        canceller = threading.Thread(target=lambda: (running.wait(30), token.cancel(), release.set()))
        canceller.start()
        result = wf.run(backend=fp.FuturesBackend(pool), cancel=token)
        canceller.join()
    assert result.status == "cancelled"
    assert result[held] == "released"
    assert {result.record(task).status for task in rest} == {"cancelled"}


@pytest.mark.parametrize("make", [lambda: ThreadPoolExecutor(2), process_pool], ids=["threads", "processes"])
def test_what_tasks_tell_is_shown_behind_their_names(make, capsys, caplog):
    lines = []
    with make() as pool:
        wf = fp.Workflow()
        wf.map(say, ["one", "two", "three"])
        wf.run(backend=fp.FuturesBackend(pool), show=lines.append)
    assert sorted((line.task, line.text) for line in lines) == [
        ("say-0", "says one"),
        ("say-1", "says two"),
        ("say-2", "says three"),
    ]
    assert sorted(record.getMessage() for record in caplog.records) == ["logs one", "logs three", "logs two"]
    assert capsys.readouterr().out == ""


def test_workers_elsewhere_keep_another_clock():
    with process_pool(initializer=set_clock) as pool:
        for start, duration, wall in started_at(fp.FuturesBackend(Elsewhere(pool), workers=2)):
            assert 0 <= start <= wall
            assert 0 <= duration <= wall
        wf = fp.Workflow()
        left = wf.map(clock_of, range(3))
        result = wf.run(backend=fp.FuturesBackend(Elsewhere(pool), workers=2), timeout=100)
    assert all(0 < seconds <= 101 for seconds in result[left])


def test_no_task_of_a_batch_that_cannot_be_seen_runs_twice(tmp_path):
    log = tmp_path / "log"

    def note(i):
        with log.open("a") as file:
            file.write(f"{i}\n")
        threading.Event().wait(0.02 if i == 150 else 0.0)  # a stall, at which what can be seen is taken back

    with process_pool() as pool:
        wf = fp.Workflow()
        wf.map(note, range(200))
        wf.run(backend=fp.FuturesBackend(Elsewhere(pool), workers=2))
    assert sorted(map(int, log.read_text().split())) == list(range(200))


def test_workers_do_not_start_workers(tmp_path):
    def nested():
        inner = fp.Workflow()
        pid = inner.add(os.getpid)
        return inner.run()[pid] == os.getpid()

    with process_pool() as pool:
        wf = fp.Workflow()
        inner = wf.add(nested)
        assert wf.run(backend=fp.FuturesBackend(pool))[inner] is True


def test_memory_is_admitted_and_not_watched():
    with ThreadPoolExecutor(2) as pool:
        wf = fp.Workflow()
        sizes = wf.map(fp.task(lambda n: len(bytearray(n))).options(memory="1MB"), [30_000_000] * 3)
        assert wf.run(backend=fp.FuturesBackend(pool))[sizes] == [30_000_000] * 3


def test_a_subinterpreter_is_a_worker():
    make = getattr(concurrent.futures, "InterpreterPoolExecutor", None)
    if make is None:
        pytest.skip("this Python has no InterpreterPoolExecutor, which came with 3.14")
    with make(2) as pool:  # no numpy in there: it loads in one interpreter of a process only
        wf = fp.Workflow()
        total = wf.add(sum, wf.map(abs, range(-10, 10)))
        assert wf.run(backend=fp.FuturesBackend(pool))[total] == 100


# Arguments


def test_what_is_no_executor():
    with pytest.raises(ValueError, match="must have a submit"):
        fp.FuturesBackend(7)


class Silent(Executor):
    def submit(self, fn, /, *args, **kwargs):
        future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def test_an_executor_that_does_not_tell_its_workers():
    with pytest.raises(ValueError, match="Silent does not state how many workers it has"):
        fp.FuturesBackend(Silent())
    wf = fp.Workflow()
    total = wf.add(sum, wf.map(identity, range(5)))
    assert wf.run(backend=fp.FuturesBackend(Silent(), workers=1))[total] == 10
    with pytest.raises(ValueError, match=r"workers must be .*, got 0"):
        fp.FuturesBackend(Silent(), workers=0)


@pytest.mark.parametrize("name", ["workers", "start_method", "memory_budget", "max_tasks_per_worker"])
def test_arguments_for_other_workers_are_refused(name):
    with ThreadPoolExecutor(1) as pool, pytest.raises(ValueError, match=f"{name}= is for workers that forgepar starts"):
        fp.WorkflowExecutor(backend=fp.FuturesBackend(pool), **{name: 1})


def test_what_is_no_backend():
    with pytest.raises(ValueError, match=r"backend must be .* got 7\."):
        fp.WorkflowExecutor(backend=7)
