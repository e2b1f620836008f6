"""SantaCoder's line diffs: equal to difflib's, and applying one gives the new file."""

import difflib
import time

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_ft.commits.line_diff import BadDiff, apply_line_diff, line_diff, number_lines

LINES = st.sampled_from(["", " ", "a", "b", "  a", "+a", "- 1 a", "1", "\r", "a\r", "\x0c", "\u2028", "é", "a" * 70])
FILES = st.lists(LINES, max_size=12).map("\n".join) | st.text(max_size=30)


@given(old=FILES, new=FILES)
@example(old="", new="")
@example(old="\n\n", new="a")
@example(old="a\nb\nc", new="a\nx\nb\nc")
@example(old="\n".join("ab" * 600), new="\n".join("ab" * 600) + "\nc")
def test_applying_a_diff_gives_the_new_file(old, new):
    assert apply_line_diff(old, line_diff(old, new)) == new.strip()


@given(old=FILES, new=FILES)
def test_diff_has_the_changed_lines_of_difflib(old, new):
    before, after = (number_lines(text).split("\n") if text.strip() else [] for text in (old, new))
    expected = [line for line in list(difflib.unified_diff(before, after, lineterm=""))[2:] if line[0] in "+-"]
    assert line_diff(old, new) == "\n".join(expected)


def test_lines_after_an_insertion_are_listed_with_their_new_numbers():
    assert line_diff("a\nb\nc\n", "a\nx\nb\nc\n") == "-  2 b\n-  3 c\n+  2 x\n+  3 b\n+  4 c"
    assert number_lines("a\n" * 1000).endswith("\n999 a\n1000 a")


@pytest.mark.parametrize(
    "diff, reason",
    [
        ("+ x", "'+ x' has no sign and line number"),
        ("here it is:\n+  1 b", "'here it is:' has no sign"),
        ("-  1 b", "line 1 is removed, but the file has no such line 'b'"),
        ("-  2 a", "line 2 is removed"),
        ("+  1 b", "line 1 is added, but the old one is not removed"),
        ("-  1 a\n+  1 b\n+  1 b", "line 1 is added twice"),
        ("-  1 a\n+  2 b", "the result has no line 1"),
        ("+999999999 b", "the result has no line 2"),
    ],
)
def test_what_is_not_a_diff_of_the_file_is_refused(diff, reason):
    with pytest.raises(BadDiff, match=reason.replace("+", r"\+")):
        apply_line_diff("a\n", diff)


def test_time_is_linear_in_the_lines():
    old = "\n".join(f"line {n % 7}" for n in range(100_000))
    start = time.monotonic()
    assert apply_line_diff(old, line_diff(old, "first\n" + old)) == "first\n" + old
    assert time.monotonic() - start < 10
