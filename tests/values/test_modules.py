"""Which modules are the user's, and which release of a library there is."""

from __future__ import annotations

import importlib.metadata
import sys
import types
from pathlib import Path

import numpy as np
import pytest

from forgepar.values import modules as libraries


@pytest.fixture(autouse=True)
def fresh():
    """What was found is forgotten before and after."""
    for cached in (libraries.is_users, libraries._release_of):
        cached.cache_clear()
    yield
    for cached in (libraries.is_users, libraries._release_of):
        cached.cache_clear()


@pytest.mark.parametrize(
    "name",
    [
        "builtins",
        "sys",
        "os",
        "os.path",
        "json.decoder",
        "_thread",
        "math",
        "importlib._bootstrap",
        "encodings.utf_8",
        "numpy",
        "numpy.linalg",
        "numpy._core._multiarray_umath",
        "pytest",
        "forgepar",
        "forgepar.workflow.workflow",
        "antigravity",  # not imported, which would open a browser
    ],
)
def test_libraries(name):
    assert not libraries.is_users(name)
    assert name != "antigravity" or name not in sys.modules


@pytest.mark.parametrize(
    "name", [None, "__main__", "test_libraries", __name__, "no_such_module", "no.such", "forgepar.examples.tree"]
)
def test_the_users_own(name):
    assert libraries.is_users(name)


def test_modules_are_found_without_being_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "lb_pack" / "deep").mkdir(parents=True)
    (tmp_path / "lb_pack" / "__init__.py").write_text("raise RuntimeError('it was imported')")
    (tmp_path / "lb_pack" / "deep" / "end.py").write_text("raise RuntimeError('it was imported')")
    assert libraries.source_of("lb_pack") == tmp_path / "lb_pack" / "__init__.py"
    assert libraries.source_of("lb_pack.deep") is None  # a namespace
    assert libraries.source_of("lb_pack.deep.end") == tmp_path / "lb_pack" / "deep" / "end.py"
    assert libraries.source_of("lb_pack.none") is libraries.source_of("lb_none.deep") is None
    assert libraries.is_users("lb_pack.deep.end")
    assert not any(name.startswith("lb_pack") for name in sys.modules)


def test_finders_that_fail_are_passed_over(monkeypatch):
    class Broken:
        def find_spec(self, name, *_):
            raise RuntimeError(name)

    monkeypatch.setattr(sys, "meta_path", [Broken(), object(), *sys.meta_path])
    assert libraries.source_of("antigravity") is not None
    assert libraries.source_of("no_such_module") is None


def test_a_folder_of_libraries_that_is_linked(tmp_path, monkeypatch):
    real = tmp_path / "site-packages"
    real.mkdir()
    (real / "lb_linked.py").write_text("")
    (tmp_path / "link").symlink_to(real)
    monkeypatch.syspath_prepend(str(tmp_path / "link"))
    assert not libraries.is_users("lb_linked")


def test_a_module_with_an_odd_file(monkeypatch):
    module = types.ModuleType("lb_odd")
    module.__file__ = 3
    monkeypatch.setitem(sys.modules, "lb_odd", module)
    assert libraries.source_of("lb_odd") is None
    assert libraries.is_users("lb_odd")


def test_releases():
    assert libraries.release_of("numpy.linalg") == np.__version__
    assert libraries.release_of("_pytest.config") == importlib.metadata.version("pytest")
    assert libraries.release_of("json.decoder") == "{}.{}".format(*sys.version_info)
    assert (
        libraries.release_of("forgepar.workflow.plan")
        == libraries.release_of(None)
        == libraries.release_of("no_such")
        == ""
    )


def installed(folder: Path, hashes: str, *, is_local: bool) -> None:
    """Write what an installer does of a package of version 1."""
    info = folder / "lb_dist-1.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: lb-dist\nVersion: 1\n")
    (info / "RECORD").write_text(f"lb_dist/__init__.py,sha256={hashes},10\n../bin/x,sha256=b,1\nlb_dist/x.pyc,,\n")
    if is_local:
        (info / "direct_url.json").write_text('{"url": "file:///src", "dir_info": {}}')


@pytest.mark.parametrize("is_local", [False, True])
def test_a_package_installed_from_a_folder_is_told_by_its_files(tmp_path, monkeypatch, is_local):
    monkeypatch.syspath_prepend(str(tmp_path))
    found = []
    for hashes in ("a", "a", "b"):
        installed(tmp_path, hashes, is_local=is_local)
        libraries._release_of.cache_clear()
        found.append(libraries.release_of("lb_dist.part"))
    assert found[0] == found[1]
    assert (found[0] == found[2]) is not is_local
    assert (found[0] == "1") is not is_local
