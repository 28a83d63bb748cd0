"""Return a workflow from a task, recursively: `forgepar.Subflow`.

``forgepar run forgepar.examples.recursive`` prints::

    sum of squares of 0..99999: 333328333350000
"""

from __future__ import annotations

import forgepar as fp

SMALL = 30_000  # a task sums at most this many numbers by itself


def sum_of_squares(begin: int, end: int) -> int | fp.Subflow:
    """Sum the squares of a range of numbers, or return two tasks that sum one half each."""
    if end - begin <= SMALL:
        return sum(number * number for number in range(begin, end))
    middle = (begin + end) // 2
    wf = fp.Workflow("halves")
    halves = [wf.add(sum_of_squares, begin, middle), wf.add(sum_of_squares, middle, end)]
    return fp.Subflow(wf, wf.add(sum, halves))


def describe(total: int, *, limit: int) -> str:
    """Return the sum as text."""
    return f"sum of squares of 0..{limit - 1}: {total}"


def workflow(limit: int = 100_000) -> fp.Workflow:
    """Declare the sum of the squares below a limit."""
    wf = fp.Workflow("recursive")
    wf.add(describe, wf.add(sum_of_squares, 0, limit), limit=limit)
    return wf
