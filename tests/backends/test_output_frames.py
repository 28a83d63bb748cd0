"""pandas and Arrow objects come back as they were; what can be shared of large ones is."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from forgepar.values.arena import Arena
from forgepar.values.codec import decode, encode, is_segment

pd = pytest.importorskip("pandas")
hpd = pytest.importorskip("hypothesis.extra.pandas")
N = 50_000


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("arena"))


def round_trip(value, arena):
    wire = encode(value, arena)
    loaded = decode(wire, arena)
    if is_segment(wire):
        arena.free(wire)
    assert arena.names() == []
    return loaded


FRAMES = hpd.data_frames(
    [
        hpd.column("i", dtype="int32"),
        hpd.column("f", dtype="float64"),
        hpd.column("b", dtype="bool"),
        hpd.column("when", dtype="datetime64[ns]"),
        hpd.column("text", elements=st.text(max_size=5)),
    ],
    index=hpd.range_indexes(max_size=8),
)


@settings(deadline=None, max_examples=50)
@given(FRAMES, st.booleans())
def test_frames_come_back_as_they_were(arena, frame, in_dict):
    loaded = round_trip({"frame": frame}, arena)["frame"] if in_dict else round_trip(frame, arena)
    pd.testing.assert_frame_equal(loaded, frame)


@settings(deadline=None, max_examples=25)
@given(hpd.series(dtype="float32", index=hpd.indexes(dtype="int64", max_size=8)))
def test_series_come_back_as_they_were(arena, series):
    pd.testing.assert_series_equal(round_trip(series, arena), series)


def large_frame():
    return pd.DataFrame(
        {
            "i": range(N),
            "f": [i / 7 for i in range(N)],
            "when": pd.date_range("2000", periods=N, freq="s"),
            "kind": pd.Categorical(["a", "b", "c", "d", "e"] * (N // 5)),
            "text": [str(i) for i in range(N)],
            "maybe": pd.array([None, 1] * (N // 2), dtype="Int64"),
        }
    )


def test_a_large_frame_is_shared(arena):
    frame = large_frame()
    wire = encode(frame, arena)
    assert is_segment(wire)
    loaded = decode(wire, arena)
    arena.free(wire)
    pd.testing.assert_frame_equal(loaded, frame)
    assert not loaded["f"].to_numpy().flags.writeable
    assert loaded["f"].sum() == frame["f"].sum()


def test_a_large_frame_can_be_worked_on_as_a_copy(arena):
    frame = round_trip(large_frame(), arena).copy()
    frame.loc[0, "f"] = 5.0
    assert frame.loc[0, "f"] == 5.0


def test_an_arrow_table_is_shared(arena):
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"i": list(range(N)), "text": [str(i) for i in range(N)]})
    wire = encode(table, arena)
    assert is_segment(wire)
    assert len(wire) > 3  # its buffers lie beside its pickle
    assert decode(wire, arena).equals(table)
    arena.free(wire)


def test_text_backed_by_arrow_is_shared(arena):
    pytest.importorskip("pyarrow")
    series = pd.Series([str(i) for i in range(N)], dtype="string[pyarrow]")
    wire = encode(series, arena)
    assert is_segment(wire)
    pd.testing.assert_series_equal(decode(wire, arena), series)
    arena.free(wire)
