"""A batch that a slot has, and how much of it is known to be done."""

from __future__ import annotations

import time
from typing import Any

from forgepar.backends.messages import Reply


class Flight:
    """A batch that was sent and does not have all its outcomes.

    Attributes:
        id: the batch's id.
        template: the template of its tasks.
        kind: the number by which `Durations` knows them.
        tasks: a range, array or list of them; int() of one is its number.
        is_short: whether it is expected to be done soon.
        n_done: how many have an outcome.
        n_own: how many still belong to the slot: those after them were reclaimed.
        since: when the slot last reported while this was its first batch, or when it was sent.
    """

    __slots__ = ("id", "is_short", "kind", "n_done", "n_own", "since", "tasks", "template")

    def __init__(self, number: int, template: int, kind: int, tasks: Any, is_short: bool) -> None:
        self.id = number
        self.template = template
        self.kind = kind
        self.tasks = tasks
        self.is_short = is_short
        self.n_done = 0
        self.n_own = len(tasks)
        self.since = time.perf_counter()


def own_part(flight: Flight, reply: Reply) -> tuple[Reply, list[int]]:
    """Return the part of a reply whose tasks belong to the slot and have no outcome yet.

    The other tasks were reclaimed before, and so may run elsewhere, or have an outcome.

    Returns:
        The part, and the places in the reply's values of what was left out.
    """
    first, n = reply.first, len(reply.values)
    begin, end = max(first, flight.n_done), min(first + n, flight.n_own)
    if first > flight.n_done or begin >= end:  # outcomes before it are missing, or none of its own count
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
