"""Byte-level BPE with tiktoken's core: the ids of the `tokenizers` library, several times faster.

`FastBPE.build(spec, reference, dtype)` takes a parsed tokenizer.json and the `tokenizers.Tokenizer`
made from it. It raises `CannotExpress` with the reason if the two might differ:
- Pre-tokenization must be GPT-2's byte level, optionally after splitting digits one by one
  (StarCoder's). Either is a single regex for tiktoken.
- tiktoken merges every adjacent pair whose concatenation is in its table, BPE only the pairs in its
  merge list. They agree if merges are listed in the order of their ranks, no two merges make the
  same token, and every token's text is encoded as that token: then a pair that tiktoken merges into
  X is a state that BPE passes through to X as well. All three are checked on the vocabulary.
- The libraries may use different versions of Unicode, so a text with a code point that Python's
  tables lack is encoded by `tokenizers`.
- Hard cases (`HARD_CASES`) are encoded both ways; a caller can do the same with its data
  (`differs`).

To bound memory, long texts are cut at certain boundaries between pre-tokens, and single long
pre-tokens are encoded window by window.
"""

import re
import sys
import unicodedata
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from tiktoken._tiktoken import CoreBPE
    from tokenizers import Tokenizer as Backend

BYTE_LEVEL = r"'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# Single digits come first. White space before a digit ends a segment, so all of it is one piece.
DIGITS_BYTE_LEVEL = r"\p{N}|'(?:[stmd]|re|ve|ll)| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"

PUNCTUATION = r"!-/:-@\[-`{-~"
# Where ASCII text can be cut without changing its pre-tokens under either pattern: before white
# space, between a letter and punctuation after it, and before the last of several spaces that
# precede a word.
CUT = re.compile(
    rf"(?<=[!-~])(?=[ \t\r\n])|(?<=[A-Za-z])(?=[{PUNCTUATION}])|(?<=[ \t\r\n])(?=[ \t\r\n][A-Za-z{PUNCTUATION}])"
)
ONE_PIECE = re.compile(r" ?[A-Za-z]+| ?[!-&(-/:-@\[-`{-~]+|[ \t\r\n]+")
LONG_TEXT = 1 << 20  # characters per call; tiktoken needs about 46 bytes per byte of one pre-token
WINDOW = 1 << 18  # bytes per call of a single long pre-token
OVERLAP = 256  # tokens at the end of a window that are encoded again with the next window

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


def unassigned_code_points() -> np.ndarray:
    """bool [0x110000], the code points that Python's Unicode tables lack.

    To save time only planes with characters are looked up: empty planes count as unassigned, the
    private planes, which never change, as assigned.
    """
    unassigned = np.ones(sys.maxunicode + 1, bool)
    unassigned[0xF0000:] = False
    for start, stop in ((0, 0x40000), (0xE0000, 0xE1000)):
        unassigned[start:stop] = [
            category == "Cn" for category in map(unicodedata.category, map(chr, range(start, stop)))
        ]
    return unassigned


class FastBPE:
    """Encoder of one tokenizer.json; made by `build`, equal to its reference."""

    def __init__(self, core: "CoreBPE", ids: np.ndarray, reference: "Backend", specials: dict[str, int]):
        """`ids` [ranks]: the id of each of tiktoken's ranks; the dtype's maximum for a byte not in
        the vocabulary."""
        self._core = core
        self._ids = ids
        self._none = np.iinfo(ids.dtype).max
        self._lacks_bytes = bool((ids == self._none).any())
        self._reference = reference
        self._specials = specials
        longest_first = sorted(specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if specials else None
        self._unassigned = unassigned_code_points()

    @classmethod
    def build(cls, spec: dict, reference: "Backend", dtype: np.dtype) -> "FastBPE":
        """The encoder of a parsed tokenizer.json `spec`, whose ids are of `dtype`.

        `reference` is the tokenizers.Tokenizer of the same file. Raises CannotExpress, or
        ImportError without tiktoken.
        """
        # Only the Rust core: tiktoken's Python layer is about downloading vocabularies.
        from tiktoken._tiktoken import CoreBPE

        pattern, merges = _pattern_of(spec), _merges_of(spec)
        vocab, alphabet = spec["model"]["vocab"], byte_alphabet()
        ranks = {bytes([byte]): byte for byte in range(256)}
        none = np.iinfo(dtype).max
        ids = [none] * 256
        for character, byte in alphabet.items():
            ids[byte] = vocab.get(character, none)
        to_bytes = {c: "\uffff" for c in range(256)} | {ord(c): byte for c, byte in alphabet.items()}
        model = reference.model
        for left, right in merges:
            token = left + right
            try:
                data = token.translate(to_bytes).encode("latin-1")
            except UnicodeEncodeError:
                raise CannotExpress(f"token {token!r} is not made of byte-level characters") from None
            if data in ranks:
                raise CannotExpress(f"two merges make the token {token!r}")
            if [t.value for t in model.tokenize(token)] != [token]:
                raise CannotExpress(f"the text of token {token!r} is not encoded as that token")
            ranks[data] = len(ids)
            ids.append(vocab[token])
        specials = {token["content"]: token["id"] for token in spec["added_tokens"]}
        # Without special tokens the core searches for an empty one at every character, at half the
        # speed. `_call` allows none of them, so text that contains this one is encoded as text.
        core = CoreBPE(ranks, {"\uffff": len(ranks)}, pattern)
        encoder = cls(core, np.array(ids, dtype), reference, specials)
        if different := encoder.differs([*HARD_CASES, *specials, "x ".join(specials) + " 1"]):
            raise CannotExpress(f"its ids differ on {different[0][:60]!r}")
        return encoder

    def encode(self, text: str) -> np.ndarray:
        """Ids [tokens] of one text; special tokens spelled out in it are parsed."""
        if self._special is None or not self._special.search(text):
            return self._ordinary(text)
        parts, start = [], 0
        for match in self._special.finditer(text):
            parts += [
                self._ordinary(text[start : match.start()]),
                np.array([self._specials[match[0]]], self._ids.dtype),
            ]
            start = match.end()
        return np.concatenate([*parts, self._ordinary(text[start:])])

    def differs(self, texts: list[str]) -> list[str]:
        """The texts that the reference encodes differently; normally none."""
        return [text for text in texts if not np.array_equal(self.encode(text), self._by_reference(text))]

    def _by_reference(self, text: str) -> np.ndarray:
        return np.array(self._reference.encode(text, add_special_tokens=False).ids, self._ids.dtype)

    def _ordinary(self, text: str) -> np.ndarray:
        """Ids of a text without special tokens; a long one is cut into calls of bounded size."""
        if len(text) <= LONG_TEXT:
            return self._call(text)
        parts, start = [], 0
        while start < len(text):
            end = _cut(text, start)
            piece = text[start:end]
            parts.append(
                self._ids_of(self._one_piece(piece.encode()), piece)
                if len(piece) > LONG_TEXT and ONE_PIECE.fullmatch(piece)
                else self._call(piece)
            )
            start = end
        return np.concatenate(parts)

    def _call(self, text: str) -> np.ndarray:
        if not text.isascii() and self._unassigned[np.frombuffer(text.encode("utf-32-le"), np.uint32)].any():
            return self._by_reference(text)
        try:
            ranks = np.frombuffer(self._core.encode_to_tiktoken_buffer(text, set()), np.uint32)
        except ValueError:  # about 500,000 spaces in a row overflow the regex engine's stack
            return self._by_reference(text)
        return self._ids_of(ranks, text)

    def _ids_of(self, ranks: np.ndarray, text: str) -> np.ndarray:
        ids = self._ids[ranks]
        if self._lacks_bytes and len(ids) and ids.max() == self._none:
            # The reference drops the unknown byte and merges its neighbors.
            return self._by_reference(text)
        return ids

    def _one_piece(self, piece: bytes) -> np.ndarray:
        """Ranks of one long pre-token, window by window.

        A sequence of tokens is the BPE encoding if every two neighbors are the encoding of their
        bytes. So two windows can be joined within two adjacent tokens that both have at the same
        bytes.
        """
        done: list[np.ndarray] = []
        start = 0  # bytes in `done`
        carried = np.zeros(0, np.uint32)  # tokens after `done` found by the last window
        while True:
            window = piece[start : start + WINDOW]
            tokens = np.array(self._core.encode_single_piece(window), np.uint32)
            if len(carried):
                joint = _joint(self._lengths(carried), self._lengths(tokens), carried, tokens)
                if joint is None:  # never observed; encoding the piece in one call is always right
                    return np.array(self._core.encode_single_piece(piece))
                ours, theirs = joint
                tokens = np.concatenate([carried[:ours], tokens[theirs:]])
            if start + WINDOW >= len(piece):
                return np.concatenate([*done, tokens])
            keep = max(1, len(tokens) - OVERLAP)
            done.append(tokens[:keep])
            start += int(self._lengths(tokens[:keep]).sum())
            carried = tokens[keep:]

    def _lengths(self, ranks: np.ndarray) -> np.ndarray:
        return np.array([len(self._core.decode_single_token_bytes(int(r))) for r in ranks], np.int64)


def _joint(
    our_lengths: np.ndarray, their_lengths: np.ndarray, ours: np.ndarray, theirs: np.ndarray
) -> tuple[int, int] | None:
    """Indices (i, j) such that `ours[:i]` continues with `theirs[j:]`: the tokens on both sides of
    the joint are the same in both, at the same bytes. Lengths are in bytes."""
    starts = {int(start): j for j, start in enumerate(np.cumsum(their_lengths) - their_lengths)}
    for i, start in enumerate(np.cumsum(our_lengths) - our_lengths):
        j = starts.get(int(start))
        if (
            j
            and i
            and ours[i] == theirs[j]
            and ours[i - 1] == theirs[j - 1]
            and int(our_lengths[i - 1]) == int(their_lengths[j - 1])
        ):
            return i, j
    return None


def _cut(text: str, start: int) -> int:
    """The end of the next slice of `text` to encode: the last certain boundary within LONG_TEXT
    characters, or else the first one after them."""
    end = start + LONG_TEXT
    if end >= len(text):
        return len(text)
    for back in (1 << 8, 1 << 14, LONG_TEXT):
        cuts = [match.start() for match in CUT.finditer(text, max(start + 1, end - back), end)]
        if cuts:
            return cuts[-1]
    match = CUT.search(text, end)
    return match.start() if match else len(text)


def _pattern_of(spec: dict) -> str:
    """The pre-tokenizer of a tokenizer.json as one regex; CannotExpress if it, the normalizer or an
    added token is of another kind."""
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
        return BYTE_LEVEL
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return DIGITS_BYTE_LEVEL
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
