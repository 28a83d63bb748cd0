"""The command line: ``forgepar COMMAND``. Each module of this package adds some of the commands.

Exit codes: 0 done; 1 a task failed, or results cannot be written; 2 bad usage or a bad workflow; 130 interrupted; 141
the reader of standard output, such as ``head``, closed it early. Results go to standard output, everything else to
standard error. A traceback is printed only for the user's own code.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import forgepar
from forgepar.cli import completion as completing
from forgepar.cli import graph as graphs
from forgepar.cli import report as reports
from forgepar.cli import run as running
from forgepar.cli import store as stores
from forgepar.cli import watch as watching
from forgepar.cli.base import BAD_USAGE, INTERRUPTED, READER_GONE, TASK_FAILED, Parser, add_volume, complain
from forgepar.errors import MissingResult, StoreError, WorkerStartFailed, WorkflowError
from forgepar.machine import hold_standard_descriptors
from forgepar.system.escaping import escaped

_MODULES = (running, graphs, stores, reports, watching, completing)  # in the order of their commands in the help
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
_LEVELS = (logging.INFO, logging.DEBUG)  # of the log records that -v and -vv show


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None: those of the process.

    Returns:
        The exit code.
    """
    with _streams():
        try:
            return _flushed(_main(argv))
        except SystemExit as end:  # of argparse
            raise SystemExit(_flushed(end.code if isinstance(end.code, int) else BAD_USAGE)) from None


def _main(argv: Sequence[str] | None) -> int:
    try:
        parser = _parser()
        arguments = parser.parse_args(argv)
        if "command" not in arguments:
            parser.print_help(sys.stderr)
            raise SystemExit(BAD_USAGE)
        arguments.parser = parser
        with _escaping_warnings(), _logging(arguments.verbose):
            code: int = arguments.command(arguments)
            return code
    except (WorkflowError, WorkerStartFailed, StoreError, MissingResult, ValueError) as error:
        return complain(error)
    except BrokenPipeError:
        return READER_GONE
    except OSError as error:  # of standard output, or of a file that the command reads
        complain(error)
        return TASK_FAILED
    except KeyboardInterrupt:
        complain("interrupted; the workers have ended")
        return INTERRUPTED


@contextmanager
def _streams() -> Iterator[None]:
    """Make the standard streams accept any text: escape what their encoding lacks, and discard it if there is none."""
    hold_standard_descriptors()
    before = sys.stdout, sys.stderr
    with ExitStack() as stack:
        for name in ("stdout", "stderr"):
            stream = getattr(sys, name)
            if stream is None:
                setattr(sys, name, stack.enter_context(open(os.devnull, "w")))  # noqa: PTH123
            elif isinstance(stream, io.TextIOWrapper):
                stack.callback(stream.reconfigure, errors=stream.errors)
                stream.reconfigure(errors="backslashreplace")
        try:
            yield
        finally:
            sys.stdout, sys.stderr = before


def _flushed(code: int) -> int:
    """Flush the standard streams. Return the exit code; if that fails, an error code in place of 0."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code = code or READER_GONE
        except (OSError, ValueError) as error:
            if stream is sys.stdout:
                complain(f"results cannot be written to standard output: {error}")
            code = code or TASK_FAILED
        else:
            continue
        with suppress(OSError, ValueError):  # else Python flushes it again at exit, and reports the error
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return escaped(super().format(record))


@contextmanager
def _escaping_warnings() -> Iterator[None]:
    """Escape control characters in warnings: they contain names and texts of tasks."""
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
    """Show log records of forgepar on standard error, if -v is given."""
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
    for module in _MODULES:
        module.add_to(commands)
    return parser
