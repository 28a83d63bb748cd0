"""Slots of a Dask backend, each a thread of a Dask worker: their batches, and the positions of these."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forgepar.backends.base import UNKNOWN_POSITION, Joined, Lost, Notice
from forgepar.backends.dask.cluster import ClusterWorker
from forgepar.backends.worker_board import NO_LIMIT, mark

LAST_POSITION = 0xFFFFFFFF  # a position after all tasks of a batch


class SentBatch(NamedTuple):
    """A batch of a slot: its number, Dask's future (None: it was not submitted), and when it was sent."""

    batch: int
    future: Any
    at: float


@dataclass(eq=False)
class PendingLoss:
    """A slot that is to be given up: its worker was asked to end the slot's batches.

    Attributes:
        until: when the slot is given up even without an answer, seconds of this process's clock.
        fault: the exception that it is given up for, if any.
        is_unknown: whether it is unknown which of its tasks began.
        asked: batches that the worker has not answered for.
        running: batches that still run.
    """

    until: float
    fault: BaseException | None = None
    is_unknown: bool = False
    asked: set[int] = field(default_factory=set)
    running: set[int] = field(default_factory=set)


@dataclass(eq=False)
class DaskSlot:
    """A thread of a Dask worker.

    Attributes:
        number: the slot's number.
        worker: its worker; None while it has none.
        sent: batches that are not answered, in order.
        answers: notices of batches that were answered before earlier ones.
        at: last known position of each batch: mark, and when that task began by the worker's clock.
        last: the position that was reported last.
        limit: the first mark that it must not begin.
        n_limits: how many limits it got.
        farthest: the highest mark that it can have reached under the last limit; None: not known yet.
        withdrawn: batches that it was asked not to begin.
        loss: set while it is to be given up.
        given_up: batches that were given up and may still run.
        n_given: how many tasks it got since its worker joined.
    """

    number: int
    worker: ClusterWorker | None = None
    sent: deque[SentBatch] = field(default_factory=deque)
    answers: dict[int, list[Notice]] = field(default_factory=dict)
    at: dict[int, tuple[int, float]] = field(default_factory=dict)
    last: tuple[int, float] = (0, 0.0)
    limit: int = NO_LIMIT
    n_limits: int = 0
    farthest: int | None = None
    withdrawn: set[int] = field(default_factory=set)
    loss: PendingLoss | None = None
    given_up: set[int] = field(default_factory=set)
    n_given: int = 0

    @property
    def mark(self) -> tuple[int, float]:
        """The mark of the task that it runs and when that began, as last reported."""
        return self.at.get(self.sent[0].batch, self.last) if self.sent else self.last

    @property
    def started(self) -> float:
        """When the task that it runs began, by this process's clock."""
        return self.mark[1] + (self.worker.clock.offset if self.worker is not None else 0.0)

    @property
    def can_work(self) -> bool:
        """Whether it can get a batch."""
        return self.worker is not None and self.loss is None and not self.given_up

    def in_order(self) -> Iterator[Notice]:
        """Yield the answers of the first batches: on a worker of several threads a later one may be done first."""
        while self.sent and self.sent[0].batch in self.answers:
            yield from self.answers.pop(self.sent.popleft().batch)

    def asks(self, batch: int) -> bool:
        """Return whether it is to be given up, and its worker has not answered for this batch."""
        return self.loss is not None and batch in self.loss.asked

    def find(self, batch: int) -> SentBatch | None:
        """Return a batch that is not answered, not even before an earlier one."""
        if batch in self.answers:
            return None
        return next((sent for sent in self.sent if sent.batch == batch), None)

    def waits_for(self, future: Any) -> bool:
        """Return whether a future is that of a batch that is not answered."""
        return any(sent.future is future and sent.batch not in self.answers for sent in self.sent)

    def joined(self) -> Joined:
        """Return the notice that it can take batches."""
        assert self.worker is not None
        return Joined(self.number, self.worker.pid, self.worker.address)

    def lost(self, unsure: Collection[int], now: float) -> list[Notice]:
        """Return the answers that it has, and the notice that it is lost.

        Args:
            unsure: batches that may have begun, or continued, without a report.
            now: seconds of this process's clock.
        """
        assert self.worker is not None
        loss, first = self.loss, self.sent[0].batch if self.sent else None
        at, also = UNKNOWN_POSITION, list[int]()
        if loss is not None and not loss.is_unknown:
            begun = [sent.batch for sent in self.sent if sent.batch in loss.running or sent.batch in unsure]
            at = self.mark[0] if begun and begun[0] == first else 0
            also = [mark(batch, LAST_POSITION) if batch in unsure else self.at[batch][0] for batch in begun]
        began = self.sent[0].at if self.sent else 0.0
        if first in self.at:
            began = min(self.started, now)
        answers = [notice for sent in self.sent for notice in self.answers.get(sent.batch, ())]
        fault = loss.fault if loss is not None else None
        return [*answers, Lost(self.number, self.worker.pid, None, at, began, fault, also=also)]

    def clear(self) -> None:
        """Forget all batches."""
        for sent in self.sent:
            if sent.future is not None and sent.batch not in self.answers:  # else it holds the batch's values
                sent.future.release()
        self.sent.clear()
        self.answers.clear()
        self.at.clear()
        self.withdrawn.clear()
        self.loss = None
        self.limit, self.farthest = NO_LIMIT, None
