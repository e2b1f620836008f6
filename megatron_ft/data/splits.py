"""Megatron's weighted splits, one group per line:

    NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX ...

Quotes around a group are optional; with them a line may contain several groups. Blank lines and
lines starting with # are skipped. START and END are fractions of a dataset's documents, so `0:0.95`
and `0.95:1` of one prefix have no document in common.
"""

import codecs
import re
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from megatron_ft.config.arguments import validation_fraction
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError
from megatron_ft.files.first_bytes import describe
from megatron_ft.files.os_error import remedy
from megatron_ft.printable import printable

FORM = "expected NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX ..."
MAX_BYTES = 16 << 20
MAX_WEIGHT = 1e12  # sums of weights stay exact enough to follow them
MAX_PARTS = 32767  # of a group: `_packing.blend` numbers them with int16
MAX_PREFIX = 3000  # characters; Linux takes paths of at most 4,095 bytes
MAX_SHOWN = 200  # characters of a mistake, in messages
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
# In no prefix and not between words: no file name has a NUL, and escapes control a terminal.
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


@dataclass(frozen=True)
class Part:
    """One dataset of a group: its weight, its range as fractions of its documents, and `where` it
    was given, for errors."""

    weight: float
    start: float
    end: float
    prefix: str
    where: str

    def documents(self, count: int) -> tuple[int, int]:
        """The range [start, stop) of document numbers out of `count`, rounded as in Megatron."""
        return round(self.start * count), round(self.end * count)


@dataclass(frozen=True)
class Group:
    """A named group of datasets that are blended by weight."""

    name: str
    parts: tuple[Part, ...]


def groups_of(config: Config, split: str) -> list[Group]:
    """The groups of `split` ("train", "valid", "test") that flags ask for, or []. Raises UserError.

    `--data-prefix` is one group for training. Its last `--validation-fraction` is the validation
    group "valid", unless validation groups are given.
    """
    path, given = config.data.split_source(split)
    if path:
        groups = read_split_file(path)
    elif given:
        flag = f"--{split}-weighted-split-paths"
        groups = [group for i, text in enumerate(given, 1) for group in parse_line(text, f"{flag}, group {i}")]
    elif config.data.prefix and split != "test":
        bound, where = 1 - validation_fraction(config), "--data-prefix"
        start, end = (0, bound) if split == "train" else (bound, 1)
        groups = [Group(split, (Part(1.0, start, end, config.data.prefix, where),))] if end > start else []
    else:
        groups = []
    if split == "train" and len(groups) > 1:
        raise UserError(
            f"training takes one group, found {len(groups)} ({', '.join(g.name for g in groups)}); "
            "put their datasets in one group with weights"
        )
    _check_names_differ(groups, split)
    return groups


def prefixes_of(config: Config) -> list[str]:
    """The datasets of all groups of all splits, each once. Raises UserError."""
    groups = (group for split in ("train", "valid", "test") for group in groups_of(config, split))
    return list(dict.fromkeys(part.prefix for group in groups for part in group.parts))


def read_split_file(path: str | Path) -> list[Group]:
    """All groups of a split file. Raises UserError with file, line and column."""
    try:
        with open(path, "rb") as file:  # may be a FIFO, such as of <(command)
            content = file.read(MAX_BYTES + 1)
        lines = content.removeprefix(codecs.BOM_UTF8).decode("utf-8").split("\n")
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as a split file ({error.strerror or error}); {remedy(error, FORM)}"
        ) from error
    except UnicodeDecodeError as error:
        found = describe(content) or f"not UTF-8 at byte {error.start}"
        raise UserError(f"{path}: cannot be read as a split file ({found}); {FORM}") from error
    if len(content) > MAX_BYTES:
        raise UserError(f"{path}: more than {MAX_BYTES:,} bytes, which is not a split file; {FORM}")
    groups: list[Group] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            groups += parse_line(line, f"{path}, line {number}")
    if not groups:
        raise UserError(f"{path}: no groups; {FORM}")
    return groups


def parse_line(line: str, where: str) -> list[Group]:
    """The groups of one line; `where` it was given begins error messages."""
    line = line.removesuffix("\r")
    if control := _CONTROL.search(line):
        column, character = control.start() + 1, ord(control.group())
        raise UserError(f"{where}, column {column}: the character U+{character:04X} does not belong here; {FORM}")
    if '"' not in line:
        return [_parse_group(line, 0, len(line), where)]
    groups: list[Group] = []
    position = 0
    while line[position:].strip():
        opening = line.find('"', position)
        stray = line[position : opening if opening >= 0 else None]
        if stray.strip():
            column = position + len(stray) - len(stray.lstrip()) + 1
            raise UserError(
                f"{where}, column {column}: {_shown(stray.strip())} is outside the quotes, which enclose complete groups; {FORM}"
            )
        closing = line.find('"', opening + 1)
        if closing < 0:
            raise UserError(f'{where}, column {opening + 1}: this quote is not closed; put a " after the last prefix')
        groups.append(_parse_group(line, opening + 1, closing, where))
        position = closing + 1
    return groups


def _parse_group(line: str, start: int, end: int, where: str) -> Group:
    text = line[start:end]
    name, colon, rest = text.partition(":")
    if not colon or not name.strip() or len(name.split()) > 1:
        column = start + len(text) - len(text.lstrip()) + 1
        raise UserError(f"{where}, column {column}: no group name followed by a colon; {FORM}")
    parts, position = [], start + len(name) + 1
    for part in rest.split(","):
        parts.append(_parse_part(part, position, where))
        position += len(part) + 1
    if len(parts) > MAX_PARTS:
        raise UserError(
            f"{where}: {len(parts):,} datasets in group {_shown(name.strip())}, expected at most {MAX_PARTS:,}"
        )
    return Group(name.strip(), tuple(parts))


def _parse_part(text: str, offset: int, where: str) -> Part:
    words = [(match.group(), offset + match.start() + 1) for match in re.finditer(r"\S+", text)]
    if len(words) != 3:
        column = words[min(len(words), 4) - 1][1] if words else offset + 1
        found = f"{_shown(text.strip())} has {len(words)} words" if words else "nothing between the commas"
        spaces = " (a prefix cannot contain spaces: use a symbolic link without them)" if len(words) > 3 else ""
        raise UserError(f"{where}, column {column}: {found}; expected WEIGHT START:END PREFIX{spaces}")
    (weight_text, weight_column), (range_text, range_column), (prefix, prefix_column) = words
    weight = _number(weight_text)
    if weight is None or not 0 < weight <= MAX_WEIGHT:
        raise UserError(
            f"{where}, column {weight_column}: weight {_shown(weight_text)} is not a number above 0 "
            f"and at most {MAX_WEIGHT:g}, like 0.5"
        )
    start_text, _, end_text = range_text.partition(":")
    start, end = _number(start_text), _number(end_text)
    if start is None or end is None or not 0 <= start < end <= 1:
        raise UserError(
            f"{where}, column {range_column}: range {_shown(range_text)} is not START:END with 0 <= START < END <= 1, like 0:0.95"
        )
    if len(prefix) > MAX_PREFIX:
        raise UserError(
            f"{where}, column {prefix_column}: a prefix of {len(prefix):,} characters ({_shown(prefix)}), "
            f"expected at most {MAX_PREFIX:,}"
        )
    return Part(weight, start, end, prefix, f"{where}, column {prefix_column}")


def _number(text: str) -> float | None:
    """A decimal number, finite; None for what float() accepts beyond that: nan, inf, 1_0, digits of
    other scripts."""
    value = float(text) if _NUMBER.fullmatch(text) else inf
    return value if isfinite(value) else None


def _shown(text: str) -> str:
    return repr(printable(text, MAX_SHOWN))


def _check_names_differ(groups: list[Group], split: str) -> None:
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two {split} groups are named {name!r}; give each a different name")
