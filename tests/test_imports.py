"""The ranks of the rooms: a module imports only from lower ranks, lazily or for typing only as much as otherwise."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import forgepar

ROOT = Path(forgepar.__file__).parent
RANKS = {
    -5: ["errors", "values.comparison"],
    -4: ["values.current", "validation"],
    -3: ["values.namespaces"],
    -2: ["values.worker_modules", "byvalue"],
    0: [
        "events",
        "forking",
        "startstate",
        "columns",
        "machine",
        "inputs",
        "pickling",
        "version",
        "trust",
        "escaping",
        "binding",
        "values.segment",
        "backends.addresses",
        "backends.lone_locks",
        "backends.joblibname",
        "backends.orphan_watch",
        "backends.limits",
        "backends.fork_server",
    ],
    0.5: ["backends.orphans", "lifelocks", "current"],
    1: [
        "values.culprit",
        "values.meter",
        "digest_source",
        "backends.starting",
        "cancellation",
        "graph",
        "batching",
        "bytecode",
        "libraries",
        "merkle",
        "arguments",
        "handles",
        "values.files",
        "backends.board",
        "contexts",
        "fallbacks",
        "standing",
        "backends.exception_fields",
        "backends.output",
        "runlock",
        "storefile",
        "valuefiles",
        "poolerrors",
    ],
    1.5: ["adapters"],
    2: [
        "values.modulestate",
        "values.arena",
        "backends.surroundings",
        "digest_data",
        "digest_guests",
        "lines",
        "programs",
        "tasks",
        "audit",
        "backends.exceptions",
        "daskstep",
    ],
    3: ["sinks", "digest_classes", "digest_code", "values.codec", "values.folders", "workflow", "values.baggage"],
    4: [
        "backends.wire",
        "values.inplace",
        "values.fresh",
        "branching",
        "combinators",
        "digests",
        "plan",
        "subflow",
        "tools",
        "fromgraph",
        "jobs",
    ],
    5: ["checks", "fingerprint", "effects", "backends.worker", "backends.base", "shipping", "toolbox", "recipes"],
    6: [
        "orders",
        "priors",
        "backends.process",
        "backends.inline",
        "backends.parcel",
        "backends.daskoutput",
        "backends.daskparts",
    ],
    7: ["runstate", "backends.futures", "backends.dasksite"],
    8: ["rollback", "runtable", "simulate", "backends.daskcluster"],
    9: [
        "displays",
        "result",
        "report.boxes",
        "report.colours",
        "report.layout",
        "report.text",
        "report.writing",
        "forecast",
        "report.analysis",
        "backends.daskslots",
    ],
    10: [
        "store",
        "keeping",
        "console",
        "faults",
        "flight",
        "holdings",
        "watch",
        "report.slices",
        "report.svg",
        "report.charts",
        "report.page",
        "report.figures",
        "backends.dask",
    ],
    11: [
        "collecting",
        "journal",
        "recording",
        "report.diagram",
        "report.trace",
        "report.wfformat",
        "report.html",
        "report.processes",
        "report.terminal",
        "report.wording",
    ],
    12: ["books", "claims", "memory", "report.bars", "report.plainprogress"],
    13: ["dispatch", "report.notebook", "roll"],
    14: ["snapshot", "targets", "report.progress", "supply"],
    15: ["executor", "commands.base", "report.live", "feeder", "sharing"],
    16: ["commands.completing", "commands.graphs", "commands.stores", "pool", "daskgraphs"],
    17: ["commands.reports", "commands.watching", "joblib"],
    18: ["commands.running"],
    19: ["cli", *(f"examples.{path.stem}" for path in ROOT.glob("examples/[a-z]*.py"))],
    20: ["__main__", "__init__"],
}
RANK_OF = {name: rank for rank, names in RANKS.items() for name in names}
# Packages' own files: they must import nothing, so that importing one module loads no other.
PACKAGES = ["backends.__init__", "values.__init__", "commands.__init__", "report.__init__", "examples.__init__"]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
    if "__pycache__" not in path.parts
}


def imported_rooms(path: Path) -> set[str]:
    """Every module of the package that a file imports anywhere, `forgepar` itself as ``__init__``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if name.removeprefix("forgepar.") in MODULES}
            found |= known or {str(node.module)}
    rooms = {name for name in found if name == "forgepar" or name.startswith("forgepar.")}
    return {name.removeprefix("forgepar.") if "." in name else "__init__" for name in rooms}


def test_every_module_has_a_rank():
    assert set(MODULES) == set(RANK_OF) | set(PACKAGES)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_lower_ranks(module):
    rooms = imported_rooms(MODULES[module])
    if module in PACKAGES:
        assert not rooms
    elif module == "__init__":
        assert max(RANK_OF[room] for room in rooms) < RANK_OF["cli"]
    else:
        # The command line and the examples use the public face, whose names load what they need.
        rooms -= {"__init__"} if RANK_OF[module] >= RANK_OF["cli"] else set()
        too_high = {room for room in rooms if RANK_OF[room] >= RANK_OF[module]}
        assert not too_high, f"{module} (rank {RANK_OF[module]}) imports {sorted(too_high)}"


def test_a_relative_rank_violation_would_be_seen(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text("def f():\n    from forgepar.executor import WorkflowExecutor\n    import forgepar.plan\n")
    assert imported_rooms(path) == {"executor", "plan"}


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import forgepar", ["numpy", "multiprocessing", "concurrent.futures", "cloudpickle", "psutil"]),
        ("import forgepar.backends.worker", ["numpy", "psutil", "forgepar.plan", "concurrent.futures.process"]),
        ("import forgepar; forgepar.task", ["numpy", "concurrent.futures.process"]),
        ("import forgepar; forgepar.Workflow", ["psutil"]),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_used(statement, unwanted):
    code = f"import sys; {statement}; print([name for name in {unwanted} if name in sys.modules])"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "[]"


def test_names_are_loaded_by_one_thread_at_a_time(monkeypatch):
    """Threads that begin to load modules of a circle at different ones see them half made."""
    owned = []
    real = importlib.import_module

    def watched(name, package=None):
        owned.append(forgepar._loading._is_owned())
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", watched)
    monkeypatch.delitem(vars(forgepar), "Workflow", raising=False)
    assert forgepar.Workflow.__name__ == "Workflow"
    assert owned
    assert all(owned)
