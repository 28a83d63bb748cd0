"""A chain of steps, each of which gets what the one before returned: `forgepar.sequence`.

``forgepar run forgepar.examples.chain`` prints::

    3 words, the longest is 'pickled'
"""

from __future__ import annotations

import forgepar as fp


def words(text: str) -> list[str]:
    """Split a text."""
    return text.strip().lower().split()


def described(found: list[str]) -> str:
    """Say how many words there are, and which is the longest."""
    return f"{len(found)} words, the longest is {max(found, key=len)!r}"


def workflow(text: str = "  Peck of pickled ") -> fp.Workflow:
    """Declare the chain for a text."""
    wf = fp.Workflow("chain")
    fp.sequence(wf, text, words, sorted, described)
    return wf
