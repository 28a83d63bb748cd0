"""A worker in a process or thread that forgepar did not start, as a Dask worker or a pool of some executor has them.

    transport ──Batch──> HostedWorker.run ──> Worker.run ──Reply, ...──> transport
                              └── OutputRouter: output of the tasks ──> transport

The transports are `backends.futures.run_batch` and `backends.dask.worker_site`. A batch brings all that it needs, so
that any worker can run it. A worker skips what it has from an earlier batch of the run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from forgepar.backends import surroundings
from forgepar.backends.hosted_output import CaptureMode, HostedOutput, router
from forgepar.backends.messages import Batch, Reply
from forgepar.backends.worker import Worker
from forgepar.backends.worker_board import Board
from forgepar.values.arena import Arena
from forgepar.values.codec import is_segment
from forgepar.values.segments import Segment
from forgepar.workflow import context as contexts


class HostedWorker:
    """Runs batches, one at a time, in the thread that calls `run`.

    Args:
        slot: number of the slot that it fills.
        arena: has the large values of the batch that runs.
        board: where it writes what it runs.
        mode: how the process logs, and whether output is captured.
        reply_seconds: work between two replies, seconds; None: the default of `Worker`.

    Attributes:
        worker: runs the tasks.
        arena: the same as the argument.
        output: what the tasks print, log and warn of, and their progress.
    """

    def __init__(
        self, slot: int, arena: Arena, board: Board, mode: CaptureMode, *, reply_seconds: float | None = None
    ) -> None:
        self.arena = arena
        self.worker = Worker(slot, arena, board, reply_seconds=reply_seconds)
        self.output = HostedOutput(self.worker.task_number)
        self.worker.output = self.output.records
        self.worker.capture = self.output
        self._mode = mode

    def run(self, batch: Batch) -> list[Reply]:
        """Run a batch that brings all it needs, and return its replies."""
        assert batch.facts is not None, "a batch for a hosted worker brings all that it needs"
        rules = surroundings.unpack(batch.facts[1]).rules
        self.output.thread = threading.get_ident()
        is_captured = self._mode != "off"
        with (
            contexts.here(self.worker.context),
            router.capturing(self.output, rules, as_caller=self._mode == "as_caller") if is_captured else nullcontext(),
        ):
            return list(self.worker.run(self._without_known(batch)))

    def _without_known(self, batch: Batch) -> Batch:
        """Return a batch without what this worker has; fetch callables that the arena has."""
        batch = self.worker.without_known(batch)
        pairs: list[tuple[int, Any]] = list(batch.callables)
        fetched = [(number, bytes(self.arena.read(part)[0]) if is_segment(part) else part) for number, part in pairs]
        return batch._replace(callables=fetched)


def batch_segments(batch: Batch) -> Iterator[Segment]:
    """Yield the large values that a batch refers to."""
    shared = (wire for template in batch.templates for wire in template.shared.values())
    callables: Iterator[Any] = (part for _, part in batch.callables)
    return filter(is_segment, (wire for part in (batch.values, batch.constants, shared, callables) for wire in part))


def reply_segments(reply: Reply) -> Iterator[Segment]:
    """Yield the large values in a reply."""
    yield from filter(is_segment, reply.values)
    yield from filter(is_segment, (wire for _, wire in reply.subflows))
