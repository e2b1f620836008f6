"""Which tokens of a text overlap given characters of it: `SpanEncoder`.

A byte-level tokenizer's tokens are the bytes of the text, so their lengths tell where each token
is, and the fast encoder can be used. Others are encoded by the `tokenizers` library, which keeps
the offsets. Both give what transformers' return_assistant_tokens_mask has.
"""

import json
from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_ft.errors import UserError
from megatron_ft.tokenizer.fast_bpe import byte_alphabet
from megatron_ft.tokenizer.kinds import JsonTokenizer, Tokenizer
from megatron_ft.tokenizer.spec import Spec
from megatron_ft.tokenizer.tokenizer import SAVE_AS_JSON


class SpanEncoder:
    """Encodes texts with marks; one object serves all threads.

    Raises UserError for a SentencePiece model, whose tokens transformers splits in its own way.
    """

    def __init__(self, tokenizer: Tokenizer):
        if not isinstance(tokenizer, JsonTokenizer):
            raise UserError(
                f"{tokenizer.path}: conversations need a tokenizer.json; save one with {SAVE_AS_JSON} "
                f"{tokenizer.path.parent} NEW"
            )
        self.tokenizer = tokenizer
        self._lengths = _lengths(tokenizer.spec, tokenizer.vocab_size) if _is_byte_level(tokenizer.spec) else None

    def encode(self, text: str, spans: Sequence[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of a text, [tokens] of the tokenizer's dtype, and whether each overlaps one of the
        spans of characters [start, end), bool [tokens]. Spans are in order and do not overlap."""
        if self._lengths is not None:
            ids = self.tokenizer.encode_batch([text])[0]
            ends = np.cumsum(self._lengths[ids])
            edges = _byte_offsets(text, [edge for span in spans for edge in span])
            if (ends[-1] if len(ends) else 0) == edges.pop():
                return ids, _marks(np.concatenate([[0], ends[:-1]]), ends, edges)
        ids, starts, ends = self.tokenizer.encode_with_offsets(text)
        return ids, _marks(starts, ends, [edge for span in spans for edge in span])


def _is_byte_level(spec: Spec) -> bool:
    """Whether the tokens of a tokenizer.json are the bytes of a text, with offsets that are too."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    last = steps[-1] if steps else {}
    trims = '"trim_offsets": true' in json.dumps(spec.get("post_processor"))  # leaves spaces out of offsets
    return (
        spec["model"].get("type") == "BPE"
        and not spec.get("normalizer")
        and last.get("type") == "ByteLevel"
        and not last.get("add_prefix_space")
        and not trims
    )


def _lengths(spec: Spec, vocab_size: int) -> np.ndarray:
    """Bytes of the text that each token stands for, int64 [vocab_size]; -1 if unknown."""
    alphabet = byte_alphabet().keys()
    lengths = np.full(vocab_size, -1, np.int64)
    for token, i in spec["model"]["vocab"].items():
        if alphabet >= set(token):
            lengths[i] = len(token)
    for token in spec["added_tokens"]:
        lengths[token["id"]] = len(token["content"].encode())
    return lengths


def _byte_offsets(text: str, edges: list[int]) -> list[int]:
    """Where characters start in the UTF-8 of a text, in order, and at last its length.

    >>> _byte_offsets("aé|b", [1, 2])
    [1, 3, 5]
    """
    edges = [*edges, len(text)]
    if text.isascii():
        return edges
    pieces = (len(text[start:end].encode()) for start, end in pairwise([0, *edges]))
    return np.cumsum(np.fromiter(pieces, np.int64)).tolist()


def _marks(starts: np.ndarray, ends: np.ndarray, edges: Sequence[int]) -> np.ndarray:
    """bool [tokens], whether a token overlaps one of the spans with these starts and ends in turn.

    >>> _marks(np.array([0, 2, 4]), np.array([2, 4, 6]), [1, 2, 5, 6]).tolist()
    [True, False, True]
    """
    marks = np.zeros(len(starts), bool)
    firsts = np.searchsorted(ends, edges[::2], "right")
    stops = np.searchsorted(starts, edges[1::2], "left")
    for first, stop in zip(firsts.tolist(), stops.tolist(), strict=True):
        marks[first:stop] = True
    return marks
