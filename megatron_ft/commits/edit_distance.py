"""Whether two texts differ by fewer than a few single-character edits."""

from collections import Counter


def is_closer_than(a: str, b: str, limit: int) -> bool:
    """Whether the Levenshtein distance of the texts is below `limit`; O(limit^2 + length).

    Furthest-reaching points per diagonal (Ukkonen 1985, Myers 1986): after e edits, how far into
    `a` each diagonal d, position in b minus position in a, gets.

    >>> is_closer_than("kitten", "sitting", 4), is_closer_than("kitten", "sitting", 3)
    (True, False)
    """
    a, b = _without_common_ends(a, b)
    if max(len(a), len(b)) < limit:
        return True
    # Characters that only one of them has: each takes an edit, which is often enough to know.
    only_a, only_b = Counter(a), Counter(b)
    if max((only_a - only_b).total(), (only_b - only_a).total()) >= limit:
        return False
    goal = len(b) - len(a)
    reached: dict[int, int] = {}
    for edits in range(limit):
        previous, reached = reached, {}
        for d in range(-edits, edits + 1):
            if edits:
                i = max(previous.get(d - 1, -1), previous.get(d, -1) + 1, previous.get(d + 1, -1) + 1)
            else:
                i = 0
            i = min(i, len(a), len(b) - d)
            if i >= 0 and i + d >= 0:
                reached[d] = i + _common_prefix(a, i, b, i + d)
        if reached.get(goal) == len(a):
            return True
    return False


def _without_common_ends(a: str, b: str) -> tuple[str, str]:
    """Both texts without their common prefix, and without the common suffix of what is left; their
    distance does not change."""
    prefix = _common_prefix(a, 0, b, 0)
    a, b = a[prefix:], b[prefix:]
    suffix = _common_prefix(a[::-1], 0, b[::-1], 0)
    return a[: len(a) - suffix], b[: len(b) - suffix]


def _common_prefix(a: str, i: int, b: str, j: int) -> int:
    """Length of the longest common prefix of a[i:] and b[j:], by slices of doubling size."""
    length, step = 0, 16
    end = min(len(a) - i, len(b) - j)
    while length < end:
        size = min(step, end - length)
        if a[i + length : i + length + size] == b[j + length : j + length + size]:
            length += size
            step *= 2
        elif size == 1:
            break
        else:
            step = size // 2
    return length
