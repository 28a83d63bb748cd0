"""Taking back from slots what they have not begun: for others that idle, or because the run ends.

Workers begin tasks unasked. So a claim is two steps: a limit that the worker is not to pass, and, when that is surely
seen, a look at where it is; what lies behind is nobody's again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

from forgepar.backends.base import Backend, traits_of
from forgepar.backends.board import NO_LIMIT, mark, unmark
from forgepar.flight import Flight


class Claims:
    """The limits of one run's slots.

    Args:
        backend: writes them.
        flights: what each slot has; kept up to date by the owner.
        pids: the worker of each slot, 0 for none; likewise.
    """

    def __init__(self, backend: Backend, flights: Sequence[deque[Flight]], pids: Sequence[int]) -> None:
        self._backend = backend
        traits = traits_of(backend)
        self._stall_seconds, self._claim_seconds = traits.stall_seconds, traits.claim_seconds
        # Where the way to a slot is long, what it tells of a limit comes late: None until then.
        self._may_be_at: Callable[[int], int | None] = getattr(backend, "may_be_at", backend.position)
        self._is_far = hasattr(backend, "may_be_at")
        self._asked: dict[int, float] = {}  # slots that were limited and not claimed from yet, and since when
        self._flights = flights
        self._pids = pids
        self._limits = [NO_LIMIT] * len(flights)

    def is_limited(self, slot: int) -> bool:
        """Tell whether a slot is not to begin all that it has; nothing is to be handed to it then."""
        return self._limits[slot] != NO_LIMIT

    def patience(self, *, is_over: bool) -> float | None:
        """Return when to call `step` again, in seconds; None: not before something else happens.

        Args:
            is_over: nothing is handed out any more.
        """
        if self._asked:
            return self._claim_seconds
        stalls = not is_over and self._some_slot_idles() and self._some_are_unbegun()
        return self._stall_seconds if stalls else None

    def step(self, *, is_wanted: bool) -> Iterator[tuple[Flight, int, int]]:
        """Limit slots that have stalled while another idles, or claim from those that were limited before.

        Args:
            is_wanted: nothing is ready for the slots that idle.

        Yields:
            A flight, and the places of the tasks that are not its own any more.
        """
        if self._asked:
            seen = time.perf_counter() - self._claim_seconds
            for slot in [slot for slot, since in self._asked.items() if since <= seen]:
                yield from self._claim(slot)
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

    def limit_all(self) -> None:
        """Let no slot begin another task."""
        for slot, has in enumerate(self._flights):
            if has:
                self._limit_here(slot)
        self._asked.clear()

    def lift(self, slot: int) -> None:
        """Let a slot begin whatever it is given."""
        self._asked.pop(slot, None)
        self._limit(slot, NO_LIMIT)

    def _limit_here(self, slot: int) -> None:
        first = self._flights[slot][0]
        self._limit(slot, max(self._backend.position(slot) + 1, mark(first.id, 0)))

    def _limit(self, slot: int, at: int) -> None:
        self._limits[slot] = at
        self._backend.limit(slot, at)

    def _some_are_unbegun(self) -> bool:
        if any(map(_n_unbegun, self._flights)):
            return True
        return self._is_far and any(
            not self.is_limited(slot) and self._waits(slot) for slot in range(len(self._flights))
        )

    def _waits(self, slot: int) -> bool:
        """Tell whether a slot that is far away has not been seen to begin what it has: that may run elsewhere."""
        has = self._flights[slot]
        if not self._is_far or not has or has[0].n_done >= has[0].n_own:
            return False
        return unmark(self._backend.position(slot))[0] < has[0].id

    def _some_slot_idles(self) -> bool:
        if all(self._flights):
            return False
        return any(pid and not has for pid, has in zip(self._pids, self._flights, strict=True))

    def _claim(self, slot: int) -> Iterator[tuple[Flight, int, int]]:
        """Take what lies behind a slot's limit, if the slot has not passed that; nothing as long as it has not said."""
        limit, position = self._limits[slot], self._may_be_at(slot)
        if position is None:
            return
        self._asked.pop(slot, None)
        if limit == NO_LIMIT or position >= limit:
            return
        batch, place = unmark(limit)
        for flight in self._flights[slot]:
            first = max(flight.n_done, place if flight.id == batch else 0)
            if flight.id >= batch and first < flight.n_own:
                end, flight.n_own = flight.n_own, first
                yield flight, first, end


def _n_unbegun(flights: deque[Flight]) -> int:
    """Count the tasks that a slot has, less what it has done and the one it is at."""
    return sum(flight.n_own - flight.n_done for flight in flights) - 1 if flights else 0
