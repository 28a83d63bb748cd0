"""The messages between the parent and a worker, and how they are packed.

    parent --- Batch ---> worker          tasks of one template
    parent <-- Hello ---- worker          once, on connecting
    parent <-- Reply ---- worker          every 10 ms of work, and at the end of a batch; tasks with effects each

No message is longer than MESSAGE_LIMIT: a longer one goes through a segment and the message names it; a reply for which
the arena has no room is sent in parts. The socket buffer
(208 KiB on Linux) then holds the two batches a worker may have waiting, so the parent never blocks in a send, and a
worker that does is read from in the end: neither can wait for the other.
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
from forgepar.contexts import RunFacts
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire
from forgepar.values.segment import Segment

MESSAGE_LIMIT = 32 * 1024  # bytes
# To be woken costs both ends together 0.1 ms on a core that went idle. Where layers are short the next batch comes
# within this time; where they are long it is lost, once a batch.
AWAKE_SECONDS = 0.00015
# A packet socket keeps messages apart by itself, so that one system call each way moves one; only Linux has it for
# sockets of the file system. Elsewhere a stream with lengths before the messages does, in two calls to read one.
_HAS_PACKETS = sys.platform == "linux"
_LONGEST = MESSAGE_LIMIT + 4096  # of a reply where the arena has no room: one value that travels inside, and the rest
_RECEIVE = _LONGEST + 1  # bytes asked for, so that a message too long would show
_MOST_TEXT = 2000  # characters of an error whose whole text finds no room
_IN_SEGMENT = b"@"  # never the first byte of a pickle


class Template(NamedTuple):
    """What tasks declared alike share, as a worker needs it.

    Attributes:
        number: its number in the plan.
        callable: the callable's number in the plan.
        layout: fields of the `Layout`.
        shared: constants that every task of the template gets by keyword.
        base: what the tasks' names begin with.
        timeout: seconds that an attempt may take; None: any number.
        owns: whether the tasks' arguments are private copies throughout, instead of views of memory that others read.
        parts: numbers of the parts of the caller's modules that its tasks need; None: all that were sent.
        has_effects: whether its tasks change something outside of the run, so that each is reported as it ends.
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
        id: grows for the life of a slot.
        run: number of the run; a new one makes the worker forget the callables of the last.
        template: number of the template.
        n_tasks: how many tasks.
        tasks: the first task's number if they are consecutive, else all numbers as int32 bytes.
        constants: ``n_tasks`` times the template's constants, task by task.
        values: values of other tasks. A blob is ``(pickle, task)``, to be kept under that task's number, or
            ``(task,)``, kept from before.
        references: int32 positions in ``values``, task by task; empty where ``values`` is in that order already.
        callables: callables that this worker does not have yet, pickled, with their numbers.
        templates: templates that it does not have yet.
        drop: what it may forget once it has taken in ``values``: tasks, whose small values it keeps, and names of
            segments, which it has mapped. A batch of no tasks brings nothing else, and gets no reply.
        ordinals: what the tasks' names end in: the first one's if they are consecutive, else all as int32 bytes; -1
            is a name that is the base alone.
        layers: the layer of all, or of each as int32 bytes.
        attempts: position and attempt of each task that is tried again.
        facts: what tasks may ask about the run, and the surroundings that they are to find, packed: in the first batch
            that a worker gets of a run, and where they have changed.
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
    facts: tuple[RunFacts, bytes] | None = None


class Failure(NamedTuple):
    """A task's exception.

    Attributes:
        position: the task's position in its batch.
        pickled: the exception, or what stands for it; None if its code prevented even that.
        type_name: its class's qualified name.
        text: what it says.
        traceback: as Python prints it, the worker's own frames left out.
        is_unread: whether it was an argument that could not be unpickled, so that the task was never called.
        original: where the exception is no `Exception`, so that a `TaskExited` is in its place, itself pickled, and its
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
        slot: who replies.
        batch: the batch's id.
        first: position of the first outcome.
        values: one a task; None for a failed one.
        marks: float64 bytes, ``len(values) + 1`` of them: when the first task began, then when each ended
            (`time.perf_counter` seconds, which all processes of a machine share).
        failure: the last of the tasks failed so; a failure ends its batch.
        ended: nothing more comes of this batch; what has no outcome was not begun.
        cpu_seconds: CPU time of the worker process since it last told, 0 where it did not look.
        peak_rss: largest resident memory of the worker process so far, bytes, 0 where it did not look.
        subflows: for each task that returned one, its place in ``values`` and the pickled workflow to run in its place.
        worker: the number of whoever ran them, where that is not the slot's.
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
        """The number to have on record as the worker."""
        return self.slot if self.worker is None else self.worker


class Hello(NamedTuple):
    """A worker's first message.

    Attributes:
        slot: which one it fills.
        pid: its process.
        refused: what it could not take over from its caller, see `StartState.take_over`.
    """

    slot: int
    pid: int
    refused: tuple[str, ...] = ()


Message: TypeAlias = Batch | Reply | Hello
AnyMessage = TypeVar("AnyMessage", Batch, Reply, Hello)


class Channel(Protocol):
    """One end of a connection; a message comes out as it went in."""

    @property
    def send(self) -> Callable[[bytes], object]:
        """Send a message. Raises OSError where the other end is gone."""

    @property
    def receive(self) -> Callable[[], bytes]:
        """Wait for a message; it is empty, or there is an OSError, where the other end is gone."""

    def receive_awake(self) -> bytes:
        """Receive, and before going to sleep for it look out for `AWAKE_SECONDS`, letting others have the core."""

    def fileno(self) -> int:
        """Return the descriptor, for a selector."""

    def close(self) -> None:
        """Hang up."""


class PacketChannel:
    """A connected packet socket; mostly its own methods, so that no Python runs per message."""

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
    """A connected stream socket, with lengths before the messages; it stays awake for nothing."""

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
    """Open the parent's socket, as a file that others' permissions on its folder guard."""
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
    """Take the next worker that connects."""
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
    """Pickle a message, or put it in a segment and name that.

    Its parts are encoded, so plain pickle does; and as a tuple, as an instance takes 1 us more at each end.
    """
    data = pickle.dumps(tuple(message), protocol=5)
    if len(data) <= MESSAGE_LIMIT:
        return data
    return _IN_SEGMENT + pickle.dumps(arena.write([data]), protocol=5)


def pack_whole(message: Message) -> bytes:
    """Pickle a message that is short enough to need no segment."""
    return pickle.dumps(tuple(message), protocol=5)


def shortened(reply: Reply) -> Iterator[Reply]:
    """Yield a reply as several that need no segment, for when the arena has no room for a long message.

    What a task returned is worth more than how its error looks: of that, the text is cut.
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
        assert failure is not None, "a value that travels inside a message is short enough for one"
        failure = failure._replace(text=failure.text[:_MOST_TEXT], traceback=failure.traceback[-_MOST_TEXT:])
        if len(pack_whole(reply._replace(failure=failure))) > _LONGEST:
            failure = failure._replace(pickled=None, original=None)
        yield reply._replace(failure=failure)


def unpack(data: bytes, kind: type[AnyMessage], arena: Arena) -> AnyMessage:
    """Turn back what `pack` made of a message of this kind, and free its segment if it had one."""
    if not data.startswith(_IN_SEGMENT):
        return kind._make(pickle.loads(data))
    segment = pickle.loads(memoryview(data)[1:])
    message = kind._make(pickle.loads(arena.read(segment)[0]))
    arena.free(segment)
    return message


def segment_of(data: bytes) -> Segment | None:
    """Return the segment that `pack` put a message in, None if it is in the data itself."""
    if not data.startswith(_IN_SEGMENT):
        return None
    segment: Segment = pickle.loads(memoryview(data)[1:])
    return segment
