"""Segments: written, mapped, freed; and folders that only their owner sees and that go with it."""

from __future__ import annotations

import ast
import contextlib
import errno
import itertools
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from unsharing import unshared

import forgepar as fp
from forgepar.backends.process import START_METHODS
from forgepar.errors import ArenaFull
from forgepar.system import life_locks as lifelocks
from forgepar.values import arena as arena_module
from forgepar.values import arena_folders as folders
from forgepar.values.arena import Arena
from forgepar.values.arena_folders import open_arena, remove_arena
from forgepar.values.segments import (
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
from forgepar.values.arena import Arena, ArenaLocation
arena = Arena(ArenaLocation(*{tuple(arena.place)!r}))
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


def interrupted_at(line):
    """Return what raises at the so many-th line of the module that makes folders, as a signal would."""

    def trace(frame, event, _):
        nonlocal line
        if frame.f_code.co_filename != folders.__file__:
            return None
        if event == "line":
            line -= 1
            if line == 0:
                raise KeyboardInterrupt
        return trace

    return trace


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of what was open to list a folder
def test_a_start_that_was_interrupted_anywhere_leaves_no_folder(roots):
    for line in itertools.count(1):
        sys.settrace(interrupted_at(line))
        try:
            arena = open_arena(2)
        except KeyboardInterrupt:
            assert [*roots[0].iterdir(), *roots[1].iterdir()] == [], line
        else:
            break
        finally:
            sys.settrace(None)
    remove_arena(arena)
    assert line > 20


def test_a_start_that_finds_no_room_leaves_no_folder(roots, monkeypatch):
    monkeypatch.setattr(folders, "_LEAST_MEMORY", 1 << 62)
    monkeypatch.setattr(folders.UsageMeter, "create", raising(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        open_arena()
    assert [*roots[0].iterdir(), *roots[1].iterdir()] == []


def failing_at(monkeypatch, module, name, *which, error=errno.EMFILE):
    """Have some calls of a function fail, by number from 1; return the arguments of all calls."""
    original, calls = getattr(module, name), []

    def call(*arguments, **more):
        calls.append(arguments)
        if len(calls) in which:
            raise OSError(error, os.strerror(error))
        return original(*arguments, **more)

    monkeypatch.setattr(module, name, call)
    return calls


def test_removing_is_tried_twice_where_descriptors_ran_out(roots, monkeypatch):
    arena = open_arena()
    (arena.folder / "value").touch()
    failing_at(monkeypatch, folders.os, "scandir", 1)
    remove_arena(arena)
    assert [*roots[0].iterdir(), *roots[1].iterdir()] == []


def test_what_cannot_be_removed_keeps_its_lock_file_so_that_another_run_sweeps_it(roots, monkeypatch):
    arena = open_arena()
    left = arena.folder / "value"
    left.touch()
    with monkeypatch.context() as patched:
        unlink = os.unlink
        refused = []

        def refuse(path, *more, **others):
            if Path(path) == left:
                refused.append(path)
                raise PermissionError(errno.EPERM, "no")
            unlink(path, *more, **others)

        patched.setattr(folders.os, "unlink", refuse)
        remove_arena(arena)
    assert len(refused) == 2
    assert {path.name for path in arena.folder.iterdir()} == {"value", "owner"}
    assert not lifelocks.is_held(folders.owner_file(arena.folder))
    sweep()
    assert [*roots[0].iterdir(), *roots[1].iterdir()] == []


def test_links_in_a_folder_are_removed_and_not_what_they_lead_to(roots, tmp_path):
    arena = open_arena()
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    (arena.folder / "link").symlink_to(tmp_path / "kept", target_is_directory=True)
    (arena.folder / "own").mkdir()
    (arena.folder / "own" / "file").touch()
    remove_arena(arena)
    assert (tmp_path / "kept" / "file").exists()
    assert [*roots[0].iterdir(), *roots[1].iterdir()] == []


def test_where_no_lock_can_be_made_in_shared_memory_the_arena_is_on_disk(roots, monkeypatch):
    failing_at(monkeypatch, folders, "hold", 2, error=errno.ENOSPC)  # the first is of the temporary folder
    arena = open_arena()
    assert list(roots[0].iterdir()) == []
    assert str(arena.folder) == arena.place.spill_folder
    assert arena.folder.parent == roots[1]
    assert arena.place.budget == 0
    remove_arena(arena)
    assert list(roots[1].iterdir()) == []


def test_a_folder_that_is_removed_again_and_again_is_given_up(roots, monkeypatch):
    calls = []

    def hold(path):
        calls.append(path)
        Path(path).parent.rmdir()
        raise FileNotFoundError(errno.ENOENT, "gone", path)

    monkeypatch.setattr(folders, "hold", hold)
    with pytest.raises(FileNotFoundError, match="Set TMPDIR to another folder") as caught:
        open_arena()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOENT, str(roots[1]))
    assert len(set(calls)) == folders._ATTEMPTS
    assert [*roots[0].iterdir(), *roots[1].iterdir()] == []


@pytest.mark.parametrize(
    ("free", "available", "budget", "expected"),
    [
        (1000, 3000, None, 900),  # nine tenths of what is free there
        (5000, 3000, None, 1500),  # half of what the machine has
        (5000, 3000, 700, 700),
        (1000, 3000, 2000, 900),
    ],
)
def test_the_budget_is_what_is_asked_for_or_half_of_the_memory_within_what_is_free(
    roots, monkeypatch, free, available, budget, expected
):
    monkeypatch.setattr(folders.os, "statvfs", lambda path: SimpleNamespace(f_bavail=free // 10, f_frsize=10))
    monkeypatch.setattr(folders, "available_memory", lambda: available)
    arena = open_arena(budget=budget)
    assert arena.place.budget == expected
    assert arena.folder.parent == roots[0]
    remove_arena(arena)


@pytest.mark.parametrize(("least", "is_used"), [(900, True), (901, False)])
def test_shared_memory_is_used_from_some_free_space_on(roots, monkeypatch, least, is_used):
    monkeypatch.setattr(folders.os, "statvfs", lambda path: SimpleNamespace(f_bavail=100, f_frsize=10))
    monkeypatch.setattr(folders, "_LEAST_MEMORY", least)
    arena = open_arena()
    assert (arena.folder.parent == roots[0]) is is_used
    remove_arena(arena)


def test_shared_memory_that_may_not_be_written_counts_as_none(roots, monkeypatch):
    monkeypatch.setattr(folders.os, "access", lambda path, how: how != os.W_OK)
    assert folders._free_memory() == 0
    monkeypatch.setattr(folders.os, "access", lambda path, how: True)
    assert folders._free_memory() > 0
    monkeypatch.setattr(folders.os, "statvfs", raising(FileNotFoundError(errno.ENOENT, "no")))
    assert folders._free_memory() == 0


def test_a_temporary_folder_in_shared_memory_takes_one_folder(roots, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(roots[0]))
    arena = open_arena()
    assert [str(path) for path in roots[0].iterdir()] == [arena.place.spill_folder] == [str(arena.folder)]
    remove_arena(arena)


@pytest.mark.parametrize("n_workers", [0, 3])
def test_an_arena_has_a_meter_for_each_worker_and_its_owner(roots, n_workers):
    arena = open_arena(n_workers)
    assert arena.place.n_columns == n_workers + 1
    assert mode(arena.folder) == mode(arena.folder / folders.IDLE) == mode(Path(arena.place.spill_folder)) == 0o700
    remove_arena(arena)


def test_one_folder_that_cannot_be_swept_does_not_keep_others(roots, monkeypatch):
    names = [f"forgepar-{os.getuid()}-7-k0{i}" for i in range(3)]
    for name in names:
        (roots[0] / name).mkdir()
    failing_at(monkeypatch, folders, "_is_mine", 2)
    sweep()
    assert len([path for path in roots[0].iterdir() if path.name in names]) == 1


def raising(error):
    def fail(*_):
        raise error

    return fail


# Sweeping

OWNER = """
import os, signal, sys
from forgepar.values import arena_folders as folders
folders._MEMORY = folders.Path(sys.argv[1])
os.environ["TMPDIR"] = sys.argv[2]
arena = folders.open_arena()
if "fork" not in sys.argv or os.fork() == 0:  # in the child, once its copies are closed
    print(arena.place.folder, arena.place.spill_folder, flush=True)
signal.pause()
"""


class Owner:
    """A process that has an arena, and what it is a part of."""

    def __init__(self, roots, *options, before=()):
        command = [*before, sys.executable, "-c", OWNER, *map(str, roots), *options]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
        self.folders = [Path(path) for path in self.process.stdout.readline().split()]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        """Kill it, and whatever it started; wait until all of that is gone."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        if not self.process.stdout.closed:
            self.process.stdout.read()
            self.process.stdout.close()
        while any(lifelocks.is_held(folders.owner_file(folder)) for folder in self.folders):
            threading.Event().wait(0.001)


@pytest.fixture
def owners(roots):
    made = []

    def start(*options, before=()):
        made.append(Owner(roots, *options, before=before))
        assert len(set(made[-1].folders)) == 2
        return made[-1]

    yield start
    for owner in made:
        owner.end()


def sweep():
    remove_arena(open_arena())


def test_what_killed_owners_left_is_swept_from_both_roots(owners):
    owner = owners()
    sweep()
    assert all(folder.is_dir() for folder in owner.folders)
    owner.kill()
    sweep()
    assert not any(folder.exists() for folder in owner.folders)


def test_an_owner_that_ended_but_was_not_waited_for_is_dead(owners):
    owner = owners()
    owner.process.kill()
    os.waitid(os.P_PID, owner.process.pid, os.WEXITED | os.WNOWAIT)
    sweep()
    assert not any(folder.exists() for folder in owner.folders)


def test_what_this_process_has_is_kept(roots):
    mine = open_arena()
    sweep()
    assert mine.folder.is_dir()
    remove_arena(mine)


def test_a_forked_child_of_a_killed_owner_keeps_nothing(owners):
    owner = owners("fork")
    owner.kill()
    sweep()
    assert not any(folder.exists() for folder in owner.folders)


def test_a_forked_child_removes_nothing_of_its_parents(roots):
    mine = open_arena()
    if (pid := os.fork()) == 0:
        remove_arena(mine)
        os._exit(0)
    os.waitpid(pid, 0)
    assert mine.folder.is_dir()
    assert Path(mine.place.spill_folder).is_dir()
    remove_arena(mine)


def test_an_owner_of_another_pid_namespace_is_not_swept(owners):
    """As in containers that share /dev/shm or a temporary folder: pids of one mean nothing, or others, in the other."""
    owner = owners(before=unshared())
    sweep()
    assert all(folder.is_dir() for folder in owner.folders)
    owner.end()
    sweep()
    assert not any(folder.exists() for folder in owner.folders)


def test_nor_is_one_of_this_namespace_by_another(owners, roots):
    owner = owners()
    sweeper = "import sys; from forgepar.values import arena_folders; "
    sweeper += "arena_folders._MEMORY = arena_folders.Path(sys.argv[1]); "
    sweeper += "arena_folders.remove_arena(arena_folders.open_arena())"
    environment = {**os.environ, "TMPDIR": str(roots[1])}
    command = [*unshared(), sys.executable, "-c", sweeper, str(roots[0])]
    subprocess.run(command, check=True, env=environment, timeout=60)
    assert all(folder.is_dir() for folder in owner.folders)
    owner.kill()
    subprocess.run(command, check=True, env=environment, timeout=60)
    assert not any(folder.exists() for folder in owner.folders)


@pytest.mark.parametrize("fault", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_where_locks_do_not_work_nothing_is_swept(roots, owners, monkeypatch, fault):
    left = owners()
    left.kill()

    def flock(_descriptor, _how):
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patched:
        patched.setattr("forgepar.system.life_locks.fcntl.flock", flock)
        mine = open_arena()
        assert all(folder.is_dir() for folder in left.folders)
    lifelocks.release(folders.owner_file(mine.folder))  # as if its owner had ended
    lifelocks.release(folders.owner_file(mine.place.spill_folder))
    sweep()  # by one for whom locks work
    assert mine.folder.is_dir()
    assert not any(folder.exists() for folder in left.folders)


def test_folders_made_under_another_kernel_are_left_alone(owners, monkeypatch):
    """Of one that shares the file system and does not tell its locks; or the same one, before it was restarted."""
    owner = owners()
    owner.kill()
    with monkeypatch.context() as patched:
        patched.setattr(lifelocks, "kernel_id", lambda: "another")
        sweep()
    assert all(folder.is_dir() for folder in owner.folders)


@pytest.mark.parametrize("name", ["notes", "7", "x-y-z", "7-8", "7-k01", "7-8-0123abcd"])
def test_folders_of_other_names_or_without_a_lock_are_left_alone(roots, name):
    folder = roots[1] / f"forgepar-{os.getuid()}-{name}"
    folder.mkdir()
    (folder / "value").touch()
    sweep()
    assert (folder / "value").exists()


def test_a_folder_whose_owner_was_killed_before_it_locked_it_is_swept(roots):
    folder = roots[0] / f"forgepar-{os.getuid()}-7-k01"
    folder.mkdir()
    sweep()
    assert not folder.exists()


def test_folders_of_other_users_and_links_are_left_alone(owners, roots):
    owner = owners()
    owner.kill()
    theirs = [folder.rename(folder.with_name(f"forgepar-{os.getuid() + 1}-7-k01")) for folder in owner.folders]
    link = roots[0] / f"forgepar-{os.getuid()}-7-k02"
    link.symlink_to(theirs[0])
    sweep()
    assert all((folder / "owner").exists() for folder in theirs)
    assert link.is_symlink()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give a folder to another user")
def test_a_folder_of_this_users_name_that_another_one_made_is_left_alone(owners):
    owner = owners()
    owner.kill()
    for folder in owner.folders:
        os.chown(folder, 12345, -1)
    sweep()
    assert all((folder / "owner").exists() for folder in owner.folders)


def test_an_owner_whose_folder_was_removed_before_its_lock_makes_another(roots, monkeypatch):
    held, removed = folders.hold, []

    def swept_first(path):
        if not removed:
            removed.append(path)
            Path(path).parent.rmdir()
        return held(path)

    monkeypatch.setattr(folders, "hold", swept_first)
    arena = open_arena()
    assert arena.folder.is_dir()
    assert len(removed) == 1
    remove_arena(arena)


class TestFoldersRemovedFromOutside:
    @pytest.fixture
    def arena(self, roots):
        arena = open_arena()
        yield arena
        remove_arena(arena)
        assert not [left for root in roots for left in root.iterdir()]

    def test_values_go_to_the_temporary_folder_and_one_warning_says_so(self, arena):
        shutil.rmtree(arena.place.folder)
        with pytest.warns(RuntimeWarning, match="removed by another program") as told:
            segments = [arena.write([b"x" * n_bytes]) for n_bytes in (100, 1 << 20, 100)]
        assert len(told) == 1
        assert [segment[0][0] for segment in segments] == ["d", "d", "d"]
        assert [bytes(*arena.read(segment)) for segment in segments] == [b"x" * 100, b"x" * (1 << 20), b"x" * 100]
        assert arena.bytes_held == 0  # in memory
        for segment in segments:
            arena.free(segment)

    def test_a_temporary_folder_is_made_anew(self, arena):
        shutil.rmtree(arena.place.folder)
        shutil.rmtree(arena.place.spill_folder)
        with pytest.warns(RuntimeWarning, match="removed by another program"):
            segment = arena.write([b"abc"])
        assert bytes(*arena.read(segment)) == b"abc"
        assert stat.S_IMODE(Path(arena.place.spill_folder).stat().st_mode) == 0o700

    def test_a_lost_value_is_told_as_one(self, arena):
        segment = arena.write([b"x" * 100])
        shutil.rmtree(arena.place.folder)
        with pytest.raises(FileNotFoundError) as caught:
            arena.read(segment)
        assert "removed by another program" in caught.value.__notes__[0]
        arena.free(segment)

    @pytest.mark.parametrize("method", START_METHODS)
    def test_an_executor_goes_on(self, roots, method):
        def remove(_):
            shutil.rmtree(folder)

        def ones(n):
            return np.ones(n)

        def check(executor, first, second):
            wf = fp.Workflow()
            made = wf.map(ones, [first, second])
            sums = wf.map(np.sum, made)
            return list(executor.run(wf)[sums])

        with fp.WorkflowExecutor(workers=1, start_method=method) as executor:
            assert check(executor, 20_000, 30_000) == [20_000, 30_000]
            (folder,) = [str(found) for found in roots[0].iterdir()]
            wf = fp.Workflow()
            wf.map(remove, [0])
            executor.run(wf)
            with pytest.warns(RuntimeWarning, match="removed by another program"):
                assert check(executor, 40_000, 50_000) == [40_000, 50_000]
        with fp.ForgeExecutor(1, start_method=method) as pool:
            assert pool.submit(ones, 20_000).result().sum() == 20_000
            (folder,) = [str(found) for found in roots[0].iterdir()]
            pool.submit(remove, 0).result()
            with pytest.warns(RuntimeWarning, match="removed by another program"):
                assert pool.submit(ones, 40_000).result().sum() == 40_000
        assert not [left for root in roots for left in root.glob("forgepar-*")]


def test_whoever_waited_for_a_sweeper_does_not_take_a_removed_file_for_its_own(tmp_path):
    path = str(tmp_path / "owner")
    Path(path).write_text(lifelocks.kernel_id())
    is_waiting, got = threading.Event(), []

    def own():
        is_waiting.set()
        got.append(lifelocks.hold(path))

    with lifelocks.locking_abandoned(path) as is_left:
        assert is_left
        thread = threading.Thread(target=own)
        thread.start()
        is_waiting.wait()
        Path(path).unlink()
    thread.join()
    assert got in ([False], [True])  # it had opened the file by then, or made a new one
    assert Path(path).exists() == got[0]
    lifelocks.release(path)


def test_many_that_come_and_go_at_once_keep_what_is_theirs(roots):
    def come_and_go():
        for _ in range(20):
            arena = open_arena()
            segment = arena.write([b"x" * 100])
            assert bytes(arena.read(segment)[0]) == b"x" * 100
            remove_arena(arena)

    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(come_and_go) for _ in range(4)]:
            done.result()
    assert [path for root in roots for path in root.iterdir() if path.name.startswith("forgepar-")] == []
