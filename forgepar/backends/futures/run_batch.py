"""Running a batch in a worker of an executor: one call with a request, which returns a result.

    FuturesBackend ──BatchRequest──> executor.submit(run_batch, request) ──BatchResult──> FuturesBackend

The worker may be a thread of the caller's process, another process, interpreter or machine, and another one for each
batch. So a request brings all that its batch needs. A worker that ran an earlier batch skips unpickling what it has.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from array import array
from collections.abc import Sequence
from typing import Any, NamedTuple

from forgepar.backends.futures.message_arena import MessageArena, SegmentParts
from forgepar.backends.hosted_output import CaptureMode
from forgepar.backends.hosted_worker import HostedWorker, reply_segments
from forgepar.backends.messages import Batch
from forgepar.backends.output_capture import OutputRecord
from forgepar.backends.worker_board import Board


class BatchRequest(NamedTuple):
    """A batch with all that it needs.

    Attributes:
        sender: the caller's interpreter, see `interpreter_id`.
        series: identifies the open backend; the same for all its requests.
        board: path of the board, which workers on the caller's machine open.
        n_slots: number of rows of the board.
        slot: number of the slot that the batch is for.
        batch: fields of the `Batch`.
        parts: the large values that the batch refers to.
        scratch: folder for scratch folders, on the caller's machine.
        sent: when the request was sent, seconds of the caller's `time.perf_counter`.
    """

    sender: tuple[bytes, int]
    series: str
    board: str
    n_slots: int
    slot: int
    batch: tuple[Any, ...]
    parts: SegmentParts
    scratch: str
    sent: float


class BatchResult(NamedTuple):
    """The outcome of a request.

    Attributes:
        replies: fields of each `Reply`.
        parts: the large values in the replies.
        output: what the tasks printed, logged and warned of, and their progress.
        ran_by: machine, process, thread and interpreter of the worker.
        sees_board: whether the worker opened the caller's board.
        finished: when the batch was done, seconds of the worker's `time.perf_counter`.
    """

    replies: Sequence[tuple[Any, ...]]
    parts: SegmentParts
    output: Sequence[OutputRecord]
    ran_by: tuple[str, int, int, bytes]
    sees_board: bool
    finished: float


class _ThreadState(threading.local):
    """What a thread keeps from one request of a series to the next."""

    series = ""
    worker: HostedWorker
    arena: MessageArena
    board: Board
    sees_board: bool


_INTERPRETER = os.urandom(8)  # a forked child has the same, and another pid
_state = _ThreadState()


def interpreter_id() -> tuple[bytes, int]:
    """Return what identifies this interpreter of this process."""
    return _INTERPRETER, os.getpid()


def run_batch(request: BatchRequest) -> BatchResult:
    """Run the batch of a request in this thread."""
    if _state.series != request.series:
        _prepare_thread(request)
    batch = _on_this_clock(request, Batch._make(request.batch))
    arena = _state.arena
    _state.worker.worker.set_slot(request.slot, _state.board)
    arena.take_in(request.parts)
    try:
        replies = _state.worker.run(batch)
    finally:
        held = arena.empty()
    made = {segment[0]: held[segment[0]] for reply in replies for segment in reply_segments(reply)}
    return BatchResult(
        [tuple(reply) for reply in replies],
        made,
        _state.worker.output.records.take(),
        (platform.node(), os.getpid(), threading.get_ident(), _INTERPRETER),
        _state.sees_board,
        time.perf_counter(),
    )


def shifted(marks: bytes, offset: float) -> bytes:
    """Return the times of a reply, float64 seconds, with an offset added."""
    return array("d", [at + offset for at in array("d", marks)]).tobytes()


def _prepare_thread(request: BatchRequest) -> None:
    """Make what this thread needs for the requests of a series."""
    try:
        _state.board, _state.sees_board = Board(request.board), True
    except OSError:
        _state.board, _state.sees_board = Board.alone(request.n_slots), False
    _state.arena = MessageArena(int.from_bytes(os.urandom(6)), request.scratch if _state.sees_board else None)
    mode: CaptureMode = "off" if request.sender == interpreter_id() else "as_caller"
    _state.worker = HostedWorker(request.slot, _state.arena, _state.board, mode)
    _state.series = request.series


def _on_this_clock(request: BatchRequest, batch: Batch) -> Batch:
    """Convert the end of the run to this machine's clock; the time that the request traveled is the error."""
    if _state.sees_board or batch.facts is None:
        return batch
    facts, packed = batch.facts
    ends_at = facts.ends_at + time.perf_counter() - request.sent
    return batch._replace(facts=(facts._replace(ends_at=ends_at), packed))
