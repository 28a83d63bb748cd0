"""For tests of what one local user can do to another: programs that run as users who have no rights but their own."""

from __future__ import annotations

import functools
import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import forgepar

VICTIM, MALLORY = 54321, 54322  # no account has these numbers; the system asks for no account
ROOT = Path(forgepar.__file__).parent.parent


# Mounts, seen by this program alone, the folders that come first as arguments where they are, without what is else in
# the closed folders on the way to them; then becomes the user, and the program behind "--".
_OPENED = """
set -e
user=$1; shift
mount -t tmpfs tmpfs /mnt
closed=$1; shift
for folder; do
    if [ "$folder" = -- ]; then break; fi
    mkdir -p "/mnt$folder"
    mount --bind "$folder" "/mnt$folder"
done
mount -t tmpfs -o mode=755 tmpfs "$closed"
while [ "$1" != -- ]; do
    mkdir -p "$1"
    mount --bind "/mnt$1" "$1"
    shift
done
shift
umount -l /mnt
exec setpriv --reuid="$user" --regid="$user" --clear-groups "$@"
"""


def _closed() -> tuple[str, list[str]]:
    """Return a folder that other users may not enter, and what Python needs that is in it; ("", []) for none."""
    needed = {
        str(Path(path).resolve()) for path in (sys.base_prefix, sys.prefix, ROOT, *sys.path) if Path(path).is_dir()
    }
    for path in sorted(needed):
        for folder in reversed([Path(path), *Path(path).parents]):
            if not folder.stat().st_mode & 0o001:
                found = [other for other in sorted(needed) if Path(other).is_relative_to(folder)]
                return str(folder), [one for one in found if not any(one.startswith(f"{two}/") for two in found)]
    return "", []


def command_of(user: int, code: str, *arguments: object) -> dict[str, Any]:
    """Return what `subprocess` needs to run Python code as a user, without what this process has of root.

    Where Python is in a folder that only root may enter, the code has a view of the file system of its own.
    """
    args = [sys.executable, "-c", code, *map(str, arguments)]
    environment = {name: value for name, value in os.environ.items() if name not in ("HOME", "TMPDIR", "USER")}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment |= {"HOME": "/nonexistent", "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
    closed, needed = _closed()
    if closed:
        unshare = ["unshare", "--mount", "--propagation", "private", "sh", "-c", _OPENED, "sh", str(user), closed]
        return {"args": [*unshare, *needed, "--", *args], "cwd": "/", "env": environment}
    return {"args": args, "cwd": "/", "env": environment, "user": user, "group": user, "extra_groups": []}


# Forks for each request: to start Python and import numpy takes a second.
_SERVER = """
import json, os, sys, tempfile, traceback
import forgepar.cli.main, forgepar.report.progress.display

def run(code, arguments):
    sys.argv = ["-c", *arguments]
    try:
        exec(compile(code, "<code>", "exec"), vars(sys.modules["__main__"]))
    except SystemExit as error:
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

for line in sys.stdin:
    request = json.loads(line)
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        if not (pid := os.fork()):
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            code = run(*request)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        told = [code]
        for stream in (out, err):
            stream.seek(0)
            told.append(stream.read())
    print(json.dumps(told), flush=True)
"""
_servers: dict[int, subprocess.Popen[str]] = {}


def run_as(user: int, code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run Python code as a user to its end."""
    server = _servers.get(user)
    if server is None:
        server = _servers[user] = subprocess.Popen(
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **command_of(user, _SERVER)
        )
    assert server.stdin is not None
    assert server.stdout is not None
    print(json.dumps([code, list(map(str, arguments))]), file=server.stdin, flush=True)
    return subprocess.CompletedProcess([], *json.loads(server.stdout.readline()))


def end_programs() -> None:
    """End what `run_as` started."""
    while _servers:
        _, server = _servers.popitem()
        server.communicate(timeout=60)


@functools.cache
def why_not() -> str:
    """Say why there can be no two users here; empty if there can."""
    if os.geteuid() != 0:
        return "only root can run programs as two other users"
    try:
        found = subprocess.run(
            capture_output=True, text=True, timeout=60, check=False, **command_of(VICTIM, "import forgepar")
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"root cannot run programs as other users here ({error})"
    return f"other users cannot run this Python: {found.stderr[-200:]}" if found.returncode else ""


@contextmanager
def shared_folder() -> Iterator[Path]:
    """Make a folder of root that all users may look into, outside of folders that only root may enter."""
    folder = Path(tempfile.mkdtemp(dir="/tmp", prefix="two-users-"))
    folder.chmod(0o755)
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def folder_of(user: int, path: Path, mode: int = 0o755) -> Path:
    path.mkdir()
    os.chown(path, user, user)
    path.chmod(mode)
    return path


def journal_of(database: bytes) -> bytes:
    """Return a rollback journal that makes any database into this one, as if a program had died amid a change."""
    page_size = int.from_bytes(database[16:18], "big") or 65536
    pages = [database[at : at + page_size] for at in range(0, len(database), page_size)]
    nonce, sector = 7, 512
    event_recorder = struct.pack(
        ">8sIIIII", bytes.fromhex("d9d505f920a163d7"), len(pages), nonce, len(pages), sector, page_size
    )
    event_recorder = event_recorder.ljust(sector, b"\0")
    for number, page in enumerate(pages, 1):
        checksum = (nonce + sum(page[at] for at in range(page_size - 200, 0, -200))) & 0xFFFFFFFF
        event_recorder += struct.pack(">I", number) + page + struct.pack(">I", checksum)
    return event_recorder
