"""The documents of a tokenized dataset: `PREFIX_inputs_document`, `PREFIX_targets_document` and, of
conversations, `PREFIX_learned_document`.

Sequence i of each belongs to document i: what the model reads first, and what follows from the
first token that it learns. Every target token is learned unless there is a third pair of files,
which has one byte per target token: 1 if it is learned, 0 for the turns of others.
"""

import hashlib
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_ft.data.indexed import CHUNK, MASK, IndexedReader, field_paths, learned_path
from megatron_ft.data.provenance import Provenance
from megatron_ft.errors import UserError

AGAIN = "make all of its files again in one run of preprocess/tokenize.py"


class TokenizedDocuments:
    """The fields of a dataset: `inputs`, `targets` and `learned`, the latter None if every target
    token is learned.

    Raises UserError if a file is missing or damaged, or the fields differ in length.
    """

    def __init__(self, prefix: str):
        self.prefix = prefix
        inputs, targets = field_paths(prefix)
        self.inputs, self.targets = IndexedReader(inputs), IndexedReader(targets)
        if len(self.inputs) != len(self.targets):
            raise UserError(f"{prefix}: {len(self.inputs)} inputs but {len(self.targets)} targets; {AGAIN}")
        self.learned = _learned(prefix, self.targets)

    def __len__(self) -> int:
        return len(self.inputs)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of the lengths of all documents: nothing else in the data affects an index."""
        digest = hashlib.blake2b(digest_size=16)
        for reader in (self.inputs, self.targets):
            digest.update(reader.sizes.data)
        return digest.hexdigest()

    def learned_tokens(self, start: int, stop: int) -> int:
        """The number of learned tokens in documents `start` to `stop`, the latter excluded."""
        if self.learned is None:
            return int(self.targets.sizes[start:stop].sum(dtype=np.int64))
        chunks = (range(first, min(first + CHUNK, stop)) for first in range(start, stop, CHUNK))
        return sum(int(np.count_nonzero(mask)) for chunk in chunks for mask in self.learned.read_many(chunk))


def _learned(prefix: str, targets: IndexedReader) -> IndexedReader | None:
    path = learned_path(prefix)
    if not any(Path(path + suffix).exists() for suffix in (".idx", ".bin")):
        made = Provenance.read(prefix)
        if made is not None and made.marks_learned:
            raise UserError(
                f"{path}.idx: not found, although {prefix} has conversations, of which it marks the learned tokens; "
                f"copy {path}.bin and .idx, too, or {AGAIN}"
            )
        return None
    learned = IndexedReader(path, MASK)
    if not np.array_equal(learned.sizes, targets.sizes):
        raise UserError(f"{path}: marks the tokens of other documents than those in {targets.path}; {AGAIN}")
    return learned
