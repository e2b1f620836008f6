"""Rows that C++ reads are those that Python reads, with the same ids; for the others Python has the
reason."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from megatron_ft.files.jsonl import Block, Source
from megatron_ft.files.jsonl_row import BadRow
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.tokenizing import row_encoder
from megatron_ft.tokenizing.row_encoder import RowEncoder

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
KEYS = [["inputs"], ["outputs", "targets"]]
TEXTS = [
    "def f(x):\n\treturn x  # it's \"12\" \\ / \b\f\r", "<|endoftext|>", "x<|endoftext|>", "é ü 我想 🙂 \u2028\u00a0\x00\x7f", "\U0001fae8", "a",
    "", "'s 're", "=" * 40, "    " * 9, "ﬀ" * 7, "\\u00e9", "\ud83d", "\U0010ffff",
]  # fmt: skip
OTHERS = [
    "1", "-0", "1.5e-7", "1E400", "01", "1.", "-", "+1", ".5", "true", "nul", "null", "NaN", "-Infinity", '"\\q"', '"\\ud83d\\ude42"', '"\\udead"',
    '"\\ud83dx"', '"\t"', '"ab', "[]", '{"a": [1]}', '"\\u12"', "12345678901234567890123", '"' + "x" * 30 + '\\"y"', "'a'", "",
]  # fmt: skip
LINES = [
    b"", b" \t\r", b"{}", b"[]", b"null", b'"a"', b"{", b'{"inputs": "a", "outputs": "b"', b'{"inputs": "a", "outputs": "b"}}',
    b'{"inputs": "a", "outputs": "b",}', b'{"inputs": "a" "outputs": "b"}', b'{"inputs": "", "inputs": "a", "targets": "b"}', b'{,"inputs": "a"}',
    b'{"inputs": "a", "outputs": "", "targets": "b"}', b'{"inputs": "a", "outputs": 5, "targets": "b"}', b' { "inputs" : "a" , "targets" : "b" } \r',
    b'{"inputs": "a", "targets": 5, "outputs": "b"}', b'{"in\\u0070uts": "a", "outputs": "b"}', b'{"inputs": "a", "outputs": "b"} {"inputs": "a"}',
    b'{"inputs": "a\xc0\x80", "outputs": "b"}', b'{"inputs": "a\xed\xa0\x80", "outputs": "b"}', b'{"inputs": "\xf4\x90\x80\x80", "outputs": "b"}',
    b'{"inputs": "\xe2\x82", "outputs": "b"}', b'{"inputs": "a", "outputs": "b", "\xff": 1}', b"\x0b\x0c", b'\xef\xbb\xbf{"inputs": "a", "outputs": "b"}',
]  # fmt: skip


def block_of(lines: list[bytes | None]) -> Block:
    complete = [None if line is None else line + b"\n" for line in lines]
    return Block(Source(Path("rows.jsonl"), 0, ""), complete, 1, 0, 0)


def made_up_line(rng: random.Random) -> bytes:
    """A row with other keys, in any order, and in a third of cases with one byte changed."""
    keys = ["inputs", "outputs", *rng.sample(["targets", "é", "id", "inputs"], rng.randint(0, 3))][rng.random() < 0.1 :]
    rng.shuffle(keys)
    fields = []
    for key in keys:
        value = json.dumps("".join(rng.choices(TEXTS, k=rng.randint(1, 3))), ensure_ascii=rng.random() < 0.5)
        fields.append(f"{json.dumps(key)}: {value if rng.random() < 0.95 else rng.choice(OTHERS)}")
    line = bytearray(f"{{{', '.join(fields)}}}".encode("utf-8", "surrogatepass"))
    if rng.random() < 0.3:
        at = rng.randrange(len(line))
        line[at : at + rng.randint(0, 1)] = rng.choice(
            [b"", b'"', b"\\", b"{", b",", b"\n", b"\xff", b"\xe9", b"0", b" ", b"\0"]
        )
    return bytes(line)


def encoded_by_python(encoder: RowEncoder, lines: list[bytes | None]):
    """(ids of each row and field, bad rows), line by line."""
    rows, bad = [], []
    for i, line in block_of(lines).rows():
        try:
            rows.append([ids.tolist() for ids in encoder._encode_line(line)])
        except BadRow as reason:
            bad.append((i, str(reason)))
    return rows, bad


def encoded_by_blocks(encoder: RowEncoder, lines: list[bytes | None]):
    """The same from one call for the block, without the end-of-text tokens."""
    encoded = encoder.encode(block_of(lines))
    fields = []
    for data, sizes in zip(encoded.data, encoded.sizes, strict=True):
        ids = np.frombuffer(data, encoder.dtype)
        assert len(ids) == sizes.sum()
        fields.append([row.tolist() for row in np.split(ids, np.cumsum(sizes))[:-1]])
    assert all(row[-1] == encoder.tokenizer.eod for row in fields[1])
    rows = [[inputs, outputs[:-1]] for inputs, outputs in zip(*fields, strict=True)]
    counted = sum(row.count(i) for fields in rows for row in fields for i in encoder.special_ids)
    assert encoded.special_counts.sum() == counted
    assert encoded.ended == sum(row[1][-1] == encoder.tokenizer.eod for row in rows)
    return rows, encoded.bad


@pytest.fixture(scope="module", params=["uint16", "int32"])
def encoder(request, tmp_path_factory) -> RowEncoder:
    """Of a small tokenizer; with int32, one with so many unused tokens that ids need it."""
    spec = json.loads((FIXTURES / "tokenizer.json").read_bytes())
    if request.param == "int32":
        vocab = spec["model"]["vocab"]
        vocab |= {f"unused-{i}": i for i in range(len(vocab), 66000)}
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    path.write_text(json.dumps(spec))
    encoder = RowEncoder(load_tokenizer(path), KEYS, append_eod=True)
    assert encoder.dtype == ("<u2" if request.param == "uint16" else "<i4")
    return encoder


def test_rows_are_those_that_python_reads(encoder):
    rng = random.Random(5)
    lines = [*LINES, None, *(made_up_line(rng) for _ in range(4000))]
    rows, bad = encoded_by_python(encoder, lines)
    assert encoded_by_blocks(encoder, lines) == (rows, bad)
    assert len(rows) > 1000 and len({reason for _, reason in bad}) > 15


def test_without_a_fast_encoder_rows_are_the_same(encoder, monkeypatch):
    rng = random.Random(6)
    lines = [*LINES, None, *(made_up_line(rng) for _ in range(100))]
    expected = encoded_by_blocks(encoder, lines)
    monkeypatch.setattr(type(encoder.tokenizer), "fast_encoder", None)
    assert encoded_by_blocks(encoder, lines) == expected


def test_python_parses_only_what_leaves_doubt(encoder, monkeypatch):
    lines = [*(FIXTURES / "rows.jsonl").read_bytes().splitlines(), LINES[15], b""]
    monkeypatch.setattr(row_encoder, "parse_row", None)
    assert len(encoder.encode(block_of(lines)).sizes[0]) == len(lines) - 1
