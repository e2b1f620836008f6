"""Blocks of JSONL rows as token ids: the inputs and outputs of each row."""

from dataclasses import dataclass
from itertools import islice

import numpy as np

from megatron_ft.files.jsonl import Block
from megatron_ft.files.jsonl_row import BadRow, parse_row
from megatron_ft.tokenizer.kinds import Tokenizer

SAMPLE_ROWS = 64  # rows of the data on which the fast encoder is checked against the reference
SAMPLE_BYTES = 1 << 18  # longer lines are left out of that sample


@dataclass(frozen=True)
class Encoded:
    """The result of encoding one block of rows. The fields of a row are its inputs, its
    outputs and, of conversations, marks of the learned outputs."""

    data: list[bytes]  # per field: the token ids of all rows
    sizes: list[np.ndarray]  # per field: int32 [rows], tokens of each row
    bad: list[tuple[int, str]]  # index in the block and reason of each bad row
    special_counts: np.ndarray  # int64 [special tokens], how often the texts spelled each one out
    ended: int  # outputs that ended with an end-of-text token before one was appended


class RowEncoder:
    """Encodes blocks of lines; one object serves all threads.

    `keys` lists, for inputs and for outputs, the names their key may have.
    """

    def __init__(self, tokenizer: Tokenizer, keys: list[list[str]], append_eod: bool):
        self.tokenizer, self.keys, self.append_eod = tokenizer, keys, append_eod
        self.dtype = tokenizer.dtype
        self.dtypes = [self.dtype, self.dtype]
        self.special_ids = np.array(list(tokenizer.special_ids.values()), np.int64)
        eod = np.array([tokenizer.eod], self.dtype).tobytes() if append_eod else b""
        self.endings = [b"", eod]  # per field: bytes to append to each row

    def check_fast_encoder(self, block: Block) -> None:
        """Compare the fast encoder with the reference on the first rows of the data.

        If they differ, the reference is used and `tokenizer.notices` has the reason.
        """
        self.tokenizer.encode("")
        texts: list[str] = []
        for _, line in islice(block.rows(), SAMPLE_ROWS):
            try:
                texts += parse_row(line, self.keys) if line is not None and len(line) < SAMPLE_BYTES else []
            except BadRow:
                pass
        self.tokenizer.check_sample(texts)

    def encode(self, block: Block) -> Encoded:
        """Encode the good rows of a block.

        Rows are parsed and freed one at a time, because a single one may have 64 MiB.
        """
        data: tuple[list[bytes | memoryview], ...] = ([], [])
        sizes: tuple[list[int], ...] = ([], [])
        bad: list[tuple[int, str]] = []
        ended = 0
        for i, line in block.rows():
            try:
                texts = parse_row(line, self.keys)
                encoded = [self.tokenizer.encode_batch([texts.pop(0)])[0] for _ in self.keys]
                if empty := [names[0] for names, ids in zip(self.keys, encoded, strict=True) if not len(ids)]:
                    raise BadRow(f"{empty[0]!r} has no tokens")
            except BadRow as reason:
                bad.append((i, str(reason)))
                continue
            for ids, ending, pieces, lengths in zip(encoded, self.endings, data, sizes, strict=True):
                pieces += [ids.data, ending]
                ended += bool(ending) and bool(ids[-1] == self.tokenizer.eod)
                lengths.append(len(ids) + len(ending) // self.dtype.itemsize)
        joined = [b"".join(pieces) for pieces in data]
        special_counts = sum(map(self._count_specials, joined), start=np.zeros_like(self.special_ids))
        if self.append_eod:
            special_counts[self.special_ids == self.tokenizer.eod] -= len(sizes[1])
        return Encoded(joined, [np.array(lengths, np.int32) for lengths in sizes], bad, special_counts, ended)

    def _count_specials(self, data: bytes) -> np.ndarray:
        """int64 [special tokens], how often each occurs in `data`."""
        counts = np.zeros_like(self.special_ids)
        ids = np.frombuffer(data, self.dtype)
        for start in range(0, len(ids), 1 << 20):
            counts += np.bincount(ids[start : start + (1 << 20)], minlength=self.tokenizer.vocab_size)[self.special_ids]
        return counts
