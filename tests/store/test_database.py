"""The file of a run store: who may open it, what is refused and how that is said."""

from __future__ import annotations

import os
import re
import sqlite3
import stat
import subprocess
import sys
import warnings
from contextlib import closing, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest

import forgepar as fp
from forgepar.store import database, schema
from forgepar.store.database import files_of, open_to_read, open_to_write
from forgepar.store.gc import collect
from forgepar.store.schema import APPLICATION_ID


@pytest.fixture
def store(tmp_path):
    return tmp_path / "runs.db"


def small() -> fp.Workflow:
    wf = fp.Workflow("small")
    wf.add(sum, wf.map(abs, range(4)))
    return wf


def run(store: Path, **more):
    return small().run(backend="inline", store=store, resume=True, **more)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# Making and opening


def test_a_store_whose_maker_was_killed_amid_the_first_transaction_opens(store):
    code = """
import os, sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA application_id = " + sys.argv[2])
connection.execute("PRAGMA cache_size = 1")  # so that it writes before the transaction is over
connection.execute("BEGIN IMMEDIATE")
connection.execute("CREATE TABLE runs(id)")
connection.executemany("INSERT INTO runs VALUES (?)", [("x" * 1000,)] * 100)
os._exit(0)
"""
    store.touch(0o600)
    subprocess.run([sys.executable, "-c", code, str(store), str(APPLICATION_ID)], check=True)
    assert Path(f"{store}-journal").stat().st_size
    with pytest.raises(fp.StoreError, match="is empty: it has no runs yet"):
        fp.Store.open(store)
    assert run(store).ok
    with fp.Store.open(store) as opened:
        assert len(opened.runs()) == 1


def test_it_is_made_for_its_owner_alone(store):
    before = os.umask(0o000)
    try:
        with closing(open_to_write(store)):
            assert mode_of(store) == 0o600
            assert mode_of(files_of(store)) == 0o700
            assert mode_of(Path(f"{store}-wal")) == 0o600
    finally:
        os.umask(before)


def test_value_files_are_for_their_owner_alone(store):
    before = os.umask(0o000)
    try:
        wf = fp.Workflow()
        wf.add(np.zeros, 100_000)
        wf.run(backend="inline", store=store)
    finally:
        os.umask(before)
    (path,) = files_of(store).glob("??/*")
    assert mode_of(path) == 0o600
    assert mode_of(path.parent) == 0o700


def test_an_empty_file_is_told(store):
    store.touch(mode=0o600)
    with pytest.raises(fp.StoreError, match="it has no runs yet"):
        fp.Store.open(store)
    assert run(store).ok


def test_a_store_that_is_not_there_is_not_made_by_asking(store):
    with pytest.raises(fp.StoreError, match="there is no run store"):
        fp.Store.open(store)
    assert not store.exists()


@pytest.mark.parametrize(
    "name", ["a?b", "a#b", "a%41b", "a b", "ä", "file:a", "'q\"", os.fsdecode(b"caf\xe9"), ":memory:"]
)
def test_any_name_will_do(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert run(Path(name)).ok
    assert run(Path(name)).status_counts() == {"cached": 5}
    with fp.Store.open(name) as opened:
        assert opened.run(1).value("sum") == 6
    assert set(os.listdir()) >= {name, name + ".files"}  # noqa: PTH208


def test_a_link_to_a_store_is_that_store(tmp_path, store):
    link = tmp_path / "link.db"
    link.symlink_to(store)
    wf = fp.Workflow()
    wf.add(np.ones, 100_000)
    wf.run(backend="inline", store=link)
    assert {path.name for path in tmp_path.iterdir()} == {"link.db", "runs.db", "runs.db.files"}
    assert wf.run(backend="inline", store=store, resume=True)["ones"].shape == (100_000,)


def test_a_task_may_leave_the_folder_that_the_path_is_relative_to(tmp_path, monkeypatch):
    def leave():
        os.chdir("/")
        return np.ones(100_000)

    monkeypatch.chdir(tmp_path)
    wf = fp.Workflow()
    wf.add(leave)
    wf.run(backend="inline", store="runs.db", resume=True)
    monkeypatch.chdir(tmp_path)
    assert wf.run(backend="inline", store="runs.db", resume=True).status_counts() == {"cached": 1}
    assert list(files_of(Path("runs.db")).glob("*.lock")) == []


@pytest.mark.parametrize("wrong", [True, 7, b"runs.db"])
def test_what_is_no_path_is_told(wrong):
    with pytest.raises(ValueError, match=f"store must be the path of a file, .*, got {wrong!r}"):
        run(wrong)


# What is refused


@pytest.mark.parametrize(("mode", "place"), [(0o620, "file"), (0o602, "file"), (0o770, "folder"), (0o777, "folder")])
def test_a_store_that_others_may_write_is_refused_with_the_reason(store, mode, place):
    run(store)
    path = store if place == "file" else files_of(store)
    path.chmod(mode)
    for use in (lambda: fp.Store.open(store), lambda: run(store)):
        with pytest.raises(fp.StoreUntrusted, match=rf"can be written by others \(mode {mode:o}\).*chmod") as caught:
            use()
        assert caught.value.path == str(store)


def test_a_folder_in_which_everybody_may_put_another_store_is_refused(tmp_path):
    tmp_path.chmod(0o777)
    try:
        with pytest.raises(fp.StoreUntrusted, match="can be written by all users"):
            run(tmp_path / "runs.db")
    finally:
        tmp_path.chmod(0o700)


def test_a_link_from_a_folder_of_ones_own_into_such_a_folder_is_refused(tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "runs.db").symlink_to(tmp_path / "open" / "runs.db")
    with pytest.raises(fp.StoreUntrusted, match="open' can be written by all users"):
        run(tmp_path / "runs.db")


@pytest.mark.parametrize("end", ["-wal", "-shm"])
def test_what_others_may_have_put_beside_a_store_is_refused(store, end):
    run(store)
    beside = Path(f"{store}{end}")
    beside.touch()
    beside.chmod(0o666)
    for use in (lambda: fp.Store.open(store), lambda: run(store)):
        with pytest.raises(fp.StoreUntrusted, match=rf"runs.db{end}' can be written by others \(mode 666\)"):
            use()


def test_a_sticky_folder_is_refused_and_a_folder_of_ones_own_in_it_will_do(tmp_path):
    """Nobody can replace a file in a sticky folder, but anybody can put a journal beside it."""
    tmp_path.chmod(0o1777)
    try:
        with pytest.raises(fp.StoreUntrusted, match=rf"mkdir -m 700 {tmp_path}/NAME"):
            run(tmp_path / "runs.db")
        assert list(tmp_path.iterdir()) == []
        (tmp_path / "own").mkdir()
        assert run(tmp_path / "own" / "runs.db").ok
    finally:
        tmp_path.chmod(0o700)


def test_a_store_that_is_replaced_while_it_is_opened_is_refused(store, monkeypatch):
    run(store)
    check = schema.check_version

    def replace(*arguments):
        other = Path(f"{store}.other")
        other.write_bytes(store.read_bytes())
        other.chmod(0o600)
        other.replace(store)
        return check(*arguments)

    for module in (database, schema):
        monkeypatch.setattr(module, "check_version", replace)
    for opening in (open_to_read, open_to_write):
        with pytest.raises(fp.StoreUntrusted, match="was replaced while it was opened"):
            opening(store)


def test_to_open_a_store_leaves_the_locks_of_this_process_on_it(store):
    """Else another process that closes it last takes the log away from under a run, and what that writes is lost."""
    run(store)
    with closing(open_to_write(store)) as connection:
        connection.execute("SELECT count(*) FROM runs").fetchall()
        open_to_write(store).close()
        other = f"from forgepar.store.database import *; open_to_write(Path({str(store)!r})).close()"
        subprocess.run([sys.executable, "-c", other], check=True, timeout=60)
        assert Path(f"{store}-wal").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_store_of_somebody_else_is_refused(store):
    run(store)
    os.chown(store, 65534, -1)
    with pytest.raises(fp.StoreUntrusted, match=r"belongs to another user \(uid 65534\)"):
        fp.Store.open(store)


def test_a_file_that_is_no_database_is_told(store):
    store.write_text("this is a diary, and long enough to have a header of a database in it. " * 100)
    store.chmod(0o600)
    for use in (lambda: fp.Store.open(store), lambda: run(store)):
        with pytest.raises(fp.StoreError, match="not a run store, or it is damaged"):
            use()


def test_a_folder_in_its_place_is_told(store):
    store.mkdir()
    with pytest.raises(fp.StoreError, match="cannot be written"):
        run(store)
    with pytest.raises(fp.StoreError, match="there is no run store"):
        fp.Store.open(store)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(fp.StoreError, match=r"cannot be written \(No such file or directory\)"):
        run(tmp_path / "nowhere" / "runs.db")


def test_a_store_that_another_program_has_locked_is_told(store, monkeypatch):
    run(store)
    with closing(sqlite3.connect(store, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        monkeypatch.setattr("forgepar.store.writer.open_to_write", partial(open_to_write, patience=0.01))
        with pytest.raises(fp.StoreBusy, match="is locked by another program"):
            run(store)
        with fp.Store.open(store) as opened:  # readers do not wait for writers
            assert len(opened.runs()) == 1
        other.execute("COMMIT")
    assert run(store).ok


AS_NOBODY = """
import os, sys
import forgepar as fp
wf = fp.Workflow("small")
wf.add(sum, wf.map(abs, range(4)))
wf.run(backend="inline", store=sys.argv[2])  # so that all is imported that is needed
os.setgid(65534); os.setuid(65534)
try:
    wf.run(backend="inline", store=sys.argv[1], resume=True)
except fp.StoreError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="root alone can become another user, and is stopped by no mode")
@pytest.mark.parametrize("what", ["file", "folder"])
def test_a_store_that_may_only_be_read_is_told(tmp_path, what):
    with TemporaryDirectory() as outside:  # pytest's own folder is closed to other users
        folder = Path(outside) / "theirs"
        folder.mkdir()
        store = folder / "runs.db"
        run(store)
        Path(outside).chmod(0o755)
        if what == "folder":
            store.unlink()
        for path in (folder, *folder.rglob("*")):
            os.chown(path, 65534, 65534)
        folder.chmod(0o500)
        for path in folder.glob("runs.db*"):
            path.chmod(0o500 if path.is_dir() else 0o400)
        done = subprocess.run(
            [sys.executable, "-c", AS_NOBODY, str(store), str(tmp_path / "own.db")],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("StoreError the run store")
    assert "cannot be written (Permission denied)" in done.stdout


# Full disks


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_values_that_find_no_room_are_told_and_computed_again(small_disk, either_backend):
    wf = fp.Workflow("large")
    parts = wf.map(np.full, [200_000] * 6, range(6))  # 1.6 MB each
    total = wf.add(lambda arrays: float(sum(array[0] for array in arrays)), parts)
    store = small_disk / "runs.db"
    for resume in (False, fp.Resume(start_from="lambda")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = wf.run(**either_backend, store=store, resume=resume)
        assert result[total] == 15.0
        # The database itself may find no room as well, while a file that will not fit is being written.
        texts = [str(warning.message) for warning in caught if warning.category is fp.StoreWarning]
        assert any(re.match(r"the value of task 'full-\d' is not kept .* No space left", text) for text in texts)
    counted = result.status_counts()
    assert counted["cached"] >= 1
    assert counted["completed"] >= 3


def test_a_database_that_finds_no_room_is_told_and_the_run_goes_on(small_disk, either_backend):
    store = small_disk / "runs.db"
    run(store)
    filler = small_disk / "filler"
    wf = fp.Workflow("many")
    last = wf.add(len, wf.map(lambda i: f"{i:03d}" * 900, range(600)))
    filler.write_bytes(b"x" * (3 << 20))
    with pytest.warns(fp.StoreWarning, match=r"its disk is full"):
        result = wf.run(**either_backend, store=store)
    assert result[last] == 600
    filler.unlink()
    again = wf.run(**either_backend, store=store, resume=True)
    assert again[last] == 600
    with fp.Store.open(store) as opened:
        assert opened.run().facts.status == "completed"


def test_a_disk_that_is_nearly_full_is_cleared_and_one_that_is_quite_full_told(small_disk):
    store, filler = small_disk / "runs.db", small_disk / "filler"
    for i in range(2):
        wf = fp.Workflow("large")
        wf.add(np.full, 40_000, i)
        wf.map(lambda i: f"{i:04d}" * 4000, range(40 * i, 40 * i + 40))
        wf.run(backend="inline", store=store)
    before = store.stat().st_size
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(b"x" * 4096)
    with pytest.raises(fp.StoreError, match="its disk is full"):
        collect(store, keep=1)
    os.truncate(filler, filler.stat().st_size - (850 << 10))  # less than a copy takes
    assert collect(store, keep=1).n_files == 1
    with fp.Store.open(store) as opened:
        assert opened.run().value("full")[0] == 1
    filler.unlink()
    collect(store, keep=1)
    assert store.stat().st_size < 0.7 * before


def test_reading_finds_what_was_written_on_a_file_system_that_cannot_be_written(small_disk):
    run(small_disk / "runs.db")
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with closing(open_to_read(small_disk / "runs.db")) as connection:
        assert connection.execute("SELECT count(*) FROM runs").fetchone() == (1,)
    with pytest.raises(fp.StoreError, match=r"cannot be written \(Read-only file system\)"):
        run(small_disk / "runs.db")


def test_a_store_with_a_log_that_cannot_be_read_where_it_lies_is_told(small_disk):
    """As of a killed run, copied without what SQLite shares in memory: not even the runs before the last are shown."""
    store = small_disk / "runs.db"
    run(store)
    with closing(open_to_write(store)) as connection:
        connection.execute("UPDATE runs SET status = 'failed'")
        saved = {path: path.read_bytes() for path in (store, Path(f"{store}-wal"))}
    for path, data in saved.items():
        path.write_bytes(data)
        path.chmod(0o600)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    with pytest.raises(fp.StoreError, match="cannot be written or opened here"):
        open_to_read(store)
