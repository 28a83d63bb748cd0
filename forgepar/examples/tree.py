"""A task an item, and a tree that makes one value of all: `forgepar.map_reduce`.

``forgepar run forgepar.examples.tree`` prints::

    longest Collatz walk below 10000: 6171 takes 261 steps
"""

from __future__ import annotations

import forgepar as fp

STEP = 500


def longest_walk(begin: int) -> tuple[int, int]:
    """Return the steps and the start of the longest walk that starts in a stretch of numbers."""
    return max((steps(start), start) for start in range(max(begin, 1), begin + STEP))


def steps(number: int) -> int:
    """Count the steps that a number takes to 1: to its half if it is even, else to three times itself and one."""
    count = 0
    while number > 1:
        number = 3 * number + 1 if number % 2 else number // 2
        count += 1
    return count


def told(longest: tuple[int, int], *, limit: int) -> str:
    """Say which walk is the longest."""
    return f"longest Collatz walk below {limit}: {longest[1]} takes {longest[0]} steps"


def workflow(limit: int = 10_000) -> fp.Workflow:
    """Declare the search below a limit."""
    wf = fp.Workflow("tree")
    longest = fp.map_reduce(wf, longest_walk, range(0, limit, STEP), max, fan_in=4)
    wf.add(told, longest, limit=limit)
    return wf
