"""The command line: ``forgepar COMMAND``, as ``forgepar --help`` tells; each command is in a room of `commands`.

Exit codes: 0 done, 1 a task failed, 2 bad usage or a bad workflow, 130 interrupted. Results go to standard output, all
else to standard error; a traceback is printed only of the user's own code.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import forgepar
from forgepar.commands import graphs, reports, running, stores
from forgepar.commands.base import DONE, INTERRUPTED, complain
from forgepar.errors import MissingResult, StoreError, WorkerStartFailed, WorkflowError

_ROOMS = (running, graphs, stores, reports)  # in the order in which help tells their commands
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
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments; None takes the process's.

    Returns:
        The exit code.
    """
    arguments = _parser().parse_args(argv)
    try:
        code: int = arguments.command(arguments)
    except (WorkflowError, WorkerStartFailed, StoreError, MissingResult, ValueError) as error:
        return complain(error)
    except BrokenPipeError:  # who read the output, as `head` does, has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python complains at its end
        return DONE
    except KeyboardInterrupt:
        print("forgepar: interrupted; the workers are ended", file=sys.stderr)
        return INTERRUPTED
    return code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "forgepar",
        description="Run graphs of plain Python functions on many processes.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"forgepar {forgepar.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in _ROOMS:
        room.add_to(commands)
    return parser
