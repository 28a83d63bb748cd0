"""External programs as tasks.

shell(line, fields) --> Command --Workflow.add--> Program, which workers call with the fields' values --> ToolResult
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from forgepar.errors import TaskTimeout, ToolFailed, WorkflowError
from forgepar.handles import TaskHandle
from forgepar.lines import Line, as_word, listed, parse
from forgepar.programs import (
    SHELL,
    TAIL_BYTES,
    Ended,
    Source,
    decoded,
    how_it_ended,
    last_words,
    run_program,
    shown,
    strict_shell,
)
from forgepar.validation import check_flag

_HEAD = 200  # characters of what a program wrote, in a result's repr
_PLACES = ("cwd", "env", "stdin")  # what may be a handle beside the fields
_RESERVED = (*_PLACES, "timeout", "check", "through_shell", "strict", "text")


@dataclass(frozen=True, slots=True, repr=False)
class ToolResult:
    """What a program did.

    Attributes:
        command: the program and its arguments, as it was started.
        exit_code: what it ended with; negative: the signal that ended it.
        stdout: all that it wrote there: text, or bytes where that was asked for.
        stderr: the same.
        seconds: how long it took.
    """

    command: tuple[str, ...]
    exit_code: int
    stdout: Any
    stderr: Any
    seconds: float

    def __repr__(self) -> str:
        told = f"exit_code={self.exit_code}, stdout={_head(self.stdout)}, stderr={_head(self.stderr)}"
        return f"ToolResult({shown(self.command)!r}, {told}, seconds={self.seconds:.3f})"


_STDIN = (str, bytes, bytearray, memoryview, os.PathLike, ToolResult)
_STDIN_MEND = "Give text, bytes, a path object, or the ToolResult of another program."


class Rules(NamedTuple):
    """What is to be done about a program that takes long, or fails, and about what it writes; see `shell`."""

    timeout: float | None
    check: bool
    text: bool
    strict: bool


@dataclass(frozen=True)
class Program:
    """What workers call: a command line that gets its fields' values by name, or by position.

    Attributes:
        line: the command line.
        rules: the rules for running it.
        front: what stands in the place of its first word, if not that itself.
        env: variables that it has, before those that it is given.
    """

    line: Line
    rules: Rules
    front: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def __name__(self) -> str:  # tasks are named after it
        return self.line.name

    def free_fields(self, n_positional: int, keywords: Mapping[str, Any]) -> list[str]:
        """Return the fields that positional arguments fill: those not given by name, in order of appearance.

        Raises:
            WorkflowError: arguments for no field, or a field without an argument.
        """
        line = self.line
        for name in keywords:
            if name not in _PLACES:
                line.refuse_unknown(name)
        free = [name for name in line.fields if name not in keywords]
        if n_positional < len(free):
            raise WorkflowError(
                f"{line} has no value for {listed(free[n_positional:])}. Give one, as shell(..., {free[-1]}=...), or "
                "to Workflow.add."
            )
        if n_positional > len(free):
            raise WorkflowError(
                f"{line} got {n_positional} positional arguments, but the fields that are left are {listed(free)}. "
                "Give one for each."
            )
        return free

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise what is wrong with arguments, as far as that is known while a workflow is declared.

        Raises:
            WorkflowError: naming the argument and the command line.
        """
        for name, value in given.items():
            if name not in _PLACES:
                self.line.check(name, value)
            elif not isinstance(value, (TaskHandle, *_KINDS[name])):
                raise WorkflowError(f"{name}={value!r} of {self.line} cannot be used. {_MENDS[name]}")

    def __call__(self, /, *args: Any, **keywords: Any) -> ToolResult:
        values = dict(zip(self.free_fields(len(args), keywords), args, strict=True)) | keywords
        words = self._words(values)
        cwd = _folder(values.get("cwd"), self.line)
        env = _environment(self.env, values.get("env"))
        stdin = _source(values.get("stdin"), cwd, self.line)
        return self._result(words, run_program(words, cwd=cwd, env=env, stdin=stdin, timeout=self.rules.timeout))

    def _words(self, values: Mapping[str, Any]) -> tuple[str, ...]:
        words = self.line.fill(values)
        if self.line.is_script:
            return (*(strict_shell() if self.rules.strict else SHELL), *words)
        if self.front:
            return (*self.front, *words[1:])
        if not words or not words[0]:
            raise ValueError(f"{self.line} names no program, as the field that it begins with is empty. Give its name.")
        return tuple(words)

    def _result(self, words: tuple[str, ...], ended: Ended) -> ToolResult:
        timeout, check, text, strict = self.rules
        if ended.is_late:
            raise TaskTimeout(
                f"{shown(words)!r} took longer than its timeout of {timeout:g} s, so it was ended, with all it "
                f"started. Give it more time, or less to do. {last_words(ended)}",
                seconds=timeout or 0.0,
            )
        if ended.exit_code and check:
            hint = " (strict=False lets commands within it fail)" if strict and self.line.is_script else ""
            raise ToolFailed(
                f"{shown(words)!r} {how_it_ended(ended.exit_code)}{hint}. check=False returns the result instead. "
                f"{last_words(ended)}",
                command=words,
                exit_code=ended.exit_code,
                stderr=decoded(ended.stderr[-TAIL_BYTES:]),
            )
        stdout, stderr = (as_text(ended.stdout), as_text(ended.stderr)) if text else (ended.stdout, ended.stderr)
        return ToolResult(words, ended.exit_code, stdout, stderr, ended.seconds)


@dataclass(frozen=True, eq=False, repr=False)
class Command:
    """A command line with some of its fields' values; made by `shell`.

    `Workflow.add` and `Workflow.map` take it as they take a function, with the other fields as arguments. Called
    directly, it runs at once, in this process, and returns the `ToolResult`.

    Attributes:
        program: the command line, and the rules for running it.
        given: the values that it was given already, ``cwd``, ``env`` and ``stdin`` included.
    """

    program: Program
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        # As of a function of the same arguments: compensations and the like are called with as many as they take.
        free = [name for name in self.program.line.fields if name not in self.given]
        parameters = [inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in free]
        object.__setattr__(self, "__signature__", inspect.Signature(parameters))

    def __call__(self, /, *args: Any, **keywords: Any) -> ToolResult:
        return self.program(*args, **{**self.given, **keywords})

    def __repr__(self) -> str:
        return f"shell({self.program.line.text!r})"

    @property
    def __name__(self) -> str:
        return self.program.__name__

    def __forgepar_call__(self, n_positional: int, keywords: Mapping[str, Any]) -> tuple[Program, dict[str, Any]]:
        """Have the program called instead, with what was given as arguments: handles are found there, not in here."""
        completed = {**self.given, **keywords}
        self.program.free_fields(n_positional, completed)
        self.program.check(keywords)
        return self.program, completed


def shell(
    line: str,
    /,
    *,
    cwd: Any = None,
    env: Any = None,
    stdin: Any = None,
    timeout: float | None = None,
    check: bool = True,
    through_shell: bool = False,
    strict: bool = True,
    text: bool = True,
    **fields: Any,
) -> Command:
    r"""Make a task of an external program.

    The line is split into words before its fields are filled in, and no shell is asked: whatever a value holds, blanks,
    quotes, ``;`` or ``$()``, it is one argument. One that begins with ``-`` is, too, but the program may take it for an
    option: write ``--`` before the field.

    However the task ends, so does the program, with all that it started, but for a daemon that has left its session as
    well as its parents. At its end, what it left in the background has 0.2 s to write the rest, and is killed; at its
    timeout it is asked to end, and half a second later made to.

    Args:
        line: the program and its arguments, as for a POSIX shell, with fields in braces: ``"convert {src} {dst}"``.
            Braces of its own are written twice. A field that is a word of its own may have a list: several words.
        cwd: the folder that it runs in; the worker's by default.
        env: variables that it has beside those of the worker; None as a value takes one away.
        stdin: what it reads: text or bytes; the `ToolResult` of another program, whose stdout it is; a path object, the
            file there, below ``cwd``. Nothing by default.
        timeout: seconds that it may take; any number by default.
        check: raise if its exit code is not 0.
        through_shell: have a shell read the line, for pipes and the like; values are quoted for it.
        strict: with `through_shell`, end at the first command that fails, the first variable that is not set, and fail
            where any command of a pipe does (``set -euo pipefail``); in /bin/sh, or bash where that lacks pipefail.
            Without, it is /bin/sh as it is, whose exit code is that of the last command.
        text: decode what it writes, as UTF-8; a byte that is none becomes a surrogate, as in names of files, and is the
            same byte again where the text is an argument or input of another program. False leaves bytes.
        **fields: values of fields: text, numbers, paths, or lists of these. Those not given here are arguments of
            `Workflow.add` or `Workflow.map`, by name, or by position in the order of appearance.

    Each of ``cwd``, ``env``, ``stdin`` and the fields may be a handle; so may items of lists and variables' values.

    Returns:
        A `Command`, for `Workflow.add`, `Workflow.map` or `task`. As a task its value is a `ToolResult`.

    Raises:
        WorkflowError: the line cannot be read, a value cannot be part of it or belongs to no field.
        ToolFailed: from the task: the exit code was not 0, or the program could not be started.
        ToolNotFound: from the task: there is no such program.
        TaskTimeout: from the task: it took longer than its timeout.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> name = wf.add(str.upper, "a; b")
        >>> said = wf.add(shell("echo {greeting} {name}", greeting="hello", name=name))
        >>> wf.run(backend="inline")[said].stdout
        'hello A; B\n'
    """
    if timeout is not None and not (isinstance(timeout, (int, float)) and timeout is not True and timeout > 0):
        raise WorkflowError(f"timeout={timeout!r} is no time. Give seconds above 0, or None.")
    for flag, value in (("check", check), ("through_shell", through_shell), ("strict", strict), ("text", text)):
        check_flag(flag, value, WorkflowError)
    if not strict and not through_shell:
        raise WorkflowError(f"strict= is for scripts, but no shell reads {line!r}. Say through_shell=True as well.")
    parsed = parse(line, is_script=bool(through_shell))
    for name in parsed.fields:
        if name in _RESERVED:
            raise WorkflowError(
                f"field {name!r} of {parsed} has the name of an argument of shell(). Name it otherwise."
            )
    places = {"cwd": cwd, "env": env, "stdin": stdin}
    given = {name: value for name, value in places.items() if value is not None} | fields
    program = Program(parsed, Rules(timeout, bool(check), bool(text), bool(strict)))
    program.check(given)
    return Command(shared(program), given)


@functools.lru_cache(maxsize=1000)
def shared(program: Program) -> Program:
    """Return the one of several equal programs: tasks that have the same one travel together."""
    return program


_KINDS: Mapping[str, tuple[type, ...]] = {"cwd": (str, os.PathLike), "env": (Mapping,), "stdin": _STDIN}
_MENDS = {"cwd": "Give the path of a folder.", "env": "Give a dict of variables.", "stdin": _STDIN_MEND}


def _folder(cwd: Any, line: Line) -> str | None:
    if cwd is None:
        return None
    folder = as_word(cwd, f"cwd= of {line}")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise NotADirectoryError(
            f"cwd={folder!r} of {line} is no folder. Make it first, in a task that this one waits for."
        )
    return folder


def _environment(own: tuple[tuple[str, str], ...], changes: Any) -> dict[str, str]:
    if changes is not None and not isinstance(changes, Mapping):
        raise ValueError(f"env={changes!r} cannot be used. {_MENDS['env']}")
    env = {**os.environ, **dict(own)}
    for name, value in (changes or {}).items():
        if value is None:
            env.pop(name, None)
        else:
            env[name] = as_word(value, f"env[{name!r}]")
    return env


def _source(stdin: Any, cwd: str | None, line: Line) -> Source:
    if isinstance(stdin, ToolResult):
        stdin = stdin.stdout
    if isinstance(stdin, str):
        return stdin.encode("utf-8", "surrogateescape")
    if isinstance(stdin, os.PathLike):
        path = os.path.join(cwd or "", os.fsdecode(stdin))  # noqa: PTH118
        if not os.path.exists(path):  # noqa: PTH110
            raise FileNotFoundError(
                f"stdin={path!r} of {line} is not there. Make it first, in a task that this one waits for."
            )
        return path
    if stdin is None or isinstance(stdin, (bytes, bytearray, memoryview)):
        return stdin
    raise ValueError(f"stdin of {line} is a {type(stdin).__name__}. {_STDIN_MEND}")


def as_text(data: bytes) -> str:
    """Return what a program wrote as text from which the same bytes can be had."""
    return data.decode("utf-8", "surrogateescape")


def _head(text: str | bytes) -> str:
    return repr(text[:_HEAD]) + ("..." if len(text) > _HEAD else "")
