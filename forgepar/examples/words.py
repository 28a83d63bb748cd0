r"""The commonest words of some texts, found by programs that are on every POSIX system.

Each text goes through two programs, the second of which reads what the first wrote; the words of all texts together
go through two more::

    tr (into words) --> tr (into small letters) --+--> join --> sort --> uniq (counting) --> commonest
                                                  |
    the same for each other text -----------------+

Run it on two tongue twisters, or on a text of your own::

    forgepar run forgepar.examples.words
    forgepar run forgepar.examples.words -p path=README.md -p count=20

``python -m forgepar.examples.words`` does the first, and prints::

     3  sea
     3  shells
     2  a
     2  of
     2  peck
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import forgepar as fp

TWISTERS = (
    "Peter Piper picked a peck of pickled peppers. A peck of pickled peppers Peter Piper picked.",
    "She sells sea shells by the sea shore. The shells she sells are sea shells, I'm sure.",
)


def registry() -> fp.ToolRegistry:
    """Return the programs that are needed, told to sort by the bytes, whatever the user's language."""
    tools = fp.ToolRegistry()
    for name in ("tr", "sort", "uniq"):
        tools.add(name, env={"LC_ALL": "C"})
    return tools


def join(words: Sequence[fp.ToolResult]) -> str:
    """Put the words of several texts together, one a line."""
    return "".join(result.stdout for result in words)


def commonest(counted: fp.ToolResult, *, count: int) -> str:
    """Return the commonest of the words that ``uniq -c`` counted, those of one number by name.

    Args:
        counted: a number and a word a line.
        count: how many words.
    """
    pairs = [(int(number), word) for number, word in map(str.split, counted.stdout.splitlines())]
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    return "\n".join(f"{number:>2}  {word}" for number, word in pairs[:count])


def workflow(path: str | None = None, count: int = 5) -> fp.Workflow:
    """Declare the search for the commonest words.

    Args:
        path: a text file; None: two tongue twisters.
        count: how many words.

    Returns:
        A workflow with one output, the words: the value of ``commonest``.

    Raises:
        ToolNotFound: a program is missing.
    """
    tools = registry()
    tools.check()
    wf = fp.Workflow("words")
    split = tools.shell(r"tr -cs {letters} '\n'", letters="A-Za-z'")
    lowered = []
    for text in TWISTERS if path is None else [Path(path)]:
        words = wf.add(split, stdin=text)
        lowered.append(wf.add(tools.shell("tr A-Z a-z", stdin=words)))
    in_order = wf.add(tools.shell("sort", stdin=wf.add(join, lowered)))
    wf.add(commonest, wf.add(tools.shell("uniq -c", stdin=in_order)), count=count)
    return wf


if __name__ == "__main__":
    print(workflow().run()["commonest"])
