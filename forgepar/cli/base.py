"""What the commands share: exit codes, their help, the target of a command, output and errors."""

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
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeAlias

from forgepar._validate import check_path
from forgepar.cli.targets import TargetError, load_workflow
from forgepar.errors import text_of
from forgepar.report.export.writing import check_target
from forgepar.system.escaping import escaped, write_text
from forgepar.workflow.workflow import Workflow

DONE, TASK_FAILED, BAD_USAGE, INTERRUPTED, READER_GONE = 0, 1, 2, 130, 141
_TARGET_HELP = (
    "package.module:attr or path/to/file.py:attr; attr is a Workflow or a function that returns one (default: workflow)"
)
_STYLES = {"bad": "1;31", "good": "32", "dim": "2"}
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


class Parser(argparse.ArgumentParser):
    """A parser that suggests the nearest command for an unknown one."""

    def error(self, message: str) -> NoReturn:
        """Print the usage and a message, and exit."""
        if (found := re.search(r"invalid choice: '([^']*)' \(choose from (.*)\)", message)) is not None:
            choices = re.findall(r"[\w-]+", found[2])
            if close := difflib.get_close_matches(found[1], choices, 1):
                message = message.replace(found[0], f"invalid choice: '{found[1]}'. Did you mean '{close[0]}'?")
        super().error(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print help, and raise if that fails; `argparse` ignores the error."""
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
        commands: the commands of the parser.
        name: the command's name.
        function: runs the command with its arguments and returns the exit code.
        text: one line of help, without a full stop.
        examples: arguments for the examples in its help.

    Returns:
        The command's parser.
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
    """Add the options for more or less output; they may stand before or after the command."""
    parser.add_argument(
        "-q", "--quiet", action="store_true", default=default or False, help="show only results and errors"
    )
    parser.add_argument(
        "-v", "--verbose", action="count", default=default or 0, help="show log records; -vv includes those of tasks"
    )


def add_json(command: argparse.ArgumentParser) -> None:
    """Add the option for JSON output; see `print_json`."""
    command.add_argument("--json", action="store_true", help="print JSON")


def print_json(document: Any) -> None:
    """Print a command's result as JSON.

    Raises:
        ValueError: the result contains itself, or is nested too deeply.
    """
    try:
        print(json.dumps(_finite(document), indent=1, default=shown))
    except RecursionError:
        raise ValueError("the value contains itself, or is nested too deeply for JSON.") from None


def _finite(value: Any) -> Any:
    """Replace what JSON lacks: nan and infinity by null, keys by text."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name if isinstance(name, str) else repr(name): _finite(part) for name, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, (list, tuple)) else value


def note(arguments: argparse.Namespace, text: str) -> None:
    """Print a note on standard error, unless --quiet is given."""
    if not arguments.quiet:
        print(f"forgepar: {escaped(text)}", file=sys.stderr)


def styled(text: str, style: str, stream: TextIO | None = None) -> str:
    """Return a text in a style if a stream shows styles, else unchanged.

    Args:
        text: the text.
        style: "bad", "good" or "dim".
        stream: the stream that the text is for; None: standard error.
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
    """Add a command whose TARGET names a workflow; ``function`` gets the workflow and the arguments."""

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
        "-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help="an argument for the function"
    )
    return command


def complain(error: Exception | str) -> int:
    """Print an error, if standard error can be written, and return the exit code for bad usage."""
    with suppress(OSError, ValueError):
        print(f"{styled('forgepar:', 'bad')} {escaped(text_of(error))}", file=sys.stderr)
    return BAD_USAGE


def print_value(value: Any) -> None:
    """Print a value: text unchanged, with control characters escaped on a terminal; other values by their repr."""
    if isinstance(value, str):
        print(escaped(value) if sys.stdout.isatty() else value)
    else:
        print(escaped(shown(value)))


def shown(value: Any) -> str:
    """Return the repr of a value; if that raises, a text that says so."""
    try:
        return repr(value)
    except Exception as error:
        return f"<{type(value).__qualname__}: __repr__ raised {type(error).__name__}: {text_of(error)}>"


def tried(call: Callable[[], object], code: int = BAD_USAGE) -> int:
    """Call a function. Return the exit code: ``code`` after an error of a missing package or of the system."""
    try:
        call()
    except (ModuleNotFoundError, OSError) as error:
        complain(error)
        return code
    return DONE


def path_of(text: str) -> Path:
    """Parse the path of a file. An empty one is refused: it would name the current folder."""
    try:
        return check_path("FILE", text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def check_output(option: str, path: Path | None) -> None:
    """Check that a file can be written, before a command starts its work. The file is not changed.

    Args:
        option: the option that names the file.
        path: the file; None if the option is not given.

    Raises:
        ValueError: the file cannot be written.
    """
    if path is None:
        return
    try:
        check_target(check_path(option, path))
    except OSError as error:
        why = f"{path} cannot be written: {error.strerror}. Give another path." if error.strerror else text_of(error)
        raise ValueError(f"{option}: {why}") from error


def _parameters(pairs: Sequence[str]) -> dict[str, str]:
    for pair in pairs:
        if "=" not in pair:
            raise TargetError(f"-p must be key=value, got {pair}.")
    return dict(pair.split("=", 1) for pair in pairs)
