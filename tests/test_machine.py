"""Limits are the least of what several sources say; sizes are read as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar import machine
from forgepar.machine import as_bytes, as_text, available_cpus, available_memory, total_memory


@pytest.fixture
def groups(tmp_path, monkeypatch):
    """A folder in the place of the control groups' files."""
    monkeypatch.setattr(machine, "_GROUPS", str(tmp_path))
    machine._folders.cache_clear()
    yield tmp_path
    machine._folders.cache_clear()


@pytest.mark.parametrize(
    ("quota", "expected"), [("max 100000", None), ("100000 100000", 1), ("150000 100000", 2), ("10000 100000", 1)]
)
def test_cpus_obey_the_quota_of_version_2(groups, quota, expected):
    (groups / "cpu.max").write_text(quota)
    assert machine._quota_cpus() == (expected or 1 << 30)
    assert 1 <= available_cpus() <= machine._quota_cpus()


@pytest.mark.parametrize(("quota", "expected"), [("-1", 1 << 30), ("250000", 3)])
def test_cpus_obey_the_quota_of_version_1(groups, quota, expected):
    (groups / "cpu").mkdir()
    (groups / "cpu" / "cpu.cfs_quota_us").write_text(quota)
    (groups / "cpu" / "cpu.cfs_period_us").write_text("100000")
    machine._folders.cache_clear()
    assert machine._quota_cpus() == expected


def test_no_control_group_is_no_limit(groups):
    assert machine._quota_cpus() == 1 << 30
    assert machine._group_memory() == 1 << 60
    assert 0 < available_memory() < 1 << 60


def test_memory_is_what_the_control_group_has_left(groups):
    (groups / "memory.max").write_text("1000\n")
    (groups / "memory.current").write_text("400\n")
    assert available_memory() == 600
    (groups / "memory.current").write_text("1200\n")
    assert available_memory() == 0


def test_a_control_group_without_limit_says_max(groups):
    (groups / "memory.max").write_text("max\n")
    (groups / "memory.current").write_text("400\n")
    assert machine._group_memory() == 1 << 60


def test_files_that_may_be_dropped_are_not_used_memory(groups):
    (groups / "memory.max").write_text("1000\n")
    (groups / "memory.current").write_text("900\n")
    (groups / "memory.stat").write_text("anon 300\ninactive_file 500\n")
    assert available_memory() == 600
    assert total_memory() == 1000


@pytest.mark.parametrize("version", [1, 2])
def test_groups_below_the_root_count_too(groups, monkeypatch, version):
    top = groups / "memory" if version == 1 else groups
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    (top / "outer" / "inner").mkdir(parents=True)
    for folder, texts in (("outer", ("500", "100")), ("outer/inner", ("9223372036854771712", "50"))):
        for name, text in zip(names, texts, strict=True):
            (top / folder / name).write_text(text)
    own = "4:memory:/outer/inner\n0::/\n" if version == 1 else "0::/outer/inner\n"
    real = machine._text_of
    monkeypatch.setattr(machine, "_text_of", lambda path: own if path == "/proc/self/cgroup" else real(path))
    assert machine._group_memory() == 400
    assert total_memory() == 500


def test_all_there_is_is_more_than_what_can_be_had():
    assert 0 < available_memory() <= total_memory()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (0, 0),
        (123, 123),
        ("123", 123),
        ("2GiB", 2 << 30),
        ("1.5 GiB", 3 << 29),
        ("500MB", 500 * 10**6),
        ("64k", 64_000),
        ("64 KiB", 1 << 16),
        (" 3 tib ", 3 << 40),
        ("7b", 7),
    ],
)
def test_sizes_are_read(size, expected):
    assert as_bytes(size) == expected


@pytest.mark.parametrize("size", ["", "GiB", "-1", "2 GiBs", "1e9", "2 XB", "ib", -1, 1.5, True, None])
def test_what_is_no_size_is_told(size):
    with pytest.raises(ValueError, match=r"size must be a number of bytes, or a string such as"):
        as_bytes(size)


@pytest.mark.parametrize(
    ("n_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (256 << 20, "256.0 MiB"), (5 << 40, "5.0 TiB")],
)
def test_sizes_are_written(n_bytes, text):
    assert as_text(n_bytes) == text


@given(st.integers(0, 1 << 50))
def test_what_is_written_can_be_read(n_bytes):
    assert as_bytes(as_text(n_bytes)) == pytest.approx(n_bytes, rel=0.05, abs=1)
