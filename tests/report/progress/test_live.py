"""The whole-screen views: a run of this process, and one of another by its store."""

from __future__ import annotations

import os
import re
import threading
from contextlib import redirect_stderr, redirect_stdout

import numpy as np
import pytest
from conftest import PATIENCE, wait_until
from pseudo_terminal import pseudo_terminal

import forgepar as fp
from forgepar.cli import main as cli
from forgepar.cli import watch as watching
from forgepar.report.progress import live
from forgepar.report.progress.live import LiveProgress, watch_table
from forgepar.report.progress.processes import Processes
from forgepar.scheduling.run_state import Status


@pytest.fixture(autouse=True)
def known_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")


def wait_for(path, told=None):
    fp.context().progress(0.25, "reading")
    print("it waits")
    wait_until(path.exists, "being told to go on")


def broken(x):
    raise LookupError(f"nothing for {x}")


def slow(tmp_path):
    wf = fp.Workflow("nightly")
    wf.map(abs, range(5))
    wf.add(fp.task(broken).options(name="bad", fallback=0), 7)
    wf.add(fp.task(wait_for).options(name="slow"), tmp_path / "go")
    return wf


def watched(terminal, tmp_path, look):
    """Run a workflow on a terminal, and look at it while it waits."""
    failures = []

    def watch():
        try:
            look()
        except BaseException as error:
            failures.append(error)
        finally:
            (tmp_path / "go").touch()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
            display = LiveProgress(terminal.stream, terminal.stream)
            result = slow(tmp_path).run(workers=1, start_method="fork", progress=display)
    finally:
        watcher.join()
    terminal.settle()
    assert not failures, failures
    return result


@pytest.mark.parametrize("columns", [80, 200])
def test_the_screen_shows_workers_failures_and_output(tmp_path, columns):
    with pseudo_terminal(columns, 24) as terminal:

        def look():
            terminal.wait_for("(25 % reading)")
            terminal.wait_for("bad failed in attempt 1, continues: LookupError: nothing for 7")
            wait_until(lambda: "it waits" in terminal.lines, "what the task printed")
            lines = terminal.lines
            assert all(len(line) < columns for line in lines)
            assert re.match(r"layer 1 of 1 ━+[╸╺]━+ 6/7 85 %", lines[0])
            head = next(i for i, line in enumerate(lines) if line.split()[:2] == ["worker", "pid"])
            assert re.match(r" +0 +\d+ +\d+ % +\S+ MiB +0:\d\d +slow \(25 % reading\)", lines[head + 1])
            assert lines[-1] == "q: back to bars; Ctrl-C: end the run"

        assert watched(terminal, tmp_path, look).ok
        # Behind the screen, what was printed meanwhile and the last line.
        behind = terminal.raw.rpartition(b"\x1b[?1049l")[2].decode()
        assert behind.splitlines()[0] == "it waits"
        assert "nightly: 7 of 7 tasks in 1 layer" in behind
        assert not terminal.screen.cursor.hidden


def test_q_leaves_for_the_bars(tmp_path, monkeypatch):
    monkeypatch.setattr("forgepar.report.progress.display.FIRST_SECONDS", 0.0)
    with pseudo_terminal(80, 24) as terminal:

        def look():
            terminal.wait_for("(25 % reading)")
            terminal.type("q")
            wait_until(lambda: b"\x1b[?1049l" in terminal.raw, "the screen to be left")
            wait_until(lambda: b"6/7" in terminal.raw.rpartition(b"\x1b[?1049l")[2], "the bars")

        assert watched(terminal, tmp_path, look).ok
        assert terminal.raw.count(b"\x1b[?1049h") == terminal.raw.count(b"\x1b[?1049l") == 1


def test_an_interrupt_gives_the_screen_back(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pseudo_terminal(80, 24) as terminal, redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
        display = LiveProgress(terminal.stream, terminal.stream)
        monkeypatch.setattr(display, "_draw", interrupt)
        with pytest.raises(KeyboardInterrupt):
            slow(tmp_path).run(backend="inline", progress=display)
        terminal.settle()
        assert b"\x1b[?1049l" in terminal.raw
        assert not terminal.screen.cursor.hidden
        terminal.type("echo\n")
        wait_until(lambda: "echo" in terminal.text, "the echo of keys, which is on again")


def test_many_workers_and_lines_fit_on_the_screen():
    rows = [("worker", "task"), *((str(i), f"t-{i}") for i in range(500))]
    figures = live.RunMeter().of_table(table())
    with pseudo_terminal(80, 20) as terminal:
        parts = live.screen(figures, rows, ["failed"] * 5, ["line"] * 100, 80, 20, "hint")
        frame = live.Artist(terminal.stream).frame(parts, 80, 21)
    assert frame.n_rows(80) <= 20
    assert "hint" in frame.text.splitlines()[-1]
    assert re.search(r"and 49\d more workers", frame.text)


# Of another process


def table(status="completed", n_done=6):
    """What a store would tell of a run that has done so many of its 6 tasks."""
    wf = fp.Workflow("stored")
    wf.map(abs, wf.map(abs, range(3)))
    whole = wf.run(backend="inline").table()
    undone = np.arange(6) >= n_done
    columns = {
        "status_of": np.where(undone, Status.PENDING, whole.status_of).astype(np.int8),
        "start": np.where(undone, np.nan, whole.start),
        "seconds": np.where(undone, np.nan, whole.seconds),
        "worker": np.where(undone, -1, whole.worker).astype(np.int32),
    }
    return type(whole)(**{**vars(whole), **columns, "status": status})


def test_a_table_is_watched_until_its_run_ends(monkeypatch):
    monkeypatch.setattr(live, "_READ_SECONDS", 0.01)
    monkeypatch.setattr(live, "_READ_SHARE", 0)
    tables = [table("running", 2), table("running", 4), table("completed", 6)]
    seen = []
    with pseudo_terminal(80, 24) as terminal:

        def read():
            terminal.settle()
            seen.append(terminal.lines)
            return tables.pop(0)

        figures = watch_table(read, os.getpid(), terminal.stream, terminal.stream)
        terminal.settle()
        assert terminal.raw.endswith(b"\x07")
        assert b"\x1b[?1049l" in terminal.raw
    assert figures.n_done == 6
    assert not tables
    assert re.match(r"layer 1 of 2 .* 2/3 66 %", seen[1][0])
    assert re.match(r"layer 2 of 2 .* 1/3 33 %", seen[2][0])
    (row,) = (line for line in seen[2] if re.match(r" +0 +4 ", line))
    assert "abs-3" in row
    assert any(re.search(rf"process {os.getpid()} and \d+ children: CPU \d+ %", line) for line in seen[1])


def test_q_ends_watching_a_table():
    with pseudo_terminal(80, 24) as terminal:

        def read():
            terminal.type("q")
            return table("running", 2)

        assert watch_table(read, None, terminal.stream, terminal.stream).n_done == 2


def test_processes_that_are_gone_are_left_out():
    processes = Processes()
    found = processes.usage([os.getpid(), 2**22 + 1])
    assert list(found) == [os.getpid()]
    assert found[os.getpid()].memory > 1 << 20
    assert processes.usage_below(2**22 + 1) == {}
    assert os.getpid() in processes.usage_below(os.getpid())


# Commands


@pytest.fixture
def store(tmp_path):
    wf = fp.Workflow("stored")
    wf.map(abs, wf.map(abs, range(3)))
    wf.run(backend="inline", store=tmp_path / "runs.db")
    return str(tmp_path / "runs.db")


def test_top_tells_once_where_there_is_no_terminal(store, capsys):
    assert cli.main(["top", store]) == 0
    assert capsys.readouterr().out.startswith("run 1 completed: stored: 6 of 6 tasks in 2 layers, ")
    assert cli.main(["top", store, "--json"]) == 0
    assert '"n_done": 6' in capsys.readouterr().out
    assert cli.main(["top", store, "17"]) == 2


def test_top_watches_a_run_of_another_thread_to_its_end(tmp_path, monkeypatch):
    """The command itself, on a terminal, beside a run that goes."""
    monkeypatch.setattr(live, "_READ_SECONDS", 0.01)
    path = tmp_path / "runs.db"
    with pseudo_terminal(80, 24) as terminal:
        with fp.WorkflowExecutor(workers=1, start_method="fork") as executor:
            results = []
            runner = threading.Thread(target=lambda: results.append(executor.run(slow(tmp_path), store=path)))
            runner.start()
            wait_until(lambda: executor.state is not None and executor.state.fraction > 0.8, "the run to wait")

            def look():
                terminal.wait_for("nightly")
                (tmp_path / "go").touch()

            looker = threading.Thread(target=look)
            looker.start()
            try:
                with redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
                    monkeypatch.setattr("sys.stdin", terminal.stream)
                    assert cli.main(["top", str(path)]) == 0
            finally:
                looker.join(PATIENCE)
                runner.join(PATIENCE)
        terminal.settle()
        behind = terminal.raw.rpartition(b"\x1b[?1049l")[2].decode()
        assert "run 1 completed: nightly: 7 of 7 tasks in 1 layer" in behind
    assert results[0].ok


def test_watch_needs_a_terminal_and_rich(tmp_path, monkeypatch, capsys):
    (tmp_path / "wf.py").write_text("import forgepar as fp\nworkflow = fp.Workflow()\nworkflow.add(abs, 1)\n")
    command = ["run", f"{tmp_path / 'wf.py'}:workflow", "--watch", "--backend", "inline"]
    assert cli.main(command) == 2
    assert "--watch needs a terminal" in capsys.readouterr().err
    monkeypatch.setattr(watching, "has_rich", lambda: False)
    monkeypatch.setattr(watching, "is_terminal", lambda _: True)
    assert cli.main(command) == 2
    assert "pip install 'forgepar[cli]'" in capsys.readouterr().err
