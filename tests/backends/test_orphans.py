"""Workers end with their parent, whatever they are at and whoever else has copies of its pipes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

import forgepar as fp
from forgepar.backends import orphan_watch, orphans

MOST_SECONDS = 2.0  # from a parent's end to its workers', as README says
SCRIPT = """
import ctypes, os, signal, subprocess, sys, threading
import forgepar as fp

method, kind, state, pids = sys.argv[1:]

def busy(state, pids):
    child = subprocess.Popen(["sleep", "1000"])
    with open(pids, "a") as file:
        file.write(f"{os.getpid()}\\n{child.pid}\\n")
    if state == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif state == "in C code":
        ctypes.PyDLL(None).pause()  # PyDLL, unlike CDLL, holds the interpreter
    threading.Event().wait()

def fork(_=None):
    '''Have a child that no hook of Python's sees: it keeps copies of all descriptors.'''
    if ctypes.CDLL(None).fork() == 0:
        signal.pause()

def run():
    if kind == "pool":
        pool = fp.ForgeExecutor(2, start_method=method)
        jobs = [pool.submit(busy, state, pids) for _ in range(2)]
        threading.Timer(0.2, fork).start()
        jobs[0].result()
    wf = fp.Workflow()
    wf.map(busy, [state] * 2, [pids] * 2)
    with fp.WorkflowExecutor(workers=2, start_method=method) as executor:
        first = fp.Workflow()
        first.map(abs, range(4))
        executor.run(first)
        fork()
        executor.run(wf)

if kind == "thread":  # what follows the thread that started the workers would end them with it
    executor = fp.WorkflowExecutor(workers=2, start_method=method)
    wf = fp.Workflow()
    wf.map(abs, range(4))
    starter = threading.Thread(target=executor.run, args=(wf,))
    starter.start()
    starter.join()
    run = lambda: executor.run(again)
    again = fp.Workflow()
    again.map(busy, [state] * 2, [pids] * 2)
run()
"""


@pytest.fixture
def start(tmp_path):
    """Starts a program with two workers that are at a task; returns it, and its workers and what they have started."""
    started = []

    def begin(method, kind, state):
        path, pids = tmp_path / "script.py", tmp_path / "pids"
        path.write_text(textwrap.dedent(SCRIPT))
        command = [sys.executable, "-W", "ignore", str(path), method, kind, state, str(pids)]
        program = subprocess.Popen(command, start_new_session=True)
        started.append(program)
        wait_until(lambda: pids.exists() and pids.read_text().count("\n") == 4, 30)
        return program, [psutil.Process(int(pid)) for pid in pids.read_text().split()]

    yield begin
    for program in started:
        for process in psutil.process_iter():
            try:
                if os.getsid(process.pid) == program.pid:
                    process.kill()
            except (ProcessLookupError, psutil.NoSuchProcess):
                pass
        program.wait()


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"not within {seconds} s"
        threading.Event().wait(0.005)


def is_gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def is_watched(program):
    return any("orphan_watch.py" in " ".join(child.cmdline()) for child in psutil.Process(program.pid).children())


@pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow), "fork"])
@pytest.mark.parametrize(
    ("kind", "state"), [("workflow", "stopped"), ("workflow", "in C code"), ("pool", "stopped"), ("thread", "waiting")]
)
def test_workers_and_what_they_started_end_with_a_killed_parent(start, method, kind, state):
    program, processes = start(method, kind, state)
    wait_until(lambda: is_watched(program), 10)
    program.kill()
    program.wait()
    wait_until(lambda: all(map(is_gone, processes)), MOST_SECONDS)


def test_without_the_program_workers_look_after_themselves(start):
    program, processes = start("fork", "workflow", "waiting")
    for child in psutil.Process(program.pid).children():
        if "orphan_watch.py" in " ".join(child.cmdline()):
            child.kill()
    program.kill()
    program.wait()
    wait_until(lambda: all(map(is_gone, processes)), 10)


def watchers():
    living = [child for child in psutil.Process().children() if child.status() != psutil.STATUS_ZOMBIE]
    return [child for child in living if "orphan_watch.py" in " ".join(child.cmdline())]


def test_there_is_one_while_there_is_an_executor_with_workers():
    with fp.ForgeExecutor(1, start_method="fork") as first:
        assert first.submit(abs, -1).result() == 1
        assert orphans._watcher._pid
        with fp.ForgeExecutor(1, start_method="fork") as second:
            pid = orphans._watcher._pid
            assert second.submit(abs, -2).result() == 2
            wait_until(lambda: len(watchers()) == 1, 10)
        assert orphans._watcher._pid == pid
    assert orphans._watcher._pid == 0
    assert not psutil.pid_exists(pid)


def test_a_forked_child_leaves_it_to_its_parent():
    with fp.ForgeExecutor(1, start_method="fork") as executor:
        assert executor.submit(abs, -1).result() == 1
        pid = orphans._watcher._pid
        if (child := os.fork()) == 0:
            code = 1
            with fp.ForgeExecutor(1, start_method="fork") as own:
                code = 0 if own.submit(abs, -1).result() == 1 and orphans._watcher._pid not in (0, pid) else 2
            os._exit(code)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert psutil.pid_exists(pid)


@pytest.mark.parametrize("fault", [OSError(11, "no more processes"), None])
def test_work_is_done_where_it_cannot_be_started_or_has_died(monkeypatch, fault):
    def fail(*_):
        raise fault

    if fault is not None:
        monkeypatch.setattr(orphans.util, "spawnv_passfds", fail)
    with fp.ForgeExecutor(1, start_method="fork", max_tasks_per_child=1) as executor:
        assert executor.submit(abs, -1).result() == 1
        if fault is None:
            os.kill(orphans._watcher._pid, signal.SIGKILL)
        assert [executor.submit(abs, -number).result() for number in range(3)] == [0, 1, 2]
    assert orphans._watcher._pid == 0


def watch(parent_of, told):
    """Start the program for a parent of its own; return that."""
    text = """
    import os, socket, subprocess, sys
    ours, theirs = socket.socketpair()
    command = [sys.executable, "-I", "-S", sys.argv[1], str(os.getpid()), str(theirs.fileno())]
    subprocess.Popen(command, pass_fds=[theirs.fileno()])
    ours.send(b"".join(b"%d\\n" % int(pid) for pid in sys.argv[2:]))
    """
    command = [sys.executable, "-c", textwrap.dedent(text + parent_of), orphan_watch.__file__, *map(str, told)]
    return subprocess.Popen(command, stdin=subprocess.PIPE)


def test_a_pid_that_another_process_has_by_then_is_left_alone():
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as other:
        assert orphan_watch._trees({other.pid: orphan_watch.start_of(other.pid)}) == {other.pid}
        assert orphan_watch._trees({other.pid: "1"}) == set()
        other.kill()
        os.waitid(os.P_PID, other.pid, os.WEXITED | os.WNOWAIT)
        assert orphan_watch._trees({other.pid: orphan_watch.start_of(other.pid)}) == set()


def test_a_parent_that_is_gone_before_the_program_looks(tmp_path):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as worker:
        parent = watch("os._exit(0)", [worker.pid])
        parent.communicate()
        assert worker.wait(30) == -signal.SIGKILL


def test_a_program_that_replaces_the_parent_keeps_what_it_has(tmp_path):
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as worker:
        parent = watch("os.execvp('cat', ['cat'])", [worker.pid])
        wait_until(lambda: psutil.Process(parent.pid).name() == "cat", 10)
        assert worker.poll() is None
        parent.communicate()
        assert worker.wait(30) == -signal.SIGKILL


def test_without_descriptors_of_processes_the_parents_pid_is_looked_at(monkeypatch):
    monkeypatch.delattr(os, "pidfd_open")
    assert orphan_watch._descriptor_of(os.getpid()) is None
    reader, writer = os.pipe()
    os.write(writer, b"%d\n" % os.getpid())
    monkeypatch.setattr(orphan_watch, "_POLL_MILLISECONDS", 1)
    looks = iter([7, 7, 8, 8])
    monkeypatch.setattr(os, "getppid", lambda: next(looks, 8))
    pids: dict[int, str] = {}
    assert orphan_watch._outlive(7, reader, pids)
    assert pids == {os.getpid(): orphan_watch.start_of(os.getpid())}
    os.close(reader)
    os.close(writer)
