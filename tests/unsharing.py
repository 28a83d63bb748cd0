"""PID namespaces, as containers have them, for tests."""

from __future__ import annotations

import contextlib
import subprocess

import pytest


def unshared():
    """What starts a program in a PID namespace of its own; skip where that is not allowed."""
    for options in (["--pid"], ["--user", "--map-root-user", "--pid"]):
        command = ["unshare", *options, "--fork", "--kill-child"]
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0:
                return command
    pytest.skip("this system lets nobody make a PID namespace here")
    raise AssertionError
