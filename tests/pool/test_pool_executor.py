"""`ForgeExecutor`: an executor as others, and what it does that others do not."""

from __future__ import annotations

import asyncio
import concurrent.futures
import functools
import gc
import logging
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import tracemalloc
import weakref
from concurrent.futures import CancelledError, Future
from concurrent.futures.process import BrokenProcessPool

import numpy as np
import psutil
import pytest
from conftest import PATIENCE, is_gone, own_arenas, wait_until

import forgepar as fp
from forgepar.backends import process
from forgepar.pool import batches, job_table, submissions
from forgepar.pool.jobs import SentCallable

METHODS = ["forkserver", "spawn", "fork"]
_initialized: list[object] = []


@pytest.fixture(scope="module")
def executor():
    """One for all tests that do not need one of their own: to start workers takes longer than most tests."""
    with fp.ForgeExecutor(workers=2) as executor:
        before = len(multiprocessing.active_children())
        for future in [executor.submit(double, i) for i in range(50)]:
            future.result()
        wait_until(lambda: len(multiprocessing.active_children()) == before + 2, "both workers")
        yield executor


@pytest.fixture(params=METHODS)
def any_executor(request):
    with fp.ForgeExecutor(2, start_method=request.param) as executor:
        yield executor


def segments_of(executor):
    return executor._scheduler._arena.names()


def double(x):
    return 2 * x


def fail(text="no"):
    raise ValueError(text)


def leave(code=3):
    os._exit(code)


def note_initialized(value):
    _initialized.append(value)


def put_into_initial(value):
    (queue,) = _initialized
    queue.put(value)


def break_down():
    raise OSError("no such device")


def wait_for(path):
    wait_until(path.exists, f"{path} to be there")
    return path.name


def say_and_wait(started, path):
    started.touch()
    return wait_for(path)


def fails_twice(path):
    with path.open("a") as file:
        file.write("x")
    if path.stat().st_size < 3:
        raise OSError("not yet")
    return path.stat().st_size


@fp.task(timeout=0.1)
def hangs():
    threading.Event().wait(60)


class Loud:
    """Says when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return _loaded, (self.path, os.getpid())


def _loaded(path, _):
    with path.open("a") as file:
        file.write(f"{os.getpid()}\n")
    return Loud(path)


# As any executor


def test_it_is_an_executor(any_executor):
    assert isinstance(any_executor, concurrent.futures.Executor)
    future = any_executor.submit(pow, 2, exp=5)
    assert isinstance(future, Future)
    assert future.result() == 32
    assert any_executor.submit(lambda: any_executor is not None) is not None


def test_lambdas_closures_and_methods(any_executor):
    factor = 3
    assert any_executor.submit(lambda x: x * factor, 5).result() == 15
    assert list(any_executor.map(lambda x: x + factor, range(50))) == [x + 3 for x in range(50)]
    assert any_executor.submit("text".upper).result() == "TEXT"


def test_a_closure_that_changed_is_another():
    box = [1]
    with fp.ForgeExecutor(1) as executor:
        add = lambda x: x + box[0]  # noqa: E731
        assert executor.submit(add, 1).result() == 2
        box[0] = 10
        assert executor.submit(add, 1).result() == 11
        assert executor.submit([3, 1, 2].index, 2).result() == 2


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map(executor, chunksize):
    rows = executor.map(pow, range(20), [2] * 30, chunksize=chunksize)
    assert list(rows) == [i * i for i in range(20)]
    assert list(executor.map(double, [], chunksize=chunksize)) == []
    assert sum(executor.map(fp.task(double).options(retries=1), range(10), chunksize=chunksize)) == 90


def test_map_tells_errors_in_their_places(executor):
    found = executor.map(divmod, [1, 1, 1], [2, 0, 3])
    assert next(found) == (0, 1)
    with pytest.raises(ZeroDivisionError):
        next(found)
    with pytest.raises(ValueError, match="chunksize"):
        executor.map(double, [1], chunksize=0)


def test_map_that_takes_too_long(executor, tmp_path):
    with pytest.raises(TimeoutError):
        list(executor.map(wait_for, [tmp_path / "made"], timeout=0.05))
    (tmp_path / "made").touch()


@pytest.mark.skipif(sys.version_info < (3, 14), reason="Executor.map has a buffersize from Python 3.14 on")
def test_map_with_a_buffer(executor):
    assert list(executor.map(double, iter(range(10)), buffersize=2)) == [2 * i for i in range(10)]


def test_an_error_is_the_jobs_own_with_the_workers_traceback_behind_it(executor):
    error = executor.submit(fail, "why").exception()
    assert (type(error), str(error)) == (ValueError, "why")
    assert "raise ValueError(text)" in str(error.__cause__)


def test_what_cannot_be_pickled_is_the_futures_error(executor):
    lock = threading.Lock()
    for future, note in [
        (executor.submit(double, lock), "args[0] is a lock"),
        (executor.submit(double, x=lock), "kwargs['x'] is a lock"),
        (executor.submit(lambda: lock), "the callable itself"),
    ]:
        error = future.exception(timeout=PATIENCE)
        assert isinstance(error, TypeError)
        assert note in "".join(error.__notes__)
    result = executor.submit(threading.Lock)
    assert isinstance(result.exception(), fp.UnpicklableResult)
    assert isinstance(result.exception(), pickle.PicklingError)
    assert executor.submit(double, 4).result() == 8


def test_sys_exit_in_a_job_is_system_exit_here(executor):
    error = executor.submit(sys.exit, 7).exception()
    assert isinstance(error, SystemExit)
    assert isinstance(error, fp.TaskExited)
    assert error.code == 7


def test_done_callbacks_may_submit_more(executor):
    found = Future()
    first = executor.submit(double, 4)
    first.add_done_callback(lambda done: executor.submit(double, done.result()).add_done_callback(found.set_result))
    assert found.result(timeout=PATIENCE).result() == 16


def test_many_threads_submit(executor):
    found = {}

    def work(name):
        found[name] = [executor.submit(double, i).result() for i in range(50)]

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(values == [2 * i for i in range(50)] for values in found.values())
    assert len(found) == 8


def test_asyncio(executor):
    async def gather():
        loop = asyncio.get_running_loop()
        results = await asyncio.gather(*(loop.run_in_executor(executor, double, i) for i in range(20)))
        with pytest.raises(ValueError, match="no"):
            await loop.run_in_executor(executor, fail)
        arrays = await loop.run_in_executor(executor, np.arange, 50_000)
        return results, arrays

    results, array = asyncio.run(gather())
    assert results == [2 * i for i in range(20)]
    assert array[-1] == 49_999


def test_what_is_queued_can_be_cancelled(tmp_path):
    with fp.ForgeExecutor(1) as executor:
        running = executor.submit(say_and_wait, tmp_path / "started", tmp_path / "go")
        wait_until((tmp_path / "started").exists, "the first job")
        queued = [executor.submit(double, i) for i in range(10)]
        assert all(future.cancel() for future in queued[::2])
        assert not running.cancel()
        (tmp_path / "go").touch()
        assert [future.result() for future in queued[1::2]] == [2, 6, 10, 14, 18]
        assert concurrent.futures.wait(queued, timeout=PATIENCE).not_done == set()
        with pytest.raises(CancelledError):
            queued[0].result()


def test_shutdown(tmp_path):
    executor = fp.ForgeExecutor(1)
    futures = [executor.submit(double, i) for i in range(20)]
    executor.shutdown(wait=False)
    with pytest.raises(RuntimeError, match="cannot schedule new futures after shutdown"):
        executor.submit(double, 1)
    executor.shutdown()
    assert [future.result(timeout=0) for future in futures] == [2 * i for i in range(20)]


def test_shutdown_that_cancels(tmp_path):
    executor = fp.ForgeExecutor(1)
    running = executor.submit(say_and_wait, tmp_path / "started", tmp_path / "go")
    queued = [executor.submit(double, i) for i in range(10)]
    dependent = executor.submit(double, queued[-1])
    wait_until((tmp_path / "started").exists, "the first job")
    executor.shutdown(wait=False, cancel_futures=True)
    wait_until(lambda: all(future.cancelled() for future in [*queued, dependent]), "cancellation")
    (tmp_path / "go").touch()
    executor.shutdown()
    assert running.result() == "go"


def test_shutdown_before_anything_was_submitted():
    before = own_arenas()
    with fp.ForgeExecutor(2) as executor:
        pass
    executor.shutdown()
    assert own_arenas() == before


def test_an_executor_that_nobody_has_ends_when_its_jobs_have():
    before = own_arenas()
    executor = fp.ForgeExecutor(1)
    future = executor.submit(double, 21)
    gone = weakref.ref(executor)
    del executor
    gc.collect()
    assert gone() is None
    assert future.result(timeout=PATIENCE) == 42
    wait_until(lambda: own_arenas() == before, "the arena to go")


@pytest.mark.parametrize("part", ["listen", "n_memory_kills"])
def test_a_start_that_fails_leaves_nothing(monkeypatch, part):
    def fail(*_):
        raise FileNotFoundError

    children, arenas = set(psutil.Process().children()), own_arenas()
    with fp.ForgeExecutor(1, start_method="fork") as executor:
        with monkeypatch.context() as patch:
            patch.setattr(process, part, fail)
            with pytest.raises(FileNotFoundError):
                executor.submit(abs, -1)
        assert (set(psutil.Process().children()), own_arenas()) == (children, arenas)
        assert executor.submit(abs, -1).result() == 1


def test_an_interrupt_ends_what_runs(tmp_path):
    with pytest.raises(KeyboardInterrupt), fp.ForgeExecutor(1) as executor:  # noqa: PT012
        running = executor.submit(say_and_wait, tmp_path / "started", tmp_path / "never")
        queued = executor.submit(double, 1)
        wait_until((tmp_path / "started").exists, "the job")
        raise KeyboardInterrupt
    assert isinstance(running.exception(timeout=0), fp.WorkerDied)
    assert queued.cancelled()


@pytest.mark.parametrize("method", METHODS)
def test_an_initializer(method):
    context = multiprocessing.get_context(method)
    queue = context.SimpleQueue()  # may only be handed over while a process is started
    with fp.ForgeExecutor(2, context, note_initialized, (queue,)) as executor:
        executor.submit(put_into_initial, "heard").result()
        assert queue.get() == "heard"


def test_an_initializer_of_the_script_with_a_lambda():
    with fp.ForgeExecutor(1, initializer=lambda value: os.environ.update(WORD=value), initargs=("set",)) as executor:
        assert executor.submit(os.getenv, "WORD").result() == "set"


def test_an_initializer_that_fails_breaks_the_executor(capfd):
    before = own_arenas()
    executor = fp.ForgeExecutor(1, initializer=break_down)
    with pytest.raises(BrokenProcessPool, match="The executor cannot run any more jobs"):
        executor.submit(double, 1).result(timeout=PATIENCE)
    with pytest.raises(BrokenProcessPool):
        executor.submit(double, 1)
    executor.shutdown()
    assert own_arenas() == before


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        ({"workers": 0}, "workers must be greater than 0"),
        ({"workers": 2, "max_workers": 2}, "Pass either workers or max_workers, not both; got 2 and 2"),
        ({"max_tasks_per_child": 0}, "max_tasks_per_child must be a positive integer or None, got 0"),
        ({"start_method": "telepathy"}, "start_method must be one of"),
        (
            {"start_method": "spawn", "mp_context": multiprocessing.get_context("spawn")},
            "Pass either mp_context or start_method",
        ),
        ({"memory_budget": "much"}, "memory_budget must be a number of bytes"),
    ],
)
def test_arguments_that_cannot_be(arguments, fault):
    with pytest.raises(ValueError, match=fault):
        fp.ForgeExecutor(**arguments)


def test_an_initializer_that_cannot_be_called():
    with pytest.raises(TypeError, match="initializer must be callable or None, got 7"):
        fp.ForgeExecutor(1, initializer=7)


# Workers


@pytest.mark.parametrize("method", METHODS)
def test_a_death_fails_one_future_and_not_the_executor(method):
    with fp.ForgeExecutor(2, start_method=method) as executor:
        before = [executor.submit(double, i) for i in range(20)]
        dead = executor.submit(leave)
        after = [executor.submit(double, i) for i in range(20)]
        error = dead.exception(timeout=PATIENCE)
        assert isinstance(error, fp.WorkerDied)
        assert isinstance(error, BrokenProcessPool)
        assert (error.exit_code, error.pid > 0) == (3, True)
        assert [future.result(timeout=PATIENCE) for future in before + after] == [2 * i for i in range(20)] * 2
        assert executor.submit(double, 5).result() == 10


def test_a_worker_that_is_killed(executor, tmp_path):
    def hold():
        (tmp_path / "pid").write_text(str(os.getpid()))
        (tmp_path / "ready").touch()
        signal.pause()

    future = executor.submit(hold)
    others = [executor.submit(double, i) for i in range(10)]
    assert [other.result(timeout=PATIENCE) for other in others] == [2 * i for i in range(10)]
    wait_until((tmp_path / "ready").exists, "the job")
    os.kill(pid := int((tmp_path / "pid").read_text()), signal.SIGKILL)
    assert future.exception(timeout=PATIENCE).exit_code == -signal.SIGKILL
    wait_until(lambda: is_gone(pid), "the worker to end")
    assert executor.submit(double, 2).result() == 4


def test_workers_start_as_they_are_needed():
    before = len(multiprocessing.active_children())
    with fp.ForgeExecutor(8) as executor:
        pids = {executor.submit(os.getpid).result() for _ in range(20)}
        assert len(pids) == 1
        assert len(multiprocessing.active_children()) == before + 1


def test_jobs_that_wait_for_each_other_meet(executor, tmp_path):
    """What waits behind a job that does not end goes to a worker that is free."""

    def meet(name, other):
        if name is None:
            return None
        (tmp_path / name).touch()
        return wait_for(tmp_path / other)

    list(executor.map(meet, [None] * 1000, [None] * 1000))  # many go in one batch by now
    pairs = [executor.submit(meet, *pair) for pair in (("a", "b"), ("b", "a"))]
    assert [future.result(timeout=PATIENCE) for future in pairs] == ["b", "a"]


def test_no_worker_is_replaced_for_nothing(tmp_path):
    def note(folder):
        (folder / str(os.getpid())).touch()

    with fp.ForgeExecutor(1, max_tasks_per_child=1, initializer=note, initargs=(tmp_path,)) as executor:
        pids = {executor.submit(os.getpid).result() for _ in range(3)}
    assert {int(path.name) for path in tmp_path.iterdir()} == pids


def test_workers_are_replaced_after_so_many_jobs():
    with fp.ForgeExecutor(1, max_tasks_per_child=3) as executor:
        pids = [executor.submit(os.getpid).result() for _ in range(9)]
        assert len(set(pids)) == 3
        assert pids == sorted(pids, key=pids.index)
        assert len(list(executor.map(double, range(10)))) == 10


def test_thousands_of_callables_do_not_stay_in_workers(monkeypatch):
    monkeypatch.setattr("forgepar.pool.batches._MOST_CALLABLES", 20)
    with fp.ForgeExecutor(2) as executor:
        futures = [executor.submit(lambda i=i: i) for i in range(200)]
        assert [future.result() for future in futures] == list(range(200))
        doubles = [executor.submit(double, future) for future in futures]
        assert [future.result() for future in doubles] == [2 * i for i in range(200)]


@pytest.mark.parametrize(
    "made",
    [
        lambda i: fp.task(abs).options(name=f"job-{i}"),
        lambda i: fp.task(abs).options(name=f"job-{i}", timeout=60.0),
        lambda i: fp.task(abs).options(name=f"job-{i}", memory=2**30 + i),
        lambda i: named_partial(f"job-{i}"),
    ],
    ids=["name", "timeout", "memory", "partial"],
)
def test_names_that_do_not_come_again_take_no_memory(monkeypatch, made):
    for module, bound in ((job_table, "_MOST_NAMES"), (batches, "_MOST_KINDS"), (batches, "_MOST_CALLABLES")):
        monkeypatch.setattr(module, bound, 20)
    monkeypatch.setattr(submissions, "_MOST_REMEMBERED", 20)
    n_jobs = 400
    with fp.ForgeExecutor(workers=1, start_method="fork") as executor:

        def traced_after(begin):
            for first in range(begin, begin + n_jobs, 100):
                jobs = [executor.submit(made(i), -i) for i in range(first, first + 100)]
                assert [job.result() for job in jobs] == list(range(first, first + 100))
            del jobs
            gc.collect()
            return tracemalloc.get_traced_memory()[0]

        tracemalloc.start()
        try:
            before = traced_after(0)
            grown = traced_after(n_jobs) - before
        finally:
            tracemalloc.stop()
    assert grown < 60 * n_jobs  # a name with its count takes 150 bytes; what is bounded swings by some KiB


def named_partial(name):
    made = functools.partial(abs)
    made.__name__ = name
    return made


def test_ordinals_do_not_come_again_when_names_are_forgotten(monkeypatch):
    monkeypatch.setattr(job_table, "_MOST_NAMES", 3)
    ordinals = job_table._Ordinals()
    told = [(name, ordinals.next(name)) for i in range(40) for name in ("often", "often", f"name-{i % 11}")]
    assert len(set(told)) == len(told)
    assert [ordinal for name, ordinal in told if name == "often"] == list(range(80))


def test_jobs_print_here(capsys, caplog):
    def say():
        sys.stdout.write("a line\n")
        logging.getLogger("tests.pool").warning("a record")

    with fp.ForgeExecutor(1) as executor:
        executor.submit(say).result()
    assert capsys.readouterr().out == "a line\n"
    assert [(record.message, record.task) for record in caplog.records] == [("a record", "say-0")]


# Options


def test_a_timeout_ends_the_worker(executor):
    error = executor.submit(hangs).exception(timeout=PATIENCE)
    assert isinstance(error, fp.TaskTimeout)
    assert isinstance(error, TimeoutError)
    assert executor.submit(double, 4).result() == 8


def test_retries(executor, tmp_path):
    assert executor.submit(fp.task(fails_twice).options(retries=2), tmp_path / "a").result() == 3
    with pytest.raises(OSError, match="not yet"):
        executor.submit(fp.task(fails_twice).options(retries=1), tmp_path / "b").result()
    with pytest.raises(OSError, match="not yet"):
        executor.submit(fp.task(fails_twice).options(retries=2, retry_on=KeyError), tmp_path / "c").result()
    assert (tmp_path / "c").stat().st_size == 1


def test_a_worker_that_dies_may_be_tried_again(executor, tmp_path):
    def leave_once(path):
        if not path.exists():
            path.touch()
            os._exit(1)
        return fp.context().attempt

    assert executor.submit(fp.task(leave_once).options(retries=1), tmp_path / "left").result() == 2


def test_memory_that_is_taken_ends_the_worker(executor):
    def grow():
        held = bytearray(200_000_000)
        held[::4096] = b"x" * len(held[::4096])
        threading.Event().wait(60)

    error = executor.submit(fp.task(grow).options(memory="20MB")).exception(timeout=PATIENCE)
    assert isinstance(error, fp.TaskMemoryExceeded)
    with pytest.raises(fp.InsufficientMemory, match="declares memory="):
        executor.submit(fp.task(double).options(memory="900TiB"), 1).result()


@pytest.mark.parametrize("option", [{"compensate": double}, {"fallback": 1}])
def test_options_of_workflows_are_refused(executor, option):
    with pytest.raises(fp.WorkflowError, match="which is for workflows"):
        executor.submit(fp.task(double).options(**option), 1)


def test_programs(executor):
    assert executor.submit(fp.shell("echo {word}"), word="said").result().stdout == "said\n"


def test_jobs_know_who_they_are(executor):
    names = [executor.submit(fp.task(lambda: fp.context().task).options(name="own")) for _ in range(3)]
    assert [future.result() for future in names] == ["own-0", "own-1", "own-2"]
    assert executor.submit(fp.task(lambda: fp.context().task).options(name="chosen")).result() == "chosen-0"


# Futures among the arguments


def test_a_future_stands_for_its_value(executor):
    first = executor.submit(double, 4)
    second = executor.submit(double, first)
    nested = executor.submit(lambda parts, by: (parts, by), [first, {"k": second}, first], by=second)
    assert nested.result() == ([8, {"k": 16}, 8], 16)
    assert executor.submit(double, nested).result() == ([8, {"k": 16}, 8], 16) * 2


def test_a_future_that_is_done_is_as_good(executor):
    words = executor.submit(str.split, "a b c")
    assert words.result() == ["a", "b", "c"]
    assert executor.submit(len, words).result() == 3
    array = executor.submit(np.arange, 100_000)
    assert array.result()[-1] == 99_999
    assert executor.submit(np.sum, array).result() == 4_999_950_000


def test_values_do_not_pass_through_this_process(executor, tmp_path):
    log = tmp_path / "log"
    made = executor.submit(Loud, log)
    assert executor.submit(lambda loud: type(loud).__name__, made).result() == "Loud"
    assert str(os.getpid()) not in log.read_text().split()


def test_a_long_chain(executor):
    last = executor.submit(double, 1)
    for _ in range(300):
        last = executor.submit(lambda x: x + 1, last)
    assert last.result(timeout=PATIENCE) == 302


def test_a_failure_fails_what_waits_for_it(executor):
    first = executor.submit(fail, "first")
    chain = [executor.submit(double, first)]
    for _ in range(2000):
        chain.append(executor.submit(double, chain[-1]))
    assert str(chain[-1].exception(timeout=PATIENCE)) == "first"
    assert str(executor.submit(double, first).exception()) == "first"


def test_a_cancelled_future_cancels_what_waits_for_it(tmp_path):
    with fp.ForgeExecutor(1) as executor:
        executor.submit(say_and_wait, tmp_path / "started", tmp_path / "go")
        wait_until((tmp_path / "started").exists, "the first job")
        first = executor.submit(double, 1)
        second = executor.submit(double, executor.submit(double, first))
        assert first.cancel()
        wait_until(second.cancelled, "the other to be cancelled")
        with pytest.raises(CancelledError):
            executor.submit(double, first).result(timeout=PATIENCE)
        (tmp_path / "go").touch()


def test_a_future_of_another_executor_is_told(executor):
    with fp.ForgeExecutor(1) as other:
        error = executor.submit(double, other.submit(double, 1)).exception(timeout=PATIENCE)
    assert isinstance(error, TypeError)
    assert "args[0] is a JobFuture" in "".join(error.__notes__)


# Large values


def test_large_values_are_shared_and_read_only(executor):
    array = np.arange(500_000)
    assert executor.submit(np.sum, array).result() == array.sum()
    result = executor.submit(np.ones, 500_000).result()
    assert not result.flags.writeable
    text = executor.submit(lambda text: text + "!", "x" * 100_000).result()
    assert len(text) == 100_001

    def write(values):
        values[0] = 1

    error = executor.submit(write, array).exception()
    assert isinstance(error, ValueError)
    assert "array.copy()" in "".join(error.__notes__)


def test_a_value_that_is_put_travels_once(executor):
    array = executor.put(np.arange(500_000))
    assert array.result()[7] == 7
    names = segments_of(executor)
    assert len(names) == 1
    assert list(executor.map(lambda i, values: int(values[i]), range(20), [array] * 20)) == list(range(20))
    assert segments_of(executor) == names


def test_segments_go_with_their_futures(executor):
    futures = [executor.submit(np.full, 200_000, i) for i in range(4)]
    kept = [future.result() for future in futures]
    assert executor.submit(np.sum, futures[3]).result() == 600_000
    del futures
    gc.collect()
    wait_until(lambda: segments_of(executor) == [], "segments to go")
    assert [values[0] for values in kept] == [0, 1, 2, 3]


def test_results_outlive_the_executor():
    with fp.ForgeExecutor(2) as executor:
        large, small = executor.submit(np.arange, 500_000), executor.submit(list, "abc")
    assert large.result()[-1] == 499_999
    assert small.result() == ["a", "b", "c"]


def test_arguments_of_a_job_that_failed_are_freed(executor):
    with pytest.raises(TypeError):
        executor.submit(double, np.arange(500_000), 1).result()
    wait_until(lambda: segments_of(executor) == [], "segments to go")


def test_arrays_that_several_jobs_take_are_written_once(executor):
    table, other = np.arange(400_000.0), np.ones(400_000)
    with executor.sharing() as sharing:
        futures = [sharing.submit(lambda parts, i: float(parts["t"][i]), {"t": table}, i) for i in range(20)]
        alone = sharing.submit(np.sum, other)
        assert [future.result() for future in futures] == list(range(20))
        assert alone.result() == 400_000
        wait_until(lambda: len(segments_of(executor)) == 1, "only the one that is shared to be left")
    wait_until(lambda: segments_of(executor) == [], "segments to go")


def test_a_job_can_be_ended(executor, tmp_path):
    running = executor.submit(say_and_wait, tmp_path / "started", tmp_path / "never")
    wait_until((tmp_path / "started").exists, "the job")
    running.kill()
    error = running.exception(timeout=PATIENCE)
    assert isinstance(error, fp.WorkerDied)
    assert "as kill() requested" in str(error)
    running.kill()  # too late, and no harm
    assert executor.submit(double, 3).result() == 6
    waiting = fp.ForgeExecutor(1)
    first = waiting.submit(say_and_wait, tmp_path / "begun", tmp_path / "go")
    second = waiting.submit(double, 1)
    second.kill()
    assert second.cancelled()
    (tmp_path / "go").touch()
    waiting.shutdown()
    assert first.result() == "go"


# The end of the program


def run(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=False
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_program_ends_when_what_it_submitted_has(method, tmp_path):
    script = f"""
import sys, time
from pathlib import Path
import forgepar as fp

def write(path):
    time.sleep(0.3)
    Path(path).write_text("done")
    return "said"

executor = fp.ForgeExecutor(2, start_method={method!r})
future = executor.submit(write, sys.argv[1])
later = executor.submit(print, future)
"""
    done = run(script, str(tmp_path / "out"))
    assert (done.returncode, done.stdout, done.stderr) == (0, "said\n", "")
    assert (tmp_path / "out").read_text() == "done"


def test_nothing_is_submitted_once_the_interpreter_ends():
    script = """
import atexit
import forgepar as fp

def late():
    try:
        executor.submit(abs, 1)
    except RuntimeError as error:
        print(error)

atexit.register(late)
executor = fp.ForgeExecutor(1)
executor.submit(abs, 1).result()
"""
    done = run(script)
    assert (done.stdout.strip(), done.stderr) == ("cannot schedule new futures after interpreter shutdown", "")


def test_a_worker_that_dies_while_the_program_ends():
    done = run(
        "import os, forgepar as fp\nexecutor = fp.ForgeExecutor(1)\nfor _ in range(3): executor.submit(os._exit, 1)"
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_fork_of_the_program_leaves_the_executor_alone(executor):
    assert executor.submit(double, 1).result() == 2
    child = multiprocessing.get_context("fork").Process(target=executor.shutdown)
    child.start()
    child.join()
    assert child.exitcode == 0
    assert executor.submit(double, 2).result() == 4


def test_an_executor_in_a_job(executor):
    def nested():
        with fp.ForgeExecutor(1) as inner:
            return inner.submit(os.getpid).result() != os.getpid()

    assert executor.submit(nested).result(timeout=PATIENCE)


def bytes_in_arenas():
    return sum(path.stat().st_size for arena in own_arenas() for path in arena.rglob("*") if path.is_file())


def fill_and_die(n):
    fp.empty(n)[:] = 1.0
    os._exit(3)


@pytest.mark.parametrize("method", METHODS)
def test_what_a_dead_worker_had_begun_to_write_is_freed_and_what_it_had_made_is_not(method):
    with fp.ForgeExecutor(1, start_method=method) as executor:
        made = [executor.submit(np.full, 100_000, number) for number in range(3)]
        concurrent.futures.wait(made)
        before = bytes_in_arenas()
        for _ in range(2):
            assert isinstance(executor.submit(fill_and_die, 1_000_000).exception(), fp.WorkerDied)
        assert bytes_in_arenas() - before < 1_000_000
        sums = [executor.submit(np.sum, future) for future in made]
        assert [future.result() for future in sums] == [0, 100_000, 200_000]
        assert [int(future.result()[-1]) for future in made] == [0, 1, 2]


def test_large_callables_are_not_kept_for_ever():
    """Neither here nor in the worker, whose memory tells."""

    def closure(number):
        large = np.full(1 << 17, number)
        return lambda: (int(large[0]), psutil.Process().memory_info().rss)

    with fp.ForgeExecutor(1, start_method="fork") as executor:
        kept = []
        peaks = []
        for number in range(150):
            call = closure(number)
            kept.append(weakref.ref(call))
            value, rss = executor.submit(call).result()
            assert value == number
            peaks.append(rss)
        del call
        gc.collect()
        assert sum(ref() is not None for ref in kept) <= 1
        assert sum(len(pickled) for pickled, *_ in executor._submissions._by_pickle) <= submissions._MOST_BYTES
    assert max(peaks) - peaks[10] < 100 << 20


def test_callables_beyond_the_bound_go_without_a_garbage_collection(monkeypatch):
    monkeypatch.setattr(submissions, "_MOST_REMEMBERED", 20)

    def n_called():
        return sum(type(found) is SentCallable for found in gc.get_objects())

    gc.collect()
    before = n_called()
    gc.disable()
    try:
        with fp.ForgeExecutor(1, start_method="fork") as executor:
            futures = [executor.submit(lambda i=i: i) for i in range(100)]
            assert [future.result() for future in futures] == list(range(100))
            del futures
            assert n_called() - before < 60
    finally:
        gc.enable()


def test_other_libraries_read_how_many_workers_there_are():
    with fp.ForgeExecutor(2) as executor:
        assert executor._max_workers == 2
