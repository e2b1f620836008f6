"""What programs print of foreign files: one line, and no character that controls a terminal."""

import os
import subprocess
import sys
import unicodedata

import pytest
from conftest import ROOT

from megatron_ft.printable import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain, é 中 🙂 data", "plain, é 中 🙂 data"),
        ("\x1b]0;owned\x07\x1b[2J\nerror: all is well", r"\x1b]0;owned\x07\x1b[2J\nerror: all is well"),
        ("a\r\tb\x00\x7f\x9b", r"a\r\tb\x00\x7f\x9b"),
        ("a\u202eb\u2066\u200f\u2028", r"a\u202eb\u2066\u200f\u2028"),
        ("\udcff\ud800", r"\xff\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("می\u200cخواهم 👨\u200d💻", "می\u200cخواهم 👨\u200d💻"),
    ],
)
def test_unsafe_characters_are_escapes(text, shown):
    assert printable(text) == shown
    assert printable(shown) == shown


def test_no_control_character_survives():
    every = "".join(map(chr, range(sys.maxunicode + 1)))
    kinds = {unicodedata.category(character) for character in printable(every, limit=None)}
    assert not kinds & {"Cc", "Cs", "Zl", "Zp"}


def test_long_text_keeps_both_ends():
    text = "config.json: " + "\x1b" * 100_000 + "; copy it again"
    shown = printable(text, limit=200)
    assert len(shown) <= 200 and shown.startswith("config.json: ") and shown.endswith("; copy it again")


def test_kept_characters_stay():
    assert printable("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


PROGRAM = """
from megatron_ft.errors import UserError, run_program
def main():
    print("loss \\u2192 \\xab2.5\\xbb \\udcff")
    raise UserError("bad\\x1b[2J\\nerror: forged \\u2192 \\udcff")
run_program(main)
"""


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1", "cp1252"])
def test_output_that_cannot_be_encoded_is_escaped(encoding):
    env = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0", "LC_ALL": "C"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, cwd=ROOT, env=env)
    out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
    arrow = "→" if encoding == "utf-8" else r"\u2192"
    assert done.returncode == 2 and out.splitlines()[0].startswith(f"loss {arrow} ")
    assert err == rf"error: bad\x1b[2J\nerror: forged {arrow} \xff" + "\n"
