"""A program that is killed again and again, and taken up each time: nothing is lost but what had just been done."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import PATIENCE, wait_until

import forgepar as fp

N_LAYERS, WIDTH = 10, 50
PROGRAM = """
    import hashlib, sys
    import numpy as np
    import forgepar as fp

    store, log, workers, kill_count = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    BYTES = {7: 50 << 20, 110: 8 << 20, 230: 1 << 20, 340: 50 << 20, 480: 200 << 10}

    class Log:
        def __init__(self, path):
            self.path = path

        def __forgepar_fingerprint__(self):
            return "log"

    def work(log, number, *before):
        with open(log.path, "a") as file:
            file.write(f"{number}\\n")
        seed = hashlib.blake2b(repr([number, *map(brief, before)]).encode(), digest_size=8).digest()
        if number in BYTES:
            return np.random.default_rng(list(seed)).integers(0, 256, BYTES[number], np.uint8)
        spins = sum(range(60_000))  # some 2 ms
        return seed.hex() * (1 + number % 300)

    def brief(value):
        return hashlib.blake2b(value if isinstance(value, np.ndarray) else value.encode(), digest_size=8).hexdigest()

    wf = fp.Workflow("killed")
    handles = []
    for layer in range(LAYERS):
        above = handles[-WIDTH:]
        for place in range(WIDTH):
            before = [above[(place + shift) % WIDTH] for shift in (0, 1, 7)] if above else []
            handles.append(wf.add(work, Log(log), len(handles), *before))
    print("begun", flush=True)
    result = wf.run(workers=workers, store=store, resume=True, outputs="all")
    print("".join(brief(result[handle]) for handle in handles), flush=True)
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    text = textwrap.dedent(PROGRAM).replace("LAYERS", str(N_LAYERS)).replace("WIDTH", str(WIDTH))
    path.write_text(text)
    return path


def started(program: Path, store: Path, log: Path, workers: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(program), str(store), str(log), str(workers), ""],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finished(running: subprocess.Popen[str]) -> str:
    out, err = running.communicate(timeout=4 * PATIENCE)
    assert (running.returncode, err) == (0, "")
    return out.split()[-1]


def n_lines(log: Path) -> int:
    return log.read_bytes().count(b"\n") if log.exists() else 0


def kill_after(running: subprocess.Popen[str], log: Path, n_more: int) -> bool:
    """Kill a program once it has begun so many more tasks; tell whether it was still running."""
    wanted = n_lines(log) + n_more
    wait_until(lambda: n_lines(log) >= wanted or running.poll() is not None, "tasks to begin")
    running.send_signal(signal.SIGKILL)
    running.communicate(timeout=PATIENCE)  # workers have the pipes too: at their end they are gone
    return running.returncode == -signal.SIGKILL


@pytest.mark.parametrize("n_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_run_that_is_killed_again_and_again_comes_to_the_same_end(program, tmp_path, n_kills, record_property):
    chance = random.Random(n_kills)
    with started(program, tmp_path / "undisturbed.db", tmp_path / "undisturbed", 2) as running:
        expected = finished(running)
    store, log = tmp_path / "runs.db", tmp_path / "log"
    n_killed = 0
    for number in range(n_kills):
        with started(program, store, log, 1 + number % 4) as running:
            n_killed += kill_after(running, log, chance.randrange(1, 45))
    with started(program, store, log, 2) as running:
        assert finished(running) == expected
    assert n_killed >= n_kills - 3  # it may have come to its end before the last ones
    n_tasks, n_executions = N_LAYERS * WIDTH, n_lines(log)
    record_property("executions", n_executions)
    assert n_tasks <= n_executions < n_tasks + n_killed * WIDTH
    with fp.Store.open(store) as opened:
        statuses = [facts.status for facts in opened.runs()]
    assert statuses[-1] == "completed"
    assert set(statuses[:-1]) <= {"interrupted", "completed"}
