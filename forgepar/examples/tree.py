"""Run one task per item and reduce their values in a tree: `forgepar.map_reduce`.

``forgepar run forgepar.examples.tree`` prints::

    longest Collatz walk below 10000: 6171 takes 261 steps
"""

from __future__ import annotations

import forgepar as fp

STEP = 500


def longest_walk(begin: int) -> tuple[int, int]:
    """Return the length and the start of the longest walk that starts at one of ``STEP`` numbers."""
    return max((steps(start), start) for start in range(max(begin, 1), begin + STEP))


def steps(number: int) -> int:
    """Count the steps from a number to 1. A step from n leads to n / 2 if n is even, else to 3 n + 1."""
    count = 0
    while number > 1:
        number = 3 * number + 1 if number % 2 else number // 2
        count += 1
    return count


def describe(longest: tuple[int, int], *, limit: int) -> str:
    """Return the longest walk as text."""
    return f"longest Collatz walk below {limit}: {longest[1]} takes {longest[0]} steps"


def workflow(limit: int = 10_000) -> fp.Workflow:
    """Declare the search for the longest walk that starts below a limit."""
    wf = fp.Workflow("tree")
    longest = fp.map_reduce(wf, longest_walk, range(0, limit, STEP), max, fan_in=4)
    wf.add(describe, longest, limit=limit)
    return wf
