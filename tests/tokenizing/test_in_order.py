"""Blocks are encoded in their order, by the reference if the fast encoder differs on the first."""

import json
from pathlib import Path

import pytest

from megatron_ft.files.jsonl import Block, Source
from megatron_ft.tokenizer.fast_bpe import FastBPE
from megatron_ft.tokenizer.tokenizer import load_tokenizer
from megatron_ft.tokenizing import in_order
from megatron_ft.tokenizing.in_order import encode_in_order
from megatron_ft.tokenizing.row_encoder import RowEncoder
from megatron_ft.tokenizing.text_encoder import TextEncoder

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"


def block_of(*rows: dict) -> Block:
    lines = [b"not a row\n", *(json.dumps(row).encode() + b"\n" for row in rows)]
    return Block(Source(Path("rows.jsonl"), 0, ""), lines, 1, 0, 0)


@pytest.mark.parametrize("kind", ["rows", "texts"])
@pytest.mark.parametrize(
    "text, falls_back", [("bad", True), ("good", False), ("x" * 200 + "bad", False)], ids=["first", "none", "too long"]
)
def test_a_difference_on_the_first_rows_falls_back(kind, text, falls_back, monkeypatch, capsys):
    monkeypatch.setattr(in_order, "SAMPLE_BYTES", 100)
    monkeypatch.setattr(FastBPE, "differs", lambda self, texts: [text for text in texts if "bad" in text])
    tokenizer = load_tokenizer(FIXTURES / "tokenizer.json")
    encoder = RowEncoder(tokenizer, [["a"], ["b"]], True) if kind == "rows" else TextEncoder(tokenizer, "b", True)
    blocks = [block_of({"a": "1", "b": text}), block_of({"a": "2", "b": "bad"})]
    found = list(encode_in_order(encoder, iter(blocks), 2))
    assert [block for block, _ in found] == blocks
    assert all(len(encoded.sizes[1]) == 1 and encoded.bad == [(0, "not JSON")] for _, encoded in found)
    assert (tokenizer.fast_encoder is None) is falls_back
    assert ("ids differ on 'bad'" in capsys.readouterr().err) is falls_back
