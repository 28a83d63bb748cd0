"""A forked child of the caller has workers of its own, and leaves those of its parent alone."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
import traceback
import warnings

import psutil
import pytest
from conftest import PATIENCE, wait_until

import forgepar as fp
from forgepar.backends import starting
from forgepar.system.forking import fork_safe, in_child, no_forks

START_METHODS = ["forkserver", "spawn", "fork"]


def in_forked_child(body):
    """Call a function in a forked child; fail with what it raises or if it does not end."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # from 3.12 on: of a fork beside threads, which is what is tested
        pid = os.fork()
    if pid == 0:
        code = 1
        try:
            os.close(reader)
            body()
            code = 0
        except BaseException:
            os.write(writer, traceback.format_exc().encode()[-4000:])
        finally:
            os._exit(code)
    os.close(writer)
    timer = threading.Timer(2 * PATIENCE, os.kill, (pid, signal.SIGABRT))
    timer.start()
    with os.fdopen(reader) as file:
        told = file.read()
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    timer.cancel()
    timer.join()
    assert (code, told) == (0, "")


def run_once(executor, number):
    wf = fp.Workflow()
    handle = wf.add(abs, -number)
    return executor.run(wf)[handle]


def run_alone(method, number):
    with fp.WorkflowExecutor(workers=1, start_method=method) as executor:
        return run_once(executor, number)


@pytest.mark.parametrize("method", START_METHODS)
class TestWorkersOfItsOwn:
    def test_a_workflow_runs_after_one_in_the_parent(self, method):
        assert run_alone(method, 1) == 1

        def body():
            assert run_alone(method, 2) == 2
            assert run_alone(method, 3) == 3

        in_forked_child(body)
        assert run_alone(method, 4) == 4

    def test_so_does_a_pool_beside_one_of_the_parent(self, method):
        with fp.ForgeExecutor(1, start_method=method) as executor:
            assert executor.submit(abs, -1).result() == 1

            def body():
                with fp.ForgeExecutor(1, start_method=method) as own:
                    assert own.submit(abs, -2).result() == 2

            in_forked_child(body)
            assert executor.submit(abs, -3).result() == 3

    def test_so_does_a_grandchild(self, method):
        assert run_alone(method, 1) == 1

        def child():
            assert run_alone(method, 2) == 2
            in_forked_child(lambda: run_alone(method, 3))
            assert run_alone(method, 4) == 4

        in_forked_child(child)

    @pytest.mark.parametrize("is_daemon", [False, True])
    def test_so_does_a_process_of_multiprocessing(self, method, is_daemon):
        assert run_alone(method, 1) == 1
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        process = context.Process(target=lambda: queue.put(run_alone(method, 5)), daemon=is_daemon)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            process.start()
        assert queue.get() == 5
        process.join(PATIENCE)
        assert process.exitcode == 0

    def test_executors_that_were_not_opened_or_were_closed_are_the_childs(self, method):
        unopened, pool = fp.WorkflowExecutor(1, start_method=method), fp.ForgeExecutor(1, start_method=method)
        closed = fp.WorkflowExecutor(1, start_method=method)
        run_once(closed, 1)
        closed.close()

        def body():
            with unopened, pool, closed:
                assert run_once(unopened, 1) == run_once(closed, 1) == pool.submit(abs, -1).result()

        in_forked_child(body)
        with unopened, pool, closed:
            assert run_once(unopened, 2) == run_once(closed, 2) == pool.submit(abs, -2).result()


def test_joblib_in_the_child():
    joblib = pytest.importorskip("joblib")
    import forgepar.joblib

    def roots():
        return joblib.Parallel(2, backend="forgepar")(joblib.delayed(abs)(-i) for i in range(4))

    assert roots() == [0, 1, 2, 3]

    def body():
        assert roots() == [0, 1, 2, 3]
        forgepar.joblib.close()

    try:
        in_forked_child(body)
        assert roots() == [0, 1, 2, 3]
    finally:
        forgepar.joblib.close()


def test_dask_graphs_in_the_child():
    pytest.importorskip("dask")
    from forgepar.integrations import dask_graphs as daskgraphs

    def get():
        return fp.dask_get({"a": 1, "b": (abs, -2), "c": (pow, "b", 2)}, ["c"], num_workers=1)

    assert tuple(get()) == (4,)

    def body():
        assert tuple(get()) == (4,)
        daskgraphs.close_workers()

    try:
        in_forked_child(body)
        assert tuple(get()) == (4,)
    finally:
        daskgraphs.close_workers()


@pytest.fixture
def warm(request):
    with fp.WorkflowExecutor(workers=1, start_method=getattr(request, "param", None)) as executor:
        run_once(executor, 1)
        yield executor


@pytest.fixture
def pool(request):
    with fp.ForgeExecutor(1, start_method=getattr(request, "param", None)) as executor:
        executor.submit(abs, -1).result()
        yield executor


def refused(call):
    with pytest.raises(
        fp.WrongProcess, match=f"belongs to process {os.getppid()}, and this process, {os.getpid()}, was forked"
    ) as e:
        call()
    assert isinstance(e.value, RuntimeError)
    assert e.value.owner == os.getppid()


class TestRefusal:
    @pytest.mark.parametrize("warm", START_METHODS, indirect=True)
    def test_a_warm_executor_refuses_to_run_and_its_parent_goes_on(self, warm):
        def body():
            refused(lambda: run_once(warm, 2))
            refused(lambda: warm.state)
            warm.close()
            refused(lambda: run_once(warm, 2))
            with warm:
                pass

        worker = psutil.Process().children(recursive=True)
        in_forked_child(body)
        assert [run_once(warm, number) for number in range(5)] == list(range(5))
        assert worker == psutil.Process().children(recursive=True)

    def test_the_inline_backend_refuses_as_well(self):
        with fp.WorkflowExecutor(backend="inline") as executor:
            run_once(executor, 1)

            def body():
                refused(lambda: run_once(executor, 2))
                executor.close()

            in_forked_child(body)
            assert run_once(executor, 3) == 3
            assert executor._backend.arena.folder.exists()

    @pytest.mark.parametrize("pool", START_METHODS, indirect=True)
    def test_a_pool_refuses_at_every_door(self, pool):
        sharing = pool.sharing()

        def body():
            refused(lambda: pool.submit(abs, -1))
            refused(lambda: pool.submit(fp.task(abs), -1))
            refused(lambda: pool.map(abs, [1]))
            refused(lambda: pool.map(abs, [1, 2, 3], chunksize=2))
            refused(lambda: pool.put([1]))
            refused(pool.sharing)
            refused(lambda: sharing.submit(abs, -1))
            sharing.close()
            pool.shutdown(wait=False, cancel_futures=True)
            pool.shutdown()
            with pool:
                pass

        in_forked_child(body)
        assert pool.submit(abs, -3).result() == 3
        assert sharing.submit(abs, -4).result() == 4

    def test_results_that_are_there_can_be_had_and_others_are_refused(self, pool, tmp_path):
        done, later = pool.submit(list, (1, 2)), pool.submit(wait_for, str(tmp_path / "go"))
        done.exception()

        def body():
            assert done.result() == [1, 2]
            assert done.exception() is None
            refused(later.result)
            refused(later.exception)
            refused(later.cancel)

        in_forked_child(body)
        (tmp_path / "go").touch()
        assert later.result() == "gone"

    def test_a_fork_in_the_midst_of_a_run_ends_the_run_of_the_child(self):
        wf = fp.Workflow()
        wf.map(abs, range(3))
        parent, children = os.getpid(), []

        def fork(_):
            if os.getpid() == parent and not children:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    children.append(os.fork())

        try:
            with fp.WorkflowExecutor(workers=1) as executor:
                executor.run(wf, audit=fork)
        except fp.WrongProcess:
            os._exit(3)
        finally:
            if os.getpid() != parent:
                os._exit(4)
        assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 3


def wait_for(path):
    while not os.path.exists(path):  # noqa: PTH110
        threading.Event().wait(0.005)
    return "gone"


class TestLocks:
    def test_a_lock_that_another_thread_held_is_free_in_the_child(self):
        lock, is_held, may_end = fork_safe(threading.RLock()), threading.Event(), threading.Event()

        def hold():
            with lock:
                is_held.set()
                may_end.wait()

        thread = threading.Thread(target=hold)
        thread.start()
        is_held.wait()

        def body():
            assert lock.acquire(timeout=PATIENCE)

        in_forked_child(body)
        may_end.set()
        thread.join()

    def test_a_lock_that_the_forking_thread_holds_is_still_its_own(self):
        lock = fork_safe(threading.RLock())
        with lock:
            in_forked_child(lock.release)

    @pytest.mark.parametrize("method", START_METHODS)
    def test_threads_of_a_worker_may_start_workers(self, method):
        """Under fork the worker is a child of the very thread that starts it and keeps others from forking."""

        def inner():
            with fp.ForgeExecutor(1, max_tasks_per_child=1, start_method=method) as own:
                return list(own.map(abs, range(3)))

        with fp.ForgeExecutor(1, start_method=method) as executor:
            assert executor.submit(inner).result(timeout=PATIENCE) == [0, 1, 2]

    def test_a_fork_waits_for_a_start_in_another_thread(self):
        seen = []
        is_held, is_over = threading.Event(), threading.Event()

        def start():
            with no_forks:
                is_held.set()
                is_over.wait(0.2)
                seen.append("started")

        thread = threading.Thread(target=start)
        thread.start()
        is_held.wait()
        in_forked_child(lambda: None)
        seen.append("forked")
        thread.join()
        assert seen == ["started", "forked"]

    def test_a_start_may_fork_itself(self):
        with no_forks:
            in_forked_child(lambda: no_forks.acquire(timeout=PATIENCE) or pytest.fail("not free"))
        assert no_forks.acquire(timeout=PATIENCE)
        no_forks.release()

    def test_forks_while_workers_start_and_run(self):
        """Whatever the other threads of the parent hold at that moment, the child has its way."""
        over = threading.Event()

        def keep_starting():
            with fp.ForgeExecutor(2, max_tasks_per_child=1) as executor:
                while not over.is_set():
                    list(executor.map(abs, range(4)))

        thread = threading.Thread(target=keep_starting)
        thread.start()
        try:
            for number in range(4):
                in_forked_child(lambda number=number: run_alone("forkserver", number) == number or pytest.fail("wrong"))
        finally:
            over.set()
            thread.join()

    def test_callbacks_run_in_children_only(self):
        seen = []
        in_child(lambda: seen.append(os.getpid()))
        in_forked_child(lambda: seen == [os.getpid()] or pytest.fail(f"{seen}"))
        assert seen == []


class TestParent:
    """What the child leaves alone, also when it ends or collects garbage."""

    def test_garbage_collection_in_the_child(self):
        executor, pool = fp.WorkflowExecutor(workers=1), fp.ForgeExecutor(1)
        run_once(executor, 1)
        held = {"executor": executor, "pool": pool, "value": pool.submit(bytes, 1 << 21)}
        held["value"].result()
        del executor, pool

        def body():
            held.clear()
            gc.collect()

        in_forked_child(body)
        assert run_once(held["executor"], 2) == 2
        assert held["pool"].submit(len, held["value"]).result() == 1 << 21
        held["executor"].close()
        held["pool"].shutdown()

    @pytest.mark.parametrize("method", START_METHODS)
    def test_a_child_that_ends_as_programs_do(self, tmp_path, method):
        done = run_script(
            tmp_path,
            """
            import os, sys
            import forgepar as fp
            def run(executor, number):
                wf = fp.Workflow()
                handle = wf.add(abs, -number)
                return executor.run(wf)[handle]
            executor = fp.WorkflowExecutor(workers=1, start_method=sys.argv[1])
            pool = fp.ForgeExecutor(1, start_method=sys.argv[1])
            print(run(executor, 1), pool.submit(abs, -1).result(), flush=True)
            child = os.fork()
            if child == 0:
                own = fp.WorkflowExecutor(workers=1, start_method=sys.argv[1])
                print(run(own, 2), flush=True)
                sys.exit(7)
            print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
            print(run(executor, 3), pool.submit(abs, -3).result())
            """,
            method,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "1 1\n2\n7\n3 3\n", "")

    @pytest.mark.parametrize("method", START_METHODS)
    def test_workers_end_with_the_parent_though_a_child_lives(self, tmp_path, method):
        """The child has copies of all descriptors that the workers see their parent's end by."""
        path = tmp_path / "script.py"
        path.write_text(
            textwrap.dedent(
                """
                import os, signal, sys
                import forgepar as fp
                executor = fp.WorkflowExecutor(workers=1, start_method=sys.argv[1])
                pool = fp.ForgeExecutor(1, start_method=sys.argv[1])
                wf = fp.Workflow()
                handle = wf.add(os.getpid)
                pids = [executor.run(wf)[handle], pool.submit(os.getpid).result()]
                child = os.fork()
                if child == 0:
                    signal.pause()
                print(child, *pids, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
                """
            )
        )
        command = [sys.executable, "-W", "ignore", str(path), method]
        parent = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        child, *workers = map(int, parent.stdout.readline().split())
        try:
            parent.wait()
            wait_until(lambda: not any(map(psutil.pid_exists, workers)), "the workers to end")
            assert psutil.pid_exists(child)
        finally:
            os.kill(child, signal.SIGKILL)
            parent.stdout.close()

    def test_exit_codes_of_its_workers_stay_the_parents(self):
        """The fork server tells them once, through a pipe that the child has, too."""
        process = starting.context("forkserver").Process(target=os._exit, args=(5,))
        process.start()
        assert multiprocessing.connection.wait([process.sentinel], PATIENCE)
        in_forked_child(multiprocessing.active_children)
        process.join(PATIENCE)
        assert process.exitcode == 5


def run_script(tmp_path, text, *arguments):
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    # Python warns of the fork that the script makes beside threads.
    command = [sys.executable, "-W", "ignore", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=4 * PATIENCE, check=False)
