"""Executors close once, at any moment: beside runs, in callbacks, in signal handlers, through interrupts."""

from __future__ import annotations

import linecache
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
from conftest import wait_until

import forgepar as fp
from forgepar.backends import open_backends, process, process_slots, worker_starter
from forgepar.backends.process import ProcessBackend
from forgepar.backends.worker_starter import WorkerStarter
from forgepar.pool.scheduler import PoolScheduler, _open_schedulers

METHODS = ["forkserver", "spawn", "fork"]
REFUSED = "cannot run a workflow on the same executor"
INTERRUPTED_FILES = {module.__file__ for module in (open_backends, process, process_slots, worker_starter)}


def wait_for(path):
    """Wait, in a task, until the test writes a file; what it holds is the value."""
    with Path(path).open() as file:
        return file.read()


@pytest.fixture
def gate(tmp_path):
    os.mkfifo(tmp_path / "gate")
    return tmp_path / "gate"


def open_gate(gate):
    with gate.open("w") as file:
        file.write("on")


def twice(executor, told):
    """Try a second run on an executor, once; note what comes of it."""
    if not told:
        told.append("")
        wf = fp.Workflow("second")
        wf.add(abs, -5)
        try:
            executor.run(wf)
            told[0] = "done"
        except RuntimeError as error:
            told[0] = str(error)


class Shown:
    """A display that does something."""

    look_at = 0.0

    def __init__(self, call):
        self.call = call

    def begin(self, *_):
        self.call()

    def beat(self, *_):
        self.call()

    def failed(self, *_):
        pass

    def close(self):
        pass


@pytest.mark.parametrize("place", ["audit", "show", "progress", "rollback"])
def test_a_second_run_in_a_callback_is_refused(place):
    told = []
    wf = fp.Workflow("first")
    done = wf.add(fp.task(print).options(compensate=abs), "hello")
    if place == "rollback":
        wf.add(lambda _: 1 / 0, done)
    with fp.WorkflowExecutor(1) as executor:

        def call(*_):
            twice(executor, told)
            return True

        options = {place: Shown(call) if place == "progress" else call}
        if place == "rollback":
            with pytest.raises(fp.WorkflowFailed):
                executor.run(wf, **options)
        else:
            assert executor.run(wf, **options).ok
        assert REFUSED in told[0]
        assert executor.run(wf, show=lambda _: None, rollback="none").ok if place != "rollback" else True


def test_a_second_run_in_an_inline_task_is_refused():
    told = []
    with fp.WorkflowExecutor(backend="inline") as executor:
        _held.update(executor=executor, told=told)
        wf = fp.Workflow("first")
        wf.add(run_within)
        assert executor.run(wf).ok
    assert REFUSED in told[0]


_held = {}


def run_within():
    twice(_held["executor"], _held["told"])


@pytest.mark.parametrize("moment", ["start", "run"])
def test_a_second_run_in_a_signal_handler_is_refused(moment, gate, monkeypatch):
    told, executor = [], fp.WorkflowExecutor(1)
    wf = fp.Workflow("first")
    handle = wf.add(wait_for, gate)
    before = signal.signal(signal.SIGUSR1, lambda *_: twice(executor, told))
    try:
        if moment == "start":
            start = WorkerStarter._launch

            def interrupted(self, slot):
                os.kill(os.getpid(), signal.SIGUSR1)
                start(self, slot)

            monkeypatch.setattr(WorkerStarter, "_launch", interrupted)
            threading.Thread(target=open_gate, args=(gate,)).start()
        else:

            def interrupt():
                with gate.open("w") as file:  # the task has opened it
                    os.kill(os.getpid(), signal.SIGUSR1)
                    file.write("on")

            threading.Thread(target=interrupt).start()
        assert executor.run(wf)[handle] == "on"
        assert REFUSED in told[0]
    finally:
        signal.signal(signal.SIGUSR1, before)
        executor.close()


def test_workers_are_not_started_by_a_handler_that_interrupts_a_start(monkeypatch):
    told, start = [], WorkerStarter._launch

    def handle(*_):
        with fp.WorkflowExecutor(1) as other:
            wf = fp.Workflow("second")
            wf.add(abs, -5)
            try:
                other.run(wf)
            except fp.WorkerStartFailed as error:
                told.append(str(error))

    def interrupted(self, slot):
        if not told:
            os.kill(os.getpid(), signal.SIGUSR1)
        start(self, slot)

    monkeypatch.setattr(WorkerStarter, "_launch", interrupted)
    before = signal.signal(signal.SIGUSR1, handle)
    try:
        wf = fp.Workflow("first")
        handle_ = wf.add(abs, -1)
        assert wf.run(workers=1)[handle_] == 1
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert "signal handler" in told[0]


@pytest.mark.parametrize("method", METHODS)
def test_closing_from_another_thread_waits_for_the_run(method, gate):
    executor = fp.WorkflowExecutor(1, start_method=method)
    wf = fp.Workflow()
    handle = wf.add(wait_for, gate)
    closing, closed = threading.Event(), threading.Event()

    def close():
        with gate.open("w") as file:  # the run goes
            closing.set()
            file.write("on")
            threading.Thread(target=lambda: (executor.close(), closed.set())).start()

    threading.Thread(target=close).start()
    assert executor.run(wf)[handle] == "on"
    assert closed.wait(30)
    threading.Thread(target=open_gate, args=(gate,)).start()
    assert executor.run(wf)[handle] == "on"  # with new workers
    executor.close()
    executor.close()


def test_closing_in_a_callback_takes_place_behind_the_run():
    executor = fp.WorkflowExecutor(1)
    wf = fp.Workflow()
    handles = wf.map(abs, range(3))
    assert executor.run(wf, audit=lambda _: executor.close())[handles] == [0, 1, 2]
    assert not executor._backend._is_open
    with executor:
        assert executor.run(wf)[handles] == [0, 1, 2]


def test_many_threads_may_close():
    executor = fp.WorkflowExecutor(2)
    wf = fp.Workflow()
    wf.map(abs, range(3))
    executor.run(wf)
    threads = [threading.Thread(target=executor.close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    assert not executor._backend._is_open


MAIN_ENDS = """
import os, sys, threading
import forgepar as fp

def step(i):
    if i == 0:
        open("go").read()
    return i

def run():
    wf = fp.Workflow()
    handles = wf.map(step, range(4))
    print(wf.run(workers=2)[handles], flush=True)

threading.Thread(target=run, daemon=DAEMON).start()
with open("go", "w") as file:
    file.write("on")
"""


@pytest.mark.parametrize("daemon", [False, True])
def test_a_run_in_a_thread_comes_to_its_end_where_the_main_thread_ends(daemon, tmp_path):
    os.mkfifo(tmp_path / "go")
    done = subprocess.run(
        [sys.executable, "-c", MAIN_ENDS.replace("DAEMON", str(daemon))],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.stderr, done.returncode) == ("", 0)
    # A daemonic thread is not waited for behind its run, so it may come too late to print.
    assert done.stdout.strip() in (["[0, 1, 2, 3]", ""] if daemon else ["[0, 1, 2, 3]"])


def test_workers_that_start_while_the_program_ends_are_ended_and_refused(tmp_path):
    program = """
import threading, time
import forgepar as fp
from forgepar.pool import scheduler
class Slow:
    def __reduce__(self):
        begun.set()
        while not scheduler._is_exiting:
            time.sleep(0.001)
        return int, ()
def submit():
    try:
        fp.ForgeExecutor(1, initializer=int, initargs=(Slow(),)).submit(abs, -1)
    except RuntimeError as error:
        print(error)
begun = threading.Event()
threading.Thread(target=submit).start()
begun.wait()
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    told = "cannot schedule new futures after interpreter shutdown\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, told, "")


def test_jobs_may_be_submitted_by_a_signal_handler_amid_a_submission():
    futures, own = [], []
    with fp.ForgeExecutor(1) as pool:
        pool.submit(abs, 0).result()
        encode, is_within = pool._submissions.sent_callable, []

        def interrupted(fn):
            if not is_within:
                is_within.append(True)
                with pool._submissions._lock, pool._scheduler._lock:
                    os.kill(os.getpid(), signal.SIGUSR1)
                is_within.clear()
            return encode(fn)

        pool._submissions.sent_callable = interrupted
        before = signal.signal(signal.SIGUSR1, lambda *_: futures.append(pool.submit(lambda i: i, [len(futures)])))
        try:
            own = [pool.submit(lambda i: i, [n]) for n in range(20)]
        finally:
            signal.signal(signal.SIGUSR1, before)
        assert [future.result(30) for future in own] == [[n] for n in range(20)]
        assert [future.result(30) for future in futures] == [[n] for n in range(20)]


# Interrupts


class Interrupting:
    """Raises KeyboardInterrupt at one line of this package's code about workers, as a signal would."""

    def __init__(self, at):
        self.at, self.count = at, 0

    def __enter__(self):
        sys.settrace(self.trace)

    def __exit__(self, *_):
        sys.settrace(None)

    def trace(self, frame, event, _):
        file = frame.f_code.co_filename
        if file not in INTERRUPTED_FILES:
            return None
        # A lock is released where its block ends, whatever comes: no signal is looked at between.
        if event == "line" and not linecache.getline(file, frame.f_lineno).lstrip().startswith("with "):
            self.count += 1
            if self.count == self.at:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


def left_over(folder, children):
    """Return what there is of an executor that was closed."""
    mine = set(psutil.Process().children(recursive=True)) - children
    alive = [child for child in mine if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    return [child.cmdline() for child in psutil.wait_procs(alive, 10)[1]], folder.exists()


def every_line(of):
    return pytest.mark.parametrize("step", [of, pytest.param(1, marks=pytest.mark.slow)])


@every_line(of=5)
def test_closing_that_was_interrupted_anywhere_goes_on(step):
    wf = fp.Workflow()
    wf.map(abs, range(3))
    at, children = 1, set(psutil.Process().children(recursive=True))
    while True:
        executor = fp.WorkflowExecutor(2, start_method="fork")
        executor.run(wf)
        folder, interrupting = executor._backend.arena.folder, Interrupting(at)
        try:
            with interrupting:
                executor.close()
            break
        except KeyboardInterrupt:
            executor.close()
            assert left_over(folder, children) == ([], False), at
            at += step
    assert at > 20


class InterruptingAt(Interrupting):
    """Raises KeyboardInterrupt the first time that a line of a function is reached."""

    def __init__(self, code, line):
        self.code, self.line, self.came = code, line, False

    def trace(self, frame, event, _):
        if frame.f_code is not self.code:
            return None
        if event == "line" and frame.f_lineno == self.line:
            self.came = True
            sys.settrace(None)
            raise KeyboardInterrupt
        return self.trace


def lines_of(function):
    """Return the lines of a function at which an interrupt can come; see `Interrupting` for those left out."""
    file, first = function.__code__.co_filename, function.__code__.co_firstlineno
    found = sorted({line for _, _, line in function.__code__.co_lines() if line is not None and line > first})
    return [line for line in found if not linecache.getline(file, line).lstrip().startswith("with ")]


@pytest.mark.parametrize("then", ["close", "end of the program", "run"])
@pytest.mark.parametrize("line", lines_of(ProcessBackend._close)[-8:])
def test_closing_that_was_interrupted_between_its_last_lines_can_be_finished(line, then):
    wf = fp.Workflow()
    handles = wf.map(abs, range(3))
    executor = fp.WorkflowExecutor(1, start_method="fork")
    executor.run(wf)
    backend, interrupting = executor._backend, InterruptingAt(ProcessBackend._close.__code__, line)
    with pytest.raises(KeyboardInterrupt), interrupting:
        executor.close()
    if then == "close":
        executor.close()
    elif then == "run":
        assert executor.run(wf)[handles] == [0, 1, 2]
        assert executor.run(wf)[handles] == [0, 1, 2]
        executor.close()
    else:
        close = backend.close
        n_calls = []

        def counted():
            n_calls.append(1)
            assert len(n_calls) < 5, "the program would never end"
            close()

        backend.close = counted
        others = open_backends._open - {backend}
        open_backends._open -= others  # those of other tests stay open
        try:
            open_backends._close_all()
        finally:
            open_backends._open |= others
            del backend.close
    assert backend not in open_backends._open
    assert not backend.arena.folder.exists()
    if then != "end of the program":  # what nothing calls any more may stay as it is
        assert not backend._is_open
        assert not backend._is_closing


@pytest.mark.parametrize("line", lines_of(open_backends.close_dropped))
def test_a_dropped_backend_is_closed_though_an_interrupt_ended_the_first_attempt(line):
    executor = fp.WorkflowExecutor(1, start_method="fork")
    wf = fp.Workflow()
    pid = wf.add(os.getpid)
    worker = psutil.Process(executor.run(wf)[pid])
    del executor
    interrupting = InterruptingAt(open_backends.close_dropped.__code__, line)
    try:
        with interrupting:
            open_backends.close_dropped()
    except KeyboardInterrupt:
        open_backends.close_dropped()
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()


@pytest.mark.parametrize("place", ["_wake", "wake"])
def test_a_wake_up_of_a_pool_that_was_interrupted_is_made_up_for(place):
    function = PoolScheduler._wake if place == "_wake" else ProcessBackend.wake
    with fp.ForgeExecutor(1) as pool:
        pool.submit(abs, 0).result(30)
        for line in lines_of(function):
            wait_until(lambda: pool._scheduler._is_asleep, "the pool to wait")
            try:
                with InterruptingAt(function.__code__, line):
                    pool.submit(abs, -1)
            except KeyboardInterrupt:
                assert pool.submit(abs, -2).result(30) == 2, line


@pytest.mark.parametrize("line", lines_of(PoolScheduler._start)[-6:])
def test_a_start_of_a_pool_that_was_interrupted_ends(line):
    pool = fp.ForgeExecutor(1, start_method="fork")
    before, scheduler = set(threading.enumerate()), pool._scheduler
    close = scheduler.backend.close

    def close_later():
        """Let the pool's thread have the lock first."""
        if threading.current_thread() is threading.main_thread():
            threads = [thread for thread in set(threading.enumerate()) - before if thread.name == "forgepar-executor"]
            wait_until(lambda: scheduler._is_asleep or not any(map(threading.Thread.is_alive, threads)), "the thread")
            assert scheduler._is_closing or not threads, "the thread would hold the backend for ever"
        close()

    scheduler.backend.close = close_later
    try:
        with InterruptingAt(PoolScheduler._start.__code__, line):
            pool.submit(abs, -1)
    except KeyboardInterrupt:
        assert pool._scheduler not in _open_schedulers
        assert pool._scheduler.backend not in open_backends._open
    else:
        pool.shutdown()
    for thread in set(threading.enumerate()) - before:
        thread.join(30)
        assert not thread.is_alive()


# What was made and not yet kept when the interrupt came is closed by the garbage collector, with a warning.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@every_line(of=9)
@pytest.mark.parametrize("method", ["forkserver", "fork"])
def test_a_start_that_was_interrupted_anywhere_leaves_nothing(method, step):
    wf = fp.Workflow()
    handles = wf.map(abs, range(3))
    with fp.WorkflowExecutor(1, start_method=method) as executor:
        executor.run(wf)  # the fork server stays
    at, children = 1, set(psutil.Process().children(recursive=True))
    while True:
        executor, interrupting = fp.WorkflowExecutor(1, start_method=method), Interrupting(at)
        open_backend = executor._backend.open

        def interrupted(n_wanted, open_backend=open_backend, interrupting=interrupting):
            with interrupting:
                open_backend(n_wanted)

        executor._backend.open = interrupted
        try:
            executor.run(wf)
            executor.close()
            break
        except KeyboardInterrupt:
            arena = executor._backend.__dict__.get("arena")
            if arena is not None:
                assert left_over(arena.folder, children) == ([], False), at
        executor._backend.open = open_backend
        assert executor.run(wf)[handles] == [0, 1, 2]
        executor.close()
        at += step
    assert at > 30


INTERRUPTED = (-signal.SIGINT, 130)  # a shell says 130
TWICE = """
import time
import forgepar as fp
wf = fp.Workflow()
wf.map(time.sleep, [30] * 4)
print("begins", flush=True)
KIND
"""
KINDS = [
    "wf.run(workers=2)",
    "wf.run(workers=2, start_method='fork')",
    "executor = fp.WorkflowExecutor(2); executor.run(wf)",
    "pool = fp.ForgeExecutor(2); [f.result() for f in [pool.submit(time.sleep, 30) for _ in range(4)]]",
    "with fp.ForgeExecutor(2) as pool: [f.result() for f in [pool.submit(time.sleep, 30) for _ in range(4)]]",
]


def interrupt_twice(seed, folder):
    """Interrupt a program twice, at random moments of its start, run and end; return its exit code, and its errors."""
    chance = random.Random(seed)
    environment = {**os.environ, "TMPDIR": str(folder)}
    with (folder / f"errors-{seed}").open("w+") as errors:
        code = _interrupt_twice(chance, environment, errors)
        errors.seek(0)
        return code, errors.read()


def _interrupt_twice(chance, environment, errors):
    program = subprocess.Popen(
        [sys.executable, "-c", TWICE.replace("KIND", chance.choice(KINDS))],
        stdout=subprocess.PIPE,
        stderr=errors,
        env=environment,
        start_new_session=True,
    )
    try:
        assert program.stdout.readline() == b"begins\n"
        for least, most in ((0.0, 0.8), (0.01, 0.2)):
            try:
                program.wait(chance.uniform(least, most))
            except subprocess.TimeoutExpired:
                program.send_signal(signal.SIGINT)
        code = program.wait(20)
    finally:
        program.kill()
        program.wait()
        program.stdout.close()
    gone = psutil.wait_procs(of_session(program.pid), 10)[1]
    assert not gone, [process.cmdline() for process in gone]
    return code


def of_session(pid):
    """Return processes of a session that the program began."""
    found = []
    for child in psutil.process_iter():
        try:
            if os.getsid(child.pid) == pid and child.status() != psutil.STATUS_ZOMBIE:
                found.append(child)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


HUNG = """
import multiprocessing, pathlib, threading
import forgepar as fp
def hang():
    pathlib.Path("begun").touch()
    threading.Event().wait()
def body():
    global pool
    pool = fp.ForgeExecutor(1)
    return pool.submit(hang).result()
KIND
"""
HANGS = {
    "without with": "body()",
    "end of with": "with fp.ForgeExecutor(1) as pool: pool.submit(hang)",
}
if sys.version_info < (3, 13):  # later ones have handled the interrupt before anything is told of the child's end
    HANGS["child"] = (
        "process = multiprocessing.get_context('fork').Process(target=body); process.start(); process.join()"
    )


@pytest.mark.parametrize("kind", HANGS)
def test_an_interrupt_ends_a_program_with_a_hung_job(kind, tmp_path):
    with (tmp_path / "errors").open("w+") as errors:
        program = subprocess.Popen(
            [sys.executable, "-c", HUNG.replace("KIND", HANGS[kind])],
            cwd=tmp_path,
            stderr=errors,
            start_new_session=True,
        )
        try:
            wait_until((tmp_path / "begun").exists, "the job to begin")
            os.killpg(program.pid, signal.SIGINT)
            assert program.wait(20) in INTERRUPTED
            wait_until(lambda: not of_session(program.pid), "its processes to end")
        finally:
            for left in of_session(program.pid):
                left.kill()
            program.wait()


def test_an_interrupt_at_the_end_of_a_with_block_ends_what_runs(tmp_path):
    program = """
import pathlib, signal, sys, threading
import forgepar as fp
def hang():
    pathlib.Path("begun").touch()
    threading.Event().wait()
def interrupt():
    while not pathlib.Path("begun").exists():
        pass
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
try:
    with fp.ForgeExecutor(1) as pool:
        job = pool.submit(hang)
        threading.Thread(target=interrupt, daemon=True).start()
except KeyboardInterrupt:
    print(type(job.exception()).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=30, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "PoolWorkerDied\n", "")


@pytest.mark.parametrize("seed", range(6))
def test_two_interrupts_end_a_program(seed, tmp_path):
    code, errors = interrupt_twice(seed, tmp_path)
    assert code in INTERRUPTED, errors


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1500, 25))
def test_many_double_interrupts_end_a_program(first, tmp_path):
    for seed in range(first, first + 25):
        code, errors = interrupt_twice(seed, tmp_path)
        assert code in INTERRUPTED, (seed, errors)


DROPPED = """
import forgepar as fp

def run(method):
    executor = fp.WorkflowExecutor(workers=1, start_method=method)
    workflow = fp.Workflow("dropped")
    handle = workflow.add(abs, -1)
    return executor.run(workflow)[handle]

print(run({method!r}))
"""


@pytest.mark.parametrize("method", METHODS)
def test_a_program_ends_that_left_a_function_with_an_executor_open(method, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(DROPPED.format(method=method))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=30)
    assert (done.stdout, done.stderr, done.returncode) == ("1\n", "", 0)


def test_the_workers_of_an_executor_that_nothing_refers_to_end_when_others_start():
    executor = fp.WorkflowExecutor(workers=1)
    wf = fp.Workflow("dropped")
    pid = wf.add(os.getpid)
    worker = psutil.Process(executor.run(wf)[pid])
    del executor
    assert wf.run(workers=1)[pid] != worker.pid
    psutil.wait_procs([worker], timeout=30)
    assert not worker.is_running()


def start_others():
    """Start processes in the ways that there are, which hold what this one lets its children have."""
    child = os.fork()
    if child == 0:
        signal.pause()
    started = multiprocessing.get_context("fork").Process(target=signal.pause)
    started.start()
    other = subprocess.Popen([sys.executable, "-S", "-c", "import signal; signal.pause()"], close_fds=False)
    return child, started.pid, other.pid


@pytest.mark.parametrize("method", METHODS)
def test_workers_end_by_themselves_beside_what_tasks_have_started(method, monkeypatch):
    killed = []
    monkeypatch.setattr(process_slots, "_kill_tree", killed.append)
    executor = fp.ForgeExecutor(1, start_method=method)
    others = [psutil.Process(pid) for pid in executor.submit(start_others).result()]
    try:
        (worker,) = multiprocessing.active_children()
        executor.shutdown()
        assert (killed, worker.exitcode) == ([], 0)
        assert all(other.is_running() for other in others)
    finally:
        for other in others:
            other.kill()
