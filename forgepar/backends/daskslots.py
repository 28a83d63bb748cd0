"""What a caller knows of the threads of Dask workers, the slots: which batches they have, and how far they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forgepar.backends.base import Notice
from forgepar.backends.board import NO_LIMIT
from forgepar.backends.daskcluster import Worker


class Sent(NamedTuple):
    """A batch that a slot has: its number, Dask's future (None: it was not even sent), and when it was sent."""

    batch: int
    future: Any
    at: float


@dataclass(eq=False)
class Ending:
    """What is asked of the worker of a slot that is to be given up.

    Attributes:
        mark: of the task that it is at, as far as is known, and when that began by the worker's clock.
        until: when it is given up without an answer.
        asked: batches of which the worker has not said where they are.
        running: those that go on.
        fault: what it is given up for, where that is an exception.
        is_unknown: whether nothing tells which of its tasks began.
    """

    mark: tuple[int, float]
    until: float
    asked: set[int] = field(default_factory=set)
    running: set[int] = field(default_factory=set)
    fault: BaseException | None = None
    is_unknown: bool = False


@dataclass(eq=False)
class Slot:
    """A thread of a Dask worker.

    Attributes:
        number: the slot's number.
        worker: whose thread it is; None while there is none.
        sent: its batches that are not answered, in order.
        answers: what replies came to that are before those of earlier batches.
        at: where its batches are, as was last told: mark, and when that began by the worker's clock.
        last: the mark that was told last of all.
        limit: what it must not begin.
        n_limits: how many limits it was given.
        farthest: how far it had come when its worker took in the last of these; None: it has not said so.
        withdrawn: batches that it was asked not to begin.
        ending: what goes on while it is to be given up.
        given_up: batches that may still run, though nobody waits for them.
        n_given: tasks it was handed since its worker came.
    """

    number: int
    worker: Worker | None = None
    sent: deque[Sent] = field(default_factory=deque)
    answers: dict[int, list[Notice]] = field(default_factory=dict)
    at: dict[int, tuple[int, float]] = field(default_factory=dict)
    last: tuple[int, float] = (0, 0.0)
    limit: int = NO_LIMIT
    n_limits: int = 0
    farthest: int | None = None
    withdrawn: set[int] = field(default_factory=set)
    ending: Ending | None = None
    given_up: set[int] = field(default_factory=set)
    n_given: int = 0

    @property
    def mark(self) -> tuple[int, float]:
        """The mark of the task it is at and when that began, as far as was told."""
        return self.at.get(self.sent[0].batch, self.last) if self.sent else self.last

    def in_order(self) -> Iterator[Notice]:
        """Yield what the first batches came to: where a worker has several threads, a later one may be done first."""
        while self.sent and self.sent[0].batch in self.answers:
            yield from self.answers.pop(self.sent.popleft().batch)

    @property
    def can_work(self) -> bool:
        """Whether it can be given a batch."""
        return self.worker is not None and self.ending is None and not self.given_up

    def asks(self, batch: int) -> bool:
        """Tell whether it is to be given up, and its worker has not said yet where this batch is."""
        return self.ending is not None and batch in self.ending.asked

    def early(self) -> list[Notice]:
        """Return what later batches came to, for which those before them are not waited for any more."""
        return [notice for sent in self.sent for notice in self.answers.get(sent.batch, ())]

    def has(self, batch: int) -> bool:
        """Tell whether a batch is one of its own that is not answered, whatever was told of it out of order."""
        return batch not in self.answers and any(sent.batch == batch for sent in self.sent)

    def waits_for(self, future: Any) -> bool:
        """Tell whether a future is that of a batch that is not answered."""
        return any(sent.future is future and sent.batch not in self.answers for sent in self.sent)

    def clear(self) -> None:
        """Forget what it has."""
        for sent in self.sent:
            if sent.future is not None and sent.batch not in self.answers:  # else its values are held by it
                sent.future.release()
        self.sent.clear()
        self.answers.clear()
        self.at.clear()
        self.withdrawn.clear()
        self.ending = None
        self.limit, self.farthest = NO_LIMIT, None
