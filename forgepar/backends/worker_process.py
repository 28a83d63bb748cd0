"""The process of a worker: it takes over its caller's state, serves batches, and ends with its parent.

    connection ──Batch──> Worker.run ──Reply, Reply, ...──> connection

`begin` is the initializer of a slot's `ProcessPoolExecutor`. `serve` is the only job that this executor ever runs; it
ends when the parent closes the connection or dies.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import active_children, connection, current_process, parent_process, process, util
from typing import Any

from forgepar.backends.joblib_name import register_joblib_backend
from forgepar.backends.messages import Batch, Channel, Hello, connect, pack, pack_whole, shortened, unpack
from forgepar.backends.output_capture import Capture, FrameWriter, open_pipes
from forgepar.backends.start_state import StartState
from forgepar.backends.surroundings import Surroundings, begin_as
from forgepar.backends.worker import OWN_FILES, Worker, be_inside
from forgepar.backends.worker_board import Board
from forgepar.system.forking import SENTINEL, hold_alone, in_child
from forgepar.values import origins
from forgepar.values.arena import Arena, ArenaLocation
from forgepar.values.in_place import use
from forgepar.workflow import context as contexts

STACK_SIGNAL = getattr(signal, "SIGRTMIN", signal.SIGUSR2)  # programs rarely use real-time signals
END_OF_STACK = " in serve\n"
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)
_parent: Channel | None = None
_refused: tuple[str, ...] = ()  # what `begin` could not take over


def serve(address: str, slot: int, place: ArenaLocation, threads: int, gives_way: bool = True) -> None:
    """Run batches from the parent until it closes the connection.

    Args:
        address: the parent's socket.
        slot: which slot this process fills.
        place: the arena; its folder also contains the board.
        threads: how many threads numerical libraries may use here.
        gives_way: whether a process that wakes this one keeps its core for the moment.
    """
    _set_up(threads, gives_way=gives_way)
    # The parent creates these files: a worker that starts late must not add any to a folder that is being removed.
    with (
        open(os.path.join(place.folder, f"crash-{slot}"), "r+b") as crash_file,  # noqa: PTH118, PTH123
        open(os.path.join(place.folder, f"stack-{slot}"), "ab") as stack_file,  # noqa: PTH118, PTH123
    ):
        # faulthandler copies only the descriptors' numbers, so the files stay open until `serve` returns.
        faulthandler.enable(crash_file)
        faulthandler.register(STACK_SIGNAL, stack_file, all_threads=False)
        _serve(address, slot, place)


def own_part(stack: str) -> str:
    """Return the task's part of a stack that `STACK_SIGNAL` made a worker write, without the frames of the worker."""
    lines = stack.splitlines()[1:]
    own = [f'"{file}"' for file in OWN_FILES]
    end = next((n for n, line in enumerate(lines) if any(file in line for file in own)), len(lines))
    return "\n".join(lines[:end])


def _serve(address: str, slot: int, place: ArenaLocation) -> None:
    arena = Arena(place, slot + 1, keeps_mapped=True)
    board = Board(os.path.join(place.folder, "board"))  # noqa: PTH118  (loading pathlib takes longer than all else here)
    worker = Worker(slot, arena, board)
    worker.output = _open_output(worker, place.folder, slot)
    worker.capture = Capture(worker.output)
    worker.capture.begin()
    use(arena)
    contexts.use(worker.context)
    global _parent  # closed in forked children
    parent = _parent = connect(address)
    try:
        parent.send(pack(Hello(slot, os.getpid(), _refused), arena))
        while message := parent.receive_awake():
            for reply in worker.run(unpack(message, Batch, arena)):
                try:
                    message = pack(reply, arena)
                except (
                    OSError,
                    MemoryError,
                ):  # the arena has no room, and the results must not be lost
                    for part in shortened(reply):
                        parent.send(pack_whole(part))
                else:
                    parent.send(message)
    except ConnectionError:
        return  # the parent closed the connection
    finally:
        parent.close()
        with suppress(OSError):
            worker.capture.flush()


def _open_output(worker: Worker, folder: str, slot: int) -> FrameWriter:
    """Open the pipes to the parent: one for frames, and one each for descriptors 1 and 2."""
    frames, *streams = open_pipes(folder, slot)
    for number, descriptor in enumerate(streams, 1):
        os.dup2(descriptor, number)
        os.close(descriptor)
    return FrameWriter(frames, worker.task_number)


def _close_connection() -> None:
    """In a forked child, close the connection: else the parent does not see its worker die while the child lives."""
    global _parent
    if _parent is not None:
        _parent.close()
        _parent = None


in_child(_close_connection)


def _limit_threads(threads: int) -> None:
    for variable in _THREAD_VARIABLES:
        os.environ.setdefault(variable, str(threads))


def _set_up(threads: int, *, gives_way: bool) -> None:
    """Make this process a worker."""
    _limit_threads(threads)
    be_inside()
    register_joblib_backend()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all of a terminal's processes; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # under fork it may be the parent's handler
    if gives_way and hasattr(os, "SCHED_BATCH"):
        # Without it, a worker that the parent wakes may take the parent's core at once, and the next worker's batch
        # waits for a task to end.
        with suppress(OSError):  # some containers forbid it
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def begin(start: StartState, threads: int, surroundings: Surroundings, prepare: Callable[[], object] | None) -> None:
    """Initialize a worker process: take over the caller's state, then call the `prepare` of the workers' owner.

    Args:
        start: the state of the process that starts this one.
        threads: how many threads numerical libraries may use here; set before any of them is loaded.
        surroundings: the caller's surroundings.
        prepare: a function to call at the end.
    """
    global _refused  # `serve` sends it to the parent
    _hold_sentinel()
    _refused = start.take_over()  # before any thread starts, which would keep its own affinity and niceness
    origins.become_worker()
    watch_parent()
    util.Finalize(None, _leave_children, exitpriority=0)
    begin_as(surroundings, dict.fromkeys(_THREAD_VARIABLES, str(threads)), with_rules=prepare is not None)
    _limit_threads(threads)
    if prepare is not None:
        prepare()


def _hold_sentinel() -> None:
    """Keep children of this process from inheriting descriptors that show others when it ends.

    For start method "fork", see `starting._ForkProcess`.
    """
    kind = type(current_process()).__name__
    if kind == "SpawnProcess":  # otherwise the command line is that of another process
        for argument in sys.orig_argv:
            if argument.startswith(SENTINEL):
                sentinel = hold_alone(int(argument.removeprefix(SENTINEL)))
                os.set_inheritable(sentinel, False)  # a task may start a program that inherits all that are inheritable
    elif kind == "ForkServerProcess" and "multiprocessing.forkserver" in sys.modules:
        # The server lives as long as any process has this descriptor.
        server: Any = sys.modules["multiprocessing.forkserver"]._forkserver
        if server._forkserver_alive_fd is not None:
            hold_alone(server._forkserver_alive_fd)


def _leave_children() -> None:
    """Make `multiprocessing` not wait for processes that tasks have started with it.

    The wait could be so long that the parent kills this process. Daemonic children still end with it.
    """
    for child in active_children():
        if not child.daemon:
            process._children.discard(child)  # type: ignore[attr-defined]


def watch_parent() -> None:
    """Start a thread that ends this process when its parent is gone, even while a task runs.

    The executor's initializer calls this first: a worker that waits for `serve` has both ends of its queue open, so it
    would never see the other end close.
    """
    with suppress(RuntimeError):  # no more threads can be started: then the program of `orphans` ends this process
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), name="forgepar-watch", daemon=True).start()


def _end_with_parent(parent_pid: int) -> None:
    parent = parent_process()
    if parent is None:
        return
    # Under fork a sibling may hold a copy of the sentinel's pipe, so the parent's pid is checked as well.
    while not connection.wait([parent.sentinel], timeout=1.0):
        if os.getppid() != parent_pid:
            break
    _end_children()
    os._exit(1)


def _end_children() -> None:
    """Kill all processes that tasks of this process have started."""
    if not _has_children():
        return
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()


def _has_children() -> bool:
    """Return whether this process may have children: loading psutil takes 0.5 s on a busy machine."""
    try:
        threads = os.listdir("/proc/self/task")  # noqa: PTH208
        lists = [f"/proc/self/task/{thread}/children" for thread in threads]
        return any(open(path).read() for path in lists)  # noqa: PTH123
    except OSError:
        return True
