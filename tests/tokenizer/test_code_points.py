"""The table of code points in code_points.h: that of the `regex` package and of `tokenizers`.

    python tests/tokenizer/test_code_points.py

prints it, in Python 3.11, whose Unicode is 14.0.
"""

import re
import sys
import unicodedata
from itertools import groupby
from pathlib import Path

import pytest
import regex
from tokenizers import Tokenizer

from megatron_ft.tokenizer import fast_bpe
from megatron_ft.tokenizer._bpe import CODE_POINT_RUNS
from megatron_ft.tokenizer.tokenizer import load_tokenizer

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
CLASS = regex.compile(r"(?<L>\p{L}+)|(?<N>\p{N}+)|(?<S>\s+)")


def code_point_classes() -> str:
    """The class of every code point, a letter each."""
    points = "".join(map(chr, range(sys.maxunicode + 1)))
    classes = ["U" if unicodedata.category(c) == "Cn" else "O" for c in points]
    for run in CLASS.finditer(points):
        for i in range(*run.span()):
            if classes[i] != "U":
                classes[i] = run.lastgroup
    return "".join(classes)


def expanded(runs: str) -> str:
    return "".join(name * int(length) for length, name in re.findall(r"(\d+)([A-Z])", runs))


def test_table_has_the_classes_of_regex():
    table, expected = expanded(CODE_POINT_RUNS), code_point_classes()
    assert len(table) == len(expected) == sys.maxunicode + 1
    different = [i for i, (a, b) in enumerate(zip(table, expected, strict=True)) if a != b]
    assert not [hex(i) for i in different if table[i] != "U"]
    if unicodedata.unidata_version == "14.0.0":
        assert not different


def test_class_edges_are_the_ends_of_every_run():
    table, edges = expanded(CODE_POINT_RUNS), fast_bpe.class_edges()
    assert len(edges) > 1000
    for first, last in edges:
        run = table[ord(first) : ord(last) + 1]
        assert set(run) == {run[0]} != {"U"}
        assert first == "\0" or table[ord(first) - 1] != run[0]


@pytest.mark.parametrize("point", [0x1FAE9, 0x11F51, 0x1E4D1, 0x2EBF0, 0x10D41, 0x11DE1, 0x379, 0x40041])
def test_class_of_a_new_code_point_is_learned_from_the_library(point):
    """Emoji, digits and letters of Unicode 15 to 17, and code points without a character."""
    path = FIXTURES / "tokenizer.json"
    tokenizer, reference = load_tokenizer(path), Tokenizer.from_file(str(path))
    text = "a{0}{0}a 1{0} {0}{0} !{0}!  {0}1{0}'s\n\n{0} \n".format(chr(point))
    encoder = tokenizer.fast_encoder
    assert encoder.encode(text.encode()) == point
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids
    assert isinstance(encoder.encode(text.encode()), bytes)


if __name__ == "__main__":
    print("".join(f"{len(list(run))}{name}" for name, run in groupby(code_point_classes())))
