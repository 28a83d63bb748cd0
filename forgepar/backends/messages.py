"""The messages between the parent and a worker, and how they are packed.

    parent --- Batch ---> worker          tasks of one template
    parent <-- Hello ---- worker          once, when it connects
    parent <-- Reply ---- worker          every 10 ms of work, at the end of a batch, and after each task with effects

No message is longer than MESSAGE_LIMIT. A longer one is written to a segment, and the message names the segment. A
reply for which the arena has no room is sent in parts. So the socket buffer (208 KiB on Linux) has room for the two
batches that a worker may have waiting, and the parent never blocks in a send. A worker may block in a send until the
parent reads. So the two cannot wait for each other.
"""

from __future__ import annotations

import functools
import os
import pickle
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple, Protocol, TypeAlias, TypeVar

from forgepar.backends.addresses import short_address
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.values.segments import Segment
from forgepar.workflow.context import RunContext

MESSAGE_LIMIT = 32 * 1024  # bytes
# Waking a worker on an idle core costs both ends 0.1 ms in total. If layers are short, the next batch comes within this
# time; if they are long, this time is wasted once per batch.
AWAKE_SECONDS = 0.00015
# A packet socket keeps messages apart, so that sending and receiving each take one system call; only Linux has it for
# sockets of the file system. Other systems use a stream with the length before each message, read in two calls.
_HAS_PACKETS = sys.platform == "linux"
_LONGEST = MESSAGE_LIMIT + 4096  # bytes of a reply if the arena has no room: one value, and all else
_RECEIVE = _LONGEST + 1  # bytes to receive: one more shows that a message is too long
_MOST_TEXT = 2000  # characters of an error message if there is no room for all
_IN_SEGMENT = b"@"  # never the first byte of a pickle


class Template(NamedTuple):
    """What tasks that were declared together share.

    Attributes:
        number: its number in the plan.
        callable: the callable's number in the plan.
        layout: the fields of the `ArgumentLayout`.
        shared: constants that every task of the template receives as keyword arguments.
        base: the start of the tasks' names.
        timeout: seconds that an attempt may take; None: no limit.
        owns: whether all arguments are private copies, and none are views of memory that other tasks read.
        parts: numbers of the parts of the caller's modules that its tasks need; None: all that were sent.
        has_effects: whether its tasks change something outside the run, so that each is reported when it ends.
    """

    number: int
    callable: int
    layout: tuple[tuple[int, ...], tuple[str, ...]]
    shared: dict[str, Wire]
    base: str = ""
    timeout: float | None = None
    owns: bool = False
    parts: tuple[int, ...] | None = None
    has_effects: bool = False


class Batch(NamedTuple):
    """Tasks of one template and one run for one worker.

    Attributes:
        id: the batch's number, which grows for the life of a slot.
        run: the run's number; a new one makes the worker forget the callables of the last run.
        template: the template's number.
        n_tasks: how many tasks.
        tasks: the first task's number if they are consecutive, else all numbers as int32 bytes.
        constants: the template's constants of each task, one task after the other.
        values: values of other tasks. A blob is ``(pickle, task)``, which the worker keeps under the task's number, or
            ``(task,)``, which it has kept before.
        references: int32 positions in ``values``, one task after the other; empty if ``values`` is already in order.
        callables: numbers and pickles of callables that the worker does not have.
        templates: templates that the worker does not have.
        drop: what the worker may forget after it has read ``values``: numbers of tasks with small values that it keeps,
            and names of segments that it has mapped. A batch without tasks has nothing else, and gets no reply.
        ordinals: the end of the tasks' names: the first one's if they are consecutive, else all as int32 bytes; -1 for
            a name that is only the base.
        layers: the layer of all tasks, or of each as int32 bytes.
        attempts: position and attempt of each task that is tried again.
        facts: what tasks may ask about the run, and the pickled surroundings: in the first batch of a run that a worker
            receives, and when they have changed.
    """

    id: int
    run: int
    template: int
    n_tasks: int
    tasks: int | bytes
    constants: Sequence[Wire]
    values: Sequence[Wire]
    references: bytes
    callables: Sequence[tuple[int, bytes]]
    templates: Sequence[Template]
    drop: Sequence[int | str]
    ordinals: int | bytes = -1
    layers: int | bytes = 0
    attempts: Sequence[tuple[int, int]] = ()
    facts: tuple[RunContext, bytes] | None = None


class Failure(NamedTuple):
    """A task's exception.

    Attributes:
        position: the task's position in its batch.
        pickled: the exception or its stand-in; None if neither can be pickled.
        type_name: the qualified name of its class.
        text: its message.
        traceback: the traceback as Python prints it, without the worker's own frames.
        is_unread: whether an argument could not be unpickled, so that the task was never called.
        original: if the exception is not an `Exception` and a `TaskExited` replaces it: the pickled exception, and its
            traceback.
    """

    position: int
    pickled: bytes | None
    type_name: str
    text: str
    traceback: str
    is_unread: bool = False
    original: tuple[bytes, str] | None = None


class Reply(NamedTuple):
    """Outcomes of consecutive tasks of a batch.

    Attributes:
        slot: the slot that replies.
        batch: the batch's id.
        first: position of the first outcome.
        values: one per task; None for a failed one.
        marks: ``len(values) + 1`` float64 numbers as bytes: when the first task began, then when each ended (seconds of
            `time.perf_counter`, which all processes of a machine share).
        failure: the exception of the last task; a failure ends its batch.
        ended: whether this is the batch's last reply; tasks without an outcome were not begun.
        cpu_seconds: CPU time of the worker process since its last sample, 0 if it took none.
        peak_rss: largest resident memory of the worker process so far, bytes, 0 if it took no sample.
        subflows: for each task that returned one, its index in ``values`` and the pickled workflow to run instead.
        worker: the number of the worker that ran the tasks, if it is not the slot's.
    """

    slot: int
    batch: int
    first: int
    values: list[Wire]
    marks: bytes
    failure: Failure | None
    ended: bool
    cpu_seconds: float
    peak_rss: int
    subflows: Sequence[tuple[int, Wire]] = ()
    worker: int | None = None

    @property
    def ran_by(self) -> int:
        """The number to record as the worker's."""
        return self.slot if self.worker is None else self.worker


class Hello(NamedTuple):
    """A worker's first message.

    Attributes:
        slot: the slot that it fills.
        pid: its process.
        refused: state of the caller that it could not take over, see `StartState.take_over`.
    """

    slot: int
    pid: int
    refused: tuple[str, ...] = ()


Message: TypeAlias = Batch | Reply | Hello
AnyMessage = TypeVar("AnyMessage", Batch, Reply, Hello)


class Channel(Protocol):
    """One end of a connection that keeps messages apart."""

    @property
    def send(self) -> Callable[[bytes], object]:
        """Send a message. Raises OSError if the other end is gone."""

    @property
    def receive(self) -> Callable[[], bytes]:
        """Wait for a message. Returns b"" or raises OSError if the other end is gone."""

    def receive_awake(self) -> bytes:
        """Receive; poll for `AWAKE_SECONDS` before sleeping, and yield the core to others meanwhile."""

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""

    def close(self) -> None:
        """Close the connection."""


class PacketChannel:
    """A connected packet socket; its methods are mostly the socket's, so that no Python code runs per message."""

    def __init__(self, connected: socket.socket) -> None:
        self.send = connected.send
        self.receive = functools.partial(connected.recv, _RECEIVE)
        self._receive_now = functools.partial(connected.recv, _RECEIVE, socket.MSG_DONTWAIT)
        self.fileno = connected.fileno
        self.close = connected.close

    def receive_awake(self) -> bytes:
        until = time.perf_counter() + AWAKE_SECONDS
        while time.perf_counter() < until:
            try:
                return self._receive_now()
            except BlockingIOError:
                os.sched_yield()
        return self.receive()


class StreamChannel:
    """A connected stream socket with the length before each message; it does not poll."""

    def __init__(self, connected: socket.socket) -> None:
        self._connection = Connection(connected.detach())
        self.send = self._connection.send_bytes
        self.fileno = self._connection.fileno
        self.close = self._connection.close

    def receive(self) -> bytes:
        try:
            return self._connection.recv_bytes()
        except EOFError:
            return b""

    receive_awake = receive


def listen(address: str, backlog: int) -> socket.socket:
    """Open the parent's listening socket, a file that the permissions of its folder protect."""
    listener = socket.socket(socket.AF_UNIX, _kind())
    try:
        with short_address(address) as path:
            listener.bind(path)
        listener.listen(backlog)
    except BaseException:
        listener.close()
        raise
    return listener


def accept(listener: socket.socket) -> Channel:
    """Accept the next worker's connection."""
    return _channel(listener.accept()[0])


def connect(address: str) -> Channel:
    """Connect a worker to its parent."""
    connected = socket.socket(socket.AF_UNIX, _kind())
    try:
        with short_address(address) as path:
            connected.connect(path)
    except OSError:
        connected.close()
        raise
    return _channel(connected)


def _kind() -> socket.SocketKind:
    return socket.SOCK_SEQPACKET if _HAS_PACKETS else socket.SOCK_STREAM


def _channel(connected: socket.socket) -> Channel:
    return PacketChannel(connected) if _HAS_PACKETS else StreamChannel(connected)


def pack(message: Message, arena: Arena) -> bytes:
    """Pickle a message; if it is long, write it to a segment and pickle the segment's name.

    Plain pickle is enough, as all values in it are encoded. It is pickled as a tuple, since an instance takes 1 us more
    at each end.
    """
    data = pickle.dumps(tuple(message), protocol=5)
    if len(data) <= MESSAGE_LIMIT:
        return data
    return _IN_SEGMENT + pickle.dumps(arena.write([data]), protocol=5)


def pack_whole(message: Message) -> bytes:
    """Pickle a message that needs no segment."""
    return pickle.dumps(tuple(message), protocol=5)


def shortened(reply: Reply) -> Iterator[Reply]:
    """Split a reply into several that need no segment, for an arena without room for a long message.

    Results are always complete. The text of an error is truncated if necessary.
    """
    n, failure = len(reply.values), reply.failure
    if len(pack_whole(reply)) <= _LONGEST:
        yield reply
    elif n > 1:
        k, marks = n // 2, memoryview(reply.marks).cast("d")
        yield from shortened(
            reply._replace(
                values=reply.values[:k],
                marks=marks[: k + 1].tobytes(),
                failure=None,
                ended=False,
                subflows=[pair for pair in reply.subflows if pair[0] < k],
            )
        )
        yield from shortened(
            reply._replace(
                first=reply.first + k,
                values=reply.values[k:],
                marks=marks[k:].tobytes(),
                cpu_seconds=0.0,
                subflows=[(place - k, wire) for place, wire in reply.subflows if place >= k],
            )
        )
    else:
        assert failure is not None, "a value inside a message is short enough for one"
        failure = failure._replace(text=failure.text[:_MOST_TEXT], traceback=failure.traceback[-_MOST_TEXT:])
        if len(pack_whole(reply._replace(failure=failure))) > _LONGEST:
            failure = failure._replace(pickled=None, original=None)
        yield reply._replace(failure=failure)


def unpack(data: bytes, kind: type[AnyMessage], arena: Arena) -> AnyMessage:
    """Unpickle a message of this kind, and free its segment if it has one."""
    if not data.startswith(_IN_SEGMENT):
        return kind._make(pickle.loads(data))
    segment = pickle.loads(memoryview(data)[1:])
    message = kind._make(pickle.loads(arena.read(segment)[0]))
    arena.free(segment)
    return message


def segment_of(data: bytes) -> Segment | None:
    """Return the segment that `pack` wrote a message to, None if it wrote none."""
    if not data.startswith(_IN_SEGMENT):
        return None
    segment: Segment = pickle.loads(memoryview(data)[1:])
    return segment
