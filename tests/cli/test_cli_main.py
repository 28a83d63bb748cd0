"""The command line as a person uses it: output, exit codes, and errors in words."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from contextlib import redirect_stderr

import pytest
from conftest import PATIENCE, wait_until
from pseudo_terminal import pseudo_terminal

from forgepar.cli import main as cli
from forgepar.records.audit_log import AuditLog

PIPELINE = """
    import os, threading
    from pathlib import Path
    import forgepar as fp

    def double(x):
        return 2 * x

    def broken(x):
        raise LookupError(f"nothing for {x}")

    sums = fp.Workflow("sums")
    sums.add(sum, sums.map(double, range(4)))

    empty = fp.Workflow("empty")
    not_a_workflow = 7

    def report(n: int = 3, title: str = "report") -> fp.Workflow:
        wf = fp.Workflow("report")
        parts = wf.map(double, range(n))
        wf.add(lambda parts: f"{title}: {parts}", parts)
        return wf

    def failing(x):
        wf = fp.Workflow("failing")
        done = wf.add(double, 1)
        bad = wf.add(fp.task(broken).options(after=done), x)
        wf.add(double, 5)
        wf.add(double, bad)
        return wf

    def wide():
        wf = fp.Workflow("wide")
        wf.map(double, range(30))
        return wf

    def hanging(path):
        wf = fp.Workflow("hanging")
        wf.add(lambda: (Path(path).touch(), threading.Event().wait()))
        return wf
"""


@pytest.fixture
def pipeline(tmp_path, monkeypatch):
    """A pipeline's file name; each test imports it anew."""
    name = f"pipeline_{tmp_path.name}".replace("-", "_")
    path = tmp_path / f"{name}.py"
    path.write_text(textwrap.dedent(PIPELINE))
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield str(path)
    sys.modules.pop(name, None)


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    "how", [("--backend", "inline"), ("--workers", 2), ("--workers", 2, "--start-method", "spawn")]
)
def test_run_prints_the_values_of_the_leaves(pipeline, capsys, how):
    assert run("run", f"{pipeline}:sums", *how) == 0
    assert capsys.readouterr() == ("sum = 12\n", "")


def test_a_lone_text_is_printed_as_it_is(pipeline, capsys):
    assert run("run", f"{pipeline}:report", "-p", "n=2", "-p", "title=two", "--backend", "inline") == 0
    assert capsys.readouterr().out == "two: [0, 2]\n"


def test_many_leaves_are_cut_and_counted(pipeline, capsys):
    assert run("run", f"{pipeline}:wide", "--backend", "inline") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["double-0 = 0", "double-1 = 2"]
    assert lines[-1] == "... and 10 more"


def test_summary_goes_to_standard_error(pipeline, capsys):
    assert run("run", f"{pipeline}:sums", "--backend", "inline", "--summary") == 0
    out, err = capsys.readouterr()
    assert out == "sum = 12\n"
    assert "workflow 'sums': 5 completed" in err
    assert "longest task" in err


def test_what_happens_is_appended_to_a_file_on_request(pipeline, tmp_path, capsys):
    path = tmp_path / "run.jsonl"
    assert run("run", f"{pipeline}:sums", "--backend", "inline", "--audit", path) == 0
    assert run("run", f"{pipeline}:failing", "-p", "x=3", "--backend", "inline", "--audit", path) == 1
    log = AuditLog.load(path)
    assert len(log.run_ids) == 2
    assert log.replay().tasks["broken"].error == "LookupError: nothing for 3"
    capsys.readouterr()
    assert run("run", f"{pipeline}:sums", "--audit", tmp_path / "none" / "run.jsonl") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_what_tasks_print_is_tagged_on_request(tmp_path, capsys):
    (tmp_path / "loud.py").write_text(
        "import forgepar as fp\ndef loud():\n    wf = fp.Workflow()\n    wf.map(print, ['a', 'b'])\n    return wf\n"
    )
    assert run("run", f"{tmp_path / 'loud.py'}:loud", "--workers", 1) == 0
    assert capsys.readouterr().out.startswith("a\nb\n")
    assert run("run", f"{tmp_path / 'loud.py'}:loud", "--workers", 1, "--tag-output") == 0
    assert capsys.readouterr().out.startswith("[print-0] a\n[print-1] b\n")


@pytest.mark.parametrize(("flags", "left"), [((), "cancelled"), (("--keep-going",), "skipped")])
def test_a_failed_task_is_exit_code_1_with_its_own_traceback(pipeline, capsys, flags, left):
    target = f"{pipeline}:failing"
    assert run("run", target, "-p", "x=9", "--workers", 2, *flags) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "forgepar: task 'broken' failed: LookupError: nothing for 9" in err
    assert "in broken" in err
    assert "cli.py" not in err
    assert err.splitlines()[-1] == f"forgepar: 2 completed, 1 failed, 1 {left}"


def test_layers_are_printed(pipeline, capsys):
    assert run("layers", f"{pipeline}:wide") == 0
    shown = ", ".join(f"double-{i}" for i in range(6))
    assert capsys.readouterr().out == f"layer 0: 30 tasks: {shown} ... and 24 more (--all)\n"
    assert run("layers", f"{pipeline}:sums", "--all") == 0
    expected = "layer 0: 4 tasks: double-0, double-1, double-2, double-3\nlayer 1: 1 task: sum\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["run", "{}:sum"], "has no attribute 'sum'. Did you mean 'sums'?"),
        (["run", "{}:empty"], "Workflow 'empty' has no tasks"),
        (["run", "{}:not_a_workflow"], "must be a Workflow or a function that returns one, got int."),
        (["run", "{}:failing"], "needs x. Give -p x=..."),
        (["run", "{}:report", "-p", "n=many"], "-p n must be int, got many."),
        (["run", "{}:report", "-p", "m=1"], "has no parameter 'm'. Its parameters: n, title"),
        (["run", "{}:report", "-p", "n"], "-p must be key=value, got n."),
        (["run", "{}:sums", "-p", "n=1"], "it takes no -p n="),
        (
            ["run", "{}:sums", "--workers", "0"],
            "workers must be an integer from 1 to 32000, or None for one per CPU, got 0",
        ),
        (["run", "no_such_file.py:x"], "there is no file"),
        (["run", "no.such.module:x"], "there is no module 'no.such.module'"),
        (["layers", "{}:empty"], "Workflow 'empty' has no tasks"),
    ],
)
def test_bad_usage_is_exit_code_2_in_words(pipeline, capsys, arguments, said):
    assert run(*[argument.format(pipeline) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert err.startswith("forgepar: ")
    assert "Traceback" not in err


def test_a_module_that_raises_shows_its_traceback(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "raises_on_import.py").write_text("1 / 0\n")
    assert run("run", tmp_path / "raises_on_import.py") == 2
    assert 'raises_on_import.py", line 1' in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["run"], ["walk", "x"], ["run", "x", "--backend", "threads"]])
def test_unknown_arguments_are_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert "usage: forgepar" in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as caught:
        run("--help")
    assert caught.value.code == 0
    assert "forgepar run forgepar.examples.census" in capsys.readouterr().out


@pytest.mark.parametrize(
    "launch", [["-m", "forgepar"], ["-c", "import sys; from forgepar.cli.main import main; sys.exit(main())"]]
)
def test_as_a_process(launch, pipeline):
    command = [sys.executable, *launch, "run", f"{pipeline}:sums", "-w", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "sum = 12\n", "")


def test_an_interrupt_is_exit_code_130(pipeline, tmp_path):
    started = tmp_path / "started"
    command = [sys.executable, "-m", "forgepar", "run", f"{pipeline}:hanging", "-p", f"path={started}", "-w", "1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        wait_until(started.exists, "the task to start")
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert err == "forgepar: interrupted; the workers have ended\n"


def test_a_run_that_takes_too_long_says_at_what(pipeline, tmp_path, capsys):
    target = ("run", f"{pipeline}:hanging", "-p", f"path={tmp_path / 'started'}", "--workers", 1)
    assert run(*target, "--timeout", 3) == 1
    error = capsys.readouterr().err
    assert "the run took longer than the 3 s it was given" in error
    assert "'lambda'" in error


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (("--timeout", "-1"), "timeout must be a positive number of seconds, or None, got -1.0"),
        (("--layer-timeout", "0"), "layer_timeout must be a positive number of seconds, or None, got 0.0"),
        (
            ("--memory-budget", "much"),
            "memory_budget must be a number of bytes, or a string such as '2GiB' or '500MB', got 'much'",
        ),
    ],
)
def test_limits_that_cannot_be_are_told(pipeline, capsys, flags, text):
    assert run("run", f"{pipeline}:sums", *flags) == 2
    assert text in capsys.readouterr().err


def test_a_budget_is_taken(pipeline, capsys):
    assert run("run", f"{pipeline}:sums", "--workers", 1, "--memory-budget", "64MiB") == 0
    assert capsys.readouterr().out == "sum = 12\n"


@pytest.mark.parametrize("arguments", [[], ["-q"], ["-v"]])
def test_without_a_command_help_is_printed(arguments, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "completion" in err
    assert "examples:" in err


STORE_COMMANDS = ["runs", "show", "values", "export", "gc", "report", "plan", "top"]
COMMANDS = ["run", "check", "layers", "graph", *STORE_COMMANDS, "completion"]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command_has_examples_that_parse(command, capsys):
    with pytest.raises(SystemExit) as caught:
        run(command, "--help")
    assert caught.value.code == 0
    _, _, examples = capsys.readouterr().out.partition("examples:\n")
    lines = [line.split(" > ")[0].split() for line in examples.splitlines()]
    assert lines
    for program, *arguments in lines:
        assert (program, arguments[0]) == ("forgepar", command)
        assert cli._parser().parse_args(arguments).command


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [(["rnu", "x"], "run"), (["layer", "x"], "layers"), (["run", "x", "--schedule", "eagre"], "eager")],
)
def test_a_word_that_is_not_known_is_met_with_one_that_is(arguments, meant, capsys):
    with pytest.raises(SystemExit) as caught:
        run(*arguments)
    assert caught.value.code == 2
    assert f"Did you mean '{meant}'?" in capsys.readouterr().err


def test_a_word_like_no_other_is_met_with_all_there_are(capsys):
    with pytest.raises(SystemExit):
        run("xyzzy")
    err = capsys.readouterr().err
    assert "invalid choice: 'xyzzy'" in err
    assert "layers" in err
    assert "Did you mean" not in err


def test_layers_as_json(pipeline, capsys, tmp_path):
    assert run("layers", f"{pipeline}:sums", "--json") == 0
    names = [[f"double-{i}" for i in range(4)], ["sum"]]
    assert json.loads(capsys.readouterr().out) == {"workflow": "sums", "layers": names, "expected": None}
    path = tmp_path / "durations.json"
    assert run("run", f"{pipeline}:sums", "--backend", "inline", "--save-durations", path) == 0
    capsys.readouterr()
    assert run("layers", f"{pipeline}:sums", "--json", "--durations", path, "-w", 3) == 0
    expected = json.loads(capsys.readouterr().out)["expected"]
    assert expected["workers"] == 3
    assert 0 < expected["eager_seconds"] <= expected["layers_seconds"]


@pytest.mark.parametrize("option", ["--save-durations", "--report"])
@pytest.mark.parametrize(("name", "said"), [("none/x.html", "there is no folder"), (".", "is a folder")])
def test_files_that_cannot_be_written_are_told_before_the_run(
    pipeline, tmp_path, monkeypatch, capsys, option, name, said
):
    monkeypatch.chdir(tmp_path)
    assert run("run", f"{pipeline}:hanging", "-p", "path=begun", "--backend", "inline", option, name) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"forgepar: {option}: ")
    assert said in err
    assert not (tmp_path / "begun").exists()


@pytest.mark.parametrize("option", ["--save-durations", "--report"])
def test_a_file_that_cannot_be_written_after_all_is_named_and_the_values_are_printed(pipeline, capsys, option):
    if option == "--report":
        pytest.importorskip("bokeh")
    assert run("run", f"{pipeline}:sums", "--backend", "inline", option, "/dev/full") == 1
    out, err = capsys.readouterr()
    assert out == "sum = 12\n"
    assert "No space left on device: '/dev/full'" in err


def test_findings_as_json(pipeline, capsys):
    assert run("check", f"{pipeline}:empty", "--json") == 2
    (finding,) = json.loads(capsys.readouterr().out)
    assert (finding["kind"], finding["is_fatal"]) == ("empty", True)


LOGS = """
    import forgepar as fp

    def talk():
        fp.context().log.info("for your information")
        fp.context().log.debug("for finding faults")

    workflow = fp.Workflow("logs")
    workflow.add(talk)
"""


@pytest.mark.parametrize(
    ("flags", "shown", "not_shown"),
    [
        ((), [], ["INFO", "DEBUG"]),
        (("-v",), ["INFO forgepar.tasks.logs: for your information", "INFO forgepar.run: WorkflowStarted"], ["DEBUG"]),
        (("-vv",), ["for finding faults", "DEBUG forgepar.run: WorkflowTaskCompleted task='talk'"], []),
    ],
)
def test_log_records_are_shown_as_asked(tmp_path, flags, shown, not_shown):
    (tmp_path / "logs.py").write_text(textwrap.dedent(LOGS))
    command = [sys.executable, "-m", "forgepar", "run", tmp_path / "logs.py", "-w", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=True)
    assert done.stdout == "talk = None\n"
    assert all(text in done.stderr for text in shown)
    assert not any(text in done.stderr for text in not_shown)


@pytest.mark.parametrize("place", ["before", "behind"])
def test_flags_may_stand_before_the_command_or_behind_it(pipeline, capsys, place):
    command = ["run", f"{pipeline}:sums", "--backend", "inline"]
    arguments = ["-v", *command] if place == "before" else [*command, "-v"]
    assert run(*arguments) == 0
    assert "INFO forgepar.run: WorkflowCompleted" in capsys.readouterr().err
    assert run(*command) == 0
    assert capsys.readouterr().err == ""


def test_quiet_leaves_results_and_errors(pipeline, capsys):
    assert run("-q", "run", f"{pipeline}:sums", "--backend", "inline") == 0
    assert capsys.readouterr() == ("sum = 12\n", "")
    assert run("run", "-q", f"{pipeline}:failing", "-p", "x=9", "--backend", "inline") == 1
    assert "LookupError: nothing for 9" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("environment", "has_colour"), [({}, True), ({"NO_COLOR": "1"}, False), ({"TERM": "dumb"}, False)]
)
def test_errors_are_coloured_on_terminals_that_want_it(monkeypatch, environment, has_colour):
    monkeypatch.delenv("NO_COLOR", raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    with pseudo_terminal() as terminal, redirect_stderr(terminal.stream):
        assert run("run", "no_such_file.py:x") == 2
        terminal.settle()
    assert (b"\x1b[1;31mforgepar:\x1b[0m there is no file" in terminal.raw) == has_colour
    assert "forgepar: there is no file" in terminal.text
