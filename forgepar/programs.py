"""Running one program to its end, whatever the end: nothing that it started is left behind."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple, TypeAlias

from forgepar.errors import ToolFailed, ToolNotFound

SHELL = ("/bin/sh", "-c")  # before a script
GRACE_SECONDS = 0.5  # from asking a program to end, which lets it clean up, to ending it; as workers are given
TAIL_BYTES = 64 << 10  # of a program's stderr, in errors
_TAIL_LINES = 20  # of those, in messages
_MOST_SHOWN = 500  # characters of a command line in messages: a list of files can be long

# What a program reads: bytes, or the path of a file, as text.
Source: TypeAlias = bytes | bytearray | memoryview | str | None


class Ended(NamedTuple):
    """What came of a program.

    Attributes:
        exit_code: negative: the signal that ended it.
        stdout: all that it wrote there.
        stderr: the same.
        seconds: how long it took.
        is_late: whether it was ended for taking too long.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    seconds: float
    is_late: bool


def run_program(
    words: Sequence[str], *, cwd: str | None, env: Mapping[str, str], stdin: Source, timeout: float | None
) -> Ended:
    """Run a program and take what it writes.

    It has a session of its own, so no terminal: one that asks for a password there fails instead of waiting for ever.

    Args:
        words: the program and its arguments.
        cwd: the folder it runs in; None: this process's.
        env: all of its environment.
        stdin: what it reads; None: nothing.
        timeout: seconds after which it is asked to end, and then made to, with all that it started.

    Raises:
        ToolNotFound: there is no such program.
        ToolFailed: it cannot be started.
        OSError: the file that it is to read cannot be opened.
    """
    with _opened(stdin) as (source, data):
        began_at = time.perf_counter()
        with _started(words, cwd, env, source) as process:
            stdout, stderr, is_late = _watched(process, data, timeout)
    return Ended(process.returncode, stdout, stderr, time.perf_counter() - began_at, is_late)


def how_it_ended(exit_code: int) -> str:
    """Say how a process ended; a negative code is the number of a signal."""
    if exit_code >= 0:
        return f"exited with code {exit_code}"
    number = f"signal {-exit_code}"
    with suppress(ValueError):  # a number without a name
        number += f" ({signal.Signals(-exit_code).name})"
    return f"was ended by {number}"


def shown(words: Sequence[str]) -> str:
    """Write a command line for people: a script as it is, words quoted."""
    text = words[-1] if tuple(words[:-1]) == SHELL else shlex.join(words)
    text = text.encode("utf-8", "backslashreplace").decode()  # file names need not be text, and messages are printed
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def decoded(data: bytes) -> str:
    """Read what a program wrote as text, whatever it is."""
    return data.decode("utf-8", "replace")


def last_words(ended: Ended) -> str:
    """Quote the end of what a program wrote to stderr, or to stdout where it wrote nothing there."""
    for name, data in (("stderr", ended.stderr), ("stdout", ended.stdout)):
        lines = decoded(data[-TAIL_BYTES:]).rstrip().splitlines()[-_TAIL_LINES:]
        if lines:
            return f"Its {name} ended in:\n" + "\n".join(f"  {line}" for line in lines)
    return "It wrote nothing."


@contextmanager
def _opened(stdin: Source) -> Iterator[tuple[int | IO[bytes], Any]]:
    """Yield where a program's stdin comes from, and what is to be written to it."""
    if isinstance(stdin, str):
        with open(stdin, "rb") as file:  # noqa: PTH123
            yield file, None
    elif stdin is None:
        yield subprocess.DEVNULL, None
    else:
        yield subprocess.PIPE, stdin


def _started(
    words: Sequence[str], cwd: str | None, env: Mapping[str, str], source: int | IO[bytes]
) -> subprocess.Popen[bytes]:
    pipe = subprocess.PIPE
    try:
        return subprocess.Popen(words, cwd=cwd, env=env, stdin=source, stdout=pipe, stderr=pipe, start_new_session=True)
    except OSError as error:
        raise _not_started(words, cwd, env, error) from error


def _not_started(words: Sequence[str], cwd: str | None, env: Mapping[str, str], error: OSError) -> Exception:
    program = words[0]
    if os.sep in program:
        searched = os.path.join(cwd or "", program)  # noqa: PTH118
        is_there = os.path.exists(searched)  # noqa: PTH110
    else:
        searched = os.pathsep.join(os.get_exec_path(env))
        is_there = shutil.which(program, path=searched) is not None
    if isinstance(error, FileNotFoundError) and not is_there:
        return ToolNotFound(
            f"there is no program {program!r} in {searched}. Install it, or give its path.",
            program=program,
            searched=searched,
        )
    return ToolFailed(
        f"{shown(words)!r} could not be started: {error.strerror}. Look at its permissions, at the interpreter that "
        "its first line may name, and at how much it is given.",
        command=words,
    )


def _watched(process: subprocess.Popen[bytes], data: Any, timeout: float | None) -> tuple[bytes, bytes, bool]:
    """Return what a program writes until it ends, and whether it had to be ended."""
    doomed: list[Any] = []
    try:
        return (*process.communicate(data, timeout), False)
    except subprocess.TimeoutExpired:
        doomed = _tree(process)
        _send(signal.SIGTERM, process, doomed)
        try:
            return (*process.communicate(timeout=GRACE_SECONDS), True)
        except subprocess.TimeoutExpired as expired:
            return expired.output or b"", expired.stderr or b"", True
    finally:
        # Also after a good end, for what the program left in the background; and before a bad one is waited for.
        if process.returncode is None:
            doomed += _tree(process)
        _send(signal.SIGKILL, process, doomed)
        process.wait()  # at an interrupt `subprocess` does not


def _tree(process: subprocess.Popen[bytes]) -> list[Any]:
    """Return all that a program started, and those did, in other sessions too."""
    import psutil  # here, as most programs end by themselves

    with suppress(psutil.Error):
        found: list[Any] = psutil.Process(process.pid).children(recursive=True)
        return found
    return []


def _send(number: signal.Signals, process: subprocess.Popen[bytes], doomed: list[Any]) -> None:
    """Signal a program, what it started, and those of its group whose parent is gone already."""
    with suppress(OSError):  # none is left, or none that may be signalled
        # The program's own number, which no process can get while one of this group lives.
        os.killpg(process.pid, number)
    if doomed:
        import psutil

        for child in doomed:
            with suppress(psutil.Error):  # gone, though its number may be another's by now, or another user's
                child.send_signal(number)
