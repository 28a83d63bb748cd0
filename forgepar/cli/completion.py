"""The command ``completion``: prints a completion script for a shell, made from the parser."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from forgepar.cli.base import DONE, Commands, add_command

_SHELLS = ("bash", "zsh", "fish")
_FILES = ("TARGET", "STORE", "FILE")  # metavars of arguments that are, or begin with, a file name


def add_to(commands: Commands) -> None:
    """Add the command to the command line."""
    command = add_command(
        commands,
        "completion",
        completion,
        "print a script for a shell that completes commands and options",
        [
            "bash > ~/.local/share/bash-completion/completions/forgepar",
            'zsh > "${fpath[1]}/_forgepar"',
            "fish > ~/.config/fish/completions/forgepar.fish",
        ],
    )
    command.add_argument("shell", choices=_SHELLS)


def completion(arguments: argparse.Namespace) -> int:
    """Print the script."""
    try:
        import shtab
    except ImportError:
        raise ValueError("completion needs shtab. Install it: pip install 'forgepar[cli]'") from None
    for action in _actions(arguments.parser):
        if action.metavar in _FILES:
            action.complete = shtab.FILE
    print(shtab.complete(arguments.parser, arguments.shell))
    return DONE


def _actions(parser: argparse.ArgumentParser) -> Iterator[Any]:
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
