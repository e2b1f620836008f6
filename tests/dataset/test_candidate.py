"""A commit row that is decoded by its types is the one that is parsed and checked; the reasons for
what is refused are those of the latter."""

import dataclasses
import json
import random
from collections import Counter
from contextlib import suppress

import msgspec
import pytest
from filter_cases import GOOD

from megatron_ft.commits.candidate import (
    REQUIRED,
    Columns,
    candidate_of,
    columns_of,
    decode,
    parse_candidate,
    read_candidates,
)
from megatron_ft.commits.row import TEXT_FIELDS, CommitRow
from megatron_ft.errors import UserError
from megatron_ft.files.jsonl_row import BadRow, parse_object
from megatron_ft.files.tables import TableWriter, open_tables

TEXTS = ["a", "", 'def f(x):\n\treturn "x" \\ / \b\f\r\0\x7f', "é ü 我想 🙂 \u2028", "\U0010ffff", "\\u00e9", "\ud83d"]
OTHERS = [
    *("1", "-0", "1.5e-7", "1E400", "01", "1.", "true", "nul", "null", "NaN", "[]", '{"a": [1]}', "[" * 9, "12345678901234567890123"),
    *('"\\q"', '"\\ud83d\\ude42"', '"\\udead"', '"\\ud83dx"', '"\t"', '"ab', '"\\u12"', "'a'", ""),
]  # fmt: skip
CHANGES = [
    b"", b'"', b"\\", b"{", b"}", b",", b":", b"\n", b"\xff", b"\xe9", b"0", b" ", b"\0", b"\xed\xa0\x80", b"\xef\xbb\xbf",
]  # fmt: skip


def made_up_line(rng: random.Random) -> bytes:
    """A row of commits, often without a column, with other columns, values or bytes."""
    keys = list(GOOD)
    if rng.random() < 0.5:
        rng.shuffle(keys)
    keys += rng.choices([*GOOD, "id", "é", "subj\\u0065ct"], k=max(0, rng.randint(-3, 2)))
    del keys[: max(0, rng.randint(-4, 2))]
    fields = []
    for key in keys:
        value = json.dumps("".join(rng.choices(TEXTS, [9, 3, 3, 3, 2, 2, 0.2], k=3)), ensure_ascii=rng.random() < 0.5)
        fields.append(f'"{key}": {value if rng.random() < 0.97 else rng.choice(OTHERS)}')
    line = bytearray(f"{{{', '.join(fields)}}}".encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        at = rng.randrange(len(line))
        line[at : at + rng.randint(0, 2)] = rng.choice(CHANGES)
    return bytes(line) + b"\n"


def outcome(parse, line: bytes) -> Columns | str:
    try:
        return parse(line)
    except BadRow as reason:
        return str(reason)


def test_decoded_rows_are_those_that_are_parsed_and_checked():
    rng = random.Random(7)
    decoded, reasons = 0, set()
    for line in (made_up_line(rng) for _ in range(20_000)):
        found = outcome(lambda line: parse_candidate(line).columns, line)
        assert found == outcome(lambda line: columns_of(parse_object(line), line), line), line
        if isinstance(found, str):
            reasons.add(found)
        else:
            with suppress(msgspec.DecodeError):  # it has other columns, too
                decoded += decode(line) == found
    assert decoded > 2000 and len(reasons) > 25


def test_columns_are_those_of_a_commit_row():
    assert set(Columns.__struct_fields__) == {column.name for column in dataclasses.fields(CommitRow)}
    assert set(REQUIRED) > set(TEXT_FIELDS)


@pytest.mark.parametrize("extra", [{}, {"extra": [1, None]}], ids=["decoded", "parsed"])
def test_a_row_keeps_its_line_until_a_text_changes(extra):
    row = GOOD | extra
    line = json.dumps(row).encode() + b"\n"
    from_line, from_parquet = parse_candidate(line), candidate_of(columns_of(row), None, row)
    assert from_line.unchanged_line == line and from_parquet.unchanged_line is None
    for candidate in (from_line, from_parquet):
        candidate.set_subject("Add a limit")
        assert candidate.unchanged_line is None
        assert list(candidate.row().items()) == list((row | {"subject": "Add a limit"}).items())


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_rows_of_both_kinds_of_table(suffix, tmp_path):
    path = tmp_path / f"rows.{suffix}"
    with TableWriter(path) as table:
        for row in (GOOD, GOOD | {"lang": None}, GOOD | {"old_file": None}, GOOD):
            table.write(row)
        table.commit()
    sources = open_tables([path])
    bad: Counter[str] = Counter()
    found = [candidate.language for candidates, _ in read_candidates(sources, bad=bad) for candidate in candidates]
    assert found == ["Python"] * 3 and bad == {"'old_file' is null, not a string": 1}
    where = "line 3" if suffix == "jsonl" else "row 3"
    with pytest.raises(UserError, match=f"rows.{suffix}, {where}: 'old_file' is null"):
        list(candidate for candidates, _ in read_candidates(sources) for candidate in candidates)
