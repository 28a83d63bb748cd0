"""Runs one program to its end; no process that it started remains."""

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

SHELL = ("/bin/sh", "-c")  # precedes a script
_STRICT = ("-eu", "-o", "pipefail", "-c")  # after the shell, before a script that stops at its first error
GRACE_SECONDS = 0.5  # between SIGTERM and SIGKILL, for the program to clean up; the same as workers get
TAIL_BYTES = 64 << 10  # of a program's stderr, in errors
_REST_SECONDS = 0.2  # after a program's end, for its background processes to write the rest of their output
_LOOK_SECONDS = 0.02  # between two polls for a program's end on systems without pidfd
_LONGEST_SECONDS = 1.0  # of one wait: the precision to which a stop of this process is noticed
_LEAST_STOP_SECONDS = 0.25  # a wait this much longer than asked means that this process was stopped, not just late
_PIECE = 1 << 16  # bytes: the capacity of a pipe
_TAIL_LINES = 20  # of the output, in messages
_MOST_SHOWN = 500  # characters of a command line in messages, which may have a long list of files

# The input of a program: bytes, or the path of a file as a string.
Source: TypeAlias = bytes | bytearray | memoryview | str | None


class Ended(NamedTuple):
    """End of a program.

    Attributes:
        exit_code: the exit code; negative for the signal that ended the program.
        stdout: all output on stdout.
        stderr: all output on stderr.
        seconds: the run time.
        is_late: whether it was killed at its timeout.
    """

    exit_code: int
    stdout: bytes
    stderr: bytes
    seconds: float
    is_late: bool


def run_program(
    words: Sequence[str], *, cwd: str | None, env: Mapping[str, str], stdin: Source, timeout: float | None
) -> Ended:
    """Run a program and collect its output.

    The program has its own session and no terminal, so one that asks there for a password fails instead of waiting.

    Args:
        words: the program and its arguments.
        cwd: the working directory; None for this process's.
        env: the whole environment.
        stdin: the input; None for none.
        timeout: seconds until the program and all that it started get SIGTERM, and later SIGKILL.

    Raises:
        ToolNotFound: the program does not exist.
        ToolFailed: it cannot be started.
        OSError: its input file cannot be opened.
    """
    with _opened(stdin) as (source, data):
        began_at = time.perf_counter()
        with _started(words, cwd, env, source) as process:
            stdout, stderr, is_late = _watched(process, data, timeout)
    return Ended(process.returncode, stdout, stderr, time.perf_counter() - began_at, is_late)


@functools.cache
def strict_shell() -> tuple[str, ...]:
    """Return the words before a script that stops at the first command that fails, also within a pipe.

    The shell is /bin/sh if that has pipefail (in POSIX since 2024), else bash.

    Raises:
        ToolNotFound: neither has pipefail.
    """
    bash = shutil.which("bash")
    for path in (SHELL[0], *([bash] if bash else [])):
        with suppress(OSError):
            tried = subprocess.run([path, *_STRICT, ":"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
            if tried.returncode == 0:
                return (path, *_STRICT)
    raise ToolNotFound(
        "strict=True needs a shell with the option pipefail, and there is none. Install bash, or pass strict=False.",
        program="bash",
        searched=os.pathsep.join(os.get_exec_path()),
    )


def is_script(words: Sequence[str]) -> bool:
    """Return whether a command line is a shell with a script."""
    return tuple(words[:-1]) == SHELL or tuple(words[1:-1]) == _STRICT


def shown(words: Sequence[str]) -> str:
    """Format a command line for messages: a script as it is, other words quoted."""
    text = words[-1] if is_script(words) else shlex.join(words)
    text = text.encode("utf-8", "backslashreplace").decode()  # file names may have surrogates, which cannot be printed
    return text if len(text) <= _MOST_SHOWN else text[: _MOST_SHOWN - 3] + "..."


def decoded(data: bytes) -> str:
    """Decode a program's output, replacing invalid bytes."""
    return data.decode("utf-8", "replace")


def last_words(ended: Ended) -> str:
    """Quote the last lines of a program's stderr, or of its stdout if stderr is empty."""
    for name, data in (("stderr", ended.stderr), ("stdout", ended.stdout)):
        lines = decoded(data[-TAIL_BYTES:]).rstrip().splitlines()[-_TAIL_LINES:]
        if lines:
            return f"Its {name} ended in:\n" + "\n".join(f"  {line}" for line in lines)
    return "It wrote nothing."


@contextmanager
def _opened(stdin: Source) -> Iterator[tuple[int | IO[bytes], Any]]:
    """Yield the argument ``stdin`` of `subprocess.Popen`, and the data to write to it."""
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
            f"There is no program {program!r} in {searched}. Install it, or pass its path.",
            program=program,
            searched=searched,
        )
    return ToolFailed(
        f"{shown(words)!r} could not be started: {error.strerror}. Check its permissions, the interpreter in its first "
        "line, and the length of its arguments.",
        command=words,
    )


def _watched(process: subprocess.Popen[bytes], data: Any, timeout: float | None) -> tuple[bytes, bytes, bool]:
    """Return a program's output until its end, and whether it was killed at its timeout."""
    descendants: list[Any] = []
    until = math.inf if timeout is None else time.monotonic() + timeout
    with _Streams(process, data) as streams:
        try:
            is_late = not streams.exchange(until)
            if is_late:
                descendants = _tree(process)
                _send(signal.SIGTERM, process, descendants)
                streams.exchange(time.monotonic() + GRACE_SECONDS)
            elif not streams.is_over:
                # Its background processes have its streams. One that is about to end may still write.
                streams.exchange(time.monotonic() + _REST_SECONDS, is_for_all=True)
        finally:
            # Also after a normal end, as background processes may be left; and before waiting for the program.
            if not streams.has_ended:
                descendants += _tree(process)
            _send(signal.SIGKILL, process, descendants)
        # All output is written, except that of daemons, which keep the streams open as long as they live.
        streams.exchange(time.monotonic() + _REST_SECONDS, is_for_all=True)
        return (*streams.written(), is_late)


class _Streams:
    """Streams of a program: writes its input, reads its output, and notices its end.

    The end of the program need not be the end of its streams: a background process may keep them open.

    Args:
        process: the program.
        data: its input; None for none.
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
        with suppress(OSError, AttributeError):  # without pidfd, poll for its end
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
        self._process.wait()  # does not block: it has ended or was killed

    @property
    def is_over(self) -> bool:
        """Whether no process has the streams open."""
        return not any(key.events & selectors.EVENT_READ and key.fd != self._pidfd for key in self._keys())

    def exchange(self, until: float, *, is_for_all: bool = False) -> bool:
        """Read and write until the program has ended; return whether it has.

        Args:
            until: when to give up, in seconds of `time.monotonic`.
            is_for_all: continue until all processes with its streams have ended.
        """
        while not (self.is_over if is_for_all else self.has_ended):
            began = time.monotonic()
            left = min(until - began, _LOOK_SECONDS if self._pidfd < 0 else _LONGEST_SECONDS)
            if left <= 0.0:
                return False
            ready = self._selector.select(left)
            if (stopped := time.monotonic() - began - left) > _LEAST_STOP_SECONDS:
                until += stopped  # this process was stopped, as by Ctrl-Z, and the program with it
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
        """Return the output on stdout and on stderr."""
        out, err = (b"".join(chunks) for chunks in self._chunks.values())
        return out, err

    def _keys(self) -> Iterable[selectors.SelectorKey]:
        return self._selector.get_map().values()

    def _is_dead(self) -> bool:
        """Return whether the program has ended; its pid is not reused before it is waited for."""
        return os.waitid(os.P_PID, self._process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def _feed(self) -> None:
        stdin = self._process.stdin
        assert stdin is not None
        try:
            self._input = self._input[os.write(stdin.fileno(), self._input[:_PIECE]) :]
        except BlockingIOError:
            return
        except BrokenPipeError:  # the program has closed its stdin
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
    """Return all descendants of a program, in other sessions too."""
    import psutil  # needed only for programs that do not end by themselves

    with suppress(psutil.Error):
        found: list[Any] = psutil.Process(process.pid).children(recursive=True)
        return found
    return []


def _send(number: signal.Signals, process: subprocess.Popen[bytes], descendants: list[Any]) -> None:
    """Signal a program, its descendants, and processes of its group that have lost their parent."""
    with suppress(OSError):  # no process is left in the group, or none that may be signalled
        # The group's id is the program's pid, which is not reused while a process of the group lives.
        os.killpg(process.pid, number)
    if descendants:
        import psutil

        for child in descendants:
            with suppress(psutil.Error):  # it has ended, its pid may have been reused, or it is another user's
                child.send_signal(number)
