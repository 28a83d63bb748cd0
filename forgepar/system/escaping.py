"""Text made safe for a terminal: escape what the terminal would obey, and what would reorder a line.

Names, errors and output may contain text from elsewhere: file names, log lines, a server's answers. Control sequences
in it can clear the screen, change the title, write to the clipboard, or make a line look like another.
"""

from __future__ import annotations

import re
from typing import TextIO

# Control characters, "\r" within a line, marks that change the direction of text, line ends other than "\n", and
# surrogates, which no stream can encode. "\t" and "\n" stay.
_OBEYED = re.compile(
    "\r(?!\n)|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_LINE_START = re.compile("\r(?!\n)")


def escaped(text: str) -> str:
    r"""Return a text with control sequences as backslash escapes; line ends and tabs stay.

    Example:
        >>> print(escaped("a\x1b[2Jb"))
        a\x1b[2Jb
    """
    if text.isascii() and text.isprintable():
        return text
    return _OBEYED.sub(_escape, text)


def escaped_output(text: str) -> str:
    r"""Return the output of a program, escaped likewise; a carriage return within a line becomes a line end.

    Example:
        >>> escaped_output("10 %\r20 %\n")
        '10 %\n20 %\n'
    """
    return escaped(_LINE_START.sub("\n", text))


def escaped_line(text: str) -> str:
    r"""Return a text on one line: escaped likewise, and line ends escaped as well.

    Example:
        >>> print(escaped_line("a\nb"))
        a\nb
    """
    return escaped(text).replace("\r", r"\r").replace("\n", r"\n")


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode()


def write_text(stream: TextIO | None, text: str) -> None:
    r"""Write a text to a stream; characters that its encoding lacks are escaped.

    Args:
        stream: a stream such as `sys.stdout`; None, as that may be, to write nothing.
        text: the text.

    Raises:
        OSError: the stream cannot be written to.
        ValueError: the stream is closed.

    Example:
        >>> import io
        >>> stream = io.TextIOWrapper(io.BytesIO(), "ascii")
        >>> write_text(stream, "done \u2713")
        >>> stream.seek(0)
        0
        >>> stream.read()
        'done \\u2713'
    """
    if stream is None:
        return
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
