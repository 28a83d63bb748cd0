"""The store's commands as a person uses them."""

from __future__ import annotations

import json
import os
import pickle
import sqlite3
import subprocess
import sys
import textwrap
from contextlib import closing

import pytest

import forgepar as fp
from forgepar.cli import main as cli
from forgepar.store.blobs import ValueFiles
from forgepar.store.database import files_of
from forgepar.store.resume import BLOB, FILE, SCALAR, checksum_of, payload_of_file

PIPELINE = """
    import forgepar as fp

    def part(i):
        print(f"part {i}")
        if i == 3:
            raise LookupError("no part 3")
        return i

    def parts(n: int = 3):
        wf = fp.Workflow("parts")
        wf.add(sum, wf.map(part, range(n)))
        return wf
"""


@pytest.fixture
def forgepar(tmp_path, monkeypatch, capfd):
    (tmp_path / "pipeline_with_store.py").write_text(textwrap.dedent(PIPELINE))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "pipeline_with_store", raising=False)

    def call(*words):
        code = cli.main(list(words))
        out, err = capfd.readouterr()
        return code, out, err

    return call


RUN = ("run", "pipeline_with_store.py:parts", "--backend", "inline", "--store", "runs.db")


def test_run_show_resume_rerun(forgepar):
    assert forgepar(*RUN) == (0, "part 0\npart 1\npart 2\nsum = 3\n", "")
    assert forgepar(*RUN, "--resume") == (0, "sum = 3\n", "")
    assert forgepar(*RUN, "--rerun", "part-1")[1] == "part 1\nsum = 3\n"
    assert forgepar(*RUN, "--from", "part-*", "--wait")[1] == "part 0\npart 1\npart 2\nsum = 3\n"
    code, out, _ = forgepar("runs", "runs.db")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["run", "1", "2", "3", "4"]
    assert "completed (resumed)" in out
    code, out, _ = forgepar("show", "runs.db", "1")
    assert "4 completed" in out
    assert "longest task" in out
    assert "part-2" in out


def test_failures_are_shown_with_their_traceback(forgepar):
    code, _, _ = forgepar(*RUN, "-p", "n=5", "--keep-going")
    assert code == 1
    _, out, _ = forgepar("show", "runs.db")
    assert ": failed" in out
    assert "task 'part-3' failed at attempt 1: LookupError: no part 3" in out
    assert 'raise LookupError("no part 3")' in out
    assert "1 skipped" in out


def test_asking_in_json(forgepar):
    forgepar(*RUN, "-p", "n=5", "--keep-going")
    (facts,) = json.loads(forgepar("runs", "runs.db", "--json")[1])
    assert (facts["number"], facts["workflow"], facts["status"], facts["n_tasks"]) == (1, "parts", "failed", 6)
    told = json.loads(forgepar("show", "runs.db", "--json")[1])
    assert told["counts"] == {"completed": 4, "failed": 1, "skipped": 1}
    assert [task["name"] for task in told["tasks"]] == [*(f"part-{i}" for i in range(5)), "sum"]
    assert told["tasks"][5]["start"] is None
    assert told["failures"][0]["task"] == "part-3"


def test_values(forgepar, tmp_path):
    forgepar(*RUN)
    code, out, _ = forgepar("values", "runs.db", "last")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == ["task", "part-0", "part-1", "part-2", "sum"]
    assert forgepar("values", "runs.db", "1", "sum") == (0, "3\n", "")
    assert forgepar("values", "runs.db", "1", "sum", "--json")[1] == "3\n"
    forgepar("values", "runs.db", "1", "sum", "-o", "value.pickle")
    assert pickle.loads((tmp_path / "value.pickle").read_bytes()) == 3
    assert len(json.loads(forgepar("values", "runs.db", "--json")[1])) == 4
    code, _, err = forgepar("values", "runs.db", "1", "nobody")
    assert code == 2
    assert "has no task named 'nobody'" in err


ODD = """
    import forgepar as fp

    class Thing:
        def __repr__(self):
            return "a thing"

    class Strange(Thing):
        def __reduce__(self):
            return __import__, ("no_such_module",)

    def circle():
        found = []
        found.append(found)
        return found

    wf = fp.Workflow("odd\\nname")
    wf.add(lambda: Thing())
    wf.add(lambda: {(1, 2): float("nan"), "b": 2, 3: 4})
    wf.add(circle)
    wf.add(fp.task(Strange).options(name="\x1b[31mred"))
    wf.run(backend="inline", store="runs.db", outputs=[])
"""


def test_odd_values_and_names(forgepar, tmp_path):
    (tmp_path / "odd.py").write_text(textwrap.dedent(ODD))
    subprocess.run([sys.executable, "odd.py"], cwd=tmp_path, check=True)
    assert forgepar("values", "runs.db", "1", "lambda") == (0, "a thing\n", "")
    assert forgepar("values", "runs.db", "1", "lambda", "-o", "thing.pickle") == (0, "", "")
    assert repr(pickle.loads((tmp_path / "thing.pickle").read_bytes())) == "a thing"
    assert json.loads(forgepar("values", "runs.db", "1", "lambda-1", "--json")[1]) == {"(1, 2)": None, "b": 2, "3": 4}
    assert forgepar("values", "runs.db", "1", "circle")[1] == "[[...]]\n"
    code, out, err = forgepar("values", "runs.db", "1", "circle", "--json")
    assert (code, out, err) == (
        2,
        "",
        "forgepar: the value contains itself, or is nested too deeply for JSON.\n",
    )
    code, _, err = forgepar("values", "runs.db", "1", "\x1b[31mred")
    assert code == 2
    assert "cannot be unpickled here (ModuleNotFoundError: No module named 'no_such_module')" in err
    for command in ("runs", "show", "values"):
        code, out, _ = forgepar(command, "runs.db")
        assert (code, "\x1b" in out) == (0, False)


@pytest.mark.parametrize("words", [("values", "runs.db", "1", "sum"), ("export", "runs.db")])
def test_a_file_that_cannot_be_written_is_told(forgepar, words):
    told = "forgepar: -o: nowhere/file cannot be written: there is no folder nowhere. Create it first.\n"
    assert forgepar(*words, "-o", "nowhere/file") == (2, "", told)


def test_export_of_events_is_an_audit_log(forgepar):
    forgepar(*RUN)
    assert forgepar("export", "runs.db", "1", "--format", "jsonl", "-o", "events.jsonl")[0] == 0
    log = fp.AuditLog.load("events.jsonl")
    assert log.replay().counts == {"completed": 4}
    assert len(forgepar("export", "runs.db")[1].splitlines()) == len(log.events)


def test_export_to_other_programs(forgepar, tmp_path):
    forgepar(*RUN)
    forgepar("export", "runs.db", "1", "--format", "wfformat", "-o", "run.json")
    tasks = json.loads((tmp_path / "run.json").read_text())["workflow"]["specification"]["tasks"]
    assert len(tasks) == 4
    trace = json.loads(forgepar("export", "runs.db", "--format", "chrome")[1])
    assert sum(event["ph"] == "X" for event in trace["traceEvents"]) == 4


def test_report_and_plan(forgepar, tmp_path):
    pytest.importorskip("bokeh")
    forgepar(*RUN)
    assert forgepar("report", "runs.db", "1", "-o", "of one.html") == (0, "report in of one.html\n", "")
    assert "<html" in (tmp_path / "of one.html").read_text()
    code, _, err = forgepar("report", "runs.db", "-o", "nowhere/run.html")
    assert code == 2
    assert "there is no folder nowhere" in err
    rows = json.loads(forgepar("plan", "runs.db", "--workers", "1..4", "--json")[1])
    assert [row["workers"] for row in rows] == [1, 2, 4]
    assert "eager" in forgepar("plan", "runs.db", "last", "--workers", "2")[1]
    assert forgepar("plan", "runs.db", "--workers", "none")[0] == 2


def test_gc(forgepar):
    for _ in range(3):
        forgepar(*RUN)
    code, out, _ = forgepar("gc", "runs.db", "--keep", "1", "--max-bytes", "1GiB")
    assert code == 0
    assert out.startswith("removed 2 runs, ")
    assert json.loads(forgepar("gc", "runs.db", "--keep", "0", "--json")[1])["n_runs"] == 1
    code, _, err = forgepar("gc", "runs.db")
    assert (code, err) == (
        2,
        "forgepar: gc needs a limit. Give --keep N, --max-bytes SIZE, or both.\n",
    )
    assert forgepar("runs", "runs.db")[1] == "runs.db has no runs\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--keep", "-1"), "expected an integer of at most 18 digits, 0 or more, got '-1'."),
        (("--keep", "many"), "expected an integer of at most 18 digits, 0 or more, got 'many'."),
        (
            ("--max-bytes", "20 bananas"),
            "size must be a number of bytes, or a string such as '2GiB' or '500MB', got '20 bananas'.",
        ),
    ],
)
def test_gc_refuses_what_is_not_a_number(forgepar, words, message, capfd):
    with pytest.raises(SystemExit) as caught:
        cli.main(["gc", "runs.db", *words])
    assert caught.value.code == 2
    assert message in capfd.readouterr().err


def test_what_is_not_there_is_told(forgepar):
    for command in ("runs", "show", "values", "export", "gc"):
        code, out, err = forgepar(command, "nowhere.db", *(("--keep", "1") if command == "gc" else ()))
        assert (code, out) == (2, "")
        assert err.startswith("forgepar: there is no run store 'nowhere.db'")


@pytest.mark.parametrize("words", [("--resume",), ("--rerun", "a"), ("--from", "a"), ("--wait",)])
def test_taking_up_needs_a_store(forgepar, words):
    code, _, err = forgepar(*RUN[:-2], *words)
    assert code == 2
    assert "need a run store. Give --store FILE" in err


def test_a_reader_that_has_read_enough_ends_a_command_as_any_other(tmp_path, forgepar):
    forgepar(*RUN, "-p", "n=3")
    command = f"{sys.executable} -m forgepar export runs.db | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode in (0, 141), done.stderr) == (True, "")  # 0 where all was written before it left
    assert "WorkflowStarted" in done.stdout


def test_lists_reports_and_exports_of_a_store_unpickle_nothing(forgepar, tmp_path):
    """Values of all three kinds are code, which only asking for a value or a resumed run would run."""
    program = (
        "import forgepar as fp, numpy as np\n"
        "wf = fp.Workflow('kinds')\n"
        "wf.add(fp.task(abs).options(name='scalar'), -1)\n"
        "wf.add(fp.task(list).options(name='blob'), range(3))\n"
        "wf.add(fp.task(np.zeros).options(name='file'), 1 << 16)\n"
        "wf.run(backend='inline', store='runs.db')\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    files = ValueFiles(files_of(tmp_path / "runs.db"))
    planted = pickle.dumps(_Code(str(tmp_path / "ran")))
    with closing(sqlite3.connect("runs.db")) as connection:
        rows = connection.execute('SELECT fingerprint, run, kind FROM "values"').fetchall()
        assert sorted(kind for _, _, kind in rows) == [SCALAR, BLOB, FILE]
        for fingerprint, run, kind in rows:
            payload = planted
            if kind == FILE:
                payload = payload_of_file(files.write([memoryview(planted)]), [len(planted)])
            told = (payload, checksum_of(fingerprint, kind, payload), fingerprint, run)
            connection.execute('UPDATE "values" SET payload = ?, checksum = ? WHERE fingerprint = ? AND run = ?', told)
        connection.commit()
    commands = ["runs", "show", "values", "export", "plan", "top"]
    for command in [*([name] for name in commands), *([name, "--json"] for name in commands if name != "export")]:
        assert forgepar(command[0], "runs.db", *command[1:])[0] == 0
    for form in ("wfformat", "chrome"):
        assert forgepar("export", "runs.db", "--format", form)[0] == 0
    with fp.Store.open("runs.db") as store:
        run = store.run()
        assert (len(run.stored_values()), len(list(run.events())), len(run.table())) == (3, 11, 3)
    assert forgepar("gc", "runs.db", "--keep", "1")[0] == 0
    assert not (tmp_path / "ran").exists()
    for name in ("scalar", "blob", "file"):
        assert forgepar("values", "runs.db", "last", name)[0] == 0
        assert (tmp_path / "ran").exists(), "what was planted is code"
        (tmp_path / "ran").rmdir()


class _Code:
    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_help_says_what_runs_code_of_the_stores_owner(capsys):
    for command in ("values", "run"):
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        assert "runs the code of the store's owner" in " ".join(capsys.readouterr().out.split())
