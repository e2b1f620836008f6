"""Answers that are diffs, of the styles diff and diff-carper, applied to the buggy function.

Both rules are the reference's (bigcode-evaluation-harness, OpenELM): a diff that does not apply
leaves the function as it was, or gives an empty program.
"""

import re
from itertools import pairwise

from megatron_ft.extras import require

HUNK = re.compile(r"^@@ .*? @@.*\n", re.MULTILINE)
NO_NEWLINE = re.compile(r"^\\ No newline at end of file$\n?", re.MULTILINE)
END_OF_HUNKS = re.compile(r"\n[^ +-@]+")  # a line that cannot be in a diff


def patched(old: str, diff: str, style: str) -> str:
    """The function `old` after the diff of an answer in this style."""
    return apply_patches(old, diff) if style == "diff" else apply_hunks(old, diff)


def apply_patches(old: str, diff: str) -> str:
    """`old` after the patches in diff-match-patch's text format, applied where their context is
    found; "" if the text is not in that format."""
    dmp = require("diff_match_patch", "evaluation").diff_match_patch()
    try:
        return dmp.patch_apply(dmp.patch_fromText(diff.lstrip()), old)[0]
    except ValueError:
        return ""


def hunks_of(text: str) -> str:
    """The hunks at the start of what follows `<DFF>`; "" if a space does not come first."""
    if not text.startswith(" "):
        return ""
    return END_OF_HUNKS.split(text[1:])[0].partition("<NME>")[0]


def apply_hunks(old: str, diff: str) -> str:
    """`old` after the hunks of a unified diff, found by their text and not by line numbers, each
    after the one before. A hunk that is not found is skipped; "" for an empty diff."""
    if not diff:
        return ""
    diff = NO_NEWLINE.sub("", diff)
    heads = [(match.start(), match.end()) for match in HUNK.finditer(diff)]
    if heads and heads[0][0] > 0:
        return f"\n{old}"  # the reference reads no hunk of a diff that starts with other text
    position = 0
    for (_, start), (end, _) in pairwise([*heads, (len(diff), 0)]):
        lines = [line for line in diff[start:end].split("\n") if line]
        before = "\n".join(line[1:] for line in lines if line[0] in "- ")
        after = "\n".join(line[1:] for line in lines if line[0] in "+ ")
        if not before:
            if position == 0:
                old = f"{after}\n{old}"
                position = 1
            continue
        found = old.find(before, position)
        end_found = found + len(before)
        if found >= 0 and old[end_found : end_found + 1] in ("", "\n"):
            old = old[:found] + after + old[end_found:]
            position = found + len(after)
    return old
