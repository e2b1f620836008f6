"""MinHash: which texts of many share most of their shingles, without comparing all pairs.

A shingle is SHINGLE consecutive words; a word is a run of letters, digits, underscores and bytes
beyond ASCII, as in BigCode's deduplication (arXiv 2301.03988). The similarity of two texts is the
Jaccard index of their sets of shingles, each a hash of 64 bits.

A signature is PERMUTATIONS minima of hashes of the shingles; the fraction in which two texts agree
estimates their similarity. Texts that agree in one of BANDS bands of BAND minima are candidates:
99.99% of the pairs of similarity 0.85, 98% at 0.75, 28% at 0.5, 2% at 0.3.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np

from megatron_ft.extras import require

SHINGLE = 5  # words
PERMUTATIONS = 128  # of which 126 are used
BANDS, BAND = 21, 6
SEED = 1

BLOCK_BYTES = 1 << 17  # of text that is hashed at a time, in arrays of eight times this size
# For bytes.translate: 1 for a byte of a word, 0 for others.
IS_WORD = bytes(bytes([byte]).isalnum() or byte == ord("_") or byte >= 0x80 for byte in range(256))
BASE = 0x9E3779B97F4A7C15  # of the polynomial over the bytes of a word; odd, so that it has an inverse
WORD_BASE = 0xC2B2AE3D27D4EB4F  # of the polynomial over the words of a shingle
MASK = (1 << 64) - 1


def method() -> str:
    """What signatures depend on; those of different methods are not comparable."""
    version = require("rensa", "dataset").RMinHash.ALGORITHM_VERSION
    return f"{SHINGLE}-word shingles, rensa's RMinHash {version}, {BANDS} bands of {BAND} of {PERMUTATIONS}"


def shingles(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of the shingles of each text, with repetitions: those of texts[i] are
    hashes[offsets[i] : offsets[i + 1]].

    A text of fewer than SHINGLE words has one shingle, one without words has none. Returns hashes,
    uint64 [s], and offsets, int64 [len(texts) + 1].
    """
    words, counts = _words(texts)
    ends = np.cumsum(counts)
    hashes = np.zeros(len(words), np.uint64)
    for i in range(min(SHINGLE, len(words))):
        hashes *= np.uint64(WORD_BASE)
        hashes[: len(words) - i] += words[i:]
    inside = np.arange(SHINGLE, len(words) + SHINGLE) <= np.repeat(ends, counts)
    for text in np.flatnonzero((counts > 0) & (counts < SHINGLE)):
        start, value = ends[text] - counts[text], 0
        for word in words[start : ends[text]].tolist():
            value = (value * WORD_BASE + word) & MASK
        hashes[start], inside[start] = value, True
    kept = np.maximum(counts - SHINGLE + 1, np.minimum(counts, 1))
    return _mixed(hashes[inside]), np.concatenate([[0], np.cumsum(kept)])


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Jaccard index of two sets of shingles, each ascending and without repetitions."""
    if not len(a) or not len(b):
        return 0.0
    both = np.sort(np.concatenate([a, b]))
    common = int(np.count_nonzero(both[1:] == both[:-1]))
    return common / (len(both) - common)


def bands(texts: Sequence[str]) -> list[list[int]]:
    """The hashes of the BANDS bands of each text's signature; [] for a text without words."""
    hashes, offsets = shingles(texts)
    rensa = require("rensa", "dataset")
    matrix = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, num_perm=PERMUTATIONS, seed=SEED)
    signatures = np.array(matrix.to_rows(), np.uint32).reshape(len(texts), PERMUTATIONS)
    hashed = np.zeros((len(texts), BANDS), np.uint64)
    for i in range(BAND):
        hashed = _mixed(hashed * np.uint64(BASE) + signatures[:, i : BANDS * BAND : BAND])
    return [row if some else [] for row, some in zip(hashed.tolist(), np.diff(offsets).tolist(), strict=True)]


def _mixed(hashes: np.ndarray) -> np.ndarray:
    """Hashes of which each bit depends on all bits (the finalizer of MurmurHash3)."""
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    hashes = (hashes ^ (hashes >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    return hashes ^ (hashes >> np.uint64(33))


def _words(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words of all texts, uint64 [w], and the number of words of each text, int64
    [len(texts)]."""
    counts = np.zeros(len(texts), np.int64)
    found = [np.empty(0, np.uint64)]
    for block in _blocks(texts):
        hashes, starts = _hash_words(b"".join(piece + b"\n" for _, piece in block))
        ends = np.searchsorted(starts, np.cumsum([len(piece) + 1 for _, piece in block]))
        np.add.at(counts, [text for text, _ in block], np.diff(ends, prepend=0))
        found.append(hashes)
    return np.concatenate(found), counts


def _blocks(texts: Sequence[str]) -> Iterator[list[tuple[int, bytes]]]:
    """The texts in order as (number of the text, piece), at most BLOCK_BYTES of pieces at a time. A
    longer text is cut at line ends, if it has any."""
    block: list[tuple[int, bytes]] = []
    size = 0
    for number, text in enumerate(texts):
        data, start = text.encode("utf-8", "replace"), 0
        while start < len(data):
            stop = start + BLOCK_BYTES
            if stop < len(data):
                stop = data.rfind(b"\n", start, stop) + 1 or stop
            piece = data[start:stop]
            if size + len(piece) > BLOCK_BYTES and block:
                yield block
                block, size = [], 0
            block.append((number, piece))
            size += len(piece)
            start = stop
    if block:
        yield block


def _hash_words(data: bytes) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of the words in `data`, uint64 [w], and the bytes at which they start, int64 [w].

    The hash of a word is the polynomial over its bytes, a difference of sums over all bytes before.
    """
    data = b"\n" + data  # so that both ends are outside a word
    powers, inverses = _powers(1 << len(data).bit_length())
    is_word = np.frombuffer(data.translate(IS_WORD), np.uint8)
    edges = np.flatnonzero(is_word[1:] != is_word[:-1])  # before a word, and its last byte
    before, last = edges[::2], edges[1::2]
    terms = np.frombuffer(data, np.uint8).astype(np.uint64)
    terms *= powers[: len(data)]
    sums = np.cumsum(terms, out=terms)
    return (sums[last] - sums[before]) * inverses[before], before


@lru_cache(maxsize=2)
def _powers(count: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and its inverse modulo 2^64 for i below `count`, uint64 [count] each."""
    bases = np.full((2, count), [[BASE], [pow(BASE, -1, 1 << 64)]], np.uint64)
    bases[:, 0] = 1
    powers = np.cumprod(bases, axis=1, dtype=np.uint64)
    return powers[0], powers[1]
