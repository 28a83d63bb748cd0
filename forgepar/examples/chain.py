"""Chain functions: each gets the return value of the one before. `forgepar.sequence`.

``forgepar run forgepar.examples.chain`` prints::

    3 words, the longest is 'pickled'
"""

from __future__ import annotations

import forgepar as fp


def words(text: str) -> list[str]:
    """Split a text into words."""
    return text.strip().lower().split()


def describe(found: list[str]) -> str:
    """Return the number of words and the longest of them, as text."""
    return f"{len(found)} words, the longest is {max(found, key=len)!r}"


def workflow(text: str = "  Peck of pickled ") -> fp.Workflow:
    """Declare the chain for a text."""
    wf = fp.Workflow("chain")
    fp.sequence(wf, text, words, sorted, describe)
    return wf
