"""External programs as tasks: what they are given, what comes of them, and how they fail."""

from __future__ import annotations

import inspect
import operator
import os
import pickle
import re
import signal
import sys
from pathlib import Path

import cloudpickle
import pytest
from conftest import executor_arguments, is_gone, wait_until

import forgepar as fp
from forgepar.records.events import WorkflowTaskTimedOut
from forgepar.workflow.shell import process as programs
from forgepar.workflow.shell.command import Command

SHORT = 0.2  # seconds; a timeout that is meant to be passed
ENOUGH = 3.0  # seconds; the same, but by then the program is to have written its file

# Prints its arguments, one a line, as Python sees them.
SHOW = "import sys; print(*map(ascii, sys.argv[1:]), sep='\\n')"

# Writes its own number to a file and waits, whatever it is asked.
DEAF = """
import os, pathlib, signal, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
path = pathlib.Path(sys.argv[1])
path.with_suffix(".part").write_text(str(os.getpid()))
path.with_suffix(".part").rename(path)
while True: signal.pause()
"""


def show(line: str, **arguments) -> Command:
    """A command that prints its arguments."""
    return fp.shell("{python} -c {code} " + line, python=sys.executable, code=SHOW, **arguments)


def failure_of(wf, **rules):
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(**rules)
    (error,) = caught.value.exceptions
    return error


def raised_by(command: Command, kind: type[Exception]) -> Exception:
    with pytest.raises(kind) as caught:
        command()
    return caught.value


# As tasks


def test_handles_go_anywhere(either_backend, tmp_path):
    wf = fp.Workflow()
    word, number, folder = wf.add(str, "a b; $(id)"), wf.add(abs, -7), wf.add(str, tmp_path)
    files = wf.map(str, ["c d", "-e"])
    first = wf.add(show("{word} --n={number} {files} {more}", word=word, number=number, files=files, more=[word, "f"]))
    both = wf.add(
        fp.shell(
            'cat; pwd; echo "$WORD"', through_shell=True, cwd=folder, env={"WORD": word}, stdin=wf.add(str, "in\n")
        )
    )
    result = wf.run(**either_backend, outputs="all")
    assert result[first].stdout.splitlines() == [
        "'a b; $(id)'", "'--n=7'", "'c d'", "'-e'", "'a b; $(id)'", "'f'",
    ]  # fmt: skip
    assert result[both].stdout == f"in\n{tmp_path}\na b; $(id)\n"
    assert (result[both].exit_code, result[both].stderr) == (0, "")


def test_fields_are_given_early_or_late_by_name_or_position(either_backend):
    wf = fp.Workflow()
    command = show("{a} {b} {c}", b="B")
    value = wf.add(str, "A")
    handles = [
        wf.add(command, value, "C"),
        wf.add(command, a=value, c="C"),
        wf.add(command, "C", a=value),
        wf.add(command, value, "C", b="late"),
        *wf.map(command, [value, "x"], ["C", "y"]),
        *wf.map(show("{a} {b} {c}"), ["A"], c="C", b=["B", "b"]),
    ]
    outputs = [result.stdout.split() for result in wf.run(**either_backend)[handles]]
    assert outputs == [
        *[["'A'", "'B'", "'C'"]] * 3,
        ["'A'", "'late'", "'C'"],
        ["'A'", "'B'", "'C'"],
        ["'x'", "'B'", "'y'"],
        ["'A'", "'B'", "'b'", "'C'"],
    ]


def test_one_program_reads_what_another_wrote(either_backend):
    wf = fp.Workflow()
    numbers = wf.add(fp.shell("seq {n}", n=wf.add(abs, -12)))
    in_order = wf.add(fp.shell("sort -r", stdin=numbers, env={"LC_ALL": "C"}, text=False))
    counted = wf.add(fp.shell("head -n {n}", n=2), stdin=in_order)
    assert wf.run(**either_backend)[counted].stdout == "9\n8\n"


def test_tasks_are_named_after_the_program_and_take_options(tmp_path):
    wf = fp.Workflow()
    first = wf.add(fp.task(fp.shell("touch {path}", path=tmp_path / "a")).options(name="made", retries=2))
    others = [wf.add(fp.shell("/bin/ls {path}", path=tmp_path)), wf.add(fp.shell("ls {path}"), tmp_path)]
    listed = wf.add(fp.task(fp.shell("ls {path}")).options(after=[first]), tmp_path)
    assert [handle.name for handle in [first, *others, listed]] == ["made", "ls", "ls-1", "ls-2"]
    assert wf.run(workers=1)[listed].stdout == "a\n"


def test_tasks_of_one_line_share_their_program():
    wf = fp.Workflow()
    for i in range(10):
        wf.add(fp.shell("echo {i}", i=i))
    assert len(wf.templates) == len(wf.specs) == 1


def test_it_undoes_what_another_task_did(tmp_path):
    def make(path):
        path.mkdir()
        return path

    wf = fp.Workflow()
    made = wf.add(fp.task(make).options(compensate=fp.shell("rmdir {path}")), tmp_path / "made")
    wf.add(fp.task(int).options(after=[made]), "x")
    with pytest.raises(fp.WorkflowFailed):
        wf.run(workers=1)
    assert not (tmp_path / "made").exists()


def test_a_task_that_is_given_a_command_may_run_it(either_backend):
    wf = fp.Workflow()
    word = wf.add(str, "a b")
    told = wf.add(lambda command: command("c").stdout, show("{x} {y}", x=word))
    assert wf.run(**either_backend)[told] == "'a b'\n'c'\n"


# Called directly


def test_called_directly_it_runs_at_once():
    result = show("{a} {b}", a="x y")("z")
    assert result.stdout == "'x y'\n'z'\n"
    assert result.command == (sys.executable, "-c", SHOW, "x y", "z")
    assert result.seconds > 0


def test_it_tells_the_arguments_that_are_left():
    command = fp.shell("cp {a} {b} {c} {a}", b=1)
    assert list(inspect.signature(command).parameters) == ["a", "c"]
    assert repr(command) == "shell('cp {a} {b} {c} {a}')"
    assert command.__name__ == "cp"


def test_text_is_what_utf_8_makes_of_it_and_bytes_are_left():
    line = "printf 'caf\\303\\251 \\377\\r\\n'"
    assert fp.shell(line)().stdout == "café \udcff\r\n"
    assert fp.shell(line, text=False)().stdout == b"caf\xc3\xa9 \xff\r\n"
    assert fp.shell(line, text=False)().stderr == b""


@pytest.mark.parametrize("stdin", ["text\n", b"text\n", bytearray(b"text\n"), memoryview(b"text\n"), Path("file")])
def test_stdin_is_text_bytes_or_a_file_below_the_folder(tmp_path, stdin):
    (tmp_path / "file").write_text("text\n")
    assert fp.shell("cat", stdin=stdin, cwd=tmp_path)().stdout == "text\n"


def test_without_stdin_there_is_nothing_to_read():
    assert fp.shell("cat")().stdout == ""


def test_variables_are_added_changed_and_taken_away(monkeypatch, tmp_path):
    monkeypatch.setenv("TAKEN", "1")
    monkeypatch.setenv("KEPT", "2")
    command = fp.shell('echo "$KEPT,$N,$PLACE,${{TAKEN-none}}"', through_shell=True)
    env = {"TAKEN": None, "N": 3, "PLACE": tmp_path}
    assert command(env=env).stdout == f"2,3,{tmp_path},none\n"


def test_a_shell_reads_the_line_only_if_asked(tmp_path):
    assert fp.shell("echo {x} '|' wc $HOME", x="a")().stdout == "a | wc $HOME\n"
    piped = fp.shell("printf '%s\\n' {words} | sort > {to} && cat {to}", through_shell=True)
    result = piped(words=["b $(id)", "a; ls"], to=tmp_path / "a file")
    assert result.stdout == "a; ls\nb $(id)\n"
    assert result.command[1:-1] == ("-eu", "-o", "pipefail", "-c")
    assert fp.shell("cd .; :", through_shell=True, strict=False)().command[:2] == ("/bin/sh", "-c")


@pytest.mark.parametrize("script", ["false; echo on", "false | cat; echo on", 'echo "$NOT_SET"; echo on'])
def test_a_script_ends_where_something_in_it_fails_unless_it_is_not_to(script):
    with pytest.raises(fp.ToolFailed, match=r"strict=False ignores errors of commands in a script"):
        fp.shell(script, through_shell=True)()
    assert fp.shell(script, through_shell=True, strict=False)().stdout.split() == ["on"]


def test_a_strict_script_needs_a_shell_that_watches_pipes(monkeypatch):
    programs.strict_shell.cache_clear()
    monkeypatch.setattr(programs, "SHELL", ("/bin/false", "-c"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(fp.ToolNotFound, match=r"Install bash, or pass strict=False"):
        fp.shell("echo", through_shell=True)()
    assert fp.shell("echo", through_shell=True, strict=False)().stdout == "\n"


SHELL_WORDS = "| || && & ; > >> < >file 2> 2>&1 &>all <in |&"


@pytest.mark.parametrize("word", SHELL_WORDS.split())
def test_a_word_that_only_a_shell_knows_is_refused_unless_it_is_quoted(word):
    with pytest.raises(
        fp.WorkflowError,
        match=rf"has the word {re.escape(word)}, which the program would get as an argument, as no shell reads",
    ):
        fp.shell(f"echo a {word} b")
    for quoted in (f"'{word}'", f'"{word}"'):
        assert fp.shell(f"echo a {quoted} b")().stdout == f"a {word} b\n"


def test_bytes_that_are_no_text_go_through_programs_unharmed(tmp_path):
    name = os.fsdecode(b"caf\xe9 \xff")
    (tmp_path / name).write_bytes(b"\xfe\n")
    wf = fp.Workflow()
    found = wf.add(fp.shell("ls", cwd=tmp_path))
    name = wf.add(str.rstrip, wf.add(operator.attrgetter("stdout"), found))
    content = wf.add(fp.shell("cat {name}", cwd=tmp_path), name=name)
    piped = wf.add(fp.shell("cat"), stdin=content)
    result = wf.run(workers=1, start_method="fork")
    assert result[piped].stdout.encode(errors="surrogateescape") == b"\xfe\n"


def test_a_program_that_left_one_in_the_background_is_not_late():
    assert fp.shell("sh -c 'sleep 60 & echo done'", timeout=50)().stdout == "done\n"


def test_much_output_crosses_from_a_worker():
    size = 120 << 20
    wf = fp.Workflow()
    much = wf.add(fp.shell("head -c {n} /dev/zero", n=size, text=False))
    assert wf.run(workers=1, outputs=[wf.add(lambda result: len(result.stdout), much)])["lambda"] == size


def test_a_result_shows_the_beginning_of_what_was_written():
    result = fp.shell("printf %s {x}", x="a" * 1000)()
    assert repr(result).startswith("ToolResult('printf %s aaa")
    assert f"exit_code=0, stdout='{'a' * 200}'..., stderr='', seconds=" in repr(result)


# Failing


def test_a_program_that_fails_fails_the_task(either_backend):
    wf = fp.Workflow()
    wf.add(fp.shell("sh -c {code} x 'y z'", code="seq 30 >&2; echo lost; exit 3"))
    error = failure_of(wf, **either_backend)
    assert type(error) is fp.ToolFailed
    assert (error.exit_code, error.command[3:]) == (3, ("x", "y z"))
    assert error.stderr == "".join(f"{i}\n" for i in range(1, 31))
    first, *tail = str(error).splitlines()
    assert "x 'y z'" in first
    assert "exited with code 3. Pass check=False to get the result instead. Its stderr ended in:" in first
    assert tail == [f"  {i}" for i in range(11, 31)]


def test_what_failed_may_be_asked_for():
    result = fp.shell("sh -c 'echo out; echo err >&2; exit 3'", check=False)()
    assert (result.exit_code, result.stdout, result.stderr) == (3, "out\n", "err\n")


def test_a_signal_is_named():
    error = raised_by(fp.shell("sh -c 'kill -9 $$'"), fp.ToolFailed)
    assert "was ended by signal 9 (SIGKILL)" in str(error)
    assert error.exit_code == -signal.SIGKILL
    assert fp.shell("sh -c 'kill -15 $$'", check=False)().exit_code == -signal.SIGTERM


def test_errors_keep_the_end_of_a_long_stderr():
    error = raised_by(fp.shell("sh -c 'yes | head -c 1000000 >&2; echo end >&2; exit 1'"), fp.ToolFailed)
    assert len(error.stderr) == 64 << 10
    assert error.stderr.endswith("y\nend\n")
    assert str(error).endswith("  y\n  end")


def test_a_missing_program_and_a_missing_folder_are_told_apart(either_backend, tmp_path):
    wf = fp.Workflow()
    wf.add(fp.shell("no-such-program {x}", x=1, env={"PATH": tmp_path}))
    error = failure_of(wf, **either_backend)
    assert type(error) is fp.ToolNotFound
    assert f"There is no program 'no-such-program' in {tmp_path}. Install it" in str(error)
    assert (error.program, error.searched) == ("no-such-program", str(tmp_path))
    other = raised_by(fp.shell("ls", cwd=tmp_path / "gone"), NotADirectoryError)
    assert f"The folder cwd='{tmp_path}/gone' of command line 'ls' does not exist. Create it" in str(other)


@pytest.mark.parametrize("pickler", [pickle, cloudpickle])
@pytest.mark.parametrize("line", ["sh -c 'echo why >&2; exit 3'", "no-such-program"])
def test_errors_travel(line, pickler):
    error = raised_by(fp.shell(line), fp.TaskError)
    loaded = pickle.loads(pickler.dumps(error))
    assert type(loaded) is type(error)
    assert (str(loaded), vars(loaded)) == (str(error), vars(error))


def test_retries_and_fallbacks_are_those_of_any_task(tmp_path):
    # Fails until there are three lines.
    line = "echo >> {log}; [ $(wc -l < {log}) -ge 3 ]"
    wf = fp.Workflow()
    command = fp.shell(line, log=tmp_path / "log", through_shell=True)
    again = wf.add(fp.task(command).options(name="again", retries=2, retry_on=fp.ToolFailed))
    other = wf.add(fp.attempt(fp.shell("false"), catch=lambda error: error.exit_code))
    result = wf.run(workers=1)
    assert (result.record(again).attempt, result[again].exit_code, result[other]) == (3, 0, 1)


# Time


@pytest.mark.parametrize("kind", ["inline", "forkserver"])
def test_a_program_that_takes_too_long_is_ended_and_fails_its_task(kind, tmp_path):
    wf = fp.Workflow()
    command = fp.shell("{python} -c {code} {path}", python=sys.executable, code=DEAF, timeout=ENOUGH)
    wf.add(command, path=tmp_path / "pid")
    error = failure_of(wf, **executor_arguments(kind))
    assert type(error) is fp.TaskTimeout
    assert error.seconds == ENOUGH
    assert "exceeded its timeout of 3 s and was killed, with all that it started" in str(error)
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: is_gone(pid), "the program's end")


def test_its_time_is_over_though_its_exit_code_does_not_matter():
    error = raised_by(fp.shell("sh -c 'echo at work >&2; exec sleep 600'", timeout=SHORT, check=False), fp.TaskTimeout)
    assert error.seconds == SHORT


def test_the_tasks_own_timeout_ends_it_too(tmp_path):
    wf = fp.Workflow()
    command = fp.shell("{python} -c {code} {path}", python=sys.executable, code=DEAF, path=tmp_path / "pid")
    wf.add(fp.task(command).options(timeout=ENOUGH))
    with pytest.raises(fp.WorkflowFailed) as caught:
        wf.run(workers=1)
    assert [event.task for event in caught.value.result.events if isinstance(event, WorkflowTaskTimedOut)] == ["python"]
    pid = int((tmp_path / "pid").read_text())
    wait_until(lambda: is_gone(pid), "the program's end")


# Declared wrongly


@pytest.mark.parametrize(
    ("declare", "fault"),
    [
        (
            lambda wf: fp.shell("cp {a} {b}", c=1),
            r"command line 'cp \{a\} \{b\}' has no field 'c'. Its fields are 'a', 'b'",
        ),
        (lambda wf: wf.add(fp.shell("cp {a} {b}"), a=1, c=1), "has no field 'c'"),
        (lambda wf: wf.map(fp.shell("cp {a} {b}"), [1], c=1), "has no field 'c'"),
        (lambda wf: wf.add(fp.shell("cp {a} {b} {c}", b=1)), r"'cp \{a\} \{b\} \{c\}' has no value for 'a', 'c'"),
        (lambda wf: wf.map(fp.shell("cp {a} {b}"), ["x"]), "has no value for 'b'"),
        (lambda wf: fp.shell("cp {a}")(), "has no value for 'a'"),
        (
            lambda wf: wf.add(fp.shell("cp {a} {b}"), 1, 2, 3),
            "got 3 positional arguments for the remaining fields 'a', 'b'. Pass one",
        ),
        (lambda wf: wf.add(fp.shell("ls"), 1), "got 1 positional arguments for the remaining fields none"),
        (
            lambda wf: wf.map(fp.shell("cp {a} {b}", b=wf.add(abs, 1)), [1]),
            "constant 'b' of map.. must not contain handles",
        ),
        (lambda wf: fp.shell("cp {a}", a=None), "field 'a' of .* must be a string, a number or a path, .*, got None"),
        (
            lambda wf: wf.add(fp.shell("cp {a}"), a=[None]),
            "an item of field 'a' of .* must be a string, a number or a path, .*, got None",
        ),
        (
            lambda wf: fp.shell("cp -t{a}", a=wf.map(abs, [1])),
            "Field 'a' of .* is only part of a word, so its value must not be a list",
        ),
        (
            lambda wf: fp.shell("make {env}", env="x"),
            "field 'env' of .* must not have the name of an argument of shell",
        ),
        (lambda wf: fp.shell("echo {text}"), "field 'text' of .* must not have the name of an argument of shell"),
        (lambda wf: fp.shell("ls", cwd=3), "cwd of command line 'ls' must be the path of a folder, got 3"),
        (lambda wf: fp.shell("ls", env=["A=1"]), "env of command line 'ls' must be a dict of variables, got"),
        (lambda wf: wf.add(fp.shell("ls"), stdin=3), "stdin of command line 'ls' must be a string, bytes, .*, got 3"),
        (lambda wf: fp.shell("ls", timeout=0), "timeout must be a positive number of seconds, or None, got 0"),
        (lambda wf: fp.shell("ls", timeout=True), "timeout must be a positive number of seconds, or None, got True"),
        (
            lambda wf: fp.shell("ls", timeout=float("nan")),
            "timeout must be a positive number of seconds, or None, got nan",
        ),
        (lambda wf: fp.shell("ls", timeout="1"), "timeout must be a positive number of seconds, or None, got '1'"),
        (lambda wf: fp.shell("ls", strict=False), "strict=False needs through_shell=True"),
        (lambda wf: fp.shell(["ls"]), "line must be a command line: .*, got"),
        (lambda wf: fp.shell("echo '{x}'", through_shell=True), "is where quoting does not protect its value"),
    ],
)
def test_what_is_declared_wrongly_is_said_at_once(declare, fault):
    wf = fp.Workflow()
    with pytest.raises(fp.WorkflowError, match=fault):
        declare(wf)


@pytest.mark.parametrize(
    ("line", "arguments", "fault"),
    [
        (
            "echo {x}",
            {"x": {"a": 1}},
            "field 'x' of command line 'echo {x}' must be a string, a number or a path, .*, got {'a': 1}",
        ),
        ("echo a{x}", {"x": ["a"]}, "is only part of a word, so its value must not be a list"),
        ("{x}", {"x": ""}, "must begin with the name of a program, got an empty field"),
        ("{x}", {"x": []}, "must begin with the name of a program, got an empty field"),
        ("ls", {"stdin": 3}, "stdin of command line 'ls' must be a string, bytes, .*, got 3"),
        ("ls", {"env": 3}, "env must be a dict of variables, got 3"),
        ("ls", {"env": {"A": True}}, r"env\['A'\] must be .*, got True"),
        ("ls", {"cwd": True}, "cwd= of command line 'ls' must be .*, got True"),
        (
            "cat",
            {"stdin": Path("/no/such/file")},
            "The file stdin='/no/such/file' of command line 'cat' does not exist. Create it",
        ),
    ],
)
def test_what_only_a_value_shows_to_be_wrong_fails_the_task(line, arguments, fault):
    wf = fp.Workflow()
    handles = {name: wf.add(lambda value=value: value) for name, value in arguments.items()}
    wf.add(fp.shell(line, **handles))
    error = failure_of(wf, backend="inline")
    assert isinstance(error, (ValueError, FileNotFoundError))
    with pytest.raises(type(error), match=fault):
        raise error


def test_a_handle_of_another_workflow_is_refused():
    other = fp.Workflow("other").add(abs, 1)
    with pytest.raises(fp.ForeignHandle):
        fp.Workflow().add(fp.shell("echo {x}", x=other))
