"""Build the API reference: python .ci/reference.py FOLDER."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import forgepar

warnings.simplefilter("error")
for name, module in forgepar._read_stub().items():
    # pdoc looks for the source of a name, and for what its annotations name, in its module.
    getattr(forgepar, name).__module__ = module
pdoc.render.configure(docformat="google")
pdoc.pdoc("forgepar", output_directory=Path(sys.argv[1]))
