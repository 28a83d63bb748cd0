"""Text as a terminal may be given it: with what the terminal would obey, or what would reorder a line, as escapes.

Names, errors and output may hold text of strangers: names of files, lines of logs, what a server answered. A terminal
obeys what is in it: it can clear the screen, change its title, put text into the clipboard or make a line look like
another.
"""

from __future__ import annotations

import re

# Control characters, "\r" within a line, marks that change the direction of text, ends of lines that are no "\n", and
# halves of surrogate pairs, which no stream can encode. "\t" and "\n" stay.
_OBEYED = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LINE_START = re.compile("\r(?!\n)")


def escaped(text: str) -> str:
    r"""Return a text with whatever a terminal would obey as a backslash escape; ends of lines and tabs stay.

    Example:
        >>> print(escaped("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    if text.isascii() and text.isprintable():
        return text
    return _OBEYED.sub(_escape, text)


def escaped_output(text: str) -> str:
    r"""Return lines that a program printed, likewise; where it went back to the start of a line, a line begins.

    Example:
        >>> escaped_output("10 %\r20 %\n")
        '10 %\n20 %\n'
    """
    return escaped(_LINE_START.sub("\n", text))


def escaped_line(text: str) -> str:
    r"""Return a text on one line, with what a terminal would obey as escapes.

    Example:
        >>> print(escaped_line("a\nb"))
        a\nb
    """
    return escaped(text).replace("\r", r"\r").replace("\n", r"\n")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()
