"""What the commands have in common: exit codes, finding the workflow they are about, and how they complain."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TypeAlias

from forgepar.targets import TargetError, load_workflow
from forgepar.workflow import Workflow

DONE, TASK_FAILED, BAD_USAGE, INTERRUPTED = 0, 1, 2, 130
_TARGET_HELP = (
    "package.module:attr or path/to/file.py:attr; attr is a Workflow or a function returning one (default: workflow)"
)
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def add_command(
    commands: Commands, name: str, function: Callable[[argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command to the command line.

    Args:
        commands: where to.
        name: what it is called.
        function: what it does, given its arguments; returns the exit code.
        text: one line of help, without a full stop.

    Returns:
        Its parser, for its arguments.
    """
    command = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
    command.set_defaults(command=function)
    return command


def add_target_command(
    commands: Commands, name: str, function: Callable[[Workflow, argparse.Namespace], int], text: str
) -> argparse.ArgumentParser:
    """Add a command about a workflow that its TARGET names; ``function`` gets that first."""

    def load_and_call(arguments: argparse.Namespace) -> int:
        try:
            workflow = load_workflow(arguments.target, _parameters(arguments.parameters))
        except TargetError as error:
            return complain(error)
        except Exception:
            print(f"forgepar: {arguments.target} cannot be loaded; it raised:", file=sys.stderr)
            traceback.print_exc()
            return BAD_USAGE
        return function(workflow, arguments)

    command = add_command(commands, name, load_and_call, text)
    command.add_argument("target", metavar="TARGET", help=_TARGET_HELP)
    command.add_argument(
        "-p", dest="parameters", action="append", default=[], metavar="KEY=VALUE", help="an argument of the function"
    )
    return command


def complain(error: Exception) -> int:
    """Say what is wrong, and return the exit code for that."""
    print(f"forgepar: {error}", file=sys.stderr)
    return BAD_USAGE


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
