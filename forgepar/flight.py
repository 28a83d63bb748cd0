"""A batch that a slot has, and how far it is known to be."""

from __future__ import annotations

import time
from typing import Protocol

from forgepar.backends.wire import Reply
from forgepar.plan import Tasks


class Flight:
    """A batch that was sent and is not answered whole.

    Attributes:
        id: the batch's id.
        template: the template of its tasks.
        tasks: their numbers.
        is_short: whether it is expected to be done soon.
        n_done: how many have an outcome.
        n_own: how many are still the slot's: those behind were claimed back.
        since: when the slot was last heard of while this was its first batch, or when it was sent.
    """

    __slots__ = ("id", "is_short", "n_done", "n_own", "since", "tasks", "template")

    def __init__(self, number: int, template: int, tasks: Tasks, is_short: bool) -> None:
        self.id = number
        self.template = template
        self.tasks = tasks
        self.is_short = is_short
        self.n_done = 0
        self.n_own = len(tasks)
        self.since = time.perf_counter()


class Answered(Protocol):
    """A batch that a slot has, as far as its replies are about it."""

    n_done: int
    n_own: int


def own_part(flight: Answered, reply: Reply) -> tuple[Reply, list[int]]:
    """Return the part of a reply that is about tasks which are the slot's own and have no outcome yet.

    The rest was claimed back before, and so may run elsewhere, or was told already.

    Returns:
        The reply, and the places in its values of what was left out.
    """
    first, n = reply.first, len(reply.values)
    begin, end = max(first, flight.n_done), min(first + n, flight.n_own)
    if first > flight.n_done or begin >= end:  # outcomes are missing in front of it, or it has none that count
        begin = end = min(begin, first + n)
    places = range(begin - first, end - first)
    left_out = [place for place in range(n) if place not in places]
    part = reply._replace(
        first=begin,
        values=reply.values[places.start : places.stop],
        marks=reply.marks[8 * places.start : 8 * (places.stop + 1)],
        failure=reply.failure if places and places.stop == n else None,
        subflows=[(place - places.start, wire) for place, wire in reply.subflows if place in places],
    )
    return part, left_out
