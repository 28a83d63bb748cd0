"""The language of the package: docstrings, comments, messages and help texts use plain words."""

import io
import re
import tokenize
from pathlib import Path

import pytest

import forgepar

ROOT = Path(forgepar.__file__).parent
# What is refused, and what to write instead.
REFUSED = {
    r"(?<![Tt]here )\bis no (?!more|less|(larg|small|long|old|new|lat|high|low)er\b)\w+": "must be ..., got ...",
    r"\bsays? the same\b": "Pass either a or b, not both.",
    r"\bin a circle\b": "a dependency cycle",
    r"\bnought\b": "zero, nothing",
    r"\bwho(m|so)?ever\b": "name who does it",
    r"\bnobody\b": "nothing, no task, no process",
    r"\banew\b": "again",
    r"\bfor ever\b": "forever, without end",
    r"\bmidst\b": "during",
    r"\bcomes? to nothing\b": "has no effect",
    r"\bwhat is there\b": "what exists",
    r"\bkin\b": "and similar ones",
    r"\bthereof\b": "of it",
    r"\bmay yet\b": "can still",
    r"\bmade of what\b": "made from",
    r"\b(luggage|baggage|parcel|cargo|shipment)s?\b": "message, batch, value",
    r"\bcondemn\w*": "pending kill",
    r"\bworn\b": "to be replaced",
    r"\bthe books\b": "the recorder",
    r"\boverheard?\b": "captured",
    r"\b(one|two|once|twice|bytes|us|ms|tasks|batches|bars?|files?|lines?|task|limit) an? "
    r"(task|item|layer|worker|batch|slot|run|process|node|column)\b": "per",
    r"\b(calls?|called|calling|to call) (it |a run |the run )?off\b": "cancel",
    r"\b(go|goes|went|going) on\b": "continue",
    r"\bas far as\b": "as much as, if",
    r"\bwhose\b.*\bwhose\b": "two sentences",
}
PATTERNS = {re.compile(pattern): better for pattern, better in REFUSED.items()}
FORMER_NAMES = ROOT / "store" / "moved_names.py"  # modules as they were called once


def prose(path):
    """Yield line and text of each comment and each string of a module."""
    kinds = {tokenize.COMMENT, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(path.read_text()).readline):
        if token.type in kinds:
            yield token.start[0], " ".join(token.string.split())


def refused(text):
    return [(found[0], better) for pattern, better in PATTERNS.items() for found in pattern.finditer(text)]


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_uses_plain_words(path):
    if path == FORMER_NAMES:
        return
    found = [(line, *what) for line, text in prose(path) for what in refused(text)]
    assert not found


@pytest.mark.parametrize(
    "text",
    [
        "workers=-1 is no number of processes",
        "workers and max_workers say the same",
        "tasks wait in a circle",
        "whoever listens",
        "one task an item",
        "5 us a task",
        "the run goes on",
        "it is called off",
    ],
)
def test_what_is_refused_is_found(text):
    assert refused(text)


@pytest.mark.parametrize(
    "text",
    [
        "there is no task of that name",
        "one task per item",
        "it is no longer there",
        "the run continues",
        "a dependency",
    ],
)
def test_plain_words_are_not_refused(text):
    assert not refused(text)
