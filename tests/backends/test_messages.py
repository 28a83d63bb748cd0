"""Messages come out as they went in, and none is ever longer than the limit."""

from __future__ import annotations

import pickle
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.backends import messages as wire
from forgepar.backends.messages import (
    MESSAGE_LIMIT,
    Batch,
    Failure,
    Hello,
    Reply,
    Template,
    accept,
    connect,
    listen,
    pack,
)
from forgepar.backends.messages import unpack as unpack_message
from forgepar.values.arena import Arena


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("arena"))


def batch_of(payload: bytes) -> Batch:
    template = Template(3, 1, ((0, 1), ("how",)), {"shared": (payload[:10],)})
    return Batch(7, 1, 3, 2, b"\1\0\0\0\5\0\0\0", [1, "two", (payload,)], [2.5], b"", [(1, b"fn")], [template], [4])


def reply_of(payload: bytes) -> Reply:
    failure = Failure(1, None, "m.E", "why", "Traceback")
    return Reply(2, 7, 0, [payload, None], b"\0" * 24, failure, True, 0.5, 1 << 30)


def packed_length(message: Batch) -> int:
    return len(pickle.dumps(tuple(message), protocol=5))


@given(st.binary(max_size=200) | st.integers(0, 3 * MESSAGE_LIMIT).map(bytes))
def test_messages_come_out_as_they_went_in(arena, payload):
    for message, kind in ((batch_of(payload), Batch), (reply_of(payload), Reply), (Hello(1, 2), Hello)):
        data = pack(message, arena)
        assert len(data) <= MESSAGE_LIMIT
        loaded = unpack_message(data, kind, arena)
        assert loaded == message
        assert type(loaded) is kind
    assert arena.names() == []


@pytest.mark.parametrize(("extra", "n_segments"), [(-1, 0), (0, 0), (1, 1)])
def test_only_what_is_longer_than_the_limit_takes_a_segment(arena, extra, n_segments):
    frame = packed_length(batch_of(bytes(30_000))) - 30_000
    message = batch_of(bytes(MESSAGE_LIMIT + extra - frame))
    assert packed_length(message) == MESSAGE_LIMIT + extra
    data = pack(message, arena)
    assert len(arena.names()) == n_segments
    assert len(data) <= MESSAGE_LIMIT
    assert unpack_message(data, Batch, arena) == message
    assert arena.names() == []


def test_what_was_unpacked_does_not_need_its_segment(arena):
    message = unpack_message(pack(reply_of(bytes(10**6)), arena), Reply, arena)
    assert arena.names() == []
    assert message.values[0] == bytes(10**6)


@pytest.mark.parametrize("has_packets", [wire._HAS_PACKETS, False])
def test_messages_are_kept_apart_on_a_connection(tmp_path, monkeypatch, has_packets):
    monkeypatch.setattr(wire, "_HAS_PACKETS", has_packets)
    listener = listen(str(tmp_path / "socket"), 1)
    worker = connect(str(tmp_path / "socket"))
    parent = accept(listener)
    try:
        sent = [b"a", b"b" * MESSAGE_LIMIT, b"c" * 10]
        for data in sent:
            worker.send(data)
        assert [parent.receive() for _ in sent] == sent
        parent.send(b"back")
        assert worker.receive() == b"back"
        parent.send(b"again")
        assert worker.receive_awake() == b"again"
        threading.Timer(0.05, parent.send, [b"late"]).start()  # it sleeps by then; without, it would be as right
        assert worker.receive_awake() == b"late"
        worker.close()
        assert parent.receive() == b""
    finally:
        for end in (worker, parent, listener):
            end.close()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a short name for a long path")
def test_a_connection_in_a_folder_of_a_long_name(tmp_path):
    folder = tmp_path / ("long" * 30)
    folder.mkdir()
    listener = listen(str(folder / "socket"), 1)
    worker = connect(str(folder / "socket"))
    parent = accept(listener)
    worker.send(b"hello")
    assert parent.receive() == b"hello"
    for end in (worker, parent, listener):
        end.close()


def test_connecting_to_nobody_fails(tmp_path):
    with pytest.raises(OSError):
        connect(str(tmp_path / "nobody"))
