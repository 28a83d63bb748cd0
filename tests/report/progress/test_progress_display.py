"""Progress of whole runs as a person sees it: on terminals of several widths, in files, without rich, interrupted."""

from __future__ import annotations

import io
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
from contextlib import contextmanager, redirect_stderr, redirect_stdout

import pytest
from conftest import PATIENCE, wait_until
from pseudo_terminal import pseudo_terminal

import forgepar as fp
from forgepar.cli import main as cli
from forgepar.cli import run as running
from forgepar.records.display import FailedTask, RunningTask
from forgepar.report.progress import display as progress
from forgepar.report.progress.display import BarProgress, Pace, progress_display
from forgepar.report.progress.figures import Figures, LayerFigures
from forgepar.report.progress.plain import PlainProgress
from forgepar.report.progress.wording import MOST_FAILURES

BAR = re.compile("[━╸╺]{6,}")


@pytest.fixture(autouse=True)
def known_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)


def figures(**fields):
    known = {
        "workflow": "nightly",
        "n_tasks": 40_000,
        "n_done": 13_204,
        "counts": {"pending": 26_788, "running": 8, "completed": 13_000, "failed": 4, "cached": 200},
        "n_layers": 12,
        "n_layers_done": 3,
        "layers": (LayerFigures(3, 1204, 3000),),
        "n_open": 1,
        "n_workers": 8,
        "running": (RunningTask("clean-1204", 3, 99, 32.0, 0.5, "halfway"),),
        "pids": (1,) * 8,
        "rate": 5210.4,
        "seconds_left": 80.0,
        "bytes_held": 1_300_000_000,
        "elapsed_seconds": 12.0,
    }
    return Figures(**{**known, **fields})


def drawn(columns, lines=24, **fields):
    """The rows of a terminal on which figures were drawn."""
    with pseudo_terminal(columns, lines) as terminal:
        display = BarProgress(terminal.stream)
        display.draw(figures(**fields))
        terminal.settle()
        return terminal.lines


def work(x):
    return x


def wait_for(path):
    wait_until(path.exists, "being told to go on")


def broken(x):
    raise LookupError(f"nothing for {x}")


# What is drawn


@pytest.mark.parametrize("columns", [80, 200])
def test_bars_tell_all_there_is_to_know(columns):
    lines = drawn(columns)
    assert all(len(line) < columns for line in lines)
    layer, run, *rest = lines
    assert re.match(r"layer 4 of 12 +[━╸╺]+ +1,204/3,000 +40 %", layer)
    assert re.match(r"nightly +[━╸╺]+ 13,204/40,000 +33 % +0:12", run)
    told = " ".join(rest)
    for text in (
        "1:20 left",
        "4 failed",
        "200 cached",
        "3 of 12 layers done",
        "1 of 8 workers busy",
        "5,210 tasks/s",
        "1.2 GiB held",
        "clean-1204 0:32 (50 % halfway)",
    ):
        assert text in told
    assert len(BAR.search(run)[0]) >= columns // 4


@pytest.mark.parametrize("columns", [20, 30, 40, 60])
def test_a_narrow_terminal_has_the_most_important(columns):
    lines = drawn(columns)
    assert all(len(line) < columns for line in lines)
    assert any("1:20 left" in line for line in lines)
    assert lines[1].startswith("nightly")
    assert "33 %" in lines[1]
    assert len(lines) <= 6


def test_a_low_terminal_is_not_overflown():
    assert len(drawn(80, 3)) <= 2


def test_many_layers_do_not_fill_the_screen():
    layers = tuple(LayerFigures(i, 1, 10) for i in range(3))
    lines = drawn(80, n_layers=5000, layers=layers, n_open=700)
    assert len(lines) <= 8
    assert "and 697 more layers begun" in lines


def test_names_that_would_move_the_cursor_do_not():
    lines = drawn(80, workflow="bad\x1b[2J\nname")
    assert lines[0].startswith("layer 4 of 12")
    assert "[2J" in lines[1]


def test_colours_obey_no_color(monkeypatch):
    def raw():
        with pseudo_terminal(80, 24) as terminal:
            BarProgress(terminal.stream).draw(figures())
            terminal.settle()
            return terminal.raw

    assert re.search(rb"\x1b\[[0-9;]*3[0-9]", raw())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not re.search(rb"\x1b\[[0-9;]*[34][0-9]", raw())


def test_drawings_take_less_than_a_hundredth_of_the_time():
    pace, now, spent = Pace(), 0.2, 0.0
    for cost in [0.0001] * 5 + [0.002] * 50 + [0.01] * 50:
        after = now + cost
        spent += cost
        now = pace.next_after(now, after)
        assert now - after >= 0.0999
    assert spent < now / 100


def test_a_drawing_that_hung_does_not_stop_the_others():
    pace = Pace()
    pace.next_after(0.2, 0.201)
    assert pace.next_after(1.0, 60.0) <= 62.0


def test_failures_are_told_one_by_one_and_then_counted():
    out = io.StringIO()
    display = PlainProgress(out)
    display.begin(lambda: None)
    for number in range(10 * MOST_FAILURES):
        display.failed(FailedTask(f"t-{number}", 1, "ValueError: no\nmore", False))
    lines = out.getvalue().splitlines()
    assert lines[0] == "forgepar: t-0 failed in attempt 1: ValueError: no"
    assert lines[-1] == "forgepar: further failures are only counted"
    assert len(lines) == MOST_FAILURES + 1


# Whole runs in this process


def test_a_failure_stands_above_the_bars_while_the_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    wf = fp.Workflow("nightly")
    bad = wf.add(fp.task(broken).options(name="bad", retries=1, backoff=0.0), 7)
    wf.add(work, bad)
    wf.add(fp.task(wait_for).options(name="slow"), tmp_path / "go")
    with pseudo_terminal(80, 24) as terminal, fp.WorkflowExecutor(workers=2, start_method="fork") as executor:
        seen = []

        def look():
            try:
                terminal.wait_for("bad failed in attempt 1, continues: LookupError: nothing for 7")
                terminal.wait_for("bad failed in attempt 2: LookupError: nothing for 7")
                terminal.wait_for("1 failed")
                seen.append((executor.state, terminal.lines))
            finally:
                (tmp_path / "go").touch()

        looker = threading.Thread(target=look)
        looker.start()
        with pytest.raises(fp.WorkflowFailed):
            executor.run(wf, fail_fast=False, progress=progress_display(terminal.stream))
        looker.join()
        terminal.settle()
        ((state, lines),) = seen
        assert state.counts["running"] == 1
        assert [line[:3] for line in lines[:3]] == ["bad", "bad", "lay"]
        assert terminal.lines[2].startswith("nightly: 3 of 3 tasks in 2 layers, 1 failed, 1 skipped")


@pytest.mark.parametrize("backend", ["inline", "fork"])
def test_what_tasks_print_is_whole_and_above_the_bars(backend, monkeypatch):
    def talk(x):
        print(f"line {x} of {'x' * 20}")
        print(f"error {x}", file=sys.stderr)

    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(progress, "SHARE", 0)  # draws whenever it can
    how = {"backend": "inline"} if backend == "inline" else {"workers": 2, "start_method": backend}
    wf = fp.Workflow("loud")
    wf.map(talk, range(60))
    with pseudo_terminal(80, 24) as terminal:
        with redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
            wf.run(**how, progress=True)
        terminal.settle()
        *printed, last = terminal.text.splitlines()
        assert terminal.raw.count(b"loud") > 2  # bars were drawn in between
    expected = [text for x in range(60) for text in (f"line {x} of {'x' * 20}", f"error {x}")]
    assert sorted(printed) == sorted(expected)
    assert last.startswith("loud: 60 of 60 tasks in 1 layer, ")


def test_a_resized_terminal_gets_bars_of_its_new_width(tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    wf = fp.Workflow("wide")
    wf.map(work, range(5))
    wf.add(fp.task(wait_for).options(name="slow"), tmp_path / "go")
    with pseudo_terminal(200, 24) as terminal, fp.WorkflowExecutor(workers=1, start_method="fork") as executor:

        def drag():
            try:
                terminal.wait_for("5/6")
                terminal.resize(50, 24)
                wait_until(lambda: all(len(line) < 50 for line in terminal.lines), "narrow bars")
                terminal.wait_for("5/6")
            finally:
                (tmp_path / "go").touch()

        dragger = threading.Thread(target=drag)
        dragger.start()
        assert executor.run(wf, progress=progress_display(terminal.stream)).ok
        dragger.join()
        terminal.settle()
        (last,) = terminal.lines
    assert last.startswith("wide: 6 of 6 tasks")


def test_a_drawing_that_fails_is_off_with_one_warning(monkeypatch):
    def fail(*_):
        raise RuntimeError("no ink")

    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(BarProgress, "draw", fail)
    wf = fp.Workflow()
    wf.map(work, wf.map(work, range(20)))
    with pseudo_terminal(80, 24) as terminal, redirect_stdout(terminal.stream):
        before = sys.stdout
        with pytest.warns(RuntimeWarning, match="raised RuntimeError: no ink") as warned:
            assert wf.run(backend="inline", progress=BarProgress(terminal.stream)).ok
        assert sys.stdout is before
    assert len(warned) == 1


def test_a_short_run_gets_its_last_line_alone():
    wf = fp.Workflow("short")
    wf.map(work, range(3))
    with pseudo_terminal(80, 24) as terminal:
        wf.run(backend="inline", progress=BarProgress(terminal.stream))
        terminal.settle()
        assert re.fullmatch(r"short: 3 of 3 tasks in 1 layer, \S+ s, \S+ tasks/s", terminal.lines[0])
        assert b"\x1b[J" not in terminal.raw


def test_a_run_in_a_run_writes_lines_above_the_bars(monkeypatch):
    def inner():
        wf = fp.Workflow("inner")
        wf.map(work, range(3))
        wf.run(backend="inline", progress=True)

    monkeypatch.setattr(progress, "FIRST_SECONDS", 0.0)
    wf = fp.Workflow("outer")
    wf.add(inner)
    with pseudo_terminal(80, 24) as terminal:
        with redirect_stdout(terminal.stream), redirect_stderr(terminal.stream):
            wf.run(backend="inline", progress=True)
        terminal.settle()
        inner_line, outer_line = terminal.lines
    assert inner_line.startswith("forgepar: inner: 3 of 3 tasks")
    assert outer_line.startswith("outer: 1 of 1 task")


def test_a_run_in_a_worker_writes_lines_that_are_its_tasks_output(capsys):
    def inner():
        wf = fp.Workflow("inner")
        wf.map(work, range(3))
        wf.run(progress=True)

    wf = fp.Workflow("outer")
    wf.add(inner)
    wf.run(workers=1, start_method="fork")
    assert capsys.readouterr().err.startswith("forgepar: inner: 3 of 3 tasks in 1 layer, ")


# Lines


def test_into_a_file_go_lines(tmp_path, monkeypatch):
    wf = fp.Workflow("nightly")
    first = wf.map(work, range(5))
    wf.add(fp.task(wait_for).options(name="slow", after=first), tmp_path / "go")
    path = tmp_path / "log"
    with path.open("w") as file, fp.WorkflowExecutor(workers=1, start_method="fork") as executor:

        def look():
            try:
                wait_until(lambda: "5 of 6 tasks (83 %), 1 of 2 layers, " in path.read_text(), "a line")
            finally:
                (tmp_path / "go").touch()

        looker = threading.Thread(target=look)
        looker.start()
        executor.run(wf, progress=PlainProgress(file, seconds=0.01))
        looker.join()
    lines = path.read_text().splitlines()
    assert all(line.startswith("forgepar: nightly: ") for line in lines)
    assert re.fullmatch(r"forgepar: nightly: 6 of 6 tasks in 2 layers, .+ tasks/s", lines[-1])
    assert "\x1b" not in path.read_text()


@pytest.mark.parametrize("kind", ["dumb", "xterm"])
def test_a_dumb_terminal_gets_lines(monkeypatch, kind):
    monkeypatch.setenv("TERM", kind)
    with pseudo_terminal() as terminal:
        assert type(progress_display(terminal.stream)) is (PlainProgress if kind == "dumb" else BarProgress)


def test_without_rich_there_are_lines_on_a_terminal_too(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "rich"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "forgepar.report.progress.bars", raising=False)
    monkeypatch.setitem(sys.modules, "rich", None)  # importing it raises
    monkeypatch.setattr(progress, "has_rich", progress.has_rich.__wrapped__)  # without what it remembers
    with pseudo_terminal() as terminal:
        assert isinstance(progress_display(terminal.stream), PlainProgress)


def test_standard_error_is_the_one_that_is_there_when_the_run_begins(capsys):
    wf = fp.Workflow("w")
    wf.map(work, range(3))
    wf.run(backend="inline", progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("forgepar: w: 3 of 3 tasks in 1 layer, ")


# Whole programs

PROGRAM = """
    import sys, time, forgepar as fp
    from pathlib import Path

    def wait_for(path):
        print("it waits")
        while not Path(path).exists():
            time.sleep(0.01)

    wf = fp.Workflow("program")
    wf.map(abs, range(50))
    wf.add(wait_for, sys.argv[1])
    wf.run(workers=1, start_method="fork", progress=True)
    print("after")
"""


@contextmanager
def start(terminal, tmp_path, *arguments, **streams):
    (tmp_path / "program.py").write_text(textwrap.dedent(PROGRAM))
    command = [sys.executable, *(arguments or (tmp_path / "program.py", tmp_path / "go"))]
    streams = {"stdin": terminal.other, "stdout": terminal.other, "stderr": terminal.other, **streams}
    with subprocess.Popen(list(map(str, command)), start_new_session=True, **streams) as program:
        try:
            yield program
        finally:
            if program.poll() is None:
                program.terminate()


@pytest.mark.parametrize("columns", [80, 200])
def test_a_program_on_a_terminal(tmp_path, columns):
    with pseudo_terminal(columns, 24) as terminal:
        with start(terminal, tmp_path) as program:
            terminal.wait_for("50/51")
            terminal.wait_for("it waits")
            bars = [line for line in terminal.lines if BAR.search(line)]
            assert len(bars) == 2
            assert all(len(line) < columns for line in terminal.lines)
            (tmp_path / "go").touch()
            assert program.wait(PATIENCE) == 0
        terminal.settle()
        waits, last, after = terminal.lines
        assert (waits, after) == ("it waits", "after")
        assert last.startswith("program: 51 of 51 tasks in 1 layer, ")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_a_terminal_that_works(tmp_path, number):
    with pseudo_terminal() as terminal:
        with start(terminal, tmp_path) as program:
            terminal.wait_for("50/51")
            os.kill(program.pid, number)
            assert program.wait(PATIENCE) != 0
        terminal.settle()
        lines = terminal.text.splitlines()
        assert not any(BAR.search(line) for line in lines)
        assert any(line.startswith("program: 50 of 51 tasks") for line in lines)
        assert not terminal.screen.cursor.hidden


def test_the_command_line_shows_bars_on_a_terminal_and_its_results_elsewhere(tmp_path):
    (tmp_path / "target.py").write_text(textwrap.dedent(PROGRAM).split("wf.run")[0].replace("sys.argv[1]", "'go'"))
    command = ("-m", "forgepar", "run", tmp_path / "target.py:wf", "-w", 1, "--start-method", "fork")
    with pseudo_terminal() as terminal:
        with start(terminal, tmp_path, *command, stdout=subprocess.PIPE, cwd=tmp_path) as program:
            terminal.wait_for("50/51")
            (tmp_path / "go").touch()
            out, _ = program.communicate(timeout=PATIENCE)
        terminal.settle()
        assert out.splitlines()[0] == b"it waits"
        assert out.splitlines()[-1] == b"... and 31 more"
        assert [line[:24] for line in terminal.lines] == ["program: 51 of 51 tasks "]


@pytest.mark.parametrize(
    ("flags", "on_a_terminal", "elsewhere"),
    [((), True, False), (("-q",), False, False), (("--progress",), True, True), (("--no-progress",), False, False)],
)
def test_the_command_line_shows_progress_by_default_on_a_terminal_alone(flags, on_a_terminal, elsewhere):
    arguments = cli._parser().parse_args(["run", "x.py", *flags])
    with pseudo_terminal() as terminal, redirect_stderr(terminal.stream):
        assert running._progress(arguments) is on_a_terminal
    with redirect_stderr(io.StringIO()):
        assert running._progress(arguments) is elsewhere
