"""Packages have ranks: a module imports only from its own package and from packages of lower ranks.

Imports inside functions and for typing alone count as all others do. The few that point to a higher rank are methods
that start a run or write a report, so that declaring a workflow loads neither; they are named here.
"""

from __future__ import annotations

import ast
import graphlib
import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import forgepar
from forgepar.system.loading import loading

ROOT = Path(forgepar.__file__).parent
RANKS = [
    ["version"],
    ["errors"],
    ["_validate"],
    ["machine"],
    ["graph", "system"],
    ["values"],
    ["workflow"],
    ["scheduling", "backends"],
    ["records"],
    ["store", "report"],
    ["engine"],
    ["pool", "integrations"],
    ["joblib"],
    ["__init__"],
    ["cli", "examples"],
    ["__main__"],
]
RANK_OF = {package: rank for rank, packages in enumerate(RANKS) for package in packages}
# Methods that declare, start or report a run: each imports what it needs when it is called. The types that they return
# are imported for type checkers only.
FACADES = {
    ("workflow.workflow", "workflow.subflow"),
    ("workflow.workflow", "workflow.from_graph"),
    ("workflow.workflow", "workflow.combinators"),
    ("workflow.workflow", "workflow.checks"),
    ("workflow.workflow", "workflow.plan"),
    ("workflow.workflow", "engine.executor"),
    ("workflow.workflow", "engine.run_options"),
    ("workflow.workflow", "records.result"),
    ("workflow.workflow", "report.graph.diagram"),
    ("records.result", "report.export.trace"),
    ("records.result", "report.html.report"),
}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
    if "__pycache__" not in path.parts
}


def imported_modules(path: Path) -> set[str]:
    """Return every module of the package that a file imports anywhere, `forgepar` itself as ``__init__``."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            known = {name for name in submodules if name.removeprefix("forgepar.") in MODULES}
            found |= known or {str(node.module)}
    ours = {name for name in found if name == "forgepar" or name.startswith("forgepar.")}
    return {name.removeprefix("forgepar.") if "." in name else "__init__" for name in ours}


def package_of(module: str) -> str:
    return module.partition(".")[0]


def test_every_package_has_a_rank():
    assert {package_of(module) for module in MODULES} == set(RANK_OF)
    assert len([path for path in ROOT.iterdir() if path.name != "__pycache__"]) <= 24


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_come_from_lower_ranks(module):
    package, imported = package_of(module), imported_modules(MODULES[module])
    if MODULES[module].name == "__init__.py" and module != "__init__":
        assert not imported, "a package's own file imports nothing, so that one module of it loads no other"
    allowed = {other for other in imported if (module, other) in FACADES or package_of(other) == package}
    too_high = {other for other in imported - allowed if RANK_OF[package_of(other)] >= RANK_OF[package]}
    assert not too_high, f"{module} imports {sorted(too_high)}"


def test_every_facade_is_in_use():
    assert {(module, other) for module, other in FACADES if other in imported_modules(MODULES[module])} == FACADES


def test_no_modules_import_each_other_in_a_circle():
    graph = {
        module: {other for other in imported_modules(path) if (module, other) not in FACADES}
        for module, path in MODULES.items()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("package", sorted(name for name, path in MODULES.items() if path.name == "__init__.py"))
def test_a_package_says_what_it_is_for_and_lists_its_modules(package):
    folder = MODULES[package].parent
    if package in ("__init__", "examples"):
        return
    text = ast.get_docstring(ast.parse(MODULES[package].read_text()), clean=False)
    listed = set(re.findall(r"^ {4}([\w/]+) {2,}\S", text, flags=re.MULTILINE))
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    packages = {f"{path.parent.name}/" for path in folder.glob("*/__init__.py")}
    assert listed == modules | packages


def test_a_workflow_that_was_imported_alone_runs():
    code = (
        "from forgepar.workflow.workflow import Workflow\n"
        "wf = Workflow()\n"
        "handle = wf.add(sum, wf.map(abs, [-1, -2]))\n"
        "print(wf.check(workers=1), wf.run(backend='inline')[handle])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith(" 3\n")


def test_imports_inside_functions_are_seen(tmp_path):
    path = tmp_path / "lazy.py"
    path.write_text(
        "def f():\n    from forgepar.engine.executor import WorkflowExecutor\n    import forgepar.workflow.plan\n"
    )
    assert imported_modules(path) == {"engine.executor", "workflow.plan"}


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import forgepar", ["numpy", "multiprocessing", "concurrent.futures", "cloudpickle", "psutil"]),
        (
            "import forgepar.backends.worker",
            ["numpy", "psutil", "forgepar.workflow.plan", "concurrent.futures.process"],
        ),
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
        owned.append(loading.lock._is_owned())
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", watched)
    monkeypatch.delitem(vars(forgepar), "Workflow", raising=False)
    assert forgepar.Workflow.__name__ == "Workflow"
    assert owned
    assert all(owned)
