"""The command line: ``forgepar COMMAND``, as ``forgepar --help`` tells; each command is in a room of `commands`.

Exit codes: 0 done, 1 a task failed, 2 bad usage or a bad workflow, 130 interrupted. Results go to standard output, all
else to standard error; a traceback is printed only of the user's own code.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import forgepar
from forgepar.commands import completing, graphs, reports, running, stores, watching
from forgepar.commands.base import BAD_USAGE, DONE, INTERRUPTED, Parser, add_volume, complain
from forgepar.errors import MissingResult, StoreError, WorkerStartFailed, WorkflowError
from forgepar.escaping import escaped

_ROOMS = (running, graphs, stores, reports, watching, completing)  # in the order in which help tells their commands
_EXAMPLES = """examples:
  forgepar run forgepar.examples.census
  forgepar run forgepar.examples.census -p root=src --workers 4
  forgepar run pipeline.py:nightly -p day=2024-05-01 --summary
  forgepar layers pipeline.py:nightly
  forgepar check pipeline.py:nightly
  forgepar run pipeline.py:nightly --store runs.db --resume
  forgepar runs runs.db
  forgepar show runs.db last
  forgepar report runs.db -o run.html
  forgepar plan runs.db --workers 1..64
  forgepar graph pipeline.py:nightly -o graph.svg
  forgepar top runs.db
"""
_LEVELS = (logging.INFO, logging.DEBUG)  # of the log records that -v shows, and -v -v


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code.
    """
    parser = _parser()
    arguments = parser.parse_args(argv)
    if "command" not in arguments:
        parser.print_help(sys.stderr)
        raise SystemExit(BAD_USAGE)
    arguments.parser = parser
    try:
        with _escaping_warnings(), _logging(arguments.verbose):
            code: int = arguments.command(arguments)
    except (WorkflowError, WorkerStartFailed, StoreError, MissingResult, ValueError) as error:
        return complain(error)
    except BrokenPipeError:  # who read the output, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return DONE
    except KeyboardInterrupt:
        complain("interrupted; the workers are ended")
        return INTERRUPTED
    return code


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


@contextmanager
def _escaping_warnings() -> Iterator[None]:
    """Show warnings, which may tell of names and of what tasks warn of, so that a terminal obeys nothing in them."""
    before = warnings.formatwarning

    def formatted(*arguments: Any, **options: Any) -> str:
        return escaped(before(*arguments, **options))

    warnings.formatwarning = formatted
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def _logging(n_verbose: int) -> Iterator[None]:
    """Show log records of forgepar's own and of tasks on standard error, if asked to."""
    if not n_verbose:
        yield
        return
    logger, handler = logging.getLogger("forgepar"), logging.StreamHandler()
    handler.setFormatter(_Formatter("%(levelname)s %(name)s: %(message)s"))
    before = logger.level
    logger.setLevel(_LEVELS[min(n_verbose, len(_LEVELS)) - 1])
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "forgepar",
        description="Run graphs of plain Python functions on many processes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"forgepar {forgepar.__version__}")
    add_volume(parser, default=None)
    commands = parser.add_subparsers(metavar="COMMAND", parser_class=Parser)
    for room in _ROOMS:
        room.add_to(commands)
    return parser
