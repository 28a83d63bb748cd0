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

from forgepar._validate import check_flag, check_instance, check_seconds, refusal
from forgepar._validate import shown as shown_value
from forgepar.errors import TaskTimeout, ToolFailed, WorkflowError
from forgepar.machine import how_it_ended
from forgepar.version import public
from forgepar.workflow.handles import TaskHandle
from forgepar.workflow.shell.process import (
    SHELL,
    TAIL_BYTES,
    Ended,
    Source,
    decoded,
    last_words,
    run_program,
    shown,
    strict_shell,
)
from forgepar.workflow.shell.template import Line, as_word, listed, parse

_HEAD = 200  # characters of a program's output in the repr of its result
_PLACES = ("cwd", "env", "stdin")  # arguments that may be handles, in addition to the fields
_RESERVED = (*_PLACES, "timeout", "check", "through_shell", "strict", "text")


@public
@dataclass(frozen=True, slots=True, repr=False)
class ToolResult:
    """Result of a program.

    Attributes:
        command: the program and its arguments.
        exit_code: the exit code; negative for the signal that ended the program.
        stdout: all output on stdout: a string, or bytes if ``text=False``.
        stderr: all output on stderr, likewise.
        seconds: the run time.
    """

    command: tuple[str, ...]
    exit_code: int
    stdout: Any
    stderr: Any
    seconds: float

    def __repr__(self) -> str:
        streams = f"stdout={_head(self.stdout)}, stderr={_head(self.stderr)}"
        return f"ToolResult({shown(self.command)!r}, exit_code={self.exit_code}, {streams}, seconds={self.seconds:.3f})"


_STDIN = (str, bytes, bytearray, memoryview, os.PathLike, ToolResult)
_STDIN_KINDS = "a string, bytes, a path object, or the ToolResult of another program"


class Rules(NamedTuple):
    """Rules for a program's timeout, exit code and output; see `shell`."""

    timeout: float | None
    check: bool
    text: bool
    strict: bool


@dataclass(frozen=True)
class Program:
    """Callable that workers call: a command line that gets the values of its fields by name or by position.

    Attributes:
        line: the command line.
        rules: the rules for running it.
        front: words that replace its first word, if any.
        env: environment variables that are set before those of the call.
    """

    line: Line
    rules: Rules
    front: tuple[str, ...] = ()
    env: tuple[tuple[str, str], ...] = ()

    @property
    def __name__(self) -> str:  # tasks are named after it
        return self.line.name

    def free_fields(self, n_positional: int, keywords: Mapping[str, Any]) -> list[str]:
        """Return the fields that positional arguments fill: those without a keyword argument, in order of appearance.

        Raises:
            WorkflowError: an argument has no field, or a field has no argument.
        """
        line = self.line
        for name in keywords:
            if name not in _PLACES:
                line.refuse_unknown(name)
        free = [name for name in line.fields if name not in keywords]
        if n_positional < len(free):
            raise WorkflowError(
                f"The {line} has no value for {listed(free[n_positional:])}. Pass one to shell(..., {free[-1]}=...) or "
                "to Workflow.add."
            )
        if n_positional > len(free):
            raise WorkflowError(
                f"The {line} got {n_positional} positional arguments for the remaining fields {listed(free)}. "
                "Pass one argument per field."
            )
        return free

    def check(self, given: Mapping[str, Any]) -> None:
        """Raise an error for invalid arguments. Handles are not checked, as their values are not known yet.

        Raises:
            WorkflowError: names the argument and the command line.
        """
        for name, value in given.items():
            if name not in _PLACES:
                self.line.check(name, value)
            elif not isinstance(value, TaskHandle):
                check_instance(f"{name} of {self.line}", value, *_KINDS[name], WorkflowError)

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
            raise ValueError(f"The {self.line} must begin with the name of a program, got an empty field.")
        return tuple(words)

    def _result(self, words: tuple[str, ...], ended: Ended) -> ToolResult:
        timeout, check, text, strict = self.rules
        if ended.is_late:
            raise TaskTimeout(
                f"{shown(words)!r} exceeded its timeout of {timeout:g} s and was killed, with all that it started. "
                f"Set a longer timeout, or split the work. {last_words(ended)}",
                seconds=timeout or 0.0,
            )
        if ended.exit_code and check:
            hint = " (strict=False ignores errors of commands in a script)" if strict and self.line.is_script else ""
            raise ToolFailed(
                f"{shown(words)!r} {how_it_ended(ended.exit_code)}{hint}. Pass check=False to get the result instead. "
                f"{last_words(ended)}",
                command=words,
                exit_code=ended.exit_code,
                stderr=decoded(ended.stderr[-TAIL_BYTES:]),
            )
        stdout, stderr = (as_text(ended.stdout), as_text(ended.stderr)) if text else (ended.stdout, ended.stderr)
        return ToolResult(words, ended.exit_code, stdout, stderr, ended.seconds)


@public
@dataclass(frozen=True, eq=False, repr=False)
class Command:
    """Command line with values for some of its fields; made by `shell`.

    `Workflow.add` and `Workflow.map` accept it like a function, with the remaining fields as arguments. A direct call
    runs the program at once, in this process, and returns the `ToolResult`.

    Attributes:
        program: the command line, and the rules for running it.
        given: the values of fields, and ``cwd``, ``env`` and ``stdin`` if they are set.
    """

    program: Program
    given: Mapping[str, Any]

    def __post_init__(self) -> None:
        # The signature of a function of the remaining fields: compensations and handlers get as many arguments.
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
        """Return the program to call instead, with the given values as arguments, as only these may be handles."""
        completed = {**self.given, **keywords}
        self.program.free_fields(n_positional, completed)
        self.program.check(keywords)
        return self.program, completed


@public
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

    The line is split into words before the fields are filled in, and no shell reads it. Each value is one argument of
    the program, even with blanks, quotes, ``;`` or ``$()`` in it. The program may take a value that begins with ``-``
    for an option: write ``--`` before the field.

    When the task ends, the program and all that it started end too, except a daemon that has left both its session and
    its parents. Background processes have 0.2 s after the program's end to write their output, and are then killed. At
    its timeout the program gets SIGTERM, and half a second later SIGKILL.

    Args:
        line: the program and its arguments, quoted as for a POSIX shell, with fields in braces:
            ``"convert {src} {dst}"``. Double other braces. A field that is a whole word may be a list: several words.
        cwd: the program's working directory; by default the worker's.
        env: environment variables to add to those of the worker; the value None removes a variable.
        stdin: a string or bytes; the `ToolResult` of another program, for its stdout; or a path object for a file,
            relative to ``cwd``. Nothing by default.
        timeout: seconds that the program may take; None for no limit.
        check: raise an error if the exit code is not 0.
        through_shell: let a shell read the line, for pipes and the like; values are quoted for it.
        strict: with ``through_shell``, stop at the first command of the script or of a pipe that fails, or variable
            that is not set (``set -euo pipefail``, in /bin/sh, or bash if that lacks pipefail). If False, /bin/sh runs
            the script as usual, and its exit code is the last command's.
        text: decode the output as UTF-8. Invalid bytes become surrogates, as in file names, and the same bytes again in
            arguments and input of other programs. If False, the output is bytes.
        **fields: values of fields: strings, numbers, paths, or lists of these. The other fields are arguments of
            `Workflow.add` or `Workflow.map`, by name, or by position in order of appearance.

    The arguments ``cwd``, ``env``, ``stdin`` and the fields may be or contain handles. These many options make this
    function long.

    Returns:
        A `Command`, for `Workflow.add`, `Workflow.map` or `task`. The value of the task is a `ToolResult`.

    Raises:
        WorkflowError: the line cannot be parsed, or a value is invalid or has no field.
        ToolFailed: from the task: the exit code was not 0, or the program could not be started.
        ToolNotFound: from the task: the program does not exist.
        TaskTimeout: from the task: the program exceeded its timeout.

    Example:
        >>> from forgepar import Workflow
        >>> wf = Workflow()
        >>> name = wf.add(str.upper, "a; b")
        >>> said = wf.add(shell("echo {greeting} {name}", greeting="hello", name=name))
        >>> wf.run(backend="inline")[said].stdout
        'hello A; B\n'
    """
    timeout = check_seconds("timeout", timeout, WorkflowError)
    for flag, value in (("check", check), ("through_shell", through_shell), ("strict", strict), ("text", text)):
        check_flag(flag, value, WorkflowError)
    if not strict and not through_shell:
        raise WorkflowError(f"strict=False needs through_shell=True, as no shell reads {shown_value(line)} otherwise.")
    parsed = parse(line, is_script=bool(through_shell))
    for name in parsed.fields:
        if name in _RESERVED:
            raise WorkflowError(f"The field {name!r} of {parsed} must not have the name of an argument of shell().")
    places = {"cwd": cwd, "env": env, "stdin": stdin}
    given = {name: value for name, value in places.items() if value is not None} | fields
    program = Program(parsed, Rules(timeout, bool(check), bool(text), bool(strict)))
    program.check(given)
    return Command(shared(program), given)


@functools.lru_cache(maxsize=1000)
def shared(program: Program) -> Program:
    """Return one object for equal programs, so that their tasks can be sent together."""
    return program


# The classes and the description of valid values.
_KINDS: Mapping[str, tuple[tuple[type, ...], str]] = {
    "cwd": ((str, os.PathLike), "the path of a folder"),
    "env": ((Mapping,), "a dict of variables"),
    "stdin": (_STDIN, _STDIN_KINDS),
}


def _folder(cwd: Any, line: Line) -> str | None:
    if cwd is None:
        return None
    folder = as_word(cwd, f"cwd= of {line}")
    if not os.path.isdir(folder):  # noqa: PTH112
        raise NotADirectoryError(
            f"The folder cwd={folder!r} of {line} does not exist. Create it in a task that this one waits for."
        )
    return folder


def _environment(own: tuple[tuple[str, str], ...], changes: Any) -> dict[str, str]:
    if changes is not None:
        check_instance("env", changes, *_KINDS["env"])
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
                f"The file stdin={path!r} of {line} does not exist. Create it in a task that this one waits for."
            )
        return path
    if stdin is None or isinstance(stdin, (bytes, bytearray, memoryview)):
        return stdin
    raise refusal(f"stdin of {line}", _STDIN_KINDS, stdin)


def as_text(data: bytes) -> str:
    """Decode a program's output to a string that encodes to the same bytes."""
    return data.decode("utf-8", "surrogateescape")


def _head(text: str | bytes) -> str:
    return repr(text[:_HEAD]) + ("..." if len(text) > _HEAD else "")
