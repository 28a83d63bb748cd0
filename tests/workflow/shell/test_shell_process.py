"""A program ends, and all that it started with it, however the call ends."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import pytest
from conftest import PATIENCE, is_gone, wait_until

from forgepar.errors import ToolFailed, ToolNotFound
from forgepar.machine import how_it_ended
from forgepar.workflow.shell.process import TAIL_BYTES, Ended, last_words, run_program, shown

ENOUGH = 3.0  # seconds; a timeout that is meant to be passed, but not before the program has written its files

# Writes its own number to a file and waits to be ended.
WAITING = """
import os, pathlib, signal, sys
def tell(path, text):
    pathlib.Path(path + ".part").write_text(str(text))
    os.rename(path + ".part", path)
tell(sys.argv[1], os.getpid())
while True: signal.pause()
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)" + WAITING


def run(*words, timeout=None, stdin=None, cwd=None, env=None):
    env = dict(os.environ) if env is None else env
    return run_program(list(map(str, words)), cwd=cwd, env=env, stdin=stdin, timeout=timeout)


def python(code, *arguments, **rules):
    return run(sys.executable, "-c", code, *arguments, **rules)


def pid_in(path: Path) -> int:
    wait_until(path.exists, f"{path.name} to be written")
    return int(path.read_text())


def assert_gone(*paths: Path) -> None:
    for pid in map(pid_in, paths):
        wait_until(lambda pid=pid: is_gone(pid), "the program's end")


# What goes in and comes out


def test_what_it_writes_and_ends_with_comes_back():
    ended = python("import sys; sys.stdout.write('out'); sys.stderr.write('err'); sys.exit(7)")
    assert ended[:3] == (7, b"out", b"err")
    assert ended.seconds > 0
    assert not ended.is_late


def test_much_goes_in_and_out_at_once():
    size = 120 << 20
    code = """if True:
        import sys
        while part := sys.stdin.buffer.read(1 << 16):
            sys.stdout.buffer.write(part)
            sys.stderr.buffer.write(part[:1 << 10])
    """
    ended = python(code, stdin=bytearray(size))
    assert (ended.exit_code, len(ended.stdout), len(ended.stderr)) == (0, size, size >> 6)


def test_a_program_need_not_read_all_it_is_given():
    assert run("true", stdin=bytes(1 << 20)).exit_code == 0


def test_it_reads_a_file_or_nothing(tmp_path):
    (tmp_path / "in").write_bytes(b"text\xff")
    assert run("cat", stdin=str(tmp_path / "in")).stdout == b"text\xff"
    assert run("cat").stdout == b""


def test_it_has_no_terminal():
    code = "import os; print(os.getsid(0) == os.getpid()); open('/dev/tty')"
    ended = python(code)
    assert ended.stdout == b"True\n"
    assert ended.exit_code == 1


# Ends


def test_one_that_takes_too_long_is_ended(tmp_path):
    ended = python(WAITING, tmp_path / "pid", timeout=ENOUGH)
    assert ended.is_late
    assert ended.exit_code == -signal.SIGTERM
    assert_gone(tmp_path / "pid")


def test_it_may_clean_up_first_and_its_last_words_are_heard():
    code = """if True:
        import signal, sys
        def end(*_):
            sys.stderr.write("cleaned")
            sys.exit(4)
        signal.signal(signal.SIGTERM, end)
        print("begun", flush=True)
        while True: signal.pause()
    """
    ended = python(code, timeout=ENOUGH)
    assert (ended.is_late, ended.exit_code, ended.stdout, ended.stderr) == (True, 4, b"begun\n", b"cleaned")


def test_one_that_does_not_listen_is_killed_with_what_it_started(tmp_path):
    code = """if True:
        import subprocess, sys
        print("begun", flush=True)
        deaf = [sys.executable, "-c", sys.argv[1]]
        subprocess.Popen([*deaf, sys.argv[3]], start_new_session=True)  # out of the program's own group
        subprocess.run([*deaf, sys.argv[2]])
    """
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + code
    ended = python(code, DEAF, tmp_path / "child", tmp_path / "other", timeout=ENOUGH)
    assert (ended.is_late, ended.exit_code, ended.stdout) == (True, -signal.SIGKILL, b"begun\n")
    assert_gone(tmp_path / "child", tmp_path / "other")


@pytest.mark.parametrize("output", ["", ">/dev/null 2>&1"])
def test_what_it_leaves_in_the_background_is_ended_and_not_waited_for(tmp_path, output):
    script = f'"$0" -c "$1" "$2" {output} & while ! [ -e "$2" ]; do :; done; echo done'
    ended = run("sh", "-c", script, sys.executable, DEAF, tmp_path / "pid", timeout=None)
    assert (ended.is_late, ended.exit_code, ended.stdout) == (False, 0, b"done\n")
    assert_gone(tmp_path / "pid")


def test_a_daemon_that_has_its_streams_is_not_waited_for(tmp_path):
    code = """if True:
        import os, pathlib, subprocess, sys
        print("begun", flush=True)
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
                os.execlp("sleep", "sleep", "60")
            os._exit(0)
        os.wait()
        while not pathlib.Path(sys.argv[1]).exists(): pass
    """
    ended = python(code, tmp_path / "pid", timeout=None)
    os.kill(pid_in(tmp_path / "pid"), signal.SIGKILL)
    assert (ended.is_late, ended.exit_code, ended.stdout) == (False, 0, b"begun\n")


@pytest.mark.parametrize("has_pidfd", [True, False])
def test_much_goes_in_and_comes_out(monkeypatch, has_pidfd):
    if not has_pidfd:
        monkeypatch.delattr(os, "pidfd_open", raising=False)
    data = os.urandom(1 << 20) * 4
    code = "import sys; d = sys.stdin.buffer.read(); sys.stdout.buffer.write(d); sys.stderr.buffer.write(d[::-1])"
    ended = run(sys.executable, "-c", code, stdin=data)
    assert (ended.exit_code, ended.stdout == data, ended.stderr == data[::-1]) == (0, True, True)


def test_one_that_reads_nothing_is_given_what_it_takes():
    assert run("true", stdin=bytes(1 << 22)).exit_code == 0


def test_an_interrupt_ends_it_too(tmp_path):
    def interrupt():
        pid_in(tmp_path / "pid")
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    thread = threading.Thread(target=interrupt)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            python(DEAF, tmp_path / "pid", timeout=PATIENCE)
    finally:
        thread.join()
        signal.signal(signal.SIGINT, before)
    assert_gone(tmp_path / "pid")


# Starting


def test_a_program_that_is_not_there_is_named_with_where_it_was_looked_for(tmp_path):
    with pytest.raises(
        ToolNotFound, match=r"There is no program 'no-such' in .*Install it, or pass its path"
    ) as caught:
        run("no-such", env={"PATH": f"{tmp_path}:/bin"})
    assert (caught.value.program, caught.value.searched) == ("no-such", f"{tmp_path}:/bin")
    with pytest.raises(ToolNotFound) as caught:
        run("./no-such", cwd=str(tmp_path))
    assert caught.value.searched == f"{tmp_path}/./no-such"
    assert isinstance(caught.value, FileNotFoundError)


def test_the_path_that_it_is_given_is_searched(tmp_path):
    (tmp_path / "own").write_text("#!/bin/sh\necho found\n")
    (tmp_path / "own").chmod(0o700)
    assert run("own", env={"PATH": str(tmp_path)}).stdout == b"found\n"


@pytest.mark.parametrize(
    ("text", "mode", "fault"),
    [("#!/no/such/interpreter\n", 0o700, "No such file"), ("echo\n", 0o700, "Exec format"), ("", 0o600, "Permission")],
)
def test_one_that_cannot_be_started_says_why(tmp_path, text, mode, fault):
    path = tmp_path / "tool"
    path.write_text(text)
    path.chmod(mode)
    with pytest.raises(ToolFailed, match=f"could not be started: {fault}.* Check its permissions") as caught:
        run(path, "a b")
    assert caught.value.exit_code is None
    assert caught.value.command == (str(path), "a b")


def test_more_arguments_than_the_system_takes_are_an_error_of_that_command():
    with pytest.raises(ToolFailed, match=r"Argument list too long.*the length of its arguments"):
        run("true", "a" * (1 << 22))


# Telling


def test_ends_are_told_by_code_or_signal():
    assert how_it_ended(3) == "exited with code 3"
    assert how_it_ended(-9) == "was ended by signal 9 (SIGKILL)"
    assert how_it_ended(-99) == "was ended by signal 99"


def test_command_lines_are_shown_as_they_would_be_typed():
    assert shown(("a", "b c")) == "a 'b c'"
    assert shown(("/bin/sh", "-c", "a 'b' | c")) == "a 'b' | c"
    assert shown(("a", "\udcff")) == "a '\\udcff'"
    assert shown(("a", "b" * 10_000)).endswith("bbb...")
    assert len(shown(("a", "b" * 10_000))) == 500


def test_last_words_are_the_last_lines_of_stderr_or_else_of_stdout():
    lines = "".join(f"line {i}\n" for i in range(100))
    told = last_words(Ended(1, b"out", lines.encode() + b"\xff\n\n", 0.0, False))
    assert told.splitlines() == ["Its stderr ended in:", *(f"  line {i}" for i in range(81, 100)), "  \ufffd"]
    assert last_words(Ended(1, b"out\n", b" \n", 0.0, False)) == "Its stdout ended in:\n  out"
    assert last_words(Ended(1, b"", b"", 0.0, False)) == "It wrote nothing."
    assert len(last_words(Ended(1, b"", b"x" * (1 << 20), 0.0, False))) < TAIL_BYTES + 100
