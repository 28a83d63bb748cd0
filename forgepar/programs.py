"""Running one program to its end, whatever the end: nothing that it started is left behind."""

from __future__ import annotations

import functools
import math
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NamedTuple, Self, TypeAlias

from forgepar.errors import ToolFailed, ToolNotFound

SHELL = ("/bin/sh", "-c")  # before a script
_STRICT = ("-eu", "-o", "pipefail", "-c")  # behind a shell, before a script that is to end at its first failure
GRACE_SECONDS = 0.5  # from asking a program to end, which lets it clean up, to ending it; as workers are given
TAIL_BYTES = 64 << 10  # of a program's stderr, in errors
_REST_SECONDS = 0.2  # from a program's end, for what it left in the background to write the rest
_LOOK_SECONDS = 0.02  # between two looks whether a program has ended, where the system does not tell
_LONGEST_SECONDS = 1.0  # of one wait: a stop of this process is seen to this precision
_LEAST_STOP_SECONDS = 0.25  # by which a wait that took longer than asked for was stopped, and not merely late
_PIECE = 1 << 16  # bytes: what a pipe holds
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


@functools.cache
def strict_shell() -> tuple[str, ...]:
    """Return what stands before a script that is to end where a command of it, or of one of its pipes, fails.

    It is /bin/sh where that can watch all of a pipe (POSIX has demanded it since 2024), else bash.

    Raises:
        ToolNotFound: there is no such shell.
    """
    bash = shutil.which("bash")
    for path in (SHELL[0], *([bash] if bash else [])):
        with suppress(OSError):
            tried = subprocess.run([path, *_STRICT, ":"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if tried.returncode == 0:
                return (path, *_STRICT)
    raise ToolNotFound(
        "there is no shell here that knows the option pipefail, which strict=True needs. Install bash, or say "
        "strict=False.",
        program="bash",
        searched=os.pathsep.join(os.get_exec_path()),
    )


def is_script(words: Sequence[str]) -> bool:
    """Tell whether a command line is a shell with a script."""
    return tuple(words[:-1]) == SHELL or tuple(words[1:-1]) == _STRICT


def shown(words: Sequence[str]) -> str:
    """Write a command line for people: a script as it is, words quoted."""
    text = words[-1] if is_script(words) else shlex.join(words)
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
    until = math.inf if timeout is None else time.monotonic() + timeout
    with _Exchange(process, data) as exchange:
        try:
            is_late = not exchange.go_on(until)
            if is_late:
                doomed = _tree(process)
                _send(signal.SIGTERM, process, doomed)
                exchange.go_on(time.monotonic() + GRACE_SECONDS)
            elif not exchange.is_over:
                # What it left in the background has its streams. What is about to end by itself may write to its end.
                exchange.go_on(time.monotonic() + _REST_SECONDS, is_for_all=True)
        finally:
            # Also after a good end, for what the program left in the background; and before a bad one is waited for.
            if not exchange.has_ended:
                doomed += _tree(process)
            _send(signal.SIGKILL, process, doomed)
        # All is written, but for what a daemon has to say that holds the streams for its own life.
        exchange.go_on(time.monotonic() + _REST_SECONDS, is_for_all=True)
        return (*exchange.written(), is_late)


class _Exchange:
    """Feeds a program, reads what it writes, and watches for its end, which need not be that of its streams.

    A child process that it leaves in the background has the same streams, and may keep them open for ever.

    Args:
        process: the program.
        data: what it is to read; None: nothing.
    """

    def __init__(self, process: subprocess.Popen[bytes], data: Any) -> None:
        self.has_ended = False
        self._process = process
        self._input = memoryview(data if data is not None else b"").cast("B")
        self._chunks: dict[Any, list[bytes]] = {process.stdout: [], process.stderr: []}
        self._selector = selectors.DefaultSelector()
        self._pidfd = -1

    def __enter__(self) -> Self:
        for stream in self._chunks:
            self._selector.register(stream, selectors.EVENT_READ)
        if self._process.stdin is not None:
            os.set_blocking(self._process.stdin.fileno(), False)
            self._selector.register(self._process.stdin, selectors.EVENT_WRITE)
        with suppress(OSError, AttributeError):  # not everywhere: its end is looked for every so often then
            self._pidfd = os.pidfd_open(self._process.pid)
            self._selector.register(self._pidfd, selectors.EVENT_READ)
        return self

    def __exit__(self, *_: object) -> None:
        self._selector.close()
        for stream in (self._process.stdin, *self._chunks):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._process.wait()  # it has ended, or was just killed

    @property
    def is_over(self) -> bool:
        """Whether nothing holds its streams any more."""
        return not any(key.events & selectors.EVENT_READ and key.fd != self._pidfd for key in self._keys())

    def go_on(self, until: float, *, is_for_all: bool = False) -> bool:
        """Go on until the program has ended; return whether it did.

        Args:
            until: seconds of `time.monotonic` at which to give up.
            is_for_all: go on until all have ended that have its streams.
        """
        while not (self.is_over if is_for_all else self.has_ended):
            began = time.monotonic()
            left = min(until - began, _LOOK_SECONDS if self._pidfd < 0 else _LONGEST_SECONDS)
            if left <= 0.0:
                return False
            ready = self._selector.select(left)
            if (stopped := time.monotonic() - began - left) > _LEAST_STOP_SECONDS:
                until += stopped  # this process was, as by Ctrl-Z, and the program with it
            for key, _ in ready:
                if key.fileobj is self._process.stdin:
                    self._feed()
                elif key.fd != self._pidfd:
                    self._read(key.fileobj)
            if not self.has_ended and self._is_dead():
                self.has_ended = True
                if self._pidfd >= 0:
                    self._selector.unregister(self._pidfd)
        return True

    def written(self) -> tuple[bytes, bytes]:
        """Return what it has written to stdout and to stderr."""
        out, err = (b"".join(chunks) for chunks in self._chunks.values())
        return out, err

    def _keys(self) -> Iterable[selectors.SelectorKey]:
        return self._selector.get_map().values()

    def _is_dead(self) -> bool:
        """Tell whether it has ended; its number stays its own until it is waited for."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _feed(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            self._input = self._input[os.write(stdin.fileno(), self._input[:_PIECE]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # it reads no more
            self._input = self._input[:0]
        if not self._input:
            self._selector.unregister(stdin)
            stdin.close()

    def _read(self, stream: Any) -> None:
        if chunk := os.read(stream.fileno(), _PIECE):
            self._chunks[stream].append(chunk)
        else:
            self._selector.unregister(stream)


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
