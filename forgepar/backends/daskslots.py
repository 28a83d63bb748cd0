"""What a caller knows of the threads of Dask workers, the slots: which batches they have, and how far they are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from forgepar.backends.base import Notice
from forgepar.backends.board import NO_LIMIT
from forgepar.backends.daskcluster import Worker
from forgepar.backends.dasksite import Position


class Sent(NamedTuple):
    """A batch that a slot has: its number, Dask's future, and when it was sent."""

    batch: int
    future: Any
    at: float


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
        agreed: the limit that its worker is known to keep, and the farthest that it had come by then.
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
    agreed: tuple[int, int] = (NO_LIMIT, 0)
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

    def agree(self, limit: int, positions: Sequence[Position]) -> None:
        """Note that the worker keeps a limit, and where it was."""
        self.agreed = (limit, max((at for _, at, _ in positions), default=0))

    def clear(self) -> list[int]:
        """Forget what it has; return the numbers of its batches."""
        batches = [sent.batch for sent in self.sent]
        for sent in self.sent:
            sent.future.release()
        self.sent.clear()
        self.answers.clear()
        self.at.clear()
        self.limit, self.agreed = NO_LIMIT, (NO_LIMIT, 0)
        return batches
