"""Segments: written, mapped, freed; and folders that only their owner sees and that go with it."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from forgepar.errors import ArenaFull
from forgepar.values import folders
from forgepar.values.arena import Arena
from forgepar.values.folders import open_arena, remove_arena
from forgepar.values.segment import ALIGNMENT, segment_bytes


@pytest.fixture
def roots(tmp_path, monkeypatch):
    """Two folders in the place of shared memory and the temporary folder."""
    memory, temporary = tmp_path / "memory", tmp_path / "temporary"
    memory.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(folders, "_MEMORY", memory)
    monkeypatch.setattr(folders, "_LEAST_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    return memory, temporary


@pytest.fixture
def arena(roots):
    arena = open_arena()
    yield arena
    remove_arena(arena)


@pytest.fixture(scope="module")
def shared_arena(tmp_path_factory):
    return Arena(tmp_path_factory.mktemp("arena"))


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Segments


@given(st.lists(st.binary(max_size=300), min_size=1).filter(any))
def test_parts_come_back_as_they_were_written(shared_arena, parts):
    segment = shared_arena.write(parts)
    views = shared_arena.read(segment)
    assert [bytes(view) for view in views] == parts
    assert segment_bytes(segment) == sum(map(len, parts))
    shared_arena.free(segment)


@pytest.mark.parametrize("parts", [[], [b""], [b"", b""]])
def test_a_segment_of_nothing_comes_back(arena, parts):
    assert [bytes(view) for view in arena.read(arena.write(parts))] == parts


def test_parts_begin_at_multiples_of_the_alignment(arena):
    np = pytest.importorskip("numpy")
    views = arena.read(arena.write([b"x", b"y" * 65, b"", b"z" * 64, b"w"]))
    assert [np.frombuffer(view, np.uint8).ctypes.data % ALIGNMENT for view in views if view] == [0] * 4


def test_views_cannot_be_written(arena):
    (view,) = arena.read(arena.write([b"abc"]))
    assert view.readonly
    with pytest.raises(TypeError):
        view[0] = 0


def test_a_part_may_be_a_view(arena):
    assert bytes(arena.read(arena.write([memoryview(bytearray(b"abc"))[1:]]))[0]) == b"bc"


def test_names_are_the_segments_there_are(arena):
    segments = [arena.write([b"x"]) for _ in range(3)]
    assert len({segment[0] for segment in segments}) == 3
    assert arena.names() == sorted(segment[0] for segment in segments)
    arena.free(segments[1])
    assert arena.names() == sorted((segments[0][0], segments[2][0]))


def test_files_that_are_no_segments_are_not_named(arena):
    (arena.folder / "board").touch()
    assert arena.names() == []


def test_a_segment_may_be_freed_twice(arena):
    segment = arena.write([b"x"])
    arena.free(segment)
    arena.free(segment)
    with pytest.raises(FileNotFoundError):
        arena.read(segment)


@pytest.mark.parametrize("end", ["free", "remove"])
def test_a_mapping_outlives_its_segment(arena, end):
    segment = arena.write([b"first", b"second" * 10_000])
    views = arena.read(segment)
    if end == "free":
        arena.free(segment)
    else:
        remove_arena(arena)
    assert [bytes(view) for view in views] == [b"first", b"second" * 10_000]


def test_others_attach_by_the_folder(arena):
    other = Arena(arena.folder)
    segment = other.write([b"x"])
    assert bytes(arena.read(segment)[0]) == b"x"
    assert arena.names() == other.names()


def test_a_full_disk_leaves_no_part_of_a_segment(arena, monkeypatch):
    written = []
    write = os.writev

    def full(descriptor, data):
        if written:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        written.append(write(descriptor, [b"".join(data)[:7]]))
        return written[-1]

    monkeypatch.setattr(os, "writev", full)
    with pytest.raises(ArenaFull, match=os.strerror(errno.ENOSPC)):
        arena.write([b"x" * 100, b"y" * 100])
    monkeypatch.undo()
    assert written
    assert arena.names() == []


def test_a_write_that_takes_a_part_only_is_gone_on_with(arena, monkeypatch):
    write = os.writev
    monkeypatch.setattr(os, "writev", lambda descriptor, parts: write(descriptor, [b"".join(parts)[:7]]))
    parts = [b"0123456789" * 5, b"abc"]
    assert [bytes(view) for view in arena.read(arena.write(parts))] == parts


# Folders


def test_only_the_owner_may_look(roots):
    before = os.umask(0)
    try:
        arena = open_arena()
        segment = arena.write([b"x"])
    finally:
        os.umask(before)
    assert mode(arena.folder) == 0o700
    assert mode(arena.folder / segment[0]) == 0o600
    remove_arena(arena)


def test_removing_takes_everything_and_may_be_done_twice(arena):
    arena.write([b"x"])
    (arena.folder / "board").touch()
    remove_arena(arena)
    assert not arena.folder.exists()
    remove_arena(arena)


def test_arenas_of_one_process_are_apart(roots):
    one, other = open_arena(), open_arena()
    assert one.folder != other.folder
    remove_arena(one)
    assert other.folder.is_dir()
    remove_arena(other)


def test_shared_memory_is_taken_where_it_has_room(roots, monkeypatch):
    memory, temporary = roots
    roomy = open_arena()
    assert roomy.folder.parent == memory
    monkeypatch.setattr(folders, "_LEAST_MEMORY", 1 << 62)
    assert open_arena().folder.parent == temporary
    monkeypatch.setattr(folders, "_MEMORY", memory / "missing")
    assert open_arena().folder.parent == temporary


# Sweeping


def left_by(pid: int, start: str, root: Path, uid: int | None = None) -> Path:
    """A folder as a process of this pid and start time would have left it."""
    folder = root / f"forgepar-{os.getuid() if uid is None else uid}-{pid}-{start}-0123abcd"
    folder.mkdir()
    (folder / f"{pid}-0").write_bytes(b"x")
    return folder


@pytest.fixture
def child():
    """A process that runs until its standard input is closed."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL)
    yield process
    process.stdin.close()
    process.wait()


def start_of(pid: int) -> str:
    """The start time that an arena made by this process has in its name."""
    return folders._start_time(pid)


def test_what_dead_owners_left_is_swept_from_both_roots(roots, child):
    folders = [left_by(child.pid, start_of(child.pid), root) for root in roots]
    child.stdin.close()
    child.wait()
    remove_arena(open_arena())
    assert not any(folder.exists() for folder in folders)


def test_what_living_owners_have_is_kept(roots, child):
    folders = [left_by(child.pid, start_of(child.pid), root) for root in roots]
    mine = open_arena()
    remove_arena(open_arena())
    assert all((folder / f"{child.pid}-0").exists() for folder in folders)
    assert mine.folder.is_dir()


def test_an_owner_that_ended_but_was_not_waited_for_is_dead(roots, child):
    folder = left_by(child.pid, start_of(child.pid), roots[0])
    child.stdin.close()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    remove_arena(open_arena())
    assert not folder.exists()


def test_a_pid_that_another_process_has_now_is_no_living_owner(roots, child):
    folder = left_by(child.pid, "1", roots[0])
    remove_arena(open_arena())
    assert not folder.exists()


def test_a_living_owner_is_known_after_the_clock_was_set(roots, child, monkeypatch):
    """Seconds since the epoch are the boot time plus what never changes; setting the clock moves the boot time."""
    folder = left_by(child.pid, start_of(child.pid), roots[0])
    boot_time = psutil._psplatform.boot_time
    monkeypatch.setattr(psutil._psplatform, "boot_time", lambda: boot_time() + 1.0)
    remove_arena(open_arena())
    assert folder.exists()


@pytest.mark.parametrize("name", ["notes", "7", "x-y-z", "7-8"])
def test_folders_of_other_names_are_left_alone(roots, name):
    folder = roots[1] / f"forgepar-{os.getuid()}-{name}"
    folder.mkdir()
    remove_arena(open_arena())
    assert folder.is_dir()


def test_folders_of_other_users_are_left_alone(roots):
    folder = left_by(2**22 + 1, "1", roots[1], uid=os.getuid() + 1)
    remove_arena(open_arena())
    assert folder.is_dir()


def test_a_folder_that_another_sweep_removes_first_is_no_fault(roots, child, monkeypatch):
    folder = left_by(child.pid, "1", roots[0])

    def removed_meanwhile(pid):
        folders._remove(folder)
        return "2"

    monkeypatch.setattr(folders, "_start_time", removed_meanwhile)
    remove_arena(open_arena())
    assert not folder.exists()
