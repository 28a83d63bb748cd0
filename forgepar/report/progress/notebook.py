"""Progress in a notebook: one output of a cell, which is updated during the run."""

from __future__ import annotations

import html
import io
import math
import sys
import time
from collections.abc import Callable
from typing import Any

from forgepar.records.display import FailedTask, RunView
from forgepar.report.progress import wording
from forgepar.report.progress.figures import Figures, RunMeter
from forgepar.report.progress.plain import line

_FIRST_SECONDS = 0.2
_LEAST_SECONDS = 0.25  # each drawing is a message to the browser
_SHARE = 100
_COLUMNS = 100
_PRE = "font-family: Menlo, Consolas, monospace; line-height: 1.3; margin: 0; white-space: pre; overflow-x: auto"


def is_notebook() -> bool:
    """Return whether this process is the kernel of a notebook."""
    if "ipykernel" not in sys.modules or "IPython" not in sys.modules:
        return False
    shell = sys.modules["IPython"].get_ipython()
    return shell is not None and getattr(shell, "kernel", None) is not None


class NotebookProgress:
    """A display in the output of a cell, with failures above the bars."""

    def __init__(self) -> None:
        self.look_at = math.inf
        self._meter = RunMeter()
        self._failures = wording.FewFailures()
        self._failed: list[str] = []
        self._look: Callable[[], RunView] | None = None
        self._handle: Any = None

    def begin(self, look: Callable[[], RunView]) -> None:
        """Start the clock."""
        self._look = look
        self.look_at = time.perf_counter() + _FIRST_SECONDS

    def beat(self, now: float) -> None:
        """Draw if it is time."""
        if now >= self.look_at:
            self._draw(now)

    def failed(self, failure: FailedTask) -> None:
        """Add a failure above the bars."""
        if (text := self._failures.line(failure)) is not None:
            self._failed.append(text)
            self._draw(time.perf_counter())

    def close(self) -> None:
        """Replace the bars with a last line."""
        look, self._look, self.look_at = self._look, None, math.inf
        if look is not None:
            text = wording.ended(self._meter.of_end(look()))
            self._put(html.escape(text), text)

    def _draw(self, now: float) -> None:
        if self._look is None:
            return
        figures = self._meter.of_view(self._look())
        self._put(_as_html(figures), line(figures))
        after = time.perf_counter()
        self.look_at = after + max(_LEAST_SECONDS, _SHARE * (after - now))

    def _put(self, shown: str, plain: str) -> None:
        import IPython.display

        display: Any = IPython.display.display
        failures = "".join(f'<span style="color: #c33">{html.escape(text)}</span>\n' for text in self._failed)
        bundle = {
            "text/html": f'<pre style="{_PRE}">{failures}{shown}</pre>',
            "text/plain": "\n".join([*self._failed, plain]),
        }
        if self._handle is None:
            self._handle = display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def _as_html(figures: Figures) -> str:
    try:
        from rich.console import Console

        from forgepar.report.progress.bars import bars
    except ImportError:
        return html.escape(line(figures))
    console = Console(file=io.StringIO(), record=True, width=_COLUMNS, force_jupyter=False, highlight=False)
    console.print(bars(figures, _COLUMNS))
    return console.export_html(inline_styles=True, code_format="{code}")
