"""Progress in a notebook, run by a real kernel: one output that is written anew, and a last line that stays."""

from __future__ import annotations

import ast
import json
import math
import subprocess
import sys

import pytest

from forgepar.records.display import FailedTask
from forgepar.report.progress import notebook

CELL = """
import sys, time
import forgepar as fp

def broken(x):
    raise LookupError(f"nothing for <{x}>")

def pause(x):
    time.sleep(0.02)
    print("task", x)

wf = fp.Workflow("cells & co")
wf.add(fp.task(broken).options(name="bad", fallback=0), 7)
wf.map(pause, range(30))
result = wf.run(workers=1, start_method="fork", progress=True)
result.ok
"""
SPOILT = """
import io, os, warnings
from contextlib import redirect_stdout

class Refusing(io.StringIO):
    def write(self, text):
        raise RuntimeError(text)

def speak(x):
    print("done \\u2713", x)
    return x

reader, writer = os.pipe()
os.close(reader)
closed = io.StringIO()
closed.close()
streams = {
    "closed": closed, "none": None, "ascii": io.TextIOWrapper(io.BytesIO(), "ascii", line_buffering=True),
    "full": open("/dev/full", "w", buffering=1), "gone": os.fdopen(writer, "w", buffering=1), "raising": Refusing(),
}
found = {}
for name, stream in streams.items():
    wf = fp.Workflow(name)
    values = wf.map(speak, range(5))
    with warnings.catch_warnings(), redirect_stdout(stream):
        warnings.simplefilter("ignore")
        found[name] = wf.run(workers=1, start_method="fork", progress=False)[values]
found
"""
PROGRAM = """
import json, sys
import nbformat
from nbclient import NotebookClient

class Watching(NotebookClient):
    updates = []
    def process_message(self, message, cell, index):
        if message["msg_type"] in ("display_data", "update_display_data"):
            self.updates.append((message["msg_type"], message["content"]["data"]))
        return super().process_message(message, cell, index)

book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in json.load(sys.stdin)])
client = Watching(book, timeout=60, kernel_name="python3")
client.execute()
print(json.dumps({"updates": client.updates, "outputs": book.cells[0].outputs, "last": book.cells[1].outputs[-1]}))
"""


@pytest.fixture(scope="module")
def executed():
    """What a notebook shows at the end, and what it was told on the way."""
    for name in ("nbclient", "ipykernel"):
        pytest.importorskip(name, reason=f"{name}, of the extra test, runs notebooks")
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM]
    cells = json.dumps([CELL, SPOILT])
    done = subprocess.run(command, input=cells, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_bars_are_one_output_that_is_written_anew(executed):
    kinds = [kind for kind, _ in executed["updates"]]
    assert kinds[0] == "display_data"
    assert set(kinds[1:]) == {"update_display_data"}
    amid = [data for _, data in executed["updates"][:-1]]
    assert any("━" in data["text/html"] and "cells &amp; co" in data["text/html"] for data in amid)
    assert any(data["text/plain"].splitlines()[-1].startswith("cells & co: ") for data in amid)


def test_the_last_line_stays(executed):
    shown = [output for output in executed["outputs"] if output["output_type"] == "display_data"]
    assert len(shown) == 1
    assert "cells &amp; co: 31 of 31 tasks in 1 layer" in shown[0]["data"]["text/html"]
    assert executed["outputs"][-1]["data"]["text/plain"] == "True"


def test_a_failure_stands_above_and_stays(executed):
    first = executed["updates"][0][1]
    assert first["text/plain"].splitlines()[0] == "bad failed in attempt 1, continues: LookupError: nothing for <7>"
    assert "nothing for &lt;7&gt;</span>" in executed["updates"][-1][1]["text/html"]


def test_what_tasks_print_is_an_output_of_its_own(executed):
    printed = "".join(output["text"] for output in executed["outputs"] if output["output_type"] == "stream")
    assert printed.splitlines() == [f"task {x}" for x in range(30)]


@pytest.mark.parametrize("condition", ["closed", "none", "ascii", "full", "gone", "raising"])
def test_a_run_has_its_values_where_nothing_can_be_printed(executed, condition):
    found = ast.literal_eval(executed["last"]["data"]["text/plain"])
    assert found[condition] == list(range(5))


def test_a_plain_python_is_no_notebook():
    assert not notebook.is_notebook()


def test_before_and_after_a_run_nothing_is_drawn():
    display = notebook.NotebookProgress()
    display.failed(FailedTask("a", 1, "E", False))
    display.beat(0.0)
    display.close()
    assert display.look_at == math.inf
