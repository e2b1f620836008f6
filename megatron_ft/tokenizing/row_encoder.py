"""Blocks of JSONL rows as token ids: the inputs and outputs of each row."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron_ft.files.jsonl import Block
from megatron_ft.files.jsonl_row import BadRow, parse_row
from megatron_ft.tokenizer._bpe import Rows16, Rows32
from megatron_ft.tokenizer.kinds import Tokenizer

SAMPLE_ROWS = 64  # rows of the data on which the fast encoder is checked against the reference
SAMPLE_BYTES = 1 << 18  # of that sample; the reference takes about a second per megabyte


@dataclass(frozen=True)
class Encoded:
    """The result of encoding one block of rows. The fields of a row are its inputs, its
    outputs and, of conversations, marks of the learned outputs."""

    data: list[bytes]  # per field: the token ids of all rows
    sizes: list[np.ndarray]  # per field: int32 [rows], tokens of each row
    bad: list[tuple[int, str]]  # index in the block and reason of each bad row
    special_counts: np.ndarray  # int64 [special tokens], how often the texts spelled each one out
    ended: int  # outputs that ended with an end-of-text token before one was appended
    stops: int = 0  # conversations that learn a token at which generation ends


def sample_of(block: Block) -> Iterator[bytes]:
    """The first rows of a block, up to SAMPLE_ROWS and SAMPLE_BYTES; those that are too long are
    left out."""
    room = SAMPLE_BYTES
    for _, line in islice(block.rows(), SAMPLE_ROWS):
        if line is not None and len(line) <= room:
            room -= len(line)
            yield line


class RowEncoder:
    """Encodes blocks of lines; one object serves all threads.

    `keys` lists, for inputs and for outputs, the names their key may have.
    """

    def __init__(self, tokenizer: Tokenizer, keys: list[list[str]], append_eod: bool):
        self.tokenizer, self.keys = tokenizer, keys
        self.dtype = tokenizer.dtype
        self.dtypes = [self.dtype, self.dtype]
        self.special_ids = np.array(list(tokenizer.special_ids.values()), np.int64)
        self._eod = tokenizer.eod if append_eod else None

    def check_fast_encoder(self, block: Block) -> None:
        """Compare the fast encoder with the reference on the first rows of the data.

        If they differ, the reference is used and `tokenizer.notices` has the reason.
        """
        self.tokenizer.encode("")
        texts: list[str] = []
        for line in sample_of(block):
            with suppress(BadRow):
                texts += parse_row(line, self.keys)
        self.tokenizer.check_sample(texts)

    def encode(self, block: Block) -> Encoded:
        """Encode the good rows of a block.

        With a fast encoder that is one call for all rows that leave no doubt; the others are parsed
        here, one at a time, because a single one may have 64 MiB.
        """
        make = Rows16 if self.dtype.itemsize == 2 else Rows32
        rows = make(self.tokenizer.fast_encoder, block.lines, self.keys, self._eod)
        bad: list[tuple[int, str]] = []
        while (i := rows.next()) < len(block.lines):
            try:
                rows.add(self._encode_line(block.lines[i]))
            except BadRow as reason:
                bad.append((i, str(reason)))
        sizes = rows.sizes()
        special_counts = rows.count(self.special_ids.tolist())
        if self._eod is not None:
            special_counts[self.special_ids == self._eod] -= len(sizes[-1])
        return Encoded(rows.data(), sizes, bad, special_counts, rows.ended)

    def _encode_line(self, line: bytes | None) -> list[np.ndarray]:
        """Ids of each field of a line, [tokens]; BadRow with the reason if it is not a good row."""
        texts = parse_row(line, self.keys)
        encoded = [self.tokenizer.encode_batch([texts.pop(0)])[0] for _ in self.keys]
        if empty := [names[0] for names, ids in zip(self.keys, encoded, strict=True) if not len(ids)]:
            raise BadRow(f"{empty[0]!r} has no tokens")
        return encoded
