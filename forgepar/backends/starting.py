"""How worker processes start, without any change to the state of the caller's process.

    ProcessPoolExecutor(mp_context=context(method)) ──> Process.start ──> Popen._launch ──> worker
                                                                               │
                                         only forkserver ──> a fork server of this package, one per process

`multiprocessing` starts processes with functions of its own modules. This module runs copies of them with a few global
names replaced, so that the caller sees nothing of a start:

- A worker receives no main module, so a script without a guard runs once, and `sys.modules["__main__"]` stays as it
  is. Callables are pickled by value.
- A new interpreter searches for modules where the caller's does, from its first import on. By default it would search
  the working directory first, and load a `queue.py` or another forgepar from there.
- The default start method, which `multiprocessing` sets when it first sends it to a child, stays unset.
- The fork server is separate from that of `multiprocessing`, so what the caller has that one preload does not matter.
  A forked child of the caller starts its own server, because only a parent can wait for a server's exit.
- A fork while other threads run causes no warning. The threads here belong to executors and sleep, and the child runs
  none of their code. No warning filter is changed.

In the worker, the process is an ordinary one of `multiprocessing`. This module uses private names of the standard
library, as do `executor_internals` and `exit_hooks`; tests/backends/test_starting.py checks them on each version of
Python.
"""

from __future__ import annotations

import copyreg
import multiprocessing
import os
import signal
import socket
import sys
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
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
from forgepar.backends.dummy_lock import DummyLock
from forgepar.backends.exit_hooks import end_before_joins
from forgepar.backends.fork_server import ModuleProxy, with_globals
from forgepar.system.forking import SENTINEL, free_all_locks, hold_alone, import_again, in_child

# The fork server imports these, so that workers need not: their own code, and the executor's code in them.
_PRELOADED = ["forgepar.backends.worker_process", "concurrent.futures.process"]


def context(start_method: str) -> BaseContext:
    """Return the context for a `ProcessPoolExecutor` of one process.

    Args:
        start_method: "forkserver", "spawn" or "fork".
    """
    return _CONTEXTS[start_method]


def process_of(pid: int) -> BaseProcess | None:
    """Return the process with this pid that was started here; None if it was garbage collected."""
    return _started.get(pid)


def make_ready(start_method: str) -> None:
    """Start the helper processes that a start needs, so that their failures come before anything is created.

    Raises:
        OSError: a helper process cannot be started.
    """
    if start_method == "forkserver":
        _server.ensure_running()
    elif start_method == "spawn":
        resource_tracker.ensure_running()


def begin_start() -> object:
    """Return a mark for the processes that start until the next call."""
    global _start  # one start happens at a time
    _start = object()
    return _start


def processes_of(start: object) -> list[BaseProcess]:
    """Return the processes with a mark of `begin_start`, also those whose start was interrupted."""
    return [child for child in list(process._children) if getattr(child, "of_start", None) is start]  # type: ignore[attr-defined]


def _spawnv(path: str, args: list[Any], descriptors: Iterable[int]) -> int:
    """Start an interpreter that runs the code after the flag -c, with the import path of this one."""
    at = args.index("-c") + 1
    folders = [folder or process.ORIGINAL_DIR or folder for folder in sys.path if isinstance(folder, str)]  # type: ignore[attr-defined]
    args = [*args[:at], f"import sys; sys.path[:] = {folders!r}; {args[at]}", *args[at + 1 :]]
    return util.spawnv_passfds(path, args, descriptors)  # type: ignore[arg-type]


def _spawnv_server(path: str, args: list[Any], descriptors: Iterable[int]) -> int:
    """Start the fork server, with `fork_server.main`."""
    at = args.index("-c") + 1
    assert args[at].startswith(_MAIN), f"unexpected code to start the fork server: {args[at]}"
    return _spawnv(path, [*args[:at], _OUR_MAIN + args[at].removeprefix(_MAIN), *args[at + 1 :]], descriptors)


def _spawnv_process(path: str, args: list[Any], descriptors: Sequence[int]) -> int:
    """Start a process with the number of its sentinel, the last descriptor, on its command line."""
    return _spawnv(path, [*args, f"{SENTINEL}{descriptors[-1]}"], descriptors)


def _folder() -> str:
    """Return the working directory, or the root if it was deleted: tasks that need it fail later."""
    try:
        return os.getcwd()  # noqa: PTH109  (pathlib takes longer to load)
    except FileNotFoundError:
        return os.sep


def _default_start_method() -> str | None:
    """Return the caller's default start method, or None if a worker would not know it.

    Libraries register their own methods: in a worker of loky the default is "loky".
    """
    method = multiprocessing.get_start_method(allow_none=True)
    return method if method in _CONTEXTS else None


_spawn = ModuleProxy(
    spawn,
    get_preparation_data=with_globals(
        spawn.get_preparation_data,
        sys=ModuleProxy(sys, modules={"__main__": ModuleType("__main__")}),
        os=ModuleProxy(os, getcwd=_folder),
        get_start_method=_default_start_method,
    ),
)
_MAIN = "from multiprocessing.forkserver import main; "
_OUR_MAIN = "from forgepar.backends.fork_server import main; "
_sockets = ModuleProxy(socket, socket=ShortSocket)
_ensure_running = with_globals(
    forkserver.ForkServer.ensure_running,
    spawn=_spawn,
    util=ModuleProxy(util, spawnv_passfds=_spawnv_server),
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
        self._most_descriptors = 0.0  # its limit

    def ensure_running(self) -> None:
        try:
            self._ensure()
        except ChildProcessError:  # it has ended, and the caller has waited for all children
            self.forget()
            self._ensure()

    def connect_to_new_process(self, fds: Any) -> Any:
        try:
            return _connect(self, fds)
        except (ConnectionError, FileNotFoundError):  # it has just ended, or its socket was removed
            self.forget()
            return _connect(self, fds)

    def _ensure(self) -> None:
        """Start it if needed, and raise its limit of descriptors to that of this process: it needs one per worker."""
        before = self._forkserver_pid
        _ensure_running(self)
        most = limits.soft_limit()
        if self._forkserver_pid == before and most > self._most_descriptors:
            assert before is not None
            if not limits.share_with(before):
                self.forget()
                _ensure_running(self)
        self._most_descriptors = most

    def forget(self) -> None:
        """Forget the server. It ends when neither its parent nor any worker has its descriptor open."""
        alive, self._forkserver_alive_fd = self._forkserver_alive_fd, None
        self._forkserver_address = self._forkserver_pid = None
        if alive is not None:
            with suppress(OSError):
                os.close(alive)


class _Descriptors:
    """Descriptors that the current start has created in this process: a failed start closes them."""

    def __init__(self) -> None:
        self._made: list[int] = []
        self._spare = -1
        self.first_pipe = (-1, -1)

    def begin(self) -> None:
        """Forget those of the last start, which belong to its process now."""
        self._made.clear()

    def pipe(self) -> tuple[int, int]:
        pair = os.pipe()
        if not self._made:
            self.first_pipe = pair
        self._made += pair
        return pair

    def reserve(self) -> None:
        """Reserve the number that `dup` returns: when `dup` is called, the process has started, so it must not fail."""
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
        """Close all descriptors of a failed start."""
        finalizer = getattr(popen, "finalizer", None)
        if finalizer is not None and finalizer.still_active():
            self._made = [number for number in self._made if number not in finalizer._args]
            finalizer()
        while self._made:
            with suppress(OSError):
                os.close(self._made.pop())


_descriptors = _Descriptors()
_os = ModuleProxy(os, pipe=_descriptors.pipe, dup=_descriptors.dup, close=_descriptors.close)
_server = _Server()
_connect = with_globals(forkserver.ForkServer.connect_to_new_process, os=_os, socket=_sockets)


def _read_pid(descriptor: int) -> int:
    """Read the pid of the process that the fork server has started.

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


_launch_by_server = with_globals(
    popen_forkserver.Popen._launch,  # type: ignore[attr-defined]
    spawn=_spawn,
    os=_os,
    open=_descriptors.open,
    forkserver=ModuleProxy(forkserver, connect_to_new_process=_ask_server, read_signed=_read_pid),
)
_launch_by_spawn = with_globals(
    popen_spawn_posix.Popen._launch,  # type: ignore[attr-defined]
    spawn=_spawn,
    util=ModuleProxy(util, spawnv_passfds=_spawnv_process),
)
# An invalid registry makes warnings in this function fail, and `os.fork` ignores a warning that fails.
_launch_by_fork = with_globals(popen_fork.Popen._launch, os=_os, __warningregistry__=())  # type: ignore[attr-defined]


class _CleanStart:
    """A `Popen` that leaves nothing when its start fails, and ignores standard streams that cannot be flushed."""

    pid: int

    def __init__(self, process_obj: BaseProcess) -> None:
        popen: Any = self
        with suppress(Exception):  # a full disk, a closed pipe; a forked child writes none of it
            util._flush_std_streams()  # type: ignore[attr-defined]
        popen._fds, popen.returncode, popen.finalizer = [], None, None
        self._launch(process_obj)

    def _launch(self, process_obj: BaseProcess) -> None:
        _descriptors.begin()
        try:
            self._launch_process(process_obj)
        except BaseException:
            _descriptors.drop(self)
            raise

    def _launch_process(self, process_obj: BaseProcess) -> None:
        raise NotImplementedError


class _ForkServerPopen(_CleanStart, popen_forkserver.Popen):
    def _launch_process(self, process_obj: BaseProcess) -> None:
        try:
            _launch_by_server(self, process_obj)
        except BrokenPipeError:
            if hasattr(self, "sentinel"):
                _read_pid(self.sentinel)  # if the server could not fork, this raises its error
            raise


class _SpawnPopen(_CleanStart, popen_spawn_posix.Popen):
    def _launch_process(self, process_obj: BaseProcess) -> None:
        try:
            _launch_by_spawn(self, process_obj)
        except BaseException:
            pid = getattr(self, "pid", None)
            if pid is not None:  # it did not receive its code
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
            raise


class _ForkPopen(_CleanStart, popen_fork.Popen):
    _launch_process = _launch_by_fork


class _Started(BaseProcess):
    """A process with forgepar's own start; base of the classes for each start method."""

    _standard: type[BaseProcess]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._config["daemon"] = False  # type: ignore[attr-defined]
        self.of_start = _start

    def start(self) -> None:
        """Start the process. Also allowed in a daemonic process: workers see their parent end, so none is left.

        Unlike `BaseProcess.start`, this does not wait for other children of this process that have ended.
        """
        assert self._popen is None, "cannot start a process twice"  # type: ignore[has-type]
        end_before_joins()
        popen: Any = self._Popen(self)  # type: ignore[attr-defined]
        self._popen, self._sentinel = popen, popen.sentinel
        self._watch()
        del self._target, self._args, self._kwargs  # type: ignore[attr-defined]
        process._children.add(self)  # type: ignore[attr-defined]
        assert self.pid is not None
        _started[self.pid] = self

    def _watch(self) -> None:
        """Have the process end when this one ends."""
        orphans.watch(self._popen.pid)

    def __reduce__(self) -> Any:
        state = {**self.__dict__, "of_start": None}
        return copyreg._reconstructor, (self._standard, object, None), state  # type: ignore[attr-defined]


class _ForkServerProcess(_Started, contexts.ForkServerProcess):
    _standard = contexts.ForkServerProcess
    _Popen = staticmethod(_ForkServerPopen)

    def _watch(self) -> None:
        super()._watch()
        if _server._forkserver_pid is not None:
            orphans.watch(_server._forkserver_pid)  # it may still start a process that was requested


class _SpawnProcess(_Started, contexts.SpawnProcess):
    _standard = contexts.SpawnProcess
    _Popen = staticmethod(_SpawnPopen)


class _ForkProcess(_Started, contexts.ForkProcess):
    _Popen = staticmethod(_ForkPopen)

    @staticmethod
    def _after_fork() -> None:
        free_all_locks()
        import_again()
        # Otherwise the parent does not see this process end while a child of it lives.
        hold_alone(_descriptors.first_pipe[1])
        BaseProcess._after_fork()  # type: ignore[attr-defined]


class _ForkServerContext(contexts.ForkServerContext):
    Process = _ForkServerProcess


class _SpawnContext(contexts.SpawnContext):
    Process = _SpawnProcess


class _ForkContext(contexts.ForkContext):
    Process = _ForkProcess


for _context in (_ForkServerContext, _SpawnContext, _ForkContext):
    for _name in ("Lock", "BoundedSemaphore"):  # used by the queues of an executor
        setattr(_context, _name, DummyLock)


_CONTEXTS: dict[str, BaseContext] = {
    "forkserver": _ForkServerContext(),
    "spawn": _SpawnContext(),
    "fork": _ForkContext(),
}
_started: weakref.WeakValueDictionary[int, BaseProcess] = weakref.WeakValueDictionary()
_start: object = None


def _leave_to_parent() -> None:
    """In a forked child, close descriptors of the parent's server and workers, which watch whether the parent lives."""
    global _server  # each process has its own
    before, _server = _server, _Server()
    before.forget()
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
