"""Surroundings that other programs fail in: runs go on, or say what to do."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from unsharing import with_mounts

PROGRAM = """
import os, sys
import numpy as np
import forgepar as fp

def add(x):
    return x + 1

if __name__ == "__main__":
    method = sys.argv[1]
    wf = fp.Workflow()
    numbers = wf.map(add, range(10))
    total = wf.add(np.sum, wf.add(np.ones, 100_000))
    result = wf.run(workers=2, start_method=method)
    assert (result[numbers], result[total]) == (list(range(1, 11)), 100_000.0)
    with fp.ForgeExecutor(2, start_method=method) as executor:
        assert list(executor.map(add, range(5))) == list(range(1, 6))
    print("fine")
"""
READ_ONLY = "mount -t tmpfs -o ro none /dev/shm && ! touch /dev/shm/file 2>/dev/null"
ABSENT = (
    "mkdir {dev} && mount -t tmpfs none {dev} && for name in null zero urandom random; do "
    "touch {dev}/$name && mount --bind /dev/$name {dev}/$name; done && mount --rbind {dev} /dev && ! test -e /dev/shm"
)


@pytest.fixture
def program(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)

    def run(method, before=(), **variables):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **variables}
        command = [*before, sys.executable, str(tmp_path / "program.py"), method]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100, check=False)
        assert (done.returncode, done.stdout) == (0, "fine\n"), done.stderr
        return done.stderr

    return run


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
def test_a_temporary_folder_with_a_long_name(program, tmp_path, method):
    """Longer than the address of a socket may be."""
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    assert program(method, TMPDIR=str(folder)) == ""
    assert [path.name for path in folder.iterdir() if not path.name.startswith("pymp-")] == []


@pytest.mark.parametrize("method", ["forkserver", "spawn", "fork"])
@pytest.mark.parametrize("mounts", [READ_ONLY, ABSENT], ids=["read-only", "absent"])
def test_without_shared_memory(program, tmp_path, method, mounts):
    """The executors of the standard library have semaphores there."""
    assert program(method, with_mounts(mounts.format(dev=tmp_path / "dev"))) == ""
