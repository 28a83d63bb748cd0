"""Workers start at a limit of the system, fewer of them, or are refused clearly; nothing hangs, and nothing is left."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import json
import multiprocessing
import os
import re
import resource
import socket
import subprocess
import sys
import threading
import warnings
import weakref
from multiprocessing import forkserver, resource_tracker, util
from pathlib import Path
from tempfile import gettempdir

import psutil
import pytest
from conftest import PATIENCE, own_arenas, wait_until
from two_users import command_of, why_not

import forgepar as fp
from forgepar.backends import fork_server, limits, orphans, starting, worker_starter
from forgepar.backends import messages as wire
from forgepar.backends.process import ProcessBackend
from forgepar.backends.worker_starter import WorkerStarter

START_METHODS = ["forkserver", "spawn", "fork"]
USER = 60_000 + os.getpid() % 1000  # of whom no other test has processes
WHY_NOT = why_not()

# A program that does some work at limits, and tells what came of it as a line of JSON.
PROGRAM = """
import gc, json, os, resource, sys, threading, warnings
kind, method, n_workers, descriptors, processes = sys.argv[1], sys.argv[2], *map(int, sys.argv[3:])
import numpy  # it starts threads
import forgepar as fp

def n_open():
    gc.collect()
    return len(os.listdir("/proc/self/fd"))

def n_threads_of_user():
    count = 0
    for name in filter(str.isdecimal, os.listdir("/proc")):
        try:
            lines = open(f"/proc/{name}/status").read().splitlines()
        except OSError:
            continue
        fields = dict(line.split(":\\t", 1) for line in lines if ":\\t" in line)
        if fields["Uid"].split()[0] == str(os.getuid()):
            count += int(fields["Threads"])
    return count

def double(number):
    return 2 * number

def double_and_die(number):
    if number == 7 and fp.context().attempt == 1:
        os._exit(1)
    return 2 * number

def workflow(executor=None, function=double):
    wf = fp.Workflow()
    handle = wf.map(function, range(40))
    if executor is not None:
        return sum(executor.run(wf)[handle])
    return sum(wf.run(workers=n_workers, start_method=method)[handle])

def work():
    if kind == "workflow":
        return workflow()
    if kind in ("warm", "restart"):
        wear = 10 if kind == "restart" else None
        with fp.WorkflowExecutor(n_workers, start_method=method, max_tasks_per_worker=wear) as executor:
            function = double if kind == "warm" else fp.task(double_and_die).options(retries=2)
            return max(workflow(executor, function) for _ in range(2))
    if kind == "pool":
        with fp.ForgeExecutor(n_workers, start_method=method) as executor:
            return sum(executor.map(double, range(40)))
    if kind == "left open":
        executor = fp.ForgeExecutor(n_workers, start_method=method)
        return sum(executor.map(double, range(40)))
    import joblib
    with joblib.parallel_config(backend="forgepar"):
        values = joblib.Parallel(n_jobs=n_workers)(joblib.delayed(double)(number) for number in range(40))
    forgepar.joblib.close()
    return sum(values)

if kind == "joblib":
    import forgepar.joblib
told = {"value": None, "error": "", "text": ""}
before = n_open()
if descriptors >= 0:
    resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + descriptors,) * 2)
if processes >= 0:
    resource.setrlimit(resource.RLIMIT_NPROC, (n_threads_of_user() + processes,) * 2)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        told["value"] = work()
    except Exception as error:
        told["error"], told["text"] = " ".join(cls.__name__ for cls in type(error).__mro__), str(error)
if kind != "left open":
    told["n_more_open"] = n_open() - before
    told["threads"] = [thread.name for thread in threading.enumerate()][1:]
told["warnings"] = [str(warning.message) for warning in caught]
print(json.dumps(told))
"""
RIGHT = sum(2 * number for number in range(40))


def tell(kind, method, *, n_workers=4, descriptors=-1, processes=-1, user=0):
    """Run the program; return what it told, and check that it ends, silently and with nothing left."""
    arguments = (kind, method, n_workers, descriptors, processes)
    if user:
        started = command_of(user, PROGRAM, *arguments)
    else:
        started = {"args": [sys.executable, "-c", PROGRAM, *map(str, arguments)]}
    semaphores = set(Path("/dev/shm").glob("sem.mp-*"))
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(**started, **pipes, start_new_session=True) as program:
        try:
            out, err = program.communicate(timeout=4 * PATIENCE)
        finally:
            of_it = [process for process in psutil.process_iter() if session_of(process.pid) == program.pid]
            program.kill()
    assert (program.returncode, err) == (0, "")
    psutil.wait_procs(of_it, timeout=PATIENCE)
    assert [process for process in of_it if process.is_running()] == []
    roots = [Path("/dev/shm"), Path(gettempdir())]
    assert [path for root in roots for path in root.glob(f"forgepar-*-{program.pid}-*")] == []
    if user:
        left = set(Path("/dev/shm").glob("sem.mp-*")) - semaphores
        assert [path for path in left if path.stat().st_uid == user] == []
    told = {**json.loads(out), "kind": kind}
    if kind != "left open":
        # The fork server's and the tracker's stay, for the next workers.
        assert told["n_more_open"] <= 6, told
        assert told["threads"] == []
    return told


def session_of(pid):
    with contextlib.suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def assert_fewer(told, n_workers=4):
    """Check that all was done, and one warning tells of fewer workers and what helps."""
    assert (told["value"], told["error"]) == (RIGHT, ""), told
    (warning,) = told["warnings"]
    assert warning.startswith("Tasks run on ")
    if told["kind"] in ("pool", "joblib", "left open"):  # they start workers as they get jobs
        n_workers = int(re.match(r"Tasks run on \d+ of (\d+) ", warning)[1])
    assert f" of {n_workers} workers, as no more can be started." in warning
    assert "`ulimit -" in warning
    assert "fewer workers." in warning


def assert_refused(told):
    assert told["value"] is None, told
    assert "WorkerStartFailed" in told["error"]
    assert "No worker can be started. " in told["text"]
    assert "`ulimit -" in told["text"]
    assert told["warnings"] == []


class TestDescriptors:
    """How many files this process may have open."""

    @pytest.fixture
    def few(self):
        """The soft limit leaves 5 more; there is no hard limit to speak of."""
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        soft = len(open_descriptors()) + 5
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, before[1]))
        try:
            yield soft
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, before)

    @pytest.mark.parametrize("method", START_METHODS)
    def test_the_soft_limit_is_raised_to_what_workers_need(self, few, method):
        wf = fp.Workflow()
        handle = wf.map(abs, range(-5, 0))
        with fp.WorkflowExecutor(3, start_method=method) as executor:
            assert sum(executor.run(wf)[handle]) == 15
            assert executor._backend._starter.n_executors() == 3
        assert few + 3 * limits.PER_WORKER < resource.getrlimit(resource.RLIMIT_NOFILE)[0] < few + 200

    @pytest.mark.usefixtures("few")
    def test_a_fork_server_that_was_started_below_has_the_new_limit(self):
        starting._server.forget()
        with fp.ForgeExecutor(1) as executor:
            assert executor.submit(abs, -1).result() == 1
        pid = starting._server._forkserver_pid
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) >= resource.getrlimit(resource.RLIMIT_NOFILE)
        with fp.WorkflowExecutor(12) as executor:
            wf = fp.Workflow()
            wf.map(abs, range(12))
            executor.run(wf)
        assert starting._server._forkserver_pid == pid
        assert resource.prlimit(pid, resource.RLIMIT_NOFILE) >= resource.getrlimit(resource.RLIMIT_NOFILE)

    def test_nothing_is_raised_where_there_are_enough(self):
        before = resource.getrlimit(resource.RLIMIT_NOFILE)
        with fp.ForgeExecutor(2, start_method="fork") as executor:
            assert sum(executor.map(abs, range(4))) == 6
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == before

    @pytest.mark.parametrize("kind", ["workflow", "pool", "joblib", "restart", "left open"])
    def test_at_the_hard_limit_there_are_fewer_workers(self, kind):
        assert_fewer(tell(kind, "fork", descriptors=64))

    @pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow)])
    def test_at_the_hard_limit_there_are_fewer_workers_of_any_start_method(self, method):
        assert_fewer(tell("warm", method, descriptors=64))

    @pytest.mark.parametrize("kind", ["workflow", "pool"])
    def test_where_there_is_room_for_none_nothing_is_started(self, kind):
        assert_refused(tell(kind, "forkserver", descriptors=20))

    @pytest.mark.slow
    @pytest.mark.parametrize("descriptors", range(4, 76, 12))
    @pytest.mark.parametrize("method", START_METHODS)
    @pytest.mark.parametrize("kind", ["workflow", "warm", "restart", "pool", "joblib", "left open"])
    def test_any_number(self, kind, method, descriptors):
        told = tell(kind, method, descriptors=descriptors)
        if told["error"]:
            assert_refused(told)
        elif told["warnings"]:
            assert_fewer(told)
        else:
            assert told["value"] == RIGHT


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "there are two users")
class TestProcesses:
    """How many processes and threads a user may have. No such limit binds root."""

    @pytest.mark.parametrize("method", ["forkserver", pytest.param("spawn", marks=pytest.mark.slow), "fork"])
    def test_at_the_limit_there_are_fewer_workers(self, method):
        assert_fewer(tell("workflow", method, processes=12, user=USER))

    def test_where_none_can_be_started_that_is_told(self):
        assert_refused(tell("workflow", "forkserver", processes=1, user=USER))

    @pytest.mark.slow
    @pytest.mark.parametrize("processes", [1, 2, 4, 6, 8, 11, 14])
    @pytest.mark.parametrize("method", START_METHODS)
    @pytest.mark.parametrize("kind", ["workflow", "warm", "restart", "pool", "joblib", "left open"])
    def test_any_number(self, kind, method, processes):
        told = tell(kind, method, processes=processes, user=USER)
        if told["error"]:
            assert "WorkerStartFailed" in told["error"], told
            assert "`ulimit -u`" in told["text"]
        elif told["warnings"]:
            assert_fewer(told)
        else:
            assert told["value"] == RIGHT


class Failing:
    """A function that fails at its n-th call in this process, or from that on."""

    def __init__(self, function, error, n, *, lasts):
        self._function, self._error, self._n, self._lasts = function, error, n, lasts
        self._process = os.getpid()
        self.n_calls = 0

    def __call__(self, *args, **options):
        if os.getpid() == self._process:
            self.n_calls += 1
            if self.n_calls == self._n or (self._lasts and self.n_calls > self._n):
                raise self._error()
        return self._function(*args, **options)

    def __get__(self, instance, owner=None):
        return self if instance is None else lambda *args, **options: self(instance, *args, **options)


def no_descriptor():
    return OSError(errno.EMFILE, os.strerror(errno.EMFILE))


def no_process():
    return BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))


def no_thread():
    return RuntimeError("can't start new thread")


POINTS = {
    "pipe": (os, "pipe", no_descriptor),
    "dup": (os, "dup", no_descriptor),
    "named pipe": (os, "mkfifo", no_descriptor),
    "file": (os, "open", no_descriptor),
    "socket pair": (socket, "socketpair", no_descriptor),
    "program": (util, "spawnv_passfds", no_process),
    "fork": (os, "fork", no_process),
    "thread": (threading.Thread, "start", no_thread),
}


def double(number):
    return 2 * number


def double_and_die(number):
    if number % 9 == 0 and fp.context().attempt == 1:
        os._exit(1)
    return 2 * number


def work(kind, method):
    """Double some numbers; return how many workers were asked for, and the sum."""
    if kind == "pool":
        with fp.ForgeExecutor(3, start_method=method) as executor:
            return sum(executor.map(double, range(20)))
    wf = fp.Workflow()
    if kind == "workflow":
        handle = wf.map(double, range(20))
        return sum(wf.run(workers=3, start_method=method)[handle])
    handle = wf.map(fp.task(double_and_die).options(retries=3), range(20))
    with fp.WorkflowExecutor(3, start_method=method, max_tasks_per_worker=8) as executor:
        return sum(executor.run(wf)[handle])


def open_descriptors():
    gc.collect()
    return {path.name for path in Path("/proc/self/fd").iterdir() if os.path.lexists(path)}


def assert_survives(kind, method, what, n, *, lasts):
    """Work while something fails, and check that all is right or refused clearly; tell whether it came to that."""
    module, name, error = POINTS[what]
    failing = Failing(getattr(module, name), error, n, lasts=lasts)
    before, threads = open_descriptors(), set(threading.enumerate())
    with warnings.catch_warnings(record=True) as caught, pytest.MonkeyPatch.context() as changed:
        warnings.simplefilter("always")
        changed.setattr(module, name, failing)
        text = "no error, so no need of fewer workers"
        try:
            assert work(kind, method) == sum(2 * number for number in range(20))
        except fp.WorkerStartFailed as failure:
            text = str(failure)
    assert "fewer workers" in text
    # From 3.12 on, Python warns of forks beside threads, here at `Failing`.
    told = [str(warning.message) for warning in caught if warning.category is not DeprecationWarning]
    assert len(told) <= 1, told
    wanted = "3" if kind == "workflow" else "[123]"  # a pool opens slots as there are jobs for them, a restart is one
    assert all(re.search(rf"Tasks run on \d of {wanted} workers, as no more can be", text) for text in told), told
    wait_until(lambda: not multiprocessing.active_children(), "workers to end")
    wait_until(lambda: set(threading.enumerate()) <= threads, "threads to end")
    wait_until(lambda: open_descriptors() <= before | kept(), "descriptors to be closed")
    assert own_arenas() == set()
    assert orphans._watcher._pid == 0
    return failing.n_calls >= n


def kept():
    """What the fork server and the tracker of semaphores have; they stay for the next workers."""
    tracker = resource_tracker._resource_tracker._fd
    return {str(starting._server._forkserver_alive_fd), str(tracker)}


@pytest.fixture
def warmed():
    """Have run what opens descriptors once for a process."""
    work("pool", "fork")


def test_what_fails_once_as_workers_are_started_costs_a_worker_at_most(warmed):
    for what, n in [("pipe", 7), ("pipe", 13), ("fork", 2), ("thread", 3), ("thread", 6), ("named pipe", 8)]:
        assert assert_survives("workflow", "fork", what, n, lasts=False), (what, n)
    assert assert_survives("pool", "fork", "thread", 4, lasts=False)
    assert assert_survives("pool", "fork", "socket pair", 1, lasts=False)
    assert assert_survives("workflow", "fork", "program", 1, lasts=False)  # the watcher


def test_what_fails_from_some_point_on_leaves_those_workers_that_there_are(warmed):
    for what, n in [("pipe", 6), ("fork", 3), ("fork", 5), ("thread", 7)]:
        assert assert_survives("restart", "fork", what, n, lasts=True), (what, n)
    assert assert_survives("pool", "fork", "fork", 1, lasts=True)


@pytest.mark.parametrize("what", ["program", "pipe"])
def test_a_fork_server_that_cannot_be_started_leaves_nothing(warmed, what):
    for n in (1, 2, 3):
        starting._server.forget()
        assert_survives("workflow", "forkserver", what, n, lasts=True)


@pytest.mark.slow
@pytest.mark.parametrize("lasts", [False, True])
@pytest.mark.parametrize("what", POINTS)
@pytest.mark.parametrize("kind", ["restart", "pool"])
@pytest.mark.parametrize("method", START_METHODS)
def test_anything_may_fail_anywhere(warmed, method, kind, what, lasts):
    if what == "file" and lasts:
        pytest.skip("to remove a folder takes a descriptor, and workers that are closed leave some")
    work(kind, method)
    step = 1 if method == "fork" else 5  # the others take longer
    for n in itertools.count(1, step):
        if n % 3 == 0:
            starting._server.forget()
        if not assert_survives(kind, method, what, n, lasts=lasts):
            break
    assert n > 1 or what == "fork"


def test_a_fork_server_that_cannot_fork_tells_why_and_goes_on(monkeypatch):
    told, own = os.pipe(), os.pipe()

    def fail():
        raise no_process()

    monkeypatch.setattr(os, "fork", fail)
    fork_server._received[:] = [own[0], told[1]]
    with pytest.raises(ConnectionAbortedError):
        fork_server._fork()
    assert forkserver.read_signed(told[0]) == -errno.EAGAIN
    assert os.read(told[0], 1) == b""
    with pytest.raises(BrokenPipeError):
        os.write(own[1], b"!")
    for descriptor in (told[0], own[1]):
        os.close(descriptor)


def test_a_fork_server_that_cannot_fork_goes_on_though_the_parent_is_gone_and_the_error_has_no_number(monkeypatch):
    def fail():
        raise OSError("no")

    monkeypatch.setattr(os, "fork", fail)
    for is_gone_by_now in (False, True):
        told, own = os.pipe(), os.pipe()
        if is_gone_by_now:
            os.close(told[0])
        fork_server._received[:] = [own[0], told[1], own[1]]
        with pytest.raises(ConnectionAbortedError) as caught:
            fork_server._fork()
        assert caught.value.errno == errno.ECONNABORTED
        if not is_gone_by_now:
            assert forkserver.read_signed(told[0]) == -errno.EAGAIN
            os.close(told[0])
        for descriptor in fork_server._received:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


def test_a_fork_server_keeps_what_it_received_and_gives_the_system_a_copy(monkeypatch):
    monkeypatch.setattr(fork_server.reduction, "recvfds", lambda client, most: [client + most, 8])
    found = fork_server._receive(4, 3)
    assert found == fork_server._received == [7, 8]
    found.clear()
    assert fork_server._received == [7, 8]


def test_a_function_with_other_globals_is_the_same_but_for_those():
    def original(a, b=2, *, c=3):
        return (a, b, c, errno.ENOENT, os.getpid)

    stand_in = fork_server.ModuleProxy(os, getpid="mine")
    assert (stand_in.getpid, stand_in.getppid) == ("mine", os.getppid)
    with pytest.raises(AttributeError):
        stand_in.no_such_name  # noqa: B018
    changed = fork_server.with_globals(original, os=stand_in)
    assert changed(1) == (1, 2, 3, errno.ENOENT, "mine")
    assert changed.__name__ == "original"
    assert original(1)[-1] is os.getpid
    closed_over = 1
    with pytest.raises(AssertionError, match="is a closure"):
        fork_server.with_globals(lambda: closed_over)


def test_a_fork_server_goes_on_where_its_parent_could_not_make_what_it_sends(warmed):
    ours, theirs = socket.socketpair()
    with theirs:
        ours.close()
        with pytest.raises(ConnectionAbortedError):
            fork_server._receive(theirs, 9)
    work("workflow", "forkserver")
    pid = starting._server._forkserver_pid
    for n in (5, 10, 11):
        assert assert_survives("workflow", "forkserver", "pipe", n, lasts=False), n
    assert starting._server._forkserver_pid == pid


def test_its_pid_is_one_or_the_reason_why_there_is_none():
    reader, writer = os.pipe()
    forkserver.write_signed(writer, 7)
    forkserver.write_signed(writer, -errno.EAGAIN)
    assert starting._read_pid(reader) == 7
    with pytest.raises(BlockingIOError):
        starting._read_pid(reader)
    os.close(writer)
    with pytest.raises(EOFError):
        starting._read_pid(reader)
    os.close(reader)


def test_a_server_whose_socket_was_removed_is_replaced():
    with fp.ForgeExecutor(2) as executor:
        assert executor.submit(abs, -1).result() == 1
        Path(starting._server._forkserver_address).unlink()
        assert sum(executor.map(abs, range(-9, 0))) == 45
        assert executor._scheduler.backend._starter.n_executors() == 2


def test_a_worker_whose_start_was_taken_for_failed_is_turned_away():
    backend = ProcessBackend(2, "fork")
    backend.open(1)
    try:
        wait_until(lambda: backend.wait(0.1) and backend.joined(), "the worker")
        pid = backend._slots[0].pid
        with contextlib.closing(wire.connect(backend._address)) as stranger:
            stranger.send(wire.pack(wire.Hello(1, pid, ()), backend.arena))
            assert backend.wait(0.2) == []
            assert stranger.receive() == b""
        assert [joined.slot for joined in backend.joined()] == [0]
    finally:
        backend.close()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (no_descriptor(), "`ulimit -n`"),
        (OSError(errno.ENFILE, "no"), "fs.file-max"),
        (no_process(), "`ulimit -u`, or pids.max of the control group"),
        (no_thread(), "`ulimit -u`, or pids.max of the control group"),
        (OSError(errno.ENOMEM, "no"), "no memory for another process"),
        (EOFError(), "The fork server ended before"),
        (RuntimeError("can't create new thread at interpreter shutdown"), "The program is ending"),
        (OSError(errno.ENOSPC, "No space left"), "OSError: [Errno 28] No space left"),
    ],
)
def test_a_reason_is_told_with_what_helps(error, reason):
    assert reason in limits.why(error)


def fail_to_start(*_):
    raise no_process()


def refused(executor):
    """Submit, and return what that is refused with."""
    try:
        executor.submit(abs, -1)
    except fp.WorkerStartFailed as failure:
        return str(failure)
    return ""


def test_an_executor_that_got_no_worker_says_so_each_time_and_is_collected(monkeypatch):
    monkeypatch.setattr(WorkerStarter, "_launch", fail_to_start)
    executor = fp.ForgeExecutor(1, start_method="fork")
    texts = {refused(executor) for _ in range(3)}
    assert len(texts) == 1
    assert "`ulimit -u`" in texts.pop()
    executor.shutdown()
    known = weakref.ref(executor)
    del executor
    gc.collect()
    assert known() is None


def test_a_call_of_joblib_that_gets_no_worker_leaves_none_in_use(monkeypatch):
    joblib = pytest.importorskip("joblib")
    forgepar_joblib = pytest.importorskip("forgepar.joblib")
    calls = [joblib.delayed(double)(number) for number in range(4)]
    with joblib.parallel_config(backend="forgepar"):
        with monkeypatch.context() as changed:
            changed.setattr(WorkerStarter, "_launch", fail_to_start)
            with pytest.raises(fp.WorkerStartFailed, match="`ulimit -u`"):
                joblib.Parallel(n_jobs=2)(calls)
        assert forgepar_joblib._workers._n_calls() == 0
        assert sum(joblib.Parallel(n_jobs=2)(calls)) == 12
        assert forgepar_joblib._workers._n_calls() == 0
    forgepar_joblib.close()


def test_a_start_is_known_by_its_own_mark_whatever_other_threads_start(monkeypatch):
    """A worker whose process has the mark of another start is turned away."""
    real, are_alone = worker_starter.begin_start, []

    def begin_start():
        are_alone.append(worker_starter.holds(worker_starter.no_forks))
        return real()

    monkeypatch.setattr(worker_starter, "begin_start", begin_start)
    assert work("pool", "fork") == sum(2 * number for number in range(20))
    assert are_alone == [True] * 3


def fail_to_serve(*_):
    raise no_thread()


def test_what_a_worker_fails_with_at_a_limit_costs_that_one_alone(monkeypatch):
    """Others work: it is no fault of what workers are to do."""
    backend = ProcessBackend(2, "fork")
    backend.open(1)
    try:
        wait_until(lambda: backend.wait(0.1) or backend.joined(), "the first worker")
        monkeypatch.setattr(worker_starter, "serve", fail_to_serve)
        backend.open(2)
        with pytest.warns(RuntimeWarning, match="Tasks run on 1 of 2 workers"):
            wait_until(lambda: backend.wait(0.1) or not backend._starter.n_starting, "the second to be done without")
        assert [joined.slot for joined in backend.joined()] == [0]
    finally:
        backend.close()


def test_a_worker_that_cannot_be_started_again_is_told_of_as_the_program_ends(monkeypatch):
    backend = ProcessBackend(2, "fork")
    backend.open(2)
    try:
        wait_until(lambda: backend.wait(0.1) is not None and len(backend.joined()) == 2, "two workers")

        def fail(*_):
            raise RuntimeError("can't create new thread at interpreter shutdown")

        monkeypatch.setattr(threading.Thread, "start", fail)
        backend.kill(0)
        notices = []
        with pytest.warns(RuntimeWarning, match=r"Tasks run on 1 of 2 workers.* The program is ending"):
            wait_until(
                lambda: notices.extend(backend.wait(0.1)) or (notices and not backend._starter.n_starting),
                "one to be done without",
            )
        assert [type(notice).__name__ for notice in notices] == ["Lost"]
        backend.kill(1)
        with pytest.raises(fp.WorkerStartFailed, match="The program is ending"):
            wait_until(lambda: notices.extend(backend.wait(0.1)), "no worker to be left")
        assert [type(notice).__name__ for notice in notices] == ["Lost", "Lost"]
    finally:
        backend.close()


def test_values_are_stored_where_no_thread_can_be_started_for_it(monkeypatch, tmp_path):
    import numpy as np

    start = threading.Thread.start

    def fail(self):
        if self.name == "forgepar-store":
            raise no_thread()
        start(self)

    monkeypatch.setattr(threading.Thread, "start", fail)
    wf = fp.Workflow()
    handle = wf.add(np.arange, 100_000)
    wf.run(workers=1, start_method="fork", store=str(tmp_path / "runs.db"))
    with fp.Store.open(str(tmp_path / "runs.db")) as store:
        assert store.run().value(handle.name).sum() == sum(range(100_000))
