"""Handle the error of a function with another function: `forgepar.attempt`.

``forgepar run forgepar.examples.caught`` prints::

    [3, 7, 'not a number: x1']
"""

from __future__ import annotations

import forgepar as fp


def not_a_number(error: Exception, text: str) -> str:
    """Return the text that replaces the value; ``error`` is what ``int`` raised."""
    del error
    return f"not a number: {text}"


def as_text(values: list[object]) -> str:
    """Return the values as text."""
    return str(values)


def workflow() -> fp.Workflow:
    """Declare the conversion of three texts; the last one is not a number."""
    wf = fp.Workflow("caught")
    wf.add(as_text, wf.map(fp.attempt(int, catch=not_a_number), ["3", "7", "x1"]))
    return wf
