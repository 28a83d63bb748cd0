"""Segments: written, mapped, freed; and folders that only their owner sees and that go with it."""

from __future__ import annotations

import ast
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
from forgepar.values import arena as arena_module
from forgepar.values import folders
from forgepar.values.arena import Arena
from forgepar.values.folders import open_arena, remove_arena
from forgepar.values.segment import (
    ALIGNMENT,
    LEAST_KEPT,
    is_reused,
    is_spilled,
    maker_of,
    segment_bytes,
    size_class,
    size_of,
)


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


# Keeping and using again

LARGE = bytes(LEAST_KEPT)


def test_a_large_segment_is_used_again(arena):
    first = arena.write([LARGE, b"first"])
    arena.free(first)
    assert arena.names() == []
    second = arena.write([LARGE, b"second"])
    assert is_reused(second[0])
    assert [bytes(view) for view in arena.read(second)] == [LARGE, b"second"]
    assert arena.usage().reused == size_of(second[0])


def test_a_shorter_value_in_a_used_segment_ends_where_it_ends(arena):
    arena.free(arena.write([b"x" * (3 * LEAST_KEPT + 1000)]))
    segment = arena.write([b"y" * (3 * LEAST_KEPT)])
    assert is_reused(segment[0])
    assert bytes(arena.read(segment)[0]) == b"y" * (3 * LEAST_KEPT)


def test_segments_of_other_sizes_are_not_used(arena):
    arena.free(arena.write([LARGE]))
    assert not is_reused(arena.write([LARGE * 2])[0])
    assert not is_reused(arena.write([b"small"])[0])


def test_small_segments_are_not_kept(arena):
    arena.free(arena.write([b"x" * 1000]))
    assert arena.usage()[:3] == (0, 0, 0)


def test_what_somebody_has_mapped_is_not_written_again(arena):
    segment = arena.write([b"x" * LEAST_KEPT])
    (view,) = arena.read(segment)
    arena.free(segment)
    other = arena.write([b"y" * LEAST_KEPT])
    assert not is_reused(other[0])
    assert bytes(view) == b"x" * LEAST_KEPT
    del view
    assert is_reused(arena.write([b"z" * LEAST_KEPT])[0])


def test_what_a_worker_keeps_mapped_is_used_again_once_it_dropped_it(arena):
    worker = Arena(arena.place, keeps_mapped=True)
    segment = arena.write([LARGE])
    assert worker.read(segment)[0].obj is worker.read(segment)[0].obj
    arena.free(segment)
    assert not is_reused(arena.write([LARGE])[0])
    worker.drop([segment[0]])
    assert is_reused(arena.write([LARGE])[0])


def test_a_worker_keeps_few_mapped(arena, monkeypatch):
    monkeypatch.setattr(arena_module, "_MOST_MAPPED", 2)
    worker = Arena(arena.place, keeps_mapped=True)
    segments = [arena.write([LARGE]) for _ in range(3)]
    for segment in segments:
        worker.read(segment)
    assert list(worker._mapped) == [segment[0] for segment in segments[1:]]


def test_half_of_the_budget_may_be_kept(roots):
    arena = open_arena(budget=4 * size_class(LEAST_KEPT))
    segments = [arena.write([LARGE]) for _ in range(4)]
    for segment in segments:
        arena.free(segment)
    assert arena.usage().idle == 2 * size_class(LEAST_KEPT)
    assert arena.usage().peak == 4 * size_class(LEAST_KEPT)
    remove_arena(arena)


# Room


def test_what_is_kept_makes_room(roots):
    arena = open_arena(budget=4 * size_class(LEAST_KEPT))
    for segment in [arena.write([LARGE]) for _ in range(2)]:
        arena.free(segment)
    segment = arena.write([LARGE * 3])
    assert not is_spilled(segment[0])
    assert arena.usage()[1:3] == (size_class(3 * LEAST_KEPT), 0)
    remove_arena(arena)


def test_what_exceeds_the_budget_goes_to_disk(roots):
    memory, temporary = roots
    arena = open_arena(budget=2 * size_class(LEAST_KEPT))
    segments = [arena.write([b"%d" % i * LEAST_KEPT]) for i in range(4)]
    assert [is_spilled(segment[0]) for segment in segments] == [False, False, True, True]
    assert [bytes(arena.read(segment)[0]) for segment in segments] == [b"%d" % i * LEAST_KEPT for i in range(4)]
    assert arena.usage().spilled == 2 * size_class(LEAST_KEPT)
    for segment in segments:
        arena.free(segment)
    assert arena.names() == []
    remove_arena(arena)
    assert list(memory.iterdir()) == list(temporary.iterdir()) == []


def test_without_shared_memory_all_is_on_disk(roots, monkeypatch):
    memory, temporary = roots
    monkeypatch.setattr(folders, "_MEMORY", memory / "missing")
    arena = open_arena()
    segment = arena.write([b"x"])
    assert is_spilled(segment[0])
    assert arena.folder.parent == temporary
    assert bytes(arena.read(segment)[0]) == b"x"
    arena.free(segment)
    assert arena.names() == []
    remove_arena(arena)
    assert list(temporary.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="tells files by /proc")
@pytest.mark.parametrize(("way", "call"), [("write", "writev"), ("grant", "posix_fallocate")])
def test_a_full_shared_memory_sends_values_to_disk(arena, monkeypatch, way, call):
    real = getattr(os, call)

    def full_in_memory(descriptor, *rest):
        if arena.folder in Path(f"/proc/self/fd/{descriptor}").readlink().parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, *rest)

    monkeypatch.setattr(os, call, full_in_memory)
    if way == "write":
        assert bytes(arena.read(arena.write([LARGE]))[0]) == LARGE
    else:
        arena.grant(LEAST_KEPT)[:3] = b"abc"
    assert [is_spilled(name) for name in arena.names()] == [True]
    assert arena.usage().in_use == 0


@pytest.mark.parametrize("error", [OSError(errno.EOPNOTSUPP, "cannot"), AttributeError("posix_fallocate")])
def test_a_segment_is_granted_where_room_cannot_be_reserved(arena, monkeypatch, error):
    def cannot(*_):
        raise error

    monkeypatch.setattr(os, "posix_fallocate", cannot, raising=False)
    mapping = arena.grant(LEAST_KEPT)
    mapping[-3:] = b"end"
    assert mapping[-3:] == b"end"


def test_many_parts_are_written(arena):
    parts = [bytes([i % 256]) * (i % 70) for i in range(3000)]
    assert [bytes(view) for view in arena.read(arena.write(parts))] == parts


def test_what_a_dead_process_had_begun_is_freed(arena):
    code = f"""
from forgepar.values.arena import Arena, Place
arena = Arena(Place(*{tuple(arena.place)!r}))
print([arena.write([bytes(2_000_000)])[0] for _ in range(3)])
"""
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    names = ast.literal_eval(printed)
    mine = arena.write([b"x"])
    arena.free_strays(maker_of(names[0]), frozenset(names[:1]))
    assert arena.names() == sorted([names[0], mine[0]])


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts files by /proc")
def test_more_files_may_be_open_than_at_first(arena):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    segments = [arena.write([b"%d" % i]) for i in range(100)]
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 10, hard))
    try:
        views = [arena.read(segment)[0] for segment in segments]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert [bytes(view) for view in views] == [b"%d" % i for i in range(100)]


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
