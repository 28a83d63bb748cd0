"""The example of external programs: what it prints is what its docstring shows."""

from __future__ import annotations

import re
import subprocess
import sys

from forgepar.examples import words


def shown() -> str:
    """What the docstring says that it prints."""
    return (
        re.search(r"prints::\n\n(.*)", words.__doc__, flags=re.DOTALL)[1].replace("\n    ", "\n").removeprefix("    ")
    )


def test_it_prints_what_it_shows():
    command = [sys.executable, "-m", "forgepar.examples.words"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == (shown(), "")


def test_a_text_of_ones_own_is_counted(any_backend, tmp_path):
    (tmp_path / "text").write_text("b B\n\n'tis c, c; C\u00e9 'tis b b")
    wf = words.workflow(str(tmp_path / "text"), count=2)
    assert wf.run(**any_backend)["commonest"] == " 4  b\n 3  c"
