"""What runs on the workers of a Dask cluster: batches, as Dask tasks, and commands of the caller.

    Dask task run_batch ──> WorkerSite.run ──> HostedWorker.run ──Reply──> Dask event ──> DaskBackend.wait
                                                 │ positions, output
                                                 └──every 0.1 s──────────> Dask event ──> DaskBackend.wait
    DaskBackend.limit, kill, withdraw ──> run_commands ──its outcome─────> Dask event ──> DaskBackend.wait

A site sends all its messages the same way, in order. So the answer to a limit never arrives before the reply of a batch
that ended before the limit.

WorkerSite   one caller's part of one Dask worker
SiteWorker   runs one batch at a time; a Dask worker of several threads has several

Each batch brings all that it needs, so that Dask may run it again, on any worker.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import platform
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple, TypeAlias

from forgepar.backends.dask.values import TaskArena, ValueParts
from forgepar.backends.hosted_worker import HostedWorker
from forgepar.backends.messages import Batch
from forgepar.backends.worker_board import CALLED_OFF, LIMIT, POSITION, STARTED, Board
from forgepar.errors import RemoteError
from forgepar.system.forking import fork_safe
from forgepar.version import __version__

BEAT_SECONDS = 0.1  # between two messages about batches that run
_PIECE = 64 * 1024  # bytes of one event: the scheduler keeps the last 1000 of a topic for a while
_MOST_SITES = 16  # callers for which a worker keeps unpickled functions
# Sites that know of batches that must not begin. A caller that crashed never closes its sites.
_MOST_WITH_COMMANDS = 256


class BatchTicket(NamedTuple):
    """What the Dask task of a batch receives besides the batch.

    Attributes:
        token: identifies the caller.
        slot: the caller's number of the slot that the batch is for.
        batch: the batch's number.
        series: which executor of the caller numbers the batches; each counts from the start.
        key: key of the Dask task.
        once: address and process of the only worker that may run the batch; None: Dask may run it again on another
            worker, if a value that it made is lost.
        era: number of the period; the caller cancels all batches up to a period.
        run: the progress of the run, see `contexts.RunProgress`.
    """

    token: str
    slot: int
    batch: int
    series: int
    key: str
    once: tuple[str, int] | None
    era: int
    run: tuple[int, int, int, int]


# Messages of a site, by kind; the content is pickled:
#   "reply"      fields of the reply; output since the last message
#   "beat"       positions of the batches that run; their output
#   "limited"    slot; number of the limit; highest mark of the slot's batches that run
#   "broken"     batch, which has no reply
#   "ended"      batch; its mark; when that task began. The mark is 0 if the batch does not run, and never will.
#   "withdrawn"  batch; whether it never will run
BatchPosition: TypeAlias = tuple[int, int, float]  # batch; mark; when that task began, by this process's clock


def topic_of(token: str) -> str:
    """Return the topic of the events that sites send to a caller."""
    return f"forgepar-{token}"


def run_batch(ticket: BatchTicket, payload: bytes, sources: Sequence[str], *parts: ValueParts) -> ValueParts:
    """Run a batch; a Dask task.

    Args:
        ticket: what the batch is for.
        payload: the batch, pickled.
        sources: names of its large inputs, see `TaskArena.begin`.
        parts: these inputs.

    Returns:
        The large values that it made.
    """
    from distributed import get_worker

    with _site(get_worker(), ticket.token) as site:
        return site.run(ticket, payload, dict(zip(sources, parts, strict=True)))


def probe() -> tuple[str, str, int, float]:
    """Return the versions of this package and of Python, the pid and the time of this worker."""
    return __version__, platform.python_version(), os.getpid(), time.perf_counter()


def run_commands(token: str, commands: Sequence[tuple[Any, ...]], dask_worker: Any = None) -> list[Any]:
    """Run commands of a caller on its site, in order: (name of a method of `WorkerSite`, arguments ...).

    Returns:
        What the methods return. The caller bases no decision on it, as it may arrive before earlier messages of the
        site.
    """
    with _site(dask_worker, token) as site:
        returned = [getattr(site, name)(*arguments) for name, *arguments in commands]
    if ("close",) in commands:
        with _sites_lock:
            _sites.pop((dask_worker.address, token), None)
    return returned


def forget_topic(token: str, dask_scheduler: Any = None) -> None:
    """Delete a caller's events from the scheduler."""
    with suppress(AttributeError):  # a private name of Dask; without it the events use memory for a while
        dask_scheduler._broker.truncate(topic_of(token))


_sites: dict[tuple[str, str], WorkerSite] = {}
_sites_lock = fork_safe(threading.RLock())


@contextmanager
def _site(worker: Any, token: str) -> Iterator[WorkerSite]:
    """Yield the one site that a caller has on a worker, and keep it while it is used.

    Two sites of a caller would be wrong: each would take the batches of the other for batches that do not run.
    """
    with _sites_lock:
        key = (worker.address, token)
        site = _sites.pop(key, None) or WorkerSite(worker, token)
        _sites[key] = site  # the most recently used one is deleted last
        site.n_users += 1
        idle = [other for other, found in _sites.items() if not found.n_users]
        idle.sort(key=lambda other: _sites[other].has_commands)
        for other in idle[: max(0, len(_sites) - _MOST_SITES)]:
            if not _sites[other].has_commands or len(_sites) > _MOST_WITH_COMMANDS:
                del _sites[other]
    try:
        yield site
    finally:
        with _sites_lock:
            site.n_users -= 1


class WorkerSite:
    """One caller's part of one Dask worker.

    Args:
        worker: the `distributed.Worker`.
        token: identifies the caller.

    Attributes:
        n_users: how many threads run a batch or a command on it.
    """

    def __init__(self, worker: Any, token: str) -> None:
        self.n_users = 0
        self._worker = worker
        self._topic = topic_of(token)
        self._lock = threading.Lock()
        self._idle: list[SiteWorker] = []
        self._running: dict[int, SiteWorker] = {}  # by batch
        self._sending = threading.Lock()
        self._limits: dict[int, tuple[int, int, int]] = {}  # by slot: series, mark, last batch
        self._barred: set[int] = set()  # batches that must not begin
        self._last_era_off = -1
        self._n_messages = 0
        self._is_beating = False

    @property
    def has_commands(self) -> bool:
        """Whether batches are known that must not begin."""
        return bool(self._barred or self._limits)

    def run(self, ticket: BatchTicket, payload: bytes, inputs: Mapping[str, ValueParts]) -> ValueParts:
        """Run a batch, and send its reply to the caller."""
        if ticket.once not in (None, (self._worker.address, os.getpid())):
            raise RemoteError(
                "A task with effects is not run again, although its worker, and with it its value, was lost."
            )
        worker = self._begin(ticket)
        try:
            if ticket.batch in self._barred:
                return ValueParts({})
            worker.inputs.begin(ticket.batch, inputs)
            (reply,) = worker.run(Batch._make(pickle.loads(payload)))
            made = worker.inputs.finish()
            if len(made):
                self._allow_rerun(ticket.key)
            self._send("reply", (tuple(reply), worker.output.records.take()))
            return made
        except BaseException:
            self._send("broken", (ticket.batch,))  # Dask reports the exception
            raise
        finally:
            self._end(ticket, worker)

    def _begin(self, ticket: BatchTicket) -> SiteWorker:
        with self._lock:
            worker = self._idle.pop() if self._idle else SiteWorker(self._worker.local_directory)
            worker.begin(ticket, is_off=ticket.era <= self._last_era_off)
            series, mark, last = self._limits.get(ticket.slot, (-1, 0, -1))
            if ticket.series == series and ticket.batch <= last:
                worker.words[LIMIT] = mark
            else:
                self._limits.pop(ticket.slot, None)  # batches that it applies to cannot arrive any more
            self._running[ticket.batch] = worker
            starts_beat = not self._is_beating
            self._is_beating = True
        if starts_beat:
            self._worker.loop.add_callback(self._beat)
        return worker

    def _end(self, ticket: BatchTicket, worker: SiteWorker) -> None:
        with self._lock:
            del self._running[ticket.batch]
            self._barred.discard(ticket.batch)
            self._idle.append(worker)

    def _allow_rerun(self, key: str) -> None:
        """Let Dask run this task on another worker if its result is lost, before anything depends on the result.

        Until now Dask must not: a batch that crashes its worker would crash the next one, too.
        """
        from distributed.utils import sync

        with suppress(KeyError):  # the caller has released the task
            sync(self._worker.loop, self._worker.scheduler.set_restrictions, worker={key: []})

    # Messages to the caller

    async def _beat(self) -> None:
        """Send positions and output while batches run, whenever they have changed."""
        last: list[BatchPosition] = []
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with self._lock:
                if not self._running:
                    self._is_beating = False
                    return
                running = dict(self._running)
            positions: list[BatchPosition] = [(batch, *worker.position()) for batch, worker in running.items()]
            output = [(batch, taken) for batch, worker in running.items() if (taken := worker.output.records.take())]
            if output or positions != last:
                self._send("beat", (positions, output))
                last = positions

    def _send(self, kind: str, content: tuple[Any, ...]) -> None:
        """Send a message as one event, or as several if it is long; Dask keeps their order.

        All threads send by way of the event loop. What Dask's own thread sent directly would overtake messages that
        others have queued.
        """
        data = pickle.dumps(content, protocol=5)
        pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
        with self._sending:
            self._n_messages += 1
            for n_more, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
                now = time.perf_counter()
                event = {"kind": kind, "number": self._n_messages, "n_more": n_more, "data": piece, "now": now}
                self._worker.loop.add_callback(self._worker.log_event, self._topic, event)

    # Commands of the caller

    def limit(self, slot: int, number: int, series: int, mark: int, last: int) -> None:
        """Forbid a slot to begin the task of this mark and all later ones, in batches up to ``last``.

        Its batches that run have the limit before the caller receives their positions. Of batches that ended before,
        the caller has the replies by then.
        """
        with self._lock:
            self._limits[slot] = (series, mark, last)
            running = self._running.items()
            limited = [worker for batch, worker in running if worker.worker.slot == slot and batch <= last]
            for worker in limited:
                worker.words[LIMIT] = mark
            highest = max((worker.position()[0] for worker in limited), default=0)
            self._send("limited", (slot, number, highest))

    def call_off(self, era: int) -> None:
        """Set the cancelled flag of all tasks of periods up to ``era``."""
        with self._lock:
            self._last_era_off = max(self._last_era_off, era)
            for worker in self._running.values():
                worker.words[CALLED_OFF] = worker.era <= self._last_era_off

    def end(self, batch: int) -> None:
        """End a batch after the task that runs; one that does not run never begins."""
        with self._lock:
            worker = self._running.get(batch)
            if worker is None:
                self._barred.add(batch)
                self._send("ended", (batch, 0, 0.0))
                return
            worker.call_off()
            self._send("ended", (batch, *worker.position()))

    def withdraw(self, batch: int) -> None:
        """Bar a batch that does not run from beginning; one that runs continues."""
        with self._lock:
            runs = batch in self._running
            if not runs:
                self._barred.add(batch)
            self._send("withdrawn", (batch, not runs))

    def stack(self, batch: int) -> str:
        """Return the stack of the thread that runs a batch, innermost call first."""
        with self._lock:
            worker = self._running.get(batch)
        frame = sys._current_frames().get(worker.output.thread) if worker is not None else None
        if frame is None:
            return ""
        return "\n".join(
            f'  File "{entry.filename}", line {entry.lineno} in {entry.name}'
            for entry in own_frames(traceback.extract_stack(frame))
        )

    def close(self) -> None:
        """End all batches after the tasks that run: the caller has closed its backend."""
        with self._lock:
            for worker in self._running.values():
                worker.call_off()


def own_frames(stack: Sequence[traceback.FrameSummary]) -> Sequence[traceback.FrameSummary]:
    """Return the frames of a task, innermost first, without those of this package and of Dask around it."""
    from forgepar.backends import worker

    below = max((at for at, frame in enumerate(stack) if frame.filename in worker.OWN_FILES), default=-1)
    return stack[below + 1 :][::-1]


class SiteWorker(HostedWorker):
    """A hosted worker with a board of one row that no other process sees.

    Args:
        folder: where tasks get scratch folders.

    Attributes:
        inputs: the arena, with the large values of the batch that runs.
        words: its row of the board.
        era: of the batch that runs.
    """

    def __init__(self, folder: str) -> None:
        self._board = Board.alone(1)
        self.words, self._times = self._board.integers(0), self._board.floats(0)
        self.inputs = TaskArena(folder)
        # One reply per batch, at its end: Dask has values only of tasks that ended.
        super().__init__(0, self.inputs, self._board, "as_host", reply_seconds=float("inf"))
        self.era = 0

    def begin(self, ticket: BatchTicket, *, is_off: bool) -> None:
        """Prepare for a batch, which this thread runs next."""
        self._board.reset(0)
        self.worker.slot = ticket.slot
        self.words[CALLED_OFF] = is_off
        run = self._board.run
        for at, number in enumerate(ticket.run):
            run[at] = number
        self.era = ticket.era
        self.output.thread = threading.get_ident()

    def position(self) -> tuple[int, float]:
        """Return the mark of the task that runs, and when it began."""
        return self.words[POSITION], self._times[STARTED]

    def call_off(self) -> None:
        """Set the cancelled flag of the task that runs, and let no other begin."""
        self.words[CALLED_OFF] = 1
        self.words[LIMIT] = 0
