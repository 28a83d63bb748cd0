"""A batch that a slot has, and how far it is known to be."""

from __future__ import annotations

import time

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
