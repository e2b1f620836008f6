"""Blocks of JSONL rows as token ids: the inputs and outputs of each row."""

from dataclasses import dataclass

import numpy as np

from megatron_ft.files.jsonl import Block
from megatron_ft.files.jsonl_row import BadRow, parse_row
from megatron_ft.tokenizer._bpe import Rows16, Rows32
from megatron_ft.tokenizer.kinds import Tokenizer


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

    def texts_of(self, line: bytes | None) -> list[str]:
        """The text of each field of a line; BadRow with the reason if it is not a good row."""
        return parse_row(line, self.keys)

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
        texts = self.texts_of(line)
        # Each text is freed once it is encoded.
        encoded = [self.tokenizer.encode_batch([texts.pop(0)])[0] for _ in self.keys]
        if empty := [names[0] for names, ids in zip(self.keys, encoded, strict=True) if not len(ids)]:
            raise BadRow(f"{empty[0]!r} has no tokens")
        return encoded
