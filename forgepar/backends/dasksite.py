"""What runs on the workers of a Dask cluster: batches, as tasks of Dask's, and what the caller hears of them.

    Dask task run_batch ──> Site.run ──> Worker.run ──Reply──> event of Dask's ──> DaskBackend.wait
                                            │ positions, what tasks say
                                            └──every 0.1 s──> event of Dask's ──> DaskBackend.wait
    DaskBackend.limit, kill, withdraw ──> obey ──> what came of it ──> event of Dask's ──> DaskBackend.wait

All that a site tells goes one way, in one order: what it answers to a limit never overtakes the reply of a batch that
ended before it heard of the limit.

Site     one caller's part of one Dask worker
_Bench   runs one batch at a time; a Dask worker of several threads has several

Only what a batch says of itself is trusted: each brings all that it needs, so that Dask may run it again, anywhere.
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

from forgepar import contexts
from forgepar.backends.board import CALLED_OFF, LIMIT, POSITION, STARTED, Board
from forgepar.backends.daskoutput import Echo, Lines, SpeakersCapture, output
from forgepar.backends.daskparts import Parts, SiteArena
from forgepar.backends.output import STREAMS
from forgepar.backends.wire import Batch
from forgepar.backends.worker import Worker
from forgepar.errors import RemoteError
from forgepar.forking import fork_safe
from forgepar.values.codec import is_segment
from forgepar.version import __version__

BEAT_SECONDS = 0.1  # between two looks at what runs
_PIECE = 64 * 1024  # bytes of one event: the scheduler keeps the last 1000 of a topic for a while
_MOST_SITES = 16  # callers whose unpickled functions a worker keeps
_MOST_WITH_ORDERS = 256  # of those that it was told not to begin something; a caller that died never says that it left


class Order(NamedTuple):
    """What a batch's task is told beside the batch, as it travels.

    Attributes:
        token: names the caller.
        slot: the caller's number of the slot that it is for.
        batch: the batch's number.
        series: of such numbers; another one counts anew.
        key: the task's own key.
        once: the worker that alone may run it, its address and process; None: it may be run again elsewhere, where a
            value that it made is lost.
        era: the caller calls off whole eras.
        run: how the run stood, see `contexts.RunProgress`.
    """

    token: str
    slot: int
    batch: int
    series: int
    key: str
    once: tuple[str, int] | None
    era: int
    run: tuple[int, int, int, int]


# What a site tells, pickled, by its kind:
#   "reply"      a reply, and what was said until then
#   "beat"       where batches are, and what they said
#   "limited"    slot, number of the limit, the farthest mark of the slot's batches that run
#   "broken"     batch, which has no reply
#   "ended"      batch, its mark and when that began; a mark of 0 where it does not run, and never will
#   "withdrawn"  batch, whether it never will
Position: TypeAlias = tuple[int, int, float]  # batch, mark, when that began by this process's clock


def topic_of(token: str) -> str:
    """Return the name of the events that sites tell a caller by."""
    return f"forgepar-{token}"


def run_batch(order: Order, payload: bytes, sources: Sequence[str], *parts: Parts) -> Parts:
    """Run a batch; a task of Dask's.

    Args:
        order: what it is told.
        payload: the batch, pickled.
        sources: names of the values that it takes, see `SiteArena.begin`.
        parts: these values.

    Returns:
        The large values that it made.
    """
    from distributed import get_worker

    with _site(get_worker(), order.token) as site:
        return site.run(order, payload, dict(zip(sources, parts, strict=True)))


def probe() -> tuple[str, str, int, float]:
    """Return what a caller asks of a worker first: versions of this package and of Python, its pid, its clock."""
    return __version__, platform.python_version(), os.getpid(), time.perf_counter()


def obey(token: str, orders: Sequence[tuple[Any, ...]], dask_worker: Any = None) -> list[Any]:
    """Do what a caller wants of its site: (name of a method of `Site`, arguments ...), one after the other.

    Returns:
        What the methods do. Nothing that the caller decides by: an answer may overtake what the site told before.
    """
    with _site(dask_worker, token) as site:
        done = [getattr(site, name)(*arguments) for name, *arguments in orders]
    if ("close",) in orders:
        with _sites_lock:
            _sites.pop((dask_worker.address, token), None)
    return done


def forget_topic(token: str, dask_scheduler: Any = None) -> None:
    """Have the scheduler forget a caller's events."""
    with suppress(AttributeError):  # it is no more than polite, and by a name that Dask may change
        dask_scheduler._broker.truncate(topic_of(token))


_sites: dict[tuple[str, str], Site] = {}
_sites_lock = fork_safe(threading.RLock())


@contextmanager
def _site(worker: Any, token: str) -> Iterator[Site]:
    """Have the one site that a caller has on a worker; it is not forgotten while it is in use.

    Two of them would not know of each other's batches: what runs on one does not run for the other.
    """
    with _sites_lock:
        key = (worker.address, token)
        site = _sites.pop(key, None) or Site(worker, token)
        _sites[key] = site  # the last one asked for is the last one to go
        site.n_users += 1
        idle = [other for other, found in _sites.items() if not found.n_users]
        idle.sort(key=lambda other: _sites[other].has_orders)
        for other in idle[: max(0, len(_sites) - _MOST_SITES)]:
            if not _sites[other].has_orders or len(_sites) > _MOST_WITH_ORDERS:
                del _sites[other]
    try:
        yield site
    finally:
        with _sites_lock:
            site.n_users -= 1


class Site:
    """One caller's part of one Dask worker.

    Args:
        worker: the `distributed.Worker`.
        token: names the caller.

    Attributes:
        n_users: how many threads run a batch or obey an order on it.
    """

    def __init__(self, worker: Any, token: str) -> None:
        self.n_users = 0
        self._worker = worker
        self._topic = topic_of(token)
        self._lock = threading.Lock()
        self._idle: list[_Bench] = []
        self._running: dict[int, _Bench] = {}
        self._telling = threading.Lock()
        self._limits: dict[int, tuple[int, int, int]] = {}
        self._barred: set[int] = set()
        self._off_era = -1
        self._n_pieces = 0
        self._is_beating = False

    @property
    def has_orders(self) -> bool:
        """Whether a batch may come that is not to begin."""
        return bool(self._barred or self._limits)

    def run(self, order: Order, payload: bytes, inputs: Mapping[str, Parts]) -> Parts:
        """Run a batch, and tell the caller how it went."""
        if order.once not in (None, (self._worker.address, os.getpid())):
            raise RemoteError("a task with effects is not run again, though its worker, and so its value, was lost")
        bench = self._begin(order)
        try:
            if order.batch in self._barred:
                return Parts({})
            bench.arena.begin(order.batch, inputs)
            with contexts.here(bench.context):
                (reply,) = bench.worker.run(bench.unpacked(payload))
            made = bench.arena.finish()
            if len(made):
                self._loosen(order.key)
            self._tell("reply", (tuple(reply), bench.voice.take()))
            return made
        except BaseException:
            self._tell("broken", (order.batch,))  # Dask tells why
            raise
        finally:
            self._end(order, bench)

    def _begin(self, order: Order) -> _Bench:
        with self._lock:
            bench = self._idle.pop() if self._idle else _Bench(self._worker.local_directory)
            bench.begin(order, is_off=order.era <= self._off_era)
            series, mark, last = self._limits.get(order.slot, (-1, 0, -1))
            if order.series == series and order.batch <= last:
                bench.words[LIMIT] = mark
            else:
                self._limits.pop(order.slot, None)  # none of those that it was for can come any more
            self._running[order.batch] = bench
            begins_to_beat = not self._is_beating
            self._is_beating = True
        output.begin(bench)
        if begins_to_beat:
            self._worker.loop.add_callback(self._beat)
        return bench

    def _end(self, order: Order, bench: _Bench) -> None:
        output.end(bench)
        with self._lock:
            del self._running[order.batch]
            self._barred.discard(order.batch)
            self._idle.append(bench)

    def _loosen(self, key: str) -> None:
        """Let Dask run this task elsewhere should its result be lost, before anybody relies on that.

        Until then it may not: a batch that ends its worker would end the next one, too.
        """
        from distributed.utils import sync

        with suppress(KeyError):  # nobody wants it any more
            sync(self._worker.loop, self._worker.scheduler.set_restrictions, worker={key: []})

    # What the caller hears

    async def _beat(self) -> None:
        """Tell where batches are, and what they said, as long as any runs and something is new."""
        told: list[Position] = []
        while True:
            await asyncio.sleep(BEAT_SECONDS)
            with self._lock:
                if not self._running:
                    self._is_beating = False
                    return
                benches = dict(self._running)
            positions: list[Position] = [(batch, *bench.look()) for batch, bench in benches.items()]
            said = [(batch, taken) for batch, bench in benches.items() if (taken := bench.voice.take())]
            if said or positions != told:
                self._tell("beat", (positions, said))
                told = positions

    def _tell(self, kind: str, content: tuple[Any, ...]) -> None:
        """Send the caller an event, or several if it is long; Dask keeps their order.

        From whatever thread, they take the same way: what Dask's own thread sends at once would overtake what others
        have lined up.
        """
        data = pickle.dumps(content, protocol=5)
        pieces = [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
        with self._telling:
            self._n_pieces += 1
            for left, piece in zip(range(len(pieces) - 1, -1, -1), pieces, strict=True):
                now = time.perf_counter()
                event = {"kind": kind, "number": self._n_pieces, "left": left, "data": piece, "now": now}
                self._worker.loop.add_callback(self._worker.log_event, self._topic, event)

    # What the caller wants

    def limit(self, slot: int, number: int, series: int, mark: int, last: int) -> None:
        """Forbid a slot to begin the task of this mark and what comes behind it, in batches up to ``last``.

        Its batches that run know when the caller hears where they are; of those that ended before, it has heard then.
        """
        with self._lock:
            self._limits[slot] = (series, mark, last)
            mine = [bench for batch, bench in self._running.items() if bench.worker.slot == slot and batch <= last]
            for bench in mine:
                bench.words[LIMIT] = mark
            farthest = max((bench.look()[0] for bench in mine), default=0)
            self._tell("limited", (slot, number, farthest))

    def call_off(self, era: int) -> None:
        """Let tasks of eras up to this one know, if they ask, that their run was called off."""
        with self._lock:
            self._off_era = max(self._off_era, era)
            for bench in self._running.values():
                bench.words[CALLED_OFF] = bench.era <= self._off_era

    def end(self, batch: int) -> None:
        """Have a batch that runs end after its task, and one that does not run never begin."""
        with self._lock:
            bench = self._running.get(batch)
            if bench is None:
                self._barred.add(batch)
                self._tell("ended", (batch, 0, 0.0))
                return
            bench.words[CALLED_OFF] = 1
            bench.words[LIMIT] = 0
            self._tell("ended", (batch, *bench.look()))

    def withdraw(self, batch: int) -> None:
        """Have a batch that does not run never begin; one that does goes on."""
        with self._lock:
            runs = batch in self._running
            if not runs:
                self._barred.add(batch)
            self._tell("withdrawn", (batch, not runs))

    def stack(self, batch: int) -> str:
        """Return where a batch's thread is, innermost call first."""
        with self._lock:
            bench = self._running.get(batch)
        frame = sys._current_frames().get(bench.thread) if bench is not None else None
        if frame is None:
            return ""
        return "\n".join(
            f'  File "{where.filename}", line {where.lineno} in {where.name}'
            for where in own_frames(traceback.extract_stack(frame))
        )

    def close(self) -> None:
        """Have all end after the task they are at: the caller is gone."""
        with self._lock:
            for bench in self._running.values():
                bench.words[CALLED_OFF] = 1
                bench.words[LIMIT] = 0


def own_frames(stack: Sequence[traceback.FrameSummary]) -> Sequence[traceback.FrameSummary]:
    """Return the frames of a task, innermost first: those that are not of this package's and Dask's machinery."""
    from forgepar.backends import worker

    below = max((at for at, frame in enumerate(stack) if frame.filename == worker.__file__), default=-1)
    return stack[below + 1 :][::-1]


class _Bench:
    """Runs batches, one at a time, in whatever thread calls.

    Attributes:
        worker: what runs them.
        arena: what it has for large values.
        voice: what tasks say.
        words: its row of a board that nobody else has.
        thread: which thread runs the batch.
        era: of the batch.
    """

    def __init__(self, folder: str) -> None:
        board = Board.alone(1)
        self._board = board
        self.words, self._times = board.integers(0), board.floats(0)
        self.arena = SiteArena(folder)
        # One reply a batch, at its end: Dask has the values of a batch that ended, and of no other.
        self.worker = Worker(0, self.arena, board, reply_seconds=float("inf"))
        self.voice = Echo(self.worker.task_number)
        self.lines: Mapping[int, Lines] = {kind: Lines(self.voice, kind) for kind in STREAMS}
        self.worker.voice = self.voice
        self.worker.capture = SpeakersCapture(self)
        self.context = self.worker.context
        self.thread = 0
        self.era = 0

    def begin(self, order: Order, *, is_off: bool) -> None:
        self._board.reset(0)
        self.worker.slot = order.slot
        self.words[CALLED_OFF] = is_off
        self.stand(order.run)
        self.era = order.era
        self.thread = threading.get_ident()

    def stand(self, row: Sequence[int]) -> None:
        run = self._board.run
        for at, number in enumerate(row):
            run[at] = number

    def unpacked(self, payload: bytes) -> Batch:
        """Return a batch with what its worker lacks of it, large callables fetched from where they are."""
        batch = self.worker.lacking(Batch._make(pickle.loads(payload)))
        pairs: list[tuple[int, Any]] = list(batch.callables)
        fetched = [(number, bytes(self.arena.read(held)[0]) if is_segment(held) else held) for number, held in pairs]
        return batch._replace(callables=fetched)

    def look(self) -> tuple[int, float]:
        """Return the mark of the task it is at, and when that began."""
        return self.words[POSITION], self._times[STARTED]
