"""Names in pictures: without characters that cannot be shown, and shortened to fit their box."""

from __future__ import annotations

import unicodedata

ELLIPSIS = "…"
TIMES = "\N{MULTIPLICATION SIGN}"
_MOST_TITLE = 1_000  # characters of a tooltip: more would fill the screen
_NOT_SHOWN = frozenset({"Cc", "Cs", "Zl", "Zp"})  # control characters, surrogates, line and paragraph separators
# They set the direction of text.
_BIDI = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def cleaned(text: str) -> str:
    """Return a text on one line, without characters that XML forbids or that change the direction of text."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(_shown(letter) for letter in " ".join(text.split()) if letter not in _BIDI)


def titled(text: str) -> str:
    """Return a full name for a tooltip."""
    text = cleaned(text)
    return text if len(text) <= _MOST_TITLE else text[: _MOST_TITLE - 1] + ELLIPSIS


def columns(text: str) -> int:
    """Return the width of a text in a fixed-width font: two columns for a wide letter, none for an accent."""
    return len(text) if text.isascii() else sum(map(_width, text))


def shortened(text: str, most: int) -> str:
    """Shorten a text to at most ``most`` columns, by its middle: names often differ at the start and the end."""
    if columns(text) <= most:
        return text
    end = _fitting(text[::-1], (most - 1) // 2)[::-1]
    return _fitting(text, most - 1 - columns(end)) + ELLIPSIS + end


def _fitting(text: str, most: int) -> str:
    taken = 0
    for place, letter in enumerate(text):
        taken += _width(letter)
        if taken > most:
            return text[:place]
    return text


def _width(letter: str) -> int:
    if unicodedata.combining(letter) or unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1


def _shown(letter: str) -> str:
    is_shown = unicodedata.category(letter) not in _NOT_SHOWN and letter not in "\ufffe\uffff"
    return letter if is_shown else "\N{REPLACEMENT CHARACTER}"
