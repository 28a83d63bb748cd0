"""What cannot be shown, whatever the reason: what runs ends with its values kept."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

import forgepar as fp

CONDITIONS = ("closed", "none", "ascii", "full", "gone", "raising")
SPEAKER = """
import logging, sys, warnings
import forgepar as fp

def speak(number):
    print("done \\u2713" * 1000, number)  # more than a pipe's buffer, in all
    print("told \\u2713", number, file=sys.stderr)
    logging.getLogger("speaker").warning("logged \\u2713 %d", number)
    warnings.warn("warned of \\u2713")
    return number

def workflow(n="20"):
    wf = fp.Workflow("speaker")
    speaking = wf.map(speak, range(int(n)))
    wf.add(fp.task(len).options(name="all", after=speaking), "\\u2713" * int(n))
    return wf
"""
SPOILT = """
import atexit, json, os
from speaker import *

class Refusing:
    encoding = "utf-8"
    def write(self, text):
        raise RuntimeError(text)
    def flush(self):
        raise RuntimeError("flush")

def refuse(*arguments):
    raise RuntimeError(arguments)

class Handler(logging.Handler):
    emit = refuse

def spoil(condition, entry):
    if condition == "closed":
        sys.stdout.close()
        sys.stderr.close()
    elif condition == "raising":
        sys.stdout = sys.stderr = Refusing()
        if entry != "inline":  # where tasks log and warn themselves
            warnings.showwarning = refuse
            logging.getLogger().addHandler(Handler())

def values(entry, **options):
    if entry == "pool":
        with fp.ForgeExecutor(2, start_method="fork") as executor:
            return list(executor.map(speak, range(20)))
    wf = fp.Workflow()
    handles = wf.map(speak, range(20))
    return wf.run(workers=2, **options)[handles]

condition, entry, path = sys.argv[1:]
spoil(condition, entry)
options = {"start_method": "fork"} if entry == "workflow" else {"backend": "inline"}
if entry != "pool":
    options["show"] = refuse if condition == "raising" else "tagged"
found = values(entry, **options)
with open(path, "w") as file:
    json.dump(found, file)
os._exit(0)  # what Python says of its streams at its end is not the matter here
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "speaker.py").write_text(SPEAKER)
    (tmp_path / "spoilt.py").write_text(SPOILT)
    return tmp_path


def run(folder, condition, *words):
    """Run a Python program under a condition of its standard streams; return its exit code and what it told."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    environment = {**kept, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, sys.path)])}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, *words]
    if condition == "ascii":
        environment["PYTHONIOENCODING"] = "ascii:strict"
    elif condition == "none":
        command = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh", *command]
    elif condition == "full":
        streams["stdout"] = os.open("/dev/full", os.O_WRONLY)
    elif condition == "gone":
        reader, streams["stdout"] = os.pipe()
        os.close(reader)
    try:
        done = subprocess.run(
            command, **streams, env=environment, cwd=folder, text=True, timeout=60, check=False, errors="replace"
        )
    finally:
        if condition in ("full", "gone"):
            os.close(streams["stdout"])
    return done


@pytest.mark.parametrize("entry", ["workflow", "pool", "inline"])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_program_has_its_values(folder, condition, entry):
    if entry == "inline" and condition != "raising":
        pytest.skip("what a task prints is then printed by the program itself, as without forgepar")
    done = run(folder, condition, "spoilt.py", condition, entry, "values.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "values.json").read_text()) == list(range(20))
    if condition == "ascii":
        assert "done \\u2713" in done.stdout
    if condition == "full":
        assert done.stderr.count("sys.stdout raised OSError") == 1
    if condition == "gone":
        assert "BrokenPipeError" not in done.stderr


CODES = {"none": 0, "ascii": 0, "full": 1, "gone": 141}


@pytest.mark.parametrize("backend", ["process", "inline"])
@pytest.mark.parametrize("condition", CODES)
def test_a_command_runs_all_tasks_and_says_how_it_ended(folder, condition, backend):
    if backend == "inline" and condition in ("gone", "full"):
        pytest.skip("tasks themselves find their standard output broken")
    files = ["--store", "runs.db", "--save-durations", "durations.json"]
    words = ["-m", "forgepar", "run", "speaker.py", "--start-method", "fork", "--backend", backend, *files]
    done = run(folder, condition, *words)
    assert done.returncode == CODES[condition], done.stderr
    assert len(json.loads((folder / "durations.json").read_text())["tasks"]) == 21
    with fp.Store.open(folder / "runs.db") as store:
        facts = store.run().facts
    assert (facts.status, facts.n_tasks) == ("completed", 21)
    assert "Traceback" not in (done.stderr or "")
    if condition == "ascii":
        assert "done \\u2713" in done.stdout
    if condition == "full":
        assert "No space left on device" in done.stderr.splitlines()[-1]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A folder with a store, which all commands only read."""
    folder = tmp_path_factory.mktemp("store")
    (folder / "speaker.py").write_text(SPEAKER)
    assert run(folder, "", "-m", "forgepar", "run", "speaker.py", "-p", "n=1", "--store", "runs.db").returncode == 0
    return folder


@pytest.mark.parametrize("words", [("-m", "forgepar", "values", "runs.db", "last"), ("-u", "-m", "forgepar", "--help")])
@pytest.mark.parametrize("condition", CODES)
def test_other_commands_too(store, condition, words):
    done = run(store, condition, *words)
    assert done.returncode == CODES[condition], done.stderr
    assert "Traceback" not in (done.stderr or "")


UNSHOWN = """
import forgepar as fp

class Unshown:
    def __repr__(self):
        raise RuntimeError("no such thing")

class Failure(Exception):
    __str__ = Unshown.__repr__

def fail():
    raise Failure

def one():
    wf = fp.Workflow()
    wf.add(Unshown)
    return wf

def two():
    wf = one()
    wf.map(fp.task(print).options(name="file \\udcff"), [1, 2])
    return wf

def failing():
    wf = two()
    wf.add(fp.task(fail).options(name="fail \\udcff"))
    return wf
"""


@pytest.mark.parametrize(("name", "code"), [("one", 0), ("two", 0), ("failing", 1)])
def test_values_errors_and_names_that_cannot_be_shown(tmp_path, name, code):
    (tmp_path / "unshown.py").write_text(UNSHOWN)
    words = ["run", f"unshown.py:{name}", "--backend", "inline", "--keep-going", "--store", "runs.db", "--summary"]
    done = run(tmp_path, "", "-m", "forgepar", *words, "--audit", "audit.jsonl", "--save-durations", "durations.json")
    assert done.returncode == code, done.stderr
    if code == 0:
        assert "<Unshown: __repr__ raised RuntimeError: no such thing>" in done.stdout
    else:
        assert "task 'fail \\udcff' failed: Failure: (no text: its __str__ raises)" in done.stderr
