"""Frames count by what is in them, not by how pandas holds it; compiled functions and models by what makes them."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from forgepar.store.fingerprint.digester import digest_of

pd = pytest.importorskip("pandas", reason="pandas is in the extra test")


def of(value: object) -> bytes:
    return digest_of(value).data


def columns(n: int = 6) -> dict[str, object]:
    return {
        "int": np.arange(n),
        "float": np.arange(n) / 8,
        "more": np.arange(n) * 1.5,
        "text": ["a", "b", None, "d", "é", "f"][:n],
        "when": pd.date_range("2024-01-01", periods=n),
        "zone": pd.date_range("2024-01-01", periods=n, tz="Europe/Berlin"),
        "took": pd.to_timedelta(range(n), unit="s"),
        "kind": pd.Categorical(["x", "y", "x", "y", "y", "x"][:n]),
        "maybe": pd.array([1, None, 3, 4, 5, 6][:n], dtype="Int64"),
        "truth": pd.array([True, None, False, True, True, False][:n], dtype="boolean"),
        "span": pd.interval_range(0, n, periods=n),
        "month": pd.period_range("2024-01", periods=n, freq="M"),
        "sparse": pd.arrays.SparseArray([0, 0, 1, 0, 2, 0][:n]),
        "any": np.array([1, "a", None, (1,), 2.5, b"x"][:n], object),
    }


def one_by_one(n: int = 6) -> pd.DataFrame:
    """The same columns, added one after the other: none of them lie together."""
    frame = pd.DataFrame(index=range(n))
    for name, values in columns(n).items():
        frame[name] = values
    return frame


def test_how_a_frame_came_to_be_makes_no_difference():
    frame = pd.DataFrame(columns())
    wide = pd.concat([frame, frame], axis=1).iloc[:, : len(frame.columns)]
    long = pd.concat([frame.iloc[:3], frame.iloc[3:]])
    more = pd.DataFrame({"extra": 0, **columns()}).drop(columns="extra")
    turned = frame[list(reversed(frame.columns))][list(frame.columns)]
    for other in (one_by_one(), frame.copy(), wide, long, more, turned, pickle.loads(pickle.dumps(frame))):
        assert of(other) == of(frame)


def test_slices_count_as_what_they_hold():
    frame, longer = pd.DataFrame(columns(4)), pd.DataFrame(columns(6))
    for name in frame:
        assert of(longer.iloc[:4][name]) == of(frame[name]), name
    assert of(longer.iloc[:4]) == of(frame)


@pytest.mark.parametrize("name", columns())
def test_a_changed_item_counts(name):
    frame = pd.DataFrame(columns())
    other = frame.copy()
    other[name] = frame[name].iloc[::-1].reset_index(drop=True)
    assert of(other) != of(frame)
    assert of(other[name]) != of(frame[name])
    assert of(other[name].array) != of(frame[name].array)
    assert of(pd.Index(other[name])) != of(pd.Index(frame[name]))


def test_other_frames():
    frame = pd.DataFrame({"a": [1, 2], "b": [3.0, 4.0]})
    marked, strict = frame.copy(), frame.set_flags(allows_duplicate_labels=False)
    marked.attrs["unit"] = "m"
    others = [
        frame,
        frame[["b", "a"]],
        frame.rename(columns={"a": "c"}),
        frame.set_index("a"),
        frame.set_axis([0, 2]),
        frame.set_axis(["0", "1"]),
        frame.rename_axis("i"),
        frame.rename_axis(columns="i"),
        frame.astype({"a": "int32"}),
        frame.astype("float64"),
        frame.astype("Int64"),
        frame.astype(object),
        frame.iloc[:1],
        frame.iloc[:0],
        frame.T,
        marked,
        strict,
        frame["a"],
        frame["b"],
        frame["a"].rename("c"),
        frame["a"].rename(None),
        frame["a"].to_numpy(),
        frame["a"].array,
        frame.index,
        frame.columns,
        pd.DataFrame(),
        pd.DataFrame(index=[1]),
        pd.DataFrame(columns=["a"]),
        pd.Series([], dtype="float64"),
        pd.Series([], dtype="int64"),
        pd.Series([1.0, None]),
        pd.Series([1.0, None], dtype="Float64"),
        pd.Series(["a"], dtype="category"),
        pd.Series(["a"], dtype="string"),
        pd.Series(["a"], dtype=object),
        pd.Series(pd.Categorical(["a"], ordered=True)),
        pd.Series(pd.Categorical(["a"], categories=["a", "b"])),
        pd.Series(pd.Categorical(["b"], categories=["a", "b"])),
    ]
    assert len({of(other) for other in others}) == len(others)


def test_what_is_missing_holds_nothing():
    one = pd.array([1, 2, 3], dtype="Int64")
    other = pd.array([1, 7, 3], dtype="Int64")
    assert of(one) != of(other)
    one[1] = other[1] = pd.NA
    assert of(one) == of(other)


def test_indexes():
    months = pd.MultiIndex.from_product([["a", "b"], [1, 2]], names=["x", "y"])
    others = [
        pd.RangeIndex(3),
        pd.RangeIndex(1, 4),
        pd.RangeIndex(3, name="a"),
        pd.Index([0, 1, 2]),
        pd.Index([0, 1, 2.0]),
        pd.Index(["a"]),
        pd.date_range("2024-01-01", periods=3),
        pd.date_range("2024-01-01", periods=3, tz="UTC"),
        pd.DatetimeIndex(["2024-01-01", "2024-01-02", "2024-01-03"]),
        pd.period_range("2024-01", periods=3, freq="M"),
        pd.CategoricalIndex(["a"]),
        months,
        months.rename(["x", "z"]),
        months[:2],
        months[2:],
    ]
    assert len({of(other) for other in others}) == len(others)
    for other in others:
        assert of(other) == of(other.copy()) == of(pickle.loads(pickle.dumps(other)))
    assert of(months[:2]) == of(pd.MultiIndex.from_arrays([["a", "a"], [1, 2]], names=["x", "y"]))


def test_looking_at_a_frame_makes_no_difference():
    frame = pd.DataFrame(columns())
    before = of(frame)
    frame["int"], frame.index.is_unique, frame.columns.get_loc("int"), frame.loc[3]
    frame.sort_values("float"), frame["kind"].cat.codes, frame.groupby("kind", observed=True).size(), repr(frame)
    assert of(frame) == before


class Named(pd.DataFrame):
    _metadata = ["unit"]  # noqa: RUF012

    @property
    def _constructor(self):
        return Named


def test_a_derived_frame_counts_with_what_it_keeps():
    one, other = Named({"a": [1]}), Named({"a": [1]})
    one.unit = other.unit = "m"
    assert of(one) == of(other) != of(pd.DataFrame({"a": [1]}))
    other.unit = "km"
    assert of(one) != of(other)


def test_scalars_and_types():
    others = [
        pd.NA,
        pd.NaT,
        pd.Timestamp("2024-01-01"),
        pd.Timestamp("2024-01-01", tz="UTC"),
        pd.Timestamp("2024-01-01", tz="Europe/Berlin"),
        pd.Timedelta(1, "s"),
        pd.Period("2024-01", "M"),
        pd.Interval(0, 1),
        pd.Interval(0, 1, closed="both"),
        pd.offsets.Day(2),
        pd.CategoricalDtype(["a"]),
        pd.CategoricalDtype(["b"]),
        pd.Int64Dtype(),
        pd.DatetimeTZDtype(tz="UTC"),
    ]
    assert len({of(other) for other in others}) == len(others)
    for other in others:
        assert of(other) == of(pickle.loads(pickle.dumps(other)))


def test_arrow_columns():
    pytest.importorskip("pyarrow", reason="pyarrow is in the extra test")
    for dtype, items in (("int64[pyarrow]", [1, None, 3, 4]), ("string[pyarrow]", ["a", None, "c", "d"])):
        whole = pd.Series(items, dtype=dtype)
        parts = pd.concat([whole.iloc[:1], whole.iloc[1:]])
        assert of(parts) == of(whole) == of(pd.Series([*items, items[0]], dtype=dtype).iloc[:4])
        assert of(whole.iloc[::-1]) != of(whole)


def test_in_other_processes():
    lines = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import test_third_party as t\n"
        "print(t.of(t.one_by_one()).hex(), t.of(t.pd.DataFrame(t.columns())).hex())"
    )
    expected = of(pd.DataFrame(columns())).hex()
    command = [sys.executable, "-c", lines, __file__.rpartition("/")[0]]
    done = subprocess.run(command, capture_output=True, text=True, env={"PYTHONHASHSEED": "1"}, check=True)
    assert done.stdout.split() == [expected, expected]


def printed(folder, source: str, *arguments: str, seed: str = "1") -> list[str]:
    (folder / "guests.py").write_text(
        "import sys\nfrom forgepar.store.fingerprint.digester import digest_of\n" + textwrap.dedent(source)
    )
    known = {**os.environ, "PYTHONHASHSEED": seed}
    command = [sys.executable, "guests.py", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=known, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


COMPILED = """
    import numba
    import numpy as np
    K = 1

    @numba.njit(fastmath=True)
    def one(x): return x + K

    @numba.vectorize
    def each(x): return x + K

    @numba.njit("f8(f8)")
    def typed(x): return x + K

    if sys.argv[1:]:
        one(1), each(np.arange(3.0))
    for value in (one, each, typed, lambda x: one(x) + each(x)):
        print(digest_of(value).data.hex())
"""


def test_compiled_functions(tmp_path):
    pytest.importorskip("numba", reason="numba is in no extra")
    before = printed(tmp_path, COMPILED)
    assert before == printed(tmp_path, COMPILED, seed="2") == printed(tmp_path, COMPILED, "call", seed="3")
    assert not set(before) & set(printed(tmp_path, COMPILED.replace("K = 1", "K = 2")))
    assert [a == b for a, b in zip(before, printed(tmp_path, COMPILED.replace("fastmath=True", "")), strict=True)] == [
        False,
        True,
        True,
        False,
    ]
    assert printed(tmp_path, COMPILED.replace("f8(f8)", "f4(f4)"))[2] != before[2]


MODELS = """
    import pydantic
    K = 1

    class Model(pydantic.BaseModel):
        x: int = 3
        y: list[str] = pydantic.Field(default_factory=lambda: ["a"])

        @pydantic.field_validator("x", mode="after")
        @classmethod
        def check(cls, value): return value + K

    @pydantic.validate_call
    def call(x: int): return x

    if sys.argv[1:]:
        Model(x=4), call(3), Model.model_json_schema()
    for value in (Model, Model(x=1), lambda: Model(), call):
        print(digest_of(value).data.hex())
"""


def test_models(tmp_path):
    pytest.importorskip("pydantic", reason="pydantic is in no extra")
    before = printed(tmp_path, MODELS)
    assert before == printed(tmp_path, MODELS, seed="2") == printed(tmp_path, MODELS, "use", seed="3")
    changes = [("= 3", "= 4"), ('"a"]', '"b"]'), ('"after"', '"before"'), ("+ K", "- K"), ("K = 1", "K = 2")]
    changes += [("    x: int", "    x: float"), ("list[str]", "list"), ("y:", "z:")]
    for old, new in changes:
        after = printed(tmp_path, MODELS.replace(old, new))
        assert not set(before[:3]) & set(after), old
        assert after[3] == before[3], old
    assert printed(tmp_path, MODELS.replace("call(x: int)", "call(x: float)"))[3] != before[3]
