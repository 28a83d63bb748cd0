"""What runs a batch where others own the workers: one call that brings all it needs, and answers with all it made.

    FuturesBackend --Parcel--> executor.submit(run_parcel, parcel) --Answer--> FuturesBackend

Whoever calls it may be a thread of the sender's process, another process, interpreter or machine, and another one for
each batch. So nothing is counted on to be there; callables that are there are not unpickled again.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from array import array
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from forgepar import contexts
from forgepar.backends import surroundings
from forgepar.backends.board import Board
from forgepar.backends.output import Notes, Rules, Said, overheard
from forgepar.backends.wire import Batch, Reply
from forgepar.backends.worker import Worker, be_inside
from forgepar.values.baggage import Baggage, Parts
from forgepar.values.codec import is_segment
from forgepar.values.segment import Segment


class Parcel(NamedTuple):
    """A batch with all that it takes.

    Attributes:
        sender: `here` of the process that sends it.
        series: text of its own for all parcels of one open backend.
        board: path of the board, for whoever can open it.
        n_slots: how many rows that has.
        slot: the slot that the batch fills.
        batch: its fields.
        parts: the large values that it refers to.
        scratch: the folder that scratch folders go to, on the sender's machine.
        sent: when it was sent, `time.perf_counter` seconds of the sender.
    """

    sender: tuple[bytes, int]
    series: str
    board: str
    n_slots: int
    slot: int
    batch: tuple[Any, ...]
    parts: Parts
    scratch: str
    sent: float


class Answer(NamedTuple):
    """What came of a parcel.

    Attributes:
        replies: fields of the `Reply` objects.
        parts: the large values among them.
        said: what the tasks told.
        who: machine, process, thread and interpreter that ran it.
        sees_board: whether it is on the sender's machine.
        told: when it was done, `time.perf_counter` seconds of whoever ran it.
    """

    replies: Sequence[tuple[Any, ...]]
    parts: Parts
    said: Sequence[Said]
    who: tuple[str, int, int, bytes]
    sees_board: bool
    told: float


class _Desk(threading.local):
    """What a thread keeps between the parcels of one series."""

    series = ""
    worker: Worker
    baggage: Baggage
    board: Board
    sees_board: bool


_MARK = os.urandom(8)  # of this interpreter; a forked child has the same, and another pid
_desk = _Desk()
_listening = threading.Lock()  # streams are one for the whole process


def here() -> tuple[bytes, int]:
    """Return what tells this interpreter of this process from any other."""
    return _MARK, os.getpid()


def run_parcel(parcel: Parcel) -> Answer:
    """Run a batch, whoever this is."""
    is_sender = parcel.sender == here()
    if not is_sender:
        be_inside()
    if _desk.series != parcel.series:
        _furnish(parcel)
    batch = Batch._make(parcel.batch)
    assert batch.facts is not None, "a parcel brings all that it takes"
    rules = surroundings.unpack(batch.facts[1]).rules
    worker, baggage = _desk.worker, _desk.baggage
    worker.sit(parcel.slot, _desk.board)
    baggage.take_in(parcel.parts)
    try:
        with contexts.here(worker.context):
            batch = _thinned(worker, _on_this_clock(parcel, batch))
            replies, said = _overhear(worker, batch, rules, listens=not is_sender)
    finally:
        held = baggage.empty()
    made = {wire[0]: held[wire[0]] for reply in replies for wire in _large(reply)}
    who = (platform.node(), os.getpid(), threading.get_ident(), _MARK)
    return Answer([tuple(reply) for reply in replies], made, said, who, _desk.sees_board, time.perf_counter())


def on_clock(marks: bytes, offset: float) -> bytes:
    """Return a reply's marks as another machine's clock would have had them."""
    return array("d", [at + offset for at in array("d", marks)]).tobytes()


def _furnish(parcel: Parcel) -> None:
    try:
        _desk.board, _desk.sees_board = Board(parcel.board), True
    except OSError:
        _desk.board, _desk.sees_board = Board.alone(parcel.n_slots), False
    _desk.baggage = Baggage(int.from_bytes(os.urandom(6)), parcel.scratch if _desk.sees_board else None)
    _desk.worker = Worker(parcel.slot, _desk.baggage, _desk.board)
    _desk.series = parcel.series


def _on_this_clock(parcel: Parcel, batch: Batch) -> Batch:
    """Have the run end by this machine's clock, as near as can be told."""
    if _desk.sees_board or batch.facts is None:
        return batch
    facts, packed = batch.facts
    ends_at = facts.ends_at + time.perf_counter() - parcel.sent
    return batch._replace(facts=(facts._replace(ends_at=ends_at), packed))


def _thinned(worker: Worker, batch: Batch) -> Batch:
    """Take out of a batch what the worker has unpickled before."""
    callables, templates = worker.knows(batch.run)
    return batch._replace(
        callables=[known for known in batch.callables if known[0] not in callables],
        templates=[template for template in batch.templates if template.number not in templates],
    )


def _overhear(worker: Worker, batch: Batch, rules: Rules, *, listens: bool) -> tuple[list[Reply], Sequence[Said]]:
    """Run a batch; return its replies, and what was told meanwhile, where it would not be seen by itself."""
    worker.voice = notes = Notes(worker.task_number)
    has_streams = listens and _listening.acquire(blocking=False)
    try:
        with overheard(rules, notes) if has_streams else nullcontext():
            return list(worker.run(batch)), notes.said
    finally:
        worker.let_go()
        if has_streams:
            _listening.release()


def _large(reply: Reply) -> Iterator[Segment]:
    """Yield the large values of a reply."""
    yield from filter(is_segment, reply.values)
    for _, wire in reply.subflows:
        if is_segment(wire):
            yield wire
