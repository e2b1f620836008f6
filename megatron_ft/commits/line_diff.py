"""The line-diff format of SantaCoder's fine-tuning on commits, and its inverse.

Both files are stripped and their lines numbered; the diff lists the numbered lines to remove (`-`)
and to add (`+`), without context. A model that writes such a diff has to generate only the lines
that change, but after an insertion every line has a new number and is listed.

Source: OctoPack (arXiv 2308.07124, appendix J).
"""

import re

NUMBERED = re.compile(r"([+-]) *([0-9]{1,9}) ?(.*)", re.DOTALL)


class BadDiff(ValueError):
    """Text that is not a line diff of the file it is applied to; the message is the reason."""


def number_lines(text: str) -> str:
    r"""The lines of a stripped file, each with its number, from 1, right-aligned in 3 columns.

    >>> number_lines("\na = 1\nb = 2\n")
    '  1 a = 1\n  2 b = 2'
    """
    return "\n".join(f"{i:3d} {line}" for i, line in enumerate(_lines(text), 1))


def line_diff(old: str, new: str) -> str:
    r"""The numbered lines that change from `old` to `new`; "" if the stripped files are equal.

    Equal to difflib.unified_diff of the numbered files without its header, hunk and context lines:
    a numbered line can only be equal to the line of the same number.

    >>> print(line_diff("a = 1\nb = 2\n", "a = 1\nb = 3\nc = 4\n"))
    -  2 b = 2
    +  2 b = 3
    +  3 c = 4
    """
    before, after = _lines(old), _lines(new)
    changed: list[str] = []
    removed: list[str] = []
    added: list[str] = []
    for i in range(max(len(before), len(after))):
        if i < len(before) and i < len(after) and before[i] == after[i]:
            changed += removed + added
            removed, added = [], []
            continue
        removed += [f"-{i + 1:3d} {line}" for line in before[i : i + 1]]
        added += [f"+{i + 1:3d} {line}" for line in after[i : i + 1]]
    return "\n".join([*changed, *removed, *added])


def apply_line_diff(old: str, diff: str) -> str:
    r"""The stripped new file: the inverse of `line_diff`.

    Raises BadDiff if a line of `diff` has no sign and number, a line that it removes is not in
    `old`, or the result would have a gap or two lines of one number.

    >>> apply_line_diff("a = 1\nb = 2\n", "-  2 b = 2\n+  2 b = 3\n+  3 c = 4\n")
    'a = 1\nb = 3\nc = 4'
    """
    lines = dict(enumerate(_lines(old), 1))
    added: dict[int, str] = {}
    for line in filter(None, diff.split("\n")):
        match = NUMBERED.fullmatch(line)
        if match is None:
            raise BadDiff(f"{line[:60]!r} has no sign and line number")
        sign, number, text = match[1], int(match[2]), match[3]
        if sign == "+":
            if number in added:
                raise BadDiff(f"line {number} is added twice")
            added[number] = text
        elif lines.pop(number, None) != text:
            raise BadDiff(f"line {number} is removed, but the file has no such line {text[:60]!r}")
    if twice := lines.keys() & added.keys():
        raise BadDiff(f"line {min(twice)} is added, but the old one is not removed")
    result = lines | added
    if missing := set(range(1, len(result) + 1)) - result.keys():
        raise BadDiff(f"the result has no line {min(missing)}")
    return "\n".join(result[number] for number in sorted(result))


def _lines(text: str) -> list[str]:
    """The lines of a stripped file; none if it is blank."""
    stripped = text.strip()
    return stripped.split("\n") if stripped else []
