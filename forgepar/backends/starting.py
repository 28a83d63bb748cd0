"""How worker processes start, without any change to the state of the caller's process.

    ProcessPoolExecutor(mp_context=context(method)) ──> Process.start ──> Popen._launch ──> worker
                                                                               │
                                                  forkserver alone ──> a server of our own, one per process

`multiprocessing` starts processes by functions of its own modules. Here these run with a few of their global names
replaced, so that the caller sees nothing of a start:

- What a worker is told names no main module, so a script without a guard runs once, and `sys.modules["__main__"]` stays
  as it is. Callables travel by value.
- An interpreter that is started looks for modules where the caller's does, from its first import on. By default it
  would look in the working directory first, and load a `queue.py` or another forgepar from there.
- The default start method, which `multiprocessing` settles when it first tells it to a child, stays unsettled.
- The fork server is ours. That of `multiprocessing`, and what the caller has it preload, is left alone. A forked child
  of the caller gets its own, as a server's exit can be waited for by its parent only.
- A fork beside threads is not warned of. The threads here are executors' own, asleep in a wait, and the child runs
  nothing of theirs. No filter is touched.

In the worker, the process is an ordinary one of `multiprocessing`. All private names of the standard library that we
use are in this module; tests/test_starting.py tries them on each version of Python.
"""

from __future__ import annotations

import atexit
import copyreg
import multiprocessing
import os
import signal
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import process as futures_process
from concurrent.futures.process import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from multiprocessing import context as contexts
from multiprocessing import (
    forkserver,
    popen_fork,
    popen_forkserver,
    popen_spawn_posix,
    process,
    resource_tracker,
    spawn,
    util,
)
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from types import ModuleType
from typing import Any

from forgepar.backends import limits, orphans
from forgepar.backends.addresses import ShortSocket
from forgepar.backends.fork_server import Instead, with_names
from forgepar.backends.lone_locks import LoneLock
from forgepar.forking import SENTINEL, free_all_locks, hold_alone, import_anew, in_child

# Loaded by the fork server, so that no worker has to: what runs in each, and what the executor's part in it needs.
_PRELOADED = ["forgepar.backends.worker", "concurrent.futures.process"]
_EXIT_PRIORITY = 1000  # before anything that `multiprocessing` does at the exit of a process


def context(start_method: str) -> BaseContext:
    """Return what a `ProcessPoolExecutor` of one process is to start that with.

    Args:
        start_method: "forkserver", "spawn" or "fork".
    """
    return _CONTEXTS[start_method]


def process_of(pid: int) -> BaseProcess | None:
    """Return the process that was started here and has this pid; None where nothing refers to it any more."""
    return _started.get(pid)


def make_ready(start_method: str) -> None:
    """Have those programs run that a start needs beside this one: what fails of that fails before anything is made.

    Raises:
        OSError: one cannot be started.
    """
    if start_method == "forkserver":
        _server.ensure_running()
    elif start_method == "spawn":
        resource_tracker.ensure_running()


def start_thread(executor: ProcessPoolExecutor) -> None:
    """Start the thread by which an executor hands out its job.

    By default another thread of the executor does so: there a failure to start it is lost, and the job waits for ever.

    Raises:
        RuntimeError: no thread can be started.
    """
    queue: Any = executor._call_queue  # type: ignore[attr-defined]
    with queue._notempty:
        queue._start_thread()


def let_go(executor: ProcessPoolExecutor) -> None:
    """Have an executor end, without waiting for that; one whose start did not come to its end closes what it has."""
    thread: Any = executor._executor_manager_thread
    if thread is None or thread.ident is None:
        _discard(executor)
    else:
        executor.shutdown(wait=False, cancel_futures=True)


def _discard(executor: ProcessPoolExecutor) -> None:
    """Close what an executor has made whose own thread was not started."""
    parts: Any = executor
    if parts._call_queue is None:
        return  # it was shut down
    queue, results, wakeup = parts._call_queue, parts._result_queue, parts._executor_manager_thread_wakeup
    executor.shutdown(wait=False, cancel_futures=True)
    queue.close()
    queue.join_thread()
    queue._thread = None  # one that was not started refers to the queue
    wakeup.close()
    for end in (queue._reader, queue._writer, results._reader, results._writer):
        end.close()


def begin_start() -> object:
    """Return what the processes that are started from here on, up to the next call, are known by."""
    global _start  # starts go one by one
    _start = object()
    return _start


def processes_of(start: object) -> list[BaseProcess]:
    """Return the processes of a start, see `begin_start`; those as well whose start an interrupt ended."""
    return [child for child in list(process._children) if getattr(child, "of_start", None) is start]  # type: ignore[attr-defined]


def at_exit(callback: Callable[[], object]) -> None:
    """Have a function called when this process ends, before anything waits for its executors or its children.

    It is called twice: once more by `atexit`, as an interrupt may keep `threading` from coming to it.

    `concurrent.futures` waits for running jobs in a callback of its own, which `atexit` comes too late for. Callbacks
    run last in, first out, and that one was registered when this module imported it. A child that `multiprocessing`
    started waits for its own children even before that, see `_end_before_joins`.
    """
    _exit_callbacks.append(callback)
    threading._register_atexit(callback)  # type: ignore[attr-defined]
    atexit.register(callback)


def abandon(threads: Iterable[threading.Thread]) -> None:
    """In a forked child, have neither its end nor garbage collection wake executors of the parent.

    Args:
        threads: those of the executors, which do not exist in the child.
    """
    for thread in threads:
        wakeup: Any = futures_process._threads_wakeups.pop(thread, None)
        if wakeup is not None and not wakeup._closed:
            wakeup._closed = True
            wakeup._writer.close()
            wakeup._reader.close()
        for lock in (getattr(thread, "shutdown_lock", None), getattr(wakeup, "_lock", None)):
            if lock is not None:
                lock._at_fork_reinit()


def _spawnv(path: str, args: list[Any], descriptors: Iterable[int]) -> int:
    """Start an interpreter on the code behind its flag -c, with the folders that this one imports from."""
    at = args.index("-c") + 1
    folders = [folder or process.ORIGINAL_DIR or folder for folder in sys.path if isinstance(folder, str)]  # type: ignore[attr-defined]
    args = [*args[:at], f"import sys; sys.path[:] = {folders!r}; {args[at]}", *args[at + 1 :]]
    return util.spawnv_passfds(path, args, descriptors)  # type: ignore[arg-type]


def _spawnv_server(path: str, args: list[Any], descriptors: Iterable[int]) -> int:
    """Start the fork server, with a main function of our own."""
    at = args.index("-c") + 1
    assert args[at].startswith(_MAIN), f"the fork server of this Python starts otherwise: {args[at]}"
    return _spawnv(path, [*args[:at], _OUR_MAIN + args[at].removeprefix(_MAIN), *args[at + 1 :]], descriptors)


def _spawnv_process(path: str, args: list[Any], descriptors: Sequence[int]) -> int:
    """Start a process, and tell it which descriptor its parent knows its end by: the last one."""
    return _spawnv(path, [*args, f"{SENTINEL}{descriptors[-1]}"], descriptors)


def _folder() -> str:
    """Return the working directory, or the root where it was deleted: tasks that need it fail by themselves."""
    try:
        return os.getcwd()  # noqa: PTH109  (pathlib takes longer to load)
    except FileNotFoundError:
        return os.sep


_spawn = Instead(
    spawn,
    get_preparation_data=with_names(
        spawn.get_preparation_data,
        sys=Instead(sys, modules={"__main__": ModuleType("__main__")}),
        os=Instead(os, getcwd=_folder),
        get_start_method=partial(multiprocessing.get_start_method, allow_none=True),
    ),
)
_MAIN = "from multiprocessing.forkserver import main; "
_OUR_MAIN = "from forgepar.backends.fork_server import main; "
_sockets = Instead(socket, socket=ShortSocket)
_ensure_running = with_names(
    forkserver.ForkServer.ensure_running,
    spawn=_spawn,
    util=Instead(util, spawnv_passfds=_spawnv_server),
    socket=_sockets,
)


class _Server(forkserver.ForkServer):
    """The fork server of this process."""

    _forkserver_alive_fd: int | None
    _forkserver_address: str | None
    _forkserver_pid: int | None

    def __init__(self) -> None:
        super().__init__()
        self.set_forkserver_preload(_PRELOADED)
        self._most_descriptors = 0.0  # that it may have

    def ensure_running(self) -> None:
        try:
            self._ensure()
        except ChildProcessError:  # it has ended, and the caller has collected all of its children
            self.let_go()
            self._ensure()

    def connect_to_new_process(self, fds: Any) -> Any:
        try:
            return _connect(self, fds)
        except (ConnectionError, FileNotFoundError):  # it has just ended, or somebody has removed its socket
            self.let_go()
            return _connect(self, fds)

    def _ensure(self) -> None:
        """Have it run, with a descriptor for the end of each worker that this process may have."""
        before = self._forkserver_pid
        _ensure_running(self)
        most = limits.soft_limit()
        if self._forkserver_pid == before and most > self._most_descriptors:
            assert before is not None
            if not limits.share_with(before):
                self.let_go()
                _ensure_running(self)
        self._most_descriptors = most

    def let_go(self) -> None:
        """Forget the server, which ends when neither its parent nor a worker holds on to it."""
        alive, self._forkserver_alive_fd = self._forkserver_alive_fd, None
        self._forkserver_address = self._forkserver_pid = None
        if alive is not None:
            with suppress(OSError):
                os.close(alive)


class _Descriptors:
    """Those that the start under way has made in this process: one that fails is to leave none."""

    def __init__(self) -> None:
        self._made: list[int] = []
        self._spare = -1
        self.first_pipe = (-1, -1)

    def begin(self) -> None:
        """Forget those of the start before, which are their process's now."""
        self._made.clear()

    def pipe(self) -> tuple[int, int]:
        pair = os.pipe()
        if not self._made:
            self.first_pipe = pair
        self._made += pair
        return pair

    def reserve(self) -> None:
        """Make sure of the number that `dup` returns, as that comes too late to fail: the process has been started."""
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._made.append(self._spare)

    def dup(self, number: int) -> int:
        return os.dup2(number, self._spare, inheritable=False)

    def close(self, number: int) -> None:
        if number in self._made:
            self._made.remove(number)
        os.close(number)

    def open(self, number: int, *args: Any, **options: Any) -> Any:
        file = open(number, *args, **options)  # noqa: SIM115  (the caller closes it)
        self._made.remove(number)
        return file

    def drop(self, popen: Any) -> None:
        """Close all that the start of a process has made, as it has failed."""
        finalizer = getattr(popen, "finalizer", None)
        if finalizer is not None and finalizer.still_active():
            self._made = [number for number in self._made if number not in finalizer._args]
            finalizer()
        while self._made:
            with suppress(OSError):
                os.close(self._made.pop())


_descriptors = _Descriptors()
_os = Instead(os, pipe=_descriptors.pipe, dup=_descriptors.dup, close=_descriptors.close)
_server = _Server()
_connect = with_names(forkserver.ForkServer.connect_to_new_process, os=_os, socket=_sockets)


def _read_pid(descriptor: int) -> int:
    """Read the pid of a process that the fork server was asked for.

    Raises:
        OSError: the server could not fork.
        EOFError: the server has ended.
    """
    pid: int = forkserver.read_signed(descriptor)
    if pid < 0:
        raise OSError(-pid, os.strerror(-pid))
    return pid


def _ask_server(fds: Any) -> Any:
    _descriptors.reserve()
    return _server.connect_to_new_process(fds)


_launch_by_server = with_names(
    popen_forkserver.Popen._launch,  # type: ignore[attr-defined]
    spawn=_spawn,
    os=_os,
    open=_descriptors.open,
    forkserver=Instead(forkserver, connect_to_new_process=_ask_server, read_signed=_read_pid),
)
_launch_by_spawn = with_names(
    popen_spawn_posix.Popen._launch,  # type: ignore[attr-defined]
    spawn=_spawn,
    util=Instead(util, spawnv_passfds=_spawnv_process),
)
# A registry that is none fails whatever is warned of in this function, and `os.fork` drops what its warning fails with.
_launch_by_fork = with_names(popen_fork.Popen._launch, os=_os, __warningregistry__=())  # type: ignore[attr-defined]


class _Undone:
    """Has a start of a process that fails leave nothing, and not fail for standard streams that cannot be flushed."""

    pid: int

    def __init__(self, process_obj: BaseProcess) -> None:
        popen: Any = self
        with suppress(Exception):  # a full disk, a reader that has gone; a child that is forked writes none of it
            util._flush_std_streams()  # type: ignore[attr-defined]
        popen._fds, popen.returncode, popen.finalizer = [], None, None
        self._launch(process_obj)

    def _launch(self, process_obj: BaseProcess) -> None:
        _descriptors.begin()
        try:
            self._start_it(process_obj)
        except BaseException:
            _descriptors.drop(self)
            raise

    def _start_it(self, process_obj: BaseProcess) -> None:
        raise NotImplementedError


class _ForkServerPopen(_Undone, popen_forkserver.Popen):
    def _start_it(self, process_obj: BaseProcess) -> None:
        try:
            _launch_by_server(self, process_obj)
        except BrokenPipeError:
            if hasattr(self, "sentinel"):
                _read_pid(self.sentinel)  # where the server could not fork, this raises what it has told of that
            raise


class _SpawnPopen(_Undone, popen_spawn_posix.Popen):
    def _start_it(self, process_obj: BaseProcess) -> None:
        try:
            _launch_by_spawn(self, process_obj)
        except BaseException:
            pid = getattr(self, "pid", None)
            if pid is not None:  # it did not take what it was to run
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            raise


class _ForkPopen(_Undone, popen_fork.Popen):
    _start_it = _launch_by_fork


class _Started(BaseProcess):
    """What our processes have in common."""

    _standard: type[BaseProcess]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._config["daemon"] = False  # type: ignore[attr-defined]
        self.of_start = _start

    def start(self) -> None:
        """Start, in a daemonic process as well: workers see their parent go, so none is left behind.

        Other children of this process are not looked at, as `BaseProcess.start` does.
        """
        assert self._popen is None, "cannot start a process twice"  # type: ignore[has-type]
        _end_before_joins()
        popen: Any = self._Popen(self)  # type: ignore[attr-defined]
        self._popen, self._sentinel = popen, popen.sentinel
        self._watch_it()
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]
        process._children.add(self)  # type: ignore[attr-defined]
        assert self.pid is not None
        _started[self.pid] = self

    def _watch_it(self) -> None:
        """Have the process end when this one is gone."""
        orphans.watch(self._popen.pid)

    def __reduce__(self) -> Any:
        state = {**self.__dict__, "of_start": None}
        return copyreg._reconstructor, (self._standard, object, None), state  # type: ignore[attr-defined]


class _ForkServerProcess(_Started, contexts.ForkServerProcess):
    _standard = contexts.ForkServerProcess
    _Popen = staticmethod(_ForkServerPopen)

    def _watch_it(self) -> None:
        super()._watch_it()
        if _server._forkserver_pid is not None:
            orphans.watch(_server._forkserver_pid)  # who could still start one that was asked for


class _SpawnProcess(_Started, contexts.SpawnProcess):
    _standard = contexts.SpawnProcess
    _Popen = staticmethod(_SpawnPopen)


class _ForkProcess(_Started, contexts.ForkProcess):
    _Popen = staticmethod(_ForkPopen)

    @staticmethod
    def _after_fork() -> None:
        free_all_locks()
        import_anew()
        # Else the parent would not see this process end while a child of it lives.
        hold_alone(_descriptors.first_pipe[1])
        BaseProcess._after_fork()  # type: ignore[attr-defined]


class _ForkServerContext(contexts.ForkServerContext):
    Process = _ForkServerProcess


class _SpawnContext(contexts.SpawnContext):
    Process = _SpawnProcess


class _ForkContext(contexts.ForkContext):
    Process = _ForkProcess


for _context in (_ForkServerContext, _SpawnContext, _ForkContext):
    for _name in ("Lock", "BoundedSemaphore"):  # of the queues of an executor
        setattr(_context, _name, LoneLock)


_CONTEXTS: dict[str, BaseContext] = {
    "forkserver": _ForkServerContext(),
    "spawn": _SpawnContext(),
    "fork": _ForkContext(),
}
_started: weakref.WeakValueDictionary[int, BaseProcess] = weakref.WeakValueDictionary()
_exit_callbacks: list[Callable[[], object]] = []
_start: object = None
_ended_in = 0  # the process that `_end_before_joins` was done in


def _end_before_joins() -> None:
    """Have a process that `multiprocessing` started end its workers before it waits for its children to end.

    It does that before `threading` calls what `at_exit` registers there, and would wait for idle workers for ever.
    """
    global _ended_in  # a forked child must do it again
    if _ended_in != os.getpid():
        _ended_in = os.getpid()
        util.Finalize(None, _run_exit_callbacks, exitpriority=_EXIT_PRIORITY)


def _run_exit_callbacks() -> None:
    for callback in reversed(_exit_callbacks):
        callback()


def _leave_to_parent() -> None:
    """In a forked child, let go of the parent's server and workers: these watch whether their parent lives."""
    global _server  # there is one for each process
    before, _server = _server, _Server()
    before.let_go()
    for started in list(_started.values()):
        process._children.discard(started)  # type: ignore[attr-defined]
        finalizer = started._popen.finalizer  # type: ignore[attr-defined]
        if finalizer is not None and finalizer.still_active():
            descriptors = finalizer._args
            finalizer.cancel()
            for descriptor in descriptors:
                with suppress(OSError):
                    os.close(descriptor)
    _started.clear()


in_child(_leave_to_parent)
