"""Work stealing: reclaim from slots tasks that they have not begun, for idle slots or because the run ends.

Workers begin the tasks of their batches without asking. So reclaiming takes two steps: set a limit that the worker must
not pass, and, when the worker surely sees it, read its position. The tasks after both can be handed out again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence

from forgepar.backends.base import Backend
from forgepar.backends.worker_board import NO_LIMIT, mark, unmark
from forgepar.engine.in_flight import Flight


class WorkStealing:
    """The limits of slots.

    Args:
        backend: sets the limits.
        flights: by slot, its batches; the slot scheduler keeps it up to date.
        pids: by slot, its worker's process, 0 for none; likewise.
    """

    def __init__(self, backend: Backend, flights: Sequence[deque[Flight]], pids: Sequence[int]) -> None:
        self._backend = backend
        traits = backend.traits
        self._stall_seconds, self._reclaim_seconds = traits.stall_seconds, traits.claim_seconds
        self._is_far = traits.is_far
        self._asked: dict[int, float] = {}  # limited slots with nothing reclaimed yet, and since when
        self._flights = flights
        self._pids = pids
        self._limits = [NO_LIMIT] * len(flights)
        self._ends = [NO_LIMIT] * len(flights)  # what a slot has lost: no later limit may let it begin that

    def is_limited(self, slot: int) -> bool:
        """Return whether a slot must not begin all that it has; it gets no more batches then."""
        return self._limits[slot] != NO_LIMIT

    def patience(self, *, is_over: bool) -> float | None:
        """Return after how many seconds to call `step` again; None: after the next notice.

        Args:
            is_over: nothing is handed out any more.
        """
        if self._asked:
            return self._reclaim_seconds
        stalls = not is_over and self._some_slot_idles() and self._some_are_unbegun()
        return self._stall_seconds if stalls else None

    def step(self, *, is_wanted: bool) -> Iterator[tuple[Flight, int, int]]:
        """Limit slots that stall while another idles; reclaim from those that were limited before.

        Args:
            is_wanted: whether idle slots have nothing to do.

        Yields:
            A batch in flight, and the first place and the end of its tasks that were reclaimed.
        """
        if self._asked:
            seen = time.perf_counter() - self._reclaim_seconds
            for slot in [slot for slot, since in self._asked.items() if since <= seen]:
                yield from self._reclaim(slot)
        if not is_wanted or not self._some_slot_idles():
            return
        now = time.perf_counter()
        for slot, has in enumerate(self._flights):
            if (
                not self.is_limited(slot)
                and (_n_unbegun(has) or self._waits(slot))
                and now - has[0].since > self._stall_seconds
            ):
                self._limit_here(slot)
                self._asked[slot] = now

    def claim(self, slot: int) -> None:
        """Reclaim what a slot has not begun, whether or not another idles; `step` yields it."""
        if slot not in self._asked:
            self._limit_here(slot)
            self._asked[slot] = time.perf_counter()

    def limit_all(self) -> None:
        """Let no slot begin another task."""
        for slot, has in enumerate(self._flights):
            if has:
                self._limit_here(slot)
        self._asked.clear()

    def lift(self, slot: int) -> None:
        """Let a slot begin all that it is given."""
        self._asked.pop(slot, None)
        self._ends[slot] = NO_LIMIT
        self._limit(slot, NO_LIMIT)

    def _limit_here(self, slot: int) -> None:
        first = self._flights[slot][0]
        self._limit(slot, min(max(self._backend.position(slot) + 1, mark(first.id, 0)), self._ends[slot]))

    def _limit(self, slot: int, at: int) -> None:
        self._limits[slot] = at
        self._backend.limit(slot, at)

    def _some_are_unbegun(self) -> bool:
        # A slot that is limited already has nothing more to give, and would have the loop wake up for nothing.
        if any(_n_unbegun(has) and not self.is_limited(slot) for slot, has in enumerate(self._flights)):
            return True
        return self._is_far and any(
            not self.is_limited(slot) and self._waits(slot) for slot in range(len(self._flights))
        )

    def _waits(self, slot: int) -> bool:
        """Return whether a remote slot has not reported that it began its first batch, which could run elsewhere."""
        has = self._flights[slot]
        if not self._is_far or not has or has[0].n_done >= has[0].n_own:
            return False
        return unmark(self._backend.position(slot))[0] < has[0].id

    def _some_slot_idles(self) -> bool:
        if all(self._flights):
            return False
        return any(pid and not has for pid, has in zip(self._pids, self._flights, strict=True))

    def _reclaim(self, slot: int) -> Iterator[tuple[Flight, int, int]]:
        """Reclaim the tasks after a slot's limit, if the slot has not passed it; a remote slot must have reported."""
        limit, position = self._limits[slot], self._backend.may_be_at(slot)
        if position is None:
            return
        self._asked.pop(slot, None)
        if limit == NO_LIMIT:
            return
        if position >= limit:
            if not self._is_far:  # it began one more before it saw the limit, which may take long
                self.claim(slot)
            return
        self._ends[slot] = limit
        batch, place = unmark(limit)
        for flight in self._flights[slot]:
            first = max(flight.n_done, place if flight.id == batch else 0)
            if flight.id >= batch and first < flight.n_own:
                end, flight.n_own = flight.n_own, first
                yield flight, first, end


def _n_unbegun(flights: deque[Flight]) -> int:
    """Count the tasks of a slot that it has not begun: without those done and the one it runs."""
    return sum(flight.n_own - flight.n_done for flight in flights) - 1 if flights else 0
