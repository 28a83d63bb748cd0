"""Print a code block of the README: python .ci/readme_block.py census|tests|program [README]."""

from __future__ import annotations

import re
import sys
from pathlib import Path

# What stands right before each block, so that a block which was moved or removed is not mistaken for another one.
BLOCKS = {
    "census": (r"A census of (?:(?!^```).)*?^```sh\n(?P<text>.*?)^```", "forgepar run forgepar.examples.census"),
    "tests": (r"^The tests:\n\n```sh\n(?P<text>.*?)^```", "pytest"),
    "program": (r"```python\n(?P<text>.*?)^```", "import forgepar"),
}


def block(readme: str, name: str) -> str:
    """Return the text of a block.

    Args:
        readme: the text of the README.
        name: a key of `BLOCKS`.

    Raises:
        SystemExit: there is no such block, or it is not the one that is meant.
    """
    pattern, contained = BLOCKS[name]
    found = re.search(pattern, readme, flags=re.DOTALL | re.MULTILINE)
    if found is None or contained not in found["text"]:
        raise SystemExit(f"The README has no {name} block: a code block with {contained!r} in it was expected.")
    return found["text"]


if __name__ == "__main__":
    name, readme = sys.argv[1], Path(*(sys.argv[2:] or ["README.md"])).read_text(encoding="utf-8")
    print(block(readme, name), end="")
