"""Two users of one machine: nothing of one's runs, reads or writes as the other."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sqlite3
import stat
import subprocess
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from two_users import (
    MALLORY,
    VICTIM,
    command_of,
    end_programs,
    folder_of,
    journal_of,
    run_as,
    shared_folder,
    why_not,
)

from forgepar.store.resume import BLOB, checksum_of

pytestmark = pytest.mark.skipif(bool(REASON := why_not()), reason=REASON or "there are two users")

# Programs of the victim. The workflow has one value that is kept as a pickle.
WORKFLOW = """
import sys
import forgepar as fp
def make():
    return ["own"] * 3
wf = fp.Workflow("shared")
wf.add(fp.task(make).options(version="1"))
"""
KEEP = WORKFLOW + "print(wf.run(backend='inline', store=sys.argv[1])['make'])"
RESUME = WORKFLOW + "print(wf.run(backend='inline', store=sys.argv[1], resume=True)['make'])"
READ = "import sys, forgepar as fp; print(fp.Store.open(sys.argv[1]).run().value('make'))"
COMMAND = "import sys; from forgepar.cli.main import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(scope="module", autouse=True)
def programs() -> Iterator[None]:
    yield
    end_programs()


@pytest.fixture
def shared() -> Iterator[Path]:
    with shared_folder() as folder:
        yield folder


@pytest.fixture
def trace(shared) -> Path:
    """Where code that was planted leaves a file, owned by whoever ran it."""
    return folder_of(0, shared / "trace", 0o1777)


def spoiled(store: Path, trace: Path) -> bytes:
    """Return a database in which the one value is code."""
    code = f"open({str(trace / 'ran')!r}, 'w').close()".encode()
    payload = b"cbuiltins\nexec\n(V" + code + b"\ntR."
    with closing(sqlite3.connect(store)) as connection:
        rows = connection.execute('SELECT fingerprint, kind FROM "values"').fetchall()
        assert [kind for _, kind in rows] == [BLOB], "the value is to be kept as a pickle"
        for fingerprint, kind in rows:
            changed = (payload, checksum_of(fingerprint, kind, payload))
            connection.execute('UPDATE "values" SET payload = ?, checksum = ?', changed)
        connection.commit()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return store.read_bytes()


@pytest.fixture
def stores(shared, trace) -> tuple[Path, bytes]:
    """A store that the victim made in a folder of its own, and a database with code in the same place."""
    home = folder_of(VICTIM, shared / "home", 0o700)
    made = run_as(VICTIM, KEEP, home / "runs.db")
    assert made.stdout == "['own', 'own', 'own']\n", made.stderr
    copy = shared / "copy"
    copy.mkdir()
    shutil.copy(home / "runs.db", copy / "runs.db")
    return home / "runs.db", spoiled(copy / "runs.db", trace)


def moved(store: Path, folder: Path) -> Path:
    """Put a store with all that is beside it into another folder, as its owner's."""
    for file in (store, Path(f"{store}.files")):
        shutil.move(file, folder / file.name)
    return folder / store.name


def test_the_planted_code_would_run(stores, trace):
    """What the other tests hold back is real: in the place of the store, it runs."""
    store, database = stores
    store.write_bytes(database)
    assert run_as(VICTIM, READ, store).returncode == 0
    assert (trace / "ran").stat().st_uid == VICTIM


PLACES = {
    "sticky": (0, 0, 0o1777),
    "open to all": (VICTIM, VICTIM, 0o777),
    "of a group": (VICTIM, MALLORY, 0o770),
    "of root and a group": (0, MALLORY, 0o775),
    "of the other": (MALLORY, MALLORY, 0o777),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("program", [RESUME, READ], ids=["resume", "read"])
def test_a_journal_that_another_user_put_beside_a_store_is_not_believed(place, program, stores, shared, trace):
    store, database = stores
    user, group, mode = PLACES[place]
    folder = shared / "place"
    folder.mkdir()
    store = moved(store, folder)
    os.chown(folder, user, group)
    folder.chmod(mode)
    (shared / "journal").write_bytes(journal_of(database))
    plant = "import sys, shutil; shutil.copy(sys.argv[1], sys.argv[2])"
    assert run_as(MALLORY, plant, shared / "journal", f"{store}-journal").returncode == 0
    ended = run_as(VICTIM, program, store)
    assert not (trace / "ran").exists()
    assert "StoreUntrusted" in ended.stderr
    assert Path(f"{store}-journal").exists()


@pytest.mark.parametrize("end", ["-journal", "-wal", "-shm"])
def test_what_was_put_beside_a_store_before_its_folder_was_closed_is_not_believed(end, stores, trace):
    store, database = stores
    beside = Path(f"{store}{end}")
    beside.write_bytes(journal_of(database))
    os.chown(beside, MALLORY, MALLORY)
    for program in (READ, RESUME):
        ended = run_as(VICTIM, program, store)
        assert "StoreUntrusted" in ended.stderr
        assert f"runs.db{end}' belongs to another user (uid {MALLORY})" in ended.stderr
    assert not (trace / "ran").exists()


def test_a_store_of_another_user_is_refused_in_any_place(stores, shared, trace):
    """Put there itself, by a link, or by moving a folder of the victim's out of the way."""
    _, database = stores
    theirs = folder_of(MALLORY, shared / "theirs", 0o755)
    (theirs / "runs.db").write_bytes(database)
    os.chown(theirs / "runs.db", MALLORY, MALLORY)
    open_to_all = folder_of(0, shared / "open", 0o1777)
    (open_to_all / "linked").symlink_to(theirs)
    os.chown(open_to_all / "linked", MALLORY, MALLORY, follow_symlinks=False)
    for path in (theirs / "runs.db", open_to_all / "linked" / "runs.db"):
        for program in (READ, RESUME):
            assert "StoreUntrusted" in run_as(VICTIM, program, path).stderr
    assert not (trace / "ran").exists()


def test_a_new_store_is_not_made_where_a_link_of_another_user_leads(shared):
    home = folder_of(VICTIM, shared / "home", 0o700)
    open_to_all = folder_of(0, shared / "open", 0o1777)
    (open_to_all / "runs.db").symlink_to(home / "made")
    os.chown(open_to_all / "runs.db", MALLORY, MALLORY, follow_symlinks=False)
    assert "StoreUntrusted" in run_as(VICTIM, KEEP, open_to_all / "runs.db").stderr
    assert list(home.iterdir()) == []


def test_root_opens_no_store_in_a_folder_of_a_user(shared):
    folder = folder_of(VICTIM, shared / "project", 0o755)
    ended = run_as(0, KEEP, folder / "runs.db")
    assert f"belongs to another user (uid {VICTIM})" in ended.stderr
    assert f"sudo -u '#{VICTIM}'" in ended.stderr
    assert list(folder.iterdir()) == []


ORDINARY = {
    "a folder of one's own": (0o755, VICTIM),
    "one of one's own group": (0o775, VICTIM),
    "one with the bits that pass a group on": (0o2775, VICTIM),
    "one that is closed": (0o700, VICTIM),
}


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_folders_in_a_sticky_one_will_do(name, shared):
    mode, group = ORDINARY[name]
    sticky = folder_of(0, shared / "tmp", 0o1777)
    project = folder_of(VICTIM, sticky / "project", 0o755)
    os.chown(project, VICTIM, group)
    project.chmod(mode)
    for program in (KEEP, RESUME, READ):
        ended = run_as(VICTIM, program, project / "runs.db")
        assert ended.stdout == "['own', 'own', 'own']\n", ended.stderr


def test_another_user_reads_nothing_of_a_store(stores):
    store, _ = stores
    store.parent.chmod(0o755)
    for path in (store, Path(f"{store}.files")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
        peek = "import os, sys; p = sys.argv[1]; os.listdir(p) if os.path.isdir(p) else open(p)"
        assert "PermissionError" in run_as(MALLORY, peek, path).stderr
    assert "StoreUntrusted" in run_as(MALLORY, READ, store).stderr or not os.access(store, os.R_OK)


# Arenas and sockets

RUNNING = """
import sys, pathlib
import forgepar as fp
from forgepar.backends.base import *
def hold(array, gate):
    with open(gate) as pipe:  # until the other end is opened and closed
        pipe.read()
    return array
if __name__ == "__main__":
    import numpy as np
    from forgepar.backends.process import ProcessBackend
    backend = ProcessBackend(1)
    with fp.WorkflowExecutor(backend=backend) as executor:
        wf = fp.Workflow("held")
        wf.add(hold, np.ones(1 << 20), sys.argv[1])
        backend.open(1)
        print(backend.arena.place.folder, backend.arena.place.spill_folder, flush=True)
        executor.run(wf)
        print("done", flush=True)
"""
ATTACK = """
import os, socket, sys
reached = []
for folder in sys.argv[1:]:
    for what in (
        lambda: os.listdir(folder),
        lambda: open(folder + "/board", "r+b"),
        lambda: open(folder + "/planted", "w"),
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET).connect(folder + "/socket"),
        lambda: os.rename(folder, folder + "x"),
    ):
        try:
            what()
        except PermissionError:
            continue
        reached.append(folder)
print(reached)
"""


def test_another_user_reaches_neither_values_nor_sockets_of_a_run(shared):
    gate = shared / "gate"
    os.mkfifo(gate)
    os.chown(gate, VICTIM, VICTIM)
    with subprocess.Popen(
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **command_of(VICTIM, RUNNING, gate)
    ) as program:
        folders = program.stdout.readline().split()
        try:
            assert len(folders) == 2, program.stderr.read()
            attack = run_as(MALLORY, ATTACK, *folders)
            assert (attack.stdout, attack.stderr) == ("[]\n", "")
        finally:
            with gate.open("w"):  # which waits for the task
                pass
        assert program.communicate(timeout=60) == ("done\n", "")


def test_folders_that_look_like_arenas_are_left_alone(shared):
    """Whoever sweeps what dead runs left follows nothing of another user's."""
    precious = folder_of(VICTIM, shared / "precious", 0o755)
    (precious / "file").touch()
    planted = []
    for root in (Path("/dev/shm"), Path("/tmp")):
        if root.is_dir():
            link, folder = (root / f"forgepar-{VICTIM}-1-1-{number:08x}" for number in (0xA1, 0xA2))
            link.symlink_to(precious)
            os.chown(link, MALLORY, MALLORY, follow_symlinks=False)
            folder_of(MALLORY, folder, 0o777)
            planted += [link, folder]
    try:
        for folder in planted[1::2]:
            (folder / "link").symlink_to(precious)
        run = "import forgepar as fp; wf = fp.Workflow(); wf.map(abs, [1]); print(wf.run(backend='inline').ok)"
        assert run_as(VICTIM, run).stdout == "True\n"
        assert (precious / "file").exists()
        assert all((folder / "link").is_symlink() for folder in planted[1::2])
    finally:
        for link, folder in zip(planted[::2], planted[1::2], strict=True):
            link.unlink()
            shutil.rmtree(folder)


# Files that are written for people

EXPORTS = {
    "report": ["report", "{store}", "-o", "{path}"],
    "trace": ["export", "{store}", "--format", "chrome", "-o", "{path}"],
    "events": ["export", "{store}", "-o", "{path}"],
    "value": ["values", "{store}", "last", "make", "-o", "{path}"],
    "diagram": ["graph", "{file}", "-o", "{path}"],
    "audit": ["run", "{file}", "--backend", "inline", "--audit", "{path}"],
    "durations": ["run", "{file}", "--backend", "inline", "--save-durations", "{path}"],
}


WHATS = [pytest.param(what, marks=[pytest.mark.slow] * (what == "report")) for what in EXPORTS]  # bokeh takes seconds


@pytest.fixture
def exporting(stores, shared):
    """Call a command that writes a file, as the victim; return how it ended."""
    store, _ = stores
    (shared / "flow.py").write_text(WORKFLOW + "workflow = wf\n")
    out = folder_of(0, shared / "out", 0o777)  # where the system itself does not look after links

    def export(what: str) -> tuple[Path, subprocess.CompletedProcess[str]]:
        path = out / f"{what}.svg"
        words = {"store": store, "file": shared / "flow.py", "path": path}
        return path, run_as(VICTIM, COMMAND, *(word.format(**words) for word in EXPORTS[what]))

    return export


@pytest.mark.parametrize("what", WHATS)
def test_a_file_is_not_written_through_a_link_of_another_user(what, exporting, shared):
    secret = folder_of(VICTIM, shared / "secret", 0o700) / "secret"
    secret.write_text("as it was")
    os.chown(secret, VICTIM, VICTIM)
    path = shared / "out" / f"{what}.svg"
    path.symlink_to(secret)
    os.chown(path, MALLORY, MALLORY, follow_symlinks=False)
    _, ended = exporting(what)
    assert secret.read_text() == "as it was"
    assert ended.returncode == 2
    assert f"This link belongs to another user (uid {MALLORY})" in ended.stderr
    assert sorted(entry.name for entry in (shared / "out").iterdir()) == [path.name]


@pytest.mark.parametrize("what", WHATS)
def test_a_file_goes_into_no_pipe_of_another_user_and_is_its_owners_alone(what, exporting, shared):
    path = shared / "out" / f"{what}.svg"
    os.mkfifo(path)
    os.chown(path, MALLORY, MALLORY)
    path.chmod(0o666)
    reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # else who writes to it waits for one
    _, ended = exporting(what)
    os.close(reader)
    assert f"This pipe belongs to another user (uid {MALLORY})" in ended.stderr
    path.unlink()
    _, ended = exporting(what)
    assert ended.returncode == 0, ended.stderr
    assert (path.stat().st_uid, stat.S_IMODE(path.stat().st_mode)) == (VICTIM, 0o600)
    assert [entry.name for entry in (shared / "out").iterdir()] == [path.name]


# A scheduler's port

CLUSTER = """
import sys
from forgepar.backends.dask.cluster import local_cluster
if __name__ == "__main__":
    with local_cluster(1) as cluster:
        print(cluster.scheduler_address, cluster.scheduler.services["dashboard"].port, flush=True)
        sys.stdin.read()
"""
CONNECT = """
import asyncio, sys, urllib.error, urllib.request
from distributed import Security
from distributed.comm import connect
address, port = sys.argv[1:]
async def ask(name, security):
    comm = await connect(name, timeout=5, **security.get_connection_args("client"))
    await comm.write({"op": "identity"})
    return await asyncio.wait_for(comm.read(), 5)
for security in (Security(), Security.temporary()):
    for name in (address, address.replace("tls://", "tcp://")):
        try:
            print(asyncio.run(ask(name, security)))
        except Exception as error:
            if not isinstance(error, (OSError, TypeError, RuntimeError, ValueError)):
                raise
for page in ("info/main/workers.html", "metrics", "json/counts.json"):
    try:
        print(urllib.request.urlopen(f"http://127.0.0.1:{port}/{page}", timeout=5).read())
    except urllib.error.HTTPError:
        pass
print("tried all")
"""


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("distributed", "cryptography"))),
    reason="needs distributed and cryptography: the extra dask",
)
@pytest.mark.slow  # to start Dask takes ten seconds
def test_another_user_cannot_speak_to_a_cluster_that_is_made_for_a_run():
    with subprocess.Popen(
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        **command_of(VICTIM, CLUSTER),
    ) as program:
        address, port = program.stdout.readline().split()
        assert address.startswith("tls://127.0.0.1:")
        ended = run_as(MALLORY, CONNECT, address, port)
        program.stdin.close()
        assert program.wait(timeout=60) == 0
    assert ended.stdout == "tried all\n", ended.stderr
