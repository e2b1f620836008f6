"""Blocks of plain texts as token ids: all tokens are targets, and there are no inputs.

Some of the texts are rearranged for fill-in-the-middle (arXiv 2207.14255), as StarCoder was trained
and in BigCode's Megatron-LM (megatron/data/gpt_dataset.py, `permute`): a text is cut at two
characters, each position equally likely, and its middle comes last, so that the model learns to
write it when it has read what is around it.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.files.jsonl import Block
from megatron_ft.files.jsonl_row import BadRow, parse_row
from megatron_ft.tokenizer.kinds import Tokenizer
from megatron_ft.tokenizing.row_encoder import Encoded

# The tokens before each part of a text: of StarCoder, and of SantaCoder.
FIM_TOKENS = (
    ("<fim_prefix>", "<fim_middle>", "<fim_suffix>"),
    ("<fim-prefix>", "<fim-middle>", "<fim-suffix>"),
)


@dataclass(frozen=True)
class FillInTheMiddle:
    """Which texts are rearranged, and how: the ids of the tokens before the parts of a text, the
    fraction `rate` of texts, and the fraction `spm_rate` of these in the order suffix, prefix,
    middle (SPM, the second variant of the paper) instead of prefix, suffix, middle (PSM)."""

    prefix: int
    middle: int
    suffix: int
    rate: float
    spm_rate: float
    seed: int

    @classmethod
    def of(cls, tokenizer: Tokenizer, rate: float, spm_rate: float, seed: int) -> "FillInTheMiddle":
        """With the tokens of a tokenizer; UserError if it has none."""
        for names in FIM_TOKENS:
            if tokenizer.special_ids.keys() >= set(names):
                prefix, middle, suffix = (tokenizer.special_ids[name] for name in names)
                return cls(prefix, middle, suffix, rate, spm_rate, seed)
        raise UserError(
            f"--fim-rate {rate:g}: {tokenizer.path} has no special tokens {' '.join(FIM_TOKENS[0])}; use a tokenizer "
            "that has them, such as StarCoder's, or leave out --fim-rate"
        )

    def arrange(self, text: str) -> list[int | str]:
        """The ids of tokens and the texts between them, in the order in which a model reads them.

        Depends on the text and the seed only, so equal texts are cut alike.

        >>> FillInTheMiddle(1, 2, 3, rate=1, spm_rate=0, seed=4).arrange("abcdef")
        [1, 'ab', 3, 'def', 2, 'c']
        >>> FillInTheMiddle(1, 2, 3, rate=1, spm_rate=1, seed=4).arrange("abcdef")
        [1, 3, 'def', 2, 'ab', 'c']
        """
        digest = hashlib.blake2b(text.encode(), key=b"%d" % self.seed, digest_size=32).digest()
        chosen, spm, *cuts = (int.from_bytes(digest[at : at + 8], "little") for at in range(0, 32, 8))
        if chosen >= self.rate * 2**64:
            return [text]
        start, end = sorted(cut * (len(text) + 1) >> 64 for cut in cuts)
        prefix, middle, suffix = text[:start], text[start:end], text[end:]
        if spm < self.spm_rate * 2**64:
            return [self.prefix, self.suffix, suffix, self.middle, prefix, middle]
        return [self.prefix, prefix, self.suffix, suffix, self.middle, middle]


class TextEncoder:
    """Encodes blocks of lines; one object serves all threads.

    `fim`: how texts are rearranged, None for none.
    """

    def __init__(self, tokenizer: Tokenizer, key: str, append_eod: bool, fim: FillInTheMiddle | None = None):
        self.tokenizer, self.key, self.fim = tokenizer, key, fim
        self.special_ids = np.array(list(tokenizer.special_ids.values()), np.int64)
        self.dtypes = [tokenizer.dtype, tokenizer.dtype]
        self._ending: list[int] = [tokenizer.eod] if append_eod else []

    def texts_of(self, line: bytes | None) -> list[str]:
        """The text of a line; BadRow with the reason if it is not a good row."""
        return parse_row(line, [[self.key]])

    def encode(self, block: Block) -> Encoded:
        """Encode the good rows of a block."""
        pieces: list[np.ndarray] = []
        lengths: list[int] = []
        bad: list[tuple[int, str]] = []
        added: list[int] = []  # tokens that are not in the texts
        ended = 0
        for i, line in block.rows():
            try:
                (text,) = self.texts_of(line)
                parts: list[int | str] = self.fim.arrange(text) if self.fim else [text]
                texts = self.tokenizer.encode_batch([part for part in parts if isinstance(part, str)])
                if not any(map(len, texts)):
                    raise BadRow(f"{self.key!r} has no tokens")
            except BadRow as reason:
                bad.append((i, str(reason)))
                continue
            ended += bool(self._ending) and bool((texts[-1][-1:] == self.tokenizer.eod).any())
            encoded = iter(texts)
            parts += self._ending
            document = [next(encoded) if isinstance(part, str) else self._ids([part]) for part in parts]
            pieces += document
            lengths.append(sum(map(len, document)))
            added += (part for part in parts if isinstance(part, int))
        targets = np.concatenate([self._ids([]), *pieces])
        sizes = np.array(lengths, np.int32)
        special_counts = self._count_specials(targets) - self._count_specials(self._ids(added))
        return Encoded([b"", targets.tobytes()], [np.zeros_like(sizes), sizes], bad, special_counts, ended)

    def _ids(self, ids: Sequence[int]) -> np.ndarray:
        return np.array(ids, self.tokenizer.dtype)

    def _count_specials(self, ids: np.ndarray) -> np.ndarray:
        """int64 [special tokens], how often each occurs in `ids`."""
        counts = np.zeros_like(self.special_ids)
        for start in range(0, len(ids), 1 << 20):
            counts += np.bincount(ids[start : start + (1 << 20)], minlength=self.tokenizer.vocab_size)[self.special_ids]
        return counts
