"""A function that gets another one's error: `forgepar.attempt`.

``forgepar run forgepar.examples.caught`` prints::

    [3, 7, 'no number: x1']
"""

from __future__ import annotations

import forgepar as fp


def no_number(error: Exception, text: str) -> str:
    """Say which text is no number."""
    del error  # says the same with more words
    return f"no number: {text}"


def as_text(values: list[object]) -> str:
    """Write the values as a list."""
    return str(values)


def workflow() -> fp.Workflow:
    """Declare the reading of three texts, of which one is no number."""
    wf = fp.Workflow("caught")
    wf.add(as_text, wf.map(fp.attempt(int, catch=no_number), ["3", "7", "x1"]))
    return wf
