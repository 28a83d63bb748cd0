"""Completion, asked of real shells."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest

from forgepar.cli import main as cli

pytest.importorskip("shtab", reason="shtab, of the extra cli, makes the scripts")


@pytest.fixture
def script(capsys):
    """The script for a shell."""

    def made(shell):
        assert cli.main(["completion", shell]) == 0
        return capsys.readouterr().out

    return made


def completed(script, folder, *words):
    """What bash offers for the last of some words."""
    (folder / "script").write_text(script)
    asked = "\n".join(
        [
            f"source {folder / 'script'}",
            f"COMP_WORDS=({' '.join(map(repr, words))})",
            f"COMP_CWORD={len(words) - 1}",
            '_shtab_forgepar "${COMP_WORDS[0]}" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"',
            'printf "%s\\n" "${COMPREPLY[@]}"',
        ]
    )
    command = ["bash", "--norc", "--noprofile", "-c", asked]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=30, check=True)
    return set(done.stdout.split())


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_options_choices_and_files(script, tmp_path):
    text = script("bash")
    (tmp_path / "pipeline.py").touch()
    (tmp_path / "data").mkdir()
    commands = completed(text, tmp_path, "forgepar", "")
    assert {"run", "check", "layers", "runs", "show", "top", "completion"} <= commands
    assert completed(text, tmp_path, "forgepar", "la") == {"layers"}
    assert {"--watch", "--workers", "--no-progress"} <= completed(text, tmp_path, "forgepar", "run", "--")
    assert completed(text, tmp_path, "forgepar", "run", "--schedule", "") == {"layers", "eager"}
    assert completed(text, tmp_path, "forgepar", "run", "pipe") == {"pipeline.py"}
    assert completed(text, tmp_path, "forgepar", "completion", "z") == {"zsh"}


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_other_shells_read_their_script(script, tmp_path, shell):
    text = script(shell)
    assert "--schedule" in text or "-l schedule" in text
    assert "layers" in text
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}, so its script is not read by one")
    (tmp_path / "script").write_text(text)
    subprocess.run([shell, "-n", str(tmp_path / "script")], timeout=30, check=True)


def test_without_shtab_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "pip install 'forgepar[cli]'" in capsys.readouterr().err
