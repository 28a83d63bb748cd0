"""What the commands have in common: exit codes, their help, finding the workflow they are about, how they complain."""

from __future__ import annotations

import argparse
import difflib
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TextIO, TypeAlias

from forgepar.errors import text_of
from forgepar.escaping import escaped, write_text
from forgepar.targets import TargetError, load_workflow
from forgepar.workflow import Workflow

DONE, TASK_FAILED, BAD_USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141
_TARGET_HELP = (
    "package.module:attr or path/to/file.py:attr; attr is a Workflow or a function returning one (default: workflow)"
)
_STYLES = {"bad": "1;31", "good": "32", "dim": "2"}
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Parser(argparse.ArgumentParser):
    """A parser that says what may have been meant by a word it does not know."""

    def error(self, message: str) -> NoReturn:
        """Print usage and message, and exit."""
        if (found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is not None:
            choices = re.findall(r"[\w-]+", found[2])
            if close := difflib.get_close_matches(found[1], choices, 1):
                message = message.replace(found[0], f"invalid choice: '{found[1]}'. Did you mean '{close[0]}'?")
        super().error(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, and say where that cannot be done: `argparse` keeps that to itself."""
        write_text(file or sys.stderr, message)


def add_command(
    commands: Commands,
    name: str,
    function: Callable[[argparse.Namespace], int],
    text: str,
    examples: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Add a command to the command line.

    Args:
        commands: where to.
        name: what it is called.
        function: what it does, given its arguments; returns the exit code.
        text: one line of help, without a full stop.
        examples: what follows ``forgepar`` and its name, for its help.

    Returns:
        Its parser, for its arguments.
    """
    command = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog="\n  ".join(["examples:", *(f"forgepar {name} {example}" for example in examples)])
        if examples
        else None,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(command=function)
    add_volume(command, default=argparse.SUPPRESS)
    return command


def add_volume(parser: argparse.ArgumentParser, default: Any) -> None:
    """Add the options that say how much is told; they may stand before the command and behind it."""
    parser.add_argument(
        "-q", "--quiet", action="store_true", default=default or False, help="show results and errors alone"
    )
    parser.add_argument(
        "-v", "--verbose", action="count", default=default or 0, help="show log records; twice: of tasks, too"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the option of a command that tells something to tell it for programs; see `print_json`."""
    command.add_argument("--json", action="store_true", help="print JSON, for programs")


def print_json(document: Any) -> None:
    """Print what a command has to tell, for programs.

    Raises:
        ValueError: JSON cannot hold it.
    """
    try:
        print(json.dumps(_finite(document), indent=1, default=shown))
    except RecursionError:
        raise ValueError("what is to be printed holds itself, or too much within each other, for JSON.") from None


def _finite(value: Any) -> Any:
    """Put null in place of what JSON has no number for, and text in place of keys that it does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else repr(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def note(arguments: argparse.Namespace, text: str) -> None:
    """Say what is good to know and no result, unless it is to be quiet."""
    if not arguments.quiet:
        print(f"forgepar: {escaped(text)}", file=sys.stderr)


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return a text in a style ("bad", "good", "dim") where a stream shows styles, else as it is.

    Args:
        text: the text.
        style: which.
        stream: where the text goes; None: to standard error.
    """
    stream = stream or sys.stderr
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM", "dumb") == "dumb" or not stream.isatty()
    return text if plain else f"\x1b[{_STYLES[style]}m{text}\x1b[0m"


def add_target_command(
    commands: Commands,
    name: str,
    function: Callable[[Workflow, argparse.Namespace], int],
    text: str,
    examples: Sequence[str] = (),
) -> argparse.ArgumentParser:
    """Add a command about a workflow that its TARGET names; ``function`` gets that first."""

    def load_and_call(arguments: argparse.Namespace) -> int:
        try:
            workflow = load_workflow(arguments.target, _parameters(arguments.parameters))
        except TargetError as error:
            return complain(error)
        except Exception:
            complain(f"{arguments.target} cannot be loaded; it raised:")
            print(escaped(traceback.format_exc()), end="", file=sys.stderr)
            return BAD_USAGE
        return function(workflow, arguments)

    command = add_command(commands, name, load_and_call, text, examples)
    command.add_argument("target", metavar="TARGET", help=_TARGET_HELP)
    command.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help="an argument of the function"
    )
    return command


def complain(error: Exception | str) -> int:
    """Say what is wrong, if anybody can hear it, and return the exit code for that."""
    with suppress(OSError, ValueError):
        print(f"{styled('forgepar:', 'bad')} {escaped(text_of(error))}", file=sys.stderr)
    return BAD_USAGE


def print_value(value: Any) -> None:
    """Print a value alone: a text as it is, unless a terminal would obey what is in it; others by their repr."""
    if isinstance(value, str):
        print(escaped(value) if sys.stdout.isatty() else value)
    else:
        print(escaped(shown(value)))


def shown(value: Any) -> str:
    """Return the repr of a value; where that raises, a text that says so."""
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__qualname__}, whose __repr__ raises {type(error).__name__}: {text_of(error)}>"


def tried(call: Callable[[], object]) -> int:
    """Do what a missing package or folder may keep from being done; return the exit code."""
    try:
        call()
    except (ModuleNotFoundError, OSError) as error:
        return complain(error)
    return DONE


def _parameters(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise TargetError(f"-p {pair} has no value. Give -p key=value.")
    return dict(pair.split("=", 1) for pair in pairs)
