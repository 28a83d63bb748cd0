r"""Find the most common words of some texts, with programs of every POSIX system.

Two programs process each text; the second one reads the output of the first. Two more programs process the words of
all texts together::

    tr (split into words) --> tr (to lower case) --+--> join --> sort --> uniq (count) --> commonest
                                                   |
    the same for each other text ------------------+

Run it on two tongue twisters, or on your own text::

    forgepar run forgepar.examples.words
    forgepar run forgepar.examples.words -p path=README.md -p count=20

``python -m forgepar.examples.words`` uses the tongue twisters, and prints::

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
    """Return the programs. LC_ALL=C makes them sort by bytes in every locale."""
    tools = fp.ToolRegistry()
    for name in ("tr", "sort", "uniq"):
        tools.add(name, env={"LC_ALL": "C"})
    return tools


def join(words: Sequence[fp.ToolResult]) -> str:
    """Join the words of several texts, one per line."""
    return "".join(result.stdout for result in words)


def commonest(counted: fp.ToolResult, *, count: int) -> str:
    """Return the most common words, with their counts; sort words of the same count by name.

    Args:
        counted: the output of ``uniq -c``, a count and a word per line.
        count: number of words to return.
    """
    pairs = [(int(number), word) for number, word in map(str.split, counted.stdout.splitlines())]
    pairs.sort(key=lambda pair: (-pair[0], pair[1]))
    return "\n".join(f"{number:>2}  {word}" for number, word in pairs[:count])


def workflow(path: str | None = None, count: int = 5) -> fp.Workflow:
    """Declare the search for the most common words.

    Args:
        path: a text file; None is two tongue twisters.
        count: number of words to return.

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
