"""The slots and workers of an open Dask backend, updated by what the cluster reports.

Cluster.next ──ClusterEvent──> SlotTable.take ──> notices of `DaskBackend.wait`
                                  └──> slots, workers
"""

from __future__ import annotations

import time
import warnings
from array import array
from collections.abc import Iterator, Sequence
from typing import Any

from forgepar.backends.base import Notice, OutputNotice
from forgepar.backends.dask.cluster import (
    Cluster,
    ClusterEvent,
    ClusterWorker,
    DaskTaskFailed,
    SiteMessage,
    SlotFreed,
    WorkerFound,
    WorkerLeft,
    WorkerRefused,
)
from forgepar.backends.dask.slots import LAST_POSITION, DaskSlot, PendingLoss
from forgepar.backends.dask.values import ClusterArena
from forgepar.backends.dask.worker_site import BatchPosition
from forgepar.backends.hosted_worker import reply_segments
from forgepar.backends.messages import Reply
from forgepar.backends.output_capture import OutputRecord
from forgepar.backends.worker_board import mark

_END_SECONDS = 10.0  # for the answer of a worker that is asked to end batches; C code may delay it


class SlotTable:
    """The slots of an open backend, and the workers that have them.

    A slot is given up only after its worker has reported the positions of its batches, so that tasks that ended before
    that count.

    Args:
        n_slots: number of slots.
        cluster: takes commands to workers.
        values: holds the values that batches make.
        restarts: whether to restart a worker if a batch that was given up still runs on it.

    Attributes:
        slots: the slots, by number.
        workers: the workers, by address.
        no_worker_since: when the last worker left, seconds of this process's clock; None while there is one.
    """

    def __init__(self, n_slots: int, cluster: Cluster, values: ClusterArena, *, restarts: bool) -> None:
        self.slots = [DaskSlot(number) for number in range(n_slots)]
        self.workers: dict[str, ClusterWorker] = {}
        self.no_worker_since: float | None = None
        self._cluster = cluster
        self._values = values
        self._restarts = restarts

    def take(self, event: ClusterEvent) -> list[Notice]:
        """Process an event, and return the notices that follow from it."""
        match event:
            case SiteMessage():
                return self._take_message(event)
            case WorkerFound(worker, n_threads):
                return self._add_worker(worker, n_threads)
            case WorkerLeft(address, visit):
                return self._remove_worker(address, visit)
            case WorkerRefused():
                warnings.warn(f"{event.message} The worker gets no tasks.", stacklevel=2)
            case SlotFreed(number):
                return self._joined(self.slots[number])
            case DaskTaskFailed(future):
                return self._take_failed(future)
        return []

    def end(self, slot: DaskSlot, fault: BaseException | None = None, *, is_unknown: bool = False) -> None:
        """Ask the worker of a slot to end the slot's batches; the slot is given up once it has answered."""
        if slot.loss is not None or not slot.sent or slot.worker is None:
            return
        asked = {sent.batch for sent in slot.sent if sent.batch not in slot.answers}
        slot.loss = PendingLoss(time.perf_counter() + _END_SECONDS, fault, is_unknown, asked)
        for batch in sorted(asked):
            self._cluster.command(slot.worker, ("end", batch))

    def next_loss(self) -> float | None:
        """Return when the next slot is given up if its worker does not answer."""
        return min((slot.loss.until for slot in self.slots if slot.loss is not None), default=None)

    def give_up_silent(self) -> list[Notice]:
        """Give up the slots whose workers did not answer in time."""
        now = time.perf_counter()
        late = [slot for slot in self.slots if slot.loss is not None and slot.loss.until <= now]
        return [notice for slot in late for notice in self._give_up(slot)]

    # Workers

    def _add_worker(self, worker: ClusterWorker, n_threads: int) -> list[Notice]:
        before = self.workers.get(worker.address)
        notices = self._remove_worker(worker.address, before.visit) if before is not None else []
        self.workers[worker.address] = worker
        self.no_worker_since = None
        free = [slot for slot in self.slots if slot.worker is None][:n_threads]
        for slot in free:
            slot.worker, slot.last, slot.n_given = worker, (0, 0.0), 0
        return [*notices, *(slot.joined() for slot in free)]

    def _remove_worker(self, address: str, visit: int) -> list[Notice]:
        """Give up the slots of a worker that left."""
        worker = self.workers.get(address)
        if worker is None or worker.visit != visit:
            return []
        del self.workers[address]
        notices: list[Notice] = []
        for slot in self.slots:
            if slot.worker is worker:
                if not slot.given_up:  # else the loss was reported before
                    notices += slot.lost({sent.batch for sent in slot.sent}, time.perf_counter())
                slot.clear()
                slot.given_up.clear()
                slot.worker = None
        if not self.workers and self.no_worker_since is None:
            self.no_worker_since = time.perf_counter()
        return notices

    # Messages of worker sites

    def _take_message(self, message: SiteMessage) -> list[Notice]:
        worker = self.workers.get(message.address)
        if worker is None:
            return []  # it was given up
        worker.clock.add_received(message.received, message.sent)
        match message.kind:
            case "reply":
                return self._take_reply(worker, *message.content)
            case "beat":
                return self._take_beat(worker, *message.content)
            case "limited":
                return self._take_limited(worker, *message.content)
            case "ended":
                return self._take_ended(worker, *message.content)
            case "withdrawn":
                return self._take_withdrawn(worker, *message.content)
        return self._take_freed(worker, *message.content)

    def _slots_of(self, worker: ClusterWorker) -> Iterator[DaskSlot]:
        return (slot for slot in self.slots if slot.worker is worker)

    def _take_reply(self, worker: ClusterWorker, fields: Sequence[Any], output: Sequence[OutputRecord]) -> list[Notice]:
        reply = Reply._make(fields)
        slot = self.slots[reply.slot]
        if slot.worker is worker and reply.batch in slot.given_up:
            return self._take_freed(worker, reply.batch)
        sent = slot.find(reply.batch)
        if sent is None or slot.worker is not worker:
            return []  # it was given up, or answered before and rerun by Dask for the values that it made
        worker.clock.add_sent(sent.at, memoryview(reply.marks).cast("d")[0])
        reply = reply._replace(marks=worker.clock.as_here(reply.marks))
        slot.last = slot.at.pop(reply.batch, slot.last)
        if not self._values.made(reply.batch, sent.future, list(reply_segments(reply))):
            sent.future.release()
        slot.answers[reply.batch] = [*_output_notices(slot, reply.batch, output), reply]
        return list(slot.in_order())

    def _take_beat(
        self,
        worker: ClusterWorker,
        positions: Sequence[BatchPosition],
        output: Sequence[tuple[int, Sequence[OutputRecord]]],
    ) -> list[Notice]:
        slots = {sent.batch: slot for slot in self._slots_of(worker) for sent in slot.sent}
        for batch, at, started in positions:
            if batch in slots:
                slots[batch].at[batch] = slots[batch].last = (at, started)
        return [
            notice
            for batch, records in output
            if batch in slots
            for notice in _output_notices(slots[batch], batch, records)
        ]

    def _take_limited(self, worker: ClusterWorker, number: int, limit: int, farthest: int) -> list[Notice]:
        """Note how far a slot had come when it got a limit; batches answered out of order count as complete."""
        slot = self.slots[number]
        if slot.worker is worker and limit == slot.n_limits:
            slot.farthest = max([farthest, *(mark(batch, LAST_POSITION) for batch in slot.answers)])
        return []

    def _take_withdrawn(self, worker: ClusterWorker, batch: int, is_barred: bool) -> list[Notice]:
        """Answer for a batch that its worker never begins. If it had begun it, its reply would have come before."""
        for slot in self._slots_of(worker):
            if (sent := slot.find(batch)) is not None:
                if not is_barred or slot.loss is not None:
                    return []
                sent.future.release()
                marks = array("d", [time.perf_counter()]).tobytes()
                slot.answers[batch] = [Reply(slot.number, batch, 0, [], marks, None, True, 0.0, 0)]
                return list(slot.in_order())
        return []

    def _take_freed(self, worker: ClusterWorker, batch: int) -> list[Notice]:
        """Note that a batch that was given up does not run any more."""
        for slot in self._slots_of(worker):
            if batch in slot.given_up:
                slot.given_up.discard(batch)
                return self._joined(slot)
        return []

    def _take_failed(self, future: Any) -> list[Notice]:
        """Give up the slot of a batch if its Dask task failed or was cancelled, which no task of the workflow causes.

        The future of a batch that was answered before an earlier one was released here; that is not a failure.
        """
        slot = next((slot for slot in self.slots if slot.waits_for(future)), None)
        if slot is not None:
            self.end(slot, future.exception() if future.status == "error" else None, is_unknown=True)
        return []

    def _take_ended(self, worker: ClusterWorker, batch: int, position: int, began: float) -> list[Notice]:
        slot = next((slot for slot in self._slots_of(worker) if slot.asks(batch)), None)
        if slot is None:
            # The slot was given up without an answer; this is the answer.
            return [] if position else self._take_freed(worker, batch)
        loss = slot.loss
        assert loss is not None
        loss.asked.discard(batch)
        if position and slot.find(batch) is not None:  # else it ended, and its reply came before this
            loss.running.add(batch)
            slot.at[batch] = (position, began)
        return [] if loss.asked else self._give_up(slot)

    def _give_up(self, slot: DaskSlot) -> list[Notice]:
        """Report a slot as lost. It can work again when the batches that still run on it have ended."""
        loss, worker = slot.loss, slot.worker
        assert loss is not None
        assert worker is not None
        notices = slot.lost(loss.asked, time.perf_counter())
        slot.given_up |= loss.running | loss.asked
        slot.clear()
        if slot.given_up and self._restarts and loss.fault is None:
            self._cluster.restart(worker)
        return [*notices, *self._joined(slot)]

    def _joined(self, slot: DaskSlot) -> list[Notice]:
        return [slot.joined()] if slot.can_work else []


def _output_notices(slot: DaskSlot, batch: int, records: Sequence[OutputRecord]) -> list[OutputNotice]:
    return [OutputNotice(slot.number, records, mark(batch, 0))] if records else []
