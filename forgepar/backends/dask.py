"""A Dask cluster as the workers: batches are tasks of Dask's, and large values stay with it as futures.

    DaskBackend.send ──> client.submit(run_batch) ──> scheduler ──> worker: dasksite.Site
    DaskBackend.wait <── Cluster.next <── events <── scheduler <──────────┘  replies, positions, output

Dask does what it is good at: it moves values between workers, frees them, computes lost ones again, authenticates and
encrypts. Order, retries and records are the dispatcher's, as with every backend. A slot is a thread of a Dask worker; a
worker that comes later takes the place of one that went.

What Dask cannot do is end a thread. See ``on_kill``.
"""

from __future__ import annotations

import pickle
import queue
import time
import warnings
from array import array
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal

from forgepar.backends import dasksite
from forgepar.backends.base import UNKNOWN_POSITION, Joined, Lost, Notice, Told, Traits
from forgepar.backends.board import NO_LIMIT, mark
from forgepar.backends.daskcluster import (
    Came,
    Cluster,
    Failed,
    Freed,
    Heard,
    Left,
    News,
    Refused,
    Woken,
    Worker,
    connected,
    n_threads,
)
from forgepar.backends.daskparts import ClusterArena
from forgepar.backends.daskslots import Ending, Sent, Slot
from forgepar.backends.output import Said
from forgepar.backends.wire import Batch, Reply
from forgepar.errors import WorkerStartFailed
from forgepar.validation import MOST_WORKERS, check_choice, check_count, is_number, refusal
from forgepar.values.arena import Arena
from forgepar.values.codec import Wire, is_segment
from forgepar.values.segment import Segment

_LARGE_CALLABLE = 16 * 1024  # bytes; one pickled to more goes to each worker once, not with each batch
_LAST = 0xFFFFFFFF  # a position behind all of a batch
_END_SECONDS = 10.0  # to say where it is, for a worker that a task is to be ended on; C code may hold it up
MEET_SECONDS = 10.0  # for the workers that are there when a backend is opened


class DaskBackend:
    """Runs workflows on a Dask cluster: ``wf.run(backend=DaskBackend("tcp://host:8786"))``.

    The caller's process sees outputs, numbers and short text; other values go from worker to worker. Workers and
    scheduler need this package, in the same version, and workers the modules that tasks come from (what is defined in a
    script travels). A worker that goes amid a run costs time: what it ran is run again, up to three times for each
    task, and what it held Dask computes again. Encryption and authentication are Dask's own: give a client made with
    its ``Security``. How long a killed worker holds up those that were fetching from it is Dask's
    ``distributed.comm.timeouts.connect``, 30 s by default. Tasks hear of a run's progress as it was when their batch
    was sent.

    Args:
        client: a `distributed.Client`, which stays open; or an address, for which one is made and closed.
        n_slots: how many tasks to run at once; None: as many as the cluster has threads at that moment. More slots than
            there are threads are filled as workers come.
        on_kill: what becomes of a task that is to be ended, for its timeout or as its run is over. Dask cannot end a
            thread, so "forget" lets it go on unheard, and gives its slot no work until it returns
            (`TaskContext.cancelled` is true for it). "restart" has the nanny of its worker end the process, with all
            that it runs, for others too.
        patience: seconds to wait for a worker while there is none.

    Raises:
        ImportError: `distributed` is missing.
        WorkerStartFailed: no scheduler answers, there is no worker, or workers lack this package (at the first run).

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> doubled = wf.map(divmod, [7, 9], [2, 2])
        >>> wf.run(backend=DaskBackend("tcp://host:8786"))[doubled]  # doctest: +SKIP
        [(3, 1), (4, 1)]
    """

    name = "dask"
    ends_workers = False
    # A batch is on its way for 10 ms, so it is to be worth that; and so is to take one back.
    traits = Traits(False, False, False, batch_seconds=0.05, stall_seconds=0.25, claim_seconds=0.05, tells_at_end=True)

    arena: Arena

    def __init__(
        self,
        client: Any,
        *,
        n_slots: int | None = None,
        on_kill: Literal["forget", "restart"] = "forget",
        patience: float = 60.0,
    ) -> None:
        if n_slots is not None:
            check_count("n_slots", n_slots, 1, MOST_WORKERS)
        check_choice("on_kill", on_kill, ("forget", "restart"))
        if not is_number(patience) or patience < 0:
            raise refusal("patience", "a number of seconds from 0", patience)
        self._given = client
        self._restarts = on_kill == "restart"
        self.traits = self.traits._replace(ends_tasks=self._restarts)
        self._patience = patience
        self._client = connected(client)
        self.n_slots = n_slots or sum(n_threads(self._client).values())
        if not self.n_slots:
            self._disconnect()
            raise WorkerStartFailed(
                f"the Dask cluster at {client!r} has no worker. Start some, or say n_slots= for those that will come."
            )
        self._slots: list[Slot] = []
        self._workers: dict[str, Worker] = {}
        self._cluster: Cluster | None = None
        self._era = 0
        self._run = (0, 0, 0, -1)

    def __repr__(self) -> str:
        return f"<DaskBackend of {self.n_slots} slots at {self._given!r}>"

    # Opening and closing

    def open(self, n_wanted: int) -> None:  # noqa: ARG002
        """Connect to the workers that there are."""
        self._era += 1  # what was called off before stays that, whenever it hears of it
        if self._cluster is not None:
            return
        self._client = self._client or connected(self._given)
        self._slots = [Slot(number) for number in range(self.n_slots)]
        self._workers = {}
        self._callables: dict[tuple[int, int], Segment] = {}
        self._newest = self._n_series = 0
        self._alone_since: float | None = None
        self._cluster = Cluster(self._client)
        self.arena = self._values = ClusterArena(self._client, self._cluster.token)
        try:
            self._meet_first()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give up what runs, let go of all values, and of the client if it is none of the caller's."""
        if self._cluster is not None:
            cluster, self._cluster = self._cluster, None
            for slot in self._slots:
                slot.clear()
            self._values.close()
            cluster.close(list(self._workers.values()))
        self._disconnect()

    def _disconnect(self) -> None:
        if self._client is not None and self._client is not self._given:
            self._client.close()
            self._client = None

    @property
    def _open_cluster(self) -> Cluster:
        assert self._cluster is not None, "the backend is not open"
        return self._cluster

    # Who is there

    def _meet_first(self) -> None:
        """Wait for the workers that there are; those that do not answer may yet come."""
        missing = set(n_threads(self._client))
        until = time.perf_counter() + MEET_SECONDS
        while missing and time.perf_counter() < until:
            with suppress(queue.Empty):
                news = self._open_cluster.next(until - time.perf_counter())
                if isinstance(news, Refused):
                    raise WorkerStartFailed(news.message)
                if isinstance(news, Came):
                    missing.discard(news.worker.address)
                elif isinstance(news, Left):
                    missing.discard(news.address)  # it may be another one by now, which is met in time
                self._take(news)
        if not self._workers:
            self._alone_since = time.perf_counter()

    def _take_came(self, worker: Worker, n_threads: int) -> list[Notice]:
        before = self._workers.get(worker.address)
        notices = self._take_left(worker.address, before.visit) if before is not None else []
        self._workers[worker.address] = worker
        self._alone_since = None
        free = [slot for slot in self._slots if slot.worker is None][:n_threads]
        for slot in free:
            slot.worker, slot.last, slot.n_given = worker, (0, 0.0), 0
        return [*notices, *map(_joined, free)]

    def _take_left(self, address: str, visit: int) -> list[Notice]:
        """Give up what a worker had that is gone."""
        worker = self._workers.get(address)
        if worker is None or worker.visit != visit:
            return []
        del self._workers[address]
        notices: list[Notice] = []
        for slot in self._slots:
            if slot.worker is worker:
                if not slot.given_up:  # else that was told
                    notices += self._lost(slot, {sent.batch for sent in slot.sent})
                slot.clear()
                slot.given_up.clear()
                slot.worker = None
        if not self._workers and self._alone_since is None:
            self._alone_since = time.perf_counter()
        return notices

    def joined(self) -> Sequence[Joined]:
        """Tell the slots that can take work at this moment."""
        return [_joined(slot) for slot in self._slots if slot.can_work]

    # Batches

    def send(self, slot: int, batch: Batch) -> None:
        """Make a task of Dask's of a batch."""
        if not batch.n_tasks:
            return  # workers keep nothing that they could be told to drop
        entry = self._slots[slot]
        assert entry.worker is not None, f"slot {slot} has no worker"
        if entry.ending is not None:
            entry.sent.append(Sent(batch.id, None, time.perf_counter()))
            return  # it is about to be lost, with all that it has
        batch = self._lightened(batch, entry.worker)
        sources = self._values.sources(_segments(batch))
        if batch.id <= self._newest:
            self._n_series += 1  # another executor counts anew
        self._newest = batch.id
        key = f"forgepar-batch-{self._open_cluster.token}-{self._n_series}-{batch.id}"
        is_once = any(template.has_effects for template in batch.templates)
        once = (entry.worker.address, entry.worker.pid) if is_once else None
        token, series = self._open_cluster.token, self._n_series
        order = dasksite.Order(token, slot, batch.id, series, key, once, self._era, self._run)
        future = self._client.submit(
            dasksite.run_batch,
            order,
            pickle.dumps(tuple(batch), protocol=5),
            list(sources),
            *sources.values(),
            key=key,
            workers=[entry.worker.address],  # lifted by the worker, once somebody may rely on the result
            priority=-batch.id,  # in the order of sending, whatever else waits
            pure=False,
        )
        self._open_cluster.watch_over(future)
        entry.sent.append(Sent(batch.id, future, time.perf_counter()))
        entry.n_given += batch.n_tasks

    def _lightened(self, batch: Batch, worker: Worker) -> Batch:
        """Put large callables where each worker gets them once, and the run's end in terms of the worker's clock."""
        callables = [(number, self._callable(batch.run, number, pickled)) for number, pickled in batch.callables]
        facts = batch.facts
        if facts is not None:
            facts = (facts[0]._replace(ends_at=facts[0].ends_at - worker.clock.offset), facts[1])
        return batch._replace(callables=callables, facts=facts)

    def _callable(self, run: int, number: int, pickled: bytes) -> Any:
        if len(pickled) <= _LARGE_CALLABLE:
            return pickled
        for old in [key for key in self._callables if key[0] != run]:
            self._values.free(self._callables.pop(old))
        if (run, number) not in self._callables:
            self._callables[run, number] = self._values.write_callable(pickled)
        return self._callables[run, number]

    # Hearing

    def wait(self, timeout: float | None) -> list[Notice]:
        """Return what has happened, after at most ``timeout`` seconds if nothing does."""
        deadline = None if timeout is None else time.perf_counter() + timeout
        notices = list[Notice]()
        while True:
            try:
                news = self._open_cluster.next(0.0 if notices else self._patience_until(deadline))
            except queue.Empty:
                notices += self._give_up_silent()
                if notices or (deadline is not None and time.perf_counter() >= deadline):
                    return notices
                continue
            notices += self._take(news)
            if isinstance(news, Woken) or (isinstance(news, Heard) and news.kind == "limited"):
                return notices

    def _patience_until(self, deadline: float | None) -> float | None:
        """Return how many seconds to wait at most; raise where there has been no worker for too long."""
        now = time.perf_counter()
        ends = [slot.ending.until for slot in self._slots if slot.ending is not None]
        deadline = min(ends if deadline is None else [deadline, *ends], default=None)
        left = None if deadline is None else max(0.0, deadline - now)
        if self._alone_since is None:
            return left
        alone = self._alone_since + self._patience - now
        if alone <= 0:
            raise WorkerStartFailed(
                f"the Dask cluster at {self._given!r} has had no worker for {self._patience:g} s (patience=). "
                "Start some."
            )
        return alone if left is None else min(left, alone)

    def _take(self, news: News) -> list[Notice]:
        match news:
            case Heard():
                return self._take_heard(news)
            case Came(worker, n_threads):
                return self._take_came(worker, n_threads)
            case Left(address, visit):
                return self._take_left(address, visit)
            case Refused():
                warnings.warn(f"{news.message} It gets no work.", stacklevel=2)
                return []
            case Freed(number):
                return [_joined(self._slots[number])] if self._slots[number].can_work else []
            case Failed(future):
                return self._take_failed(future)
            case Woken():
                return []
        raise WorkerStartFailed(
            f"the Dask scheduler at {self._given!r} is gone: {type(news.error).__name__}: {news.error}"
        ) from news.error

    def _take_heard(self, news: Heard) -> list[Notice]:
        worker = self._workers.get(news.address)
        if worker is None:
            return []  # it was given up
        worker.clock.heard(news.here, news.there)
        match news.kind:
            case "reply":
                return self._take_reply(worker, *news.content)
            case "beat":
                return self._take_beat(worker, *news.content)
            case "limited":
                return self._take_limited(worker, *news.content)
            case "ended":
                return self._take_ended(worker, *news.content)
            case "withdrawn":
                return self._take_withdrawn(worker, *news.content)
        return self._take_freed(worker, *news.content)

    def _take_reply(self, worker: Worker, fields: Sequence[Any], said: list[Any]) -> list[Notice]:
        reply = Reply._make(fields)
        slot = self._slots[reply.slot]
        if slot.worker is worker and reply.batch in slot.given_up:
            return self._take_freed(worker, reply.batch)
        sent = next((sent for sent in slot.sent if sent.batch == reply.batch), None)
        if sent is None or sent.batch in slot.answers or slot.worker is not worker:
            return []  # it was given up, or answered before: Dask ran it again, for the values that it made
        worker.clock.sent(sent.at, memoryview(reply.marks).cast("d")[0])
        reply = reply._replace(marks=worker.clock.as_here(reply.marks))
        slot.last = slot.at.pop(reply.batch, slot.last)
        if not self._values.made(reply.batch, sent.future, [*reply.values, *(wire for _, wire in reply.subflows)]):
            sent.future.release()
        slot.answers[reply.batch] = [*_told(slot, reply.batch, said), reply]
        return list(slot.in_order())

    def _take_beat(
        self, worker: Worker, positions: Sequence[dasksite.Position], said: Sequence[tuple[int, list[Any]]]
    ) -> list[Notice]:
        has = {sent.batch: slot for slot in self._slots if slot.worker is worker for sent in slot.sent}
        for batch, at, started in positions:
            if batch in has:
                has[batch].at[batch] = has[batch].last = (at, started)
        return [told for batch, lines in said if batch in has for told in _told(has[batch], batch, lines)]

    def _take_limited(self, worker: Worker, number: int, limit: int, farthest: int) -> list[Notice]:
        """Take in how far a slot had come; what ended before is known here, though its answer may wait for others."""
        slot = self._slots[number]
        if slot.worker is worker and limit == slot.n_limits:
            slot.farthest = max([farthest, *(mark(batch, _LAST) for batch in slot.answers)])
        return []

    def _take_withdrawn(self, worker: Worker, batch: int, is_barred: bool) -> list[Notice]:
        """Answer for a batch that its worker never begins, and has not begun: its reply would have come before."""
        slot = next((slot for slot in self._slots if slot.worker is worker and slot.has(batch)), None)
        if slot is None or not is_barred or slot.ending is not None:
            return []
        sent = next(sent for sent in slot.sent if sent.batch == batch)
        sent.future.release()
        marks = array("d", [time.perf_counter()]).tobytes()
        slot.answers[batch] = [Reply(slot.number, batch, 0, [], marks, None, True, 0.0, 0)]
        return list(slot.in_order())

    def _take_freed(self, worker: Worker, batch: int) -> list[Notice]:
        slot = next((slot for slot in self._slots if slot.worker is worker and batch in slot.given_up), None)
        if slot is None:
            return []
        slot.given_up.discard(batch)
        return [_joined(slot)] if slot.can_work else []

    def _take_failed(self, future: Any) -> list[Notice]:
        """Have a batch handed out again whose task of Dask's failed or was cancelled: no task of ours raised that.

        The future of a batch that is answered, and waits for an earlier one, was released here: that is no failure.
        """
        slot = next((slot for slot in self._slots if slot.waits_for(future)), None)
        if slot is None:
            return []
        fault = future.exception() if future.status == "error" else None
        return self._end(slot, fault=fault, is_unknown=True)

    def _lost(self, slot: Slot, unsure: Collection[int]) -> list[Notice]:
        """Return what tells that a slot is lost.

        Args:
            slot: which.
            unsure: batches that may have begun, or gone on, without being heard of.
        """
        assert slot.worker is not None
        ending = slot.ending
        at, fault, also = UNKNOWN_POSITION, None, list[int]()
        if ending is not None:
            fault = ending.fault
        if ending is not None and not ending.is_unknown:
            began_or_may = [sent.batch for sent in slot.sent if sent.batch in ending.running or sent.batch in unsure]
            at = slot.mark[0] if began_or_may[:1] == [sent.batch for sent in slot.sent][:1] != [] else 0
            also = [mark(batch, _LAST) if batch in unsure else slot.at[batch][0] for batch in began_or_may]
        began = slot.sent[0].at if slot.sent else 0.0
        if slot.sent and slot.sent[0].batch in slot.at:
            began = min(self.started(slot.number), time.perf_counter())
        return [*slot.early(), Lost(slot.number, slot.worker.pid, None, at, began, fault, also=also)]

    # Giving up: a slot is lost once its worker has said where it is, so that what it did before that counts.

    def _end(self, slot: Slot, fault: BaseException | None = None, *, is_unknown: bool = False) -> list[Notice]:
        """Have the worker of a slot end what that has, and say where it is."""
        if slot.ending is not None or not slot.sent or slot.worker is None:
            return []
        ending = Ending(slot.mark, time.perf_counter() + _END_SECONDS, fault=fault, is_unknown=is_unknown)
        ending.asked = {sent.batch for sent in slot.sent if sent.batch not in slot.answers}
        slot.ending = ending
        for batch in sorted(ending.asked):
            self._open_cluster.order(slot.worker, ("end", batch))
        return []

    def _take_ended(self, worker: Worker, batch: int, mark: int, began: float) -> list[Notice]:
        slot = next((slot for slot in self._slots if slot.worker is worker and slot.asks(batch)), None)
        if slot is None:
            # It was given up without an answer; this is the answer.
            return [] if mark else self._take_freed(worker, batch)
        ending = slot.ending
        assert ending is not None
        ending.asked.discard(batch)
        if mark and slot.has(batch):  # else it ended, and its reply came before this
            ending.running.add(batch)
            slot.at[batch] = (mark, began)
        return [] if ending.asked else self._give_up(slot)

    def _give_up_silent(self) -> list[Notice]:
        """Give up the slots whose workers do not say where they are."""
        now = time.perf_counter()
        late = [slot for slot in self._slots if slot.ending is not None and slot.ending.until <= now]
        return [notice for slot in late for notice in self._give_up(slot)]

    def _give_up(self, slot: Slot) -> list[Notice]:
        """Let a slot go on with what runs, unheard, and take its place among the others when it is rid of that."""
        ending, worker = slot.ending, slot.worker
        assert ending is not None
        assert worker is not None
        notices = self._lost(slot, ending.asked)
        slot.given_up |= ending.running | ending.asked
        slot.clear()
        if slot.given_up and self._restarts and ending.fault is None:
            self._open_cluster.restart(worker)
        return [*notices, _joined(slot)] if slot.can_work else notices

    def rest(self) -> Sequence[Told]:
        """Return nothing: what tasks print comes in whole lines."""
        return ()

    def wake(self) -> None:
        """Have `wait` return soon."""
        if self._cluster is not None:
            self._cluster.put(Woken())

    # Telling

    def tell(self, n_tasks: int, n_settled: int, n_out: int, layer: int | None) -> None:
        """Let tasks of the next batches know, if they ask, how the run stands."""
        self._run = (n_tasks, n_settled, n_out, -1 if layer is None else layer)

    def call_off(self, *, is_off: bool = True) -> None:
        """Let tasks know, if they ask, that the run was called off, and `wake`."""
        if not is_off:
            self._era += 1
        elif self._cluster is not None:
            for worker in list(self._workers.values()):
                self._cluster.order(worker, ("call_off", self._era))
        self.wake()

    def position(self, slot: int) -> int:
        """Return the mark of the task that the slot is at, as it was a tenth of a second ago or less."""
        return self._slots[slot].mark[0]

    def may_be_at(self, slot: int) -> int | None:
        """Return the farthest mark that the slot may have come to while it is limited; None: it has not said so yet."""
        entry = self._slots[slot]
        return None if entry.ending is not None else entry.farthest

    def limit(self, slot: int, mark: int) -> None:
        """Forbid the slot to begin the task of this mark and whatever comes behind it."""
        entry = self._slots[slot]
        entry.limit, entry.farthest = mark, None
        entry.n_limits += 1
        if mark != NO_LIMIT and entry.worker is not None and entry.sent:
            order = ("limit", slot, entry.n_limits, self._n_series, mark, self._newest)
            self._open_cluster.order(entry.worker, order)

    def withdraw(self, slot: int) -> None:
        """Have the slot answer early for the batches that it has not begun."""
        entry = self._slots[slot]
        if entry.worker is None or entry.ending is not None:
            return
        for sent in entry.sent:
            if sent.batch not in entry.withdrawn:
                entry.withdrawn.add(sent.batch)
                self._open_cluster.order(entry.worker, ("withdraw", sent.batch))

    def started(self, slot: int) -> float:
        """Tell when the slot began the task that it is at."""
        entry = self._slots[slot]
        return entry.mark[1] + (entry.worker.clock.offset if entry.worker is not None else 0.0)

    def where(self, slots: Sequence[int]) -> dict[int, str]:
        """Return the stacks of what workers are at, of those that tell within a second."""
        asked = {}
        for number in slots:
            slot = self._slots[number]
            if slot.worker is not None and slot.sent:
                asked[number] = (slot.worker, slot.sent[0].batch)
        return self._open_cluster.stacks(asked)

    def n_given(self, slot: int) -> int:
        """Count the tasks that the slot was handed since its worker came."""
        return self._slots[slot].n_given

    def renew(self, slot: int) -> None:
        """Go on with the same worker: to renew it is for whoever started it (``dask worker --lifetime``)."""
        self._slots[slot].n_given = 0
        self._open_cluster.put(Freed(slot))

    # Ending

    def terminate(self, slot: int) -> None:
        """Do as `kill` does: nothing would come of waiting."""
        self.kill(slot)

    def kill(self, slot: int) -> None:
        """Give up what a slot has; its thread goes on to the end of its task, or its worker is restarted."""
        self._end(self._slots[slot])


def _joined(slot: Slot) -> Joined:
    assert slot.worker is not None
    return Joined(slot.number, slot.worker.pid, slot.worker.address)


def _told(slot: Slot, batch: int, said: Sequence[Any]) -> list[Told]:
    return [Told(slot.number, [Said(*one) for one in said], mark(batch, 0))] if said else []


def _segments(batch: Batch) -> Iterator[Segment]:
    """Yield the large values that a batch needs."""
    shared = (wire for template in batch.templates for wire in template.shared.values())
    callables = (held for _, held in batch.callables)
    wires: Iterator[Wire] = (wire for part in (batch.values, batch.constants, shared, callables) for wire in part)
    return filter(is_segment, wires)
