"""Command lines: no value is ever more than a word, and what cannot be filled in is said at once."""

from __future__ import annotations

import enum
import shlex
import subprocess
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import forgepar as fp
from forgepar.workflow.shell.template import parse

EVIL = [
    "a b", "'", '"', "\\", "$(: >canary)", "`: >canary`", "; : >canary;", "\n: >canary\n", "-rf", "", "*", "~", "{x}",
    "'; : >canary; '", '"; : >canary; "', "\\'; : >canary #", ")\n: >canary\n(", "\nEOF\n: >canary\n", "& : >canary &",
    "a[$(: >canary)]",
]  # fmt: skip


def fill(text: str, **values):
    return parse(text, is_script=False).fill(values)


@pytest.mark.parametrize("value", EVIL)
def test_a_value_is_one_word_whatever_it_holds(value):
    assert fill("program {x} --in={x} end", x=value) == ["program", value, f"--in={value}", "end"]


@pytest.mark.parametrize("value", EVIL)
@pytest.mark.parametrize("script", ["printf %s {x}", 'X={x}; printf %s "$X"', "(printf %s {x})|cat"])
def test_a_value_in_a_script_is_one_word_whatever_it_holds(tmp_path, script, value):
    (filled,) = parse(script, is_script=True).fill({"x": value})
    printed = subprocess.run(["/bin/sh", "-c", filled], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert printed == value
    assert not list(tmp_path.iterdir())


@settings(deadline=None, max_examples=150)
@given(
    st.lists(
        st.sampled_from(["'", '"', "\\", "`", "$", "(", "#", "<<", "|", ";", " ", "\n", "a", "$((", "{x}"]), max_size=7
    ),
    st.sampled_from(EVIL),
)
def test_what_is_not_refused_is_safe(folder, pieces, value):
    try:
        line = parse("echo " + "".join(pieces) + " {x}", is_script=True)
    except fp.WorkflowError:
        return
    (script,) = line.fill({"x": value})
    subprocess.run(
        ["/bin/sh", "-c", script], cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False
    )
    assert not (folder / "canary").exists()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("scripts")


@pytest.mark.parametrize(
    "script",
    [
        "echo '{x}'", 'echo "{x}"', 'echo "a" "b {x}', "echo `echo {x}`", "echo \\{x}", "echo ${x}", "echo 1 # {x}",
        "cat <<EOF\n{x}\nEOF", "echo $((1 + {x}))", "echo $'a' {x}", "echo $[{x}]", 'echo "{x}\\',
    ],
)  # fmt: skip
def test_a_field_that_quoting_cannot_keep_from_the_shell_is_refused(script):
    with pytest.raises(fp.WorkflowError, match=r"Field 'x' of command line .* Write the field without quotes.*env="):
        parse(script, is_script=True)


@pytest.mark.parametrize(
    "script", ["echo {x}", "a=#{x}; b='it' {x} \"c\"", "(ls {x})|wc>{x}", "echo \\\\{x} 'a'{x}", "echo # a\n{x}"]
)
def test_a_field_that_stands_free_is_not(script):
    assert parse(script, is_script=True).fields == ("x",)


def test_words_are_those_of_a_shell():
    assert fill("a 'b c' \"d $e\" f\\ g '' h#i") == ["a", "b c", "d $e", "f g", "", "h#i"]
    assert fill("awk '{{ print $1 }}' {{}}") == ["awk", "{ print $1 }", "{}"]
    assert fill("a {{{x}}}", x=1) == ["a", "{1}"]


def test_a_list_is_several_words_where_it_stands_alone():
    assert fill("rm -- {files} end", files=["a b", Path("c"), 3]) == ["rm", "--", "a b", "c", "3", "end"]
    assert fill("rm {files}", files=()) == ["rm"]
    assert parse("rm {files};", is_script=True).fill({"files": ["a b", "c"]}) == ["rm 'a b' c;"]
    with pytest.raises(ValueError, match=r"Field 'files' of command line 'rm --in={files}' is only part of a word"):
        fill("rm --in={files}", files=["a"])


class Colour(str, enum.Enum):  # noqa: UP042  (a StrEnum tells its value anyway)
    RED = "red"


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (1, "1"),
        (0.5, "0.5"),
        (np.int64(7), "7"),
        (np.float64(0.25), "0.25"),
        (Fraction(1, 3), "1/3"),
        (Path("a b"), "a b"),
        (b"caf\xc3\xa9", "café"),
        (b"\xff", "\udcff"),
        (Colour.RED, "red"),
    ],
)
def test_text_numbers_and_paths_are_words(value, word):
    assert fill("echo {x}", x=value) == ["echo", word]


@pytest.mark.parametrize("value", [None, True, {"a": 1}, {1}, object(), [["a"]], [None], np.zeros(2), "a\0b", ["a\0"]])
def test_what_is_no_word_is_refused(value):
    line = parse("echo {x}", is_script=False)
    with pytest.raises(ValueError, match=r"field 'x' of command line 'echo {x}' must be"):
        line.fill({"x": value})
    with pytest.raises(fp.WorkflowError, match=r"field 'x' of command line 'echo {x}' must be"):
        line.check("x", value)


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("", "must be a command line"),
        (" ", "must be a command line"),
        ("a\0", "must be a command line"),
        (["ls"], "must be a command line"),
        ("ls 'a", "No closing quotation"),
        ("ls {x", "expected '}'"),
        ("ls x}", "Single '}'"),
        ("ls {}", "'{}' is not a field"),
        ("ls {0}", "'{0}' is not a field"),
        ("ls {x.y}", "is not a field"),
        ("ls {x!r}", "is not a field"),
        ("ls {x:>3}", "is not a field"),
        ("awk '{print $1}'", "'{print $1}' is not a field"),
    ],
)
def test_lines_that_cannot_be_read_are_refused(text, fault):
    with pytest.raises(fp.WorkflowError) as caught:
        parse(text, is_script=False)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("text", "is_script", "name"),
    [
        ("gzip -k {x}", False, "gzip"),
        ("/usr/bin/gzip -k", False, "gzip"),
        ("{python} -c 1", False, "python"),
        ("{folder}/tool a", False, "tool"),
        ("'my tool' a", False, "my"),
        ("  ls | wc", True, "ls"),
        ("bin/", False, "bin/"),
    ],
)
def test_a_line_is_named_after_its_program(text, is_script, name):
    assert parse(text, is_script=is_script).name == name


@given(st.lists(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))))
def test_a_list_comes_back_from_any_shell(values):
    (script,) = parse("program {values}", is_script=True).fill({"values": values})
    assert shlex.split(script) == ["program", *values] == fill("program {values}", values=values)
