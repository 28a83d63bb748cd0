"""Namespaces, as containers have them, for tests."""

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


def with_mounts(script):
    """What starts a program that sees other file systems, as a shell script has mounted them; skip where none may."""
    for options in (["--mount"], ["--user", "--map-root-user", "--mount"]):
        command = ["unshare", *options, "sh", "-c", f'{script} && exec "$@"', "sh"]
        with contextlib.suppress(OSError):
            allowed = ["unshare", *options, "sh", "-c", "mount -t tmpfs none /tmp"]
            if subprocess.run(allowed, capture_output=True, check=False).returncode == 0:
                return command
    pytest.skip("this system lets nobody mount a file system here")
    raise AssertionError
