"""Local workers: start-up, death, exit, what they leave behind, and scripts without a guard."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import threading
from multiprocessing.synchronize import SemLock
from pathlib import Path

import psutil
import pytest
from conftest import PATIENCE, own_arenas, wait_until

import forgepar as fp
from forgepar import machine
from forgepar.backends import process, worker_starter
from forgepar.backends.process import ProcessBackend
from forgepar.backends.worker_board import NO_LIMIT
from forgepar.machine import available_cpus

START_METHODS = ["forkserver", "spawn", "fork"]


def exit_at_once(code):
    os._exit(code)


def kill_self(signal_number):
    os.kill(os.getpid(), signal_number)


def pid_of(_):
    return os.getpid()


def run_script(tmp_path, text, *arguments, **options):
    """Run a script in a process of its own; it gets no guard and no help."""
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(text))
    command = [sys.executable, "-W", "error", str(path), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False, **options)


@pytest.mark.parametrize("start_method", START_METHODS)
class TestScripts:
    def test_a_script_without_a_guard_runs_once_and_exits_by_itself(self, tmp_path, start_method):
        done = run_script(
            tmp_path,
            """
            import sys
            import forgepar as fp
            print("script runs")
            class Money:
                def __init__(self, cents):
                    self.cents = cents
                def __add__(self, other):
                    return Money(self.cents + other.cents)
            rate = 3
            @fp.task(retries=1)
            def exchange(money):
                return Money(money.cents * rate)
            wf = fp.Workflow()
            made = wf.map(lambda cents: Money(cents), range(4))
            changed = wf.map(exchange, made)
            total = wf.add(lambda parts: sum(parts, start=Money(0)), changed)
            value = wf.run(workers=2, start_method=sys.argv[1])[total]
            print(type(value) is Money, value.cents)
            executor = fp.WorkflowExecutor(workers=2, start_method=sys.argv[1])
            print(type(executor.run(wf)[total]) is Money)
            # The executor stays open: exit must not hang on it.
            """,
            start_method,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.split("\n") == ["script runs", "True 18", "True", ""]

    def test_an_uncaught_failure_ends_the_script_with_its_traceback(self, tmp_path, start_method):
        done = run_script(
            tmp_path,
            """
            import sys
            import forgepar as fp
            executor = fp.WorkflowExecutor(workers=2, start_method=sys.argv[1])
            wf = fp.Workflow()
            wf.add(lambda: 1 / 0)
            executor.run(wf)
            """,
            start_method,
        )
        assert done.returncode == 1
        assert "ZeroDivisionError: division by zero" in done.stderr
        assert "task 'lambda', layer 0, attempt 1" in done.stderr

    def test_a_parent_that_is_killed_takes_its_workers_along(self, tmp_path, start_method):
        pids = tmp_path / "pids"
        path = tmp_path / "script.py"
        path.write_text(
            textwrap.dedent(
                """
                import os, sys, threading
                import forgepar as fp
                def hold(path):
                    with open(path, "a") as file:
                        file.write(f"{os.getpid()}\\n")
                    threading.Event().wait()
                wf = fp.Workflow()
                wf.map(hold, [sys.argv[2]] * 2)
                wf.run(workers=2, start_method=sys.argv[1])
                """
            )
        )
        parent = subprocess.Popen([sys.executable, str(path), start_method, str(pids)])
        try:
            wait_until(lambda: pids.exists() and pids.read_text().count("\n") == 2, "both tasks to start")
            workers = [psutil.Process(int(pid)) for pid in pids.read_text().split()]
        finally:
            parent.kill()
            parent.wait()
        wait_until(lambda: not any(running(worker) for worker in workers), "workers to end with their parent")
        with fp.WorkflowExecutor(backend="inline") as executor:  # its start sweeps what the killed parent left
            executor._backend.open(2)
        left = list(Path("/dev/shm").glob(f"forgepar-{os.getuid()}-{parent.pid}-*"))
        assert left == []

    def test_dead_worker_breaks_its_own_slot_alone(self, start_method):
        wf = fp.Workflow()
        wf.add(exit_at_once, 7)
        with fp.WorkflowExecutor(workers=2, start_method=start_method) as executor:
            before = worker_pids(executor)
            with pytest.raises(fp.WorkflowFailed, match="exited with code 7 while it ran task 'exit_at_once'"):
                executor.run(wf)
            after = worker_pids(executor)
        assert len(before & after) == 1


def running(proc: psutil.Process) -> bool:
    try:
        return proc.is_running() and proc.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def worker_pids(executor: fp.WorkflowExecutor) -> set[int]:
    """The pids of all workers of an executor, once all have joined."""
    backend = executor._backend
    backend.open(2)
    while len(backend.joined()) < executor.workers:
        backend.wait(PATIENCE)
    return {joined.pid for joined in backend.joined()}


@pytest.fixture
def executor():
    with fp.WorkflowExecutor(workers=2) as executor:
        yield executor


def failure_of(executor, wf, **rules) -> fp.WorkflowFailed:
    with pytest.raises(fp.WorkflowFailed) as caught:
        executor.run(wf, **rules)
    return caught.value


class TestDeath:
    @pytest.mark.parametrize(
        ("end", "text", "exit_code"),
        [
            (lambda: exit_at_once(0), "exited with code 0", 0),
            (lambda: exit_at_once(3), "exited with code 3", 3),
            (lambda: kill_self(signal.SIGKILL), "was ended by signal 9", -9),
            (lambda: kill_self(signal.SIGSEGV), "was ended by signal 11", -11),
        ],
        ids=["exit 0", "exit 3", "SIGKILL", "SIGSEGV"],
    )
    def test_the_error_tells_task_exit_and_mend(self, executor, end, text, exit_code):
        wf = fp.Workflow()
        wf.add(fp.task(end).options(name="ender"))
        (error,) = failure_of(executor, wf).exceptions
        assert isinstance(error, fp.WorkerDied)
        assert error.exit_code == exit_code
        assert text in str(error)
        assert "task 'ender'" in str(error)
        assert "retries=" in str(error)

    def test_the_rest_of_its_batch_runs_elsewhere_and_once(self, executor, tmp_path):
        log = tmp_path / "log"

        def note(i):
            with log.open("a") as file:
                file.write(f"{i}\n")
            if i == 150:
                os._exit(1)
            return i

        wf = fp.Workflow()
        warm = wf.map(lambda i: i, range(50))
        noted = wf.map(fp.task(note).options(after=warm), range(300))
        result = failure_of(executor, wf, fail_fast=False).result
        others = [handle for i, handle in enumerate(noted) if i != 150]
        assert result[others] == [i for i in range(300) if i != 150]
        runs = [int(line) for line in log.read_text().split()]
        # What the dead worker ran in its last 10 ms but had not reported runs again; nothing else does.
        again = {i for i in runs if runs.count(i) > 1}
        workers = {result.record(noted[i]).worker for i in again}
        assert set(runs) == set(range(300))
        assert runs.count(150) == 1
        assert len(workers) <= 2
        assert [type(e).__name__ for e in result.events].count("WorkflowWorkerDied") == 1

    def test_retries_run_it_on_a_new_worker(self, executor, tmp_path):
        def once(path):
            if not path.exists():
                path.touch()
                os._exit(1)
            return "survived"

        wf = fp.Workflow()
        handle = wf.add(fp.task(once).options(retries=1), tmp_path / "tried")
        result = executor.run(wf)
        assert result[handle] == "survived"
        assert result.record(handle).attempt == 2

    def test_a_worker_killed_between_runs_is_replaced(self, executor):
        wf = fp.Workflow()
        pids = wf.map(pid_of, range(8))
        first = set(executor.run(wf)[pids])
        victim = first.pop()
        doomed = psutil.Process(victim)
        os.kill(victim, signal.SIGKILL)
        wait_until(lambda: not running(doomed), "the kill")
        assert victim not in executor.run(wf)[pids]

    def test_running_tasks_are_ended_after_a_failure(self, executor, tmp_path):
        started = tmp_path / "started"

        def hang(path):
            path.touch()
            threading.Event().wait()

        def fail_when(path):
            wait_until(path.exists, "the other task to start")
            raise RuntimeError("now")

        wf = fp.Workflow()
        wf.add(hang, started)
        wf.add(fail_when, started)
        result = failure_of(executor, wf).result
        assert result.status_counts() == {"failed": 1, "cancelled": 1}
        again = fp.Workflow()
        assert executor.run(fp_add(again))["pid_of"] > 0


def fp_add(wf: fp.Workflow) -> fp.Workflow:
    wf.add(pid_of, None)
    return wf


class TestStart:
    def test_workers_that_cannot_start_are_an_error(self, monkeypatch):
        monkeypatch.setattr(worker_starter, "serve", exit_at_serve)
        wf = fp.Workflow()
        wf.add(pid_of, 1)
        with fp.WorkflowExecutor(workers=1) as executor, pytest.raises(fp.WorkerStartFailed, match="3 times in a row"):
            executor.run(wf)

    @pytest.mark.parametrize("workers", [0, -1, 1.5, "2"])
    def test_a_number_of_workers_that_cannot_be(self, workers):
        with pytest.raises(ValueError, match="workers must be an integer from 1 to 32000, or None for one per CPU"):
            fp.WorkflowExecutor(workers=workers)

    def test_an_unknown_start_method_or_backend(self):
        with pytest.raises(ValueError, match=r"start_method must be one of .*, got 'thread'"):
            fp.WorkflowExecutor(start_method="thread")
        with pytest.raises(ValueError, match="backend must be 'process', 'inline' or a backend"):
            fp.WorkflowExecutor(backend="threads")

    def test_default_workers_follow_the_affinity(self):
        code = "import os; os.sched_setaffinity(0, {0}); import forgepar; print(forgepar.WorkflowExecutor().workers)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.strip() == "1"

    def test_available_cpus_obey_the_quota(self, monkeypatch):
        monkeypatch.setattr(machine, "_quota_cpus", lambda: 1)
        assert available_cpus() == 1

    def test_numerical_libraries_get_a_share_of_the_cores(self, executor):
        wf = fp.Workflow()
        handle = wf.add(lambda: os.environ["OMP_NUM_THREADS"])
        assert int(executor.run(wf)[handle]) == max(1, available_cpus() // 2)

    def test_threads_of_libraries_are_the_users_if_set(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "7")
        wf = fp.Workflow()
        wf.add(lambda: os.environ["OMP_NUM_THREADS"])
        assert wf.run(workers=1, start_method="spawn")["lambda"] == "7"


def exit_at_serve(*_):
    os._exit(1)


WAITING = """
import multiprocessing, os, signal, sys
from concurrent.futures import ProcessPoolExecutor
from forgepar.backends.worker_process import watch_parent

if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    executor = ProcessPoolExecutor(1, mp_context=context, initializer=watch_parent)
    print(executor.submit(os.getpid).result(), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("start_method", START_METHODS)
def test_a_worker_whose_parent_dies_before_it_serves_goes_too(tmp_path, start_method):
    """It waits at the executor's queue then, of which it holds both ends itself."""
    program = tmp_path / "program.py"
    program.write_text(WAITING)
    done = subprocess.run(
        [sys.executable, str(program), start_method], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    wait_until(lambda: not psutil.pid_exists(pid), "the worker to go")


def test_workers_start_where_their_kind_of_work_cannot_be_told(monkeypatch):
    def forbidden(*_):
        raise PermissionError("no")

    monkeypatch.setattr(os, "sched_setscheduler", forbidden, raising=False)
    wf = fp.Workflow()
    pid = wf.add(pid_of, 1)
    assert wf.run(workers=1, start_method="fork")[pid] != os.getpid()


class TestLastingUse:
    def test_200_workflows_in_a_row_grow_nothing(self, executor):
        wf = fp.Workflow()
        values = wf.map(pow, range(20), [2] * 20)
        wf.add(sum, values)
        me = psutil.Process()

        def use():
            executor.run(wf)
            return me.num_fds(), me.num_threads(), len(me.children(recursive=True))

        worker_pids(executor)
        gc.collect()  # what is mapped has a descriptor
        first = use()
        assert {use() for _ in range(200)} == {first}

    def test_close_ends_all_and_open_begins_anew(self, executor):
        wf = fp_add(fp.Workflow())
        before = executor.run(wf)["pid_of"]
        executor.close()
        assert not psutil.pid_exists(before)
        assert own_arenas() == set()
        assert executor.run(wf)["pid_of"] != before
        executor.close()
        executor.close()

    def test_opening_and_closing_grows_nothing(self, executor):
        wf = fp_add(fp.Workflow())
        me = psutil.Process()
        executor.run(wf)
        executor.close()

        def size():
            return me.num_fds(), me.num_threads()

        before = size()
        for _ in range(10):
            executor.run(wf)
            executor.close()
        wait_until(lambda: size() <= before, "descriptors and threads to be as they were")

    def test_a_run_inside_a_task_works_inline(self, executor):
        def inner():
            wf = fp.Workflow()
            pids = wf.map(pid_of, range(3))
            return os.getpid(), wf.run(workers=2)[pids]

        wf = fp.Workflow()
        handle = wf.add(inner)
        outer_pid, inner_pids = executor.run(wf)[handle]
        assert inner_pids == [outer_pid] * 3

    def test_an_interrupt_ends_the_workers_and_the_executor_stays_usable(self, executor, tmp_path):
        started = tmp_path / "started"

        def hang(path):
            path.touch()
            threading.Event().wait()

        def interrupt():
            wait_until(started.exists, "the task to start")
            os.kill(os.getpid(), signal.SIGINT)

        wf = fp.Workflow()
        wf.add(hang, started)
        pids = worker_pids(executor)
        watcher = threading.Thread(target=interrupt)
        watcher.start()
        with pytest.raises(KeyboardInterrupt):
            executor.run(wf)
        watcher.join()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        assert executor.run(fp_add(fp.Workflow()))["pid_of"] not in pids

    def test_runs_of_two_threads_take_turns(self, executor):
        results = []

        def use(n):
            wf = fp.Workflow()
            values = wf.map(abs, range(n))
            results.append(executor.run(wf)[values] == list(range(n)))

        threads = [threading.Thread(target=use, args=(n,)) for n in (30, 40, 50)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [True] * 3


class TestSharing:
    def test_a_slow_task_does_not_hold_the_rest_of_its_batch(self, executor, tmp_path):
        """The slow task ends only when all others have: those behind it in its batch must run on the other worker."""
        done = tmp_path / "done"
        done.mkdir()

        def step(i, folder, n):
            if i == n // 4:
                wait_until(lambda: sum(1 for _ in folder.iterdir()) == n - 1, "all others to be done")
            else:
                (folder / str(i)).touch()
            return i

        wf = fp.Workflow()
        quick = wf.map(lambda i: i, range(2000))  # teaches the engine to send large batches
        slow = wf.map(fp.task(step).options(after=quick), range(400), folder=done, n=400)
        assert executor.run(wf)[slow] == list(range(400))
        assert all(backend_limit(executor, slot) == NO_LIMIT for slot in range(2))


def backend_limit(executor: fp.WorkflowExecutor, slot: int) -> int:
    backend: ProcessBackend = executor._backend
    return backend._slots[slot].integers[process.LIMIT]


def test_a_closed_executor_holds_no_semaphores_however_long_its_failure_is_kept():
    """Collected amid the start of another worker, they could not be released: the resource tracker is not reentrant."""

    def fail():
        raise ValueError("kept")

    wf = fp.Workflow()
    wf.add(fail)
    gc.collect()
    before = n_semaphores()
    gc.disable()
    try:
        with pytest.raises(fp.WorkflowFailed) as caught:  # its frames hold the executor
            wf.run(workers=2)
        assert n_semaphores() <= before
    finally:
        gc.enable()
    del caught


def n_semaphores() -> int:
    return sum(issubclass(type(found), SemLock) for found in gc.get_objects())  # `isinstance` may run their code


def test_without_a_thread_for_its_executor_a_worker_is_done_without(monkeypatch):
    """3.12 starts no thread once the interpreter ends, when other workers may still have work."""
    backend = ProcessBackend(2, "forkserver")
    backend.open(1)
    try:
        wait_until(lambda: backend.wait(0.1) or backend.joined(), "the first worker")
        before = multiprocessing.active_children()

        def refuse(_):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        with monkeypatch.context() as changed:
            changed.setattr(threading.Thread, "start", refuse)
            backend.open(2)
            assert multiprocessing.active_children() == before
            assert [joined.slot for joined in backend.joined()] == [0]
        backend.open(2)
        wait_until(lambda: backend.wait(0.1) and len(backend.joined()) == 2, "the second worker")
    finally:
        backend.close()
    alone = ProcessBackend(1, "forkserver")
    try:
        with monkeypatch.context() as changed:
            changed.setattr(threading.Thread, "start", refuse)
            with pytest.raises(fp.WorkerStartFailed, match=r"No worker can be started\. The program is ending"):
                alone.open(1)
    finally:
        alone.close()
