"""Does a text hold a problem of HumanEvalPack? `ProblemIndex` answers with the ids of the tasks.

    index = ProblemIndex.load("humanevalpack")  # a directory of LANG.jsonl
    index.task_ids([row["old_contents"], row["new_contents"], row["subject"]])  # ["Python/0"]

Texts are compared without any white space, so indentation and line breaks do not matter. Of each
problem are looked for: its prompt, its docstring, and its canonical and its buggy solution with and
without the declaration. A text holds a problem if

1. it shares WINDOW consecutive tokens (words, numbers, single operators) with one of these, if
   MIN_WORDS of the tokens are distinct words of MIN_LETTERS letters or more and no other problem
   has them, translations aside: short names and boilerplate (`for (int i = 0; i < n; i++)`) also
   agree by chance;
2. it contains one of these completely: a prompt, a solution with its declaration, or a docstring or
   solution of at least MIN_TOKENS tokens;
3. it is a docstring or solution and nothing else: a row whose complete text is `return x + y` holds
   a problem, a file with such a line does not.

The overlap of 13 tokens is GPT-3's, there of words (arXiv 2005.14165, appendix C).
"""

import re
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import open_sources
from megatron_ft.files.tables import Row, read_table

LANGUAGES = ("python", "cpp", "js", "java", "go", "rust")  # names of HumanEvalPack's files
FIELDS = ("task_id", "prompt", "docstring", "declaration", "canonical_solution", "buggy_solution")

WINDOW = 13
MIN_WORDS, MIN_LETTERS = 5, 3
MIN_TOKENS = 20
TOKEN = re.compile(r"\w+|[^\w\s]")
ASCII_SPACES = bytes(code for code in range(128) if chr(code).isspace())

GRAM = 16  # bytes that are hashed together
STEP = 4  # of a piece, the grams at multiples of STEP may be indexed
MIN_BYTES = GRAM + STEP - 1  # so that a window of this size holds one of them
FACTORS = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F], np.uint64)  # odd, without pattern
HASH_BITS = 21  # a table of 2 MiB, of which the grams of all problems fill 2%
HASH_SHIFT = np.uint64(64 - HASH_BITS)


@dataclass
class Piece:
    """A part of one or more tasks: its text without white space, and the stretches of it, as bytes
    [start, stop) in ascending order, that a text must not hold."""

    text: bytes
    tasks: set[str]
    windows: list[tuple[int, int]] = field(default_factory=list)

    def is_held(self, here: int, text: bytes, there: int) -> bool:
        """Whether `text` holds a window around text[there:there + GRAM], which equals self.text at
        `here`."""
        low = here - _common_suffix(self.text, here, text, there)
        high = here + _common_prefix(self.text, here, text, there)
        first = bisect_left(self.windows, (low,))
        return first < len(self.windows) and self.windows[first][1] <= high


class ProblemIndex:
    """Problems, indexed by GRAM bytes at a time: a text is hashed at every byte, and what the index
    may hold is compared byte by byte. HumanEvalPack's takes 2 s to build, and 90 MB."""

    def __init__(self, problems: Iterable[dict[str, str]]):
        """`problems` are rows that have all of FIELDS, each a string."""
        self.problems = 0
        self._complete: dict[bytes, set[str]] = defaultdict(set)  # for rule 3
        pieces: dict[bytes, Piece] = {}
        windows: dict[bytes, list[tuple[int, int]]] = {}
        whole: set[bytes] = set()  # for rule 2
        for problem in problems:
            self.problems += 1
            for text, has_declaration in pieces_of(problem):
                key = without_white_space(text)
                tokens = TOKEN.findall(text)
                pieces.setdefault(key, Piece(key, set())).tasks.add(problem["task_id"])
                if key not in windows:
                    windows[key] = list(distinctive_windows(tokens))
                if has_declaration or len(tokens) >= MIN_TOKENS:
                    whole.add(key)
                if not has_declaration:
                    self._complete[key].add(problem["task_id"])
        shared = _windows_of_several_problems(pieces, windows)
        for key, piece in pieces.items():
            piece.windows = [(start, stop) for start, stop in windows[key] if key[start:stop] not in shared]
            if not piece.windows and key in whole and len(key) >= MIN_BYTES:
                piece.windows = [(0, len(key))]
        self._pieces = [piece for piece in pieces.values() if piece.windows]
        self._positions = self._index()
        self._filter = np.zeros(1 << HASH_BITS, np.bool_)
        for gram in self._positions:
            self._filter[_hashes(gram)] = True

    @classmethod
    def load(cls, directory: str | Path) -> "ProblemIndex":
        """The problems of the files LANG.jsonl of a directory, whichever of LANGUAGES it has.

        Raises UserError if it has none, or a row is not a problem.
        """
        directory = Path(directory)
        files = [path for path in (directory / f"{name}.jsonl" for name in LANGUAGES) if path.is_file()]
        if not files:
            expected = ", ".join(f"{name}.jsonl" for name in LANGUAGES)
            raise UserError(f"{directory}: no problems found; expected a directory with HumanEvalPack's {expected}")
        rows = (row for chunk in read_table(open_sources(files)) for row in chunk.rows)
        return cls(_problem(row) for row in rows)

    def task_ids(self, texts: Iterable[str]) -> list[str]:
        """The ids of the tasks that these texts, such as those of a row, hold; in order."""
        keys = [without_white_space(text) for text in texts]
        found: set[str] = set()
        for key in keys:
            found |= self._complete.get(key, set())
        joined = b"\0".join(keys)  # no token has a NUL
        for there in np.flatnonzero(self._filter[_hashes(joined)]).tolist():
            for piece, here in self._positions.get(joined[there : there + GRAM], ()):
                if not piece.tasks <= found and piece.is_held(here, joined, there):
                    found |= piece.tasks
        return in_order(found)

    def _index(self) -> dict[bytes, list[tuple[Piece, int]]]:
        """Grams and where they are: for each window the one of its grams that is the rarest."""
        count = Counter(piece.text[at : at + GRAM] for piece in self._pieces for at in range(0, len(piece.text), STEP))
        positions: dict[bytes, list[tuple[Piece, int]]] = defaultdict(list)
        for piece in self._pieces:
            grams = [piece.text[at : at + GRAM] for at in range(0, len(piece.text), STEP)]
            counts = [count[gram] for gram in grams]
            chosen = set()
            for start, stop in piece.windows:
                inside = range(-(-start // STEP), (stop - GRAM) // STEP + 1)
                chosen.add(min(inside, key=counts.__getitem__))
            for i in sorted(chosen):
                positions[grams[i]].append((piece, i * STEP))
        return dict(positions)


def pieces_of(problem: dict[str, str]) -> Iterator[tuple[str, bool]]:
    """The texts of a problem that are looked for, and whether each has the declaration."""
    yield problem["prompt"], True
    yield problem["docstring"], False
    for solution in (problem["canonical_solution"], problem["buggy_solution"]):
        yield problem["declaration"] + solution, True
        yield solution, False


def without_white_space(text: str) -> bytes:
    r"""The text in UTF-8 without white space.

    >>> without_white_space(" return x +\n\ty")
    b'returnx+y'
    """
    if text.isascii():
        return text.encode().translate(None, ASCII_SPACES)
    return "".join(text.split()).encode("utf-8", "replace")


def distinctive_windows(tokens: list[str]) -> Iterator[tuple[int, int]]:
    """Each WINDOW consecutive tokens with MIN_WORDS distinct words, as bytes [start, stop) of all
    tokens joined."""
    ends = [0]
    for token in tokens:
        ends.append(ends[-1] + len(token.encode("utf-8", "replace")))
    words = [token if len(token) >= MIN_LETTERS and not token[0].isdigit() else "" for token in tokens]
    for first in range(len(tokens) - WINDOW + 1):
        start, stop = ends[first], ends[first + WINDOW]
        distinct = set(words[first : first + WINDOW])
        if len(distinct) - ("" in distinct) >= MIN_WORDS and stop - start >= MIN_BYTES:
            yield start, stop


def _windows_of_several_problems(pieces: dict[bytes, Piece], windows: dict[bytes, list[tuple[int, int]]]) -> set[bytes]:
    """Windows that occur in problems of different numbers: Python/7 and Rust/7 are translations."""
    seen: dict[bytes, str] = {}
    shared = set()
    for key, piece in pieces.items():
        for number in {task.rpartition("/")[2] for task in piece.tasks}:
            for start, stop in windows[key]:
                window = key[start:stop]
                if seen.setdefault(window, number) != number:
                    shared.add(window)
    return shared


def _hashes(text: bytes) -> np.ndarray:
    """Hash of the GRAM bytes at each position, below 2^HASH_BITS: int64 [len(text) - GRAM + 1]."""
    count = len(text) - GRAM + 1
    if count <= 0:
        return np.empty(0, np.int64)
    # Eight bytes from every position; as a copy, since numpy is slow where they are not aligned.
    words = np.ndarray((count + 8,), "<u8", text, strides=(1,)).copy()
    mixed = words[:-8] * FACTORS[0]
    mixed += words[8:] * FACTORS[1]
    return (mixed >> HASH_SHIFT).view(np.int64)


def _common_suffix(a: bytes, i: int, b: bytes, j: int) -> int:
    """Length of the longest common suffix of a[:i] and b[:j]."""
    length, limit = 0, min(i, j)
    while length < limit and a[i - length - 1] == b[j - length - 1]:
        length += 1
    return length


def _common_prefix(a: bytes, i: int, b: bytes, j: int) -> int:
    """Length of the longest common prefix of a[i:] and b[j:]."""
    length, limit = 0, min(len(a) - i, len(b) - j)
    while length < limit and a[i + length] == b[j + length]:
        length += 1
    return length


def in_order(tasks: Iterable[str]) -> list[str]:
    """Task ids sorted by language and number.

    >>> in_order(["CPP/10", "Rust/1", "CPP/2"])
    ['CPP/2', 'CPP/10', 'Rust/1']
    """

    def key(task: str) -> tuple[str, int, str]:
        language, _, number = task.rpartition("/")
        return language, int(number) if number.isdecimal() else 0, task

    return sorted(tasks, key=key)


def _problem(row: Row) -> dict[str, str]:
    """The fields of a row; UserError if one of FIELDS is missing or not a string."""
    for name in FIELDS:
        if not isinstance(row.fields.get(name), str):
            what = "is not a string" if name in row.fields else "is missing"
            raise row.error(f"not a problem of HumanEvalPack: {name!r} {what}")
    return row.fields
