"""Megatron's weighted splits, one group per line:

    NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX ...

Quotes around a group are optional; with them a line may contain several groups. Blank lines and
lines starting with # are skipped. START and END are fractions of a dataset's documents, so `0:0.95`
and `0.95:1` of one prefix have no document in common.
"""

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from megatron_ft.config.arguments import validation_fraction
from megatron_ft.config.config import Config
from megatron_ft.errors import UserError

FORM = "expected NAME: WEIGHT START:END PREFIX, WEIGHT START:END PREFIX ..."


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


def read_split_file(path: str | Path) -> list[Group]:
    """All groups of a split file. Raises UserError with file, line and column."""
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read as a split file ({error}); {FORM}") from error
    groups: list[Group] = []
    for number, line in enumerate(lines, 1):
        if line.strip() and not line.lstrip().startswith("#"):
            groups += parse_line(line, f"{path}, line {number}")
    if not groups:
        raise UserError(f"{path}: no groups; {FORM}")
    return groups


def parse_line(line: str, where: str) -> list[Group]:
    """The groups of one line; `where` it was given begins error messages."""
    if '"' not in line:
        return [_parse_group(line, 0, len(line), where)]
    groups: list[Group] = []
    position = 0
    while line[position:].strip():
        opening = line.find('"', position)
        stray = line[position : opening if opening >= 0 else None]
        if stray.strip():
            column = position + len(stray) - len(stray.lstrip()) + 1
            raise UserError(f"{where}, column {column}: {stray.strip()!r} is outside the quotes; {FORM}")
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
    return Group(name.strip(), tuple(parts))


def _parse_part(text: str, offset: int, where: str) -> Part:
    words = [(match.group(), offset + match.start() + 1) for match in re.finditer(r"\S+", text)]
    if len(words) != 3:
        column = words[min(len(words), 4) - 1][1] if words else offset + 1
        found = f"{text.strip()!r} has {len(words)} words" if words else "nothing between the commas"
        spaces = " (a prefix cannot contain spaces: use a symbolic link without them)" if len(words) > 3 else ""
        raise UserError(f"{where}, column {column}: {found}; expected WEIGHT START:END PREFIX{spaces}")
    (weight_text, weight_column), (range_text, range_column), (prefix, prefix_column) = words
    weight = _number(weight_text)
    if weight is None or weight <= 0:
        raise UserError(f"{where}, column {weight_column}: weight {weight_text!r} is not a number above 0, like 0.5")
    start_text, _, end_text = range_text.partition(":")
    start, end = _number(start_text), _number(end_text)
    if start is None or end is None or not 0 <= start < end <= 1:
        raise UserError(
            f"{where}, column {range_column}: range {range_text!r} is not START:END with 0 <= START < END <= 1, like 0:0.95"
        )
    return Part(weight, start, end, prefix, f"{where}, column {prefix_column}")


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if isfinite(value) else None


def _check_names_differ(groups: list[Group], split: str) -> None:
    names = [group.name for group in groups]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"two {split} groups are named {name!r}; give each a different name")
