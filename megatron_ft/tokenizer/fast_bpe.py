"""Byte-level BPE in C++ (`bpe.cpp`): the ids of the `tokenizers` library, many times faster.

`FastBPE.build(spec, reference, dtype)` takes a parsed tokenizer.json and the `tokenizers.Tokenizer`
made from it. It raises `CannotExpress` with the reason if the two might differ:
- Pre-tokenization must be GPT-2's byte level, optionally after splitting digits one by one
  (StarCoder's).
- Every merge must be of tokens that earlier merges make, and none may make a token again.
- The code points that start and end each class (letters, digits, white space) and hard cases
  (`HARD_CASES`) are encoded both ways; a caller can do the same with its data (`differs`).

Versions of Unicode disagree on newer code points only. The class of one is found by trying it out
on the library when a text has it.
"""

import re
from typing import TYPE_CHECKING

import numpy as np

from megatron_ft.tokenizer import _bpe

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend

MISSING = 0xFFFFFFFF  # the id of a byte that a vocabulary does not have

HARD_CASES = [
    "",
    " ",
    "  ",
    "\n",
    " \n \n\n\t \t\t \r\n  x",
    "a  1  2   b\t\t3\n\n4 \n 5",
    "x  'sy 's 't 're 've 'm 'll 'd 'S don't I'LL''s1's",
    "0123456789 3.14 1e-5 0x1F ½ ² ٣ Ⅷ 一二三",
    " Hello, World!!  ---- ====== ######\n/* x */ {}[]();",
    "def f(x):\n    return x ** 2  # comment\n\n\nclass A:\n\tpass\n",
    "нещо на Български កាន់តែពិសេស 我想在apple工作1314151天～ Cửa Việt Äpfel",
    "e\u0301 \u200b \u00a0x\u3000y \u2028z\u0085w \ufeff \u1680\u180e\u202f",
    "🚀 😶‍🌫️ ✅ 🦙🦙 👩‍👩‍👧 🇩🇪 \U0001faf0 \U0001fae8",
    "\x00\x01\x1c\x1d\x1e\x1f\x7f \x0b\x0c|",
    "a" * 300 + " " * 300 + "=" * 300 + "\n" * 300,
    "\U00040000 \U0010ffff \ue000 \u0378",
    # letters and digits of Unicode 14 to 17
    "\u0870 \u1df5 \U00011f00 \U0001e4d0 \U00010d40 \U00011bc0 \u1c89 \U00011de0 \U00016ff4",
]


class CannotExpress(ValueError):
    """FastBPE cannot encode like this tokenizer; the message is the reason."""


def byte_alphabet() -> dict[str, int]:
    """GPT-2's map of characters in byte-level vocabularies to bytes: printable characters stand for
    themselves, those from U+0100 for the other bytes.

    >>> alphabet = byte_alphabet()
    >>> alphabet["a"], alphabet["\u0120"]
    (97, 32)
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(b): b for b in printable} | {chr(0x100 + i): b for i, b in enumerate(others)}


def class_edges() -> list[tuple[str, str]]:
    """The classes of code points, in order: the first and the last character of each run of one,
    without surrogates and those whose class is not known."""
    edges, start = [], 0
    for length, name in re.findall(r"(\d+)([A-Z])", _bpe.CODE_POINT_RUNS):
        if name != "U":
            edges.append((chr(start), chr(start + int(length) - 1)))
        start += int(length)
    return [(first, last) for first, last in edges if not any("\ud800" <= c < "\ue000" for c in (first, last))]


class FastBPE:
    """Encoder of one tokenizer.json; made by `build`, equal to its reference.

    encoder: its C++ part, for all threads. It leaves texts to the caller that have a code point
    whose class is not known.
    """

    def __init__(self, encoder: "_bpe.Encoder16 | _bpe.Encoder32", dtype: np.dtype, reference: "Backend", digits: bool):
        self.encoder = encoder
        self._dtype = dtype
        self._reference = reference
        self._digits = digits

    @classmethod
    def build(cls, spec: dict, reference: "Backend", dtype: np.dtype) -> "FastBPE":
        """The encoder of a parsed tokenizer.json `spec`, whose ids are of `dtype`.

        `reference` is the tokenizers.Tokenizer of the same file. Raises CannotExpress.
        """
        digits, merges = _splits_digits(spec), _merges_of(spec)
        vocab = spec["model"]["vocab"]
        symbols = byte_alphabet()
        ids = [MISSING] * len(symbols)
        for character, byte in symbols.items():
            ids[byte] = vocab.get(character, MISSING)
        pairs: list[int] = []  # two per merge
        for left, right in merges:
            made, symbol = left + right, len(ids)
            try:
                pairs += symbols[left], symbols[right]
            except KeyError:
                raise CannotExpress(f"the merge of {left!r} and {right!r} comes before those that make them") from None
            if symbols.setdefault(made, symbol) != symbol:
                raise CannotExpress(f"two merges make the token {made!r}")
            ids.append(vocab[made])
        specials = [(token["content"].encode(), token["id"]) for token in spec["added_tokens"]]
        make = _bpe.Encoder16 if dtype.itemsize == 2 else _bpe.Encoder32
        try:
            encoder = cls(
                make(np.array(pairs, np.uint32).reshape(-1, 2), ids, digits, specials), dtype, reference, digits
            )
        except ValueError as reason:
            raise CannotExpress(str(reason)) from None
        names = [token["content"] for token in spec["added_tokens"]]
        edges = [f"a{first}{last}b {first} !{last}1" for first, last in class_edges()]
        if different := encoder.differs([*HARD_CASES, *names, "x ".join(names) + " 1", *edges]):
            raise CannotExpress(f"its ids differ on {different[0][:60]!r}")
        return encoder

    def encode(self, text: str) -> np.ndarray:
        """Ids [tokens] of one text; special tokens spelled out in it are parsed."""
        data = text.encode()
        while isinstance(ids := self.encoder.encode(data), int):
            if (name := self._class_of(chr(ids))) is None:
                return self._by_reference([text])[0]
            self.encoder.set_class(ids, name)
        return np.frombuffer(ids, self._dtype)

    def differs(self, texts: list[str]) -> list[str]:
        """The texts that the reference encodes differently; normally none."""
        expected = self._by_reference(texts)
        return [text for text, ids in zip(texts, expected, strict=True) if not np.array_equal(self.encode(text), ids)]

    def _by_reference(self, texts: list[str]) -> list[np.ndarray]:
        encoded = self._reference.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(one.ids, self._dtype) for one in encoded]

    def _class_of(self, c: str) -> str | None:
        """The class of a character in the library's version of Unicode, as in CODE_POINT_RUNS; None
        if it is none of them."""

        def pieces(text: str) -> int:
            return len(self._reference.pre_tokenizer.pre_tokenize_str(text))

        if pieces(f"a{c}a") == 1:
            return "L"
        if (pieces(f"{c}{c}"), pieces(f" {c}")) == (2, 2) if self._digits else pieces(f"1{c}1") == 1:
            return "N"
        if pieces(f"!{c}!") == 1:
            return "O"
        return "S" if pieces(f" {c} ") == 1 else None


def _splits_digits(spec: dict) -> bool:
    """Whether the pre-tokenizer of a tokenizer.json takes digits one by one; CannotExpress if it,
    the normalizer or an added token is of another kind than GPT-2's or StarCoder's."""
    if spec.get("normalizer"):
        raise CannotExpress(f"it has a normalizer ({spec['normalizer'].get('type')})")
    for token in spec["added_tokens"]:
        if token["single_word"] or token["lstrip"] or token["rstrip"] or token["normalized"]:
            raise CannotExpress(f"its token {token['content']!r} has special matching rules")
    steps = spec.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    if not steps:
        raise CannotExpress("its pre-tokenizer has no steps")
    kinds = [step.get("type") for step in steps]
    byte_level = steps[-1]
    if kinds[-1] != "ByteLevel" or byte_level.get("add_prefix_space") or not byte_level.get("use_regex", True):
        raise CannotExpress(f"its pre-tokenizer is {' + '.join(map(str, kinds))}, not plain byte level")
    if kinds == ["ByteLevel"]:
        return False
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return True
    raise CannotExpress(f"its pre-tokenizer is {' + '.join(map(str, kinds))}")


def _merges_of(spec: dict) -> list[tuple[str, str]]:
    """The merge list of a plain BPE model; CannotExpress if the model is of another kind."""
    model = spec["model"]
    if model.get("type") != "BPE":
        raise CannotExpress(f"its model is {model.get('type')}, not BPE")
    for option in (
        "dropout",
        "unk_token",
        "continuing_subword_prefix",
        "end_of_word_suffix",
        "byte_fallback",
        "ignore_merges",
    ):
        if model.get(option):
            raise CannotExpress(f"its BPE model sets {option}")
    pairs = (merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"])
    return [(left, right) for left, right in pairs]
